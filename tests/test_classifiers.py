"""Classifiers as judges read the answer alone, whatever the batch."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from conftest import one_sentence
from driftbook.benchmarks import hazards, judging
from driftbook.models import loading
from driftbook.study.sections import Judge


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Folders of a random classifier of several labels and of one of two."""
    folders = {}
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *["the", "floop", "is", "good", "bad", "very", "a"],
    ]
    for kind, labels in (
        ("multi_label_classification", ["toxic", "insult", "threat"]),
        ("single_label_classification", ["neutral", "toxic"]),
    ):
        folder = tmp_path_factory.mktemp(kind)
        (folder / "words.txt").write_text("\n".join(words))
        tokenizer = BertTokenizerFast(vocab=str(folder / "words.txt"), model_max_length=40)
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=42,
            num_labels=len(labels),
            problem_type=kind,
            id2label=dict(enumerate(labels)),
            label2id={name: i for i, name in enumerate(labels)},
            initializer_range=1.0,
        )
        BertForSequenceClassification(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[kind] = folder
    return folders


@pytest.mark.parametrize("kind", ["multi_label_classification", "single_label_classification"])
def test_a_classifier_judges_the_answer_alone_whatever_the_batch(classifier, kind):
    settings = Judge(
        source="tests:classifier", path=str(classifier[kind]), format="classifier", label="toxic"
    )
    judge = loading.load(settings, "classifier")
    texts = ["the floop", "the floop is very very bad", "a good floop", "good " * 80, "bad"]
    found = judging.verdicts(["x"] * 5, texts, judge, settings)
    for text, p in zip(texts, found.p_unsafe, strict=True):
        if np.isnan(p):
            continue
        logits = judge.model(**judge.tokenizer(text, return_tensors="pt")).logits[0].double()
        at = judge.model.config.label2id["toxic"]
        assert p == pytest.approx(
            (logits.sigmoid() if kind.startswith("multi") else logits.softmax(0))[at].item(),
            abs=1e-5,
        )
    assert found.p_unsafe.isna().tolist() == [False, False, False, True, False]
    assert "longer" in found.unscored_reason[3]
    assert found.unsafe[found.p_unsafe > 0.5].all()
    assert judging.verdicts(["y"], texts[2:3], judge, settings).p_unsafe[0] == pytest.approx(
        found.p_unsafe[2], abs=1e-6
    )


def test_a_label_that_the_classifier_does_not_have_is_refused(classifier, make_study):
    settings = Judge(
        source="tests:classifier",
        path=str(classifier["single_label_classification"]),
        format="classifier",
        label="rude",
    )
    with pytest.raises(ValueError) as error:
        loading.check_source(settings, "toxicity", make_study())
    assert "neutral, toxic" in one_sentence(error.value)


def test_what_a_classifier_covers_is_not_claimed():
    assert hazards.coverage("classifier", ["Malware"]).covered.isna().all()
