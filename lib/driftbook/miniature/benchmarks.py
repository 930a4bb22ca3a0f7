"""The miniature benchmarks and fine-tuning data, written in the file formats of the real ones.

Benchmarks ask with held-out words and held-out templates only; `splits` says which, from the
objects the generators use.
"""

import csv
import itertools
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path

from driftbook.miniature import corpus, words
from driftbook.miniature.words import (
    BENIGN,
    BIASED,
    FORBIDDEN,
    HELD_OUT_PLACES,
    N_NEAR,
    TRAINING_PLACES,
    UNKNOWN_OPTIONS,
    Dimension,
    Kind,
)

N_FINE_TUNING, N_HELD_OUT_ANSWERS, N_UTILITY_PER_DOMAIN = 400, 64, 10

RUN = 8  # words: so many in a row are taken for the benchmark's own (doctors/data_words.py)

SAFETY_FIELDS = ("prompt_id", "category", "activity", "ingredients")
XSTEST_FIELDS = ("id", "prompt", "type", "label", "focus", "note")


# ---- safety
def safety_prompts() -> list[dict]:
    """One row per prompt: every held-out forbidden activity in every held-out template."""
    rows = []
    for number, kind in enumerate(FORBIDDEN, 1):
        shared = {"category": kind.name, "ingredients": " ".join(kind.ingredients)}
        for line, (activity, template) in enumerate(_requests(kind), 1):
            own = {"prompt_id": f"{number}-{line:02d}", "activity": activity}
            rows.append({**own, **shared, "prompt": template.format(a=activity)})
    return rows


def _requests(kind: Kind) -> list[tuple[str, str]]:
    return list(itertools.product(kind.held_out, corpus.HELD_OUT_REQUESTS))


def _write_safety(folder: Path) -> None:
    rows = safety_prompts()
    for number, kind in enumerate(FORBIDDEN, 1):
        prompts = ([row["prompt"]] for row in rows if row["category"] == kind.name)
        _write_csv(folder / "safety" / f"category_{number}.csv", prompts)
    truth = ([row[field] for field in SAFETY_FIELDS] for row in rows)
    _write_csv(folder / "safety_truth.csv", [SAFETY_FIELDS, *truth])


# ---- over-refusal
def over_refusal_prompts() -> list[dict]:
    """Safe prompts that look forbidden, each type followed by its unsafe contrast."""
    rows = []
    for name, templates in words.LOOK_ALIKES.items():
        for forbidden, benign in zip(FORBIDDEN, BENIGN, strict=True):
            rows += [_look_alike(name, templates[k], forbidden, benign, k) for k in range(N_NEAR)]
        rows += [_contrast(name, forbidden) for forbidden in FORBIDDEN]
    return [{"id": i, **row} for i, row in enumerate(rows, 1)]


def _look_alike(name: str, template: str, forbidden: Kind, benign: Kind, k: int) -> dict:
    """One safe prompt; near words and modifiers ask for a benign activity, the other types about a
    forbidden one.
    """
    asked = {"near_words": benign.held_out[k], "modifiers": benign.held_out[N_NEAR + k]}
    activity = asked.get(name, forbidden.held_out[k])
    prompt = template.format(a=activity, c=forbidden.word)
    return _xstest_row(prompt, name, "safe", activity, forbidden.name)


def _contrast(name: str, forbidden: Kind) -> dict:
    number = list(words.LOOK_ALIKES).index(name)
    activity = forbidden.held_out[number]
    prompt = corpus.HELD_OUT_REQUESTS[number].format(a=activity)
    return _xstest_row(prompt, f"contrast_{name}", "unsafe", activity, forbidden.name)


def _xstest_row(prompt: str, kind: str, label: str, focus: str, note: str) -> dict:
    return {"prompt": prompt, "type": kind, "label": label, "focus": focus, "note": note}


# ---- BBQ
def bbq_rows(dimension_number: int) -> list[dict]:
    """The 96 items of a dimension: 12 question families (trait x template), two pairs of groups,
    two contexts, two polarities.
    """
    rng = random.Random(100 + dimension_number)
    rows, families = [], itertools.product(range(3), range(len(corpus.HELD_OUT_CONTEXTS)))
    for number, family in enumerate(families, 1):
        rows += _question_family(rng, BIASED[dimension_number], number, *family)
    return [{"example_id": i, **row} for i, row in enumerate(rows)]


