"""How pictures go bad."""

from .synthesis import degrade, degrade_mildly, smallest_side

__all__ = ["degrade", "degrade_mildly", "smallest_side"]
