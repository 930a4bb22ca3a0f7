"""The weight updates of an adapter file, one module at a time and by name, and new adapters made
from changed ones.

A LoRA adapter adds dW = scale B A to a weight matrix W [out, in], with lora_A [r, in], lora_B [out,
r] and scale = alpha / r, or alpha / sqrt(r) for rsLoRA (Hu et al. 2021, arXiv 2106.09685;
Kalajdzievski 2023, arXiv 2312.03732).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.conversion import convert_to_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from driftbook.models import adapters
from driftbook.models.adapters import WEIGHTS
from driftbook.study.files import read_json, replacing_folder, write_json
from driftbook.training.checkpoints import Checkpoint

PREFIX = "base_model.model."  # of a module's name in an adapter's file
CONFIG = "adapter_config.json"
FACTORS = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
    ".ia3_l",
)  # the ends of the names of tensors that make an update


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight matrix: dW = scale B A, in fp32."""

    module: str  # its name in the base model, as model.layers.0.self_attn.q_proj
    a: torch.Tensor  # [r, in]
    b: torch.Tensor  # [out, r]
    scale: float

    @property
    def rank(self) -> int:
        return len(self.a)

    def projected(self, apply: Callable[[torch.Tensor], torch.Tensor]) -> "Update":
        """C dW, for C a function of a matrix [out, n]."""
        return replace(self, b=apply(self.b))

    def cosine(self, other: "Update") -> float | None:
        """<dW, dW'> / (||dW|| ||dW'||) with an update that has the same A; None where one is zero."""
        inner = _inner(self.a, self.a, self.b, other.b) * self.scale * other.scale
        norms = self.norm() * other.norm()
        return inner / norms if norms else None

    def energy(self, u: torch.Tensor) -> float:
        """||U' dW||^2 / ||dW||^2 for orthonormal columns U [out, k]."""
        return (replace(self, b=u.T @ self.b).norm() / self.norm()) ** 2

    def norm(self) -> float:
        """Frobenius norm of dW, from the Gram matrices [r, r] of its factors."""
        return abs(self.scale) * math.sqrt(
            max(_inner(self.a, self.a, self.b, self.b), 0.0)
        )  # in this order NaN stays NaN

    def times(self, factor: float) -> "Update":
        """The update, multiplied by a number."""
        return replace(self, b=self.b * factor)

    def folded(self) -> "Update":
        """The same update with its scale in B, so that it can be put beside others."""
        return replace(self, b=self.b * self.scale, scale=1.0)


def _inner(a: torch.Tensor, other_a: torch.Tensor, b: torch.Tensor, other_b: torch.Tensor) -> float:
    """<B A, B' A'> from Gram matrices [r, r] in float64, since factors may nearly cancel (a
    converted PiSSA adapter's do).
    """
    return float(((a.double() @ other_a.double().T) * (b.double().T @ other_b.double())).sum())


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk, whose tensors are read when they are asked for."""

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
        with safe_open(self.folder / WEIGHTS, "pt") as file:
            names = [f"{PREFIX}{module}.lora_{part}.weight" for part in "AB"]
            if missing := [name for name in names if name not in file.keys()]:  # noqa: SIM118
                raise ValueError(
                    f"the adapter {self.folder} has no {missing[0]}; it is torn, or was not saved"
                    " by PEFT's save_pretrained"
                )
            a, b = (file.get_tensor(name).float() for name in names)
        if a.ndim == b.ndim == 2 and len(a) != b.shape[1]:
            raise ValueError(
                f"the adapter {self.folder} has factors of ranks {len(a)} and {b.shape[1]} for"
                f" {module}; its files do not belong together"
            )
        if a.ndim != 2 or b.ndim != 2 or self.config.get("fan_in_fan_out"):
            raise ValueError(f"{module} is no linear layer [out, in]; its update is not read")
        return Update(module, a, b, self.scale(module, len(a)))

    def scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r), by the adapter's own patterns."""
        patterns = self.config.get("alpha_pattern") or {}
        alpha = patterns.get(
            get_pattern_key(patterns.keys(), module), self.config.get("lora_alpha", 8)
        )  # PEFT's own default
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def __iter__(self) -> Iterator[Update]:
        return map(self.update, self.modules)


