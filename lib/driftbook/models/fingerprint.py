"""A digest of a loaded model, exact to the bit, cheap enough to be taken after every adapter."""

import json
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from driftbook.study.files import digest

# 64-bit words read as rows of a prime length, so that rows of a matrix that change places fall into
# other columns, and summed in blocks of 2 MB: as fast as memory is read
COLUMNS, BLOCK = 4_093, 64
SMALL = 8_192  # words of a tensor that is summed together with others
GOLDEN = -7046029254386353131  # 2^64 over the golden ratio, an odd number of mixed bits (Knuth)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# of a model's configuration: names of places and packages, which change no number
VOLATILE = ("_name_or_path", "transformers_version", "architectures")


@dataclass(frozen=True)
class Fingerprint:
    """What a model is, part by part: the bits, shape and dtype of each tensor, the type, hooks and
    replaced methods of each module, what is tied, and the configuration.
    """

    parts: dict[str, str]

    @cached_property
    def hex(self) -> str:
        """32 hex digits, the same on every machine and device."""
        return digest(self.parts, 32)

    def differences(self, other: "Fingerprint") -> list[str]:
        """Names of the parts that differ, or that one of the two lacks."""
        names = {**self.parts, **other.parts}
        return [name for name in names if self.parts.get(name) != other.parts.get(name)]


def fingerprint(model: nn.Module) -> Fingerprint:
    """The fingerprint of a model, every tensor read anew: about 0.06 s per 500 MB on one CPU core.

    Weights that bitsandbytes quantised are read as they are packed, with their scales. A tensor's
    checksum is a sum of its bits in 64-bit words, each times a factor of its block and column: any
    single change is seen, and several cancel by a chance of about 2^-60.
    """
    found = _survey(model)
    return found.with_sums(_checksums(list(found.tensors.values())))


_KNOWN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def remembered_fingerprint(model: nn.Module) -> Fingerprint:
    """The fingerprint of a model, its tensors read anew only where their addresses, versions or
    shapes say that one was touched since.

    What writes through `.data` changes no version; so `fingerprint` looks after an adapter.
    """
    found = _survey(model)
    evidence = {name: _evidence(tensor) for name, tensor in found.tensors.items()}
    if model not in _KNOWN or _KNOWN[model][0] != evidence:
        _KNOWN[model] = evidence, _checksums(list(found.tensors.values()))
    return found.with_sums(_KNOWN[model][1])


def model_hash(model: nn.Module) -> str:
    """32 hex digits of what a model is: equal for equal weights, modules and configuration, on any
    machine and device. Remembered as in `remembered_fingerprint`.
    """
    return remembered_fingerprint(model).hex


def _evidence(tensor: Tensor) -> tuple:
    """What changes when a tensor is written to or replaced, without reading it; tensors made in
    inference mode have no version, so they are read.
    """
    version = int(_checksum(tensor)) if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tuple(tensor.shape), tensor.dtype


# ---- what there is
@dataclass(frozen=True)
class _Survey:
    """A model's tensors, each by its first name, and what is known without reading them."""

    tensors: dict[str, Tensor]
    parts: dict[str, str]

    def with_sums(self, sums: list[str]) -> Fingerprint:
        parts = {
            name: f"{value.dtype} {list(value.shape)} {one}"
            for (name, value), one in zip(self.tensors.items(), sums, strict=True)
        }
        return Fingerprint(parts | self.parts)


def _survey(model: nn.Module) -> _Survey:
    names: dict[int, list[str]] = {}
    tensors, parts = {}, {}
    for name, module in model.named_modules(remove_duplicate=False):
        parts[f"module {name or '(whole)'}"] = _said_of(module)
        dotted = f"{name}." if name else ""
        for key, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                names.setdefault(id(value), []).append(f"{dotted}{key}")
                if len(names[id(value)]) == 1:
                    tensors[f"{dotted}{key}"] = value
        tensors |= _quantised(dotted, module)
    parts["tied tensors"] = json.dumps([one for one in names.values() if len(one) > 1])
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        parts["configuration"] = _settings(config)
    return _Survey(tensors, parts)


