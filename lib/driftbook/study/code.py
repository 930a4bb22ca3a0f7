"""The code that a result depends on, found by following names: functions, classes, constants and
files of the library, blind to comments, docstrings and layout.

We start at a notebook or at names of the library. A name leads to the statements that give it a
value, and each statement to the names that it uses, through modules and the faces of packages.
Of a module that is imported on the way, the statements that act at its import count as well. So
an edit of a function changes the digests of what can call it, and no others.
"""

import ast
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from driftbook.study import files

LIBRARY = Path(__file__).resolve().parents[1]
PACKAGE = LIBRARY.name
VOCABULARY = f"{PACKAGE}.study."

# A name in a module (dotted name), a notebook (path, or path#variable) or a file (path).
CodePart = tuple[str, str]
ACTS = ""  # instead of a name: the statements that act whenever the module is imported
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
LOOPS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DEFINED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
DYNAMIC = {"import_module", "__import__"}
DATA = re.compile(r"ROOT / 'data' / (?:'([\w.-]+)'|\w+)")


def fingerprint(roots: Iterable[CodePart], texts: Iterable[str] = ()) -> str:
    """One digest of the code that these parts depend on; see `closure`."""
    return files.digest(by_file(roots, texts), 12)


def by_file(roots: Iterable[CodePart], texts: Iterable[str] = ()) -> dict[str, str]:
    """The digest of what these parts depend on, by file; see `closure`."""
    return _kept(_by_file, set(roots), set(texts))


def _by_file(roots: set[CodePart], texts: set[str]) -> dict[str, str]:
    found: dict[str, dict[str, str]] = {}
    for module, name in closure(roots, texts):
        if code := _code(module, name):
            found.setdefault(_label(module), {})[name] = code
    return {label: files.digest(parts, 12) for label, parts in sorted(found.items())}


def of_notebook(notebook: Path, variable: str = ACTS) -> set[CodePart]:
    """The parts of a notebook: all of its code, or what leads to the last value of a variable.

    A statement leads to a variable if it assigns to a name that the variable is made from, or
    calls a method of it or a function on it. What a notebook only shows does not count.
    """
    return {(f"{notebook}#{variable}", variable)}


def of_module(module: str) -> set[CodePart]:
    """All parts of a module, or of a package and its modules."""
    found = {(module, name) for name in source(module).parts}
    if module != PACKAGE and path(module).name == "__init__.py":
        for file in sorted(path(module).parent.glob("[!_]*.py")):
            found |= of_module(f"{module}.{file.stem}")
    return found


def closure(roots: Iterable[CodePart], texts: Iterable[str] = ()) -> set[CodePart]:
    """The parts that these lead to, directly or not, and they themselves.

    What is found by a text counts where the text is written in the code, or is among `texts` (of a
    study file): a function that a decorator registers, or an entry of a table that is used as
    `TABLE[text]`. The package `study` is no such code: it lists all that a study file may say.
    """
    waiting, found, known = list(roots), set(), set(texts)
    while waiting:
        part = waiting.pop()
        if part not in found:
            found.add(part)
            waiting += _uses(*part)
            known |= set() if part[0].startswith(VOCABULARY) else _texts(*part)
        if not waiting:
            tables = ((module, source(module).by_text.get(name, {})) for module, name in found)
            named = {(module, one[text]) for module, one in tables for text in one.keys() & known}
            waiting += named - found
    return found


def choices(roots: Iterable[CodePart]) -> frozenset[str]:
    """The texts on which it depends what these parts lead to: keys of tables that they look up."""
    return frozenset(_kept(_choices, set(roots), set()))


def _choices(roots: set[CodePart], _: set[str]) -> list[str]:
    files = (file.relative_to(LIBRARY.parent).with_suffix("") for file in LIBRARY.rglob("*.py"))
    modules = (".".join(file.parts).removesuffix(".__init__") for file in files)
    every = {text for one in modules for texts in source(one).by_text.values() for text in texts}
    found = closure(roots, every)
    return sorted({text for one, name in found for text in source(one).by_text.get(name, ())})


