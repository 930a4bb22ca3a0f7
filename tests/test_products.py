"""Products of distributions (MOD): the oracle is the slow way, one sequence at a time, by the full
forward passes of separate models whose log-probabilities are mixed by hand.
"""

import copy
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from conftest import OTHER_METHODS, PEFT_METHODS, SMALL, one_sentence, write_study
from driftbook.batch import costing, jobs
from driftbook.batch.opened import Job
from driftbook.models import adapters, base_state
from driftbook.models.base_state import BaseState
from driftbook.models.fingerprint import model_hash
from driftbook.models.products import multiplied
from driftbook.models.sampling import Sampling, VariantFailure, next_tokens, uniforms
from driftbook.models.scoring import Scorer
from driftbook.study import folders as study_folders
from driftbook.study.files import digest
from driftbook.study.folders import adapter_files
from driftbook.study.study_file import Study, load
from driftbook.study.tables import RUNS
from driftbook.training import examples, repairs, stage
from scored import LENGTHS, TOLERANCE, pairs_of

CASES = [("llama", method) for method in (*PEFT_METHODS, *OTHER_METHODS)]
CASES += [(family, "lora") for family in ("qwen2", "mistral", "gemma")]
cases = pytest.mark.parametrize(("family", "method"), CASES)
WEIGHTS = (0.3, 0.7)


@pytest.fixture(scope="session")
def folders(adapter_folders, tmp_path_factory):
    """{(family, method): three folders}: of the shared adapter, and of two others of its form."""
    made = {}
    for case in CASES:
        made[case] = [adapter_folders[case]]
        for seed in (1, 2):
            other = tmp_path_factory.mktemp("others") / "-".join(case)
            shutil.copytree(adapter_folders[case], other)
            generator = torch.Generator().manual_seed(seed)
            values = load_file(other / adapters.WEIGHTS)
            for name, one in values.items():
                noise = torch.randn(one.shape, generator=generator)
                values[name] = one + 0.3 * noise * one.std(correction=0)
            save_file(values, other / adapters.WEIGHTS)
            made[case].append(other)
    return made


class ByHand:
    """Separate models, each with a copy of the base, and the power of each."""

    def __init__(self, base, folders, weights):
        fresh = [copy.deepcopy(base.model) for _ in folders]
        self.models = [
            PeftModel.from_pretrained(one, folder).eval() if folder else one
            for one, folder in zip(fresh, folders, strict=True)
        ]
        self.weights = weights

    @torch.inference_mode()
    def logprobs(self, ids):
        """Log-probabilities [tokens, vocabulary] of one sequence."""
        found = 0.0
        for model, weight in zip(self.models, self.weights, strict=True):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :].double()
            found = found + weight * logits.log_softmax(1)
        return found.log_softmax(1)

    def scored(self, pair):
        context, said = pair
        found = self.logprobs([*context, *said])
        return [float(found[len(context) + t - 1, one]) for t, one in enumerate(said)]

    def written(self, context, n, end, sampling=None):
        said = []
        draws = None if sampling is None else uniforms([context], sampling, n)
        while len(said) < n and said[-1:] != [end]:
            last = self.logprobs([*context, *said])[-1:]
            step = None if draws is None else draws[:, len(said)]
            said.append(int(next_tokens(last, sampling, step)[0]))
        return [one for one in said if one != end]


def pairs_with_common_beginnings(base):
    header = pairs_of(base, [(14, 1)], seed=5)[0][0]
    branches = pairs_of(base, [(4, 2), (9, 3), (1, 1), (9, 5)], seed=6)
    return [*pairs_of(base, LENGTHS), *((header + context, said) for context, said in branches)]


