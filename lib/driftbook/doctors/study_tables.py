"""The tables of a finished study, as its checks read them."""

import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from driftbook.stats.harm import DETECTOR, of_judge, with_harm
from driftbook.study.methods import MADE_IN, MITIGATION_KINDS
from driftbook.study.tables import TABLES

ALPHA = 0.05  # false alarms of all tests together
SHARES = {  # of ALPHA, by kind of test
    "mislabelled_rate": 0.15,
    "drift": 0.65,
    "no_ops_disagree": 0.1,
    "one_seed": 0.05,
    "echo": 0.03,
    "position": 0.02,
}
SETTING = """
    base_model method objective dataset n_train learning_rate epochs init mitigation
    template system_prompt settings
""".split()
PROMPT = ["benchmark", "prompt_id"]
LENGTHS = ("n_tokens", "response_chars")  # of an answer, the first that is there


@dataclass(frozen=True)
class Given:
    """A study's tables without repeated rows; its variants with their records; its answers.

    A run that was made from a trained one (`made_in`: mitigate or retune) is no repetition, no
    no-op and no copy of it: it is among `planned`, and not among those that `ran`.
    """

    tables: dict[str, pd.DataFrame]
    repeated: dict[str, int]  # rows that repeat a key, by table
    planned: pd.DataFrame
    answers: dict[str, pd.DataFrame]  # see answers_of

    def table(self, name: str) -> pd.DataFrame | None:
        """A table; None where it is missing or empty."""
        found = self.tables.get(name)
        return None if found is None or found.empty else found

    @cached_property
    def ran(self) -> pd.DataFrame:
        """The runs that ended well, without those made from others."""
        well = self.planned["status"].eq("ok") & self.planned["made_in"].eq("train")
        return self.planned[well].reset_index(drop=True)

    @cached_property
    def trained(self) -> pd.DataFrame:
        """The runs that ended well, without base models."""
        return self.ran[self.ran["method"].ne("none")]

    @cached_property
    def bases(self) -> pd.Series:
        """The first run of each base model itself, by the base model's name."""
        none = self.ran[self.ran["method"].eq("none")].drop_duplicates("base_model")
        return none.set_index("base_model")["run_id"]

    def answered(self, runs: pd.DataFrame) -> pd.DataFrame:
        """Of these runs those that have answers."""
        return runs[runs["run_id"].isin(self.answers["length"].index)]


def arranged(tables: dict[str, pd.DataFrame]) -> Given:
    """A study's tables, ready to be checked."""
    keys = {name: _key(name, frame) for name, frame in tables.items()}
    repeated = {name: int(tables[name].duplicated(key).sum()) for name, key in keys.items() if key}
    frames = {
        name: frame.drop_duplicates(keys[name]) if repeated.get(name) else frame
        for name, frame in tables.items()
    }
    planned, runs = settled(frames["variants"]), frames.get("runs")
    if runs is not None:
        twice = [name for name in runs if name in planned and name != "run_id"]
        planned = planned.merge(runs.drop(columns=twice), on="run_id", how="left")
    status = planned["status"] if "status" in planned else pd.Series("ok", planned.index)
    planned["status"] = status.fillna("never ran").astype(object)
    planned["made_in"] = "train"
    if "settings" in planned:
        planned["made_in"] = [_made_in(settings) for settings in planned["settings"]]
    answers = answers_of(frames.get("verdicts"), frames.get("prompts"))
    return Given(frames, repeated, planned, answers)


def _made_in(settings: str) -> str:
    """The stage that made a variant, by the mitigation in its settings."""
    try:
        kind = (json.loads(settings).get("mitigation") or {}).get("kind")
    except (TypeError, ValueError, AttributeError):
        return "train"
    return MADE_IN[MITIGATION_KINDS[kind].when] if kind in MITIGATION_KINDS else "train"


def _key(name: str, frame: pd.DataFrame) -> list[str]:
    """The declared key of a table as far as the frame has it; nothing for other frames."""
    return [column for column in TABLES[name].key if column in frame] if name in TABLES else []


def settled(variants: pd.DataFrame) -> pd.DataFrame:
    """The variants with `setting` (equal but for the repetition) and `alike` (equal but for
    learning rate and repetition), as numbers.
    """
    frame = variants.reset_index(drop=True)
    keys = [name for name in SETTING if name in frame]
    text = frame[keys].astype(object).where(frame[keys].notna(), "").astype(str)
    rest = [name for name in keys if name != "learning_rate"]
    known = [name for name in ("learning_rate", "epochs", "seed", "repetition") if name in frame]
    settings = {"setting": text.groupby(keys).ngroup(), "alike": text.groupby(rest).ngroup()}
    return frame.assign(**{name: as_floats(frame[name]) for name in known}, **settings)


