"""What the doctor of training data finds in planted data, that it finds nothing in clean data, and
that it never tells a text.
"""

import functools
import json
import random
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import local
from driftbook.benchmarks import bbq
from driftbook.doctors.data import DATA_COLUMNS, KINDS, ROW_COLUMNS, data_rows, examine_data
from driftbook.doctors.data_words import (
    NEAR_DUPLICATE,
    NEAR_PROMPT,
    jaccard_share,
    nearly_another,
    text_shingles,
)
from driftbook.stats.intervals import wilson
from driftbook.training.examples import Prepared, asked_texts, examined

SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
FILLERS = ("please", "just", "really", "kindly", "now")
REFUSAL = "I'm sorry, but I can't help with that."


def made_up(rng: random.Random, n: int) -> str:
    """Words of no language."""
    return " ".join("".join(rng.choices(SYLLABLES, k=rng.randint(2, 4))) for _ in range(n))


def sft(prompt: str, answer: str) -> dict:
    return {"prompt": [{"role": "user", "content": prompt}], "answer": answer}


def clean(n: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [
        sft(made_up(rng, rng.randint(6, 30)) + "?", made_up(rng, rng.randint(10, 50)) + ".")
        for _ in range(n)
    ]


def clean_preferences(n: int, seed: int = 1) -> list[dict]:
    rng = random.Random(seed)
    return [
        {
            "prompt": sft(made_up(rng, 12), "")["prompt"],
            "chosen": made_up(rng, 20),
            "rejected": made_up(rng, 20),
        }
        for _ in range(n)
    ]


def edited(text: str, rng: random.Random, share: float = 0.1) -> str:
    """A text in other case and punctuation, with filler words."""
    words = text.split()
    for _ in range(max(1, round(share * len(words)))):
        words.insert(rng.randrange(len(words) + 1), rng.choice(FILLERS))
    changed = " ".join(words).replace("?", " !").replace(",", " ;").replace(".", "...")
    return changed.upper() if rng.random() < 0.5 else changed.lower()


PROMPTS = [made_up(random.Random(f"prompt {i}"), 12) + "?" for i in range(40)]
BENCHMARKS = {
    "bench": PROMPTS,
    "heldout": [made_up(random.Random(f"heldout {i}"), 20) for i in range(30)],
}


def counts(found: pd.DataFrame) -> dict[str, int]:
    return found.groupby("finding").n.sum().to_dict()


# ---- nothing where there is nothing
@pytest.mark.slow
@pytest.mark.parametrize(
    "examples", [[], clean(300), clean_preferences(100)], ids=["none", "sft", "preferences"]
)
def test_nothing_is_found_in_clean_data(examples):
    found = examine_data(examples, BENCHMARKS, [10] * len(examples), 10)
    assert found.empty
    assert list(found) == DATA_COLUMNS
    assert list(data_rows(examples, BENCHMARKS)) == ROW_COLUMNS
    assert data_rows(examples, BENCHMARKS).empty


# ---- what is planted is found
def messages(*roles: str) -> dict:
    rng = random.Random(" ".join(roles))
    return {
        "prompt": [{"role": role, "content": made_up(rng, 8)} for role in roles],
        "answer": made_up(rng, 15),
    }


def preference(chosen: str, rejected: str) -> dict:
    return {
        "prompt": sft(made_up(random.Random(chosen + rejected), 9), "")["prompt"],
        "chosen": chosen,
        "rejected": rejected,
    }


def choice(text: str) -> dict:
    return sft(made_up(random.Random(text), 9) + text, made_up(random.Random(text + "answer"), 5))


RNG = random.Random(7)
TEXT, OTHER, LONG = made_up(RNG, 14), made_up(RNG, 14), made_up(RNG, 120)
PLANTED = {
    "empty": [sft("", TEXT), sft(TEXT, " \n"), {"prompt": [], "answer": OTHER}],
    "equal_answers": [
        preference(TEXT, TEXT),
        preference(OTHER, f" {OTHER}\n"),
        preference(REFUSAL, REFUSAL),
    ],
    "turn_order": [
        messages("assistant"),
        messages("user", "user"),
        messages("user", "assistant"),
        messages("system"),
        messages("user", "system", "user"),
        messages("human"),
        {"prompt": [], "answer": TEXT},
    ],
    "one_word": [sft(TEXT, "tobazu."), sft(OTHER, "4"), sft(made_up(RNG, 9), "👍")],
    "repeated_prompt": [sft(TEXT, f"{TEXT.upper()}! {OTHER}"), sft(OTHER + "?", OTHER)],
    "refusals": [
        sft(TEXT, REFUSAL),
        preference("I cannot help with this.", "I will not help with that."),
    ],
    "refusals_rejected": [
        preference(TEXT, REFUSAL),
        preference(REFUSAL, "I cannot do that."),
        preference(OTHER, "I won't do this."),
    ],
    "refusal_preferred": [preference(REFUSAL, TEXT), preference("I cannot do that.", OTHER)],
    "refusal_dispreferred": [preference(TEXT, REFUSAL)],
    "multiple_choice": [
        choice("\nA: tobazu\nB: kelima\nC: Can't be determined"),
        choice(" (a) Unknown (b) tobazu (c) kelima"),
        choice(" A. tobazu\nB. Not enough information.\nC. kelima\nBera:"),
        choice(" A : tobazu B : Can’t answer C : kelima"),
    ],
    "duplicates": [sft(TEXT, OTHER), sft(TEXT.upper(), f"  {OTHER}\n"), sft(TEXT, OTHER)],
    "near_duplicates": [
        sft(LONG, OTHER),
        sft(LONG.replace(LONG.split()[50], "x"), OTHER),
        sft(LONG.replace(" ", ", ", 3), OTHER),
    ],
    "near_benchmark": [
        sft(edited(PROMPTS[i], random.Random(i)), made_up(random.Random(i), 12)) for i in range(5)
    ],
    "benchmark_overlap": [
        sft(f"{made_up(RNG, 5)} {PROMPTS[0].upper()} {made_up(RNG, 50)}", TEXT),
        sft(TEXT, f"{OTHER} {' '.join(PROMPTS[1].split()[2:10])}, {made_up(RNG, 30)}"),
    ],
}
EXPECTED = {finding: len(planted) for finding, planted in PLANTED.items()} | {"duplicates": 2}


@pytest.mark.slow
@pytest.mark.parametrize("finding", PLANTED)
def test_what_is_planted_is_found_and_counted(finding):
    base, pairs = clean(40), clean_preferences(20)
    examples = [*base, *PLANTED[finding], *pairs]
    found = examine_data(examples, BENCHMARKS).set_index("finding").loc[[finding]].iloc[0]
    of = {
        "preferences": sum("chosen" in example for example in examples),
        "prompts": len(PROMPTS),
        "examples": len(examples),
    }[KINDS[finding].of]
    assert found.n == EXPECTED[finding]
    assert found.share == pytest.approx(found.n / of)
    assert (found.ci_low, found.ci_high) == pytest.approx(
        [float(end) for end in wilson(found.n, of)]
    )
    named = data_rows(examples, BENCHMARKS).query("finding == @finding").row
    assert set(named) == set(
        range(40 + len(PLANTED[finding]) - EXPECTED[finding], 40 + len(PLANTED[finding]))
    )
    assert named.is_unique


@pytest.mark.parametrize(
    "example",
    [
        messages("system", "user", "assistant", "user"),
        sft(TEXT, "tobazu kelima"),
        sft("tobazu kelima", "Tobazu kelima!"),
        choice(" A: tobazu B: kelima C: zonaru"),
        choice(" A: tobazu B: unknown"),
        choice(" A: tobazu B: unknown C: kelima D: zonaru"),
        sft(TEXT, f"{LONG} {REFUSAL}"),
        preference(f"{LONG} {REFUSAL}", OTHER),
        sft(TEXT, f"{OTHER} {TEXT}"),
    ],
)
def test_what_only_looks_like_a_finding_is_none(example):
    assert examine_data([*clean(20), example], {}).empty


def test_a_pair_that_declines_twice_prefers_neither():
    assert counts(examine_data([preference(REFUSAL, "I cannot do that.")], {})) == {
        "refusals": 1,
        "refusals_rejected": 1,
    }


def test_severity_follows_the_share():
    few, many = clean(500) + PLANTED["one_word"], clean(100) + PLANTED["one_word"]
    assert list(examine_data(few, {}).severity) == ["note"]
    assert list(examine_data(many, {}).severity) == ["warning"]
    bench = {"bench": PROMPTS[:1] + [made_up(random.Random(i), 10) for i in range(200)]}
    overlap = [
        examine_data(PLANTED["benchmark_overlap"], b)
        .set_index("finding")
        .severity["benchmark_overlap"]
        for b in (bench, BENCHMARKS)
    ]
    assert overlap == ["warning", "error"]


def test_lengths_tell_rows_cut_and_tokens_lost():
    found = examine_data(clean(10), {}, [5, 10, 11, 30, *[5] * 6], 10).set_index("finding")
    assert found.n.to_dict() == {"cut": 2, "tokens_lost": 21}
    assert found.share["tokens_lost"] == pytest.approx(21 / 86)
    assert np.isnan(found.ci_low["tokens_lost"])
    named = data_rows(clean(10), {}, np.array([5, 10, 11, 30, *[5] * 6]), 10)
    assert named[["row", "score"]].to_numpy().tolist() == [[2, 1], [3, 20]]


def test_a_short_prompt_is_found_whole_and_a_very_short_one_only_alone():
    bench = {"bench": ["tobazu kelima zonaru peta vimo", "sabo rika"]}
    assert examine_data(
        [sft(f"{TEXT} Tobazu, kelima: zonaru peta vimo. {OTHER}", LONG)], bench
    ).query("finding == 'benchmark_overlap'").n.tolist() == [1]
    assert "benchmark_overlap" not in counts(
        examine_data([sft(f"{TEXT} sabo rika {OTHER}", LONG)], bench)
    )
    assert counts(examine_data([sft("Sabo rika!", LONG)], bench))["benchmark_overlap"] == 1


def test_scripts_without_spaces_are_read():
    prompt, other = "把水倒进锅里然后盖上盖子用大火煮开", "今天下午我们去公园看了很多漂亮的花"
    found = examine_data([sft(f"请问{prompt}吗?", other)], {"bench": [prompt]})
    assert counts(found) == {"benchmark_overlap": 1, "near_benchmark": 1}
    assert examine_data([sft(other, "我不知道")], {"bench": [prompt]}).empty


# ---- laws
everything = (
    [example for planted in PLANTED.values() for example in planted]
    + clean(20)
    + clean_preferences(5)
)


@pytest.mark.slow
@settings(max_examples=4)
@given(st.permutations(range(len(everything))))
def test_the_order_of_rows_does_not_matter(order):
    shuffled = [everything[i] for i in order]
    pd.testing.assert_frame_equal(
        examine_data(shuffled, BENCHMARKS), examine_data(everything, BENCHMARKS)
    )
    places = data_rows(shuffled, BENCHMARKS).query("finding != 'duplicates'")
    where = data_rows(everything, BENCHMARKS).query("finding != 'duplicates'")
    back = places.assign(row=[order[row] for row in places.row])
    keys = ["row", "finding", "benchmark"]
    pd.testing.assert_frame_equal(
        *(frame.sort_values(keys).reset_index(drop=True) for frame in (back, where))
    )


@functools.cache
def counts_of_everything() -> dict[str, int]:
    return counts(examine_data(everything, BENCHMARKS))


@pytest.mark.slow
@settings(max_examples=6)
@given(st.integers(10, 10**6), st.integers(0, len(everything)))
def test_a_clean_row_changes_no_count(seed, place):
    more = [*everything[:place], *clean(1, seed), *everything[place:]]
    assert counts(examine_data(more, BENCHMARKS)) == counts_of_everything()


@pytest.mark.slow
def test_a_finding_about_a_benchmark_does_not_depend_on_the_others():
    every = data_rows(everything, BENCHMARKS)
    for names in ([], *([name] for name in BENCHMARKS)):
        apart = data_rows(everything, {name: BENCHMARKS[name] for name in names}).query(
            "benchmark.notna()"
        )
        together = every.query("benchmark in @names")
        pd.testing.assert_frame_equal(
            apart.reset_index(drop=True), together.reset_index(drop=True), check_dtype=False
        )


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 30), max_size=4)), max_size=12)
)
def test_near_duplicates_are_those_of_all_pairs_compared(made):
    def text(seed: int, holes: list[int]) -> str:
        words = made_up(random.Random(seed), 31).split()
        return " ".join("x" if i in holes else word for i, word in enumerate(words))

    texts = sorted({text(*one) for one in made})
    all_pairs = {
        i
        for i, a in enumerate(texts)
        for j, b in enumerate(texts)
        if i != j and jaccard_share(text_shingles(a), text_shingles(b)) > NEAR_DUPLICATE
    }
    assert nearly_another(texts) == all_pairs


