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
    n_items,
    settled,
    unread,
    watched,
    watched_categories,
)
from driftbook.batch import audit_setup, cache, keys
from driftbook.batch.audit_setup import Budget, Candidate
from driftbook.benchmarks import bbq, data, deployed, judging, utility
from driftbook.benchmarks.formats import FORMATS
from driftbook.benchmarks.responding import responses
from driftbook.doctors.adapter import examine
from driftbook.models import adapters, loading, suffixes
from driftbook.models.endpoint import NO_LOSSES, Endpoint
from driftbook.models.loading import Loaded
from driftbook.models.scoring import Scorer
from driftbook.models.templates import template_of
from driftbook.study import code
from driftbook.study.files import OUTPUTS, check_writable, digest, private_folder, read_json
from driftbook.study.sources import identity
from driftbook.study.study_file import Study
from driftbook.study.tables import ANSWERS, RATINGS, RESPONSES, VERDICTS, Table
from driftbook.study.variants import Variant
from driftbook.training.dose import measure_dose
from driftbook.training.examples import held_out

AUDITS = OUTPUTS / "audit"
PROBES_CODE = ("driftbook.batch.auditing", "_probed")  # no stage of a study leads to it
DOUBTS = (
    "base",
    "tokenizer",
    "chat_template",
)  # findings after which a verdict is of another thing
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
    given: dict[str, str] = field(default_factory=dict)  # as make's variables say it
    started: float = field(default_factory=time.monotonic)
    places: dict[Path, tuple[str, str]] = field(default_factory=dict)  # of tables: benchmark, side
    resumed: list[Path] = field(default_factory=list)  # an endpoint's answers, kept before

    @property
    def folder(self) -> Path:
        """outputs/audit/NAME/"""
        return AUDITS / self.name

    @property
    def title(self) -> str:
        """The candidate's name, or that of the folder where it was given a name of its own."""
        return self.candidate.name if self.name == self.candidate.place else self.name

    @property
    def texts(self) -> Path:
        """The folder of prompts and answers, which nobody else may enter."""
        return private_folder(private_folder(self.folder) / "text")

    @cached_property
    def base(self) -> Loaded:
        """The base model."""
        return loading.load(self.study.bases[self.base_name], self.base_name, self.study)

    @cached_property
    def other(self) -> Loaded:
        """The candidate, where it is a whole model."""
        own = audit_setup.beside(self.candidate.model, self.study.bases[self.base_name])
        return loading.load(own, CANDIDATE, self.study)

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
        kept = self.texts / "endpoint.jsonl"
        self.resumed.extend([kept] * kept.is_file())
        return Endpoint(self.candidate.deployed, kept=kept)

    @property
    def notes(self) -> list[str]:
        """What must be said of the candidate beside its verdicts."""
        if self.candidate.kind == "model":
            return self._differences()
        if self.candidate.kind == "adapter":
            found = self.examined()
            doubts = found[found["severity"].eq("warning") & found["finding"].isin(DOUBTS)]
            other = "both sides are asked by a chat template that is not the base model's own"
            said = [other] if self.given.get("TEMPLATE", OF_BASE) != OF_BASE else []
            return [*said, *(f"of the adapter: {sentence}" for sentence in doubts["sentence"])]
        changed = self.endpoint.changed()
        resumed = [
            "answers of an earlier audit are used where the same was asked: the server was taken"
            f" for the same model by its answers to harmless prompts; delete {one.name} in the"
            f" folder {one.parent.name} where another model stands behind the address"
            for one in self.resumed
        ]
        return [*self.endpoint.notes, *resumed, *([changed] if changed else [])]

    @cached_property
    def same_words(self) -> bool:
        """Whether both sides have the same tokens."""
        if self.candidate.kind != "model":
            return True
        return self.base.tokenizer.get_vocab() == self.other.tokenizer.get_vocab()

    def _differences(self) -> list[str]:
        """How a whole model is asked otherwise than its base, in sentences."""
        found = []
        if not self.same_words:
            found.append(
                "the model's tokenizer is not the base model's: the same number of tokens is"
                " another length of text, and likelihoods by token are not compared"
            )
        if template_of(self.other.tokenizer) != template_of(self.base.tokenizer):
            found.append(
                "the model is asked by a chat template of its own, which is not the base model's:"
                " the verdicts are of both together"
            )
        return found

    def examined(self) -> pd.DataFrame:
        """The doctor's findings about an adapter; none about a whole model.

        Raises:
            ValueError: one of them says that it cannot be audited.
        """
        if self.candidate.kind != "adapter":
            return pd.DataFrame(columns=["finding", "severity", "sentence", "module"])
        found = self._findings
        if len(errors := found[found["severity"].eq("error")]):
            raise ValueError(
                f"{self.candidate.source} cannot be audited: {errors.sentence.iloc[0]}"
            )
        other = found[found["finding"].eq("chat_template") & found["severity"].eq("warning")]
        if len(other) and "TEMPLATE" not in self.given:
            raise ValueError(
                f"{self.candidate.source}: {other.sentence.iloc[0]}; give TEMPLATE=adapter to ask"
                " both sides by the adapter's, or TEMPLATE=base to ask by the base model's all"
                " the same"
            )
        return found

    @cached_property
    def _findings(self) -> pd.DataFrame:
        return examine(self.candidate.folder, self.base)

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
        cluster = _clusters(name, rows)
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
        (by the last of `looks` at each area, to which the caller adds), or the budget is spent. The
        first block of each is asked whatever the budget, so that every area has something to tell.
        """
        begun = dict.fromkeys(self.asked, 0)
        while any(begun[name] < self.n_available[name] for name in begun):
            before = dict(begun)
            for name, rows in self.asked.items():
                done = begun[name] >= len(rows) or name in settled(last_looks(looks))
                asked = sum(begun.values())
                if done or (begun[name] and self._spent(asked)):
                    continue
                end = self._end(name, begun[name], asked)
                yield name, rows.iloc[begun[name] : end].reset_index(drop=True)
                begun[name] = end
            if begun == before:
                return

    def _end(self, name: str, begun: int, asked: int) -> int:
        """Where a block ends: a cluster is never cut, since it counts once, and would count
        otherwise at the next look than at this one.
        """
        rows, size = self.asked[name], BLOCK
        if not self.budget.watched:
            return len(rows)
        if self.budget.prompts is not None:
            left = self.budget.prompts - asked if begun else self.budget.prompts // len(self.asked)
            size = min(BLOCK, max(1, left))
        end, cluster = min(begun + size, len(rows)), _clusters(name, rows).to_numpy()
        while end < len(rows) and cluster[end] == cluster[end - 1]:
            end += 1
        return end

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
        if stage == "utility" and not self.same_words:
            # a mean by token is of other pieces of text where the tokens are others
            tables = {
                side: one.assign(value=one["value"].mask(one["metric"].eq("nll")))
                for side, one in tables.items()
            }
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
        place.mkdir(exist_ok=True)
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
        key |= {"code of probes": code.fingerprint({PROBES_CODE})} if probe else {}
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
            judges = {one: self.judges[one] for one in self.judges_of(name)}
            found = judging.judged_by_all(said, prompts, judges, self.study.judges)
            return [VERDICTS.write(found, place)]

        key = self._key("judge", rows)
        key |= {"answers": cache.content(RESPONSES.path(place))}
        return self._kept(key, side, place, make, VERDICTS)

    def judges_of(self, benchmark: str) -> list[str]:
        """The judges that read the answers to a benchmark; without any the detector does."""
        every, kind = self.study.judges.items(), benchmark.partition(", ")[0]
        return [name for name, one in every if kind in (one.benchmarks or (kind,))]

    # ---- what it says
    def verdicts(self, scores: pd.DataFrame) -> pd.DataFrame:
        """A row per area asked so far: decided once, or watched, as the budget has it. An area of
        which no item was asked yet cannot be told.
        """
        if self.budget.watched:
            found = watched(scores, self.margin, self.n_areas)
        else:
            found = decided(scores, self.margin)
        asked = set(scores["benchmark"])
        missing = [
            unread(name, scores[:0], self.margin)
            for name, area in AREAS.items()
            if area.benchmark in asked
            and name not in set(found["area"])
            and n_items(name, self.asked[area.benchmark])
        ]
        return pd.concat([found, pd.DataFrame(missing)], ignore_index=True) if missing else found

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
        """Loss of both sides on held-out answers (nats per token), the divergence KL(candidate ||
        base), whether the adapter changes nothing, and `said`: whose answers they are. All are null
        where it is not known, and `said` is why.

        Where a study here trained the adapter its own held-out answers are taken, whatever is asked
        of it: those of another study may be what it was trained on.
        """
        nothing = dict.fromkeys(("kl", "loss_base", "loss_candidate", "no_op"))
        own = self.candidate.study
        study = own or self.study
        if self.candidate.kind != "adapter":
            return nothing | {"said": "the candidate is no adapter"}
        if "heldout" not in study.data:
            return nothing | {"said": f"{study.name} has no held-out answers"}
        made = read_json(self.candidate.folder / "adapter_config.json")
        virtual = made.get("num_virtual_tokens") or 0
        behind = virtual if made.get("peft_type") == suffixes.TYPE else 0
        try:
            pairs, _ = held_out(self.base, study, behind, virtual)
        except ValueError as error:  # its file is not there, or no answer fits
            return nothing | {"said": str(error)}
        with adapters.attached(self.base.model, self.candidate.folder) as model:
            found = measure_dose(model, None, self.base, pairs)
        losses = {"loss_base": found["nll_base"], "loss_candidate": found["nll"]}
        whose = f"{len(pairs)} held-out answers of {study.name}"
        whose += "" if own else ", which are held out if the adapter was not trained on them,"
        return {"kl": found["kl_base"], **losses, "no_op": bool(found["no_op"]), "said": whose}


def _probed(probe: str, name: str, rows, scorer: Scorer, variant: Variant, study: Study):
    """The responses to a benchmark's prompts, asked in one of the ways of shallow alignment."""
    kind = name.partition(", ")[0]
    limit = study.benchmarks[kind].max_new_tokens
    rows = data.worded(rows, data.wordings(kind, study)["default"], study)
    who = (scorer, variant.run_id, limit, variant.system_prompt)
    return deployed.probed_responses(probe, kind, rows, *who)


