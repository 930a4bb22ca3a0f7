"""Every figure of the workbook by name: read the tables, draw, save, show."""

from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import Image
from matplotlib.figure import Figure

from driftbook.figures import (
    adaptation_study,
    claims,
    factors_and_doses,
    fairness,
    frontier,
    joint,
    labels,
    mechanisms,
    mixed_effects,
    original_study,
    peft_results,
    power,
    primary,
    repairs,
    safety,
    second_tuning,
    specifications,
    starts,
    tradeoffs,
)
from driftbook.figures.drawing import FIGURES, SOURCES, WIDTH, Drawing, save_figure, style
from driftbook.stats import estimation
from driftbook.study.files import read_json
from driftbook.study.opening import OPTIONAL, Tables
from driftbook.study.tables import TABLES

MODULES = (
    safety,
    fairness,
    frontier,
    mixed_effects,
    tradeoffs,
    starts,
    repairs,
    second_tuning,
    joint,
    mechanisms,
    factors_and_doses,
    power,
    labels,
    primary,
    specifications,
    original_study,
    peft_results,
    claims,
    adaptation_study,
)


def every() -> dict[str, Drawing]:
    """All figures by name, in the order of the notebooks."""
    return {name: FIGURES[name] for name in sorted(FIGURES, key=SOURCES.get)}


def of(folder: Path) -> list[str]:
    """The names of the figures that a folder of figures holds, in the workbook's order."""
    return [name for name in every() if (folder / f"{name}.png").is_file()]


def read(tables_folder: Path, note: str | None = None) -> dict:
    """What figures are drawn from: the tables by name, and the study's note (from study.json beside
    published tables where not given).
    """
    found = {
        name: TABLES[name].read(tables_folder) for name in ("variants", "runs", "curves", "rates")
    }
    found |= {
        name: (
            TABLES[name].read(tables_folder)
            if TABLES[name].path(tables_folder).is_file()
            else TABLES[name].empty()
        )
        for name in OPTIONAL
    }
    note = read_json(tables_folder.parent / "study.json")["note"] if note is None else note
    return {**found, "estimates": estimation.read_estimates(tables_folder), "note": note}


def draw(name: str, tables: dict | Tables, folder: Path | None = None) -> Figure:
    """The figure of this name, saved with its caption in `folder` where one is given; a notebook
    shows it by returning it.
    """
    style()
    fig, caption = every()[name](tables)
    height = fig.get_figheight()
    fig.get_layout_engine().set(
        rect=(0, 0.16 / height, 1, 1 - 0.16 / height), w_pad=0.05, h_pad=0.05
    )
    fig.text(
        0.995,
        0.03 / height,
        tables["note"],
        ha="right",
        va="bottom",
        fontsize=6.5,
        color="#888888",
        style="italic",
    )
    if folder is not None:
        save_figure(fig, folder, name, caption, SOURCES[name])
    plt.close(fig)
    return fig


def show(name: str, tables: dict | Tables, folder: Path | None = None) -> Image:
    """The figure of this name, saved with its caption, as the picture that was saved: a notebook
    need not draw it twice. It goes to the figures of the tables' study where no folder is given.
    """
    folder = tables.study.folder / "figures" if folder is None else folder
    draw(name, tables, folder)
    return Image(data=(folder / f"{name}.png").read_bytes(), width=int(WIDTH * 120))
