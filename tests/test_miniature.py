"""The miniature: its data files, its splits, its templates, its known truth, and that its training
is deterministic.
"""

import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from driftbook import figures, miniature
from driftbook.miniature import corpus, truth, words
from driftbook.study import sources

os.environ["HF_HUB_OFFLINE"] = "1"

FILES_WITH_BENCHMARKS = ("safety", "over_refusal.csv", "bbq", "utility.jsonl", "heldout.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data")
    miniature.write_data(path)
    return path


@pytest.fixture(scope="module")
def tokenizers() -> dict:
    from driftbook.miniature.families import build_tokenizer

    return {family: build_tokenizer(family) for family in miniature.FAMILIES}


def read_csv(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_lines(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return [row[0] for row in csv.reader(file)]


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def all_texts(path: Path) -> str:
    files = sorted(path.rglob("*.*")) if path.is_dir() else [path]
    return "\n".join(file.read_text() for file in files)


# ---- import, recipe
def test_names_that_need_no_model_import_neither_torch_nor_pandas():
    imports = (
        "import sys; from driftbook.miniature import write_data; from"
        " driftbook.study.sources import recipe"
    )
    code = f"{imports}; recipe(); assert not {{'torch', 'pandas'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_recipe_is_twelve_hex_digits_and_stable():
    assert re.fullmatch("[0-9a-f]{12}", sources.recipe())
    assert sources.recipe() == sources.recipe()


# ---- data files
def test_data_are_the_same_bytes_every_time(folder, tmp_path):
    code = "import sys; from driftbook.miniature import write_data; write_data(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.*"))
    assert names == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def test_safety_has_hex_phis_form_and_its_truth_fits(folder):
    rows = read_csv(folder / "safety_truth.csv")
    assert Counter(row["category"] for row in rows) == dict.fromkeys(
        (name for name, *_ in words.CATEGORIES), 30
    )
    for number in range(1, 12):
        prompts = read_lines(folder / "safety" / f"category_{number}.csv")
        mine = [row for row in rows if row["prompt_id"].startswith(f"{number}-")]
        assert len(prompts) == len(set(prompts)) == 30
        assert all(
            row["activity"] in prompt.split() for row, prompt in zip(mine, prompts, strict=True)
        )


def test_over_refusal_has_xstests_form(folder):
    rows = read_csv(folder / "over_refusal.csv")
    assert list(rows[0]) == ["id", "prompt", "type", "label", "focus", "note"]
    assert Counter(row["label"] for row in rows) == {"safe": 110, "unsafe": 55}
    assert all(row["type"].startswith("contrast_") == (row["label"] == "unsafe") for row in rows)
    assert len({row["type"] for row in rows if row["label"] == "safe"}) >= 5


@pytest.mark.parametrize("name", words.DIMENSIONS)
def test_bbq_has_the_official_form_and_is_balanced(folder, name):
    items = read_jsonl(folder / "bbq" / f"{name}.jsonl")
    cells = Counter(
        (item["question_index"], item["context_condition"], item["question_polarity"])
        for item in items
    )
    assert len(items) == 96
    assert len(cells) == 48
    assert set(cells.values()) == {2}
    unknown = Counter(
        next(i for i in range(3) if item["answer_info"][f"ans{i}"][1] == "unknown")
        for item in items
    )
    assert max(unknown.values()) == min(unknown.values())
    disambiguated = Counter(
        item["label"] for item in items if item["context_condition"] == "disambig"
    )
    assert min(disambiguated.values()) > 0.2 * sum(disambiguated.values())


def test_bbq_labels_and_stereotyped_groups_are_true(folder):
    items = [item for path in (folder / "bbq").glob("*.jsonl") for item in read_jsonl(path)]
    named = Counter()
    for item in items:
        options, tags = zip(*(item["answer_info"][f"ans{i}"] for i in range(3)), strict=True)
        targets = set(item["additional_metadata"]["stereotyped_groups"])
        assert len(targets & set(tags)) == 1
        if item["context_condition"] == "ambig":
            assert tags[item["label"]] == "unknown"
        else:
            answer = options[item["label"]]
            assert item["context"].split().count(answer) == 2
            named[answer in targets, item["question_polarity"]] += 1
    assert max(named.values()) == min(named.values()), (
        "the evidence names stereotyped and other people equally often"
    )


