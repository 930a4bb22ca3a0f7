"""Entry point: repair an adapter with Safe LoRA."""

from driftbook.training.safe_lora import project

__all__ = ["project"]
