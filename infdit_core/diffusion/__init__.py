"""Schedules, preconditioning, samplers: no network in here."""

from . import edm, samplers

__all__ = ["edm", "samplers"]
