"""Scoring: no result depends on batch size, order or padding, for any family and method; PEFT's own
forward on one example is the oracle.
"""

import types

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from conftest import FAMILIES, OTHER_METHODS, PEFT_METHODS, one_sentence
from driftbook.models import adapters, trees
from driftbook.models.engine import Engine
from driftbook.models.sampling import Sampling, VariantFailure, next_tokens
from driftbook.models.scoring import Scorer
from scored import LENGTHS, TOLERANCE, every_case, every_family, pairs_of, some_cases

pytest_plugins = ["scored"]


def branching(base, seed=0, stems=3, branches=4):
    """Pairs whose contexts share beginnings: of all of them, of some, and whole contexts with
    several continuations.
    """
    rng, size = np.random.default_rng(seed), len(base.tokenizer)
    draw = lambda n: rng.integers(12, size, n).tolist()  # noqa: E731
    header, pairs = draw(14), []
    for _ in range(stems):
        stem = header + draw(10)
        for _ in range(branches):
            context = stem + draw(int(rng.integers(1, 30)))
            first = draw(2)
            pairs += [
                (context, first),
                (context, [*first, *draw(3)]),
                (context, draw(1)),
                (context, first),
            ]
    return [pairs[i] for i in rng.permutation(len(pairs))]


def peft_logits(model, ids):
    """PEFT's own logits of one unpadded example, without those of the virtual tokens."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :].double()


# ---- one batch, many batches, PEFT itself
@every_case
def test_log_probabilities_do_not_depend_on_the_batch(attached):
    base, model = attached
    pairs = pairs_of(base, LENGTHS)
    together = Scorer(model, base.tokenizer).token_logprobs(pairs)
    alone = [Scorer(model, base.tokenizer).token_logprobs([pair])[0] for pair in pairs]
    small = Scorer(model, base.tokenizer, tokens_per_batch=90).token_logprobs(pairs)
    order = [4, 0, 6, 2, 5, 1, 3]
    shuffled = Scorer(model, base.tokenizer).token_logprobs([pairs[i] for i in order])
    for i, one in enumerate(alone):
        assert len(one) == LENGTHS[i][1]
        for other in (together[i], small[i], shuffled[order.index(i)]):
            np.testing.assert_allclose(other, one, atol=TOLERANCE, rtol=0)


@every_case
def test_log_probabilities_are_those_of_pefts_forward_on_one_example(attached):
    base, model = attached
    pairs = pairs_of(base, LENGTHS, seed=1)
    found = Scorer(model, base.tokenizer).token_logprobs(pairs)
    for (context, continuation), scores in zip(pairs, found, strict=True):
        logprobs = peft_logits(model, context + continuation).log_softmax(1)
        expected = [
            logprobs[len(context) + t - 1, token].item() for t, token in enumerate(continuation)
        ]
        np.testing.assert_allclose(scores, expected, atol=TOLERANCE, rtol=0)


@some_cases
def test_sharing_beginnings_changes_nothing(attached, monkeypatch):
    base, model = attached
    pairs = branching(base, seed=8)
    computed = []
    scorer, run = Scorer(model, base.tokenizer), Engine.run
    monkeypatch.setattr(
        Engine,
        "run",
        lambda self, inputs, *rest: (
            computed.append(int(np.prod(inputs.shape[:2]))) or run(self, inputs, *rest)
        ),
    )
    together = scorer.token_logprobs(pairs)
    assert sum(computed) < sum(len(a) + len(b) for a, b in pairs) / 3, "nothing was shared"
    for pair, scores in zip(pairs, together, strict=True):
        logprobs = peft_logits(model, [*pair[0], *pair[1]]).log_softmax(1)
        expected = [logprobs[len(pair[0]) + t - 1, token].item() for t, token in enumerate(pair[1])]
        np.testing.assert_allclose(scores, expected, atol=TOLERANCE, rtol=0)


@some_cases
def test_greedy_text_does_not_depend_on_the_batch_and_is_pefts_own(attached):
    base, model = attached
    contexts = [context for context, _ in pairs_of(base, LENGTHS, seed=2)]
    together = Scorer(model, base.tokenizer).generate(contexts, 10)
    small = Scorer(model, base.tokenizer, tokens_per_batch=80).generate(contexts, 10)
    alone = [Scorer(model, base.tokenizer).generate([context], 10)[0] for context in contexts]
    assert together == small == alone
    assert len({answer.text for answer in alone}) > 1, (
        "answers that are all the same would show nothing"
    )
    for context, answer in zip(contexts[:4], alone, strict=False):
        with torch.inference_mode():
            tokens = model.generate(
                input_ids=torch.tensor([context]),
                attention_mask=torch.ones(1, len(context), dtype=torch.long),
                max_new_tokens=10,
                do_sample=False,
            )
        own = tokens[0, len(context) :].tolist()
        end = (
            own.index(base.tokenizer.eos_token_id)
            if base.tokenizer.eos_token_id in own
            else len(own)
        )
        assert answer.text == base.tokenizer.decode(own[:end], skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", PEFT_METHODS)
def test_the_adapters_of_these_tests_do_something(attached, bases, family):
    base, model = attached
    ids = pairs_of(base, [(20, 1)])[0][0]
    with_adapter, without = peft_logits(model, ids), None
    with model.disable_adapter():
        without = bases[family].model(input_ids=torch.tensor([ids])).logits[0].double()
    assert (with_adapter - without).abs().max() > 0.1


@every_family
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_pefts_own_left_padding_is_wrong_so_these_tests_could_fail(attached):
    base, model = attached
    ids = pairs_of(base, [(20, 1)])[0][0]
    padded = torch.tensor([[base.tokenizer.pad_token_id] * 30 + ids])
    with torch.inference_mode():
        wrong = (
            model(input_ids=padded, attention_mask=(torch.arange(50) >= 30).long()[None])
            .logits[0, -1]
            .double()
        )
    assert (wrong - peft_logits(model, ids)[-1]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("method", [*PEFT_METHODS, *OTHER_METHODS])
def test_any_lengths_in_any_order_and_budget_give_the_same(bases, adapter_folders, method):
    base = bases["llama"]
    with adapters.attached(base.model, adapter_folders["llama", method]) as model:

        @hypothesis_settings(max_examples=6, deadline=None)
        @given(
            lengths=st.lists(
                st.tuples(st.integers(1, 60), st.integers(1, 8)), min_size=1, max_size=8
            ),
            budget=st.integers(1, 600),
            seed=st.integers(0, 99),
        )
        def property(lengths, budget, seed):
            pairs = pairs_of(base, lengths, seed)
            found = Scorer(model, base.tokenizer, budget).token_logprobs(pairs)
            for pair, scores in zip(pairs, found, strict=True):
                np.testing.assert_allclose(
                    scores,
                    Scorer(model, base.tokenizer).token_logprobs([pair])[0],
                    atol=TOLERANCE,
                    rtol=0,
                )

        property()


# ---- trees
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=25))
def test_a_tree_holds_each_beginning_once_and_each_token_sees_its_own_path_alone(sequences):
    for numbers, size in trees.groups(sequences):
        members = [sequences[i] for i in numbers]
        made = trees.tree(members)
        beginnings = {tuple(one[:n]) for one in members for n in range(1, len(one) + 1)}
        assert len(made.tokens) == size == len(beginnings)
        for one, path in zip(members, made.paths, strict=True):
            assert made.tokens[path].tolist() == one
            assert made.positions[path].tolist() == list(range(len(one)))
            seen = [j for j in range(path[-1] + 1) if path[-1] < made.ends[j]]
            assert seen == path.tolist()
    assert sorted(i for numbers, _ in trees.groups(sequences) for i in numbers) == list(
        range(len(sequences))
    )


@given(st.lists(st.integers(0, 1), max_size=20), st.lists(st.integers(0, 1), max_size=20))
def test_a_common_prefix_is_the_longest(a, b):
    n = trees.common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


def sliding(family):
    """A model whose attention slides over 9 tokens: Mistral in every layer, Qwen2 in those that its
    config names.
    """
    torch.manual_seed(1)
    shape = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 9,
        "initializer_range": 0.2,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "pad_token_id": 2,
    }
    config = (
        transformers.MistralConfig(**shape)
        if family == "mistral"
        else transformers.Qwen2Config(**shape, use_sliding_window=True, max_window_layers=1)
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def greedy_ids(model, context, n):
    """transformers' own greedy continuation of one unpadded context."""
    with torch.inference_mode():
        tokens = model.generate(
            input_ids=torch.tensor([context]),
            attention_mask=torch.ones(1, len(context), dtype=torch.long),
            max_new_tokens=n,
            do_sample=False,
        )
    return tokens[0, len(context) :].tolist()


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_sliding_window_is_the_models_own_in_trees_and_after_padding(family):
    """transformers' own forward of one sequence is the oracle."""
    model = sliding(family)
    tokenizer = types.SimpleNamespace(
        eos_token_id=1, decode=lambda ids, **_: " ".join(map(str, ids))
    )
    rng = np.random.default_rng(0)
    header, own = (
        rng.integers(3, 60, 12).tolist(),
        [rng.integers(3, 60, n).tolist() for n in (5, 20, 31, 2)],
    )
    pairs = [(header + one, rng.integers(3, 60, 4).tolist()) for one in own for _ in range(2)]
    for (context, continuation), scores in zip(
        pairs, Scorer(model, tokenizer).token_logprobs(pairs), strict=True
    ):
        logprobs = peft_logits(model, context + continuation).log_softmax(1)
        np.testing.assert_allclose(
            scores,
            [logprobs[len(context) + t - 1, token] for t, token in enumerate(continuation)],
            atol=TOLERANCE,
            rtol=0,
        )
    contexts = [context for context, _ in pairs]
    for context, answer in zip(
        contexts, Scorer(model, tokenizer).generate(contexts, 8), strict=True
    ):
        own = [str(token) for token in greedy_ids(model, context, 8) if token != 1]
        assert answer.text.split() == own


