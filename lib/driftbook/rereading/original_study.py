"""The original study (arXiv 2511.00382) as tables: read from its authors' public package, or from a
local folder reduced to numbers.

Both give the same two frames, runs and verdicts, and from them our declared tables. No prompt and
no response is kept: a file of the package is reduced, while it is read, to prompt index, verdict,
hazard codes and length of the response. Base models have no verdicts in it, only counts.
"""

import csv
import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from driftbook.benchmarks.hex_phi import CATEGORIES as HEX_PHI
from driftbook.study.files import ROOT, expanded, read_json, replacing, write_json

ORIGINAL_NAME = "original_study"
ORIGINAL_NOTE = "the original study, read again from its public data"
CITED = ROOT / "data" / ORIGINAL_NAME
REPOSITORY, ORIGINAL_COMMIT = (
    "replicationpackagetai/Replication-Package-TAI",
    "f03e76500457770f5bf81c951a4d98d07323586b",
)
LISTING, RAW = "https://api.github.com/repos", "https://raw.githubusercontent.com"
# the default local folder, where the variable is set
_LOCAL = f"${{DRIFTBOOK_SHARED}}/data/{ORIGINAL_NAME}"
JUDGE, BENCHMARK, SEED, BATCH_SIZE = "llama-guard-2", "safety", 42, 128
PER_CATEGORY = 30  # prompts in each category of HEx-PHI as it was then
ROUNDS = (1, 2, 3)
OBJECTIVE_SETTINGS = {
    "sft": (
        ("ultrachat_200k", 2e-5, 1),
        ("ultrafeedback_binarized", 2e-5, 1),
        ("ultrafeedback_binarized", 2e-5, 5),
        ("ultrafeedback_binarized", 1e-3, 5),
    ),
    "dpo": (("ultrafeedback_binarized", 2e-5, 5), ("ultrafeedback_binarized", 1e-3, 5)),
}
N_TRAIN = {
    ("sft", "ultrafeedback_binarized"): 20_785,
    ("sft", "ultrachat_200k"): 20_786,
}  # of DPO only the share is stated
METHOD_SETTINGS = {
    "lora": {
        "r": 4,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    },
    "ia3": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "prompt_tuning": {"num_virtual_tokens": 20, "init": "random"},
    "p_tuning": {
        "num_virtual_tokens": 20,
        "encoder": "MLP",
        "encoder_num_layers": 2,
        "encoder_dropout": 0,
    },
}
# an adapter that starts as the base model and ends within this share of its loss has learned
# nothing
SAME_LOSS = 0.002
KEYS = ["base_model", "method", "objective", "dataset", "learning_rate_labelled", "epochs", "round"]
RUN_COLUMNS = [
    "run",
    *KEYS,
    "learning_rate_true",
    "utility_1_to_10",
    "final_eval_loss",
    "first_logged_loss",
    "last_logged_loss",
]
VERDICT_COLUMNS = ["run", "prompt", "category", "verdict", "hazards", "response_chars"]

# how the package names things
MODELS = {
    "llama": "meta-llama/Meta-Llama-3-8B-Instruct",
    "mistral": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen": "Qwen/Qwen2.5-7B-Instruct",
    "gemma": "google/gemma-7b-it",
}
FOLDERS = {"LoRA": "lora", "IA3": "ia3", "PromptTuning": "prompt_tuning", "PTuning": "p_tuning"}
ARM = rf"Round(?P<round>\d)/(?P<method>{'|'.join(FOLDERS)})_(?P<objective>SFT|DPO)"
VERDICT_FILE = re.compile(
    rf"Data/Models_Reponses/Safety_Hex_PHI/{ARM}/(?P<dataset>[^/]+)/(?P<rest>.*_moderated\.csv)"
)
STATE_FILE = re.compile(
    rf"Data/Fine-Tuned_Models/{ARM}/(?P<model>[^/]+)/(?P<dataset>[^/]+)/"
    r"(?P<rest>lr_[^/]+/\d+e)/trainer_state\.json"
)
COLUMNS = (
    "response",
    "Moderation_Result",
    "Hazard_Types",
)  # of a verdict file; its prompts are not looked at
_VERDICTS = {"safe": "safe", "unsafe": "unsafe"}


