"""The weight updates of an adapter file, one module at a time and by name, and new adapters made
from changed ones.

A LoRA adapter adds dW = scale B A to a weight matrix W [out, in], with lora_A [r, in], lora_B [out,
r] and scale = alpha / r, or alpha / sqrt(r) for rsLoRA (Hu et al. 2021, arXiv 2106.09685;
Kalajdzievski 2023, arXiv 2312.03732).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.conversion import convert_to_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from driftbook.doctors.adapter_files import CONFIG, PREFIX, inner, lora_scale, product_norm
from driftbook.models import adapters
from driftbook.models.adapters import WEIGHTS
from driftbook.study.files import read_json, replacing_folder, write_json
from driftbook.training.checkpoints import Checkpoint

FACTORS = (  # the ends of the names of tensors that make an update
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
    ".ia3_l",
)
GONE = """
    layers_to_transform layers_pattern exclude_modules loftq_config eva_config corda_config
    lora_bias
""".split()  # settings that chose modules, or began their training
ANOTHER = "it is the adapter of another base model"


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight matrix: dW = scale B A, in fp32."""

    module: str  # its name in the base model, as model.layers.0.self_attn.q_proj
    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scale: float

    @classmethod
    def whole(cls, module: str, change: Tensor) -> "Update":
        """An update of full rank, given as a matrix [out, in]."""
        rows, columns = change.shape
        factors = (torch.eye(columns), change) if columns <= rows else (change, torch.eye(rows))
        return cls(module, *factors, 1.0)

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.b), self.a.shape[1]

    def norm(self) -> float:
        """Frobenius norm of dW, from the Gram matrices [r, r] of its factors."""
        return abs(self.scale) * product_norm(self.a, self.b)

    def concentration(self) -> float:
        """sum s^4 / (sum s^2)^2 over the singular values s of dW: 1 for one rank, 1 / r for r equal
        ones. By the Gram matrices of its factors.
        """
        both = (self.a @ self.a.T).double() @ (self.b.T @ self.b).double()
        return float((both * both.T).sum() / both.trace() ** 2)

    def times(self, factor: float) -> "Update":
        """The update, multiplied by a number."""
        return replace(self, b=self.b * factor)

    def projected(self, apply: Callable[[Tensor], Tensor]) -> "Update":
        """C dW, for C a function of a matrix [out, n]."""
        return replace(self, b=apply(self.b))

    def folded(self) -> "Update":
        """The same update with its scale in B, so that it can be joined with others."""
        return replace(self, b=self.b * self.scale, scale=1.0)

    def cosine(self, other: "Update") -> float | None:
        """<dW, dW'> / (||dW|| ||dW'||) with an update of the same A; None where one is zero."""
        product = inner(self.a, self.a, self.b, other.b) * self.scale * other.scale
        norms = self.norm() * other.norm()
        return product / norms if norms else None

    def energy(self, u: Tensor) -> float:
        """||U' dW||^2 / ||dW||^2 for orthonormal columns U [out, k]."""
        return (replace(self, b=u.T @ self.b).norm() / self.norm()) ** 2


def joined(parts: Sequence[Update]) -> Update:
    """The sum of updates of one module as one update: their factors side by side, [out, sum of r]
    and [sum of r, in], or the matrix itself where it has fewer rows or columns than that.
    """
    folded = [part.folded() for part in parts]
    a, b = torch.cat([part.a for part in folded]), torch.cat([part.b for part in folded], 1)
    if len(a) > min(len(b), a.shape[1]):
        return Update.whole(parts[0].module, b @ a)
    return Update(parts[0].module, a, b, 1.0)


