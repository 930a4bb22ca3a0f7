"""The study file, its variants, sources, tables and folders."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "environment": ["versions"],
        "opening": ["opened"],
        "preregistration": ["deviations", "registered"],
        "sections": ["Base"],
        "sources": ["origin"],
        "study_file": ["load"],
        "tables": ["greedy"],
    },
)
