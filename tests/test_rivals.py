"""Rivals and controls of Safe LoRA: exact sums of updates against dense ones and against PEFT,
norms that are what they are said to be, and what is refused.
"""

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale

from conftest import one_sentence
from driftbook.models import adapters
from driftbook.training import controls, updates
from safe_lora_cases import lora_folder, tiny

CONFIGS = {
    "plain": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "down_proj"]),
    "patterns": LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "k_proj", "down_proj"],
        rank_pattern={"k_proj": 2},
        alpha_pattern={"down_proj": 9},
        use_rslora=True,
    ),
    "dora": LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "down_proj"], use_dora=True
    ),
    "biases": LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "down_proj"], lora_bias=True
    ),
    "fewer": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict:
    """Adapters of one tiny Llama that do something, by the name of their configuration."""
    folders = {}
    for number, (name, config) in enumerate(CONFIGS.items()):
        model = get_peft_model(tiny("llama"), config)
        generator = torch.Generator().manual_seed(number)
        for value in model.parameters():
            if value.requires_grad:
                value.data += 0.2 * torch.randn(value.shape, generator=generator)
        folders[name] = tmp_path_factory.mktemp("rivals") / name
        adapters.save(model, folders[name])
    return folders


def dense(folder) -> dict[str, torch.Tensor]:
    """dW [out, in] of each module, in float64."""
    return {one.module: one.scale * one.b.double() @ one.a.double() for one in updates.read(folder)}


def change(folder) -> dict[str, torch.Tensor]:
    """What PEFT adds to each weight of the model when it loads and merges the adapter."""
    before = {name: value.double().clone() for name, value in tiny("llama").state_dict().items()}
    after = PeftModel.from_pretrained(tiny("llama"), folder).merge_and_unload().state_dict()
    return {
        name.removesuffix(".weight"): after[name].double() - value
        for name, value in before.items()
        if not torch.equal(after[name].double(), value)
    }


def equal(found: dict, wanted: dict) -> None:
    for module in wanted:
        assert torch.allclose(
            found.get(module, torch.zeros((), dtype=torch.float64)),
            wanted[module],
            atol=2e-5 * (1 + float(wanted[module].abs().max())),
        ), module


@pytest.mark.parametrize("name", ["plain", "patterns", "dora", "ia3"])
def test_rescaling_is_that_of_peft(saved, tmp_path, name):
    rows = controls.rescaled(saved[name], tmp_path / "out", 0.3)
    ids = torch.arange(12)[None]
    with torch.no_grad(), adapters.attached(tiny("llama"), tmp_path / "out") as model:
        found = model(ids).logits
    if name == "ia3":
        equal(
            change(tmp_path / "out"),
            {module: 0.3 * value for module, value in change(saved[name]).items()},
        )
    else:
        model = PeftModel.from_pretrained(tiny("llama"), saved[name])
        with torch.no_grad(), rescale_adapter_scale(model, 0.3):
            assert torch.allclose(model(ids).logits, found, atol=1e-4)
    assert rows.share_kept.tolist() == pytest.approx([0.3] * len(rows))


def test_sums_are_exact_whatever_the_ranks_and_scales(saved, tmp_path):
    one, other = dense(saved["plain"]), dense(saved["patterns"])
    controls.averaged([saved["plain"], saved["patterns"]], tmp_path / "average")
    controls.add(saved["plain"], saved["patterns"], tmp_path / "add", 0.7)
    controls.mixed(saved["plain"], saved["patterns"], tmp_path / "mixed", 0.3)
    equal(
        change(tmp_path / "mixed"),
        {module: 0.7 * one[module] + 0.3 * other[module] for module in one},
    )
    first = next(iter(one))
    rows = controls.merge_where(
        saved["plain"], saved["patterns"], tmp_path / "merge", [first], 0.25
    )
    equal(
        change(tmp_path / "average"), {module: (one[module] + other[module]) / 2 for module in one}
    )
    equal(change(tmp_path / "add"), {module: one[module] + 0.7 * other[module] for module in one})
    equal(change(tmp_path / "merge"), one | {first: 0.75 * one[first] + 0.25 * other[first]})
    assert rows.set_index("module").projected.to_dict() == {
        module: module == first for module in one
    }


def test_sums_equal_those_of_pefts_cat(saved, tmp_path):
    model = PeftModel.from_pretrained(tiny("llama"), saved["plain"], adapter_name="one")
    model.load_adapter(saved["patterns"], adapter_name="other")
    with torch.no_grad():
        model.add_weighted_adapter(["one", "other"], [1.0, 0.7], "both", combination_type="cat")
        model.set_adapter("both")
        ids = torch.arange(12)[None]
        wanted = model(ids).logits
        controls.add(saved["plain"], saved["patterns"], tmp_path / "out", 0.7)
        with adapters.attached(tiny("llama"), tmp_path / "out") as ours:
            assert torch.allclose(ours(ids).logits, wanted, atol=1e-3)


def test_many_snapshots_have_no_more_rank_than_the_matrix(saved, tmp_path):
    rows = controls.averaged(
        [saved["plain"]] * 9, tmp_path / "out"
    )  # 9 x 4 columns, and k_proj has 16 rows
    equal(change(tmp_path / "out"), dense(saved["plain"]))
    ranks = {one.module: one.rank for one in updates.read(tmp_path / "out")}
    assert all(
        rank <= min(rows.set_index("module").loc[module, ["out_features", "in_features"]])
        for module, rank in ranks.items()
    )


