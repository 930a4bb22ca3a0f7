"""The product of several tuned models' distributions, from which the next token is taken (MOD).

Decoding for several objectives (Shi et al. 2024, arXiv 2406.18853): p(y) is proportional to the
product of p_i(y)^w_i over models p_i that were tuned separately, with weights w_i that sum to one.
Its logits are the weighted sum of theirs: what normalises a p_i is the same for all tokens. Each
model reads what was said by key/values of its own. The base is loaded once: each model has modules
of its own, with an adapter on them, and the weights of all are the same tensors.
"""

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Cache, PreTrainedModel

from driftbook.models import adapters
from driftbook.models.base_state import refuse_spoiled
from driftbook.models.engine import Engine, Ids
from driftbook.models.fingerprint import model_hash
from driftbook.models.layout import KeyValues
from driftbook.models.ways import Ways, common
from driftbook.study import folders
from driftbook.study.study_file import Study
from driftbook.study.variants import Variant

_TWINS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # base: models of its weights


@dataclass(frozen=True)
class Product:
    """Models whose distributions are multiplied, and the power of each; a Scorer reads it as it
    reads a model.
    """

    parts: tuple[PreTrainedModel | PeftModel, ...]
    weights: tuple[float, ...]

    def disable_adapter(self) -> AbstractContextManager:
        """A block in which the base is without adapters, as it always is."""
        return nullcontext()


def answering(base: PreTrainedModel, study: Study, variant: Variant) -> AbstractContextManager:
    """A block in which there is what a variant is: the base itself, the base with an adapter on it,
    or a product of several. See `adapters.attached` and `multiplied`.
    """
    if not variant.parts:
        return adapters.attached(base, folders.adapter(study, variant))
    weights = variant.parts.values()
    return multiplied(base, list(zip(folders.part_adapters(study, variant), weights, strict=True)))


@contextmanager
def multiplied(
    base: PreTrainedModel, parts: Sequence[tuple[Path | None, float]]
) -> Iterator[Product]:
    """The product of the models that adapters on one base make (None: the base itself), each with
    its weight. The base itself stays as it is.

    Raises:
        ValueError: there are fewer than two parts, the weights are negative or do not sum to one,
            the base is no model that is loaded here, or in 8 bits, an adapter belongs to another
            base or changes the weights of this one; or as `adapters.attached`.
    """
    weights = tuple(weight for _, weight in parts)
    _check(base, weights)
    before = model_hash(base)
    with ExitStack() as stack:
        pairs = zip(_sharing(base, len(parts)), parts, strict=True)
        tuned = [stack.enter_context(adapters.attached(one, part)) for one, (part, _) in pairs]
        if model_hash(base) != before:
            raise ValueError(
                "an adapter writes over weights of the base model, which all parts of a product"
                " share; take runs that train no biases and do not change the base"
            )
        yield Product(tuple(tuned), weights)


def _check(base: PreTrainedModel, weights: tuple[float, ...]) -> None:
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"a product needs every token's probability, which {type(base).__name__} does not give;"
            " use a model that is loaded here"
        )
    refuse_spoiled(base)
    if any(isinstance(one, BaseTunerLayer) for one in base.modules()):
        raise ValueError("a product is made on a base without adapters; take off the one on it")
    if getattr(base, "is_loaded_in_8bit", False):
        raise ValueError(
            "a base model in 8 bits moves its packed weights in its first pass, so that the parts"
            " of a product cannot share them; load it in 4 bits or whole"
        )
    if len(weights) < 2:
        raise ValueError(f"a product has at least two parts, and there is {len(weights)}")
    if min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
        said = ", ".join(f"{weight:g}" for weight in weights)
        raise ValueError(f"the weights of a product are at least 0 and sum to one, not {said}")


