"""Training examples and prompts, read from files in the forms that the public sets have."""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from driftbook.sources import locate
from driftbook.study import Benchmark, Source, Study, TrainingData

HEX_PHI = (
    "Illegal Activity", "Child Abuse Content", "Hate/Harass/Violence", "Malware", "Physical Harm", "Economic Harm", "Fraud/Deception",
    "Adult Content", "Political Campaigning", "Privacy Violation Activity", "Tailored Financial Advice",
)  # fmt: skip
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PROMPT_COLUMNS = ["prompt_id", "category", "kind", "family", "prompt"]


# ---- training data
def training_examples(name: str, study: Study) -> list[dict]:
    """The study's examples of `sft`, `dpo` or `heldout`: a sample of its size drawn with the study's seed, the same for all variants.

    An example has `prompt` (messages) and `answer`, of preferences `chosen` and `rejected`.

    Raises:
        ValueError: no such data, fewer rows than asked for, or rows of another form.
    """
    data = study.data[name]
    rows = _json_rows(data, study)
    if len(rows) < data.n:
        raise ValueError(f"data.{name}: {data.source} has {len(rows)} rows and the study asks for {data.n}; lower n")
    drawn = np.random.default_rng(study.seed).permutation(len(rows))[: data.n]
    read = {"alpaca": _alpaca, "preference": _preference, "gsm8k": _gsm8k}[data.format]
    try:
        examples = [read(rows[i]) for i in drawn]
    except KeyError as error:
        raise ValueError(f"data.{name}: {data.source} has a row without {error}; it is not of the form {data.format!r}") from None
    except (TypeError, AttributeError):
        raise ValueError(f"data.{name}: {data.source} has a row that is not of the form {data.format!r}") from None
    if any(_is_empty(example) for example in examples):
        raise ValueError(f"data.{name}: {data.source} has an empty prompt or an empty answer; fill it or remove its row")
    return examples


def _is_empty(example: dict) -> bool:
    """Whether an example lacks a prompt, or says nothing in it or in an answer."""
    texts = [turn["content"] for turn in example["prompt"]] + [text for key, text in example.items() if key != "prompt"]
    return not example["prompt"] or not all(text.strip() for text in texts)


def _json_rows(data: TrainingData, study: Study) -> list[dict]:
    path = locate(data, study)
    if isinstance(path, str):
        from datasets import load_dataset

        return list(load_dataset(path, revision=data.revision, split="train"))
    try:
        text = path.read_text()
        return [json.loads(line) for line in text.splitlines() if line] if path.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); fetch it again") from None


def _alpaca(row: dict) -> dict:
    text = row["instruction"] + (f"\n{row['input']}" if row.get("input") else "")
    return {"prompt": [{"role": "user", "content": text}], "answer": row["output"]}


def _gsm8k(row: dict) -> dict:
    return {"prompt": [{"role": "user", "content": row["question"]}], "answer": row["answer"]}


def _preference(row: dict) -> dict:
    prompt = [{"role": _role(turn["from"]), "content": turn["value"]} for turn in row["conversations"]]
    return {"prompt": prompt, "chosen": row["chosen"]["value"], "rejected": row["rejected"]["value"]}


def _role(name: str) -> str:
    if name not in ROLES:
        raise ValueError(f"a conversation has a turn of {name!r}; known are {', '.join(ROLES)}")
    return ROLES[name]


# ---- prompts
def prompts(name: str, study: Study) -> pd.DataFrame:
    """The prompts of a benchmark of the study: prompt_id, category, kind, family and prompt (its text, never to be published).

    Raises:
        ValueError: the benchmark is missing, of another form, empty, or has an empty prompt.
    """
    benchmark = study.benchmarks[name]
    path = local_file(benchmark, study)
    read: Callable[[Path], Iterable[tuple]] = {"hex_phi": _hex_phi, "xstest": _xstest, "ailuminate": _ailuminate, "csv": _csv}[benchmark.format]
    try:
        frame = pd.DataFrame(list(read(path)), columns=PROMPT_COLUMNS)
    except KeyError as error:
        raise ValueError(f"benchmarks.{name}: {path} has no column {error}; it is not of the form {benchmark.format!r}") from None
    if frame.empty:
        raise ValueError(f"benchmarks.{name}: {path} has no prompts")
    cut = frame.drop(columns="family").isna().any(axis=1)
    if cut.any():
        raise ValueError(f"benchmarks.{name}: {path} has {cut.sum()} rows that end too soon, first {frame.prompt_id[cut].iloc[0]}; fetch it again")
    repeated = frame.prompt_id.duplicated()
    if repeated.any():
        raise ValueError(f"benchmarks.{name}: {path} has {repeated.sum()} repeated ids, first {frame.prompt_id[repeated].iloc[0]}")
    empty = frame.prompt.str.strip() == ""
    if empty.any():
        raise ValueError(f"benchmarks.{name}: {empty.sum()} empty prompts, first {frame.prompt_id[empty].iloc[0]}; fill or remove them")
    return sampled(frame, benchmark, study)


def sampled(frame: pd.DataFrame, benchmark: Benchmark, study: Study) -> pd.DataFrame:
    """All rows, or n of them drawn with the study's seed, in the file's order."""
    if benchmark.n is None or benchmark.n >= len(frame):
        return frame
    return frame.loc[np.sort(np.random.default_rng(study.seed).permutation(len(frame))[: benchmark.n])].reset_index(drop=True)


def local_file(source: Source, study: Study) -> Path:
    """The local file or folder of a benchmark."""
    path = locate(source, study)
    if isinstance(path, str):
        raise ValueError(f"{source.source}: this form is read from files; give a github: source, or a local path:")
    return path


def _rows(path: Path) -> Iterable[dict]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        yield from csv.DictReader(file)


def _hex_phi(folder: Path) -> Iterable[tuple]:
    """category_N.csv, one prompt a line, no header; a category that is not there (the gated set has ten today) is left out."""
    for number, category in enumerate(HEX_PHI, 1):
        path = folder / f"category_{number}.csv"
        if path.exists():
            with path.open(newline="", encoding="utf-8-sig") as file:
                for line, row in enumerate(csv.reader(file), 1):
                    yield f"{number}-{line:02d}", category, "harmful", None, row[0] if row else ""


def _xstest(path: Path) -> Iterable[tuple]:
    for row in _rows(path):
        kind = "harmful" if (row["type"] or "").startswith("contrast_") else "benign look-alike"
        yield row["id"], (row["type"] or "").removeprefix("contrast_") or None, kind, row["focus"], row["prompt"]


def _ailuminate(path: Path) -> Iterable[tuple]:
    for row in _rows(path):
        yield row["release_prompt_id"], row["hazard"], "harmful", None, row["prompt_text"]


def _csv(path: Path) -> Iterable[tuple]:
    for row in _rows(path):
        yield row["prompt_id"], row["category"], "harmful", None, row["prompt"]
