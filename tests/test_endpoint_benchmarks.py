"""Benchmarks asked of an endpoint: letters, what it cannot give, probes of shallow alignment, and
the same answers as weights from a real server.
"""

import importlib.util
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import one_sentence
from driftbook.benchmarks import bbq, bbq_orders, data, deployed, responding, utility
from driftbook.benchmarks.format import Asking
from driftbook.models import replies
from driftbook.models.endpoint import Endpoint
from driftbook.models.requesting import Deployed, EndpointError
from driftbook.models.scoring import Scorer
from driftbook.study.sections import PROMPT_FORMATS, Benchmark
from served import FAST, PROMPTS, FakeModel, endpoint, expected, texts, words_for
from small_chat import small_chat

pytest_plugins = ["served"]


# ---- letters
@given(st.lists(st.floats(-8, 8), min_size=6, max_size=30), st.integers(2, 20), st.data())
def test_a_listed_letter_is_exact_and_a_missing_one_is_within_its_bound(logits, n_top, data):
    logprobs = np.array(logits) - np.logaddexp.reduce(logits)
    tokens = [chr(ord("A") + i) for i in range(len(logits))]
    order = np.argsort(-logprobs)
    top = [[tokens[i], float(logprobs[i])] for i in order[:n_top]]
    asked = data.draw(st.lists(st.sampled_from(tokens), min_size=3, max_size=3, unique=True))
    found, missing = replies.letter_logprobs(top, asked)
    listed = {token for token, _ in top}
    assert missing == sum(letter not in listed for letter in asked)
    for letter, value in zip(asked, found, strict=True):
        true = logprobs[tokens.index(letter)]
        if letter in listed:
            assert value == true
        else:
            assert true <= value + 1e-6
            assert value <= top[-1][1]


def test_of_a_letters_forms_the_likelier_counts_and_none_listed_is_no_number():
    top = [[" A", -0.5], ["A", -2.0], ["\u0120B", -3.0], ["x", -4.0]]
    found, missing = replies.letter_logprobs(top, "ABC")
    assert (found[0], found[1], missing) == (-0.5, -3.0, 1)
    assert found[2] == -4.0
    assert np.isnan(replies.letter_logprobs([], "ABC")[0]).all()


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(*small_chat())


def of_weights(scorer: Scorer, first: str = "") -> FakeModel:
    """A server that lists a real model's likeliest tokens, those of `first` among them."""
    model, lock = FakeModel(), threading.Lock()
    wanted = [scorer.ids(letter)[0] for letter in first]

    def top(body):
        if "prompt" in body:
            context = scorer.ids(body["prompt"])
        else:
            [context] = scorer.ask_turns([body["messages"]])
        with lock:
            [logprobs] = scorer.distributions([(context, [0])])
        likely = [i for i in logprobs[0].topk(20).indices.tolist() if i not in wanted]
        listed = [*wanted, *likely][:20]
        return [(scorer.tokenizer.decode([i]), float(logprobs[0][i])) for i in listed]

    model.top = top
    return model


def bbq_items(n: int) -> pd.DataFrame:
    rows = [
        {
            "item_id": f"Age-{i}",
            "dimension": "Age",
            "context": ("ambiguous", "disambiguated")[i % 2],
            "polarity": "negative",
            "question_family": f"Age-{i // 2}",
            "passage": f"Two people met {i}.",
            "question": "Who was late?",
            "ans0": "The old man",
            "ans1": "The young man",
            "ans2": "Unknown",
            "label": 2 if i % 2 == 0 else 0,
            "unknown": 2,
            "target": 0,
        }
        for i in range(n)
    ]
    return pd.DataFrame(rows)