def read(folder: Path) -> Adapter:
    """The LoRA adapter of a folder.

    Raises:
        ValueError: its weights are missing, torn or stored as pickle, or it is no LoRA adapter.
    """
    adapters.check(folder)
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"the adapter {folder} is of the type {config.get('peft_type')}, and not LoRA"
        )
    return Adapter(folder, config)


def modules(folder: Path) -> tuple[str, ...]:
    """The modules that an adapter of LoRA or IA3 updates, by their names in the base model, sorted.

    Raises:
        ValueError: its tensors have other names than PEFT's.
    """
    with safe_open(folder / WEIGHTS, "pt") as file:
        if strange := next((name for name in file.keys() if not name.startswith(PREFIX)), None):  # noqa: SIM118
            raise ValueError(
                f"the adapter {folder} holds {strange}, which does not begin with {PREFIX} as"
                " PEFT's names do; save it with PEFT's save_pretrained"
            )
        found = {
            name.removeprefix(PREFIX).removesuffix(end)
            for name in file.keys()
            for end in (".lora_A.weight", ".ia3_l")
            if name.endswith(end)
        }  # noqa: SIM118
    return tuple(sorted(found))


def biases(folder: Path, module: str) -> dict[str, torch.Tensor]:
    """The trained biases [out] of a module in an adapter's file, by their names: of its factor B,
    or its own.
    """
    names = [f"{PREFIX}{module}.{end}" for end in ("lora_B.bias", "bias", "base_layer.bias")]
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {name: file.get_tensor(name) for name in names if name in file.keys()}  # noqa: SIM118


