"""What a result depends on is found by following names: an edit redoes what can notice it, and
nothing else.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from driftbook.batch import keys, plan
from driftbook.figures import drawing
from driftbook.study import code
from driftbook.study.files import ROOT, read_json, write_json
from driftbook.study.study_file import load


def forget():
    """Read every file again."""
    for one in (*vars(code).values(), keys._code_of, keys._choices):
        if hasattr(one, "cache_clear"):
            one.cache_clear()


# ---- a small library
LIBRARY = {
    "__init__": "",
    "stats/__init__": "import lazy_loader\n__getattr__, __dir__, __all__ = lazy_loader.attach("
    "__name__, submod_attrs={'means': ['mean'], 'counts': ['count']})\n",
    "stats/means": "from driftbook.stats import counts\nHALF = 2\nDEEP = HALF * 2\n"
    "def mean(x):\n    '''The mean.'''\n    return sum(x) / counts.count(x) * DEEP\n"
    "def other(x):\n    return x\n",
    "stats/counts": "ONE = 1\ndef count(x):\n    from driftbook.deep import late\n"
    "    return late.size(x) + ONE\ndef unused():\n    return ONE + 1\n",
    "deep/__init__": "",
    "deep/late": "LATE = 3\ndef size(x):\n    return LATE\nclass Box:\n    WIDE = 1\n",
    "deep/early": "from driftbook.deep import late\nlate.Box.WIDE = 7\n",
    "plots/__init__": "",
    "plots/registry": "KNOWN = {}\ndef drawn(f):\n    KNOWN[str(f)] = f\n    return f\n"
    "def draw(name):\n    return KNOWN[name]()\n",
    "plots/figures": "from driftbook.plots.registry import drawn\n@drawn\n"
    "def red():\n    return 1\n@drawn\ndef blue():\n    return 2\n",
    "plots/style": "from pathlib import Path\nfrom driftbook.stats import means\n"
    "def style(means):\n    return Path(__file__).with_name('house.style'), means.other\n"
    "def table():\n    return ROOT / 'data' / 'cited' / 'x.csv'\n",
}
NOTEBOOK = [
    "from driftbook import stats\nfrom driftbook.deep import late\nrows = [1]\n",
    "display(late.Box)\nfor row in range(3):\n    rows.append(row)\n",
    "done = stats.mean(rows)\nshown = stats.count(rows)\ndisplay(shown)",
]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library and a notebook in a folder; call it with changes of text to write it again."""
    home = tmp_path / "lib" / "driftbook"
    monkeypatch.setattr(code, "LIBRARY", home)

    def write(old: str = "", new: str = "") -> None:
        assert any(old in text for text in (*LIBRARY.values(), *NOTEBOOK))
        for name, text in LIBRARY.items():
            path = home / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace(old, new) if old else text)
        cells = [text.replace(old, new) if old else text for text in NOTEBOOK]
        content = [{"cell_type": "code", "source": [text]} for text in cells]
        (tmp_path / "note.ipynb").write_text(json.dumps({"cells": content}))
        (home / "plots" / "house.style").write_text("colour: red")
        (tmp_path / "data" / "cited").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "cited" / "x.csv").write_text("a\n1\n")
        forget()

    write()
    yield write
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("HALF = 2", "HALF = 3", True),
        ("ONE = 1", "ONE = 2", True),
        ("LATE = 3", "LATE = 4", True),
        ("rows = [1]", "rows = [2]", True),
        ("rows.append(row)", "rows.append(2 * row)", True),
        ("stats.mean(rows)", "stats.mean(rows[1:])", True),
        ("ONE + 1", "ONE + 2", False),
        ("WIDE = 1", "WIDE = 2", False),
        ("    return x\n", "    return 2 * x\n", False),
        ("shown = stats.count(rows)", "shown = stats.count(rows * 2)", False),
        ("display(late.Box)", "display(late)", False),
        ("'''The mean.'''", "'''The sum by the number.'''", False),
        ("sum(x) / counts", "(sum(x)\n        / counts", None),
        ("ONE = 1", "# a reason\nONE = 1", False),
    ],
)
def test_a_result_depends_on_what_leads_to_its_variable(library, tmp_path, old, new, changes):
    note = tmp_path / "note.ipynb"
    before = code.fingerprint(code.of_notebook(note, "done"))
    if changes is None:  # the same code in another layout
        library("sum(x) / counts.count(x) * DEEP", "(\n        sum(x) / counts.count(x) * DEEP)")
    else:
        library(old, new)
    assert (code.fingerprint(code.of_notebook(note, "done")) != before) == bool(changes)


