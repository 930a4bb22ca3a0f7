"""What holds once and what holds twice, on simulated runs whose truth is known."""

from itertools import pairwise

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from driftbook.analyses import repairs, second_tuning
from driftbook.analyses.second_tuning import (
    HELD,
    HOLDS_ONCE,
    HOLDS_TWICE,
    MORE_LEFT,
    NO_EFFECT,
    ONCE,
    TWICE,
    UNCLEAR,
    UNDEFENDED,
)
from driftbook.figures import drawing, gallery, ticks
from driftbook.publishing.guidance import NOT_SHOWN, guidance
from driftbook.stats import terms
from driftbook.study.tables import VERDICTS
from test_frontier import LABELS, tables_of, variant

RATES = (0.001, 0.005, 0.02)
OUTCOMES = {"Safety": (terms.UNSAFE, "safety")}
UNSAFE = 0.7  # of plain runs, tuned once or twice
# of a defence: its kind, unsafe answers once, and at each rate twice with the gain there
DEFENCES = {
    "lasting 1": ("mixing", 0.3, ((0.3, 1.0),) * 3),
    "brief 0.5": ("rescale", 0.3, ((0.35, 0.95), (0.68, 0.95), (0.5, 1.0))),
    "halved 1": ("rescale", 0.3, ((0.5, 1.0),) * 3),
    "useless": ("constrained_sft", 0.7, ((0.7, 1.0),) * 3),
    "unless spoiled 2, same norm": ("safe_lora", 0.3, ((0.3, 1.0), (0.3, 1.0), (0.7, 0.8))),
    "never learns": ("rescale", 0.3, ((0.3, 0.5), (0.3, 0.6), (0.7, 0.2))),
}


def every_run(bases, n_seeds):
    """The variant, share of unsafe answers and gain of each run, repair and second tuning."""
    for base in bases:
        yield variant(f"{base}.none", base, "none", None), 0.1, 0.0
        for number in range(1, n_seeds + 1):
            plain, shared = f"{base}.s{number}", {"base": base, "method": "lora"}
            shared["dataset"] = "d"
            yield variant(plain, number=number, **shared), UNSAFE, 1.0
            yield from again(plain, None, ((UNSAFE, 1.0),) * 3, number, shared)
            for name, (kind, share, twice) in DEFENCES.items():
                one, own = f"{plain}.{name}", {"mitigation": name, "parent_run_id": plain}
                repair = {"name": name.split()[0], "kind": kind, "value": 1.0, "control": None}
                settings = {"mitigation": repair}
                yield variant(one, number=number, settings=settings, **own, **shared), share, 0.9
                yield from again(one, repair, twice, number, shared)


def again(parent, of, twice, number, shared):
    for rate, (share, gain) in zip(RATES, twice, strict=True):
        own = {"name": "again", "kind": "second_tuning", "value": rate, "control": None, "of": of}
        row = variant(
            f"{parent}.again {rate}",
            number=1000 * number,
            settings={"mitigation": own},
            mitigation=f"again {rate}",
            parent_run_id=parent,
            learning_rate=rate,
            **shared,
        )
        yield row | {"objective": "sft", "dataset": "other"}, share, gain


def simulated(seed=0, n_prompts=240, n_seeds=4, bases=("one", "two")) -> repairs.Tables:
    return tables_of(list(every_run(bases, n_seeds)), seed, n_prompts)


@pytest.fixture(scope="module")
def found():
    tables = simulated()
    again = second_tuning.second_tunings(tables.variants, tables.runs)
    mean = second_tuning.at_each_rate(again, second_tuning.levels(tables, again, 0))
    worst = second_tuning.worst_rates(mean)
    return (
        tables,
        again,
        mean,
        worst,
        second_tuning.defences_compared(tables, again, worst, 0, **LABELS),
    )


