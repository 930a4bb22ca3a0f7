"""Formulas in the pages of notebooks are drawn, so that they are read without a network."""

import base64
import re
from html.parser import HTMLParser
from itertools import combinations
from xml.etree import ElementTree

import nbformat
import pytest

from driftbook.publishing import pages
from driftbook.study.files import ROOT

# as it is put into a cell, and as it stands in a page
IMAGE = re.compile(r'<img alt="([^"]*)" src="data:image/svg\+xml;place=(\w+);base64,([^"]*)">')
SHOWN = re.compile(
    r'<img alt="([^"]*)" style="([^"]*)" src="data:image/svg\+xml;base64,([^"]*)"/?>'
)


def drawings(text: str) -> list[tuple[str, str, ElementTree.Element]]:
    """Alternative text, place and drawing of each formula that was drawn."""
    found = IMAGE.findall(pages.with_formulas(text))
    return [
        (tex, place, ElementTree.fromstring(base64.b64decode(svg))) for tex, place, svg in found
    ]


def height(drawing: ElementTree.Element) -> float:
    """In points."""
    return float(drawing.get("height").removesuffix("pt"))


def test_formulas_are_drawn_in_their_line_and_alone():
    text = "the share $h_f<1$ of a\n\n$$\\frac{a}\n{b}$$\n\ncategory"
    (tex, place, small), (other, centred, large) = drawings(text)
    assert (tex, other) == ("h_f&lt;1", r"\frac{a} {b}")
    assert 10 < int(place) < 50  # tenths of a point below the line
    assert centred == "alone"
    assert height(large) > 1.5 * height(small)
    assert all(one.tag.endswith("svg") and one.findall(".//{*}path") for one in (small, large))
    kept = IMAGE.sub("#", pages.with_formulas(text))
    assert kept == "the share # of a\n\n#\n\ncategory"


@pytest.mark.parametrize(
    "text",
    [
        "`a$b$c` and ``$x$``",  # code
        "$18.00 is less than $20",  # money
        "18, $18.00 and 18%",
        r"$\nosuchmacro{x}$ and $$\nosuchmacro{x}$$",  # what cannot be drawn
    ],
)
def test_what_is_no_formula_stays(text):
    assert pages.with_formulas(text) == text


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_formula_of_a_notebook_can_be_drawn(path, monkeypatch):
    drawn = []
    draw = pages._formula
    monkeypatch.setattr(pages, "_formula", lambda *tex: drawn.append(draw(*tex)) or drawn[-1])
    cells = nbformat.read(path, 4).cells
    text = "\n\n".join(one.source for one in cells if one.cell_type == "markdown")
    left = re.sub(r"`+[^`]+`+|\$(?=[\d.])", "", IMAGE.sub("", pages.with_formulas(text)))
    assert "$" not in left
    assert all(IMAGE.fullmatch(one) for one in drawn)


def test_a_page_shows_formulas_without_a_network(tmp_path):
    cells = [
        nbformat.v4.new_markdown_cell("# 09\n\nIs $x^2$ so?"),
        nbformat.v4.new_code_cell("'$x^2$'"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "page.ipynb")
    pages.notebook_pages(tmp_path)
    page = (tmp_path / "page.html").read_text()
    [(tex, style, _)] = SHOWN.findall(page)
    assert tex == "x^2"
    assert re.fullmatch(r"max-width:100%;vertical-align:-\d+\.\dpt", style)
    assert not re.search(r'(src|href)="(https?:)?//', page)


def test_no_line_stands_in_two_templates_of_pages():
    """What the study report and the audit page share is a macro of page_parts.html."""
    folder = ROOT / "lib" / "driftbook" / "publishing"
    lines = [
        {line.strip() for line in path.read_text(encoding="utf-8").splitlines()}
        for path in sorted(folder.glob("*.html"))
    ]
    assert len(lines) > 2
    twice = {line for one, other in combinations(lines, 2) for line in one & other}
    own = ("{% from parts import ", "<script>{{ script }}")
    assert [line for line in twice if len(line) > 25 and not line.startswith(own)] == []


ACTS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "<a href='data:text/html,<script>alert(1)</script>'>a</a>",
    "<iframe src=javascript:alert(1)></iframe>",
    "<svg onload=alert(1)></svg>",
    "<style>body{display:none}</style>",
    "<form action=//x><input></form>",
    "<meta http-equiv=refresh content='0;url=//x'>",
    "<p onclick=alert(1) style='position:fixed'>a</p>",
)


class Acting(HTMLParser):
    """What acts in a page: elements, attributes and addresses."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        given = {name: value or "" for name, value in attributes}
        acts = tag in ("iframe", "svg", "form", "input", "object", "embed")
        acts |= tag == "meta" and given.get("http-equiv") == "refresh"
        acts |= any(name.startswith("on") for name in given)
        acts |= given.get("href", "").lower().startswith(("javascript:", "data:"))
        acts |= tag == "img" and not given.get("src", "data:image").startswith("data:image")
        acts |= "fixed" in given.get("style", "") or given.get("src", "").startswith("javascript")
        self.found += [(tag, given)] * acts


def test_nothing_that_a_notebook_shows_acts_in_its_page(tmp_path):
    text = "\n\n".join(ACTS)
    table = f"<style scoped>td {{}}</style><table><tr><td>{text}</td></tr></table>"
    shown = [
        {"text/markdown": text},
        {"text/html": table},
        {"image/svg+xml": "<svg onload='alert(1)'><script>alert(1)</script></svg>"},
        {"text/latex": text},
        {"application/javascript": "alert(1)"},
        {"text/plain": text},
    ]
    made = [nbformat.v4.new_output("display_data", data=data) for data in shown]
    made.append(nbformat.v4.new_output("error", ename=text, evalue=text, traceback=[text]))
    cells = [nbformat.v4.new_markdown_cell(f"# 09\n\n{text}")]
    cells.append(nbformat.v4.new_code_cell(repr(text), outputs=made))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "page.ipynb")
    pages.notebook_pages(tmp_path)
    page = (tmp_path / "page.html").read_text()
    head, _, body = page.partition("</head>")
    acting = Acting()
    acting.feed(body)
    assert acting.found == []
    assert "alert(1)</script>" not in body
    assert "<h1" in body
    assert "<td>" in body
    assert head.index("Content-Security-Policy") < head.index("<script")
    assert "default-src 'none'" in head
    assert "script-src" not in head


def test_a_caption_is_no_html_and_no_link_and_the_report_shows_it_as_it_was(tmp_path):
    import matplotlib.pyplot as plt

    from driftbook.figures import drawing

    caption = "\n\n".join(ACTS)
    drawing.save_figure(plt.figure(figsize=(1, 1)), tmp_path, "name", caption, "a table")
    kept = (tmp_path / "name.md").read_text()
    assert "<" not in kept
    assert "](" not in kept
    assert drawing.plain_caption(kept) == f"{caption}\n\nMade by a table.\n"
