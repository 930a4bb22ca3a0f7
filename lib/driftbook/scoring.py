"""Entry point: score and generate with any base model and adapter."""

from driftbook.models.scoring import Scorer

__all__ = ["Scorer"]