# ---- against the slow way
@cases
def test_log_probabilities_and_answers_are_those_of_models_mixed_by_hand(
    bases, folders, family, method
):
    base, some = bases[family], folders[family, method][:2]
    oracle, pairs = ByHand(base, some, WEIGHTS), pairs_with_common_beginnings(base)
    contexts = [context for context, _ in pairs[:4]]
    before, end = model_hash(base.model), base.tokenizer.eos_token_id
    drawn = Sampling(temperature=0.8, top_p=0.9, seed=3)
    with multiplied(base.model, list(zip(some, WEIGHTS, strict=True))) as model:
        scorer = Scorer(model, base.tokenizer)
        assert scorer.engine.ways.shared, "nothing fast is tried here"
        found = scorer.token_logprobs(pairs)
        [whole] = scorer.distributions(pairs[:1])
        greedy, sampled = (scorer.generate(contexts, 6, way) for way in (None, drawn))
        alone = [scorer.generate([one], 6)[0] for one in contexts]
    for pair, scores in zip(pairs, found, strict=True):
        np.testing.assert_allclose(scores, oracle.scored(pair), atol=TOLERANCE, rtol=0)
    context, said = pairs[0]
    expected = oracle.logprobs([*context, *said])[len(context) - 1 : -1]
    torch.testing.assert_close(whole.double(), expected, atol=TOLERANCE, rtol=0)
    assert greedy == alone
    for answers, way in ((greedy, None), (sampled, drawn)):
        for context, answer in zip(contexts, answers, strict=True):
            tokens = oracle.written(context, 6, end, way)
            assert answer.text == base.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert model_hash(base.model) == before


def test_options_are_scored_by_the_product(bases, folders):
    base, some = bases["llama"], folders["llama", "lora"]
    weights, options = (0.2, 0.5, 0.3), ["A", "B", "C"]
    oracle = ByHand(base, some, weights)
    contexts = [context for context, _ in pairs_of(base, [(20, 1), (31, 1)], seed=3)]
    with multiplied(base.model, list(zip(some, weights, strict=True))) as model:
        scorer = Scorer(model, base.tokenizer)
        letters = scorer.letters(contexts)
        longer = scorer.choices(contexts, [["A B", "C"]] * 2, " ")
        joined = [scorer.joined(one, options) for one in contexts]
        spelled = [scorer.joined(one, ["A B", "C"], " ") for one in contexts]
    for found, asked in ((letters, joined), (longer, spelled)):
        expected = [
            [sum(oracle.scored((context, option))) for option in row] for context, row in asked
        ]
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_the_weight_on_one_run_is_this_run_to_the_bit(bases, folders, dtype):
    base, some = bases["llama"], folders["llama", "lora"][:2]
    loaded = copy.deepcopy(base.model).to(dtype)
    pairs = pairs_with_common_beginnings(base)
    contexts = [context for context, _ in pairs]

    def asked(model):
        scorer = Scorer(model, base.tokenizer)
        said = [scorer.generate(contexts, 6, way) for way in (None, Sampling(seed=1))]
        return np.concatenate(scorer.token_logprobs(pairs)), said

    found = []
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        with multiplied(loaded, list(zip(some, weights, strict=True))) as model:
            found.append(asked(model))
    for (scores, said), folder in zip(found, some, strict=True):
        with adapters.attached(loaded, folder) as model:
            own, written = asked(model)
        assert np.array_equal(scores, own)
        assert said == written
    assert not np.array_equal(found[0][0], found[1][0])


def test_the_base_with_itself_is_the_base(bases):
    base = bases["gemma"]
    pairs = pairs_of(base, LENGTHS)
    own = Scorer(base.model, base.tokenizer).token_logprobs(pairs)
    with multiplied(base.model, [(None, 0.25), (None, 0.75)]) as model:
        found = Scorer(model, base.tokenizer).token_logprobs(pairs)
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(own), atol=1e-5, rtol=0)


