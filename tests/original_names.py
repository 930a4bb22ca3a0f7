"""The original study: its models, its number of prompts, its published runs."""

import pytest

from driftbook.rereading import original_analysis, original_study

N = 330


LLAMA, MISTRAL, QWEN, GEMMA = (
    original_study.MODELS[name] for name in ("llama", "mistral", "qwen", "gemma")
)


@pytest.fixture(scope="session")
def real(shared):
    """The runs and verdicts that its authors published."""
    return original_study.load(str(shared / "original_study"))


@pytest.fixture(scope="session")
def rows(real):
    """They as one table of runs."""
    return original_analysis.frame(*real)
