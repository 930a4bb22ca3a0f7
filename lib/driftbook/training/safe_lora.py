"""Safe LoRA: the update of an adapter, projected onto what alignment changed in the model (Hsu et
al., NeurIPS 2024, arXiv 2405.16833).

V = W_aligned - W_unaligned [out, in] is the alignment matrix of a module, dW = scale B A [out, in]
the adapter's update. An operator C [out, out] acts on the output side, C dW, which is lora_B <- C
lora_B:

- approximate: C = V V' / ||V||_F, the paper's code; no projector, and not invariant to V's scale
- exact: C = V (V' V)^-1 V', the projector on V's columns; the identity for square V of full rank
- subspace: C = U_k U_k', the projector on V's first k left singular vectors
- zero, random, random subspace: controls, see `project`

C is never formed. C B = V (V' B) / ||V||_F, norms and inner products come from Gram matrices [r,
r].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from safetensors import safe_open
from torch import Tensor

from driftbook.doctors.adapter_files import CONFIG
from driftbook.doctors.findings import times
from driftbook.models.adapters import WEIGHTS
from driftbook.models.adapters import check as check_weights
from driftbook.study.files import read_json
from driftbook.study.methods import REWRITING
from driftbook.training import updates
from driftbook.training.checkpoints import Checkpoint, open_checkpoint
from driftbook.training.updates import ANOTHER, Update

OPERATORS = ("approximate", "exact", "subspace", "zero", "random", "random subspace")
BY_ENERGY = ("subspace", "random subspace")  # selected by the energy, the others by the cosine
SMALL = 1_024  # the smaller side of V up to which its spectrum is computed whole
PROBES, OVERSAMPLED, PASSES, K = 32, 10, 4, 16
PROMPTS = """
    PROMPT_TUNING P_TUNING PREFIX_TUNING MULTITASK_PROMPT_TUNING CPT ADAPTION_PROMPT SUFFIX_TUNING
""".split()
UNREADABLE = {
    "target_parameters": "whose modules have no counterpart in a checkpoint",
    "layer_replication": "whose modules have no counterpart in a checkpoint",
    "fan_in_fan_out": "whose matrices are stored the other way round",
    "kasa_config": "whose update is no product of A and B alone",
    "use_qalora": "whose update is no product of A and B alone",
    "use_bdlora": "whose update is no product of A and B alone",
}

SPECTRUM = "module index singular_value out_features in_features norm_v effective_rank_v".split()

Apply = Callable[[Tensor], Tensor]  # C times a matrix [out, n]


def project(
    adapter: Path,
    aligned: Path | str,
    unaligned: Path | str,
    out: Path,
    operator: str = "approximate",
    select: str = "threshold",
    value: float = 0.35,
    rank: int | None = None,
    base: Path | str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Write a copy of an adapter to the new folder `out` in which the updates of selected modules
    are C dW; a row per module of what was found and done.

    The score of a module is cos(dW, C dW) = <dW, C dW> / (||dW|| ||C dW||), or for `subspace` the
    energy ||U_k' dW||^2 / ||dW||^2. With select `threshold` the modules with a score below `value`
    are projected, with `top` the `value` lowest ones. The operators `zero` (C = 0) and `random` (a
    Gaussian matrix of V's norm in place of V) select the modules that `approximate` selects,
    `random subspace` (k random directions) those of `subspace`: they are its controls.

    LoRA of every form is read by the names of its tensors; of DoRA and IA3 the merged update is
    projected and written as LoRA of full rank: for these `base` is the checkpoint that the adapter
    belongs to (the aligned one where not given). Computed in fp32, one module at a time.

    Columns: module, out_features, in_features, rank, norm_update, norm_v, effective_rank_v ((sum
    s^2)^2 / sum s^4 of V's singular values s), cosine and cosine_null (that of an update in a
    random direction, sqrt(effective_rank_v / out), for `exact` sqrt(rank of V / out)), energy,
    energy_null (k / out), k, score, projected, share_kept (||new dW|| / ||dW||), state.

    Raises:
        ValueError: an argument has no meaning, the adapter or a checkpoint cannot be used, they do
            not fit each other, or V or dW is zero or not finite. Nothing is written then.
    """
    adapter, out = Path(adapter), Path(out)
    _check_arguments(operator, select, value, rank)
    updates.refuse_folder(out)
    check_adapter(adapter)
    pair = open_checkpoint(aligned, "aligned"), open_checkpoint(unaligned, "unaligned")
    of = pair[0] if base is None else open_checkpoint(base, "base")
    found = _found(adapter, pair, of, operator, rank, seed)
    rows = pd.DataFrame([one.row for one in found])
    rows["projected"] = _selected(rows, select, value)
    changed = [one for one, hit in zip(found, rows["projected"], strict=True) if hit]
    kept = {one.update.module: one.treated.norm() / one.row["norm_update"] for one in changed}
    rows["share_kept"] = rows["module"].map(kept).fillna(1.0)
    done = rows["projected"].map({True: "projected", False: "kept"})
    rows["state"] = rows["state"].where(rows["state"].notna(), done)
    _write(out, adapter, found, changed)
    return rows.sort_values("module", ignore_index=True)