def test_the_plain_way_gives_the_same(bases, folders):
    base, some = bases["llama"], folders["llama", "prompt_tuning"][:2]
    pairs = pairs_with_common_beginnings(base)
    contexts = [context for context, _ in pairs]
    with multiplied(base.model, list(zip(some, WEIGHTS, strict=True))) as model:
        scorer = Scorer(model, base.tokenizer)
        fast = scorer.token_logprobs(pairs), scorer.generate(contexts, 6)
        for cached in (True, False):  # of one part alone: what is not its own is not used of any
            part = scorer.engine.parts[1]
            part.ways = replace(part.ways, shared=False, rows=False, cached=cached, reason="a test")
            with pytest.warns(UserWarning, match="of its own|one answer at a time"):
                scores, said = scorer.token_logprobs(pairs), scorer.generate(contexts, 6)
            np.testing.assert_allclose(
                np.concatenate(scores), np.concatenate(fast[0]), atol=TOLERANCE, rtol=0
            )
            assert said == fast[1]
            scorer = Scorer(model, base.tokenizer)


def test_weights_of_the_base_are_there_once(bases, folders):
    base = bases["llama"].model
    some = [(folder, 0.5) for folder in folders["llama", "lora"][:2]]
    own = {one.data_ptr() for one in base.parameters()}
    with multiplied(base, some) as model:
        for part in model.parts:
            more = {one.data_ptr() for one in part.parameters()} - own
            assert len(more) == len(load_file(some[0][0] / adapters.WEIGHTS))
    with multiplied(base, some) as again:
        assert [a.get_base_model() for a in again.parts] == [
            b.get_base_model() for b in model.parts
        ]


# ---- what is refused
@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ((1.0,), "at least two parts, and there is 1"),
        ((0.5, 0.6), "sum to one, not 0.5, 0.6"),
        ((-0.5, 1.5), "at least 0"),
    ],
)
def test_weights_that_are_none(bases, folders, weights, words):
    some = folders["llama", "lora"][: len(weights)]
    parts = list(zip(some, weights, strict=True))
    with pytest.raises(ValueError, match=words) as error, multiplied(bases["llama"].model, parts):
        pass
    one_sentence(error.value)


def test_models_of_which_no_product_can_be_made(bases, folders, tmp_path):
    base, own = bases["llama"], folders["llama", "lora"][0]
    with pytest.raises(ValueError, match="str does not give"), multiplied("endpoint", [(own, 1.0)]):
        pass
    parts = [(own, 0.5), (folders["gemma", "lora"][0], 0.5)]
    before = model_hash(base.model)
    with pytest.raises(ValueError, match="does not fit this base"), multiplied(base.model, parts):
        pass
    model = copy.deepcopy(bases["qwen2"].model)  # which has biases
    kept, config = BaseState(model), LoraConfig(task_type="CAUSAL_LM", r=2, bias="all")
    kept.copy(model.parameters())
    config.target_modules = ["q_proj"]
    made = get_peft_model(model, config)
    for name, value in made.named_parameters():
        if value.requires_grad and name.endswith("bias"):
            value.data += 1.0
    adapters.save(made, tmp_path)
    kept.restore("a test")
    parts = [(folders["qwen2", "lora"][0], 0.5), (tmp_path, 0.5)]
    with pytest.raises(ValueError, match="writes over weights"), multiplied(model, parts):
        pass
    assert model_hash(base.model) == before
    parts = [(own, 0.5), (own, 0.5)]
    with (
        adapters.attached(base.model, own),
        pytest.raises(ValueError, match="without adapters"),
        multiplied(base.model, parts),
    ):
        pass
    spoiled = copy.deepcopy(base.model)
    base_state._SPOILED[spoiled] = "it was changed"
    with pytest.raises(base_state.SpoiledBase), multiplied(spoiled, parts):
        pass


def test_a_base_that_is_given_other_weights_is_multiplied_with_them(bases, folders):
    model, own = copy.deepcopy(bases["llama"].model), folders["llama", "lora"][0]
    with multiplied(model, [(own, 0.5), (None, 0.5)]):
        pass
    others = {name: 1.1 * one for name, one in model.state_dict().items()}
    model.load_state_dict(others, assign=True)
    model.tie_weights()
    with multiplied(model, [(None, 0.5), (None, 0.5)]) as product:
        tensors = {id(one) for one in model.parameters()}
        assert all(id(one) in tensors for part in product.parts for one in part.parameters())


