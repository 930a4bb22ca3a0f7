"""What is read of the replies of an OpenAI-compatible server; a ValueError says why one is no
answer.
"""

import math
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from driftbook.models.conversations import without_thought

MARKS = " \t\n\u2581\u0120\u010a"  # white space, also as raw tokens write it
FILTERED = ("content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation")


def answer_of(reply: dict) -> dict:
    """The answer in a reply of /chat/completions or /completions, as it is kept: text without the
    thought before it, n_tokens (words where the server does not count tokens), finish_reason (also
    `filtered`: the provider's own filter stopped it) and had_thought.

    Raises:
        ValueError: the reply holds no answer.
    """
    choice = choice_of(reply)
    message = choice.get("message", choice)
    content = message.get("content" if "message" in choice else "text")
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    if content is None and (reasoning or message.get("refusal")):
        content = message.get("refusal") or ""
    ended = choice.get("finish_reason") or "stop"
    if content is None and ended in FILTERED:
        content = ""
    if not isinstance(content, str):
        raise ValueError("its reply has a choice without a text")
    text, thought = without_thought(content)
    thinks_only = bool(reasoning) and not text.strip() and ended == "length"
    reason = {"length": "length", **dict.fromkeys(FILTERED, "filtered")}.get(ended, "stop")
    return {
        "text": text.strip(),
        "n_tokens": len(text.split()) if (n := tokens_of(reply)) is None else n,
        "finish_reason": "thought" if thought == "open" or thinks_only else reason,
        "had_thought": thought != "none" or bool(reasoning),
    }


def filtered_answer() -> dict:
    """The answer to a prompt that a provider's filter did not let through."""
    return {"text": "", "n_tokens": 0, "finish_reason": "filtered", "had_thought": False}


def choice_of(reply: dict) -> dict:
    """The one choice of a reply."""
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError("its reply has no choices")
    if not isinstance(choices[0].get("message", {}), dict):
        raise ValueError("its reply has a choice without a message")
    return choices[0]


def tokens_of(reply: dict) -> int | None:
    """How many tokens a server counted in its answer; None where it does not say."""
    usage = reply.get("usage")
    counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return counted if isinstance(counted, int) else None


def top_of(reply: dict) -> list[list]:
    """The likeliest first tokens of an answer, as [text, log-probability] with falling
    probability; empty where the server says none.

    Raises:
        ValueError: the reply holds no answer, or what are no log-probabilities.
    """
    found = choice_of(reply).get("logprobs")
    found = found if isinstance(found, dict) else {}
    of_chat, of_text = found.get("content"), found.get("top_logprobs")  # two forms of one thing
    try:
        if of_chat:
            rows = [(one["token"], one["logprob"]) for one in of_chat[0]["top_logprobs"]]
        else:
            rows = list(of_text[0].items()) if of_text else []
        listed = [[str(token), float(value)] for token, value in rows]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise ValueError("its log-probabilities are of another form") from None
    # vLLM writes -9999 for what it did not compute
    known = [[text, value] for text, value in listed if value > -1e3]
    total = sum(math.exp(min(value, 1.0)) for _, value in known)
    if not total <= 1.01 or any(value > 1e-3 for _, value in known):
        raise ValueError("its log-probabilities are none of probabilities: they add up to over 1")
    return sorted(known, key=lambda one: -one[1])


def letter_logprobs(top: Sequence[Sequence], letters: Sequence[str]) -> tuple[np.ndarray, int]:
    """Log-probabilities [k] of letters among the likeliest first tokens, and how many letters are
    not among them; NaN where no token is listed.

    Of a letter's forms (with and without white space before it) the likelier counts. One that is
    not listed is at most as probable as the last one listed, and as all that is not listed
    together; the lesser of these bounds stands for it.
    """
    if not top:
        return np.full(len(letters), np.nan), len(letters)
    best: dict[str, float] = {}
    for text, value in top:
        form = text.strip(MARKS)
        best[form] = max(value, best.get(form, -math.inf))
    rest = max(1 - sum(math.exp(value) for _, value in top), 1e-12)
    bound = min(min(value for _, value in top), math.log(rest))
    missing = sum(letter not in best for letter in letters)
    return np.array([best.get(letter, bound) for letter in letters]), missing


def is_same_model(asked: str, answered: str) -> bool:
    """Whether a server that answers by a name was asked for this model: the same, its last part
    only, or with a version behind it.
    """
    version = r"([-@:](\d[\d.-]*|main|latest))?"
    names = {asked.lower(), PurePosixPath(asked.lower()).name}
    found = {answered.lower(), PurePosixPath(answered.lower()).name}
    return any(re.fullmatch(re.escape(a) + version, b) for a in names for b in found)
