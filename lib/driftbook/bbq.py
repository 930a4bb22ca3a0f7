"""Entry point: load BBQ, have it answered, and score the answers."""

from driftbook.benchmarks.bbq import answers, load
from driftbook.benchmarks.bbq_scores import scores

__all__ = ["answers", "load", "scores"]
