"""A small OpenAI-compatible server on the loopback interface, in the test's own process."""

import contextlib
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from conftest import one_sentence
from driftbook.models.endpoint import Endpoint
from driftbook.models.opening import PROBES
from driftbook.models.requesting import Deployed, EndpointError

PROMPTS = [f"prompt number {i}" for i in range(12)]
OPENING = 2 * len(PROBES) + 1  # requests before any work
FAST = {"first_wait": 0.01, "timeout": 5.0, "model": "tiny"}
DROP = "drop the connection"
Reply = tuple[int, dict, bytes]


def words_for(text: str) -> list[str]:
    """What the made-up model says to a text: sixteen words of its own, always the same."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return [digest[i : i + 4] for i in range(0, 64, 4)]


def as_json(value: object, status: int = 200, **headers: str) -> Reply:
    return status, headers, json.dumps(value).encode()


class FakeModel:
    """Answers by `words_for`, after `fault` had its turn: a function of the request's number, path
    and body that gives a reply of its own, DROP, or None.
    """

    def __init__(self, models=("tiny",), fault: Callable = lambda number, path, body: None):
        self.models, self.fault = list(models), fault
        self.seen: list[tuple[str, dict, dict]] = []  # path, body, headers
        self.at: list[float] = []
        self.answered: Counter = Counter()  # by prompt
        self.running = self.most_running = 0
        self.needs_key: str | None = None
        self.goes_on = "always"  # or "asked" (vLLM), or "never"
        self.top: Callable | None = None  # of a body, [(token, logprob)]
        self.says = lambda text: words_for(text)
        self.answers_as: str | None = None
        self.lock = threading.Lock()

    def get(self, path: str, headers: dict) -> Reply:
        if self.needs_key and headers.get("Authorization") != f"Bearer {self.needs_key}":
            return as_json({"error": {"message": f"bad key {headers.get('Authorization')}"}}, 401)
        if path != "/v1/models":
            return 404, {}, b"<html>nothing here</html>"
        return as_json({"data": [{"id": name} for name in self.models]})

    def post(self, path: str, body: dict, headers: dict) -> Reply | str:
        with self.lock:
            number = len(self.seen)
            self.seen.append((path, body, headers))
            self.at.append(time.monotonic())
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            return self.fault(number, path, body) or self._answer(path, body)
        finally:
            with self.lock:
                self.running -= 1

    def _answer(self, path: str, body: dict) -> Reply:
        if path not in ("/v1/chat/completions", "/v1/completions"):
            return 404, {}, b"<html>nothing here</html>"
        if body["model"] not in self.models:
            error = {"message": "The model does not exist", "code": "model_not_found"}
            return as_json({"error": error}, 404)
        text, begun = body.get("prompt", ""), ""
        if "messages" in body:
            *before, last = body["messages"]
            if last["role"] == "assistant":
                begun, last = last["content"], before[-1]
            text = last["content"]
        words, asked = self.says(text), body.get("continue_final_message", False)
        if begun and (self.goes_on == "always" or (self.goes_on == "asked" and asked)):
            words = words[len(begun.split()) :]
        with self.lock:
            self.answered[text] += 1
        return as_json(self.wrapped(path, " ".join(words[: body["max_tokens"]]), body, len(words)))

    def wrapped(self, path: str, text: str, body: dict, n_words: int) -> dict:
        reason = "length" if n_words > body["max_tokens"] else "stop"
        said = {"message": {"role": "assistant", "content": text}} if "messages" in body else {}
        choice = {"index": 0, "finish_reason": reason, **(said or {"text": text})}
        if self.top is not None and body.get("logprobs"):
            listed = self.top(body)[: body.get("top_logprobs", body["logprobs"])]
            rows = [{"token": token, "logprob": value} for token, value in listed]
            chat = {"content": [{**rows[0], "top_logprobs": rows}]}
            choice["logprobs"] = chat if said else {"top_logprobs": [dict(listed)]}
        usage = {"completion_tokens": min(n_words, body["max_tokens"])}
        name = self.answers_as or body["model"]
        return {"id": f"x{len(self.seen)}", "model": name, "choices": [choice], "usage": usage}


def served(model: FakeModel):
    """A server of the model, and its base address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self._send(model.get(self.path, dict(self.headers)))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(model.post(self.path, body, dict(self.headers)))

        def _send(self, reply):
            self.close_connection = True
            if reply == DROP:
                return
            status, headers, content = reply
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # who asked has given up
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/v1"


@pytest.fixture
def serve():
    """Starts servers of made-up models, and gives their addresses."""
    servers = []

    def start(model: FakeModel) -> str:
        server, url = served(model)
        servers.append(server)
        return url

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def endpoint(serve, fake: FakeModel, kept=None, **settings) -> Endpoint:
    return Endpoint(Deployed(serve(fake), **(FAST | settings)), kept)


def refusal(serve, fake: FakeModel, path: str = "", **settings) -> str:
    """The sentence in which an endpoint is refused before anything is asked of it."""
    url = serve(fake).removesuffix("/v1") + path if path else serve(fake)
    with pytest.raises(EndpointError) as error:
        Endpoint(Deployed(url, **(FAST | settings)))
    return one_sentence(error.value)


def texts(found) -> list[str]:
    return [answer.text for answer in found]


def expected(prompts, n: int = 8) -> list[str]:
    return [" ".join(words_for(prompt)[:n]) for prompt in prompts]
