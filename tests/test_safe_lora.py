"""Safe LoRA against a dense reference in float64, on matrices of all shapes, and its laws."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from driftbook.models import adapters
from driftbook.training import safe_lora, updates
from safe_lora_cases import SHAPES, dense, lora_folder, one_shape, written

pytest_plugins = ["safe_lora_cases"]


# ---- an obviously right version: everything dense, in float64
def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))


every_shape = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES, indirect=True)


def run(case, **kwargs):
    return safe_lora.project(
        case["adapter"], case["aligned"], case["unaligned"], case["out"], **kwargs
    )


def result(case) -> dict:
    return {
        one.module: (one.scale * one.b @ one.a).double().numpy()
        for one in updates.read(case["out"])
    }


@every_shape
@pytest.mark.parametrize("operator", ["approximate", "exact", "subspace", "zero"])
def test_it_equals_the_dense_form(case, operator):
    k = 5 if operator == "subspace" else None
    rows = run(case, operator=operator, select="top", value=2, rank=k).set_index("module")
    for module, new in result(case).items():
        v, dw, row = case["v"][module], case["dw"][module], rows.loc[module]
        c = np.zeros((len(v), len(v))) if operator == "zero" else dense(operator, v, k)
        assert np.linalg.norm(new - c @ dw) <= 1e-5 * np.linalg.norm(dw)
        judged = dense("approximate" if operator in ("zero", "subspace") else operator, v) @ dw
        assert row.cosine == pytest.approx(cosine(dw, judged), rel=1e-5)
        u = np.linalg.svd(v, full_matrices=False)[0][:, : int(row.k)]
        assert row.energy == pytest.approx(
            np.linalg.norm(u.T @ dw) ** 2 / np.linalg.norm(dw) ** 2, rel=1e-5
        )
        assert row.share_kept == pytest.approx(
            np.linalg.norm(c @ dw) / np.linalg.norm(dw), rel=1e-5, abs=1e-7
        )
        s = np.linalg.svd(v, compute_uv=False)
        assert row.effective_rank_v == pytest.approx((s**2).sum() ** 2 / (s**4).sum(), rel=1e-5)
        assert (row.norm_v, row.norm_update) == pytest.approx(
            (np.linalg.norm(v), np.linalg.norm(dw)), rel=1e-5
        )


@every_shape
def test_the_exact_operator_says_where_it_is_the_identity_or_undefined(case):
    rows = run(case, operator="exact", select="top", value=2)
    (out, columns), said = case["v"]["model.layers.0.q"].shape, set(rows.state)
    if out == columns:
        assert said == {"identity: V has full row rank"}
    elif out < columns:
        assert len(said) == 1
        assert said.pop().startswith("undefined as written: V is wide")
    else:
        assert said == {"projected"}
    for module, new in result(case).items():
        same = np.allclose(new, case["dw"][module], atol=1e-5)
        assert same == (out <= columns)


def test_a_square_v_with_strong_directions_is_still_of_full_rank(tmp_path):
    rng, (v, up, down) = (
        np.random.default_rng(0),
        (np.zeros((512, 512)), *np.random.default_rng(1).normal(size=(2, 512))),
    )
    v = (rng.normal(size=v.shape) + 5 * np.outer(up, down)).astype(np.float32)
    adapter = lora_folder(
        tmp_path / "adapter", {"q": (rng.normal(size=(4, 512)), rng.normal(size=(512, 4)))}
    )
    pair = (
        written(tmp_path / "a", {"q.weight": v}),
        written(tmp_path / "b", {"q.weight": np.zeros_like(v)}),
    )
    rows = safe_lora.project(adapter, *pair, tmp_path / "out", "exact", "top", 1)
    assert rows.state.tolist() == ["identity: V has full row rank"]
    assert rows.cosine_null.tolist() == [1.0]


def test_an_update_that_the_operator_takes_away_whole_is_the_first_to_be_projected(tmp_path):
    rng, factors = np.random.default_rng(0), {}
    v, b = np.zeros((48, 30)), np.zeros((48, 4))
    v[:24], b[24:] = rng.normal(size=(24, 30)), rng.normal(size=(24, 4))
    factors = {
        "l0.q": (rng.normal(size=(4, 30)), b),
        "l1.q": (rng.normal(size=(4, 30)), rng.normal(size=(48, 4))),
    }
    adapter = lora_folder(tmp_path / "adapter", factors)
    pair = (
        written(tmp_path / "a", {f"{name}.weight": v for name in factors}),
        written(tmp_path / "b", {f"{name}.weight": np.zeros_like(v) for name in factors}),
    )
    for number, (select, value) in enumerate([("threshold", 0.01), ("top", 1)]):
        rows = safe_lora.project(
            adapter, *pair, tmp_path / f"out{number}", select=select, value=value
        )
        assert rows.projected.tolist() == [True, False]
        assert rows.score.tolist()[0] == 0
    alone = lora_folder(tmp_path / "alone", {"l0.q": factors["l0.q"]})
    assert safe_lora.project(alone, *pair, tmp_path / "out").projected.tolist() == [True]


@one_shape
def test_more_directions_than_v_has_are_called_so(case, tmp_path):
    rng, names = np.random.default_rng(0), [f"{module}.weight" for module in case["v"]]
    low = {
        name: (rng.normal(size=(48, 3)) @ rng.normal(size=(3, 48))).astype(np.float32)
        for name in names
    }
    zero = {name: np.zeros((48, 48), np.float32) for name in names}
    pair = written(tmp_path / "low", low), written(tmp_path / "none", zero)
    assert all(
        "the last directions are arbitrary" in said
        for said in safe_lora.project(
            case["adapter"], *pair, case["out"], "subspace", "top", 2, rank=24
        ).state
    )
    assert set(
        safe_lora.project(
            case["adapter"], *pair, tmp_path / "out3", "subspace", "top", 2, rank=3
        ).state
    ) == {"projected"}


@one_shape
def test_a_rank_deficient_v_is_called_so(case, tmp_path):
    rng, names = np.random.default_rng(0), [f"{module}.weight" for module in case["v"]]
    low = {
        name: (rng.normal(size=(48, 3)) @ rng.normal(size=(3, 48))).astype(np.float32)
        for name in names
    }
    zero = {name: np.zeros((48, 48), np.float32) for name in names}
    rows = safe_lora.project(
        case["adapter"],
        written(tmp_path / "low", low),
        written(tmp_path / "none", zero),
        case["out"],
        "exact",
        "top",
        2,
    )
    assert rows.state.str.contains("undefined as written: V has rank 3 of 48").all()
    for module, new in result(case).items():
        assert np.linalg.norm(
            new - dense("exact", low[f"{module}.weight"].astype(float), 3) @ case["dw"][module]
        ) <= 1e-4 * np.linalg.norm(case["dw"][module])


@one_shape
def test_modules_are_selected_by_their_score(case):
    rows = run(case, select="top", value=1)
    assert rows.projected.tolist() == (rows.score == rows.score.min()).tolist()
    before, after = (
        load_file(folder / adapters.WEIGHTS) for folder in (case["adapter"], case["out"])
    )
    touched = rows.module[rows.projected].item()
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        f"{updates.PREFIX}{touched}.lora_B.weight"
    ]
    shutil.rmtree(case["out"])
    between = rows.score.mean()
    again = run(case, select="threshold", value=between)
    assert again.projected.tolist() == rows.projected.tolist()


@one_shape
def test_controls_select_what_they_control(case):
    of = {}
    for operator, k in (
        ("approximate", None),
        ("zero", None),
        ("random", None),
        ("subspace", 6),
        ("random subspace", 6),
    ):
        of[operator] = run(case, operator=operator, rank=k, select="top", value=1)
        shutil.rmtree(case["out"])
    for one, other in (
        ("zero", "approximate"),
        ("random", "approximate"),
        ("random subspace", "subspace"),
    ):
        assert of[one].score.tolist() == pytest.approx(of[other].score.tolist())
    hit = of["random subspace"].projected
    assert of["random subspace"].share_kept[hit].item() == pytest.approx((6 / 48) ** 0.5, abs=0.15)
    assert of["zero"].share_kept[of["zero"].projected].item() == 0


# ---- laws
@given(rows=st.integers(2, 30), columns=st.integers(2, 30), seed=st.integers(0, 99), data=st.data())
def test_the_projector_on_left_vectors_is_idempotent(rows, columns, seed, data):
    v = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    k = data.draw(st.integers(1, min(rows, columns)))
    apply = safe_lora.operator_of("subspace", v, k, seed)[0]
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed + 1))
    assert torch.allclose(apply(apply(x)), apply(x), atol=1e-5)
    assert torch.linalg.vector_norm(apply(x)) <= torch.linalg.vector_norm(x) * (1 + 1e-6)


@given(scale=st.floats(1e-2, 1e2), seed=st.integers(0, 99))
def test_the_cosine_does_not_know_the_scales_and_what_is_kept_grows_with_that_of_v(scale, seed):
    generator = torch.Generator().manual_seed(seed)
    v, a, b = (torch.randn(shape, generator=generator) for shape in ((20, 15), (3, 15), (20, 3)))
    one, of_v, of_dw = (
        safe_lora.treat_module(
            updates.Update("m", a, b * factor, 2.0), v * of_v, "approximate", None, 0, {}
        )
        for factor, of_v in ((1, 1), (1, scale), (scale, 1))
    )
    for other in (of_v, of_dw):
        assert other.row["cosine"] == pytest.approx(one.row["cosine"], rel=1e-4)
        assert other.row["energy"] == pytest.approx(one.row["energy"], rel=1e-4)
    assert of_v.treated.norm() == pytest.approx(
        one.treated.norm() * scale, rel=1e-4
    )  # C grows with ||V||: the published operator is no projector
    assert of_dw.treated.norm() == pytest.approx(one.treated.norm() * scale, rel=1e-4)


@pytest.mark.parametrize("operator", ["approximate", "exact"])
@pytest.mark.parametrize("shape", [(60, 60), (90, 30), (30, 90)])
def test_null_values_are_those_of_random_updates(shape, operator):
    rng = torch.Generator().manual_seed(1)
    v = torch.randn(shape, generator=rng) * torch.linspace(0, 2, shape[1]) ** 2
    drawn = [
        safe_lora.treat_module(
            updates.Update(
                "m",
                torch.randn(8, shape[1], generator=rng),
                torch.randn(shape[0], 8, generator=rng),
                1.0,
            ),
            v,
            operator,
            None,
            0,
            {},
        ).row
        for _ in range(60)
    ]
    assert np.mean([row["cosine"] for row in drawn]) == pytest.approx(
        drawn[0]["cosine_null"], abs=0.02
    )
    assert np.mean([row["energy"] for row in drawn]) == pytest.approx(
        drawn[0]["energy_null"], abs=0.02
    )


def test_a_large_v_is_estimated_to_a_hundredth(monkeypatch):
    v = (
        torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
        * torch.linspace(0, 3, 200) ** 2
    )
    whole, vectors = safe_lora.effective_rank(v), safe_lora.left_vectors(v, 8)
    monkeypatch.setattr(safe_lora, "SMALL", 0)
    assert (safe_lora.effective_rank(v) / 300) ** 0.5 == pytest.approx(
        (whole / 300) ** 0.5, abs=0.01
    )
    caught, most = (
        float(torch.linalg.vector_norm(u.T @ v)) for u in (safe_lora.left_vectors(v, 8), vectors)
    )
    assert 0.99 * most < caught <= most * (1 + 1e-6)
