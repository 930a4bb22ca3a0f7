"""A second study's public tables (Tamsal and Rusert, "Adaptation, Not Algorithm", Findings of
AACL-IJCNLP 2026): where they are, and what they hold once their traps are out of the way.

Five base models, each as it is, in 4 bits, and tuned on Alpaca by LoRA, QLoRA and in full; attack
success by three judges; 750 answers labelled by two people. Rates, labels and ids only. The label
files' licence is not stated, so what leaves here is estimates of ours, never a table of theirs.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from driftbook.rereading.places import published_files
from driftbook.study.files import OUTPUTS, ROOT
from driftbook.study.sections import Source

ADAPTATION_NAME = "adaptation_study"
ADAPTATION_NOTEBOOK = f"23_{ADAPTATION_NAME}"
ADAPTATION_NOTE = "a second study, read again from its public tables"
ADAPTATION_FOLDER = OUTPUTS / ADAPTATION_NAME
_KNOWN = ROOT / "data" / ADAPTATION_NAME
ADAPTATION_SOURCE, ADAPTATION_COMMIT = "github:Taleef7/adaptation-not-algorithm", "f76dfbe099"

MODEL_FAMILIES = {
    "gemma2": "Gemma-2-9B",
    "llama31": "Llama-3.1-8B",
    "phi4": "Phi-4",
    "qwen25": "Qwen2.5-14B",
    "qwen3": "Qwen3-4B",
}
PLAIN, FOUR_BIT = "base_fp16", "base_4bit"
CONFIGS = {
    PLAIN: "base model",
    FOUR_BIT: "base model, 4 bits",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "fft": "full fine-tuning",
}
TUNED = ("lora", "qlora", "fft")
JUDGES = ("HB-Cls", "GPT-4o-mini", "LlamaGuard-3")
_JUDGE_NAMES = {"Llama-2-13b-cls": "HB-Cls", "Llama-2": "HB-Cls", "LlamaGuard": "LlamaGuard-3"}
_VERDICT_COLUMNS = ["hbcls_label", "gpt4omini_label", "llamaguard3_label"]  # in the judges' order
WHITE_BOX = "AutoDAN"  # the one attack that reads the model's gradients; the others are black-box
LABELLED_BENCHMARK = "HarmBench"
CELL_KEYS = ["attack", "dataset"]
SEED_NAMES = {"lora_original_asr": "original", "lora_seed0_asr": "0", "lora_seed123_asr": "123"}
_REPAIRED = 7  # rows of the first of two tables in one file


# ---- where it is
def adaptation_files() -> pd.DataFrame:
    """The files of the study: upstream folder, rows, and SHA-256 of the copy known here, by name.

    Upstream published no checksums, and the copy known here was typed from pages, so that a hash
    tells equality with that copy and nothing more.
    """
    return pd.read_csv(_KNOWN / "files.csv", index_col="file")


def cited_figures() -> pd.DataFrame:
    """Figures of the paper's text: statistic, value, decimals printed, where."""
    return pd.read_csv(_KNOWN / "cited.csv")


def adaptation_located(folder: str = "") -> Path:
    """The folder of the study's tables; see `published_files`."""
    tables = f"tables of {ADAPTATION_SOURCE.partition(':')[2]}"
    sources = (
        Source(
            source=f"{ADAPTATION_SOURCE}/{place}",
            revision=ADAPTATION_COMMIT,
            files=tuple(files.index),
        )
        for place, files in adaptation_files().groupby("folder")
    )
    return published_files(folder, ADAPTATION_NAME, tables, sources)


def adaptation_provenance(folder: Path) -> str:
    """A sentence: how many files are, byte for byte, the copy that this notebook was made with."""
    known = adaptation_files()["sha256"]
    same = sum(
        hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256
        for name, sha256 in known.items()
    )
    return (
        f"{same} of {len(known)} files are the copy that this notebook was made with, byte for"
        f" byte; {ADAPTATION_SOURCE.partition(':')[2]} at {ADAPTATION_COMMIT} is where the copy"
        " was typed from, and publishes no checksum."
    )


# ---- reading
@dataclass(frozen=True)
class AdaptationData:
    """The study's tables by file name, as they are, and what analyses read of them.

    asr: attack, dataset, judge, family, config, asr (percent), n: the published grid. controlled:
    the same for the re-training at one seed (two attacks), with `original` rates. seeds: family,
    attack, dataset, judge, seed, asr, base (percent), usable. labels, refusals: a row per labelled
    answer with pattern (three verdicts), consensus of two people (1, 0, null), config, attack,
    group. repaired: method, seed, judge, asr. orr: judge, family, config, orr (percent).
    """

    raw: dict[str, pd.DataFrame]
    asr: pd.DataFrame
    controlled: pd.DataFrame
    seeds: pd.DataFrame
    labels: pd.DataFrame
    refusals: pd.DataFrame
    repaired: pd.DataFrame
    orr: pd.DataFrame


