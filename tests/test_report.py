"""The report opens offline, escapes what it shows and says what the tables say; publishing lets no
text out.
"""

import re
import shutil
from html.parser import HTMLParser

import nbformat
import pandas as pd
import pytest

import browsing
from driftbook.batch import collecting
from driftbook.figures import gallery
from driftbook.publishing import publish, report
from driftbook.publishing.story import happened, story
from driftbook.stats import estimation, influence, terms
from driftbook.study import opening
from driftbook.study.files import ROOT
from driftbook.study.opening import OPTIONAL
from driftbook.study.study_file import load
from driftbook.study.tables import TABLES
from simulated import simulate

pytestmark = pytest.mark.slow

LABELS = {
    "study": "miniature",
    "notebook": "09_safety",
    "outcome": terms.UNSAFE,
    "benchmark": "safety",
    "judge": "mini-guard",
}


class Links(HTMLParser):
    """Everything that a page would fetch or lead to, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.found += [
            value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")
        ]


def links(page: str) -> Links:
    parser = Links()
    parser.feed(page)
    return parser


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A simulated study with estimates of safety, one figure and an executed notebook."""
    folder = simulate(
        tmp_path_factory.mktemp("report") / "miniature",
        bases=["mini-llama", "mini-gemma"],
        seeds=(1,),
        failed=2,
    )
    tables = {
        name: TABLES[name].read(folder / "tables")
        for name in ("variants", "runs", "verdicts", "prompts")
    }
    arms = influence.arms(tables["variants"], tables["runs"])
    verdicts = tables["verdicts"].merge(tables["prompts"], on=["benchmark", "prompt_id"])
    values = influence.matrix(
        verdicts[verdicts["benchmark"].eq("safety")], "unsafe", ["category", "prompt_id"]
    )
    estimation.write_estimates(
        estimation.of_rate(values, arms, influence.cells(arms), **LABELS),
        folder / "tables",
        "safety",
    )
    gallery.draw("safety_change", gallery.read(folder / "tables", "a note"), folder / "figures")
    (folder / "figures" / "safety_change.md").write_text(
        "A caption with <script>alert(1)</script>.\n\nMade by hand.\n"
    )
    for name in ("pareto", "of_my_own"):
        shutil.copyfile(
            folder / "figures" / "safety_change.png", folder / "figures" / f"{name}.png"
        )
    (folder / "notebooks").mkdir()
    cells = [
        nbformat.v4.new_markdown_cell("# 09 · A question?"),
        nbformat.v4.new_code_cell("1 + 1"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "notebooks" / "09_safety.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("driftbook.study.study_file.Study.folder", property(lambda study: folder))
        yield load("miniature")


@pytest.fixture(scope="module")
def page(study) -> str:
    return report.write(study).read_text()


def test_page_needs_no_network(study, page):
    assert page.startswith("<!doctype html>")
    for link in links(page).found:
        assert link.startswith(("data:image/png;base64,", "#", "notebooks/")), link[:80]
        if link.startswith("notebooks/"):
            assert (study.folder / link).is_file()
    assert not re.search(r"@import|url\(", page)
    assert links(page).tags.count("script") == 1
    assert "default-src &#39;none&#39;" in page


def test_notebook_pages_need_no_network_either(study, page):
    converted = (study.folder / "notebooks" / "09_safety.html").read_text()
    assert not [
        link
        for link in links(converted).found
        if link and link.startswith(("http:", "https:", "//"))
    ]


def test_page_escapes_what_it_shows(page):
    assert "<b>at step 3</b>" not in page
    assert "&lt;b&gt;at step 3&lt;/b&gt;" in page
    assert "&lt;script&gt;" in page


def test_page_is_only_converted_when_older(study, page):
    converted = study.folder / "notebooks" / "09_safety.html"
    converted.write_text("kept")
    report.write(study)
    assert converted.read_text() == "kept"


def test_findings_are_the_estimates(study, page):
    estimates = estimation.read_estimates(study.folder / "tables")
    row = estimates.query(
        "base_model == 'all' and method == 'lora' and group == 'trained' and contrast == 'change"
        " against the base model'"
    ).iloc[0]
    star = "" if row["ci_low"] <= 0 <= row["ci_high"] else " *"
    cell = f"{row['value']:+.1f}{star}\n[{row['ci_low']:+.1f}, {row['ci_high']:+.1f}]"
    assert page.count(cell.replace("-", "−")) == 1
    assert "mean over the 2 base models" in page
    tables = [TABLES[name].read(study.folder / "tables") for name in ("variants", "runs")]
    arms = influence.arms(*tables)
    idle = arms["objective"].isin(["sft", "dpo"]) & arms["no_op"].astype("boolean").fillna(False)
    assert idle.any()
    assert f"runs {idle.sum()} did nothing" in page
    assert "did nothing (no-ops)" in page
    assert collecting.status(study) == 2
    assert "2 failed" in page
    assert study.note in page


def test_each_change_is_told_once_by_its_interval():
    def row(method: str, value: float, low: float, high: float) -> dict:
        ends = {"value": value, "ci_low": low, "ci_high": high}
        return {"method": method, "base_model": "all", "judge": "mini-guard"} | ends

    nan = float("nan")
    rows = [row("lora", 5, 2, 8), row("ia3", -5, -8, -2), row("prompt_tuning", 1, -1, 3)]
    rows += [row("p_tuning", 4, nan, nan)]
    same = {"outcome": terms.UNSAFE, "benchmark": "safety", "contrast": terms.CHANGE}
    same |= {"estimator": terms.PRIMARY, "group": terms.TRAINED}
    estimates = pd.DataFrame([one | same for one in rows])
    assert happened(estimates, {"Safety": (terms.UNSAFE, "safety")}) == [
        "Unsafe answers to harmful prompts: rose with LoRA; fell with IA3; no change can be told"
        " with Prompt-Tuning; nothing was repeated, so there is no interval, with P-Tuning."
    ]
    (none,) = happened(estimates.assign(contrast=terms.LEVEL), {"Safety": (terms.UNSAFE, "safety")})
    assert "No change was estimated" in none


def test_words_say_when_a_number_cannot():
    assert "could not be estimated" in report.number(
        float("nan"), float("nan"), float("nan"), "points"
    )
    assert "no interval" in report.number(1.0, float("nan"), float("nan"), "points")
    assert "cannot tell" in report.number(1.0, -1.0, 3.0, "points")
    assert report.number(5.0, 2.0, 8.0, "points") == "+5.0 points [+2.0, +8.0]"


def test_report_of_a_study_without_estimates_is_written(tmp_path, monkeypatch):
    folder = simulate(tmp_path / "bare", bases=["mini-llama"], seeds=[1])
    monkeypatch.setattr("driftbook.study.study_file.Study.folder", property(lambda study: folder))
    page = report.write(load("miniature")).read_text()
    assert "No figure has been drawn yet." in page


# ---- in a browser
@pytest.fixture(scope="module")
def tab(study, page, tmp_path_factory):
    with browsing.tab(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_figures_are_tabs_for_the_keyboard_and_all_there_on_paper_and_without_scripts(tab, study):
    shown = "[...document.querySelectorAll('.tabs > section')].map(e => e.checkVisibility())"
    chosen = "document.activeElement.textContent"
    tab.look()
    tab.open(study.folder / "report.html")
    assert tab.run(shown) == [True, False, False]
    tab.run("document.querySelector('[role=tab]').focus()")
    for key, title, seen in (
        ("ArrowRight", "Trade-offs", 1),
        ("End", "Further figures", 2),
        ("ArrowRight", "Safety", 0),
        ("ArrowLeft", "Further figures", 2),
    ):
        tab.key(key)
        assert tab.run(chosen) == title
        assert tab.run(shown) == [n == seen for n in range(3)]
    tab.look(media="print")
    assert tab.run(shown) == [True] * 3
    tab.look()
    tab.send("Emulation.setScriptExecutionDisabled", value=True)
    tab.open(study.folder / "report.html")
    tab.send("Emulation.setScriptExecutionDisabled", value=False)
    assert tab.run(shown) == [True] * 3


@pytest.mark.parametrize("dark", [False, True])
def test_nothing_of_the_report_is_cut_on_a_phone(tab, study, dark):
    tab.look(390, dark)
    tab.open(study.folder / "report.html")
    assert tab.run("document.documentElement.scrollWidth") <= 390
    assert tab.run(browsing.CUT) == []


@pytest.mark.parametrize(
    ("width", "dark"), [(1100, False), (1100, True), (390, False), (390, True)]
)
def test_no_rule_of_accessibility_is_broken(tab, study, width, dark):
    tab.look(width, dark)
    tab.open(study.folder / "report.html")
    assert browsing.violations(tab) == []


# ---- publishing
def test_published_is_text_free_and_enough_for_every_figure(study, tmp_path):
    files = publish.publish(study.folder, tmp_path / "miniature", study.note)
    names = {path.stem for path in files if path.suffix == ".parquet"}
    private = {name for name, table in TABLES.items() if table.private}
    assert private
    assert not names & private
    assert names == {*publish.PUBLISHED, "safety"} - {*OPTIONAL}
    assert sum(path.stat().st_size for path in files) < 1_000_000
    tables = gallery.read(tmp_path / "miniature" / "tables")
    assert tables["note"] == study.note
    gallery.draw("safety_change", tables, tmp_path / "again")
    drawn = (tmp_path / "again" / "safety_change.png").read_bytes()
    assert gallery.draw(
        "safety_change", gallery.read(study.folder / "tables", study.note), tmp_path / "before"
    )
    assert drawn == (tmp_path / "before" / "safety_change.png").read_bytes()


def test_private_and_undeclared_tables_are_refused(study, tmp_path):
    with pytest.raises(ValueError, match="responses holds text"):
        publish.publish(study.folder, tmp_path / "a", study.note, (*publish.PUBLISHED, "responses"))
    with pytest.raises(ValueError, match="secrets is no declared table"):
        publish.publish(study.folder, tmp_path / "b", study.note, ("secrets",))
    assert not (tmp_path / "a").exists()


def test_paths_of_this_machine_are_not_published(study, tmp_path):
    folder = simulate(tmp_path / "leaky", bases=["mini-llama"], seeds=[1])
    runs = TABLES["runs"].read(folder / "tables")
    named = runs.assign(trainer_arguments=f'{{"output_dir": "{ROOT}/outputs"}}')
    named.to_parquet(folder / "tables" / "runs.parquet")  # as an earlier version wrote it
    publish.publish(folder, tmp_path / "out", f"made in {ROOT}/outputs")
    found = TABLES["runs"].read(tmp_path / "out" / "tables")
    assert set(found.trainer_arguments) == {'{"output_dir": "outputs"}'}
    assert str(ROOT) not in (tmp_path / "out" / "study.json").read_text()
    prompts = TABLES["prompts"].read(folder / "tables")
    TABLES["prompts"].write(
        prompts.assign(prompt_id=f"{ROOT}/" + prompts.prompt_id), folder / "tables"
    )
    with pytest.raises(ValueError, match="prompt_id names a folder"):
        publish.publish(folder, tmp_path / "out", study.note)


def test_overview_counts_every_run(study):
    tables = {name: TABLES[name].read(study.folder / "tables") for name in ("variants", "runs")}
    table = report.overview(tables["variants"], tables["runs"])
    assert table.drop(columns="Method").to_numpy().sum() == len(tables["runs"])
    assert isinstance(
        report.unscored(
            TABLES["rates"].read(study.folder / "tables"),
            estimation.read_estimates(study.folder / "tables"),
        ),
        pd.DataFrame,
    )


def published_tables(name: str) -> opening.Tables:
    tables = opening.Tables(load(name))
    tables.folder = ROOT / "outputs" / "published" / name / "tables"
    return tables


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pocket_repairs", "several data sets (sft, arithmetic and persona)"),
        ("pocket_objectives", ""),
        ("pocket", ""),
    ],
)
def test_a_mean_over_data_sets_is_said_to_be_one(name, said):
    """The pocket study tunes each base model on one set of its own, so no change mixes them; runs
    that are only mixed into others are apart.
    """
    tables = published_tables(name)
    told = dict(story(tables.study, tables, report.told(tables.estimates)))["How sure"][0]
    assert ("several data sets" in told) == bool(said)
    assert said in told


def test_layers_are_in_their_order_and_panels_without_a_number_are_not_drawn():
    tables, draw = published_tables("pocket_objectives"), gallery.every()
    rows = [text.get_text() for text in draw["touched"](tables)[0].axes[0].get_yticklabels()]
    assert rows == [f"{layer}.{part}_proj" for layer in range(30) for part in "qv"]
    for name in ("safety_fairness", "fairness_dimensions"):
        fig, caption = draw[name](tables)
        assert len(fig.axes) == 1, "its bias scores are no findings"
        assert not caption.startswith("Nothing to draw")
    assert "no method was trained by SFT and DPO" in draw["mixed_terms"](tables)[1]


@pytest.mark.parametrize("name", ["objectives", "pocket_objectives", "second_tuning"])
def test_a_figure_is_the_same_before_and_after_repairs_were_estimated(name):
    """Repairs' estimates of an outcome name another judge, and do not stand in for the study's."""
    tables = published_tables(name)
    fig, caption = gallery.every()["over_refusal"](tables)
    assert "; refusal rate by refusal detector: " in caption
    tables.estimates = tables.estimates[tables.estimates["notebook"].eq("09_safety")]
    before, words = gallery.every()["over_refusal"](tables)
    assert words == caption
    for one, other in zip(before.axes, fig.axes, strict=True):
        assert len(one.lines) == len(other.lines)
        assert len(one.collections) == len(other.collections)
