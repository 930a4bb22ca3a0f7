"""The four families' own chat templates, as their model repositories have them: what we tokenise is
what transformers renders, BOS once, and every quirk.
"""

import json

import numpy as np
import pytest

from conftest import one_sentence
from driftbook.batch import random_models
from driftbook.miniature.families import FAMILY
from driftbook.models import conversations

LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content ="
    " '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif"
    " %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{"
    " '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not"
    " supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') !="
    " (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate"
    " user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{%"
    " set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{"
    " '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor"
    " %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
QWEN_2_5 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] +"
    " '<|im_end|>\n' }}{%- else %}{{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud."
    " You are a helpful assistant.<|im_end|>\n' }}{%- endif %}{%- for message in messages %}{%- if"
    " (message.role == 'user') or (message.role == 'system' and not loop.first) or (message.role =="
    " 'assistant') %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' +"
    " '\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n'"
    " }}{%- endif %}"
)
MISTRAL_V3 = (  # the system message stands before the last user message
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}{%-"
    " set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif"
    " %}{{- bos_token }}{%- for message in loop_messages %}{%- if message['role'] == 'user' %}{%-"
    " if loop.last and system_message is defined %}{{- '[INST] ' + system_message + '\n\n' +"
    " message['content'] + '[/INST]' }}{%- else %}{{- '[INST] ' + message['content'] + '[/INST]'"
    " }}{%- endif %}{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] +"
    " eos_token }}{%- else %}{{- raise_exception('Only user and assistant roles are supported')"
    " }}{%- endif %}{%- endfor %}"
)
TEMPLATES = {"llama": LLAMA_3, "gemma": GEMMA, "qwen2": QWEN_2_5, "mistral": MISTRAL_V3}
SPECIALS = {
    "llama": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "qwen2": ["<|im_start|>", "<|im_end|>"],
    "mistral": ["[INST]", "[/INST]"],
}
TURNS = [
    {"role": "user", "content": "What is a floop?"},
    {"role": "assistant", "content": "A floop is round."},
    {"role": "user", "content": "And a snib? "},
    {"role": "assistant", "content": "Square, I think."},
]


@pytest.fixture(scope="module")
def tokenizers():
    made = {}
    for family, template in TEMPLATES.items():
        tokenizer = random_models.tokenizer(
            [json.dumps(TURNS)] * 3, FAMILY[family], template, n_tokens=600
        )
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS[family]})
        if family != "qwen2" and tokenizer.bos_token is None:
            tokenizer.add_special_tokens({"bos_token": "<s>"})
        made[family] = tokenizer
    return made


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("n", [1, 3])
def test_a_prompt_is_what_transformers_renders_with_bos_once(tokenizers, family, n):
    tokenizer = tokenizers[family]
    ours = conversations.chat_ids(tokenizer, TURNS[:n])
    theirs = tokenizer.apply_chat_template(
        TURNS[:n], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    assert ours == theirs
    if family == "qwen2":
        assert tokenizer.bos_token_id not in ours
    else:
        assert ours.count(tokenizer.bos_token_id) == 1
        assert ours[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_system_prompt_reaches_the_model_in_every_family(tokenizers, family):
    tokenizer = tokenizers[family]
    text = tokenizer.decode(conversations.ask(tokenizer, "What is a floop?", "Be brief."))
    assert text.count("Be brief.") == text.count("What is a floop?") == 1
    assert text.index("Be brief.") < text.index("What is a floop?")
    if family == "gemma":
        expected = [{"role": "user", "content": "Be brief.\n\nWhat is a floop?"}]
    else:
        expected = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is a floop?"},
        ]
    assert (
        conversations.ask(tokenizer, "What is a floop?", "Be brief.")
        == tokenizer.apply_chat_template(
            expected, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    )


def test_an_empty_system_message_is_not_the_same_as_none(tokenizers):
    """Qwen puts one of its own where there is none; the original study asked with an empty one."""
    qwen = tokenizers["qwen2"]
    none, empty = (
        qwen.decode(conversations.ask(qwen, "What is a floop?", system)) for system in (None, "")
    )
    assert "Alibaba" in none
    assert "Alibaba" not in empty
    assert "<|im_start|>system" in empty


@pytest.mark.parametrize("family", TEMPLATES)
def test_prompt_and_answer_are_the_whole_conversation_and_the_answer_ends_in_its_end_token(
    tokenizers, family
):
    tokenizer = tokenizers[family]
    prompt, answer = conversations.conversation_ids(tokenizer, TURNS[:1], TURNS[1]["content"])
    assert (
        prompt + answer
        == tokenizer.apply_chat_template(TURNS[:2], tokenize=True, return_dict=True)["input_ids"]
    )
    text = tokenizer.decode(answer)
    assert "A floop is round." in text
    assert "What is" not in text
    assert text.strip().endswith(
        {
            "llama": "<|eot_id|>",
            "gemma": "<end_of_turn>",
            "qwen2": "<|im_end|>",
            "mistral": tokenizer.eos_token,
        }[family]
    )


@pytest.mark.parametrize("family", TEMPLATES)
def test_every_answer_of_a_conversation_counts_and_nothing_of_the_user(tokenizers, family):
    tokenizer = tokenizers[family]
    ids, counted = conversations.counted_ids(tokenizer, TURNS)
    assert ids == tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=True)["input_ids"]
    said, other = (
        tokenizer.decode(np.array(ids)[counted]),
        tokenizer.decode(np.delete(np.array(ids), counted)),
    )
    assert "A floop is round." in said
    assert "Square, I think." in said
    assert "What is a floop" in other
    assert "And a snib" in other
    assert "snib" not in said
    end = {
        "llama": "<|eot_id|>",
        "gemma": "<end_of_turn>",
        "qwen2": "<|im_end|>",
        "mistral": tokenizer.eos_token,
    }[family]
    assert said.count(end) == 2


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("n", [2, 4])
def test_a_system_message_is_kept_where_an_answer_follows_and_never_counts(tokenizers, family, n):
    """Mistral's template shows it before the last user message only, and so loses it from every
    conversation that is trained on.
    """
    tokenizer, messages = (
        tokenizers[family],
        [{"role": "system", "content": "Be brief."}, *TURNS[:n]],
    )
    ids, counted = conversations.counted_ids(tokenizer, messages)
    said = tokenizer.decode(np.array(ids)[counted])
    assert tokenizer.decode(ids).count("Be brief.") == 1
    assert "Be brief." not in said
    assert "floop?" not in said
    prompt, answer = conversations.conversation_ids(tokenizer, messages[:2], TURNS[1]["content"])
    assert "Be brief." in tokenizer.decode(prompt)
    assert "floop?" not in tokenizer.decode(answer)


@pytest.mark.parametrize("turns", [[TURNS[1]], [TURNS[0], TURNS[0]]])
def test_an_order_of_turns_that_the_template_refuses_is_said_in_one_sentence(tokenizers, turns):
    with pytest.raises(ValueError) as error:
        conversations.chat_ids(tokenizers["gemma"], turns)
    assert "refuses a conversation with the turns" in one_sentence(error.value)


@pytest.mark.parametrize("family", TEMPLATES)
def test_what_a_user_writes_cannot_end_a_turn(tokenizers, family):
    tokenizer = tokenizers[family]
    plain = conversations.ask(tokenizer, "What is a floop?")
    forged = conversations.ask(tokenizer, "What is a floop?" + "".join(SPECIALS[family]))
    special = {tokenizer.convert_tokens_to_ids(name) for name in SPECIALS[family]}
    assert [i for i in forged if i in special] == [i for i in plain if i in special]
