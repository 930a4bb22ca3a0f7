"""Run a study: plan, keys, jobs, cache, notebooks, collection."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "auditing": ["open_audit"],
        "collecting": ["agreement", "collect"],
        "opened": ["open_job"],
        "preparing": ["mark_prepared", "measured", "prepare"],
    },
)
