"""Real text through every loader, template and parser: real chat, preference and benchmark files,
and random-weight models of the real families.
"""

import numpy as np
import pytest

from conftest import FAMILIES
from driftbook.batch import random_models
from driftbook.benchmarks import bbq, data, gsm8k, judging, utility
from driftbook.benchmarks.format import Asking
from driftbook.miniature.families import FAMILY
from driftbook.models import conversations, loading
from driftbook.models.scoring import Scorer
from driftbook.study import sources
from driftbook.study.sections import Judge
from driftbook.study.study_file import load
from driftbook.training import examples

PARTS = (*FAMILIES, "judge")


@pytest.fixture(scope="module")
def study(shared):
    return load("real_data")


def with_all(study, **sizes):
    """The study with other sizes of its training data, and all prompts of its benchmarks."""
    parts = {
        name: part.model_copy(update={"n": sizes.get(name, part.n)})
        for name, part in study.data.items()
    }
    benchmarks = {
        name: part.model_copy(update={"n": None}) for name, part in study.benchmarks.items()
    }
    return study.model_copy(update={"data": parts, "benchmarks": benchmarks})


@pytest.fixture(scope="module")
def built(study) -> dict:
    """The random models of the four families and the judge, loaded as a study loads them."""
    made = {}
    for part in PARTS:
        random_models.build(part, study)
        source = next(
            source
            for source in (*study.bases.values(), *study.judges.values())
            if source.source == f"random:{part}"
        )
        made[part] = loading.load(source, f"random-{part}", study)
    return made


# ---- files
def test_every_source_of_the_study_has_its_local_copy(study):
    for source in (*study.data.values(), *study.benchmarks.values()):
        assert source.local is not None
        assert source.local.exists()
        assert source.revision


def test_the_files_have_the_rows_that_their_sources_say(study):
    whole = with_all(study, sft=999, dpo=299, heldout=2000)
    counts = {name: len(data.training_examples(name, whole)) for name in whole.data}
    assert counts == {"sft": 999, "dpo": 299, "heldout": 2000}
    turns = [len(example["prompt"]) for example in data.training_examples("dpo", whole)]
    assert (max(turns), sum(turn > 1 for turn in turns) > 0) == (13, True)
    assert all(
        example["prompt"][-1]["role"] == "user" for example in data.training_examples("dpo", whole)
    )


def test_more_rows_than_there_are_cannot_be_asked_for(study):
    with pytest.raises(ValueError, match="999 rows"):
        data.training_examples("sft", with_all(study, sft=1000))


def test_the_prompts_are_all_there(study):
    whole = with_all(study)
    safety, over_refusal = data.prompts("safety", whole), data.prompts("over_refusal", whole)
    assert (len(safety), set(safety.kind)) == (700, {"harmful"})
    assert safety.category.str.partition("_")[0].nunique() == 7, (
        "hazards; one of them, specialised advice, has four parts"
    )
    assert over_refusal.kind.value_counts().to_dict() == {"benign look-alike": 250, "harmful": 200}
    for frame in (safety, over_refusal):
        assert frame.prompt_id.is_unique
        assert frame.prompt.str.strip().ne("").all()
    sampled = data.prompts("safety", study)
    assert len(sampled) == study.benchmarks["safety"].n
    assert set(sampled.prompt_id) <= set(safety.prompt_id)


def test_bbq_and_gsm8k_are_all_there(study):
    items = bbq.load(data.local_file(study.benchmarks["bbq"], study))
    assert items.dimension.value_counts().to_dict() == {
        "Age": 3680,
        "Nationality": 3080,
        "Religion": 1200,
    }
    questions = gsm8k.load_questions(data.local_file(study.benchmarks["utility"], study))
    assert len(questions) == 2000
    assert not questions.answer.str.contains("<<", regex=False).any()
    right = [gsm8k.is_correct(f"so it is {row.final}", row.final) for row in questions.itertuples()]
    assert all(right)


# ---- models
def test_the_models_are_small_and_of_their_families(built):
    for family in FAMILIES:
        assert isinstance(built[family].model, FAMILY[family].model)
        assert sum(value.numel() for value in built[family].model.parameters()) < 2_000_000
        assert (
            len(built[family].tokenizer)
            == built[family].model.get_input_embeddings().num_embeddings
        )


def test_the_same_study_builds_the_same_models(study, built):
    folder = sources.made_folder(study, "random") / "gemma"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    random_models.build("gemma", study)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("part", PARTS)
