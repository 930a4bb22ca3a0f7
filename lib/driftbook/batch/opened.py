"""A stage of a study, opened for a notebook: its variants, its models, and one call that does the
work for all of them.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from transformers import PreTrainedModel

from driftbook.batch import jobs
from driftbook.models import loading, products
from driftbook.models.base_state import SpoiledBase
from driftbook.models.loading import Loaded
from driftbook.models.scoring import Scorer
from driftbook.study import folders, study_file
from driftbook.study.study_file import Study
from driftbook.study.tables import ANSWERS, PROBES, RATINGS, RESPONSES, RUNS, TABLES, VERDICTS
from driftbook.study.variants import Variant

WRITES = {
    "train": RUNS,
    "mitigate": RUNS,
    "retune": RUNS,
    "respond": RESPONSES,
    "judge": VERDICTS,
    "answer": ANSWERS,
    "utility": RATINGS,
    "probe": PROBES,
}


@dataclass(frozen=True)
class Job:
    """One stage for one base model. Models are loaded when they are first used, and stay loaded."""

    stage: str
    study: Study
    base_model: str
    variants: list[Variant]

    @cached_property
    def base(self) -> Loaded:
        """The base model."""
        return loading.load(self.study.bases[self.base_model], self.base_model, self.study)

    @cached_property
    def judges(self) -> dict[str, Loaded]:
        """The study's judges, by name."""
        return {
            name: loading.load(one, name, self.study) for name, one in self.study.judges.items()
        }

    @cached_property
    def raters(self) -> list[tuple[Loaded, float]]:
        """The study's raters, each with the least probability that its grades must have."""
        return [
            (loading.load(one, name, self.study), one.min_mass)
            for name, one in self.study.raters.items()
        ]

    @property
    def example(self) -> Variant:
        """The variant to show by hand: the job's first one that has an adapter of its own, else
        the base model itself.
        """
        made = [
            one
            for one in self.variants
            if folders.adapter(self.study, one)
            and all(path.exists() for path in self.adapter_files(one))
        ]
        bases = [one for one in self.study.of_base(self.base_model) if one.method == "none"]
        return [*made, *bases][0]

    def folder(self, variant: Variant) -> Path:
        """Where the files of a variant are."""
        return folders.folder(self.study, variant)

    def adapter_files(self, variant: Variant) -> list[Path]:
        """The files of a variant's adapter, on which its answers depend."""
        return folders.adapter_files(self.study, variant)

    @contextmanager
    def attached(self, variant: Variant) -> Iterator[PreTrainedModel]:
        """The base model with the variant's adapter on it, or the product that the variant is, as
        long as the block lasts.

        A base model that an adapter left changed is loaded anew for the next variant, with a
        warning that says what had changed.
        """
        finished = False
        try:
            with products.answering(self.base.model, self.study, variant) as model:
                yield model
                finished = True
        except SpoiledBase as error:
            self.__dict__.pop("base", None)
            if not finished:
                raise
            warnings.warn(f"{error}. It is loaded anew for the next variant", stacklevel=3)

    def run(
        self,
        work: Callable[[Variant, Path], list[Path]],
        inputs: Callable[[Variant], list[Path]] | None = None,
    ) -> pd.DataFrame:
        """Do `work(variant, its folder)`, which writes files and returns their paths, for each
        variant that is not finished: run_id, status, and whether it was there already (reused).
        """
        return jobs.run_variants(
            self.stage,
            self.study,
            self.base_model,
            self.variants,
            inputs or self.adapter_files,
            work,
        )

    def score(self, rows: Callable[[Scorer, Variant], pd.DataFrame]) -> pd.DataFrame:
        """Write `rows(scorer, variant)` as the stage's table for each unfinished variant; see
        `run`.
        """

        def work(variant: Variant, folder: Path) -> list[Path]:
            with self.attached(variant) as model:
                found = rows(Scorer(model, self.base.tokenizer), variant)
            return [WRITES[self.stage].write(found, folder)]

        return self.run(work)

    def probe(self, rows: Callable[[PreTrainedModel, Variant, Path], pd.DataFrame]) -> pd.DataFrame:
        """Write `rows(model, variant, adapter's folder)` as the stage's table for each unfinished
        variant; see `run`.
        """

        def work(variant: Variant, folder: Path) -> list[Path]:
            with self.attached(variant) as model:
                found = rows(model, variant, folders.adapter(self.study, variant))
            return [WRITES[self.stage].write(found, folder)]

        return self.run(work)

    def judge(self, rows: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
        """Write `rows(responses)` as the stage's table for each variant that is unfinished, or
        whose responses have changed; see `run`.
        """

        def work(variant: Variant, folder: Path) -> list[Path]:
            return [WRITES[self.stage].write(rows(RESPONSES.read(folder)), folder)]

        return self.run(work, lambda variant: [RESPONSES.path(self.folder(variant))])

    def written(self, table: str, variant: Variant) -> pd.DataFrame:
        """What a stage wrote of a variant, by the table's name."""
        return TABLES[table].read(self.folder(variant))

    def read(self, done: pd.DataFrame, table: str | None = None) -> pd.DataFrame:
        """The rows of all variants that succeeded, of the stage's own table or of another one,
        which not every variant needs to have.
        """
        found = TABLES[table] if table else WRITES[self.stage]
        succeeded = set(done.run_id[done.status == "ok"])
        paths = [found.path(self.folder(one)) for one in self.variants if one.run_id in succeeded]
        return found.read_all([path for path in paths if table is None or path.is_file()])


def open_job(stage: str, study: str, base_model: str, run_ids: list[str]) -> Job:
    """The job of a stage: the variants of these run_ids, or, without any, the first one that is not
    the base model itself.

    Raises:
        ValueError: the study has no such base model or run_id.
    """
    checked = study_file.load(study)
    return Job(stage, checked, base_model, jobs.job_variants(checked, base_model, run_ids, stage))