def test_letters_of_a_server_are_those_of_the_weights(serve, scorer):
    """To 1e-4 where the server lists them: BBQ's answers, probabilities and mass are the same."""
    items, how = bbq_items(6), ("letters", "run")
    with endpoint(serve, of_weights(scorer, "ABC")) as asked:
        assert asked.server.n_top == 20
        for order in ("ABC", "CAB"):
            theirs = bbq.answers(items, asked, *how, order=order, min_mass=0.0)
            ours = bbq.answers(items, scorer, *how, order=order, min_mass=0.0)
            for name in ("p_a", "p_b", "p_c", "option_mass"):
                np.testing.assert_allclose(theirs[name], ours[name], rtol=2e-4)
            others = [name for name in ours if ours[name].dtype != float]
            pd.testing.assert_frame_equal(theirs[others], ours[others])
        assert asked.n_letters_bounded == 0
        with pytest.raises(ValueError, match="first token only"):
            asked.choices(asked.ask(["x"]), [["Yes indeed", "No"]])


def test_a_template_of_ones_own_is_written_here_and_sent_as_text(serve, scorer):
    items, how = bbq_items(4), ("letters", "run")
    model, stem = of_weights(scorer, "ABC"), {"stem": "Well, "}
    model.goes_on = "never"  # by itself the server begins no answer
    url = serve(model)
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    settings = Deployed(url, **FAST, extra_body=extra)
    with Endpoint(settings, tokenizer=scorer.tokenizer) as asked:
        theirs = bbq.answers(items, asked, *how, min_mass=0.0, **stem)
        ours = bbq.answers(items, scorer, *how, min_mass=0.0, **stem)
        pd.testing.assert_series_equal(theirs.answer, ours.answer)
        np.testing.assert_allclose(theirs.option_mass, ours.option_mass, rtol=2e-4)
        path, body, _ = model.seen[-1]
        assert path == "/v1/completions"
        assert body["prompt"].endswith("<|start|>assistant\nWell, ")
        assert body["logprobs"] == 20
        assert "chat_template_kwargs" not in body
        asked.generate(asked.ask(["Hello you"], "Brief."), 4)
        own = scorer.ask(["Hello you"], "Brief.")
        assert [scorer.ids(model.seen[-1][1]["prompt"])] == own


def test_letters_that_a_server_does_not_list_are_no_more_probable_than_that(serve, scorer):
    model = of_weights(scorer)
    likely = model.top({"messages": [{"role": "user", "content": PROMPTS[0]}]})
    letters = [*[token for token, _ in likely if token.isascii() and token.isalnum()][:2], "A"]
    with endpoint(serve, model) as asked:
        found = asked.letters(asked.ask(PROMPTS), letters)
        own = scorer.letters(scorer.ask(PROMPTS), letters)
        bounded = asked.n_letters_bounded
        [note] = asked.notes
    assert (own <= found + 1e-4).all()
    assert 0 < bounded <= found.size - 2
    assert (np.abs(own - found) < 1e-4).sum() == found.size - bounded
    assert f"{bounded} letters were not among the 20 likeliest" in one_sentence(note)


def test_letters_are_read_in_text_where_a_server_gives_no_probabilities(serve):
    """A made-up model that always chooses the young man, wherever he is shown."""

    def says(text):
        line = next((one for one in text.split("\n") if one.endswith("The young man")), None)
        return ["The", "answer", "is", line[0]] if line else words_for(text)

    model, items = FakeModel(), bbq_items(6)
    model.says = says
    with endpoint(serve, model) as asked:
        assert asked.server.n_top == 0
        with pytest.raises(ValueError, match="no log-probabilities"):
            asked.letters(asked.ask(["x"]))
        benchmark = Benchmark(format="bbq", source="none", permuted=4, generated=3)
        found = bbq_orders.study_answers(items, asked, "letters", "run", benchmark, 0)
    assert set(found.answer) == {"B"}  # of the file, in each order
    assert set(found.answer_mode) == {"generated"}
    assert found.option_order.value_counts().to_dict() == {"ABC": 6, "BCA": 4, "CAB": 4}
    assert found.option_mass.isna().all()
    assert not found.duplicated(["item_id", "answer_mode", "option_order"]).any()
    assert len(bbq_orders.official(found)) == 6


