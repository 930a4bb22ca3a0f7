"""Sequences laid out in packs and trees: PEFT's own log-probabilities whatever the layout, and the
tokens that count.
"""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import FAMILIES, one_sentence, variants_of
from driftbook.models import adapters
from driftbook.models.conversations import chat_ids, counted_ids
from driftbook.models.loading import Loaded
from driftbook.training import examples, steps
from driftbook.training.steps import Conversation
from fitted import METHODS, conversations, same

pytest_plugins = ["fitted"]


# ---- the forward pass
def windowed(bases, family, window=8):
    """The family's model with sliding-window attention, in Qwen2 in its second layer alone."""
    config = copy.deepcopy(bases[family].model.config)
    config.sliding_window = window
    if family == "qwen2":
        config.use_sliding_window, config.max_window_layers, config.layer_types = (
            True,
            1,
            ["full_attention", "sliding_attention"],
        )
    model = type(bases[family].model)(config)
    model.load_state_dict(bases[family].model.state_dict())
    model.requires_grad_(False)
    return Loaded(family, model.eval(), bases[family].tokenizer, "windowed")


def randomised(base, study, seed=0):
    """A model of the study's method with weights far from their init, where they are no change at
    all.
    """
    model = adapters.create(
        variants_of(study, next(iter(study.methods)))[0], base.model, base.tokenizer
    )
    generator = torch.Generator().manual_seed(seed)
    for value in (parameter for parameter in model.parameters() if parameter.requires_grad):
        value.data.add_(torch.empty(value.shape).normal_(generator=generator), alpha=0.2)
    return model


@torch.no_grad()
def own_logprobs(model, one):
    """By PEFT's own forward on this one conversation."""
    logits = (
        model(input_ids=torch.tensor([one.ids])).logits[0, -len(one.ids) :].double().log_softmax(1)
    )
    return logits[one.counted - 1, np.array(one.ids)[one.counted]].numpy()


LAYOUTS = {
    "alone": lambda made: [[steps.plain([one])] for one in made],
    "together": lambda made: [[steps.plain([one]) for one in made]],
    "packed": lambda made: [[steps.plain(made[:4]), steps.plain(made[4:])]],
    "trees": lambda made: [
        [steps.branching(made[:2]), steps.branching(made[2:4]), steps.branching(made[4:])]
    ],
}


FORWARDS = [(method, FAMILIES[(i + 1) % 4], 0) for i, method in enumerate(METHODS)]


FORWARDS += [
    (method, family, 8)
    for method in ("lora", "prompt_tuning", "prefix_tuning")
    for family in ("mistral", "qwen2")
]


@pytest.mark.parametrize(("method", "family", "window"), FORWARDS)
def test_logprobs_are_those_of_pefts_own_forward_in_every_layout(
    bases, a_study, method, family, window
):
    base, study = windowed(bases, family, window) if window else bases[family], a_study(method)
    model = randomised(base, study)
    try:
        made = conversations([20, 11, 5, 33, 2, 17])
        made[1] = Conversation(
            made[0].ids[:9] + made[1].ids[9:], made[1].counted
        )  # two that begin alike, and one that another begins with
        made[5] = Conversation(made[4].ids + made[5].ids[2:], made[5].counted)
        expected = [own_logprobs(model, one) for one in made]
        forward = steps.Forward(model)
        for name, layout in LAYOUTS.items():
            if name == "packed" and forward.prompt_based:
                continue
            for order in (range(6), range(5, -1, -1)):
                passes = layout([made[i] for i in order])
                found = [part for rows in passes for row in forward.logprobs(rows) for part in row]
                for i, part in zip(order, found, strict=True):
                    np.testing.assert_allclose(
                        part.detach(),
                        expected[i],
                        atol=1e-4,
                        rtol=0,
                        err_msg=f"{name}, conversation {i}",
                    )
    finally:
        adapters.detach(model)


