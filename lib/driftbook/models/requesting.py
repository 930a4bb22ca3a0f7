"""Requests to an OpenAI-compatible server: settings, pauses, repeats, and one sentence where it
gives no answer.

No key is ever written: it is read from an environment variable into the client's header, and what
a server says is shown only of our own harmless prompts, without the key.
"""

import ipaddress
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

KEY_VARIABLE = "DRIFTBOOK_ENDPOINT_KEY"
BUSY = (408, 425, 429, 500, 502, 503, 504, 529)  # statuses after which a request is repeated
CROWDED = (429, 503, 529)  # those which say that nobody should ask just now
NO_KEY = (401, 403)
LONGEST_BACKOFF = 30.0  # seconds between two tries, where the server does not say how long
SHOWN = 160  # characters of what a server says

Read = TypeVar("Read")
Task = TypeVar("Task")
Done = TypeVar("Done")


class EndpointError(ValueError):
    """A server that cannot be asked, in one sentence; what it answered before is kept."""


class StatusError(EndpointError):
    """A request that the server refused for good, with its status and what it said."""

    def __init__(self, sentence: str, status: int, code: str, said: str):
        super().__init__(sentence)
        self.status, self.code, self.said = status, code, said


@dataclass(frozen=True)
class Deployed:
    """How a deployed model is asked.

    base_url: the address before /chat/completions (http://127.0.0.1:8000/v1); model: its name
    there (None: the only one it serves); system_prompt: of every prompt that brings none of its
    own; decoding: parameters of a greedy answer (the default), or those the model is deployed
    with, {} for the server's own; extra_body: more fields of each request (chat_template_kwargs, or
    vLLM's chat_template: a template of your own); key_variable: the environment variable that holds
    the key (where not given, KEY_VARIABLE, if it is set); answers_as: the name that the server's
    answers bear where it is another; concurrency: requests at once; timeout: seconds for one;
    attempts: tries of a request, first_wait seconds before the second and twice as many before each
    further one; longest_pause: seconds that a server may ask to wait (Retry-After); per_minute:
    the most requests in a minute.
    """

    base_url: str
    model: str | None = None
    system_prompt: str | None = None
    decoding: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0})
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    key_variable: str | None = None
    answers_as: str | None = None
    concurrency: int = 4
    timeout: float = 120.0
    attempts: int = 8
    first_wait: float = 0.5
    longest_pause: float = 300.0
    per_minute: float | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"endpoint {self.base_url!r} is no address; give one such as"
                " http://127.0.0.1:8000/v1"
            )
        if parts.username or parts.password or parts.query:
            raise ValueError(
                "the endpoint's address holds a user, a password or a query, which would be written"
                f" into results; give the key in the environment variable {KEY_VARIABLE}"
            )
        if self.concurrency < 1 or self.attempts < 1 or not self.timeout > 0:
            raise ValueError(
                f"concurrency={self.concurrency}, attempts={self.attempts}, timeout={self.timeout};"
                " expected at least 1 request, 1 try and some seconds"
            )
        if taken := sorted({"messages", "prompt", "model", "n", "stream"} & {*self.extra_body}):
            raise ValueError(f"extra_body holds {taken[0]!r}, which is not yours to set; remove it")

    @property
    def url(self) -> str:
        """The base address without what people paste behind it."""
        url = self.base_url.rstrip("/")
        return re.sub(r"/(chat/completions|completions|models)$", "", url).rstrip("/")


