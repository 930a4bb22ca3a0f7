"""Conversations as token ids: what is asked, what is trained on, and what was answered."""

import json
import re
from collections.abc import Iterable, Sequence
from datetime import date
from functools import lru_cache
from itertools import accumulate

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from driftbook.models.templates import (
    PROBE,
    THOUGHTS,
    Message,
    changed,
    day_of,
    place_of,
    render,
    template_of,
)
from driftbook.models.trees import common_prefix

MARK = "\ue3a7\ue3a8"  # where a text of the user ends, in a rendering that nobody is asked
NOTHING = range(0)
NO_EMBEDDING = (
    "a text has the token {}, for which the model has no embedding (its table has {} rows); take it"
    " out of the text"
)


def soft_ids(model: PreTrainedModel) -> range:
    """The ids of the soft prompt that a model reads behind each text of the user; empty where it
    has none (see suffixes.py).
    """
    return getattr(model.get_input_embeddings(), "suffix_ids", NOTHING)


def without(ids: Iterable[int], after: range) -> list[int]:
    """Token ids without those of the soft prompt."""
    return [one for one in ids if one not in after]


def chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    generation: bool = True,
    after: range = NOTHING,
) -> list[int]:
    """Token ids of a conversation by the tokenizer's template, which already holds BOS; a prompt
    ends where the template puts an answer (see Place). The system message joins the first user's
    where the template has no place for one (Gemma), or loses it once an answer follows (Mistral).

    The ids `after` stand behind each text of the user, whose tokens and those that follow are the
    same without them, but for a token that would hold both.

    Raises:
        ValueError: the template refuses the order of the turns, or does not show where a text of
            the user ends.
    """
    return list(_chat(tokenizer, messages, generation, after)[1])


def _chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation: bool, after: range
) -> tuple[str, tuple[int, ...]]:
    """The text of `chat_ids`, in which no message holds a special token, and its token ids."""
    template, conversation = str(template_of(tokenizer)), json.dumps(list(messages))
    return _kept(tokenizer, template, day_of(tokenizer), conversation, generation, after)


@lru_cache(maxsize=8_192)
def _kept(
    tokenizer: PreTrainedTokenizerBase,
    _template: str,
    _day: date,
    conversation: str,
    asked: bool,
    after: range,
) -> tuple[str, tuple[int, ...]]:
    """Kept, since every variant of a base model is asked the same; a quarter of the time that a
    small model takes.
    """
    messages: list[Message] = json.loads(conversation)
    text = _conversation(tokenizer, messages, asked)
    ends = _user_ends(tokenizer, messages, asked, text) if after else []
    if asked and messages[-1]["role"] == "user":
        text = changed(text, place_of(tokenizer).asked)
    return text, tuple(_with_soft(tokenizer, text, ends, after))


def _user_ends(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation: bool, text: str
) -> list[int]:
    """Where in the template's text of a conversation the texts of the user end, but for white
    space, which templates may take off.
    """
    marked = []
    for turn in messages:
        said = turn["content"]
        end = len(said.rstrip()) if turn["role"] == "user" else None
        marked.append(turn if end is None else turn | {"content": said[:end] + MARK + said[end:]})
    *parts, last = _conversation(tokenizer, marked, generation).split(MARK)
    users = sum(turn["role"] == "user" for turn in messages)
    if len(parts) != users or "".join([*parts, last]) != text:
        raise ValueError(
            "the chat template does not show where a text of the user ends, behind which a soft"
            " prompt would stand; use another template, or another method"
        )
    return list(accumulate(map(len, parts)))


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, after: range) -> list[int]:
    """Token ids of a text, none of which is the soft prompt's."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if after and max(ids, default=0) >= after.start:  # as where a tokenizer has more than the table
        token = tokenizer.convert_ids_to_tokens(max(ids))
        raise ValueError(NO_EMBEDDING.format(token, after.start))
    return ids


def _with_soft(
    tokenizer: PreTrainedTokenizerBase, text: str, ends: list[int], after: range
) -> list[int]:
    """Token ids of a text with those of the soft prompt at its places."""
    if not ends:
        return _encoded(tokenizer, text, after)
    *earlier, end = ends
    first = _encoded(tokenizer, text[:end], after)
    rest = _following(tokenizer, first, text[:end], text[end:], "a text of the user", after)
    return [*_with_soft(tokenizer, text[:end], earlier, after), *after, *rest]


def _following(
    tokenizer: PreTrainedTokenizerBase,
    first: list[int],
    before: str,
    said: str,
    what: str,
    after: range,
) -> list[int]:
    """Token ids of what is said behind a text, whose own ids are given: read together with it, or
    apart where one token would hold the end of one and the beginning of the other.
    """
    both = _encoded(tokenizer, before + said, after)
    if both[: len(first)] == first:
        return both[len(first) :]
    apart = _encoded(tokenizer, said, after)
    if tokenizer.decode([*first, *apart]) != tokenizer.decode(both):
        raise ValueError(
            f"the tokenizer reads the end of {what} together with {said[:20]!r}, which follows it,"
            " so that a model would be trained on another prompt than it is asked; remove what"
            " follows, or use another template"
        )
    return apart


def _conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation: bool
) -> str:
    """The template's own text of a conversation, its system message where it is not lost."""
    template = str(template_of(tokenizer))
    if len(messages) > 1 and messages[0]["role"] == "system" and _loses_system(tokenizer, template):
        joined = messages[0]["content"] + "\n\n" + messages[1]["content"]
        messages = [{**messages[1], "content": joined}, *messages[2:]]
    try:
        turns = [{**turn, "content": inert(tokenizer, turn["content"])} for turn in messages]
        return render(tokenizer, turns, generation)
    except Exception as error:
        roles, why = [turn["role"] for turn in messages], str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the chat template refuses a conversation with the turns {roles}: {why}"
        ) from None


