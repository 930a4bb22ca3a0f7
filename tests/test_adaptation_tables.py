"""The second study's real tables: every published figure comes back, the traps are there, and what
is published of the rereading holds no table of theirs.
"""

import os

import nbformat
import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from matplotlib import pyplot as plt
from scipy.stats import t as student

from driftbook.figures import drawing, gallery
from driftbook.publishing import publish
from driftbook.rereading import adaptation_judges as judged
from driftbook.rereading import adaptation_reading as whole
from driftbook.rereading import adaptation_study as known
from driftbook.rereading import adaptation_units as units
from driftbook.stats import estimation
from driftbook.stats.terms import CHANGE, LEVEL, PRIMARY
from driftbook.study.files import ROOT
from driftbook.study.tables import ESTIMATES, TABLES

DRAWINGS = [name for name, source in drawing.SOURCES.items() if known.ADAPTATION_NOTEBOOK in source]
PUBLISHED = ROOT / "outputs" / "published" / known.ADAPTATION_NAME


@pytest.fixture(scope="module")
def folder(shared):
    path = shared / known.ADAPTATION_NAME
    if not path.is_dir():
        pytest.skip(f"no second study at {path}")
    return path


@pytest.fixture(scope="module")
def reading(folder):
    return whole.read_adaptation(str(folder))


@pytest.fixture(scope="module")
def published():
    """What is committed of the rereading: tables for figures."""
    return gallery.read(PUBLISHED / "tables")


# ---- the tables
def test_every_published_figure_comes_back(reading):
    found = reading.reproduction
    assert (found["equal"] == found["published"]).all()
    assert found["published"].sum() == 2000
    assert set(found["file"]) >= {"r6_tost_3judge", "friedman_per_family", "regime_a_calibration"}


def test_the_copy_is_the_one_that_the_notebook_was_made_with(reading):
    n = len(known.adaptation_files())
    assert reading.source.startswith(f"{n} of {n} files")


def test_the_traps_of_the_files_are_found(reading):
    text = reading.traps.to_string()
    for words in (
        "annotator_B outside 0 and 1: 1",
        "88 and 11 disagreements",
        "of every base model (5 rows; LoRA too: 1)",
        "22 of 30 base, 14 of 30 LoRA",
        "6 rates are not successes",
        "seed 3407, in seed_matrix 42",
    ):
        assert words in text


def test_our_consensus_is_upstreams(reading):
    for name, ours in (
        ("asr_500_labels", reading.data.labels),
        ("orr_250_labels", reading.data.refusals),
    ):
        theirs = reading.data.raw[name]["consensus"]
        assert ours["consensus"].isna().equals(theirs.isna())
        assert (ours["consensus"].dropna() == theirs.dropna()).all()


def test_the_sample_is_what_its_groups_say(reading):
    """The verdicts follow the group that an answer was drawn for, five in each stratum."""
    labels = reading.data.labels
    assert labels.groupby(["attack", "family", "group"]).size().eq(5).all()
    by_group = labels.groupby("group")["pattern"].agg(lambda one: sorted(set(one))).to_dict()
    assert by_group == {
        "consensus_neg": ["000"],
        "consensus_pos": ["111"],
        "gpt4o_outlier": ["010", "101"],
        "llama2_outlier": ["011", "100"],
        "llamaguard_outlier": ["001", "110"],
    }


def test_families_as_units_are_computed_from_the_cells_by_hand(reading):
    rows = reading.data.raw["phase5_tost_percell_5fam_strict"].query("pair == 'lora-fft'")
    means = rows.groupby("family")["diff"].mean()
    se = means.std() / np.sqrt(5)
    p = student.sf((5 - abs(means.mean())) / se, 4)
    found = units.mean_of_families(reading.pair("lora", "fft"))
    assert found.equivalence(5) == pytest.approx(p)
    assert 0.05 < p < 0.07 < 5 * units.mean_of_cells(reading.pair("lora", "fft")).equivalence(5)


