"""The original study, read again: the package's own format on small files of made-up words, and on
the real numbers what was published of them.
"""

import functools
import gzip
import hashlib
import itertools
import json
import math
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata, ttest_ind

from conftest import one_sentence
from driftbook.benchmarks.data import HEX_PHI
from driftbook.figures import drawing, gallery
from driftbook.figures import original_study as original_figures
from driftbook.publishing import publish
from driftbook.rereading import original_analysis, original_claims, original_study
from driftbook.stats import terms
from driftbook.study.files import write_json
from driftbook.study.tables import TABLES

WORDS = ("brimla", "ostufen", "quarnel")  # made up: they must not be found in anything that is kept
N = 330
HEX = "Data/Models_Reponses/Safety_Hex_PHI"
LLAMA, MISTRAL, QWEN, GEMMA = (
    original_study.MODELS[name] for name in ("llama", "mistral", "qwen", "gemma")
)


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


FILES = {  # the names vary as the package's do
    f"{HEX}/Round1/LoRA_SFT/ultrafeedback_binarized/lr_2e-5/1e/lora_llama_ultrafeedback_hex_moderated.csv": moderated(
        unsafe=(3, 40), empty=(7,)
    ),
    f"{HEX}/Round1/LoRA_SFT/ultrafeedback_binarized/lr_1e-3/5e/lora_gemma-7b-it_ultrafeedback_binarized_hex_lr_1e-3_5e_moderated.csv": moderated(
        unsafe=range(90)
    ),
    f"{HEX}/Round2/PTuning_SFT/ultrachat_200k/Mistral-7B-Instruct-v0.3_ultrachat_200k_hex_lr_2e-5_1e_moderated.csv": (
        moderated()
    ),
    f"{HEX}/Round3/IA3_DPO/ultrafeedback_binarized/lr_1e-3/5e/Qwen2.5-7B-Instruct_ultrafeedback_binarized_hex_lr_1e-3_5e_moderated.csv": moderated(
        length=9
    ),
    f"{HEX}/Round3/IA3_DPO/ultrafeedback_binarized/lr_1e-3/5e/Qwen2.5-7B-Instruct_ultrafeedback_binarized_hex_lr_1e-3_5e.csv": (
        f"{WORDS[0]},{WORDS[1]}\n"
    ),
    "Data/Fine-Tuned_Models/Round1/LoRA_SFT/Meta-Llama-3-8B-Instruct/ultrafeedback_binarized/lr_2e-5/1e/trainer_state.json": state(
        2e-5
    ),
    "Data/Fine-Tuned_Models/Round1/LoRA_SFT/gemma-7b-it/ultrafeedback_binarized/lr_1e-3/5e/trainer_state.json": state(
        1e-3, held_out=()
    ),
    "Data/Fine-Tuned_Models/Round3/IA3_DPO/Qwen2.5-7B-Instruct/ultrafeedback_binarized/lr_1e-3/5e/trainer_state.json": state(
        2e-5
    ),
    "Data/CodeAlpaca/Round1/benchmark_outputs/hex_moderated/llama_ia3_lr2e-5_e1_hex_moderated.csv": (
        f"{WORDS[2]}\n"
    ),
}
FIRST = next(iter(FILES))


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
        (
            "Data/Fine-Tuned_Models/Round1/LoRA_SFT/Meta-Llama-3-8B-Instruct/ultrafeedback_binarized/lr_2e-5/1e/trainer_state.json",
            '{"log_history": [',
            ("no trainer state", "lr_2e-5"),
        ),
        (
            "Data/Fine-Tuned_Models/Round1/LoRA_SFT/Meta-Llama-3-8B-Instruct/ultrafeedback_binarized/lr_2e-5/1e/trainer_state.json",
            {"epoch": 1},
            ("no trainer state", "log_history"),
        ),
        (
            f"{HEX}/Round1/LoRA_SFT/ultrafeedback_binarized/lora_llama_hex_moderated.csv",
            moderated(),
            ("learning rate", "lora_llama"),
        ),
        (
            f"{HEX}/Round1/LoRA_SFT/ultrafeedback_binarized/lr_2e-5/1e/lora_Meta-Llama_again_hex_moderated.csv",
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
    """A server that speaks as GitHub does, of the small package; gives the folder that it serves."""
    root = tmp_path / "served"
    (root / "raw").mkdir(parents=True)
    target = root / "raw" / original_study.REPOSITORY / original_study.COMMIT
    target.parent.mkdir(parents=True)
    (package / "Data").rename(target.with_name("Data"))
    target.mkdir()
    target.with_name("Data").rename(target / "Data")
    tree = [
        {"path": path.relative_to(target).as_posix(), "sha": blob(path.read_bytes())}
        for path in target.rglob("*")
        if path.is_file()
    ]
    listing = root / "api" / original_study.REPOSITORY / "git" / "trees" / original_study.COMMIT
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
    served = github / "raw" / original_study.REPOSITORY / original_study.COMMIT / FIRST
    assert registry[FIRST] == hashlib.sha256(served.read_bytes()).hexdigest()
    monkeypatch.setattr(original_study, "RAW", "http://127.0.0.1:9")
    again = original_study.load()
    pd.testing.assert_frame_equal(again[1], verdicts, check_dtype=False)


def test_a_file_that_is_not_the_commits_is_refused_and_nothing_is_kept(github, tmp_path):
    served = github / "raw" / original_study.REPOSITORY / original_study.COMMIT / FIRST
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
    [listing] = (github / "api").rglob(original_study.COMMIT)
    write_json(listing, {"tree": [], "truncated": True})
    refused(original_study.load, "not complete", "clone")
    monkeypatch.setattr(original_study, "LISTING", "http://127.0.0.1:9")
    refused(original_study.load, "cannot fetch", "go online", "DRIFTBOOK_SHARED")
    assert not kept(tmp_path)


# ---- what was published
def test_the_cited_counts_are_the_published_percentages():
    bases = original_study.cited("base_models").set_index("base_model")
    totals = original_study.base_counts().groupby("base_model")["n_safe"].sum()
    assert (100 * totals / N).round(2).to_dict() == bases["safety_percent"].to_dict()
    for n in range(31):  # no two counts of 30 print the same percentage
        assert [k for k in range(31) if round(100 * k / 30, 1) == round(100 * n / 30, 1)] == [n]


def test_every_claim_of_the_ledger_is_cited_and_the_other_way_round(rows):
    assert set(original_study.cited("claims")["claim"]) == set(
        original_claims.ledger(rows, n_boot=50)
    )


# ---- the real numbers
@pytest.fixture(scope="module")
def real(shared):
    return original_study.load(str(shared / "original_study"))


@pytest.fixture(scope="module")
def rows(real):
    return original_analysis.frame(*real)


@pytest.fixture(scope="module")
def items(real):
    return original_study.items(*real)


def test_the_tables_are_declared_complete_and_agree_with_the_runs_own_percentages(real, shared):
    made = original_study.tables(*real)
    for name, frame in made.items():
        TABLES[name].check(frame)
    status = made["runs"]["status"].value_counts()
    assert status.to_dict() == {"ok": 260, "failed": 8}, "264 planned and four base models"
    lost = made["runs"][made["runs"]["status"].eq("failed")].merge(made["variants"], on="run_id")
    assert (lost["method"].eq("p_tuning") & lost["objective"].eq("dpo")).sum() == 6
    assert made["runs"]["findings"].notna().sum() == 28
    assert (made["rates"]["n"] - made["rates"]["n_scored"]).sum() == 9
    published = pd.read_csv(shared / "original_study" / "runs.csv").set_index("run")
    ids = dict(zip(original_study.run_ids(real[0]), real[0]["run"], strict=True))
    own = made["rates"][made["rates"]["run_id"].isin(ids)].assign(
        run=lambda part: part["run_id"].map(ids)
    )
    safe = (own["n_scored"] - own["k"]).astype(float)
    for number, category in enumerate(HEX_PHI, 1):
        ours = (100 * safe / 30)[own["category"].eq(category)].set_axis(
            own.loc[own["category"].eq(category), "run"]
        )
        np.testing.assert_allclose(
            ours.sort_index(), published[f"safe_pct_category_{number}"], atol=1e-4
        )
    np.testing.assert_allclose(
        100 / N * safe.groupby(own["run"]).sum(), published["safe_pct"], atol=1e-4
    )


def test_no_ops_are_ia3_by_sft_at_2e5_and_nothing_else(rows):
    assert rows["no_op"].sum() == 40
    assert rows["no_op"].equals(
        rows["method"].eq("ia3") & rows["objective"].eq("sft") & rows["rate"].lt(1e-4)
    )
    assert (rows["method"].eq("ia3") & rows["objective"].eq("sft")).sum() == 48


def test_no_ops_do_not_look_at_verdicts(real):
    runs, verdicts = real
    shuffled = verdicts.assign(
        verdict=verdicts["verdict"].sample(frac=1, random_state=0).to_numpy()
    )
    ours, other = (
        original_study.tables(runs, frame)["runs"]["no_op"] for frame in (verdicts, shuffled)
    )
    assert ours.equals(other)


def test_the_published_mean_changes_come_back(rows):
    """facts: mean change in safety over all runs, by method and base model."""
    printed = {
        "ia3": (-0.6, 0.4, 4.8, 1.6),
        "lora": (-1.6, -1.1, 9.1, 1.5),
        "p_tuning": (-23.2, -10.7, -19.6, -6.3),
        "prompt_tuning": (-6.5, -18.9, -10.0, 0.4),
    }
    found = original_analysis.changes(rows)
    found = found[
        found["group"].eq(terms.AS_CONFIGURED) & found["contrast"].eq(terms.CHANGE)
    ].set_index(["method", "base_model"])["value"]
    for method, values in printed.items():
        np.testing.assert_allclose(
            [found[method, base] for base in (GEMMA, LLAMA, MISTRAL, QWEN)], values, atol=0.06
        )


def test_six_of_the_published_statistics_come_back_to_every_digit(rows):
    found = original_analysis.reproduction(rows).set_index(["comparison", "statistic"])
    fence = next(name for name in found if "fence" in name)
    back = found[found["reproduced"].str.contains(fence, regex=False)]
    assert set(back.index) == set(found.index) - {
        ("ia3 against the base model", "r"),
        ("among the four methods", "W"),
    }
    assert found.loc[("ia3 against the base model", "r"), fence] == pytest.approx(0.641, abs=0.02)


def test_the_answers_show_the_wrong_labels(rows, items):
    """facts: 21 % equal lengths in round 3 against 0.4-0.9 %, IA3 26 % against 9 %; verdicts 94.7 %
    against 86.6 %.
    """
    found = (
        original_analysis.agreement(rows, items)
        .groupby(["method", "round"])[["same_length", "same_verdict"]]
        .mean()
    )
    assert found.loc[("lora", 3), "same_length"] == pytest.approx(21, abs=0.5)
    assert (found.loc[[("lora", 1), ("lora", 2)], "same_length"] < 1).all()
    assert found.loc[("ia3", 3), "same_length"] == pytest.approx(26, abs=0.5)
    assert found.loc[("ia3", 1), "same_length"] == pytest.approx(9, abs=0.5)
    assert found.loc[("lora", 3), "same_verdict"] == pytest.approx(94.7, abs=0.5)
    assert found.loc[[("lora", 1), ("lora", 2)], "same_verdict"].mean() == pytest.approx(
        86.6, abs=0.5
    )


def test_agreement_is_what_a_loop_over_prompts_counts(rows, items):
    found = original_analysis.agreement(rows, items).set_index("run_id")
    run = rows[rows["method"].eq("lora") & rows["labelled"].gt(1e-4)].iloc[5]
    others = rows[
        rows["method"].eq("lora")
        & rows["labelled"].lt(1e-4)
        & rows["base_model"].eq(run["base_model"])
        & rows["objective"].eq(run["objective"])
    ]
    others = others[others["dataset"].eq(run["dataset"]) & others["epochs"].eq(run["epochs"])]
    answers = {
        run_id: part.set_index("prompt_id")
        for run_id, part in items[items["run_id"].isin([run["run_id"], *others["run_id"]])].groupby(
            "run_id"
        )
    }
    own, shares = answers[run["run_id"]], []
    for other in others["run_id"]:
        shares.append(
            100
            * np.mean(
                [
                    own["response_chars"][prompt] == answers[other]["response_chars"][prompt]
                    for prompt in own.index
                ]
            )
        )
    assert found.loc[run["run_id"], "same_length"] == pytest.approx(np.mean(shares))


def test_rounds_drift_on_mistral_alone(rows):
    found = original_analysis.rounds(rows)
    np.testing.assert_allclose(
        found[found["base_model"].eq(MISTRAL)]["value"].astype(float), [-1.3, 6.1, 4.9], atol=0.06
    )
    p = found.groupby("base_model")["p"].first()
    assert p[MISTRAL] < 0.001 < 0.1 < p.drop(MISTRAL).min()


def test_true_rates_have_opposite_effects(rows):
    """facts: 2e-5 instead of 1e-3 by true labels, LoRA +4.5, P-Tuning +5.3, Prompt-Tuning -6.5, IA3
    -2.9 points of safety, over matched cells.
    """
    cells = (
        rows[rows["epochs"].eq(5)]
        .groupby(["method", "base_model", "objective", rows["rate"].lt(1e-4)])["change"]
        .mean()
        .unstack()
    )
    by_cell = (cells[True] - cells[False]).dropna().groupby("method").mean()
    found = original_analysis.rate_effects(rows)
    found = (
        found[found["base_model"].eq("all") & found["contrast"].str.contains("true")]
        .set_index("method")["value"]
        .astype(float)
    )
    np.testing.assert_allclose(found[by_cell.index], by_cell)
    np.testing.assert_allclose(
        found[["lora", "p_tuning", "prompt_tuning", "ia3"]], [4.5, 5.3, -6.5, -2.9], atol=0.06
    )


def test_a_run_whose_true_rate_is_not_known_takes_no_part_in_effects_of_true_rates(rows, items):
    unknown = rows["round"].eq(2) & rows["method"].eq("lora")
    hidden, dropped = (
        rows.assign(rate=rows["rate"].mask(unknown)),
        rows[~unknown].reset_index(drop=True),
    )
    values = [
        original_analysis.rate_effects(part)
        .query("contrast.str.contains('true') and method == 'lora'")["value"]
        .astype(float)
        for part in (hidden, dropped)
    ]
    np.testing.assert_allclose(*values)
    assert len(original_analysis.item_rows(hidden, items)) == len(items) - unknown.sum() * N


def test_the_ledger_of_the_real_study(rows):
    judged = original_claims.ledger(rows, n_boot=200)
    assert {
        judged[name].verdict for name in ("lora_preserves", "llama_stable", "rate_secondary")
    } == {original_claims.FALLS}
    assert {judged[name].verdict for name in ("p_tuning_degrades", "dpo_steadier")} == {
        original_claims.STANDS
    }
    assert judged["lora_preserves"].value == pytest.approx(-9.85, abs=0.01), (
        "LoRA by SFT at 1e-3 on Llama"
    )
    without = [one for one in judged.values() if one.value is None]
    assert [one.verdict for one in without] == [original_claims.OPEN] * 3
    assert all("needed" in one.how for one in without)
    shown = original_claims.table(original_claims.estimates(judged))
    assert shown["claim"].tolist() == original_study.cited("claims")["sentence"].tolist()
    assert sum(original_claims.counts(original_claims.estimates(judged)).values()) == len(shown)


# ---- the methods, against something not written here
def test_signed_rank_is_the_count_over_all_signs():
    """The exact p by its definition: the share of sign patterns whose statistic is as far out."""
    rng = np.random.default_rng(0)
    change = rng.normal(0.4, 1, 9)
    ranks = rankdata(np.abs(change))
    least = min(ranks[change > 0].sum(), ranks[change < 0].sum())
    patterns = np.array(list(itertools.product([0, 1], repeat=9))) @ ranks
    assert original_analysis.signed_rank(change)["p"] == pytest.approx(
        2 * np.mean(patterns <= least)
    )


@pytest.mark.parametrize(("n", "published"), [(16, 1.042), (12, 1.0066)])
def test_the_largest_r_is_what_was_published_of_gemma(n, published):
    assert original_analysis.largest_r(n) == pytest.approx(published, abs=0.0005)
    assert original_analysis.signed_rank(-np.arange(1, n + 1))["r"] == pytest.approx(
        original_analysis.largest_r(n)
    ), "every change in one direction, whatever its size"
    assert original_analysis.signed_rank(-np.arange(1, n + 1) * 1e-6)["r"] == pytest.approx(
        original_analysis.largest_r(n)
    )


def test_kendalls_w_from_its_ranks():
    """W = 12 S / (n^2 (k^3 - k)), with S the squared deviations of the rank sums (Kendall and
    Babington Smith 1939).
    """
    table = pd.DataFrame(np.random.default_rng(1).normal(size=(14, 4)) + np.array([0, 0.5, 1, 0]))
    sums = rankdata(table.to_numpy(), axis=1).sum(0)
    expected = 12 * ((sums - sums.mean()) ** 2).sum() / (14**2 * (4**3 - 4))
    assert original_analysis.friedman(table)["W"] == pytest.approx(expected)


def test_a_combination_of_two_pools_is_welchs_test():
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.normal(3, 1, 7), rng.normal(0, 9, 5)])
    frame = pd.DataFrame(
        {
            "change": values,
            "pool": ["a"] * 7 + ["b"] * 5,
            "setting": "one",
            "base_model": "x",
            "no_op": False,
            "round": 1,
        }
    )
    weight = pd.Series([1 / 7] * 7 + [-1 / 5] * 5)
    ours, theirs = (
        original_analysis.combination(frame, weight),
        ttest_ind(values[:7], values[7:], equal_var=False),
    )
    interval = theirs.confidence_interval(0.95)
    assert ours["p"] == pytest.approx(theirs.pvalue)
    assert (ours["ci_low"], ours["ci_high"]) == pytest.approx((interval.low, interval.high))
    wider = original_analysis.combination(frame, weight, level=0.99)
    assert (wider["ci_low"], wider["ci_high"]) == pytest.approx(
        tuple(theirs.confidence_interval(0.99))
    )


