"""The code that a result depends on, found by following imports: one digest, blind to comments,
docstrings and formatting.
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[1]
PACKAGE = LIBRARY.name


def digest(names: Iterable[str], length: int = 12) -> str:
    """The first hex digits of a hash of the code of these modules and of all that they import,
    whatever is only needed inside a function too.
    """
    found = {name: _code(name) for name in sorted(closure(names))}
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:length]


def closure(names: Iterable[str]) -> set[str]:
    """The modules of the library that these import, directly or not, and they themselves."""
    waiting, found = list(names), set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += imported(name)
    return found


@cache
def imported(name: str) -> frozenset[str]:
    """The modules of the library that a module imports."""
    return frozenset(_imports(_tree(name)))


def package(name: str) -> list[str]:
    """The modules of a package of the library, by name."""
    return [
        f"{PACKAGE}.{name}.{file.stem}"
        for file in sorted((LIBRARY / name).glob("*.py"))
        if file.stem != "__init__"
    ]


def of_notebook(notebook: Path) -> set[str]:
    """The modules that a notebook's code imports. Of a package's face it needs just the modules
    that define the names it uses.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return set(_imports(ast.parse(source)))


def _imports(tree: ast.AST) -> Iterator[str]:
    """Modules by the import statements of a tree; names taken from a package's face lead to the
    modules that define them.
    """
    used: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.setdefault(node.value.id, set()).add(node.attr)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    yield from _named(alias.name, used.get(alias.asname or alias.name, set()))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if path(inner):
                    yield from _named(inner, used.get(alias.asname or alias.name, set()))
                else:
                    yield from _named(node.module, {alias.name})


def _named(name: str, attributes: set[str]) -> Iterator[str]:
    """A module itself; of a package's face, the modules from which it takes these attributes."""
    if path(name).name != "__init__.py":
        yield name
        return
    for attribute in attributes:
        if path(f"{name}.{attribute}"):
            yield from _named(f"{name}.{attribute}", set())
        elif attribute in _face(name):
            yield _face(name)[attribute]
        else:
            yield name


@cache
def _face(package: str) -> dict[str, str]:
    """The module from which a package's face takes each of its names."""
    calls = (node for node in ast.walk(_tree(package)) if isinstance(node, ast.keyword))
    homes = next((ast.literal_eval(node.value) for node in calls if node.arg == "submod_attrs"), {})
    return {name: f"{package}.{module}" for module, names in homes.items() for name in names}


@cache
def path(name: str) -> Path | None:
    """The file of a module or of a package's face; None where the library has none of this name."""
    stem = LIBRARY.parent / name.replace(".", "/")
    return next(
        (file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()), None
    )


@cache
def _tree(name: str) -> ast.Module:
    return ast.parse(path(name).read_text(encoding="utf-8"))


def _code(name: str) -> str:
    """A module's code without comments, docstrings and layout."""
    tree = ast.parse(path(name).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
    return ast.dump(tree)