def _write(out: Path, adapter: Path, found: list["Treated"], changed: list["Treated"]) -> None:
    """The adapter with the updates and biases of some modules as the operator made them."""
    made = {one.update.module: one.treated for one in changed}
    biases = {name: bias for one in changed for name, bias in one.biases.items()}
    if is_factored(adapter):
        updates.write(out, updates.read(adapter), made, biases)
    else:
        made = {one.update.module: one.update for one in found} | made
        _write_whole(out, adapter, made, biases)


def _found(
    adapter: Path,
    pair: tuple[Checkpoint, Checkpoint],
    base: Checkpoint,
    operator: str,
    rank: int | None,
    seed: int,
) -> list["Treated"]:
    """Each module of an adapter, projected."""
    own = updates.read(adapter) if is_factored(adapter) else updates.merged(adapter, base)
    found = []
    for number, update in enumerate(own):
        v, biases = _difference(*pair, update.module, update), _biases(adapter, update, base)
        found.append(treat_module(update, v, operator, rank, seed + number, biases))
    if not found:
        raise ValueError(
            f"the adapter {adapter} updates no weight matrix, so there is nothing to project"
        )
    return found


def _write_whole(
    out: Path, adapter: Path, made: dict[str, Update], biases: dict[str, Tensor]
) -> None:
    """An adapter of another kind, written as LoRA with these updates."""
    known = updates.Adapter(adapter, read_json(adapter / CONFIG))
    updates.write_new(out, known, made, updates.others(adapter) | biases)


def _check_arguments(operator: str, select: str, value: float, rank: int | None) -> None:
    if operator not in OPERATORS:
        raise ValueError(f"operator={operator!r}; expected one of {', '.join(OPERATORS)}")
    if select not in ("threshold", "top"):
        raise ValueError(f"select={select!r}; expected threshold or top")
    if select == "top" and (not math.isfinite(value) or value != int(value) or value < 1):
        raise ValueError(
            f"value={value!r} with select='top' is the number of modules to project; give a whole"
            " number from 1"
        )
    if select == "threshold" and not 0 <= value <= 1:
        raise ValueError(f"value={value!r} is a threshold of a score between 0 and 1")
    if operator in BY_ENERGY and rank is None:
        raise ValueError(
            f"operator={operator!r} needs rank, the number of V's left singular vectors"
        )
    if operator not in BY_ENERGY and rank is not None:
        raise ValueError(f"operator={operator!r} takes no rank; remove it")
    if rank is not None and rank < 1:
        raise ValueError(
            f"rank={rank} is no number of singular vectors; give a whole number from 1"
        )