def test_without_a_repeated_setting_there_is_a_number_and_no_interval():
    frame = pd.DataFrame(
        {
            "change": [1.0, 2.0],
            "pool": "a",
            "setting": ["one", "two"],
            "base_model": "x",
            "no_op": False,
            "round": 1,
        }
    )
    found = original_analysis.combination(frame, pd.Series([0.5, 0.5]))
    assert found["value"] == 1.5
    assert found["se"] is found["ci_low"] is found["p"] is None
    assert "nothing was repeated" in found["how"]


def test_intervals_cover_when_methods_differ_in_spread():
    """Simulated rounds: four settings of three rounds, a spread of 1.4 points in one pool and 13 in
    the other; the mean difference is 2.
    """
    rng, hits, draws = np.random.default_rng(3), 0, 250
    frame = pd.DataFrame(
        {
            "pool": np.repeat(["a", "b"], 12),
            "setting": np.tile(np.repeat(list("wxyz"), 3), 2),
            "base_model": "x",
            "no_op": False,
            "round": 1,
        }
    )
    level, weight = (
        np.repeat([2.0, 0.0], 12) + np.tile(np.repeat([0.0, 5, -9, 4], 3), 2),
        pd.Series(np.repeat([1 / 12, -1 / 12], 12)),
    )
    for _ in range(draws):
        found = original_analysis.combination(
            frame.assign(change=level + rng.normal(0, np.repeat([1.4, 13.0], 12))), weight
        )
        hits += found["ci_low"] < 2 < found["ci_high"]
    assert abs(hits / draws - 0.95) < 3 * math.sqrt(0.95 * 0.05 / draws)


