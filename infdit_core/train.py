"""Train Inf-DiT: python -m infdit_core.train CONFIG [CONFIG ...] [key=value ...] [--debug]

CONFIG: nano, infdit, or a YAML file; several merge in order, and key=value wins. All settings with their defaults:
training/config.py. On several devices: torchrun --nproc-per-node N -m infdit_core.train ... Killed at any moment, the
same command goes on from the last save; SIGUSR1 saves, SIGTERM saves and stops. --debug: into the debugger at an error.
"""

import os
import pdb
import sys
from collections.abc import Sequence

STOPPED = 143  # the exit status that shells give SIGTERM


def main(arguments: Sequence[str]) -> int:
    """Entry point: 0 when trained to the last step, 143 when SIGTERM stopped it before.

    Raises ValueError for settings or data that don't make sense, OSError for what can't be read or written.
    """
    try:
        from .training.config import parse
        from .training.loop import train
    except ModuleNotFoundError as error:
        raise ValueError(f"training needs {error.name}: pip install 'inf-dit[train]'") from error
    debug = "--debug" in arguments
    try:
        weights = train(parse([argument for argument in arguments if argument != "--debug"]))
    except Exception:
        if debug and os.environ.get("RANK", "0") == "0":
            pdb.post_mortem()
        raise
    if weights is None:
        return STOPPED
    return 0


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit(0)
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError, ArithmeticError) as error:
        sys.exit(f"infdit: {error}")
