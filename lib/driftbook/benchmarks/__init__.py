"""What is asked, and how an answer is read: each benchmark is one file."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["bbq", "bbq_orders", "gsm8k", "judging", "utility", "verdict_counts"],
    submod_attrs={
        "data": ["items", "worded", "wordings"],
        "hazards": ["coverage"],
        "responding": ["asked_prompts", "responses"],
    },
)