def test_matched_weights_compare_only_cells_that_both_have():
    frame = pd.DataFrame({"method": list("aaabbc"), "cell": [1, 1, 2, 1, 3, 1]})
    weight = original_analysis.matched_weight(
        frame, frame["method"].eq("a"), frame["method"].eq("b"), ["cell"]
    )
    assert weight.tolist() == [0.5, 0.5, 0, -1, 0, 0]
    nothing = original_analysis.matched_weight(
        frame, frame["method"].eq("b"), frame["method"].eq("b") & False, ["cell"]
    )
    assert not nothing.any()


def test_the_ratio_of_spreads_covers_its_truth():
    rng, hits = np.random.default_rng(4), 0
    frame = pd.DataFrame(
        {"arm": np.repeat(["a", "b"], 60), "cell": np.tile(np.repeat(np.arange(20), 3), 2)}
    )
    for draw in range(60):
        means = np.concatenate([2 * rng.normal(size=20), rng.normal(size=20)])
        change = np.repeat(means, 3) + rng.normal(size=120) * np.repeat([1.0, 0.5], 60)
        found = original_analysis.spread_ratio(
            frame.assign(change=change),
            frame["arm"].eq("a"),
            frame["arm"].eq("b"),
            ["cell"],
            200,
            draw,
        )
        hits += found["ci_low"] < 2 < found["ci_high"]
    assert hits >= 50, "of 60 95 % intervals"
    few = original_analysis.spread_ratio(
        frame[frame["cell"].lt(2)].assign(change=1.0),
        frame["arm"].eq("a"),
        frame["arm"].eq("b"),
        ["cell"],
        10,
        0,
    )
    assert few["value"] is None
    assert "2 common configurations" in few["how"]


