"""Others' published runs, analysed again."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adaptation_reading": ["read_adaptation"],
        "original_analysis": ["grid"],
        "original_ledger": ["judge_claims"],
        "original_reading": ["category_model", "original_estimates", "read_original"],
        "original_tests": ["largest_r"],
        "peft_front": ["peft_summary"],
        "peft_reading": ["peft_estimates", "read_peft"],
        "since": ["published_since"],
    },
)
