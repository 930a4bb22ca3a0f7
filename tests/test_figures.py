"""Every figure draws from a study's tables alone: a full one, and the poor ones that a real study
can turn out to be.
"""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from conftest import SMALL
from driftbook import figures
from driftbook.batch import keys
from driftbook.figures import drawing as drawing_tools
from driftbook.figures import gallery
from driftbook.stats import estimation, terms
from driftbook.study import methods
from executed import run_notebook
from simulated import CATEGORIES, DIMENSIONS, simulate

pytestmark = pytest.mark.slow

pytest_plugins = ["batches"]
NOTE = SMALL["note"]
ANALYSES = tuple(keys.ANALYSES.values())
OF_STUDIES = {
    name
    for name, source in ((name, drawing_tools.SOURCES[name]) for name in gallery.every())
    if source.split()[1] in ANALYSES
}
FEWER = {"n_boot": 50, "n_draws": 50, "n_sets": 4}  # of what the notebooks draw and simulate
POOR = {"bases": ["mini-llama"], "seeds": [1], "methods": ("none", "lora", "prompt_tuning")}
# an analysis takes as long as there are of them
POOR |= {"categories": CATEGORIES[:3], "dimensions": DIMENSIONS[:3]}
STUDIES = {
    "usual": None,
    "one base, one seed, no utility, no families": {**POOR, "utility": False, "families": False},
    "no verdict could be read": {**POOR, "silent_judge": True},
}


def build(name: str, tables, folder=None) -> None:
    """Draws a figure and renders nothing."""
    plt.close(drawing_tools.FIGURES[name](tables)[0])


@pytest.fixture(scope="module", params=STUDIES, ids=lambda name: name.replace(" ", "_"))
def analysed(request, tmp_path_factory):
    """The name and folder of a study after its analysis notebooks: the session's batch, or a poor
    study of simulated tables, whose figures are built and not rendered.
    """
    if request.param == "usual":
        return request.param, request.getfixturevalue("finished").folder
    folder = simulate(tmp_path_factory.mktemp("figures") / "miniature", **STUDIES[request.param])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "show", build)  # the face: it keeps what it first resolved
        for stem in ANALYSES:
            run_notebook(stem, folder, patch, **FEWER)
    return request.param, folder


def test_notebooks_leave_estimates_and_every_figure(analysed):
    name, folder = analysed
    estimates = estimation.read_estimates(folder / "tables")
    silent = (
        {"11_mixed_effects", "17_labels", "19_primary"}
        if name == "no verdict could be read"
        else set()
    )
    assert set(ANALYSES) - set(estimates["notebook"]) <= silent | {
        "17_labels"  # nobody has labelled the simulated answers
    }
    if name == "usual":
        assert {path.stem for path in (folder / "figures").glob("*.png")} >= OF_STUDIES
    if name == "no verdict could be read":
        unsafe = estimates[
            estimates["outcome"].eq(terms.UNSAFE)
            & estimates["notebook"].eq("09_safety")
            & ~estimates["contrast"].isin([terms.LOWEST, terms.HIGHEST])
        ]
        assert len(unsafe)
        assert unsafe[["value", "se", "ci_low", "ci_high", "p"]].isna().all().all()
    if name == "usual":
        intervals = estimates.dropna(subset=["ci_low", "value"])
        assert (intervals["ci_low"] <= intervals["value"]).all()
        assert (intervals["value"] <= intervals["ci_high"]).all()
        means = estimates[
            estimates["group"].isin([terms.TRAINED, terms.UNTRAINED])
            & estimates["contrast"].eq(terms.CHANGE)
        ]
        # no interval where nothing was scored, or where no answer changed: nothing varies there
        bare = means[means["ci_low"].isna()]
        assert (bare["value"].isna() | bare["value"].eq(0)).all()
        assert bare["how"].notna().all()
        assert len(bare) < len(means) / 5


def test_figures_are_the_same_again_small_and_captioned(analysed, tmp_path):
    of_study, folder = analysed
    tables = gallery.read(folder / "tables", NOTE)
    for name in ("safety_change", "pareto"):
        gallery.draw(name, tables, tmp_path)
        if of_study == "usual":
            assert (tmp_path / f"{name}.png").read_bytes() == (
                folder / "figures" / f"{name}.png"
            ).read_bytes()
    for path in (*tmp_path.glob("*.png"), *(folder / "figures").glob("*.png")):
        assert path.stat().st_size < 200_000, path.name
        assert "Made by notebook" in path.with_suffix(".md").read_text()


def test_every_figure_says_that_it_is_miniature(analysed):
    _, folder = analysed
    tables = gallery.read(folder / "tables", NOTE)
    fig = gallery.draw("safety_change", tables)
    assert NOTE in [text.get_text() for text in fig.texts]
    assert fig.get_figwidth() == drawing_tools.WIDTH


def test_text_stays_inside_the_figure(analysed):
    _, folder = analysed
    tables = gallery.read(folder / "tables", NOTE)
    for name in ("over_refusal", "safety_settings"):
        fig = gallery.draw(name, tables)
        canvas = FigureCanvasAgg(fig)
        canvas.draw()
        box, renderer = fig.bbox, canvas.get_renderer()
        for ax in fig.axes:
            for text in (
                *ax.texts,
                ax.title,
                ax.xaxis.label,
                ax.yaxis.label,
                *ax.get_yticklabels(),
            ):
                if text.get_visible() and text.get_text().strip():
                    extent = text.get_window_extent(renderer)
                    assert extent.x0 >= box.x0 - 2, (name, text.get_text())
                    assert extent.x1 <= box.x1 + 2, (name, text.get_text())


def test_figures_draw_where_numbers_and_intervals_are_null(finished):
    tables = gallery.read(finished.folder / "tables", NOTE)
    estimates = tables["estimates"].copy()
    estimates.loc[::3, ["se", "ci_low", "ci_high"]] = None
    estimates.loc[::7, ["value", "se", "ci_low", "ci_high"]] = None
    for drawing in gallery.every().values():
        plt.close(drawing({**tables, "estimates": estimates})[0])


def test_figures_draw_before_there_is_any_estimate(tmp_path):
    folder = simulate(tmp_path / "bare", bases=["mini-llama"], seeds=[1])
    tables = gallery.read(folder / "tables", NOTE)
    for name in gallery.every():
        gallery.draw(name, tables, tmp_path / "figures")
        assert Image.open(tmp_path / "figures" / f"{name}.png").width == pytest.approx(
            drawing_tools.WIDTH * 150, abs=1
        )


def test_methods_keep_their_colours_and_order():
    assert (
        list(drawing_tools.COLOURS)[:5]
        == ["none", *methods.STUDIED]
        == ["none", "lora", "ia3", "prompt_tuning", "p_tuning"]
    )
    assert (
        len(set(drawing_tools.COLOURS.values()))
        == len(drawing_tools.COLOURS)
        == len(methods.METHODS)
    )
    assert drawing_tools.COLOURS["p_tuning"] == "#E69F00"
    rows = pd.DataFrame(
        {
            "method": ["p_tuning", "lora", "lora"],
            "group": [terms.TRAINED, terms.UNTRAINED, terms.TRAINED],
        }
    )
    assert drawing_tools.present(rows, (terms.TRAINED, terms.UNTRAINED)) == [
        ("lora", terms.TRAINED),
        ("p_tuning", terms.TRAINED),
        ("lora", terms.UNTRAINED),
    ]
