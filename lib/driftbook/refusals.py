"""Entry point: whether a response declines what was asked."""

from driftbook.benchmarks.refusals import is_refusal

__all__ = ["is_refusal"]
