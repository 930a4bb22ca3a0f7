"""The second study's published figures, computed again from its tables: which come back to the last
digit printed.
"""

import numpy as np
import pandas as pd
from scipy.stats import friedmanchisquare, kruskal, rankdata, wilcoxon
from scipy.stats import t as student

from driftbook.rereading.adaptation_study import (
    CELL_KEYS,
    FOUR_BIT,
    JUDGES,
    PLAIN,
    SEED_NAMES,
    TUNED,
    WHITE_BOX,
    AdaptationData,
    cited_figures,
)
from driftbook.stats.intervals import wilson

RESTRICTED = ("gemma2", "llama31", "qwen3")  # the families of their scope `restricted3`
_LEVEL = 0.9  # of the interval that a test of equivalence at 5 % reads
_PRINTED_Z = 1.96  # their normal quantile, rounded, without which the last digit differs
_FEW = 13  # differences, of which all signs can be tried
_COUNTS = ("tp", "fp", "fn", "tn")


def reproduced(data: AdaptationData) -> pd.DataFrame:
    """A row per kind of published figure: file, statistic, decimals, published (how many numbers),
    equal (how many of them ours rounds to).
    """
    parts = [
        *_tost(data),
        *_phase_five(data),
        *_cells(data),
        *_ranks(data),
        *_calibrations(data),
        *_seed_tables(data),
        *_repair(data),
        *_cited(data),
    ]
    return pd.DataFrame(parts)


def equal_to(file: str, statistic: str, published, ours, decimals: int) -> dict:
    """How many published numbers ours rounds to, a half in the last digit being either."""
    published, ours = np.asarray(published, float), np.asarray(ours, float)
    told = ~np.isnan(published)
    near = np.abs(published - ours) <= 0.5 * 10.0**-decimals + 1e-9
    return {
        "file": file,
        "statistic": statistic,
        "decimals": decimals,
        "published": int(told.sum()),
        "equal": int((near & told).sum()),
    }


def changed(rows: pd.DataFrame, judge: str, one: str, other: str) -> pd.Series:
    """The difference of two configurations in each cell of a grid by one judge, percentage points;
    indexed by family, attack and dataset.
    """
    wide = rows[rows["judge"].eq(judge)].pivot_table(
        index=["family", *CELL_KEYS], columns="config", values="asr"
    )
    return wide[one] - wide[other]


