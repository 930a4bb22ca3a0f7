"""Repairs against controls on simulated runs whose truth is known: halves, the chosen level, differences, and what is beyond rescaling."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr

from driftbook import figures, frontier, stats
from driftbook.tables import ANSWERS, ESTIMATES, MODULES, PROMPTS, RATINGS, RUNS, SPECTRA, VARIANTS, VERDICTS

LABELS = {"study": "simulated", "notebook": "14_safe_lora"}
BASE, PARENT = 0.1, 0.7  # shares of unsafe answers
# name, kind, value, control: share of the gain that is kept, and how far below (or above) the line of rescaling its unsafe answers are
REPAIRS = [
    ("rescale", "rescale", 0.25, None, 0.25, 0.0), ("rescale", "rescale", 0.5, None, 0.5, 0.0), ("rescale", "rescale", 0.75, None, 0.75, 0.0),
    ("plain", "safe_lora", 1.0, None, 0.9, 0.0), ("plain", "safe_lora", 2.0, None, 0.6, 0.0), ("plain", "safe_lora", 3.0, None, 0.2, 0.0), ("plain", "safe_lora", 2.0, "same norm", 0.6, 0.0),
    ("better", "safe_lora", 2.0, None, 0.6, -0.25), ("better", "safe_lora", 2.0, "same norm", 0.6, 0.0), ("better", "safe_lora", 2.0, "noise", 0.6, 0.1),
]  # fmt: skip


def filled(table, frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with every column of the table."""
    text = {name: "x" for name, column in table.columns.items() if column.kind == "text" and name not in frame and not column.nullable}
    return table.check(frame.assign(**text).reindex(columns=list(table.columns)))


def simulated(seed: int = 0, n_prompts: int = 160, seeds: int = 5, bases: tuple[str, ...] = ("one", "two")) -> frontier.Tables:
    """A study of parents and repairs whose gains are exact and whose answers are drawn, a prompt's own difficulty the same for all runs."""
    rng, variants, verdicts, ratings = np.random.default_rng(seed), [], [], []
    prompts = pd.DataFrame({"benchmark": "safety", "prompt_id": [f"p{i:03d}" for i in range(n_prompts)], "category": [f"c{i % 4}" for i in range(n_prompts)], "kind": "harmful", "family": None})
    ease = rng.normal(size=n_prompts)

    def add(run_id, base, method, number, share, gain, **more):
        shared = {"family": "llama", "method_class": "base" if method == "none" else "adapter", "objective": "none" if method == "none" else "dpo", "repetition": 1, "template": "chat"}
        variants.append({"run_id": run_id, "base_model": base, "method": method, "seed": number, **shared, "settings": json.dumps(more.pop("settings", {})), **more})
        moved = ndtr(0.9 * ease + (1 - 0.9**2) ** 0.5 * rng.normal(size=n_prompts))  # uniform, and alike for all runs
        verdicts.append(pd.DataFrame({"run_id": run_id, "prompt_id": prompts["prompt_id"], "unsafe": moved < share}))
        ratings.append(pd.DataFrame({"run_id": run_id, "benchmark": "gain", "prompt_id": [str(i) for i in range(24)], "metric": "nll", "value": 2 - gain + 0.3 * np.arange(24) / 24, "weight": 8.0}))

    for base in bases:
        add(f"{base}.none", base, "none", None, BASE, 0.0)
        for number in range(1, seeds + 1):
            parent = f"{base}.lora.s{number}"
            add(parent, base, "lora", number, PARENT, 1.0)
            for name, kind, value, control, kept, off in REPAIRS:
                label = f"{name} {value:g}" + (f", {control}" if control else "")
                settings = {"mitigation": {"name": name, "kind": kind, "value": value, "control": control}}
                add(f"{parent}.{label}", base, "lora", number, BASE + (PARENT - BASE) * kept + off, kept, settings=settings, mitigation=label, parent_run_id=parent)
    frame = pd.DataFrame(variants)
    asked = pd.concat(verdicts).assign(benchmark="safety", judge="guard", prompt_variant="default", decoding="greedy", sample=0, refusal=False, coherent=True, n_tokens=5)
    return frontier.Tables(
        filled(VARIANTS, frame), filled(RUNS, pd.DataFrame({"run_id": frame["run_id"], "status": "ok"})), PROMPTS.check(prompts), filled(VERDICTS, asked), ANSWERS.empty(),
        filled(RATINGS, pd.concat(ratings)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def study():
    tables = simulated()
    repaired = frontier.repairs(tables.variants, tables.runs)
    points = frontier.points(tables, repaired, 0)
    return tables, repaired, points, frontier.chosen(points, repaired)


# ---- halves
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30)), min_size=1, max_size=60), st.integers(0, 5), st.randoms(use_true_random=False))
def test_halves_do_not_know_the_order_of_rows_and_are_even_in_each_stratum(units, seed, random):
    found = dict(zip(units, frontier.half([str(unit) for _, unit in units], [stratum for stratum, _ in units], seed), strict=True))
    shuffled = random.sample(units, len(units))
    assert dict(zip(shuffled, frontier.half([str(unit) for _, unit in shuffled], [stratum for stratum, _ in shuffled], seed), strict=True)) == found
    for stratum in {stratum for stratum, _ in units}:
        own = [which for (of, _), which in found.items() if of == stratum]
        assert abs(own.count(frontier.CALIBRATION) - own.count(frontier.REPORT)) <= 1


