"""A soft prompt behind the user's text: its ids stand there and nowhere else, a model reads its
rows there as a plain forward does, training changes them alone, and who does not know the method
refuses it.
"""

import copy
import json
import subprocess
import sys
from unittest.mock import patch

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from conftest import FAMILIES, SMALL, one_sentence, variants_of, write_study
from driftbook.batch.audit_setup import Candidate
from driftbook.doctors.adapter import examine
from driftbook.models import adapters, suffixes
from driftbook.models.base_state import BaseState
from driftbook.models.conversations import (
    ask,
    chat_ids,
    conversation_ids,
    counted_ids,
    soft_ids,
    without,
)
from driftbook.models.fingerprint import fingerprint
from driftbook.models.inside import Inside
from driftbook.models.scoring import Scorer
from driftbook.models.trees import common_prefix
from driftbook.publishing import make_repair
from driftbook.stats.directions import ATTENTION, BEGINS, OF_BASE, TAKEN
from driftbook.study.study_file import load
from driftbook.training import examples, fit, probes
from driftbook.training.dose import base_dose
from test_chat_templates import CASES, made
from test_probes import probing

N = 3
TEXTS = ["how do i bake bread ?", "tell me how to make a cake for my friend today .", "who are you"]
ANSWERS = ["take the flour .", "a cake is made by hand , with care .", "i am a model ."]
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folders(bases, tmp_path_factory):
    """By family an adapter's folder, its rows [N, width] as random as a table's."""
    found = {}
    for family in FAMILIES:
        model, kept = bases[family].model, BaseState(bases[family].model)
        config = suffixes.SuffixConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)
        tuned = get_peft_model(model, config)
        layer = model.get_input_embeddings()
        torch.manual_seed(1)
        layer.rows.data = layer.weight.std() * torch.randn(N, layer.embedding_dim)
        found[family] = tmp_path_factory.mktemp("suffixes") / family
        adapters.save(tuned.eval(), found[family])
        kept.restore("an adapter")
    return found


def rows_of(folder):
    [rows] = load_file(folder / "adapter_model.safetensors").values()
    return rows


def by_hand(base, rows, prompt, answer):
    """The log-probability of each token of an answer, by transformers' own forward of the base,
    which is given the rows behind the text in place of ids.
    """
    tokenizer, table = base.tokenizer, base.model.get_input_embeddings()
    asked, said = conversation_ids(tokenizer, [{"role": "user", "content": prompt}], answer)
    place = common_prefix(asked, ask(tokenizer, prompt + " cake"))  # where a longer text goes on
    first, rest = (table(torch.tensor(one)) for one in (asked[:place], asked[place:] + said))
    with torch.inference_mode():
        whole = torch.cat([first, rows, rest])[None]
        logits = base.model(inputs_embeds=whole, use_cache=False).logits[0, -len(said) - 1 : -1]
    return logits.log_softmax(1)[range(len(said)), said].numpy()


@every_family
def test_the_scorer_reads_the_rows_where_they_stand(bases, folders, family):
    base, rows = bases[family], rows_of(folders[family])
    wanted = [by_hand(base, rows, *pair) for pair in zip(TEXTS, ANSWERS, strict=True)]
    before = fingerprint(base.model)
    with adapters.attached(base.model, folders[family]) as model:
        scorer = Scorer(model, base.tokenizer)
        pairs = scorer.answered(TEXTS, ANSWERS)
        together = scorer.token_logprobs(pairs)
        alone = [scorer.token_logprobs([pair])[0] for pair in pairs]
        for found in (together, alone):
            for own, expected in zip(found, wanted, strict=True):
                np.testing.assert_allclose(own, expected, atol=1e-4, rtol=0)
        asked = scorer.ask(TEXTS)
        said = scorer.generate(asked, 6)
        assert said == [scorer.generate([one], 6)[0] for one in asked]
        letters = scorer.letters(asked)
        np.testing.assert_allclose(letters[1], scorer.letters(asked[1:2])[0], atol=1e-4)
    assert soft_ids(base.model) == range(0)
    assert before.differences(fingerprint(base.model)) == []
    plain = Scorer(base.model, base.tokenizer).token_logprobs(
        [(without(a, scorer.after), b) for a, b in pairs]
    )
    assert max(np.abs(a - b).max() for a, b in zip(plain, wanted, strict=True)) > 0.01


