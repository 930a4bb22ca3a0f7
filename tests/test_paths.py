"""Folders and files of any name: what is run gets each path as it is, or a sentence refuses it."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import one_sentence
from driftbook.batch import make_study, notebooks
from driftbook.study import code
from driftbook.study.files import ROOT, check_path, expanded
from driftbook.study.sections import Source
from driftbook.study.study_file import Study, load

ODD = 'my work, ü\'x $y #1 "q" & `a` [1] (é) 日本 %s !'


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The project in a folder of an odd name."""
    root = tmp_path / ODD / "a: b"
    root.mkdir(parents=True)
    for name in ("lib", "notebooks", "studies", "profiles", "data", "Snakefile"):
        (root / name).symlink_to(ROOT / name)
    return root


# what Snakemake would run, with a study in the odd folder
CODE = """
import subprocess, sys
from driftbook.batch import plan
from driftbook.batch.make_study import snakemake
from driftbook.study.files import ROOT
from driftbook.study.study_file import load
study = ROOT / "my study # 1: ü $x.yaml"
study.write_text((ROOT / "studies" / "miniature.yaml").read_text())
plan.write(load(study))
command = snakemake(study, "local", [])
at = command.index("--")
command[at:at] = ["--dry-run", "--printshellcmds"]
sys.exit(subprocess.run(command, cwd=ROOT).returncode)
"""


@pytest.mark.slow
def test_every_job_gets_its_paths_as_they_are(checkout):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "lib"),
        "DRIFTBOOK_ROOT": str(checkout),
        "DRIFTBOOK_OUTPUTS": str(checkout / "outputs"),
    }
    command = [sys.executable, "-c", CODE]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    said = [line.strip() for line in (ended.stdout + ended.stderr).splitlines()]
    jobs = [shlex.split(line.partition(": ")[2]) for line in said if "warm notebook" in line]
    assert len(jobs) > 5
    for python, _, _, _, notebook, log, parameters, *more in jobs:
        assert python == sys.executable
        assert Path(notebook).is_file()
        assert Path(notebook).parent == checkout / "notebooks"
        assert log.startswith("notebooks/")
        assert json.loads(parameters)["study"] == str(checkout / "my study # 1: ü $x.yaml")
        assert not more or more[:1] == ["&&"] or len(more) == 2


