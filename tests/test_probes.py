"""Probes of runs: rows for every probe with their nulls, what they must be where the answer is
known, and bad input refused in a sentence.
"""

import copy

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import SMALL, local, one_sentence
from driftbook.batch import keys
from driftbook.models import adapters
from driftbook.stats import directions
from driftbook.stats.directions import (
    ATTENTION,
    BEGINS,
    CEILING,
    CKA,
    DRIFT,
    DROP,
    HARMFUL,
    KL,
    NEURONS,
    OF_BASE,
    RANKS,
    RESTORED,
    SHIFT,
    TAKEN,
    UPDATE,
)
from driftbook.study.methods import layers_of
from driftbook.training import probes
from driftbook.training.critical import critical_ranks, random_energy
from driftbook.training.updates import Update

PROBES = {"harmful": "forbidden", "harmless": "allowed", "n": 16, "reported": 4, "answer_tokens": 4}


def probing(study: dict = SMALL, **more) -> dict:
    """The small study with probes, or another one."""
    content = copy.deepcopy(study) | {"probes": PROBES | more}
    content["data"]["forbidden"] = {"format": "alpaca", "n": 16, **local("data/safety_sft.json")}
    content["data"]["allowed"] = {
        "format": "alpaca",
        "n": 16,
        "rows": [160, 200],
        **local("data/sft.json"),
    }
    return content


@pytest.fixture
def looked(bases, adapter_folders, make_study):
    """Looks into a variant of the small study with a random adapter of its method."""
    study = make_study(probing())
    reference = probes.Reference(bases["llama"], study, "tiny-llama")

    def look(method):
        variant = next(one for one in study.variants if one.method == method)
        folder = adapter_folders["llama", None if method == "none" else method]
        with adapters.attached(bases["llama"].model, folder) as model:
            found = probes.probed(reference, model, variant, folder)
        return found.astype({"value": float, "null": float})

    look.reference = reference
    return look


def test_a_run_has_every_probe_with_its_null(looked):
    found = looked("lora")
    wanted = {BEGINS, DRIFT, DROP, SHIFT, CKA, KL, RESTORED, TAKEN, UPDATE, NEURONS, RANKS}
    assert wanted == set(found["probe"])
    made = found[found["note"].isna()]
    assert made["value"].notna().all()
    nulls = made.loc[made["probe"].isin([SHIFT, CKA, RESTORED, UPDATE, NEURONS, RANKS]), "null"]
    assert nulls.notna().all()
    shift = made[made["probe"].eq(SHIFT)]
    assert shift["value"].gt(0).all()
    # the last layer's states decide the first token; put back, refusals are nearly the base's
    begins = made[made["probe"].eq(BEGINS)].set_index("part")["value"]
    ends = made[made["probe"].eq(TAKEN)].set_index("layer")["value"]
    assert abs(ends.dropna().iloc[0] - begins[OF_BASE]) < 0.01, "LoRA leaves what layer 0 is given"


def test_an_update_is_what_the_module_adds(looked, bases, adapter_folders):
    found, base = looked("lora"), bases["llama"]
    name = "model.layers.1.self_attn.v_proj"
    row = found[found["probe"].eq(UPDATE) & found["part"].eq(name)].iloc[0]
    with adapters.attached(base.model, adapter_folders["llama", "lora"]) as model:
        module = model.get_base_model().get_submodule(name)
        shares, given = [], {}
        hook = module.register_forward_pre_hook(lambda _, x: given.update(x=x[0][0, -1]))
        for prompt in looked.reference.reports[HARMFUL]:
            with torch.inference_mode():
                model(input_ids=torch.tensor([prompt]))
                h = given["x"]
                added = module(h[None]) - module.base_layer(h[None])
            shares.append(float(100 * added.norm() / h.norm()))
        hook.remove()
    assert row["value"] == pytest.approx(np.mean(shares), rel=1e-4)


