"""Does an adapter fit its base model: name, shapes, vocabulary, tokenizer, template, settings."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
)
from transformers import PreTrainedModel

from driftbook.doctors.adapter_files import AdapterFiles, BaseFiles, module_of, reason_of, words_in
from driftbook.doctors.findings import Finding, error, named, note, times, warning
from driftbook.models.adapter_forms import CONFIG
from driftbook.models.adapters import unscored_reason
from driftbook.study.methods import REWRITING
from driftbook.study.nameless import model_name

Shapes = dict[str, tuple[int, ...]]


# ---- name
def base_match(adapter: AdapterFiles, base: BaseFiles) -> Iterator[Finding]:
    """Whether the base model is the one that the adapter names."""
    name, revision = map(adapter.settings.get, ("base_model_name_or_path", "revision"))
    trained = "it was trained on"
    if not name:
        yield note("base", "it does not say which base model it was trained on")
    elif not any(same_model(name, other) for other in base.names):
        given = model_name(base.names[-1])
        yield warning("base", f"{trained} {model_name(name)}, and the base model given is {given}")
    if revision and base.revision and not base.revision.startswith(revision):
        other = f"and the base given is revision {base.revision}"
        yield warning("base", f"{trained} revision {revision} of its base model, {other}")


def same_model(one: str, other: str) -> bool:
    """Whether two names can mean one model; a folder on another machine has only its last part."""
    if Path(one).is_dir() and Path(other).is_dir():
        return Path(one).resolve() == Path(other).resolve()
    a, b = model_name(one).lower(), model_name(other).lower()
    return a == b or (not ("/" in a and "/" in b) and a.rpartition("/")[2] == b.rpartition("/")[2])


# ---- shapes
def tensor_shapes(adapter: AdapterFiles, base: BaseFiles) -> Iterator[Finding]:
    """What PEFT would save for this configuration on this base, against what the file holds."""
    try:
        expected, found = _expected(adapter, base.skeleton)
    except Exception as failure:  # PEFT raises a dozen kinds where a configuration does not fit
        why = reason_of(failure, adapter.folder)
        if isinstance(failure, NotImplementedError | RuntimeError) and "meta" in why.lower():
            text = "its method is made from weights, so its names and shapes were not compared"
            yield note("not_examined", text)
        else:
            yield error("shapes", f"PEFT cannot put it on this base model: {why}")
        return
    stored = {name: shape for name, shape in found.items() if not _is_embedding(name)}
    faults = {
        "the base model has no place for {n} of its {of} tensors, first {first}, which PEFT ignores"
        " in silence": [name for name in stored if name not in expected],
        "it lacks {n} of the {of_expected} tensors that its configuration asks for on this base,"
        " first {first}, which PEFT leaves at its init in silence": [
            name for name in expected if name not in found
        ],
        "{n} of its {of} tensors have another shape than the base model needs, first {first} with"
        " {has} for {needs}": [
            name for name in stored if name in expected and stored[name] != expected[name]
        ],
    }
    for sentence, names in faults.items():
        if names:
            first = names[0]
            facts = {"n": len(names), "of": len(stored), "of_expected": len(expected)}
            facts |= {"has": times(stored.get(first, ())), "needs": times(expected.get(first, ()))}
            yield error("shapes", sentence.format(first=first, **facts), module_of(first))


def _expected(adapter: AdapterFiles, skeleton: PreTrainedModel) -> tuple[Shapes, Shapes]:
    """Names and shapes that PEFT saves for a configuration on a model, and those in the file, in
    the names that PEFT gives them when it loads them (of experts saved before transformers 5 these
    are others); all on the meta device.
    """
    config = copy.deepcopy(adapter.config)
    config.task_type = config.task_type or "CAUSAL_LM"
    config.inference_mode = True  # else soft prompts start from text, with a tokenizer from the hub
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # the others decompose the base's weights
    if config.is_prompt_learning:  # of this base, not of the one in the file
        config.token_dim = config.num_layers = config.num_attention_heads = None
    with torch.device("meta"):
        model = get_peft_model(copy.deepcopy(skeleton), config)
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        found = {name: torch.empty(shape) for name, shape in adapter.shapes.items()}
        found = convert_peft_adapter_state_dict_for_transformers(model, config, found)
    # a name that a parameter has in the model itself, with the adapter's name in it, is loaded too
    own = model.state_dict().keys() - state.keys()
    found = {_saved_name(name) if name in own else name: value for name, value in found.items()}
    return _shapes(state), _shapes(found)


def _saved_name(parameter: str) -> str:
    """The name under which PEFT saves a parameter of the adapter named default."""
    name = parameter.replace(".default", "", 1)
    return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name


def _shapes(state: dict[str, torch.Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in state.items()}


def _is_embedding(tensor: str) -> bool:
    """Whether a tensor is a table of one row per token, and no adapter's factor for that table."""
    name = tensor.removesuffix(".weight").removesuffix(".base_layer")
    return name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES


