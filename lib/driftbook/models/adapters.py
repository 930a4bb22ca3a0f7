"""PEFT adapters: made for a variant, saved as safetensors, and attached to a base model that stays
resident.
"""

import copy
import json
import re
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    PeftConfig,
    PeftModel,
    PeftType,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from driftbook.models import starts
from driftbook.models.adapter_forms import check_patterns, excess
from driftbook.models.base_state import BaseState, refuse_spoiled
from driftbook.models.suffixes import SuffixConfig, check_replaceable
from driftbook.study.files import OUTPUTS, check_safetensors, remedy_of
from driftbook.study.methods import PEFT_METHODS, REWRITING_IN_PLACE, layers_of, unscored_setting
from driftbook.study.variants import Variant

WEIGHTS = "adapter_model.safetensors"
ANOTHER_BASE = (
    "it was trained on another base model, or through another class of it, whose modules have other"
    " names"
)
ALLOCATING = (
    "PEFT's {} is itself only where its update_and_allocate is called after every step, which is"
    " not done here; take a method that trains all its weights to the end, such as LoRA"
)
UNSCORED_METHODS = {
    "MULTITASK_PROMPT_TUNING": "whose answers depend on a task that every prompt would have to name"
    " (task_ids)",
    "POLY": "whose answers depend on a task that every prompt would have to name (task_ids)",
    "LILY": "which mixes its experts by a mean over all tokens of a batch, later ones too, so that"
    " no text has a score of its own",
    "SHADOW": "which runs a second model beside the base, and changes what its layers are given",
    "XLORA": "which mixes other adapters, which its folder does not hold",
}
_BASES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # what an adapter was put on


def config(variant: Variant) -> PeftConfig:
    """PEFT's configuration of a variant's method: the study's settings, and what the method's name
    fixes.

    Raises:
        ValueError: the study file gives a setting that PEFT's method does not have or does not
            take, or the method needs a step of its own while it trains.
    """
    method = PEFT_METHODS[variant.method]
    settings = json.loads(variant.settings)["peft"] | method.fixed
    if variant.init in ("vocabulary", "safety_frozen") and variant.method == "prompt_tuning":
        settings["prompt_tuning_init"] = "SAMPLE_VOCAB"
    kind = SuffixConfig if variant.n_after else getattr(peft, method.config)
    if _allocates(kind, settings):
        raise ValueError(f"methods.{variant.method}: {ALLOCATING.format(method.config)}")
    try:
        return kind(task_type=TaskType.CAUSAL_LM, **settings)
    except (TypeError, ValueError) as error:
        said = str(error).partition("() ")[2] or _first_line(error)
        raise ValueError(f"methods.{variant.method}: {said}") from None


def placed(made: PeftConfig, variant: Variant, base: torch.nn.Module) -> PeftConfig:
    """PEFT's configuration for a base model: where a variant adapts a third of the layers alone,
    with their numbers.

    Raises:
        ValueError: the model has no thirds.
    """
    if variant.layers:
        n = base.config.get_text_config().num_hidden_layers
        made.layers_to_transform = list(layers_of(variant.layers, n))
    return made


def _allocates(kind: type[PeftConfig], settings: dict[str, Any]) -> bool:
    """Whether PEFT's method moves its ranks while it trains: AdaLoRA, and AdaMSS where asked."""
    name = next(name for name, one in PEFT_TYPE_TO_CONFIG_MAPPING.items() if one is kind)
    moves = hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(name), "update_and_allocate")
    return moves and bool(settings.get("use_asa", getattr(kind, "use_asa", True)))


def create(
    variant: Variant,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    init_text: str | None = None,
    rows: torch.Tensor | None = None,
) -> PeftModel:
    """A new adapter of the variant on the base model, its init drawn by the variant's seed; its
    weights are fp32 whatever the base's are.

    `init_text` is what a soft prompt starts as, its tokens repeated to the number of virtual
    tokens; or `rows` [virtual tokens, width] are. See `starts.begin`.
    """
    made = placed(config(variant), variant, base)
    if variant.init == "safety_frozen":  # the text is in front of the tokens that are trained
        made.num_virtual_tokens += len(starts.token_ids(tokenizer, init_text))
    check_targets(variant.method, made, base)
    kept = BaseState(base)
    try:
        _keep_rewritten(base, made, kept)
        torch.manual_seed(variant.seed)
        model = get_peft_model(base, made)
        if variant.init is not None and made.peft_type != PeftType.PREFIX_TUNING:
            starts.begin(model, variant.init, variant.seed, tokenizer, init_text, rows)
    except Exception as error:  # PEFT raises many kinds for settings of the wrong kind
        kept.restore(f"methods.{variant.method}, which was refused,")
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"methods.{variant.method}: {_first_line(error)}") from None
    kept.copy(value for value in model.parameters() if value.requires_grad)
    _BASES[model] = kept
    return model