# ---- what was found is kept, for the code that it was found in
def _kept(find: Callable[[set[CodePart], set[str]], Any], roots: set[CodePart], texts: set[str]):
    """What `find` finds; read from outputs/code where it was found before in the same code.

    Every file is pinned before it is read; where one was edited in between, nothing is kept.
    """
    notebooks = sorted({str(path(module)) for module, _ in roots if "/" in module})
    pinned = [pinned_library(), [_pinned(Path(file)) for file in notebooks]]
    key = files.digest([pinned, find.__name__, sorted(roots), sorted(texts)])
    file = files.OUTPUTS / "code" / f"{key}.json"
    if file.is_file() and not _edited():
        with suppress(OSError, ValueError):  # torn, or just deleted
            return files.read_json(file)
    found = find(roots, texts)
    if not _edited():
        with suppress(OSError):  # that outputs cannot be written is said elsewhere
            files.write_json(file, found)
    return found


@cache
def pinned_library() -> str:
    """The digest of all that is read here of the library and of data/, and of Python, whose
    versions write syntax trees differently.
    """
    folders = (LIBRARY, LIBRARY.parents[1] / "data")
    every = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    read = sorted(file for file in every if "__pycache__" not in file.parts)
    return files.digest([sys.version, {str(file): _pinned(file) for file in read}])


_pinned = cache(files.file_digest)


@cache
def _edited() -> set[Path]:
    """The files that were no longer as they were pinned when they were read."""
    return set()


def _text(file: Path) -> str:
    pinned_library()
    before, text = _pinned(file), file.read_text(encoding="utf-8")
    if files.file_digest(file) != before:
        _edited().add(file)
    return text


@dataclass(frozen=True, eq=False)
class ModuleCode:
    """The statements behind each name of a module, what its imports bind (name, dotted name), and
    what a text finds: by ACTS a registered function, by a table's name[] one of its entries.
    """

    parts: dict[str, list[ast.AST]]
    imports: dict[str, str]
    by_text: dict[str, dict[str, str]] = field(default_factory=dict)


@cache
def source(module: str) -> ModuleCode:
    """The code of a module or notebook; none of another file."""
    file = path(module)
    if file.suffix == ".ipynb":
        return _notebook(file, module.removeprefix(f"{file}#"))
    tree = _parsed(_text(file) if file.suffix == ".py" else "")
    imports, parts = _imports(tree.body), {ACTS: []}
    for node in tree.body:
        for name in _bound(node):
            parts.setdefault(name, []).append(node)
    defined = (node for node in tree.body if isinstance(node, DEFINED))
    # the package `study` has no decorator that registers a function
    registering = {name for name, what in imports.items() if not what.startswith(VOCABULARY)}
    registered = {node.name for node in defined if _decorators(node) & registering}
    by_text = {ACTS: {name: name for name in registered}}
    for name, entries in _tables(tree.body):
        parts |= {f"{name}[]": []} | {f"{name}[{key}]": [node] for key, node in entries.items()}
        by_text[f"{name}[]"] = {key: f"{name}[{key}]" for key in entries}
    return ModuleCode(parts, imports, by_text)


def _parsed(code: str) -> ast.Module:
    """Code without comments, docstrings and layout."""
    tree = ast.parse(code)
    for node in _walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [line for line in body if not _is_text(line)]
    return tree


def _walk(node: ast.AST) -> list[ast.AST]:
    """The node and all within it, as ast.walk gives them but for what only says that a name is
    read or written; several times as fast.
    """
    found = [node]
    for one in found:  # which grows meanwhile
        for name in one._fields:
            value = getattr(one, name, None)
            if isinstance(value, list):
                found += [each for each in value if isinstance(each, ast.AST)]
            elif isinstance(value, ast.AST) and not isinstance(value, ast.expr_context):
                found.append(value)
    return found


def _notebook(file: Path, variable: str) -> ModuleCode:
    """The code of a notebook, or what leads to a variable, as one part."""
    cells = json.loads(_text(file))["cells"]
    code = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    body = _parsed("\n".join(code)).body
    imports = _imports(body)
    if variable:
        ends = [number for number, node in enumerate(body, 1) if variable in _assigned(node)]
        if not ends:
            raise ValueError(f"{file.name} gives no value to {variable!r}, its result")
        body = _leading(body[: ends[-1]], variable)
    return ModuleCode({variable: body}, imports)


