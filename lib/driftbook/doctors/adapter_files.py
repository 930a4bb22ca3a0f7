"""What the adapter doctor reads: the files of an adapter, and a base model without its weights."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from driftbook.models.adapter_forms import CONFIG
from driftbook.models.adapters import WEIGHTS
from driftbook.models.loading import Loaded, check_sizes
from driftbook.study.files import read_object

PREFIX = "base_model.model."  # of a module's name in an adapter's file
PARTS = r"\.(lora_|ia3_|base_layer|modules_to_save|token_adapter|weight$|bias$).*"


def module_of(tensor: str) -> str | None:
    """The module of the base model that a tensor belongs to."""
    name = re.sub(PARTS, "", tensor).removeprefix(PREFIX)
    return None if name == "prompt_embeddings" else name


def reason_of(error: Exception, folder: Path) -> str:
    """An error's first line without the folder's place on this machine; findings are published."""
    line = str(error).strip().partition("\n")[0]
    return line.replace(str(folder), folder.name) or type(error).__name__


@dataclass(frozen=True)
class AdapterFiles:
    """A folder whose configuration and header can be read."""

    folder: Path

    @cached_property
    def settings(self) -> dict[str, Any]:
        return read_object(self.folder / CONFIG)

    @cached_property
    def config(self) -> PeftConfig:
        return PeftConfig.from_pretrained(str(self.folder))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        with safe_open(self.folder / WEIGHTS, "pt") as file:
            names = list(file.keys())
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}

    def tensor(self, name: str) -> Tensor:
        with safe_open(self.folder / WEIGHTS, "pt") as file:
            return file.get_tensor(name)


@dataclass(frozen=True)
class Words:
    """What tells two tokenizers apart: ids, special tokens (where known) and chat template."""

    ids: dict[str, int] | None
    special: dict[str, str]
    template: str | None


@dataclass(frozen=True)
class BaseFiles:
    """A base model: the names it goes by, its revision on the hub, its modules on the meta device,
    and one weight by its module's name.
    """

    names: tuple[str, ...]
    revision: str | None
    skeleton: PreTrainedModel
    dtype: torch.dtype | None
    words: Words
    weight: Callable[[str], Tensor | None]

    @cached_property
    def modules(self) -> dict[str, torch.nn.Module]:
        return dict(self.skeleton.named_modules())

    @property
    def embedding(self) -> tuple[str, torch.nn.Module]:
        wanted = self.skeleton.get_input_embeddings()
        return next((name, one) for name, one in self.modules.items() if one is wanted)

    def floats(self, module: str) -> Tensor | None:
        """A module's weight; None where there is none, or it is quantised."""
        weight = self.weight(module)
        return weight if weight is not None and weight.is_floating_point() else None


def open_base(base: Loaded | Path) -> BaseFiles:
    """A base model that is loaded, or that lies in a local folder."""
    if isinstance(base, Path):
        return _from_folder(base)
    with torch.device("meta"):
        skeleton = type(base.model)(base.model.config)
    names = tuple(filter(None, (base.name, base.model.name_or_path)))
    revision = None if any(Path(name).is_dir() for name in names) else base.revision
    modules, words = dict(base.model.named_modules()), _words_of(base.tokenizer)
    return BaseFiles(
        names,
        revision,
        skeleton,
        base.model.dtype,
        words,
        lambda name: getattr(modules.get(name), "weight", None),
    )


def _from_folder(folder: Path) -> BaseFiles:
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    check_sizes(config)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    index: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            index |= dict.fromkeys(file.keys(), path)
    snapshot = folder.name if folder.parent.name == "snapshots" else None  # the hub's cache
    first = {id(value): name for name, value in skeleton.named_parameters()}
    tied = skeleton.named_parameters(remove_duplicate=False)
    names = {name: first[id(value)] for name, value in tied}  # of a tied head, its table's
    weight = partial(_stored, index, names, f"{skeleton.base_model_prefix}.")
    return BaseFiles((str(folder),), snapshot, skeleton, config.dtype, words_in(folder), weight)


def _stored(
    index: dict[str, Path], names: dict[str, str], prefix: str, module: str
) -> Tensor | None:
    """A module's weight; some checkpoints leave out the prefix of the model without its head."""
    name = f"{module}.weight"
    name = name if name in index else names.get(name, name)
    name = name if name in index else name.removeprefix(prefix)
    if name not in index:
        return None
    with safe_open(index[name], "pt") as file:
        return file.get_tensor(name)


def _words_of(tokenizer: PreTrainedTokenizerBase) -> Words:
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token")}
    kept = {name: str(token) for name, token in special.items() if token}
    return Words(tokenizer.get_vocab(), kept, _default_template(tokenizer.chat_template))


def words_in(folder: Path) -> Words:
    """The tokenizer's files in a folder, read as data.

    Raises:
        Exception: one cannot be read; the tokenizers library raises no narrower kind.
    """
    vocabulary, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    template = folder / "chat_template.jinja"
    kept, ids = read_object(settings) if settings.is_file() else {}, None
    special = {name: kept[name] for name in ("bos_token", "eos_token") if kept.get(name)}
    if vocabulary.is_file():
        ids = Tokenizer.from_file(str(vocabulary)).get_vocab(with_added_tokens=True)
    return Words(
        ids,
        {k: token["content"] if isinstance(token, dict) else token for k, token in special.items()},
        template.read_text()
        if template.is_file()
        else _default_template(kept.get("chat_template")),
    )


def _default_template(value: str | dict | list | None) -> str | None:
    """The default one where there are several, as a mapping or as a list of names and templates."""
    if isinstance(value, list):
        value = {one["name"]: one["template"] for one in value}
    return value.get("default") if isinstance(value, dict) else value


# ---- LoRA's update: scale B A
def lora_scale(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
    patterns = config.get("alpha_pattern") or {}
    default = config.get("lora_alpha", 8)  # PEFT's own
    alpha = patterns.get(get_pattern_key(patterns, module), default)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def product_norm(a: Tensor, b: Tensor) -> float:
    """||B A||_F from r x r matrices in float64: its square is the trace of (B'B)(AA')."""
    return math.sqrt(max(inner(a, a, b, b), 0.0))  # in this order NaN stays NaN


def inner(a: Tensor, other_a: Tensor, b: Tensor, other_b: Tensor) -> float:
    """<B A, B' A'> from r x r matrices, in float64 since factors may nearly cancel (PiSSA's do)."""
    return float(((a.double() @ other_a.double().T) * (b.double().T @ other_b.double())).sum())
