"""An audit of logs that exist, as a function, as a command, and as a workflow's steps."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml

from conftest import one_sentence
from driftbook import stats
from driftbook.publishing import audit_logs as logs
from driftbook.publishing.audit_card import card_section
from driftbook.publishing.audit_formats import every_eval_ever
from driftbook.publishing.audit_gate import FAIL, PASS, UNDECIDED, gate
from driftbook.publishing.audit_record import checked_audit
from driftbook.study.files import ROOT
from test_two_models import write_log
from test_two_models_logs import evaluated

N = 200
RNG = np.random.default_rng(5)
HARD = RNG.random(N)
ACC = ("acc", "none")


def answers(rate: float) -> list[float]:
    """Scores of N documents, the easy ones right."""
    return (rate > HARD).astype(float).tolist()


@pytest.fixture
def folders(tmp_path):
    """Logs of lm-eval of a base, of a candidate that lost 20 points, and of one that lost none."""
    for name, rate in {"base": 0.8, "worse": 0.6, "same": 0.8}.items():
        write_log(tmp_path / name, {ACC: answers(rate)}, task="harmful")
        write_log(tmp_path / name, {ACC: answers(0.5)}, task="gsm8k")
        better = {"harmful": {"acc": True}, "gsm8k": {"acc": True}}
        results = {"results": {}, "higher_is_better": better, "model_name": f"org/{name}"}
        results |= {"chat_template_sha": "f" * 64, "system_instruction": "Be brief."}
        (tmp_path / name / "results_2026-01-01T00-00-00.json").write_text(json.dumps(results))
    return tmp_path


# ---- the record
def test_a_record_of_logs_has_their_comparison(folders):
    made = checked_audit(logs.from_logs(folders / "base", folders / "worse"))
    expected = stats.compare(folders / "base", folders / "worse").set_index("task")
    rows = {row["area"]: row for row in made["verdicts"]}
    assert set(rows) == set(expected.index) == {"harmful", "gsm8k"}
    for name in ("difference", "ci_low", "ci_high", "p_adjusted", "sentence"):
        assert rows["harmful"][name] == expected.loc["harmful", name]
    assert (rows["harmful"]["word"], rows["harmful"]["worse"]) == ("worse", "fall")
    assert rows["gsm8k"]["word"] == "no worse by the margin"
    assert made["candidate"]["source"] == "org/worse"
    assert (made["template_hash"], made["system_prompt"]) == ("f" * 64, "Be brief.")
    assert [made["how"][key] for key in ("seed", "margin", "level")] == [None, 3.0, 0.95]
    json.dumps(made, allow_nan=False)
    assert str(folders) not in json.dumps(made)
    assert gate(made)[0] == FAIL


def test_items_are_paired_by_document(folders):
    made = logs.from_logs(folders / "base", folders / "worse")
    items = [one for one in made["items"] if one["area"] == "harmful"]
    found = {int(one["item"]): one["change"] for one in items}
    assert found == {
        at: "worse" if base > candidate else "same"
        for at, (base, candidate) in enumerate(zip(answers(0.8), answers(0.6), strict=True))
    }
    row = next(one for one in made["verdicts"] if one["area"] == "harmful")
    changes = [one["candidate"] - one["base"] for one in items]
    assert 100 * np.mean(changes) == pytest.approx(row["difference"])


def test_where_lower_is_better_a_rise_is_for_the_worse(tmp_path):
    for name, rate in (("base", 0.2), ("candidate", 0.5)):
        write_log(tmp_path / name, {ACC: answers(rate)})
    made = logs.from_logs(tmp_path / "base", tmp_path / "candidate", higher_is_better=False)
    (row,) = made["verdicts"]
    assert (row["worse"], row["word"]) == ("rise", "worse")
    assert {one["change"] for one in made["items"]} == {"worse", "same"}


@pytest.mark.slow
def test_a_log_of_inspect_is_read(tmp_path):
    for name, rate in (("base", 0.9), ("candidate", 0.4)):
        evaluated(tmp_path / name, [[one > 0] for one in answers(rate)[:40]])
    made = checked_audit(logs.from_logs(tmp_path / "base", tmp_path / "candidate", stratum="topic"))
    assert (made["verdicts"][0]["area"], made["candidate"]["name"]) == ("toy", "m/m")
    assert {one["category"] for one in made["items"]} == {str(at) for at in range(10)}


def test_an_item_without_a_score_is_unscored(tmp_path):
    write_log(tmp_path / "base", {ACC: answers(0.8)})
    write_log(tmp_path / "candidate", {ACC: [None, *answers(0.8)[1:]]})
    made = logs.from_logs(tmp_path / "base", tmp_path / "candidate")
    assert [one["change"] for one in made["items"]].count("unscored") == 1
    assert (made["verdicts"][0]["n_unscored"], made["verdicts"][0]["n_available"]) == (1, N)


def test_the_prompts_that_it_would_take_are_about_enough(tmp_path):
    scores = {}
    for n in (60, 2000):
        rng = np.random.default_rng(1)
        base, noise = rng.random(n) < 0.5, rng.random(n) < 0.06
        for name, one in (("base", base), ("candidate", base ^ noise)):
            scores[n, name] = one.astype(float).tolist()
            write_log(tmp_path / f"{n} {name}", {ACC: scores[n, name]})
    made = {
        n: logs.from_logs(tmp_path / f"{n} base", tmp_path / f"{n} candidate") for n in (60, 2000)
    }
    (row,), (large,) = made[60]["verdicts"], made[2000]["verdicts"]
    assert row["word"] == "cannot tell"
    assert 60 < row["needed"] < 2000
    assert (large["word"], large["needed"]) == ("no worse by the margin", None)


def test_every_other_form_can_be_made_of_it(folders):
    made = logs.from_logs(folders / "base", folders / "worse")
    assert "the scores of the logs" in card_section(made)
    assert every_eval_ever(made)["model_info"]["additional_details"]["kind"] == "log"


# ---- as a command
@pytest.fixture
def here(folders, monkeypatch):
    monkeypatch.setattr(logs, "OUTPUTS", folders / "outputs")
    monkeypatch.chdir(folders)
    return folders


CASES = {
    PASS: ("same", "harmful<-5,gsm8k<-5"),
    FAIL: ("worse", "harmful<-5"),
    UNDECIDED: ("worse", "harmful<-20"),
}


@pytest.mark.parametrize("status", CASES)
def test_the_exit_status_is_the_gates(here, status):
    name, fail_if = CASES[status]
    pairs = ("BASE_LOG=base", f"CANDIDATE_LOG={name}", f"FAIL_IF={fail_if}", "NAME=mine")
    assert logs.main(*pairs) == status
    folder = here / "outputs" / "audit" / "mine"
    assert json.loads((folder / "ci.json").read_text())["status"] == status
    names = {path.name for path in folder.iterdir()}
    made = {"audit.json", "card.md", "model_card.md", "every_eval_ever.json", "ci.json"}
    assert names == {*made, "audit.html"}
    assert "The scores are those of the logs." in (folder / "audit.html").read_text()


def test_the_last_accepted_audit_is_compared(here):
    assert logs.main("BASE_LOG=base", "CANDIDATE_LOG=same", "FAIL_IF=harmful<-5") == PASS
    accepted = here / "accepted.json"
    (here / "outputs" / "audit" / "logs" / "audit.json").rename(accepted)
    pairs = ("BASE_LOG=base", "CANDIDATE_LOG=worse", "FAIL_IF=harmful<-5", f"SINCE={accepted}")
    assert logs.main(*pairs) == FAIL
    found = json.loads((here / "outputs" / "audit" / "logs" / "ci.json").read_text())["since"]
    changed = sum(one != other for one, other in zip(answers(0.8), answers(0.6), strict=True))
    assert len(found["items"]) == changed
    assert {one["change"] for one in found["items"]} == {"worse"}


WRONG = {
    "BASE_LOG is not given": ["CANDIDATE_LOG=worse"],
    "is not there": ["BASE_LOG=nowhere", "CANDIDATE_LOG=worse"],
    "names no area in 'safety<-3'; the areas are": ["FAIL_IF=safety<-3"],
    "MARGIN='-3'": ["MARGIN=-3"],
    "MARGIN='wide'": ["MARGIN=wide"],
    "BETTER='more'": ["BETTER=more"],
    "NAME='../x'": ["NAME=../x"],
    "'ADAPTER' is no setting": ["ADAPTER=x"],
    "has no metric 'f1'": ["METRIC=f1"],
    "task 'mmlu'": ["METRIC=mmlu=acc"],
    "nothing.json is no file": ["SINCE=nothing.json"],
    "different prompts": ["CANDIDATE_LOG=asked"],
}


@pytest.mark.parametrize("said", WRONG)
def test_what_cannot_run_exits_with_3_and_a_sentence(here, capsys, said):
    write_log(here / "asked", {ACC: answers(0.8)}, task="harmful", prompt_hash="other")
    write_log(here / "asked", {ACC: answers(0.8)}, task="gsm8k")
    old = here / "outputs" / "audit" / "logs" / "ci.json"
    old.parent.mkdir(parents=True)
    old.write_text('{"status": 0}')
    pairs = ["BASE_LOG=base", "CANDIDATE_LOG=worse", *WRONG[said]]
    pairs = WRONG[said] if "BASE_LOG" in said or "BASE_LOG=nowhere" in WRONG[said] else pairs
    assert logs.main(*pairs) == 3
    assert said in one_sentence(capsys.readouterr().err)
    assert json.loads(old.read_text())["status"] == 3
    assert not (old.parent / "audit.json").exists()


# ---- the workflow
WORKFLOW = ROOT / "data" / "audit_workflow.yml"


def steps() -> tuple[dict[str, str], list[str]]:
    """The workflow's own variables, and the commands of its steps."""
    job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["audit"]
    return job["env"], [step["run"] for step in job["steps"] if "run" in step]