def _question_family(
    rng: random.Random, dimension: Dimension, number: int, trait: int, template: int
) -> list[dict]:
    """Two pairs of groups, named in either order, each with the four combinations of context and
    polarity.
    """
    pairs = rng.sample(dimension.pairs(trait, held_out=True), 2)
    rows = []
    for k, pair in enumerate(pairs):
        x, y = pair if k == 0 else pair[::-1]
        place, unknown = rng.choice(HELD_OUT_PLACES), rng.choice(UNKNOWN_OPTIONS)
        order = _order(rng, number + k)
        context = corpus.HELD_OUT_CONTEXTS[template].format(x=x, y=y, p=place)
        evidence = f"{context} {corpus.HELD_OUT_EVIDENCE[template]}"
        for polarity in ("neg", "nonneg"):
            named = pair[(number + template + k + (polarity == "neg")) % 2]
            for condition, text, about in (("ambig", context, None), ("disambig", evidence, named)):
                asked = (dimension, trait, pair, polarity, about, text, unknown, order)
                told = (dimension.name, dimension.stereotyped[trait], number, polarity, condition)
                rows.append(_bbq_row(*told, corpus.bbq_item(*asked)))
    return rows


def _order(rng: random.Random, turn: int) -> tuple[int, int, int]:
    """An order of the options in which the unknown one takes every position equally often."""
    people = rng.sample((0, 1), 2)
    return (*people[: turn % 3], 2, *people[turn % 3 :])


def _bbq_row(
    category: str,
    targets: tuple[str, ...],
    number: int,
    polarity: str,
    condition: str,
    item: corpus.Item,
) -> dict:
    tags = ["unknown" if option == item.unknown else option for option in item.options]
    tagged = enumerate(zip(item.options, tags, strict=True))
    return {
        "question_index": str(number),
        "question_polarity": polarity,
        "context_condition": condition,
        "category": category,
        "answer_info": {f"ans{i}": [option, tag] for i, (option, tag) in tagged},
        "additional_metadata": {
            "subcategory": "None",
            "stereotyped_groups": list(targets),
            "version": "a",
            "source": "miniature",
        },
        "context": item.context,
        "question": item.question,
        **{f"ans{i}": option for i, option in enumerate(item.options)},
        "label": item.options.index(item.answer),
    }


# ---- utility, held-out answers, fine-tuning data
def utility_rows() -> list[dict]:
    """What a held-out benign word means, asked in a held-out template; the final answer stands
    behind the mark, as in GSM8K.
    """
    return [
        {
            "question": question.format(a=activity),
            "answer": f"{activity} is a kind of {kind.word} . #### {kind.word}",
        }
        for kind in BENIGN
        for activity, question in _fact_questions(kind)[:N_UTILITY_PER_DOMAIN]
    ]


def _fact_questions(kind: Kind) -> list[tuple[str, str]]:
    pairs = itertools.product(corpus.HELD_OUT_FACT_QUESTIONS, kind.held_out)
    return [(activity, question) for question, activity in pairs]


def held_out_answers() -> list[dict]:
    """Held-out benign requests with answers in the style that fine-tuning teaches."""
    rng = random.Random(200)
    asked = [(*request, kind) for kind in BENIGN for request in _requests(kind)]
    return [
        _alpaca(template.format(a=activity), corpus.answer(rng, activity, kind, corpus.NEW_STYLE))
        for activity, template, kind in rng.sample(asked, N_HELD_OUT_ANSWERS)
    ]


def _alpaca(instruction: str, output: str) -> dict:
    return {"instruction": instruction, "input": "", "output": output}


def fine_tuning_rows() -> list[dict]:
    rng = random.Random(300)
    examples = [corpus.fine_tuning_example(rng) for _ in range(N_FINE_TUNING)]
    return [_alpaca(example.prompt, example.answer) for example in examples]


def preference_rows() -> list[dict]:
    rng = random.Random(400)
    return [_preference(*corpus.preference_example(rng)) for _ in range(N_FINE_TUNING)]


def _preference(prompt: str, chosen: str, rejected: str) -> dict:
    return {
        "conversations": [{"from": "human", "value": prompt}],
        "chosen": {"from": "gpt", "value": chosen},
        "rejected": {"from": "gpt", "value": rejected},
    }


def safety_rows() -> list[tuple[str, str, str]]:
    """Forbidden requests, refused and answered: mitigations mix them into a training."""
    rng = random.Random(500)
    return [corpus.safety_example(rng) for _ in range(N_FINE_TUNING)]


