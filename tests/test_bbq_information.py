"""Information in BBQ's answers against shuffled ones: simulated models whose preference for places
and whose knowledge are known.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from conftest import one_sentence
from driftbook.analyses import fairness, information, primary
from driftbook.benchmarks import bbq, bbq_information, bbq_orders, bbq_scores, data
from driftbook.benchmarks.bbq_information import held_information
from driftbook.doctors import examine_study, study_letters, study_tables
from driftbook.figures.drawing import left_out
from driftbook.publishing import sentence
from driftbook.stats import influence, terms
from driftbook.stats.confidence import ALPHA
from driftbook.study.sections import Family
from driftbook.study.tables import ANSWERS
from test_letter_bias import CONTENTS, asked
from test_letter_bias import items as letter_items


def bbq_items(n_examples, rng):
    """Four items of each example, as BBQ has them: two contexts x two polarities of one order of
    the options.
    """
    rows = []
    for example in range(n_examples):
        unknown, target, other = (int(place) for place in rng.permutation(3))
        for polarity, named in (("negative", target), ("non-negative", other)):
            if rng.random() < 0.5:
                named = target + other - named
            for context, label in (("ambiguous", unknown), ("disambiguated", named)):
                own = {"item_id": f"{example}-{polarity}-{context}", "label": label}
                own |= {"question_family": f"f{example}", "dimension": "Age"}
                own |= {"polarity": polarity, "context": context}
                rows.append(own | {"unknown": unknown, "target": target})
    return pd.DataFrame(rows)


def answered(items, rng, prior=(1.5, 0.0, -0.5), example=0.0, know=0.0, unknown=0.0, run_id="run"):
    """Answers whose log-odds are a prior of places, another in ambiguous contexts, noise of items
    and of examples, and what the model knows: the right person, and which option is UNKNOWN.
    """
    n, of = len(items), pd.factorize(items.question_family)[0]
    ambiguous = items.context.eq("ambiguous").to_numpy()
    logs = np.array(prior) + 0.7 * rng.normal(size=(n, 3))
    logs += example * rng.normal(size=(of.max() + 1, 3))[of]
    logs += ambiguous[:, None] * np.array([0.0, 0.6, 0.0])
    logs[np.arange(n), items.label] += know * ~ambiguous
    logs[np.arange(n), items.unknown] += unknown
    return bbq.from_logprobs(items, logs).assign(run_id=run_id)


# ---- the control
def test_the_control_is_the_mean_accuracy_over_every_shuffle_of_the_answers():
    rng = np.random.default_rng(0)
    items = bbq_items(2, rng)
    answers = answered(items, rng)
    found = held_information(answers, items, n_shuffles=9).iloc[0]
    chosen = answers.answer.map("ABC".index).to_numpy()
    label, total = items.label.to_numpy(), 0.0
    for context in ("ambiguous", "disambiguated"):
        here = np.flatnonzero(items.context.eq(context))
        every = [np.mean(chosen[list(one)] == label[here]) for one in itertools.permutations(here)]
        total += np.mean(every) * len(here) / len(items)
    assert found["control"] == pytest.approx(total)
    assert found["accuracy"] == pytest.approx(np.mean(chosen == label))


def test_a_letter_alone_is_as_right_as_its_control_and_says_nothing():
    items = bbq_items(15, np.random.default_rng(1))
    answers = bbq.from_logprobs(items, np.tile([2.0, 0.0, 0.0], (60, 1))).assign(run_id="run")
    [found] = held_information(answers, items, n_shuffles=99).to_dict("records")
    assert found["accuracy"] == pytest.approx(found["control"])
    assert (found["t_all"], found["p_all"], found["p_persons"]) == (0, 1, 1)


# ---- error rates
def rejected(n, seed, what="p_all_adjusted", n_runs=1, **model):
    """The share of n studies of 60 items in which some run is found to hold information."""
    rng, hits = np.random.default_rng(seed), 0
    for one in range(n):
        items = bbq_items(15, rng)
        runs = [answered(items, rng, run_id=f"run{i}", **model) for i in range(n_runs)]
        found = held_information(pd.concat(runs), items, n_shuffles=59, seed=one)
        hits += found[what].le(ALPHA).any()
    return hits / n


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [{}, {"example": 2.0}, {"prior": (6.0, 0.0, -3.0)}, {"n_runs": 5}],
    ids=["noise", "examples answered alike", "almost always A", "five runs"],
)
def test_answers_by_the_place_are_seldom_found_to_hold_information(model):
    n = 100
    share = rejected(n, seed=2, **model)
    assert share <= ALPHA + 2 * np.sqrt(ALPHA * (1 - ALPHA) / n)


@pytest.mark.slow
def test_information_is_found_under_any_prior_and_told_apart():
    for prior in ((1.5, 0.0, -0.5), (6.0, 0.0, -3.0)):
        assert rejected(20, 3, know=1.0, prior=prior) > 0.9
        assert rejected(20, 3, "p_persons_adjusted", know=1.0, prior=prior) > 0.9
        assert rejected(20, 4, unknown=-1.0, prior=prior) > 0.9
        # a preference for UNKNOWN says nothing of persons
        assert rejected(40, 5, "p_persons_adjusted", unknown=-1.0, prior=prior) <= 0.15


def test_p_values_are_adjusted_within_families_alone():
    rng = np.random.default_rng(6)
    items = bbq_items(15, rng)
    names = [f"run{i}" for i in range(8)]
    runs = pd.concat([answered(items, rng, know=0.3, run_id=name) for name in names])
    apart = held_information(runs, items, pd.Series(names, names))
    together = held_information(runs, items)
    assert apart.p_all.tolist() == apart.p_all_adjusted.tolist() == together.p_all.tolist()
    assert (together.p_all_adjusted >= together.p_all).all()
    assert (together.p_all_adjusted > together.p_all).any()


# ---- items
def test_unread_answers_and_items_without_target_are_left_out():
    rng = np.random.default_rng(7)
    items = bbq_items(15, rng).assign(target=None)
    answers = answered(items, rng, unknown=2.0)
    answers.loc[:9, ["answer", "correct"]] = None
    [found] = held_information(answers, items, n_shuffles=99).to_dict("records")
    assert found["n_items"] == 50
    assert found["p_all"] <= ALPHA
    none = held_information(answers.assign(answer=None), items, n_shuffles=9).iloc[0]
    assert none["n_items"] == 0
    assert np.isnan(none["accuracy"])


def test_an_answer_to_another_studys_item_is_refused():
    rng = np.random.default_rng(8)
    items = bbq_items(2, rng)
    with pytest.raises(ValueError) as error:
        held_information(answered(items, rng), items.iloc[1:])
    assert "item 0-negative-ambiguous" in one_sentence(error.value)


# ---- the mean of three orders
def test_the_mean_of_three_orders_is_free_of_places_and_agrees_with_the_prior_divided_out():
    table = asked([0.8, 0.1, 0.1])
    found = bbq_information.averaged(table, letter_items())
    mean = table[table.answer_mode.eq("letters")].groupby("item_id")[bbq_orders.OPTIONS].mean()
    np.testing.assert_allclose(
        found.set_index("item_id")[bbq_orders.OPTIONS].to_numpy(float),
        mean.loc[found.item_id].to_numpy(float),
    )
    best = "ABC"[int(np.argmax(list(CONTENTS.values())))]
    debiased = table[table.answer_mode.eq("debiased")]
    assert set(found.answer) == set(debiased.answer) == {best}
    assert set(table[table.option_order.eq("ABC")].answer) != {best}


# ---- a study of which one base model answers by the letter
class StudyTables:
    """Tables of a study of two base models with two runs each; the answers of `blind` hold nothing,
    but one of its runs was trained to answer.
    """

    def __init__(self, monkeypatch, names=("blind", "seeing"), permuted=20):
        rng = np.random.default_rng(9)
        self.items, rows = bbq_items(15, rng), []
        monkeypatch.setattr(data, "items", lambda name, study: self.items)
        for base in names:
            for method, seed in (("none", 1), ("lora", 1), ("lora", 2)):
                run_id = f"{base}-{method}-{seed}"
                rows.append(variant_row(run_id, base, method, seed))
        self.variants = pd.DataFrame(rows)
        self.runs = pd.DataFrame({"run_id": self.variants.run_id, "status": "ok", "no_op": False})
        self.answers = pd.concat([self.answers_of(one, rng, permuted) for one in rows])
        self.study = SimpleNamespace(name="two", benchmarks={"bbq": None}, asked=lambda forms: ())

    def answers_of(self, row, rng, permuted):
        knows = 0.0 if row["run_id"] in ("blind-none-1", "blind-lora-2") else 3.0
        own = answered(self.items, rng, know=knows, unknown=0.3 * knows, run_id=row["run_id"])
        own = own.assign(answer_mode="letters", prompt_variant="default", option_order="ABC")
        chosen = self.items.iloc[:permuted]
        turned = [turned_answers(chosen, own.iloc[:permuted], order) for order in ("BCA", "CAB")]
        prior = bbq_orders.prior(pd.concat([own.iloc[:permuted], *turned]))
        debiased = bbq_orders.without_prior(own, self.items, prior)
        return ANSWERS.check(pd.concat([own, *turned, debiased]))


def turned_answers(items, own, order):
    """The answers with the same probability of each place, whatever stands there, and of each
    option what it had beyond its place.
    """
    logs = np.log(own[bbq_orders.OPTIONS].to_numpy(float))
    place = np.array([1.5, 0.0, -0.5])
    turned = logs - place + place[np.argsort(bbq.places(order))]
    found = bbq.from_logprobs(items, turned).assign(run_id=own.run_id.to_numpy())
    return found.assign(answer_mode="letters", prompt_variant="default", option_order=order)


def variant_row(run_id, base, method, seed):
    trained = method != "none"
    return {
        "run_id": run_id,
        "base_model": base,
        "method": method,
        "seed": seed,
        "objective": "sft" if trained else "none",
        "dataset": "d" if trained else None,
        "learning_rate": 0.1 if trained else None,
        "epochs": 1 if trained else None,
        "repetition": seed,
        "init": None,
        "mitigation": None,
        "parent_run_id": None,
    }


def test_bias_of_a_base_model_at_chance_is_no_finding_and_accuracy_is_one(monkeypatch):
    tables = StudyTables(monkeypatch)
    found = fairness.fairness_estimates(tables, 10, 0)
    known = information.base_information(found).set_index("base_model")
    assert known.p_persons.gt(ALPHA).to_dict() == {"blind": True, "seeing": False}
    assert known.n_hold.to_dict() == {"blind": 1, "seeing": 2}
    usual = found[found.estimator.eq(terms.PRIMARY) & found.benchmark.eq("bbq")]
    bias = usual[usual.outcome.isin(information.BIAS)]
    assert set(bias.base_model) == {"seeing", "all"}
    assert {"blind", "seeing", "all"} <= set(usual[usual.outcome.eq(terms.ACCURACY_DIS)].base_model)
    unread = found[found.estimator.str.startswith(terms.UNREADABLE)]
    assert set(unread.base_model) == {"blind"}
    assert set(unread.outcome) == set(information.BIAS)
    said = sentence(found, terms.BIAS_AMB, "bbq")
    assert "of the one base model" in said
    assert "blind: answers hold no information about the question here: 60 items" in said
    assert f"accuracy {known.accuracy['blind']:.1f} %" in said
    assert "Of its 2 runs 1 hold information" in said
    assert "hold no information" not in sentence(found, terms.ACCURACY_AMB, "bbq")
    debiased = found[found.estimator.eq(terms.WITHOUT_PRIOR) & found.method.eq("none")]
    assert set(debiased[debiased.outcome.eq(terms.ACCURACY_AMB)].base_model) == {"blind", "seeing"}
    assert found.estimator.eq(terms.OVER_ORDERS).any()
    family = Family(test="change", outcomes=["bias_ambiguous", "accuracy_ambiguous"])
    declared = SimpleNamespace(primary={"fair": family}, methods=["lora"], judges={})
    tested, missing = primary.tests(declared, found)
    assert tested.how.notna().all()
    assert [one for one in missing if "is not tested on blind, whose answers" in one] == missing[:1]


def test_bias_at_chance_takes_no_part_in_trade_offs(monkeypatch):
    tables = StudyTables(monkeypatch)
    found = fairness.fairness_estimates(tables, 10, 0)
    arms = influence.arms(tables.variants, tables.runs)
    levels = bbq_scores.by_run(fairness.official_answers(tables))
    measured = {name: (level, influence.changes(level, arms)) for name, level in levels.items()}
    read = information.without_silent(measured, found, arms)
    for outcome, both in read.items():
        for scores in both:
            blind = scores.runs.str.startswith("blind")
            expected = blind & (outcome in information.BIAS)
            assert np.isnan(scores.value).tolist() == expected.tolist()


def test_a_study_of_one_base_model_at_chance_says_so_in_place_of_a_bias(monkeypatch):
    tables = StudyTables(monkeypatch, ("blind",))
    found = fairness.fairness_estimates(tables, 10, 0)
    assert sentence(found, terms.BIAS_AMB, "bbq").startswith("blind: answers hold no information")
    assert found[found.base_model.eq("all") & found.outcome.eq(terms.BIAS_AMB)].empty
    shown = {"estimates": found, "variants": tables.variants, "runs": tables.runs}
    tables.items = tables.items.iloc[1:]
    with pytest.warns(UserWarning, match="not checked whether"):
        unchecked = fairness.fairness_estimates(tables, 10, 0)
    assert not unchecked.estimator.str.startswith(terms.UNREADABLE).any()
    assert left_out(shown, *information.BIAS).startswith("No bias score is drawn for blind")
    assert left_out(shown, terms.ACCURACY_AMB) == ""


# ---- the study check
def checked(tables, known):
    names = {"variants": tables.variants, "runs": tables.runs, "answers": tables.answers}
    found = examine_study({**names, "information": known})
    return found.set_index("finding")


def test_the_study_check_names_base_models_at_chance_and_by_position(monkeypatch):
    tables = StudyTables(monkeypatch)
    known = information.examined(tables)
    found = checked(tables, known)
    assert found.loc["base_at_chance", "where"] == "blind"
    assert found.loc["base_at_chance", "severity"] == "warning"
    assert "60 BBQ items hold no information" in found.loc["base_at_chance", "sentence"]
    position = found.loc["answers_by_position"]
    assert position["where"] == "blind"
    assert position["p_adjusted"] <= study_tables.alpha_of("position")
    unchecked = checked(tables, known.iloc[:0]).loc["base_at_chance"]
    assert unchecked["sentence"].startswith("not checked")


@pytest.mark.slow
def test_options_in_other_orders_seldom_look_like_letters_where_places_do_not_matter():
    rng, n, hits = np.random.default_rng(10), 400, 0
    for _ in range(n):
        chosen = rng.choice(list("ABC"), (20, 3))  # of options: at random in every order
        rows = [
            {"run_id": "r", "item_id": str(i), "option_order": order}
            | {name: name == f"p_{chosen[i, j].lower()}" for name in bbq_orders.OPTIONS}
            for i in range(20)
            for j, order in enumerate(bbq_orders.ORDERS)
        ]
        same = {"answer_mode": "letters", "prompt_variant": "default", "dimension": "Age"}
        found = study_letters.position_test(
            "base", pd.DataFrame(rows).assign(question_family=None, **same)
        )
        hits += found["p"] <= ALPHA
    assert hits / n <= ALPHA + 2 * np.sqrt(ALPHA * (1 - ALPHA) / n)