def content(own="lora", safe="lora", same=(), twice="", early="", **settings):
    """A study with a product of the runs of two blocks, and a third one; two of them may be the
    `same`, one have two sets of data (`twice`), one be of the first layers (`early`).
    """
    made = copy.deepcopy(SMALL)
    first = made["grid"][0] | {"objectives": ["sft"], "methods": [own]}
    names = {"main": [own], "safe": [safe], "fair": [own]}
    data = {"main": [], "safe": ["dpo_like"], "fair": ["fair"]}
    data |= dict.fromkeys(same, data[same[0]] if same else [])
    data |= {twice: ["dpo_like", "fair"]} if twice else {}
    rates = made["grid"][0]["learning_rates"]
    made["grid"] = [
        first
        | {"name": name, "methods": methods, "data": data[name], "learning_rates": rates}
        | ({"layers": ["early"]} if name == early else {})
        for name, methods in names.items()
    ]
    for name in ("dpo_like", "fair"):
        made["data"][name] = made["data"]["sft"]
    mod = {"kind": "mod", "blocks": ["main"], "safety": "safe", "values": [0.25, 0.5]}
    made["mitigations"] = {"mod": mod | settings}
    return made


def test_a_product_names_its_runs_and_their_weights():
    study = Study(**content(others={"fair": 0.25}))
    variants = {one.run_id: one for one in study.variants}
    products = [one for one in variants.values() if one.parts]
    parents = [one for one in variants.values() if one.method == "lora" and one.dataset == "sft"]
    assert len(products) == 2 * len([one for one in parents if not one.parts])
    for one in products:
        by_data = {variants[name].dataset: weight for name, weight in one.parts.items()}
        value = one.repair["value"]
        assert by_data == {"sft": 0.75 - value, "dpo_like": value, "fair": 0.25}
        assert {variants[name].repetition for name in one.parts} == {one.repetition}
        assert {variants[name].base_model for name in one.parts} == {one.base_model}
        assert one.made_in == "mitigate"


def test_a_run_of_a_study_is_made_recorded_and_opened_as_its_product(bases, data_folder):
    study, base = Study(**content(values=[0.3]) | {"name": "multiplied"}), bases["llama"]
    variants = {one.run_id: one for one in study.variants}
    one = next(some for some in variants.values() if some.parts)
    with pytest.raises(VariantFailure, match="that run failed"):
        stage.repair_variant(one, base, study)
    for part in (variants[run_id] for run_id in one.parts):
        stage.train_variant(part, base, study, stage.prepare_all([part], base, study))
    files = stage.repair_variant(one, base, study)
    assert {path.stem for path in files} == {"runs", "modules"}
    own = study_folders.folder(study, one)
    assert {path.name for path in own.iterdir()} == {path.name for path in files}
    record, parent = (
        RUNS.read(study_folders.folder(study, some)).iloc[0]
        for some in (one, variants[one.parent_run_id])
    )
    assert record[["adapter_sha256", "n_stored", "findings"]].isna().all()
    assert record["trainer_arguments"] == parent["trainer_arguments"]
    pairs = examples.held_out(base, study)[0]
    oracle = ByHand(base, study_folders.part_adapters(study, one), tuple(one.parts.values()))
    nll = -np.concatenate([oracle.scored(pair) for pair in pairs]).mean()
    assert record["nll"] == pytest.approx(nll, abs=1e-4)
    assert record["nll_base"] == pytest.approx(parent["nll_base"], abs=1e-6)
    assert record["kl_base"] > 0
    assert (pd.isna(record["kl_init"]), record["no_op"]) == (True, False)  # it has no start
    job = Job("respond", study, "tiny-llama", [one])
    job.__dict__["base"] = base
    assert job.example.method == "none"
    assert job.adapter_files(one) == repairs.made_from(study, one)
    assert all(path.is_file() for path in job.adapter_files(one))
    with job.attached(one) as model:
        found = Scorer(model, base.tokenizer).token_logprobs(pairs)
    assert -np.concatenate(found).mean() == pytest.approx(nll, abs=1e-4)