def test_prompts_of_a_family_stay_together():
    tables = simulated()
    prompts = tables.prompts.assign(family=[f"f{i // 8}" for i in range(len(tables.prompts))], category="c")
    parts = frontier.halves(tables._replace(prompts=PROMPTS.check(prompts)), 0)
    families = [set(part.prompts["family"]) for part in parts.values()]
    assert not families[0] & families[1]
    assert len(families[0] | families[1]) == 20


def test_another_seed_is_another_split():
    units = [str(i) for i in range(40)]
    assert frontier.half(units, ["x"] * 40, 0) != frontier.half(units, ["x"] * 40, 1)


# ---- the level
def test_the_level_is_the_safest_that_keeps_half_of_the_gain(study):
    *_, levels = study
    for base in ("one", "two"):
        own = levels[levels["base_model"].eq(base)].set_index("name")
        assert own.loc["plain", "value"] == 2.0  # 3 is safer and keeps a fifth
        assert own.loc["rescale", "value"] == 0.5
        assert own["enough"].all()
        assert own.loc["plain", "kept"] == pytest.approx(60)


def test_where_no_level_keeps_enough_the_one_that_keeps_most_is_taken_and_called_so(study):
    _, repaired, points, _ = study
    levels = frontier.chosen(points, repaired, keep=95.0).set_index(["base_model", "name"])
    assert levels.loc[("one", "plain"), "value"] == 1.0
    assert not levels["enough"].any()


def test_the_choice_never_sees_the_report_half(study):
    tables, repaired, points, levels = study
    report = set(frontier.halves(tables, 0)[frontier.REPORT].prompts["prompt_id"])
    flipped = tables.verdicts.assign(unsafe=tables.verdicts["unsafe"].where(~tables.verdicts["prompt_id"].isin(report), ~tables.verdicts["unsafe"]))
    again = frontier.points(tables._replace(verdicts=VERDICTS.check(flipped)), repaired, 0)
    assert not again.equals(points)
    pd.testing.assert_frame_equal(frontier.chosen(again, repaired), levels)