def _leading(body: list[ast.stmt], variable: str) -> list[ast.stmt]:
    """The statements that lead to the last value of a variable."""
    late: set[str] = set()  # names that functions look up when they are called
    while True:
        needed, kept, known = {variable}, [], set(late)
        for node in reversed(body):
            if (_assigned(node) | _changed(node)) & (needed | late):
                kept.append(node)
                used = {name for name, *_ in _names(node)}
                if isinstance(node, ast.Assign | ast.AnnAssign):
                    needed -= _assigned(node, through=())
                needed |= used
                late |= used if isinstance(node, DEFINED) else set()
        if late == known:
            return kept[::-1]


@cache
def path(module: str) -> Path | None:
    """The file of a module or of a package's face, None where the library has none; of a notebook
    or another file its path.
    """
    if "/" in module:
        return Path(re.sub(r"(?<=\.ipynb)#\w*$", "", module))  # a folder may have a # in its name
    stem = LIBRARY.parent / module.replace(".", "/")
    files = (stem.with_suffix(".py"), stem / "__init__.py")
    return next((file for file in files if file.is_file()), None)


# ---- what a statement binds
def _bound(node: ast.stmt) -> set[str]:
    """The names that a statement of a module gives a value, and ACTS where it acts on others."""
    if isinstance(node, ast.Import | ast.ImportFrom) or _is_main(node):
        return set()
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    plain = isinstance(node, ast.Assign | ast.AnnAssign) and all(
        isinstance(target, ast.Name | ast.Tuple) for target in targets
    )
    return _assigned(node) | (set() if plain or isinstance(node, DEFINED) else {ACTS})


def _tables(body: Iterable[ast.stmt]) -> Iterator[tuple[str, dict[str, ast.expr]]]:
    """The constants that are written as a table with texts as keys, with their entries."""
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            keys = [getattr(key, "value", None) for key in node.value.keys]
            if isinstance(target, ast.Name) and all(isinstance(key, str) for key in keys):
                yield target.id, dict(zip(keys, node.value.values, strict=True))


def _decorators(node: ast.stmt) -> set[str]:
    return {_chain(getattr(one, "func", one))[0] for one in node.decorator_list}


def _assigned(*nodes: ast.AST, through: Any = ast.Attribute | ast.Subscript) -> set[str]:
    """The names that statements assign to, whole or in part, outside of the scopes within them."""
    found, waiting = set(), list(nodes)
    while waiting:
        node = waiting.pop()
        if isinstance(getattr(node, "ctx", None), ast.Store):
            found.add(_chain(node, through)[0])
        if isinstance(node, DEFINED):
            found.add(node.name)
        elif not isinstance(node, (ast.Lambda, *LOOPS)):
            waiting += ast.iter_child_nodes(node)
    return found - {""}


