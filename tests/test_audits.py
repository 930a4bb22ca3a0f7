"""Several audits of one base model: adjusted together, against the base and against each other."""

import pandas as pd
import pytest

import audited
from driftbook.analyses import audit, audits
from driftbook.publishing.audit_gate import FAIL, UNDECIDED
from driftbook.publishing.audit_several import write_several
from driftbook.publishing.audit_since import since
from driftbook.stats import monitor
from driftbook.stats.confidence import ALPHA


def record(rate: float, seed: int) -> dict:
    """An audit of one area, of a candidate with this rate; base answers are all alike."""
    scores = audited.scores({"safety": (0.9, rate)}, seed=0)
    mine = audited.scores({"safety": (0.9, rate)}, seed=seed)
    scores = pd.concat([scores[scores["side"].eq("base")], mine[mine["side"].eq("candidate")]])
    items = audit.moved(scores).astype(object)
    rows = items.where(items.notna(), None).to_dict("records")
    same = dict.fromkeys(("tokenizer_hash", "template_hash", "system_prompt"), "x")
    return {"base": {"hash": "b"}, "judges": [], "items": rows, **same}


def test_each_is_compared_with_the_base_and_with_each_other(tmp_path):
    records = {"good": record(0.9, 1), "bad": record(0.3, 2)}
    status, own, pairs = write_several(records, 3.0, tmp_path)
    assert status == FAIL
    assert own["Safety"]["bad"].endswith("worse")
    assert not own["Safety"]["good"].endswith("worse")
    assert pairs["Safety"]["bad less good"].endswith("worse")
    assert (tmp_path / "audits.png").stat().st_size > 1_000
    assert "bad less good" in (tmp_path / "audits_compared.md").read_text()


def test_tests_are_adjusted_over_all_comparisons():
    one = audits.against_base({"a": record(0.7, 1)}, 3.0)
    five = audits.against_base({str(n): record(0.7, 1) for n in range(5)}, 3.0)
    assert five["p_adjusted"].iloc[0] == pytest.approx(5 * one["p_adjusted"].iloc[0])


def test_audits_of_another_base_are_refused():
    other = record(0.9, 2) | {"base": {"hash": "c"}}
    with pytest.raises(ValueError, match="were not audited alike: their base differs"):
        audits.check_together({"a": record(0.9, 1), "b": other})


@pytest.mark.parametrize("sequential", [True, False])
def test_an_adapter_whose_answers_cannot_be_read_is_not_passed(tmp_path, sequential):
    lost = record(0.9, 2)
    lost["items"] = [row | {"candidate": None} for row in lost["items"]]
    same = record(0.9, 1)
    same["items"] = [row | {"candidate": row["base"]} for row in same["items"]]
    records = {"same": same, "lost": lost | {"how": {"sequential": sequential}}}
    status, own, pairs = write_several(records, 50.0, tmp_path)
    assert status == UNDECIDED
    assert own["Safety"]["lost"] == "cannot tell"
    assert own["Safety"]["same"].endswith("no worse by the margin")
    assert pairs["Safety"].tolist() == ["cannot tell"]


def test_prompts_must_be_the_same():
    other = record(0.9, 2)
    other["items"] = [row | {"item": f"other {row['item']}"} for row in other["items"]]
    with pytest.raises(ValueError, match="were asked no prompt in common"):
        audits.check_together({"a": record(0.9, 1), "b": other})


def test_audits_that_may_have_stopped_early_have_intervals_that_hold_at_every_look():
    """A fixed design's test of answers that were asked until its words were settled errs more."""
    how = {"how": {"sequential": True}}
    records = {"a": record(0.8, 1) | how, "b": record(0.7, 2)}
    own = audits.against_base(records, 3.0)
    for name, one in records.items():
        base, candidate = ([row[side] for row in one["items"]] for side in audit.SIDES)
        last = monitor(base, candidate, alpha=ALPHA / 2).iloc[-1]
        [row] = own[own["name"].eq(name)].to_dict("records")
        assert [row["ci_low"], row["ci_high"]] == [last["ci_low"], last["ci_high"]]
        assert row["p_adjusted"] == pytest.approx(min(1, 2 * last["p"]))
    [pair] = audits.against_each_other(records, 3.0).to_dict("records")
    sides = [[row["candidate"] for row in one["items"]] for one in records.values()]
    assert pair["ci_low"] == monitor(*sides).iloc[-1]["ci_low"]


# ---- one rule
CHANGES = {  # shares of good answers, before and now
    "worse": (0.9, 0.5),
    "better": (0.5, 0.9),
    "no worse by the margin": (0.95, 0.95),
    "cannot tell": (0.6, 0.55),
}


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("word", CHANGES)
def test_a_change_has_one_word_in_every_comparison(word, sequential):
    """The same two sets of answers, as base and candidate of one audit, as the candidates of two
    audits side by side, and as those of an earlier and a later audit.
    """
    shares = {"safety": CHANGES[word]}
    scores = audited.scores(shares, n=400).assign(category="all")
    if word == audit.NO_WORSE:
        scores.loc[scores["side"].eq("candidate"), "score"] = scores["score"].iloc[:400].tolist()
    how = audited.HOW | {"sequential": sequential, "margin": 6.0}
    items = audit.moved(scores).to_dict("records")
    sides = {side: [row | {"candidate": row[side]} for row in items] for side in audit.SIDES}
    records = {side: audited.record([], rows, how=how) for side, rows in sides.items()}
    for one in records.values():
        one["verdicts"] = [audited.verdict(benchmark="safety")]
    decide = audit.watched_together if sequential else audit.compared
    [own] = decide(scores.assign(task="x"), 6.0).to_dict("records")
    [pair] = audits.against_each_other(records, 6.0).to_dict("records")
    [later] = since(records["candidate"], records["base"])["areas"]
    assert own["word"] == pair["word"] == later["word"] == word
    for end in ("ci_low", "ci_high"):
        assert own[end] == pytest.approx(pair[end]) == pytest.approx(later[end])
