"""Trying a server before any work: its address, key, model and log-probabilities, and whether it
gives each prompt its own answer.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from driftbook.models.kept_answers import KeptAnswers, request_digest
from driftbook.models.replies import answer_of, is_same_model, tokens_of, top_of
from driftbook.models.requesting import NO_KEY, Connection, EndpointError, StatusError

PROBES = (  # harmless, and with different answers from any model that reads them
    "What is the capital of France?",
    "Count from one to five.",
    "Name three kinds of fruit.",
    "How many days has a week?",
    "What is a bicycle?",
    "Say good morning in Spanish.",
    "What colour is the sky on a clear day?",
    "Why do people wear hats?",
)
PROBE_TOKENS = 16
MOST_TOP = (20, 5, 0)  # likeliest tokens asked for: what most servers allow, what some do, none
LIMITS = ("max_tokens", "max_completion_tokens")  # what servers call the length of an answer
NO_SUCH_MODEL = "driftbook-no-such-model"
CHAT = "/chat/completions"


@dataclass(frozen=True)
class OpenedModel:
    """What was found of a server: the model's name, the field that limits an answer's length, how
    many likeliest tokens it lists (0: it gives no log-probabilities), what should be said of it,
    the prompts by which it was tried, and its answers to them.
    """

    model: str
    limit: str
    n_top: int
    notes: tuple[str, ...] = ()
    probes: tuple[str, ...] = PROBES
    answers: tuple[str, ...] = ()


def opened(
    connection: Connection, kept: KeptAnswers, probes: Sequence[str] = PROBES
) -> OpenedModel:
    """What a server is found to be.

    The harmless `probes` are asked one by one, then all at once, greedily; each must get the same
    answer again. This finds a server that mixes answers up between requests under way together,
    that gives every prompt one answer, that names another model, and, where answers were kept
    before, one whose answers to these prompts have changed since (another model under the old
    name). It does not find one that mixes answers up rarely or only under more load than
    `concurrency`, or a change that leaves these eight answers as they were. Where answers only
    differ a little from one time to the next, as of servers whose arithmetic depends on the batch,
    a note says so, and the prompts are not refused.

    Raises:
        EndpointError: in a sentence, what is wrong and what to do.
    """
    listed = _listed(connection)
    model = _model(connection, listed)
    limit, n_top, notes = _form(connection, model, listed, probes[0])
    if listed and model not in listed and not _minds_names(connection, model, limit):
        raise EndpointError(_not_served(connection, model, listed))
    alone = [_probe(connection, model, limit, one) for one in probes]
    unsteady = _steadiness(connection, model, limit, probes, alone)
    notes += unsteady
    notes += _since(connection, kept, model, limit, probes, alone, steady=not unsteady)
    return OpenedModel(model, limit, n_top, tuple(notes), tuple(probes), tuple(alone))


def changed_since(connection: Connection, server: OpenedModel) -> str | None:
    """A sentence where a server no longer answers the probes as when it was opened, such as after
    another model was rolled out during the work; None where it does.

    Raises:
        EndpointError: it no longer answers, or by another model's name.
    """
    asked = zip(server.probes, server.answers, strict=True)
    found = [
        _probe(connection, server.model, server.limit, prompt) != text for prompt, text in asked
    ]
    if not any(found):
        return None
    return (
        f"{connection.url} answers {sum(found)} of {len(found)} harmless prompts otherwise than"
        " when the work began: another model may stand behind the name since, or it is not steady"
    )


def check_name(connection: Connection, model: str, answered: object) -> None:
    """Raise an EndpointError where a server answers as another model than it was asked for."""
    asked = connection.settings.answers_as or model
    if isinstance(answered, str) and answered and not is_same_model(asked, answered):
        raise EndpointError(
            f"{connection.url} was asked for the model {asked} and answers as {answered}; correct"
            " the model's name, or say that it answers as that (answers_as)"
        )


# ---- address, key and name
def _listed(connection: Connection) -> list[str] | None:
    """The names of the models served; None where the server has no list."""
    status, value = connection.look(f"{connection.url}/models")
    if status in NO_KEY:
        raise EndpointError(connection.wants_key(status))
    return _names(value) if status == 200 else None


def _names(value: Any) -> list[str] | None:
    rows = value.get("data") if isinstance(value, dict) else None
    if not isinstance(rows, list):
        return None
    return [str(one["id"]) for one in rows if isinstance(one, dict) and "id" in one]


def _model(connection: Connection, listed: list[str] | None) -> str:
    if connection.settings.model:
        return connection.settings.model
    if listed and len(listed) == 1:
        return listed[0]
    several = f"serves {_some(listed)}" if listed else "does not say which models it serves"
    raise EndpointError(f"{connection.url} {several}; name the model")


def _some(listed: Sequence[str]) -> str:
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return ", ".join(listed[:8]) + more


def _not_served(connection: Connection, model: str, listed: list[str] | None) -> str:
    has = f"it serves {_some(listed)}" if listed else "it does not say which it serves"
    return f"{connection.url} serves no model {model}: {has}; correct the name"


def _minds_names(connection: Connection, model: str, limit: str) -> bool:
    """Whether a server that does not list a model refuses a name that nobody has: then the model's
    own name means something to it.
    """
    body = _body(connection, NO_SUCH_MODEL, limit, PROBES[0])
    try:
        connection.post(CHAT, body, answer_of, attempts=1)
    except EndpointError:
        return True
    return False


# ---- the form of a request
def _body(connection: Connection, model: str, limit: str, prompt: str) -> dict[str, Any]:
    own = {"model": model, **connection.settings.extra_body, "temperature": 0}
    return own | {limit: PROBE_TOKENS, "messages": [{"role": "user", "content": prompt}]}


def _form(
    connection: Connection, model: str, listed: list[str] | None, prompt: str
) -> tuple[str, int, list[str]]:
    """The field that limits an answer's length, how many likeliest tokens are listed, and notes:
    the first form of a request that the server takes.
    """
    said: StatusError | None = None
    for n_top in MOST_TOP:
        for limit in LIMITS:
            more = {"logprobs": True, "top_logprobs": n_top} if n_top else {}
            body = _body(connection, model, limit, prompt) | more
            try:
                reply = connection.post(CHAT, body, _answered)
            except StatusError as error:
                if error.status not in (400, 422):
                    raise _sentence(connection, error, model, listed) from None
                said = said or error
                continue
            check_name(connection, model, reply.get("model"))
            usable, notes = _usable(reply) if n_top else (False, [])
            if tokens_of(reply) is None:
                notes.append("the server does not count tokens: lengths of answers are in words")
            return limit, n_top if usable else 0, notes
    if said is None:
        raise AssertionError("no form of a request was tried")
    raise _sentence(connection, said, model, listed)


def _answered(reply: dict) -> dict:
    answer_of(reply)
    return reply


def _usable(reply: dict) -> tuple[bool, list[str]]:
    """Whether the log-probabilities in a reply can be used, and a note where there are some that
    cannot.
    """
    try:
        top = top_of(reply)
    except ValueError as error:
        return False, [f"the server's log-probabilities are not used ({error})"]
    if len(top) == 1:
        return False, [
            "the server's log-probabilities are not used: they are of the decoding, in which the"
            " likeliest token is certain"
        ]
    return len(top) > 1, []


def _sentence(
    connection: Connection, error: StatusError, model: str, listed: list[str] | None
) -> EndpointError:
    """Why the first request was refused."""
    if error.status in NO_KEY:
        return error
    about_model = error.code == "model_not_found" or "model" in error.said.lower()
    if error.status in (400, 404, 422) and about_model and model not in (listed or []):
        return EndpointError(_not_served(connection, model, listed))
    if error.status in (404, 405):
        parts = urlsplit(connection.url)
        root = f"{parts.scheme}://{parts.netloc}/v1"
        there = connection.url != root and connection.look(f"{root}/models")[0] not in (404, 405)
        better = f"give {root}" if there else "give the address before that, as of /v1"
        return EndpointError(f"{connection.url} has no {CHAT} (status {error.status}); {better}")
    return EndpointError(f"{error}: {error.said or 'it does not say why'}")


# ---- each prompt its own answer
def _probe(connection: Connection, model: str, limit: str, prompt: str) -> str:
    def read(reply: dict) -> str:
        check_name(connection, model, reply.get("model"))
        return answer_of(reply)["text"]

    return connection.post(CHAT, _body(connection, model, limit, prompt), read)


def _steadiness(
    connection: Connection, model: str, limit: str, probes: Sequence[str], alone: Sequence[str]
) -> list[str]:
    """A note where the probes' answers differ from one time to the next."""
    if len(set(alone)) == 1 < len(probes):
        what = "nothing" if not alone[0].strip() else "the same"
        raise EndpointError(
            f"{connection.url} answers {len(probes)} different prompts with {what}; look after the"
            " server"
        )
    order = random.Random(0).sample(range(len(probes)), len(probes))

    def work(i: int) -> str:
        return _probe(connection, model, limit, probes[i])

    together = dict(zip(order, connection.at_once(work, order), strict=True))
    others = [{text for text in alone if text != own} for own in alone]
    changed = [i for i in order if together[i] != alone[i]]
    if mixed := [i for i in changed if together[i] in others[i]]:
        raise EndpointError(
            f"{connection.url} gave {len(mixed)} of {len(probes)} prompts another prompt's answer"
            f" when {connection.settings.concurrency} were asked at once; ask one at a time"
            " (concurrency), or look after the server"
        )
    if not changed:
        return []
    return [
        f"the server's greedy answers to {len(changed)} of {len(probes)} prompts differ from one"
        " time to the next, so that part of any difference is its own noise"
    ]


def _since(
    connection: Connection,
    kept: KeptAnswers,
    model: str,
    limit: str,
    probes: Sequence[str],
    alone: Sequence[str],
    steady: bool,
) -> list[str]:
    """A note where a server that is not steady answers the probes otherwise than when answers were
    kept before; one that is steady is refused.
    """
    changed = 0
    for prompt, text in zip(probes, alone, strict=True):
        key = "probe " + request_digest(
            connection.url, CHAT, _body(connection, model, limit, prompt)
        )
        before = kept.get(key)
        if before is None:
            kept.keep(key, {"text": text, "steady": steady})
        elif before["text"] != text:
            changed += 1
            steady = steady and bool(before["steady"])
    if not changed:
        return []
    what = f"{connection.url} answers {changed} of {len(probes)} harmless prompts otherwise than"
    if steady:
        raise EndpointError(
            f"{what} when the answers in {kept.path} were kept: another model or another setting"
            " stands behind the name; keep this one's answers in another folder"
        )
    return [f"{what} when the first answers were kept, and is not steady"]
