"""Schedules, preconditioning, samplers: no network in here."""

from . import edm, preconditioning, samplers

__all__ = ["edm", "preconditioning", "samplers"]
