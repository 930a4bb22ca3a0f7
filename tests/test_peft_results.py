"""PEFT's published runs are read as they are, modelled as an independent computation models them,
and drawn from the published tables alone.
"""

import os

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy.optimize import minimize_scalar
from scipy.stats import beta, norm
from statsmodels.stats.proportion import proportion_confint

from driftbook.figures import drawing, gallery
from driftbook.publishing import publish
from driftbook.rereading import peft_front, peft_models, peft_results
from driftbook.stats import estimation
from driftbook.study.files import ROOT
from driftbook.study.tables import ESTIMATES, TABLES
from peft_files import KINDS, result, write

pytestmark = pytest.mark.slow

pytest_plugins = ["peft_files"]


DRAWINGS = [name for name, source in drawing.SOURCES.items() if peft_results.NOTEBOOK in source]


# ---- files in PEFT's form, of made-up numbers
def simulated(folder, n_runs=3, seed=0):
    """Runs of every kind, with an effect of size and of method."""
    rng, records = np.random.default_rng(seed), {}
    for i, method in enumerate([*KINDS, None]):
        shift = rng.normal(0, 80)
        for j in range(n_runs if method else 1):
            size = int(10 ** rng.uniform(3, 7))
            k = int(np.clip(450 + shift + 60 * (np.log10(size) - 5) + rng.normal(0, 40), 0, 1319))
            valid = np.clip(np.round(k / 1319 * 50 + rng.normal(0, 3, 6) + np.arange(6) - 3), 0, 50)
            made = result(
                method,
                f"set-{j}",
                k,
                10 ** rng.normal(-1.2, 0.4),
                size,
                10 ** rng.uniform(-4, -2),
                int(rng.uniform(20, 26) * 1e9),
                valid,
            )
            records[f"run-{i}-{j}"] = made
    return write(folder, **records)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Simulated runs, analysed as the notebook does, in a study folder: (folder, runs, points,
    estimates).
    """
    folder = tmp_path_factory.mktemp("peft") / peft_results.PEFT_NAME
    runs, points = peft_results.read(simulated(folder.parent / "results"))
    tables = peft_results.write_peft(peft_results.declared(runs, points), folder)
    estimates = analysed(runs, points)
    estimation.write_estimates(estimates, tables, peft_results.PEFT_NAME)
    for name in DRAWINGS:
        gallery.draw(name, gallery.read(tables, peft_results.PEFT_NOTE), folder / "figures")
    return folder, runs, points, estimates


def analysed(runs: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    rows, parts = peft_models.modelled(runs), [peft_results.measured(runs)]
    for outcome in (peft_results.ACCURACY, peft_results.FORGETTING):
        means, alone = peft_models.means_of_methods(rows, outcome)
        terms, equal = peft_models.terms(rows, outcome)
        parts += [
            means,
            terms,
            peft_models.spreads(rows, outcome, {"alone": alone, "equal": equal}),
        ]
    return ESTIMATES.concat(
        [
            *parts,
            peft_models.growth(points, rows)[0],
            peft_front.on_front(runs, 100, 0, 0.5, (1.0, 0.05)),
        ]
    )


# ---- numbers
def test_intervals_of_accuracy_are_wilsons(made):
    _, runs, _, estimates = made
    rows = estimates[
        estimates["outcome"].eq(peft_results.ACCURACY) & estimates["contrast"].eq(peft_results.RUN)
    ]
    low, high = proportion_confint(runs["k"].to_numpy(int), 1319, method="wilson")
    assert np.allclose(rows["ci_low"].astype(float), 100 * np.where(runs["k"].eq(0), 0, low))
    assert np.allclose(rows["ci_high"].astype(float), 100 * high)
    others = estimates[
        estimates["outcome"].eq(peft_results.FORGETTING)
        & estimates["contrast"].eq(peft_results.RUN)
    ]
    assert others[["se", "ci_low", "ci_high"]].isna().all().all()


def restricted(y: np.ndarray, x: np.ndarray, z: np.ndarray) -> dict:
    """A random intercept by REML, from full matrices and a search in one dimension: slow, and
    plainly right.
    """
    n, p = x.shape

    def at(log_ratio: float) -> tuple:
        v = np.eye(n) + np.exp(2 * log_ratio) * z @ z.T
        inverse = np.linalg.inv(v)
        information = x.T @ inverse @ x
        b = np.linalg.solve(information, x.T @ inverse @ y)
        s2 = (y - x @ b) @ inverse @ (y - x @ b) / (n - p)
        return (
            ((n - p) * np.log(s2) + np.linalg.slogdet(v)[1] + np.linalg.slogdet(information)[1])
            / 2,
            b,
            s2,
            np.linalg.inv(information) * s2,
        )

    best = minimize_scalar(
        lambda t: at(t)[0], bounds=(-8, 4), method="bounded", options={"xatol": 1e-9}
    ).x
    _, b, s2, cov = at(best)
    return {"b": b, "cov": cov, "within": np.sqrt(s2), "between": np.sqrt(s2) * np.exp(best)}


def test_partial_pooling_is_hendersons_solution(made):
    """Predictions and their errors from Henderson's mixed model equations (Robinson 1991, eq. 1.2),
    at the variances found.
    """
    _, runs, _, _ = made
    rows = peft_models.modelled(runs)
    _, fit = peft_models.means_of_methods(rows, peft_results.ACCURACY)
    codes, methods = pd.factorize(rows["method"], sort=True)
    x, z, y = np.ones((len(rows), 1)), np.eye(len(methods))[codes], rows["accuracy"].to_numpy()
    sd = fit.random.set_index("group")["sd"]
    w = np.column_stack([x, z])
    c = (
        np.linalg.inv(
            w.T @ w + np.diag([0, *[sd["residual"] ** 2 / sd["method"] ** 2] * len(methods)])
        )
        * sd["residual"] ** 2
    )
    solution = c @ w.T @ y / sd["residual"] ** 2
    at = np.column_stack([np.ones(len(methods)), np.eye(len(methods))])
    table = peft_models.pooling(
        rows.groupby("method")["accuracy"].agg(["mean", "size"]),
        *peft_models._spread(rows, "accuracy"),
        fit,
    )
    assert np.allclose(table[peft_results.MIXED], at @ solution, atol=1e-4)
    assert np.allclose(
        table[f"se {peft_results.MIXED}"], np.sqrt(np.einsum("ij,jk,ik->i", at, c, at)), rtol=0.01
    )
    between = (table["mean"] - fit.fixed["estimate"].iloc[0]).abs()
    assert (
        (table[peft_results.MIXED] - fit.fixed["estimate"].iloc[0]).abs() <= between + 1e-9
    ).all()


def test_the_models_of_the_real_runs_are_those_of_an_independent_fit(real):
    runs, points = peft_results.read(real)
    rows = peft_models.modelled(runs)
    z = np.eye(rows["method"].nunique())[pd.factorize(rows["method"])[0]]
    one = np.ones(len(rows))
    classes = [rows["method_class"].eq(kind).to_numpy(float) for kind in ("full", "prompt")]
    for column, outcome in (
        ("accuracy", peft_results.ACCURACY),
        ("log_forgetting", peft_results.FORGETTING),
    ):
        for x, (_, fit) in (
            (one[:, None], peft_models.means_of_methods(rows, outcome)),
            (
                np.column_stack([one, *classes, rows["size"], rows["rate"]]),
                peft_models.terms(rows, outcome),
            ),
        ):
            same_fit(fit, restricted(rows[column].to_numpy(float), x, z))
    sloped = peft_models.slopes(points, rows)
    same_fit(
        peft_models.growth(points, rows)[1][peft_results.TWO_STAGES],
        restricted(sloped["slope"].to_numpy(float), np.column_stack([one, rows["size"]]), z),
    )


def same_fit(fit, slow: dict) -> None:
    scale = slow["within"]
    assert np.allclose(fit.fixed["estimate"], slow["b"], atol=1e-3 * scale)
    assert np.allclose(fit.fixed["se"], np.sqrt(np.diag(slow["cov"])), rtol=0.01)
    assert np.allclose(
        fit.random.set_index("group").loc[["method", "residual"], "sd"],
        [slow["between"], slow["within"]],
        atol=1e-2 * scale,
    )


def test_intervals_of_the_mixed_means_cover_what_made_the_runs():
    """Twelve methods with one to five runs, spreads as in the real runs: the true means of methods
    lie in their 95% intervals about so often.
    """
    rng, covered, closer = np.random.default_rng(1), [], []
    sizes = np.array([1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 5, 8])
    for _ in range(30):
        truth = 36 + 12 * rng.standard_normal(len(sizes))
        rows = pd.DataFrame(
            {
                "method": np.repeat([f"m{i:02d}" for i in range(len(sizes))], sizes),
                "base_model": "made",
            }
        )
        rows["accuracy"] = np.repeat(truth, sizes) + 8 * rng.standard_normal(len(rows))
        found, _ = peft_models.means_of_methods(rows, peft_results.ACCURACY)
        mixed, own = (
            found[found["estimator"].eq(model)]
            .set_index("method")
            .astype({"value": float, "ci_low": float, "ci_high": float})
            for model in (peft_results.MIXED, peft_results.BY_METHOD)
        )
        covered.append(((mixed["ci_low"] <= truth) & (truth <= mixed["ci_high"])).mean())
        closer.append(((own["value"] - truth) ** 2).mean() - ((mixed["value"] - truth) ** 2).mean())
    assert 0.9 < np.mean(covered) < 0.99
    assert np.mean(closer) > 0


def test_methods_with_one_run_each_have_no_mixed_mean(tmp_path):
    runs, points = peft_results.read(simulated(tmp_path / "results", n_runs=1))
    means, _ = peft_models.means_of_methods(peft_models.modelled(runs), peft_results.ACCURACY)
    mixed = means[means["estimator"].eq(peft_results.MIXED)]
    assert mixed[["value", "ci_low", "ci_high"]].isna().all().all()
    assert mixed["how"].str.contains("cannot be told apart").all()
    assert (
        means.loc[means["estimator"].eq(peft_results.BY_METHOD), ["se", "ci_low"]]
        .isna()
        .all()
        .all()
    )
    assert peft_front.peft_summary(analysed(runs, points)).endswith(".")


def test_one_method_alone_and_no_finished_run_are_said(tmp_path):
    runs, points = peft_results.read(
        write(
            tmp_path / "one",
            **{
                f"run-{i}": result(
                    variant=f"set-{i}",
                    k=500 + 9 * i,
                    lost=0.05 + i / 100,
                    n_trainable=1000 * (i + 1),
                )
                for i in range(4)
            },
        )
    )
    assert analysed(runs, points)["how"].str.contains("cannot be told apart").any()
    runs, _ = peft_results.read(write(tmp_path / "none", one=result(status="canceled")))
    with pytest.raises(ValueError, match="none of 1 runs finished"):
        peft_models.modelled(runs)


def test_settings_that_no_run_varies_are_null(tmp_path):
    runs, _ = peft_results.read(
        write(
            tmp_path / "same",
            **{
                f"run-{i}": result(
                    list(KINDS)[i % 6], f"set-{i}", k=400 + 17 * (i * i % 11), lost=0.05
                )
                for i in range(12)
            },
        )
    )
    found, fit = peft_models.terms(peft_models.modelled(runs), peft_results.ACCURACY)
    assert (
        found.loc[found["contrast"].isin([peft_results.SIZE, peft_results.RATE]), "value"]
        .isna()
        .all()
    )
    assert [note for note in fit.notes if "not estimable: size" in note]


def test_slopes_are_least_squares(made):
    _, runs, points, _ = made
    sloped = peft_models.slopes(points, peft_models.modelled(runs)).set_index("run_id")["slope"]
    for run_id, part in points.groupby("run_id"):
        assert sloped[run_id] == pytest.approx(
            np.polyfit(np.log2(part["step"].astype(float)), 100 * part["k"].astype(float) / 50, 1)[
                0
            ]
        )


def test_forgetting_that_is_none_leaves_the_logarithm_and_is_counted(tmp_path):
    folder = simulated(tmp_path / "results")
    write(folder, better=result("IA3", "better", lost=-0.01))
    runs, _ = peft_results.read(folder)
    _, fit = peft_models.terms(peft_models.modelled(runs), peft_results.FORGETTING)
    assert "1 rows left out: no value" in fit.notes


# ---- the front
def test_the_front_is_what_no_run_beats(made):
    _, runs, _, estimates = made
    for goal, column in peft_results.GOALS.items():
        rows = estimates[
            estimates["outcome"].eq(peft_results.on(goal))
            & estimates["contrast"].eq(peft_results.AS_PUBLISHED)
        ]
        points = list(
            zip(
                -runs["k"].astype(float),
                runs["forgetting"].astype(float),
                runs[column].astype(float),
                strict=True,
            )
        )
        beaten = [
            any(
                all(a <= b for a, b in zip(other, one, strict=True)) and other != one
                for other in points
            )
            for one in points
        ]
        assert rows["value"].eq(100).tolist() == [not lost for lost in beaten]


def test_draws_are_jeffreys_posterior_with_the_correlation_asked_for():
    rng, k, n = np.random.default_rng(0), np.array([0, 5, 600, 640, 1319]), 1319
    drawn = peft_front.draws(k, n, 40_000, rng)
    expected = beta(k + 0.5, n - k + 0.5)
    assert np.allclose(drawn.mean(0), 100 * expected.mean(), atol=0.02)
    assert np.allclose(drawn.std(0), 100 * expected.std(), rtol=0.03)
    assert abs(np.corrcoef(drawn[:, 2], drawn[:, 3])[0, 1]) < 0.02
    assert np.corrcoef(peft_front.draws(k, n, 40_000, rng, 0.5)[:, 2:4].T)[0, 1] == pytest.approx(
        0.5, abs=0.02
    )


def test_how_often_a_run_is_first_is_the_chance_that_its_accuracy_is_higher(tmp_path):
    runs, _ = peft_results.read(
        write(tmp_path / "two", one=result("LORA", k=640), two=result("IA3", k=600))
    )
    rows = peft_front.on_front(runs, 20_000, 0, 0.5, (1.0, 0.05))
    found = (
        rows[rows["outcome"].eq(peft_results.BEST)]
        .set_index(["contrast", "method"])["value"]
        .astype(float)
    )
    share = runs.set_index("method")["k"].astype(float) / 1319
    apart = (share["lora"] - share["ia3"]) / np.sqrt((share * (1 - share)).sum() / 1319)
    assert found[peft_results.QUESTIONS, "lora"] == pytest.approx(100 * norm.cdf(apart), abs=1)
    assert found[peft_results.CORRELATED, "lora"] == pytest.approx(
        100 * norm.cdf(apart / np.sqrt(0.5)), abs=1
    )
    assert found[peft_results.AS_PUBLISHED, "lora"] == 100


def test_a_run_without_a_number_takes_no_part_in_the_front(few, tmp_path):
    record = result("IA3")
    record["train_info"]["metrics"][-1]["forgetting"] = float("nan")
    runs, _ = peft_results.read(write(few, four=record))
    rows = peft_front.on_front(runs, 50, 0, 0.5, (1.0, 0.05))
    assert rows["member"].nunique() == 2
    again = peft_front.on_front(runs, 50, 0, 0.5, (1.0, 0.05))
    pd.testing.assert_frame_equal(rows, again)


# ---- tables, figures, the notebook
def test_estimates_say_what_their_intervals_cover_and_never_seeds(made):
    estimates = made[3]
    known = estimates.dropna(subset=["ci_low", "value"]).astype(
        {"ci_low": float, "value": float, "ci_high": float}
    )
    assert len(known)
    assert (known["ci_low"] <= known["value"] + 1e-9).all()
    assert (known["value"] <= known["ci_high"] + 1e-9).all()
    assert not known["population"].str.contains("seeds like these").any()
    assert known["population"].str.contains("seed 0").all()


def test_figures_are_the_same_from_published_tables_alone(made, tmp_path):
    folder = made[0]
    publish.publish(folder, tmp_path / "published" / peft_results.PEFT_NAME, peft_results.PEFT_NOTE)
    tables = gallery.read(tmp_path / "published" / peft_results.PEFT_NAME / "tables")
    for path in (folder / "figures").glob("*.png"):
        assert path.stat().st_size < 200_000
        assert "Made by notebook" in path.with_suffix(".md").read_text()
    for name in ("peft_pareto", "peft_curves"):
        gallery.draw(name, tables, tmp_path / "again")
        assert (tmp_path / "again" / f"{name}.png").read_bytes() == (
            folder / "figures" / f"{name}.png"
        ).read_bytes()


def test_names_on_the_front_hide_neither_each_other_nor_the_edge(made):
    fig = gallery.draw("peft_pareto", gallery.read(made[0] / "tables", peft_results.PEFT_NOTE))
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in fig.axes[0].texts]
    front = (
        made[3][
            made[3]["outcome"].eq(peft_results.on("peak memory"))
            & made[3]["contrast"].eq(peft_results.AS_PUBLISHED)
        ]["value"]
        .eq(100)
        .sum()
    )
    assert len(boxes) == front > 2
    assert not [
        (i, j)
        for i, one in enumerate(boxes)
        for j, other in enumerate(boxes)
        if i < j and one.overlaps(other)
    ]
    assert all(box.x0 >= 0 and box.x1 <= fig.bbox.x1 for box in boxes)


def test_figures_draw_where_there_is_nothing(made, few, tmp_path):
    tables = gallery.read(made[0] / "tables", peft_results.PEFT_NOTE)
    bare = {**tables, "estimates": ESTIMATES.empty(), "rates": TABLES["rates"].empty()}
    holes = tables["estimates"].copy()
    holes.loc[::3, ["se", "ci_low", "ci_high"]] = None
    for name in DRAWINGS:
        fig, caption = drawing.FIGURES[name](bare)
        assert "Nothing to draw" in caption
        plt.close(fig)
        plt.close(drawing.FIGURES[name]({**tables, "estimates": holes})[0])


def test_the_notebook_runs_on_the_real_files(real, monkeypatch):
    monkeypatch.setenv("DRIFTBOOK_SHARED", os.environ["DRIFTBOOK_SHARED"])
    shell = InteractiveShell()
    shell.display_pub.publish = lambda *args, **kwargs: None
    for cell in nbformat.read(ROOT / "notebooks" / f"{peft_results.NOTEBOOK}.ipynb", 4).cells:
        if cell.cell_type == "code":
            shell.run_cell(
                cell.source.replace("n_draws: int = 2000", "n_draws: int = 200"), silent=True
            ).raise_error()
    folder, note, _ = publish.made(peft_results.PEFT_NAME)
    assert (folder, note) == (peft_results.FOLDER, peft_results.PEFT_NOTE)
    assert {path.stem for path in (folder / "figures").glob("*.png")} == set(DRAWINGS)
    estimates = estimation.read_estimates(folder / "tables")
    assert set(estimates["notebook"]) == {peft_results.NOTEBOOK}
    assert estimates["outcome"].eq(peft_results.BEST).any()
