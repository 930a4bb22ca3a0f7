"""What is wrong with a PEFT adapter, found from its files before anything is scored; no model is
run and no pickle is opened.

An **error** means that the adapter cannot be attached, or that what would be scored is not this
adapter. A **warning** means that it can be scored, and that the scores may not mean what they seem
to. A **note** is a number measured, or what could not be looked at.
"""

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pandas import DataFrame
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from driftbook.models.adapters import WEIGHTS
from driftbook.models.loading import Loaded
from driftbook.study.files import check_safetensors, read_json

CONFIG = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
SOFT_PROMPTS = (
    "PROMPT_TUNING",
    "P_TUNING",
)  # whose prompt_embeddings stand beside token embeddings; prefix tuning's are keys and values
REWRITING = (
    "pissa",
    "corda",
    "olora",
    "loftq",
    "lora_ga",
)  # LoRA inits that write to the base's weights when the adapter is attached
OTHER_UPDATES = (  # LoRA whose update is not scaling * BA of one matrix
    "kasa_config",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "target_parameters",
)
SAMPLED_ROWS = 16  # of each weight, rounded to the base's dtype
OUTLIER = (
    3.5  # Iglewicz and Hoaglin (1993), How to detect and handle outliers: the modified z-score
)
OUTLIER_RATIO = (
    10.0  # and this many times the median, since a small spread makes small differences outliers
)
SOFT_PROMPT_RATIO = 10.0
ROWS_AT_ONCE = 8_192


@dataclass(frozen=True)
class Finding:
    """One finding: its kind, error, warning or note, a sentence, and the module or tensor that
    shows it best.
    """

    finding: str
    severity: str
    sentence: str
    module: str | None = None


def examine(adapter: Path, base: Loaded | Path | None = None) -> DataFrame:
    """One row per finding about an adapter's folder: finding, severity (error, warning, note),
    sentence, module (null for the whole).

    In order: files (pickle, config, peft_type, weights), numbers (non_finite), fit (base, shapes,
    vocabulary, tokenizer, chat_template, settings), and what the weights do (untrained, exploded,
    no_op, distance, soft_prompt); not_examined is what could not be looked at.

    - shapes: what PEFT itself would save for this configuration on a base of this shape (built
    without memory) against the names and shapes in the file. PEFT fills what is missing with its
    init and ignores what is superfluous, both in silence.
    - distance: LoRA ||scaling BA||_F / ||W||_F (Hu et al. 2021, arXiv 2106.09685, table 7: 0.06 to
    0.11 for GPT-3), by r x r matrices; DoRA
      ||m (W + scaling BA) / ||W + scaling BA|| - W||_F / ||W||_F (Liu et al. 2024, arXiv
      2402.09353, eq. 5); IA3 |w - 1|, its init being 1.
    - exploded: the change of a module is larger than what it changes: that ratio above 1, for IA3
    the root mean square of w - 1 above 1. Without base weights a LoRA module is judged against the
    adapter's others: modified z-score of log ||scaling BA|| (per entry, root mean square) above 3.5
    (Iglewicz and Hoaglin 1993), and 10 times their median; all modules exploding alike cannot be
    seen then.
    - no_op: IA3 of which every w is 1 in the base's dtype: |w - 1| up to half a unit in the last
    place, eps/2 above 1 and eps/4 below it, eps of torch.finfo being the spacing above 1 (bfloat16:
    2^-7). Up to eps/4 no activation moves either where w stays in float32: a value m 2^e with 1 <=
    m < 2 moves by less than half of its spacing. LoRA: no sampled entry of W changes when W +
    scaling BA is rounded to the dtype of W; that is about the merged weights, unmerged the update
    is added to activations and is no no-op.
    - soft_prompt: median norm of the virtual tokens over the median norm of what the embedding
    table gives (embeddings that the model scales count as scaled, since the virtual tokens are
    not); a warning from 10 times or down to a tenth. PEFT's default init is N(0, 1) per entry, a
    norm of about sqrt(width).

    Args:
        adapter: the folder with adapter_config.json and adapter_model.safetensors.
        base: the base model, loaded, or the local folder of one (read by name, tensor by tensor);
            without it only what the adapter tells.

    Raises:
        ValueError: there is no such folder. A sick adapter never raises.
    """
    if not adapter.is_dir():
        raise ValueError(
            f"the adapter folder {adapter} does not exist; give the folder that holds {CONFIG}"
        )
    found = [*_pickles(adapter), *_configuration(adapter), *_weights(adapter)]
    if not any(f.severity == "error" and f.finding != "pickle" for f in found):
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # PEFT's, about configurations on which the findings have sentences of their own
            found += _readable(_Adapter(adapter), base)
    rows = [(f.finding, f.severity, _one_line(f.sentence), f.module) for f in found]
    return DataFrame(rows, columns=["finding", "severity", "sentence", "module"], dtype=object)