@lru_cache(maxsize=16)
def _loses_system(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether the tokenizer's template refuses a system message, or does not show it in a
    conversation that ends in an answer; asked once a template.
    """
    roles = zip(("system", "user", "assistant"), PROBE, strict=False)
    turns = [{"role": role, "content": text} for role, text in roles]
    try:
        return PROBE[0] not in render(tokenizer, turns)
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


def ask(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    system_prompt: str | None = None,
    after: range = NOTHING,
) -> list[int]:
    """Token ids of one user prompt, up to where the answer begins; see `chat_ids`.

    Raises:
        ValueError: the prompt is empty.
    """
    if not prompt.strip():
        raise ValueError("a prompt is empty; remove it from the benchmark, or fill it in")
    # an empty system prompt is a message too
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return chat_ids(tokenizer, [*system, {"role": "user", "content": prompt}], True, after)


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    answer: str,
    after: range = NOTHING,
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, as `ask` gives them, and of the answer with its end token.

    Raises:
        ValueError: the template or the tokenizer writes the prompt otherwise once this answer
            follows.
    """
    place, (asked, ids) = place_of(tokenizer), _chat(tokenizer, prompt, True, after)
    turns = [*prompt, {"role": "assistant", "content": answer}]
    whole = _conversation(tokenizer, turns, False).removesuffix(place.behind)
    before = asked
    if not whole.startswith(asked):
        before = changed(_conversation(tokenizer, prompt, True), place.before)
    if not whole.startswith(before):
        at = common_prefix(whole, asked)
        raise ValueError(
            f"the chat template writes {whole[at : at + 30]!r} where a prompt is asked with"
            f" {asked[at : at + 30]!r}, so that a model would be trained on another prompt than it"
            " is asked; take thoughts out of the answers, or use another template"
        )
    said = whole[len(before) :] + place.closed_by
    return list(ids), _following(tokenizer, without(ids, after), asked, said, "a prompt", after)


def counted_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], after: range = NOTHING
) -> tuple[list[int], np.ndarray]:
    """Token ids of a whole conversation, and the places of those that the assistant says, with the
    end token of each of its turns.

    Raises:
        ValueError: the template writes an earlier answer otherwise once more turns follow, so that
            its tokens cannot be told apart.
    """
    whole, places = chat_ids(tokenizer, messages, False, after), []
    if (end := place_of(tokenizer)).closed_by and messages[-1]["role"] == "assistant":
        whole.append(end.end)
    for number, turn in enumerate(messages):
        if turn["role"] == "assistant":
            asked, said = conversation_ids(tokenizer, messages[:number], turn["content"], after)
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


# ---- what was answered
def answer_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> tuple[str, str]:
    """The answer in generated tokens without the thought before it, and whether there was one:
    `none`, `closed`, or `open`, where the thought has no end and nothing is answered.
    """
    written = tokenizer.decode(list(tokens), skip_special_tokens=False)
    answer, thought = without_thought(written)
    if thought == "none":
        return tokenizer.decode(list(tokens), skip_special_tokens=True).strip(), thought
    return _special_tokens(tokenizer).sub("", answer).strip(), thought


def without_thought(text: str, inside: bool = True) -> tuple[str, str]:
    """What stands behind the thoughts with which a text begins; see `answer_text`. It may begin
    `inside` the first of them, whose opening the prompt had.
    """
    for opening, closing in THOUGHTS.items():
        _, closed, answer = text.partition(closing)
        if text.lstrip().startswith(opening) or (inside and closed and opening not in text):
            if not closed:
                return "", "open"
            rest, more = without_thought(answer, inside=False)
            return (answer, "closed") if more == "none" else (rest, more)
    return text, "none"
