"""What an adapter's weights do: untrained, exploded, lost in rounding, how far from their init."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from driftbook.doctors.adapter_files import (
    AdapterFiles,
    BaseFiles,
    lora_scale,
    module_of,
    product_norm,
)
from driftbook.doctors.findings import Finding, error, note, warning

SAMPLED_ROWS = 16  # of each weight, rounded to the base's dtype
OUTLIER = 3.5  # modified z-score: Iglewicz and Hoaglin (1993), How to detect and handle outliers
OUTLIER_RATIO = 10.0  # and times the median: a small spread makes small differences outliers
SOFT_PROMPT_RATIO = 10.0
TABLE_ROWS = 8_192  # of an embedding table, compared at once
PART = re.compile(
    r"base_model\.model\.(.+)\.lora_(?:embedding_)?"
    r"(A|B|magnitude_vector)(?:\.default)?(?:\.weight)?$"
)


@dataclass(frozen=True)
class Change:
    """What LoRA does to one weight: Frobenius norms, and sampled entries that change."""

    module: str
    update: float
    per_entry: float
    zero: bool  # the update is, as at init
    table: bool  # an embedding's, of another scale by its init
    weight: float | None = None
    dtype: torch.dtype | None = None
    changed: int = 0
    sampled: int = 0

    @property
    def ratio(self) -> float | None:
        return self.update / self.weight if self.weight else None


# ---- LoRA and DoRA
def lora_updates(adapter: AdapterFiles, base: BaseFiles | None) -> Iterator[Finding]:
    """What the update of each module does to its weight."""
    parts: dict[str, dict[str, str]] = {}
    for name in adapter.shapes:
        if match := PART.match(name):
            parts.setdefault(match[1], {})[match[2]] = name
    ill = [module for module, part in parts.items() if not _is_pair(adapter, module, part)]
    if not parts:
        first = (
            f"base_model.model.(...).lora_A.weight, and the first is {next(iter(adapter.shapes))}"
        )
        yield error("shapes", f"none of its tensors is named as PEFT names a LoRA's, {first}")
        return
    if ill:
        text = f"{len(ill)} of its modules lack a lora_A and lora_B of the configured rank"
        yield error("shapes", f"{text}, first {ill[0]}", ill[0])
        return
    rng = np.random.default_rng(0)
    changes = [lora_change(adapter, module, part, base, rng) for module, part in parts.items()]
    untrained = list(_untrained(changes, len(adapter.shapes) - 2 * len(changes)))
    yield from untrained
    yield from _exploded(changes)
    if not any(f.severity == "warning" for f in untrained):
        yield from _rounded(changes)
    yield _distance(changes)
    if base and (silent := sum(not change.weight for change in changes)):
        text = f"the base model's weights were not to be had for {silent} of its {len(changes)}"
        yield note("not_examined", f"{text} modules")


def _is_pair(adapter: AdapterFiles, module: str, part: dict[str, str]) -> bool:
    """Whether lora_A [r, in, ...] and lora_B [out, r, ...] have the configured rank."""
    if not {"A", "B"} <= part.keys():
        return False
    a, b = adapter.shapes[part["A"]], adapter.shapes[part["B"]]
    return len(a) >= 2 <= len(b) and a[0] == b[1] == _rank(adapter.config, module)


def _rank(config: LoraConfig, module: str) -> int:
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)


def lora_change(
    adapter: AdapterFiles,
    module: str,
    part: dict[str, str],
    base: BaseFiles | None,
    rng: np.random.Generator,
) -> Change:
    """What LoRA or DoRA does to one module's weight; tensors by part (A, B, magnitude_vector)."""
    a, b = (adapter.tensor(part[key]).double().flatten(1) for key in "AB")
    scale, shape = lora_scale(adapter.settings, module, len(a)), (len(b), a.shape[1])
    update, zero = abs(scale) * product_norm(a, b), not (a.any() and b.any())
    per_entry = update / (shape[0] * shape[1]) ** 0.5
    plain = Change(module, update, per_entry, zero, "embedding" in part["A"])
    weight = _oriented(base, module, shape) if base else None
    if weight is None:
        return plain
    where = weight.device
    a, b, magnitude = a.to(where), scale * b.to(where), None
    if "magnitude_vector" in part:
        magnitude = adapter.tensor(part["magnitude_vector"]).to(where).double().flatten()
        update = _norm_of_dora(weight.double(), a, b, magnitude)
    chosen = rng.choice(shape[0], min(shape[0], SAMPLED_ROWS), replace=False)
    rows = torch.from_numpy(chosen).to(where)
    new = weight[rows].double() + b[rows] @ a
    if magnitude is not None:
        new *= (magnitude[rows] / new.norm(dim=1)).unsqueeze(1)
    return replace(
        plain,
        update=update,
        weight=float(torch.linalg.vector_norm(weight, dtype=torch.float32)),
        dtype=weight.dtype,
        changed=int((new.to(weight.dtype) != weight[rows]).sum()),
        sampled=new.numel(),
    )


