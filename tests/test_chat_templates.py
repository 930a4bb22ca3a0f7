"""Chat templates that think, write the date or end a turn in their own way: what is asked, where an
answer is read and how it ends. The oracle is transformers' own rendering, of the templates that TRL
ships and of short ones with the same features.
"""

import copy
import datetime
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import transformers.utils.chat_template_utils as rendering
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conftest import one_sentence
from driftbook.benchmarks import responding
from driftbook.models import loading, templates
from driftbook.models.conversations import answer_text, ask, conversation_ids, counted_ids
from driftbook.models.scoring import Answer, Scorer
from driftbook.study.sections import Base, Benchmark

SHIPPED = {
    path.stem: path.read_text()
    for path in sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))
    if "training" not in path.stem
}
CHATML = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
SMOLLM3 = (  # thinks unless told not to, and writes the date
    "{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}"
    "{%- set mode = '/think' if enable_thinking else '/no_think' %}"
    "{{- '<|im_start|>system\nToday Date: ' + strftime_now('%d %B %Y') + '\nReasoning Mode: '"
    " + mode + '\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}"
    "{{- '<|im_end|>\n' }}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{%- elif m.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\n' + ('' if enable_thinking else '<think>\n\n</think>\n') }}"
    "{{- m.content.lstrip('\n') + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if not enable_thinking %}{{- '<think>\n\n</think>\n' }}{%- endif %}{%- endif %}"
)
GRANITE = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}"
    "{%- set messages = messages[1:] %}{%- else %}"
    "{%- set system = 'Today is ' + strftime_now('%B %d, %Y') + '.' %}"
    "{%- if thinking %}{%- set system = system + ' Think first.' %}{%- endif %}{%- endif %}"
    "{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}"
    "{%- for m in messages %}{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content"
    " + '<|end_of_text|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"
)
MISTRAL = (  # the system message stands in the last user's turn, and so is lost in training
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}"
    "{%- set messages = messages[1:] %}{%- endif %}{{- bos_token }}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' }}{%- if loop.last and system is defined %}"
    "{{- system + '\n\n' }}{%- endif %}{{- m.content + '[/INST]' }}{%- else %}"
    "{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
)
CLOSED = CHATML.replace(
    "m.content", "('<think></think>' if loop.last and m.role == 'assistant' else '') + m.content"
)
TURNS = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
# template, how a prompt ends, what is counted of an answer
CASES = {
    "ChatML": (CHATML, "<|im_start|>assistant\n", "Yes.<|im_end|>\n"),
    "Qwen3": (SHIPPED["qwen3"], "assistant\n<think>\n\n</think>\n\n", "Yes.<|im_end|>\n"),
    "Qwen3, answers behind a closed thought": (
        CLOSED,
        "<|im_start|>assistant\n<think></think>",
        "Yes.<|im_end|>\n",
    ),
    "R1 distill": (
        SHIPPED["deepseek_r1_distill"],
        "Hello?<｜Assistant｜>",
        "Yes.<｜end▁of▁sentence｜>",
    ),
    "SmolLM3": (SMOLLM3, "assistant\n<think>\n\n</think>\n", "Yes.<|im_end|>\n"),
    "Llama 3.2": (SHIPPED["llama3_2"], "assistant<|end_header_id|>\n\n", "Yes.<|eot_id|>"),
    "Granite": (GRANITE, "assistant<|end_of_role|>", "Yes.<|end_of_text|>\n"),
    "Gemma": (SHIPPED["gemma"], "<start_of_turn>model\n", "Yes.<end_of_turn>\n"),
    "Mistral": (MISTRAL, "Hello?[/INST]", " Yes.</s>"),
    "Phi-3": (SHIPPED["phi3"], "<|assistant|>\n", "Yes.<|end|>\n"),
    "gpt-oss": (SHIPPED["gptoss"], "assistant<|channel|>final<|message|>", "Yes.<|return|>"),
    "GLM": (SHIPPED["glm4moe"], "<|assistant|>\n<think></think>", "\nYes.<|user|>"),
    "parts": (
        SHIPPED["idefics3"],
        "Hello?<end_of_utterance>\nAssistant:",
        " Yes.<end_of_utterance>\n",
    ),
}
SPECIALS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "</s>", "<|user|>"),
    *("<|assistant|>", "<|end|>", "<|return|>", "<|start|>", "<|channel|>", "<|message|>"),
    *(
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜end▁of▁sentence｜>",
        "<|start_of_role|>",
        "<|end_of_role|>",
    ),
    *("<|end_of_text|>", "<end_of_utterance>", "<|turn>", "<turn|>", "<|eot|>"),
    *("<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|>"),
)
THINK_ENDS = ("<think>", "<|channel>thought", "<|channel|>analysis<|message|>")