def test_an_update_in_the_critical_ranks_has_all_its_energy_there():
    torch.manual_seed(0)
    weight, safety, utility = torch.randn(30, 20), torch.randn(50, 20), torch.randn(40, 20)
    utility[:, 0] *= 30  # both sets have a rank in common, which is not safety's alone
    safety[:, 0] *= 30
    safety[:, 1] *= 20
    found = critical_ranks(weight, safety, utility)
    projectors = []
    for x in (safety, utility):  # the slow way: whole projections [out, out]
        u = torch.linalg.eigh((weight @ x.T @ x @ weight.T).double()).eigenvectors[:, -2:]
        projectors.append(u @ u.T)
    p_safety, p_utility = projectors
    u, s, _ = torch.linalg.svd((torch.eye(30) - p_utility) @ p_safety)
    slow = u[:, s >= 0.5**0.5]
    assert found.shape[1] == slow.shape[1] == 1
    torch.testing.assert_close(found @ found.T, (slow @ slow.T).float(), atol=1e-5, rtol=0)
    assert (p_utility.float() @ found).norm() < 1e-5
    inside = Update("m", torch.randn(3, 20), found @ torch.randn(1, 3), 2.0)
    outside = inside.projected(lambda b: torch.randn(30, 3)).projected(
        lambda b: b - found @ (found.T @ b)
    )
    assert inside.energy(found) == pytest.approx(1, abs=1e-5)
    assert outside.energy(found) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("k", [1, 5])
def test_the_energy_in_random_subspaces_is_that_of_draws(k):
    torch.manual_seed(k)
    update = Update("m", torch.randn(3, 20), torch.randn(30, 3), 0.5)
    s = torch.linalg.svdvals(update.b @ update.a)
    assert update.concentration() == pytest.approx(
        float((s**4).sum() / (s**2).sum() ** 2), rel=1e-5
    )
    draws = [100 * update.energy(torch.linalg.qr(torch.randn(30, k)).Q) for _ in range(2000)]
    drawn = probes.null_of(draws)
    found = dict(zip(probes.NULLS, random_energy(update, k), strict=True))
    assert found["null"] == pytest.approx(drawn["null"], rel=0.03)
    for end in ("null_low", "null_high"):
        assert found[end] == pytest.approx(drawn[end], abs=0.12 * found["null"])


def test_a_soft_prompt_draws_attention_and_a_base_model_has_a_ceiling(looked):
    found = looked("prompt_tuning")
    seen = found[found["probe"].eq(ATTENTION)]
    assert len(seen) == 2
    assert seen["value"].between(0, 100).all()
    assert found.loc[found["probe"].eq(BEGINS), "value"].nunique() == 2
    base = looked("none")
    assert set(base["probe"]) == {CEILING, BEGINS}


def test_too_few_prompts_for_a_direction_are_refused(looked, monkeypatch):
    monkeypatch.setattr(probes, "LEAST_CEILING", 1.01)
    found = looked("lora")
    refused = found[found["probe"].isin([DRIFT, DROP])]
    assert refused["value"].isna().all()
    assert refused["note"].str.contains("too few prompts for a direction").all()


def test_directions_and_their_nulls():
    rng = np.random.default_rng(0)
    r = directions.unit(rng.standard_normal((3, 20)))
    noise = rng.standard_normal((2, 40, 3, 20))
    harmful, harmless = noise[0] + 3 * r, noise[1] - 3 * r
    assert (directions.cosines(directions.direction(harmful, harmless), r) > 0.95).all()
    assert (directions.halves(harmful, harmless, rng).mean(0) > 0.9).all()
    both = np.concatenate([harmful, harmless])
    mixed = directions.cosines(directions.shuffled(both, 40, rng), r)
    assert abs(mixed.mean()) < 0.3
    turned = both @ np.linalg.qr(rng.standard_normal((20, 20)))[0]
    order = rng.permutation(80)
    same, other = directions.linear_cka(both, 2 * turned, [np.arange(80), order])
    np.testing.assert_allclose(same, 1)
    assert (other < 0.5).all()
    np.testing.assert_allclose(other, directions.linear_cka(both, turned[order], [range(80)])[0])
    drawn = [rng.integers(0, 80, n) for n in (80, 40)]
    slow = np.stack([both[one].mean(0) for one in drawn])
    np.testing.assert_allclose(directions.mean_states(both, drawn), slow, atol=1e-12)


def _drop(content):
    del content["data"]["forbidden"]


def _asked_otherwise(content):
    template = {"kind": "template", "blocks": ["main"], "system_prompt": "please be careful ."}
    content["mitigations"] = {"template": template}


