"""Hygiene of every notebook, without exemption; running one refuses unknown parameters."""

import ast
import importlib
import json
import re
import tokenize
from io import StringIO

import pytest

from conftest import one_sentence
from driftbook.batch import notebooks
from driftbook.study.files import ROOT

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_CELLS, MOST_LINES, WIDEST = 20, 15, 100
MOST_NAMES, MOST_NAMES_OF_ONE = 126, 15
every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def cells(path, kind=None) -> list[dict]:
    return [
        cell for cell in json.loads(path.read_text())["cells"] if kind in (None, cell["cell_type"])
    ]


def source(cell) -> str:
    return "".join(cell["source"])


def code(path) -> list[str]:
    return [source(cell) for cell in cells(path, "code")]


def parameters_cell(path) -> str:
    [found] = [
        cell for cell in cells(path, "code") if "parameters" in cell["metadata"].get("tags", [])
    ]
    return source(found)


def strings(text: str) -> list[str]:
    """Every string literal of some code, those of f-strings too."""
    return [
        node.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def imported(path) -> dict[str, str]:
    """{name in the notebook: what of the library it is, dotted}."""
    found = {}
    for node in (node for text in code(path) for node in ast.walk(ast.parse(text))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("driftbook"):
            found |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                one.asname or one.name.partition(".")[0]: one.name
                for one in node.names
                if one.name.startswith("driftbook")
            }
    return found


def library_names(path) -> set[str]:
    """Every name of the library that a notebook's code looks up, dotted as far as there are
    modules.
    """
    known, found = imported(path), set()
    for node in (node for text in code(path) for node in ast.walk(ast.parse(text))):
        chain = []
        while isinstance(node, ast.Attribute):
            chain, node = [node.attr, *chain], node.value
        if isinstance(node, ast.Name) and node.id in known:
            dotted = known[node.id]
            while chain and is_module(dotted):
                dotted = f"{dotted}.{chain.pop(0)}"
            if not is_module(dotted):
                found.add(dotted)
    return found


def is_module(dotted: str) -> bool:
    path = ROOT / "lib" / dotted.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_there_are_notebooks_in_the_order_of_the_data():
    numbers = [path.stem[:2] for path in PATHS]
    assert {"01", "02", "04", "05", "06", "07", "08"} <= set(numbers)
    assert len(set(numbers)) == len(numbers)
    assert all(re.fullmatch(r"\d\d_[a-z_]+", path.stem) for path in PATHS)


@every_notebook
def test_it_is_stripped(path):
    whole = json.loads(path.read_text())
    for cell in cells(path, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        assert set(cell["metadata"]) <= {"tags"}
    assert set(whole["metadata"]) <= {"kernelspec", "language_info"}
    assert whole["nbformat"] == 4
    assert path.read_text().endswith("\n")


@every_notebook
def test_its_cells_have_ids_of_their_own(path):
    found = [cell.get("id") for cell in cells(path)]
    assert all(found)
    assert len(set(found)) == len(found)


@every_notebook
def test_its_title_is_a_question_with_its_number(path):
    first = cells(path)[0]
    assert first["cell_type"] == "markdown"
    lines = [line for line in source(first).splitlines() if line.strip()]
    assert re.fullmatch(rf"# {path.stem[:2]} · .+\?", lines[0])
    assert [line.split()[0] for line in lines[1:] if line.startswith("**")] == [
        "**Reads**",
        "**Writes**",
        "**Takes**",
    ]
    assert lines[1].startswith("**Reads**")


@every_notebook
def test_its_parameters_are_typed_and_commented_literals(path):
    text = parameters_cell(path)
    statements = ast.parse(text).body
    assert statements
    for statement in statements:
        assert isinstance(statement, ast.AnnAssign), "each parameter is a typed assignment"
        ast.literal_eval(statement.value)
    comments = [
        token.start[0]
        for token in tokenize.generate_tokens(StringIO(text).readline)
        if token.type == tokenize.COMMENT
    ]
    assert sorted({statement.end_lineno for statement in statements}) == sorted(set(comments)), (
        "each parameter has a comment"
    )
    assert cells(path, "code")[0] == next(
        cell for cell in cells(path, "code") if source(cell) == text
    ), "the first code cell"


@pytest.mark.slow
@every_notebook
def test_its_parameters_are_what_papermill_sees(path):
    names = [statement.target.id for statement in ast.parse(parameters_cell(path)).body]
    notebooks.check_parameters(path, dict.fromkeys(names))


@every_notebook
def test_it_is_short(path):
    assert len(code(path)) <= MOST_CELLS
    for text in code(path):
        lines = text.strip().splitlines()
        assert 0 < len(lines) <= MOST_LINES, text[:200]
        assert max(map(len, lines)) <= WIDEST, text[:200]


@every_notebook
def test_it_imports_packages_only(path):
    assert not [name for name in imported(path).values() if name.count(".") > 1]


@every_notebook
def test_it_uses_few_names_of_the_library(path):
    assert len(library_names(path)) <= MOST_NAMES_OF_ONE, sorted(library_names(path))


@every_notebook
def test_every_name_of_the_library_that_it_uses_is_there(path):
    def found(dotted: str) -> bool:
        _, package, *names = dotted.split(".")
        value = importlib.import_module(f"driftbook.{package}")
        for name in names:  # by the faces, as the notebook has it
            if name not in getattr(value, "__all__", dir(value)):
                return False
            value = getattr(value, name)
        return True

    assert not [dotted for dotted in library_names(path) if not found(dotted)]


def test_all_notebooks_together_use_few_names_of_the_library():
    assert len(set().union(*map(library_names, PATHS))) <= MOST_NAMES


@every_notebook
def test_it_ends_with_the_versions(path):
    assert "versions(" in code(path)[-1]
    assert cells(path)[-1]["cell_type"] == "code"


@every_notebook
def test_every_cell_is_python_without_magic_or_commented_code(path):
    for text in code(path):
        ast.parse(text)
        for token in tokenize.generate_tokens(StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                words = token.string.lstrip("# ")
                assert not re.match(r"(import|from|for|if|return|print|\w+ = |\w+\()", words), (
                    f"code in a comment: {words}"
                )


FORBIDDEN = {
    "chdir": r"\bchdir\b",
    "sys.path": r"\bsys\.path\b",
    "pip": r"^\s*[!%]",
    "backend": r"matplotlib\.use|%matplotlib",
    "warnings off": r"simplefilter|filterwarnings",
    "absolute path": r"""["'](/|~/|[A-Z]:\\)[\w.]""",
    "relative path": r"""["']\.{1,2}/""",
    "swallowed errors": r"except\s*(Exception)?\s*:",
    "global seed": r"np\.random\.seed|torch\.manual_seed",
}


@every_notebook
@pytest.mark.parametrize("name", FORBIDDEN)
def test_it_does_nothing_that_is_forbidden(path, name):
    for text in code(path):
        assert not re.search(FORBIDDEN[name], text, re.MULTILINE), f"{name}: {text[:200]}"


@every_notebook
def test_it_names_no_file_by_path(path):
    for text in code(path):
        for literal in strings(text):
            assert not re.search(
                r"^(outputs|notebooks|studies|data|lib|tests)/"
                r"|\.(parquet|csv|json|jsonl|png|svg|pdf)$",
                literal,
            ), literal


@every_notebook
def test_nothing_with_a_name_is_defined_twice(path):
    names = [
        node.name
        for text in code(path)
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert len(set(names)) == len(names)
    long = [
        node.name
        for text in code(path)
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 10
    ]
    assert not long, f"longer than ten lines belongs into lib: {long}"


@every_notebook
def test_text_stands_on_both_sides_of_code(path):
    kinds = [cell["cell_type"] for cell in cells(path)]
    headings = [source(cell) for cell in cells(path, "markdown") if source(cell).startswith("## ")]
    assert headings, "sections have headings"
    assert kinds.count("markdown") >= 3


# ---- a rule that finds nothing anywhere would be no rule
def test_the_rules_find_what_they_are_for():
    bad = [
        "import os\nos.chdir('x')",
        "import sys\nsys.path.append('x')",
        "!pip install x",
        "matplotlib.use('Agg')",
        "warnings.simplefilter('ignore')",
        "open('/" + "tmp/x')",
        "open('../x')",
        "try:\n    x\nexcept Exception:\n    pass",
        "np.random.seed(1)",
    ]
    for name, text in zip(FORBIDDEN, bad, strict=True):
        assert re.search(FORBIDDEN[name], text, re.MULTILINE), name


# ---- running
def test_an_unknown_parameter_is_refused_in_a_sentence(tmp_path, capsys):
    output = tmp_path / "executed.ipynb"
    assert (
        notebooks.run_notebook(
            str(PATHS[0]), str(output), json.dumps({"study": "miniature", "modles": []})
        )
        == 1
    )
    sentence = one_sentence(capsys.readouterr().err)
    assert "modles" in sentence
    assert "models" in sentence
    assert not output.exists(), "nothing was executed"
    assert one_sentence(output.with_suffix(".error.txt").read_text()) == sentence


@pytest.fixture
def notebook(tmp_path):
    """Makes a notebook of a parameter and one cell."""
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    def make(text):
        path = tmp_path / "99_test.ipynb"
        first = new_code_cell("number: int = 1  # a number", metadata={"tags": ["parameters"]})
        spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(new_notebook(cells=[first, new_code_cell(text)], metadata=spec), path)
        return path

    return make


@pytest.mark.slow
def test_a_cell_that_raises_is_named_and_the_executed_notebook_is_kept(notebook, tmp_path):
    output = tmp_path / "out" / "executed.ipynb"
    with pytest.raises(notebooks.NotebookError) as error:
        notebooks.execute(notebook("raise ValueError(f'no {number}')"), output, {"number": 7})
    sentence = one_sentence(error.value)
    assert all(word in sentence for word in ("99_test", "ValueError", "no 7", str(output)))
    assert "no 7" in output.read_text()
    assert [path.name for path in output.parent.iterdir()] == [output.name], (
        "no half-written file stays behind"
    )


def test_a_notebook_runs_with_its_parameters(notebook, tmp_path):
    output = tmp_path / "executed.ipynb"
    notebooks.execute(notebook("number * 6"), output, {"number": 7})
    assert "'42'" in str(json.loads(output.read_text())["cells"][-1]["outputs"])