def made(template: str | None, texts: tuple[str, ...] = (), size: int = 0):
    """A tokenizer of bytes, and of `size` merges that texts show, with the special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=258 + len(SPECIALS) + size,
        special_tokens=["<pad>", "<bos>", *SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, **names)


@pytest.fixture(params=CASES)
def case(request):
    template, *expected = CASES[request.param]
    return made(template), *expected


def test_a_prompt_ends_where_an_answer_begins_and_an_answer_with_its_turn(case):
    tokenizer, ending, counted = case
    prompt = tokenizer.decode(ask(tokenizer, "Hello?"))
    asked, said = conversation_ids(tokenizer, TURNS[:1], "Yes.")
    assert prompt.endswith(ending)
    assert tokenizer.decode(said) == counted
    assert asked == ask(tokenizer, "Hello?")
    end = templates.place_of(tokenizer).end
    assert end in said
    assert said[said.index(end) + 1 :] in ([], tokenizer.encode("\n"))


@pytest.mark.parametrize("system", ["Be brief.", ""])
def test_a_model_is_trained_on_the_prompt_that_it_is_asked(case, system):
    tokenizer, *_ = case
    turns = [{"role": "system", "content": system}, TURNS[0]]
    asked, _ = conversation_ids(tokenizer, turns, "Yes.")
    assert asked == ask(tokenizer, "Hello?", system)
    assert tokenizer.decode(asked).count(system or "Hello?") == 1


def test_a_letter_is_read_where_a_trained_answer_begins(case):
    tokenizer, *_ = case
    scorer = object.__new__(Scorer)
    scorer.tokenizer, scorer.after = tokenizer, range(0)
    context, [option] = scorer.joined(ask(tokenizer, "Hello?"), ["A"], scorer.lead)
    asked, said = conversation_ids(tokenizer, TURNS[:1], "A")
    assert [*context, *option] == [*asked, *said][: len(context) + len(option)]
    assert tokenizer.decode(option) == "A"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_template_that_trl_ships_is_asked_without_a_thought_or_a_clock(name, monkeypatch):
    tokenizer = made(SHIPPED[name])
    templates.check_template(name, tokenizer)
    prompt = ask(tokenizer, "Hello?")
    text = tokenizer.decode(prompt)
    assert not text.rstrip().endswith(THINK_ENDS)
    assert conversation_ids(tokenizer, TURNS[:1], "Yes.")[0] == prompt
    monkeypatch.setattr(rendering, "datetime", Later)
    assert tokenizer.decode(ask(made(SHIPPED[name]), "Hello?")) == text


class Later(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2041, 5, 17)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_6", "nemotron_3_nano", "gemma4"])
def test_a_switch_turns_thinking_off_as_transformers_does(name):
    tokenizer = made(SHIPPED[name])
    off, on = (
        tokenizer.apply_chat_template(
            TURNS[:1], add_generation_prompt=True, tokenize=False, enable_thinking=thinks
        )
        for thinks in (False, True)
    )
    assert tokenizer.decode(ask(tokenizer, "Hello?")) == off != on
    assert "thinking is off (enable_thinking = False)" in templates.notes(tokenizer)


@pytest.mark.parametrize(
    ("begin", "expected"),
    [
        ("{{- 'Effort: ' ~ (reasoning_effort or 'high') ~ '.' }}", "Effort: high."),
        (
            "{%- if reasoning_effort == 'none' %}{{- 'No effort.' }}{%- endif %}"
            "{{- 'Effort: ' ~ (reasoning_effort or 'high') ~ '.' }}",
            "No effort.Effort: none.",
        ),
        ("{{- 'Style: ' ~ (thinking_style or 'long') ~ '.' }}", "Style: long."),
        ("{{- 'Shown: ' ~ thinking_style ~ '.' }}", "Shown: ."),
        ("{{- 'Budget: ' ~ thinking_budget ~ '.' }}", "Budget: 0."),
        ("{%- if preserve_thinking and messages[1] %}{{- 'Kept.' }}{%- endif %}", ""),
    ],
)
def test_a_switch_is_set_by_what_the_template_does_with_it(begin, expected):
    assert templates.render(made(begin + CHATML), TURNS[:1], True) == (
        expected + "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"
    )


# ---- the date
@pytest.mark.parametrize("day", [None, datetime.date(2041, 5, 7)])
def test_the_date_is_the_studys(day):
    said = (day or templates.DATE).strftime("%d %b %Y")
    for name in ("llama3_1", "llama3_2"):
        tokenizer = made(SHIPPED[name])
        templates.fix_date(tokenizer, day)
        expected = tokenizer.apply_chat_template(
            TURNS[:1], add_generation_prompt=True, tokenize=False, date_string=said
        )
        assert said in expected
        assert tokenizer.decode(ask(tokenizer, "Hello?")) == expected
        assert any(str(day or templates.DATE) in note for note in templates.notes(tokenizer))


@pytest.mark.parametrize("form", ["%d %B %Y", "%A, %-d %b %y", "%F", "%H:%M:%S %j", "%c, 9%%"])
def test_a_template_writes_the_date_in_its_own_form(form):
    day = datetime.date(2031, 2, 3)
    tokenizer = made("{{- strftime_now('" + form + "') + '\n' }}" + CHATML)
    templates.fix_date(tokenizer, day)
    written = templates.render(tokenizer, TURNS[:1], True).partition("\n")[0]
    assert written == day.strftime(form)


def test_the_text_around_a_date_is_as_transformers_has_it():
    """A macro before the template must not change its white space."""
    for before in ("\n", "  ", "\n\n  {% if true %}x{% endif %}", "{%- if true %} y{% endif %}\n"):
        template = before + "{{- strftime_now('%Y') }}" + CHATML
        tokenizer = made(template)
        fixed = template.replace("strftime_now('%Y')", "'2024'")
        assert templates.render(tokenizer, TURNS) == tokenizer.apply_chat_template(
            TURNS, chat_template=fixed, tokenize=False
        )


# ---- how a turn ends
def test_what_stands_behind_a_whole_conversation_counts_nowhere():
    tokenizer = made(SHIPPED["phi3"])
    chat = [*TURNS, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}]
    ids, counted = counted_ids(tokenizer, chat)
    assert tokenizer.decode(np.array(ids)[counted]) == "Yes.<|end|>\nNo.<|end|>\n"
    assert ids == tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]


def test_a_turn_that_only_the_next_one_ends_ends_there():
    tokenizer = made(SHIPPED["glm4moe"])
    ids, counted = counted_ids(tokenizer, TURNS)
    assert tokenizer.decode(np.array(ids)[counted]) == "\nYes.<|user|>"


def test_answers_end_with_the_turn_whatever_the_tokenizers_eos(bases):
    tokenizer = made(CHATML)
    model = bases["llama"].model
    ends = tokenizer.convert_ids_to_tokens(templates.end_tokens(model, tokenizer))
    assert {"</s>", "<|im_end|>"} <= set(ends)
    assert "a turn ends with <|im_end|>, which is not the tokenizer's </s>" in templates.notes(
        tokenizer
    )


NO_END = CHATML.replace("<|im_end|>\n", "\n### End\n")
SILENT = CHATML.replace("+ m.content ", "")
ALWAYS = (
    "{%- for m in messages %}{{- m.role + ':' + ('<think>\n' if m.role == 'assistant' else '') }}"
    "{{- m.content + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'assistant:<think>\n' }}{%- endif %}"
)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "give one to the base in the study file, under template:"),
        (NO_END, "no special token behind an answer"),
        (SILENT, "does not show it"),
        (ALWAYS, "opens a thought before every answer"),
        ("{{- raise_exception('no') }}", "refuses what a user asks"),
    ],
)
def test_a_template_that_cannot_ask_is_refused_by_the_models_name(template, words):
    with pytest.raises(ValueError) as error:
        templates.check_template("my-base", made(template))
    assert one_sentence(error.value).startswith("my-base: ")
    assert words in str(error.value)


# ---- what is trained on
THOUGHT = "<think>\nHm.\n</think>\n\nYes."


def test_answers_with_thoughts_are_refused_where_the_template_shows_them():
    with pytest.raises(ValueError) as error:
        conversation_ids(made(SHIPPED["qwen3"]), TURNS[:1], THOUGHT)
    assert "take thoughts out of the answers" in one_sentence(error.value)
    tokenizer = made(SHIPPED["deepseek_r1_distill"])  # it leaves them out itself
    assert "Hm." not in tokenizer.decode(conversation_ids(tokenizer, TURNS[:1], THOUGHT)[1])


def test_a_prompt_is_not_read_together_with_the_answer():
    tokenizer = made(CHATML, ("\n\n\n\n",) * 20, size=2)
    assert len(tokenizer.encode("\n\n")) == 1
    asked, said = conversation_ids(tokenizer, TURNS[:1], "\nYes.")
    assert asked == ask(tokenizer, "Hello?")
    assert tokenizer.decode(said) == "\nYes.<|im_end|>\n"


# ---- what was answered
@pytest.mark.parametrize(
    ("written", "text", "thought"),
    [
        ("Yes.", "Yes.", "none"),
        ("<think>\nHm.\n</think>\n\nYes.", "Yes.", "closed"),
        ("\n<think>\n\n</think>\n\nYes.", "Yes.", "closed"),
        ("<think>a</think><think>b</think>Yes.", "Yes.", "closed"),
        ("Hm.</think>Yes. See </think>.", "Yes. See </think>.", "closed"),
        ("<think>\nHm. Yes. And so", "", "open"),
        ("<think>a</think><think>b", "", "open"),
        ("<think></think>", "", "closed"),
        ("Yes, <think> is a mark.", "Yes, <think> is a mark.", "none"),
        (
            "<|channel|>analysis<|message|>Hm.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>Yes.",
            "Yes.",
            "closed",
        ),
    ],
)
def test_a_thought_is_taken_off_before_an_answer_is_read(written, text, thought):
    tokenizer = made(CHATML)
    ids = tokenizer.encode(written, add_special_tokens=False)
    assert answer_text(tokenizer, ids) == (text, thought)


def test_an_answer_that_is_all_thought_is_none(bases, monkeypatch):
    scorer = Scorer(bases["llama"].model, made(CHATML))
    written = iter(scorer.tokenizer.encode("<think> so"))
    monkeypatch.setattr(scorer, "_continued", lambda *_: [list(written)])
    [answer] = scorer.generate([[1]], 20)
    assert (answer.text, answer.finish_reason, answer.had_thought) == ("", "thought", True)
    assert answer.n_tokens == 10


# ---- a template that the study gives
def test_a_base_without_a_template_is_asked_by_the_studys(bases, tmp_path):
    base, own = bases["llama"], bases["llama"].tokenizer.chat_template
    bare = copy.deepcopy(base.tokenizer)
    bare.chat_template = None
    base.model.save_pretrained(tmp_path / "base")
    bare.save_pretrained(tmp_path / "base")
    source = {"family": "llama", "source": "tests:base", "path": str(tmp_path / "base")}
    with pytest.raises(ValueError) as error:
        loading.load(Base(**source), "my-base")
    assert "under template:" in one_sentence(error.value)
    assert str(error.value).startswith("my-base: ")
    (tmp_path / "chat.jinja").write_text(own)
    for given in (own, str(tmp_path / "chat.jinja")):
        loaded = loading.load(Base(**source, template=given), "my-base")
        assert ask(loaded.tokenizer, "is it safe") == ask(base.tokenizer, "is it safe")
    with pytest.raises(ValueError) as error:
        loading.load(Base(**source, template="no/such.jinja"), "my-base")
    assert "'no/such.jinja'" in one_sentence(error.value)


def test_a_template_and_a_date_of_a_study_are_in_its_runs_and_no_others(make_study, content):
    def runs():
        return [one.run_id for one in make_study(content).variants]

    before, base = runs(), content["bases"]["tiny-llama"]
    assert "template" not in json.loads(make_study(content).variants[0].settings)["base"]
    seen = [before]
    for change in ({"template": "{{ 1 }}"}, {"template": "{{ 2 }}"}):
        base.update(change)
        seen.append(runs())
    del base["template"]
    content["date"] = "2041-05-07"
    seen.append(runs())
    assert len({tuple(one) for one in seen}) == 4
    assert make_study(content).date == datetime.date(2041, 5, 7)


def test_thoughts_that_are_taken_off_are_counted():
    said = [
        Answer("Yes.", 9, "stop", True),
        Answer("", 9, "thought", True),
        Answer("No.", 2, "stop"),
    ]
    scorer = SimpleNamespace(ask=lambda prompts, system: prompts, generate=lambda *_: said)
    prompts = pd.DataFrame({"prompt_id": list("abc"), "prompt": ["x"] * 3})
    variant = SimpleNamespace(run_id="r", system_prompt=None, repetition=1)
    benchmark = Benchmark(source="tests:x", format="csv")
    study = SimpleNamespace(benchmarks={"safety": benchmark}, seed=0)
    with pytest.warns(UserWarning, match="2 of 3 answers to safety begin with a thought.* 1 of"):
        found = responding.responses("safety", prompts, scorer, variant, study)
    assert found.finish_reason.tolist() == ["stop", "thought", "stop"]