def test_what_is_kept_of_a_product_is_no_other_run_s(tmp_path, monkeypatch):
    study = Study(**content(values=[0.3, 0.4]))
    every = [one for one in study.variants if one.method == "lora" and one.repetition == 1]
    seen, names = {}, {path: str(path) for one in every for path in adapter_files(study, one)}
    monkeypatch.setattr(jobs.cache, "content", names.get)
    monkeypatch.setattr(jobs.keys, "made_by", lambda shared, one: shared)
    for one in every:

        def kept(key, *_, one=one):
            seen[one.run_id] = digest(key)
            return []

        monkeypatch.setattr(jobs.cache, "served", kept)
        own = jobs._Task("respond", study, {}, partial(adapter_files, study), None)
        jobs._work(own, one, tmp_path)
    assert len(set(seen.values())) == len(every) >= 5


def test_what_a_product_is_asked_costs_as_much_as_its_parts():
    study = Study(**content(values=[0.3], others={"fair": 0.2}))
    rows = costing.amounts(study)
    one = next(some for some in study.variants if some.parts)
    work = rows[rows["kind"].ne("piece") & rows["kind"].ne("read probe")]
    work = work.groupby(["stage", "run_id"])["operations"].sum()
    for name, times in {"respond": 3, "answer": 3, "utility": 3, "judge": 1}.items():
        assert work[name, one.run_id] == pytest.approx(times * work[name, one.parent_run_id])


AGAIN = {"kind": "second_tuning", "blocks": ["main"], "of": ["mod"], "data": "sft"}
INT8 = {"bases": {"tiny-llama": {"quantization": "int8"}}}
WRONG = {
    "no other run": ({"safety": None}, {}, "needs safety"),
    "no weight": ({"values": []}, {}, "needs values"),
    "itself": ({"safety": "main"}, {}, "to itself"),
    "itself beside": ({"others": {"main": 0.1}}, {}, "to itself"),
    "no such block": ({"others": {"fare": 0.1}}, {}, "'fare'"),
    "one twice": ({"others": {"safe": 0.1}}, {}, "once is enough"),
    "all of the weight": ({"values": [1.0]}, {}, "leaves nothing"),
    "more than all of it": ({"others": {"fair": 0.5}}, {}, "others have the weight 1, so"),
    "all of it by rounding": ({"values": [0.3], "others": {"fair": 0.7}}, {}, "weight 1, so"),
    "one run under two names": (
        {"others": {"fair": 0.2}, "same": ("safe", "fair")},
        {},
        "by itself",
    ),
    "the run itself": ({"same": ("main", "safe")}, {}, "by itself"),
    "several runs beside": ({"twice": "safe"}, {}, "has 2 runs of lora"),
    "a block of few layers": ({"early": "safe"}, {}, "which has layers"),
    "a run of no such method": ({"safe": "ia3"}, {}, "no run of lora on tiny-llama"),
    "tuned again": ({}, {"again": AGAIN | {"values": [1e-3]}}, "no weights to tune"),
    "biases": ({}, {"methods": {"lora": {"bias": "all"}}}, "lora has bias all, which writes over"),
    "int8": ({"own": "ia3", "safe": "ia3"}, INT8, "to tiny-llama in int8"),
    "a residual": (
        {},
        {"methods": {"lora": {"init_lora_weights": "pissa"}}},
        "init_lora_weights pissa, which writes over",
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_said_in_one_sentence(case, tmp_path, data_folder):
    settings, more, words = case
    made = content(**settings)
    made["mitigations"] |= {name: one for name, one in more.items() if name == "again"}
    for part in ("methods", "bases"):
        for name, own in more.get(part, {}).items():
            made[part][name] |= own
    with pytest.raises(ValueError) as error:
        load(write_study(tmp_path, made)).variants  # noqa: B018
    assert words in one_sentence(error.value)
