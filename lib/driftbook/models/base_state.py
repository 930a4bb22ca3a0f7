"""A resident base model as it is before an adapter, put back after it whatever the adapter did.

Structure is put back as a whole: the attributes, hooks, parameters and submodules of every module,
as objects. So nothing here knows PEFT's methods one by one. Values that are replaced (the residual
of PiSSA) are put back as the tensors that they were; those that are written over in place (trained
biases) from copies, which whoever knows of them asks for.
"""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from driftbook.models.fingerprint import fingerprint, remembered_fingerprint

_SPOILED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # models, and why


class SpoiledBase(ValueError):
    """A base model that could not be put back as it was: it must be loaded anew."""


def refuse_spoiled(model: nn.Module) -> None:
    """Raise a SpoiledBase where a base model was changed by an earlier adapter and not put back."""
    if model in _SPOILED:
        raise SpoiledBase(_SPOILED[model])


class BaseState:
    """What a model is now; `restore` puts it back.

    Raises:
        SpoiledBase: the model was not put back after an earlier adapter.
    """

    def __init__(self, model: nn.Module):
        refuse_spoiled(model)
        self.model = model
        self.before = remembered_fingerprint(model)
        holders = [*model.modules(), *_configurations(model)]
        self.kinds = [(module, type(module)) for module in model.modules()]
        self.attributes = [(one, vars(one).copy()) for one in holders]
        every = [held for one in holders for held in _held(one)]
        self.contents = [(held, held.copy()) for held in every if held]
        self.empty = [held for held in every if not held]  # most are, as hooks
        own = {id(one): one for one in (*model.parameters(), *model.buffers())}
        self.tensors = [(one, one.data, one.requires_grad) for one in own.values()]
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}

    def copy(self, tensors: Iterable[Tensor]) -> None:
        """Keep the values of those of these tensors that are the base's, since they are going to be
        written over in place.
        """
        own = {id(one) for one, _, _ in self.tensors}
        for tensor in tensors:
            if id(tensor) in own and id(tensor) not in self.copies:
                self.copies[id(tensor)] = tensor, tensor.detach().clone()

    def restore(self, what: str) -> None:
        """Put the model back, and read it to see that it is what it was; `what` was done to it, for
        the sentence.

        Raises:
            SpoiledBase: it is not; the sentence says what differs.
        """
        self.undo()
        self._compare(what)

    @torch.no_grad()
    def undo(self) -> None:
        """Put the model back."""
        for module, kind in self.kinds:
            if type(module) is not kind:
                module.__class__ = kind
        for one, attributes in self.attributes:
            vars(one).clear()
            vars(one).update(attributes)
        for held in self.empty:
            held.clear()
        for held, content in self.contents:
            _refill(held, content)
        for tensor, data, requires_grad in self.tensors:
            if not _same_place(tensor, data):
                tensor.data = data
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            tensor.grad = None
        for tensor, values in self.copies.values():
            tensor.copy_(values)

    def _compare(self, what: str) -> None:
        after = fingerprint(self.model)
        changed = self.before.differences(after)
        if not changed:
            return
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        said = (
            f"{what} left the base model changed in {', '.join(changed[:3])}{more}; load the base"
            " anew, since nothing that is scored on this one would be right"
        )
        _SPOILED[self.model] = said
        raise SpoiledBase(said)


def _same_place(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and (one.shape, one.dtype) == (
        other.shape,
        other.dtype,
    )


def _configurations(model: nn.Module) -> Iterator[Any]:
    """The configurations of a model and its parts, each once."""
    waiting, seen = list(model.modules()), set()
    while waiting:
        for value in vars(waiting.pop()).values():
            if isinstance(value, PreTrainedConfig | GenerationConfig) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(value)
                yield value


def _held(one: Any) -> Iterator[dict | list | set]:
    """The containers in an object's attributes: submodules, parameters, hooks, and more."""
    return (value for value in vars(one).values() if isinstance(value, dict | list | set))


def _refill(held: dict | list | set, content: dict | list | set) -> None:
    """Give a container its content back; it stays the same object, to which others refer."""
    if isinstance(held, list):
        held[:] = content
    else:
        held.clear()
        held.update(content)
