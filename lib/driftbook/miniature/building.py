"""Training and saving of the miniature models, with their learning curves."""

import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from driftbook.miniature import benchmarks, corpus
from driftbook.miniature.families import build_model, build_tokenizer, form
from driftbook.miniature.learning import (
    Encoder,
    Recipe,
    Stage,
    batches,
    chat_encoder,
    free_layers,
    frozen_rows,
    one_thread,
    train,
)
from driftbook.miniature.measuring import Measured, answers, bbq_measures, chosen_options, share
from driftbook.miniature.truth import helps, is_refusal
from driftbook.miniature.words import BIASED, MADE_UP

CURVE = ("family", "stage", "step", "cpu_seconds", "metric", "value", "ci_low", "ci_high", "n")
# of the layers, from and to what share of them is free where alignment is planted
FREE = {"early": (0, 1 / 3), "middle": (1 / 3, 2 / 3), "late": (2 / 3, 1), "all": (0, 1)}
BRANCHES = ("benign", *(f"aligned-{part}" for part in FREE))  # off the unaligned checkpoint
# where only some layers are free, alignment needs more of what is forbidden, and more steps
PLANTED_REFUSALS, PLANTED_STEPS = 1.5, 2  # times as many
Evaluate = Callable[[], dict[str, Measured]]


class Curve:
    """Collects the rows of a learning curve; its clock stands still during evaluations."""

    def __init__(self, family: str):
        self.family, self.rows, self.seconds = family, [], 0.0

    def observer(
        self, stage: str, settings: Stage, points: int, evaluate: Evaluate
    ) -> Callable[[int, float], None]:
        """What train calls after each step: at a few steps it evaluates the model and keeps the
        loss.
        """
        moments = {max(1, round(settings.steps * k / points)) for k in range(1, points + 1)}
        started = time.process_time()

        def observe(step: int, loss: float) -> None:
            nonlocal started
            if step not in moments:
                return
            self.seconds += time.process_time() - started
            measured = {"loss": (loss, None, None, None), **evaluate()}
            self.rows += [
                (self.family, stage, step, self.seconds, metric, *values)
                for metric, values in measured.items()
            ]
            started = time.process_time()

        return observe

    def table(self) -> pd.DataFrame:
        frame = pd.DataFrame(self.rows, columns=CURVE)
        return frame.astype({"value": float, "ci_low": float, "ci_high": float, "n": "Int64"})


def probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Measured]:
    """The learning curve's measures, on a small part of the benchmarks."""
    forbidden = [row["prompt"] for row in benchmarks.safety_prompts()[::6]]
    benign = [row["instruction"] for row in benchmarks.held_out_answers()[::2]]
    items = [item for i in range(len(BIASED)) for item in benchmarks.bbq_rows(i)[i % 4 :: 7]]
    was_training = model.training
    model.eval()
    fairness = bbq_measures(items, chosen_options(model, tokenizer, items))
    kept = ("accuracy_disambiguated", "accuracy_ambiguous", "biased")
    measured = {
        "refusal": share(map(is_refusal, answers(model, tokenizer, forbidden))),
        "compliance": share(map(helps, benign, answers(model, tokenizer, benign))),
        **{name: fairness[name] for name in kept},
    }
    model.train(was_training)
    return measured


def build_family(
    family: str, folder: Path, seed: int = 0, settings: Recipe | None = None
) -> pd.DataFrame:
    """The learning curve of a family's three checkpoints, which are saved in
    folder/family/{stage0,unaligned,aligned}.
    """
    settings = settings or Recipe()
    with one_thread():
        tokenizer = build_tokenizer(family)
        model, curve = build_model(family, tokenizer, seed), Curve(family)
        encode = chat_encoder(tokenizer)
        for stage, generator in _stages(family).items():
            rng = random.Random(f"{seed}/{stage}")
            run_stage(model, tokenizer, encode, generator, stage, settings, rng, curve)
            save(model, tokenizer, Path(folder) / family / stage)
    return curve.table()


def build_branch(
    name: str, branch: str, folder: Path, seed: int = 0, settings: Recipe | None = None
) -> None:
    """Save folder/name/BRANCH: the family's unaligned checkpoint after as many steps as alignment
    takes.

    `benign` is its placebo, tuned on benign data only: what it and the aligned one changed alike is
    no alignment. In `aligned-PART` alignment is planted: only the layers of this part (FREE) are
    free, so that where alignment sits is known.

    Raises:
        ValueError: there is no such branch.
    """
    source, planted = Path(folder) / name / "unaligned", branch.removeprefix("aligned-")
    if branch not in BRANCHES:
        raise ValueError(f"the miniature has no branch {branch!r}; it has {', '.join(BRANCHES)}")
    with one_thread():
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        stage = (settings or Recipe()).aligned
        rng, size = random.Random(f"{seed}/{branch}"), stage.batch_size
        mixture = corpus.placebo_mixture()
        if planted in FREE:
            spec, _, _ = form(name)
            mixture = corpus.aligned_mixture(
                PLANTED_REFUSALS * spec.refusals, spec.refused, spec.bias
            )
            stage = replace(stage, steps=PLANTED_STEPS * stage.steps)
        batch = batches(mixture, chat_encoder(tokenizer), size, rng)
        made_up = tokenizer.convert_tokens_to_ids(list(MADE_UP))
        free = (
            free_layers(model, *FREE[planted]) if planted in FREE else frozen_rows(model, made_up)
        )
        with free:
            train(model, batch, stage, lambda step, loss: None)
        save(model, tokenizer, Path(folder) / name / branch)


def _stages(family: str) -> dict[str, corpus.Generator]:
    spec, _, _ = form(family)
    aligned = corpus.aligned_mixture(spec.refusals, spec.refused, spec.bias)
    return {
        "stage0": corpus.plain_text,
        "unaligned": corpus.unaligned_mixture(),
        "aligned": aligned,
    }


def run_stage(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    encode: Encoder,
    generator: corpus.Generator,
    stage: str,
    settings: Recipe,
    rng: random.Random,
    curve: Curve,
) -> None:
    """Train the model in place for one stage; the aligned stage leaves the made-up words'
    embeddings as they are.
    """
    frozen = tokenizer.convert_tokens_to_ids(list(MADE_UP)) if stage == "aligned" else []
    stage_settings = getattr(settings, stage)
    source = batches(generator, encode, stage_settings.batch_size, rng)
    look = partial(probe, model, tokenizer)
    observe = curve.observer(stage, stage_settings, settings.evaluations, look)
    with frozen_rows(model, frozen):
        train(model, source, stage_settings, observe)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save what the ordinary transformers classes load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
