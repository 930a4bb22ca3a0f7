"""Small and lopsided studies run through every analysis to the report: no crash, no empty table,
no figure of nothing, and no sentence about seeds or base models that the study does not have.
"""

import copy
import html
import re

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from batches import SMOKE
from conftest import write_study
from driftbook import figures
from driftbook.batch import keys
from driftbook.figures import drawing
from driftbook.publishing import report
from driftbook.stats import populations
from driftbook.study.study_file import load
from driftbook.study.tables import TABLES
from executed import run_notebook

pytestmark = pytest.mark.slow
pytest_plugins = ["batches"]

FEWER = {"n_boot": 20, "n_draws": 20, "n_sets": 2}  # of what the notebooks draw and simulate
MERGED = ("first", "second")
LLAMA, OTHER = "tiny-llama", "tiny-other"
KINDS = {  # base models, blocks of the batch's grid, and seeds where fewer than it has
    "one run": ((LLAMA,), ("main",), (1,)),
    "one method, two seeds": ((OTHER,), ("other",), (1, 2)),
    "two methods, each at its own rate, one seed": ((LLAMA,), ("main", "ia3"), (1,)),
    "one method, two bases": ((LLAMA, OTHER), ("main", "other"), (1,)),
    "a method on each base": ((LLAMA, OTHER), ("ia3", "other"), (1, 2)),
    "nothing trained but controls": ((LLAMA,), ("untrained",), (1,)),
    "bases alone": ((LLAMA, OTHER), (), ()),
}
NOT_SAID = (  # by any study
    r"There (?:is|are) no (?!intervals)|Nothing to draw|Nothing was asked"
    r"|\bnan\b|<NA>|\bNone\b(?! failed)|\b1 (?:runs|base models|seeds|settings|items)\b|e\+0\d%"
)


def cut(finished, folder, kind: str):
    """The batch's study with some of its grid alone, as it would have been had it been run so."""
    bases, blocks, seeds = KINDS[kind]
    content = copy.deepcopy(SMOKE) | {"name": "cut", "mitigations": {}}
    content["bases"] = {name: content["bases"][name] for name in bases}
    content["grid"] = [
        one | {"seeds": [seed for seed in one["seeds"] if seed in seeds]}
        for one in content["grid"]
        if one["name"] in blocks
    ]
    if not content["grid"]:
        content.pop("primary")
    study = load(write_study(folder, content))
    known = {variant.run_id for variant in study.variants}
    for table in TABLES.values():
        if table.path(finished.folder / "tables").is_file():
            rows = table.read(finished.folder / "tables")
            own = rows[rows["run_id"].isin(known)] if "run_id" in rows else rows
            table.write(merged(own), folder / "tables")
    ran = TABLES["variants"].read(folder / "tables")
    assert set(ran["run_id"]) == known, "the batch has every run of the cut"
    return study


def merged(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with two categories and two dimensions in place of a dozen, each of which takes the
    time of a study.
    """
    for name in {"category", "dimension"} & set(rows):
        rows = rows.assign(**{name: [MERGED[len(text) % 2] for text in rows[name]]})
    if {"k", "n_scored"} <= set(rows):
        rows = rows.groupby(list(TABLES["rates"].key), as_index=False)[["k", "n_scored", "n"]].sum()
    return rows


def built(name: str, tables, folder=None) -> None:
    """A figure, drawn and not rendered, beside its caption."""
    fig, caption = drawing.FIGURES[name](tables)
    fig.canvas.draw_idle()
    plt.close(fig)
    folder = tables.study.folder / "figures"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.png").write_bytes(b"")
    (folder / f"{name}.md").write_text(f"{caption}\n\nMade by {drawing.SOURCES[name]}.\n")


def text_of(page: str) -> str:
    """What a reader sees of a page."""
    unseen = r"<style>.*?</style>|<script>.*?</script>| src=\"[^\"]*\""
    page = re.sub(unseen, "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.replace(" ", "_"))
def told(request, finished, tmp_path_factory):
    """The kind of a study, its folder, and its report after all of its analyses."""
    folder = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "show", built)
        study = cut(finished, folder, request.param)
        for stem in keys.analyses(study).values():
            run_notebook(stem, folder, patch, study=str(folder / "study.yaml"), **FEWER)
        yield request.param, folder, report.write(study).read_text()


def test_the_report_is_told_in_full(told):
    kind, _, page = told
    text = text_of(page)
    assert not re.findall(rf".{{0,80}}(?:{NOT_SAID}).{{0,40}}", text)
    for title in ("What was asked", "Of whom", "What happened", "How sure", "What it does not say"):
        assert f"{title}." in text
    assert all("<td" in table for table in re.findall(r"<table.*?</table>", page, re.DOTALL)[:2])
    bases = len(KINDS[kind][0])
    assert f"{bases} base model{'s' if bases > 1 else ''}:" in text


def test_no_sentence_is_of_other_seeds_where_no_setting_was_run_twice(told):
    kind, folder, page = told
    captions = "".join(path.read_text() for path in (folder / "figures").glob("*.md"))
    seeds = populations.SEEDS in captions or populations.SEEDS in text_of(page)
    assert seeds == (2 in KINDS[kind][2])
    if not seeds:
        assert not re.search(r"over seeds|other seeds alone", captions)


def test_every_change_stands_beside_the_base_models_own_level(told):
    kind, folder, _ = told
    if not KINDS[kind][1]:
        return
    estimates = report.estimation.read_estimates(folder / "tables")
    shown = report.summary(estimates)
    trained = estimates["group"].eq("trained").any()
    assert trained == (report.BASE in shown)
    if trained:
        assert not shown[report.BASE].eq("not known").any()
        assert shown.iloc[:, 2:].ne("").any(axis=None)


# ---- the words themselves
def rows(*populations_: str, ends=(0.0, 1.0)) -> pd.DataFrame:
    return pd.DataFrame({"population": populations_, "ci_low": ends[0], "ci_high": ends[1]})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["seeds like these, prompts like these, these base models"], "seeds like these and prom"),
        (["these runs, prompts like these, these base models"], "these runs and prompts like"),
        (["seeds like these, these prompts, these base models"], "seeds like these and these p"),
    ],
)
def test_intervals_are_for_what_the_estimates_say(given, words):
    assert populations.held_for(rows(*given)).startswith(words)
    assert populations.held_for(rows(*given, ends=(None, None))) == ""


@pytest.mark.slow
def test_training_says_what_it_did_where_a_base_model_stands_alone(finished, monkeypatch):
    """Of a study that trains on other base models alone."""
    base = next(one for one in finished.study().variants if one.method == "none")
    asked = {"study": str(finished.file), "base_model": base.base_model, "run_ids": [base.run_id]}
    run_notebook("02_train", finished.folder, monkeypatch, **asked)
