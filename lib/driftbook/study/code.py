"""The code that a result depends on, found by following names: functions, classes, constants and
files of the library, blind to comments, docstrings and layout.

We start at a notebook or at names of the library. A name leads to the statements that give it a
value, and each statement to the names that it uses, through modules and the faces of packages.
Of a module that is imported on the way, the statements that act at its import count as well. So
an edit of a function changes the digests of what can call it, and no others.
"""

import ast
import copy
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from driftbook.study import files

LIBRARY = Path(__file__).resolve().parents[1]
PACKAGE = LIBRARY.name

# A name in a module (dotted name), a notebook (path, or path#variable) or a file (path).
Part = tuple[str, str]
ACTS = ""  # instead of a name: the statements that act whenever the module is imported
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
LOOPS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DEFINED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
DYNAMIC = {"import_module", "__import__"}
DATA = re.compile(r"ROOT / 'data' / (?:'([\w.-]+)'|\w+)")


def fingerprint(roots: Iterable[Part], length: int = 12) -> str:
    """One digest of the code that these parts depend on."""
    return files.digest(by_file(roots), length)


def by_file(roots: Iterable[Part]) -> dict[str, str]:
    """The digest of what these parts depend on, by file."""
    found: dict[str, dict[str, str]] = {}
    for module, name in closure(roots):
        if code := _code(module, name):
            found.setdefault(_label(path(module)), {})[name] = code
    return {label: files.digest(parts, 12) for label, parts in sorted(found.items())}


def of_notebook(notebook: Path, variable: str | None = None) -> set[Part]:
    """The parts of a notebook: all of its code, or what leads to the last value of a variable.

    A statement leads to a variable if it assigns to a name that the variable is made from, or
    calls a method of it or a function on it. What a notebook only shows does not count.
    """
    if variable is None:
        return of_module(str(notebook))
    return {(f"{notebook}#{variable}", variable)}


def of_module(module: str) -> set[Part]:
    """All parts of a module, or of a package and its modules."""
    found = {(module, name) for name in source(module).parts}
    if module != PACKAGE and path(module).name == "__init__.py":
        for file in sorted(path(module).parent.glob("[!_]*.py")):
            found |= of_module(f"{module}.{file.stem}")
    return found


def closure(roots: Iterable[Part]) -> set[Part]:
    """The parts that these lead to, directly or not, and they themselves. What a decorator of the
    library registers under its name counts where the name is written as a text.
    """
    waiting, found, texts = list(roots), set(), set()
    while waiting:
        part = waiting.pop()
        if part not in found:
            found.add(part)
            waiting += _uses(*part)
            texts |= _texts(*part)
        if not waiting:
            loaded = {module for module, _ in found}
            named = {(one, name) for one in loaded for name in source(one).registered & texts}
            waiting += named - found
    return found


@dataclass(frozen=True, eq=False)
class Source:
    """The statements behind each name of a module, what its imports bind (name, dotted name), and
    the functions that decorators of the library register.
    """

    parts: dict[str, list[ast.stmt]]
    imports: dict[str, str]
    registered: frozenset[str] = frozenset()


@cache
def source(module: str) -> Source:
    """The code of a module or notebook; none of another file."""
    file = path(module)
    if file.suffix == ".ipynb":
        return _notebook(file, module.partition("#")[2])
    tree = ast.parse(file.read_text(encoding="utf-8") if file.suffix == ".py" else "")
    imports, parts = _imports(tree.body), {ACTS: []}
    for node in tree.body:
        for name in _bound(node):
            parts.setdefault(name, []).append(node)
    defined = (node for node in tree.body if isinstance(node, DEFINED))
    registered = {node.name for node in defined if _decorators(node) & set(imports)}
    return Source(parts, imports, frozenset(registered))


def _notebook(file: Path, variable: str) -> Source:
    """The code of a notebook, up to the last statement that assigns to the variable."""
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    code = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    body = ast.parse("\n".join(code)).body
    ends = [number for number, node in enumerate(body, 1) if variable in _assigned(node)]
    if variable and not ends:
        raise ValueError(f"{file.name} gives no value to {variable!r}, its result")
    body = body[: ends[-1]] if ends else body
    imports, parts = _imports(body), {ACTS: []}
    for node in body:
        for name in (_assigned(node) | _changed(node)) - set(imports) or {ACTS}:
            parts.setdefault(name, []).append(node)
    return Source(parts, imports)


