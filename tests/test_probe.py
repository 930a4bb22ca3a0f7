"""What a model may be asked is tried once and kept by its hash; what is not its own is not used."""

import copy
import warnings

import numpy as np
import pytest
import torch
import transformers

from conftest import one_sentence
from driftbook.models import probe, ways
from driftbook.models.scoring import Scorer
from small_models import SHAPE, own, random_ids


def llama(**more) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, **more)).eval()


def mistral(window: int) -> transformers.MistralForCausalLM:
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SHAPE, sliding_window=window)
    return transformers.MistralForCausalLM(config).eval()


def forget(model) -> None:
    ways._KNOWN.pop(model, None)


def test_what_was_found_is_kept_by_hash_and_for_no_other_model(monkeypatch):
    model = llama()
    found = probe.found_ways(model)
    assert found.shared
    assert found.packed
    tried = []
    real = probe._Probe.found
    monkeypatch.setattr(probe._Probe, "found", lambda self: tried.append(self.model) or real(self))
    again = copy.deepcopy(model)
    assert probe.found_ways(again) == found
    assert not tried, "an equal model is not tried again"
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    probe.found_ways(other)
    assert tried == [other]


def test_a_torn_record_is_made_anew():
    model = llama(rope_theta=5_000.0)
    found = probe.found_ways(model)
    probe._file(model).write_text("{")
    forget(model)
    assert probe.found_ways(model) == found
    assert probe._file(model).read_text().startswith("{\n")


def test_a_forward_that_reads_no_mask_takes_the_plain_way_and_says_so_once(monkeypatch):
    """A model whose attention looks only at what stands before: positions and masks mean nothing
    to it, so neither trees nor left padding are its own.
    """
    model = llama(rope_theta=9_000.0)
    forward = type(model.model).forward

    def deaf(self, *args, attention_mask=None, position_ids=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", deaf)
    pairs = [(random_ids(20), random_ids(3, seed)) for seed in range(3)]
    scorer = Scorer(model, None)
    with pytest.warns(UserWarning, match="a row of its own .* times the tokens"):
        scores = scorer.token_logprobs(pairs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer.token_logprobs(pairs)
    for found, pair in zip(scores, pairs, strict=True):
        np.testing.assert_allclose(found, own(model, *pair), atol=1e-4)


def test_a_window_too_long_to_be_tried_at_first_is_tried_when_it_is_needed(monkeypatch):
    monkeypatch.setattr(probe, "LONGEST", {"cpu": 16})
    model = mistral(40)
    scorer = Scorer(model, None)
    assert scorer.engine.ways.limit == 40
    pairs = [(random_ids(60), random_ids(2, seed)) for seed in range(2)]
    for found, pair in zip(scorer.token_logprobs(pairs), pairs, strict=True):
        np.testing.assert_allclose(found, own(model, *pair), atol=1e-4)
    assert scorer.engine.ways.limit is None
    assert scorer.engine.ways.shared


def test_where_rope_depends_on_what_was_asked_before_longer_texts_are_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    scorer = Scorer(llama(max_position_embeddings=32, rope_parameters=rope), None)
    with pytest.raises(ValueError) as error:
        scorer.token_logprobs([(random_ids(40), [5])])
    assert "the model reads 32" in one_sentence(error.value)


def test_models_that_give_no_probability_of_a_text_are_refused_by_name():
    class Drawing(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.logits = found.logits + torch.randn_like(found.logits)
            return found

    looking = transformers.BertLMHeadModel(
        transformers.BertConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    drawing = Drawing(transformers.LlamaConfig(**SHAPE))
    for model, said in ((looking, "tokens that come later"), (drawing, "each time")):
        with pytest.raises(ValueError) as error:
            Scorer(model.eval(), None)
        sentence = one_sentence(error.value)
        assert said in sentence
        assert type(model).__name__ in sentence