def _sharing(base: PreTrainedModel, n: int) -> list[PreTrainedModel]:
    """Models with modules of their own and the base's tensors; kept, since each is tried once."""
    tensors = {id(one): one for one in (*base.parameters(), *base.buffers())}
    made = _TWINS.setdefault(base, [])
    held = [one for twin in made for one in (*twin.parameters(), *twin.buffers())]
    if any(id(one) not in tensors for one in held):
        made.clear()  # the base has other tensors by now
    made += [copy.deepcopy(base, dict(tensors)) for _ in range(n - len(made))]
    return made[:n]


class _Caches(list):
    """The cache of each part."""

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        for one in self:
            one.batch_select_indices(indices)


class ProductEngine:
    """The engines of several models as one. Where an engine has hidden states [places, width] it
    has those of all parts, [places, parts, width]; for the rest see `Engine`.
    """

    def __init__(self, parts: Sequence[Engine], weights: Sequence[float]):
        self.parts, self.weights, self.model = tuple(parts), tuple(weights), parts[0].model
        self.n_virtual = max(one.n_virtual for one in parts)
        self.soft_prompt = [one.soft_prompt for one in parts]
        if len({one.is_whole for one in parts}) > 1:
            raise ValueError(
                "of these runs the model is read in two ways, so that their states cannot stand"
                " beside each other; multiply runs of one method"
            )

    @property
    def ways(self) -> Ways:
        return common([one.ways for one in self.parts])

    def tensor(self, values: np.ndarray) -> torch.Tensor:
        return self.parts[0].tensor(values)

    def _sum(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        pairs = zip(self.weights, logits, strict=True)
        return sum(weight * one for weight, one in pairs)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        states = hidden.unbind(-2)
        return self._sum([one.head(own) for one, own in zip(self.parts, states, strict=True)])

    def logits_of(
        self, logits: torch.Tensor, hidden: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        if not all(one.rounds for one in self.parts):
            return logits[rows, targets]
        pairs = zip(self.parts, hidden.unbind(-2), strict=True)
        return self._sum([one.logits_of(logits, own, rows, targets) for one, own in pairs])

    def prefix(self, ids: Ids) -> list[KeyValues | None] | None:
        found = [one.prefix(ids) for one in self.parts]
        return found if any(found) else None

    def trees(
        self,
        members: list[list[Ids]],
        starts: list[list[int]],
        shared: int,
        prefix: list[KeyValues | None] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = zip(self.parts, self._each(prefix), strict=True)
        return _beside([one.trees(members, starts, shared, own) for one, own in pairs])

    def plain_at(
        self,
        rows: Sequence[Ids],
        wanted: Sequence[Sequence[np.ndarray]],
        soft: list[torch.Tensor | None],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = zip(self.parts, soft, strict=True)
        return _beside([one.plain_at(rows, wanted, own) for one, own in pairs])

    def cache(self, prefix: list[KeyValues | None] | None, rows: int) -> _Caches:
        pairs = zip(self.parts, self._each(prefix), strict=True)
        return _Caches(one.cache(own, rows) for one, own in pairs)

    def step(
        self, tokens: np.ndarray, padding: np.ndarray, total: int, cache: _Caches
    ) -> torch.Tensor:
        pairs = zip(self.parts, cache, strict=True)
        return self._sum([one.step(tokens, padding, total, own) for one, own in pairs])

    def following(
        self, sequence: Ids, new: int, cache: list[Cache | None] | None
    ) -> tuple[torch.Tensor, list[Cache | None]]:
        pairs = zip(self.parts, self._each(cache), strict=True)
        logits, caches = zip(
            *[one.following(sequence, new, own) for one, own in pairs], strict=True
        )
        return self._sum(logits), list(caches)

    def _each(self, given: Sequence | None) -> Sequence:
        return given or [None] * len(self.parts)


def _beside(found: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The states of all parts beside each other, and their places, which are the same in all."""
    states, places = zip(*found, strict=True)
    return torch.stack(states, -2), places[0]