@pytest.mark.parametrize("window", [0, 6])
def test_the_gradient_of_a_packed_document_is_that_of_the_document_alone(bases, a_study, window):
    base, study = windowed(bases, "mistral", window) if window else bases["llama"], a_study("lora")
    model = randomised(base, study)
    try:
        forward = steps.Forward(model)
        trained = [value for value in model.parameters() if value.requires_grad]

        @settings(max_examples=8)
        @given(
            lengths=st.lists(st.integers(2, 24), min_size=2, max_size=6),
            seed=st.integers(0, 99),
            data=st.data(),
        )
        def check(lengths, seed, data):
            made, number = conversations(lengths, seed), data.draw(st.integers(0, len(lengths) - 1))
            alone = torch.autograd.grad(
                forward.logprobs([steps.plain([made[number]])])[0][0].sum(), trained
            )
            packed = torch.autograd.grad(
                forward.logprobs([steps.plain(made)])[0][number].sum(), trained
            )
            for one, other in zip(alone, packed, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)

        check()
    finally:
        adapters.detach(model)


def test_the_gradient_of_a_pair_in_a_tree_is_that_of_its_answers_alone(bases, a_study):
    base, study = bases["gemma"], a_study("prefix_tuning")
    model = randomised(base, study)
    try:
        forward = steps.Forward(model)
        trained = [value for value in model.parameters() if value.requires_grad]
        one, other = conversations([20, 13])
        other = Conversation(one.ids[:10] + other.ids[10:], other.counted)
        alone = torch.autograd.grad(
            forward.logprobs([steps.plain([one])])[0][0].sum()
            - 2 * forward.logprobs([steps.plain([other])])[0][0].sum(),
            trained,
        )
        chosen, rejected = forward.logprobs([steps.branching([one, other])])[0]
        for a, b in zip(
            alone, torch.autograd.grad(chosen.sum() - 2 * rejected.sum(), trained), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
    finally:
        adapters.detach(model)


def test_two_answers_that_are_alike_or_begin_alike_are_both_counted(bases, a_study):
    base, [one] = bases["llama"], conversations([12])
    model = randomised(base, a_study("lora"))
    short = Conversation(one.ids[:8], np.array([5, 6, 7]))
    long = Conversation(one.ids, np.arange(5, 12))
    try:
        forward = steps.Forward(model)
        for pair in ([long, long], [long, short], [short, long]):
            row = steps.branching(pair)
            assert len(row.tokens) == 12
            for found, part in zip(forward.logprobs([row])[0], pair, strict=True):
                np.testing.assert_allclose(found.detach(), own_logprobs(model, part), atol=1e-4)
    finally:
        adapters.detach(model)


def test_logits_in_parts_are_those_at_once(bases, a_study, monkeypatch):
    base = bases["llama"]
    model = randomised(base, a_study("lora"))
    try:
        forward, rows = (steps.Forward(model), [steps.plain(conversations([20, 11, 30]))])
        trained, found = [value for value in model.parameters() if value.requires_grad], []
        weight = base.model.get_output_embeddings().weight
        for at_once, linear in (
            (2**27, True),
            (3 * len(weight), True),
            (1, True),
            (3 * len(weight), False),
        ):
            monkeypatch.setattr(steps, "LOGITS_AT_ONCE", at_once)
            forward.linear_head = linear
            values = torch.cat(forward.logprobs(rows)[0])
            found.append([values.detach(), *torch.autograd.grad(values.square().sum(), trained)])
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-4)
    finally:
        adapters.detach(model)


# ---- layout
@given(lengths=st.lists(st.integers(1, 60), max_size=40), width=st.integers(1, 80))
def test_bins_hold_every_sequence_once_and_none_is_too_full(lengths, width):
    found = steps.bins(lengths, width)
    assert sorted(i for one in found for i in one) == list(range(len(lengths)))
    assert all(len(one) == 1 or sum(lengths[i] for i in one) <= width for one in found)
    assert all(found)
    total, largest = sum(lengths), max(lengths, default=0)
    if largest <= width:
        assert (
            len(found) <= max(1, 2 * total / width) + 1
        )  # two bins that are both at most half full would have been one
    assert found == steps.bins(lengths, width)