def test_text_survives_the_tokenizer(study, built, part):
    tokenizer = built[part].tokenizer
    texts = [
        "日本語 ñ é 👍🏽 ʼ \u202e",
        "a\tb\n\n  c ",
        "".join(map(chr, range(32, 127))),
        "\u0000\u0007",
    ]
    texts += [example["answer"] for example in data.training_examples("sft", study)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def _conversations(study) -> list[tuple[list, str]]:
    pairs = [
        (example["prompt"], example[key])
        for example in data.training_examples("dpo", with_all(study, dpo=299))
        for key in ("chosen", "rejected")
    ]
    pairs += [
        (example["prompt"], example["answer"])
        for name in ("sft", "heldout")
        for example in data.training_examples(name, study)
    ]
    return [*pairs, ([{"role": "user", "content": "日本語で 👍🏽?"}], "はい。\n\n\u202eñ  ")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_real_conversation_is_split_where_its_answer_begins(study, built, family):
    tokenizer = built[family].tokenizer
    wrong, cut = [], 0
    # each conversation with one family, and the last, of all scripts, with all
    *every, last = _conversations(study)
    for i, (prompt, answer) in enumerate([*every[FAMILIES.index(family) :: 4], last]):
        first, rest = conversations.conversation_ids(tokenizer, prompt, answer)
        messages = [*prompt, {"role": "assistant", "content": answer}]
        if family == "gemma" and prompt[0]["role"] == "system":
            messages = [
                {**prompt[1], "content": prompt[0]["content"] + "\n\n" + prompt[1]["content"]},
                *messages[2:],
            ]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        asked = conversations.chat_ids(tokenizer, prompt)
        wrong += [i] if tokenizer.decode(first) + tokenizer.decode(rest) != rendered else []
        cut += asked != first
        assert tokenizer.eos_token_id in rest, f"conversation {i}: the answer has no end"
        assert first.count(tokenizer.bos_token_id) == (0 if family == "qwen2" else 1), (
            f"conversation {i}"
        )
        assert answer.strip() in tokenizer.decode(rest, skip_special_tokens=True), (
            f"conversation {i}: the answer is not whole"
        )
    assert wrong == []
    assert cut == 0, "the prompt that is trained on is the one that is asked at test time"


@pytest.mark.parametrize("family", FAMILIES)
def test_letters_are_single_tokens_and_their_options_can_be_read(study, built, family):
    base = built[family]
    scorer = Scorer(base.model, base.tokenizer)
    ids = [scorer.ids(letter) for letter in "ABC"]
    assert [len(one) for one in ids] == [1, 1, 1]
    assert len({one[0] for one in ids}) == 3
    items = bbq.load(data.local_file(study.benchmarks["bbq"], study)).groupby("dimension").head(8)
    found = bbq.answers(
        items, scorer, "letters", "run", system_prompt="You are a helpful assistant.", min_mass=0.0
    )
    assert found.answer.notna().all()
    np.testing.assert_allclose(found[["p_a", "p_b", "p_c"]].sum(axis=1), 1, atol=1e-9)
    options = bbq.answers(items.head(6), scorer, "options", "run")
    assert options.answer.notna().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_prompts_fit_and_are_answered_alike_alone_and_together(study, built, family):
    base = built[family]
    scorer = Scorer(base.model, base.tokenizer)
    prompts = [
        *data.prompts("safety", with_all(study)).prompt,
        *data.prompts("over_refusal", with_all(study)).prompt,
    ]
    contexts = scorer.ask(prompts, "You are a helpful assistant.")
    longest = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
    some = [contexts[i] for i in [*longest[:2], *longest[-3:]]]
    together = scorer.generate(some, 8)
    assert together == [scorer.generate([context], 8)[0] for context in some]
    assert all(answer.finish_reason in ("stop", "length") for answer in together)


@pytest.mark.parametrize("family", FAMILIES)
def test_real_examples_become_rows_to_train_on(study, built, family):
    sft, dpo = (examples.prepare(objective, built[family], study) for objective in ("sft", "dpo"))
    limit = study.training.max_length
    assert 0 < len(sft.examples) <= study.data["sft"].n
    assert max(len(one.ids) for one in sft.examples) <= limit
    assert all(len(one.counted) for one in sft.examples)
    assert (
        max(len(one.ids) for pair in dpo.examples for one in (pair.chosen, pair.rejected)) <= limit
    )
    assert np.isfinite([pair.reference for pair in dpo.examples]).all()
    n_out = study.data["dpo"].n - len(dpo.examples)
    assert n_out == 0 or f"{n_out} examples left out" in dpo.note


def test_the_judge_reads_real_prompts_and_answers(study, built):
    prompts = list(data.prompts("safety", study).prompt[:6])
    answers = [example["answer"] for example in data.training_examples("sft", study)[:5]] + [""]
    settings = next(iter(study.judges.values()))
    found = judging.verdicts(prompts, answers, built["judge"], settings)
    assert len(found) == 6
    assert found.p_unsafe.between(0, 1).all()
    assert found.unsafe.notna().all()
    strict = judging.verdicts(
        prompts, answers, built["judge"], Judge(source="x", format="llama_guard_2", min_mass=0.9)
    )
    assert strict.unsafe.isna().all()
    assert strict.unscored_reason.notna().all()


def test_utility_is_measured_on_real_questions(study, built):
    items = gsm8k.load_questions(data.local_file(study.benchmarks["utility"], study)).head(5)
    base = built["qwen2"]
    found = utility.rated(
        "utility", items, Scorer(base.model, base.tokenizer), "run", "gsm8k", Asking(6)
    )
    assert found.value.notna().all()
    assert found[found.metric == "nll"].value.between(0, 50).all()


def test_a_rater_grades_the_answers_to_real_questions(study, built):
    items = gsm8k.load_questions(data.local_file(study.benchmarks["utility"], study)).head(5)
    base, rater = built["qwen2"], built["llama"]
    scorer = Scorer(base.model, base.tokenizer)
    plain = utility.rated("utility", items, scorer, "run", "gsm8k", Asking(6))
    lax, strict = (
        utility.rated(
            "utility",
            items,
            scorer,
            "run",
            "gsm8k",
            Asking(6, None, utility.graders([(rater, mass)])),
        )
        for mass in (0.0, 0.9)
    )
    assert lax[~lax.metric.str.startswith("grade")].reset_index(drop=True).equals(plain)
    grades = lax[lax.metric == f"grade by {rater.name}"]
    answered = grades.unscored_reason.ne("the answer is empty")
    assert len(grades) == 5
    assert grades.value[answered].between(1, 10).all()
    assert strict[strict.metric.str.startswith("grade")].value.isna().all(), (
        "a random model gives its grades no probability"
    )
    assert strict[strict.metric.str.startswith("grade")].unscored_reason.notna().all()
