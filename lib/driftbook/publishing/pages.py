"""The executed notebooks of a study as pages beside its report."""

import base64
import html
import io
import re
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


# a code span, which stays as it is; a formula of its own line; a formula in a sentence
_FORMULA = re.compile(r"(`+[^`]+`+)|\$\$(.+?)\$\$|\$(?!\s)([^$]+?)(?<!\s)\$(?!\w)", re.DOTALL)
# how far a drawn formula reaches below the line, in tenths of a point, or that it is alone
_PLACED = re.compile(r'src="data:image/svg\+xml;place=(alone|\d+);')
SHOWN_TAGS = (*"p br hr div span pre code img table thead tbody tr th td del sup sub".split(),)
SHOWN_TAGS += tuple(f"h{level}" for level in range(1, 7))
_STYLE = re.compile(r"<style\b[^>]*>.*?</style>", re.DOTALL | re.IGNORECASE)
_EMBEDDED = re.compile(r"data:image/(png|svg\+xml);(place=\w+;)?base64,[A-Za-z0-9+/=\s]*\Z")
_LINKED = re.compile(r"https?://|mailto:|#|[\w./-]+\Z", re.IGNORECASE)
# a second wall: a browser runs no script of a page, and asks no other server
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:;"
    " base-uri 'none'; form-action 'none'"
)
_EXPORTERS: list = []  # made once: it takes a second


def _convert(path: Path, page: Path) -> None:
    """Write a notebook as a page without scripts from elsewhere, its formulas as drawings."""
    import nbformat

    if not _EXPORTERS:
        from nbconvert import HTMLExporter  # a second to import, and only pages need it

        none = dict.fromkeys(("mathjax_url", "require_js_url", "jquery_url", "mermaid_js_url"), "")
        _EXPORTERS.append(HTMLExporter(**none, sanitize_html=True))
        _EXPORTERS[0].register_filter("clean_html", _harmless)
    shown = nameless_notebook(nbformat.read(path, as_version=4))
    for cell in shown.cells:
        if cell.cell_type == "markdown":
            cell.source = with_formulas(cell.source)
    titled = {"metadata": {"name": path.stem}}
    body, _ = _EXPORTERS[0].from_notebook_node(shown, titled)
    with replacing(page) as new:
        new.write_text(_PLACED.sub(_style, _closed(body)), encoding="utf-8")


def _harmless(element: Any) -> str:
    """HTML of a cell or of what it shows with nothing in it that acts, loads or restyles: what
    names and notes of models and study files wrote as HTML is seen as it was written.
    """
    import bleach

    text = _STYLE.sub("", element.decode() if isinstance(element, bytes) else str(element))
    attributes = {"*": ["class", "id"], "a": _keeps, "img": _keeps}
    kinds = (*bleach.ALLOWED_PROTOCOLS, "data")
    return bleach.clean(text, {*bleach.ALLOWED_TAGS, *SHOWN_TAGS}, attributes, kinds)


def _keeps(_: str, name: str, value: str) -> bool:
    """Whether an image or a link keeps an attribute: an image is embedded, a link is to a page."""
    if name == "src":
        return bool(_EMBEDDED.match(value))
    return name in ("alt", "class", "id") or (name == "href" and bool(_LINKED.match(value)))


def _closed(page: str) -> str:
    """The page under POLICY."""
    return page.replace(
        "<head>", f'<head><meta http-equiv="Content-Security-Policy" content="{POLICY}">', 1
    )


def with_formulas(text: str) -> str:
    """Markdown with its formulas drawn, so that a page shows them without a script or a network;
    their TeX is the drawing's alternative text. What matplotlib cannot draw stays as TeX.
    """
    return _FORMULA.sub(lambda found: found[1] or _formula(found[2] or found[3], found[2]), text)


def _formula(tex: str, alone: str | None) -> str:
    """A formula as an inline picture on the line of its text, or centred where it is alone."""
    from matplotlib import rc_context
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import math_to_image

    tex, drawn, font = " ".join(tex.split()), io.BytesIO(), FontProperties(size=11)
    large = tex.replace(r"\frac", r"\dfrac") if alone else tex
    with rc_context({"mathtext.fontset": "cm", "svg.hashsalt": "formula"}):
        try:
            depth = math_to_image(f"${large}$", drawn, font, 72, "svg")
        except ValueError:
            return f"$${tex}$$" if alone else f"${tex}$"
    place = "alone" if alone else f"{10 * depth:.0f}"
    source = base64.b64encode(drawn.getvalue()).decode()
    source = f"data:image/svg+xml;place={place};base64,{source}"
    return f'<img alt="{html.escape(tex)}" src="{source}">'


def _style(found: re.Match[str]) -> str:
    """The place of a formula as a style, which nbconvert would have taken off."""
    place = "display:block;margin:1em auto"
    if found[1] != "alone":
        place = f"vertical-align:-{int(found[1]) / 10}pt"
    return f'style="max-width:100%;{place}" src="data:image/svg+xml;'


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
