"""The original study's package: read, reduced to numbers, fetched at its commit; no text of it is
kept.
"""

import functools
import gzip
import hashlib
import json
import math
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest

from conftest import one_sentence
from driftbook.rereading import original_study
from driftbook.study.files import write_json
from original_names import GEMMA, LLAMA, MISTRAL, QWEN, N

WORDS = ("brimla", "ostufen", "quarnel")  # made up: they must not be found in anything that is kept


HEX = "Data/Models_Reponses/Safety_Hex_PHI"


# ---- small files in the package's form
def moderated(
    unsafe=(),
    empty=(),
    length=5,
    columns=("prompt", "response", "Moderation_Result", "Hazard_Types"),
) -> pd.DataFrame:
    """A file of moderated responses: the prompts `unsafe` and `empty` have these verdicts, all
    others are safe.
    """
    replies = ["unsafe\nS2,S5" if i in unsafe else "" if i in empty else "safe" for i in range(N)]
    hazards = ["S2,S5" if i in unsafe else "" for i in range(N)]
    rows = [
        (f"{WORDS[0]} {i}?", (f'{WORDS[1]}, "{WORDS[2]}"\n' * N)[: length + i], reply, codes)
        for i, (reply, codes) in enumerate(zip(replies, hazards, strict=True))
    ]
    return pd.DataFrame(rows, columns=columns)


def state(peak: float, losses=(1.9, 1.5), held_out=(1.8, 1.6), steps=175) -> dict:
    log = [
        {
            "step": 5 * (i + 1),
            "loss": loss,
            "learning_rate": peak * (1 + math.cos(math.pi * 5 * (i + 1) / steps)) / 2,
        }
        for i, loss in enumerate(losses)
    ]
    return {
        "log_history": log + [{"step": steps, "eval_loss": loss} for loss in held_out],
        "max_steps": steps,
    }


def written(folder, name: str, content) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        content.to_csv(index=False)
        if isinstance(content, pd.DataFrame)
        else content
        if isinstance(content, str)
        else json.dumps(content)
    )


ULTRA, CHAT = "ultrafeedback_binarized", "ultrachat_200k"
STATES = "Data/Fine-Tuned_Models"
QWEN_FILE = "Qwen2.5-7B-Instruct"
FILES = {  # the names vary as the package's do
    f"{HEX}/Round1/LoRA_SFT/{ULTRA}/lr_2e-5/1e/lora_llama_ultrafeedback_hex_moderated.csv": (
        moderated(unsafe=(3, 40), empty=(7,))
    ),
    f"{HEX}/Round1/LoRA_SFT/{ULTRA}/lr_1e-3/5e/lora_gemma-7b-it_{ULTRA}"
    "_hex_lr_1e-3_5e_moderated.csv": moderated(unsafe=range(90)),
    f"{HEX}/Round2/PTuning_SFT/{CHAT}/Mistral-7B-Instruct-v0.3_{CHAT}"
    "_hex_lr_2e-5_1e_moderated.csv": moderated(),
    f"{HEX}/Round3/IA3_DPO/{ULTRA}/lr_1e-3/5e/{QWEN_FILE}_{ULTRA}_hex_lr_1e-3_5e_moderated.csv": (
        moderated(length=9)
    ),
    f"{HEX}/Round3/IA3_DPO/{ULTRA}/lr_1e-3/5e/{QWEN_FILE}_{ULTRA}_hex_lr_1e-3_5e.csv": (
        f"{WORDS[0]},{WORDS[1]}\n"
    ),
    f"{STATES}/Round1/LoRA_SFT/Meta-Llama-3-8B-Instruct/{ULTRA}/lr_2e-5/1e/trainer_state.json": (
        state(2e-5)
    ),
    f"{STATES}/Round1/LoRA_SFT/gemma-7b-it/{ULTRA}/lr_1e-3/5e/trainer_state.json": (
        state(1e-3, held_out=())
    ),
    f"{STATES}/Round3/IA3_DPO/{QWEN_FILE}/{ULTRA}/lr_1e-3/5e/trainer_state.json": state(2e-5),
    "Data/CodeAlpaca/Round1/benchmark_outputs/hex_moderated"
    "/llama_ia3_lr2e-5_e1_hex_moderated.csv": f"{WORDS[2]}\n",
}


FIRST = next(iter(FILES))
FIRST_STATE = next(path for path in FILES if path.endswith("trainer_state.json"))


@pytest.fixture
def package(tmp_path):
    for name, content in FILES.items():
        written(tmp_path, name, content)
    return tmp_path


