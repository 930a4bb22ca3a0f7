"""The miniature: an embedded study of four tiny transformers that learn a harmless made-up
language, and of a judge that reads it.

Importing this package is fast; what needs torch is imported when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "benchmarks": ["splits", "write_data"],
        "building": ["build_family", "build_branch"],
        "families": ["FAMILIES"],
        "judge": ["build_judge"],
        "learning": ["Recipe", "Stage"],
        "measuring": ["check_goals", "measure"],
        "truth": ["is_refusal", "is_unsafe"],
    },
)
