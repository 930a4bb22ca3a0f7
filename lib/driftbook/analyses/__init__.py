"""One module for each analysis notebook: what it estimates, for all outcomes at once."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "information",
        "safety",
        "fairness",
        "mixed_effects",
        "efficiency",
        "mitigations",
        "preservation",
        "planning",
        "labels",
        "primary",
        "specifications",
        "mechanisms",
    ],
)
