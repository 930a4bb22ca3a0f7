"""A model behind an HTTP endpoint, asked like weights, whatever the server does meanwhile."""

import dataclasses
import json
import stat
import threading
import time

import pytest

from conftest import one_sentence
from driftbook.models import replies, requesting
from driftbook.models.endpoint import Endpoint
from driftbook.models.kept_answers import KeptAnswers
from driftbook.models.opening import PROBES
from driftbook.models.requesting import Connection, Deployed, EndpointError
from driftbook.models.sampling import Sampling
from served import (
    DROP,
    FAST,
    OPENING,
    PROMPTS,
    FakeModel,
    as_json,
    endpoint,
    expected,
    refusal,
    texts,
    words_for,
)

pytest_plugins = ["served"]


# ---- what is asked and answered
def test_each_prompt_gets_its_own_answer_with_system_prompt_decoding_and_extra_fields(serve):
    model, extra = FakeModel(), {"chat_template_kwargs": {"enable_thinking": False}}
    with endpoint(serve, model, system_prompt="Be brief.", extra_body=extra) as asked:
        found = asked.generate(asked.ask(PROMPTS), 8)
        assert texts(found) == expected(PROMPTS)
        assert {(one.n_tokens, one.finish_reason) for one in found} == {(8, "length")}
        [whole] = asked.generate(asked.ask(PROMPTS[:1], "Other."), 99)
        assert (whole.text, whole.finish_reason) == (" ".join(words_for(PROMPTS[0])), "stop")
    *_, (_, first, _), (_, last, _) = [one for one in model.seen if one[1]["max_tokens"] != 16]
    assert first["messages"][0] == {"role": "system", "content": "Be brief."}
    assert last["messages"][0] == {"role": "system", "content": "Other."}
    assert all(body["chat_template_kwargs"] for _, body, _ in model.seen)
    assert all(body["temperature"] == 0 for _, body, _ in model.seen)


def test_decoding_is_greedy_the_deployed_one_or_drawn_with_a_seed_of_each_prompt(serve):
    model, own = FakeModel(), {"temperature": 0.7, "top_p": 0.9}
    with endpoint(serve, model, decoding=own) as asked:
        contexts = asked.ask(PROMPTS[:2])
        asked.generate(contexts, 8)
        for sample in (0, 1):
            asked.generate(contexts, 8, Sampling(temperature=0.5, seed=3, sample=sample))
        assert asked.decoding == "as deployed (temperature 0.7, top_p 0.9)"
    bodies = [body for _, body, _ in model.seen[OPENING:]]
    assert [body["temperature"] for body in bodies] == [0.7] * 2 + [0.5] * 4
    assert "seed" not in bodies[0]
    assert len({body["seed"] for body in bodies[2:]}) == 4  # of two prompts and two samples
    with endpoint(serve, model, decoding={}) as asked:
        asked.generate(asked.ask(PROMPTS[:1]), 8)
    assert not {"temperature", "top_p"} & {*model.seen[-1][1]}
    assert asked.decoding == "as deployed (as it comes)"


def test_lengths_are_in_words_where_a_server_does_not_count_tokens(serve):
    model = FakeModel()
    whole = model.wrapped
    model.wrapped = lambda *given: whole(*given) | {"usage": None}
    with endpoint(serve, model) as asked:
        found = asked.generate(asked.ask(PROMPTS), 8)
        assert {one.n_tokens for one in found} == {8}
        assert asked.decoding == "greedy"
        assert "does not count tokens" in one_sentence(asked.notes[0])


def test_an_empty_prompt_is_refused(serve):
    with (
        endpoint(serve, FakeModel()) as asked,
        pytest.raises(ValueError, match="a prompt is empty"),
    ):
        asked.ask(["fine", " "])


def test_several_are_asked_at_once_and_no_more_than_that(serve):
    model = FakeModel(fault=lambda *_: time.sleep(0.02))
    with endpoint(serve, model, concurrency=3) as asked:
        asked.generate(asked.ask(PROMPTS), 8)
    assert 1 < model.most_running <= 3