# ---- sampling
@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("method", [None, "prompt_tuning", "prefix_tuning"])
def test_a_drawn_answer_does_not_depend_on_the_batch_and_differs_by_sample(attached, method):
    base, model = attached
    contexts = [context for context, _ in pairs_of(base, LENGTHS, seed=9)]
    drawn = [
        Scorer(model, base.tokenizer).generate(contexts, 10, Sampling(sample=sample))
        for sample in (0, 1, 0)
    ]
    assert drawn[0] == drawn[2] != drawn[1]
    small = Scorer(model, base.tokenizer, 80).generate(contexts[::-1], 10, Sampling(sample=1))[::-1]
    assert (
        small
        == drawn[1]
        == [
            Scorer(model, base.tokenizer).generate([one], 10, Sampling(sample=1))[0]
            for one in contexts
        ]
    )


def test_tokens_are_drawn_with_the_models_probabilities_and_the_nucleus_alone(bases):
    base = bases["llama"]
    scorer, context = Scorer(base.model, base.tokenizer), pairs_of(base, [(9, 1)])[0][0]
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(4000, -1)
    draws = np.random.default_rng(0).random(4000)
    for settings, expected in (
        (Sampling(), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(top_p=0.75), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=0.01), [1, 0, 0, 0]),
    ):
        found = np.bincount(next_tokens(logits, settings, draws), minlength=4) / 4000
        np.testing.assert_allclose(found, expected, atol=0.025)
    cold = scorer.generate([context], 8, Sampling(temperature=1e-6))
    assert cold == scorer.generate([context], 8)