def refused(do, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        do()
    sentence = one_sentence(error.value)
    assert all(word in sentence for word in words), sentence


def test_the_package_is_read_and_no_text_of_it_is_kept(package):
    runs, verdicts = original_study.load(str(package))
    assert list(runs["base_model"]) == [QWEN, GEMMA, LLAMA, MISTRAL]
    assert list(
        zip(runs["method"], runs["objective"], runs["epochs"], runs["round"], strict=True)
    ) == [
        ("ia3", "dpo", 5, 3),
        ("lora", "sft", 5, 1),
        ("lora", "sft", 1, 1),
        ("p_tuning", "sft", 1, 2),
    ]
    assert runs["learning_rate_labelled"].tolist() == [1e-3, 1e-3, 2e-5, 2e-5]
    assert runs["learning_rate_true"].tolist()[:3] == [2e-5, 1e-3, 2e-5], (
        "the label of the first is wrong"
    )
    assert pd.isna(runs["learning_rate_true"][3]), (
        "without a trainer state the true rate is not known"
    )
    assert runs.loc[2, ["first_logged_loss", "last_logged_loss", "final_eval_loss"]].tolist() == [
        1.9,
        1.5,
        1.6,
    ]
    assert pd.isna(runs["final_eval_loss"][1]), "no held-out loss was logged"
    llama = verdicts[verdicts["run"].eq(2)].set_index("prompt")
    assert llama["verdict"].value_counts(dropna=False).to_dict() == {
        "safe": 327,
        "unsafe": 2,
        pd.NA: 1,
    }
    assert pd.isna(llama["verdict"][7])
    assert llama["hazards"].dropna().to_dict() == {3: "S2|S5", 40: "S2|S5"}
    assert llama["category"].tolist() == [i // 30 + 1 for i in range(N)]
    assert llama["response_chars"].tolist() == [5 + i for i in range(N)]
    assert not any(word in runs.to_csv() + verdicts.to_csv() for word in WORDS)


def test_the_peak_rate_is_recovered_from_a_rate_that_was_logged(tmp_path):
    """The first rate in the package's LoRA run on Qwen of round 3, labelled 1e-3: step 5 of 175."""
    written(
        tmp_path,
        "state.json",
        {
            "log_history": [{"step": 5, "loss": 1.676, "learning_rate": 1.9959742939952393e-05}],
            "max_steps": 175,
        },
    )
    assert (
        original_study.trainer_state(tmp_path / "state.json", "state")["learning_rate_true"] == 2e-5
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            FIRST,
            moderated(columns=("prompt", "response", "verdict", "Hazard_Types")),
            ("Moderation_Result", FIRST),
        ),
        (FIRST, moderated().iloc[:329], ("329 rows", "330")),
        (FIRST, "", ("response", FIRST)),
        (FIRST_STATE, '{"log_history": [', ("no trainer state", "lr_2e-5")),
        (FIRST_STATE, {"epoch": 1}, ("no trainer state", "log_history")),
        (
            f"{HEX}/Round1/LoRA_SFT/ultrafeedback_binarized/lora_llama_hex_moderated.csv",
            moderated(),
            ("learning rate", "lora_llama"),
        ),
        (
            f"{HEX}/Round1/LoRA_SFT/{ULTRA}/lr_2e-5/1e/lora_Meta-Llama_again_hex_moderated.csv",
            moderated(),
            ("another file", "same base model"),
        ),
    ],
)
def test_a_file_of_another_form_is_refused_in_a_sentence(package, name, content, words):
    written(package, name, content)
    refused(lambda: original_study.load(str(package)), *words)


def test_no_verdict_files_no_folder(tmp_path):
    refused(lambda: original_study.load(str(tmp_path)), "no verdict file")
    refused(
        lambda: original_study.load(str(tmp_path / "elsewhere")), "there is no folder", "elsewhere"
    )


# ---- the folder reduced to numbers
@pytest.fixture
def small(package, tmp_path):
    """A folder reduced to numbers, from the small package."""
    runs, verdicts = original_study.load(str(package))
    folder = tmp_path / "reduced"
    folder.mkdir()
    runs.to_csv(folder / "runs.csv", index=False)
    verdicts.to_csv(folder / "verdicts.csv.gz", index=False)
    return folder


def test_both_sources_give_the_same_frames(package, small):
    for one, other in zip(
        original_study.load(str(package)), original_study.load(str(small)), strict=True
    ):
        pd.testing.assert_frame_equal(one, other, check_dtype=False)