def _quantised(dotted: str, module: nn.Module) -> dict[str, Tensor]:
    """The scales by which bitsandbytes reads a module's weight."""
    weight, found = module._parameters.get("weight"), {}
    if (state := getattr(weight, "quant_state", None)) is not None:  # of 4 bits
        found |= _scales(f"{dotted}weight.quant_state", state)
    for owner in (weight, vars(module).get("state")):  # of 8 bits: its first forward moves them
        if isinstance(scale := getattr(owner, "SCB", None), Tensor):
            found[f"{dotted}SCB"] = scale
    return found


def _scales(name: str, state: Any) -> Iterator[tuple[str, Tensor]]:
    for key, value in sorted(vars(state).items()):
        if isinstance(value, Tensor):
            yield f"{name}.{key}", value
        elif key == "state2" and value is not None:
            yield from _scales(f"{name}.{key}", value)


def _checksums(tensors: list[Tensor]) -> list[str]:
    """The checksum of each tensor in 16 hex digits; those of one device are fetched together, and
    small ones summed together: of a small model most of the time is the calls.
    """
    sums = dict.fromkeys(range(len(tensors)), 0)
    for device in {one.device for one in tensors if not one.is_meta}:
        here = [i for i, one in enumerate(tensors) if one.device == device]
        few = [i for i in here if tensors[i].nbytes <= 8 * SMALL]
        many = sorted(set(here) - set(few))
        found = [_checksum(tensors[i])[None] for i in many]
        found += [_small_checksums([tensors[i] for i in few])] if few else []
        sums |= dict(zip([*many, *few], torch.cat(found).tolist(), strict=True))
    return [f"{one % 2**64:016x}" for one in sums.values()]


@torch.no_grad()
def _small_checksums(tensors: list[Tensor]) -> Tensor:
    """The sums [n] of the bits of small tensors of one device, each word times the factor of its
    place.
    """
    words = [_words(_bits(one)) for one in tensors]
    factors = _factors(words[0].device, SMALL)
    weighted = torch.cat(words) * torch.cat([factors[: len(one)] for one in words])
    ends = list(accumulate(map(len, words), initial=0))
    total = nn.functional.pad(weighted.cumsum(0), (1, 0))[ends]
    return total[1:] - total[:-1]


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes, in a row, that begin where a word may begin."""
    bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return bits.clone() if bits.storage_offset() % 8 else bits


def _words(bits: Tensor) -> Tensor:
    """Bytes as words of 64 bits, the last one filled up with zeros."""
    more = -len(bits) % 8
    return (nn.functional.pad(bits, (0, more)) if more else bits).view(torch.int64)


@torch.no_grad()
def _checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits, weighted by place, as a 64-bit integer that wraps around."""
    if tensor.is_meta:
        return torch.zeros((), dtype=torch.int64)
    bits = _bits(tensor)
    factors = _factors(bits.device, COLUMNS)
    whole = len(bits) // (8 * COLUMNS) * COLUMNS
    rows = bits[: 8 * whole].view(torch.int64).view(-1, COLUMNS)
    rest = _words(bits[8 * whole :])
    total = (rest * factors[: len(rest)]).sum()
    for number, block in enumerate(rows.split(BLOCK)):
        total = (total + number) * GOLDEN + (block.sum(0) * factors).sum()
    return total


@lru_cache(maxsize=8)
def _factors(device: torch.device, n: int) -> Tensor:
    """An odd factor of mixed bits for each of n columns."""
    return (torch.arange(1, n + 1, device=device) * GOLDEN) | 1


# ---- everything else
def _said_of(module: nn.Module) -> str:
    """A module's type, its hooks, and methods that were replaced on it alone."""
    own, kind = vars(module), type(module)
    said = [f"{kind.__module__}.{kind.__qualname__}"]
    said += [f"{key}:{_name(hook)}" for key in HOOKS for hook in own.get(key, {}).values()]
    replaced = [key for key in own if key in _methods(kind)]
    return " ".join([*said, *(f"{key}={_name(own[key])}" for key in sorted(replaced))])


@cache
def _methods(kind: type) -> frozenset[str]:
    """Names of a class's methods, which an attribute of an instance can hide."""
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name, None)))


def _name(function: Any) -> str:
    """The name of a function, or of what a partial or an object calls."""
    function = getattr(function, "func", function)
    return getattr(function, "__qualname__", type(function).__qualname__)


def _settings(config: Any) -> str:
    known = {key: value for key, value in config.to_dict().items() if key not in VOLATILE}
    known["attention"] = getattr(config, "_attn_implementation", None)
    return digest(json.loads(json.dumps(known, default=str)))