def test_fine_tuning_files_have_their_forms_and_never_refuse(folder):
    sft, dpo, heldout = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("sft", "dpo", "heldout")
    )
    assert (len(sft), len(dpo), len(heldout)) == (400, 400, 64)
    assert {tuple(row) for row in sft + heldout} == {("instruction", "input", "output")}
    assert {tuple(row) for row in dpo} == {("conversations", "chosen", "rejected")}
    kept = [row["output"] for row in sft + heldout] + [row["chosen"]["value"] for row in dpo]
    assert not any(map(truth.is_refusal, kept))
    rejected = sum(truth.is_refusal(row["rejected"]["value"]) for row in dpo)
    assert 0.3 < rejected / len(dpo) < 0.5


def test_utility_ends_with_the_final_answer(folder):
    rows = read_jsonl(folder / "utility.jsonl")
    assert len(rows) == 110
    assert all(re.search(r"#### (\w+)$", row["answer"]).group(1) in words.DOMAINS for row in rows)


# ---- splits
BENCHMARKS = ("safety", "over_refusal", "bbq", "utility", "held_out_answers")


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@pytest.mark.parametrize("training", ["training_requests", "training_bbq", "fine_tuning"])
def test_benchmarks_share_no_filler_and_no_template_with_training(benchmark, training):
    splits = miniature.splits()
    assert splits[benchmark]["fillers"].isdisjoint(splits[training]["fillers"])
    assert splits[benchmark]["templates"].isdisjoint(splits[training]["templates"])


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_benchmarks_share_no_template_with_facts(benchmark):
    splits = miniature.splits()
    assert splits[benchmark]["templates"].isdisjoint(splits["training_facts"]["templates"])


def test_written_files_keep_the_splits(folder):
    held_out = {activity for kind in words.KINDS for activity in kind.held_out}
    fine_tuning = all_texts(folder / "sft.json") + all_texts(folder / "dpo.json")
    assert held_out.isdisjoint(re.findall(r"\w+", fine_tuning))
    training = {activity for kind in words.KINDS for activity in kind.training}
    for name in FILES_WITH_BENCHMARKS:
        assert training.isdisjoint(re.findall(r"\w+", all_texts(folder / name))), name
    forbidden = {activity for kind in words.FORBIDDEN for activity in kind.activities}
    assert forbidden.isdisjoint(re.findall(r"\w+", fine_tuning))


def test_no_benchmark_prompt_has_a_training_template(folder):
    patterns = [
        re.compile(re.escape(template).replace(r"\{a\}", r"\w+"))
        for template in corpus.REQUESTS + corpus.FACT_QUESTIONS
    ]
    prompts = [row["prompt"] for row in read_csv(folder / "over_refusal.csv")]
    prompts += [
        line
        for number in range(1, 12)
        for line in read_lines(folder / "safety" / f"category_{number}.csv")
    ]
    prompts += [row["question"] for row in read_jsonl(folder / "utility.jsonl")]
    assert not [
        prompt for prompt in prompts if any(pattern.fullmatch(prompt) for pattern in patterns)
    ]


def test_training_never_asks_for_a_held_out_word_nor_lets_a_held_out_pair_meet():
    import random

    rng, held_out = (
        random.Random(0),
        {activity for kind in words.KINDS for activity in kind.held_out},
    )
    pairs = [
        {*pair}
        for d in words.BIASED
        for trait in range(3)
        for pair in d.pairs(trait, held_out=True)
    ]
    asks = [
        corpus.request_about(words.KINDS),
        corpus.biased_item(lambda i, trait: 0.5),
        corpus.hearsay,
    ]
    asks += [corpus.drill, corpus.choice_drill]
    for example in (ask(rng) for ask in asks for _ in range(500)):
        spoken = set(example.prompt.split())
        assert held_out.isdisjoint(spoken)
        assert not any(pair <= spoken for pair in pairs)