def test_a_table_of_another_version_is_refused(folder, tmp_path):
    for path in folder.glob("*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "master_orr_long.csv"
    path.write_text(path.read_text().replace("ORR", "rate", 1))
    with pytest.raises(ValueError, match=r"lacks a column: .*orr.*; it is of another version"):
        known.read_tables(tmp_path)
    assert known.adaptation_provenance(tmp_path).startswith("20 of 21 files")


# ---- what is published
def test_no_table_of_theirs_is_published(published):
    """No rate of a single cell and no label: what a number is a mean of, it says."""
    assert published["rates"].empty
    assert TABLES["prompts"].read(PUBLISHED / "tables").empty
    rows = published["estimates"]
    theirs = rows[rows["study"].eq(known.ADAPTATION_NAME)]
    assert theirs.loc[theirs["outcome"].eq(judged.OF_PATTERN), "n_items"].ge(5).all()
    assert not theirs["n_items"].eq(1).any()
    single = theirs["contrast"].eq(LEVEL) & theirs["n_items"].isna()
    kinds = theirs[single].groupby("group").size()
    assert set(kinds.index) <= {"all", whole.REPAIR_OF_SEED}  # corrected rates; cited seeds
    assert kinds[whole.REPAIR_OF_SEED] == 3
    texts = rows.select_dtypes("string").stack().dropna().unique()
    assert not [word for word in texts if word.startswith(("asr_", "orr_"))]


def test_published_intervals_hold_their_numbers_and_say_over_what(published):
    rows = published["estimates"].dropna(subset=["ci_low", "value"])
    rows = rows.astype({"value": float, "ci_low": float, "ci_high": float})
    assert (rows["ci_low"] <= rows["value"] + 1e-9).all()
    assert (rows["value"] <= rows["ci_high"] + 1e-9).all()
    theirs = rows[rows["study"].eq(known.ADAPTATION_NAME)]
    assert not theirs["population"].str.startswith("seeds like these, ").any()


def test_bounds_hold_the_raked_numbers(published):
    rows = published["estimates"]
    for outcome in (judged.HARMFUL, judged.OVER_REFUSED):
        for contrast in (LEVEL, CHANGE):
            part = rows[rows["outcome"].eq(outcome) & rows["contrast"].eq(contrast)]
            wide = part[part["estimator"].eq(judged.BOUNDED)].set_index("method")
            for estimator in (PRIMARY, judged.UNRELATED):
                raked = part[part["estimator"].eq(estimator)].set_index("method")["value"]
                assert len(raked) == len(wide) > 0
                assert (wide["ci_low"] <= raked + 1e-6).all()
                assert (raked <= wide["ci_high"] + 1e-6).all()


@pytest.mark.slow
def test_figures_are_drawn_from_published_tables_alone(published):
    assert {path.stem for path in (PUBLISHED / "figures").glob("*.png")} == set(DRAWINGS)
    for name in DRAWINGS:
        fig, caption = drawing.FIGURES[name](published)
        assert "Nothing to draw" not in caption
        plt.close(fig)
        bare = {**published, "estimates": ESTIMATES.empty()}
        fig, caption = drawing.FIGURES[name](bare)
        assert "Nothing to draw" in caption
        plt.close(fig)


# ---- the notebook
@pytest.mark.slow
def test_the_notebook_runs_on_the_real_tables(folder, published, monkeypatch):
    monkeypatch.setenv("DRIFTBOOK_SHARED", os.environ["DRIFTBOOK_SHARED"])
    shell = InteractiveShell()
    shell.display_pub.publish = lambda *args, **kwargs: None
    path = ROOT / "notebooks" / f"{known.ADAPTATION_NOTEBOOK}.ipynb"
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            shell.run_cell(cell.source, silent=True).raise_error()
    made, note, _ = publish.made(known.ADAPTATION_NAME)
    assert (made, note) == (known.ADAPTATION_FOLDER, known.ADAPTATION_NOTE)
    assert {one.stem for one in (made / "figures").glob("*.png")} == set(DRAWINGS)
    again, before = (
        rows[rows["study"].eq(known.ADAPTATION_NAME)].reset_index(drop=True)
        for rows in (estimation.read_estimates(made / "tables"), published["estimates"])
    )  # our repair's rows follow what notebook 14 publishes
    numbers = ["value", "ci_low", "ci_high"]
    pd.testing.assert_frame_equal(
        again[numbers].astype(float), before[numbers].astype(float), atol=1e-4
    )
