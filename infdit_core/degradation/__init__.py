"""How pictures go bad."""

from .synthesis import degrade

__all__ = ["degrade"]
