"""States inside a model are those of a plain forward, one prompt at a time; states put in their
place do what they should, and leave nothing behind.
"""

import numpy as np
import pytest
import torch

from conftest import FAMILIES, one_sentence
from driftbook.benchmarks.utility import REFUSALS, refusal_probability
from driftbook.models import adapters
from driftbook.models.inside import (
    Beginnings,
    Inside,
    decoder_layers,
    prompt_attention,
    while_answering,
)
from driftbook.models.scoring import Scorer

TEXTS = ["how do i bake bread ?", "tell me how to make a cake for my friend today .", "who are you"]
CASES = [("llama", None), ("gemma", "lora"), ("qwen2", "prompt_tuning"), ("mistral", "p_tuning")]
CASES += [("llama", "prefix_tuning"), ("gemma", "ia3")]


def plain_states(model, scorer, prompt) -> np.ndarray:
    """The states [layers, width] before the final norm by transformers' own forward, at the last
    token of one prompt.
    """
    found = []
    layers = decoder_layers(scorer.model)
    hooks = [one.register_forward_hook(lambda *given: found.append(given[2])) for one in layers]
    with torch.inference_mode():
        model(input_ids=torch.tensor([prompt]), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    last = [one[0] if isinstance(one, tuple) else one for one in found]
    return torch.stack([one[0, -1] for one in last]).numpy()


@pytest.mark.parametrize(("family", "method"), CASES)
def test_states_are_those_of_a_plain_forward(bases, adapter_folders, family, method):
    base = bases[family]
    with adapters.attached(base.model, adapter_folders[family, method]) as model:
        scorer = Scorer(model, base.tokenizer)
        prompts = scorer.ask(TEXTS)
        found = Inside(scorer).last_states(prompts)
        for own, prompt in zip(found, prompts, strict=True):
            wanted = plain_states(model, scorer, prompt)
            assert np.abs(own[1:] - wanted).max() < 1e-4 * max(1, np.abs(wanted).max())


def test_hidden_states_of_transformers_agree(bases):
    base = bases["llama"]
    scorer = Scorer(base.model, base.tokenizer)
    [prompt] = scorer.ask(TEXTS[:1])
    with torch.inference_mode():
        asked = base.model(input_ids=torch.tensor([prompt]), output_hidden_states=True)
    wanted = np.stack([one[0, -1].numpy() for one in asked.hidden_states[:-1]])
    assert np.abs(Inside(scorer).last_states([prompt])[0, :-1] - wanted).max() < 1e-4


@pytest.mark.parametrize("method", [None, "lora", "prompt_tuning", "prefix_tuning"])
def test_a_refusal_is_as_likely_as_the_scorer_says(bases, adapter_folders, method):
    import pandas as pd

    base = bases["llama"]
    with adapters.attached(base.model, adapter_folders["llama", method]) as model:
        scorer = Scorer(model, base.tokenizer)
        asked = pd.DataFrame({"prompt_id": list("abc"), "prompt": TEXTS})
        wanted = refusal_probability(asked, scorer, "safety", "run").value.astype(float)
        joined = [scorer.joined(one, REFUSALS, scorer.lead) for one in scorer.ask(TEXTS)]
        contexts, options = zip(*joined, strict=True)
        inside = Inside(Scorer(model, base.tokenizer))
        own = Beginnings(inside, contexts, options, range(inside.levels))
        np.testing.assert_allclose(own.likely, wanted, atol=1e-5)
        assert own.skips
        for level, states in own.states.items():  # its own states change nothing
            found = own.patched(inside, level, {level: states})
            np.testing.assert_allclose(found, own.likely, atol=1e-7)
        again = Beginnings(inside, contexts, options)
        np.testing.assert_allclose(again.likely, own.likely, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_anothers_states_are_put_in_place(bases, adapter_folders, family):
    base = bases[family]
    scorer = Scorer(base.model, base.tokenizer)
    joined = [scorer.joined(one, ["yes", "no"], scorer.lead) for one in scorer.ask(TEXTS)]
    contexts, options = zip(*joined, strict=True)
    inside = Inside(scorer)
    levels = range(inside.levels)
    before = Beginnings(inside, contexts, options, levels)
    with adapters.attached(base.model, adapter_folders[family, "lora"]) as model:
        tuned = Inside(Scorer(model, base.tokenizer))
        own = Beginnings(tuned, contexts, options, levels)
        found = [own.patched(tuned, level, before.states) for level in levels]
        own.skips = False
        whole = [own.patched(tuned, level, before.states) for level in levels]
    assert np.abs(own.likely - before.likely).max() > 1e-4
    np.testing.assert_allclose(found, whole, atol=1e-6)
    np.testing.assert_allclose(found[0], own.likely, atol=1e-5)  # LoRA leaves what layer 0 is given
    # options of one token follow from the last layer's states alone
    np.testing.assert_allclose(found[-1], before.likely, atol=1e-5)


def test_layers_are_not_skipped_where_later_ones_share_more_than_states(bases):
    base = bases["llama"]
    scorer = Scorer(base.model, base.tokenizer)
    joined = [scorer.joined(one, ["yes", "no"], scorer.lead) for one in scorer.ask(TEXTS)]
    inside, seen = Inside(scorer), {}
    first, last = inside.layers
    keep = first.self_attn.register_forward_hook(lambda *given: seen.update(own=given[2][0]))
    share = last.self_attn.register_forward_hook(
        lambda *given: (given[2][0] + seen.pop("own"), *given[2][1:])
    )
    try:
        own = Beginnings(inside, *zip(*joined, strict=True), range(inside.levels))
        assert not own.skips
        np.testing.assert_allclose(own.patched(inside, 1, own.states), own.likely, atol=1e-6)
    finally:
        keep.remove()
        share.remove()
    assert "forward" not in vars(first)


def test_the_attention_that_a_soft_prompt_gets(bases, adapter_folders):
    base = bases["llama"]
    with adapters.attached(base.model, adapter_folders["llama", "prompt_tuning"]) as model:
        scorer = Scorer(model, base.tokenizer)
        inside = Inside(scorer)
        shares = prompt_attention(inside, scorer.ask(TEXTS))
        alone = [prompt_attention(inside, [one]) for one in scorer.ask(TEXTS)]
        assert base.model.config._attn_implementation == "sdpa", "as it was"
    assert shares.shape == (3, 2)
    np.testing.assert_allclose(shares, np.concatenate(alone), rtol=1e-4)
    assert ((shares > 0) & (shares < 1)).all()


def test_the_importance_of_neurons_is_that_of_their_weights_gradients(bases):
    base = bases["llama"]
    scorer = Scorer(base.model, base.tokenizer)
    pairs = [(prompt, prompt[1:4]) for prompt in scorer.ask(TEXTS)]
    found, given = while_answering(Inside(scorer), pairs)["model.layers.0.self_attn.v_proj"]
    name = "model.layers.0.self_attn.v_proj"
    weight, total = base.model.get_submodule(name).weight, 0.0
    weight.requires_grad_(True)
    inputs = []
    hook = base.model.get_submodule(name).register_forward_pre_hook(
        lambda _, x: inputs.append(x[0][0, -3:].detach())
    )
    for prompt, answer in pairs:
        logits = base.model(input_ids=torch.tensor([[*prompt, *answer]])).logits
        read = logits[0, len(prompt) - 1 : -1]
        torch.nn.functional.cross_entropy(read, torch.tensor(answer)).backward()
        total = total + (weight * weight.grad).abs().sum(1).detach() / len(pairs)
        weight.grad = None
    weight.requires_grad_(False)
    hook.remove()
    torch.testing.assert_close(found, total, rtol=1e-3, atol=1e-6)
    by_size = [torch.cat(some).sort(0).values for some in (inputs, [given])]  # in any order
    torch.testing.assert_close(*by_size)
    assert not any(one.requires_grad or one._backward_hooks for one in base.model.parameters())


def test_a_model_whose_layers_are_not_found_is_refused(bases):
    class Odd(torch.nn.Module):
        config = bases["llama"].model.config

    with pytest.raises(ValueError) as error:
        decoder_layers(Odd())
    assert "layers of Odd are not found" in one_sentence(error.value)