def vocabulary(adapter: AdapterFiles, base: BaseFiles | None) -> Iterator[Finding]:
    """Embedding tables that the adapter stores: resized, or different from the base model's."""
    whole = adapter.settings.get("modules_to_save") or []
    if whole and adapter.settings.get("ensure_weight_tying"):
        whole = EMBEDDING_LAYER_NAMES  # what is tied to one of them is stored with it
    for name in filter(_is_embedding, adapter.shapes):
        module, rows = str(module_of(name)), adapter.shapes[name][0]
        if base is None:
            text = f"it stores all {rows} rows of {module}, so its vocabulary may have been resized"
            yield note("vocabulary", text, module)
        elif module not in base.modules:
            text = f"the base model has no place for its {module}, which PEFT ignores in silence"
            yield error("vocabulary", text, module)
        elif rows != (known := base.embedding[1].num_embeddings):
            text = f"""its vocabulary was resized: it stores {rows} rows of {module} and the
                base model has {known}, so it cannot be attached before the base is resized too"""
            yield error("vocabulary", text, module)
        elif module.rpartition(".")[2] not in whole and _differs(base, adapter, module, name):
            text = f"""it stores its own {module}, which differs from the base model's and
                is written over it while it is attached"""
            yield warning("vocabulary", text, module)


def _differs(base: Any, adapter: Any, module: str, name: str) -> bool:
    """Whether an adapter's whole matrix is not the base model's."""
    weight = base.weight(module)
    if weight is None:
        return False
    return not torch.equal(weight.to("cpu", torch.float32), adapter.tensor(name).float())


# ---- words
def tokenizer(adapter: AdapterFiles, base: BaseFiles) -> Iterator[Finding]:
    """A tokenizer or chat template beside the adapter that is not the base model's."""
    try:
        words = words_in(adapter.folder)
    except Exception as failure:  # see words_in
        why = reason_of(failure, adapter.folder)
        yield warning("tokenizer", f"its tokenizer's files cannot be read: {why}")
        return
    if words.ids is not None and base.words.ids is not None and words.ids != base.words.ids:
        what = _difference(words.ids, base.words.ids)
        yield warning("tokenizer", f"its tokenizer is not the base model's: {what}")
    for name in words.special.keys() & base.words.special.keys():
        own, other = words.special[name], base.words.special[name]
        if own != other:
            text = f"its tokenizer's {name} is {own!r} and the base model's is {other!r}"
            yield warning("tokenizer", text)
    if words.template is not None and words.template.strip() != (base.words.template or "").strip():
        text = """its chat template differs from the base model's, and scores depend on it: it
            was trained on one and is asked by the other"""
        yield warning("chat_template", text)


def _difference(ids: dict[str, int], others: dict[str, int]) -> str:
    if len(ids) != len(others):
        return f"it has {len(ids)} tokens and the base's {len(others)}"
    count = sum(others.get(token) != i for token, i in ids.items())
    return f"{count} of its {len(ids)} tokens have other ids"


# ---- settings
def rewrites_base(adapter: AdapterFiles) -> bool:
    """Whether attaching the adapter changes the base model's own weights."""
    return str(adapter.settings.get("init_lora_weights")).lower().startswith(REWRITING)


def _left_by_peft(adapter: AdapterFiles, biases: list[str]) -> Iterator[Finding]:
    """What an adapter does to its base that PEFT's own unload does not undo (it is undone here)."""
    stays = "which PEFT's unload does not undo, so load the base again where you use it elsewhere"
    if rewrites_base(adapter):
        init = adapter.settings.get("init_lora_weights")
        text = f"its init_lora_weights is {init}: attaching it rewrites the base model's weights"
        yield note("settings", f"{text}, {stays}")
    if biases:
        text = f"it trained {len(biases)} biases of the base model"
        text = f"{text} (bias = {adapter.settings.get('bias')}), {stays}"
        yield note("settings", text, module_of(biases[0]))
    if adapter.settings.get("layer_replication"):
        yield note("settings", f"it replicates layers of the base model, {stays}")


def config_settings(adapter: AdapterFiles, base: BaseFiles | None) -> Iterator[Finding]:
    """Settings that change what is scored, or what stays on the base model afterwards."""
    settings, config = adapter.settings, adapter.config
    task, of = settings.get("task_type"), type(base.skeleton).__name__ if base else None
    trained_on = (settings.get("auto_mapping") or {}).get("base_model_class")
    biases = [name for name in adapter.shapes if name.endswith(".bias") and ".lora_" not in name]
    biases = biases if settings.get("bias") not in (None, "none") else []  # a method's own
    whole, not_ours = settings.get("modules_to_save") or [], ("trust_remote_code", "auto_map")
    unknown = sorted(k for k, v in settings.items() if v and not hasattr(config, k))
    unknown = [key for key in unknown if key not in not_ours]
    doubts = {
        f"it was made for the task {task}: it can be attached, but no answers were trained": (
            task not in (None, "CAUSAL_LM")
        ),
        "its task_type is not set, and PEFT then leaves its virtual tokens out when the model is"
        " called": task is None and config.is_prompt_learning,
        "it asks for remote code, which is never run": any(map(settings.get, not_ours)),
        f"it was trained on the class {trained_on}, and the base model given is a {of}": (
            trained_on and base and trained_on != of
        ),
        f"its {CONFIG} sets {named(unknown, 1)}, unknown to the installed PEFT, which ignores it": (
            unknown
        ),
    }
    for text, so in doubts.items():
        if so:
            yield warning("settings", text)
    if why := unscored_reason(config):
        yield error("settings", f"it {why}, so it cannot be scored here")
    yield from _left_by_peft(adapter, biases)
    if whole:
        yield note("settings", f"it replaces whole modules (modules_to_save): {', '.join(whole)}")
    if settings.get("inference_mode") is False:
        text = "its inference_mode is false, so it was not saved by PEFT's save_pretrained"
        yield note("settings", text)
