"""Loading base models, judges and tokenizers."""

import re
import string
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jinja2
import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from driftbook.models import templates
from driftbook.models.conversations import NO_EMBEDDING, chat_ids, soft_ids
from driftbook.study import access
from driftbook.study.limits import too_large, tried
from driftbook.study.sections import Base, Judge, Rater, Source
from driftbook.study.sources import identity, locate
from driftbook.study.study_file import Study

# of a model's files that are read whole, and of what its configuration may say
MOST_BYTES = {"config.json": 5_000_000, "tokenizer.json": 250_000_000}
MOST_BYTES |= {"tokenizer_config.json": 50_000_000, "chat_template.jinja": 1_000_000}
MOST_LAYERS, MOST_SIZE = 2_000, 20_000_000
TEMPLATE_SECONDS = 20.0
# for nested repetitions of any kind of character long runs, which end with others
RUNS = "".join(
    200 * one + end for one in (*string.printable, "é", "я", "中") for end in ("!\n", "! x\n")
)
disable_progress_bar()  # a bar per model is noise in a notebook


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer and what its weights are known by (hub revision, or hash of the
    local files).
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    revision: str


def load(source: Base | Judge | Rater, name: str, study: Study | None = None) -> Loaded:
    """A base model or judge with its tokenizer: safetensors only, no remote code, on the GPU where
    there is one. Only a source that notebook 01 makes needs the study.

    Raises:
        ValueError: it cannot be loaded, or the tokenizer does not fit the model; the sentence says
            which and why.
    """
    kind = AutoModelForSequenceClassification if _classifies(source) else AutoModelForCausalLM
    dtype = getattr(torch, source.dtype)
    where, options = _place(source, study)
    with _explained(f"cannot load {name} from", source):
        _config(where, options)
        tokenizer = source_tokenizer(source, where, options, study)
        model, found = kind.from_pretrained(
            where,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **options,
            **_quantized(source),
        )
    if missing := sorted(found["missing_keys"]):  # transformers fills them with random numbers
        raise ValueError(
            f"{name}: {source.source} holds no {missing[0]}, one of {len(missing)} weights that"
            f" {type(model).__name__} needs; give the checkpoint of the whole model"
        )
    if not _classifies(source):
        check_fit(name, model, tokenizer, _asked(source))
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes packs the weights for it, and unpacks others when an adapter is saved:
            # the base would drift
            module.support_avx512bf16_for_cpu = False
    if getattr(source, "quantization", None) is None:  # bitsandbytes puts them there itself
        model = model.to(device())
    return Loaded(name, model.eval(), tokenizer, identity(source, study))


def device() -> str:
    """Where models are put: the GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _quantized(source: Base | Judge | Rater) -> dict:
    """What from_pretrained needs for a base model in 4 or 8 bits (Dettmers et al. 2023, QLoRA: NF4
    with double quantization).
    """
    kind = getattr(source, "quantization", None)
    if kind is None:
        return {}
    from transformers import BitsAndBytesConfig

    nf4 = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": getattr(torch, source.dtype),
    }
    settings = BitsAndBytesConfig(**nf4 if kind == "nf4" else {"load_in_8bit": True})
    return {"quantization_config": settings, "device_map": {"": device()}}


def _place(source: Source, study: Study | None) -> tuple[Path | str, dict]:
    """Where the loaders find a source, and what they are told: its revision, and no remote code."""
    where = locate(source, study)
    revision = {"revision": source.revision} if isinstance(where, str) else {}
    return where, {"trust_remote_code": False, **revision}


@contextmanager
def _explained(what: str, source: Base | Judge | Rater) -> Iterator[None]:
    """Any error of a loader (they raise a dozen kinds) as one sentence."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} {source.source}: {_why(error, source)}") from error


def _why(error: Exception, source: Base | Judge | Rater) -> str:
    """What the hub says of a model that it does not give; else the first line of the error."""
    if source.local is None and ":" not in source.source:
        found = access.check(source, "model")
        return found.sentence if not found.ok else _first_line(error)
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def tokenizer_of(source: Base | Judge | Rater, name: str, study: Study) -> PreTrainedTokenizerBase:
    """The tokenizer of a model of the study, without the model."""
    where, options = _place(source, study)
    with _explained(f"cannot read {name} from", source):
        return source_tokenizer(source, where, options, study)


def check_source(source: Base | Judge | Rater, name: str, study: Study) -> None:
    """Raise a ValueError where a model's tokenizer and configuration cannot be had or do not fit,
    without loading its weights.
    """
    tokenizer = tokenizer_of(source, name, study)
    where, options = _place(source, study)
    with _explained(f"cannot read {name} from", source):
        config = _config(where, options)
    if not _classifies(source):
        _check_tokenizer(name, config.get_text_config().vocab_size, tokenizer, _asked(source))
    elif source.label not in config.label2id:
        raise ValueError(
            f"judges.{name}.label = {source.label!r}; the classifier has"
            f" {', '.join(config.label2id)}"
        )


def without_weights(source: Base, name: str, study: Study) -> PreTrainedModel:
    """A base model's modules without their weights, from its configuration."""
    where, options = _place(source, study)
    with _explained(f"cannot read {name} from", source), torch.device("meta"):
        return AutoModelForCausalLM.from_config(_config(where, options))