def black_box(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of attacks that do not read the model's gradients."""
    return rows[rows["attack"].ne(WHITE_BOX)]


def equivalence_p(mean: float, se: float, df: float, margin: float) -> float:
    """The p value of two one-sided t tests that a mean lies within +-margin (Schuirmann 1987)."""
    return float(max(student.sf((margin + mean) / se, df), student.sf((margin - mean) / se, df)))


def signed_rank_p(difference: pd.Series) -> float:
    """The two-sided p value of Wilcoxon's signed-rank test, differences of zero left out.

    Exact up to 13 differences, over all signs, so that ties do no harm; of more, scipy's, which
    falls back to a normal approximation where there are ties.
    """
    if len(difference) > _FEW:
        return float(wilcoxon(difference).pvalue)
    values = difference[difference.ne(0)].to_numpy()
    ranks = rankdata(np.abs(values))
    signs = (np.arange(2 ** len(ranks))[:, None] >> np.arange(len(ranks))) & 1
    sums, own = signs @ ranks, ranks[values > 0].sum()
    tails = np.mean(sums >= own - 1e-9), np.mean(sums <= own + 1e-9)
    return float(min(1.0, 2 * min(tails)))


def _tested(difference: pd.Series) -> dict[str, float]:
    """What their tables hold of the differences of cells, as if each were a draw of its own."""
    n, mean, sd = len(difference), difference.mean(), difference.std()
    se = sd / np.sqrt(n)
    half = student.ppf(0.5 + _LEVEL / 2, n - 1) * se
    wide = _PRINTED_Z * se
    return {
        "mean": mean,
        "sd": sd,
        "se": se,
        "df": n - 1,
        "ci90_lo": mean - half,
        "ci90_hi": mean + half,
        "ci_lo": mean - wide,
        "ci_hi": mean + wide,
        "wilcoxon_p": signed_rank_p(difference),
    }


def _tests(table: pd.DataFrame, keys: list[str], difference) -> pd.DataFrame:
    """The statistics of each row of a table of tests; `difference` gives the cells' differences of
    the values of `keys`, which rows at several margins have in common.
    """
    known = {key: _tested(difference(*key)) for key in set(_keys(table, keys))}
    ours = pd.DataFrame([known[key] for key in _keys(table, keys)])
    ours["p_tost"] = [
        equivalence_p(row.mean, row.se, row.df, margin)
        for row, margin in zip(ours.itertuples(index=False), table["margin"], strict=True)
    ]
    return ours


def _keys(table: pd.DataFrame, keys: list[str]) -> list[tuple]:
    return list(table[keys].itertuples(index=False, name=None))


def _tost(data: AdaptationData) -> list[dict]:
    """The tests of equivalence at one seed, by judge and scope, and those of the margins."""

    def of_scope(judge: str, scope: str, contrast: str) -> pd.Series:
        cells = changed(data.controlled, judge, *contrast.split("-"))
        return cells.loc[list(RESTRICTED)] if scope == "restricted3" else cells

    def of_margins(contrast: str) -> pd.Series:
        if contrast == "base4bit-basefp16":
            return changed(black_box(data.asr), JUDGES[0], FOUR_BIT, PLAIN)
        return changed(data.controlled, JUDGES[0], *contrast.split("-"))

    parts = []
    for name, keys, difference in (
        ("r6_tost_3judge", ["judge", "scope", "contrast"], of_scope),
        ("tost_margin_sensitivity", ["contrast"], of_margins),
    ):
        table = data.raw[name]
        ours = _tests(table, keys, difference)
        parts += [
            equal_to(name, column, table[column], ours[column], digits)
            for column, digits in _DIGITS.items()
            if column in table
        ]
    return parts


_DIGITS = {"mean": 3, "sd": 3, "ci90_lo": 3, "ci90_hi": 3, "p_tost": 4, "wilcoxon_p": 4}


def _phase_five(data: AdaptationData) -> list[dict]:
    """The same tests of one judge, with normal intervals, and by family."""
    name = "phase5_tost_full_5fam_strict"
    table = data.raw[name]

    def of_family(family: str, pair: str) -> pd.Series:
        cells = changed(data.controlled, JUDGES[0], *pair.split("-"))
        return cells if family == "ALL" else cells.loc[[family]]

    ours = _tests(table, ["family", "pair"], of_family)
    columns = ["mean", "sd", "se", "ci_lo", "ci_hi", "p_tost", "wilcoxon_p"]
    return [equal_to(name, column, table[column], ours[column], 4) for column in columns]


def _cells(data: AdaptationData) -> list[dict]:
    """Differences in single cells: of pairs, of old and new runs, and against the base model."""
    name, keys = "phase5_tost_percell_5fam_strict", ["family", *CELL_KEYS]
    table = data.raw[name]
    pairs = {
        pair: changed(data.controlled, JUDGES[0], *pair.split("-")) for pair in set(table["pair"])
    }
    ours = [pairs[row.pair][row.family, row.attack, row.dataset] for row in table.itertuples()]
    parts = [equal_to(name, "difference of a cell", table["diff"], ours, 3)]
    name = "phase5_old_vs_new_hbcls_5fam"
    table = data.raw[name].rename(columns={"model_family": "family"})
    rows = data.controlled[data.controlled["judge"].eq(JUDGES[0])]
    moved = rows.set_index([*keys, "config"]).eval("asr - original")
    ours = moved.loc[list(table[[*keys, "config"]].itertuples(index=False, name=None))]
    parts.append(equal_to(name, "new less old run", table["delta"], ours, 2))
    name = "peft_deltas"
    table = data.raw[name].rename(columns={"model_family": "family"})
    wide = data.asr.assign(judge=data.raw["master_asr_long"]["evaluator"])
    wide = wide.set_index([*keys, "judge", "config"])["asr"]
    index = table[[*keys, "evaluator"]].itertuples(index=False, name=None)
    ours = [
        wide[(*cell, config)] - wide[(*cell, PLAIN)]
        for cell, config in zip(index, table["config"], strict=True)
    ]
    return [*parts, equal_to(name, "change of a cell", table["delta_ASR"], ours, 2)]


def _ranks(data: AdaptationData) -> list[dict]:
    """Friedman's and Kruskal and Wallis's tests of the five configurations, by judge and family."""
    name, found = "friedman_per_family", []
    table = data.raw[name]
    for row in table.itertuples():
        rows = black_box(data.asr)
        rows = rows[rows["judge"].eq(row.evaluator) & rows["family"].eq(row.family)]
        groups = rows.pivot_table(index=CELL_KEYS, columns="config", values="asr").to_numpy().T
        found.append((*friedmanchisquare(*groups), *kruskal(*groups)))
    digits = {"friedman_chi2": 2, "friedman_p": 4, "kruskal_H": 2, "kruskal_p": 4}
    return [
        equal_to(name, column, table[column], np.array(found)[:, i], digits[column])
        for i, column in enumerate(digits)
    ]


def confusion(labels: pd.DataFrame, judge: int, positive: int = 1) -> dict[str, float]:
    """tp, fp, fn, tn of one judge (its place) against the consensus of the labelled answers."""
    known = labels.dropna(subset=["consensus"])
    truth = known["consensus"].astype(int).eq(positive)
    said = known["pattern"].str[judge].astype(int).eq(positive)
    cells = ((truth & said), (~truth & said), (truth & ~said), (~truth & ~said))
    return dict(zip(_COUNTS, map(int, map(sum, cells)), strict=True))


def _calibrations(data: AdaptationData) -> list[dict]:
    """The judges against the human consensus: counts, rates and Wilson intervals."""
    table = data.raw["regime_a_calibration"]
    counts = [
        confusion(data.labels if row.task == "asr" else data.refusals, JUDGES.index(row.evaluator))
        for row in table.itertuples()
    ]
    ours = pd.DataFrame(counts)
    tp, fp, fn, tn = (ours[name].to_numpy() for name in _COUNTS)
    shares = {
        "accuracy": (tp + tn, tp + fp + fn + tn),
        "precision": (tp, tp + fp),
        "recall": (tp, tp + fn),
    }
    for share, (k, n) in shares.items():
        low, high = wilson(k, n)
        ours = ours.assign(**{share: k / n, f"{share}_ci_low": low, f"{share}_ci_high": high})
    ours = ours.assign(fpr=fp / (fp + tn), fnr=fn / (fn + tp))
    parts = [
        equal_to("regime_a_calibration", name, table[name], ours[name], 0 if name in _COUNTS else 6)
        for name in ours
    ]
    table = data.raw["orr_evaluator_calibration"]
    counts = [confusion(data.refusals, JUDGES.index(name), 0) for name in table["evaluator"]]
    ours = pd.DataFrame(counts)
    tp, fp, fn, tn = (ours[name].to_numpy() for name in _COUNTS)
    n = tp + fp + fn + tn
    precision = np.divide(tp, tp + fp, out=np.full(len(tp), np.nan), where=tp + fp > 0)
    rates = {"accuracy": (tp + tn) / n, "precision": precision, "recall": tp / (tp + fn)}
    rates |= {"fpr": fp / (fp + tn), "predicted_orr": (tp + fp) / n, "human_orr": (tp + fn) / n}
    name = "orr_evaluator_calibration"
    return [
        *parts,
        *(equal_to(name, column, table[column], ours[column], 0) for column in _COUNTS),
        *(equal_to(name, column, table[column], 100 * of, 1) for column, of in rates.items()),
    ]


def _seed_tables(data: AdaptationData) -> list[dict]:
    """LoRA's mean change over three seeds, the smallest and largest, and their spread."""
    name = "multiseed_lora_protective_map"
    table = data.raw[name]
    change = table[list(SEED_NAMES)].sub(table["base_asr"], axis=0)
    ours = {
        "mean_delta_asr": change.mean(axis=1),
        "ci95_lo": change.min(axis=1),
        "ci95_hi": change.max(axis=1),
    }
    parts = [equal_to(name, column, table[column], of, 8) for column, of in ours.items()]
    name = "seed_variance_decomposition"
    table = data.raw[name]
    spread = 100 * table[list(SEED_NAMES)].std(axis=1)
    change = 100 * (table[list(SEED_NAMES)].mean(axis=1) - table["base_asr"])
    return [
        *parts,
        equal_to(name, "seed_std_pp", table["seed_std_pp"], spread, 8),
        equal_to(name, "delta_pp", table["delta_pp"], change, 8),
    ]


def protection(data: AdaptationData, judge: str) -> pd.Series:
    """LoRA's rate less Safe LoRA's by seed, percentage points, by one judge."""
    rows = data.repaired[data.repaired["judge"].eq(judge)]
    wide = rows.pivot_table(index="seed", columns="method", values="asr")
    return (wide["lora"] - wide["safelora"]).dropna()


def _repair(data: AdaptationData) -> list[dict]:
    """Safe LoRA's protection: mean and standard deviation over three seeds."""
    cited = cited_figures()
    parts = []
    for name, function in (("mean", pd.Series.mean), ("standard deviation", pd.Series.std)):
        rows = cited[cited["statistic"].str.startswith(f"Safe LoRA's protection, {name}")]
        ours = [function(protection(data, judge)) for judge in JUDGES]
        parts.append(equal_to("defense_audit", f"protection, {name}", rows["value"], ours, 2))
    return parts


def _cited(data: AdaptationData) -> list[dict]:
    """Figures of the paper's text."""
    cited = cited_figures().set_index("statistic")
    changes = [changed(black_box(data.asr), JUDGES[0], name, PLAIN) for name in TUNED]
    matrix = [confusion(data.labels, i) for i in range(len(JUDGES))]
    rubric = data.raw["strongreject_judge_per_sample"]
    harmless = rubric["truth_harmful"].eq(0)
    ours = [
        *(one.mean() for one in changes),
        wilcoxon(changes[0]).pvalue,
        100 * matrix[0]["tp"] / (matrix[0]["tp"] + matrix[0]["fp"]),
        *(100 * one["fp"] / (one["fp"] + one["tn"]) for one in matrix),
        100 * rubric.loc[harmless, "pred_harmful"].mean(),
    ]
    rows = cited[~cited.index.str.startswith("Safe LoRA")]
    return [
        equal_to("the paper's text", name, [row.value], [value], int(row.decimals))
        for (name, row), value in zip(rows.iterrows(), ours, strict=True)
    ]