# ---- read
@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk, whose tensors are read when they are needed."""

    folder: Path
    config: dict[str, Any]

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """The modules that it updates, by their names in the base model, sorted."""
        return modules(self.folder)

    def update(self, module: str) -> Update:
        """The update of one module.

        Raises:
            ValueError: the module is a convolution, or stores its weight the other way round.
        """
        names = [f"{PREFIX}{module}.lora_{part}.weight" for part in "AB"]
        tensors = stored(self.folder, names)
        if missing := [name for name in names if name not in tensors]:
            raise ValueError(
                f"the adapter {self.folder} has no {missing[0]}; it is torn, or was not saved by"
                " PEFT's save_pretrained"
            )
        a, b = (tensors[name].float() for name in names)
        if a.ndim == b.ndim == 2 and len(a) != b.shape[1]:
            raise ValueError(
                f"the adapter {self.folder} has factors of ranks {len(a)} and {b.shape[1]} for"
                f" {module}; its files do not belong together"
            )
        if a.ndim != 2 or b.ndim != 2 or self.config.get("fan_in_fan_out"):
            raise ValueError(f"{module} is no linear layer [out, in]; its update is not read")
        return Update(module, a, b, lora_scale(self.config, module, len(a)))

    def __iter__(self) -> Iterator[Update]:
        return map(self.update, self.modules)


def read(folder: Path) -> Adapter:
    """The LoRA adapter of a folder.

    Raises:
        ValueError: its weights are missing, torn or stored as pickle, or it is no LoRA adapter.
    """
    adapters.check(folder)
    config = read_json(folder / CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"the adapter {folder} is of the type {kind}, and not LoRA")
    check_tensors(folder)
    return Adapter(folder, config)


def stored(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Of these tensors those that are in an adapter's file."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        there = set(file.keys())
        return {name: file.get_tensor(name) for name in names if name in there}


def modules(folder: Path) -> tuple[str, ...]:
    """The modules that an adapter of LoRA or IA3 updates, by their names in the base model, sorted.

    Raises:
        ValueError: its tensors have other names than PEFT's.
    """
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = list(file.keys())
    if strange := [name for name in names if not name.startswith(PREFIX)]:
        raise ValueError(
            f"the adapter {folder} holds {strange[0]}, which does not begin with {PREFIX} as PEFT's"
            " names do; save it with PEFT's save_pretrained"
        )
    ends = (".lora_A.weight", ".ia3_l")
    found = [(name.removeprefix(PREFIX), end) for name in names for end in ends]
    return tuple(sorted({name.removesuffix(end) for name, end in found if name.endswith(end)}))


def check_tensors(folder: Path) -> None:
    """Raise a ValueError where an adapter's file holds a tensor that is no factor of a module with
    both, and no bias, whole module or embedding either: it would be lost in silence.
    """
    known, whole = set(modules(folder)), read_json(folder / CONFIG).get("modules_to_save") or ()
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = list(file.keys())
    for name in names:
        ends = [end for end in FACTORS if name.endswith(end)]
        if ends:
            there = name.removeprefix(PREFIX).removesuffix(max(ends, key=len)) in known
        else:
            parts = name.removesuffix(".weight").removesuffix(".base_layer").split(".")
            there = name.endswith(".bias") or not {*whole, "token_adapter"}.isdisjoint(parts)
            there = there or parts[-1] in EMBEDDING_LAYER_NAMES
        if not there:
            raise ValueError(
                f"the adapter {folder} holds {name}, which is no tensor of an update as PEFT names"
                " them; save it with PEFT's save_pretrained"
            )


def biases(folder: Path, module: str) -> dict[str, Tensor]:
    """The trained biases [out] of a module by their names: of its factor B, or its own."""
    ends = ("lora_B.bias", "bias", "base_layer.bias")
    return stored(folder, [f"{PREFIX}{module}.{end}" for end in ends])


def others(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter that are no factors: biases, modules_to_save."""
    tensors = load_file(folder / WEIGHTS)
    return {name: value for name, value in tensors.items() if not name.endswith(FACTORS)}


def merged(folder: Path, base: Checkpoint) -> Iterator[Update]:
    """The update of DoRA or IA3, which is of full rank, as the product of a matrix [out, in] and an
    identity on its smaller side; one module at a time.

    DoRA (Liu et al. 2024, arXiv 2402.09353): W' = m (W + s B A) / ||W + s B A||, norms by row. IA3
    (Liu et al. 2022, arXiv 2205.05638): W' = l W, by row, or by column for feed-forward modules.
    """
    config, tensors = read_json(folder / CONFIG), load_file(folder / WEIGHTS)
    for module in modules(folder):
        weight = base.matrix(module).float()
        if config["peft_type"] == "IA3":
            scales = tensors[f"{PREFIX}{module}.ia3_l"].float()
            if tuple(scales.shape) not in ((len(weight), 1), (1, weight.shape[1])):
                shape = list(weight.shape)
                raise ValueError(f"the scales of {module} do not fit its matrix {shape}; {ANOTHER}")
            yield Update.whole(module, (scales - 1) * weight)
        else:
            name = f"{PREFIX}{module}.lora_magnitude_vector"
            magnitude = tensors[name if name in tensors else f"{name}.weight"].float().flatten()
            change = _dora(Adapter(folder, config).update(module), magnitude, weight)
            yield Update.whole(module, change)


def _dora(update: Update, magnitude: Tensor, weight: Tensor) -> Tensor:
    if tuple(weight.shape) != update.shape:
        raise ValueError(
            f"the adapter's update of {update.module} does not fit its matrix"
            f" {list(weight.shape)}; {ANOTHER}"
        )
    new = weight + update.scale * update.b @ update.a
    return new * (magnitude / torch.linalg.vector_norm(new, dim=1))[:, None] - weight


