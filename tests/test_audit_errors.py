"""How often an audit errs is measured on sides that change places by a fair coin."""

import numpy as np
import pytest
from bench import audit_errors

import audited
from driftbook.analyses import audit
from driftbook.stats.words import WORSE


@pytest.fixture(scope="module")
def record() -> dict:
    """An audit of two areas of one benchmark, whose candidate is plainly worse in both."""
    scores = audited.scores({"accuracy": (0.9, 0.4), "bias_ambiguous": (0.1, 0.6)}, n=60)
    number = scores["item"].str.extract(r"(\d+)$")[0].astype(int)
    scores = scores.assign(item="item " + number.astype(str))
    scores["cluster"] = "family " + (number // 3).astype(str)
    assert audit.decided(scores, 3.0)["word"].eq(WORSE).all()
    return audited.record(items=audit.moved(scores).to_dict("records"))


def test_sides_change_places_by_whole_clusters_and_in_all_areas_alike(record):
    scores = audit_errors.scores_of(record)
    drawn = audit_errors.swapped(scores, np.random.default_rng(1))
    turned = scores.assign(turned=drawn["side"].ne(scores["side"]))
    by_cluster = turned.groupby("cluster")["turned"].agg(["min", "max"])
    assert by_cluster["min"].equals(by_cluster["max"])
    assert 3 < by_cluster["max"].sum() < 17  # of 20
    assert drawn["score"].equals(scores["score"])


def test_an_audit_of_swapped_sides_seldom_says_that_anything_moved(record):
    found = audit_errors.false_alarms(record, 6)
    assert found["sets"].eq(6).all()
    assert found["false alarms"].le(0.2).all()  # unswapped it is 1
