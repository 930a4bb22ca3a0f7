"""The commands audit and repair: what broke is never read as a model that failed."""

import json

import pytest

from conftest import one_sentence
from driftbook.batch.notebooks import NotebookError
from driftbook.publishing import make_audit, make_repair
from driftbook.publishing.audit_gate import COULD_NOT_RUN, FAIL, PASS, UNDECIDED


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A place of its own for audits."""
    for module in (make_audit, make_repair):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(make_audit, "OUTPUTS", tmp_path / "outputs")
    return tmp_path


def stops_with(monkeypatch, error: Exception) -> None:
    def execute(*_):
        raise error

    monkeypatch.setattr(make_audit, "execute", execute)


STOPPED = "21_audit stopped in cell 2: {}: {}; see /o/audit/x/21_audit.ipynb"
ERRORS = {
    "no such adapter; see the folder": NotebookError(
        STOPPED.format("ValueError", "no such adapter; see the folder")
    ),
    "there is no server": NotebookError(STOPPED.format("EndpointError", "there is no server")),
    "21_audit stopped in cell 2: KeyError: 'x'": NotebookError(STOPPED.format("KeyError", "'x'")),
    "the audit could not run: RuntimeError: Kernel died": RuntimeError("Kernel died"),
    "no parameter 'x'": ValueError("no parameter 'x'"),
}


@pytest.mark.parametrize("said", ERRORS)
def test_a_notebook_that_stops_could_not_run(here, monkeypatch, said):
    stops_with(monkeypatch, ERRORS[said])
    found = make_audit.run_audit({"name": "x"})
    assert (found["status"], found["sentences"]) == (COULD_NOT_RUN, [said])


def test_an_error_that_nobody_foresaw_is_no_failed_model(capsys):
    def breaks() -> int:
        raise KeyError("x")

    assert make_audit.exit_status(breaks) == COULD_NOT_RUN
    assert "the audit could not run (KeyError)" in capsys.readouterr().err
    assert make_audit.exit_status(lambda: FAIL) == FAIL


@pytest.mark.parametrize(
    ("name", "value"),
    [("ADAPTER", 5000 * "x"), ("MODEL", f"/{300 * 'x'}"), ("ADAPTERS", f"a {300 * 'x'}")],
)
def test_a_name_that_is_too_long_for_any_path_is_one_sentence(monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    assert make_audit.exit_status(make_audit.main) == COULD_NOT_RUN
    said = one_sentence(capsys.readouterr().err)
    assert f"{name} has {len(value.split()[-1]):,} characters" in said


@pytest.mark.parametrize(
    ("statuses", "expected"), [((0, 2), UNDECIDED), ((1, 2), FAIL), ((0, 0), PASS)]
)
def test_conditions_decide_of_several_adapters_too(here, monkeypatch, capsys, statuses, expected):
    """By words the first comparison fails; by FAIL_IF it is what its conditions say."""
    monkeypatch.setenv("FAIL_IF", "safety<-50")
    monkeypatch.setattr(
        make_audit, "parameters", lambda env: {"name": env["ADAPTER"], "fail_if": env["FAIL_IF"]}
    )
    said = dict(zip("ab", statuses, strict=True))
    monkeypatch.setattr(
        make_audit,
        "run_audit",
        lambda given: {"status": said[given["name"]], "sentences": [f"{given['name']} is so"]},
    )
    monkeypatch.setattr(make_audit, "read_audit", lambda _: {"how": {"margin": 3.0}})
    monkeypatch.setattr(make_audit, "write_several", lambda *_: (FAIL,))
    assert make_audit._several(["a", "b"]) == expected
    assert "a: a is so" in capsys.readouterr().out
    ci = json.loads((here / "outputs" / "audit" / "compared" / "ci.json").read_text())
    assert (ci["status"], ci["sentences"]) == (expected, ["a: a is so", "b: b is so"])


@pytest.mark.parametrize("margin", ["nan", "inf", "0", "-3", "100", "wide"])
def test_a_margin_that_means_nothing_is_refused(margin):
    with pytest.raises(ValueError, match="MARGIN="):
        make_audit.parameters({"MARGIN": margin, "ADAPTER": "x"})


@pytest.mark.parametrize("kind", ["", "../../elsewhere", "resta"])
def test_a_repair_is_known_before_it_names_a_folder(here, monkeypatch, capsys, kind):
    monkeypatch.setenv("WITH", kind)
    monkeypatch.setattr(make_repair, "parameters", lambda _: {"name": "x", "adapter": "x"})
    one = make_repair.Candidate("adapter", "x", "x", here, None, None)
    monkeypatch.setattr(make_repair.audit_setup, "candidate", lambda *_: one)
    assert make_repair.main() == COULD_NOT_RUN
    assert "give rescale or safe_lora" in capsys.readouterr().err
    assert not [*here.iterdir()]


@pytest.mark.parametrize("template", ["", "base", "adapter"])
def test_a_repaired_copy_is_asked_by_the_template_that_was_chosen(here, template):
    """Each folder of an adapter may hold a template, which a repair does not copy."""
    for name in ("lora", "out"):
        (here / name).mkdir()
    (here / "lora" / "chat_template.jinja").write_text("{{ mine }}")
    one = make_repair.Candidate("adapter", "lora", "lora", here / "lora", None, None)
    before = {"name": "lora", "adapter": "lora"} | ({"template": template} if template else {})
    given = make_repair._of(before, one, here / "out")
    assert given.get("template", "") == template
    copied = (here / "out" / "chat_template.jinja").exists()
    assert copied == (template == "adapter")


def test_an_earlier_audit_is_not_read_as_one_that_could_not_begin(here, monkeypatch, capsys):
    folder = here / "outputs" / "audit" / make_audit.audit_setup.place_of("nowhere/lora", "")
    folder.mkdir(parents=True)
    for name in ("ci.json", "audit.html", "card.md", "model_card.md", "every_eval_ever.json"):
        (folder / name).write_text('{"status": 0}')
    (folder / "audit.json").write_text("an earlier record, which SINCE may name")
    monkeypatch.setenv("ADAPTER", "nowhere/lora")
    monkeypatch.setenv("FAIL_IF", "saftey<-3")
    assert make_audit.main() == COULD_NOT_RUN
    assert "names no area" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"ci.json", "audit.json"}
    ci = json.loads((folder / "ci.json").read_text())
    assert ci["status"] == COULD_NOT_RUN
    assert "names no area" in ci["sentences"][0]


def test_outputs_that_cannot_be_written_are_said_in_a_sentence(here, monkeypatch, capsys):
    (here / "outputs").write_text("a file where the folder should be")
    monkeypatch.setenv("ADAPTER", "lora")
    assert make_audit.main() == COULD_NOT_RUN
    assert one_sentence(capsys.readouterr().err).startswith("driftbook: ")


def test_until_an_audit_ends_it_has_not_passed(here, monkeypatch):
    """Whatever kills it: ci.json of the run before is gone, and says so."""
    seen = []

    def killed(*_):
        seen.append(json.loads((here / "outputs/audit/x/ci.json").read_text()))
        raise KeyboardInterrupt

    monkeypatch.setattr(make_audit, "execute", killed)
    with pytest.raises(KeyboardInterrupt):
        make_audit.run_audit({"name": "x"})
    assert seen[0]["status"] == COULD_NOT_RUN
    assert "has not ended" in seen[0]["sentences"][0]


def test_several_of_which_one_is_not_there_leave_nothing_that_looks_like_an_end(
    here, monkeypatch, capsys
):
    old = here / "outputs" / "audit" / "compared" / "audits_compared.md"
    old.parent.mkdir(parents=True)
    old.write_text("an earlier comparison")
    monkeypatch.setenv("ADAPTERS", "./a/lora ./b/lora")
    assert make_audit.main() == COULD_NOT_RUN
    assert "there is no such folder" in capsys.readouterr().err
    assert not old.exists()
    cis = sorted((here / "outputs" / "audit").glob("*/ci.json"))
    assert len(cis) == 3
    assert all("no such folder" in json.loads(one.read_text())["sentences"][0] for one in cis)


@pytest.mark.parametrize("fail_if", ["", "safety<-3"])
def test_what_was_found_is_said_wherever_outputs_lie(
    here, monkeypatch, capsys, tmp_path_factory, fail_if
):
    elsewhere = tmp_path_factory.mktemp("outputs")
    monkeypatch.setattr(make_audit, "OUTPUTS", elsewhere)
    given = {"name": "lora-0a1b2c"} | ({"fail_if": fail_if} if fail_if else {})
    monkeypatch.setattr(make_audit, "parameters", lambda _: given)
    found = {"status": UNDECIDED, "sentences": ["safety: cannot tell."]}
    found["verdicts"] = [{"sentence": "Safety: it fell by 2 points."}]
    monkeypatch.setattr(make_audit, "run_audit", lambda _: found)
    assert make_audit.main() == UNDECIDED
    said = capsys.readouterr().out
    assert said.startswith("asking lora and the base model the same prompts")
    assert "Safety: it fell by 2 points." in said
    assert ("safety: cannot tell." in said) == bool(fail_if)
    page = elsewhere / "audit" / "lora-0a1b2c" / "audit.html"
    assert said.endswith(f"cannot tell (status 2 in ci.json); see {page}\n")


def test_logs_and_an_adapter_are_not_one_audit(here, monkeypatch, capsys):
    monkeypatch.setenv("BASE_LOG", "a")
    monkeypatch.setenv("ADAPTER", "b")
    assert make_audit.main() == COULD_NOT_RUN
    assert "give ADAPTER= or two logs" in capsys.readouterr().err


def test_ci_reads_why_it_could_not_run(here, monkeypatch):
    stops_with(monkeypatch, ValueError("no"))
    make_audit.run_audit({"name": "x"})
    value = json.loads((here / "outputs" / "audit" / "x" / "ci.json").read_text())
    assert (value["status"], value["meaning"]) == (COULD_NOT_RUN, "could not run")