def test_no_more_requests_in_a_minute_than_allowed(serve):
    model = FakeModel()
    with endpoint(serve, model, per_minute=6000) as asked:
        asked.generate(asked.ask(PROMPTS), 8)
    assert model.at[-1] - model.at[0] > 0.009 * (len(model.at) - 1)


def test_a_thought_is_taken_off_and_a_filter_is_said():
    def said(content, ended="stop", **more):
        message = {"message": {"content": content, **more}, "finish_reason": ended}
        found = replies.answer_of({"choices": [message]})
        return found["text"], found["finish_reason"], found["had_thought"]

    assert said("<think>hm</think>\nYes.") == ("Yes.", "stop", True)
    assert said("<think>hm and", "length") == ("", "thought", True)
    assert said("", "length", reasoning_content="hm and") == ("", "thought", True)
    assert said("Yes.", reasoning_content="hm") == ("Yes.", "stop", True)
    assert said(None, "content_filter") == ("", "filtered", False)
    assert said("") == ("", "stop", False)  # an answer that ends at once is one
    with pytest.raises(ValueError, match="without a text"):
        said(None)


def test_a_prompt_that_a_filter_stops_is_answered_so_and_other_refused_requests_end_it(serve):
    def fault(number, path, body):
        if body["messages"][-1]["content"] == PROMPTS[1]:
            return as_json({"error": {"code": code, "message": PROMPTS[1]}}, 400)
        return None

    code = "content_filter"
    with endpoint(serve, FakeModel(fault=fault)) as asked:
        found = asked.generate(asked.ask(PROMPTS[:3]), 8)
    assert [one.finish_reason for one in found] == ["length", "filtered", "length"]
    code = "context_length_exceeded"
    with endpoint(serve, FakeModel(fault=fault)) as asked, pytest.raises(EndpointError) as error:
        asked.generate(asked.ask(PROMPTS[:3]), 8)
    assert "status 400, context_length_exceeded" in one_sentence(error.value)
    assert PROMPTS[1] not in str(error.value)


