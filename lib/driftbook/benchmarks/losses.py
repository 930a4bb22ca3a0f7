"""The loss of reference answers, which several utility benchmarks share."""

from typing import TYPE_CHECKING

import pandas as pd

from driftbook.benchmarks.format import Asking, Rating, lacking

if TYPE_CHECKING:  # importing torch takes a second, which plans and figures do not need
    from driftbook.models.scoring import Scorer


def answer_losses(items: pd.DataFrame, scorer: "Scorer", asking: Asking) -> list[Rating]:
    """The loss of each reference answer (nats per token): nothing is generated. Null with a reason
    where the model cannot be asked for it.
    """
    if why := lacking(scorer, "losses"):
        return [(name, "nll", None, 1, why) for name in items.prompt_id]
    pairs = scorer.answered(list(items.prompt), list(items.answer), asking.system_prompt)
    losses = scorer.token_logprobs(pairs)
    return [
        (name, "nll", -loss.mean(), len(loss), None)
        for name, loss in zip(items.prompt_id, losses, strict=True)
    ]


def written(items: pd.DataFrame, scorer: "Scorer", asking: Asking) -> list[str]:
    """The model's own answer to each prompt."""
    asked = scorer.ask(list(items.prompt), asking.system_prompt)
    return [answer.text for answer in scorer.generate(asked, asking.max_new_tokens)]
