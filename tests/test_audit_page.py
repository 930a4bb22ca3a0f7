"""The audit's page: whole for every record, nothing of it unescaped, no network; and in chromium it
filters, sorts, fits a phone and breaks no rule of axe-core.
"""

import base64
import copy
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import browsing
from audited import large_record
from driftbook.publishing import audit_figures
from driftbook.publishing.audit_page import write_audit_page

HOSTILE = (
    '<img src=x onerror="alert(1)">',
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "' onmouseover='alert(1)' x='",
    '" style="background:url(//evil.example/x)" y="',
    "javascript:alert(1)",
    "//evil.example/x",
    "{{ 7*7 }} ${7*7} \u2028 \x00 \U0001f600 \ud800",
)
SECTIONS = ["answer", "effects", "categories", "items", "do", "not-tested", "how"]
FIXED = {"format"}  # what a page is refused for


class Seen(HTMLParser):
    """A page's tags with their attributes, and the text of each script."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag in ("script", "style")
        self.scripts += [""] * (tag == "script")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if not self.inside:
            self.text.append(data)
        elif self.tags[-1][0] == "script":
            self.scripts[-1] += data


def read(path: Path) -> Seen:
    page = Seen()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def made(record: dict, folder: Path) -> Seen:
    return read(write_audit_page(record, folder / "audit.html"))


def shape(page: Seen) -> list[tuple[str, list[str]]]:
    """The tags and the names of their attributes, which no text of a record may change."""
    return [(tag, sorted(attrs)) for tag, attrs in page.tags]


def with_text(value, text: str, key: str = ""):
    """The record with `text` after every one of its strings but those that are FIXED."""
    if isinstance(value, dict):
        return {name: with_text(one, text, name) for name, one in value.items()}
    if isinstance(value, list):
        return [with_text(one, text, key) for one in value]
    return value + text if isinstance(value, str) and key not in FIXED else value


def with_keys(record: dict, text: str) -> dict:
    """The record with `text` in the names of items' details and of packages."""
    found = copy.deepcopy(record)
    for item in found["items"]:
        for side in ("base_detail", "candidate_detail"):
            item[side] = {name + text: value for name, value in item[side].items()}
    packages = found["driftbook"]["packages"]
    found["driftbook"]["packages"] = {name + text: value for name, value in packages.items()}
    return found


# ---- what every page is
def test_sections_come_in_their_order(tmp_path):
    page = made(large_record(), tmp_path)
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == SECTIONS
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    wanted = [attrs["href"][1:] for _, attrs in page.tags if attrs.get("href", "")[:1] == "#"]
    assert wanted
    assert set(wanted) <= set(ids)


def test_verdicts_are_said_with_their_numbers(tmp_path):
    record = large_record()
    words = " ".join(" ".join(made(record, tmp_path).text).split())
    assert "−51.5 points [−57.6, −45.4], 95% interval" in words
    assert "base 82.5 → candidate 31.0 · 180 of 250 prompts asked, 2 without a score" in words
    assert "It would take about 640 prompts like these to know. The benchmark has 250." in words
    assert "41 answers, read wrongly, would overturn it." in words
    assert "This adapter, not this recipe." in words
    assert "not evidence of safety" in words
    assert words.index("worse Safety") < words.index("cannot tell Bias, Usefulness")
    for row in record["verdicts"]:
        assert row["sentence"] in words


def test_data_in_the_page_are_the_record(tmp_path):
    record = with_text(large_record(), "</script><!-- & \u2028")
    page = made(record, tmp_path)
    assert json.loads(page.scripts[0]) == record
    assert len(page.scripts) == 2