def test_the_screen_over_categories_is_benjamini_and_hochbergs(rows):
    from statsmodels.stats.multitest import multipletests

    found = original_analysis.by_category(rows)
    wide = found[found["contrast"].eq(original_analysis.CHANGE_WIDE)]
    np.testing.assert_allclose(
        wide["p_adjusted"].astype(float), multipletests(wide["p"].astype(float), method="fdr_bh")[1]
    )
    assert found.loc[found["contrast"].eq(terms.CHANGE), "p_adjusted"].isna().all()


# ---- the ledger on studies whose truth is known
def invented(rows, effect, noise=0.3) -> pd.DataFrame:
    """The real study's grid with changes by a rule (of method, base_model, objective, rate), noise
    of rounds, and base models scored well.
    """
    rng = np.random.default_rng(5)
    values = np.array([effect(row) for row in rows.itertuples()], float) + rng.normal(
        0, noise, len(rows)
    )
    return rows.assign(change=values, **dict.fromkeys(HEX_PHI, values))


def verdicts_of(rows, effect) -> dict[str, str]:
    return {
        name: one.verdict
        for name, one in original_claims.ledger(invented(rows, effect), n_boot=200).items()
    }


def test_where_the_claims_are_true_they_stand(rows):
    loss = {"lora": 1.0, "ia3": 1.0, "prompt_tuning": -9.0, "p_tuning": -12.0}
    found = verdicts_of(
        rows,
        lambda row: loss[row.method] - 4 * (row.base_model == GEMMA and row.method.startswith("p")),
    )
    assert {
        found[name]
        for name in (
            "lora_preserves",
            "ia3_preserves",
            "prompt_tuning_degrades",
            "p_tuning_degrades",
            "gemma_steepest",
        )
    } == {original_claims.STANDS}


