"""What is wrong with an adapter, with training data, with a finished study."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules=["adapter", "finished_study", "training_data"]
)
