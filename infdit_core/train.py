"""Train Inf-DiT on a folder of photographs: python -m infdit_core.train photographs=DIR out=DIR [key=value ...]

Settings and their defaults: training/config.py. Killed at any moment, the same command goes on from the last save.
"""

import sys
from collections.abc import Sequence

from .training.config import parse
from .training.loop import train


def main(settings: Sequence[str]) -> int:
    """Entry point. Raises ValueError for settings that don't make sense."""
    print(f"weights: {train(parse(settings))}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"infdit: {error}")
