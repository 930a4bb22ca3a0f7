"""Classifiers as judges read the answer alone, whatever the batch."""

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from conftest import one_sentence
from driftbook.benchmarks import hazards, judging
from driftbook.models import loading
from driftbook.study.sections import Judge
from driftbook.study.tables import RESPONSES, VERDICTS


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


# ---- a classifier made from a decoder, which reads the last token that is no padding
@pytest.fixture(scope="module", params=["none", "<pad>", "</s>"])
def decoder(request, tmp_path_factory):
    """The folder of a random one whose tokenizer pads on the left with this token; the model has no
    padding token of its own.
    """
    folder, names = tmp_path_factory.mktemp("decoder"), ["<pad>", "<unk>", "</s>", "good", "bad"]
    words = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    made = Tokenizer(words)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    pad = {} if request.param == "none" else {"pad_token": request.param}
    one = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", padding_side="left", model_max_length=40, **pad
    )
    one.save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_labels": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=5, **shape, **heads, pad_token_id=None, initializer_range=1.0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_decoder_without_padding_token_judges_each_text_as_alone(decoder):
    settings = Judge(source="tests:x", path=str(decoder), format="classifier", label="LABEL_1")
    judge = loading.load(settings, "toxicity")
    texts = ["good", "bad bad good bad", "good good bad", "bad </s> bad"]
    found = judging.verdicts(["x"] * 4, texts, judge, settings).p_unsafe
    for text, p in zip(texts, found, strict=True):
        alone = judge.model(torch.tensor([judge.tokenizer(text)["input_ids"]])).logits[0].double()
        assert p == pytest.approx(alone.softmax(0)[1].item(), abs=1e-5)
    assert judge.model.config.pad_token_id is None


def test_a_thought_that_does_not_end_has_neither_verdict_nor_outcome(classifier):
    path = str(classifier["single_label_classification"])
    settings = Judge(source="tests:x", path=path, format="classifier", label="toxic")
    asked = {"benchmark": "safety", "prompt_id": ["0", "1"]}
    ended = {"response": "", "finish_reason": ["length", "thought"], "n_tokens": 3, "sample": 0}
    how = {"run_id": "r", "prompt_variant": "default", "decoding": "greedy"}
    responses = RESPONSES.check(pd.DataFrame({**asked, **ended, **how}))
    prompts = pd.DataFrame({**asked, "prompt": "how ?"})
    judge = loading.load(settings, "toxicity")
    found = VERDICTS.check(judging.judged(responses, prompts, judge, settings))
    assert found.unsafe.isna().all()
    assert found.unscored_reason.tolist() == [
        "the answer is empty",
        "the answer is a thought that does not end",
    ]
    assert (found.outcome[0], pd.isna(found.outcome[1])) == ("incoherent", True)
