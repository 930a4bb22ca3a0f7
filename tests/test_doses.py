"""Matched doses against statsmodels' lowess, exact lines and known truth; preset rates against the
power law they were drawn from; figures.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from statsmodels.nonparametric.smoothers_lowess import lowess

from driftbook.analyses import doses, factors, variance_shares
from driftbook.figures import drawing, factors_and_doses, gallery
from driftbook.stats import estimation, influence, terms
from driftbook.study.tables import ESTIMATES, TABLES
from simulated import simulate

LABELS = {
    "study": "s",
    "notebook": "15_dose",
    "outcome": terms.UNSAFE,
    "benchmark": "safety",
    "judge": "mini-guard",
}
METHODS = {"lora": -2.0, "p_tuning": -1.6}  # log10 of the lowest KL


def made(change, noise: float = 0.0, seed: int = 0, lowest=METHODS, seeds: int = 3) -> pd.DataFrame:
    """Runs of four settings a method; `change` gives a run's change from its method and the log10
    of its KL.
    """
    rng, rows = np.random.default_rng(seed), []
    for method, low in lowest.items():
        for setting in range(4):
            for number in range(1, seeds + 1):
                x = low + 0.35 * setting + rng.normal(0, 0.12)
                rows.append(
                    (
                        f"{method}{setting}{number}",
                        "b",
                        method,
                        f"s{setting}",
                        number,
                        10**x,
                        change(method, x) + noise * rng.normal(),
                    )
                )
    frame = pd.DataFrame(
        rows, columns=["run_id", "base_model", "method", "setting", "seed", "kl_base", "value"]
    )
    return frame.assign(
        dose_nll=frame["kl_base"] - 0.1,
        objective="sft",
        dataset="d",
        epochs=3,
        learning_rate=frame["setting"].map({f"s{i}": 10.0 ** (i - 4) for i in range(4)}),
    )


def mean_row(estimates: pd.DataFrame) -> pd.Series:
    [found] = [row for _, row in estimates[estimates["member"].eq(doses.MEAN_DOSE)].iterrows()]
    return found


# ---- matched dose
def test_the_local_line_is_statsmodels_lowess():
    rng = np.random.default_rng(0)
    x, y = np.sort(rng.normal(size=(5, 13)), axis=1), rng.normal(size=(5, 13))
    for at in (-0.5, 0.1, 0.6):
        expected = [
            lowess(b, a, frac=0.75, it=0, xvals=np.array([at]))[0]
            for a, b in zip(x, y, strict=True)
        ]
        assert doses.local_line(x, y, at) == pytest.approx(expected, abs=1e-6)


def test_where_all_doses_are_one_the_line_is_the_mean():
    assert doses.local_line(np.full(4, 2.0), np.array([1.0, 2.0, 3.0, 6.0]), 2.0) == pytest.approx(
        3.0
    )


@pytest.mark.parametrize("measure", ["kl_base", "dose_nll"])
def test_methods_that_differ_only_in_dose_differ_as_configured_and_not_at_equal_dose(measure):
    runs = made(lambda method, x: 0.0)
    runs["value"] = 10 * (np.log10(runs["kl_base"]) if measure == "kl_base" else runs["dose_nll"])
    plain = doses.as_configured(runs, 50, **LABELS).iloc[0]
    means = runs.groupby("method")["value"].mean()
    assert plain["value"] == pytest.approx(means["lora"] - means["p_tuning"])
    assert abs(plain["value"]) > 0.5
    assert mean_row(doses.matched(runs, measure, 50, **LABELS))["value"] == pytest.approx(
        0, abs=1e-9
    )


def test_the_mean_over_doses_is_the_mean_of_its_rows():
    found = doses.matched(
        made(lambda method, x: 3 * x + 5 * (method == "lora"), 1.0), "kl_base", 50, **LABELS
    )
    three = found[found["member"].isin(doses.QUARTILES)]
    assert len(three) == 3
    assert mean_row(found)["value"] == pytest.approx(three["value"].mean())
    assert ESTIMATES.check(found).equals(found)


@pytest.mark.slow
def test_intervals_at_equal_dose_cover_the_truth():
    hits = 0
    for seed in range(50):
        runs = made(lambda method, x: 10 * max(x + 1.5, 0) ** 2 + 5 * (method == "lora"), 3.0, seed)
        row = mean_row(doses.matched(runs, "kl_base", 150, seed, **LABELS))
        hits += row["ci_low"] <= 5 <= row["ci_high"]
    assert 0.88 <= hits / 50 <= 0.99


def test_the_difference_as_configured_has_welchs_interval_where_settings_do_not_matter():
    runs = made(lambda method, x: 0.0, 2.0).assign(setting="one")
    found = doses.as_configured(runs, 8000, **LABELS).iloc[0]
    test = scipy_stats.ttest_ind(
        *(runs.loc[runs["method"].eq(method), "value"] for method in METHODS), equal_var=False
    )
    low, high = test.confidence_interval()
    assert [found["ci_low"], found["ci_high"], found["p"]] == pytest.approx(
        [low, high, test.pvalue], abs=0.05
    )


def test_preset_doses_come_from_doses_alone():
    runs = made(lambda method, x: 3 * x, 1.0)
    other = runs.assign(value=runs["value"].sample(frac=1, random_state=1).to_numpy())
    one, two = (doses.matched(frame, "kl_base", 20, **LABELS) for frame in (runs, other))
    assert one["how"].tolist() == two["how"].tolist()
    a, b = (
        np.log10(runs.loc[runs["method"].eq(method), "kl_base"]).to_numpy() for method in METHODS
    )
    low, high = max(a.min(), b.min()), min(a.max(), b.max())
    inside = [x for x in (*a, *b) if low <= x <= high]
    assert doses.preset_doses(a, b)[0] == pytest.approx(np.percentile(inside, [25, 50, 75]))


def test_every_matched_row_is_called_descriptive():
    runs = made(lambda method, x: 3 * x, 1.0)
    found = pd.concat([doses.matched(runs, measure, 20, **LABELS) for measure in doses.DOSES])
    assert found["how"].str.startswith("descriptive").all()
    assert found["population"].str.startswith("descriptive").all()
    assert not doses.as_configured(runs, 20, **LABELS)["how"].str.contains("descriptive").any()


def test_without_a_common_dose_there_is_no_number():
    apart = doses.matched(
        made(lambda method, x: x, 1.0, lowest={"lora": -6.0, "p_tuning": 0.0}),
        "kl_base",
        20,
        **LABELS,
    )
    assert len(apart) == 4
    assert apart["value"].isna().all()
    assert apart["how"].eq("descriptive; no common dose").all()


def test_few_runs_no_kl_and_one_seed_are_said():
    runs = made(lambda method, x: x, 1.0)
    few = doses.matched(
        runs[
            runs["method"].eq("lora")
            | runs["run_id"].isin(["p_tuning01", "p_tuning11", "p_tuning21"])
        ],
        "kl_base",
        20,
        **LABELS,
    )
    assert few["value"].isna().all()
    assert few["how"].str.contains("fewer than 4 runs").all()
    idle = runs.assign(kl_base=runs["kl_base"].where(runs["method"].ne("lora"), 0.0))
    none = doses.matched(idle, "kl_base", 20, **LABELS)
    assert none["value"].isna().all()
    assert none["how"].str.contains("no run of lora has a change and this dose").all()
    lost = doses.matched(
        runs.assign(kl_base=runs["kl_base"].where(runs["run_id"].ne("lora01"), 0.0)),
        "kl_base",
        20,
        **LABELS,
    )
    assert "1 runs without a change or this dose left out" in mean_row(lost)["how"]
    single = mean_row(doses.matched(runs[runs["seed"].eq(1)], "kl_base", 20, **LABELS))
    assert pd.notna(single["value"])
    assert pd.isna(single["ci_low"])
    with pytest.raises(ValueError, match="measure='kl'; expected one of"):
        doses.matched(runs, "kl", 20, **LABELS)


def test_runs_worse_than_their_base_model_count():
    runs = made(lambda method, x: 0.0).assign(value=lambda rows: 10 * rows["dose_nll"])
    below = doses.below_base(runs)
    assert below["worse"].tolist() == [
        runs.loc[runs["method"].eq(method), "dose_nll"].lt(0).sum() for method in METHODS
    ]
    assert below["worse"].sum() > 5
    assert (
        doses.preset_doses(
            *(runs.loc[runs["method"].eq(method), "dose_nll"].to_numpy() for method in METHODS)
        )[0][0]
        < 0
    )


def test_estimates_do_not_depend_on_the_order_of_runs():
    runs = made(lambda method, x: x, 1.0)
    one, two = (
        doses.matched(frame, "kl_base", 400, **LABELS)
        for frame in (runs, runs.sample(frac=1, random_state=2))
    )
    assert one["value"].tolist() == pytest.approx(two["value"].tolist())
    assert one["se"].tolist() == pytest.approx(two["se"].tolist(), rel=0.2)


# ---- preset doses
def pilot() -> pd.DataFrame:
    """A dose that is a power of the rate, the same for all seeds."""
    runs = made(lambda method, x: 0.0)
    return runs.assign(
        kl_base=runs["method"].map({"lora": 100.0, "p_tuning": 30.0}) * runs["learning_rate"] ** 1.5
    )


def test_a_power_law_is_inverted_exactly_and_never_beyond_the_pilot():
    found = doses.rates_for_dose(pilot(), [1e-3, 1e-9]).set_index(["method", "dose"])
    assert found.loc[("lora", 1e-3), "learning_rate"] == pytest.approx((1e-3 / 100) ** (1 / 1.5))
    assert found.loc[("p_tuning", 1e-3), "learning_rate"] == pytest.approx((1e-3 / 30) ** (1 / 1.5))
    assert pd.isna(found.loc[("lora", 1e-9), "learning_rate"])
    assert "no extrapolation" in found.loc[("lora", 1e-9), "reason"]
    assert found["pilot_seeds"].eq("1, 2, 3").all()


@pytest.mark.parametrize(
    ("reached", "rate", "words"),
    [
        ([1, 2, 4, 8], 10**-3.5, "between 0.0001 and 0.001"),
        ([1, 4, 1, 4], 10**-3.75, "the first of 2 crossings"),
        ([8, 4, 1, 0.5], None, "no rising pair"),
        ([-1, -1, 4, 8], None, "not above zero at 0.0001, 0.001"),
        ([-1, -2, -3, -4], None, "no rising pair"),
        ([1, 2**0.5, 4, 8], 1e-3, "reached in the pilot"),
    ],
)
def test_the_first_rate_that_reaches_the_dose_is_taken(reached, rate, words):
    runs = pilot().query("method == 'lora'")
    runs = runs.assign(
        dose_nll=runs["setting"].map({f"s{i}": value for i, value in enumerate(reached)})
    )
    [row] = doses.rates_for_dose(runs, [2**0.5], "dose_nll").itertuples()
    assert words in row.reason
    assert pd.isna(row.learning_rate) if rate is None else row.learning_rate == pytest.approx(rate)


def test_a_dose_of_zero_has_no_rate():
    assert doses.rates_for_dose(pilot(), [0.0])["reason"].str.contains("no logarithm").all()


def fresh(preset: pd.DataFrame, off: float = 0.05, seeds=(4, 5, 6)) -> pd.DataFrame:
    """Runs at the preset rates whose doses miss by up to `off`, p_tuning two points higher."""
    rng, rows = np.random.default_rng(0), []
    for row in preset.dropna(subset="learning_rate").to_dict("records"):
        for seed in seeds:
            dose = row["dose"] * (1 + off * (seed - 5))
            rows.append(
                {
                    **row,
                    "run_id": f"{row['method']}{seed}",
                    "seed": seed,
                    "setting": "preset",
                    "kl_base": dose,
                    "value": 2 * (row["method"] == "p_tuning") + rng.normal(),
                }
            )
    return pd.DataFrame(rows)


def test_fresh_seeds_within_the_tolerance_make_an_experiment_of_it():
    preset = doses.rates_for_dose(pilot(), [1e-3])
    runs = fresh(preset)
    checked = doses.confirmed(runs, preset, 0.1)
    assert checked["confirmed"].all()
    assert checked["n_runs"].eq(3).all()
    found = doses.experiment(runs, checked, **LABELS).iloc[0]
    test = scipy_stats.ttest_ind(
        *(runs.loc[runs["method"].eq(method), "value"] for method in METHODS), equal_var=False
    )
    low, high = test.confidence_interval()
    assert [found["ci_low"], found["ci_high"], found["p"]] == pytest.approx(
        [low, high, test.pvalue]
    )
    assert "experiment" in found["how"]
    assert "descriptive" not in found["how"] + found["population"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"off": 0.3}, "2 of 3 fresh seeds are more than 10% off"),
        ({"seeds": (1, 2, 3)}, "0 fresh seeds ran at this rate"),
        ({"seeds": (3, 5)}, "1 fresh seeds ran at this rate"),
    ],
)
def test_what_did_not_land_on_fresh_seeds_stays_descriptive(change, words):
    preset = doses.rates_for_dose(pilot(), [1e-3])
    runs = fresh(preset, **change)
    checked = doses.confirmed(runs, preset, 0.1)
    assert not checked["confirmed"].any()
    assert checked["reason"].str.contains(words).all()
    assert doses.experiment(runs, checked, **LABELS).empty


def test_a_rate_that_could_not_be_set_is_not_confirmed():
    preset = doses.rates_for_dose(pilot(), [1e-9])
    checked = doses.confirmed(pilot(), preset, 0.5)
    assert not checked["confirmed"].any()
    assert checked["reason"].str.contains("no extrapolation").all()


# ---- a simulated study
@pytest.fixture(scope="module")
def study(tmp_path_factory) -> dict:
    """Tables of a small study as figures get them, with the rows of notebooks 09, 11 and 15 that
    they show.
    """
    folder = (
        simulate(
            tmp_path_factory.mktemp("doses"), bases=["mini-llama", "mini-gemma"], utility=False
        )
        / "tables"
    )
    tables = gallery.read(folder, "miniature: not a finding about real models")
    of_ia3 = tables["variants"]["method"].eq("ia3") & tables["variants"]["repetition"].eq(1)
    idle = tables["variants"].loc[of_ia3 & tables["variants"]["objective"].eq("sft"), "run_id"]
    runs = tables["runs"]
    tables["runs"] = runs.assign(no_op=runs["no_op"].mask(runs["run_id"].isin(idle), True))
    arms = influence.arms(tables["variants"], tables["runs"])
    asked = (
        TABLES["verdicts"]
        .read(folder)
        .merge(TABLES["prompts"].read(folder), on=["benchmark", "prompt_id"])
        .query("benchmark == 'safety'")
    )
    values = influence.matrix(asked, "unsafe", ["category", "prompt_id"])
    named = {**LABELS, "notebook": "09_safety"}
    parts = [estimation.of_rate(values, arms, influence.cells(arms), **named)]
    change = estimation.run_changes(parts[0], {terms.UNSAFE: "safety"})[terms.UNSAFE]
    runs = doses.dose_runs(arms, tables["runs"], change)
    parts += [
        doses.as_configured(runs, 50, **LABELS),
        *(doses.matched(runs, measure, 50, **LABELS) for measure in doses.DOSES),
    ]
    mixed, every = {**LABELS, "notebook": "11_mixed_effects"}, factors.factor_runs(arms, change)
    parts += [
        factors.largest_contrasts(factors.matched_contrasts(every, grain, 200), **mixed)
        for grain in (factors.CELL, factors.MEAN)
    ]
    parts.append(variance_shares.variance_shares(every, 50, **mixed))
    return {**tables, "estimates": ESTIMATES.concat(parts), "arms": arms, "doses": runs}


def test_no_ops_are_counted_and_both_means_are_shown(study):
    table = doses.with_and_without_no_ops(study["estimates"], study["arms"])
    usual = study["arms"][study["arms"]["arm"].isin([terms.TRAINED, terms.NO_OP])]
    assert (
        table.loc[table["base_model"].ne("all"), "runs"].sum() == len(usual) == len(study["doses"])
    )
    idle = table[table["base_model"].ne("all") & table["no_ops"].gt(0)]
    assert idle["no_ops"].sum() == usual["arm"].eq(terms.NO_OP).sum() > 0
    differ = idle[terms.AS_CONFIGURED] != idle[terms.TRAINED]
    assert differ.all()  # the grid of every base model has the rate at which nothing happens


def test_the_last_sentence_counts_what_the_table_holds(study):
    rows = study["estimates"]
    text = doses.doses_sentence(
        rows[rows["notebook"].eq("15_dose")], study["arms"], "the unsafe-response rate"
    )
    plain = rows[rows["contrast"].eq(doses.PLAIN)]
    assert (
        f"as configured {(plain['ci_low'].gt(0) | plain['ci_high'].lt(0)).sum()} of {len(plain)}"
        in text
    )
    assert "descriptions" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["variance_shares", "no_ops", "doses_reached", "dose_matched"])
def test_figures_draw_from_full_poor_and_empty_tables(study, name, tmp_path):
    drawing.style()
    fig, caption = drawing.FIGURES[name](study)
    assert fig.get_figwidth() == drawing.WIDTH
    assert "descriptive" in caption.lower() or name != "dose_matched"
    poor = study["estimates"].copy()
    poor.loc[::2, ["se", "ci_low", "ci_high"]] = None
    poor.loc[::3, ["value", "se", "ci_low", "ci_high"]] = None
    for estimates in (poor, ESTIMATES.empty()):
        plt.close(drawing.FIGURES[name]({**study, "estimates": estimates})[0])
    bare = study["runs"].assign(dose_nll=pd.NA, kl_base=pd.NA)
    plt.close(drawing.FIGURES[name]({**study, "runs": TABLES["runs"].check(bare)})[0])
    assert drawing.SOURCES[name].startswith(
        f"notebook {'11_mixed_effects' if name == 'variance_shares' else '15_dose'}"
    )
    assert factors_and_doses.__name__ == drawing.FIGURES[name].__module__
    plt.close(fig)
