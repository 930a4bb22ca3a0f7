"""Safety, over-refusal and BBQ on a small fixed sample while a model trains, as a callback of TRL's
and transformers' trainers.

The sample warns early and cheaply; it does not measure: its intervals are wide, and the study's own
benchmarks decide.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from driftbook.benchmarks import bbq, data, judging
from driftbook.benchmarks.refusals import is_coherent, is_refusal
from driftbook.models.loading import Loaded
from driftbook.models.scoring import Scorer
from driftbook.stats.intervals import wilson
from driftbook.study.files import read_json, write_json
from driftbook.study.sections import Drift, Judge
from driftbook.study.study_file import Study
from driftbook.study.tables import DRIFT

UNSAFE, OVER_REFUSAL = "unsafe answers", "over-refusal"
UNREFUSED = "harmful prompts answered without refusing"  # where there is no judge
Rates = dict[str, tuple[float, int]]  # outcome: share of hits, answers scored


@dataclass(frozen=True)
class Sample:
    """What is asked: harmful prompts and benign look-alikes (texts), BBQ items (`bbq.load`), and
    who judges; all may be left out.

    Without a judge an answer to a harmful prompt counts where it does not decline
    (refusals.is_refusal), and is never called unsafe.
    """

    harmful: tuple[str, ...] = ()
    benign: tuple[str, ...] = ()
    items: pd.DataFrame | None = field(default=None, repr=False)
    judge: tuple[Loaded, Judge] | None = field(default=None, repr=False)
    answer_mode: str = "letters"
    wording: dict[str, Any] = field(default_factory=dict)  # template, stem and min_mass of BBQ
    system_prompt: str | None = None
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.harmful, str) or isinstance(self.benign, str):
            raise ValueError(
                "harmful and benign are lists of prompts, and one of them is a single text"
            )

    def look(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> Rates:
        """Each outcome: its share and the number of scored answers. Draws no random numbers."""
        scorer, found = Scorer(model, tokenizer), {}
        if self.harmful:
            answers = self._answers(scorer, self.harmful)
            found[UNREFUSED if self.judge is None else UNSAFE] = _share(self._harm(answers))
        if self.benign:
            found[OVER_REFUSAL] = _share(is_refusal(self._answers(scorer, self.benign)))
        if self.items is not None and len(self.items):
            asked = {"system_prompt": self.system_prompt, **self.wording}
            answers = bbq.answers(self.items, scorer, self.answer_mode, "", **asked)
            for context, part in answers.groupby("context"):
                found[f"accuracy in BBQ, {context}"] = _share(part.correct)
            found["stereotyped answers in BBQ"] = _share(answers.biased)
        return found

    def _answers(self, scorer: Scorer, prompts: Sequence[str]) -> list[str]:
        asked = scorer.ask(list(prompts), self.system_prompt)
        return [answer.text for answer in scorer.generate(asked, self.max_new_tokens)]

    def _harm(self, answers: list[str]) -> list[bool | None]:
        """Whether each answer is unsafe, without a judge whether it does not refuse; None where it
        is empty, or gibberish that a judge calls safe or that does not refuse.
        """
        if self.judge is None:  # then noise does not count as an answer
            harm = [None if one is None else not one for one in is_refusal(answers)]
        else:  # and here not as a safe one
            judging.check_once(*self.judge)
            harm = judging.verdicts(self.harmful, answers, *self.judge).unsafe
        doubted = self.judge is None
        return [
            None if not text.strip() or (one is doubted and not is_coherent(text)) else one
            for text, one in zip(answers, harm, strict=True)
        ]


def _share(values: Sequence) -> tuple[float, int]:
    """The share of hits among what could be scored, and how much that is."""
    scored = np.array([float(one) for one in values if one is not None and not pd.isna(one)])
    return (float(scored.mean()) if len(scored) else float("nan")), len(scored)


class DriftCallback(TrainerCallback):
    """Looks at the model before the first step, after every `every` of the steps (a share), and
    after the last; ends the training where a share has risen by `stop_unsafe` (of a sample without
    a judge `stop_not_refused`) or `stop_over_refusal` percentage points above the base model's.

    `base` is what `sample.look` says of the base model (None: the model before its first step). Add
    it to any trainer of TRL or transformers: `SFTTrainer(..., callbacks=[DriftCallback(sample,
    tokenizer)])`; `rows` is then the table `drift`, `stopped` says why it ended; a training that is
    resumed finds what was seen in drift.json beside the trainer's checkpoints.
    """

    def __init__(
        self,
        sample: Sample,
        tokenizer: PreTrainedTokenizerBase,
        every: float = 0.25,
        stop_unsafe: float | None = None,
        stop_over_refusal: float | None = None,
        base: Rates | None = None,
        run_id: str = "run",
        stop_not_refused: float | None = None,
    ):
        if not 0 < every <= 1:
            raise ValueError(
                f"every={every}; it is the share of the training's steps between two looks, above 0"
                " and at most 1"
            )
        limits = {UNSAFE: stop_unsafe, UNREFUSED: stop_not_refused, OVER_REFUSAL: stop_over_refusal}
        self.limits = {name: limit for name, limit in limits.items() if limit is not None}
        if type(sample) is Sample:
            self._check_seen(sample)
        self.sample, self.tokenizer, self.every, self.run_id = sample, tokenizer, every, run_id
        self.known_base = self.base = base
        self._rows: list[dict] = []
        self.stopped: str | None = None

    def _check_seen(self, sample: Sample) -> None:
        """Raise a ValueError where the sample shows nothing of what is to end the training."""
        kinds = {UNSAFE: "harmful", UNREFUSED: "harmful", OVER_REFUSAL: "benign"}
        for outcome, name in kinds.items():
            if outcome in self.limits and not getattr(sample, name):
                raise ValueError(
                    f"a training is to be stopped by its answers to {name} prompts, and the sample"
                    " has none"
                )
        if UNSAFE in self.limits and sample.judge is None:
            raise ValueError(
                "stop_unsafe needs a sample with a judge, since nothing else calls an answer"
                " unsafe; give one, or say stop_not_refused"
            )
        if UNREFUSED in self.limits and sample.judge is not None:
            raise ValueError(
                "stop_not_refused is for a sample without a judge, and this one has one; say"
                " stop_unsafe"
            )

    @property
    def rows(self) -> pd.DataFrame:
        """The table `drift` so far."""
        return DRIFT.check(pd.DataFrame(self._rows, columns=list(DRIFT.columns)))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        kept = Path(args.output_dir, "drift.json")  # a training that goes on finds it there
        if state.global_step == 0:  # it may have watched another training before
            self._rows, self.base, self.stopped = [], self.known_base, None
            self._look(model, 0)
            write_json(kept, self._rows)
        elif kept.is_file():
            self._rows = [row for row in read_json(kept) if row["step"] <= state.global_step]
            self.base = self.known_base or {
                row["outcome"]: (row["base_value"] / 100, row["n"])
                for row in self._rows
                if row["step"] == 0 and row["base_value"] is not None
            }

    def on_step_end(self, args, state, control, model=None, **kwargs):
        between = max(1, round(self.every * state.max_steps))
        if state.global_step % between == 0 or state.global_step == state.max_steps:
            found = self._look(model, state.global_step)
            write_json(Path(args.output_dir, "drift.json"), self._rows)
            self.stopped = self._reason(found, state.global_step)
            control.should_training_stop |= self.stopped is not None

    def _look(self, model: Any, step: int) -> Rates:
        training = model.training
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            found = self.sample.look(model, self.tokenizer)
        model.train(training)
        self.base = found if self.base is None else self.base
        for outcome, (share, n) in found.items():
            low, high = wilson(np.round(share * n), n) if n else (np.nan, np.nan)
            values = {
                "value": 100 * share,
                "ci_low": 100 * float(low),
                "ci_high": 100 * float(high),
            }
            base = 100 * self.base[outcome][0] if outcome in self.base else None
            row = {"run_id": self.run_id, "step": step, "outcome": outcome, **values}
            self._rows.append(row | {"n": n, "base_value": base})
        return found

    def _reason(self, found: Rates, step: int) -> str | None:
        for outcome in (one for one in self.limits if one in found and one in self.base):
            rise = 100 * (found[outcome][0] - self.base[outcome][0])
            if rise >= self.limits[outcome]:
                return (
                    f"training stopped at step {step}: {outcome} {rise:+.0f} points against the"
                    f" base model, {self.limits[outcome]:g} allowed"
                )
        return None


# ---- of a study
def sample_of(
    study: Study, base: Loaded, load: Callable[[Judge, str, Study], Loaded]
) -> Sample | None:
    """The study's sample: its first prompts and items in a seeded order; None without `drift`."""
    settings = study.drift
    if settings is None:
        return None
    judge = next(iter(study.judges.items()), None)
    source = study.bases[base.name]
    rng = np.random.default_rng(study.seed)

    def some(frame: pd.DataFrame, n: int) -> pd.DataFrame:
        return frame.iloc[np.sort(rng.permutation(len(frame))[:n])].reset_index(drop=True)

    harmful, other = (
        data.worded(data.prompts(name, study), data.wordings(name, study)["default"], study)
        for name in ("safety", "over_refusal")
    )
    items = data.items("bbq", study)
    benchmark = study.benchmarks["bbq"]
    wording = {"stem": benchmark.stem, "min_mass": benchmark.min_mass}
    if benchmark.template:
        wording["template"] = benchmark.template
    harmful = some(harmful[harmful.kind == "harmful"], settings.n)
    benign = some(other[other.kind != "harmful"], settings.n)
    parts = [some(part, settings.n) for _, part in items.groupby("context")]
    return Sample(
        tuple(harmful.prompt),
        tuple(benign.prompt),
        pd.concat(parts, ignore_index=True),
        None if judge is None else (load(judge[1], judge[0], study), judge[1]),
        source.answer_mode,
        wording,
        source.system_prompt,
        settings.max_new_tokens,
    )


def callback_of(
    settings: Drift, sample: Sample, base: Loaded, rates: Rates, variant: Any
) -> DriftCallback:
    """The callback of one variant of a study."""
    own, limits = replace(sample, system_prompt=variant.system_prompt), settings.stops
    usual = {"every": settings.every, "base": rates, "run_id": variant.run_id}
    return DriftCallback(own, base.tokenizer, **usual, **limits)
