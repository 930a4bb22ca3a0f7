"""Training examples and prompts, read from files in the forms that the public sets have."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from driftbook.benchmarks.formats import FORMATS
from driftbook.study import access
from driftbook.study.files import read_json
from driftbook.study.reading import columns_of, csv_rows, in_short, json_rows, line_rows
from driftbook.study.sections import GIVEN, Benchmark, Source, TrainingData, Wording
from driftbook.study.sources import locate
from driftbook.study.study_file import Study

PARTIES = {name: name for name in ("user", "assistant", "system")} | {
    "human": "user",
    "gpt": "assistant",
}
READERS = {".json": json_rows, ".jsonl": json_rows, ".csv": csv_rows, ".txt": line_rows}
PROMPT_COLUMNS = ["prompt_id", "category", "kind", "family", "prompt"]
# Categories of prompts about the sexual abuse of children. An answer to one may itself be illegal
# to make or to keep in many countries, so they are off unless a study asks for them, and then no
# answer is generated: only the probability that it begins as a refusal is read. They are known by
# their category alone, its words or Llama Guard's code S4: a set whose categories do not say so
# (StrongREJECT, RealToxicityPrompts) is asked as it is.
CHILD_ABUSE = re.compile(
    r"\b(?:(?:pre)?(?:teen|child|adolescen|juvenil|toddler|pa?edo)\w*|bab(?:y|ies)|kids?"
    r"|infants?|minors?|under ?age\w*|cs(?:am|ea?|ae|em)|loli\w*|shota\w*|grooming|s4)\b"
)


# ---- training data
def training_examples(name: str, study: Study) -> list[dict]:
    """The study's examples of a name under `data` and of those together with it, the same for all
    variants: drawn with the study's seed, or the first rows.

    An example has `prompt` (messages) and `answer`, of preferences `chosen` and `rejected`.

    Raises:
        ValueError: no such data, fewer rows than asked for, a column that is not there, or rows of
            another form.
    """
    found = [_examples_of(one, study) for one in study.together(name)]
    return [example for part in found for example in part]


def _examples_of(name: str, study: Study) -> list[dict]:
    data = study.data[name]
    rows = _rows_of(name, data, study)
    last = max([*data.leave_out, *((data.rows[1] - 1,) if data.rows else ())], default=-1)
    if last >= len(rows):
        raise ValueError(
            f"data.{name}: {data.source} has {len(rows)} rows, and rows or leave_out names row"
            f" {last}, counted from 0; correct it"
        )
    some = np.arange(len(rows))[slice(*data.rows) if data.rows else slice(None)]
    some = some[~np.isin(some, data.leave_out)]
    if len(some) < data.n:
        there = f"{len(some)} rows" + " there" * bool(data.rows)
        raise ValueError(
            f"data.{name}: {data.source} has {there} and the study asks for {data.n}; lower n"
        )
    random = np.random.default_rng(study.seed)
    order = some if data.sample == "first" else some[random.permutation(len(some))]
    said = _answers(name, data)
    examples, form = [], data.format or data.mapping
    for i in order[: data.n].tolist():
        try:
            row = {**rows[i], GIVEN: said[random.integers(len(said))]} if said else rows[i]
            examples.append(_put(_example(row, data.mapping), data.template))
        except KeyError as error:
            raise ValueError(
                f"data.{name}: {data.source} has a row without {error}, so it is not of the form"
                f" {form!r}; it has {columns_of(rows[i])}"
            ) from None
        except (TypeError, AttributeError):
            raise ValueError(
                f"data.{name}: row {i} of {data.source} is not of the form {form!r}"
            ) from None
        except ValueError as error:
            raise ValueError(f"data.{name}: row {i} of {data.source}: {error}") from None
    if any(_is_empty(example) for example in examples):
        raise ValueError(
            f"data.{name}: {data.source} has an empty prompt or an empty answer; fill it or remove"
            " its row"
        )
    return examples


def _answers(name: str, data: TrainingData) -> list[str]:
    """The texts of which each prompt of a set gets one as its answer; none where it has answers."""
    path = data.answers_path
    if path is None:
        return []
    try:
        said = read_json(path)
    except (FileNotFoundError, ValueError):
        said = None
    if not isinstance(said, list) or not said or not all(isinstance(one, str) for one in said):
        raise ValueError(f"data.{name}.answers: {path} is no JSON list of texts; give one")
    return said


def _put(example: dict, template: str | None) -> dict:
    """The example with its last request in a template."""
    if template is None or not example["prompt"]:
        return example
    *before, last = example["prompt"]
    content = template.replace("{prompt}", last["content"])
    return example | {"prompt": [*before, {**last, "content": content}]}


def for_sft(examples: list[dict]) -> list[dict]:
    """The examples with one answer each: of a preference the chosen one."""
    return [
        {"prompt": example["prompt"], "answer": example.get("answer", example.get("chosen"))}
        for example in examples
    ]


def _is_empty(example: dict) -> bool:
    """Whether an example lacks a prompt, or says nothing in it or in an answer."""
    texts = [turn["content"] for turn in example["prompt"]]
    texts += [text for key, text in example.items() if key != "prompt"]
    return not example["prompt"] or not all(text.strip() for text in texts)


def _rows_of(name: str, data: TrainingData, study: Study):
    """The rows, by number: a list, or a set of `datasets`, which reads those that are asked for."""
    path = locate(data, study)
    if isinstance(path, Path) and (path.is_dir() or path.suffix == ".parquet"):
        _check_pattern(name, path)
    if not isinstance(path, Path) or not path.is_file():
        revision = {} if isinstance(path, Path) else {"revision": data.revision}
        return _loaded(name, data, str(path), data.subset, split=data.split, **revision)
    if path.suffix == ".parquet":
        return _loaded(name, data, path.suffix[1:], data_files=str(path), split="train")
    if path.suffix not in READERS:
        raise ValueError(
            f"data.{name}: {path} is none of {', '.join(READERS)} and .parquet; write it as one of"
            " them"
        )
    try:
        return READERS[path.suffix](path)
    except ValueError as error:
        raise ValueError(f"data.{name}: {error}") from None


def _check_pattern(name: str, path: Path) -> None:
    """Raise a ValueError where `datasets` would take a path for a pattern, and read other files."""
    if mark := next((mark for mark in ("*", "?", "[", "::") if mark in str(path)), None):
        raise ValueError(
            f"data.{name}: the path {path} has {mark!r}, which the package datasets reads as a"
            " pattern; rename it"
        )


def _loaded(name: str, data: TrainingData, *arguments, **more):
    """A set as the package `datasets` reads it."""
    from datasets import load_dataset

    try:
        return load_dataset(*arguments, **more)
    except Exception as error:  # of a dozen kinds; every one means that this set cannot be used
        found = access.check(data, "dataset")
        said = found.sentence if not found.ok else _first_line(error)
        raise ValueError(f"data.{name}: {said}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _example(row: dict, mapping: dict[str, str]) -> dict:
    """A row as an example, by the columns of its set."""
    roles = [pair for pair in mapping.items() if pair != ("input", "input")]
    cell = {role: row[column] for role, column in roles}  # alpaca rows may lack their input
    system = [{"role": "system", "content": cell["system"]}] if cell.get("system") else []
    if "messages" in cell:
        turns = _turns(cell["messages"])
        return {"prompt": system + turns[:-1], "answer": _last(turns)}
    if "chosen" in cell:
        return _preference(cell, system)
    prompt, more = _turns(cell["prompt"], "user"), row.get(mapping.get("input", ""))
    if more:
        prompt = [*prompt[:-1], {**prompt[-1], "content": f"{prompt[-1]['content']}\n{more}"}]
    return {"prompt": system + prompt, "answer": _last(_turns(cell["answer"], "assistant"))}


def _preference(cell: dict, system: list[dict]) -> dict:
    """A row of a preference; without a column of its own the prompt is all but the last turn."""
    chosen, rejected = (_turns(cell[name], "assistant") for name in ("chosen", "rejected"))
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


def _turns(cell: str | dict | list, role: str = "user") -> list[dict]:
    """The turns of a cell: a text of a party, a turn, or a list of turns, with role and content or
    with from and value.
    """
    if isinstance(cell, (str, int, float)):
        return [{"role": role, "content": str(cell)}]
    if isinstance(cell, dict):
        cell = [cell if "from" in cell else {"role": role, **cell}]
    names = [("role" if "role" in turn else "from") for turn in cell]
    texts = [("content" if "content" in turn else "value") for turn in cell]
    return [
        {"role": _party(turn[name]), "content": _text(turn[text])}
        for turn, name, text in zip(cell, names, texts, strict=True)
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
        raise ValueError(
            f"a conversation has a turn of {in_short(name)}; known are {', '.join(PARTIES)}"
        )
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
    is_asked = study.benchmarks[name].child_abuse == "refusal probability"
    return frame[_child_abuse(frame) & is_asked].reset_index(drop=True)


def _child_abuse(frame: pd.DataFrame) -> pd.Series:
    words = frame.category.str.lower().str.replace(r"[_\W]+", " ", regex=True)
    return words.str.contains(CHILD_ABUSE)


def items(name: str, study: Study) -> pd.DataFrame:
    """The items of BBQ or of a utility benchmark of the study: all, or its seeded sample."""
    benchmark = study.benchmarks[name]
    return sampled(FORMATS[benchmark.format].read(local_file(benchmark, study)), benchmark, study)


def wordings(name: str, study: Study) -> dict[str, Wording]:
    """How a benchmark's prompts are asked, by name: `default`, and the study's other wordings."""
    benchmark = study.benchmarks[name]
    template = benchmark.template or FORMATS[benchmark.format].template
    ways = {"default": Wording.model_construct(template=template, system_prompt=None, n=None)}
    for other, way in benchmark.wordings.items():
        ways[other] = way.model_copy(update={"template": way.template or template})
    return ways


def worded(frame: pd.DataFrame, way: Wording, study: Study) -> pd.DataFrame:
    """Prompts as a wording puts them: all of them, or its seeded sample, in its template."""
    rows = sampled(frame, way, study).reset_index(drop=True)
    if not way.template:
        return rows
    return rows.assign(prompt=[way.template.replace("{prompt}", text) for text in rows.prompt])


def _all_prompts(name: str, study: Study) -> pd.DataFrame:
    benchmark = study.benchmarks[name]
    path = local_file(benchmark, study)
    where, form = f"benchmarks.{name}: {path}", repr(benchmark.format)
    try:
        rows = list(FORMATS[benchmark.format].read(path))
    except KeyError as error:
        raise ValueError(f"{where} has no column {error}; it is not of the form {form}") from None
    except (TypeError, AttributeError, OSError):
        raise ValueError(f"{where} is not of the form {form}") from None
    except ValueError as error:
        raise ValueError(f"benchmarks.{name} of the form {form}: {error}") from None
    frame = pd.DataFrame(rows, columns=PROMPT_COLUMNS)
    if frame.empty:
        raise ValueError(f"{where} has no prompts")
    cut = frame.prompt_id[frame.drop(columns="family").isna().any(axis=1)]
    if len(cut):
        raise ValueError(
            f"{where} has {len(cut)} rows that end too soon, first {in_short(cut.iloc[0])}; fetch"
            " it again"
        )
    repeated = frame.prompt_id[frame.prompt_id.duplicated()]
    if len(repeated):
        raise ValueError(
            f"{where} has {len(repeated)} repeated ids, first {in_short(repeated.iloc[0])}"
        )
    empty = frame.prompt_id[frame.prompt.str.strip() == ""]
    if len(empty):
        raise ValueError(
            f"benchmarks.{name}: {len(empty)} empty prompts, first {in_short(empty.iloc[0])}; fill"
            " or remove them"
        )
    return frame


def sampled(frame: pd.DataFrame, part: Benchmark | Wording, study: Study) -> pd.DataFrame:
    """All rows, or n of them drawn with the study's seed, in the file's order.

    Raises:
        ValueError: a benchmark's `rows` name rows that it does not have.
    """
    wanted = getattr(part, "rows", None)
    if wanted is not None and wanted[1] > len(frame):
        raise ValueError(f"{part.source} has {len(frame)} rows; rows asks for those to {wanted[1]}")
    if wanted is not None:
        frame = frame.iloc[slice(*wanted)].reset_index(drop=True)
    if part.n is None or part.n >= len(frame):
        return frame
    drawn = np.random.default_rng(study.seed).permutation(len(frame))[: part.n]
    return frame.iloc[np.sort(drawn)].reset_index(drop=True)


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