# ---- a study's own code
def test_responses_of_a_study_are_asked_of_an_endpoint_like_of_weights(serve, study):
    model, name = FakeModel(), study.asked(PROMPT_FORMATS)[0]
    prompts = data.prompts(name, study).head(4)
    variant = next(one for one in study.variants if one.method == "none")
    with endpoint(serve, model) as asked:
        found = responding.responses(name, prompts, asked, variant, study)
    own = found[(found.prompt_variant == "default") & (found.decoding == "greedy")]
    length = study.benchmarks[name].max_new_tokens
    assert list(own.response) == expected(prompts.prompt, length)
    assert list(own.prompt_id) == list(prompts.prompt_id)
    assert found.n_tokens.notna().all()


# ---- what an endpoint cannot give
def test_losses_are_null_with_a_reason_and_what_needs_them_alone_is_refused(serve):
    items = pd.DataFrame(
        {"prompt_id": ["0", "1"], "prompt": ["2 and 3?", "1 and 1?"], "answer": ["5", "2"]}
    ).assign(final=["5", "2"])
    model = FakeModel()
    model.says = lambda text: ["It", "is", "5."] if "and" in text else words_for(text)
    with endpoint(serve, model) as asked:
        found = utility.rated("sums", items, asked, "run", "gsm8k", Asking(8))
        begun = utility.refusal_probability(items, asked, "sums", "run")
        for form, mode, said in (
            ("text", "letters", "format text cannot be asked"),
            ("stereoset", "letters", "likelihood"),
            ("answers", "letters", "likelihood"),
            ("bbq", "options", "by whole options"),
        ):
            assert said in one_sentence(deployed.unaskable(form, asked, mode))
        with pytest.raises(ValueError, match="format text cannot be asked"):
            utility.rated("prose", items, asked, "run", "text", Asking(8))
        assert deployed.unaskable("gsm8k", asked) is None
        assert deployed.unaskable("bbq", asked) is None
        with pytest.raises(ValueError, match="ask by letters"):
            bbq.answers(bbq_items(2), asked, "options", "run")
    losses, right = found[found.metric == "nll"], found[found.metric == "correct"]
    assert losses.value.isna().all()
    assert losses.unscored_reason.str.contains("no likelihood").all()
    assert list(right.value) == [1.0, 0.0]
    assert begun.value.isna().all()
    assert begun.unscored_reason.str.contains("first token only").all()


def test_weights_lack_nothing(scorer):
    assert all(deployed.unaskable(form, scorer, "options") is None for form in ("text", "bbq"))


# ---- probes of shallow alignment
@pytest.mark.parametrize("goes_on", ["always", "asked"])
def test_a_begun_answer_is_gone_on_with_as_the_server_wants_it(serve, goes_on):
    model = FakeModel()
    model.goes_on = goes_on
    prompts = pd.DataFrame({"prompt_id": ["a", "b"], "prompt": PROMPTS[:2]})
    with endpoint(serve, model) as asked:
        found = deployed.probed_responses("begun answer", "own", prompts, asked, "run", 4)
    assert list(found.response) == [f"Sure {' '.join(words_for(one)[1:5])}" for one in PROMPTS[:2]]
    assert model.seen[-1][1]["messages"][-1] == {"role": "assistant", "content": "Sure"}
    assert ("continue_final_message" in model.seen[-1][1]) is (goes_on == "asked")
    assert set(found.prompt_variant) == {"begun answer"}


def test_a_server_that_begins_another_answer_is_found_out(serve):
    model = FakeModel()
    model.goes_on = "never"
    with endpoint(serve, model) as asked:
        with pytest.raises(EndpointError) as error:
            deployed.probed_contexts("begun answer", PROMPTS, asked)
        assert "does not go on with an answer that is begun" in one_sentence(error.value)
        assert texts(asked.generate(asked.ask(PROMPTS), 8)) == expected(PROMPTS)