# ---- servers that are busy, break off, or talk nonsense
FAULTS = {
    "429": (429, {"Retry-After": "0.05"}, b""),
    "a date": (429, {"Retry-After": "Mon, 01 Jan 2001 00:00:00 GMT"}, b""),
    "500": (500, {}, b"oops"),
    "503": (503, {}, b""),
    "dropped": DROP,
    "no JSON": (200, {}, b"<html>"),
    "empty": (200, {}, b""),
    "no choices": as_json({"choices": []}),
    "no text": as_json({"choices": [{"message": {}}]}),
    "cut off": (200, {"Content-Length": "500"}, b'{"choices": [{"mess'),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_passes_is_tried_again(serve, fault):
    tries = {}

    def broken(number, path, body):
        if number < OPENING:
            return None
        prompt = body["messages"][-1]["content"]
        tries[prompt] = tries.get(prompt, 0) + 1
        return fault if tries[prompt] < 3 and prompt in PROMPTS[:2] else None

    with endpoint(serve, FakeModel(fault=broken)) as asked:
        assert texts(asked.generate(asked.ask(PROMPTS), 8)) == expected(PROMPTS)
    assert sorted(tries.values()) == [1] * 10 + [3, 3]


def test_a_slow_answer_is_given_up_and_asked_for_again(serve):
    slow = threading.Event()

    def once(number, path, body):
        if body["messages"][-1]["content"] == PROMPTS[0] and not slow.is_set():
            slow.set()
            time.sleep(0.5)

    with endpoint(serve, FakeModel(fault=once), timeout=0.2) as asked:
        assert texts(asked.generate(asked.ask(PROMPTS), 8)) == expected(PROMPTS)


def test_all_requests_rest_when_one_is_told_to_wait_and_a_long_pause_is_said(serve):
    pause, told = "0.4", []

    def busy(number, path, body):
        if number >= OPENING and not told:
            told.append(time.monotonic())
            return 429, {"Retry-After": pause}, b""
        return None

    model = FakeModel(fault=busy)
    with endpoint(serve, model, concurrency=2) as asked:
        asked.generate(asked.ask(PROMPTS), 8)
    # what was under way when it was told may come a little later
    assert not [at for at in model.at if told[0] + 0.2 < at < told[0] + 0.39]
    pause = "3600"
    told.clear()
    with endpoint(serve, FakeModel(fault=busy)) as asked, pytest.raises(EndpointError) as error:
        asked.generate(asked.ask(["another"]), 8)
    assert "asks for a pause of 3600 seconds" in one_sentence(error.value)


def test_waits_grow_up_to_a_limit():
    connection = Connection(Deployed("http://127.0.0.1:1/v1", first_wait=1.0))
    waits = [connection._pause(None, attempt) for attempt in range(8)]
    for attempt, wait in enumerate(waits):
        usual = min(2.0**attempt, requesting.LONGEST_BACKOFF)
        assert usual <= wait <= 1.5 * usual
    connection.close()


def test_a_server_that_dies_in_the_middle_is_resumed_and_nothing_is_asked_twice(serve, tmp_path):
    dead, kept = threading.Event(), tmp_path / "private" / "answers.jsonl"

    def dies(number, path, body):
        if number >= OPENING + 5:
            dead.set()
        return DROP if dead.is_set() and not revived.is_set() else None

    revived, model = threading.Event(), FakeModel(fault=dies)
    url = serve(model)
    settings = Deployed(url, **(FAST | {"attempts": 2, "concurrency": 2}))
    with Endpoint(settings, kept) as asked, pytest.raises(EndpointError) as error:
        asked.generate(asked.ask(PROMPTS), 8)
    assert "kept" in one_sentence(error.value)
    answered = {prompt for prompt in PROMPTS if model.answered[prompt]}
    assert len(answered) == 5
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert not any(prompt in kept.read_text() for prompt in PROMPTS)
    revived.set()
    with Endpoint(settings, kept) as asked:
        found = asked.generate(asked.ask(PROMPTS), 8)
    assert texts(found) == expected(PROMPTS)
    assert {model.answered[prompt] for prompt in PROMPTS} == {1}
    with Endpoint(settings, kept) as asked:  # other questions are other requests
        asked.generate(asked.ask(PROMPTS[:1]), 9)
        asked.generate(asked.ask(PROMPTS[:1], "Be brief."), 8)
    assert model.answered[PROMPTS[0]] == 3


def test_a_file_whose_last_line_was_cut_off_is_read_and_written_on(tmp_path):
    path = tmp_path / "answers.jsonl"
    kept = KeptAnswers(path)
    kept.keep("a", {"text": "one"})
    kept.keep("b", {"text": "tw\N{SNOWMAN}\u2028o"})
    kept.close()
    path.write_bytes(path.read_bytes()[:-20])  # a run was killed while it wrote
    kept = KeptAnswers(path)
    assert (kept.get("a"), kept.get("b"), len(kept)) == ({"text": "one"}, None, 1)
    kept.keep("c", {"text": "three"})
    kept.close()
    assert KeptAnswers(path).get("c") == {"text": "three"}


# ---- refused before any work
def test_a_server_that_is_not_there_a_wrong_path_and_a_wrong_name_are_said(serve):
    with pytest.raises(EndpointError, match="there is no server at"):
        Endpoint(Deployed("http://127.0.0.1:9/v1", **FAST))
    assert "give http://127.0.0.1" in refusal(serve, FakeModel(), path="/api")
    assert "it serves tiny, big" in refusal(serve, FakeModel(["tiny", "big"]), model="other")
    several = refusal(serve, FakeModel(["tiny", "big"]), model=None)
    assert "serves tiny, big; name the model" in several
    with endpoint(serve, FakeModel(["only"]), model=None) as asked:
        assert asked.name == "only"


def test_a_server_that_sends_on_and_one_without_encryption_are_said(serve):
    moved = (301, {"Location": "http://elsewhere/v1/chat/completions"}, b"")
    said = refusal(serve, FakeModel(fault=lambda *_: moved))
    assert "it sends on to http://elsewhere/v1" in said
    with pytest.raises(EndpointError, match="no encrypted connection is made"):
        Endpoint(Deployed(serve(FakeModel()).replace("http:", "https:"), **FAST))


def test_a_server_that_minds_no_name_is_asked_by_a_name_that_it_lists(serve):
    model = FakeModel(["tiny"])
    model.models = type("Any", (list,), {"__contains__": lambda *_: True})(["tiny"])
    assert "serves no model other" in refusal(serve, model, model="other")
    # a server that lists others, but knows this one and refuses what nobody has
    hidden = FakeModel(["tiny"])
    hidden.get = lambda path, headers: as_json({"data": [{"id": "cached"}]})
    with endpoint(serve, hidden) as asked:
        assert asked.name == "tiny"


def test_another_models_name_is_refused_at_once_and_later(serve):
    model = FakeModel()
    model.answers_as = "huge"
    assert "asked for the model tiny and answers as huge" in refusal(serve, model)
    with endpoint(serve, model, answers_as="huge") as asked:
        model.answers_as = "tiny-2"
        with pytest.raises(EndpointError, match="answers as tiny-2"):
            asked.generate(asked.ask(PROMPTS[:1]), 8)


@pytest.mark.parametrize(
    ("asked", "answered", "same"),
    [
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("/models/a.gguf", "a.gguf", True),
        ("org/model", "org/model@main", True),
        ("llama3", "llama3:latest", True),
        ("org/model", "org/model-instruct", False),
        ("model", "Model", True),
    ],
)
def test_which_names_are_the_same_models(asked, answered, same):
    assert replies.is_same_model(asked, answered) is same


def test_a_missing_and_a_refused_key_are_said_and_the_key_is_nowhere(serve, tmp_path, monkeypatch):
    secret, model = "sk-very-secret-1234", FakeModel()
    model.needs_key = secret
    monkeypatch.delenv("DRIFTBOOK_ENDPOINT_KEY", raising=False)
    assert "wants a key (status 401)" in refusal(serve, model)
    assert "MY_KEY is not set" in refusal(serve, model, key_variable="MY_KEY")
    monkeypatch.setenv("MY_KEY", "sk-another-5678")
    wrong = refusal(serve, model, key_variable="MY_KEY")
    assert "refuses the key" in wrong
    assert "sk-" not in wrong
    monkeypatch.setenv("MY_KEY", secret)
    kept = tmp_path / "answers.jsonl"
    with endpoint(serve, model, kept, key_variable="MY_KEY") as asked:
        asked.generate(asked.ask(PROMPTS), 8)
        shown = [repr(asked.settings), repr(asked.server), str(dataclasses.asdict(asked.settings))]
        assert secret not in "".join(shown) + kept.read_text() + json.dumps(asked.notes)
    assert model.seen[-1][2]["Authorization"] == f"Bearer {secret}"
    # a server that says the key again
    model.fault = lambda *_: as_json({"error": {"message": f"no {secret} here"}}, 400)
    said = refusal(serve, model, key_variable="MY_KEY")
    assert "no ... here" in said
    assert secret not in said


@pytest.mark.parametrize(
    ("url", "shown"),
    [("http://10.0.0.1/v1", True), ("https://10.0.0.1/v1", False), ("http://[::1]:8/v1", False)],
)
def test_a_key_that_travels_unencrypted_is_known(monkeypatch, url, shown):
    monkeypatch.setenv("DRIFTBOOK_ENDPOINT_KEY", "sk-1")
    connection = Connection(Deployed(url))
    connection.close()
    assert connection.shows_key is shown


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base_url": "localhost:8000"}, "is no address"),
        ({"base_url": "http://me:secret@host/v1"}, "holds a user, a password or a query"),
        ({"concurrency": 0}, "expected at least 1 request"),
        ({"extra_body": {"messages": []}}, "is not yours to set"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, said):
    with pytest.raises(ValueError, match=said) as error:
        Deployed(**({"base_url": "http://127.0.0.1:8000/v1"} | change))
    assert "secret" not in one_sentence(error.value)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("http://h:1/v1/", "http://h:1/v1"),
        ("http://h:1/v1/chat/completions", "http://h:1/v1"),
        ("https://h/v1/models", "https://h/v1"),
    ],
)
def test_what_is_pasted_behind_the_address_is_taken_off(given, kept):
    assert Deployed(given).url == kept


