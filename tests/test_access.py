"""Whether what a study names on the hub can be had: the hub's real client against a small hub of
our own, which says no in every way.
"""

import json
import logging
import socket
import threading
import traceback
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from conftest import one_sentence
from driftbook.study import access
from driftbook.study.sections import Source

COMMIT, MAIN, NOWHERE = "1" * 40, "2" * 40, "3" * 40
TOKEN = "hf_secretSECRETsecretSECRET"
CSV, JSON = b"prompt\nhow?\n", b'{"a": 1}\n'
HEX_PHI = "LLM-Tuning-Safety/HEx-PHI"


class Hub:
    """A hub on this machine. `repositories`: by kind and name, {files, gated}; `members`: tokens
    with access to what is gated.
    """

    def __init__(self):
        self.repositories = {
            ("dataset", "lab/set"): {
                "files": {
                    "data.csv": CSV,
                    "meta.json": JSON,
                    "load.py": b"1",
                    "w.bin": b"1",
                    "README.md": b"#",
                }
            },
            ("dataset", HEX_PHI): {"files": {"category_1.csv": CSV}, "gated": "manual"},
            ("model", "lab/model"): {"files": {"config.json": JSON, "model.safetensors": b"00"}},
            ("model", "lab/gated"): {"files": {"config.json": JSON}, "gated": "manual"},
            ("model", "lab/closed"): {
                "files": {},
                "gated": "manual",
                "hidden": True,
            },  # even its description
            ("model", "lab/off"): {"files": {}, "disabled": True},
        }
        self.members, self.known, self.broken, self.requests = set(), {TOKEN}, None, []
        self.torn = set()  # files that are listed and not there
        self.slow = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        self.slow.set()
        self.server.shutdown()
        self.server.server_close()
        close_session()  # with its open connections

    def answer(self, request):
        """What a broken hub answers, or else what the working one does."""
        path = unquote(urlsplit(request.path).path)
        self.requests.append(f"{request.command} {path}")
        gate = path.endswith("/auth-check")
        if self.broken == "slow" or (self.broken == "slow gate" and gate):
            self.slow.wait(20)
        if self.broken == "no gate" and gate:
            return self.no(request, 404)
        if isinstance(self.broken, int):
            return self.no(request, self.broken)
        if self.broken == "page":
            return self.yes(request, b"<html>Sign in to the Wi-Fi</html>")
        return self.admit(request, path)

    def admit(self, request, path):
        """Refuses whoever may not have what the path names, and answers all others."""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.known:
            return self.no(request, 401, "", "Invalid credentials in Authorization header")
        kind, name, what, rest = self.parse(path)
        found = self.repositories.get((kind, name))
        if found is None:
            return self.no(request, 404 if token else 401, "RepoNotFound")
        if found.get("disabled"):
            return self.no(request, 403, "", "Access to this resource is disabled.")
        closed = found.get("hidden") or what in ("auth-check", "resolve")
        if found.get("gated") and token not in self.members and closed:
            return self.no(request, 403 if token else 401, "GatedRepo")
        if what == "auth-check":
            return self.yes(request, b"{}")
        return self.show(request, name, found, what, rest)

    def show(self, request, name, found, what, rest):
        """The list of a repository's files, one of them, or the repository's description."""
        revision, _, file = rest.partition("/")
        if revision not in ("", COMMIT, MAIN):
            return self.no(request, 404, "RevisionNotFound")
        if what == "tree":
            listing = [
                {"type": "file", "path": path, "size": len(data), "oid": f"{number:040x}"}
                for number, (path, data) in enumerate(found["files"].items())
            ]
            return self.yes(request, json.dumps(listing).encode())
        if what == "resolve":
            if file not in found["files"] or file in self.torn:
                return self.no(request, 404, "EntryNotFound")
            tag = f'"{name.replace("/", "-")}-{file}"'
            headers = {"ETag": tag, "X-Repo-Commit": revision}
            return self.yes(request, found["files"][file], headers)
        info = {
            "id": name,
            "sha": revision or MAIN,
            "gated": found.get("gated", False),
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": file} for file in found["files"]],
        }
        return self.yes(request, json.dumps(info).encode())

    @staticmethod
    def parse(path):
        """Kind, name, what is asked and the rest of a path of the API (/api/models/LAB/NAME/...) or
        of a file (/datasets/LAB/NAME/resolve/...).
        """
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            kind, parts = parts[1][:-1], parts[2:]
        else:
            kind, parts = ("dataset", parts[1:]) if parts[0] == "datasets" else ("model", parts)
        return kind, "/".join(parts[:2]), parts[2] if parts[2:] else "", "/".join(parts[3:])

    def no(self, request, status, code="", message=""):
        self.send(request, status, {"X-Error-Code": code, "X-Error-Message": message}, b"")

    def yes(self, request, body, headers=None):
        self.send(request, 200, headers or {}, body)

    @staticmethod
    def send(request, status, headers, body):
        try:
            request.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                if value:
                    request.send_header(name, value)
            request.end_headers()
            request.wfile.write(body if request.command == "GET" else b"")
        except OSError:  # the client did not wait
            pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub, an empty cache, and nobody signed in. The client read its environment when it was
    imported, so its constants are set.
    """
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_OIDC_RESOURCE",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        constants, "HF_HUB_DISABLE_TELEMETRY", True
    )  # once a day the client asks for a list of its own
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "stored_tokens"))
    close_session()
    hub = Hub()
    yield hub
    hub.stop()


def source(name="lab/set", revision=COMMIT, **more):
    return Source(source=name, revision=revision, **more)


def states(found):
    """The state, after checking that the sentence is one and that ok goes with the state."""
    one_sentence(found.sentence)
    assert found.state in access.STATES
    assert found.ok == (found.state in access.OK)
    return found.state


def cached(tmp_path, kind, name, files, revision=COMMIT):
    """Files in the cache as transformers leaves them: without a list of what the repository has."""
    folder = tmp_path / "cache" / f"{kind}s--{name.replace('/', '--')}" / "snapshots" / revision
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    return folder


# ---- check
def test_what_is_not_on_the_hub_needs_no_request(hub, tmp_path):
    (tmp_path / "set.csv").touch()
    found = {
        "local": source("lab/none", path=str(tmp_path / "set.csv")),
        "wrong file": source("lab/none", path=str(tmp_path / "no.csv")),
        "made here": source("miniature:data/sft.json", None),
        "not checked": source("github:lab/repository/folder"),
        "wrong revision": source("github:lab/repository/folder", None),
        "unknown": source("tests:data", path="${NOT_SET_ANYWHERE}/data"),
    }
    assert {state: states(access.check(each, "dataset")) for state, each in found.items()} == {
        state: state for state in found
    }
    assert access.check(source("random:llama", None), "model").ok
    assert hub.requests == []


def test_what_is_open_takes_one_request(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    assert states(access.check(source("lab/model"), "model", hub.url)) == "reachable"
    assert (
        states(access.check(source(files=("data.csv", "*.json")), "dataset")) == "reachable"
    )  # the endpoint of the environment
    assert hub.requests == [
        f"GET /api/models/lab/model/revision/{COMMIT}",
        f"GET /api/datasets/lab/set/revision/{COMMIT}",
    ]


@pytest.mark.parametrize(
    ("kind", "name"), [("model", "lab/gated"), ("model", "lab/closed"), ("dataset", HEX_PHI)]
)
def test_gated(hub, kind, name):
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    nobody = access.check(source(name), kind, hub.url)
    assert states(nobody) == "no token"
    assert f"{name} is gated: sign in with `hf auth login` or set HF_TOKEN" in nobody.sentence
    stranger = access.check(source(name), kind, hub.url, TOKEN)
    assert states(stranger) == "gated"
    for found in (nobody, stranger):
        assert page in found.sentence
        assert "manual approval can take days" in found.sentence
        assert (
            "its own licence must be accepted" in found.sentence
            and "300 prompts today" in found.sentence
        ) == (name == HEX_PHI)
    hub.members.add(TOKEN)
    hub.requests.clear()
    assert states(access.check(source(name), kind, hub.url, TOKEN)) == "reachable"
    assert len(hub.requests) == 2


def test_a_gate_that_does_not_answer_and_a_mirror_without_one(hub, monkeypatch):
    monkeypatch.setattr(access, "TIMEOUT", 0.3)
    hub.broken = "slow gate"
    assert states(access.check(source("lab/gated"), "model", hub.url, TOKEN)) == "offline"
    hub.broken = "no gate"
    assert states(access.check(source("lab/gated"), "model", hub.url, TOKEN)) == "reachable"


def test_the_token_of_the_environment_is_used(hub, monkeypatch):
    hub.members.add(TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert states(access.check(source("lab/gated"), "model", hub.url)) == "reachable"


@pytest.mark.parametrize("token", [None, TOKEN])
def test_unknown_or_private(hub, token):
    found = access.check(source("lab/nothing"), "model", hub.url, token)
    assert states(found) == "unknown"
    assert ("sign in" in found.sentence) == (token is None)
    assert states(access.check(source("lab/model"), "dataset", hub.url, token)) == "unknown"
    assert "disabled" in access.check(source("lab/off"), "model", hub.url, token).sentence


def test_a_wrong_revision_is_told_with_the_commit_that_main_is_at(hub):
    for revision in (NOWHERE, "main", None, "abc123"):
        hub.requests.clear()
        found = access.check(source(revision=revision), "dataset", hub.url)
        assert states(found) == "wrong revision"
        assert MAIN in found.sentence
        assert len(hub.requests) <= 2


def test_wrong_files(hub):
    found = access.check(source(files=("data.csv", "prompts.csv")), "dataset", hub.url)
    assert states(found) == "wrong file"
    assert "prompts.csv" in found.sentence
    assert "data.csv" in found.sentence
    assert (
        states(access.check(source(files=("load.py",)), "dataset", hub.url)) == "wrong file"
    )  # there, and never fetched


@pytest.mark.slow
@pytest.mark.parametrize("broken", [500, 503, 429, "slow", "page", "stopped", "refused", "offline"])
def test_without_the_hub_only_a_whole_copy_at_the_very_commit_serves(
    hub, tmp_path, monkeypatch, broken
):
    endpoint, hub.broken = hub.url, broken
    monkeypatch.setattr(access, "TIMEOUT", 0.3)
    if broken == "stopped":
        hub.server.shutdown()
        hub.server.server_close()
    if broken == "refused":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    if broken == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def state(name, kind, **more):
        return states(access.check(source(name, **more), kind, endpoint))

    assert state("lab/model", "model") == state("lab/set", "dataset") == "offline"
    assert state("lab/model", "model", revision="main") == "wrong revision"
    cached(tmp_path, "model", "lab/model", {"config.json": "{}", "model.safetensors": ""}, MAIN)
    cached(
        tmp_path, "model", "lab/model", {"config.json": "{}"}
    )  # as left by a check of the configuration
    assert state("lab/model", "model") == "offline"
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    cached(
        tmp_path,
        "model",
        "lab/model",
        {"model.safetensors.index.json": json.dumps(index), "model-1-of-2.safetensors": ""},
    )
    found = access.check(source("lab/model"), "model", endpoint)
    assert "model-2-of-2.safetensors" in found.sentence
    assert not found.ok
    cached(tmp_path, "model", "lab/model", {"model-2-of-2.safetensors": ""})
    found = access.check(source("lab/model"), "model", endpoint)
    assert states(found) == "cached"
    assert COMMIT in found.sentence
    cached(tmp_path, "dataset", "lab/set", {"README.md": "", "a/data.csv": ""})
    assert state("lab/set", "dataset") == "cached"
    assert state("lab/set", "dataset", files=("a/*.csv",)) == "cached"
    assert state("lab/set", "dataset", files=("a/data.csv", "b.csv")) == "offline"


def test_all_at_once_and_never_an_exception(hub):
    names = [
        ("open", "model", source("lab/model")),
        ("gated", "model", source("lab/gated")),
        ("none", "dataset", source("lab/none")),
        ("made", "model", source("miniature:x", None)),
        ("odd", "space", source("lab/model")),
    ]
    table = access.check_all(iter(names), hub.url, workers=3)
    assert list(table) == ["name", "kind", "source", "revision", "state", "ok", "sentence"]
    assert table.name.tolist() == [name for name, _, _ in names]
    assert table.state.tolist() == ["reachable", "no token", "unknown", "made here", "unknown"]
    assert table.ok.tolist() == [True, False, False, True, False]
    assert table.ok.dtype == bool
    assert list(access.check_all([])) == list(table)


def test_a_hub_that_hangs_takes_as_long_for_many_sources_as_for_one(hub, monkeypatch):
    import time

    monkeypatch.setattr(access, "TIMEOUT", 0.5)
    hub.broken, begun = "slow", time.monotonic()
    table = access.check_all(
        [(str(number), "model", source("lab/model")) for number in range(8)], hub.url
    )
    assert (table.state == "offline").all()
    assert time.monotonic() - begun < 3


# ---- tokens
@pytest.mark.parametrize(
    "token",
    [TOKEN, "hf_expiredEXPIREDexpired", "hf_two\nLINES", "hf_ümlautUMLAUT", "hf with SPACES"],
)
@pytest.mark.parametrize("broken", [None, 500, "page", "stopped"])
def test_a_token_is_never_told(hub, monkeypatch, caplog, token, broken):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(constants, "HF_DEBUG", True)  # the client logs each request
    hub.broken, told = broken, []
    if broken == "stopped":
        hub.stop()
    for name, revision in (("lab/gated", COMMIT), ("lab/nothing", COMMIT), ("lab/model", NOWHERE)):
        found = access.check(source(name, revision), "model", hub.url, token)
        table = access.check_all([("x", "model", source(name, revision))], hub.url, token)
        with pytest.raises(ValueError) as error:
            access.fetch(source(name, revision), "model", ["*.json"], hub.url, token)
        one_sentence(error.value)
        assert error.value.__context__ is None  # an error of the client holds its request
        told += [
            repr(found),
            found.sentence,
            table.to_csv(),
            "".join(traceback.format_exception(error.value)),
        ]
        if token != TOKEN and broken is None:
            assert states(found) == "no token"
    told += [caplog.text, *(repr(record.args) for record in caplog.records)]
    secrets = {
        token,
        repr(token)[1:-1],
        ascii(token)[1:-1],
        *(part for part in token.split() if len(part) > 4),
    }
    assert not [text for text in told for secret in secrets if secret in text]


def test_a_password_in_the_address_of_a_hub_is_never_told(hub):
    hub.broken = 500
    sentence = one_sentence(
        access.check(source(), "dataset", hub.url.replace("//", "//user:passWORD@")).sentence
    )
    assert "127.0.0.1" in sentence
    assert "passWORD" not in sentence


# ---- fetch
def test_what_is_fetched_serves_when_the_hub_is_gone_and_a_warning_says_so(hub):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = access.fetch(source(), "dataset", ["data.csv", "meta.json"], hub.url)
    assert folder.name == COMMIT
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "data.csv": CSV,
        "meta.json": JSON,
    }
    assert states(access.check(source(files=("data.csv",)), "dataset", hub.url)) == "reachable"
    hub.stop()
    with pytest.warns(UserWarning, match="the cached copy") as told:
        assert access.fetch(source(), "dataset", ["data.csv", "meta.json"], hub.url) == folder
    assert COMMIT in one_sentence(told[0].message)
    assert states(access.check(source(files=("data.csv",)), "dataset", hub.url)) == "cached"
    with pytest.raises(
        ValueError, match=r"lacks README.md"
    ):  # known from the list of files that was kept
        access.fetch(source(), "dataset", ["*.csv", "*.md"], hub.url)


def test_offline_mode_serves_the_cached_copy(hub, monkeypatch):
    folder = access.fetch(source(), "dataset", ["*.csv"], hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    with pytest.warns(UserWarning, match="HF_HUB_OFFLINE is set; the cached copy"):
        assert access.fetch(source(), "dataset", ["*.csv"], hub.url) == folder
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set, and no copy"):
        access.fetch(source(revision=MAIN), "dataset", ["*.csv"], hub.url)
    assert hub.requests == []


def test_a_download_that_fails_leaves_what_is_cached(hub, tmp_path):
    folder = cached(tmp_path, "dataset", "lab/set", {"data.csv": "kept"})
    hub.repositories["dataset", "lab/set"]["files"]["more.csv"] = CSV
    hub.torn.add("more.csv")
    with pytest.raises(ValueError, match=r"more\.csv is missing"):
        access.fetch(source(), "dataset", ["*.csv"], hub.url)
    assert (folder / "data.csv").read_text() == "kept"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert access.fetch(source(), "dataset", ["data.csv"], hub.url) == folder


def test_files_that_run_code_are_never_fetched(hub):
    folder = access.fetch(source(), "dataset", ["*"], hub.url)
    assert {path.name for path in folder.iterdir()} == {"data.csv", "meta.json", "README.md"}
    with pytest.raises(ValueError, match=r"no w.bin"):
        access.fetch(source(), "dataset", ["w.bin"], hub.url)


def test_what_cannot_be_fetched_is_one_sentence(hub):
    for name, revision, words in (
        ("lab/none", COMMIT, "lab/none is on the hub"),
        ("lab/set", NOWHERE, MAIN),
        (HEX_PHI, COMMIT, "gated"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            access.fetch(source(name, revision), "dataset", ["*.csv"], hub.url)
        one_sentence(error.value)
    hub.torn.add("meta.json")
    with pytest.raises(ValueError, match=r"meta.json is missing") as error:
        access.fetch(source(), "dataset", ["*.csv", "*.json"], hub.url)
    one_sentence(error.value)


def test_fetch_of_what_is_not_on_the_hub(hub, tmp_path):
    assert access.fetch(source(path=str(tmp_path)), "dataset", ["*"]) == tmp_path
    for other in (
        source(path=str(tmp_path / "no")),
        source("miniature:data", None),
        source("github:lab/repository"),
    ):
        with pytest.raises(ValueError, match=r"correct or remove it|sources\.locate") as error:
            access.fetch(other, "dataset", ["*"])
        one_sentence(error.value)
    assert hub.requests == []