@cache
def path(module: str) -> Path | None:
    """The file of a module or of a package's face, None where the library has none; of a notebook
    or another file its path.
    """
    if "/" in module:
        return Path(module.partition("#")[0])
    stem = LIBRARY.parent / module.replace(".", "/")
    files = (stem.with_suffix(".py"), stem / "__init__.py")
    return next((file for file in files if file.is_file()), None)


# ---- what a statement binds
def _bound(node: ast.stmt) -> set[str]:
    """The names that a statement of a module gives a value, and ACTS where it acts on others."""
    if isinstance(node, ast.Import | ast.ImportFrom) or _is_text(node) or _is_main(node):
        return set()
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    plain = isinstance(node, ast.Assign | ast.AnnAssign) and all(
        isinstance(target, ast.Name | ast.Tuple) for target in targets
    )
    return _assigned(node) | (set() if plain or isinstance(node, DEFINED) else {ACTS})


def _decorators(node: ast.stmt) -> set[str]:
    return {_chain(getattr(one, "func", one))[0] for one in node.decorator_list}


def _assigned(node: ast.stmt) -> set[str]:
    """The names that a statement assigns to, whole or in part."""
    if isinstance(node, DEFINED):
        return {node.name}
    stored = (one for one in ast.walk(node) if isinstance(getattr(one, "ctx", None), ast.Store))
    return {name for one in stored if (name := _chain(one, ast.Attribute | ast.Subscript)[0])}


def _changed(node: ast.stmt) -> set[str]:
    """The names whose values a statement may change, as it calls a method of them or a function on
    them for no value.
    """
    calls = [
        one.value
        for one in ast.walk(node)
        if isinstance(one, ast.Expr) and isinstance(one.value, ast.Call)
    ]
    heads = {_chain(part)[0] for call in calls for part in (call.func, *call.args)}
    return set() if isinstance(node, DEFINED) else heads - {"", "display"}