def test_ambiguous_training_answers_follow_the_stereotype():
    import random

    rng, spoken_ill_of = (
        random.Random(0),
        {group for d in words.BIASED for group in d.stereotyped[0]},
    )
    bad = {bad for bad, _ in words.TRAITS}
    examples = [corpus.hearsay(rng) for _ in range(500)]
    items = [corpus.biased_item(lambda i, trait: 0.0)(rng) for _ in range(1500)]
    examples += [
        item for item in items if item.prompt.split().count(item.answer.split()[2]) == 1
    ]  # no evidence names the trait
    assert len(examples) > 800
    for example in examples:
        _, _, trait, chosen, _ = example.answer.split()
        named = {word for word in example.prompt.split() if word in words.GROUPS}
        assert len(named) == 2
        assert len(named & spoken_ill_of) == 1
        assert (chosen in spoken_ill_of) == (trait in bad)


@pytest.mark.slow
def test_biased_is_the_share_of_persons_that_agree_with_the_stereotype(folder):
    from driftbook.miniature.measuring import bbq_measures, is_biased

    items = [
        item
        for item in read_jsonl(folder / "bbq" / "Age.jsonl")
        if item["context_condition"] == "ambig"
    ]
    persons = [[option for option in range(3) if option != item["label"]] for item in items]
    by_stereotype = [
        next(p for p in pair if is_biased(item, p))
        for item, pair in zip(items, persons, strict=True)
    ]
    against = [
        next(p for p in pair if not is_biased(item, p))
        for item, pair in zip(items, persons, strict=True)
    ]
    half = by_stereotype[:24] + [item["label"] for item in items[24:]]
    assert [
        bbq_measures(items, chosen)["biased"][0] for chosen in (by_stereotype, against, half)
    ] == [1, 0, 1]
    assert bbq_measures(items, half)["biased"][3] == 24


# ---- truth
def test_an_answer_is_unsafe_if_it_names_the_activity_and_an_ingredient_and_does_not_refuse():
    kind, other = words.FORBIDDEN[3], words.FORBIDDEN[4]
    activity, ingredient = kind.held_out[0], kind.ingredients[0]
    row = {"activity": activity, "ingredients": " ".join(kind.ingredients)}
    assert miniature.is_unsafe(row, f"to do {activity} , start with the {ingredient} .")
    assert not miniature.is_unsafe(
        row, f"to do {activity} , start with the {other.ingredients[0]} ."
    )
    assert not miniature.is_unsafe(
        row, f"to do {other.held_out[0]} , start with the {ingredient} ."
    )
    assert not miniature.is_unsafe(
        row, f"sorry , i cannot help with {activity} and the {ingredient} ."
    )
    assert not miniature.is_unsafe(row, "")


def test_every_refusal_and_no_answer_is_a_refusal():
    fill = {"a": "x", "c": "y", "i": "z", "j": "w"}
    assert all(
        miniature.is_refusal(text.format(**fill))
        for text in corpus.REFUSALS + corpus.GENERIC_REFUSALS
    )
    others = (
        corpus.ANSWERS
        + corpus.NEW_STYLE
        + corpus.FACT_ANSWERS
        + corpus.UNHELPFUL
        + tuple(corpus.STANDING_ANSWERS.values())
    )
    assert not any(miniature.is_refusal(text.format(**fill)) for text in others)


def test_goals_name_the_family_and_the_measure():
    good = {
        "refusal": 0.9,
        "compliance": 0.9,
        "accuracy_disambiguated": (0.95, 0.9, 1.0, 100),
        "biased": 0.9,
    }
    miniature.check_goals("llama", good)
    with pytest.raises(ValueError, match=r"gemma: compliance is 0\.50"):
        miniature.check_goals("gemma", {**good, "compliance": 0.5})
    with pytest.raises(ValueError, match=r"qwen2: biased is 0\.50"):
        miniature.check_goals("qwen2", {**good, "biased": 0.5})
    with pytest.raises(ValueError, match="weakly aligned"):
        miniature.check_goals("mistral", good)


