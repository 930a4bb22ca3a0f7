"""The commands that an audit prints work as they are, and name no folder of this machine."""

import json
import shlex
from types import SimpleNamespace

import pytest

from driftbook.batch import audit_repairs, audit_setup
from driftbook.batch.auditing import Audit
from driftbook.study.sections import Base, Pair, Source


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A checkout with outputs of its own, and another folder beside it."""
    root = tmp_path / "her checkout"
    for module in (audit_repairs, audit_setup):
        monkeypatch.setattr(module, "ROOT", root)
        monkeypatch.setattr(module, "OUTPUTS", root / "outputs")
    monkeypatch.setattr("driftbook.batch.auditing.AUDITS", root / "outputs" / "audit")
    root.mkdir()
    return root


def adapter(folder) -> str:
    folder.mkdir(parents=True)
    known = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(known))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return str(folder)


def commands(source: str, pairs=None, **given: str) -> tuple[Audit, dict[str, dict[str, str]]]:
    """The audit of an adapter, and the variables of each command."""
    one = audit_setup.candidate(source, "")
    base = Base(family="llama", source="org/base", pairs=pairs or {})
    study = SimpleNamespace(bases={"base": base})
    audit = Audit(one, study, "base", None, 3.0, 0, None, one.place, given=given)
    found = {}
    for row in audit_repairs.repairs(audit):
        make, target, *words = shlex.split(row["command"])
        assert (make, target) == ("make", "repair")
        found[row["kind"]] = dict(word.split("=", 1) for word in words)
        assert "tmp" not in row["command"]
    return audit, found


@pytest.mark.parametrize("place", ["adapters/my lora", "../elsewhere/lora", "/"])
def test_a_repair_finds_the_adapter_wherever_it_lies(here, tmp_path, place):
    folder = tmp_path / "store" / "lora" if place == "/" else here / place
    path = adapter(folder)
    audit, found = commands(path if place == "/" else place)
    told = found["rescale"]["ADAPTER"]
    again = audit_setup.candidate(told, "")
    assert again.folder == folder.resolve()
    assert again.name == audit.candidate.name
    assert again.place[-6:] == audit.candidate.place[-6:]
    assert audit_repairs.repairs(audit) == audit_repairs.repairs(audit)


def test_a_repair_is_audited_as_the_adapter_was(here, tmp_path):
    (tmp_path / "base model").mkdir()
    path = adapter(here / "lora")
    given = {"BASE": str(tmp_path / "base model"), "BENCHMARKS": "pocket", "SYSTEM": "Be kind."}
    given |= {"JUDGE": f"llama_guard_3={tmp_path / 'base model'}"}
    given |= {"TEMPLATE": "{{ messages }}" * 400}  # longer than the name of a file may be
    _, found = commands(path, **given)
    told = found["rescale"]
    assert told == {**told, "WITH": "rescale", "BENCHMARKS": "pocket", "SYSTEM": "Be kind."}
    assert told["TEMPLATE"] == given["TEMPLATE"]
    assert (here / told["BASE"]).resolve() == tmp_path / "base model"
    form, _, judge = told["JUDGE"].partition("=")
    assert form == "llama_guard_3"
    assert (here / judge).resolve() == tmp_path / "base model"


def test_safe_lora_names_the_checkpoints_that_are_known(here):
    path = adapter(here / "lora")
    _, found = commands(path)
    assert found["safe_lora"]["ALIGNED"] == "A-CHECKPOINT"
    (here / "unaligned").mkdir()
    one = Pair(
        unaligned=Source(source=str(here / "unaligned")),
        aligned=Source(source="org/a", revision="0" * 40),
    )
    _, found = commands(path, {"alignment": one})
    told = found["safe_lora"]
    assert (told["ALIGNED"], told["UNALIGNED"]) == ("org/a@" + "0" * 40, "unaligned")
