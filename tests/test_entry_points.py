"""Every entry point with the least that its docstring promises to take, and what it refuses."""

import importlib

import numpy as np
import pandas as pd
import pytest

from conftest import one_sentence
from driftbook import bbq, doctor, refusals, safe_lora, scoring, stats
from driftbook.miniature.families import build_model, build_tokenizer

ENTRIES = {
    "bbq": {"answers", "load", "scores"},
    "doctor": {"examine"},
    "refusals": {"is_refusal"},
    "safe_lora": {"project"},
    "scoring": {"Scorer"},
}
FACES = "analyses batch benchmarks doctors figures miniature models publishing rereading stats"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An adapter with random weights and two checkpoints, in a folder of an odd name."""
    from peft import LoraConfig, get_peft_model

    root, tokenizer = tmp_path_factory.mktemp("ü'x $y #1 [z] "), build_tokenizer("llama")
    for seed, name in enumerate(("aligned", "unaligned", "adapter")):
        model = build_model("llama", tokenizer, seed, width=32)
        if name == "adapter":
            settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
            model = get_peft_model(model, settings)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def scorer():
    tokenizer = build_tokenizer("llama")
    return scoring.Scorer(build_model("llama", tokenizer, 0, width=32).eval(), tokenizer)


@pytest.fixture(scope="module")
def answered(scorer, data_folder):
    items = bbq.load(data_folder / "bbq", ["Age"]).head(8)
    return bbq.answers(items, scorer, "letters", "run")


def refused(call, *arguments, **more) -> str:
    with pytest.raises(ValueError) as error:
        call(*arguments, **more)
    return one_sentence(error.value)


def test_every_name_that_is_shown_is_there_and_documented():
    for name in [*ENTRIES, *FACES.split(), "study", "training"]:
        module = importlib.import_module(f"driftbook.{name}")
        assert ENTRIES.get(name, set(module.__all__)) == set(module.__all__)
        for shown in module.__all__:
            assert getattr(module, shown).__doc__ or isinstance(
                getattr(module, shown), dict | tuple
            )


# ---- BBQ
@pytest.mark.parametrize("by", [(), ("dimension",), "dimension"])
def test_scores_without_families_are_over_items_and_say_so(answered, by):
    found = bbq.scores(answered.drop(columns="question_family"), by)
    null = bbq.scores(answered.assign(question_family=None), by)
    pd.testing.assert_frame_equal(found, null)
    assert set(found.resampled) == {"items"}
    least = ["context", "answer", "correct", "unknown", "biased", "item_id"]
    named = [] if by == () else ["dimension"]
    pd.testing.assert_frame_equal(bbq.scores(answered[least + named], by), found)
    alone = answered.assign(question_family=answered.item_id)  # the same resamples, by name
    same = bbq.scores(alone, by).drop(columns="resampled")
    pd.testing.assert_frame_equal(same, found.drop(columns="resampled"))


def test_answers_need_no_family_and_say_what_is_wrong(scorer, data_folder):
    items = bbq.load(str(data_folder / "bbq"), "Age").head(4)
    without = bbq.answers(items.drop(columns="question_family"), scorer, "options", "run")
    whole = bbq.answers(items, scorer, "options", "run")
    assert without.question_family.isna().all()
    pd.testing.assert_series_equal(without.p_a, whole.p_a)
    assert "letters or options" in refused(bbq.answers, items, scorer, "words", "run")
    assert "no items" in refused(bbq.answers, items.iloc[:0], scorer, "letters", "run")
    said = refused(bbq.answers, items, scorer, "letters", "run", template="{passage}")
    assert "passage" in said
    assert "known are context" in said


@pytest.mark.parametrize("column", ["context", "answer", "correct", "unknown", "biased", "item_id"])
def test_scores_name_the_column_that_is_missing(answered, column):
    frame = answered.drop(columns=["question_family", column])
    assert repr(column) in refused(bbq.scores, frame)


def test_scores_of_nothing_are_refused(answered):
    assert "no answers" in refused(bbq.scores, answered.iloc[:0])
    assert "'none'" in refused(bbq.scores, answered, "none")


# ---- texts
def test_a_refusal_is_told_of_any_list_and_null_of_no_answer():
    said = ["I'm sorry, but I can't help with that.", "", None, float("nan"), "Paris."]
    for texts in (said, tuple(said), pd.Series(said), np.array(said, dtype=object), iter(said)):
        assert list(refusals.is_refusal(texts)) == [True, None, None, None, False]
    assert list(refusals.is_refusal([])) == []
    assert "[text]" in refused(refusals.is_refusal, said[0])


def test_a_scorer_takes_texts_and_nothing_at_all(scorer):
    asked = scorer.ask(["how is it done ?"])
    assert scorer.loglikelihood([("how is", " it")]).shape == (1,)
    assert scorer.choices(asked, [["it", "safe"]]).shape == (1, 2)
    assert scorer.letters(asked).shape == (1, 3)
    assert scorer.generate(asked, 2)[0].n_tokens <= 2
    for empty in (scorer.loglikelihood([]), scorer.choices([], []), scorer.generate([], 2)):
        assert len(empty) == 0


# ---- adapters
def test_folders_are_paths_or_texts(files):
    for kind in (lambda path: path, str):
        found = doctor.examine(kind(files / "adapter"))
        assert list(found) == ["finding", "severity", "sentence", "module"]
        whole = doctor.examine(kind(files / "adapter"), kind(files / "aligned"))
        assert "base" not in set(found.finding)
        assert "shapes" not in set(whole.finding)  # it fits
        assert "not_examined" not in set(whole.finding)
    assert "does not exist" in refused(doctor.examine, str(files / "none"))
    parts = [str(files / name) for name in ("adapter", "aligned", "unaligned")]
    assert len(safe_lora.project(*parts, str(files / "out")))
    assert (files / "out" / "adapter_model.safetensors").is_file()


# ---- models of rates and items
def frame() -> pd.DataFrame:
    rng, n = np.random.default_rng(0), 80
    return pd.DataFrame(
        {
            "rate": rng.normal(10, 3, n),
            "unsafe": rng.random(n) < 0.4,
            "method": np.repeat(["a", "b"], n // 2),
            "run_id": np.repeat(list("0123456789"), n // 10),
            "category": np.tile(list("wxyz"), n // 4),
            "prompt_id": np.tile(list("01234567"), n // 8),
        }
    )


@pytest.mark.parametrize(
    ("model", "response"), [(stats.rate_model, "rate"), (stats.item_model, "unsafe")]
)
def test_models_need_their_columns_alone_and_name_one_that_is_missing(model, response):
    rows, formula = frame(), f"{response} ~ method"
    assert list(model(rows, formula).fixed.term) == ["Intercept", "method[T.b]"]
    one, again = model(rows, formula, "run_id"), model(rows, formula, ("run_id",))
    pd.testing.assert_frame_equal(one.fixed, again.fixed)
    assert "'run_id'" in refused(model, rows.drop(columns="run_id"), formula)
    assert "dose" in refused(model, rows, f"{response} ~ dose")
    assert "formula" in refused(model, rows, f"{response} ~ ~")
    assert "no row" in refused(model, rows.iloc[:0], formula)