# ---- where it is
def load(source: str = "") -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs and the verdicts, from a folder (reduced to numbers, or a checkout of the package),
    or as they are found.

    Without a folder: the local one that DRIFTBOOK_SHARED leads to, or the package on GitHub at the
    pinned commit, reduced as it arrives.

    Raises:
        ValueError: neither is there, or what is there is not of this form; one sentence.
    """
    folder = Path(expanded(source or _LOCAL) or _LOCAL).expanduser()
    if source and not folder.is_dir():
        raise ValueError(
            f"there is no folder {source}; give one with runs.csv and verdicts.csv.gz, or a"
            f" checkout of {REPOSITORY}, or none to fetch it"
        )
    if folder.is_dir():
        return reduced(folder) if (folder / "runs.csv").is_file() else package(folder)
    return fetched()


def reduced(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs and verdicts of a folder with runs.csv and verdicts.csv.gz, checked.

    Raises:
        ValueError: a file or a column is missing, a run has no verdicts, or a prompt was judged
            twice.
    """
    runs, verdicts = (
        _csv(folder / name, columns)
        for name, columns in (("runs.csv", RUN_COLUMNS), ("verdicts.csv.gz", VERDICT_COLUMNS))
    )
    return _checked(runs, verdicts, folder.name)


def _csv(path: Path, columns: list[str]) -> pd.DataFrame:
    if not path.is_file():
        raise ValueError(
            f"{path.parent} has no {path.name}; it is not the original study reduced to numbers"
        )
    try:
        frame = pd.read_csv(path)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again") from None
    if missing := [name for name in columns if name not in frame]:
        raise ValueError(f"{path} has no column {missing[0]!r}; expected {', '.join(columns)}")
    return frame[columns]


def _checked(
    runs: pd.DataFrame, verdicts: pd.DataFrame, where: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both frames, sorted, if they fit together."""
    n_prompts = PER_CATEGORY * len(HEX_PHI)
    counts = verdicts.groupby("run")["prompt"].agg(["size", "nunique"]).reindex(runs["run"])
    if (wrong := counts[counts["nunique"].ne(n_prompts) | counts["size"].ne(n_prompts)]).size:
        n = int(wrong["size"].fillna(0).iloc[0])
        raise ValueError(
            f"{where}: run {wrong.index[0]} has {n} verdicts of {n_prompts} prompts; each prompt of"
            " each run is judged once"
        )
    if (strange := set(runs["method"]) - set(METHOD_SETTINGS)) or (
        strange := set(runs["base_model"]) - set(MODELS.values())
    ):
        raise ValueError(
            f"{where}: {sorted(strange)[0]!r} is no method or base model of the original study"
        )
    if (twice := runs[runs.duplicated(KEYS)]).size:
        raise ValueError(f"{where}: run {twice['run'].iloc[0]} has the settings of another run")
    if strange := set(verdicts["verdict"].dropna()) - set(_VERDICTS):
        raise ValueError(
            f"{where}: {sorted(strange)[0]!r} is no verdict; expected safe, unsafe or nothing"
        )
    runs = runs.astype(dict.fromkeys(RUN_COLUMNS[len(KEYS) + 1 :], float)).sort_values(
        "run", ignore_index=True
    )
    return runs, verdicts.astype({"verdict": "string", "hazards": "string"}).sort_values(
        ["run", "prompt"], ignore_index=True
    )


# ---- the package's own files
def package(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs and verdicts of a checkout of the package (its folder Data is enough).

    Raises:
        ValueError: there is no verdict file, or one is of another form.
    """
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in (folder / "Data").rglob("*")
        if path.is_file()
    )
    return _joined((name, folder / name) for name in names if wanted(name))


def wanted(name: str) -> bool:
    """Whether a file is a verdict file or a trainer state of the study's main arm."""
    return bool(VERDICT_FILE.fullmatch(name) or STATE_FILE.fullmatch(name))


