"""How a model may be asked: what is faster than one sequence at a time is tried on a few short
random sequences against the model's own forward, not assumed.

A mask and positions in a forward's signature prove nothing: recurrent and convolutional layers see
neither, some families build their masks from something else, look embeddings up by token id, or
scale their logits, and LLM.int8 depends on the other rows of a batch.
"""

import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from peft import PeftModel
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Ways:
    """What gives a model's own log-probabilities; what does not is not used.

    shared: sequences as trees and behind a common prefix, and answers generated side by side;
    packed: several conversations in one row (training); rows: several sequences side by side,
    padded on the right; embeddings: the embeddings of tokens in place of their ids, as a soft
    prompt needs; cached: key/values kept from token to token; trimmed: the last layer only at the
    tokens that are read; scale: logits are this many times what the output embedding gives (None:
    the whole forward is used, head and all); limit: the tokens up to which all this was tried
    (None: any number); reason: what differed, and by how much.
    """

    shared: bool = True
    packed: bool = True
    rows: bool = True
    embeddings: bool = True
    cached: bool = True
    trimmed: bool = True
    scale: float | None = 1.0
    limit: int | None = None
    reason: str = ""


TRUTHS = tuple(one.name for one in fields(Ways) if one.type is bool)
_KNOWN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model: {kind of adapter: Ways}
_SAID: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model: what was said of it


def adapter_kind(model: PreTrainedModel | PeftModel) -> str:
    """What a model's ways depend on beside the base: the method of the adapter, where it is more
    than virtual tokens.
    """
    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning:
        return "base"
    config = model.active_peft_config
    invoked = getattr(config, "alora_invocation_tokens", None)
    return f"{config.peft_type}{' by invocation' if invoked else ''}"


def common(ways: Sequence[Ways]) -> Ways:
    """What may be relied on with each of several, which have one scale."""
    first, *others = ways
    for one in others:
        both = {name: getattr(first, name) and getattr(one, name) for name in TRUTHS}
        limit = min(filter(None, (first.limit, one.limit)), default=None)
        first = replace(first, **both, limit=limit, reason=first.reason or one.reason)
    return first


def known(model: PreTrainedModel, kind: str) -> Ways | None:
    """The ways that were found of a model with this kind of adapter on it."""
    return _KNOWN.get(model, {}).get(kind)


def keep(model: PreTrainedModel, kind: str, ways: Ways) -> Ways:
    """Remember what was found, as long as the model lives."""
    _KNOWN.setdefault(model, {})[kind] = ways
    return ways


def say(model: PreTrainedModel, sentence: str) -> None:
    """Warn of something, once a model."""
    said = _SAID.setdefault(model, set())
    if sentence.partition(":")[0] not in said:
        said.add(sentence.partition(":")[0])
        warnings.warn(sentence, stacklevel=3)


def apart(found: Iterable[torch.Tensor], own: Iterable[torch.Tensor]) -> float:
    """The largest difference of log-probabilities [tokens, vocabulary], in nats."""
    both = zip(found, own, strict=True)
    differences = [(a.float().log_softmax(-1) - b.log_softmax(-1)).abs().max() for a, b in both]
    worst = float(torch.stack(differences).max())
    return worst if worst == worst else float("inf")  # NaN is as wrong as can be


def tolerance(own: Iterable[torch.Tensor], dtype: torch.dtype) -> float:
    """How far two orders of the same sums may be apart, in nats: 1e-4, or what the numbers' own
    precision leaves of the largest logit.
    """
    largest = max(float(logits.abs().max()) for logits in own)
    return max(1e-4, 8 * torch.finfo(dtype).eps * largest)