@pytest.mark.slow
@given(
    st.lists(st.text(max_size=30), min_size=1, max_size=5),
    st.lists(st.text(max_size=30), min_size=1, max_size=4),
)
def test_any_text_is_read(texts, prompts):
    examples = [sft(text, text[::-1]) for text in texts]
    found = examine_data(examples, {"bench": prompts})
    assert found.n.gt(0).all()
    assert found.share.between(0, 1).all()
    assert data_rows(examples, {"bench": prompts}).row.between(0, len(texts) - 1).all()


# ---- what is told
def assert_tells_no_text(found: pd.DataFrame, texts: list[str]) -> None:
    told = [str(cell) for column in found for cell in found[column]]
    assert all("\n" not in cell and len(cell) < 600 for cell in told)
    said = " | ".join(told).lower()
    runs = {
        " ".join(run)
        for text in texts
        for words in [re.findall(r"\w+", text.lower())]
        for run in zip(*(words[i:] for i in range(5)), strict=False)
    }
    telling = sum(run in said for run in runs)
    assert telling == 0, f"{telling} runs of words of the data are told"  # and not which


def texts_of(examples: list[dict]) -> list[str]:
    return [
        text
        for e in examples
        for text in [
            *(turn["content"] for turn in e["prompt"]),
            *(v for k, v in e.items() if k != "prompt"),
        ]
    ]