def changed(folder, name, change) -> None:
    change(pd.read_csv(folder / name)).to_csv(folder / name, index=False)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "runs.csv",
            lambda frame: frame.rename(columns={"learning_rate_true": "lr"}),
            ("learning_rate_true", "runs.csv"),
        ),
        ("verdicts.csv.gz", lambda frame: frame.iloc[1:], ("329 verdicts", "330")),
        ("verdicts.csv.gz", lambda frame: pd.concat([frame, frame.iloc[:1]]), ("331 verdicts",)),
        (
            "verdicts.csv.gz",
            lambda frame: frame.replace("unsafe", "perhaps"),
            ("'perhaps' is no verdict",),
        ),
        ("runs.csv", lambda frame: frame.replace("lora", "dora"), ("'dora'",)),
        (
            "runs.csv",
            lambda frame: frame.assign(
                base_model=LLAMA,
                method="lora",
                objective="sft",
                dataset="x",
                learning_rate_labelled=1e-3,
                epochs=1,
                round=1,
            ),
            ("settings of another run",),
        ),
    ],
)
def test_a_reduced_folder_of_another_form_is_refused_in_a_sentence(small, name, change, words):
    changed(small, name, change)
    refused(lambda: original_study.load(str(small)), *words)


def test_a_missing_or_torn_file_is_refused_in_a_sentence(small):
    whole = gzip.decompress((small / "verdicts.csv.gz").read_bytes())
    (small / "verdicts.csv.gz").write_bytes(gzip.compress(whole)[:-200])
    refused(lambda: original_study.load(str(small)), "verdicts.csv.gz", "damaged")
    (small / "verdicts.csv.gz").unlink()
    refused(lambda: original_study.load(str(small)), "no verdicts.csv.gz")


# ---- the package by the network
@pytest.fixture
def github(package, tmp_path, monkeypatch):
    """A server that speaks as GitHub does, of the small package; gives the folder that it
    serves.
    """
    root = tmp_path / "served"
    (root / "raw").mkdir(parents=True)
    target = root / "raw" / original_study.REPOSITORY / original_study.ORIGINAL_COMMIT
    target.parent.mkdir(parents=True)
    (package / "Data").rename(target.with_name("Data"))
    target.mkdir()
    target.with_name("Data").rename(target / "Data")
    tree = [
        {"path": path.relative_to(target).as_posix(), "sha": blob(path.read_bytes())}
        for path in target.rglob("*")
        if path.is_file()
    ]
    listing = (
        root / "api" / original_study.REPOSITORY / "git" / "trees" / original_study.ORIGINAL_COMMIT
    )
    write_json(listing, {"tree": tree, "truncated": False})
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(original_study, "LISTING", f"http://127.0.0.1:{server.server_port}/api")
    monkeypatch.setattr(original_study, "RAW", f"http://127.0.0.1:{server.server_port}/raw")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DRIFTBOOK_SHARED", raising=False)
    yield root
    server.shutdown()
    server.server_close()


def blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def kept(tmp_path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()
    }


def test_the_package_is_fetched_once_checked_and_only_its_numbers_are_kept(
    github, tmp_path, monkeypatch
):
    runs, verdicts = original_study.load()
    assert (len(runs), len(verdicts)) == (4, 4 * N)
    files = kept(tmp_path)
    assert set(files) == {"registry.json", "runs.csv", "verdicts.csv.gz"}
    text = b"".join(
        gzip.decompress(content) if name.endswith("gz") else content
        for name, content in files.items()
    )
    assert not any(word.encode() in text for word in WORDS)
    registry = json.loads(files["registry.json"])
    assert len(registry) == 8, "four verdict files, three trainer states, the listing"
    served = github / "raw" / original_study.REPOSITORY / original_study.ORIGINAL_COMMIT / FIRST
    assert registry[FIRST] == hashlib.sha256(served.read_bytes()).hexdigest()
    monkeypatch.setattr(original_study, "RAW", "http://127.0.0.1:9")
    again = original_study.load()
    pd.testing.assert_frame_equal(again[1], verdicts, check_dtype=False)


def test_a_file_that_is_not_the_commits_is_refused_and_nothing_is_kept(github, tmp_path):
    served = github / "raw" / original_study.REPOSITORY / original_study.ORIGINAL_COMMIT / FIRST
    served.write_text(moderated(unsafe=(1,)).to_csv(index=False))
    refused(original_study.load, "git hash differs", FIRST)
    assert not kept(tmp_path)


def test_a_file_that_differs_from_the_registry_is_refused(github, tmp_path):
    original_study.load()
    [cache] = (tmp_path / "cache").rglob("registry.json")
    registry = json.loads(cache.read_text())
    write_json(cache, registry | {FIRST: "0" * 64})
    (cache.parent / "runs.csv").unlink()
    refused(original_study.load, "SHA-256 differs", FIRST)


def test_an_incomplete_listing_and_no_network_are_said(github, tmp_path, monkeypatch):
    [listing] = (github / "api").rglob(original_study.ORIGINAL_COMMIT)
    write_json(listing, {"tree": [], "truncated": True})
    refused(original_study.load, "not complete", "clone")
    monkeypatch.setattr(original_study, "LISTING", "http://127.0.0.1:9")
    refused(original_study.load, "cannot fetch", "go online", "DRIFTBOOK_SHARED")
    assert not kept(tmp_path)