class Connection:
    """The requests of one run to one server; safe to use from several threads."""

    def __init__(self, settings: Deployed):
        self.settings, self.url = settings, settings.url
        self._key = _key(settings)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # a proxy of the environment cannot reach this machine's own addresses
        self._client = httpx.Client(
            headers=headers, timeout=settings.timeout, trust_env=not _is_loopback(self.url)
        )
        self._lock, self._free_at = threading.Lock(), 0.0
        self.n_requests = 0
        self._stopped = threading.Event()

    @property
    def shows_key(self) -> bool:
        """Whether the key travels unencrypted to another machine."""
        plain = self.url.startswith("http://") and not _is_loopback(self.url)
        return bool(self._key) and plain

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def look(self, url: str) -> tuple[int, Any]:
        """The status of a GET and its JSON; None where it is none.

        Raises:
            EndpointError: nothing listens there.
        """
        for attempt in range(self.settings.attempts):
            try:
                reply = self._client.get(url)
            except (httpx.TransportError, httpx.InvalidURL) as error:
                raise EndpointError(
                    f"there is no server at {self.url} ({_named(error, self.settings.timeout)});"
                    " start it, or correct the address"
                ) from None
            if reply.status_code not in (429, 503) or attempt + 1 == self.settings.attempts:
                break  # 503: it is still loading its model
            self._rest(self._pause(reply, attempt))
        return reply.status_code, _json(reply)

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        read: Callable[[dict], Read],
        attempts: int | None = None,
    ) -> Read:
        """What `read` makes of the reply to a request, which is sent again after a pause where the
        server is busy, breaks off, or says what `read` refuses with a ValueError.

        Raises:
            StatusError: the server refuses this request for good.
            EndpointError: all tries failed.
        """
        attempts, why = attempts or self.settings.attempts, ""
        for attempt in range(attempts):
            self._await_turn()
            wait, rest = self._pause(None, attempt), self._sleep
            try:
                reply = self._client.post(self.url + path, json=dict(body))
            except httpx.TransportError as error:
                why = _named(error, self.settings.timeout)
            else:
                if reply.is_success:
                    try:
                        return read(_object(reply))
                    except EndpointError:
                        raise
                    except ValueError as error:
                        why = str(error)
                elif reply.status_code in BUSY:
                    why, wait = f"status {reply.status_code}", self._pause(reply, attempt)
                    rest = self._rest if reply.status_code in CROWDED else self._sleep
                else:
                    raise self._refusal(reply)
            if attempt + 1 < attempts:
                rest(wait)
        times = "once" if attempts == 1 else f"{attempts} times"
        raise EndpointError(
            f"{self.url} gave no answer to a request that was sent {times} ({why}); what it"
            " answered before is kept: look after the server and run the same command again"
        )

    def wants_key(self, status: int) -> str:
        """What to say where the server lets nobody in."""
        have = "refuses the key" if self._key else "wants a key"
        variable = self.settings.key_variable or KEY_VARIABLE
        return f"{self.url} {have} (status {status}); set the environment variable {variable}"

    def at_once(self, work: Callable[[Task], Done], tasks: Sequence[Task]) -> list[Done]:
        """What `work` gives of each task, several at a time; the first error ends all of it, once
        the requests under way are answered.
        """
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            running = [pool.submit(work, task) for task in tasks]
            try:
                done, _ = wait(running, return_when=FIRST_EXCEPTION)
                failed = [one.exception() for one in running if one in done and one.exception()]
                if failed:
                    raise failed[0]
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)
                self._stopped.clear()
                raise
            return [one.result() for one in running]

    # ---- pauses
    def _await_turn(self) -> None:
        """Wait until another request may be sent: all threads rest where one was told to."""
        every = 60.0 / self.settings.per_minute if self.settings.per_minute else 0.0
        while True:
            with self._lock:
                wait = self._free_at - time.monotonic()
                if wait <= 0:
                    self._free_at = time.monotonic() + every
                    self.n_requests += 1
                    return
            self._sleep(wait)

    def _rest(self, seconds: float) -> None:
        """Sleep, and let all other threads wait as long with their next request."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic() + seconds)
        self._sleep(seconds)

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise EndpointError(f"no more is asked of {self.url}: another request failed for good")

    def _pause(self, reply: httpx.Response | None, attempt: int) -> float:
        """Seconds to wait: what the server asks for, else twice as long each time, by chance up to
        half as long again, so that those who were refused together do not come back together.
        """
        asked = None if reply is None else _retry_after(reply)
        if asked is None:
            first = self.settings.first_wait
            return min(LONGEST_BACKOFF, first * 2**attempt) * (1 + random.random() / 2)
        if asked > self.settings.longest_pause:
            raise EndpointError(
                f"{self.url} asks for a pause of {asked:.0f} seconds; what it answered before is"
                " kept: run the same command again after that"
            )
        return asked

    def _refusal(self, reply: httpx.Response) -> StatusError:
        status, (code, said) = reply.status_code, _said(reply)
        if status in NO_KEY:
            return StatusError(self.wants_key(status), status, code, "")
        if reply.is_redirect:
            said = f"it sends on to {reply.headers['location'][:SHOWN]}; give that address"
        said = said.replace(self._key, "...") if self._key else said
        sentence = f"{self.url} refuses a request (status {status}{f', {code}' if code else ''})"
        return StatusError(sentence, status, code, said)


# ---- what is read of a reply
def _key(settings: Deployed) -> str | None:
    name = settings.key_variable or KEY_VARIABLE
    key = os.environ.get(name, "").strip()
    if settings.key_variable and not key:
        raise EndpointError(f"the environment variable {name} is not set; put the key there")
    if not key.isprintable() or not key.isascii() or " " in key:
        raise EndpointError(f"the environment variable {name} holds no key: it has spaces or signs")
    return key or None


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _named(error: Exception, timeout: float) -> str:
    if isinstance(error, httpx.ConnectError):
        why = str(error).lower()
        if "certificate" in why or "ssl" in why:
            return "no encrypted connection is made: its certificate, or http where https is said"
        unknown = any(said in why for said in ("name or service", "name resolution", "nodename"))
        return "no such host" if unknown else "nothing listens there"
    if isinstance(error, httpx.TimeoutException):
        return f"no answer within {timeout:g} seconds"
    return f"the connection broke off: {type(error).__name__}"


def _json(reply: httpx.Response) -> Any:
    try:
        return reply.json()
    except ValueError:
        return None


def _object(reply: httpx.Response) -> dict:
    value = _json(reply)
    if not isinstance(value, dict):
        raise ValueError("its reply is no JSON object")
    return value


def _retry_after(reply: httpx.Response) -> float | None:
    """Seconds that a reply asks to wait: a number of them, or a date (RFC 9110, 10.2.3)."""
    given = reply.headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", given):
        return float(given)
    try:
        return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
    except ValueError:
        return None


def _said(reply: httpx.Response) -> tuple[str, str]:
    """The error code in a reply, and the first line of what it says."""
    value = _json(reply)
    error = value.get("error", value.get("detail", value)) if isinstance(value, dict) else value
    fields = error if isinstance(error, dict) else {}
    code = str(fields.get("code") or fields.get("type") or "")
    said = str(fields.get("message") or error or "").strip().partition("\n")[0][:SHOWN]
    return (code if re.fullmatch(r"[A-Za-z_]{3,40}", code) else ""), said
