"""Entry point: examine an adapter's files."""

from driftbook.doctors.adapter import examine

__all__ = ["examine"]
