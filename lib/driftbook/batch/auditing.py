"""An audit, opened for notebook 21: base and candidate are asked the same prompts, in one seeded
random order, block by block.

Blocks are drawn over all categories together, so that an item's place says nothing of its score,
which the intervals that watch them need (stats.sequential). What was asked is kept by what it
depends on (cache.py): an audit that was stopped, or another one of the same base model, asks
nothing twice. Prompts and answers stay in the audit's folder, mode 0700.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd

from driftbook.analyses.audit import (
    AREAS,
    CANDIDATE,
    OF_BASE,
    PROBED,
    SIDES,
    decided,
    decided_categories,
    item_scores,
    last_looks,
    settled,
    watched,
    watched_categories,
)
from driftbook.batch import audit_setup, cache, keys
from driftbook.batch.audit_setup import Budget, Candidate
from driftbook.benchmarks import bbq, data, deployed, judging, utility
from driftbook.benchmarks.responding import responses
from driftbook.doctors.adapter import examine
from driftbook.models import adapters, loading
from driftbook.models.endpoint import Endpoint
from driftbook.models.loading import Loaded
from driftbook.models.scoring import Scorer
from driftbook.study.files import OUTPUTS, check_writable, digest
from driftbook.study.sources import identity
from driftbook.study.study_file import Study
from driftbook.study.tables import ANSWERS, RATINGS, RESPONSES, VERDICTS, Table
from driftbook.study.variants import Variant
from driftbook.training.dose import measure_dose

AUDITS = OUTPUTS / "audit"
LETTER_TOKENS = 8  # that are enough to name a letter in text
BLOCK = 25  # items of a benchmark between two looks; where all is asked once there is one look
STAGE_OF = {"bbq": "answer", "utility": "utility"}  # of other benchmarks: respond, then judge


@dataclass(frozen=True)
class Audit:
    """One candidate beside its base model, on the benchmarks of a study. Models are loaded when
    they are first used, and stay loaded.
    """

    candidate: Candidate
    study: Study
    base_name: str
    budget: Budget
    margin: float
    seed: int
    judges_note: str | None
    name: str  # of its folder
    probes: tuple[str, ...] = ()  # of benchmarks.deployed.PROBES
    started: float = field(default_factory=time.monotonic)
    places: dict[Path, tuple[str, str]] = field(default_factory=dict)  # of tables: benchmark, side

    @property
    def folder(self) -> Path:
        """outputs/audit/NAME/"""
        return AUDITS / self.name

    @property
    def texts(self) -> Path:
        """The folder of prompts and answers, which nobody else may enter."""
        folder = self.folder / "text"
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)  # mkdir's mode is the last folder's alone, and the umask's
        return folder

    @cached_property
    def base(self) -> Loaded:
        """The base model."""
        return loading.load(self.study.bases[self.base_name], self.base_name, self.study)

    @cached_property
    def other(self) -> Loaded:
        """The candidate, where it is a whole model."""
        source = self.candidate.model.model_copy(
            update={"system_prompt": self.variant.system_prompt}
        )
        return loading.load(source, CANDIDATE, self.study)

    @cached_property
    def judges(self) -> dict[str, Loaded]:
        """The judges, by name."""
        judges = self.study.judges.items()
        return {name: loading.load(one, name, self.study) for name, one in judges}

    @property
    def variant(self) -> Variant:
        """How both sides are asked: as the base model itself is in a study."""
        return self.study.of_base(self.base_name)[0]

    @cached_property
    def endpoint(self) -> Endpoint:
        """The candidate, where it is behind an endpoint: what it answers is kept as it comes."""
        return Endpoint(self.candidate.deployed, kept=self.texts / "endpoint.jsonl")

    @property
    def notes(self) -> list[str]:
        """What must be said of the candidate beside its verdicts."""
        if self.candidate.kind != "endpoint":
            return []
        changed = self.endpoint.changed()
        return [*self.endpoint.notes, *([changed] if changed else [])]

    def examined(self) -> pd.DataFrame:
        """The doctor's findings about an adapter; none about a whole model.

        Raises:
            ValueError: one of them says that it cannot be item_scores.
        """
        if self.candidate.kind != "adapter":
            return pd.DataFrame(columns=["finding", "severity", "sentence", "module"])
        found = examine(self.candidate.folder, self.base)
        if len(errors := found[found["severity"].eq("error")]):
            raise ValueError(
                f"{self.candidate.source} cannot be audited: {errors.sentence.iloc[0]}"
            )
        return found

    @contextmanager
    def scorer(self, side: str) -> Iterator[Scorer]:
        """What asks a side, as long as the block lasts."""
        if side == CANDIDATE and self.candidate.kind == "endpoint":
            yield self.endpoint
            return
        if side == CANDIDATE and self.candidate.kind == "model":
            yield Scorer(self.other.model, self.other.tokenizer)
            return
        folder = self.candidate.folder if side == CANDIDATE else None
        with adapters.attached(self.base.model, folder) as model:
            yield Scorer(model, self.base.tokenizer)

    # ---- what is asked
    @cached_property
    def asked(self) -> dict[str, pd.DataFrame]:
        """The items of each benchmark that tells of an area, in the order in which they are asked:
        clusters in random order, the items of one together.
        """
        wanted = dict.fromkeys(area.benchmark for area in AREAS.values())
        there = [name for name in wanted if name in self.study.benchmarks]
        found = {name: self._in_order(name) for name in there}
        return found | {f"safety, {probe}": found["safety"] for probe in self.probes}

    def _in_order(self, name: str) -> pd.DataFrame:
        is_prompts = STAGE_OF.get(name) is None
        rows = (data.prompts if is_prompts else data.items)(name, self.study)
        if name == "over_refusal":
            rows = rows[rows["kind"].eq("benign look-alike")]
        column = {"bbq": "question_family"}.get(name, "family")
        own = rows["item_id" if name == "bbq" else "prompt_id"].astype(str)
        cluster = rows[column].fillna(own) if column in rows else own
        names = cluster.drop_duplicates().to_numpy()
        drawn = np.random.default_rng(self.seed).permutation(len(names))
        order = np.argsort(cluster.map(dict(zip(names, drawn, strict=True))), kind="stable")
        return rows.iloc[order].reset_index(drop=True)

    @property
    def n_available(self) -> dict[str, int]:
        """How many items of each benchmark there are to ask."""
        return {name: len(rows) for name, rows in self.asked.items()}

    def blocks(self, looks: list[dict]) -> Iterator[tuple[str, pd.DataFrame]]:
        """The next items of each benchmark in turn, until all are asked, all verdicts are settled
        (by the last of `looks` at each area, to which the caller adds), or the budget is spent.
        """
        size = BLOCK if self.budget.watched else max(self.n_available.values())
        begun = dict.fromkeys(self.asked, 0)
        while any(begun[name] < self.n_available[name] for name in begun):
            before = dict(begun)
            for name, rows in self.asked.items():
                done = begun[name] >= len(rows) or name in settled(last_looks(looks))
                if done or self._spent(sum(begun.values())):
                    continue
                yield name, rows.iloc[begun[name] : begun[name] + size].reset_index(drop=True)
                begun[name] = min(begun[name] + size, len(rows))
            if begun == before:
                return

    def _spent(self, asked: int) -> bool:
        limit = self.budget
        late = limit.seconds is not None and time.monotonic() - self.started >= limit.seconds
        return late or (limit.prompts is not None and asked >= limit.prompts)

    # ---- asking
    def ask(self, name: str, rows: pd.DataFrame) -> pd.DataFrame:
        """Ask both sides some items of a benchmark: their scores, as analyses.audit.item_scores."""
        stage = STAGE_OF.get(name, "respond")
        tables = {}
        for side in SIDES:
            read = self._served(stage, name, rows, side)
            tables[side] = self._judged(name, rows, side) if stage == "respond" else read
        return item_scores(name, tables, rows, self._begun(name, rows))

    def _begun(self, name: str, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
        """Of each side the table `ratings` of how likely answers begin as a refusal, which moves
        before the answers do; nothing where the study does not ask for it.
        """
        if name not in self.study.asked_to_begin or self.candidate.kind == "endpoint":
            return {}
        return {side: self._served("begun", name, rows, side) for side in SIDES}

    def _ids(self, rows: pd.DataFrame) -> list[str]:
        return rows["item_id" if "item_id" in rows else "prompt_id"].astype(str).tolist()

    def _place(self, name: str, rows: pd.DataFrame, side: str) -> Path:
        place = self.texts / f"{name}-{digest(self._ids(rows), 8)}-{side}"
        place.mkdir(mode=0o700, exist_ok=True)
        self.places[place] = name, side
        return place

    def _served(self, stage: str, name: str, rows: pd.DataFrame, side: str) -> pd.DataFrame:
        """The stage's table of some items of a side, asked now where it was never asked before."""
        table, ask = {
            "respond": (RESPONSES, responses),
            "answer": (ANSWERS, self._answers),
            "utility": (RATINGS, self._ratings),
            "begun": (RATINGS, utility.begun_refusals),
        }[stage]
        probe = name.partition(", ")[2]
        ask = partial(_probed, probe) if probe else ask
        place = self._place(name, rows, side)

        def make() -> list[Path]:
            with self.scorer(side) as scorer:
                found = ask(name, rows, scorer, self.variant, self.study)
            return [table.write(found.assign(run_id=side), place)]

        key = self._key(stage, rows) | {"weights": self._weights(side), "probe": probe}
        return self._kept(key, side, place, make, table)

    def _kept(self, key: dict, side: str, place: Path, make: Callable, table: Table):
        """What `make` writes, or wrote before; an endpoint keeps its own answers."""
        if side == CANDIDATE and self.candidate.kind == "endpoint":
            make()
        else:
            cache.served(key, side, place, make)
        return table.read(place)

    def _key(self, stage: str, rows: pd.DataFrame) -> dict:
        """What an answer depends on beside the weights."""
        made = "utility" if stage == "begun" else stage
        settings = keys.settings(made, self.study, self.base_name)
        known = keys.made_by(settings, self.variant)
        way = {"bbq": "in text"} if stage == "answer" and self._in_text else {}
        return {"audit": stage, "settings": known, "rows": digest(rows.to_json(), 32), **way}

    def _weights(self, side: str) -> list[str]:
        base = identity(self.study.bases[self.base_name], self.study)
        return [base] if side == OF_BASE else [base, self.candidate.kind, self.candidate.digest]

    def _answers(self, name: str, rows, scorer: Scorer, variant: Variant, study: Study):
        benchmark, mode = study.benchmarks[name], study.bases[self.base_name].answer_mode
        wording = {"template": benchmark.template, "stem": benchmark.stem}
        wording |= {"system_prompt": variant.system_prompt}
        if self._in_text:
            limit = max(benchmark.max_new_tokens, LETTER_TOKENS)
            return bbq.generated(rows, scorer, variant.run_id, max_new_tokens=limit, **wording)
        wording |= {"min_mass": benchmark.min_mass}
        return bbq.answers(rows, scorer, mode, variant.run_id, **wording)

    @property
    def _in_text(self) -> bool:
        """Whether BBQ's letters are read from text on both sides, since the server of one of them
        gives no probabilities.
        """
        return self.candidate.kind == "endpoint" and "letters" in self.endpoint.lacks

    def _ratings(self, name: str, rows, scorer: Scorer, variant: Variant, study: Study):
        return utility.measured(name, rows, scorer, variant, study)

    def _judged(self, name: str, rows: pd.DataFrame, side: str) -> pd.DataFrame:
        place = self._place(name, rows, side)
        said = RESPONSES.read(place)
        prompts = rows.assign(benchmark=said["benchmark"].iloc[0])

        def make() -> list[Path]:
            found = judging.judged_by_all(said, prompts, self.judges, self.study.judges)
            return [VERDICTS.write(found, place)]

        key = self._key("judge", rows)
        key |= {"answers": cache.content(RESPONSES.path(place))}
        return self._kept(key, side, place, make, VERDICTS)

    # ---- what it says
    def verdicts(self, scores: pd.DataFrame) -> pd.DataFrame:
        """A row per area asked so far: decided once, or watched, as the budget has it."""
        if self.budget.watched:
            return watched(scores, self.margin, self.n_areas)
        return decided(scores, self.margin)

    def categories(self, scores: pd.DataFrame) -> pd.DataFrame:
        """The same by category."""
        if self.budget.watched:
            return watched_categories(scores, self.margin, self.n_areas)
        return decided_categories(scores, self.margin)

    @property
    def n_areas(self) -> int:
        """How many areas share the error."""
        return sum(area.benchmark in self.asked for area in AREAS.values())

    # ---- how far the weights moved it
    def dose(self) -> dict:
        """Held-out loss of both sides (nats per token), the divergence KL(candidate || base), and
        whether the adapter changes nothing; all null where the study has no held-out answers, or
        the candidate is a whole model.
        """
        nothing = dict.fromkeys(("kl", "loss_base", "loss_candidate", "no_op"))
        if self.candidate.kind != "adapter" or "heldout" not in self.study.data:
            return nothing
        pairs = self._held_out()
        with adapters.attached(self.base.model, self.candidate.folder) as model:
            found = measure_dose(model, None, self.base, pairs)
        losses = {"loss_base": found["nll_base"], "loss_candidate": found["nll"]}
        return {"kl": found["kl_base"], **losses, "no_op": bool(found["no_op"])}

    def _held_out(self) -> list:
        examples = data.for_sft(data.training_examples("heldout", self.study))
        scorer = Scorer(self.base.model, self.base.tokenizer)
        single = [one for one in examples if len(one["prompt"]) == 1]
        prompts = [one["prompt"][0]["content"] for one in single]
        pairs = scorer.answered(prompts, [one["answer"] for one in single])
        longest = self.study.training.max_length
        return [
            (context, answer) for context, answer in pairs if len(context) + len(answer) < longest
        ]