@settings(max_examples=15, deadline=None)
@given(st.text(min_size=1, max_size=20))
@example(HOSTILE[0])
@example("".join(HOSTILE))
def test_no_text_of_a_record_becomes_markup(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("hostile")
    record = large_record(5, 3, 2)
    hostile = with_keys(with_text(record, text), text)
    plain = with_text(record, "x")
    hostile["text_folder"] = text
    has_link = bool(hostile["text_folder"].strip("/"))
    plain["text_folder"] = "x" if has_link else None
    page = made(hostile, folder)
    assert shape(page) == shape(made(plain, folder))
    assert json.loads(page.scripts[0])["items"] == hostile["items"]
    for _, attrs in page.tags:
        for name in ("src", "href", "action", "srcset", "data"):
            assert re.match(r"#|\./|$", attrs.get(name, "") or "")
        assert not [name for name in attrs if name.startswith("on")]


@pytest.mark.parametrize("field", ["name", "kind", "word", "area", "worse", "check", "command"])
@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_string_is_nowhere_as_it_is(tmp_path, field, text):
    def replaced(value):
        if isinstance(value, dict):
            return {key: text if key == field else replaced(one) for key, one in value.items()}
        return [replaced(one) for one in value] if isinstance(value, list) else value

    write_audit_page(replaced(large_record(5, 3, 2)), tmp_path / "audit.html")
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    before, _, rest = page.partition('<script type="application/json"')
    data, _, after = rest.partition("</script>")
    if re.search("[<\"']", text):
        assert text not in before + after
    assert "<" not in data


def test_page_has_no_address_of_elsewhere(tmp_path):
    page = made(large_record(), tmp_path)
    text = (tmp_path / "audit.html").read_text(encoding="utf-8")
    links = [attrs[name] for _, attrs in page.tags for name in ("src", "href") if name in attrs]
    assert [link for link in links if not link.startswith("#")] == ["./text/"]
    assert not re.search(r"https?:|@import|url\(", text)
    (policy,) = [one["content"] for _, one in page.tags if one.get("http-equiv")]
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize("folder", [None, "", "/"])
def test_no_folder_of_text_is_said(tmp_path, folder):
    page = made(large_record() | {"text_folder": folder}, tmp_path)
    assert "no folder of text was kept" in " ".join(page.text)


def test_1500_items_stay_under_3_mb(tmp_path):
    path = write_audit_page(large_record(1500, 20, 12), tmp_path / "audit.html")
    assert path.stat().st_size < 3_000_000


# ---- what may be missing
def test_a_record_with_nothing_found_is_a_whole_page(tmp_path):
    empty = large_record(0, 0, 0) | {"repairs": [], "doctor": [], "judges": [], "licences": []}
    empty |= {"not_tested": [], "system_prompt": None, "text_folder": None}
    empty["dose"] = dict.fromkeys(("kl", "loss_base", "loss_candidate", "no_op", "sentence"))
    empty["provider_share"] = {"share": None, "sentence": None}
    page = made(empty, tmp_path)
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == SECTIONS
    assert "None" not in " ".join(page.text).replace("None was given", "")
    page = made(empty | {"verdicts": []}, tmp_path)
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == SECTIONS


def test_unknown_numbers_are_said_to_be_unknown(tmp_path):
    record = large_record()
    numbers = ("base", "candidate", "difference", "ci_low", "ci_high", "p", "p_adjusted", "needed")
    unknown = dict.fromkeys((*numbers, "tipping", "judge", "margin"))
    for part in ("verdicts", "categories", "looks"):
        record[part] = [
            row | {k: v for k, v in unknown.items() if k in row} for row in record[part]
        ]
    for row in (record["candidate"], record["base"]):
        row["hash"] = None
    record["how"]["seconds"] = None
    page = made(record, tmp_path)
    words = " ".join(page.text)
    assert "no interval" in words
    assert "no estimate" in words
    assert "None" not in words
    assert "nan" not in words.lower().split()


def test_what_is_no_record_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="format is 'driftbook audit 0'"):
        write_audit_page(large_record() | {"format": "driftbook audit 0"}, tmp_path / "a.html")
    record = large_record()
    with pytest.raises(ValueError, match=r"lacks looks, items$"):
        write_audit_page(
            {name: one for name, one in record.items() if name not in ("looks", "items")},
            tmp_path / "a.html",
        )
    record["items"][0]["base"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        write_audit_page(record, tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


# ---- positions
@given(
    st.lists(st.floats(-100, 100), min_size=3, max_size=3).map(sorted),
    st.floats(0.1, 50),
    st.sampled_from(["fall", "rise"]),
)
def test_places_of_an_effect_keep_its_order(ends, margin, worse):
    keys = ("ci_low", "difference", "ci_high")
    row = dict(zip(keys, ends, strict=True)) | {"margin": margin, "worse": worse}
    figure = audit_figures.forest([row])
    (one,) = figure["rows"]
    assert 0 <= one["low"] <= one["dot"] <= one["high"] <= 100
    assert (one["low"] <= one["zero"]) or ends[0] > 0
    assert one["band_width"] > 0
    on_the_left = one["band"] < one["zero"]
    assert on_the_left == (worse == "fall")


@given(st.floats(-1e4, 1e4), st.floats(0.01, 1e4))
def test_ticks_are_round_inside_and_few(low, width):
    found = audit_figures.ticks(low, low + width)
    assert 1 <= len(found) <= 7
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in found)
    steps = [f"{b - a:.0e}"[0] for a, b in itertools.pairwise(found)]
    assert len(set(steps)) <= 1
    assert all(step in "125" for step in steps)


def test_only_the_page_s_own_script_may_run(tmp_path):
    page = made(large_record(), tmp_path)
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    (policy,) = [one["content"] for _, one in page.tags if one.get("http-equiv")]
    assert policy.endswith(f"script-src 'sha256-{digest}'")
    assert "<!--" not in page.scripts[1]


# ---- in a browser
@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    record = large_record(1500, 20, 12)
    record["items"][7]["item"] = HOSTILE[0]
    return write_audit_page(record, tmp_path_factory.mktemp("page") / "audit.html")


@pytest.fixture(scope="module")
def tab(tmp_path_factory, path):
    with browsing.tab(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def page(tab, path):
    tab.look()
    tab.open(path)
    return tab


def rows(tab: browsing.Tab) -> list[str]:
    found = tab.run("[...document.querySelectorAll('#items-table tbody tr')].map(r => r.innerText)")
    return [re.sub(r"\s+", " ", row).strip() for row in found]


def choose(tab: browsing.Tab, name: str, value: str) -> str:
    """Set a control, and what the page says then of the number of prompts."""
    kind = "input" if name == "search" else "change"
    return tab.run(
        f"(() => {{ const c = document.getElementById('items-{name}'); c.value = '{value}';"
        f" c.dispatchEvent(new Event('{kind}')); }})(),"
        " document.getElementById('items-count').textContent.split(',').slice(0, -1).join(',')"
    )


@pytest.mark.slow
def test_items_filter_sort_and_turn_pages(page):
    items = large_record(1500, 20, 12)["items"]
    assert len(rows(page)) == 25
    safe = [one for one in items if one["area"] == "safety"]
    assert choose(page, "area", "safety") == f"{len(safe)} of 1,500 prompts"
    worse = [one for one in safe if one["change"] == "worse"]
    assert choose(page, "change", "worse") == f"{len(worse)} of 1,500 prompts"
    own = [one for one in worse if one["category"] == "category 3"]
    assert choose(page, "category", "category 3") == f"{len(own)} of 1,500 prompts"
    for name in ("category", "change"):
        choose(page, name, "")
    page.run(
        "[...document.querySelectorAll('#items-table th button')].find(b => b.textContent =="
        " 'P(unsafe)').focus()"
    )
    by = sorted(
        (one["candidate_detail"]["p_unsafe"] - one["base_detail"]["p_unsafe"], one["item"])
        for one in safe
    )
    for way, said in ((by, "ascending"), (by[::-1], "descending")):
        page.key("Enter", "\r")
        assert page.run("document.activeElement.parentNode.getAttribute('aria-sort')") == said
        assert [row.split()[0] for row in rows(page)] == [item for _, item in way[:25]]
    page.run("document.getElementById('items-after').click()")
    assert [row.split()[0] for row in rows(page)] == [item for _, item in by[::-1][25:50]]
    assert choose(page, "search", "safety-1495") == "1 of 1,500 prompts"
    assert choose(page, "search", "no such prompt") == "0 of 1,500 prompts"


@pytest.mark.slow
def test_categories_sort_by_their_numbers(page):
    body = "document.querySelector('#categories tbody')"
    found = f"[...{body}.rows].map(r => +r.cells[3].dataset.sort)"
    assert len(page.run(found)) > 5
    heads = "document.querySelectorAll('#categories th button')[3]"
    page.run(f"{heads}.click()")
    assert page.run(found) == sorted(page.run(found))
    page.run(f"{heads}.click()")
    assert page.run(found) == sorted(page.run(found), reverse=True)


@pytest.mark.slow
def test_hostile_items_run_nothing_and_nothing_is_fetched(page, path):
    page.run("document.documentElement.dataset.was = 'here'")
    choose(page, "search", "img src")
    assert HOSTILE[0] in rows(page)[0]
    assert page.run("document.querySelectorAll('img').length") == 0
    assert {one for one in page.asked if not one.startswith("data:")} == {path.as_uri()}


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("area", ["", "safety", "bias_ambiguous"])
def test_a_phone_shows_all_without_sideways_scroll(page, dark, area):
    page.look(390, dark)
    choose(page, "area", area)
    assert page.run("document.documentElement.scrollWidth") <= 390
    assert page.run(browsing.CUT) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1100])
