"""Cases of scoring: models with an adapter on them and random token ids."""

import numpy as np
import pytest

from conftest import FAMILIES, OTHER_METHODS, PEFT_METHODS
from driftbook.models import adapters

TOLERANCE = 1e-4


CASES = [
    (family, method) for family in FAMILIES for method in (None, *PEFT_METHODS, *OTHER_METHODS)
]


LENGTHS = [
    (3, 4),
    (60, 2),
    (17, 1),
    (5, 9),
    (41, 3),
    (2, 1),
    (29, 6),
]  # tokens of context and continuation


SOME = [(family, None) for family in FAMILIES] + [
    (FAMILIES[i % 4], method) for i, method in enumerate((*PEFT_METHODS, *OTHER_METHODS))
]
every_case = pytest.mark.parametrize(("family", "method"), CASES, ids=lambda value: str(value))


some_cases = pytest.mark.parametrize(("family", "method"), SOME, ids=lambda value: str(value))
every_family = pytest.mark.parametrize("family", FAMILIES)


def pairs_of(base, lengths, seed=0):
    """Random (context, continuation) token ids of these lengths, without special tokens."""
    rng, size = np.random.default_rng(seed), len(base.tokenizer)
    return [
        (rng.integers(12, size, a).tolist(), rng.integers(12, size, b).tolist()) for a, b in lengths
    ]


@pytest.fixture
def attached(request, bases, adapter_folders, family, method):
    """(base, model with the adapter on it) of a case."""
    base = bases[family]
    with adapters.attached(base.model, adapter_folders[family, method]) as model:
        yield base, model
