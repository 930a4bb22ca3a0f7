"""Several audits of one base model: adjusted together, against the base and against each other."""

import pandas as pd
import pytest

from driftbook.analyses import audit, audits
from driftbook.publishing.audit_gate import FAIL
from driftbook.publishing.audit_several import write_several
from test_audit import made


def record(rate: float, seed: int) -> dict:
    """An audit of one area, of a candidate with this rate; base answers are all alike."""
    scores = made({"safety": (0.9, rate)}, seed=0)
    mine = made({"safety": (0.9, rate)}, seed=seed)
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
    assert pairs["Safety"]["good against bad"].endswith("worse")
    assert (tmp_path / "audits.png").stat().st_size > 1_000
    assert "good against bad" in (tmp_path / "audits_compared.md").read_text()


def test_tests_are_adjusted_over_all_comparisons():
    one = audits.against_base({"a": record(0.7, 1)}, 3.0)
    five = audits.against_base({str(n): record(0.7, 1) for n in range(5)}, 3.0)
    assert five["p_adjusted"].iloc[0] == pytest.approx(5 * one["p_adjusted"].iloc[0])


def test_audits_of_another_base_are_refused():
    other = record(0.9, 2) | {"base": {"hash": "c"}}
    with pytest.raises(ValueError, match="were not audited alike: their base differs"):
        audits.check_together({"a": record(0.9, 1), "b": other})