@given(lengths=st.lists(st.integers(1, 60), max_size=40), budget=st.integers(1, 200))
def test_batches_hold_every_row_once_and_fit_the_budget(lengths, budget):
    found = list(steps.batches(lengths, budget))
    assert sorted(i for one in found for i in one) == list(range(len(lengths)))
    assert all(len(one) == 1 or len(one) * max(lengths[i] for i in one) <= budget for one in found)


@pytest.mark.parametrize(
    ("method", "objective"),
    [
        ("lora", "sft"),
        ("ia3", "dpo"),
        ("prompt_tuning", "sft"),
        ("prefix_tuning", "sft"),
        ("prefix_tuning", "dpo"),
    ],
)
def test_how_many_tokens_a_pass_has_changes_nothing(bases, fit, method, objective):
    base = bases["qwen2"]
    one, *others = [
        fit(base, method, objective, tokens_per_batch=tokens) for tokens in (32, 200, 10_000)
    ]
    assert one.said["tokens_per_pass"] == 32
    for other in others:
        same(one, other, 1e-5)


@pytest.mark.parametrize("method", ["lora", "p_tuning"])
def test_a_packed_step_draws_packs_whose_documents_see_only_themselves(bases, fit, a_study, method):
    base, changes = bases["llama"], {"max_length": 64, "batch_size": 2, "n": 24}
    study = a_study(method, packed=True, **changes)
    prepared = examples.prepare("sft", base, study)
    lengths = [len(one.ids) for one in prepared.examples]
    assert sorted(i for pack in prepared.packs for i in pack) == list(range(24))
    assert all(sum(lengths[i] for i in pack) <= 64 for pack in prepared.packs)
    assert len(prepared.packs) < 24
    order = []

    def spy(self, model, inputs, num_items_in_batch=None, step=steps._Steps.training_step):
        order.append(list(inputs["step"].numbers))
        return step(self, model, inputs, num_items_in_batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps._Steps, "training_step", spy)
        packed = fit(base, method, packed=True, **changes)
    assert packed.facts["steps"] == -(-len(prepared.packs) // 2)
    alone = fit(
        base, method, packed=True, tokens_per_batch=1, **changes
    )  # every example is a pass of its own, in the same groups
    same(packed, alone, 1e-5)
    assert sorted(i for step in order for i in step) == list(range(24))
    packs = {tuple(pack) for pack in prepared.packs}
    assert all(any(tuple(step) == a + b for a in packs for b in packs | {()}) for step in order)


# ---- which tokens count
CHAT = [
    {"role": "user", "content": "who are the people"},
    {"role": "assistant", "content": "the people are here"},
    {"role": "user", "content": "and who are you"},
    {"role": "assistant", "content": "who"},
    {"role": "user", "content": "the"},
    {"role": "assistant", "content": "here and here"},
]


MARKS = {  # what stands around an answer in each template's text
    "llama": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "qwen2": ("<|im_start|>assistant\n", "<|im_end|>"),
    "mistral": ("[/INST]", "</s>"),
    "gemma": ("<start_of_turn>model\n", "<end_of_turn>"),
}


def read_slowly(base, family, chat):
    """Ids of the conversation and which of them are the assistant's: the template's text is cut by
    hand at its marks.
    """
    text, (begin, end) = base.tokenizer.apply_chat_template(chat, tokenize=False), MARKS[family]
    ids, counted = [], []
    while text:
        before, found, text = text.partition(begin)
        ids += base.tokenizer.encode(before + found, add_special_tokens=False)
        if found:
            answer, found, text = text.partition(end)
            part = base.tokenizer.encode(answer + found, add_special_tokens=False)
            counted += range(len(ids), len(ids) + len(part))
            ids += part
    return ids, counted


@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_of_the_assistant_counts_with_its_end_token(bases, family):
    base = bases[family]
    ids, counted = read_slowly(base, family, CHAT)
    found, places = counted_ids(base.tokenizer, CHAT)
    assert (
        found
        == ids
        == base.tokenizer.encode(
            base.tokenizer.apply_chat_template(CHAT, tokenize=False), add_special_tokens=False
        )
    )
    end = base.tokenizer.convert_tokens_to_ids(MARKS[family][1])
    newline = (
        set()
        if "\n" not in base.tokenizer.get_vocab()
        else {base.tokenizer.convert_tokens_to_ids("\n")}
    )
    assert set(counted) <= set(places.tolist())
    assert {ids[i] for i in set(places.tolist()) - set(counted)} <= newline, (
        "besides answers and end tokens only the template's line end"
    )
    assert [ids[i] for i in counted].count(end) == 3
    assert len(set(places.tolist())) == len(places)
    assert 0 not in places


@pytest.mark.parametrize("loss", ["answers", "whole"])
@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_the_loss_of_many_turns_is_the_mean_over_what_counts(
    bases, fit, a_study, tmp_path, method, loss
):
    base = bases["llama"]
    chats = [CHAT, CHAT[:2], CHAT[:4], [*CHAT[2:4], *CHAT[:2]]]
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    )
    source = {
        "source": "tests:chats",
        "path": str(tmp_path / "chats.jsonl"),
        "format": "messages",
        "n": 4,
    }
    study = a_study(method, data=source, loss=loss)
    ours = fit(base, method, data=source, loss=loss)
    model = adapters.create(variants_of(study, method)[0], base.model, base.tokenizer)
    try:
        values = []
        for chat in chats:
            ids, counted = read_slowly(base, "llama", chat)
            counted = np.array(counted) if loss == "answers" else np.arange(1, len(ids))
            values.append(own_logprobs(model, Conversation(ids, counted)))
    finally:
        adapters.detach(model)
    assert ours.losses == pytest.approx([-np.concatenate(values).mean()], abs=1e-4)


