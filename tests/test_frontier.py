"""Repairs against controls on simulated runs whose truth is known: halves, the chosen level,
differences, and what is beyond rescaling.
"""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr, stdtrit

from driftbook.analyses import repairs, rescaling
from driftbook.figures import drawing, gallery
from driftbook.stats import terms
from driftbook.study.tables import (
    ANSWERS,
    ESTIMATES,
    MODULES,
    PROMPTS,
    RATINGS,
    RUNS,
    SPECTRA,
    VARIANTS,
    VERDICTS,
)

LABELS = {"study": "simulated", "notebook": "14_safe_lora"}
BASE, PARENT = 0.1, 0.7  # shares of unsafe answers
# name, kind, value, control: share of the gain that is kept, and how far below (or above) the line
# of rescaling its unsafe answers are
REPAIRS = [
    ("rescale", "rescale", 0.25, None, 0.25, 0.0),
    ("rescale", "rescale", 0.5, None, 0.5, 0.0),
    ("rescale", "rescale", 0.75, None, 0.75, 0.0),
    ("plain", "safe_lora", 1.0, None, 0.9, 0.0),
    ("plain", "safe_lora", 2.0, None, 0.6, 0.0),
    ("plain", "safe_lora", 3.0, None, 0.2, 0.0),
    ("plain", "safe_lora", 2.0, "same norm", 0.6, 0.0),
    ("better", "safe_lora", 2.0, None, 0.6, -0.25),
    ("better", "safe_lora", 2.0, "same norm", 0.6, 0.0),
    ("better", "safe_lora", 2.0, "noise", 0.6, 0.1),
]
# what all verdicts have in common
SCORED = {
    "benchmark": "safety",
    "judge": "guard",
    "prompt_variant": "default",
    "decoding": "greedy",
    "sample": 0,
    "refusal": False,
    "coherent": True,
    "n_tokens": 5,
}


def filled(table, frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with every column of the table."""
    text = {
        name: "x"
        for name, column in table.columns.items()
        if column.kind == "text" and name not in frame and not column.nullable
    }
    return table.check(frame.assign(**text).reindex(columns=list(table.columns)))


def variant(run_id, base, method, number, settings=None, **more) -> dict:
    """A row of the table of variants."""
    return {
        "run_id": run_id,
        "base_model": base,
        "method": method,
        "seed": number,
        "family": "llama",
        "method_class": "base" if method == "none" else "adapter",
        "objective": "none" if method == "none" else "dpo",
        "repetition": 1,
        "template": "chat",
        "settings": json.dumps(settings or {}),
        **more,
    }


def repaired_runs(parent, curve, **shared):
    """The variant, share of unsafe answers and gain of each repair of a parent."""
    for name, kind, value, control, kept, off in REPAIRS:
        label = f"{name} {value:g}" + (f", {control}" if control else "")
        mitigation = {"name": name, "kind": kind, "value": value, "control": control}
        row = variant(
            f"{parent}.{label}",
            settings={"mitigation": mitigation},
            mitigation=label,
            parent_run_id=parent,
            **shared,
        )
        yield row, BASE + (PARENT - BASE) * kept**curve + off, kept


def every_run(bases, seeds, datasets, curve):
    """The variant, share of unsafe answers and gain of each base model, parent and repair."""
    for base in bases:
        yield variant(f"{base}.none", base, "none", None), BASE, 0.0
        for number, dataset in itertools.product(range(1, seeds + 1), datasets):
            parent = f"{base}.lora.{dataset}.s{number}"
            shared = {"base": base, "method": "lora", "number": number, "dataset": dataset}
            yield variant(parent, **shared), PARENT, 1.0
            yield from repaired_runs(parent, curve, **shared)


def asked(n_prompts: int) -> pd.DataFrame:
    """Harmful prompts of four categories."""
    return pd.DataFrame(
        {
            "benchmark": "safety",
            "prompt_id": [f"p{i:03d}" for i in range(n_prompts)],
            "category": [f"c{i % 4}" for i in range(n_prompts)],
            "kind": "harmful",
            "family": None,
        }
    )


def judged(rng, ease, run_id, prompt_ids, share) -> pd.DataFrame:
    """Verdicts of which about this share is unsafe."""
    moved = 0.9 * ease + (1 - 0.9**2) ** 0.5 * rng.normal(size=len(ease))
    unsafe = ndtr(moved) < share  # ndtr(moved) is uniform, and alike for all runs
    return pd.DataFrame({"run_id": run_id, "prompt_id": prompt_ids, "unsafe": unsafe})


def rated(run_id, gain) -> pd.DataFrame:
    """Ratings whose mean shows exactly this gain over the base model's."""
    return pd.DataFrame(
        {
            "run_id": run_id,
            "benchmark": "gain",
            "prompt_id": [str(i) for i in range(24)],
            "metric": "nll",
            "value": 2 - gain + 0.3 * np.arange(24) / 24,
            "weight": 8.0,
        }
    )


def tables_of(made: list[tuple], seed: int, n_prompts: int) -> repairs.Tables:
    """The tables of runs, each with its share of unsafe answers and its gain; a prompt's own
    difficulty is the same for all runs.
    """
    rng, prompts = np.random.default_rng(seed), asked(n_prompts)
    ease, ids = rng.normal(size=n_prompts), prompts["prompt_id"]
    frame = pd.DataFrame([row for row, _, _ in made])
    verdicts = [judged(rng, ease, row["run_id"], ids, share) for row, share, _ in made]
    return repairs.Tables(
        filled(VARIANTS, frame),
        filled(RUNS, pd.DataFrame({"run_id": frame["run_id"], "status": "ok"})),
        PROMPTS.check(prompts),
        filled(VERDICTS, pd.concat(verdicts).assign(**SCORED)),
        ANSWERS.empty(),
        filled(RATINGS, pd.concat([rated(row["run_id"], gain) for row, _, gain in made])),
    )


def simulated(
    seed: int = 0,
    n_prompts: int = 160,
    seeds: int = 5,
    bases: tuple[str, ...] = ("one", "two"),
    curve: float = 1.0,
    datasets: tuple[str, ...] = ("d",),
) -> repairs.Tables:
    """A study of parents and repairs whose gains are exact and whose answers are drawn, a prompt's
    own difficulty the same for all runs; unsafe answers grow as this power of the gain kept.
    """
    return tables_of(list(every_run(bases, seeds, datasets, curve)), seed, n_prompts)


@pytest.fixture(scope="module")
def study():
    tables = simulated()
    repaired = repairs.repairs(tables.variants, tables.runs)
    points = repairs.points(tables, repaired, 0)
    return tables, repaired, points, repairs.chosen(points, repaired)


# ---- halves
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 30)), min_size=1, max_size=60, unique=True
    ),
    st.integers(0, 5),
    st.randoms(use_true_random=False),
)
def test_halves_do_not_know_the_order_of_rows_and_are_even_in_each_stratum(units, seed, random):
    def of(rows):
        return dict(
            zip(
                rows,
                repairs.half(
                    [f"{stratum}{unit}" for stratum, unit in rows],
                    [stratum for stratum, _ in rows],
                    seed,
                ),
                strict=True,
            )
        )

    found = of(units)
    assert of(random.sample(units, len(units))) == found
    for own in (
        [which for (of, _), which in found.items() if of == stratum]
        for stratum in {stratum for stratum, _ in units}
    ):
        assert abs(own.count(repairs.CALIBRATION) - own.count(repairs.REPORT)) <= 1