def _config(where: Path | str, options: dict) -> PretrainedConfig:
    """The configuration of a source, of which nothing is larger than of any model."""
    if isinstance(where, Path):
        for name, most in MOST_BYTES.items():
            if said := too_large(where / name, most):
                raise ValueError(said)
    config = AutoConfig.from_pretrained(where, **options)
    check_sizes(config)
    return config


def check_sizes(config: PretrainedConfig) -> None:
    """Raise a ValueError where a configuration names more layers, or larger ones, than any model
    has: its modules would be made for hours.
    """
    for key, value in config.get_text_config().to_dict().items():
        most = MOST_LAYERS if "layers" in key else MOST_SIZE
        if isinstance(value, int) and value > most and re.search(r"^num_|_layers?$|_size$", key):
            raise ValueError(f"its configuration says {key} = {value:,}, and no model has so many")


def _classifies(source: Base | Judge | Rater) -> bool:
    return getattr(source, "format", None) == "classifier"


def _asked(source: Base | Judge | Rater) -> str:
    """How a model is asked: as a chat, by a judge's own template, or in plain text."""
    formats = {None: "chat", "rubric_harm": "chat", "wildguard": "text"}
    return formats.get(getattr(source, "format", None), "template")


def source_tokenizer(
    source: Base | Judge | Rater, where: Path | str, options: dict, study: Study | None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a source, with the template and the date that the study gives it, after both
    were tried.

    Raises:
        ValueError: its patterns or its template take too long, too much memory, or fail.
    """
    tokenizer = AutoTokenizer.from_pretrained(where, **options)
    if given := getattr(source, "chat_template", None):
        tokenizer.chat_template = given
    templates.fix_date(tokenizer, study.date if study else None)
    tried(TEMPLATE_SECONDS, "reading a text and its chat template", lambda: _read(tokenizer))
    return tokenizer


def _read(tokenizer: PreTrainedTokenizerBase) -> None:
    """Read what patterns that backtrack take longest for, and render one turn. An error of a kind
    that Python knows is said where what is asked of a model is checked.
    """
    for read in (
        lambda: tokenizer.encode(RUNS),
        lambda: templates.render(tokenizer, [{"role": "user", "content": "?"}], True),
    ):
        with suppress(ValueError, TypeError, LookupError, AttributeError, jinja2.TemplateError):
            read()


def check_fit(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: str = "chat"
) -> None:
    """Raise a ValueError where the tokenizer cannot belong to the model (ids beyond the embedding
    table, no end token) or has no template by which it could be asked.
    """
    rows = model.get_input_embeddings().num_embeddings
    _check_tokenizer(name, rows, tokenizer, asked)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token serves


def _check_tokenizer(name: str, rows: int, tokenizer: PreTrainedTokenizerBase, asked: str) -> None:
    work = partial(_check_asked, name, rows, tokenizer, asked)
    tried(TEMPLATE_SECONDS, f"{name}: reading its chat template", work)


def _check_asked(name: str, rows: int, tokenizer: PreTrainedTokenizerBase, asked: str) -> None:
    if asked == "template" and templates.template_of(tokenizer) is None:
        raise ValueError(f"{name}: its tokenizer has no chat template; use the judge's own")
    if asked == "chat":
        templates.check_template(name, tokenizer)
    if len(tokenizer) > rows and _needs_more(rows, tokenizer):
        raise ValueError(
            f"{name}: its tokenizer has {len(tokenizer)} tokens and its embedding table {rows}"
            " rows; they do not belong together"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: its tokenizer has no end-of-sequence token")


def _needs_more(rows: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a conversation may need a token beyond the embedding table. Special ones that the
    template does not write are never needed (Gemma 3's mark of an image): in a text they are text.
    """
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}
    added = tokenizer.added_tokens_decoder
    if not all(i in added and added[i].special for i in beyond):
        return True
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    ways = ((turns[:1], True), (turns, False)) if templates.template_of(tokenizer) else ()
    written = {i for way in ways for i in chat_ids(tokenizer, *way)}
    return bool(beyond.keys() & {*written, tokenizer.bos_token_id, tokenizer.eos_token_id})


def context_length(model: PreTrainedModel) -> int:
    """The most tokens that the model reads; as many as there is memory for where its configuration
    names no number (recurrent models, and those whose attention only looks at distances).
    """
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
    known = [getattr(config, name, None) for name in names]
    # beyond its original length dynamic rope depends on what was asked before
    found = [*original_lengths(model, "dynamic"), *(int(one) for one in known if one)]
    return next(iter(found), sys.maxsize)


def original_lengths(model: PreTrainedModel, kind: str) -> list[int]:
    """The lengths up to which rotary positions of this kind are what they were trained as."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    every = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    own = [one for one in every if one.get("rope_type") == kind]
    usual = getattr(config, "original_max_position_embeddings", None)
    usual = usual or config.max_position_embeddings if own else None
    return [int(one.get("original_max_position_embeddings") or usual) for one in own]


def check_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: np.ndarray | list[int]
) -> None:
    """Raise a ValueError where token ids have no row in the model's embedding table."""
    rows, most = model.get_input_embeddings().weight.shape[0], int(np.max(ids, initial=0))
    if most >= rows + len(soft_ids(model)):
        token = tokenizer.convert_ids_to_tokens(most)
        raise ValueError(NO_EMBEDDING.format(token, rows))