def read_tables(folder: Path) -> AdaptationData:
    """The study's tables from a folder of its files.

    Raises:
        ValueError: a file is missing, has another number of rows than the study's, or lacks a
            column.
    """
    raw = {name.removesuffix(".csv"): _file(folder, name) for name in adaptation_files().index}
    try:
        return AdaptationData(
            raw,
            _grid(raw["master_asr_long"]),
            _controlled(raw["r6_controlled_cells_3judge"]),
            _seeds(raw["multiseed_lora_protective_map"]),
            _labels(raw["asr_500_labels"], "attack"),
            _labels(raw["orr_250_labels"], "attack"),
            _repaired(raw["defense_audit"]),
            _refused(raw["master_orr_long"]),
        )
    except KeyError as error:
        raise ValueError(
            f"{folder}: a table of the second study lacks a column: {error.args[0]};"
            " it is of another version"
        ) from None


def _file(folder: Path, name: str) -> pd.DataFrame:
    """One file; of the one that holds two tables the first."""
    path, rows = folder / name, int(adaptation_files().loc[name, "rows"])
    if not path.is_file():
        raise ValueError(f"{folder} has no {name}; it holds not all tables of the second study")
    table = pd.read_csv(path, nrows=_REPAIRED if name == "defense_audit.csv" else None)
    if len(table) != rows:
        raise ValueError(
            f"{path} has {len(table)} rows, and the study's has {rows}; it is another version"
        )
    return table


def _judged(names: pd.Series) -> pd.Series:
    """Each judge under one name; upstream has up to four for one."""
    return names.replace(_JUDGE_NAMES)


def _grid(table: pd.DataFrame) -> pd.DataFrame:
    """The published grid. The ASR column is kept where it is not successes / n, since upstream's
    own tests use it.
    """
    table = table.rename(columns={"model_family": "family", "ASR": "asr", "evaluator": "judge"})
    columns = [*CELL_KEYS, "judge", "family", "config", "n", "successes", "asr"]
    return table.assign(judge=_judged(table["judge"]))[columns]


def _controlled(table: pd.DataFrame) -> pd.DataFrame:
    """The re-training at one seed, a row per cell and configuration."""
    table = table.rename(columns={"model_family": "family"}).assign(judge=_judged(table["judge"]))
    keys = ["judge", "family", *CELL_KEYS]
    own = table[[*keys, *CONFIGS]].melt(keys, var_name="config", value_name="asr")
    old = table[[*keys, *(f"{name}_orig" for name in TUNED)]]
    old = old.rename(columns=lambda name: name.removesuffix("_orig"))
    old = old.melt(keys, var_name="config", value_name="original")
    return own.merge(old, how="left", on=[*keys, "config"])


def _seeds(table: pd.DataFrame) -> pd.DataFrame:
    """LoRA at three seeds, in percent. `usable` is false where a judge gave no model a single
    success, the base model included: those verdicts are probably missing.
    """
    table = table.rename(columns={"evaluator": "judge"})
    table = table.assign(judge=_judged(table["judge"]))
    empty = table.groupby([*CELL_KEYS, "judge"])["base_asr"].transform("max").eq(0)
    keys = ["family", *CELL_KEYS, "judge"]
    rows = table.assign(usable=~empty, base=100 * table["base_asr"])
    rows = rows.rename(columns=SEED_NAMES)[[*keys, "base", "usable", *SEED_NAMES.values()]]
    rows = rows.melt([*keys, "base", "usable"], var_name="seed", value_name="asr")
    return rows.assign(asr=100 * rows["asr"])


def _labels(table: pd.DataFrame, *more: str) -> pd.DataFrame:
    """A row per labelled answer; a grade of 0 or 1 by both people alike is the consensus, so that
    any other grade is a disagreement.
    """
    one, two = table["annotator_A"], table["annotator_B"]
    agreed = one.eq(two) & one.isin([0, 1])
    pattern = table[_VERDICT_COLUMNS].astype(int).astype(str).agg("".join, axis=1)
    rows = table.rename(columns={"model_family": "family", "selection_group": "group"})
    rows = rows[["sample_id", *more, "family", "config", "group"]]
    return rows.assign(pattern=pattern, consensus=one.where(agreed).astype("Float64"))