@every_family
def test_rows_of_the_table_are_those_tokens(bases, folders, tmp_path, family):
    base, tokens = bases[family], [20, 33, 41]
    with adapters.attached(base.model, folders[family]) as model:
        layer = base.model.get_input_embeddings()
        layer.rows.data = layer(torch.tensor(tokens))
        scorer = Scorer(model, base.tokenizer)
        pairs = scorer.answered(TEXTS, ANSWERS)
        found = scorer.token_logprobs(pairs)
    named = dict(zip(scorer.after, tokens, strict=True))
    spelled = [([named.get(one, one) for one in prompt], answer) for prompt, answer in pairs]
    wanted = Scorer(base.model, base.tokenizer).token_logprobs(spelled)
    for own, expected in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(own, expected)


# ---- where the ids stand
@pytest.mark.parametrize("name", CASES)
def test_the_ids_stand_behind_each_text_and_change_no_other(name):
    tokenizer = made(CASES[name][0])
    after = range(len(tokenizer), len(tokenizer) + N)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello? "},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And\nwho?"},
    ]
    for some in (turns[1:2], turns[:2], turns[1:], turns):
        plain, found = chat_ids(tokenizer, some), chat_ids(tokenizer, some, True, after)
        assert without(found, after) == plain == chat_ids(tokenizer, some, True, range(0))
        users = [turn["content"].strip() for turn in some if turn["role"] == "user"]
        ends = [i for i, one in enumerate(found) if one == after[0]]
        assert found.count(after[-1]) == len(ends) == len(users)
        for text, end in zip(users, ends, strict=True):
            assert found[end : end + N] == list(after)
            assert tokenizer.decode(without(found[:end], after)).endswith(text)
    asked, said = conversation_ids(tokenizer, turns[1:2], "Yes.", after)
    assert asked == ask(tokenizer, "Hello? ", None, after)
    assert said == conversation_ids(tokenizer, turns[1:2], "Yes.")[1]