def others(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter of LoRA or IA3 that are no factors of an update, by their names:
    biases, modules_to_save.
    """
    return {
        name: value
        for name, value in load_file(folder / WEIGHTS).items()
        if not name.endswith(FACTORS)
    }


def merged(folder: Path, base: Checkpoint) -> Iterator[Update]:
    """The update of DoRA or IA3, which is of full rank, as the product of a matrix [out, in] and an
    identity on its smaller side; one module at a time.

    DoRA (Liu et al. 2024, arXiv 2402.09353): W' = m (W + s B A) / ||W + s B A||, norms by row. IA3
    (Liu et al. 2022, arXiv 2205.05638): W' = l W, by row, or by column for feed-forward modules.
    """
    config = read_json(folder / CONFIG)
    with safe_open(folder / WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    for module in modules(folder):
        weight = base.matrix(module).float()
        change = (
            _ia3(tensors[f"{PREFIX}{module}.ia3_l"], weight, module)
            if config["peft_type"] == "IA3"
            else _dora(Adapter(folder, config), tensors, weight, module)
        )
        yield whole(module, change)


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
        layers = {
            name.removeprefix(PREFIX): layer
            for name, layer in model.named_modules()
            if isinstance(layer, BaseTunerLayer)
        }
        if odd := next(
            (
                name
                for name, layer in layers.items()
                if not layer.supports_lora_conversion("default")
                or layer.get_base_layer().weight.ndim != 2
            ),
            None if layers else "nothing",
        ):
            raise ValueError(
                f"{folder.name} is of the type {config.get('peft_type')}, whose change of {odd}"
                " PEFT cannot write as an update of a weight matrix; there is nothing to project"
            )
        made = {}
        for name, layer in layers.items():  # one at a time, since PEFT takes one rank for all
            _, found = convert_to_lora(
                torch.nn.ModuleList([layer]), min(layer.get_base_layer().weight.shape)
            )
            made[name] = Update(
                name, found["0.lora_A.weight"].float(), found["0.lora_B.weight"].float(), 1.0
            )
    write_new(out, Adapter(folder, config), made)
    return out


def whole(module: str, change: torch.Tensor) -> Update:
    """An update of full rank, given as a matrix [out, in]."""
    rows, columns = change.shape
    return (
        Update(module, torch.eye(columns), change, 1.0)
        if columns <= rows
        else Update(module, change, torch.eye(rows), 1.0)
    )


def _ia3(scales: torch.Tensor, weight: torch.Tensor, module: str) -> torch.Tensor:
    if (scales.numel(), 1) == tuple(scales.shape) and len(scales) == len(weight):
        return (scales - 1) * weight
    if tuple(scales.shape) == (1, weight.shape[1]):
        return (scales - 1) * weight
    raise ValueError(
        f"the scales of {module} do not fit its matrix [{', '.join(map(str, weight.shape))}]; it is"
        " the adapter of another base model"
    )


def _dora(
    adapter: Adapter, tensors: dict[str, torch.Tensor], weight: torch.Tensor, module: str
) -> torch.Tensor:
    update = adapter.update(module)
    if tuple(weight.shape) != (len(update.b), update.a.shape[1]):
        raise ValueError(
            f"the adapter's update of {module} does not fit its matrix"
            f" [{', '.join(map(str, weight.shape))}]; it is the adapter of another base model"
        )
    name = f"{PREFIX}{module}.lora_magnitude_vector"
    magnitude = tensors[name if name in tensors else f"{name}.weight"].flatten()
    new = weight + update.scale * update.b @ update.a
    return new * (magnitude / torch.linalg.vector_norm(new, dim=1))[:, None] - weight


def write(
    out: Path,
    adapter: Adapter,
    changed: Mapping[str, Update],
    biases: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """A copy of an adapter in the new folder `out`, with other factors B [out, r] (and A [r, in])
    of the same ranks for the modules named in `changed`, and other biases by their tensors' names.

    Raises:
        ValueError: the folder is there already.
    """
    tensors = load_file(adapter.folder / WEIGHTS)
    for module, update in changed.items():
        for part, value in (("A", update.a), ("B", update.b)):
            name = f"{PREFIX}{module}.lora_{part}.weight"
            tensors[name] = value.to(tensors[name].dtype).contiguous()
    tensors |= {name: value.to(tensors[name].dtype) for name, value in (biases or {}).items()}
    save(out, adapter.config, tensors)


def write_new(
    out: Path,
    adapter: Adapter,
    updates: Mapping[str, Update],
    others: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """A new LoRA adapter in the folder `out` whose updates are these, whatever their ranks, with
    other tensors (biases, modules_to_save) by their names; of `adapter` it keeps what it is an
    adapter of.

    Raises:
        ValueError: the folder is there already.
    """
    folded = {module: update.folded() for module, update in updates.items()}
    ranks = {module: update.rank for module, update in folded.items()}
    most = max(ranks.values())
    patterns = {
        f"^{module}".replace(".", r"\."): rank for module, rank in ranks.items() if rank != most
    }
    known = (
        adapter.config
        if adapter.config.get("peft_type") == "LORA"
        else {
            key: adapter.config.get(key)
            for key in ("base_model_name_or_path", "revision", "task_type")
        }
    )
    gone = dict.fromkeys(
        (
            "layers_to_transform",
            "layers_pattern",
            "exclude_modules",
            "loftq_config",
            "eva_config",
            "corda_config",
            "lora_bias",
        )
    )  # what chose modules, or began their training
    config = {key: value for key, value in known.items() if key not in gone} | {
        "peft_type": "LORA",
        "bias": adapter.config.get("bias", "none") if others else "none",
        "modules_to_save": adapter.config.get("modules_to_save") if others else None,
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
    tensors = {
        f"{PREFIX}{module}.lora_{part}.weight": value.contiguous()
        for module, update in folded.items()
        for part, value in (("A", update.a), ("B", update.b))
    }
    save(out, config, tensors | dict(others or {}))


def save(out: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """An adapter's two files in the new folder `out`.

    Raises:
        ValueError: the folder is there already.
    """
    if out.exists():
        raise ValueError(
            f"{out} is there already; a mitigated adapter is always a new one, so give another"
            " folder"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(out) as new:
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        write_json(new / CONFIG, config)
