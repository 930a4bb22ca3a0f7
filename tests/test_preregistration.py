"""What was declared before any answer was scored, and what was not: the register says which."""

import copy

import pytest

from conftest import SMALL
from driftbook.study import preregistration
from driftbook.study.study_file import Study

FAMILY = {"test": "change", "outcomes": ["unsafe"]}


@pytest.fixture
def study(monkeypatch, tmp_path):
    """Makes a study with these families in a folder of its own."""
    monkeypatch.setattr(Study, "folder", property(lambda self: tmp_path))
    return lambda **families: Study(**copy.deepcopy(SMALL) | {"primary": families})


def scored(tmp_path, run: str) -> None:
    path = tmp_path / "runs" / run / "verdicts.parquet"
    path.parent.mkdir(parents=True)
    path.touch()


def test_a_family_declared_before_any_score_is_no_deviation_and_is_registered_once(study, tmp_path):
    this = study(safety=FAMILY)
    preregistration.register(this)
    scored(tmp_path, "a")
    preregistration.register(this)
    [entry] = preregistration.registered(this)
    assert entry["runs_scored"] == 0
    assert entry["hash"] == preregistration.digest(preregistration.declared(this))
    assert preregistration.deviations(this) == []


def test_what_changed_before_any_score_is_no_deviation(study):
    preregistration.register(study(safety=FAMILY))
    this = study(safety=FAMILY | {"bases": "each"})
    preregistration.register(this)
    assert len(preregistration.registered(this)) == 2
    assert preregistration.deviations(this) == []


def test_what_is_added_changed_or_dropped_after_a_score_is_said(study, tmp_path):
    preregistration.register(study(safety=FAMILY, gone=FAMILY))
    scored(tmp_path, "a")
    scored(tmp_path, "b")
    this = study(safety=FAMILY | {"outcomes": ["unsafe", "over_refusal"]}, late=FAMILY)
    preregistration.register(this)
    late, changed, gone = preregistration.deviations(this)
    assert "late: declared when 2 runs had been scored" in late
    assert (
        "safety: changed when 2 runs had been scored: outcomes was ['unsafe'] and is ['unsafe',"
        " 'over_refusal']" in changed
    )
    assert gone == "gone: declared at first, and no longer tested"


def test_a_change_of_the_study_itself_after_a_score_is_a_deviation(study, tmp_path):
    preregistration.register(study(safety=FAMILY))
    sample = tmp_path / "runs" / "a" / "checkpoints" / "drift.json"  # looked at while it trains
    sample.parent.mkdir(parents=True)
    sample.touch()
    this = study(safety=FAMILY)
    changed = copy.deepcopy(SMALL) | {"primary": {"safety": FAMILY}}
    judge = next(iter(changed["judges"].values()))
    judge["threshold"] = 0.9
    changed["grid"][0]["seeds"] = [*changed["grid"][0]["seeds"], 99]
    later = Study(**changed)
    preregistration.register(later)
    assert [entry["runs_scored"] for entry in preregistration.registered(later)] == [0, 1]
    assert preregistration.deviations(this) == []
    grid, judges = preregistration.deviations(later)
    assert grid.startswith("grid: changed when 1 runs had been scored")
    assert "seeds was" in grid
    assert "99" in grid
    assert "threshold was 0.5 and is 0.9" in judges


def test_without_a_register_every_family_is_exploratory(study):
    [sentence] = preregistration.deviations(study(safety=FAMILY))
    assert "never registered" in sentence
    assert preregistration.deviations(study()) == []


def test_the_hash_changes_with_any_part_of_a_family(study):
    hashes = {
        preregistration.digest(preregistration.declared(study(safety=FAMILY | change)))
        for change in ({}, {"bases": "each"}, {"group": "trained"}, {"methods": ["lora"]})
    }
    assert len(hashes) == 4