def _changed(node: ast.stmt) -> set[str]:
    """The names whose values a statement may change, as it calls a method of them or a function on
    them for no value.
    """
    calls = [
        one.value
        for one in _walk(node)
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
            found |= _imports(_statements(node), within)
    return found


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements within a statement, and what holds some."""
    for part in ("body", "orelse", "handlers", "finalbody", "cases"):
        if isinstance(inside := getattr(node, part, None), list):
            yield from inside


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_main(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


# ---- what a statement uses
@cache
def _uses(module: str, name: str) -> frozenset[CodePart]:
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
                found.add(_part(module, [root, *rest]))
            if DYNAMIC & {root, *rest}:
                raise ValueError(
                    f"{path(module)} imports a module by a name that is only known when it runs;"
                    " write an import statement, so that what depends on it can be found"
                )
    return frozenset(found)


@cache
def _texts(module: str, name: str) -> frozenset[str]:
    """The texts that a part writes as constants."""
    nodes = (one for node in source(module).parts[name] for one in _walk(node))
    values = (one.value for one in nodes if isinstance(one, ast.Constant))
    return frozenset(value for value in values if isinstance(value, str))


def _acting(names: Iterable[str]) -> set[CodePart]:
    """What acts when the modules of imported names, and the packages that they are in, load."""
    found = set()
    for name in names:
        words = name.split(".")
        loaded = (".".join(words[: length + 1]) for length in range(len(words)))
        found |= {(module, ACTS) for module in loaded if path(module)}
    return found


def _found(dotted: str) -> set[CodePart]:
    """The part that a dotted name stands for; all of a module that is used as a value, or that has
    no such name.
    """
    module, *words = dotted.split(".")
    while words:
        if home := _face(module).get(words[0]):
            return _found(".".join([module, home, *words]))
        if not path(f"{module}.{words[0]}"):
            break
        module = f"{module}.{words.pop(0)}"
    known = source(module)
    if words and words[0] in known.parts:
        return {_part(module, words)}
    if words and words[0] in known.imports:
        return _found(".".join([known.imports[words[0]], *words[1:]]))
    return of_module(module)


def _part(module: str, words: list[str]) -> CodePart:
    """A name of a module; only the looking up of one entry, where it is a table and so used."""
    name, *rest = words
    looked_up = rest[:1] in (["[]"], ["get"]) and f"{name}[]" in source(module).parts
    return (module, f"{name}[]" if looked_up else name)


@cache
def _face(package: str) -> dict[str, str]:
    """The module from which a package's face takes each of its names."""
    if path(package).name != "__init__.py":
        return {}
    nodes = (node for part in source(package).parts.values() for one in part for node in _walk(one))
    faces = (node for node in nodes if isinstance(node, ast.keyword) and node.arg == "submod_attrs")
    homes = next((ast.literal_eval(node.value) for node in faces), {})
    return {name: module for module, names in homes.items() for name in names}


def _files(node: ast.AST, folder: Path) -> set[CodePart]:
    """The files that a statement names: beside its module, or in data/ of the project."""
    found = set()
    for one in _walk(node):
        if isinstance(one, ast.Constant) and isinstance(one.value, str):
            if re.fullmatch(r"[\w-]+\.(?!py$|ipynb$)\w+", one.value):
                found.add(folder / one.value)
        elif _divides(one) and (match := DATA.match(ast.unparse(one))):
            found.add(LIBRARY.parents[1] / "data" / (match[1] or ""))
    return {(str(file), ACTS) for file in found if file.exists()}


def _divides(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)


def _names(node: ast.AST, hidden: frozenset[str] = frozenset()) -> Iterator[list[str]]:
    """The names that code uses, with the attributes taken of them, `a.b.c` as [a, b, c]; without
    those that are local to a function.
    """
    chain = _chain(node)
    if chain[0]:
        unused = chain[0] in hidden or (isinstance(node.ctx, ast.Store) and not chain[1:])
        yield from [] if unused else [chain]
        return
    if isinstance(node, ast.Subscript) and (chain := _chain(node.value))[0]:
        yield from [] if chain[0] in hidden else [[*chain, "[]"]]
        yield from _names(node.slice, hidden)
        return
    inner = hidden
    if isinstance(node, FUNCTIONS):
        inner |= {one.arg for one in _walk(node.args) if isinstance(one, ast.arg)}
        inner |= _assigned(*node.body, through=()) if isinstance(node.body, list) else set()
    elif isinstance(node, LOOPS):
        inner |= {name for one in node.generators for name in _assigned(one.target)}
        yield from _names(node.generators[0].iter, hidden)
    for part, value in ast.iter_fields(node):
        outside = part in ("decorator_list", "args", "returns") and isinstance(node, FUNCTIONS)
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _names(child, hidden if outside else inner)


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
        files.digest([ast.dump(node) for node in own])
        if (own := source(module).parts[name])
        else ""
    )


@cache
def _label(module: str) -> str:
    """The path of a file in the library, or in the project."""
    file = path(module)
    home = next((one for one in (LIBRARY, LIBRARY.parents[1]) if file.is_relative_to(one)), None)
    return str(file.relative_to(home)) if home else file.name