def test_all_of_a_notebook_depends_on_what_it_shows_too(library, tmp_path):
    note = tmp_path / "note.ipynb"
    before = code.by_file(code.of_notebook(note))
    assert set(before) == {
        "stats/means.py",
        "stats/counts.py",
        "deep/late.py",
        "note.ipynb",
        "__init__.py",
    } - {"__init__.py"}
    library("WIDE = 1", "WIDE = 2")
    after = code.by_file(code.of_notebook(note))
    assert {name for name in after if before[name] != after[name]} == {"deep/late.py"}


def test_a_registered_function_counts_where_its_name_is_written(library, tmp_path):
    NOTEBOOK.append("from driftbook.plots import figures, registry\nregistry.draw('red')")
    try:
        library()
        names = code.closure(code.of_notebook(tmp_path / "note.ipynb"))
    finally:
        NOTEBOOK.pop()
    figures = "driftbook.plots.figures"
    assert (figures, "red") in names
    assert (figures, "blue") not in names


TABLE = (
    "from driftbook.stats import counts, means\nWAYS = {'mean': means.mean, 'n': counts.unused}\n"
    "def one(way, x):\n    return WAYS[way](x)\ndef every(x):\n    return list(WAYS)\n"
)


@pytest.mark.parametrize(
    ("name", "texts", "found"),
    [
        ("one", {"mean"}, {"mean"}),
        ("one", {"n", "other"}, {"unused"}),
        ("one", set(), set()),
        ("every", set(), {"mean", "unused"}),
    ],
)
def test_an_entry_of_a_table_counts_where_its_key_is_given(library, tmp_path, name, texts, found):
    (tmp_path / "lib" / "driftbook" / "plots" / "ways.py").write_text(TABLE)
    forget()
    names = {part for _, part in code.closure({("driftbook.plots.ways", name)}, texts)}
    assert names & {"mean", "unused"} == found
    assert code.choices({("driftbook.plots.ways", "one")}) == {"mean", "n"}


def test_files_that_code_names_count_by_their_bytes(library, tmp_path):
    parts = {("driftbook.plots.style", "style"), ("driftbook.plots.style", "table")}
    before = code.by_file(parts)
    assert {"plots/house.style", "data/cited"} <= set(before)
    assert "stats/means.py" not in before, "a parameter hides the module of its name"
    (tmp_path / "lib" / "driftbook" / "plots" / "house.style").write_text("colour: blue")
    (tmp_path / "data" / "cited" / "x.csv").write_text("a\n2\n")
    forget()
    after = code.by_file(parts)
    changed = {name for name in after if before[name] != after[name]}
    assert changed == {"plots/house.style", "data/cited"}


def test_what_a_module_does_to_others_at_its_import_counts(library):
    before = code.fingerprint({("driftbook.deep.early", code.ACTS)})
    library("late.Box.WIDE = 7", "late.Box.WIDE = 8")
    assert code.fingerprint({("driftbook.deep.early", code.ACTS)}) != before


def test_what_was_found_is_kept_for_this_code_alone(library, tmp_path, monkeypatch):
    monkeypatch.setattr(code.files, "OUTPUTS", tmp_path / "outputs")
    note = code.of_notebook(tmp_path / "note.ipynb", "done")
    first = code.by_file(note)
    [kept] = (tmp_path / "outputs").rglob("*.json")
    write_json(kept, {"read": "again"})
    forget()
    assert code.by_file(note) == {"read": "again"}
    kept.write_text("{torn")
    assert code.by_file(note) == first == read_json(kept)
    for old, new in (("HALF = 2", "HALF = 3"), ("rows = [1]", "rows = [2]")):
        library(old, new)
        assert code.by_file(note) != first
    assert len([*kept.parent.iterdir()]) == 3
    library()
    assert code.by_file(note) == first
    assert len([*kept.parent.iterdir()]) == 3


def test_what_is_edited_while_it_is_read_is_not_kept(library, tmp_path, monkeypatch):
    monkeypatch.setattr(code.files, "OUTPUTS", tmp_path / "outputs")
    note = code.of_notebook(tmp_path / "note.ipynb", "done")
    code.source("driftbook.stats.means")
    counts = tmp_path / "lib" / "driftbook" / "stats" / "counts.py"
    counts.write_text(counts.read_text().replace("ONE = 1", "ONE = 2"))
    found = code.by_file(note)
    assert not [*(tmp_path / "outputs").rglob("*.json")]
    library("ONE = 1", "ONE = 2")
    assert code.by_file(note) == found


