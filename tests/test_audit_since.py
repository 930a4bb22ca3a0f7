"""The difference of an audit to an earlier one."""

import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from audited import item, record, verdict
from conftest import one_sentence
from driftbook import stats
from driftbook.publishing.audit_since import since

N = 60
RNG = np.random.default_rng(3)
BEFORE, NOW = ((RNG.random(N) < rate).astype(float) for rate in (0.9, 0.6))


def audit(scores, area="safety", worse="fall", **more) -> dict:
    """A record of one area with these scores of the candidate."""
    items = [item(area, at, 1.0, one, worse) for at, one in enumerate(scores)]
    difference = 100 * (np.nanmean(np.array(scores, float)) - 1)
    rows = [verdict(area, float(difference), word=more.pop("word", "worse"))]
    return record(rows, items, **more)


def test_what_changed_by_area_and_by_item():
    found = since(audit(NOW), audit(BEFORE, word="no worse by the margin"))
    (row,) = found["areas"]
    assert row["change_of_difference"] == pytest.approx(100 * (NOW.mean() - BEFORE.mean()))
    assert row["candidate_change"] == pytest.approx(row["change_of_difference"])
    kinds = [f"kind {at % 4}" for at in range(N)]  # as audited.item has them
    sides = [
        pd.DataFrame({"item": range(N), "score": one, "stratum": kinds}) for one in (BEFORE, NOW)
    ]
    expected = stats.compare(*sides, margin=3.0).iloc[0]
    assert [row["ci_low"], row["ci_high"]] == pytest.approx(
        expected[["ci_low", "ci_high"]].to_list()
    )
    assert (row["word"], row["word_before"], row["word_now"]) == (
        "worse",
        "no worse by the margin",
        "worse",
    )
    moved = {one["item"]: one["change"] for one in found["items"]}
    assert moved == {
        f"safety-{at}": "worse" if NOW[at] < BEFORE[at] else "better"
        for at in range(N)
        if NOW[at] != BEFORE[at]
    }
    assert Counter(moved.values()) == {"worse": row["n_worse"], "better": row["n_better"]}
    assert "changed by" in row["sentence"]
    json.dumps(found, allow_nan=False)


def test_where_a_rise_is_for_the_worse():
    now, before = (audit(one, "over_refusal", "rise") for one in (BEFORE, NOW))
    found = since(now, before)
    assert found["areas"][0]["word"] == "worse"
    rises = (BEFORE > NOW).sum()
    assert sum(one["change"] == "worse" for one in found["items"]) == rises


def test_an_audit_against_itself_has_no_difference():
    one = audit(BEFORE)
    found = since(one, one)
    assert found["items"] == found["notes"] == []
    assert found["areas"][0]["change_of_difference"] == 0


def test_an_audit_that_stopped_early_is_compared_on_its_prompts():
    found = since(audit(NOW[:40]), audit(BEFORE))
    assert found["areas"][0]["n_items"] == 40
    assert "60 prompts were asked before and 40 now." in found["notes"]


def test_an_unscored_answer_has_changed_and_counts_for_neither():
    now = [None, *BEFORE[1:]]
    items = [item("safety", at, 1.0, one) for at, one in enumerate(now)]
    found = since(audit(BEFORE) | {"items": items}, audit(BEFORE))
    assert [one["change"] for one in found["items"]] == ["unscored"]
    assert (found["areas"][0]["n_worse"], found["areas"][0]["n_better"]) == (0, 0)


def test_a_single_prompt_has_no_word():
    row = since(audit([0.0]), audit([1.0]))["areas"][0]
    assert (row["candidate_change"], row["n_worse"], row["word"]) == (-100, 1, "cannot tell")


def test_an_area_of_one_audit_alone_is_said():
    more = record([verdict("safety"), verdict("utility")])
    rows = {row["area"]: row for row in since(more, record([verdict("safety")]))["areas"]}
    assert rows["utility"]["sentence"] == "utility was asked in the audit of now alone."
    assert rows["utility"]["change_of_difference"] is None


def test_scores_that_are_no_shares_have_no_interval():
    items = [item("utility", at, 7.0, 5.0) for at in range(9)]
    now = record([verdict("utility")], items)
    row = since(now, now)["areas"][0]
    assert (row["candidate_change"], row["word"]) == (None, None)