# ---- which adapters
def check_adapter(adapter: Path) -> dict:
    """The configuration of an adapter that has a weight update.

    Raises:
        ValueError: there is none, and the sentence says why and what applies.
    """
    if not (adapter / CONFIG).is_file():
        merged = adapter.is_dir() and any(adapter.glob("*.safetensors"))
        raise ValueError(
            f"{adapter} is a merged model and no adapter: its update cannot be told apart; give the"
            " adapter's folder"
            if merged
            else f"there is no adapter {adapter}; give the folder that has its {CONFIG}"
        )
    config, name = read_json(adapter / CONFIG), adapter.name
    check_weights(adapter)
    kind, init = config.get("peft_type"), str(config.get("init_lora_weights", "")).lower()
    if kind in PROMPTS:
        raise ValueError(
            f"{name} is a soft prompt ({kind}), which has no weight update to project; to it apply"
            " a safety template at test time, safety data mixed into its training, and, where it is"
            " in front of the user's text, constrained fine-tuning"
        )
    if kind not in ("LORA", "IA3"):
        raise ValueError(
            f"{name} is of the type {kind}; LoRA and IA3 can be projected as they are; write"
            " another method as LoRA first, with updates.converted"
        )
    if init.startswith(REWRITING):
        raise ValueError(
            f"{name} began as {init}, which changes the base model itself, so that BA is not its"
            " update; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    with safe_open(adapter / WEIGHTS, "pt") as file:
        tensors = " ".join(file.keys())
    if "lora_embedding" in tensors:
        raise ValueError(
            f"{name} updates an embedding, which is a table and no linear layer; leave it out of"
            " target_modules"
        )
    if odd := [key for key in UNREADABLE if config.get(key)]:
        raise ValueError(f"{name} has {odd[0]}, {UNREADABLE[odd[0]]}; it cannot be projected")
    updates.check_tensors(adapter)
    return config


def is_factored(adapter: Path) -> bool:
    """Whether the update is scale B A: LoRA, but not DoRA, whose magnitudes act on the matrix."""
    config = read_json(adapter / CONFIG)
    return config.get("peft_type") == "LORA" and not config.get("use_dora")


def has_update(adapter: Path) -> bool:
    """Whether an adapter changes weights at all: a soft prompt does not."""
    return read_json(adapter / CONFIG).get("peft_type") in ("LORA", "IA3")


def as_lora(adapter: Path, out: Path, base: Path | str) -> Path:
    """DoRA or IA3 as LoRA of full rank, the same model, in the new folder `out`, returned."""
    check_adapter(adapter)
    found = updates.merged(adapter, open_checkpoint(base, "base"))
    _write_whole(out, adapter, {update.module: update for update in found}, {})
    return out


# ---- V
def _difference(
    aligned: Checkpoint, unaligned: Checkpoint, module: str, update: Update | None = None
) -> Tensor:
    """V [out, in] of a module, in fp32."""
    v, other = aligned.matrix(module), unaligned.matrix(module)
    if v.shape != other.shape:
        raise ValueError(
            f"{module} is {times(v.shape)} in the aligned and {times(other.shape)} in the unaligned"
            " checkpoint; they are of different models"
        )
    if update is not None and tuple(v.shape) != update.shape:
        raise ValueError(
            f"the adapter's update of {module} is {times(update.shape)} and the checkpoints' matrix"
            f" {times(v.shape)}; {ANOTHER}"
        )
    v = v.float().sub_(other)
    if not torch.isfinite(v).all():
        raise ValueError(
            f"{module} holds NaN or infinity in one of the checkpoints {aligned.folder} and"
            f" {unaligned.folder}; fetch them again"
        )
    if not v.any():
        raise ValueError(
            f"the aligned and the unaligned checkpoint have the same {module}, so that V is zero"
            " and no direction of alignment; give two checkpoints that differ"
        )
    return v


def left_vectors(v: Tensor, k: int, seed: int = 0) -> Tensor:
    """U_k [out, k], the first k left singular vectors of V: whole for a small V, else by randomised
    subspace iteration (Halko et al. 2011, arXiv 0909.4061).
    """
    return _svd(v, k, seed)[0]


def _svd(v: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    if min(v.shape) <= SMALL:
        u, s, _ = torch.linalg.svd(v, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            u, s, _ = torch.svd_lowrank(v, q=min(k + OVERSAMPLED, *v.shape), niter=PASSES)
    return u[:, :k], s[:k]


def effective_rank(v: Tensor, seed: int = 0) -> float:
    """(sum s^2)^2 / sum s^4 over V's singular values: the number of directions that share its norm.

    The second sum is ||V'V||_F^2, whole for a small V; for a larger one it is estimated with
    Gaussian probes g, since E ||V V' g||^2 is the same (Hutchinson).
    """
    if min(v.shape) <= SMALL:
        squares = float(v.double().square().sum())
        small = v if v.shape[0] <= v.shape[1] else v.T
        fourth = float((small @ small.T).double().square().sum())
    else:
        squares = float(torch.linalg.vector_norm(v)) ** 2
        g = torch.randn(len(v), PROBES, generator=torch.Generator().manual_seed(seed))
        fourth = float((v @ _across(v, g)).double().square().sum()) / PROBES
    return min(squares**2 / fourth, float(min(v.shape)))


# ---- operators
def operator_of(
    name: str, v: Tensor, rank: int | None, seed: int
) -> tuple[Apply, str | None, int | None]:
    """C as a function of a matrix [out, n], a remark, and for `exact` the rank that it keeps."""
    norm, generator, said = torch.linalg.vector_norm(v), torch.Generator().manual_seed(seed), None
    match name:
        case "approximate":
            return lambda x: v @ _across(v, x) / norm, None, None
        case "zero":
            return torch.zeros_like, None, None
        case "random":
            r = torch.randn(v.shape, generator=generator)
            r.mul_(norm / torch.linalg.vector_norm(r))
            return lambda x: r @ _across(r, x) / norm, None, None
        case "exact":
            return _exact(v)
        case "subspace":
            u, s = _svd(v, rank, seed)
            if s[-1] <= max(v.shape) * torch.finfo(torch.float32).eps * s[0]:
                said = f"undefined beyond V's rank, which is below {rank}: the last directions are"
                said = f"{said} arbitrary"
        case "random subspace":
            u = torch.linalg.qr(torch.randn(len(v), rank, generator=generator))[0]
    return lambda x: u @ (u.T @ x), said, None


def _across(v: Tensor, x: Tensor) -> Tensor:
    """V'x [in, n], with V read along its rows as it lies in memory: a third faster than V.T @ x."""
    return (x.T.contiguous() @ v).T.contiguous()


def _exact(v: Tensor) -> tuple[Apply, str | None, int]:
    """The projector on V's columns, from the eigenvectors of the smaller Gram matrix, a remark on
    it, and V's rank: eigenvalues below max(out, in) eps of float64 of the largest are none, so that
    a matrix that fp32 can hold is of full rank where it is.
    """
    rows, columns = v.shape
    wide, double = rows <= columns, v.double()  # a Gram matrix squares the condition
    values, vectors = torch.linalg.eigh(double @ double.T if wide else double.T @ double)
    there = values > max(rows, columns) * torch.finfo(torch.float64).eps * values[-1]
    rank, said = int(there.sum()), None
    if wide and rank == rows:
        said = "identity: V has full row rank"
        if rows < columns:
            said = (
                f"undefined as written: V is wide ({rows} x {columns}) and V'V has no inverse; the"
                " projector on its columns is the identity"
            )
        return lambda x: x, said, rank
    u = vectors[:, there] if wide else (double @ vectors[:, there]) / values[there].sqrt()
    if rank < columns:
        said = (
            f"undefined as written: V has rank {rank} of {min(rows, columns)} and V'V no inverse;"
            " the projector on its columns is used"
        )
    u = u.float()
    return lambda x: u @ (u.T @ x), said, rank


@dataclass(frozen=True)
class Treated:
    """A module's update, what the operator makes of it and of its biases, and its row."""

    update: Update
    treated: Update
    row: dict
    biases: dict[str, Tensor]


def treat_module(
    update: Update,
    v: Tensor,
    operator: str,
    rank: int | None,
    seed: int,
    biases: dict[str, tuple[Tensor, Tensor]],
) -> Treated:
    """A module's update, projected; biases as they were before training, and their changes."""
    (rows, columns), norm = v.shape, update.norm()
    if not math.isfinite(norm) or norm == 0:
        raise ValueError(
            f"the adapter's update of {update.module} is"
            f" {'zero: it was never trained' if norm == 0 else 'not finite'}, so that it has no"
            " direction; take it out of the adapter, or train it again"
        )
    k = rank or min(K, *v.shape)
    if k > min(v.shape):
        raise ValueError(
            f"rank={rank} and V of {update.module} is {rows} x {columns}; a subspace has at most"
            f" {min(v.shape)} directions"
        )
    apply, said, kept = operator_of(operator, v, rank, seed)
    judged = treated = update.projected(apply)
    if operator not in ("approximate", "exact"):
        judged = update.projected(operator_of("approximate", v, None, seed)[0])
    energy, cosine = update.energy(left_vectors(v, k, seed)), update.cosine(judged)
    directions = effective_rank(v, seed)
    row = {
        "module": update.module,
        "out_features": rows,
        "in_features": columns,
        "rank": update.rank,
        "norm_update": norm,
        "norm_v": float(torch.linalg.vector_norm(v)),
        "effective_rank_v": directions,
        "cosine": cosine,
        "cosine_null": math.sqrt((directions if kept is None else kept) / rows),
        "energy": energy,
        "energy_null": k / rows,
        "k": k,
        "score": energy if operator in BY_ENERGY else cosine or 0.0,
        "state": said,
    }
    new = {name: old + apply(change[:, None])[:, 0] for name, (old, change) in biases.items()}
    return Treated(update, treated, row, new)


def _selected(rows: pd.DataFrame, select: str, value: float) -> pd.Series:
    """Which modules are projected."""
    if select == "threshold":
        return rows["score"] < value
    if value > len(rows):
        raise ValueError(
            f"value={value:g} modules are to be projected, and the adapter has {len(rows)}; give at"
            " most that many"
        )
    return rows["score"].rank(method="first") <= value


def _biases(adapter: Path, update: Update, base: Checkpoint) -> dict[str, tuple[Tensor, Tensor]]:
    """The trained biases [out] of a module by name: before training, and how it changed them."""
    found = {}
    for name, value in updates.biases(adapter, update.module).items():
        stored = None if name.endswith("lora_B.bias") else base.name(f"{update.module}.bias")
        before = torch.zeros_like(value) if stored is None else base.tensor(stored)
        found[name] = before.float(), value.float() - before.float()
    return found


def spectra(
    adapter: Path, aligned: Path | str, unaligned: Path | str, most: int = 64, seed: int = 0
) -> pd.DataFrame:
    """The first `most` singular values of V for each module that an adapter updates: module, index
    (from 1), singular_value, out_features, in_features, norm_v, effective_rank_v.
    """
    check_adapter(adapter)
    pair, rows = (open_checkpoint(aligned, "aligned"), open_checkpoint(unaligned, "unaligned")), []
    for module in updates.modules(adapter):
        v = _difference(*pair, module)
        shared = (*v.shape, float(torch.linalg.vector_norm(v)), effective_rank(v, seed))
        values = _svd(v, min(most, *v.shape), seed)[1].tolist()
        rows += [(module, index, s, *shared) for index, s in enumerate(values, 1)]
    return pd.DataFrame(rows, columns=SPECTRUM)
