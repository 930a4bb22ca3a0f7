"""The starts of soft prompts against each other, on simulated runs."""

import numpy as np
import pandas as pd
import pytest

from driftbook.analyses import starts
from driftbook.figures import gallery
from driftbook.publishing import report
from driftbook.stats import influence, intervals, terms
from driftbook.study.tables import ESTIMATES

INITS = ("random", "safety_text", "safety_permuted")
BASES = ("a", "b")


def simulated(rng, shift=(0.0, 0.0, 0.0), n_units=40, shared=True, seeds=5, method="prompt_tuning"):
    """arms, changes of a rate and a record of doses; `shift` is what training adds with a start."""
    rows, answers = [], []
    ease = rng.normal(size=n_units)
    for base in BASES:
        for i, init in enumerate(INITS):
            own = rng.normal(size=seeds) * 0.5  # of the seed, before and after
            for objective in ("untrained", "sft"):
                for seed in range(seeds):
                    run_id = f"{base}.{method}.{init}.{objective}.{seed}"
                    drawn = seed if shared else f"{init}.{objective}.{seed}"
                    rows.append((run_id, base, method, objective, init, drawn))
                    trained = objective == "sft"
                    logit = ease + own[seed] * shared + trained * (0.5 + shift[i])
                    logit = logit + rng.normal() * 0.3
                    answers.append(rng.random(n_units) < 1 / (1 + np.exp(-logit)))
    columns = ["run_id", "base_model", "method", "objective", "init", "seed"]
    arms = pd.DataFrame(rows, columns=columns).assign(mitigation=None)
    arms["setting"] = arms["objective"].map({"untrained": "untrained", "sft": "sft at 5e-3, 3 ep"})
    answers = np.array(answers, float)
    counts = np.full(len(rows), n_units), np.zeros(len(rows), int)
    change = influence.ratio(
        answers, np.ones_like(answers), pd.Index(arms["run_id"]), np.zeros(n_units), *counts
    )
    change = influence.replace(change, limits=(-100.0, 100.0))
    runs = arms[["run_id"]].assign(dose_nll=rng.random(len(rows)), kl_base=rng.random(len(rows)))
    return arms, change, runs


def estimated(arms, change, runs):
    names = {"study": "s", "notebook": "12_tradeoffs"}
    measured = {terms.UNSAFE: (change, change)}
    return starts.start_estimates(measured, arms, runs, "judge", **names)


def one(estimates, **wanted):
    rows = estimates
    for column, value in wanted.items():
        rows = rows[rows[column].eq(value)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_the_contrasts_are_what_they_are_by_hand():
    arms, change, runs = simulated(np.random.default_rng(0))
    found = estimated(arms, change, runs)
    ESTIMATES.check(found)
    mean = arms.assign(value=change.value).groupby(["base_model", "init", "objective"])["value"]
    mean = mean.mean().unstack()
    moved = mean["sft"] - mean["untrained"]
    wanted = {"outcome": terms.UNSAFE, "member": "safety_text", "against": "random"}
    for base in BASES:
        row = one(found, **wanted, base_model=base, contrast=starts.BY_TRAINING)
        by_hand = moved[base, "safety_text"] - moved[base, "random"]
        assert row["value"] == pytest.approx(by_hand)
    for contrast, values in ((starts.AT_START, mean["untrained"]), (starts.AFTER, mean["sft"])):
        row = one(found, **wanted, base_model="all", contrast=contrast)
        less = values.unstack("init")
        assert row["value"] == pytest.approx((less["safety_text"] - less["random"]).mean())
        assert row["judge"] == "judge"
    null = one(found, **wanted | {"against": starts.NULL}, base_model="all", contrast=starts.AFTER)
    assert null["how"].endswith("mean over a, b")
    gain = one(
        found,
        **wanted | {"outcome": starts.DOSE_GAIN},
        base_model="all",
        contrast=starts.BY_TRAINING,
    )
    value = arms.assign(value=runs["dose_nll"]).groupby(["init", "objective"])["value"].mean()
    sides = [value[init, "sft"] - value[init, "untrained"] for init in ("safety_text", "random")]
    assert gain["value"] == pytest.approx(sides[0] - sides[1])
    assert pd.isna(gain["p_adjusted"])
    family = found[found["family_of_tests"].notna()]
    assert set(family["family_of_tests"]) == {"starts of prompt_tuning"}
    assert len(family) == 3  # two against the random start, one against the null
    np.testing.assert_allclose(
        family["p_adjusted"].astype(float), intervals.holm(family["p"].to_numpy(float))
    )


def test_a_start_that_matters_is_found_and_said_and_drawn(monkeypatch):
    arms, change, runs = simulated(np.random.default_rng(1), (0.0, 2.0, 0.0), n_units=90)
    found = estimated(arms, change, runs)
    row = one(
        found,
        outcome=terms.UNSAFE,
        member="safety_text",
        against="random",
        base_model="all",
        contrast=starts.BY_TRAINING,
    )
    assert row["ci_low"] > 0
    assert row["p_adjusted"] < 0.05
    said = starts.start_sentence(found)
    assert "matters for safety" in said
    assert f"{row['value']:+.1f} [{row['ci_low']:+.1f}, {row['ci_high']:+.1f}]" in said
    assert "against itself permuted" in said
    fig, caption = gallery.every()["starts"]({"estimates": found})
    assert said in caption
    assert fig.axes[0].get_title(loc="left") or fig.axes[0].get_title()
    cost = {"method": "prompt_tuning", "base_model": "all", "n_trainable": 8, "seconds": 1.0}
    cost |= {"value": 1.0, "ci_low": 0.5, "ci_high": 1.5}
    monkeypatch.setattr(report, "_costs", lambda *_: pd.DataFrame([cost]))
    assert report.cost_sentence(found, arms, runs).endswith(said)


def test_where_starts_are_alike_nothing_is_claimed():
    arms, change, runs = simulated(np.random.default_rng(2))
    said = starts.start_sentence(estimated(arms, change, runs))
    assert "is not shown" in said
    none = estimated(arms[arms["init"].eq("random")], change, runs)
    assert none.empty
    assert starts.start_sentence(none) == ""
    _, caption = gallery.every()["starts"]({"estimates": none})
    assert caption.startswith("Nothing to draw")


def test_the_intervals_cover():
    rng, inside = np.random.default_rng(3), []
    for _ in range(12):
        arms, change, runs = simulated(rng, n_units=24, seeds=4)
        arms = arms[arms["init"].ne(starts.NULL)]
        row = one(
            estimated(arms, change, runs.iloc[:0]), base_model="all", contrast=starts.BY_TRAINING
        )
        inside.append(row["ci_low"] <= 0 <= row["ci_high"])
    assert np.mean(inside) >= 0.75  # at 95 % fewer than 9 of 12 in 1 of 500 sets


def test_without_untrained_prompts_only_trained_ones_are_compared():
    arms, change, runs = simulated(np.random.default_rng(4))
    trained = arms[arms["objective"].eq("sft")]
    assert set(estimated(trained, change, runs)["contrast"]) == {starts.AFTER}
    mixed = arms.assign(setting=arms["setting"] + np.where(arms["init"].eq("random"), " x", ""))
    assert starts.BY_TRAINING not in set(
        estimated(mixed[mixed["init"].ne(starts.NULL)], change, runs)["contrast"]
    )