def test_an_import_by_a_computed_name_is_refused_in_a_sentence(library, tmp_path):
    library("return late.size(x)", "return __import__('driftbook.' + x)")
    with pytest.raises(ValueError, match=r"counts\.py imports a module by a name"):
        code.closure(code.of_notebook(tmp_path / "note.ipynb"))


# ---- the real one
@pytest.mark.slow
def test_a_notebook_depends_on_the_figures_that_it_makes():
    missing = []
    for name, one in drawing.FIGURES.items():
        stem = drawing.SOURCES[name].split()[1]
        found = code.closure(code.of_notebook(keys.notebook(stem)))
        one = getattr(one, "__wrapped__", one)
        missing += [name] if (one.__module__, one.__name__) not in found else []
    assert not missing


MODELS = {*keys.NOTEBOOKS}
ALL = {"prepare", *MODELS, "collect", *keys.ANALYSES, "report"}
# A constant of each package, the jobs that are executed again when it changes, and the stages
# whose finished work is done again too; what is made from these follows from the Snakefile.
TRAINS = {"train", "retune"}  # two stages of one notebook
EDITS = {
    ("batch/collecting.py", "OF_DETECTOR"): ({"collect"}, set()),
    ("publishing/report.py", "TITLES"): ({"report"}, set()),
    ("figures/labels.py", "_MARKS"): ({"labels"}, set()),
    ("training/fit.py", "RECORDED"): (TRAINS, TRAINS),
    ("analyses/doses.py", "QUARTILES"): ({"dose"}, set()),
    ("rereading/original_claims.py", "MARGIN"): (set(), set()),
    ("doctors/data_words.py", "NEAR_PROMPT"): ({"prepare", *TRAINS}, set()),
    ("benchmarks/judging.py", "HAZARD_TOKENS"): ({*TRAINS, "judge"}, {*TRAINS, "judge"}),
    ("stats/laplace.py", "TOLERANCE"): ({"mixed_effects"}, set()),
    ("models/scoring.py", "TAIL"): (MODELS, MODELS),
    ("study/sections.py", "DATA_COLUMNS"): (ALL, MODELS),
    ("miniature/corpus.py", "REQUESTS"): ({"prepare"}, set()),  # and all else by the models' recipe
}


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of the project; who edits it puts it back."""
    home = tmp_path_factory.mktemp("project") / "copied"
    for name in ("lib", "notebooks", "studies", "profiles"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "README.md"):
        shutil.copyfile(ROOT / name, home / name)
    return home


def edit(home: Path, file: str, constant: str) -> None:
    """Give a constant of a module another value."""
    path = home / "lib" / "driftbook" / file
    lines = path.read_text().splitlines(keepends=True)
    node = next(
        node
        for node in ast.parse("".join(lines)).body
        if isinstance(node, ast.Assign | ast.AnnAssign) and constant in ast.unparse(node).split()
    )
    end = lines[node.end_lineno - 1]
    lines[node.end_lineno - 1] = (
        end[: node.end_col_offset] + " or None" + end[node.end_col_offset :]
    )
    path.write_text("".join(lines))


def by_job() -> dict[str, tuple[dict, dict]]:
    """The digests by file of what each job depends on, and of what leads to its results."""
    names = {"prepare": "01_prepare", "collect": "08_collect", **keys.NOTEBOOKS, **keys.ANALYSES}
    found = {}
    for job, name in names.items():
        result = {"prepare": "prepared"}.get(
            job, keys.RESULT if job in keys.NOTEBOOKS else code.ACTS
        )
        parts = [code.of_notebook(keys.notebook(name), one) for one in (code.ACTS, result)]
        found[job] = tuple(map(code.by_file, parts))
    report = code.by_file(code.of_module("driftbook.publishing.report"))
    return {**found, "report": (report, report)}


@pytest.mark.slow
def test_an_edit_of_a_constant_redoes_what_can_notice_it(copied, monkeypatch):
    monkeypatch.setattr(code, "LIBRARY", copied / "lib" / "driftbook")
    monkeypatch.setattr(keys, "ROOT", copied)
    forget()
    before = by_job()
    texts = {path: path.read_text() for path in (copied / "lib").rglob("*.py")}
    for file, constant in EDITS:
        edit(copied, file, constant)
    forget()
    after = by_job()
    for path, text in texts.items():
        path.write_text(text)
    monkeypatch.undo()
    forget()

    def changed(file: str, which: int) -> set[str]:
        return {
            job for job in before if before[job][which].get(file) != after[job][which].get(file)
        }

    found = {edit: (changed(edit[0], 0), changed(edit[0], 1) & MODELS) for edit in EDITS}
    wrong = {edit: found[edit] for edit, wanted in EDITS.items() if found[edit] != wanted}
    assert not wrong


# ---- what Snakemake would do
SAID = (
    "import sys; from driftbook.batch import plan; from driftbook.study.study_file import load;"
    " print(plan.write(load(sys.argv[1])))"
)


def surroundings(home: Path) -> dict[str, str]:
    """The environment in which the copied project is used."""
    paths = [str(home / "lib"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "DRIFTBOOK_ROOT": str(home)}


def planned(home: Path, study: Path) -> dict[str, int]:
    """The jobs that `snakemake -n` would do in the copied project, by rule."""
    code = [sys.executable, "-c", SAID, str(study)]
    subprocess.run(code, env=surroundings(home), cwd=home, capture_output=True, check=True)
    command = [sys.executable, "-m", "snakemake", "--snakefile", "Snakefile", "--profile"]
    command += ["profiles/local", "--config", f"study={study}", "--dry-run", "--quiet", "rules"]
    ended = subprocess.run(
        command, env=surroundings(home), cwd=home, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    rows = (line.split() for line in ended.stdout.splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


@pytest.fixture(scope="module")
def finished(copied):
    """A study of the copied project, of which every job has a mark of its present key."""
    text = (ROOT / "studies" / "miniature.yaml").read_text()
    path = copied / "studies" / "finished.yaml"
    name = f"finished{os.getpid()}"  # each process of the tests has one
    path.write_text(text.replace("name: miniature", f"name: {name}", 1))
    study, now = load(path), time.time()
    assert plan.write(study) == ""
    order = ["prepare", *keys.STAGES, "collect", *keys.analyses(study), "report"]
    for number, job in enumerate(order):
        for key in (study.folder / "keys").rglob("*.json"):
            if key.relative_to(study.folder / "keys").parts[0].removesuffix(".json") == job:
                done = plan.job_mark(study, str(key.relative_to(study.folder / "keys"))[:-5])
                write_json(done, read_json(key))
                os.utime(key, (now - 200, now - 200))
                os.utime(done, (now - 100 + number, now - 100 + number))
    yield path
    shutil.rmtree(study.folder)


# in this order: each finds the copy as the one before left it
@pytest.mark.slow
def test_words_redo_nothing(copied, finished):
    for file in (copied / "lib").rglob("*.py"):
        text = re.sub(r'(:\n +""")(?=\w)', r"\1So: ", file.read_text())
        file.write_text(f"{text}# a reason\n")
    note = copied / "notebooks" / "04_respond.ipynb"
    content = json.loads(note.read_text())
    for cell in content["cells"]:
        cell["source"] = ["# more words\n", *cell["source"]]
    note.write_text(json.dumps(content))
    (copied / "README.md").write_text("other words")
    assert planned(copied, finished) == {}


@pytest.mark.slow
def test_an_edit_of_a_notebook_redoes_it_and_what_reads_it(copied, finished):
    note = copied / "notebooks" / "15_dose.ipynb"
    before = note.read_text()
    content = json.loads(before)
    content["cells"][-1]["source"] = ["1 + 1"]
    note.write_text(json.dumps(content))
    try:
        assert planned(copied, finished) == {"dose": 1, "report": 1, "all": 1, "total": 3}
    finally:
        note.write_text(before)


@pytest.mark.slow
def test_an_edit_redoes_what_reads_it_with_a_reason(copied, finished):
    edit(copied, "benchmarks/judging.py", "HAZARD_TOKENS")
    jobs = planned(copied, finished)
    again = subprocess.run(
        [sys.executable, "-c", SAID, str(finished)],
        env=surroundings(copied),
        cwd=copied,
        text=True,
        capture_output=True,
    )
    wanted = "to do again: train, judge (code of benchmarks/judging.py) and what is made from it"
    assert again.stdout.strip() == wanted
    assert jobs.pop("total") == sum(jobs.values())
    assert "train" in jobs, "it judges the looks at drift while a variant trains"
