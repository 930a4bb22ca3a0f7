"""The dose: how far training moved a model, on held-out answers."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel

from driftbook.doctors.study_no_ops import NO_OP_KL
from driftbook.models import adapters
from driftbook.models.conversations import soft_ids, without
from driftbook.models.loading import Loaded
from driftbook.models.products import Product
from driftbook.models.scoring import Ids, Scorer

DISTRIBUTIONS_AT_ONCE = 2**27  # numbers in each of three: half a gigabyte in fp32


def measure_dose(
    model: PeftModel | Product,
    initial: dict[str, torch.Tensor] | None,
    base: Loaded,
    pairs: list[tuple[Ids, Ids]],
) -> dict[str, Any]:
    """How far training moved the model, on held-out answers: columns nll .. no_op of `runs`.

    The mean over answer tokens of KL(variant || base) and of KL(variant || variant as initialised),
    in nats. Where the initial adapter changes no number of the base the two are equal, and
    `initial` may be None; a soft prompt moves the model before any training. One behind the user's
    text is in the prompts of the pairs, and the base model reads them without it.
    """
    after = soft_ids(base.model)

    def trained_state(part):
        return Scorer(model, base.tokenizer).distributions(part)

    def base_state(part):
        with model.disable_adapter():
            asked = [(without(prompt, after), answer) for prompt, answer in part]
            return Scorer(base.model, base.tokenizer).distributions(asked)

    def initial_state(part):
        with adapters.swapped(model, initial):
            return trained_state(part)

    start = None if initial is None or starts_at_base(initial) else initial_state
    totals = torch.zeros(4, dtype=torch.float64)
    for part in _parts(pairs, base.model.get_output_embeddings().weight.shape[0]):
        totals += _divergences(part, trained_state, base_state, start)
    nll, nll_base, kl_base, kl_init = (totals / sum(len(answer) for _, answer in pairs)).tolist()
    dose = {"nll": nll, "nll_base": nll_base, "dose_nll": nll_base - nll}
    return dose | {"kl_base": kl_base, "kl_init": kl_init, "no_op": kl_init < NO_OP_KL}


def starts_at_base(initial: dict[str, torch.Tensor]) -> bool:
    """Whether initial parameters add exactly zero (LoRA, its second matrix zero) or multiply by
    exactly one (IA3), so that the model is the base to the bit and need not be computed again.
    """

    def is_idle(name: str, value: torch.Tensor) -> bool:
        if ".ia3_l." in name:
            return bool((value == 1).all())
        return ".lora_A." in name or (".lora_B." in name and not value.any())

    return all(is_idle(*one) for one in initial.items())


def base_dose(base: Loaded, pairs: list[tuple[Ids, Ids]]) -> dict[str, Any]:
    """The same columns for the base model itself, which nothing moved."""
    scores = Scorer(base.model, base.tokenizer).token_logprobs(pairs)
    nll = -sum(part.sum() for part in scores) / sum(map(len, scores))
    still = dict.fromkeys(("dose_nll", "kl_base", "kl_init"), 0.0)
    return {"nll": nll, "nll_base": nll, **still, "no_op": None}


def _parts(pairs: list[tuple[Ids, Ids]], vocabulary: int) -> Iterator[list[tuple[Ids, Ids]]]:
    """Pairs, few at a time: three full distributions a token are large for a real vocabulary."""
    part: list[tuple[Ids, Ids]] = []
    for pair in pairs:
        n = sum(len(answer) for _, answer in [*part, pair])
        if part and n * vocabulary > DISTRIBUTIONS_AT_ONCE:
            yield part
            part = []
        part.append(pair)
    yield part


@torch.inference_mode()
def _divergences(
    part: list[tuple[Ids, Ids]], trained: Callable, base: Callable, initial: Callable | None
) -> torch.Tensor:
    """Sums over answer tokens: -log p of trained and base, KL(trained || base) and (|| initial)."""
    totals = torch.zeros(4, dtype=torch.float64)
    before, after = base(part), trained(part)
    begun = before if initial is None else initial(part)
    for (_, answer), p, q, start in zip(part, after, before, begun, strict=True):
        tokens, weight = torch.tensor(answer, device=p.device)[:, None], p.exp()
        sums = [-p.gather(1, tokens).sum(), -q.gather(1, tokens).sum()]
        sums += [(weight * (p - q)).sum(), (weight * (p - start)).sum()]
        totals += torch.tensor(sums, dtype=torch.float64)
    return totals