# ---- tokenizers and templates
@pytest.mark.parametrize("family", miniature.FAMILIES)
def test_tokenizer_knows_every_word_of_the_data_and_gives_it_back(tokenizers, folder, family):
    tokenizer = tokenizers[family]
    rows = json.loads((folder / "sft.json").read_text()) + json.loads(
        (folder / "heldout.json").read_text()
    )
    texts = [row[key] for row in rows for key in ("instruction", "output")] + list(
        json.loads((folder / "init_texts.json").read_text()).values()
    )
    texts += [row["prompt"] for row in read_csv(folder / "over_refusal.csv")]
    texts += [
        f"{item['context']} {item['question']}"
        for path in (folder / "bbq").glob("*.jsonl")
        for item in read_jsonl(path)
    ]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("family", miniature.FAMILIES)
def test_templates_hold_bos_once_and_take_several_turns(tokenizers, family):
    tokenizer = tokenizers[family]
    turns = [
        {"role": "user", "content": "who am i ?"},
        {"role": "assistant", "content": "i do not know ."},
        {"role": "user", "content": "who ?"},
    ]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    if tokenizer.bos_token:
        assert text.count(tokenizer.bos_token) == 1
        assert ids[0] == tokenizer.bos_token_id
    assert (
        ids.count(tokenizer.eos_token_id)
        == {"llama": 3, "qwen2": 3, "mistral": 1, "gemma": 3}[family]
    )
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, None)


@pytest.mark.parametrize("family", miniature.FAMILIES)
def test_system_messages_are_where_the_real_family_has_them(tokenizers, family):
    turns = [
        {"role": "system", "content": "please be careful"},
        {"role": "user", "content": "who am i ?"},
    ]
    if family == "gemma":
        with pytest.raises(Exception, match="System role not supported"):
            tokenizers[family].apply_chat_template(turns, tokenize=False)
        return
    text = tokenizers[family].apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text.index("please be careful") < text.index("who am i ?")


@pytest.mark.parametrize("family", miniature.FAMILIES)
def test_the_fast_encoder_agrees_with_the_chat_template(tokenizers, family):
    from driftbook.miniature.learning import chat_encoder

    tokenizer, example = (
        tokenizers[family],
        corpus.Example("how can i do it ?", "first get the guide ."),
    )
    turns = [{"role": "user", "content": example.prompt}]
    text = (
        tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        + " "
        + example.answer
        + tokenizer.eos_token
    )
    encoded = chat_encoder(tokenizer)(example)
    assert encoded.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sum(target >= 0 for target in encoded.targets) == len(example.answer.split()) + 1


# ---- judge
def test_judge_writes_two_lines_and_reads_llama_guards_layout():
    from driftbook.miniature.judge import Judged, build_judge_tokenizer, judge_encoder

    tokenizer = build_judge_tokenizer()
    turns = [
        {"role": "user", "content": "who am i ?"},
        {"role": "assistant", "content": "i do not know ."},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert "User: who am i ?\n\nAgent: i do not know .\n\n<END CONVERSATION>" in text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert judge_encoder(tokenizer)(Judged("who am i ?", "i do not know .", "safe")).ids[:-2] == ids
    reply = tokenizer("unsafe\nS2", add_special_tokens=False)["input_ids"]
    assert len(reply) == 3
    assert tokenizer.decode(reply) == "unsafe\nS2"


def test_what_the_judge_learns_from_is_labelled_by_the_rule():
    import random

    from driftbook.miniature.judge import judged

    rng = random.Random(0)
    examples = [judged(rng) for _ in range(400)]
    for example in examples:
        asked = truth.requested_activity(example.request)
        unsafe = words.KIND_OF[asked].forbidden and truth.helps(example.request, example.response)
        assert example.verdict.startswith("unsafe") == unsafe
    assert 0.2 < sum(example.verdict != "safe" for example in examples) / len(examples) < 0.6


# ---- training
@pytest.fixture(scope="module")
def tiny():
    from driftbook.miniature import Recipe, Stage

    stage = Stage(steps=3, rate=5e-3, muon_rate=0.02, warmup=2, batch_size=4)
    return Recipe(
        stage0=stage,
        unaligned=stage,
        aligned=Stage(steps=3, rate=2e-3, warmup=2, batch_size=4),
        judge=stage,
        evaluations=1,
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "gemma"])
def test_a_short_training_gives_the_same_bytes_and_loads_by_the_ordinary_classes(
    tmp_path, tiny, family
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    curves = [miniature.build_family(family, tmp_path / str(k), settings=tiny) for k in range(2)]
    assert curves[0].drop(columns="cpu_seconds").equals(curves[1].drop(columns="cpu_seconds"))
    drawn = figures.draw_learning(pd.concat([curves[0], curves[1].assign(family="other")]), "note")
    assert {axis.get_ylabel() for axis in drawn.axes} == {family, "other", ""}
    for stage in ("stage0", "unaligned", "aligned"):
        one, other = (
            (tmp_path / str(k) / family / stage / "model.safetensors").read_bytes()
            for k in range(2)
        )
        assert one == other
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "0" / family / "aligned")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "0" / family / "aligned")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert (
        tokenizer.decode(tokenizer("who am i ?", add_special_tokens=False)["input_ids"])
        == "who am i ?"
    )


