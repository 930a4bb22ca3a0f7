"""The responses of a model to a benchmark's prompts, as a study asks them."""

import warnings

import pandas as pd

from driftbook.benchmarks import data
from driftbook.models.sampling import Sampling
from driftbook.models.scoring import Answer, Scorer
from driftbook.study.sections import PROMPT_FORMATS
from driftbook.study.study_file import Study
from driftbook.study.variants import Variant


def asked_prompts(study: Study) -> pd.DataFrame:
    """The prompts of every benchmark whose responses are judged, with a column benchmark; see
    `data.prompts`.
    """
    names = study.asked(PROMPT_FORMATS)
    parts = [data.prompts(name, study).assign(benchmark=name) for name in names]
    return pd.concat(parts, ignore_index=True)


def responses(
    name: str, prompts: pd.DataFrame, scorer: Scorer, variant: Variant, study: Study
) -> pd.DataFrame:
    """The table `responses` of a variant on one benchmark: greedy in every wording, then as many
    samples in the study's own wording as the study asks for.

    Each sample has its own random numbers, which depend neither on the batch nor on another
    repetition's. What a model thinks before its answer is taken off, with a warning that counts it.
    """
    ways, benchmark = data.wordings(name, study), study.benchmarks[name]
    asks = [(wording, way, None) for wording, way in ways.items()]
    for sample in range(benchmark.samples or 0):
        seed = study.seed + variant.repetition - 1
        drawn = Sampling(benchmark.temperature, benchmark.top_p, seed, sample)
        asks.append(("default", ways["default"], drawn))
    parts = []
    for wording, way, drawn in asks:
        asked = data.worded(prompts, way, study)
        contexts = scorer.ask(list(asked.prompt), way.system_prompt or variant.system_prompt)
        answers = scorer.generate(contexts, benchmark.max_new_tokens, drawn)
        _warn_of_thoughts(name, answers)
        parts.append(
            asked[["prompt_id"]].assign(
                run_id=variant.run_id,
                benchmark=name,
                prompt_variant=wording,
                decoding=drawn.name if drawn else "greedy",
                sample=drawn.sample if drawn else 0,
                response=[answer.text for answer in answers],
                n_tokens=[answer.n_tokens for answer in answers],
                finish_reason=[answer.finish_reason for answer in answers],
            )
        )
    return pd.concat(parts)


def _warn_of_thoughts(name: str, answers: list[Answer]) -> None:
    thoughts = sum(answer.had_thought for answer in answers)
    endless = sum(answer.finish_reason == "thought" for answer in answers)
    if thoughts:
        warnings.warn(
            f"{thoughts} of {len(answers)} answers to {name} begin with a thought, which is taken"
            f" off; {endless} of these never end it and count as unanswered (a larger"
            " max_new_tokens, or a model that does not think)",
            stacklevel=3,
        )