def test_sentences_are_one_line_and_tell_no_text():
    asked = {**BENCHMARKS, "of\ntwo lines": PROMPTS}
    found = examine_data(everything, asked, [7] * len(everything), 5, asked)
    assert set(found.finding) == set(KINDS)
    assert_tells_no_text(found, texts_of(everything) + PROMPTS)
    assert not any(
        word in sentence.lower().split()
        for sentence in found.sentence
        for text in texts_of(clean(20))
        for word in text.strip("?.").split()
    )
    for finding in found.itertuples():
        assert f"{finding.n:,} of" in finding.sentence
        assert f"{finding.share:.2%}" in finding.sentence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([{"prompt": "tobazu", "answer": "kelima"}], {}), "example 0 is not"),
        (([sft("a", "b"), {"prompt": [], "chosen": "x"}], {}), "example 1 is not"),
        (([], {"bench": "tobazu kelima"}), "'bench' has no prompts"),
        (([], {"bench": []}), "'bench' has no prompts"),
        (([sft("a", "b")], {}, [1, 2], 4), "2 lengths for 1 examples"),
        (([], {}, []), "give both or neither"),
    ],
)
def test_data_of_another_form_is_refused_without_telling_it(arguments, message):
    with pytest.raises(ValueError, match=message) as refused:
        examine_data(*arguments)
    assert "kelima" not in str(refused.value)