def converted(folder: Path, base: PreTrainedModel, out: Path) -> Path:
    """An adapter of another PEFT method (LoHa, LoKr, MiSS, VeRA, FourierFT, ...) as LoRA in the new
    folder `out`, which is returned: by PEFT's own conversion, each matrix at its full rank, so that
    nothing is lost and the file is as large as the matrices are.

    Raises:
        ValueError: PEFT cannot convert this method, or the adapter trains more than such updates.
    """
    adapters.check(folder)
    config = read_json(folder / CONFIG)
    for key in ("bias", "modules_to_save"):
        if config.get(key) not in (None, "none", []):
            raise ValueError(
                f"{folder.name} has {key}={config[key]!r}, which the conversion to LoRA would lose;"
                " only an adapter without it can be converted"
            )
    with adapters.attached(base, folder) as model:
        named = model.named_modules()
        layers = {name: layer for name, layer in named if isinstance(layer, BaseTunerLayer)}
        odd = [name.removeprefix(PREFIX) for name, one in layers.items() if not _is_matrix(one)]
        if odd or not layers:
            raise ValueError(
                f"{folder.name} is of the type {config.get('peft_type')}, whose change of"
                f" {[*odd, 'nothing'][0]} PEFT cannot write as an update of a weight matrix; there"
                " is nothing to project"
            )
        made = {}
        for name, layer in layers.items():  # one at a time, since PEFT takes one rank for all
            rank = min(layer.get_base_layer().weight.shape)
            _, found = convert_to_lora(torch.nn.ModuleList([layer]), rank)
            a, b = (found[f"0.lora_{part}.weight"].float() for part in "AB")
            made[name.removeprefix(PREFIX)] = Update(name.removeprefix(PREFIX), a, b, 1.0)
    write_new(out, Adapter(folder, config), made)
    return out


def _is_matrix(layer: BaseTunerLayer) -> bool:
    """Whether PEFT can write a layer's change as LoRA of one matrix."""
    return layer.supports_lora_conversion("default") and layer.get_base_layer().weight.ndim == 2


# ---- write
def write(
    out: Path,
    adapter: Adapter,
    changed: Mapping[str, Update],
    biases: Mapping[str, Tensor] | None = None,
) -> None:
    """A copy of an adapter in the new folder `out`, with other factors B [out, r] (and A [r, in])
    of the same ranks for the modules named in `changed`, and other biases by their tensors' names.

    Raises:
        ValueError: the folder is there already.
    """
    tensors = load_file(adapter.folder / WEIGHTS)
    new = _factors(changed) | dict(biases or {})
    tensors |= {name: value.to(tensors[name].dtype).contiguous() for name, value in new.items()}
    save(out, adapter.config, tensors)


def write_new(
    out: Path,
    adapter: Adapter,
    updates: Mapping[str, Update],
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """A new LoRA adapter in the folder `out` whose updates are these, whatever their ranks, with
    other tensors (biases, modules_to_save) by their names; of `adapter` it keeps the base model and
    the settings that still hold.

    Raises:
        ValueError: the folder is there already.
    """
    folded = {module: update.folded() for module, update in updates.items()}
    ranks, old = {module: update.rank for module, update in folded.items()}, adapter.config
    most = max(ranks.values())
    odd = {module: rank for module, rank in ranks.items() if rank != most}
    patterns = {f"^{module}".replace(".", r"\."): rank for module, rank in odd.items()}
    if old.get("peft_type") == "LORA":
        known = {key: value for key, value in old.items() if key not in GONE}
    else:
        known = {key: old.get(key) for key in ("base_model_name_or_path", "revision", "task_type")}
    config = known | {
        "peft_type": "LORA",
        "bias": old.get("bias", "none") if others else "none",
        "modules_to_save": old.get("modules_to_save") if others else None,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(ranks),
        "init_lora_weights": True,
    }
    tensors = {name: value.contiguous() for name, value in _factors(folded).items()}
    save(out, config, tensors | dict(others or {}))


def _factors(updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """A and B of each update, by the names that PEFT gives them."""
    return {
        f"{PREFIX}{module}.lora_{part}.weight": value
        for module, update in updates.items()
        for part, value in (("A", update.a), ("B", update.b))
    }


def refuse_folder(out: Path) -> None:
    """Raise a ValueError if a folder is there already."""
    if out.exists():
        raise ValueError(
            f"{out} is there already; a mitigated adapter is always a new one, so give another"
            " folder"
        )


def save(out: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """An adapter's two files in the new folder `out`.

    Raises:
        ValueError: the folder is there already.
    """
    refuse_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(out) as new:
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        write_json(new / CONFIG, config)