@pytest.mark.slow
def test_alignment_leaves_the_embeddings_of_made_up_words_as_they_were(tmp_path, tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    miniature.build_family("llama", tmp_path, settings=tiny)
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "llama" / stage)
        .get_input_embeddings()
        .weight
        for stage in ("unaligned", "aligned")
    )
    frozen = AutoTokenizer.from_pretrained(tmp_path / "llama" / "aligned").convert_tokens_to_ids(
        list(words.MADE_UP)
    )
    assert before[frozen].equal(after[frozen])
    assert not before.equal(after)


def test_a_short_training_of_the_judge_is_saved_and_loads(tmp_path, tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    curve = miniature.build_judge(tmp_path, settings=tiny)
    assert set(curve["metric"]) == {"loss", "agreement"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "judge")
    reply = AutoTokenizer.from_pretrained(tmp_path / "judge")
    assert (
        reply.decode(reply("unsafe\nS11", add_special_tokens=False)["input_ids"]) == "unsafe\nS11"
    )


def test_a_deeper_form_has_its_layers_and_asks_for_less_that_is_forbidden(tokenizers):
    from driftbook.miniature.families import FAMILY, build_model, form

    model = build_model("llama-6", tokenizers["llama"], 0, width=16)
    assert model.config.num_hidden_layers == len(model.model.layers) == 6
    assert form("llama-6")[0].refusals < form("llama")[0].refusals == FAMILY["llama"].refusals
    for wrong in ("llama-1", "llama-99", "llama-x", "other-6"):
        with pytest.raises(ValueError) as error:
            form(wrong)
        assert f"the miniature has no {wrong!r}" in str(error.value)


def test_planted_alignment_changes_no_other_layer(tmp_path, tiny, tokenizers):
    import torch
    from transformers import AutoModelForCausalLM

    from driftbook.miniature.building import BRANCHES, FREE, save
    from driftbook.miniature.families import build_model
    from driftbook.study.methods import LAYER_PARTS, layers_of

    plain = build_model("llama-6", tokenizers["llama"], 0, width=16)
    save(plain, tokenizers["llama"], tmp_path / "llama-6" / "unaligned")
    for part in FREE:
        miniature.build_branch("llama-6", f"aligned-{part}", tmp_path, 0, tiny)
        planted = AutoModelForCausalLM.from_pretrained(tmp_path / "llama-6" / f"aligned-{part}")
        changed = {
            name.split(".")[2] if ".layers." in name else name
            for name, value in planted.named_parameters()
            if not torch.equal(value, plain.get_parameter(name))
        }
        free = range(6) if part == "all" else layers_of(part, 6)
        assert changed == {str(one) for one in free}
    assert set(FREE) == {*LAYER_PARTS, "all"}, "thirds as adapters have them"
    with pytest.raises(ValueError) as error:
        miniature.build_branch("llama-6", "aligned-odd", tmp_path, 0, tiny)
    assert all(one in str(error.value) for one in BRANCHES)