def test_where_the_claims_are_false_they_fall(rows):
    found = verdicts_of(
        rows,
        lambda row: (
            {"lora": -8.0, "ia3": -8.0, "prompt_tuning": 4.0, "p_tuning": 4.0}[row.method]
            + 12 * (row.rate < 1e-4) * (row.method == "lora")
        ),
    )
    assert {found[name] for name in ("lora_preserves", "ia3_preserves", "rate_secondary")} == {
        original_claims.FALLS
    }
    assert {found[name] for name in ("prompt_tuning_degrades", "p_tuning_degrades")} == {
        original_claims.FALLS
    }


def test_where_nothing_happens_no_decline_is_found(rows):
    found = verdicts_of(rows, lambda row: 0.0)
    assert found["llama_stable"] == original_claims.STANDS
    assert found["gemma_steepest"] != original_claims.STANDS
    assert found["categories_decline"] != original_claims.STANDS


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.1, 2, original_claims.STANDS),
        (-2, -0.1, original_claims.FALLS),
        (-1, 1, original_claims.OPEN),
        (None, None, original_claims.OPEN),
    ],
)
def test_an_interval_decides(low, high, verdict):
    assert original_claims.decide(low, high) == verdict


# ---- what is published
@pytest.fixture(scope="module")
def finished(real, rows, items, tmp_path_factory):
    """The study's folder as notebook 20 leaves it."""
    folder = tmp_path_factory.mktemp("finished") / original_study.NAME
    made = original_study.tables(*real)
    parts = [
        original_analysis.of_tests(rows, original_analysis.reproduction(rows)),
        original_analysis.of_agreement(original_analysis.agreement(rows, items)),
        original_analysis.cells(rows),
        original_analysis.single_runs(rows),
        original_analysis.rounds(rows),
        original_claims.estimates(original_claims.ledger(rows, n_boot=50)),
    ]
    original_study.write(made, TABLES["estimates"].concat(parts), folder)
    return folder