def test_each_is_compared_with_the_plain_run_tuned_alike(found):
    tables, again, *_ = found
    assert len(again) == 2 * 4 * len(RATES) * (1 + len(DEFENCES))
    for row in again.itertuples():
        assert row.again_run_id == f"{row.plain_run_id}.again {row.rate}"
        assert row.parent_run_id == row.run_id.removesuffix(f".again {row.rate}")
        assert row.name == row.parent_run_id.partition(f"{row.plain_run_id}.")[2] or UNDEFENDED
        assert (row.dataset, row.objective) == ("d", "dpo")  # of the first tuning
    assert not set(again["run_id"]) & set(
        repairs.repairs(tables.variants, tables.runs)["run_id"]
    )  # which are compared with their parents


def test_the_worst_rate_is_one_at_which_the_second_tuning_does_its_work(found):
    *_, mean, worst, _ = found
    for base in ("one", "two"):
        own = worst[worst["base_model"].eq(base)].set_index("name")
        assert own.at["brief 0.5", "rate"] == 0.005
        assert own.at["unless spoiled 2, same norm", "rate"] < 0.02
        assert own.at["never learns", "rate"] == 0.005  # where it lacks least
        assert own.index[~own["works"]].tolist() == ["never learns"]
    lacks = mean.set_index(["base_model", "name", "rate"])["lacks"]
    assert lacks["one", "brief 0.5", 0.001] == pytest.approx(5, abs=1e-6)
    assert lacks["one", "never learns", 0.02] == pytest.approx(80, abs=1e-6)


def test_the_worst_rate_never_sees_the_report_half(found):
    tables, again, _, worst, _ = found
    report = set(repairs.halves(tables, 0)[repairs.REPORT].prompts["prompt_id"])
    unsafe = tables.verdicts["unsafe"]
    flipped = unsafe.where(~tables.verdicts["prompt_id"].isin(report), ~unsafe)
    other = tables._replace(verdicts=VERDICTS.check(tables.verdicts.assign(unsafe=flipped)))
    levels = second_tuning.levels(other, again, 0)
    anew = second_tuning.worst_rates(second_tuning.at_each_rate(again, levels))
    pd.testing.assert_frame_equal(anew, worst)


def test_the_words_follow_from_what_was_put_in(found):
    *_, worst, estimates = found
    held = second_tuning.what_holds(estimates, worst).set_index("defence")
    assert held["word"].to_dict() == {
        "lasting 1": HOLDS_TWICE,
        "brief 0.5": HOLDS_ONCE,
        "halved 1": UNCLEAR,  # just LEFT of its effect is left
        "useless": NO_EFFECT,
        "unless spoiled 2, same norm": HOLDS_TWICE,
        "never learns": UNCLEAR,  # since nothing can be taught to it
    }
    assert held.at["lasting 1", "once"] == pytest.approx(-40, abs=8)
    assert held.at["brief 0.5", "twice"] == pytest.approx(-2, abs=6)
    assert (held["once from"] <= held["once"]).all()
    assert (held["twice"] <= held["twice to"]).all()
    assert held["works on"].to_dict() == dict.fromkeys(DEFENCES, 2) | {"never learns": 0}
    said = second_tuning.held_sentence(held.reset_index())
    assert said.index("lasting 1") < said.index("Holds once") < said.index("brief 0.5")


def test_the_report_says_what_outlasts_a_second_tuning(found):
    *_, estimates = found
    asked = {one.question: one for one in guidance(estimates, OUTCOMES)}
    _, advice, evidence = asked["What outlasts a second tuning?"]
    assert advice == "lasting 1 and unless spoiled 2, same norm"
    of = dict(zip(HELD[1:], ("brief 0.5", "halved 1", "useless"), strict=True))
    for word, name in of.items():
        assert f"{word.capitalize()}: {name} (" in evidence
    once_only = estimates[~estimates["member"].isin(["lasting 1", "unless spoiled 2, same norm"])]
    assert guidance(once_only, OUTCOMES)[-1].advice == NOT_SHOWN
    of_one = estimates["member"].eq("useless") & estimates["base_model"].ne("one")
    partly = guidance(estimates[~of_one], OUTCOMES)[-1].evidence
    assert "useless on one (" in partly
    assert "lasting 1 (" in partly