def test_impossible_sampling_is_refused():
    for wrong in ({"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError) as error:
            Sampling(**wrong)
        assert "temperature" in one_sentence(error.value)


# ---- memory
@pytest.mark.parametrize("limit", [2, 1])
def test_without_memory_a_batch_is_halved_and_a_tree_is_cut_and_the_results_are_the_same(
    bases, monkeypatch, limit
):
    base, forward = bases["llama"], Engine.trees
    pairs = pairs_of(base, LENGTHS) + branching(base, seed=7)
    expected = Scorer(base.model, base.tokenizer).token_logprobs(pairs)

    def poor(self, members, *rest):
        if sum(map(len, members)) > limit:
            raise torch.OutOfMemoryError("pretended")
        return forward(self, members, *rest)

    monkeypatch.setattr(Engine, "trees", poor)
    for one, other in zip(
        Scorer(base.model, base.tokenizer).token_logprobs(pairs), expected, strict=True
    ):
        np.testing.assert_allclose(one, other, atol=TOLERANCE)


def test_without_memory_for_one_prompt_it_is_the_variants_failure(bases, monkeypatch):
    base = bases["llama"]
    monkeypatch.setattr(
        Scorer, "_continued", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("pretended"))
    )
    with pytest.raises(VariantFailure):
        Scorer(base.model, base.tokenizer).generate([[20, 21]], 3)


# ---- the base stays as it is
@some_cases
def test_the_base_is_bitwise_the_same_after_an_adapter_came_and_went(
    bases, adapter_folders, family, method
):
    base = bases[family].model
    ids = torch.tensor([pairs_of(bases[family], [(40, 1)])[0][0]])
    before, names = base(input_ids=ids).logits, [name for name, _ in base.named_modules()]
    with adapters.attached(base, adapter_folders[family, method]) as model:
        inside = Scorer(model, bases[family].tokenizer).token_logprobs(
            pairs_of(bases[family], [(40, 3)])
        )
    assert np.isfinite(inside[0]).all()
    assert torch.equal(base(input_ids=ids).logits, before)
    assert [name for name, _ in base.named_modules()] == names
    assert not {"forward", "peft_config"} & set(base.__dict__)
