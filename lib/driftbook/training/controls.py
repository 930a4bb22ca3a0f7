"""What Safe LoRA is measured against: other repairs of an adapter after its training, and the
controls that keep one thing of it and drop another.

Each writes a new adapter and returns a row per module: module, rank, norm_update, projected
(whether it was touched), share_kept (||new dW|| / ||dW||), state. dW = scale B A throughout,
combined exactly: factors are put beside each other, never averaged (PEFT's `linear` combination is
not linear in dW, its `cat` is).
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

from driftbook.models import adapters
from driftbook.study.files import read_json
from driftbook.training import safe_lora, updates
from driftbook.training.updates import Adapter, Update


# ---- repairs of one adapter
def rescale(adapter: Path, out: Path, factor: float) -> pd.DataFrame:
    """dW times a factor between 0 and 1, as lower alpha would have it (PEFT's
    rescale_adapter_scale): the null that every other repair must beat.

    Of IA3 the scales go to 1 + factor (l - 1), which is the same. Of DoRA the factor stands within
    the norm, where PEFT has it too.

    Raises:
        ValueError: the factor is outside 0 to 1, the adapter has no weight update, or `out` is
            there.
    """
    if not 0 <= factor <= 1:
        raise ValueError(f"factor={factor!r} is no share of an update between 0 and 1")
    config = safe_lora.check_adapter(adapter)
    _check_alone(adapter)
    if config["peft_type"] == "IA3":
        tensors = {
            name: 1 + factor * (value - 1) if name.endswith(".ia3_l") else value
            for name, value in load_file(adapter / adapters.WEIGHTS).items()
        }
        updates.save(out, read_json(adapter / updates.CONFIG), tensors)
        return pd.DataFrame(
            [(module, True, factor, "rescaled") for module in updates.modules(adapter)],
            columns=["module", "projected", "share_kept", "state"],
        )
    own = updates.read(adapter)
    return _written(out, own, {update.module: update.times(factor) for update in own}, "rescaled")


def zeroed(adapter: Path, modules: Sequence[str], out: Path) -> pd.DataFrame:
    """The updates of these modules deleted."""
    own = _linear(adapter)
    _check_named(own, modules)
    return _written(
        out, own, {module: own.update(module).times(0.0) for module in modules}, "zeroed"
    )


def reduce_intruders(
    model: PeftModel, out: Path, strength: float, top_k: int = 10, threshold: float = 0.5
) -> pd.DataFrame:
    """The adapter of a PEFT model with `strength` (0 to 1) of its intruder dimensions taken out:
    singular vectors of W + dW that no singular vector of W is like (Shuttleworth et al. 2024, arXiv
    2410.21228; PEFT's own function, whose mitigation_lambda is the share that is left, whatever its
    docstring says). The model is left as it was.

    Raises:
        ValueError: the adapter trains more than A and B, which PEFT's function would lose.
    """
    if odd := next(
        (
            name
            for name in get_peft_model_state_dict(model)
            if not name.endswith((".lora_A.weight", ".lora_B.weight"))
        ),
        None,
    ):
        raise ValueError(
            f"the adapter trains {odd} too, which PEFT's reduce_intruder_dimension would lose; only"
            " LoRA of A and B alone can be repaired so"
        )
    said: list[str] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        reduce_intruder_dimension(
            model, "default", "reduced", top_k, threshold, 1 - strength, said.append
        )
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            model.save_pretrained(scratch, selected_adapters=["reduced"], safe_serialization=True)
            (made,) = [path.parent for path in Path(scratch).rglob(adapters.WEIGHTS)]
            updates.save(out, read_json(made / updates.CONFIG), load_file(made / adapters.WEIGHTS))
    finally:
        if "reduced" in model.peft_config:
            model.set_adapter("default")
            model.delete_adapter("reduced")
    touched = {
        line.partition(":")[0].removeprefix("base_model.model.")
        for line in said
        if "No intruders" not in line
    }
    return pd.DataFrame(
        [
            (
                module,
                module in touched,
                "intruders reduced" if module in touched else "no intruders",
            )
            for module in updates.modules(out)
        ],
        columns=["module", "projected", "state"],
    )


# ---- combinations of several
def average(folders: Sequence[Path], out: Path) -> pd.DataFrame:
    """The mean of the updates (not of the factors) of several adapters, as of the snapshots of one
    training; its rank is the sum of theirs, or the matrix's where that is smaller.

    Raises:
        ValueError: they update different modules, or their update is not linear in the factors.
    """
    owns = [_linear(folder) for folder in folders]
    _check_same(owns)
    made = {
        module: beside([own.update(module).times(1 / len(owns)) for own in owns])
        for module in owns[-1].modules
    }
    return _new(out, owns[-1], made, "averaged")


def add(adapter: Path, safety: Path, out: Path, gamma: float) -> pd.DataFrame:
    """RESTA (Bhardwaj et al. 2024, arXiv 2402.11746): dW + gamma dW_safety."""
    own, other = _linear(adapter), _linear(safety)
    _check_same([own, other])
    return _new(
        out,
        own,
        {
            module: beside([own.update(module), other.update(module).times(gamma)])
            for module in own.modules
        },
        "safety added",
    )


def merge_where(
    adapter: Path, safety: Path, out: Path, modules: Sequence[str], weight: float
) -> pd.DataFrame:
    """SafeMERGE (Djuhera et al. 2025, arXiv 2503.17239): (1 - weight) dW + weight dW_safety on
    these modules, dW on the others.
    """
    own, other = _linear(adapter), _linear(safety)
    _check_same([own, other])
    _check_named(own, modules)
    made = {module: own.update(module) for module in own.modules}
    made |= {
        module: beside([own.update(module).times(1 - weight), other.update(module).times(weight)])
        for module in modules
    }
    return _new(out, own, made, "merged", set(modules))


def beside(parts: Sequence[Update]) -> Update:
    """The sum of updates of one module as one update: their factors beside each other, [out, sum of
    r] and [sum of r, in], or the matrix itself where it has fewer rows or columns than that.
    """
    folded = [part.folded() for part in parts]
    a, b = torch.cat([part.a for part in folded]), torch.cat([part.b for part in folded], 1)
    return (
        updates.whole(parts[0].module, b @ a)
        if len(a) > min(len(b), a.shape[1])
        else Update(parts[0].module, a, b, 1.0)
    )


# ---- controls of Safe LoRA
def same_norm(adapter: Path, treated: Path, out: Path) -> pd.DataFrame:
    """Every update scaled to the norm that it has in the treated adapter: what is left if only the
    size mattered.
    """
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
    return zeroed(
        adapter,
        [modules[i] for i in np.sort(np.random.default_rng(seed).permutation(len(modules))[:n])],
        out,
    )


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
            " LoRA first (safe_lora.merged)"
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
    for own in owns:
        if own.modules != first.modules:
            odd = sorted(set(own.modules) ^ set(first.modules))[0]
            raise ValueError(
                f"{own.folder} and {first.folder} update different modules, first {odd}; only"
                " adapters of the same modules can be combined"
            )
        for module in own.modules:
            shapes = [
                (len(one.update(module).b), one.update(module).a.shape[1]) for one in (first, own)
            ]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"the updates of {module} are {shapes[0][0]} x {shapes[0][1]} and"
                    f" {shapes[1][0]} x {shapes[1][1]}; they belong to different base models"
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


def _new(
    out: Path, own: Adapter, made: Mapping[str, Update], state: str, touched: set[str] | None = None
) -> pd.DataFrame:
    updates.write_new(out, own, made)
    return _rows(own, made, state, set(made) if touched is None else touched)


def _rows(own: Adapter, made: Mapping[str, Update], state: str, touched: set[str]) -> pd.DataFrame:
    rows = []
    for update in own:
        norm = update.norm()
        share = made.get(update.module, update).norm() / norm if norm else None
        rows.append(
            (
                update.module,
                len(update.b),
                update.a.shape[1],
                update.rank,
                norm,
                update.module in touched,
                share,
                state if update.module in touched else "kept",
            )
        )
    return pd.DataFrame(
        rows,
        columns=[
            "module",
            "out_features",
            "in_features",
            "rank",
            "norm_update",
            "projected",
            "share_kept",
            "state",
        ],
    )
