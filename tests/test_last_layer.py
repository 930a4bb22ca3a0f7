"""The last layer computed only where it is read gives what the whole forward gives there, leaves
the model as it was, and is not used where its parts look at other tokens.
"""

import numpy as np
import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, get_peft_model

from driftbook.models.engine import Engine
from driftbook.models.fingerprint import fingerprint
from driftbook.models.probe import found_ways
from driftbook.models.scoring import Scorer
from driftbook.models.ways import Ways
from small_models import SHAPE, own, random_ids

FAMILIES = ("Llama", "Qwen3", "Gemma2", "Gemma3", "Mixtral", "GPTNeoX", "Phi3", "StableLm")


def made(family: str, **more) -> transformers.PreTrainedModel:
    name = {"Gemma3": "Gemma3Text"}.get(family, family)
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE, **more)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def asked() -> list[tuple[list[int], list[int]]]:
    """Pairs of several lengths, some of which begin alike: 3 to 33 tokens, and 1 to 4 after."""
    begun = random_ids(20, 9)
    pairs = [(begun + random_ids(n, n), random_ids(1 + n % 4, n + 50)) for n in (3, 7, 13)]
    return [*pairs, (random_ids(3, 4), [7]), (random_ids(33, 5), [8]), (random_ids(33, 5), [9])]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_its_own_probabilities(family):
    model = made(family)
    scorer = Scorer(model, None)
    for found, pair in zip(scorer.token_logprobs(asked()), asked(), strict=True):
        np.testing.assert_allclose(found, own(model, *pair), atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
        IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
        ),
    ],
    ids=["lora", "ia3"],
)
def test_an_adapter_in_the_last_layer_counts(config):
    model = get_peft_model(made("Llama"), config).eval()
    scorer = Scorer(model, None)
    assert scorer.engine.ways.trimmed
    for found, pair in zip(scorer.token_logprobs(asked()), asked(), strict=True):
        np.testing.assert_allclose(found, own(model, *pair), atol=1e-4)


def test_only_the_tokens_that_are_read_go_through_the_last_mlp():
    model, seen = made("Llama"), []
    scorer = Scorer(model, None)
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(
            lambda _, given, __: seen.append(given[0].shape[:-1].numel())
        )
    scorer.token_logprobs([(random_ids(30), [5])])
    assert seen == [30, 1]


@pytest.mark.parametrize("breaks", [False, True], ids=["done", "broken off"])
def test_the_model_is_afterwards_what_it_was(breaks, monkeypatch):
    model = made("Llama")
    scorer, before = Scorer(model, None), fingerprint(model)
    usual = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
    if breaks:

        def broken(*_):
            raise RuntimeError("no more")

        monkeypatch.setattr(type(model.model.norm), "forward", broken)
        with pytest.raises(RuntimeError, match="no more"):
            scorer.token_logprobs(asked())
    else:
        scorer.token_logprobs(asked())
    assert not before.differences(fingerprint(model))
    assert transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"] is usual


def test_a_layer_whose_mlp_looks_at_other_tokens_is_computed_whole(monkeypatch):
    model = made("Llama", rope_theta=7_000.0)  # else what was found of an equal one is used
    usual = type(model.model.layers[0].mlp).forward

    def mixing(self, states):  # each token is given some of the one before it
        before = torch.nn.functional.pad(states, (0, 0, 1, 0))[:, :-1]
        return usual(self, states + before)

    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", mixing)
    ways = found_ways(model)
    assert not ways.trimmed
    scorer = Scorer(model, None)
    for found, pair in zip(scorer.token_logprobs(asked()), asked(), strict=True):
        np.testing.assert_allclose(found, own(model, *pair), atol=1e-4)


def test_the_plain_way_computes_equal_sequences_once():
    model, seen = made("Llama"), []
    engine = Engine(model, Ways(shared=False))
    model.model.embed_tokens.register_forward_hook(
        lambda _, given, __: seen.append(given[0].numel())
    )
    context = random_ids(30)
    scorer = Scorer(model, None)
    scorer.engine = engine
    seen.clear()
    with pytest.warns(UserWarning, match="a row of its own"):
        found = scorer.token_logprobs([(context, [token]) for token in (5, 6, 7)])
    assert seen == [30]
    for one, token in zip(found, (5, 6, 7), strict=True):
        np.testing.assert_allclose(one, own(model, context, [token]), atol=1e-4)
