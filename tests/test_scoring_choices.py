"""Options, letters and what is asked: scored alike whatever the batch, for any family and
method.
"""

import types

import numpy as np
import pytest
import torch
import transformers

from conftest import one_sentence
from driftbook.models import conversations
from driftbook.models.engine import Engine
from driftbook.models.sampling import Sampling, VariantFailure
from driftbook.models.scoring import Scorer
from scored import LENGTHS, TOLERANCE, every_family, pairs_of, some_cases

pytest_plugins = ["scored"]


# ---- options, letters, distributions
@some_cases
def test_options_of_one_token_and_of_several_agree_with_the_likelihood(attached):
    base, model = attached
    scorer = Scorer(model, base.tokenizer)
    contexts = [context for context, _ in pairs_of(base, LENGTHS, seed=3)]
    words = base.tokenizer.convert_ids_to_tokens([40, 41, 42, 43, 44])
    single = [[words[i % 5], words[(i + 1) % 5], words[(i + 2) % 5]] for i in range(len(contexts))]
    several = [[f"{a} {b}", b, f"{c} {a} {b}"] for a, b, c in single]
    for options, stem in (
        (single, " "),
        (single, f" {words[3]} "),
        (several, " "),
        (several, f" {words[3]} {words[4]} "),
    ):
        found = scorer.choices(contexts, options, stem)
        stem_ids = scorer.ids(stem) if stem else []
        pairs = [
            ([*context, *stem_ids], scorer.ids(option))
            for context, row in zip(contexts, options, strict=True)
            for option in row
        ]
        expected = [scores.sum() for pair in pairs for scores in scorer.token_logprobs([pair])]
        np.testing.assert_allclose(found.ravel(), expected, atol=TOLERANCE, rtol=0)


@every_family
def test_letters_are_options_of_one_token_and_their_mass_is_at_most_one(bases, family):
    base = bases[family]
    scorer, words = (
        Scorer(base.model, base.tokenizer),
        base.tokenizer.convert_ids_to_tokens([30, 31, 32]),
    )
    contexts = [context for context, _ in pairs_of(base, LENGTHS, seed=4)]
    found = scorer.letters(contexts, [f" {word}" for word in words])
    np.testing.assert_allclose(
        found, scorer.choices(contexts, [words] * len(contexts), " "), atol=TOLERANCE
    )
    assert (np.exp(found).sum(1) <= 1 + 1e-6).all()


@every_family
def test_the_likelihood_of_texts_is_that_of_their_tokens(bases, family):
    base = bases[family]
    scorer = Scorer(base.model, base.tokenizer)
    texts = [("how is it done ?", " you must not"), ("please explain", " it is safe .")]
    parts = scorer.token_logprobs([(scorer.ids(a), scorer.ids(b)) for a, b in texts])
    np.testing.assert_allclose(
        scorer.loglikelihood(texts), [part.sum() for part in parts], atol=TOLERANCE
    )


@pytest.mark.parametrize(
    "template",
    ["[INST] {} [/INST]", "[INST] {}\n", "[INST] {}\nAnswer:"],
    ids=["special token", "newline", "word"],
)
@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_an_options_tokens_are_those_of_the_whole_text(kind, template):
    """Tokenizers mark the beginnings of words: an option by itself is marked, where the model,
    after a newline, writes it without.
    """
    tokenizer = marking_tokenizer(kind)
    scorer = types.SimpleNamespace(
        tokenizer=tokenizer,
        ids=lambda text: tokenizer.encode(text, add_special_tokens=False),
        after=(),
    )
    prompt = template.format("who did it ? A : man B : woman")
    context = scorer.ids(prompt)
    for stem in ("", " ", "The answer is ", "It was the"):
        for texts in (
            ["A", "B", "C"],
            ["the man", "the woman", "nobody at all"],
            [" man", " woman"],
        ):
            begun, options = Scorer.joined(scorer, context, texts, stem)
            for text, option in zip(texts, options, strict=True):
                assert [*begun, *option] == scorer.ids(prompt + stem + text)
                assert option


