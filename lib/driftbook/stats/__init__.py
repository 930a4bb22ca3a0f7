"""Scores with their influence, intervals, comparisons and mixed models."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["terms"],
    submod_attrs={
        "agreement": ["agreement_of_judges"],
        "harm": ["safety_outcome", "with_harm"],
        "influence": ["arms", "matrix"],
        "linear": ["rate_model"],
        "logistic": ["item_model"],
        "picking": ["in_words", "picked"],
        "sequential": ["monitor"],
        "two_models": ["compare"],
    },
)
