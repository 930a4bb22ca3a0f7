"""The executed notebooks of a study as pages beside its report."""

from pathlib import Path
from typing import Any

from driftbook.study.files import replacing
from driftbook.study.nameless import nameless


def notebook_pages(folder: Path) -> list[dict[str, str]]:
    """The executed notebooks as pages (converted where the page is missing or older), with their
    titles and relative links.
    """
    found = []
    for path in sorted(folder.rglob("*.ipynb")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        page = path.with_suffix(".html")
        if not page.is_file() or page.stat().st_mtime < path.stat().st_mtime:
            _convert(path, page)
        name = path.relative_to(folder).with_suffix("").as_posix()
        found.append({"name": name, "link": f"notebooks/{name}.html"})
    return found


_EXPORTERS: list = []  # made once: it takes a second


def _convert(path: Path, page: Path) -> None:
    """Write a notebook as a page without scripts from elsewhere."""
    import nbformat

    if not _EXPORTERS:
        from nbconvert import HTMLExporter  # a second to import, and only pages need it

        _EXPORTERS.append(
            HTMLExporter(mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url="")
        )
    shown = nameless_notebook(nbformat.read(path, as_version=4))
    titled = {"metadata": {"name": path.stem}}
    body, _ = _EXPORTERS[0].from_notebook_node(shown, titled)
    with replacing(page) as new:
        new.write_text(body, encoding="utf-8")


def nameless_notebook(notebook: Any) -> Any:
    """The notebook without users' names and folders in what its cells show and in the parameters
    that it was run with.
    """
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.source = nameless(cell.source)
        for shown in cell.get("outputs", []):
            data = shown.get("data", {})
            data.update({k: nameless(v) for k, v in data.items() if k.startswith("text/")})
            for key in ("text", "evalue"):
                if key in shown:
                    shown[key] = nameless(shown[key])
            if "traceback" in shown:
                shown["traceback"] = [nameless(line) for line in shown["traceback"]]
    return notebook
