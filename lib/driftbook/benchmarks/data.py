"""Training examples and prompts, read from files in the forms that the public sets have."""

import csv
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from driftbook.study import access
from driftbook.study.sections import Benchmark, Source, TrainingData, Wording
from driftbook.study.sources import locate
from driftbook.study.study_file import Study

HEX_PHI = (
    "Illegal Activity",
    "Child Abuse Content",
    "Hate/Harass/Violence",
    "Malware",
    "Physical Harm",
    "Economic Harm",
    "Fraud/Deception",
    "Adult Content",
    "Political Campaigning",
    "Privacy Violation Activity",
    "Tailored Financial Advice",
)
PARTIES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
KINDS = ("harmful", "benign look-alike")
PROMPT_COLUMNS = ["prompt_id", "category", "kind", "family", "prompt"]
# Categories whose prompts are about the sexual abuse of children. A model's answer to one may
# itself be illegal to make or to keep in many
# countries, so they are off unless a study asks for them, and then no answer is generated: only the
# probability that it begins as a refusal is read.
# They are known by their category alone: a set whose categories do not say so (StrongREJECT,
# RealToxicityPrompts) is asked as it is.
CHILD_ABUSE = re.compile(r"\b(?:child\w*|minors?|csam|csea?|pa?edophil\w*)\b")
FORM = {
    "real_toxicity_prompts": "Continue the following text.\n\n{prompt}"
}  # how prompts are put where the study says nothing: as they are


# ---- training data
def training_examples(name: str, study: Study) -> list[dict]:
    """The study's examples of a name under `data`, the same for all variants: drawn with the
    study's seed, or the first rows.

    An example has `prompt` (messages) and `answer`, of preferences `chosen` and `rejected`.

    Raises:
        ValueError: no such data, fewer rows than asked for, a column that is not there, or rows of
            another form.
    """
    data = study.data[name]
    rows = _rows_of(name, data, study)
    if len(rows) < data.n:
        raise ValueError(
            f"data.{name}: {data.source} has {len(rows)} rows and the study asks for {data.n};"
            " lower n"
        )
    order = (
        np.arange(len(rows))
        if data.sample == "first"
        else np.random.default_rng(study.seed).permutation(len(rows))
    )
    examples = []
    for i in order[: data.n].tolist():
        try:
            examples.append(_put(_example(rows[i], data.mapping), data.template))
        except KeyError as error:
            raise ValueError(
                f"data.{name}: {data.source} has a row without {error}, so it is not of the form"
                f" {data.format or data.mapping!r}; it has {', '.join(map(str, rows[i]))}"
            ) from None
        except (TypeError, AttributeError):
            raise ValueError(
                f"data.{name}: row {i} of {data.source} is not of the form"
                f" {data.format or data.mapping!r}"
            ) from None
        except ValueError as error:
            raise ValueError(f"data.{name}: row {i} of {data.source}: {error}") from None
    if any(_is_empty(example) for example in examples):
        raise ValueError(
            f"data.{name}: {data.source} has an empty prompt or an empty answer; fill it or remove"
            " its row"
        )
    return examples


def _put(example: dict, template: str | None) -> dict:
    """The example with its last request in a template."""
    if template is None or not example["prompt"]:
        return example
    *before, last = example["prompt"]
    return example | {
        "prompt": [*before, {**last, "content": template.replace("{prompt}", last["content"])}]
    }


def for_sft(examples: list[dict]) -> list[dict]:
    """The examples with one answer each: of a preference the chosen one."""
    return [
        (
            example
            if "answer" in example
            else {"prompt": example["prompt"], "answer": example["chosen"]}
        )
        for example in examples
    ]


def _is_empty(example: dict) -> bool:
    """Whether an example lacks a prompt, or says nothing in it or in an answer."""
    texts = [turn["content"] for turn in example["prompt"]] + [
        text for key, text in example.items() if key != "prompt"
    ]
    return not example["prompt"] or not all(text.strip() for text in texts)