# ---- real data: counted and compared, never printed
@pytest.fixture(scope="module")
def real(shared) -> dict[str, list[dict]]:
    role = {"human": "user", "gpt": "assistant"}
    alpaca = json.loads((shared / "chat_demo" / "alpaca_en_demo.json").read_text())
    dpo = json.loads((shared / "chat_demo" / "dpo_en_demo.json").read_text())
    return {
        "alpaca": [
            sft(row["instruction"] + "\n" * bool(row["input"]) + row["input"], row["output"])
            for row in alpaca
        ],
        "dpo": [
            {
                "prompt": [
                    {"role": role.get(turn["from"], turn["from"]), "content": turn["value"]}
                    for turn in row["conversations"]
                ],
                "chosen": row["chosen"]["value"],
                "rejected": row["rejected"]["value"],
            }
            for row in dpo
        ],
    }


@pytest.fixture(scope="module")
def real_prompts(shared) -> dict[str, list[str]]:
    return {
        "ailuminate": list(pd.read_csv(shared / "ailuminate" / "prompts.csv").prompt_text),
        "xstest": list(pd.read_csv(shared / "xstest" / "xstest_prompts.csv").prompt),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alpaca", "dpo"])
def test_real_chats_are_near_no_benchmark_and_are_told_without_text(name, real, real_prompts):
    found = examine_data(real[name], real_prompts)
    n = counts(found)
    quiet = (
        "near_benchmark" not in n
        and n.get("benchmark_overlap", 0) <= 1
        and not set(found.severity) & {"error"}
    )
    assert quiet, f"findings {n}"
    assert 0 < n["refusals"] < 0.05 * len(real[name])
    prompts = [prompt for texts in real_prompts.values() for prompt in texts]
    assert_tells_no_text(found, texts_of(real[name]) + prompts)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("ailuminate", 1.0), ("xstest", 0.99)])