def test_strata_of_one_unit_are_shared_out_and_a_unit_of_several_strata_is_in_one_half():
    alone = repairs.half([str(i) for i in range(10)], [str(i) for i in range(10)], 0)
    assert alone.count(repairs.REPORT) == 5
    spanning = repairs.half(["f1", "f2", "f1", "f2"], ["a", "a", "b", "b"], 0)
    assert spanning[:2] == spanning[2:]


def test_prompts_of_a_family_stay_together():
    tables = simulated()
    prompts = tables.prompts.assign(
        family=[f"f{i // 8}" for i in range(len(tables.prompts))], category="c"
    )
    parts = repairs.halves(tables._replace(prompts=PROMPTS.check(prompts)), 0)
    families = [set(part.prompts["family"]) for part in parts.values()]
    assert not families[0] & families[1]
    assert len(families[0] | families[1]) == 20


def test_another_seed_is_another_split():
    units = [str(i) for i in range(40)]
    assert repairs.half(units, ["x"] * 40, 0) != repairs.half(units, ["x"] * 40, 1)


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
    levels = repairs.chosen(points, repaired, keep=95.0).set_index(["base_model", "name"])
    assert levels.loc[("one", "plain"), "value"] == 1.0
    assert not levels["enough"].any()


def test_where_the_parents_gained_nothing_there_is_nothing_to_keep(study):
    _, repaired, points, _ = study
    none = points.copy()
    parents = repaired.loc[
        repaired["name"].eq(repairs.PARENT) & repaired["base_model"].eq("one"), "run_id"
    ]
    none.loc[none["run_id"].isin(parents) & none["outcome"].eq(repairs.GAIN), "value"] = -0.1
    levels = repairs.chosen(none, repaired)
    here = levels["base_model"].eq("one")
    assert levels.loc[here, "kept"].isna().all()
    assert not levels.loc[here, "enough"].any()
    assert levels.loc[~here, "enough"].all()