def _refused(table: pd.DataFrame) -> pd.DataFrame:
    """The rates of over-refusal."""
    table = table.rename(columns={"model_family": "family", "ORR": "orr", "evaluator": "judge"})
    return table.assign(judge=_judged(table["judge"]))[["judge", "family", "config", "orr"]]


def _repaired(table: pd.DataFrame) -> pd.DataFrame:
    """LoRA and Safe LoRA at three seeds, long."""
    rows = table.melt(["method", "seed"], list(JUDGES), var_name="judge", value_name="asr")
    rows["asr"] = rows["asr"].astype(float)
    return rows


# ---- its traps
def traps(data: AdaptationData) -> pd.DataFrame:
    """What would mislead a reader of the files, counted in them, and what is done: file, found,
    done.
    """
    rows = [*_of_labels(data), *_of_seeds(data), *_of_grids(data)]
    return pd.DataFrame(rows, columns=["file", "found", "done"])


def _of_labels(data: AdaptationData) -> list[tuple[str, str, str]]:
    strange = ~data.raw["asr_500_labels"]["annotator_B"].isin([0, 1])
    unsure = [part["consensus"].isna().sum() for part in (data.labels, data.refusals)]
    return [
        ("asr_500_labels", f"annotator_B outside 0 and 1: {strange.sum()}", "a disagreement"),
        (
            "both label files",
            f"{unsure[0]} and {unsure[1]} disagreements",
            "left out, then bounded",
        ),
        ("all", f"{len(_JUDGE_NAMES)} other names of judges", "one name each"),
    ]


def _of_seeds(data: AdaptationData) -> list[tuple[str, str, str]]:
    """Of the tables by seed. In DeepInception on JBB one judge's verdicts are probably missing."""
    multi, cross, matrix = (
        data.raw[name]
        for name in ("multiseed_lora_protective_map", "cross_seed_results", "seed_matrix")
    )
    n_seeds, empty = len(SEED_NAMES), ~data.seeds["usable"]
    lost = data.seeds[empty & data.seeds["asr"].eq(0)]
    base, lora = _other_runs(data)
    said = cross[cross["method"].eq("fft") & cross["seed_label"].eq("original")]["seed"].iloc[0]
    held = matrix[matrix["family"].eq("llama31") & matrix["config"].eq("fft")]["seed"].iloc[0]
    seeds = matrix.groupby("config")["seed"].agg(lambda one: sorted(set(one))).to_dict()
    fewer = cross[cross["method"].eq("fft")].groupby("seed_label")["evaluator"].nunique()
    return [
        (
            "multiseed, DeepInception on JBB",
            f"GPT-4o-mini 0.0 of every base model ({empty.sum() // n_seeds} rows; LoRA too:"
            f" {len(lost)})",
            "rows left out",
        ),
        (
            "multiseed, DeepInception",
            f"{base[0]} of {base[1]} base, {lora[0]} of {lora[1]} LoRA rates are not master's",
            "differences within the table",
        ),
        ("multiseed", f"ci95: minimum, maximum ({len(multi)} rows)", "no intervals"),
        ("cross_seed_results", f"fft: seed {said:.0f}, in seed_matrix {held}", "column not used"),
        (
            "cross_seed_results",
            f"fft without a third judge: {fewer.lt(len(JUDGES)).sum()} seeds",
            "not used as runs",
        ),
        ("seed_matrix", f"seeds {seeds}", "the grid at one seed decides"),
    ]


def _of_grids(data: AdaptationData) -> list[tuple[str, str, str]]:
    master = data.raw["master_asr_long"]
    off = (master["ASR"] - 100 * master["successes"] / master["n"]).abs().gt(0.005)
    return [
        ("master_asr_long", f"{off.sum()} rates are not successes / n", "the rate, as upstream"),
        ("phase5, r6", "95 % normal, 90 % t intervals", "reproduced as they are"),
        ("defense_audit", "two tables, CRLF ends", f"first {_REPAIRED} rows read"),
    ]


def _other_runs(data: AdaptationData) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many base and LoRA rates of DeepInception differ between the multi-seed table and the
    published grid, of how many.
    """
    keys = ["family", *CELL_KEYS, "judge"]
    rows = data.seeds[data.seeds["attack"].eq("DeepInception") & data.seeds["seed"].eq("original")]
    wide = data.asr.pivot_table(index=keys, columns="config", values="asr")
    rows = rows.join(wide, on=keys)
    differ = [
        (rows[own] - rows[other]).abs().gt(0.0051).sum()
        for own, other in (("base", PLAIN), ("asr", "lora"))
    ]
    return (int(differ[0]), len(rows)), (int(differ[1]), len(rows))
