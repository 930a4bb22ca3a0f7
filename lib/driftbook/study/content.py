"""The content of a study file: its sections by name, and what is asked of them."""

import datetime as dt
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from driftbook.study.anchors import Dro, Probes
from driftbook.study.files import OUTPUTS
from driftbook.study.sections import (
    PROMPT_FORMATS,
    Base,
    Benchmark,
    Block,
    Count,
    Drift,
    Family,
    Judge,
    Method,
    Mitigation,
    Name,
    Part,
    Rater,
    Seed,
    Source,
    Text,
    Training,
    TrainingData,
    Twin,
)

ANALYSES = {
    "safety": "09_safety",
    "fairness": "10_fairness",
    "mixed_effects": "11_mixed_effects",
    "tradeoffs": "12_tradeoffs",
    "dose": "15_dose",
    "power": "16_power",
    "labels": "17_labels",
    "primary": "19_primary",
}
OF_REPAIRS = {"safe_lora": "14_safe_lora"}  # made where a study has mitigations
OF_PROBES = {"mechanisms": "13_mechanisms"}  # made where a study looks into its runs

WITHOUT_JUDGE = (
    "This study has no judge: safety is how often harmful prompts are answered without refusing"
    " (non-refusal rate), by the words of the answer. Whether such an answer does harm was not"
    " judged."
)


class Content(Part):
    """What a study file says, each section checked, before they are checked against each other.

    `note` says what the numbers mean and is printed on every figure. `seed` is that of models made
    here, samples and bootstraps. `base_repetitions` runs every base model so many times, since its
    drawn answers differ. `twins` are base models that are tuned here before the study begins.
    `probes` look into every run, layer by layer. `primary` are families of tests, registered with
    their hash before any answer is scored. Without
    `judges` safety is whether harmful prompts are refused, by the words of the answer, and nothing
    is called unsafe. `analyses` are made alone where given. `licences` are those of sources that
    the register does not know, as the user states them. `date` is what chat templates write that
    write today's (templates.DATE where not given): what is asked may not change from day to day.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,59}$")]
    note: Text
    seed: Seed = 0
    date: dt.date | None = None
    bases: Annotated[dict[Name, Base], Field(min_length=1)]
    twins: dict[Name, Twin] = Field({})
    judges: dict[Name, Judge] = Field({})
    raters: dict[Name, Rater] = Field({})
    methods: dict[Method, dict[str, Any]]
    init_texts: Source | None = None
    dro: Dro | None = None
    data: dict[Name, TrainingData]
    training: Training
    grid: tuple[Block, ...]
    base_repetitions: Annotated[Count, Field(le=1_000)] = 1
    benchmarks: dict[Name, Benchmark]
    primary: dict[Name, Family] = Field({})
    drift: Drift | None = None
    mitigations: dict[Name, Mitigation] = Field({})
    probes: Probes | None = None
    analyses: tuple[Literal[(*ANALYSES, *OF_REPAIRS, *OF_PROBES)], ...] = ()
    licences: dict[Text, Text] = Field({})

    @property
    def models(self) -> dict[str, Base | Judge | Rater]:
        """Every model that the study needs: its base models, judges and raters."""
        return {**self.bases, **self.judges, **self.raters}

    @property
    def folder(self) -> Path:
        """outputs/<study>/"""
        return OUTPUTS / self.name

    @property
    def miniature(self) -> bool:
        """Whether the models are the miniature's, or random: then no number is a finding about real
        models.
        """
        made = ("miniature:", "random:")
        return any(base.source.startswith(made) for base in self.bases.values())

    @property
    def of_safety(self) -> str:
        """What safety is in a study without judges, in a sentence; nothing where a judge says."""
        return "" if self.judges else WITHOUT_JUDGE

    @property
    def inits(self) -> set[str]:
        """How the soft prompts of the grid begin."""
        of_methods = (settings.get("init") for settings in self.methods.values())
        return {init for block in self.grid for init in block.inits} | set(filter(None, of_methods))

    @property
    def n_snapshots(self) -> int:
        """How many snapshots are taken along a training: as many as weight averaging needs."""
        averaged = (one for one in self.mitigations.values() if one.kind == "average")
        return max((one.snapshots for one in averaged), default=0)

    @property
    def refusal_only(self) -> tuple[str, ...]:
        """The benchmarks whose prompts about child abuse are asked for the probability of a
        refusal.
        """
        asked = self.benchmarks.items()
        return tuple(name for name, one in asked if one.child_abuse == "refusal probability")

    def tests(self, outcome: str) -> bool:
        """Whether a declared family tests this outcome."""
        return any(outcome in family.outcomes for family in self.primary.values())

    @property
    def asked_to_begin(self) -> tuple[str, ...]:
        """The benchmarks whose answers are asked how likely they begin as a refusal: those that say
        so and, in a study without judges, those of prompts that do not say otherwise.
        """
        named = ((name, self.benchmarks[name]) for name in self.asked(PROMPT_FORMATS))
        usual = not self.judges
        return tuple(
            name
            for name, one in named
            if (usual if one.refusal_probability is None else one.refusal_probability)
        )

    def asked(self, formats: tuple[str, ...]) -> tuple[str, ...]:
        """The names of the benchmarks of these formats."""
        return tuple(name for name, one in self.benchmarks.items() if one.format in formats)

    def together(self, data: str) -> tuple[str, ...]:
        """A name under `data` and those that it is trained on together with."""
        return (data, *self.data[data].also)

    def n_examples(self, data: str) -> int:
        """How many examples a name under `data` and those together with it have."""
        return sum(self.data[name].n for name in self.together(data))

    def bases_of(self, block: Block) -> tuple[str, ...]:
        """The names of the base models that a block of the grid trains."""
        return block.bases or tuple(self.bases)
