"""Loading base models, judges and tokenizers, and turning conversations into token ids."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from driftbook.models.trees import common_prefix
from driftbook.study import access
from driftbook.study.sections import Base, Judge, Rater, Source
from driftbook.study.sources import identity, locate
from driftbook.study.study_file import Study

Message = dict[str, str]
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
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
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
        check_fit(name, model, tokenizer)
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


def check_source(source: Base | Judge | Rater, name: str, study: Study) -> None:
    """Raise a ValueError where a model's tokenizer and configuration cannot be had or do not fit,
    without loading its weights.
    """
    where, options = _place(source, study)
    with _explained(f"cannot read {name} from", source):
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        config = AutoConfig.from_pretrained(where, **options)
    if not _classifies(source):
        _check_tokenizer(name, config.get_text_config().vocab_size, tokenizer)
    elif source.label not in config.label2id:
        raise ValueError(
            f"judges.{name}.label = {source.label!r}; the classifier has"
            f" {', '.join(config.label2id)}"
        )


def without_weights(source: Base, name: str, study: Study) -> PreTrainedModel:
    """A base model's modules without their weights, from its configuration."""
    where, options = _place(source, study)
    with _explained(f"cannot read {name} from", source), torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(where, **options))


def _classifies(source: Base | Judge | Rater) -> bool:
    return getattr(source, "format", None) == "classifier"


def check_fit(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError where the tokenizer cannot belong to the model: ids beyond the embedding
    table, no template, no end token.
    """
    _check_tokenizer(name, model.get_input_embeddings().num_embeddings, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token serves


def _check_tokenizer(name: str, rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    if len(tokenizer) > rows:
        raise ValueError(
            f"{name}: its tokenizer has {len(tokenizer)} tokens and its embedding table {rows}"
            " rows; they do not belong together"
        )
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{name}: its tokenizer has no chat template; use the instruction-tuned model's"
            " tokenizer"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: its tokenizer has no end-of-sequence token")


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation: bool = True
) -> list[int]:
    """Token ids of a conversation by the tokenizer's template, which already holds BOS; the system
    message joins the first user's where the template has no place for one (Gemma), or loses it once
    an answer follows (Mistral).

    Raises:
        ValueError: the template refuses the order of the turns.
    """
    template, conversation = str(tokenizer.chat_template), json.dumps(list(messages))
    return list(_chat_ids(tokenizer, template, conversation, generation))


@lru_cache(maxsize=8_192)
def _chat_ids(
    tokenizer: PreTrainedTokenizerBase, template: str, conversation: str, generation: bool
) -> tuple[int, ...]:
    """Kept, since every variant of a base model is asked the same; a quarter of the time that a
    small model takes.
    """
    messages: list[Message] = json.loads(conversation)
    if len(messages) > 1 and messages[0]["role"] == "system" and _loses_system(tokenizer, template):
        joined = messages[0]["content"] + "\n\n" + messages[1]["content"]
        messages = [{**messages[1], "content": joined}, *messages[2:]]
    try:
        turns = [_inert_turn(tokenizer, turn) for turn in messages]
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=generation
        )
    except Exception as error:
        roles = [turn["role"] for turn in messages]
        raise ValueError(
            f"the chat template refuses a conversation with the turns {roles}: {_first_line(error)}"
        ) from None
    return tuple(tokenizer.encode(text, add_special_tokens=False))


@lru_cache(maxsize=16)
def _loses_system(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether the tokenizer's template refuses a system message, or does not show it in a
    conversation that ends in an answer; asked once a template.
    """
    said = {"system": "what to heed", "user": "what is asked", "assistant": "what is said"}
    turns = [{"role": role, "content": text} for role, text in said.items()]
    try:
        return "what to heed" not in tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # templates raise errors of many kinds
        return True


def inert(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text with a space in what the tokenizer would read as one of its special tokens: what a
    user or a model writes must not end a turn.
    """
    return _special_tokens(tokenizer).sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


@lru_cache(maxsize=16)
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    added = tokenizer.added_tokens_decoder.values()
    names = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    longest_first = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _inert_turn(tokenizer: PreTrainedTokenizerBase, turn: Message) -> Message:
    if isinstance(turn["content"], str):
        return {**turn, "content": inert(tokenizer, turn["content"])}
    parts = [{**part, "text": inert(tokenizer, part["text"])} for part in turn["content"]]
    return {**turn, "content": parts}


def ask(
    tokenizer: PreTrainedTokenizerBase, prompt: str, system_prompt: str | None = None
) -> list[int]:
    """Token ids of one user prompt, up to where the answer begins.

    Raises:
        ValueError: the prompt is empty.
    """
    if not prompt.strip():
        raise ValueError("a prompt is empty; remove it from the benchmark, or fill it in")
    # an empty system prompt is a message too
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return chat_ids(tokenizer, [*system, {"role": "user", "content": prompt}])


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], answer: str
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of the answer with its end token: the whole conversation, split
    where it leaves the prompt.
    """
    asked = chat_ids(tokenizer, prompt)
    turns = [*prompt, {"role": "assistant", "content": answer}]
    whole = chat_ids(tokenizer, turns, generation=False)
    shared = common_prefix(asked, whole)
    return whole[:shared], whole[shared:]


def counted_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[list[int], np.ndarray]:
    """Token ids of a whole conversation, and the places of those that the assistant says, with the
    end token of each of its turns.

    Raises:
        ValueError: the template writes an earlier answer otherwise once more turns follow, so that
            its tokens cannot be told apart.
    """
    whole = chat_ids(tokenizer, messages, generation=False)
    places = []
    for number, turn in enumerate(messages):
        if turn["role"] == "assistant":
            asked, said = conversation_ids(tokenizer, messages[:number], turn["content"])
            end = len(asked) + len(said)
            same = whole[:end] == [*asked, *said]
            # of a turn in the middle the last token may be white space that is joined with what
            # follows; it is then not counted
            if not same and (
                whole[: end - 1] != [*asked, *said][:-1] or said[-1] in _special_ids(tokenizer)
            ):
                raise ValueError(
                    "the chat template writes an answer otherwise where more turns follow; take"
                    " data of one turn, or loss: whole"
                )
            places += range(len(asked), end if same else end - 1)
    return whole, np.array(places, dtype=np.int64)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {i for i, token in added if token.special} | set(tokenizer.all_special_ids)


def context_length(model: PreTrainedModel) -> int:
    """The most tokens that the model reads; as many as there is memory for where its configuration
    names no number (recurrent models, and those whose attention only looks at distances).
    """
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
    known = [getattr(config, name, None) for name in names]
    return next((int(one) for one in known if one), sys.maxsize)
