"""Safe LoRA against a dense reference in float64, on matrices of all shapes and on adapters that
PEFT saved; its laws; and what it refuses.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import (
    BeftConfig,
    FourierFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from conftest import one_sentence
from driftbook.models import adapters
from driftbook.training import safe_lora, updates
from driftbook.training.checkpoints import open_checkpoint

SHAPES = {
    "square": (48, 48, 4),
    "tall": (64, 24, 4),
    "wide": (24, 64, 4),
    "rank one": (40, 40, 1),
    "rank of the rows": (16, 40, 16),
}


# ---- an obviously right version: everything dense, in float64
def dense(operator: str, v: np.ndarray, k: int | None = None) -> np.ndarray:
    """C [out, out]."""
    if operator == "approximate":
        return v @ v.T / np.linalg.norm(v)
    u, s, _ = np.linalg.svd(v, full_matrices=False)
    u = u[:, : k or int((s > 1e-9 * s[0]).sum())]
    return u @ u.T


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))


def written(folder, matrices: dict, **dtype):
    folder.mkdir(parents=True)
    save_file(
        {
            name: torch.as_tensor(value).to(dtype.get("dtype", torch.float32)).contiguous()
            for name, value in matrices.items()
        },
        folder / "model.safetensors",
    )
    return folder


def lora_folder(folder, factors: dict, **config):
    folder.mkdir(parents=True)
    tensors = {
        f"{updates.PREFIX}{module}.lora_{part}.weight": (
            torch.as_tensor(value, dtype=torch.float32).contiguous()
        )
        for module, (a, b) in factors.items()
        for part, value in (("A", a), ("B", b))
    }
    save_file(tensors, folder / adapters.WEIGHTS)
    made = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "task_type": "CAUSAL_LM",
        "target_modules": ["q"],
        **config,
    }
    (folder / updates.CONFIG).write_text(json.dumps(made))
    return folder


@pytest.fixture
def case(tmp_path, request):
    """An adapter of two modules and its pair of checkpoints, with the same numbers in float64."""
    rows, columns, r = request.param
    rng = np.random.default_rng(rows)
    modules = ["model.layers.0.q", "model.layers.1.q"]
    unaligned = {m: rng.normal(size=(rows, columns)).astype(np.float32) for m in modules}
    aligned = {
        m: (
            unaligned[m]
            + 0.1
            * rng.normal(size=(rows, columns)).astype(np.float32)
            * rng.gamma(1, size=columns).astype(np.float32)
        )
        for m in modules
    }
    factors = {
        m: (
            rng.normal(size=(r, columns)).astype(np.float32),
            rng.normal(size=(rows, r)).astype(np.float32),
        )
        for m in modules
    }
    return {
        "aligned": written(
            tmp_path / "aligned", {f"{m}.weight": value for m, value in aligned.items()}
        ),
        "unaligned": written(
            tmp_path / "unaligned", {f"{m}.weight": value for m, value in unaligned.items()}
        ),
        "adapter": lora_folder(tmp_path / "adapter", factors, r=r),
        "out": tmp_path / "out",
        "v": {m: aligned[m].astype(float) - unaligned[m].astype(float) for m in modules},
        "dw": {m: (8 / r) * b.astype(float) @ a.astype(float) for m, (a, b) in factors.items()},
    }


every_shape = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES, indirect=True)
one_shape = pytest.mark.parametrize("case", [SHAPES["square"]], indirect=True)


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
    apply = safe_lora._operator("subspace", v, k, seed)[0]
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed + 1))
    assert torch.allclose(apply(apply(x)), apply(x), atol=1e-5)
    assert torch.linalg.vector_norm(apply(x)) <= torch.linalg.vector_norm(x) * (1 + 1e-6)


@given(scale=st.floats(1e-2, 1e2), seed=st.integers(0, 99))
def test_the_cosine_does_not_know_the_scales_and_what_is_kept_grows_with_that_of_v(scale, seed):
    generator = torch.Generator().manual_seed(seed)
    v, a, b = (torch.randn(shape, generator=generator) for shape in ((20, 15), (3, 15), (20, 3)))
    one, of_v, of_dw = (
        safe_lora._Module.of(
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
        safe_lora._Module.of(
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


# ---- real adapters of PEFT, by name
def tiny(kind: str, seed: int = 0):
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = (
        LlamaForCausalLM(LlamaConfig(**shape))
        if kind == "llama"
        else Qwen2ForCausalLM(Qwen2Config(**shape))
    )
    for value in model.parameters():
        if value.ndim == 2:
            value.data.mul_(5)
    return model.eval()


LORAS = {
    "grouped queries, patterns": (
        "llama",
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
            rank_pattern={"k_proj": 2, "layers.1.self_attn.q_proj": 7},
            alpha_pattern={"v_proj": 3},
        ),
    ),
    "a regex, rsLoRA": (
        "llama",
        LoraConfig(
            r=4, lora_alpha=8, target_modules=r".*layers\.1.*(q_proj|o_proj)", use_rslora=True
        ),
    ),
    "some layers": (
        "llama",
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], layers_to_transform=[1]),
    ),
    "rank of the rows": ("llama", LoraConfig(r=16, lora_alpha=8, target_modules=["k_proj"])),
    "biases": (
        "qwen2",
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], bias="all"),
    ),
    "a bias of B": (
        "qwen2",
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_bias=True),
    ),
    "DoRA": (
        "llama",
        LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "down_proj"], use_dora=True
        ),
    ),
    "DoRA with biases": (
        "qwen2",
        LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_dora=True, bias="lora_only"
        ),
    ),
    "DoRA with trained tokens": (
        "llama",
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj"],
            use_dora=True,
            trainable_token_indices=[1, 3],
        ),
    ),
    "DoRA with a module trained whole": (
        "llama",
        LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"]
        ),
    ),
    "IA3": (
        "llama",
        IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
}


@pytest.mark.parametrize(("kind", "config"), LORAS.values(), ids=LORAS)
def test_the_loaded_adapter_adds_what_the_dense_form_says(kind, config, tmp_path):
    base, other = tiny(kind), tiny(kind, seed=1)
    base.save_pretrained(tmp_path / "aligned")
    other.save_pretrained(tmp_path / "unaligned")
    before, unaligned = (
        {name: value.double().clone() for name, value in model.state_dict().items()}
        for model in (base, other)
    )
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(2)
    for value in model.parameters():
        if value.requires_grad:
            value.data += 0.3 * torch.randn(value.shape, generator=generator)
    adapters.save(model, tmp_path / "adapter")
    merged = {name: value.double() for name, value in model.merge_and_unload().state_dict().items()}
    rows = safe_lora.project(
        tmp_path / "adapter",
        tmp_path / "aligned",
        tmp_path / "unaligned",
        tmp_path / "out",
        select="top",
        value=1,
    )
    with adapters.attached(tiny(kind), tmp_path / "out") as loaded:
        after = {
            name: value.double() for name, value in loaded.merge_and_unload().state_dict().items()
        }
    touched = set(rows.module[rows.projected])
    for name, start in before.items():
        module = name.rpartition(".")[0]
        change = merged[name] - start
        if module in touched:
            v = (before[f"{module}.weight"] - unaligned[f"{module}.weight"]).numpy()
            change = torch.as_tensor(dense("approximate", v) @ change.numpy())
        assert torch.allclose(
            after[name], start + change, atol=2e-5 * (1 + float(change.abs().max()))
        ), name
    assert touched


TARGETS = {"target_modules": ["q_proj", "k_proj", "down_proj"]}
OTHERS = {
    "LoHa": LoHaConfig(r=2, alpha=4, **TARGETS),
    "LoKr": LoKrConfig(r=2, alpha=4, **TARGETS),
    "MiSS": MissConfig(r=4, **TARGETS),
    "VeRA": VeraConfig(r=4, **{**TARGETS, "target_modules": ["q_proj"]}),
    "FourierFT": FourierFTConfig(n_frequency=20, scaling=50.0, **TARGETS),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_another_method_is_converted_without_loss_and_then_projected(config, tmp_path):
    base, other = tiny("llama"), tiny("llama", seed=1)
    base.save_pretrained(tmp_path / "aligned")
    other.save_pretrained(tmp_path / "unaligned")
    before = {name: value.double().clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(2)
    for value in model.parameters():
        if value.requires_grad:
            value.data += 0.3 * torch.randn(value.shape, generator=generator)
    adapters.save(model, tmp_path / "adapter")
    wanted = {
        name: value.double() - before[name]
        for name, value in model.merge_and_unload().state_dict().items()
    }
    with pytest.raises(ValueError, match=r"updates\.converted"):
        safe_lora.project(
            tmp_path / "adapter", tmp_path / "aligned", tmp_path / "unaligned", tmp_path / "out"
        )
    made = updates.read(updates.converted(tmp_path / "adapter", tiny("llama"), tmp_path / "lora"))
    assert {f"{one.module}.weight" for one in made} == {
        name for name, value in wanted.items() if value.any()
    }
    for one in made:
        change = wanted[f"{one.module}.weight"]
        assert (
            float((one.scale * one.b.double() @ one.a.double() - change).norm() / change.norm())
            < 1e-5
        )
    rows = safe_lora.project(
        tmp_path / "lora",
        tmp_path / "aligned",
        tmp_path / "unaligned",
        tmp_path / "out",
        select="top",
        value=1,
    )
    assert rows.projected.sum() == 1


def test_what_peft_cannot_convert_is_refused(tmp_path):
    for name, config in {
        "biases": BeftConfig(target_modules=["v_proj"]),
        "saved": LoHaConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    }.items():
        adapters.save(get_peft_model(tiny("llama"), config), tmp_path / name)
        with pytest.raises(ValueError) as error:
            updates.converted(tmp_path / name, tiny("llama"), tmp_path / "out")
        assert name in one_sentence(error.value)
        assert not (tmp_path / "out").exists()


# ---- what is refused
@one_shape
def test_bad_input_is_one_sentence_and_nothing_is_written(case, tmp_path):
    def said(match: str, **changes):
        arguments = {
            name: case[name] for name in ("adapter", "aligned", "unaligned", "out")
        } | changes
        before = set(tmp_path.rglob("*"))
        with pytest.raises(ValueError) as error:
            safe_lora.project(**arguments)
        assert match in one_sentence(error.value)
        assert set(tmp_path.rglob("*")) == before

    def other(name: str, change) -> object:
        tensors = load_file(case["unaligned"] / "model.safetensors")
        return written(tmp_path / name, change(tensors))

    shorter = other(
        "shorter", lambda tensors: {name: value[:-1] for name, value in tensors.items()}
    )
    renamed = other(
        "renamed",
        lambda tensors: {f"transformer.{name}.x": value for name, value in tensors.items()},
    )
    packed = other(
        "packed", lambda tensors: {**tensors, "model.layers.0.q.weight.absmax": torch.ones(1)}
    )
    broken = other(
        "broken", lambda tensors: {name: value * float("nan") for name, value in tensors.items()}
    )
    integers = written(
        tmp_path / "integers",
        {
            name: value.to(torch.int8)
            for name, value in load_file(case["unaligned"] / "model.safetensors").items()
        },
        dtype=torch.int8,
    )
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    torn = tmp_path / "torn"
    shutil.copytree(case["unaligned"], torn)
    (torn / "model.safetensors").write_bytes(b"\x00" * 20)
    smaller = lora_folder(
        tmp_path / "smaller", {"model.layers.0.q": (np.ones((4, 40)), np.ones((40, 4)))}
    )
    idle = lora_folder(
        tmp_path / "idle", {"model.layers.0.q": (np.ones((4, 48)), np.zeros((48, 4)))}
    )
    soft = lora_folder(
        tmp_path / "soft",
        {"model.layers.0.q": (np.ones((4, 48)), np.ones((48, 4)))},
        peft_type="PROMPT_TUNING",
    )
    pissa = lora_folder(
        tmp_path / "pissa",
        {"model.layers.0.q": (np.ones((4, 48)), np.ones((48, 4)))},
        init_lora_weights="pissa_niter_4",
    )
    said("no unaligned checkpoint", unaligned=tmp_path / "nowhere")
    said("no unaligned checkpoint", unaligned="./nowhere")
    said("V is zero", unaligned=case["aligned"])
    said("48 x 48 in the aligned and 47 x 48", unaligned=shorter)
    said("has no weight of the module", unaligned=renamed)
    said("quantised", unaligned=packed)
    said("quantised", unaligned=integers)
    said("NaN", unaligned=broken)
    said("pickles", unaligned=pickled)
    said("torn", unaligned=torn)
    said("another base model", adapter=smaller)
    said("never trained", adapter=idle)
    said("no weight update", adapter=soft)
    said("changes the base model itself", adapter=pissa)
    said("merged model and no adapter", adapter=case["aligned"])
    said("there is no adapter", adapter=tmp_path / "nothing")
    said("is there already", out=case["adapter"])
    said("operator='safe'", operator="safe")
    said("select='best'", select="best")
    said("number of modules", select="top", value=0.5)
    said("the adapter has 2", select="top", value=3)
    said("between 0 and 1", value=1.5)
    said("needs rank", operator="subspace")
    said("takes no rank", rank=3)
    said("at most 48", operator="subspace", rank=49)
    said("whole number from 1", operator="subspace", rank=-1)
    said("number of modules", select="top", value=float("inf"))
    for key, value in {
        "fan_in_fan_out": True,
        "kasa_config": {"r": 4},
        "target_parameters": ["x"],
    }.items():
        said(
            key,
            adapter=lora_folder(
                tmp_path / key,
                {"model.layers.0.q": (np.ones((4, 48)), np.ones((48, 4)))},
                **{key: value},
            ),
        )
    said(
        "ranks 4 and 3",
        adapter=lora_folder(
            tmp_path / "uneven", {"model.layers.0.q": (np.ones((4, 48)), np.ones((48, 3)))}
        ),
    )
    said(
        "not finite",
        adapter=lora_folder(
            tmp_path / "nan", {"model.layers.0.q": (np.full((4, 48), np.nan), np.ones((48, 4)))}
        ),
    )
    bare = lora_folder(
        tmp_path / "bare", {"model.layers.0.q": (np.ones((4, 48)), np.ones((48, 4)))}
    )
    whole = load_file(bare / adapters.WEIGHTS)
    for name, tensors, word in (
        (
            "unnamed",
            {key.removeprefix(updates.PREFIX): value for key, value in whole.items()},
            "does not begin with",
        ),
        ("half", {key: value for key, value in whole.items() if "lora_A" in key}, "lora_B.weight"),
    ):
        torn_one = lora_folder(
            tmp_path / name, {"model.layers.0.q": (np.ones((4, 48)), np.ones((48, 4)))}
        )
        save_file(tensors, torn_one / adapters.WEIGHTS)
        said(word, adapter=torn_one)


def test_a_soft_prompt_of_peft_is_refused(tmp_path):
    model = get_peft_model(
        tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    adapters.save(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="safety template at test time"):
        safe_lora.project(tmp_path / "adapter", tmp_path, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_with_more_or_less_before_them_are_found(tmp_path):
    folder = written(
        tmp_path / "one",
        {
            "language_model.model.layers.0.q.weight": np.ones((2, 2)),
            "layers.1.q.weight": np.ones((2, 2)),
        },
    )
    found = open_checkpoint(folder, "aligned")
    assert found.name("model.layers.0.q.weight") == "language_model.model.layers.0.q.weight"
    assert found.name("model.layers.1.q.weight") == "layers.1.q.weight"
    assert found.name("model.layers.2.q.weight") is None


@one_shape
def test_spectra_are_those_of_v(case):
    found = safe_lora.spectra(case["adapter"], case["aligned"], case["unaligned"], most=5)
    for module, part in found.groupby("module"):
        assert part.singular_value.tolist() == pytest.approx(
            np.linalg.svd(case["v"][module], compute_uv=False)[:5].tolist(), rel=1e-4
        )
        assert part["index"].tolist() == [1, 2, 3, 4, 5]