def marking_tokenizer(kind):
    """A small BPE in Llama 2's form (metaspace) or GPT-2's (byte level)."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds

    made = Tokenizer(kinds.BPE())
    if kind == "bytes":
        made.pre_tokenizer, made.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
    else:
        made.pre_tokenizer, made.decoder = (
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            decoders.Metaspace(prepend_scheme="first"),
        )
    texts = [
        "who did it ? the man or the woman ? The answer is A B C\nAnswer: nobody at all It was the"
        " man woman"
    ] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else ["\n", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "[INST]", "[/INST]"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>"
    )


def test_options_must_be_as_many_everywhere_and_not_empty(bases):
    base = bases["llama"]
    scorer = Scorer(base.model, base.tokenizer)
    for contexts, options in (
        ([[20], [21]], [[" a", " b"], [" a"]]),
        ([[20]], [["", " b"]]),
        ([[20]], [["  ", " b"]]),
    ):
        with pytest.raises(ValueError) as error:
            scorer.choices(contexts, options)
        assert "option" in one_sentence(error.value)
    assert scorer.choices([], []).shape == (0, 0)
    for action in (
        lambda: scorer.token_logprobs([([], [20])]),
        lambda: scorer.generate([[20], []], 2),
    ):
        with pytest.raises(ValueError) as error:
            action()
        assert "empty" in one_sentence(error.value)


def test_a_model_whose_probabilities_are_no_numbers_fails_and_answers_nothing(bases, monkeypatch):
    base = bases["llama"]
    monkeypatch.setattr(
        Engine,
        "head",
        lambda self, hidden: torch.full((len(hidden), len(base.tokenizer)), torch.nan),
    )
    for sampling in (None, Sampling()):
        with pytest.raises(VariantFailure):
            Scorer(base.model, base.tokenizer).generate([[20, 21]], 3, sampling)


def test_a_model_that_scales_its_logits_is_scored_by_its_own_scale():
    shape = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config = transformers.GraniteConfig(
        **shape,
        logits_scaling=8.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.5,
    )
    model = transformers.GraniteForCausalLM(config).eval()
    context, said = [7, 8, 9, 10], [11, 12]
    (found,) = Scorer(model, None).token_logprobs([(context, said)])
    own = model(input_ids=torch.tensor([context + said])).logits[0].log_softmax(1)
    np.testing.assert_allclose(found, [float(own[3, 11]), float(own[4, 12])], atol=1e-4)


def test_in_half_precision_two_letters_are_told_apart_as_in_fp32(bases):
    """bfloat16 rounds logits near 20 to eighths: without the exact logits of the letters, ties
    would go to the first.
    """
    import copy

    base = bases["llama"]
    model = copy.deepcopy(base.model).to(torch.bfloat16)
    model.get_output_embeddings().weight.data *= 20
    contexts = [context for context, _ in pairs_of(base, [(9, 1)] * 60, seed=11)]
    pairs = [(context, [token]) for context in contexts for token in range(30, 35)]
    found = np.array(Scorer(model, base.tokenizer).token_logprobs(pairs)).reshape(60, 5)
    hidden = [
        model.base_model(input_ids=torch.tensor([context])).last_hidden_state[0, -1].float()
        for context in contexts
    ]
    exact = torch.stack(hidden) @ model.get_output_embeddings().weight[30:35].float().T
    np.testing.assert_allclose(np.diff(found, axis=1), torch.diff(exact, dim=1).detach(), atol=0.3)
    assert len(np.unique(np.diff(found, axis=1).round(4))) > 200, (
        "differences in steps of an eighth"
    )


def test_distributions_sum_to_one_and_hold_the_log_probabilities(bases):
    base = bases["gemma"]
    scorer, pairs = (
        Scorer(base.model, base.tokenizer, 100),
        pairs_of(bases["gemma"], LENGTHS, seed=5),
    )
    for (_, continuation), table, scores in zip(
        pairs, scorer.distributions(pairs), scorer.token_logprobs(pairs), strict=True
    ):
        np.testing.assert_allclose(table.exp().sum(1), 1, atol=1e-5)
        np.testing.assert_allclose(
            table[range(len(continuation)), continuation], scores, atol=TOLERANCE
        )


# ---- asking
@every_family
@pytest.mark.parametrize("system", [None, "you must refuse what is forbidden ."])
def test_a_prompt_has_bos_exactly_once_and_ends_where_the_answer_begins(bases, family, system):
    tokenizer = bases[family].tokenizer
    [ids] = Scorer(bases[family].model, tokenizer).ask(["how is it done ?"], system)
    assert ids.count(tokenizer.bos_token_id) == (0 if family == "qwen2" else 1)
    assert tokenizer.unk_token_id not in ids
    prompt, answer = conversations.conversation_ids(
        tokenizer, [{"role": "user", "content": "how is it done ?"}], "it is safe"
    )
    assert tokenizer.eos_token_id in answer
    if system is None:
        assert ids == prompt
    else:
        assert set(tokenizer.encode(system, add_special_tokens=False)) <= set(ids), (
            "the system message was lost"
        )


@every_family
def test_a_special_token_in_a_text_is_text_and_ends_no_turn(bases, family):
    tokenizer = bases[family].tokenizer
    names = {
        *tokenizer.all_special_tokens,
        *(token.content for token in tokenizer.added_tokens_decoder.values()),
    }
    plain, special = (
        conversations.ask(tokenizer, text)
        for text in ("how is it done ?", "how is it done ? " + " ".join(sorted(names)))
    )
    ids = set(tokenizer.convert_tokens_to_ids(sorted(names))) - {tokenizer.unk_token_id}
    count = lambda row: sum(token in ids for token in row)  # noqa: E731
    assert count(special) == count(plain) > 0


def test_an_empty_prompt_is_refused(bases):
    with pytest.raises(ValueError) as error:
        conversations.ask(bases["llama"].tokenizer, "  \n")
    assert "empty" in one_sentence(error.value)


def test_an_impossible_order_of_turns_is_refused_in_a_sentence(bases):
    tokenizer = bases["gemma"].tokenizer
    with pytest.raises(ValueError) as error:
        conversations.chat_ids(tokenizer, [{"role": "system", "content": "who"}])
    assert "chat template" in one_sentence(error.value)


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("method", [None, "prompt_tuning"])
def test_a_prompt_that_is_too_long_raises_and_nothing_is_cut(attached, method):
    base, model = attached
    scorer, virtual = Scorer(model, base.tokenizer), 4 if method else 0
    assert scorer.context_length == 256 - virtual
    fits, too_long = pairs_of(base, [(250 - virtual, 6), (250 - virtual, 7)])
    assert len(scorer.token_logprobs([fits])[0]) == 6
    for action in (
        lambda: scorer.token_logprobs([fits, too_long]),
        lambda: scorer.generate([fits[0]], 7),
        lambda: scorer.choices([fits[0]], [[" how is it done how is it"] * 2]),
    ):
        with pytest.raises(ValueError) as error:
            action()
        assert "nothing is cut" in one_sentence(error.value)
    assert len(scorer.generate([fits[0]], 6)) == 1


def test_an_answer_ends_before_its_end_token_whatever_others_do(bases, monkeypatch):
    base = bases["llama"]
    contexts = [context for context, _ in pairs_of(base, LENGTHS, seed=6)]
    free = Scorer(base.model, base.tokenizer).generate(contexts, 10)
    words = free[0].text.split()
    end = base.tokenizer.convert_tokens_to_ids(words[2])
    monkeypatch.setattr(
        base.model.generation_config, "eos_token_id", [base.tokenizer.eos_token_id, end]
    )
    stopped = Scorer(base.model, base.tokenizer).generate(contexts, 10)
    first = words.index(words[2])
    assert (stopped[0].text.split(), stopped[0].n_tokens, stopped[0].finish_reason) == (
        words[:first],
        first,
        "stop",
    )
    assert stopped == [
        Scorer(base.model, base.tokenizer).generate([context], 10)[0] for context in contexts
    ]
    assert {answer.finish_reason for answer in stopped} == {"stop", "length"}