@pytest.mark.parametrize("fault", ["no JSON", "empty", "no choices", "no text"])
def test_nonsense_is_refused_in_a_sentence(serve, fault):
    model = FakeModel(fault=lambda *_: FAULTS[fault])
    assert "its reply" in refusal(serve, model, attempts=2)


def test_one_answer_to_all_prompts_is_refused(serve):
    model = FakeModel()
    model.says = lambda text: ["hello"]
    assert "answers 8 different prompts with the same" in refusal(serve, model)
    model.says = lambda text: []
    assert "with nothing" in refusal(serve, model)


def test_answers_that_are_mixed_up_between_requests_are_found_and_noise_is_noted(serve):
    """A server that gives two prompts under way together each other's answers is refused; one that
    says a word otherwise now and then is not."""
    waiting, lock = [], threading.Lock()

    def swaps(number, path, body):
        if number < 1 + len(PROBES):
            return None
        mine = {"body": body, "other": None, "met": threading.Event()}
        with lock:
            other = waiting.pop() if waiting else None
            if other is None:
                waiting.append(mine)
            else:
                other["other"], mine["other"] = body, other["body"]
                other["met"].set()
        if other is None and not mine["met"].wait(0.5):
            return None
        text = " ".join(words_for(mine["other"]["messages"][-1]["content"])[:16])
        return as_json(model.wrapped(path, text, body, 16))

    model = FakeModel(fault=swaps)
    assert "another prompt's answer" in refusal(serve, model)

    def noisy(number, path, body):
        if number == OPENING - 1:
            return as_json(model.wrapped(path, "something else", body, 2))
        return None

    model = FakeModel(fault=noisy)
    with endpoint(serve, model) as asked:
        [note] = asked.notes
    assert "1 of 8 prompts differ from one time to the next" in one_sentence(note)