def test_two_methods_with_one_defence_are_told_apart(found):
    *_, worst, estimates = found
    both = pd.concat([estimates, estimates.assign(method="prompt_tuning")], ignore_index=True)
    [told] = [one.evidence for one in guidance(both, OUTCOMES) if "outlasts" in one.question]
    assert told.count("lasting 1 of LoRA (") == told.count("lasting 1 of Prompt-Tuning (") == 1
    every = pd.concat([worst, worst.assign(method="prompt_tuning")])
    held = second_tuning.what_holds(both, every)
    said = second_tuning.held_sentence(held)
    assert said.count("useless of LoRA (") == said.count("useless of Prompt-Tuning (") == 1
    settings = pd.concat([worst, worst.assign(dataset="another")])
    assert second_tuning.what_holds(estimates, settings)["works on"].max() == 2  # base models


def test_where_no_second_answer_was_judged_nothing_can_be_told(found):
    *_, worst, estimates = found
    lost = estimates["member"].eq("lasting 1") & estimates["contrast"].ne(ONCE)
    for rows in (estimates[~lost], estimates.assign(value=estimates["value"].mask(lost))):
        held = second_tuning.what_holds(rows, worst).set_index("defence")
        assert pd.isna(held.at["lasting 1", "twice"])
        evidence = guidance(rows, OUTCOMES)[-1].evidence
        assert "once, not known twice)" in evidence
    assert held["word"].drop("lasting 1").ne(NO_EFFECT).sum() == len(DEFENCES) - 2
    held = second_tuning.what_holds(estimates[~lost], worst).set_index("defence")
    assert held.at["lasting 1", "word"] == UNCLEAR


def test_what_is_left_is_the_second_difference_minus_its_share_of_the_first(found):
    *_, estimates = found
    rows = estimates[estimates["outcome"].eq(terms.UNSAFE)]
    own = rows[rows["group"].eq(second_tuning.GROUP)]
    wide = own.pivot(index=["base_model", "member"], columns="contrast", values="value")
    wide = wide.astype(float)
    left = wide[TWICE] - second_tuning.LEFT * wide[ONCE]
    assert wide[MORE_LEFT].to_numpy() == pytest.approx(left.to_numpy())
    families = own.groupby("family_of_tests").size()
    assert len(families) == 3 * 3  # once, twice and what is left; two base models and all
    assert (families == len(DEFENCES)).all()
    untold = own["contrast"].eq(MORE_LEFT) & own["p"].isna()
    assert set(own.loc[untold, "member"]) == {"never learns"}
    sweep = rows[rows["group"].eq(second_tuning.SWEEP) & rows["base_model"].eq("all")]
    assert len(sweep) == len(DEFENCES) * len(RATES)
    assert sweep["p_adjusted"].isna().all()


def test_numbers_along_narrow_panels_keep_apart():
    drawing.style()
    fig, axes = plt.subplots(1, 5, figsize=(drawing.WIDTH, 1))
    for ax, size in zip(axes, (0.006, 0.09, 1, 30, 900), strict=True):
        ax.plot([-size, size / 9], [0, 0])
        ticks.few_ticks(ax)
    fig.canvas.draw()
    for ax in axes:
        boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
        inside = [box for box in boxes if ax.bbox.x0 <= (box.x0 + box.x1) / 2 <= ax.bbox.x1]
        assert len(inside) >= 2
        assert all(one.x1 < other.x0 for one, other in pairwise(inside))


def test_its_figure_shows_each_defence_once_at_each_rate_and_at_the_worst(found, monkeypatch):
    tables, *_, estimates = found
    drawing.style()
    shown = []
    dots = drawing.dots
    monkeypatch.setattr(
        "driftbook.figures.second_tuning.dots",
        lambda ax, own, *more: (shown.append(len(own)), dots(ax, own, *more)),
    )
    names = {"variants": tables.variants, "runs": tables.runs, "estimates": estimates}
    _, caption = gallery.every()["tuned_again"](names | {"note": "simulated"})
    assert shown == [len(DEFENCES)] * (len(RATES) + 2)
    assert "2 base models" in caption
    none = estimates[estimates["group"].eq("no such group")]
    assert "Nothing to draw" in gallery.every()["tuned_again"](names | {"estimates": none})[1]