def _repaired(content):
    rates = {"lora": [5.0e-3]}
    block = {"methods": ["lora"], "objectives": ["sft"], "learning_rates": rates, "seeds": [1]}
    content["grid"] = [block | {"name": "thirds", "layers": ["early"]}]
    content["mitigations"] = {"half": {"kind": "rescale", "blocks": ["thirds"], "values": [0.5]}}


def _trained(content):
    content["grid"][0] |= {"data": ["forbidden"], "objectives": ["sft"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop, "probes.harmful = 'forbidden'"),
        (_trained, "no block trains on"),
        (lambda c: c["probes"].update(harmless="forbidden"), "no direction"),
        (lambda c: c["probes"].update(n=17), "16 examples of 17"),
        (lambda c: c["grid"][0].update(layers=["early"]), "layers apply to LoRA"),
        (_asked_otherwise, "asks under another one"),
        (_repaired, "repairs are made of runs in all layers"),
    ],
    ids=[
        "no set",
        "trained on",
        "one set",
        "too few",
        "soft prompt in layers",
        "other system prompt",
        "repaired",
    ],
)
def test_what_does_not_fit_is_one_sentence(make_study, change, words):
    content = probing()
    change(content)
    with pytest.raises(ValueError) as error:
        make_study(content)
    assert words in one_sentence(error.value)


def test_prompts_that_are_reported_on_are_none_of_the_directions(bases, make_study, monkeypatch):
    content = probing()
    content["data"]["allowed"] |= {"rows": [0, 16]}
    study = make_study(content)
    asked = probes._reported(study)
    texts = pd.Series([one for some in asked.values() for one in some])
    assert len(texts) == 8
    monkeypatch.setattr(probes, "_prompts", lambda *_: list(texts))
    with pytest.raises(ValueError) as error:
        probes.Reference(bases["llama"], study, "tiny-llama")
    assert "are also asked by the benchmarks" in one_sentence(error.value)


def test_the_stage_is_there_where_a_study_has_probes(make_study):
    assert keys.stages(make_study(probing()))[-1] == "probe"
    assert "mechanisms" in keys.analyses(make_study(probing()))
    assert "probe" not in keys.stages(make_study())
    stated = keys.settings("probe", make_study(probing()), "tiny-llama", lambda *_: "content")
    assert {"data forbidden", "data allowed", "safety", "over_refusal", "probes"} <= set(stated)


def test_a_third_of_the_layers_is_a_setting_of_its_own(make_study):
    content = copy.deepcopy(SMALL)
    plain = make_study(content)
    block = {"methods": ["lora"], "objectives": ["sft"], "learning_rates": {"lora": [5.0e-3]}}
    content["grid"] = [block | {"name": "thirds", "seeds": [1], "layers": ["all", "early", "late"]}]
    lora = [one for one in make_study(content).variants if one.method == "lora"]
    assert [one.layers for one in lora] == [None, "early", "late"]
    assert [one.mitigation for one in lora] == [None, "layers early", "layers late"]
    assert lora[0].run_id in {one.run_id for one in plain.variants}, (
        "runs in all layers are as before"
    )
    assert len({one.seed for one in lora}) == 3
    assert [list(layers_of(part, 7)) for part in ("early", "middle", "late")] == [
        [0, 1],
        [2, 3, 4],
        [5, 6],
    ]


def test_an_adapter_in_a_third_has_no_other_layers(make_study):
    from driftbook.miniature.families import build_model, build_tokenizer

    content = copy.deepcopy(SMALL)
    content["grid"][0] |= {
        "methods": ["lora"],
        "objectives": ["untrained"],
        "layers": ["middle"],
        "learning_rates": {},
    }
    [variant] = [one for one in make_study(content).variants if one.layers]
    tokenizer = build_tokenizer("llama")
    deep = build_model("llama-4", tokenizer, 0, width=16)
    model = adapters.create(variant, deep, tokenizer)
    named = {
        name.split(".layers.")[1][0] for name, one in model.named_parameters() if one.requires_grad
    }
    assert named == {str(one) for one in layers_of("middle", 4)}
    with pytest.raises(ValueError) as error:
        adapters.create(variant, build_model("llama", tokenizer, 0, width=16), tokenizer)
    assert "a model of 2 layers has no middle third" in one_sentence(error.value)