def test_make_hands_on_what_it_is_told(tmp_path):
    root = tmp_path / ODD
    (root / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    python = root / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$PATH" "$@"\n')
    python.chmod(0o755)
    (root / ".venv" / ".installed").touch()
    study = f"studies/{ODD}; $(HOME) $${{x}}.yaml"
    environment = {name: os.environ[name] for name in ("PATH",)}
    for given in ([f"STUDY={study}"], []):
        more = {} if given else {"STUDY": study}
        ended = subprocess.run(
            ["make", "study", *given],
            cwd=root,
            env=environment | more,
            capture_output=True,
            text=True,
        )
        path, *arguments = ended.stdout.splitlines()
        assert arguments == ["-m", "driftbook.batch.make_study", study, "local"], ended.stderr
        assert path.startswith(f"{root}/.venv/bin:")
    hostile = """x'"; touch ran; $(touch ran) `touch ran` $(shell touch ran) #"""
    for target in ("plan", "calibrate", "export", "report", "publish", "purge", "audit", "repair"):
        told = [f"{name}={hostile}" for name in ("STUDY", "PROFILE", "ADAPTER", "DEVICE")]
        ended = subprocess.run(
            ["make", target, *told], cwd=root, env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        assert target in ("audit", "repair") or hostile in ended.stdout.splitlines()
        assert not (root / "ran").exists(), target


def test_papermill_reads_a_notebook_in_braces(tmp_path):
    path = tmp_path / "{a} $b" / "07.ipynb"
    path.parent.mkdir()
    shutil.copy(ROOT / "notebooks" / "07_utility.ipynb", path)
    notebooks.check_parameters(path, {"study": "x"})


def test_the_code_of_a_notebook_is_known_wherever_it_is(tmp_path):
    path = tmp_path / "c # 1" / "07_utility.ipynb"
    path.parent.mkdir()
    shutil.copy(ROOT / "notebooks" / "07_utility.ipynb", path)
    there, here = (
        code.by_file(code.of_notebook(one, "done"))
        for one in (path, ROOT / "notebooks" / path.name)
    )
    assert sorted(there.values()) == sorted(here.values())


def test_what_no_command_could_carry_is_refused_before_anything_starts(tmp_path, capsys, content):
    check_path(Path(ODD), "the checkout")
    for mark in ("{", "}", "\n", "\x07", "\udce9"):
        with pytest.raises(ValueError) as error:
            check_path(tmp_path / f"a{mark}b", "the checkout")
        assert repr(mark) in one_sentence(error.value)
    file = tmp_path / "{a}.yaml"
    file.write_text("name: x")
    assert make_study.main(str(file)) == 2
    assert "the study file" in capsys.readouterr().err


def test_a_dollar_is_a_variable_in_braces_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(tmp_path / "a $b"))
    monkeypatch.setenv("y", "elsewhere")
    assert expanded("${PLACE}/c $y") == f"{tmp_path}/a $b/c $y"
    monkeypatch.setenv("EMPTY", "")
    assert expanded("${EMPTY}/c") is expanded("${NOT_SET}/c") is None
    assert Source(source="a/b", path="${PLACE}/c").local == tmp_path / "a $b" / "c"
    assert Source(source="a/b", path="${NOT_SET}/c").local is None
    assert Source(source="a/b", path=str(tmp_path / "$y")).local == tmp_path / "$y"


NAMED = ("bases", "twins", "judges", "raters", "data", "benchmarks", "primary", "mitigations")
SIGNS = (
    "{b}",
    "/b",
    "\n",
    "$(b)",
    "`b`",
    "'",
    '"',
    ";",
    "<b>",
    "[b](javascript:b)",
    "|",
    "*",
    "\\",
)


def named(content: dict, section: str, name: str) -> dict:
    """The content with one more part of a section, under this name."""
    like = next(iter(content.get(section, {}).values()), {})
    return content | {section: content.get(section, {}) | {name: like}}


@pytest.mark.parametrize("section", NAMED)
def test_a_name_is_checked_by_one_pattern_wherever_a_study_file_gives_one(content, section):
    for name in (
        *(f"a{sign}" for sign in SIGNS),
        ".a",
        "../a",
        "-a",
        " a",
        "a ",
        "a" * 61,
        "é" * 31,
    ):
        with pytest.raises(ValueError, match="is no name; a name has letters"):
            Study(**named(content, section, name))


def test_every_other_name_is_checked_too(content):
    bad = "<img src=x>"
    base, benchmark = content["bases"]["tiny-llama"], content["benchmarks"]["safety"]
    for part, change in (
        (base, {"family": bad}),
        (base, {"pairs": {bad: {"unaligned": {"source": "a/b"}}}}),
        (benchmark, {"wordings": {bad: {"system_prompt": "x"}}}),
        (content["grid"][0], {"name": bad}),
    ):
        before = dict(part)
        part.update(change)
        with pytest.raises(ValueError, match="is no name; a name has letters"):
            Study(**content)
        part.clear()
        part.update(before)
    Study(**named(content, "data", "日本 (été) 1.5, a+b_c-d"))


@pytest.mark.parametrize("name", ["HF_TOKEN", "OPENAI_API_KEY", "my_password", "AWS_SECRET"])
def test_no_path_holds_a_secret(monkeypatch, content, name):
    monkeypatch.setenv(name, "s3cr3t")
    for change in ({"path": f"${{{name}}}/x"}, {"source": f"${{{name}}}/x"}):
        with pytest.raises(ValueError, match="secret by its name") as error:
            Source(**{"source": "a/b", **change})
        assert "s3cr3t" not in str(error.value)
    content["bases"]["tiny-llama"]["template"] = f"${{{name}}}"
    with pytest.raises(ValueError, match="secret by its name"):
        Study(**content).bases["tiny-llama"].chat_template  # noqa: B018
    assert expanded("a/b") == "a/b"


@pytest.mark.parametrize(
    "change",
    [
        {"source": "miniature:../../x"},
        {"source": "random:/x"},
        {"source": "github:a/b/../../../x", "revision": "0" * 40},
        {"source": "github:a/b", "revision": "../../x"},
        {"source": "github:a/b", "files": ["../../x"]},
        {"source": "a/b", "files": ["/etc/passwd"]},
    ],
)
def test_a_source_stays_in_its_folder(change):
    with pytest.raises(ValueError, match="leads out of its folder"):
        Source(**change)


def test_a_study_and_its_files_may_have_any_name(content, tmp_path, data_folder):
    from driftbook.benchmarks import data

    folder = tmp_path / ODD
    folder.mkdir()
    shutil.copy(data_folder / "sft.json", folder / "a $y's.json")
    content["data"]["sft"]["path"] = str(folder / "a $y's.json")
    (folder / "ü #1.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    assert len(data.training_examples("sft", load(folder / "ü #1.yaml"))) == 32
    for mark in ("*", "?", "[", "::"):  # datasets would read other folders too
        content["data"]["sft"]["path"] = str(tmp_path / f"a{mark}b")
        (tmp_path / f"a{mark}b").mkdir()
        with pytest.raises(ValueError) as error:
            data.training_examples("sft", Study(**content))
        assert f"{mark!r}, which the package datasets reads as a pattern" in one_sentence(
            error.value
        )