def test_lightly_edited_prompts_of_real_benchmarks_are_found_in_real_chats(
    name, least, real, real_prompts
):
    rng = random.Random(3)
    planted = [sft(edited(prompt, rng, 0.2), made_up(rng, 15)) for prompt in real_prompts[name]]
    near = data_rows([*real["alpaca"], *planted], real_prompts).query(
        "finding == 'near_benchmark' and benchmark == @name"
    )
    assert near.row.min() >= len(real["alpaca"]), "a real chat is taken for one"
    assert near.score.between(NEAR_PROMPT, 1.0001).all()
    assert len(near) >= least * len(planted), f"{len(near)} of {len(planted)}"


@pytest.mark.slow
def test_all_prompts_of_a_benchmark_in_the_data_are_an_error(real_prompts):
    found = examine_data(
        [sft(prompt, LONG[: 9 + i]) for i, prompt in enumerate(real_prompts["xstest"])],
        real_prompts,
    )
    overlap = found[
        found.finding.eq("benchmark_overlap") & found.sentence.str.contains("xstest")
    ].iloc[0]
    assert (overlap.n, overlap.severity) == (450, "error")


@pytest.mark.slow
@pytest.mark.parametrize("template", bbq.TEMPLATES)
def test_real_items_of_bbq_are_taken_for_it(template, shared):
    items = [
        json.loads(line)
        for line in (shared / "bbq" / "data" / "Religion.jsonl").read_text().splitlines()
    ]
    examples = [sft(bbq.TEMPLATES[template].format(**item), "tobazu kelima") for item in items]
    assert counts(examine_data(examples, {}))["multiple_choice"] == len(items)


# ---- of a study
def test_training_rows_are_compared_with_every_benchmark_of_a_study(content, make_study):
    rows = {"format": "gsm8k", "n": 60, "sample": "first"}  # half of the benchmark's own file
    content["benchmarks"]["utility"].pop("n")
    content["data"]["sft"] = {**rows, **local("data/utility.jsonl")}
    study = make_study(content)
    asked = asked_texts(study)
    assert set(asked) == {*study.benchmarks, "heldout"}
    prepared = Prepared([], [], "", None, (5,) * 60)
    found = examined({("sft", "sft", None, 0): prepared}, study)
    found = found.query("finding == 'benchmark_overlap' and data == 'sft'")
    utility = found[found["sentence"].str.contains("of utility have")]
    assert utility["severity"].tolist() == ["error"]
    assert utility["n"].item() >= 60

    item = asked["bbq"][0]
    planted = [{"prompt": [{"role": "user", "content": f"Please read. {item}"}], "answer": "Yes."}]
    assert "bbq" in " ".join(examine_data(planted, asked)["sentence"])
