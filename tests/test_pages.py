"""Formulas in the pages of notebooks are drawn, so that they are read without a network."""

import base64
import re
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