def test_controls_keep_the_norm_and_lose_the_rest(saved, tmp_path):
    own = dense(saved["plain"])
    first = next(iter(own))
    controls.zeroed(saved["plain"], [first], tmp_path / "zeroed")
    equal(change(tmp_path / "zeroed"), own | {first: torch.zeros_like(own[first])})
    controls.rescaled(saved["patterns"], tmp_path / "treated", 0.5)
    for control in (controls.same_norm, lambda *paths: controls.noise(*paths, 3)):
        out = tmp_path / f"control{control is controls.same_norm}"
        rows = control(saved["plain"], saved["patterns"], out).set_index("module")
        for module, value in dense(out).items():
            goal = dense(saved["patterns"])[module].norm()
            assert float(value.norm()) == pytest.approx(float(goal), rel=1e-5)
            cosine = float((value * own[module]).sum() / value.norm() / own[module].norm())
            assert (
                cosine == pytest.approx(1, abs=1e-5)
                if control is controls.same_norm
                else abs(cosine) < 0.6
            )
            assert rows.share_kept[module] == pytest.approx(
                float(goal / own[module].norm()), rel=1e-4
            )
    drawn = [
        controls.random_zeroed(saved["plain"], 2, seed, tmp_path / f"random{seed}")
        for seed in range(4)
    ]
    assert {int(rows.projected.sum()) for rows in drawn} == {2}
    assert len({tuple(rows.module[rows.projected]) for rows in drawn}) > 1


def test_noise_leaves_alone_what_was_not_treated(saved, tmp_path):
    own = updates.read(saved["plain"])
    first = own.modules[0]
    updates.write(tmp_path / "treated", own, {first: own.update(first).times(0.5)})
    controls.noise(saved["plain"], tmp_path / "treated", tmp_path / "out", 0)
    before, after = dense(saved["plain"]), dense(tmp_path / "out")
    assert [module for module in before if not torch.equal(before[module], after[module])] == [
        first
    ]


def test_intruders_are_reduced_by_peft_and_the_model_stays_as_it_was(saved, tmp_path):
    with adapters.attached(tiny("llama"), saved["plain"]) as model:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        rows = controls.intruders_reduced(model, tmp_path / "out", 0.75)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert model.active_adapters == ["default"]
    old, new = dense(saved["plain"]), change(tmp_path / "out")
    assert rows.projected.any()
    moved = {module for module in old if not torch.allclose(new[module], old[module], atol=1e-3)}
    assert moved == set(rows.module[rows.projected])


def test_strength_is_the_share_of_the_intruders_that_is_taken_out(saved, tmp_path):
    old, kept = dense(saved["plain"]), {}
    for strength in (0.0, 0.5, 1.0):
        with adapters.attached(tiny("llama"), saved["plain"]) as model:
            controls.intruders_reduced(model, tmp_path / str(strength), strength)
        new = change(tmp_path / str(strength))
        kept[strength] = sum(float((new[module] - old[module]).norm()) for module in old)
    assert kept[0.0] < 1e-3
    assert kept[1.0] == pytest.approx(2 * kept[0.5], rel=0.05)  # up to the rank that PEFT keeps
    for name in ("biases", "dora"):
        with (
            adapters.attached(tiny("llama"), saved[name]) as model,
            pytest.raises(ValueError, match="would lose"),
        ):
            controls.intruders_reduced(model, tmp_path / "out", 0.5)


def test_bad_input_is_one_sentence_and_nothing_is_written(saved, tmp_path):
    soft = lora_folder(
        tmp_path / "soft", {"q": (torch.ones(4, 8), torch.ones(8, 4))}, peft_type="P_TUNING"
    )
    small = lora_folder(
        tmp_path / "small",
        {
            module: (torch.ones(4, 8), torch.ones(8, 4))
            for module in updates.modules(saved["plain"])
        },
    )
    out = tmp_path / "out"
    for call, word in (
        (lambda: controls.rescaled(saved["plain"], out, 1.5), "between 0 and 1"),
        (lambda: controls.rescaled(soft, out, 0.5), "no weight update"),
        (lambda: controls.rescaled(saved["plain"], saved["ia3"], 0.5), "is there already"),
        (lambda: controls.averaged([saved["plain"], saved["fewer"]], out), "different modules"),
        (
            lambda: controls.add(saved["plain"], saved["dora"], out, 1.0),
            "no product of two factors",
        ),
        (lambda: controls.add(saved["plain"], small, out, 1.0), "different base models"),
        (
            lambda: controls.add(saved["biases"], saved["plain"], out, 1.0),
            "would leave as it was trained",
        ),
        (lambda: controls.rescaled(saved["biases"], out, 0.5), "would leave as it was trained"),
        (lambda: controls.averaged([], out), "no adapter to average"),
        (
            lambda: controls.merge_where(saved["plain"], saved["plain"], out, ["q"], 0.5),
            "does not update q",
        ),
        (
            lambda: controls.same_norm(saved["ia3"], saved["plain"], out),
            "no product of two factors",
        ),
        (lambda: controls.random_zeroed(saved["plain"], 99, 0, out), "the adapter has 6"),
        (lambda: controls.zeroed(saved["plain"], ["q"], out), "does not update q"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert word in one_sentence(error.value)
        assert not out.exists()