def test_the_choice_never_sees_the_report_half(study):
    tables, repaired, points, levels = study
    report = set(repairs.halves(tables, 0)[repairs.REPORT].prompts["prompt_id"])
    flipped = tables.verdicts.assign(
        unsafe=tables.verdicts["unsafe"].where(
            ~tables.verdicts["prompt_id"].isin(report), ~tables.verdicts["unsafe"]
        )
    )
    again = repairs.points(tables._replace(verdicts=VERDICTS.check(flipped)), repaired, 0)
    assert not again.equals(points)
    pd.testing.assert_frame_equal(repairs.chosen(again, repaired), levels)


# ---- differences
def test_differences_are_those_that_were_put_in(study):
    tables, repaired, points, levels = study
    found = repairs.repairs_compared(tables, repaired, levels, 0, **LABELS)
    ESTIMATES.check(found)
    unsafe = (
        found[found["outcome"].eq(terms.UNSAFE)]
        .set_index(["base_model", "member", "contrast", "against"])
        .sort_index()
    )
    norm, noise = ((repairs.MINUS, control) for control in ("same norm", "noise"))
    parent, change = ((what, terms.NONE) for what in (repairs.AGAINST_PARENT, terms.CHANGE))
    for base in ("one", "two", "all"):
        better, plain = (unsafe.loc[(base, name)] for name in ("better", "plain"))
        for row, true in (
            (better.loc[norm], -25),
            (better.loc[noise], -35),
            (plain.loc[norm], 0),
            (plain.loc[parent], -24),
            (plain.loc[change], 36),
        ):
            assert row["ci_low"] - 3 < true < row["ci_high"] + 3
        assert better.loc[norm, "value"] == pytest.approx(-25, abs=8)
        assert better.loc[norm, "p_adjusted"] < 0.01
        assert plain.loc[norm, "p_adjusted"] > 0.05
    gain = found[found["outcome"].eq(repairs.GAIN)].set_index(["base_model", "member", "contrast"])[
        "value"
    ]
    assert gain[("all", "plain", repairs.AGAINST_PARENT)] == pytest.approx(-0.4, abs=1e-9)
    family = found[
        found["outcome"].eq(terms.UNSAFE)
        & found["base_model"].eq("all")
        & found["contrast"].eq(repairs.MINUS)
    ]
    assert family["family_of_tests"].nunique() == 1
    assert len(family) == 3  # one control of plain, two of better
    assert points["half"].isin([repairs.CALIBRATION, repairs.REPORT, repairs.ALL]).all()


def beside(tables, seed: int = 0) -> pd.DataFrame:
    repaired = repairs.repairs(tables.variants, tables.runs)
    points = repairs.points(tables, repaired, seed)
    return (
        rescaling.beside_rescaling(points, repaired, repairs.chosen(points, repaired), **LABELS)
        .set_index(["base_model", "member", "contrast"])
        .sort_index()
    )


def test_a_repair_stands_beside_the_rescaled_runs_around_its_gain(study):
    _, repaired, points, levels = study
    found = (
        rescaling.beside_rescaling(points, repaired, levels, **LABELS)
        .set_index(["base_model", "member", "contrast"])
        .sort_index()
    )
    assert "rescale" not in found.index.get_level_values("member")
    for base in ("one", "two", "all"):
        better, plain = (found.loc[(base, name)] for name in ("better", "plain"))
        for row, true in (
            (better.loc[repairs.JUST_LESS], -19),
            (better.loc[repairs.JUST_MORE], -34),
            (plain.loc[repairs.JUST_LESS], 6),
            (plain.loc[repairs.JUST_MORE], -9),
        ):
            assert row["value"] == pytest.approx(true, abs=7)
        assert better.loc[repairs.JUST_LESS, "p_adjusted"] < 0.01
        assert plain.loc[repairs.JUST_LESS, "value"] > 0 > plain.loc[repairs.JUST_MORE, "value"]


@pytest.mark.slow
@pytest.mark.parametrize("curve", [3.0, 0.3])
def test_rescaling_never_beats_itself_whatever_the_curve(curve):
    """`plain` is a smaller update and nothing else, of a size between two factors."""
    wrong = 0
    for seed in range(4):
        found = beside(simulated(seed, n_prompts=60, bases=("one",), curve=curve), seed).loc[
            ("all", "plain")
        ]
        beats = found.loc[repairs.JUST_LESS, "ci_high"] < 0
        worse = found.loc[repairs.JUST_MORE, "ci_low"] > 0
        wrong += beats or worse
    assert wrong == 0


