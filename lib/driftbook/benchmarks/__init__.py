"""What is asked, and how an answer is read."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["bbq", "bbq_orders", "judging", "utility"],
    submod_attrs={
        "data": ["items", "refusal_only", "worded", "wordings"],
        "responding": ["asked_prompts", "responses"],
        "hazards": ["coverage"],
    },
)
