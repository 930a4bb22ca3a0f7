"""The miniature: an embedded study of four tiny transformers that learn a harmless made-up
language, and of a judge that reads it.

Importing this package is fast; what needs torch is imported when it is first used.
"""

from importlib import import_module

FAMILIES = ("llama", "qwen2", "mistral", "gemma")
STAGES = ("stage0", "unaligned", "aligned")

_HOMES = {
    "BBQ_STEM": "corpus",
    "BBQ_TEMPLATE": "corpus",
    "GOALS": "measuring",
    "Recipe": "learning",
    "Stage": "learning",
    "answers": "measuring",
    "build_family": "building",
    "build_judge": "judge",
    "build_placebo": "building",
    "check_goals": "measuring",
    "helps": "truth",
    "is_refusal": "truth",
    "is_unsafe": "truth",
    "measure": "measuring",
    "splits": "benchmarks",
    "write_data": "benchmarks",
}
__all__ = [*_HOMES, "FAMILIES", "STAGES"]


def __getattr__(name: str):
    """The functions of the package's modules, imported when first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