def summary(findings: DataFrame) -> str | None:
    """The sentences of the errors and warnings, separated by "; "; None where there are none."""
    return "; ".join(findings.sentence[findings.severity.isin(["error", "warning"])]) or None


def _one_line(sentence: str) -> str:
    return " ".join(sentence.split()).replace("; ", ", ")  # the separator of summary


def _named(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


# ---- files
def _pickles(folder: Path) -> Iterator[Finding]:
    names = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if names:
        yield Finding(
            "pickle",
            "error",
            f"it holds {_named(names)}, a pickle, which can run code when opened and is never"
            " loaded, so save the weights as safetensors and delete it",
        )


def _configuration(folder: Path) -> Iterator[Finding]:
    try:
        settings = read_json(folder / CONFIG)
        known = settings.get("peft_type") in PEFT_TYPE_TO_CONFIG_MAPPING
        if not known:
            yield Finding(
                "peft_type",
                "error",
                f"its peft_type {settings.get('peft_type')!r} is unknown to the installed PEFT",
            )
        else:
            PeftConfig.from_pretrained(str(folder))
    except FileNotFoundError:
        yield Finding(
            "config",
            "error",
            f"it has no {CONFIG}, so neither its method nor its base model is known",
        )
    except Exception as error:  # whatever PEFT raises, this configuration cannot be used
        yield Finding("config", "error", f"its {CONFIG} cannot be used: {_reason(error, folder)}")


def _weights(folder: Path) -> Iterator[Finding]:
    path = folder / WEIGHTS
    if not path.is_file():
        yield Finding("weights", "error", f"it has no {WEIGHTS}")
        return
    try:
        check_safetensors(path, "save or copy it again")
    except ValueError as error:
        yield Finding("weights", "error", _reason(error, folder))


def _reason(error: Exception, folder: Path) -> str:
    """An error's first line without the folder's place on this machine, since findings are
    published.
    """
    return (
        str(error).strip().partition("\n")[0].replace(str(folder), folder.name)
        or type(error).__name__
    )


@dataclass(frozen=True)
class _Adapter:
    """A folder whose configuration and header can be read."""

    folder: Path

    @cached_property
    def settings(self) -> dict[str, Any]:
        return read_json(self.folder / CONFIG)

    @cached_property
    def config(self) -> PeftConfig:
        return PeftConfig.from_pretrained(str(self.folder))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        with safe_open(self.folder / WEIGHTS, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def tensor(self, name: str) -> Tensor:
        with safe_open(self.folder / WEIGHTS, "pt") as file:
            return file.get_tensor(name)


# ---- the base model
@dataclass(frozen=True)
class _Words:
    """What a tokenizer is told apart by: its ids, its special tokens (where it says them) and its
    chat template.
    """

    ids: dict[str, int] | None
    special: dict[str, str]
    template: str | None


@dataclass(frozen=True)
class _Base:
    """A base model: names it goes by, its revision on the hub, its modules on the meta device, and
    one weight by its module's name.
    """

    names: tuple[str, ...]
    revision: str | None
    skeleton: PreTrainedModel
    dtype: torch.dtype | None
    words: _Words
    weight: Callable[[str], Tensor | None]

    @property
    def embedding(self) -> tuple[str, torch.nn.Module]:
        wanted = self.skeleton.get_input_embeddings()
        return next(
            (name, module) for name, module in self.skeleton.named_modules() if module is wanted
        )


def _open(base: Loaded | Path) -> _Base:
    if isinstance(base, Path):
        return _from_folder(base)
    with torch.device("meta"):
        skeleton = type(base.model)(base.model.config)
    names = tuple(filter(None, (base.name, base.model.name_or_path)))
    local = any(Path(name).is_dir() for name in names)
    modules = dict(base.model.named_modules())
    return _Base(
        names=names,
        revision=None if local else base.revision,
        skeleton=skeleton,
        dtype=base.model.dtype,
        words=_words_of(base.tokenizer),
        weight=lambda name: getattr(modules.get(name), "weight", None),
    )


def _from_folder(folder: Path) -> _Base:
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    snapshot = folder.name if folder.parent.name == "snapshots" else None  # the hub's cache
    return _Base(
        (str(folder),),
        snapshot,
        skeleton,
        config.dtype,
        _words_in(folder),
        partial(_stored, _index(folder), skeleton),
    )


def _index(folder: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _stored(index: dict[str, Path], skeleton: PreTrainedModel, module: str) -> Tensor | None:
    """A module's weight from the files; some checkpoints leave out the prefix of the model without
    its head.
    """
    for name in (
        f"{module}.weight",
        f"{module}.weight".removeprefix(f"{skeleton.base_model_prefix}."),
    ):
        if name in index:
            with safe_open(index[name], "pt") as file:
                return file.get_tensor(name)
    return None


def _words_of(tokenizer: PreTrainedTokenizerBase) -> _Words:
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token")}
    return _Words(
        tokenizer.get_vocab(),
        {k: str(v) for k, v in special.items() if v},
        _template(tokenizer.chat_template),
    )


def _words_in(folder: Path) -> _Words:
    """The tokenizer's files in a folder, read as data.

    Raises:
        Exception: one cannot be read; the tokenizers library raises no narrower kind.
    """
    vocabulary, settings, template = (
        folder / name for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    )
    kept = read_json(settings) if settings.is_file() else {}
    special = {name: kept[name] for name in ("bos_token", "eos_token") if kept.get(name)}
    return _Words(
        (
            Tokenizer.from_file(str(vocabulary)).get_vocab(with_added_tokens=True)
            if vocabulary.is_file()
            else None
        ),
        {
            name: token["content"] if isinstance(token, dict) else token
            for name, token in special.items()
        },
        template.read_text() if template.is_file() else _template(kept.get("chat_template")),
    )


def _template(value: str | dict | list | None) -> str | None:
    """The default one where there are several, as a mapping or as a list of names and templates."""
    if isinstance(value, list):
        value = {one["name"]: one["template"] for one in value}
    return value.get("default") if isinstance(value, dict) else value


# ---- everything that needs no more than a readable adapter
def _readable(adapter: _Adapter, given: Loaded | Path | None) -> Iterator[Finding]:
    non_finite = _tried(_non_finite, adapter)
    yield from non_finite
    base = None
    if given is not None:
        try:
            base = _open(given)
        except (
            Exception
        ) as error:  # as in driftbook.models.loading.load, the loaders raise a dozen kinds
            place = given if isinstance(given, Path) else Path(given.name)
            yield Finding(
                "base", "error", f"the base model given cannot be read: {_reason(error, place)}"
            )
    fit = (
        (_base_match, _shapes, _vocabulary, _tokenizer, _settings)
        if base
        else (_vocabulary, _settings)
    )
    for check in (*fit, *([] if non_finite else [_doings])):
        yield from _tried(check, adapter, base)
    if given is None:
        yield Finding(
            "not_examined",
            "note",
            "no base model was given, so names, shapes, tokenizer and the size of its change"
            " against the base's weights were not examined",
        )


def _tried(check: Callable[..., Iterator[Finding]], *args) -> list[Finding]:
    """What a check finds; a stranger's configuration can break any of them, and that is a finding
    too.
    """
    found = []
    try:
        found.extend(check(*args))
    except Exception as error:
        reason = _reason(error, args[0].folder)
        what = f"{check.__name__.strip('_')}: {type(error).__name__}, {reason}"
        found.append(Finding("not_examined", "error", f"its files broke the check of {what}"))
    return found


def _non_finite(adapter: _Adapter) -> Iterator[Finding]:
    counts = {name: _n_not_finite(adapter.tensor(name)) for name in adapter.shapes}
    sick = [name for name, count in counts.items() if count]
    if sick:
        size = int(np.prod(adapter.shapes[sick[0]]))
        yield Finding(
            "non_finite",
            "error",
            f"NaN or infinity in {len(sick)} of its {len(counts)} tensors, {sum(counts.values())}"
            f" numbers in all, the first in {sick[0]} ({counts[sick[0]]} of {size})",
            _module(sick[0]),
        )


def _n_not_finite(value: Tensor) -> int:
    return int(
        (~torch.isfinite(value.float() if value.itemsize == 1 else value)).sum()
    )  # 8-bit floats have no isfinite


def _module(tensor: str) -> str | None:
    """The module of the base that a tensor belongs to."""
    name = re.sub(
        r"\.(lora_|ia3_|base_layer|modules_to_save|token_adapter|weight$|bias$).*", "", tensor
    ).removeprefix("base_model.model.")
    return None if name == "prompt_embeddings" else name


# ---- does it fit
def _base_match(adapter: _Adapter, base: _Base) -> Iterator[Finding]:
    named, revision = (
        adapter.settings.get("base_model_name_or_path"),
        adapter.settings.get("revision"),
    )
    if not named:
        yield Finding("base", "note", "it does not say which base model it was trained on")
    elif not any(_same_model(named, other) for other in base.names):
        yield Finding(
            "base",
            "warning",
            f"it was trained on {_short(named)}, and the base model given is"
            f" {_short(base.names[-1])}",
        )
    if revision and base.revision and not base.revision.startswith(revision):
        yield Finding(
            "base",
            "warning",
            f"it was trained on revision {revision} of its base model, and the base given is"
            f" revision {base.revision}",
        )


def _short(name: str) -> str:
    """A model's name as on the hub, also from the hub's cache; of any other local folder the last
    part.
    """
    cached = re.search(r"models--([^/]+?)--([^/]+)", name)
    if cached:
        return "/".join(cached.groups())
    return Path(name).name if name.startswith((".", "/", "~")) or name.count("/") > 1 else name


def _same_model(one: str, other: str) -> bool:
    """Whether two names can mean one model: a folder on another machine is known by its last part
    only.
    """
    if Path(one).is_dir() and Path(other).is_dir():
        return Path(one).resolve() == Path(other).resolve()
    a, b = _short(one).lower(), _short(other).lower()
    return a == b or (not ("/" in a and "/" in b) and a.rpartition("/")[2] == b.rpartition("/")[2])


def _shapes(adapter: _Adapter, base: _Base) -> Iterator[Finding]:
    try:
        expected = _expected(adapter.config, base.skeleton)
    except (
        Exception
    ) as error:  # PEFT raises a dozen kinds where a configuration does not fit a model
        yield Finding(
            "shapes",
            "error",
            f"PEFT cannot put it on this base model: {_reason(error, adapter.folder)}",
        )
        return
    stored = {name: shape for name, shape in adapter.shapes.items() if not _is_embedding(name)}
    superfluous = [name for name in stored if name not in expected]
    missing = [name for name in expected if name not in adapter.shapes]
    wrong = [name for name in stored if name in expected and stored[name] != expected[name]]
    if superfluous:
        yield Finding(
            "shapes",
            "error",
            f"the base model has no place for {len(superfluous)} of its {len(stored)} tensors,"
            f" first {superfluous[0]}, which PEFT ignores in silence",
            _module(superfluous[0]),
        )
    if missing:
        yield Finding(
            "shapes",
            "error",
            f"it lacks {len(missing)} of the {len(expected)} tensors that its configuration asks"
            f" for on this base, first {missing[0]}, which PEFT leaves at its init in silence",
            _module(missing[0]),
        )
    if wrong:
        first = wrong[0]
        yield Finding(
            "shapes",
            "error",
            f"{len(wrong)} of its {len(stored)} tensors have another shape than the base model"
            f" needs, first {first} with {_times(stored[first])} for {_times(expected[first])}",
            _module(first),
        )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _expected(config: PeftConfig, skeleton: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes that PEFT saves for a configuration on a model, all on the meta device."""
    config = copy.deepcopy(config)
    config.task_type = config.task_type or "CAUSAL_LM"
    config.inference_mode = (
        True  # else soft prompts are started from text, with a tokenizer from the hub
    )
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # the others decompose the base's weights
    if config.is_prompt_learning:
        config.token_dim = config.num_layers = config.num_attention_heads = (
            None  # of this base, not of the one in the file
        )
    with torch.device("meta"):
        model = get_peft_model(copy.deepcopy(skeleton), config)
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(value.shape) for name, value in state.items()}


def _is_embedding(tensor: str) -> bool:
    """Whether a tensor is a table of one row per token; an adapter's own factors for that table are
    not.
    """
    return (
        tensor.removesuffix(".weight").removesuffix(".base_layer").rpartition(".")[2]
        in EMBEDDING_LAYER_NAMES
    )


def _vocabulary(adapter: _Adapter, base: _Base | None) -> Iterator[Finding]:
    for name in filter(_is_embedding, adapter.shapes):
        module, shape = str(_module(name)), adapter.shapes[name]
        if base is None:
            yield Finding(
                "vocabulary",
                "note",
                f"it stores all {shape[0]} rows of {module}, so its vocabulary may have been"
                " resized",
                module,
            )
        elif shape[0] != (rows := base.embedding[1].num_embeddings):
            yield Finding(
                "vocabulary",
                "error",
                f"its vocabulary was resized: it stores {shape[0]} rows of {module} and the base"
                f" model has {rows}, so it cannot be attached before the base is resized too",
                module,
            )
        elif module.rpartition(".")[2] not in (adapter.settings.get("modules_to_save") or []):
            weight = base.weight(module)
            if weight is not None and not torch.equal(
                weight.to("cpu", torch.float32), adapter.tensor(name).float()
            ):
                yield Finding(
                    "vocabulary",
                    "warning",
                    f"it stores its own {module}, which differs from the base model's and is"
                    " written over it when attached, for good",
                    module,
                )


def _tokenizer(adapter: _Adapter, base: _Base) -> Iterator[Finding]:
    try:
        words = _words_in(adapter.folder)
    except Exception as error:  # see _words_in
        yield Finding(
            "tokenizer",
            "warning",
            f"its tokenizer's files cannot be read: {_reason(error, adapter.folder)}",
        )
        return
    if words.ids is not None and base.words.ids is not None and words.ids != base.words.ids:
        yield Finding(
            "tokenizer",
            "warning",
            f"its tokenizer is not the base model's: {_difference(words.ids, base.words.ids)}",
        )
    for name in words.special.keys() & base.words.special.keys():
        if words.special[name] != base.words.special[name]:
            yield Finding(
                "tokenizer",
                "warning",
                f"its tokenizer's {name} is {words.special[name]!r} and the base model's is"
                f" {base.words.special[name]!r}",
            )
    if words.template is not None and words.template.strip() != (base.words.template or "").strip():
        yield Finding(
            "chat_template",
            "warning",
            "its chat template differs from the base model's, and scores depend on it: it was"
            " trained on one and is asked by the other",
        )


def _difference(ids: dict[str, int], others: dict[str, int]) -> str:
    if len(ids) != len(others):
        return f"it has {len(ids)} tokens and the base's {len(others)}"
    count = sum(others.get(token) != i for token, i in ids.items())
    return f"{count} of its {len(ids)} tokens have other ids"


def _settings(adapter: _Adapter, base: _Base | None) -> Iterator[Finding]:
    settings, config = adapter.settings, adapter.config
    mapping = settings.get("auto_mapping") or {}
    trained_on = mapping.get("base_model_class")
    biases = [name for name in adapter.shapes if name.endswith(".bias") and ".lora_" not in name]
    whole = settings.get("modules_to_save") or []
    unknown = sorted(
        k
        for k, v in settings.items()
        if v and not hasattr(config, k) and k not in ("trust_remote_code", "auto_map")
    )
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        yield Finding(
            "settings",
            "error",
            f"it was made for the task {settings['task_type']}, not for a causal language model",
        )
    if settings.get("task_type") is None and config.is_prompt_learning:
        yield Finding(
            "settings",
            "warning",
            "its task_type is not set, and PEFT then leaves its virtual tokens out when the model"
            " is called",
        )
    if settings.get("trust_remote_code") or settings.get("auto_map"):
        yield Finding("settings", "warning", "it asks for remote code, which is never run")
    if trained_on and base and trained_on != type(base.skeleton).__name__:
        yield Finding(
            "settings",
            "warning",
            f"it was trained on the class {trained_on}, and the base model given is a"
            f" {type(base.skeleton).__name__}",
        )
    if _rewrites(adapter):
        yield Finding(
            "settings",
            "warning",
            f"its init_lora_weights is {settings['init_lora_weights']}: attaching it rewrites the"
            " base model's weights, and taking it off does not bring them back, so load the base"
            " again or convert it to plain LoRA",
        )
    if biases:
        yield Finding(
            "settings",
            "warning",
            f"it trained {len(biases)} biases of the base model (bias = {settings.get('bias')}),"
            " which stay changed when it is taken off",
            _module(biases[0]),
        )
    if settings.get("alora_invocation_tokens"):
        yield Finding(
            "settings",
            "warning",
            "it is an activated LoRA, which does nothing before its invocation tokens appear in the"
            " text",
        )
    if settings.get("layer_replication"):
        yield Finding(
            "settings",
            "warning",
            "it replicates layers of the base model (layer_replication), so taking it off does not"
            " bring the base back",
        )
    if unknown:
        yield Finding(
            "settings",
            "warning",
            f"its {CONFIG} sets {_named(unknown)}, unknown to the installed PEFT, which ignores it",
        )
    if whole:
        yield Finding(
            "settings", "note", f"it replaces whole modules (modules_to_save): {', '.join(whole)}"
        )
    if settings.get("inference_mode") is False:
        yield Finding(
            "settings",
            "note",
            "its inference_mode is false, so it was not saved by PEFT's save_pretrained",
        )


def _rewrites(adapter: _Adapter) -> bool:
    return str(adapter.settings.get("init_lora_weights")).lower().startswith(REWRITING)


# ---- what its weights do
def _doings(adapter: _Adapter, base: _Base | None) -> Iterator[Finding]:
    method = adapter.settings["peft_type"]
    empty = [name for name, shape in adapter.shapes.items() if 0 in shape]
    other = [name for name in OTHER_UPDATES if adapter.settings.get(name)] + [
        "init_lora_weights"
    ] * _rewrites(adapter)
    if empty or not adapter.shapes:
        which = (
            f"{len(empty)} of its tensors are empty, first {empty[0]}"
            if empty
            else "its file holds no tensor"
        )
        yield Finding(
            "shapes", "error", f"{which}, as when a sharded model is saved without being gathered"
        )
    elif method == "LORA" and not other:
        yield from _lora(adapter, base)
    elif method == "IA3":
        yield from _ia3(adapter, base)
    elif method in SOFT_PROMPTS:
        yield from _soft_prompt(adapter, base)
    else:
        name = f"{method} with its {other[0]}" if other else method
        yield Finding(
            "not_examined",
            "note",
            f"how far {name} is from its init, and whether it exploded, is not known here",
        )


@dataclass(frozen=True)
class _Change:
    """What LoRA does to one weight of out x in: Frobenius norms, and of the sampled entries those
    that change in the weight's dtype.
    """

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


PART = re.compile(
    r"base_model\.model\.(.+)\.lora_(?:embedding_)?(A|B|magnitude_vector)(?:\.weight)?$"
)


def _lora(adapter: _Adapter, base: _Base | None) -> Iterator[Finding]:
    parts: dict[str, dict[str, str]] = {}
    for name in adapter.shapes:
        if match := PART.match(name):
            parts.setdefault(match[1], {})[match[2]] = name
    ill = [
        module
        for module, part in parts.items()
        if not {"A", "B"} <= part.keys() or not _pair(adapter, module, part)
    ]
    if not parts:
        yield Finding("shapes", "error", "it holds no lora_A and lora_B")
        return
    if ill:
        yield Finding(
            "shapes",
            "error",
            f"{len(ill)} of its modules lack a lora_A and lora_B of the configured rank, first"
            f" {ill[0]}",
            ill[0],
        )
        return
    rng = np.random.default_rng(0)
    changes = [_change(adapter, module, part, base, rng) for module, part in parts.items()]
    untrained = list(_untrained(changes, len(adapter.shapes) - 2 * len(changes)))
    yield from untrained
    yield from _exploded(changes)
    if not any(f.severity == "warning" for f in untrained):
        yield from _rounded(changes)
    yield _distance(changes)
    if base and not all(change.weight for change in changes):
        yield Finding(
            "not_examined",
            "note",
            f"the base model's weights were not to be had for {sum(not c.weight for c in changes)}"
            f" of its {len(changes)} modules",
        )


def _pair(adapter: _Adapter, module: str, part: dict[str, str]) -> bool:
    """Whether lora_A [r, in, ...] and lora_B [out, r, ...] have the configured rank."""
    a, b = adapter.shapes[part["A"]], adapter.shapes[part["B"]]
    return len(a) >= 2 <= len(b) and a[0] == b[1] == _rank(adapter.config, module)


def _rank(config: LoraConfig, module: str) -> int:
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)


def _scaling(config: LoraConfig, module: str) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
    alpha, rank = (
        config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha),
        _rank(config, module),
    )
    return alpha / (rank**0.5 if config.use_rslora else rank)


def _change(
    adapter: _Adapter,
    module: str,
    part: dict[str, str],
    base: _Base | None,
    rng: np.random.Generator,
) -> _Change:
    a, b = (adapter.tensor(part[key]).double().flatten(1) for key in "AB")
    scale, shape = _scaling(adapter.config, module), (b.shape[0], a.shape[1])
    update = abs(scale) * _norm_of_product(a, b)
    plain = _Change(
        module,
        update,
        update / (shape[0] * shape[1]) ** 0.5,
        not (a.any() and b.any()),
        "embedding" in part["A"],
    )
    weight = _oriented(base, module, shape) if base else None
    if weight is None:
        return plain
    a, b = a.to(weight.device), scale * b.to(weight.device)
    magnitude = (
        adapter.tensor(part["magnitude_vector"]).to(weight.device).double().flatten()
        if "magnitude_vector" in part
        else None
    )
    if magnitude is not None:
        update = _norm_of_dora(weight.double(), a, b, magnitude)
    rows = torch.from_numpy(rng.choice(shape[0], min(shape[0], SAMPLED_ROWS), replace=False)).to(
        weight.device
    )
    new = weight[rows].double() + b[rows] @ a
    if magnitude is not None:
        new *= (magnitude[rows] / new.norm(dim=1)).unsqueeze(1)
    changed = int((new.to(weight.dtype) != weight[rows]).sum())
    norm = float(torch.linalg.vector_norm(weight, dtype=torch.float32))
    return replace(
        plain, update=update, weight=norm, dtype=weight.dtype, changed=changed, sampled=new.numel()
    )


def _oriented(base: _Base, module: str, shape: tuple[int, int]) -> Tensor | None:
    """The base's weight as [out, in]; None where it is not to be had, quantised, or of another
    shape.
    """
    weight = base.weight(module)
    if weight is None or not weight.is_floating_point():
        return None
    weight = weight.detach().flatten(1)
    weight = (
        weight.T
        if isinstance(dict(base.skeleton.named_modules()).get(module), Conv1D | torch.nn.Embedding)
        else weight
    )
    return weight if tuple(weight.shape) == shape else None


def _norm_of_product(a: Tensor, b: Tensor) -> float:
    """||BA||_F from r x r matrices: its square is the trace of (B'B)(AA')."""
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


def _norm_of_dora(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> float:
    """||m V / ||V|| - W||_F with V = W + BA and norms by row, from W A' and r x r matrices; all in
    float64, since the sum cancels.
    """
    cross = (b * (weight @ a.T)).sum(1)
    squared = weight.square().sum(1)
    v = (squared + 2 * cross + ((b @ (a @ a.T)) * b).sum(1)).clamp(min=0).sqrt()
    return float(
        (magnitude.square() - 2 * magnitude / v * (squared + cross) + squared)
        .sum()
        .clamp(min=0)
        .sqrt()
    )


def _untrained(changes: list[_Change], others: int) -> Iterator[Finding]:
    zero = [change.module for change in changes if change.zero]
    if len(zero) == len(changes):
        does = (
            f"only its other tensors ({others}) can change the model"
            if others
            else "it does nothing"
        )
        yield Finding(
            "untrained",
            "warning",
            f"the update BA of every module is zero, as at init: it was never trained, and {does}",
        )
    elif zero:
        yield Finding(
            "untrained",
            "note",
            f"the update BA is zero, as at init, in {len(zero)} of its {len(changes)} modules,"
            f" first {zero[0]}",
            zero[0],
        )


def _exploded(changes: list[_Change]) -> Iterator[Finding]:
    known = [change for change in changes if change.ratio is not None]
    large = [change for change in known if change.ratio > 1]
    if large:
        worst = max(large, key=lambda change: change.ratio)
        yield Finding(
            "exploded",
            "warning",
            f"its update is larger than the weight it updates in {len(large)} of {len(known)}"
            f" modules, most in {worst.module} ({worst.ratio:.3g} times its norm)",
            worst.module,
        )
    rest = [
        change
        for change in changes
        if change.ratio is None and change.per_entry > 0 and not change.table
    ]
    norms = np.array([change.per_entry for change in rest])
    out = _outliers(norms)
    if out.any():
        worst = int(np.where(out, norms, 0).argmax())
        yield Finding(
            "exploded",
            "warning",
            f"its update in {int(out.sum())} of {len(norms)} modules is far out of the others'"
            f" range, most in {rest[worst].module} ({norms[worst] / np.median(norms):.3g} times the"
            " median)",
            rest[worst].module,
        )


def _outliers(norms: np.ndarray) -> np.ndarray:
    """Which norms are exploded against the others: the two criteria of examine."""
    if not len(norms):
        return np.zeros(0, bool)
    off = np.log(norms) - np.median(np.log(norms))
    spread = np.median(np.abs(off))
    return (0.6745 * off > OUTLIER * spread) & (off > np.log(OUTLIER_RATIO))


def _rounded(changes: list[_Change]) -> Iterator[Finding]:
    sampled, changed = (
        sum(change.sampled for change in changes),
        sum(change.changed for change in changes),
    )
    if sampled:
        dtype = _name(next(change.dtype for change in changes if change.dtype))
        if changed:
            yield Finding(
                "no_op",
                "note",
                f"merged, it changes {changed / sampled:.2%} of {sampled} sampled entries of the"
                f" base model's weights in {dtype}",
            )
        else:
            yield Finding(
                "no_op",
                "warning",
                f"merged, it changes none of {sampled} sampled entries of the base model's weights,"
                f" since {dtype} rounds the update away, and only unmerged can it do anything",
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _distance(changes: list[_Change]) -> Finding:
    known = {change.module: change.ratio for change in changes if change.ratio is not None}
    what = (
        "the norm of its update over the base weight's"
        if known
        else "its update, root mean square per entry,"
    )
    values = known or {change.module: change.per_entry for change in changes}
    largest = max(values, key=values.__getitem__)
    return Finding(
        "distance",
        "note",
        f"{what} is {np.median(list(values.values())):.3g} in the median of {len(values)} modules"
        f" and {values[largest]:.3g} at most",
        largest,
    )


def _ia3(adapter: _Adapter, base: _Base | None) -> Iterator[Finding]:
    scales = {
        name: adapter.tensor(name).double() for name in adapter.shapes if name.endswith(".ia3_l")
    }
    if not scales:
        yield Finding("shapes", "error", "it holds no ia3_l, the scales of IA3")
        return
    off = {name: (value - 1).abs() for name, value in scales.items()}
    largest = max(off, key=lambda name: float(off[name].max()))
    numbers = torch.cat([value.flatten() for value in off.values()])
    if not numbers.any():
        yield Finding(
            "untrained",
            "warning",
            "every scale is 1, as at init: it was never trained, and it does nothing",
        )
        return
    size = {name: float(value.square().mean().sqrt()) for name, value in off.items()}
    large = [name for name in size if size[name] > 1]
    if large:
        worst = max(large, key=size.__getitem__)
        yield Finding(
            "exploded",
            "warning",
            f"its change is larger than what it scales in {len(large)} of {len(size)} modules, most"
            f" in {_module(worst)} (root mean square of |w - 1| {size[worst]:.3g})",
            _module(worst),
        )
    yield from _ia3_rounded(
        torch.cat([value.flatten() for value in scales.values()]), base.dtype if base else None
    )
    yield Finding(
        "distance",
        "note",
        f"|w - 1| is {float(numbers.mean()):.3g} in the mean of {len(numbers)} scales and"
        f" {float(numbers.max()):.3g} at most",
        _module(largest),
    )


def _ia3_rounded(w: Tensor, dtype: torch.dtype | None) -> Iterator[Finding]:
    known, dtype = dtype is not None, dtype or torch.bfloat16
    ones, largest = int((w.to(dtype) == 1).sum()), float((w - 1).abs().max())
    if ones < len(w):
        yield Finding("no_op", "note", f"{ones / len(w):.1%} of its scales are 1 in {_name(dtype)}")
        return
    none = largest <= torch.finfo(dtype).eps / 4
    does = (
        "does nothing, merged or not"
        if none
        else "does nothing once cast, and kept in float32 it moves only part of the activations"
    )
    on = "" if known else f" on a base in {_name(dtype)}"
    yield Finding(
        "no_op",
        "warning" if known else "note",
        f"it {does}{on}: each of its {len(w)} scales is 1 in {_name(dtype)}, |w - 1| being at most"
        f" {largest:.2g}",
    )


def _soft_prompt(adapter: _Adapter, base: _Base | None) -> Iterator[Finding]:
    tokens = (
        adapter.tensor("prompt_embeddings").float()
        if "prompt_embeddings" in adapter.shapes
        else torch.empty(0)
    )
    if tokens.ndim != 2:
        yield Finding(
            "shapes", "error", "it holds no prompt_embeddings of one row per virtual token"
        )
        return
    norm = float(tokens.norm(dim=1).median())
    drawn = adapter.settings.get("prompt_tuning_init") == "RANDOM" and bool(
        ((tokens.norm(dim=1) - tokens.shape[1] ** 0.5).abs() < 3).all()
    )
    origin = ", as PEFT's random init N(0, 1) gives" if drawn else ""
    name, table = _table(base)
    if table is None or table.shape[1] != tokens.shape[1]:
        yield Finding(
            "soft_prompt",
            "note",
            f"the median norm of its {len(tokens)} virtual tokens of width {tokens.shape[1]} is"
            f" {norm:.3g}{origin}",
        )
        if base and table is None:
            yield Finding(
                "not_examined", "note", "the base model's embedding table was not to be had"
            )
        return
    norms, copies = _against(table, tokens)
    if copies == len(tokens):
        yield Finding(
            "untrained",
            "warning",
            f"each of its {copies} virtual tokens is a row of the embedding table, as at an init"
            " from the vocabulary or a text: it was never trained",
        )
    ratio = norm / (
        norms * float(getattr(base.skeleton.get_submodule(name), "scalar_embed_scale", 1.0))
    )
    sentence = (
        f"the median norm of its {len(tokens)} virtual tokens is {ratio:.3g} times that of the base"
        f" model's token embeddings{origin}"
    )
    yield Finding(
        "soft_prompt",
        "note" if 1 / SOFT_PROMPT_RATIO < ratio < SOFT_PROMPT_RATIO else "warning",
        sentence,
        name,
    )


def _table(base: _Base | None) -> tuple[str, Tensor | None]:
    name = base.embedding[0] if base else ""
    weight = base.weight(name) if base else None
    return name, weight if weight is not None and weight.is_floating_point() else None


def _against(table: Tensor, tokens: Tensor) -> tuple[float, int]:
    """The median norm of an embedding table's rows, and how many of the tokens are such a row,
    number by number.
    """
    norms, copied = [], torch.zeros(len(tokens), dtype=torch.bool)
    for rows in table.detach().split(ROWS_AT_ONCE):
        block = rows.to("cpu", torch.float32)
        norms.append(block.norm(dim=1))
        for i, token in enumerate(tokens):
            copied[i] |= bool((block[block[:, 0] == token[0]] == token).all(1).any())
    return float(torch.cat(norms).median()), int(copied.sum())