@pytest.mark.parametrize(("candidate", "expected"), [("worse", 1), ("nothing", 3)])
def test_the_steps_of_the_workflow_pass_on_the_status(folders, candidate, expected):
    """As GitHub runs them: each in a bash of its own that stops at the first failure. `make` is
    replaced by the command behind `make audit`, with make's own exit status.
    """
    variables, commands = steps()
    tools = folders / "tools"
    tools.mkdir()
    made = (
        f'#!/bin/sh\nshift\n"{sys.executable}" -m driftbook.publishing.audit_logs "$@" || exit 2\n'
    )
    (tools / "make").write_text(made)
    (tools / "make").chmod(0o755)
    own = {key: str(value) for key, value in variables.items()}
    own |= {"BASE_LOG": "base", "CANDIDATE_LOG": candidate, "PYTHONPATH": str(ROOT / "lib")}
    own |= {"PATH": f"{tools}:{os.environ['PATH']}", "DRIFTBOOK_OUTPUTS": str(folders / "outputs")}
    own |= {"GITHUB_STEP_SUMMARY": str(folders / "summary.md")}
    codes = [
        subprocess.run(["bash", "-e", "-c", one], cwd=folders, env=os.environ | own).returncode
        for one in commands
    ]
    assert codes == [0, 0, expected]
    assert (folders / "summary.md").exists() == (expected != 3)


def test_the_workflow_lets_no_text_of_others_into_a_shell():
    assert all("${{" not in command for command in steps()[1])
