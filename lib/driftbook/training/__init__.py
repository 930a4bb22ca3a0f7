"""Make an adapter, repair it, watch it while it trains."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["repairs", "updates"],
    submod_attrs={
        "checkpoints": ["open_checkpoint"],
        "stage": ["prepare_all", "train_variant", "watch"],
        "steps": ["Pair", "example_loss"],
        "training": ["examined", "named"],
    },
)
