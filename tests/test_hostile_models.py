"""Models, tokenizers and adapters made to cost hours are refused within seconds, in a sentence."""

import contextlib
import json
import os
import re
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from conftest import one_sentence
from driftbook import doctor
from driftbook.batch import preparing
from driftbook.models import adapter_forms, adapters, loading
from driftbook.study.limits import tried
from driftbook.study.sections import Base
from driftbook.study.study_file import Study
from small_chat import small_chat

LOOP = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}"
LOOP += "{% endfor %}{% endfor %}{{ messages[0].content }}"
CALLS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
GROWS = "{% set ns = namespace(x='xx') %}{% for a in range(50) %}{% set ns.x = ns.x ~ ns.x %}"
GROWS += "{% endfor %}{{ ns.x }}"
NESTED = "{% if 1 %}" * 3000 + "{% endif %}" * 3000


@pytest.fixture(scope="module")
def chat():
    return small_chat()


@pytest.mark.parametrize("template", [LOOP, CALLS, GROWS, "{{ 'x' * 10 ** 12 }}", NESTED])
def test_a_template_that_never_ends_is_refused(chat, monkeypatch, template):
    model, tokenizer = chat
    monkeypatch.setattr(loading, "TEMPLATE_SECONDS", 0.5)
    monkeypatch.setattr(tokenizer, "chat_template", template)
    started = time.time()
    with pytest.raises(ValueError) as error:
        loading.check_fit("mine", model, tokenizer)
    assert "mine" in one_sentence(error.value)
    assert "template" in str(error.value)
    assert time.time() - started < 10


@pytest.mark.parametrize("template", ["{{ 9 ** (9 ** 9) }}", "{{ 'x' * 9 }}" + "{{ (9" * 400])
def test_a_template_whose_work_is_not_pythons_own_is_refused(chat, monkeypatch, template):
    """In a thread too: no signal comes between the digits of a number."""
    model, tokenizer = chat
    monkeypatch.setattr(loading, "TEMPLATE_SECONDS", 0.5)
    monkeypatch.setattr(tokenizer, "chat_template", template)
    said = []

    def check():
        try:
            loading.check_fit("mine", model, tokenizer)
        except ValueError as error:
            said.append(one_sentence(error))

    thread = threading.Thread(target=check)
    started = time.time()
    thread.start()
    thread.join()
    assert "template" in said[0]
    assert time.time() - started < 10


@pytest.mark.parametrize(
    ("where", "pattern"),
    [
        ("pre_tokenizer", r"(a+)+$"),
        ("pre_tokenizer", r"(\w+\s?)+!$"),
        ("normalizer", r"(x*x*x*x*x*)*y"),
    ],
)
def test_a_tokenizer_whose_patterns_backtrack_is_refused(
    chat, tmp_path, monkeypatch, where, pattern
):
    model, tokenizer = chat
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    part = {"type": "Split", "behavior": "Isolated", "invert": False}
    part = part if where == "pre_tokenizer" else {"type": "Replace", "content": "z"}
    part |= {"pattern": {"Regex": pattern}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {where: part}))
    monkeypatch.setattr(loading, "TEMPLATE_SECONDS", 1.5)
    source = Base(source=str(tmp_path), family="llama")
    started = time.time()
    with pytest.raises(ValueError, match=r"cannot load mine from .*: reading a text") as error:
        loading.load(source, "mine", None)
    one_sentence(error.value)
    assert time.time() - started < 10