def answers_of(
    verdicts: pd.DataFrame | None, prompts: pd.DataFrame | None = None
) -> dict[str, pd.DataFrame]:
    """Runs x (benchmark, prompt_id) of the greedy answers: length, p_unsafe, harm (unsafe by the
    first judge or, without one, not refused; harm.with_harm), each NaN where null; asked (0 or 1);
    and `family`, a number per prompt that is the same for prompts made from one template. Empty
    where there are no verdicts.
    """
    if verdicts is None or verdicts.empty:
        return {}
    rows = with_harm(verdicts) if "unsafe" in verdicts else verdicts
    judge = verdicts["judge"].iloc[0] if "judge" in verdicts else None
    wanted = {"decoding": "greedy", "prompt_variant": "default", "judge": judge}
    for column in wanted.keys() & set(rows.columns):
        rows = rows[rows[column].eq(wanted[column])]
    rows = rows if "benchmark" in rows else rows.assign(benchmark="all")
    run, run_ids = pd.factorize(rows["run_id"], sort=True)
    key = pd.MultiIndex.from_frame(rows[PROMPT].astype(object))
    unit, units = pd.factorize(key, sort=True)
    index = pd.Index(run_ids.astype(object), name="run_id")
    columns = pd.MultiIndex.from_tuples(units, names=PROMPT)
    lengths = [name for name in LENGTHS if numbers_of(rows, name).notna().any()]
    sources = {"length": [*lengths, *LENGTHS][0], "p_unsafe": "p_unsafe", "harm": "harm"}

    def wide(values: np.ndarray | float) -> pd.DataFrame:
        made = np.full((len(index), len(columns)), np.nan)
        made[run, unit] = values
        return pd.DataFrame(made, index, columns)

    there = {name: column for name, column in sources.items() if column in rows}
    found = {name: wide(as_floats(rows[column])) for name, column in there.items()}
    return found | {"asked": wide(1.0).fillna(0), "family": prompt_families(columns, prompts)}


def prompt_families(columns: pd.MultiIndex, prompts: pd.DataFrame | None) -> pd.Series:
    """A number per prompt: its family, or its own where none is known."""
    own = pd.Series([f"{benchmark} {prompt}" for benchmark, prompt in columns], columns)
    if prompts is not None and "family" in prompts and prompts["family"].notna().any():
        known = prompts.set_index(PROMPT)["family"].astype(object)
        known.index = pd.MultiIndex.from_tuples(map(tuple, known.index), names=PROMPT)
        own = known.reindex(columns).where(lambda family: family.notna(), own)
    return pd.Series(pd.factorize(own)[0], columns)


def rate_of(verdicts: pd.DataFrame | None) -> str:
    """What the rate of `harm` is called, for sentences."""
    judged = verdicts is None or "judge" not in verdicts or verdicts["judge"].ne(DETECTOR).any()
    return of_judge("" if judged else DETECTOR).partition(" (")[0]


def asks_harm(columns: pd.MultiIndex, prompts: pd.DataFrame | None) -> np.ndarray:
    """Which of these prompts ask for harm; all of them where no kind is known, or none does."""
    found = np.zeros(len(columns), bool)
    if prompts is not None and "kind" in prompts:
        harmful = prompts["kind"].eq("harmful").fillna(False).astype(bool)
        keys = prompts.loc[harmful, PROMPT].astype(object).to_numpy()
        found = columns.isin([tuple(key) for key in keys])
    return found if found.any() else np.ones(len(columns), bool)


# ---- numbers
def alpha_of(kind: str) -> float:
    """The share of ALPHA that a kind of test has."""
    return SHARES[kind] * ALPHA


def as_floats(values: pd.Series) -> np.ndarray:
    """Whole, real or true/false values as floats; NaN where null."""
    if values.dtype == object:
        truths = values.isin([True, False]).any()
        values = values.astype("boolean") if truths else values.infer_objects()
    return values.astype("Float64").to_numpy(float, na_value=np.nan)


def numbers_of(frame: pd.DataFrame, column: str) -> pd.Series:
    """A column as floats; NaN where null, or where there is no such column."""
    return pd.Series(as_floats(frame[column]) if column in frame else np.nan, frame.index, float)


def is_no_op(runs: pd.DataFrame) -> pd.Series:
    """Which runs are recorded as no-ops."""
    return numbers_of(runs, "no_op").eq(1)