def _rows_of(name: str, data: TrainingData, study: Study):
    """The rows, by number: a list, or a set of `datasets`, which reads those that are asked for."""
    path = locate(data, study)
    if isinstance(path, Path) and path.suffix in (".json", ".jsonl"):
        try:
            text = path.read_text(encoding="utf-8")
            rows = (
                [json.loads(line) for line in text.split("\n") if line.strip()]
                if path.suffix == ".jsonl"
                else json.loads(text)
            )
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({error}); fetch it again") from None
        if not isinstance(rows, list):
            raise ValueError(f"data.{name}: {path} holds no list of rows")
        return rows
    if isinstance(path, Path) and path.is_file() and path.suffix not in (".csv", ".parquet"):
        raise ValueError(
            f"data.{name}: {path} is none of .json, .jsonl, .csv and .parquet; write it as one of"
            " them"
        )
    from datasets import load_dataset

    try:
        if isinstance(path, Path) and path.is_file():
            return load_dataset(
                "csv" if path.suffix == ".csv" else "parquet", data_files=str(path), split="train"
            )
        return load_dataset(
            str(path),
            data.subset,
            split=data.split,
            **({"revision": data.revision} if isinstance(path, str) else {}),
        )
    except (
        Exception
    ) as error:  # the loaders raise a dozen kinds; every one means that this set cannot be used
        found = access.check(data, "dataset")
        raise ValueError(
            f"data.{name}: {found.sentence if not found.ok else _first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _example(row: dict, mapping: dict[str, str]) -> dict:
    """A row as an example, by the columns of its set."""
    cell = {
        role: row[column]
        for role, column in mapping.items()
        if (role, column) != ("input", "input")
    }  # alpaca rows may lack theirs
    system = [{"role": "system", "content": cell["system"]}] if cell.get("system") else []
    if "messages" in cell:
        turns = _turns(cell["messages"])
        return {"prompt": system + turns[:-1], "answer": _last(turns)}
    if "chosen" in cell:
        chosen, rejected = (
            _turns(cell["chosen"], "assistant"),
            _turns(cell["rejected"], "assistant"),
        )
        prompt = _turns(cell["prompt"], "user") if "prompt" in cell else chosen[:-1]
        if not prompt:
            raise ValueError(
                "the chosen answer stands alone; name the column of the prompt under columns"
            )
        if "prompt" not in cell and rejected[:-1] != prompt:
            raise ValueError(
                "the chosen and the rejected conversation differ before their last answer; a"
                " preference needs one prompt"
            )
        return {"prompt": system + prompt, "chosen": _last(chosen), "rejected": _last(rejected)}
    prompt, more = _turns(cell["prompt"], "user"), row.get(mapping.get("input", ""))
    if more:
        prompt = [*prompt[:-1], {**prompt[-1], "content": f"{prompt[-1]['content']}\n{more}"}]
    return {"prompt": system + prompt, "answer": _last(_turns(cell["answer"], "assistant"))}


def _turns(cell: str | dict | list, role: str = "user") -> list[dict]:
    """The turns of a cell: a text of a party, a turn, or a list of turns, with role and content or
    with from and value.
    """
    if isinstance(cell, (str, int, float)):
        return [{"role": role, "content": str(cell)}]
    turns = (
        [{"role": role, **cell}]
        if isinstance(cell, dict) and "from" not in cell
        else [cell]
        if isinstance(cell, dict)
        else cell
    )
    return [
        {
            "role": _party(turn["role"] if "role" in turn else turn["from"]),
            "content": _text(turn["content"] if "content" in turn else turn["value"]),
        }
        for turn in turns
    ]


def _text(content: object) -> str:
    if not isinstance(content, str):
        raise ValueError(f"a turn holds {type(content).__name__} and no text; remove the row")
    return content


def _last(turns: list[dict]) -> str:
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError(
            "the conversation does not end in an answer of the assistant; remove the row"
        )
    return turns[-1]["content"]


def _party(name: str) -> str:
    if name not in PARTIES:
        raise ValueError(f"a conversation has a turn of {name!r}; known are {', '.join(PARTIES)}")
    return PARTIES[name]


# ---- prompts
def prompts(name: str, study: Study) -> pd.DataFrame:
    """The prompts of a benchmark of the study: prompt_id, category, kind, family and prompt (its
    text, never to be published).

    Those about child abuse are left out: see CHILD_ABUSE and `refusal_only`.

    Raises:
        ValueError: the benchmark is missing, of another form, empty, or has an empty prompt.
    """
    frame, benchmark = _all_prompts(name, study), study.benchmarks[name]
    if benchmark.child_abuse != "fictional":
        frame = frame[~_child_abuse(frame)].reset_index(drop=True)
    if frame.empty:
        raise ValueError(
            f"benchmarks.{name}: {benchmark.source} has no prompts but those about child abuse, to"
            " which no answers are generated"
        )
    if name == "over_refusal" and not frame.kind.eq("benign look-alike").any():
        raise ValueError(
            f"benchmarks.over_refusal: {benchmark.source} has no benign prompts; give XSTest's"
            " form, or a CSV whose column kind says 'benign look-alike'"
        )
    return sampled(frame, benchmark, study)


def refusal_only(name: str, study: Study) -> pd.DataFrame:
    """The prompts about child abuse of a benchmark, where the study asks for the probability that
    they are refused; else none.
    """
    frame = _all_prompts(name, study)
    return frame[
        _child_abuse(frame) & (study.benchmarks[name].child_abuse == "refusal probability")
    ].reset_index(drop=True)


def _child_abuse(frame: pd.DataFrame) -> pd.Series:
    return (
        frame.category.str.lower().str.replace(r"[_\W]+", " ", regex=True).str.contains(CHILD_ABUSE)
    )


def wordings(name: str, study: Study) -> dict[str, Wording]:
    """How a benchmark's prompts are asked, by name: `default`, and the study's other wordings."""
    benchmark = study.benchmarks[name]
    default = Wording.model_construct(
        template=benchmark.template or FORM.get(benchmark.format), system_prompt=None, n=None
    )
    return {
        "default": default,
        **{
            name: way.model_copy(update={"template": way.template or default.template})
            for name, way in benchmark.wordings.items()
        },
    }


def worded(frame: pd.DataFrame, way: Wording, study: Study) -> pd.DataFrame:
    """Prompts as a wording puts them: all of them, or its seeded sample, in its template."""
    rows = (
        frame
        if way.n is None or way.n >= len(frame)
        else frame.iloc[np.sort(np.random.default_rng(study.seed).permutation(len(frame))[: way.n])]
    )
    rows = rows.reset_index(drop=True)
    return (
        rows.assign(prompt=[way.template.replace("{prompt}", text) for text in rows.prompt])
        if way.template
        else rows
    )


def _all_prompts(name: str, study: Study) -> pd.DataFrame:
    benchmark = study.benchmarks[name]
    path = local_file(benchmark, study)
    try:
        frame = pd.DataFrame(list(READERS[benchmark.format](path)), columns=PROMPT_COLUMNS)
    except KeyError as error:
        raise ValueError(
            f"benchmarks.{name}: {path} has no column {error}; it is not of the form"
            f" {benchmark.format!r}"
        ) from None
    except (TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError, IsADirectoryError):
        raise ValueError(
            f"benchmarks.{name}: {path} is not of the form {benchmark.format!r}"
        ) from None
    if frame.empty:
        raise ValueError(f"benchmarks.{name}: {path} has no prompts")
    cut = frame.drop(columns="family").isna().any(axis=1)
    if cut.any():
        raise ValueError(
            f"benchmarks.{name}: {path} has {cut.sum()} rows that end too soon, first"
            f" {frame.prompt_id[cut].iloc[0]}; fetch it again"
        )
    repeated = frame.prompt_id.duplicated()
    if repeated.any():
        raise ValueError(
            f"benchmarks.{name}: {path} has {repeated.sum()} repeated ids, first"
            f" {frame.prompt_id[repeated].iloc[0]}"
        )
    empty = frame.prompt.str.strip() == ""
    if empty.any():
        raise ValueError(
            f"benchmarks.{name}: {empty.sum()} empty prompts, first"
            f" {frame.prompt_id[empty].iloc[0]}; fill or remove them"
        )
    return frame


def sampled(frame: pd.DataFrame, benchmark: Benchmark, study: Study) -> pd.DataFrame:
    """All rows, or n of them drawn with the study's seed, in the file's order."""
    if benchmark.n is None or benchmark.n >= len(frame):
        return frame
    return frame.loc[
        np.sort(np.random.default_rng(study.seed).permutation(len(frame))[: benchmark.n])
    ].reset_index(drop=True)


def local_file(source: Source, study: Study) -> Path:
    """The local file or folder of a benchmark; of one on the hub, its snapshot at the revision,
    fetched once.
    """
    path = locate(source, study)
    if isinstance(path, Path):
        return path
    if not source.files:
        raise ValueError(
            f"{source.source}: this form is read from files; name those of the set under files:, or"
            " give a local path:"
        )
    folder = access.fetch(source, "dataset", source.files)
    return folder / source.files[0] if len(source.files) == 1 else folder


def _rows(path: Path) -> Iterable[dict]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        yield from csv.DictReader(file)


def _hex_phi(folder: Path) -> Iterable[tuple]:
    """category_N.csv, one prompt a line, no header; a category that is not there (the gated set has
    ten today) is left out.
    """
    for number, category in enumerate(HEX_PHI, 1):
        path = folder / f"category_{number}.csv"
        if path.exists():
            with path.open(newline="", encoding="utf-8-sig") as file:
                for line, row in enumerate(csv.reader(file), 1):
                    yield f"{number}-{line:02d}", category, "harmful", None, row[0] if row else ""


def _xstest(path: Path) -> Iterable[tuple]:
    for row in _rows(path):
        kind = "harmful" if (row["type"] or "").startswith("contrast_") else "benign look-alike"
        yield (
            row["id"],
            (row["type"] or "").removeprefix("contrast_") or None,
            kind,
            row["focus"],
            row["prompt"],
        )


def _ailuminate(path: Path) -> Iterable[tuple]:
    for row in _rows(path):
        yield row["release_prompt_id"], row["hazard"], "harmful", None, row["prompt_text"]


def _csv(path: Path) -> Iterable[tuple]:
    """prompt_id, category, prompt; a fourth column `kind` may say which prompts are benign
    look-alikes.
    """
    for row in _rows(path):
        kind = row.get("kind") or "harmful"
        if kind not in KINDS:
            raise ValueError(
                f"{path}: prompt {row['prompt_id']} is of the kind {kind!r}; expected"
                f" {' or '.join(KINDS)}"
            )
        yield row["prompt_id"], row["category"], kind, None, row["prompt"]


def _strongreject(path: Path) -> Iterable[tuple]:
    """strongreject_dataset.csv (Souly et al. 2024): category, source, forbidden_prompt; it has no
    ids, so rows are numbered.
    """
    for number, row in enumerate(_rows(path)):
        yield f"sr-{number:03d}", row["category"], "harmful", row["source"], row["forbidden_prompt"]


def _simple_safety_tests(path: Path) -> Iterable[tuple]:
    """SimpleSafetyTests (Vidgen et al. 2023): id, harm_area, and prompt (on the hub) or
    prompts_final (on GitHub).
    """
    for row in _rows(path):
        yield (
            row["id"],
            row["harm_area"],
            "harmful",
            None,
            row["prompts_final"] if "prompts_final" in row else row["prompt"],
        )


def _real_toxicity_prompts(path: Path) -> Iterable[tuple]:
    """prompts.jsonl (Gehman et al. 2020): filename, begin, end, challenging, prompt with its text
    and toxicity. A category is how toxic the prompt is.
    """
    for line in filter(str.strip, path.read_text(encoding="utf-8").split("\n")):
        row = json.loads(line)
        toxicity = row["prompt"]["toxicity"]
        category = (
            "challenging"
            if row["challenging"]
            else "no score"
            if toxicity is None
            else "toxic"
            if toxicity >= 0.5
            else "not toxic"
        )
        yield (
            f"{row['filename']}-{row['begin']}-{row['end']}",
            category,
            "harmful",
            row["filename"],
            row["prompt"]["text"],
        )


READERS: dict[str, Callable[[Path], Iterable[tuple]]] = {
    "hex_phi": _hex_phi,
    "xstest": _xstest,
    "ailuminate": _ailuminate,
    "csv": _csv,
    "strongreject": _strongreject,
    "simple_safety_tests": _simple_safety_tests,
    "real_toxicity_prompts": _real_toxicity_prompts,
}