def test_another_model_under_the_old_name_is_refused_where_answers_are_kept(serve, tmp_path):
    model, kept = FakeModel(), tmp_path / "answers.jsonl"
    url = serve(model)
    for _ in range(2):
        with Endpoint(Deployed(url, **FAST), kept) as asked:
            assert asked.notes == []
    model.says = lambda text: words_for(text + " by another model")
    with pytest.raises(EndpointError) as error:
        Endpoint(Deployed(url, **FAST), kept)
    assert "8 of 8 harmless prompts otherwise" in one_sentence(error.value)
    Endpoint(Deployed(url, **FAST), tmp_path / "others.jsonl").close()


def test_a_model_that_is_exchanged_during_the_work_is_found_afterwards(serve):
    model = FakeModel()
    with endpoint(serve, model) as asked:
        asked.generate(asked.ask(PROMPTS), 8)
        assert asked.changed() is None
        model.says = lambda text: words_for(text + " by another model")
        assert "8 of 8 harmless prompts otherwise" in one_sentence(asked.changed())


@pytest.mark.parametrize(
    ("listed", "note"),
    [
        ([("A", 0.0), ("B", -9999.0)], "the likeliest token is certain"),
        ([("A", 0.4), ("B", -1.0)], "add up to over 1"),
        ([("A", "high"), ("B", -1.0)], "of another form"),
        ([("A", 0.0), ("B", -17.0)], None),  # a model that is sure, in single precision
    ],
)
def test_log_probabilities_that_are_none_are_not_used(serve, listed, note):
    model = FakeModel()
    model.top = lambda body: listed
    with endpoint(serve, model) as asked:
        assert (asked.server.n_top, len(asked.notes)) == ((0, 1) if note else (20, 0))
        assert note is None or note in one_sentence(asked.notes[0])


def test_the_names_of_fields_that_a_server_wants_are_found(serve):
    def wants(number, path, body):
        if "max_tokens" in body or body.get("top_logprobs", 0) > 5:
            return as_json({"error": {"message": "use max_completion_tokens"}}, 400)
        return as_json(model.wrapped(path, words[0], {**body, "max_tokens": 99}, 1))

    words = ["one"]
    model = FakeModel(fault=wants)
    model.top = lambda body: [(token, -1.0 - i) for i, token in enumerate("ABCDEFG")]
    said = refusal(serve, model)
    assert "different prompts with the same" in said  # it was taken, and says one thing to all
    assert model.seen[-1][1]["max_completion_tokens"] == 16
    assert "max_tokens" not in model.seen[-1][1]
    assert 5 in {body.get("top_logprobs") for _, body, _ in model.seen}