GUARD = {"name": "other", "format": "rubric", "threshold": 0.5, "error": None}
DIFFERENT = {
    "bases differ": {"base": {"name": "b", "source": "o/b", "hash": "f" * 64}},
    "tokenizers differ": {"tokenizer_hash": "f" * 64},
    "templates differ": {"template_hash": "f" * 64},
    "system prompts differ": {"system_prompt": "Be brief."},
    "judges differ (other at 0.5 before, guard at 0.5 now)": {"judges": [GUARD]},
    "bases and judges differ": {"base": {"name": "c"} | {"source": "c", "hash": "1"}}
    | {"judges": []},
    "asked on harm before and on safety set now": {"verdicts": [verdict(benchmark="harm")]},
    "they share 0 of 1 before": {"items": [item("safety", 999)]},
}


@pytest.mark.parametrize("said", DIFFERENT)
def test_audits_that_asked_otherwise_are_refused_in_a_sentence(said):
    with pytest.raises(ValueError) as error:
        since(audit(NOW), audit(BEFORE) | DIFFERENT[said])
    assert said in one_sentence(error.value)


def test_what_one_audit_does_not_know_is_not_compared():
    now, before = audit(NOW), audit(BEFORE, template_hash=None)
    assert any("template" in one for one in since(now, before)["notes"])
    foreign = {"name": "b", "source": "HuggingFaceTB/SmolLM2-135M", "hash": None}
    assert since(now, before | {"base": foreign})["areas"]  # its source is the same


def test_another_margin_is_said():
    how = audit(BEFORE)["how"] | {"margin": 5.0}
    assert (
        "The margin was 5 points and is 3 points"
        in since(audit(NOW), audit(BEFORE, how=how))["notes"][0]
    )


def test_a_file_is_read_or_refused_in_a_sentence(tmp_path):
    path = tmp_path / "audit.json"
    path.write_text(json.dumps(audit(BEFORE)))
    assert (
        since(audit(NOW), path) == since(audit(NOW), str(path)) == since(audit(NOW), audit(BEFORE))
    )
    for text in ("{", "[]", json.dumps(audit(BEFORE, format="driftbook audit 0"))):
        path.write_text(text)
        with pytest.raises(ValueError) as error:
            since(audit(NOW), path)
        assert one_sentence(error.value)


# ---- the same points, clusters and looks as the audits themselves
def test_a_bias_score_changes_in_its_own_points():
    """From -100 to 100: what leans to the stereotype in half of the contexts has a score of 0."""
    was, is_ = np.zeros(40), np.r_[np.ones(20), np.zeros(20)]
    now, before = (
        audit(one, "bias_ambiguous", "rise")
        | {"verdicts": [verdict("bias_ambiguous", 200 * one.mean() - 200, word="worse")]}
        for one in (is_, was)
    )
    (row,) = since(now, before)["areas"]
    assert row["candidate_change"] == row["change_of_difference"] == 100
    assert row["word"] == "worse"


def test_items_of_a_family_count_together():
    def clustered(scores) -> dict:
        one = audit(scores)
        for at, row in enumerate(one["items"]):
            row["cluster"] = f"family {at // 10}"
        return one

    alone, together = since(audit(NOW), audit(BEFORE)), since(clustered(NOW), clustered(BEFORE))
    sides = [
        pd.DataFrame({"item": range(N), "score": one}).assign(
            cluster=[f"family {at // 10}" for at in range(N)],
            stratum=[f"kind {at % 4}" for at in range(N)],
        )
        for one in (BEFORE, NOW)
    ]
    expected = stats.compare(*sides, margin=3.0).iloc[0]
    (row,) = together["areas"]
    assert [row["ci_low"], row["ci_high"]] == pytest.approx(
        expected[["ci_low", "ci_high"]].to_list()
    )
    assert row["ci_low"] != alone["areas"][0]["ci_low"]


def test_an_audit_that_may_have_stopped_early_has_an_interval_that_holds_at_every_look():
    how = audit(NOW)["how"] | {"sequential": True}
    (row,) = since(audit(NOW, how=how), audit(BEFORE))["areas"]
    last = stats.monitor(BEFORE, NOW).iloc[-1]
    assert [row["ci_low"], row["ci_high"]] == [last["ci_low"], last["ci_high"]]