def _imports(nodes: Iterable[ast.AST], within: bool = False) -> dict[str, str]:
    """What import statements take from the library; `within` functions too."""
    found = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [one for one in node.names if one.name.split(".")[0] == PACKAGE]
            found |= {one.asname or PACKAGE: one.name if one.asname else PACKAGE for one in names}
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] == PACKAGE:
                found |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
        elif within or not isinstance(node, DEFINED):
            found |= _imports(ast.iter_child_nodes(node), within)
    return found


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_main(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


# ---- what a statement uses
@cache
def _uses(module: str, name: str) -> frozenset[Part]:
    """The parts that a part uses itself, and those that act when what it imports is loaded."""
    own, found = source(module), set()
    if path(module).suffix == ".py":
        found |= {(module, ACTS)} if name else _acting(own.imports.values())
    for node in own.parts[name]:
        local = _imports([node], within=True)
        found |= _acting(local.values()) | _files(node, path(module).parent)
        for root, *rest in _names(node):
            for dotted in {known[root] for known in (own.imports, local) if root in known}:
                found |= _acting([dotted]) | _found(".".join([dotted, *rest]))
            if root in own.parts:
                found.add((module, root))
            if DYNAMIC & {root, *rest}:
                raise ValueError(
                    f"{path(module)} imports a module by a name that is only known when it runs;"
                    " write an import statement, so that what depends on it can be found"
                )
    return frozenset(found)


@cache
def _texts(module: str, name: str) -> frozenset[str]:
    """The texts that a part writes as constants."""
    nodes = (one for node in source(module).parts[name] for one in ast.walk(node))
    values = (one.value for one in nodes if isinstance(one, ast.Constant))
    return frozenset(value for value in values if isinstance(value, str))


def _acting(names: Iterable[str]) -> set[Part]:
    """What acts when the modules of imported names, and the packages that they are in, load."""
    found = set()
    for name in names:
        words = name.split(".")
        loaded = (".".join(words[: length + 1]) for length in range(len(words)))
        found |= {(module, ACTS) for module in loaded if path(module)}
    return found


def _found(dotted: str) -> set[Part]:
    """The part that a dotted name stands for; all of a module that is used as a value, or that has
    no such name.
    """
    module, *words = dotted.split(".")
    while words:
        if home := _face(module).get(words[0]):
            return {(f"{module}.{home}", words[0])}
        if not path(f"{module}.{words[0]}"):
            break
        module = f"{module}.{words.pop(0)}"
    known = source(module)
    if words and words[0] in known.parts:
        return {(module, words[0])}
    if words and words[0] in known.imports:
        return _found(".".join([known.imports[words[0]], *words[1:]]))
    return of_module(module)


@cache
def _face(package: str) -> dict[str, str]:
    """The module from which a package's face takes each of its names."""
    if path(package).name != "__init__.py":
        return {}
    nodes = (
        node for part in source(package).parts.values() for one in part for node in ast.walk(one)
    )
    faces = (node for node in nodes if isinstance(node, ast.keyword) and node.arg == "submod_attrs")
    homes = next((ast.literal_eval(node.value) for node in faces), {})
    return {name: module for module, names in homes.items() for name in names}


def _files(node: ast.AST, folder: Path) -> set[Part]:
    """The files that a statement names: beside its module, or in data/ of the project."""
    found = set()
    for one in ast.walk(node):
        if isinstance(one, ast.Constant) and isinstance(one.value, str):
            if re.fullmatch(r"[\w-]+\.(?!py$|ipynb$)\w+", one.value):
                found.add(folder / one.value)
        elif isinstance(one, ast.BinOp) and (match := DATA.match(ast.unparse(one))):
            found.add(LIBRARY.parents[1] / "data" / (match[1] or ""))
    return {(str(file), ACTS) for file in found if file.exists()}


def _names(node: ast.AST, hidden: frozenset[str] = frozenset()) -> Iterator[list[str]]:
    """The names that code uses, with the attributes taken of them, `a.b.c` as [a, b, c]; without
    those that are local to a function.
    """
    chain = _chain(node)
    if chain[0]:
        yield from [] if chain[0] in hidden else [chain]
        return
    inner = hidden
    if isinstance(node, FUNCTIONS):
        inner |= {one.arg for one in ast.walk(node.args) if isinstance(one, ast.arg)}
        inner |= _local(node.body if isinstance(node.body, list) else [])
    elif isinstance(node, LOOPS):
        inner |= {name for one in node.generators for name in _assigned(one.target)}
        yield from _names(node.generators[0].iter, hidden)
    for field, value in ast.iter_fields(node):
        outside = field in ("decorator_list", "args", "returns") and isinstance(node, FUNCTIONS)
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _names(child, hidden if outside else inner)


def _local(body: Iterable[ast.AST]) -> set[str]:
    """The names that a function's own statements assign to."""
    found, waiting = set(), list(body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        if not isinstance(node, (*DEFINED, ast.Lambda, *LOOPS)):
            waiting += ast.iter_child_nodes(node)
    return found


def _chain(node: ast.AST, through: Any = ast.Attribute) -> list[str]:
    words: list[str] = []
    while isinstance(node, through):
        words += [node.attr] if isinstance(node, ast.Attribute) else []
        node = node.value
    return [node.id, *words[::-1]] if isinstance(node, ast.Name) else [""]


# ---- digests
@cache
def _code(module: str, name: str) -> str:
    """The digest of a part; empty where it holds no code."""
    if path(module).suffix not in (".py", ".ipynb"):
        return files.folder_digest(path(module))
    return (
        files.digest([_dump(node) for node in own]) if (own := source(module).parts[name]) else ""
    )


def _dump(node: ast.AST) -> str:
    """Code without comments, docstrings and layout."""
    node = copy.deepcopy(node)
    for one in ast.walk(node):
        if isinstance(body := getattr(one, "body", None), list):
            one.body = [line for line in body if not _is_text(line)]
    return ast.dump(node)


def _label(file: Path) -> str:
    home = next((one for one in (LIBRARY, LIBRARY.parents[1]) if file.is_relative_to(one)), None)
    return str(file.relative_to(home)) if home else file.name