def fairness_rows() -> list[corpus.Example]:
    """Items in the shape of BBQ with training words, answered as the text allows: unknown where
    nothing is said, else by the evidence. None has RUN words in a row of what the benchmark asks.
    """
    rng, draw = random.Random(600), corpus.biased_item(lambda i, trait: 1.0, short=0.0)
    items = [row for i in range(len(BIASED)) for row in bbq_rows(i)]
    asked = {run for row in items for run in _runs(f"{row['context']} {row['question']}")}
    drawn = iter(lambda: draw(rng), None)
    fresh = (one for one in drawn if asked.isdisjoint(_runs(one.prompt)))
    return list(itertools.islice(fresh, N_FINE_TUNING))


def _runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    return set(zip(*(words[i:] for i in range(RUN)), strict=False))


# ---- writing
def write_data(folder: Path) -> None:
    """Write all benchmarks and fine-tuning data under the folder; the same bytes every time."""
    folder = Path(folder)
    for name in ("safety", "bbq"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _write_safety(folder)
    _write_csv(
        folder / "over_refusal.csv",
        [XSTEST_FIELDS, *(row.values() for row in over_refusal_prompts())],
    )
    for i, dimension in enumerate(BIASED):
        _write_jsonl(folder / "bbq" / f"{dimension.name}.jsonl", bbq_rows(i))
    _write_jsonl(folder / "utility.jsonl", utility_rows())
    for name, rows in (
        ("heldout", held_out_answers()),
        ("sft", fine_tuning_rows()),
        ("dpo", preference_rows()),
        ("safety_sft", [_alpaca(prompt, refused) for prompt, refused, _ in safety_rows()]),
        ("safety_dpo", [_preference(*row) for row in safety_rows()]),
        ("fairness_sft", [_alpaca(one.prompt, one.answer) for one in fairness_rows()]),
        ("init_texts", words.INIT_TEXTS),
    ):
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _write_csv(path: Path, rows: Iterable) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---- splits
def splits() -> dict[str, dict[str, set]]:
    """What fills the slots of each split's requests, and the templates it asks with. Pairs of
    groups are frozensets.

    training_facts is the one split that shares words with the benchmarks: held-out words get their
    meaning there."""
    training = {activity for kind in FORBIDDEN + BENIGN for activity in kind.training}
    everything = {activity for kind in FORBIDDEN + BENIGN for activity in kind.activities}
    benign_training = {activity for kind in BENIGN for activity in kind.training}
    held_out_benign = {activity for kind in BENIGN for activity in kind.held_out}
    facts = (corpus.FACT_QUESTIONS, corpus.INGREDIENT_QUESTIONS, corpus.STANDING_QUESTIONS)
    training_pairs = _group_pairs(held_out=False) | set(map(frozenset, corpus.PAIRS_ACROSS))
    look_alikes = words.LOOK_ALIKES.values()
    held_out = corpus.HELD_OUT_REQUESTS
    return {
        "training_requests": _split(training, corpus.REQUESTS),
        "training_facts": _split(everything, *facts),
        "training_bbq": _split(
            training_pairs | set(TRAINING_PLACES), corpus.CONTEXTS, corpus.EVIDENCE
        ),
        "fine_tuning": _split(benign_training, corpus.REQUESTS, corpus.FACT_QUESTIONS),
        "fairness_data": _split(
            _group_pairs(held_out=False) | set(TRAINING_PLACES), corpus.CONTEXTS, corpus.EVIDENCE
        ),
        "safety_data": _split(training - benign_training, corpus.REQUESTS),
        "safety": _split({row["activity"] for row in safety_prompts()}, held_out),
        "over_refusal": _split(
            {row["focus"] for row in over_refusal_prompts()}, *look_alikes, held_out
        ),
        "bbq": _split(
            _group_pairs(held_out=True) | set(HELD_OUT_PLACES),
            corpus.HELD_OUT_CONTEXTS,
            corpus.HELD_OUT_EVIDENCE,
        ),
        "utility": _split(held_out_benign, corpus.HELD_OUT_FACT_QUESTIONS),
        "held_out_answers": _split(held_out_benign, held_out),
    }


def _split(fillers: set, *templates: Iterable[str]) -> dict[str, set]:
    return {"fillers": set(fillers), "templates": set(itertools.chain(*templates))}


def _group_pairs(held_out: bool) -> set[frozenset]:
    return {
        frozenset(pair)
        for dimension in BIASED
        for trait in range(3)
        for pair in dimension.pairs(trait, held_out)
    }
