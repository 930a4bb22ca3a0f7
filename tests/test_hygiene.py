"""Rules for every file of the project: sizes, names, faces, and nothing of one machine."""

import ast
import importlib
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from driftbook.study.files import ROOT

LONGEST_FILE, LONGEST_FUNCTION, LARGEST_FACE, README_WORDS, CELL_WORDS = 600, 50, 12, 1500, 20
TEXT = {".py", ".ipynb", ".yaml", ".yml", ".md", ".toml", ".txt", ".mplstyle", ".html", ".csv"}
FOLDERS = ("work", "tmp", "home", "root", "Users", "mnt", "scratch", "opt")
ENTRY_POINTS = {"main"}  # what `python -m MODULE` runs: under this name each command has its own
REGISTRY = r"--(extra-)?index-url|--find-links|https?://[^\s/\"')]*(pypi|artifactory|nexus|devpi)"


def project_files() -> list[Path]:
    """Every file that git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if said.returncode:
        pytest.skip("no git checkout here, so which files are the project's is not known")
    names = sorted(set(said.stdout.splitlines()))
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def texts() -> dict[str, str]:
    """{path: content} of the project's text files."""
    readable = [
        path
        for path in project_files()
        if path.suffix in {*TEXT, ".json", ""} and path.stat().st_size < 2_000_000
    ]
    return {str(path.relative_to(ROOT)): path.read_text(errors="ignore") for path in readable}


def where(path: Path, node: ast.AST | None = None) -> str:
    return f"{path.relative_to(ROOT)}{f':{node.lineno}' if node else ''}"


def public_names(tree: ast.Module) -> list[str]:
    """Functions, classes and constants that a module defines under a name without underscore."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bound = (one for target in targets for one in ast.walk(target))
            found += [
                one.id
                for one in bound
                if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)
            ]
    return [name for name in found if not name.startswith("_")]


# ---- nothing of one machine, nothing computed
def test_no_file_names_a_folder_of_one_machine():
    pattern = re.compile(rf"(?<![\w.}}$)-])/({'|'.join(FOLDERS)})/")
    assert not {name: hit[0] for name, text in texts().items() if (hit := pattern.search(text))}


def test_no_file_names_a_package_registry():
    found = {name: hit[0] for name, text in texts().items() if (hit := re.search(REGISTRY, text))}
    assert set(found) <= {"tests/test_hygiene.py"}, found


def test_nothing_that_was_computed_or_holds_text_is_the_projects():
    names = [str(path.relative_to(ROOT)) for path in project_files()]
    assert not [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pkl"))]
    made = [name for name in names if name.startswith("outputs/")]
    assert all(name.startswith("outputs/published/") for name in made)
    assert not [name for name in names if "responses" in name and name.endswith(".parquet")]


# ---- sizes
def test_no_file_is_too_long():
    lines = {
        where(path): len(path.read_text().splitlines())
        for path in python_files("lib", "bench", "tests")
    }
    assert not {name: n for name, n in lines.items() if n > LONGEST_FILE}


def test_no_function_is_too_long():
    found = {}
    for path in python_files("lib", "bench", "tests"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    found[f"{where(path, node)} {node.name}"] = length
    assert not found


def test_formatting_has_no_exceptions():
    mark = re.compile("fmt: (skip|off)|noqa: *E501")
    assert not [
        where(path) for path in python_files("lib", "bench") if mark.search(path.read_text())
    ]


# ---- names
def test_no_public_name_is_defined_in_two_modules_of_a_package():
    modules = defaultdict(list)
    for path in python_files("lib/driftbook"):
        package = path.relative_to(ROOT / "lib" / "driftbook").parent
        for name in public_names(ast.parse(path.read_text())):
            modules[str(package), name].append(path.stem)
    assert not {
        (package, name): stems
        for (package, name), stems in modules.items()
        if package != "." and name not in ENTRY_POINTS and len(set(stems)) > 1
    }


def test_no_private_name_is_used_by_another_module():
    found = []
    for path in python_files("lib", "bench"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("driftbook"):
                private = [one.name for one in node.names if one.name.startswith("_")]
                found += [f"{where(path, node)} {name}" for name in private]
    assert not found


def test_no_name_is_defined_twice_in_a_module():
    found = []
    for path in python_files("lib", "bench", "tests"):
        kinds = (ast.FunctionDef, ast.ClassDef)
        names = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, kinds)]
        found += [f"{where(path)} {name}" for name in {*names} if names.count(name) > 1]
    assert not found  # the second would silently replace the first


def test_a_face_shows_few_names():
    packages = sorted(path.parent.name for path in (ROOT / "lib/driftbook").glob("*/__init__.py"))
    assert len(packages) == 12
    for package in packages:
        shown = importlib.import_module(f"driftbook.{package}").__all__
        assert 0 < len(shown) <= LARGEST_FACE, f"{package}: {len(shown)} names"


def test_the_level_of_intervals_is_one_constant():
    lines = [
        f"{where(path)}: {line.strip()}"
        for path in python_files("lib")
        for line in path.read_text().splitlines()
        if re.search(r"0?\.975|0?\.025", line)
    ]
    assert len(lines) <= 1, lines


# ---- the README
def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= README_WORDS
    rows = [line for line in text.splitlines() if line.startswith("|")]
    long = [cell for row in rows for cell in row.split("|") if len(cell.split()) > CELL_WORDS]
    assert not long
