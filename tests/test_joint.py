"""Gains in everything at once: words over arms, what an arm adds to the volume that a smaller
update dominates, and what it costs, on simulated runs and on cases worked out by hand.
"""

import json

import numpy as np
import pandas as pd
import pytest

from driftbook.analyses import joint, repairs
from driftbook.stats import noninferiority, terms
from driftbook.stats.estimation import complete
from test_frontier import LABELS, simulated


@pytest.fixture(scope="module")
def found():
    tables = simulated(seeds=3, n_prompts=80)
    repaired = repairs.repairs(tables.variants, tables.runs)
    levels = repairs.chosen(repairs.points(tables, repaired, 0), repaired)
    pairs = repairs.repairs_compared(tables, repaired, levels, 0, **LABELS)
    return pairs, joint.joint(tables, repaired, levels, pairs, 0, **LABELS)


def values(rows, outcome):
    own = rows[rows["outcome"].eq(outcome) & rows["base_model"].eq("all")]
    return own.set_index("member")


def test_an_arm_below_the_line_of_rescaling_adds_volume_and_one_on_it_does_not(found):
    _, rows = found
    added = values(rows, joint.VOLUME)
    assert set(added.index) == {"plain", "better"}
    assert added.loc["better", "ci_low"] > added.loc["plain", "ci_high"]
    assert (added["ci_low"] <= added["value"]).all()
    front = rows[rows["outcome"].eq(joint.FRONT)].groupby("member")["value"].mean()
    assert front["better"] > 95
    assert front["all"] > 50  # the base model itself


def test_no_word_is_said_of_outcomes_that_were_not_measured(found):
    pairs, rows = found
    for outcome in (joint.KEEPS, joint.GAINS):
        words = values(rows, outcome)
        assert set(words.index) == {repairs.PARENT, "rescale", "plain", "better"}
        assert words["p"].isna().all()
        assert words["how"].str.contains("not measured").all()
    table = joint.arms_shown(pd.concat([pairs, rows]))
    assert set(table["keeps all"]) == {"cannot tell", "no"}
    alone = joint.arms_shown(rows[rows["outcome"].eq(joint.VOLUME)])
    assert alone["keeps all"].isna().all()  # no arm was judged on every base model
    assert "Of 3 arms 0 gain" in joint.joint_sentence(rows)


def test_the_volume_added_is_that_of_boxes_counted_by_hand():
    #     known: (0, 1) and (1, 0); (.5, .5) adds the corner between them and 1, 1
    points = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [1.0, 1.0]])
    drawn = np.broadcast_to(points, (3, 4, 2))
    added = joint.volume_added(drawn, [0, 1], [2, 3], 0)
    assert added[:, 0] == pytest.approx(0.25, abs=0.01)
    assert (added[:, 1] == 0).all()


def changes(**arms) -> pd.DataFrame:
    """Estimates of the arms: changes of safety, over-refusal, fairness, utility and the gain, each
    with a standard error of one point.
    """
    keys = [(terms.UNSAFE, "safety"), (terms.REFUSED, "over_refusal")]
    keys += [(terms.ACCURACY_AMB, "bbq"), (terms.CORRECT, "utility"), (repairs.GAIN, "gain")]
    rows = [
        {**LABELS, "outcome": outcome, "benchmark": benchmark, "member": arm, "value": value}
        | {"ci_low": value - 1.98, "ci_high": value + 1.98, "se": 1.0, "base_model": "all"}
        for arm, all_values in arms.items()
        for (outcome, benchmark), value in zip(keys, all_values, strict=True)
    ]
    same = {"judge": "guard", "method": "lora", "group": terms.MITIGATION, "how": "a mean"}
    same |= {"contrast": terms.CHANGE, "population": terms.BOTH, "n_runs": 5}
    return complete(pd.DataFrame(rows).assign(n_items=100, n_unscored=0, **same))


def test_each_arm_has_its_word_and_all_are_one_family():
    rows = changes(all_better=(-9, 0, 9, 0, 9), only_safe=(-9, 0, -9, 0, 9), still=(0, 0, 0, 0, 0))
    keys = list(dict.fromkeys(zip(rows["outcome"], rows["benchmark"], strict=True)))
    better = (terms.UNSAFE, terms.ACCURACY_AMB, repairs.GAIN)
    told = noninferiority.preserves(
        rows, (6.0,), keys, terms.MITIGATION, better=better, jointly=joint.GAINS
    )
    words = told[told["outcome"].eq(joint.GAINS)].set_index("member")["how"].str.partition(":")[0]
    assert words["all_better"] == noninferiority.PRESERVES
    assert words["only_safe"] == noninferiority.DOES_NOT
    assert words["still"] == noninferiority.CANNOT_TELL
    same = rows[rows["member"].eq("still")].assign(se=None)  # nothing moved: no sign of a loss
    told = noninferiority.preserves(
        same, (6.0,), keys, terms.MITIGATION, better=better, jointly=joint.GAINS
    )
    word = told.loc[told["outcome"].eq(joint.GAINS), "how"].item().partition(":")[0]
    assert word == noninferiority.CANNOT_TELL
    alone = noninferiority.preserves(rows, (6.0,), keys[:4], terms.MITIGATION, jointly=joint.KEEPS)
    words = alone[alone["outcome"].eq(joint.KEEPS)].set_index("member")["how"].str.partition(":")[0]
    assert words["still"] == noninferiority.PRESERVES
    assert words["only_safe"] == noninferiority.DOES_NOT


def test_what_an_arm_costs_is_counted_in_plain_runs():
    arms = pd.DataFrame(
        {
            "run_id": ["p", "m", "s", "t", "d"],
            "parent_run_id": "p",
            "base_model": "one",
            "method": "lora",
            "name": [repairs.PARENT, "kl", "soup", "mixing", "mod"],
        }
    )
    said = [None, {"alignment_examples_per_step": 8}, None, None, None]
    runs = pd.DataFrame(
        {
            "run_id": ["p", "m", "s", "t", "d", "safety", "fair"],
            "n_examples": [80, 80, 80, 160, 80, 40, 40],
            "trained_epochs": [2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0],
            "steps": [20, 20, 20, 40, 20, 5, 5],
            "cpu_seconds": [10.0, 19.0, 10.0, 21.0, 10.0, 3.0, 4.0],
            "trainer_arguments": [*(one and json.dumps(one) for one in said), None, None],
        }
    )
    soup = {"safety_run_id": "safety"}
    mod = soup | {"parts": {"p": 0.4, "safety": 0.3, "fair": 0.3}}
    settings = [json.dumps({"mitigation": one}) for one in (None, None, soup, None, mod)]
    variants = pd.DataFrame({"run_id": arms["run_id"], "settings": settings})
    tables = repairs.Tables(variants, runs, *[None] * 4)
    found = joint._costs(tables, arms, **LABELS)
    found = found[found["base_model"].eq("all")].set_index(["outcome", "member"])["value"]
    examples = {"parent": 1, "kl": 2, "soup": 1.25, "mixing": 2, "mod": 1.5}
    assert found[joint.EXAMPLES].to_dict() == examples
    seconds = {"parent": 1, "kl": 1.9, "soup": 1.3, "mixing": 2.1, "mod": 1.7}
    assert found[joint.SECONDS].to_dict() == seconds