def test_work_is_tried_in_a_process_of_its_own():
    started, made = time.time(), []

    def count():
        while True:
            with contextlib.suppress(Exception):  # a limit is none
                sum(range(1000))

    for work, words in (
        (count, "counting takes longer than 0.2 s; give another"),
        (lambda: time.sleep(60), "counting takes longer"),  # of which a machine may be too busy
        (lambda: os._exit(3), "counting ends its process"),
        (lambda: bytearray(2**40), "counting fails (MemoryError"),
        (lambda: int("x"), "invalid literal"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            tried(0.2, "counting", work)
    tried(0.5, "counting", lambda: made.append(1))
    assert not made
    assert time.time() - started < 20


SLOW = r"(\w+\.?)+!"
SETTINGS = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def adapter(folder, **settings):
    """An adapter's folder, of these settings."""
    folder.mkdir()
    (folder / adapter_forms.CONFIG).write_text(json.dumps(SETTINGS | settings))
    tensors = {NAME.format("A"): torch.ones(2, 8), NAME.format("B"): torch.ones(8, 2)}
    save_file(tensors, folder / adapters.WEIGHTS)
    return folder


@pytest.mark.parametrize(
    "settings", [{"target_modules": SLOW}, {"rank_pattern": {SLOW: 2}}, {"alpha_pattern": {"(": 2}}]
)
def test_a_pattern_that_backtracks_or_is_none_is_refused(chat, tmp_path, monkeypatch, settings):
    monkeypatch.setattr(adapter_forms, "PATTERN_SECONDS", 0.5)
    folder = adapter(tmp_path / "a", **settings)
    assert "config" in set(doctor.examine(folder).finding)
    with pytest.raises(ValueError, match="pattern") as error, adapters.attached(chat[0], folder):
        pass
    one_sentence(error.value)


def test_settings_and_headers_beyond_any_adapter_are_refused(chat, tmp_path):
    large = adapter(tmp_path / "a", rank_pattern={f"x{i}": 2 for i in range(500_000)})
    headed = adapter(tmp_path / "b")
    length = adapter_forms.MOST_HEADER + 1
    with (headed / adapters.WEIGHTS).open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(2 * length)
    deep = adapter(tmp_path / "c")
    (deep / adapter_forms.CONFIG).write_text("[" * 100_000)
    for folder, words in ((large, "adapter_config.json has"), (headed, "header"), (deep, "config")):
        started = time.time()
        [said] = doctor.examine(folder).sentence
        assert words in said
        with pytest.raises(ValueError, match=words), adapters.attached(chat[0], folder):
            pass
        assert time.time() - started < 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1,000,000,000"),
        ({"vocab_size": 10**9}, "vocab_size"),
        ({"auto_map": {"AutoConfig": "x.Y"}, "model_type": "y"}, "custom code"),
        ({"note": "x" * 6_000_000}, "config.json has"),
    ],
)
def test_a_configuration_beyond_any_model_is_refused(chat, tmp_path, change, words):
    model, tokenizer = chat
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (tmp_path / "x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    source = Base(source=str(tmp_path), family="llama")
    for read in (loading.load, loading.check_source, loading.without_weights):
        started = time.time()
        with pytest.raises(ValueError, match=words) as error:
            read(source, "mine", None)
        one_sentence(error.value)
        assert time.time() - started < 5
    assert not (tmp_path / "ran").exists()


def test_an_answer_longer_than_the_model_reads_is_refused_before_work(chat, tmp_path, content):
    model, tokenizer = chat
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    content["bases"]["tiny-llama"]["path"] = str(tmp_path)
    for where, n, words in (
        (content["benchmarks"]["safety"], 1024, "benchmarks.safety.max_new_tokens = 1024"),
        (content["methods"]["prompt_tuning"], 1020, "with 1020 virtual tokens"),
    ):
        key = "max_new_tokens" if "format" in where else "num_virtual_tokens"
        before, where[key] = where[key], n
        study = Study(**content)
        with pytest.raises(ValueError) as error:
            preparing.check_model("tiny-llama", study.bases["tiny-llama"], study)
        assert words in one_sentence(error.value)
        assert "reads 1024 tokens" in str(error.value)
        where[key] = before
    study = Study(**content)
    preparing.check_model("tiny-llama", study.bases["tiny-llama"], study)