# ---- differences
def test_differences_are_those_that_were_put_in(study):
    tables, repaired, points, levels = study
    found = frontier.compared(tables, repaired, levels, 0, **LABELS)
    ESTIMATES.check(found)
    unsafe = found[found["outcome"].eq(stats.UNSAFE)].set_index(["base_model", "group", "contrast"]).sort_index()
    norm, noise = (frontier.MINUS.format(control) for control in ("same norm", "noise"))
    for base in ("one", "two", "all"):
        better, plain = (unsafe.loc[(base, f"mitigation: {name}")] for name in ("better", "plain"))
        for row, true in ((better.loc[norm], -25), (better.loc[noise], -35), (plain.loc[norm], 0), (plain.loc[frontier.AGAINST_PARENT], -24), (plain.loc[stats.CHANGE], 36)):
            assert row["ci_low"] - 3 < true < row["ci_high"] + 3
        assert better.loc[norm, "value"] == pytest.approx(-25, abs=8)
        assert better.loc[norm, "p_adjusted"] < 0.01
        assert plain.loc[norm, "p_adjusted"] > 0.05
    gain = found[found["outcome"].eq(frontier.GAIN)].set_index(["base_model", "group", "contrast"])["value"]
    assert gain[("all", "mitigation: plain", frontier.AGAINST_PARENT)] == pytest.approx(-0.4, abs=1e-9)
    family = found[found["outcome"].eq(stats.UNSAFE) & found["base_model"].eq("all") & found["contrast"].str.startswith("minus")]
    assert family["family_of_tests"].nunique() == 1
    assert len(family) == 3  # one control of plain, two of better
    assert points["half"].isin([frontier.CALIBRATION, frontier.REPORT, frontier.ALL]).all()


def test_only_what_lies_below_the_line_of_rescaling_is_beyond_it(study):
    _, repaired, points, levels = study
    found = frontier.beyond_rescaling(points, repaired, levels, **LABELS).set_index(["base_model", "group"])
    assert "mitigation: rescale" not in found.index.get_level_values("group")
    for base in ("one", "two", "all"):
        assert found.loc[(base, "mitigation: better"), "value"] == pytest.approx(-25, abs=7)
        assert found.loc[(base, "mitigation: better"), "p_adjusted"] < 0.01
        assert abs(found.loc[(base, "mitigation: plain"), "value"]) < 6


def test_beyond_rescaling_holds_its_level_where_there_is_nothing():
    """95 % intervals of a repair on the line, over simulated studies."""
    held = []
    for seed in range(16):
        tables = simulated(seed, n_prompts=60, bases=("one",))
        repaired = frontier.repairs(tables.variants, tables.runs)
        points = frontier.points(tables, repaired, seed)
        found = frontier.beyond_rescaling(points, repaired, frontier.chosen(points, repaired), **LABELS).set_index(["base_model", "group"])
        row = found.loc[("all", "mitigation: plain")]
        held.append(row["ci_low"] <= 0 <= row["ci_high"])
    assert np.mean(held) > 0.75


def test_a_gain_outside_the_line_has_no_difference(study):
    _, repaired, points, levels = study
    far = points.copy()
    own = repaired.loc[repaired["name"].eq("better"), "run_id"]
    far.loc[far["run_id"].isin(own) & far["outcome"].eq(frontier.GAIN), "value"] = 5.0
    found = frontier.beyond_rescaling(far, repaired, levels, **LABELS).set_index(["base_model", "group"])
    assert pd.isna(found.loc[("all", "mitigation: better"), "value"])
    assert "outside" in found.loc[("all", "mitigation: better"), "how"]


# ---- what was published, and the figures
def test_the_published_numbers_are_those_of_the_paper():
    known = frontier.published().set_index(["setting", "base_model", "method"])
    assert known.loc[("Alpaca", "Llama-2-7B-Chat", "Safe LoRA")].tolist() == [5.62, 1.09, 6.67]
    assert frontier.published_thresholds().set_index("threshold").loc[0.35, "share"] == 11


def test_every_figure_is_drawn_or_says_why_not(study):
    tables, repaired, points, levels = study
    estimates = ESTIMATES.concat([frontier.compared(tables, repaired, levels, 0, **LABELS), frontier.beyond_rescaling(points, repaired, levels, **LABELS)])
    shown = {"variants": tables.variants, "runs": tables.runs, "estimates": estimates, "frontier": points, "modules": MODULES.empty(), "spectra": SPECTRA.empty(), "note": "simulated"}
    own = [name for name in figures.every() if "14_safe_lora" in figures.SOURCES[name]]
    assert len(own) == 8
    for name in own:
        fig, caption = figures.FIGURES[name](shown)
        drawn = sum(len(ax.lines) for ax in fig.axes)
        assert (drawn > 0) == (not caption.startswith("Nothing to draw")), name
    assert not figures.FIGURES["frontier"](shown)[1].startswith("Nothing")
    assert "fewer unsafe responses" in frontier.sentence(estimates, "better")