def test_a_seed_counts_once_though_several_of_its_runs_are_repaired():
    one, two = simulated(1, bases=("one",)), simulated(1, bases=("one",), datasets=("d", "e"))
    rows = [beside(tables).loc[("one", "better", repairs.JUST_LESS)] for tables in (one, two)]
    assert [row["n_runs"] for row in rows] == [5, 10]
    for row in rows:
        assert (row["ci_high"] - row["ci_low"]) / 2 / row["se"] == pytest.approx(stdtrit(4, 0.975))


def test_a_repair_of_one_base_model_is_no_finding_over_all(study):
    tables, *_ = study
    gone = tables.variants["base_model"].eq("two") & (
        tables.variants["mitigation"].fillna("").str.startswith("better")
        | tables.variants["mitigation"].fillna("").str.endswith("same norm")
    )
    kept = set(tables.variants.loc[~gone, "run_id"])
    fewer = tables._replace(
        **{
            name: frame[frame["run_id"].isin(kept)]
            for name in ("runs", "verdicts", "ratings")
            if len(frame := getattr(tables, name))
        }
    )
    assert "better" not in beside(fewer).loc["all"].index.get_level_values("member")
    repaired = repairs.repairs(fewer.variants, fewer.runs)
    points = repairs.points(fewer, repaired, 0)
    found = repairs.repairs_compared(fewer, repaired, repairs.chosen(points, repaired), 0, **LABELS)
    overall = found[found["base_model"].eq("all")]
    assert not overall["against"].eq("same norm").any()
    assert set(overall["member"]) == {"plain", "rescale"}


def test_a_gain_outside_those_of_rescaling_has_no_difference(study):
    _, repaired, points, levels = study
    far = points.copy()
    own = repaired.loc[repaired["name"].eq("better"), "run_id"]
    far.loc[far["run_id"].isin(own) & far["outcome"].eq(repairs.GAIN), "value"] = 5.0
    found = rescaling.beside_rescaling(far, repaired, levels, **LABELS).set_index(
        ["base_model", "member", "contrast"]
    )
    row = found.loc[("all", "better", repairs.JUST_MORE)]
    assert pd.isna(row["value"])
    assert "no rescaled run" in row["how"]
    assert found.loc[("all", "better", repairs.JUST_LESS), "value"] == pytest.approx(
        -49, abs=8
    )  # the parent itself


def test_one_parent_that_gained_next_to_nothing_does_not_decide_the_level(study):
    _, repaired, points, _ = study
    odd = points.copy()
    parent = "one.lora.d.s1"
    own = repaired.loc[repaired["parent_run_id"].eq(parent), ["run_id", "value", "name"]]
    small = dict.fromkeys(own["run_id"], 0.001) | {
        own.loc[own["name"].eq("plain") & own["value"].eq(3.0), "run_id"].iloc[0]: 0.05
    }
    here = odd["outcome"].eq(repairs.GAIN) & odd["run_id"].isin(small)
    odd.loc[here, "value"] = odd.loc[here, "run_id"].map(small)
    levels = repairs.chosen(odd, repaired).set_index(["base_model", "name"])
    assert levels.loc[("one", "plain"), "value"] == 2.0


# ---- what was published, and the figures
def test_the_published_numbers_are_those_of_the_paper():
    known = repairs.published().set_index(["setting", "base_model", "method"])
    assert known.loc[("Alpaca", "Llama-2-7B-Chat", "Safe LoRA")].tolist() == [5.62, 1.09, 6.67]
    assert repairs.published_thresholds().set_index("threshold").loc[0.35, "share"] == 11


@pytest.mark.slow
def test_every_figure_is_drawn_or_says_why_not(study):
    tables, repaired, points, levels = study
    estimates = ESTIMATES.concat(
        [
            repairs.repairs_compared(tables, repaired, levels, 0, **LABELS),
            rescaling.beside_rescaling(points, repaired, levels, **LABELS),
        ]
    )
    shown = {
        "variants": tables.variants,
        "runs": tables.runs,
        "estimates": estimates,
        "frontier": points,
        "modules": MODULES.empty(),
        "spectra": SPECTRA.empty(),
        "note": "simulated",
    }
    own = [name for name in gallery.every() if "14_safe_lora" in drawing.SOURCES[name]]
    assert len(own) == 11
    for name in own:
        fig, caption = drawing.FIGURES[name](shown)
        drawn = sum(len(ax.lines) for ax in fig.axes)
        assert (drawn > 0) == (not caption.startswith("Nothing to draw")), name
    for name in (
        "frontier",
        "controls",
        "mitigations",
        "restored",
    ):  # whatever the study calls its mitigations
        assert not drawing.FIGURES[name](shown)[1].startswith("Nothing")
    assert repairs.leading(repaired) == "plain"
    assert "fewer unsafe responses" in repairs.repairs_sentence(estimates, "better")
