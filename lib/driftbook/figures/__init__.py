"""Draw tables: a figure computes positions and nothing else."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"gallery": ["of", "read", "show"], "miniature": ["draw_learning"]}
)