FIRST_LINES = (
    "{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] +"
    " '<|end_header_id|>\\n\\n' }}"
)


LAST_LINES = (
    "{%- endfor %}{%- if add_generation_prompt %}{{-"
    " '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)


REWRITING = {  # as reasoning models' templates leave out earlier thoughts
    "drops": (
        "{%- if message['role'] == 'assistant' and not loop.last %}{{- 'here<|eot_id|>' }}{%- else"
        " %}{{- message['content'] + '<|eot_id|>' }}{%- endif %}"
    ),
    "no end token": (
        "{{- message['content'] }}{%- if message['role'] == 'user' or loop.last %}{{- '<|eot_id|>'"
        " }}{%- endif %}"
    ),
}


def rewriting(base, name):
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = FIRST_LINES + REWRITING[name] + LAST_LINES
    return Loaded(base.name, base.model, tokenizer, "rewriting")


@pytest.mark.parametrize("name", ["drops", "no end token"])
def test_a_template_that_rewrites_earlier_turns_is_refused(bases, name):
    base = rewriting(bases["llama"], name)
    with pytest.raises(ValueError) as error:
        counted_ids(base.tokenizer, CHAT)
    assert "loss: whole" in one_sentence(error.value)
    assert len(counted_ids(base.tokenizer, CHAT[:2])[1]) == 5


def test_where_all_tokens_count_a_template_may_rewrite_what_it_likes(bases, a_study, tmp_path):
    base = rewriting(bases["llama"], "drops")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    source = {
        "source": "tests:chats",
        "path": str(tmp_path / "chats.jsonl"),
        "format": "messages",
        "n": 1,
    }
    [one] = examples.prepare("sft", base, a_study("lora", data=source, loss="whole")).examples
    assert one.ids == chat_ids(base.tokenizer, CHAT, generation=False)
    assert list(one.counted) == list(range(1, len(one.ids)))