def _joined(files: Iterator[tuple[str, Path]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs and verdicts from files by name; each is read once and not held."""
    judged, states = {}, {}
    for name, path in files:
        if match := VERDICT_FILE.fullmatch(name):
            key = _settings(match, match["rest"], name)
            if key in judged:
                raise ValueError(
                    f"{name}: another file has verdicts of the same base model, settings and round;"
                    " remove one"
                )
            judged[key] = verdict_file(path, name)
        elif match := STATE_FILE.fullmatch(name):
            states[_settings(match, match["model"] + "/" + match["rest"], name)] = trainer_state(
                path, name
            )
    if not judged:
        raise ValueError(
            "there is no verdict file of the form"
            " Data/Models_Reponses/Safety_Hex_PHI/RoundN/METHOD_SFT/...; is this a checkout of"
            f" {REPOSITORY}?"
        )
    rows = [
        dict(zip(KEYS, key, strict=True), run=run) | states.get(key, {})
        for run, key in enumerate(sorted(judged))
    ]
    verdicts = pd.concat(
        [judged[key].assign(run=run) for run, key in enumerate(sorted(judged))], ignore_index=True
    )
    return _checked(
        pd.DataFrame(rows).reindex(columns=RUN_COLUMNS), verdicts[VERDICT_COLUMNS], "the package"
    )


def _settings(match: re.Match, rest: str, name: str) -> tuple:
    """What a file's name says of the run it belongs to, in the order of KEYS; the labelled rate is
    the folder's or the file's.
    """
    model = [full for word, full in MODELS.items() if word in rest.lower()]
    rate, epochs = (
        re.search(r"lr_(\d(?:\.\d+)?e-\d+)", rest),
        re.search(r"(?:^|[/_])(\d)e(?=[/_.]|$)", rest),
    )
    if len(model) != 1 or not (rate and epochs):
        raise ValueError(f"{name}: the name does not say base model, learning rate and epochs")
    objective, dataset = match["objective"].lower(), match["dataset"]
    return (
        model[0],
        FOLDERS[match["method"]],
        objective,
        dataset,
        float(rate[1]),
        int(epochs[1]),
        int(match["round"]),
    )


def verdict_file(path: Path, name: str) -> pd.DataFrame:
    """Prompt index, category, verdict, hazards and response length (characters) of a file of
    moderated responses.

    A verdict is the first line of the judge's reply; null where that is neither safe nor unsafe.

    Raises:
        ValueError: a column is missing, or the file has not one row for each prompt.
    """
    csv.field_size_limit(10_000_000)  # a response may be long
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.DictReader(file)
        if missing := [column for column in COLUMNS if column not in (rows.fieldnames or [])]:
            raise ValueError(f"{name} has no column {missing[0]!r}; expected {', '.join(COLUMNS)}")
        found = [
            _reduced_row(index, *(row[column] or "" for column in COLUMNS))
            for index, row in enumerate(rows)
        ]
    if len(found) != (expected := PER_CATEGORY * len(HEX_PHI)):
        raise ValueError(f"{name} has {len(found)} rows; expected {expected}, one for each prompt")
    return pd.DataFrame(found, columns=VERDICT_COLUMNS[1:])


def _reduced_row(index: int, response: str, reply: str, hazards: str) -> tuple:
    verdict = _VERDICTS.get(reply.strip().partition("\n")[0].strip().lower())
    codes = "|".join(re.findall(r"S\d+", hazards or reply)) or None
    return (
        index,
        index // PER_CATEGORY + 1,
        verdict,
        codes if verdict == "unsafe" else None,
        len(response),
    )


def trainer_state(path: Path, name: str) -> dict[str, float | None]:
    """The peak learning rate as the optimiser had it, and first, last and final held-out losses.

    The trainers used a cosine schedule without warm-up: rate(t) = peak (1 + cos(pi t / T)) / 2, so
    the first logged rate gives the peak.

    Raises:
        ValueError: it is no JSON, or has no log.
    """
    try:
        state = json.loads(path.read_text())
        log, steps = state["log_history"], state["max_steps"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{name} is no trainer state ({type(error).__name__}: {error}); fetch it again"
        ) from None
    losses = [entry["loss"] for entry in log if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    logged = next((entry for entry in log if entry.get("learning_rate")), None)
    peak = logged and float(
        f"{logged['learning_rate'] / (0.5 + 0.5 * math.cos(math.pi * logged['step'] / steps)):.1e}"
    )
    ends = (losses[0], losses[-1]) if losses else (None, None)
    return {
        "learning_rate_true": peak,
        "first_logged_loss": ends[0],
        "last_logged_loss": ends[1],
        "final_eval_loss": held_out[-1] if held_out else None,
    }


# ---- the package on GitHub
def fetched() -> tuple[pd.DataFrame, pd.DataFrame]:
    """The package at the pinned commit, reduced to numbers as it arrives; the numbers are kept, the
    files are not.

    Every file is checked against its git hash in the commit's listing. The listing and the files'
    SHA-256 are trusted on first use: no hash of them is known beforehand, so the first download
    writes them into registry.json beside the numbers, and a later one must agree with it.

    Raises:
        ValueError: it cannot be fetched, or a file is another one than was known.
    """
    import pooch

    pooch.get_logger().setLevel("WARNING")
    cache = Path(pooch.os_cache("driftbook")) / f"{ORIGINAL_NAME}-{ORIGINAL_COMMIT}"
    if (cache / "runs.csv").is_file():
        return reduced(cache)
    registry = read_json(cache / "registry.json") if (cache / "registry.json").is_file() else {}
    with TemporaryDirectory() as scratch:
        listed = json.loads(
            _retrieve(
                "listing",
                f"{LISTING}/{REPOSITORY}/git/trees/{ORIGINAL_COMMIT}?recursive=1",
                registry,
                Path(scratch),
            ).read_text()
        )
        if listed.get("truncated"):
            raise ValueError(
                f"GitHub's listing of {REPOSITORY} is not complete; clone it at {ORIGINAL_COMMIT}"
                " and give the folder as source"
            )
        blobs = {entry["path"]: entry["sha"] for entry in listed["tree"] if wanted(entry["path"])}
        runs, verdicts = _joined(_downloads(blobs, registry, Path(scratch)))
    write_json(cache / "registry.json", registry)
    with replacing(cache / "verdicts.csv.gz") as new:
        verdicts.to_csv(new, index=False, compression="gzip")
    with replacing(cache / "runs.csv") as new:  # last, since it says that all is there
        runs.to_csv(new, index=False)
    return runs, verdicts


def _downloads(
    blobs: dict[str, str], registry: dict[str, str], scratch: Path
) -> Iterator[tuple[str, Path]]:
    """Each file by name, deleted before the next one is fetched."""
    for name, blob in blobs.items():
        path = _retrieve(name, f"{RAW}/{REPOSITORY}/{ORIGINAL_COMMIT}/{name}", registry, scratch)
        content = path.read_bytes()
        if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != blob:
            raise ValueError(
                f"{name} is not the file of commit {ORIGINAL_COMMIT[:7]} (its git hash differs);"
                " fetch again"
            )
        yield name, path
        path.unlink()


def _retrieve(name: str, url: str, registry: dict[str, str], scratch: Path) -> Path:
    import pooch

    try:
        path = Path(
            pooch.retrieve(url, known_hash=registry.get(name), fname="download", path=scratch)
        )
    except ValueError:  # pooch's word for another hash
        raise ValueError(
            f"{name} of {REPOSITORY} is not the file that was fetched before (its SHA-256 differs"
            " from registry.json); find out why"
        ) from None
    except Exception as error:
        raise ValueError(
            f"cannot fetch {name} of {REPOSITORY} ({type(error).__name__}); go online, set"
            " DRIFTBOOK_SHARED, or give a folder as source"
        ) from None
    registry.setdefault(name, pooch.file_hash(str(path)))
    return path if name != "listing" else path.rename(scratch / "listing")


# ---- what was published
def cited(name: str) -> pd.DataFrame:
    """A table of data/original_study: effect_sizes, base_models or claims."""
    return pd.read_csv(CITED / f"{name}.csv")


def base_counts() -> pd.DataFrame:
    """Prompts judged safe of each base model and category: base_model, category, n_safe (of 30)."""
    wide = cited("base_models").set_index("base_model")
    long = wide[[f"safe_{number}" for number in range(1, len(HEX_PHI) + 1)]].set_axis(
        HEX_PHI, axis=1
    )
    return long.rename_axis(columns="category").stack().rename("n_safe").reset_index()