def test_every_figure_is_drawn_again_from_what_is_published(finished, tmp_path):
    files = publish.publish(finished, tmp_path / "published", original_study.NOTE)
    assert not any("verdict" in path.name for path in files)
    shown = gallery.read(tmp_path / "published" / "tables")
    names = [
        name
        for name, module in ((name, one.__module__) for name, one in drawing.FIGURES.items())
        if module == original_figures.__name__
    ]
    assert len(names) == 6
    for name in names:
        gallery.draw(name, shown, tmp_path / "figures")
        assert (tmp_path / "figures" / f"{name}.md").read_text().count("20_original_study") == 1


def test_the_sum_of_what_is_published_holds_no_single_verdict(finished):
    """Counts per run and category, contrasts, and agreements: the items stay at home."""
    assert sorted(path.name for path in finished.rglob("*.parquet")) == [
        "curves.parquet",
        "original_study.parquet",
        "prompts.parquet",
        "rates.parquet",
        "runs.parquet",
        "variants.parquet",
    ]
    rates = TABLES["rates"].read(finished / "tables")
    assert rates["n"].eq(30).all()


# ---- the models' rows
def test_the_rows_of_the_models_have_the_studys_numbers(rows, items):
    long = original_analysis.category_rows(rows)
    np.testing.assert_allclose(
        long.groupby("run_id")["difference"].mean()[rows["run_id"]], rows["change"], atol=1e-9
    )
    np.testing.assert_allclose(long.groupby("method")["log10_rate"].mean(), 0, atol=1e-12)
    asked = original_analysis.item_rows(rows, items)
    assert len(asked) == len(items)
    np.testing.assert_allclose(
        100
        * asked["safe"].fillna(False).astype(float).groupby(asked["run_id"]).mean()[rows["run_id"]],
        rows["safety"],
    )