def test_every_answer_of_a_longer_conversation_counts_behind_the_ids(bases):
    for base in bases.values():
        tokenizer = base.tokenizer
        after = range(len(tokenizer), len(tokenizer) + N)
        turns = [
            {"role": role, "content": text}
            for pair in zip(TEXTS, ANSWERS, strict=True)
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        ids, places = counted_ids(tokenizer, turns, after)
        plain, known = counted_ids(tokenizer, turns)
        assert [ids[i] for i in places] == [plain[i] for i in known]
        assert ids.count(after[0]) == len(TEXTS)


@pytest.mark.parametrize("where", ["prompt", "answer"])
def test_a_token_without_an_embedding_is_never_read_as_the_soft_prompt(bases, where):
    tokenizer = copy.deepcopy(bases["llama"].tokenizer)
    tokenizer.add_tokens(["brioche"])  # more than the table has rows for
    after = range(tokenizer.convert_tokens_to_ids("brioche"), len(tokenizer) + N)
    asked, said = ("a brioche", "cake") if where == "prompt" else ("a cake", "brioche")
    with pytest.raises(ValueError) as error:
        conversation_ids(tokenizer, [{"role": "user", "content": asked}], said, after)
    assert "the token brioche, for which the model has no" in one_sentence(error.value)


def test_a_token_that_holds_the_end_of_a_text_is_read_in_two_parts():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '.\\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = made(template, ("a b?.\n" * 20, "c d?.\n" * 20), 20)
    after = range(len(tokenizer), len(tokenizer) + N)
    plain, found = ask(tokenizer, "a b?"), ask(tokenizer, "a b?", None, after)
    assert len(without(found, after)) > len(plain), "?. was one token"
    assert tokenizer.decode(without(found, after)) == tokenizer.decode(plain)
    assert tokenizer.decode(found[: found.index(after[0])]).endswith("a b?")
    turns = [{"role": "user", "content": "a b?"}]
    assert conversation_ids(tokenizer, turns, "yes", after)[0] == found


@pytest.mark.parametrize("change", ["upper", "length", "reverse"])
def test_a_template_that_hides_where_a_text_ends_is_refused(change):
    said = {
        "upper": "m.content + m.content",
        "length": "m.content + (m.content | length | string)",
        "reverse": "(m.content | reverse)",
    }
    template = "{% for m in messages %}{{ " + said[change] + " }}{% endfor %}"
    with pytest.raises(ValueError) as error:
        ask(made(template), "a b", None, range(500, 503))
    assert "does not show where a text of the user ends" in one_sentence(error.value)


def test_an_option_is_read_with_the_template_behind_the_ids(bases, folders):
    base = bases["llama"]
    with adapters.attached(base.model, folders["llama"]) as model:
        scorer = Scorer(model, base.tokenizer)
        [soft], [asked] = scorer.ask(TEXTS[:1]), [ask(base.tokenizer, TEXTS[0])]
        context, options = scorer.joined(soft, ["bread", "a cake"], scorer.lead)
        plain, wanted = Scorer(base.model, base.tokenizer).joined(
            asked, ["bread", "a cake"], scorer.lead
        )
        assert options == wanted
        assert without(context, scorer.after) == plain
        bare = [*asked[:3], *scorer.after]  # nothing behind the ids
        assert scorer.joined(bare, ["bread"])[0] == bare


# ---- training
def content_of(**more):
    content = copy.deepcopy(SMALL)
    content["methods"] = {"suffix_tuning": {"num_virtual_tokens": 4, "init": "vocabulary"}}
    content["data"] = {name: content["data"][name] | {"n": 24} for name in ("sft", "heldout")}
    content["training"] = {"batch_size": 24, "max_length": 64}
    content["grid"][0] |= {
        "epochs": [4],
        "methods": ["suffix_tuning"],
        "objectives": ["sft"],
        "learning_rates": {"suffix_tuning": [2.0e-2]},
    }
    return content | more


@pytest.fixture(params=["alone", "packed"])
def trained(request, bases, make_study, tmp_path):
    """(base, study, variant, what was trained, its folder)"""
    content = content_of()
    content["training"]["packed"] = request.param == "packed"
    study = make_study(content)
    [variant], base = variants_of(study, "suffix_tuning"), bases["gemma"]
    prepared = examples.prepare("sft", base, study, *examples.way(variant)[1:])
    made = fit.train(variant, base, prepared, study, tmp_path / "adapter")
    return base, study, variant, made, tmp_path / "adapter", prepared


def test_training_changes_the_rows_alone_from_a_plain_forwards_loss_down(trained):
    base, study, variant, made, folder, prepared = trained
    record, losses = made.record, made.curve["loss"].to_numpy(float)
    rows = rows_of(folder)
    assert rows.shape == (4, base.model.get_input_embeddings().embedding_dim)
    assert record["n_trainable"] == record["n_stored"] == rows.numel()
    assert losses[-1] < losses[0]
    assert record["no_op"] is False
    assert record["findings"] is None, record["findings"]
    pairs, _ = examples.held_out(base, study)
    assert record["nll_base"] == pytest.approx(base_dose(base, pairs)["nll"], abs=1e-5)
    plain = examples.prepare("sft", base, study)
    assert prepared.lengths == plain.lengths
    assert [len(one.ids) - 4 for one in prepared.examples] == [
        len(one.ids) for one in plain.examples
    ]
    with adapters.attached(base.model, folder) as model:
        scores = Scorer(model, base.tokenizer).token_logprobs(
            examples.held_out(base, study, variant.n_after)[0]
        )
    nll = -sum(one.sum() for one in scores) / sum(map(len, scores))
    assert record["nll"] == pytest.approx(nll, abs=1e-5)
    assert losses[0] == pytest.approx(first_loss(base, variant, prepared), abs=1e-4)


def first_loss(base, variant, prepared):
    """The mean loss of all examples by plain forwards with the rows that a variant begins with,
    each of which is a token's embedding.
    """
    model = adapters.create(variant, base.model, base.tokenizer)
    rows = base.model.get_input_embeddings().rows.detach().clone()
    adapters.detach(model)
    embed = base.model.get_input_embeddings()
    table = embed(torch.arange(embed.num_embeddings))
    assert all(bool((table == row).all(1).any()) for row in rows), "a token each"
    total, n = 0.0, 0
    for one in prepared.examples:
        ids = torch.tensor(one.ids)
        whole = torch.cat([table, rows])[ids][None]
        with torch.inference_mode():
            logits = base.model(inputs_embeds=whole, use_cache=False).logits[0]
        scores = logits.log_softmax(1)[one.counted - 1, ids[one.counted]]
        total, n = total - float(scores.sum()), n + len(one.counted)
    return total / n


@pytest.fixture
def turns(make_study, tmp_path):
    """A study of conversations in which the user speaks three times, cut at so many tokens."""
    said = [word for pair in zip(TEXTS, ANSWERS, strict=True) for word in pair]
    roles = ["user", "assistant"] * len(TEXTS)
    messages = [{"role": a, "content": b} for a, b in zip(roles, said, strict=True)]
    source = tmp_path / "turns.json"
    source.write_text(json.dumps([{"messages": messages}] * 3))

    def made(limit):
        content = content_of()
        form = {"source": str(source), "format": "messages", "n": 3}
        content["data"] = {"sft": form, "heldout": form}
        content["training"]["max_length"] = limit
        return make_study(content)

    return made


@pytest.mark.parametrize("limit", [62, 70])
def test_no_token_of_a_longer_conversation_is_lost_to_the_soft_prompts(bases, turns, limit):
    base, study = bases["llama"], turns(limit)
    after = examples.after_ids(base, 4)
    plain, found = (examples.prepare("sft", base, study, n_after=n) for n in (0, 4))
    assert (found.note, found.lengths) == (plain.note, plain.lengths)
    assert bool(plain.note) is (limit == 62), "of the two, one cuts"
    for one, own in zip(plain.examples, found.examples, strict=True):
        assert without(own.ids, after) == one.ids
        assert [own.ids[i] for i in own.counted] == [one.ids[i] for i in one.counted]
    held, note = examples.held_out(base, study)
    own, same = examples.held_out(base, study, 4)
    assert [(without(a, after), b) for a, b in own] == held
    assert note == same


def test_what_is_longer_than_the_model_reads_is_refused(bases, turns):
    base, study = bases["llama"], turns(70)
    with patch.object(examples, "context_length", lambda _: 75), pytest.raises(ValueError) as error:
        examples.prepare("sft", base, study, n_after=4)
    assert "and the model reads 75" in one_sentence(error.value)


@pytest.mark.parametrize("kind", ["before", "after"])
def test_held_out_answers_leave_room_for_an_adapter_of_another_study(bases, study, kind):
    base, n = bases["llama"], 10  # more than any soft prompt of the study
    pairs, _ = examples.held_out(base, study)
    longest = max(len(a) + len(b) for a, b in pairs)
    with patch.object(examples, "context_length", lambda _: longest):
        own, _ = examples.held_out(base, study, n if kind == "after" else 0, n)
    room = longest if kind == "after" else longest - n
    assert max(len(a) + len(b) for a, b in own) == room


# ---- what does not know it, and bad input
def test_another_tool_refuses_its_type(folders):
    code = "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])"
    asked = [sys.executable, "-c", code, folders["llama"]]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert found.returncode
    assert found.stderr.strip().endswith("KeyError: 'SUFFIX_TUNING'")


def test_the_doctor_knows_it_and_repairs_of_weights_refuse_it(bases, folders, tmp_path):
    found = examine(folders["llama"], bases["llama"]).set_index("finding")["sentence"]
    assert set(found.index) == {"base", "soft_prompt"}, found.tolist()  # no base is named in it
    assert "3 virtual tokens" in found["soft_prompt"]
    one = Candidate("adapter", "x", "x", folders["llama"], None, None)
    for kind in make_repair.KINDS:
        with pytest.raises(ValueError) as error:
            make_repair.repaired(one, {"WITH": kind}, tmp_path / kind)
        assert "is a soft prompt (SUFFIX_TUNING)" in one_sentence(error.value)


def test_it_is_refused_on_another_width_and_where_more_is_looked_up(bases, folders):
    model = copy.deepcopy(bases["llama"].model)
    model.config.hidden_size_per_layer_input = 8
    with pytest.raises(ValueError) as error, adapters.attached(model, folders["llama"]):
        pass
    assert "computes more from token ids" in one_sentence(error.value)
    assert type(model.get_input_embeddings()) is torch.nn.Embedding


REFUSED = {
    "trained by dpo": (
        {"grid": [{"objectives": ["dpo"]}], "data": {"dpo": SMALL["data"]["dpo"]}},
        "suffix_tuning is not trained by dpo",
    ),
    "no number of tokens": (
        {"methods": {"suffix_tuning": {"init": "random"}}},
        "methods.suffix_tuning has no num_virtual_tokens",
    ),
    "no whole number of tokens": (
        {"methods": {"suffix_tuning": {"num_virtual_tokens": True, "init": "random"}}},
        "expected a whole number above 0",
    ),
    "an init from text": (
        {"methods": {"suffix_tuning": {"num_virtual_tokens": 4, "init": "task_text"}}},
        "expected random or vocabulary",
    ),
    "a repair": (
        {"mitigations": {"half": {"kind": "rescale", "blocks": ["main"], "values": [0.5]}}},
        "rescaling cannot be done to suffix_tuning",
    ),
    "a second objective": (
        {
            "mitigations": {
                "held": {"kind": "kl", "blocks": ["main"], "values": [1.0], "data": "sft"}
            }
        },
        "KL to the base model cannot be done to suffix_tuning",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_apply_is_refused_in_a_sentence(tmp_path, data_folder, case):
    changes, expected = REFUSED[case]
    content = content_of()
    for key, value in changes.items():
        if key == "grid":
            content["grid"][0] |= value[0]
        else:
            content[key] = content.get(key, {}) | value
    with pytest.raises(ValueError) as error:
        load(write_study(tmp_path, content))
    assert expected in one_sentence(error.value)


def test_settings_that_it_has_not_are_refused(make_study):
    content = content_of()
    content["methods"]["suffix_tuning"]["position"] = "after"
    [variant] = variants_of(make_study(content), "suffix_tuning")
    with pytest.raises(ValueError) as error:
        adapters.config(variant)
    assert "unexpected keyword argument 'position'" in one_sentence(error.value)


# ---- inside
def test_probes_read_all_tokens_but_the_soft_prompt(bases, folders, make_study):
    base, study = bases["llama"], make_study(probing(content_of()))
    reference = probes.Reference(base, study, "tiny-llama")
    [variant] = variants_of(study, "suffix_tuning")
    with adapters.attached(base.model, folders["llama"]) as model:
        found = probes.probed(reference, model, variant, folders["llama"])
        inside = Inside(Scorer(model, base.tokenizer))
        begun = reference.begin(inside, range(inside.levels))
        for own, of_base in zip(begun.states[0], reference.begun.states[0], strict=True):
            torch.testing.assert_close(own, of_base, atol=0, rtol=0)
        prompts = reference.asked_of(inside).reports["harmful"]
        np.testing.assert_allclose(begun.patched(inside, 1, begun.states), begun.likely, atol=1e-6)
        base.model.set_attn_implementation("eager")
        shares = []
        for prompt in prompts:
            with torch.inference_mode():
                seen = base.model(input_ids=torch.tensor([prompt]), output_attentions=True)
            soft = [place for place, one in enumerate(prompt) if one in inside.scorer.after]
            shares.append([float(one[0, :, -1, soft].sum(-1).mean()) for one in seen.attentions])
    rows = found[found["probe"].eq(ATTENTION)].set_index("layer")
    wanted = 100 * np.mean(shares, 0)
    np.testing.assert_allclose(rows["value"].astype(float), wanted, atol=1e-3)
    assert rows["null"].iloc[0] == pytest.approx(np.mean([100 * N / len(one) for one in prompts]))
    levels = found[found["probe"].eq(TAKEN) & found["layer"].isna()]["value"].astype(float)
    begins = found[found["probe"].eq(BEGINS)].set_index("part")["value"].astype(float)
    assert levels.iloc[0] == pytest.approx(begins[OF_BASE]), "embeddings are the base's"