def test_long_names_are_not_cut_either(tab, tmp_path, width):
    record = with_keys(with_text(large_record(), "x" * 150), "y" * 60)
    tab.look(width)
    tab.open(write_audit_page(record, tmp_path / "long.html"))
    for area in ("", record["verdicts"][0]["area"]):
        choose(tab, "area", area)
        assert tab.run("document.documentElement.scrollWidth") <= width
        assert width > 390 or tab.run(browsing.CUT) == []  # a wide window scrolls in a box


@pytest.mark.slow
def test_a_command_is_copied_or_selected_and_that_is_said(page):
    box = "document.querySelector('#do pre.command')"
    page.run(f"{box}.nextElementSibling.click()")
    said = page.run(
        f"new Promise(done => setTimeout(() => done({box}.parentNode.querySelector"
        "('[role=status]').textContent), 300))"
    )
    assert said in ("Copied.", "Selected: copy it with the keyboard.")


@pytest.mark.slow
def test_dark_mode_is_dark_and_paper_is_white(page):
    ground = "getComputedStyle(document.querySelector('main')).backgroundColor"
    light = [int(n) for n in re.findall(r"\d+", page.run(ground))]
    page.look(dark=True)
    dark = [int(n) for n in re.findall(r"\d+", page.run(ground))]
    assert min(light) > 230 > 60 > max(dark)
    page.look(dark=True, media="print")
    assert [int(n) for n in re.findall(r"\d+", page.run(ground))] == light
    assert page.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    page.look(700, media="print")
    assert page.run("document.documentElement.scrollWidth") <= 700


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "dark"), [(1100, False), (1100, True), (390, False), (390, True)]
)
def test_no_rule_of_accessibility_is_broken(page, width, dark):
    page.look(width, dark)
    assert browsing.violations(page) == []
    choose(page, "area", "accuracy")
    assert browsing.violations(page) == []


@pytest.mark.slow
def test_all_but_the_items_is_there_without_scripts(page, path):
    page.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open(path)
        shown = page.run("document.body.innerText")
    finally:
        page.send("Emulation.setScriptExecutionDisabled", value=False)
    assert "This table needs JavaScript" in shown
    for words in ("Categories that moved", "category 19", "make repair ADAPTER", "Jailbreaks."):
        assert words in shown


def test_what_must_be_said_of_the_candidate_is_said(tmp_path):
    note = "a note <b>of an endpoint"
    told = large_record() | {"notes": [note]}
    page = write_audit_page(told, tmp_path / "audit.html").read_text()
    assert "<p>A note &lt;b&gt;of an endpoint.</p>" in page
