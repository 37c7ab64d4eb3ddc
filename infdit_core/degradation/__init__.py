"""How pictures go bad."""

from .synthesis import degrade, smallest_side

__all__ = ["degrade", "smallest_side"]
