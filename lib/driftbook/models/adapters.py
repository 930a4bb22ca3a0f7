"""PEFT adapters: made for a variant, saved as safetensors, and attached to a base model that stays
resident.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from driftbook.study.files import check_safetensors
from driftbook.study.methods import PEFT_METHODS
from driftbook.study.variants import Variant

WEIGHTS = "adapter_model.safetensors"


def config(variant: Variant) -> PeftConfig:
    """PEFT's configuration of a variant's method: the study's settings, and what the method's name
    fixes.

    Raises:
        ValueError: the study file gives a setting that PEFT's method does not have.
    """
    method = PEFT_METHODS[variant.method]
    settings = json.loads(variant.settings)["peft"] | method.fixed
    if variant.init == "vocabulary":
        settings["prompt_tuning_init"] = "SAMPLE_VOCAB"
    try:
        return getattr(peft, method.config)(task_type=TaskType.CAUSAL_LM, **settings)
    except TypeError as error:
        said = str(error).partition("() ")[2] or error
        raise ValueError(f"methods.{variant.method}: {said}") from None


def create(
    variant: Variant,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    init_text: str | None = None,
) -> PeftModel:
    """A new adapter of the variant on the base model, its init drawn by the variant's seed; its
    weights are fp32 whatever the base's are.

    `init_text` is what a soft prompt starts as, its tokens repeated to the number of virtual
    tokens.
    """
    made = config(variant)
    check_targets(variant.method, made, base)
    torch.manual_seed(variant.seed)
    try:
        model = get_peft_model(base, made)
    # what PEFT says of settings of the wrong kind
    except (TypeError, ValueError, NotImplementedError, AttributeError) as error:
        _strip(base)
        raise ValueError(f"methods.{variant.method}: {_first_line(error)}") from None
    if init_text is not None:
        _start_from_text(model, tokenizer, init_text)
    return model


def check_targets(method: str, config: PeftConfig, base: torch.nn.Module) -> None:
    """Raise a ValueError where one of the modules that a method names is not in the base model:
    PEFT passes over it in silence.
    """
    wanted = getattr(config, "target_modules", None)
    names = [name for name, _ in base.named_modules()]
    for target in wanted if isinstance(wanted, (list, set, tuple)) else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            linear = [n for n, one in base.named_modules() if isinstance(one, torch.nn.Linear)]
            known = dict.fromkeys(name.rpartition(".")[2] for name in linear)
            raise ValueError(
                f"methods.{method}.target_modules names {target!r}, and {type(base).__name__} has"
                f" no such module; it has {', '.join(known)}"
            )


@torch.no_grad()
def _start_from_text(model: PeftModel, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    weight = model.prompt_encoder["default"].embedding.weight
    repeated = (ids * (len(weight) // len(ids) + 1))[: len(weight)]
    embedding = model.get_base_model().get_input_embeddings()
    weight.copy_(embedding(torch.tensor(repeated, device=weight.device)))


def state(model: PeftModel) -> dict[str, torch.Tensor]:
    """A copy of the parameters that are trained, by name."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@contextmanager
def swapped(model: PeftModel, parameters: dict[str, torch.Tensor]) -> Iterator[None]:
    """The model with other values of the trained parameters, as long as the block lasts."""
    kept = state(model)
    model.load_state_dict(parameters, strict=False)
    try:
        yield
    finally:
        model.load_state_dict(kept, strict=False)


def save(model: PeftModel, folder: Path) -> None:
    """Write adapter_config.json and the weights as safetensors, and nothing else that PEFT adds."""
    # TRL's DPO adds another adapter, as its reference
    model.save_pretrained(folder, safe_serialization=True, selected_adapters=["default"])
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def detach(model: PeftModel) -> None:
    """Take the adapter off, so that the base model is as it was before; TRL leaves a patched
    forward on it, which goes too.
    """
    base = model.get_base_model()
    if not model.active_peft_config.is_prompt_learning:
        base = model.unload()
    base.__dict__.pop("forward", None)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        base.__dict__.pop(name, None)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _strip(base: PreTrainedModel) -> None:
    """Take off what PEFT had put on the base before it found that the adapter does not fit."""
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base.set_submodule(name, module.get_base_layer())
    for name in ("peft_config", "_hf_peft_config_loaded"):
        base.__dict__.pop(name, None)


@contextmanager
def attached(base: PreTrainedModel, folder: Path | None) -> Iterator[PreTrainedModel | PeftModel]:
    """The base with the adapter of a folder on it, taken off when the block ends; the base itself
    where there is no folder.

    Raises:
        ValueError: the adapter is missing, torn, in another format than safetensors, or of another
            base model.
    """
    if folder is None:
        yield base
        return
    check(folder)
    try:
        model = PeftModel.from_pretrained(base, folder, is_trainable=False)
    except (RuntimeError, ValueError, KeyError) as error:
        _strip(base)
        raise ValueError(
            f"the adapter {folder} does not fit this base model: {_first_line(error)}"
        ) from None
    try:
        yield model.eval()
    finally:
        detach(model)


def check(folder: Path) -> None:
    """Raise a ValueError where an adapter's weights are missing, torn, or stored as pickle."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = [file.name for file in folder.glob("*.bin")]
        hint = (
            f"it has {pickled[0]}, a pickle, which is never loaded; save it as safetensors"
            if pickled
            else "train the variant again"
        )
        raise ValueError(f"the adapter {folder} has no {WEIGHTS}: {hint}")
    check_safetensors(path, f"delete {folder.parent} and run again")


def n_stored(folder: Path) -> int:
    """Numbers in the adapter's file."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        slices = [file.get_slice(name) for name in list(file.keys())]
        return sum(torch.Size(stored.get_shape()).numel() for stored in slices)


def non_finite(model: PeftModel) -> list[str]:
    """Names of trained parameters that hold NaN or infinity."""
    return [name for name, value in state(model).items() if not torch.isfinite(value).all()]