def test_other_probes_of_an_endpoint(serve):
    model = FakeModel()
    with endpoint(serve, model, system_prompt="Be brief.") as asked:
        raw = asked.generate(deployed.probed_contexts("no template", PROMPTS, asked), 8)
        assert texts(raw) == expected(PROMPTS)
        path, body, _ = model.seen[-1]
        assert (path, "messages" in body) == ("/v1/completions", False)
        later = asked.generate(deployed.probed_contexts("second turn", PROMPTS, asked), 8)
        assert texts(later) == expected(PROMPTS)
        roles = [turn["role"] for turn in model.seen[-1][1]["messages"]]
        assert roles == ["system", "user", "assistant", "user"]
        with pytest.raises(ValueError, match="expected one of begun answer"):
            deployed.probed_contexts("other", PROMPTS, asked)


def test_probes_of_weights_are_written_by_the_models_own_template(scorer):
    shown = {
        probe: scorer.tokenizer.decode(
            deployed.probed_contexts(probe, ["Hello you"], scorer, "Brief.")[0]
        )
        for probe in deployed.PROBES
    }
    first, then = (turn["content"] for turn in deployed.FIRST_TURN)
    system = "<|start|>system\nBrief.<|end|>"
    asked = "<|start|>user\nHello you<|end|><|start|>assistant\n"
    turn = f"<|start|>user\n{first}<|end|><|start|>assistant\n{then}<|end|>"
    assert shown == {
        "begun answer": f"{system}{asked}Sure",
        "no template": "Hello you",
        "second turn": f"{system}{turn}{asked}",
    }
    prompts = pd.DataFrame({"prompt_id": ["a"], "prompt": ["Hello you"]})
    for probe in deployed.PROBES:
        found = deployed.probed_responses(probe, "own", prompts, scorer, "run", 4)
        assert found.response[0].startswith("Sure") or probe != "begun answer"


# ---- a real server
@pytest.fixture
def transformers_server(scorer, tmp_path):
    """transformers' own server of the tiny model, on a free port; gives its address and the model's
    name there."""
    missing = [one for one in ("fastapi", "uvicorn", "openai") if not importlib.util.find_spec(one)]
    if missing:
        pytest.skip(f"transformers serve needs {', '.join(missing)}")
    folder = tmp_path / "tiny"
    scorer.model.save_pretrained(folder)
    scorer.tokenizer.save_pretrained(folder)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    begin = "from transformers.cli.transformers import main; main()"
    options = ["--host", "127.0.0.1", "--port", port, "--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, "-W", "ignore", "-c", begin, "serve", str(folder), *options]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
            assert process.poll() is None, (tmp_path / "log").read_text()[-500:]
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
def test_the_text_of_transformers_serve_is_that_of_the_weights(transformers_server, scorer):
    """Greedy, in fp32, with a system prompt, after a first turn and without a template."""
    url, name = transformers_server
    with Endpoint(Deployed(url, model=name)) as asked:
        assert asked.notes == []
        assert {*asked.lacks} == {"losses", "options", "letters"}  # it passes logprobs over
        for contexts, own in (
            (asked.ask(PROMPTS[:5]), scorer.ask(PROMPTS[:5])),
            (asked.ask(PROMPTS[:2], "Be brief."), scorer.ask(PROMPTS[:2], "Be brief.")),
            *(
                [deployed.probed_contexts(probe, PROMPTS[:2], one) for one in (asked, scorer)]
                for probe in ("no template", "second turn")
            ),
        ):
            theirs, ours = asked.generate(contexts, 12), scorer.generate(own, 12)
            assert texts(theirs) == texts(ours)
            assert [one.finish_reason for one in theirs] == [one.finish_reason for one in ours]
        with pytest.raises(EndpointError, match="does not go on"):
            deployed.probed_contexts("begun answer", PROMPTS[:1], asked)
    with Endpoint(Deployed(url, model=name), tokenizer=scorer.tokenizer) as asked:
        both = [deployed.probed_contexts("begun answer", PROMPTS[:3], x) for x in (asked, scorer)]
        assert texts(asked.generate(both[0], 12)) == texts(scorer.generate(both[1], 12))
    with pytest.raises(EndpointError) as error:
        Endpoint(Deployed(url, model="nobody/nothing"))
    assert "Server is pinned to" in one_sentence(error.value)
    with pytest.raises(EndpointError, match="give http://127"):
        Endpoint(Deployed(url.removesuffix("/v1"), model=name))