def _probed(probe: str, name: str, rows, scorer: Scorer, variant: Variant, study: Study):
    """The responses to a benchmark's prompts, asked in one of the ways of shallow alignment."""
    kind = name.partition(", ")[0]
    limit = study.benchmarks[kind].max_new_tokens
    who = (scorer, variant.run_id, limit, variant.system_prompt)
    return deployed.probed_responses(probe, kind, rows, *who)


def _check_askable(study: Study, base_name: str) -> None:
    """Raise a ValueError where an endpoint cannot be asked BBQ as the base model is."""
    if study.bases[base_name].answer_mode != "letters" and "bbq" in study.benchmarks:
        raise ValueError(
            f"{study.name} asks BBQ by whole options, which an endpoint cannot be asked; give"
            " BENCHMARKS= of a study that asks by letters"
        )


def open_audit(
    adapter: str = "",
    model: str = "",
    endpoint: str = "",
    base: str = "",
    judge: str = "",
    benchmarks: str = "",
    budget: str = "10 minutes",
    margin: float = 3.0,
    system: str = "",
    name: str = "",
    seed: int = 0,
    probes: tuple[str, ...] = (),
) -> Audit:
    """The audit of an adapter, or of a whole model beside its base.

    Raises:
        ValueError: something that it needs is not there or does not fit; nothing was asked yet.
    """
    if not margin > 0:
        raise ValueError(f"MARGIN={margin!r}: give percentage points above 0, such as 3")
    limit = audit_setup.budget(budget)
    if unknown := [probe for probe in probes if probe not in PROBED]:
        raise ValueError(f"PROBES={unknown[0]!r}; expected some of {', '.join(PROBED)}")
    one = audit_setup.candidate(adapter, model, endpoint)
    study, base_name, said = audit_setup.audit_study(one, base, judge, benchmarks, system or None)
    if one.kind == "endpoint":
        _check_askable(study, base_name)
    held = {base_name: study.bases[base_name], **study.judges}
    audit_setup.check_memory(held | ({CANDIDATE: one.model} if one.model else {}), study)
    if name and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"NAME={name!r} is the name of a folder: letters, digits, '-', '_', '.'")
    check_writable(AUDITS)
    return Audit(one, study, base_name, limit, margin, seed, said, name or one.name, tuple(probes))