def check_targets(method: str, config: PeftConfig, base: torch.nn.Module) -> None:
    """Raise a ValueError where one of the modules that a method names is not in the base model:
    PEFT passes over it in silence; or one that it replaces cannot be replaced.
    """
    wanted = getattr(config, "target_modules", None)
    if isinstance(config, SuffixConfig):
        check_replaceable(base)
    names = [name for name, _ in base.named_modules()]
    try:
        check_patterns(vars(config), names)
    except ValueError as error:
        raise ValueError(f"methods.{method}: {error}") from None
    for target in wanted if isinstance(wanted, (list, set, tuple)) else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            linear = [n for n, one in base.named_modules() if isinstance(one, torch.nn.Linear)]
            known = dict.fromkeys(name.rpartition(".")[2] for name in linear)
            raise ValueError(
                f"methods.{method}.target_modules names {target!r}, and {type(base).__name__} has"
                f" no such module; it has {', '.join(known)}"
            )


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
    model.create_or_update_model_card = lambda *_: None  # it would be an empty one
    try:
        model.save_pretrained(folder, safe_serialization=True, selected_adapters=["default"])
    finally:
        del model.create_or_update_model_card


def detach(model: PeftModel) -> None:
    """Take off an adapter that `create` put on: the base model is then what it was before, also
    where biases, whole modules or embeddings were trained, or where TRL left a patched forward.

    Raises:
        SpoiledBase: something of the base changed that could not be put back.
        ValueError: the adapter was not made by `create`.
    """
    if model not in _BASES:
        raise ValueError(
            "this adapter was not put on by adapters.create, which alone knows its base"
        )
    _BASES.pop(model).restore("training an adapter on it")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


# ---- attach
@contextmanager
def attached(base: PreTrainedModel, folder: Path | None) -> Iterator[PreTrainedModel | PeftModel]:
    """The base with the adapter of a folder on it, taken off when the block ends; the base itself
    where there is no folder.

    The base is afterwards what it was before, to the bit, whatever the adapter does to it, and also
    where it was refused.

    Raises:
        ValueError: the adapter is missing, torn, in another format than safetensors, of a method
            that cannot be scored, or of another base model: a tensor of its file has no place on
            this base, or a module that it trained got none.
        SpoiledBase: the base was changed and could not be put back.
    """
    refuse_spoiled(base)
    if folder is None:
        yield base
        return
    model, kept = _put_on(base, folder, {"inference_mode": True})
    try:
        yield model.eval()
    finally:
        kept.restore(f"the adapter {folder}")


def _put_on(
    base: PreTrainedModel, folder: Path, changed: dict[str, Any]
) -> tuple[PeftModel, BaseState]:
    """The base with the adapter of a folder on it, of whose configuration these settings are
    others, and what restores the base; it is restored where the adapter is refused.
    """
    check(folder)
    configuration = _read_config(folder)
    for name, value in changed.items():
        setattr(configuration, name, value)
    try:
        check_patterns(vars(configuration), (name for name, _ in base.named_modules()))
    except ValueError as error:
        raise ValueError(f"the adapter {folder}: {error}") from None
    kept = BaseState(base)
    try:
        return _attach(base, folder, configuration, kept), kept
    except torch.OutOfMemoryError:
        kept.restore(f"the adapter {folder}")
        raise
    except Exception as error:  # PEFT raises a dozen kinds where files do not fit
        kept.restore(f"the adapter {folder}, which was refused,")
        raise ValueError(
            f"the adapter {folder} does not fit this base model: {_reason(error)}"
        ) from None