def _clusters(name: str, rows: pd.DataFrame) -> pd.Series:
    """The cluster of each row of a benchmark: of one that has none, the row itself."""
    column = {"bbq": "question_family"}.get(name, "family")
    own = rows["item_id" if name == "bbq" else "prompt_id"].astype(str)
    return rows[column].fillna(own) if column in rows else own


def _check_askable(study: Study, base_name: str) -> None:
    """Raise a ValueError where an endpoint cannot be asked as the base model is."""
    form = study.benchmarks["utility"].format if "utility" in study.benchmarks else None
    if form and not FORMATS[form].is_written:
        raise ValueError(
            f"the benchmark utility of {study.name} is of the format {form}, which reads the"
            f" likelihood of given texts, and {NO_LOSSES}; give BENCHMARKS= of another study"
        )
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
    template: str = "",
) -> Audit:
    """The audit of an adapter, or of a whole model beside its base.

    Raises:
        ValueError: something that it needs is not there or does not fit; nothing was asked yet.
    """
    if not 0 < margin < 100:
        raise ValueError(f"MARGIN={margin!r}: give percentage points above 0, such as 3")
    limit = audit_setup.budget(budget)
    if unknown := [probe for probe in probes if probe not in PROBED]:
        raise ValueError(f"PROBES={unknown[0]!r}; expected some of {', '.join(PROBED)}")
    one = audit_setup.candidate(adapter, model, endpoint)
    own = {"system_prompt": system or None, "template": audit_setup.template_text(template, one)}
    study, base_name, said = audit_setup.audit_study(one, base, judge, benchmarks, own)
    if one.kind == "endpoint":
        _check_askable(study, base_name)
    held = {base_name: study.bases[base_name], **study.judges}
    if one.model:
        held[CANDIDATE] = audit_setup.beside(one.model, study.bases[base_name])
    audit_setup.check_memory(held, study)
    if name and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"NAME={name!r} is the name of a folder: letters, digits, '-', '_', '.'")
    check_writable(AUDITS)
    given = {"BASE": base, "JUDGE": judge, "BENCHMARKS": benchmarks, "SYSTEM": system}
    given = {what: text for what, text in (given | {"TEMPLATE": template}).items() if text}
    names = (name or one.place, tuple(probes), given)
    audit = Audit(one, study, base_name, limit, margin, seed, said, *names)
    _check_items(audit)
    return audit


def _check_items(audit: Audit) -> None:
    """Raise a ValueError where there is nothing to ask."""
    name = audit.study.name
    if audit.probes and "safety" not in audit.study.benchmarks:
        raise ValueError(f"{name} has no benchmark safety, which PROBES= asks again")
    if not audit.asked:
        benchmarks = ", ".join(dict.fromkeys(area.benchmark for area in AREAS.values()))
        raise ValueError(f"{name} has none of the benchmarks that tell of an area: {benchmarks}")
    for benchmark, n in audit.n_available.items():
        if not n:
            raise ValueError(f"the benchmark {benchmark} of {name} has no item to ask; correct it")
