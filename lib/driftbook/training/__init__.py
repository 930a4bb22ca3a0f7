"""Make an adapter, repair it, watch it while it trains."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["mitigations", "probes", "repairs", "updates"],
    submod_attrs={
        "stage": ["pair_spectra", "prepare_all", "repair_variant", "train_variant", "watch"],
        "steps": ["example_loss"],
        "examples": ["examined", "named"],
    },
)