def _oriented(base: BaseFiles, module: str, shape: tuple[int, int]) -> Tensor | None:
    """The base's weight as [out, in]; None where it is missing, quantised, or of another shape."""
    weight = base.floats(module)
    if weight is None:
        return None
    weight = weight.detach().flatten(1)
    if isinstance(base.modules.get(module), Conv1D | torch.nn.Embedding):
        weight = weight.T
    return weight if tuple(weight.shape) == shape else None


def _norm_of_dora(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> float:
    """||m V / ||V|| - W||_F with V = W + BA and norms by row, from W A' and r x r matrices; all in
    float64, since the sum cancels.
    """
    cross = (b * (weight @ a.T)).sum(1)
    squared = weight.square().sum(1)
    v = (squared + 2 * cross + ((b @ (a @ a.T)) * b).sum(1)).clamp(min=0).sqrt()
    parts = magnitude.square() - 2 * magnitude / v * (squared + cross) + squared
    return float(parts.sum().clamp(min=0).sqrt())


def _untrained(changes: list[Change], others: int) -> Iterator[Finding]:
    zero, zeros = [change.module for change in changes if change.zero], "the update BA"
    if len(zero) == len(changes):
        does = f"only its other tensors ({others}) can change the model" if others else ""
        text = f"{zeros} of every module is zero, as at init: it was never trained, and"
        yield warning("untrained", f"{text} {does or 'it does nothing'}")
    elif zero:
        where = f"{len(zero)} of its {len(changes)} modules, first {zero[0]}"
        yield note("untrained", f"{zeros} is zero, as at init, in {where}", zero[0])


def _exploded(changes: list[Change]) -> Iterator[Finding]:
    known = [change for change in changes if change.ratio is not None]
    large = [change for change in known if change.ratio > 1]
    if large:
        worst = max(large, key=lambda change: change.ratio)
        text = f"""its update is larger than the weight it updates in {len(large)} of
            {len(known)} modules, most in {worst.module} ({worst.ratio:.3g} times its norm)"""
        yield warning("exploded", text, worst.module)
    rest = [one for one in changes if one.ratio is None and one.per_entry > 0 and not one.table]
    norms = np.array([change.per_entry for change in rest])
    out = norm_outliers(norms)
    if out.any():
        worst = int(np.where(out, norms, 0).argmax())
        text = f"""its update in {int(out.sum())} of {len(norms)} modules is far out of the
            others' range, most in {rest[worst].module} ({norms[worst] / np.median(norms):.3g} times
            the median)"""
        yield warning("exploded", text, rest[worst].module)


def norm_outliers(norms: np.ndarray) -> np.ndarray:
    """Which norms are exploded against the others: the two criteria of examine."""
    if not len(norms):
        return np.zeros(0, bool)
    off = np.log(norms) - np.median(np.log(norms))
    spread = np.median(np.abs(off))
    return (0.6745 * off > OUTLIER * spread) & (off > np.log(OUTLIER_RATIO))


def _rounded(changes: list[Change]) -> Iterator[Finding]:
    sampled = sum(change.sampled for change in changes)
    changed = sum(change.changed for change in changes)
    if not sampled:
        return
    entries = f"of {sampled} sampled entries of the base model's weights"
    dtype = _name(next(change.dtype for change in changes if change.dtype))
    if changed:
        text = f"merged, it changes {changed / sampled:.2%} {entries} in {dtype}"
        yield note("no_op", text)
    else:
        text = f"merged, it changes none {entries}, since {dtype} rounds the update away, and only"
        yield warning("no_op", f"{text} unmerged can it do anything")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _distance(changes: list[Change]) -> Finding:
    values = {change.module: change.ratio for change in changes if change.ratio is not None}
    what = "the norm of its update over the base weight's"
    if not values:
        what = "its update, root mean square per entry,"
        values = {change.module: change.per_entry for change in changes}
    largest, median = max(values, key=values.__getitem__), np.median(list(values.values()))
    at = f"in the median of {len(values)} modules and {values[largest]:.3g} at most"
    return note("distance", f"{what} is {median:.3g} {at}", largest)


# ---- IA3
def ia3_scales(adapter: AdapterFiles, base: BaseFiles | None) -> Iterator[Finding]:
    """How far the scales are from 1, their init."""
    names = [name for name in adapter.shapes if name.endswith(".ia3_l")]
    scales = {name: adapter.tensor(name).double() for name in names}
    if not scales:
        yield error("shapes", "it holds no ia3_l, the scales of IA3")
        return
    off = {name: (value - 1).abs() for name, value in scales.items()}
    numbers = torch.cat([value.flatten() for value in off.values()])
    if not numbers.any():
        text = "every scale is 1, as at init: it was never trained, and it does nothing"
        yield warning("untrained", text)
        return
    size = {name: float(value.square().mean().sqrt()) for name, value in off.items()}
    large = [name for name in size if size[name] > 1]
    if large:
        worst = module_of(name := max(large, key=size.__getitem__))
        text = f"""its change is larger than what it scales in {len(large)} of {len(size)}
            modules, most in {worst} (root mean square of |w - 1| {size[name]:.3g})"""
        yield warning("exploded", text, worst)
    whole = torch.cat([value.flatten() for value in scales.values()])
    yield _ia3_rounded(whole, base.dtype if base else None)
    mean, most = float(numbers.mean()), float(numbers.max())
    text = f"|w - 1| is {mean:.3g} in the mean of {len(numbers)} scales and {most:.3g} at most"
    yield note("distance", text, module_of(max(off, key=lambda name: float(off[name].max()))))


def _ia3_rounded(w: Tensor, dtype: torch.dtype | None) -> Finding:
    known, dtype = dtype is not None, dtype or torch.bfloat16
    ones, largest = int((w.to(dtype) == 1).sum()), float((w - 1).abs().max())
    if ones < len(w):
        return note("no_op", f"{ones / len(w):.1%} of its scales are 1 in {_name(dtype)}")
    does = "does nothing, merged or not"
    if largest > torch.finfo(dtype).eps / 4:
        does = "does nothing once cast, and kept in float32 it moves only part of the activations"
    on = "" if known else f" on a base in {_name(dtype)}"
    each = f"each of its {len(w)} scales is 1 in {_name(dtype)}, |w - 1| being at most"
    return (warning if known else note)("no_op", f"it {does}{on}: {each} {largest:.2g}")


# ---- soft prompts
def soft_prompt(adapter: AdapterFiles, base: BaseFiles | None) -> Iterator[Finding]:
    """The norm of the virtual tokens against the rows of the embedding table."""
    names = [one for one in adapter.shapes if one.endswith(("prompt_embeddings", ".suffix_rows"))]
    tokens = adapter.tensor(names[0]).float() if names else torch.empty(0)
    if tokens.ndim != 2:
        yield error("shapes", "it holds no prompt_embeddings of one row per virtual token")
        return
    (n, width), norms = tokens.shape, tokens.norm(dim=1)
    norm, origin = float(norms.median()), ""
    at_random = adapter.settings.get("prompt_tuning_init") == "RANDOM"
    if at_random and bool(((norms - width**0.5).abs() < 3).all()):
        origin = ", as PEFT's random init N(0, 1) gives"
    name = base.embedding[0] if base else ""
    table = base.floats(name) if base else None
    text = f"the median norm of its {n} virtual tokens"
    if table is None or table.shape[1] != width:
        yield note("soft_prompt", f"{text} of width {width} is {norm:.3g}{origin}")
        if base and table is None:
            yield note("not_examined", "the base model's embedding table was not to be had")
        return
    usual, copies = _against(table, tokens)
    if copies == n:
        init = "as at an init from the vocabulary or a text: it was never trained"
        each = f"each of its {copies} virtual tokens is a row of the embedding table"
        yield warning("untrained", f"{each}, {init}")
    # embeddings that the model scales count as scaled, since virtual tokens are not
    ratio = norm / (usual * float(getattr(base.modules[name], "scalar_embed_scale", 1.0)))
    told = note if 1 / SOFT_PROMPT_RATIO < ratio < SOFT_PROMPT_RATIO else warning
    text = f"{text} is {ratio:.3g} times that of the base model's token embeddings{origin}"
    yield told("soft_prompt", text, name)


def _against(table: Tensor, tokens: Tensor) -> tuple[float, int]:
    """The median norm of an embedding table's rows, and how many of the tokens are such a row."""
    norms, copied = [], torch.zeros(len(tokens), dtype=torch.bool)
    for rows in table.detach().split(TABLE_ROWS):
        block = rows.to("cpu", torch.float32)
        norms.append(block.norm(dim=1))
        for i, token in enumerate(tokens):
            copied[i] |= bool((block[block[:, 0] == token[0]] == token).all(1).any())
    return float(torch.cat(norms).median()), int(copied.sum())
