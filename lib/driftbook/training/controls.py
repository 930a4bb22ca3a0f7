"""Baselines and controls for Safe LoRA.

Baselines are other repairs of an adapter after its training; each control preserves one property of
Safe LoRA's update, such as its norm or its modules, and randomises the others.

Each writes a new adapter and returns a row per module: module, rank, norm_update, projected
(whether it was touched), share_kept (||new dW|| / ||dW||), state. dW = scale B A throughout,
combined exactly: factors are joined, never averaged (PEFT's `linear` combination is not linear in
dW, its `cat` is).
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora.intruders import reduce_intruder_dimension
from safetensors.torch import load_file

from driftbook.doctors.adapter_files import CONFIG, PREFIX
from driftbook.doctors.findings import times
from driftbook.models.adapters import WEIGHTS
from driftbook.study.files import read_json
from driftbook.training import safe_lora, updates
from driftbook.training.updates import Adapter, Update, joined

INTRUDERS = {True: "intruders reduced", False: "no intruders"}


# ---- repairs of one adapter
def rescaled(adapter: Path, out: Path, factor: float) -> pd.DataFrame:
    """dW times a factor between 0 and 1, as lower alpha would have it (PEFT's
    rescale_adapter_scale): the null that every other repair must beat.

    Of IA3 the scales go to 1 + factor (l - 1), which is the same. Of DoRA the factor acts within
    the norm, where PEFT has it too.

    Raises:
        ValueError: the factor is outside 0 to 1, the adapter has no weight update, or `out` is
            there.
    """
    if not 0 <= factor <= 1:
        raise ValueError(f"factor={factor!r} is no share of an update between 0 and 1")
    config = safe_lora.check_adapter(adapter)
    _check_alone(adapter)
    if config["peft_type"] != "IA3":
        own = updates.read(adapter)
        made = {update.module: update.times(factor) for update in own}
        return _written(out, own, made, "rescaled")
    tensors = load_file(adapter / WEIGHTS)
    for name in tensors:
        if name.endswith(".ia3_l"):
            tensors[name] = 1 + factor * (tensors[name] - 1)
    updates.save(out, config, tensors)
    rows = {"module": updates.modules(adapter), "projected": True, "share_kept": factor}
    return pd.DataFrame(rows).assign(state="rescaled")


def zeroed(adapter: Path, modules: Sequence[str], out: Path) -> pd.DataFrame:
    """The updates of these modules deleted."""
    own = _linear(adapter)
    _check_named(own, modules)
    made = {module: own.update(module).times(0.0) for module in modules}
    return _written(out, own, made, "zeroed")


def intruders_reduced(
    model: PeftModel, out: Path, strength: float, top_k: int = 10, threshold: float = 0.5
) -> pd.DataFrame:
    """The adapter of a PEFT model with `strength` (0 to 1) of its intruder dimensions taken out:
    singular vectors of W + dW that no singular vector of W is like (Shuttleworth et al. 2024, arXiv
    2410.21228; PEFT's own function, whose mitigation_lambda is the share that is left, whatever its
    docstring says). The model is left as it was.

    Raises:
        ValueError: the adapter trains more than A and B, which PEFT's function would lose.
    """
    factors = (".lora_A.weight", ".lora_B.weight")
    if odd := [name for name in get_peft_model_state_dict(model) if not name.endswith(factors)]:
        raise ValueError(
            f"the adapter trains {odd[0]} too, which PEFT's reduce_intruder_dimension would lose;"
            " only LoRA of A and B alone can be repaired so"
        )
    said: list[str] = []
    settings = (top_k, threshold, 1 - strength, said.append)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        reduce_intruder_dimension(model, "default", "reduced", *settings)
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            model.save_pretrained(scratch, selected_adapters=["reduced"], safe_serialization=True)
            (made,) = [path.parent for path in Path(scratch).rglob(WEIGHTS)]
            updates.save(out, read_json(made / CONFIG), load_file(made / WEIGHTS))
    finally:
        if "reduced" in model.peft_config:
            model.set_adapter("default")
            model.delete_adapter("reduced")
    lines = [line for line in said if "No intruders" not in line]
    touched = {line.partition(":")[0].removeprefix(PREFIX) for line in lines}
    rows = pd.DataFrame({"module": updates.modules(out)})
    rows["projected"] = rows["module"].isin(touched)
    return rows.assign(state=rows["projected"].map(INTRUDERS))


# ---- combinations of several
def averaged(folders: Sequence[Path], out: Path) -> pd.DataFrame:
    """The mean of the updates (not of the factors) of several adapters, as of the snapshots of one
    training; its rank is the sum of theirs, or the matrix's where that is smaller.

    Raises:
        ValueError: they update different modules, or their update is not linear in the factors.
    """
    return _summed(folders, [1 / len(folders) for _ in folders], out, "averaged", -1)


def add(adapter: Path, safety: Path, out: Path, gamma: float) -> pd.DataFrame:
    """RESTA (Bhardwaj et al. 2024, arXiv 2402.11746): dW + gamma dW_safety."""
    return _summed([adapter, safety], [1.0, gamma], out, "safety added")


def mixed(adapter: Path, safety: Path, out: Path, weight: float) -> pd.DataFrame:
    """A soup of two updates that were trained separately (Wortsman et al. 2022, arXiv 2203.05482,
    exact in dW): (1 - weight) dW + weight dW_safety.
    """
    return _summed([adapter, safety], [1 - weight, weight], out, "mixed")


def merge_where(
    adapter: Path, safety: Path, out: Path, modules: Sequence[str], weight: float
) -> pd.DataFrame:
    """SafeMERGE (Djuhera et al. 2025, arXiv 2503.17239): a weighted sum on these modules alone."""
    return _summed([adapter, safety], [1 - weight, weight], out, "merged", 0, modules)


def _summed(
    folders: Sequence[Path],
    weights: Sequence[float],
    out: Path,
    state: str,
    of: int = 0,
    modules: Sequence[str] | None = None,
) -> pd.DataFrame:
    """The weighted sum of the updates of several adapters in these modules (all where not given),
    else the update of the adapter number `of`, whose configuration it keeps.
    """
    owns = [_linear(folder) for folder in folders]
    _check_same(owns)
    own = owns[of]
    modules = own.modules if modules is None else modules
    _check_named(own, modules)
    made = {module: own.update(module) for module in own.modules}
    for module in modules:
        parts = zip(owns, weights, strict=True)
        made[module] = joined([one.update(module).times(weight) for one, weight in parts])
    updates.write_new(out, own, made)
    return _rows(own, made, state, set(modules))


# ---- controls of Safe LoRA
def same_norm(adapter: Path, treated: Path, out: Path) -> pd.DataFrame:
    """Every update scaled to its norm in the treated adapter: the effect of size alone."""
    own, other = _linear(adapter), _linear(treated)
    made = {}
    for update in own:
        norm, wanted = update.norm(), other.update(update.module).norm()
        if norm == 0 < wanted:
            raise ValueError(
                f"the update of {update.module} is zero in {adapter.name}, so that it has no"
                " direction to scale"
            )
        made[update.module] = update.times(wanted / norm if norm else 0.0)
    return _written(out, own, made, "scaled to the same norm")


def random_zeroed(adapter: Path, n: int, seed: int, out: Path) -> pd.DataFrame:
    """n modules deleted, drawn at random.

    Raises:
        ValueError: the adapter has fewer.
    """
    modules = _linear(adapter).modules
    if not 0 <= n <= len(modules):
        raise ValueError(f"{n} modules are to be zeroed, and the adapter has {len(modules)}")
    drawn = np.sort(np.random.default_rng(seed).permutation(len(modules))[:n])
    return zeroed(adapter, [modules[i] for i in drawn], out)


def noise(adapter: Path, treated: Path, out: Path, seed: int) -> pd.DataFrame:
    """Where the treated adapter differs, Gaussian noise in place of B, scaled so that ||dW|| is
    that of the treated one: it reads the same inputs (A stays), and writes them anywhere.
    """
    own, other, generator = _linear(adapter), _linear(treated), torch.Generator().manual_seed(seed)
    made = {}
    for update in own:
        goal = other.update(update.module)
        if not torch.equal(goal.b, update.b):
            drawn = replace(update, b=torch.randn(update.b.shape, generator=generator))
            made[update.module] = drawn.times(goal.norm() / drawn.norm())
    return _written(out, own, made, "noise of the same norm")


# ---- shared
def _linear(folder: Path) -> Adapter:
    """A LoRA adapter whose update is linear in B.

    Raises:
        ValueError: it is of another kind, or holds more than the factors A and B.
    """
    safe_lora.check_adapter(folder)
    if not safe_lora.is_factored(folder):
        raise ValueError(
            f"the update of {folder.name} is no product of two factors (DoRA or IA3), so that it"
            " cannot be combined or scaled as one; rescaling and Safe LoRA apply, or write it as"
            " LoRA first (safe_lora.as_lora)"
        )
    _check_alone(folder)
    return updates.read(folder)


def _check_alone(folder: Path) -> None:
    if more := list(updates.others(folder)):
        raise ValueError(
            f"the adapter {folder.name} holds {more[0]} too, which this repair would leave as it"
            " was trained; of the repairs only a template takes such an adapter, and Safe LoRA"
            " where it is a bias of the modules"
        )


def _check_same(owns: Sequence[Adapter]) -> None:
    """Raise a ValueError unless there are adapters, and they update the same matrices."""
    if not owns:
        raise ValueError("there is no adapter to average; give at least one")
    first = owns[0]
    for own in owns[1:]:
        if odd := sorted(set(own.modules) ^ set(first.modules)):
            raise ValueError(
                f"{own.folder} and {first.folder} update different modules, first {odd[0]}; only"
                " adapters of the same modules can be combined"
            )
        for module in own.modules:
            shape, other = (times(one.update(module).shape) for one in (first, own))
            if shape != other:
                raise ValueError(
                    f"the updates of {module} are {shape} and {other}; they belong to different"
                    " base models"
                )


def _check_named(own: Adapter, modules: Sequence[str]) -> None:
    if strange := [module for module in modules if module not in own.modules]:
        raise ValueError(
            f"the adapter {own.folder} does not update {strange[0]}; it updates"
            f" {', '.join(own.modules[:3])}, ..."
        )


def _written(out: Path, own: Adapter, made: Mapping[str, Update], state: str) -> pd.DataFrame:
    updates.write(out, own, made)
    return _rows(own, made, state, set(made))


def _rows(own: Adapter, made: Mapping[str, Update], state: str, touched: set[str]) -> pd.DataFrame:
    rows = []
    for update in own:
        norm, hit = update.norm(), update.module in touched
        share = made.get(update.module, update).norm() / norm if norm else None
        row = {"module": update.module, "out_features": update.shape[0]}
        row |= {"in_features": update.shape[1], "rank": update.rank, "norm_update": norm}
        rows.append(
            row | {"projected": hit, "share_kept": share, "state": state if hit else "kept"}
        )
    return pd.DataFrame(rows)