def go_on(variant: Variant, base: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter of a folder on the base, whose training goes on: of its own form and rank, which
    a repair may have changed, with the dropout that the variant's settings say, which a repair may
    have left out. `detach` takes it off.

    Raises:
        ValueError: as `attached`.
    """
    dropout = {"lora_dropout": getattr(config(variant), "lora_dropout", 0.0)}
    model, kept = _put_on(base, folder, {"inference_mode": False, **dropout})
    kept.copy(value for value in model.parameters() if value.requires_grad)
    _BASES[model] = kept
    return model


def _read_config(folder: Path) -> PeftConfig:
    """The configuration of an adapter that can be attached to a base and scored."""
    try:
        made = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # an unknown peft_type or key, a torn file
        raise ValueError(
            f"the configuration of the adapter {folder} cannot be used: {_first_line(error)}"
        ) from None
    if why := unscored_reason(made):
        raise ValueError(f"the adapter {folder} {why}; it cannot be scored here")
    return made


def unscored_reason(configuration: PeftConfig) -> str | None:
    """Why adapters of a configuration cannot be scored, as a predicate; None where they can."""
    kind = getattr(configuration.peft_type, "value", configuration.peft_type)
    if kind in UNSCORED_METHODS:
        return f"is of the method {kind}, {UNSCORED_METHODS[kind]}"
    why = unscored_setting(vars(configuration))
    return why and f"has {why}"


def _attach(
    base: PreTrainedModel, folder: Path, configuration: PeftConfig, kept: BaseState
) -> PeftModel:
    """The base with an adapter's modules, and in them the tensors of its file."""
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(configuration.task_type, PeftModel)
    with warnings.catch_warnings(action="ignore"), torch.random.fork_rng():  # of what is an error
        _keep_rewritten(base, configuration, kept)
        torch.manual_seed(0)
        model = kind(base, configuration, "default")
        names = _stored_names(folder)
        kept.copy(_written_over(model, names))
        mapping = None if configuration.is_prompt_learning else _renaming(base)
        placed = model.load_adapter(str(folder), "default", key_mapping=mapping)
        check_placed(model, names, placed)
    return model


def _keep_rewritten(base: PreTrainedModel, configuration: PeftConfig, kept: BaseState) -> None:
    """Keep the weights that an initialisation writes over in place: which, is found by putting the
    adapter on with a plain one.
    """
    begins = str(getattr(configuration, "init_lora_weights", "")).lower()
    if not begins.startswith(REWRITING_IN_PLACE):
        return
    plain = copy.deepcopy(configuration)
    plain.init_lora_weights = False
    with torch.random.fork_rng():
        layers = get_peft_model(base, plain).modules()
        found = [one.get_base_layer() for one in layers if isinstance(one, BaseTunerLayer)]
    kept.undo()
    kept.copy(layer.weight for layer in found)


def _renaming(base: PreTrainedModel) -> dict[str, str]:
    """How transformers renamed an architecture's modules since (as from_pretrained asks it)."""
    return getattr(base, "_checkpoint_conversion_mapping", {})


def _stored_names(folder: Path) -> list[str]:
    with safe_open(folder / WEIGHTS, "pt") as file:
        return list(file.keys())


def _written_over(model: PeftModel, names: list[str]) -> list[torch.Tensor]:
    """Tensors of the model that an adapter's file names as they are: biases, embedding tables."""
    plain = {name.replace(".base_layer.", ".") for name in names}
    named = model.state_dict(keep_vars=True).items()
    return [value for name, value in named if name.replace(".base_layer.", ".") in plain]


def check_placed(model: PeftModel, names: list[str], placed: Any) -> None:
    """Raise a ValueError where a tensor of an adapter's file went to no module, or a module of the
    adapter got none. `placed` is what PEFT says of loading: missing_keys, unexpected_keys.
    """
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    strange = [name for name in placed.unexpected_keys if name not in wanted]
    if strange:
        raise ValueError(f"{_some(strange, len(names), 'tensors')} found no module; {ANOTHER_BASE}")
    own = {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()}
    renamed = [one for one in names if one not in wanted and one not in own]
    absent = placed.missing_keys if renamed else [one for one in wanted if one not in names]
    if absent:
        raise ValueError(
            f"{_some(list(absent), len(wanted), 'tensors that its configuration asks for')} are not"
            f" in its file, so that these modules would stay at their init; {ANOTHER_BASE}"
        )


def _some(names: list[str], of: int, what: str) -> str:
    return f"{len(names)} of its {of} {what} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"


SIZES = re.compile(r"size mismatch for (\S+): .*?Size\((.*?)\).*?Size\((.*?)\)")


def _reason(error: Exception) -> str:
    """What PEFT says of a file that does not fit, in one line; of sizes that differ, which."""
    sizes = SIZES.findall(str(error))
    if sizes:
        name, stored, wanted = sizes[0]
        more = f", and {len(sizes) - 1} more" if len(sizes) > 1 else ""
        return f"sizes differ: {name} is {stored} in its file and {wanted} on this base{more}"
    if isinstance(error, KeyError):
        return f"its file has no {error.args[0]}"
    return _first_line(error) or type(error).__name__


def check(folder: Path) -> None:
    """Raise a ValueError where an adapter's weights are missing, torn, or stored as pickle."""
    path = folder / WEIGHTS
    if said := excess(folder):
        raise ValueError(f"the adapter {folder}: {said}")
    if not path.is_file():
        pickled = [file.name for file in folder.glob("*.bin")]
        hint = (
            f"it has {pickled[0]}, a pickle, which is never loaded; save it as safetensors"
            if pickled
            else "train the variant again"
            if folder.resolve().is_relative_to(OUTPUTS)
            else "give the folder that holds it"
        )
        raise ValueError(f"the adapter {folder} has no {WEIGHTS}: {hint}")
    check_safetensors(path, remedy_of(folder.parent if folder.name == "adapter" else folder))


def n_stored(folder: Path) -> int:
    """Numbers in the adapter's file."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        slices = [file.get_slice(name) for name in list(file.keys())]
        return sum(torch.Size(stored.get_shape()).numel() for stored in slices)


def non_finite(model: PeftModel) -> list[str]:
    """Names of trained parameters that hold NaN or infinity."""
    return [name for name, value in state(model).items() if not torch.isfinite(value).all()]
