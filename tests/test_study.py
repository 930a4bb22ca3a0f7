"""Study files: what is wrong is said in one sentence before any work; run_ids are unique, readable,
stable, and change with any setting.
"""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conftest import SMALL, one_sentence, write_study
from driftbook.study import access, sources
from driftbook.study.consistency import RESERVED
from driftbook.study.files import ROOT
from driftbook.study.study_file import Study, find, load


def ids(content) -> list[str]:
    return [variant.run_id for variant in Study(**content).variants]


def put(content: dict, path: tuple, value) -> dict:
    """The content with another value at a path of keys; DELETE takes the key out."""
    content = copy.deepcopy(content)
    part = content
    for key in path[:-1]:
        part = part[key]
    if value is DELETE:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return content


DELETE = object()
BASE, BLOCK = ("bases", "tiny-llama"), ("grid", 0)

# ---- what is wrong: where, the value, and words that its sentence must have
WRONG = {
    "unknown key": (("benchmark",), {}, ["unknown key 'benchmark'", "did you mean 'benchmarks'"]),
    "unknown key of a base": (
        (*BASE, "famly"),
        "llama",
        ["unknown key", "famly", "did you mean 'family'"],
    ),
    "unknown key of a judge": (
        ("judges", "tiny-guard", "treshold"),
        0.5,
        ["did you mean 'threshold'"],
    ),
    "unknown key of data": (
        ("data", "sft", "line"),
        3,
        ["unknown key 'data.sft.line'", "known here"],
    ),
    "unknown key of training": (("training", "batchsize"), 3, ["did you mean 'batch_size'"]),
    "unknown key of a block": ((*BLOCK, "seed"), [1], ["did you mean 'seeds'"]),
    "unknown key of a benchmark": (
        ("benchmarks", "bbq", "max_tokens"),
        3,
        ["did you mean 'max_new_tokens'"],
    ),
    "unknown key of init_texts": (("init_texts", "pth"), "x", ["did you mean 'path'"]),
    "unknown key of a primary family": (
        ("primary",),
        {"a": {"test": "change", "outcome": ["unsafe"]}},
        ["did you mean 'outcomes'"],
    ),
    "unknown test": (
        ("primary",),
        {"a": {"test": "changes", "outcomes": ["unsafe"]}},
        ["changes", "'preserves'"],
    ),
    "unknown outcome": (
        ("primary",),
        {"a": {"test": "change", "outcomes": ["safety"]}},
        ["safety", "'over_refusal'"],
    ),
    "a margin that is missing": (
        ("primary",),
        {"a": {"test": "preserves", "outcomes": ["unsafe"]}},
        ["primary.a", "needs a margin"],
    ),
    "a margin that has no meaning": (
        ("primary",),
        {"a": {"test": "change", "outcomes": ["unsafe"], "margin": 3}},
        ["has no margin"],
    ),
    "a margin of a loss": (
        ("primary",),
        {"a": {"test": "preserves", "outcomes": ["loss"], "margin": 3}},
        ["'loss'", "percentage points"],
    ),
    "one method against itself": (
        ("primary",),
        {"a": {"test": "difference", "outcomes": ["unsafe"], "methods": ["lora"]}},
        ["'a'", "only one"],
    ),
    "unknown method": (("methods", "lroa"), {}, ["lroa", "'lora'"]),
    "unknown method in a block": ((*BLOCK, "methods"), ["adalora"], ["adalora", "'lora'"]),
    "unknown objective": ((*BLOCK, "objectives"), ["kto"], ["kto", "'dpo'"]),
    "unknown init": ((*BLOCK, "inits"), ["zeros"], ["zeros", "'vocabulary'"]),
    "unknown scheduler": (("training", "scheduler"), "step", ["step", "'cosine'"]),
    "unknown format": (("benchmarks", "bbq", "format"), "bbqq", ["bbqq", "'bbq'"]),
    "unknown benchmark format": (
        ("benchmarks", "toxicity"),
        {"source": "a", "format": "jsonl"},
        ["toxicity", "jsonl", "'real_toxicity_prompts'"],
    ),
    "a second BBQ": (
        ("benchmarks", "other"),
        {"source": "a", "format": "bbq"},
        ["other", "second BBQ"],
    ),
    "a format of another task": (("benchmarks", "safety", "format"), "gsm8k", ["safety", "gsm8k"]),
    "a template without its prompt": (
        ("benchmarks", "safety", "template"),
        "Answer this.",
        ["{prompt}"],
    ),
    "a wording that says nothing": (
        ("benchmarks", "safety", "wordings"),
        {"other": {"n": 3}},
        ["system_prompt"],
    ),
    "a wording of utility": (
        ("benchmarks", "utility", "wordings"),
        {"other": {"system_prompt": "a"}},
        ["gsm8k"],
    ),
    "made-up words of a real set": (("benchmarks", "safety", "source"), "some/set", ["fictional"]),
    "a judge of no benchmark": (
        ("judges", "second"),
        {"source": "a", "format": "wildguard", "benchmarks": ["no"]},
        ["second", "no"],
    ),
    "a first judge of some": (("judges", "tiny-guard", "benchmarks"), ["safety"], ["first judge"]),
    "a classifier without its label": (
        ("judges", "second"),
        {"source": "a", "format": "classifier"},
        ["second", "label"],
    ),
    "data of neither format nor columns": (
        ("data", "sft"),
        {"source": "a", "n": 1},
        ["sft", "columns"],
    ),
    "columns that are too few": (
        ("data", "sft"),
        {"source": "a", "n": 1, "columns": {"prompt": "q"}},
        ["sft", "answer"],
    ),
    "data that a block does not find": ((*BLOCK, "data"), ["ultrachat"], ["ultrachat"]),
    "training on what is held out": ((*BLOCK, "data"), ["heldout"], ["held-out"]),
    "dpo on answers alone": ((*BLOCK, "data"), ["sft"], ["chosen"]),
    "qlora on whole weights": ((*BLOCK, "methods"), ["qlora"], ["qlora"]),
    "a setting that the name fixes": (
        ("methods", "dora"),
        {"use_dora": False},
        ["use_dora", "DoRA"],
    ),
    "unknown answer mode": ((*BASE, "answer_mode"), "prose", ["prose", "'letters'"]),
    "rate as text": ((*BLOCK, "learning_rates", "lora"), ["1e-3"], ["1e-3", "text", "1.0e-3"]),
    "rate of zero": ((*BLOCK, "learning_rates", "lora"), [0.0], ["learning_rates"]),
    "negative rate": ((*BLOCK, "learning_rates", "lora"), [-1e-3], ["learning_rates"]),
    "rate of one": ((*BLOCK, "learning_rates", "lora"), [1.0], ["learning_rates"]),
    "rate that is no number": (
        (*BLOCK, "learning_rates", "lora"),
        [float("nan")],
        ["learning_rates"],
    ),
    "no rate": ((*BLOCK, "learning_rates", "lora"), DELETE, ["learning_rates has none for lora"]),
    "empty rates": ((*BLOCK, "learning_rates", "ia3"), [], ["learning_rates has none for ia3"]),
    "repeated seed": ((*BLOCK, "seeds"), [1, 2, 1], ["repeats a seed", "repeated_seeds"]),
    "negative seed": ((*BLOCK, "seeds"), [-1], ["seeds"]),
    "seed as text": ((*BLOCK, "seeds"), ["1"], ["seeds"]),
    "no seeds": ((*BLOCK, "seeds"), [], ["seeds"]),
    "no methods": ((*BLOCK, "methods"), [], ["methods"]),
    "no objectives": ((*BLOCK, "objectives"), [], ["objectives"]),
    "half an epoch": ((*BLOCK, "epochs"), [0.5], ["epochs"]),
    "no epoch": ((*BLOCK, "epochs"), [0], ["epochs"]),
    "base not in the study": ((*BLOCK, "bases"), ["tiny-lama"], ["tiny-lama", "tiny-llama"]),
    "method without settings": (("methods", "lora"), DELETE, ["lora", "no settings"]),
    "objective without data": (("data", "dpo"), DELETE, ["dpo", "no dpo"]),
    "nothing held out": (("data", "heldout"), DELETE, ["heldout"]),
    "init of an adapter": ((*BLOCK, "inits"), ["random"], ["inits apply to"]),
    "base without a source": (BASE, {"family": "llama"}, ["'bases.tiny-llama.source' is missing"]),
    "no bases": (("bases",), {}, ["bases"]),
    "missing benchmark": (("benchmarks", "bbq"), DELETE, ["bbq"]),
    "missing section": (("training",), DELETE, ["'training' is missing"]),
    "reserved name": (("name",), "models", ["models", "taken"]),
    "name with a space": (("name",), "My study", ["name"]),
    "a seed that numpy does not take": ((*BLOCK, "seeds"), [2**32], ["seeds", "4294967296"]),
    "dropout of more than all": (
        ("methods", "lora", "lora_dropout"),
        2,
        ["lora_dropout", "below 1"],
    ),
    "no rank": (("methods", "lora", "r"), 0, ["methods.lora.r", "above 0"]),
    "more patterns than may be": (
        ("methods", "lora", "rank_pattern"),
        dict.fromkeys(map(str, range(10_001)), 4),
        ["rank_pattern", "10,001 entries"],
    ),
    "a thousand million repetitions": (("base_repetitions",), 10**9, ["base_repetitions"]),
    "more variants than can be made": (
        BLOCK,
        SMALL["grid"][0] | {"seeds": list(range(12_500))},
        ["100,001", "variants"],
    ),
    "name that climbs": (("name",), "../x", ["name"]),
    "dot in a base": (("bases", "a.b"), {"source": "x", "family": "llama"}, ["a.b", "'.'"]),
    "slash in a base": (("bases", "a/b"), {"source": "x", "family": "llama"}, ["a/b"]),
    "negative size": (("data", "sft", "n"), -1, ["data.sft.n", "-1"]),
    "size as text": (("benchmarks", "bbq", "n"), "20", ["benchmarks.bbq.n", "20"]),
    "no tokens": (("benchmarks", "safety", "max_new_tokens"), 0, ["max_new_tokens"]),
    "negative batch": (("training", "batch_size"), -16, ["batch_size"]),
    "negative decay": (("training", "weight_decay"), -0.1, ["weight_decay"]),
    "warmup of two": (("training", "warmup_ratio"), 2, ["warmup_ratio"]),
    "beta of zero": (("training", "dpo_beta"), 0, ["dpo_beta"]),
    "infinite norm": (("training", "max_grad_norm"), float("inf"), ["max_grad_norm"]),
    "threshold above one": (("judges", "tiny-guard", "threshold"), 1.5, ["threshold"]),
    "negative seed of the study": (("seed",), -1, ["seed"]),
    "no note": (("note",), "", ["note"]),
    "a list for a section": (("bases",), [1], ["bases"]),
}


def test_a_primary_method_that_no_block_runs_is_refused():
    content = put(
        put(SMALL, (*BLOCK, "methods"), ["lora"]),
        ("primary",),
        {"a": {"test": "change", "outcomes": ["unsafe"], "methods": ["p_tuning"]}},
    )
    with pytest.raises(ValueError, match="'a' tests p_tuning, which no block of the grid runs"):
        Study(**content)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "value", "words"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path, path, value, words):
    file = write_study(tmp_path, put(SMALL, path, value))
    with pytest.raises(ValueError) as error:
        load(file)
    sentence = one_sentence(error.value)
    assert file.name in sentence
    for word in words:
        assert word in sentence


def test_the_study_that_all_these_break_is_good(make_study, content):
    study = make_study(content)
    assert len(study.variants) == 1 + 4 * 2
    assert study.folder.name == "small"


def test_a_rate_that_yaml_reads_as_text_is_refused_as_it_stands_in_a_file(tmp_path, content):
    text = yaml.safe_dump(content).replace("- 0.005", "- 5e-3", 1)
    assert "5e-3" in text
    (tmp_path / "small.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        load(tmp_path / "small.yaml")
    assert "5e-3" in one_sentence(error.value)


def test_text_inits_need_texts_and_prefix_tuning_has_one_init(tmp_path, content):
    block = content["grid"][0]
    block |= {"methods": ["prompt_tuning"], "inits": ["safety_text"]}
    assert len(load(write_study(tmp_path, content)).variants) == 3
    del content["init_texts"]
    with pytest.raises(ValueError) as error:
        load(write_study(tmp_path, content))
    assert "init_texts" in one_sentence(error.value)
    content["methods"]["prefix_tuning"] = {"num_virtual_tokens": 4}
    block |= {"methods": ["prefix_tuning"], "inits": ["vocabulary"]}
    block["learning_rates"]["prefix_tuning"] = [0.01]
    with pytest.raises(ValueError) as error:
        load(write_study(tmp_path, content))
    assert "prefix_tuning" in one_sentence(error.value)


@pytest.mark.parametrize("init", ["safety_frozen", "no such"])
def test_an_init_under_methods_is_checked_too(tmp_path, content, init):
    content["methods"]["p_tuning"]["init"] = init
    with pytest.raises(ValueError) as error:
        load(write_study(tmp_path, content))
    assert "init" in one_sentence(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just words",
        "- 1\n- 2",
        "a: [1\nb: {",
        "\ta: 1",
        "a: !!python/object/apply:os.getcwd []",
    ],
)
def test_a_file_that_is_no_study_is_refused(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        load(tmp_path / "bad.yaml")
    assert "bad.yaml" in one_sentence(error.value)


@pytest.mark.parametrize("name", ["no-such-study", "studies", "/no/such/file.yaml"])
def test_a_missing_file_is_said_with_what_there_is(name):
    with pytest.raises(ValueError) as error:
        load(name)
    assert "miniature" in one_sentence(error.value)


def test_every_reserved_folder_is_refused(tmp_path, content):
    for name in RESERVED:
        with pytest.raises(ValueError, match="taken"):
            load(write_study(tmp_path, {**content, "name": name}))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_study_of_the_project_loads(path):
    study = load(path)
    found = [variant.run_id for variant in study.variants]
    assert len(set(found)) == len(found)
    assert len(found) > len(study.bases) or not study.grid  # an audit trains nothing
    assert study.name == path.stem, "the name is the folder of its outputs"
    assert load(path.stem) == study
    assert find(path.stem) == path


def test_a_study_is_not_changed_after_it_was_read(study):
    with pytest.raises(ValueError):
        study.name = "other"


# ---- paths
def test_a_path_with_an_unset_variable_falls_back_to_the_source(content, monkeypatch, tmp_path):
    content["data"]["sft"]["path"] = "${DRIFTBOOK_NO_SUCH}/sft.json"
    monkeypatch.delenv("DRIFTBOOK_NO_SUCH", raising=False)
    assert Study(**content).data["sft"].local is None
    monkeypatch.setenv("DRIFTBOOK_NO_SUCH", str(tmp_path))
    assert Study(**content).data["sft"].local == (tmp_path / "sft.json").resolve()


def test_a_path_alone_is_the_source_too(content, data_folder):
    path = str(data_folder / "sft.json")
    content["data"]["sft"].pop("source")
    content["data"]["sft"]["path"] = path
    part = Study(**content).data["sft"]
    assert part.source == path
    assert part.local == (data_folder / "sft.json").resolve()
    content["data"]["sft"].pop("path")
    with pytest.raises(ValueError, match="source"):
        Study(**content)


def test_an_unset_variable_of_a_path_is_named(content, monkeypatch):
    monkeypatch.delenv("DRIFTBOOK_NO_SUCH", raising=False)
    content["data"]["sft"] |= {"path": "${DRIFTBOOK_NO_SUCH}/sft.json"}
    content["data"]["sft"].pop("source")
    study = Study(**content)
    with pytest.raises(ValueError, match="DRIFTBOOK_NO_SUCH") as error:
        sources.locate(study.data["sft"], study)
    assert "DRIFTBOOK_NO_SUCH" in one_sentence(error.value)
    assert "DRIFTBOOK_NO_SUCH" in access.check(study.data["sft"], "dataset").sentence


def test_a_relative_path_is_of_the_repository(content):
    content["data"]["sft"]["path"] = "README.md"
    assert Study(**content).data["sft"].local == (ROOT / "README.md").resolve()


def test_a_path_that_does_not_exist_is_named(content):
    content["data"]["sft"]["path"] = "no/such/file.json"
    study = Study(**content)
    with pytest.raises(ValueError) as error:
        sources.locate(study.data["sft"], study)
    assert "no/such/file.json" in one_sentence(error.value)


def test_what_is_not_made_yet_says_how_to_make_it(content):
    content["bases"]["tiny-llama"] |= {"source": "miniature:llama/aligned", "path": None}
    content["seed"] = 987
    study = Study(**content)
    with pytest.raises(ValueError) as error:
        sources.locate(study.bases["tiny-llama"], study)
    assert "01_prepare" in one_sentence(error.value)


@pytest.mark.parametrize(
    ("source", "word"), [("github:a/b/c", "revision"), ("some/model", "revision")]
)
def test_a_public_source_needs_a_revision(content, source, word):
    content["bases"]["tiny-llama"] |= {"source": source, "path": None}
    study = Study(**content)
    with pytest.raises(ValueError) as error:
        sources.identity(study.bases["tiny-llama"], study)
    assert word in one_sentence(error.value)


# ---- run_ids
def test_run_ids_are_unique_readable_and_safe_as_names_of_folders(study):
    found = [variant.run_id for variant in study.variants]
    assert len(set(found)) == len(found)
    for variant in study.variants:
        words = variant.run_id.split(".")
        assert words[0] == variant.base_model
        assert variant.method in words
        assert variant.method == "none" or {variant.objective, "r1"} <= set(words)
        assert variant.learning_rate is None or any(
            word.startswith("lr") and float(word[2:]) == variant.learning_rate for word in words
        )
        assert Path(variant.run_id).name == variant.run_id
        assert len(variant.run_id) < 100


def test_rates_that_read_alike_have_ids_of_their_own(content):
    content["grid"][0] |= {
        "methods": ["lora"],
        "objectives": ["sft"],
        "learning_rates": {"lora": [1.0e-3, 1.2e-3, 1.2000001e-3]},
    }
    assert len(set(ids(content))) == 4


def test_run_ids_are_the_same_in_another_process(tmp_path, content):
    path = write_study(tmp_path, content)
    code = (
        "from driftbook.study.study_file import load; print(*(v.run_id for v in"
        f" load({str(path)!r}).variants))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7"},
    ).stdout
    assert said.split() == ids(content)


def test_blocks_that_overlap_give_each_variant_once(content):
    before = ids(content)
    content["grid"].append({**content["grid"][0], "name": "again"})
    assert ids(content) == before


def test_shared_seeds_are_repetitions_of_their_own_when_the_file_says_so(content):
    content["grid"][0] |= {
        "seeds": [5, 5],
        "repeated_seeds": True,
        "shared_seeds": True,
        "methods": ["ia3"],
        "objectives": ["sft"],
    }
    _, one, two = Study(**content).variants
    assert (one.seed, two.seed, one.repetition, two.repetition) == (5, 5, 1, 2)
    assert one.run_id != two.run_id


def test_every_setting_draws_seeds_of_its_own_unless_the_file_shares_them(content):
    trained = [one for one in Study(**content).variants if one.method != "none"]
    assert len({one.seed for one in trained}) == len(trained)
    assert all(0 <= one.seed < 2**31 for one in trained)
    for block in content["grid"]:
        block["shared_seeds"] = True
    shared = [one for one in Study(**content).variants if one.method != "none"]
    assert {one.seed for one in shared} == {s for b in content["grid"] for s in b["seeds"]}


ALL = {"none", "lora", "ia3", "prompt_tuning", "p_tuning"}
TRAINED = ALL - {"none"}
# where, another value, and (methods, objectives) whose variants must have other ids; all others
# must keep theirs
CHANGES = {
    "lora's rank": (("methods", "lora", "r"), 8, ({"lora"}, {"sft", "dpo"})),
    "lora's dropout": (("methods", "lora", "lora_dropout"), 0.2, ({"lora"}, {"sft", "dpo"})),
    "ia3's targets": (
        ("methods", "ia3", "target_modules"),
        ["k_proj", "down_proj"],
        ({"ia3"}, {"sft", "dpo"}),
    ),
    "virtual tokens": (
        ("methods", "prompt_tuning", "num_virtual_tokens"),
        5,
        ({"prompt_tuning"}, {"sft", "dpo"}),
    ),
    "init": (("methods", "prompt_tuning", "init"), "random", ({"prompt_tuning"}, {"sft", "dpo"})),
    "encoder": (("methods", "p_tuning", "encoder_hidden_size"), 17, ({"p_tuning"}, {"sft", "dpo"})),
    "rate": ((*BLOCK, "learning_rates", "lora"), [4.9e-3], ({"lora"}, {"sft", "dpo"})),
    "seed": ((*BLOCK, "seeds"), [2], (TRAINED, {"sft", "dpo"})),
    "epochs": ((*BLOCK, "epochs"), [2], (TRAINED, {"sft", "dpo"})),
    "size of sft": (("data", "sft", "n"), 31, (TRAINED, {"sft"})),
    "source of dpo": (("data", "dpo", "source"), "other", (TRAINED, {"dpo"})),
    "revision of dpo": (("data", "dpo", "revision"), "abc", (TRAINED, {"dpo"})),
    "batch size": (("training", "batch_size"), 8, (TRAINED, {"sft", "dpo"})),
    "length": (("training", "max_length"), 64, (TRAINED, {"sft", "dpo"})),
    "beta": (("training", "dpo_beta"), 0.2, (TRAINED, {"sft", "dpo"})),
    "base's revision": ((*BASE, "revision"), "abc", (ALL, {"none", "sft", "dpo"})),
    "base's dtype": ((*BASE, "dtype"), "bfloat16", (ALL, {"none", "sft", "dpo"})),
    "system prompt": ((*BASE, "system_prompt"), "be good", (ALL, {"none", "sft", "dpo"})),
    "where the base is": ((*BASE, "path"), "elsewhere", (set(), set())),
    "name of the study": (("name",), "other", (set(), set())),
    "note": (("note",), "other", (set(), set())),
    "benchmark": (("benchmarks", "safety", "max_new_tokens"), 99, (set(), set())),
    "judge": (("judges", "tiny-guard", "threshold"), 0.7, (set(), set())),
    "name of the block": ((*BLOCK, "name"), "other", (set(), set())),
}


@pytest.mark.parametrize(("path", "value", "expected"), CHANGES.values(), ids=CHANGES)
def test_a_changed_setting_changes_the_ids_that_depend_on_it_and_no_others(path, value, expected):
    methods, objectives = expected
    before, after = Study(**SMALL).variants, Study(**put(SMALL, path, value)).variants
    for one, other in zip(before, after, strict=True):
        depends = one.method in methods and one.objective in objectives
        assert (one.run_id != other.run_id) == depends, f"{one.run_id} -> {other.run_id}"


FIELDS = {
    (*BLOCK, "seeds"): st.lists(st.integers(0, 10_000), min_size=1, max_size=3, unique=True),
    (*BLOCK, "epochs"): st.lists(st.integers(1, 50), min_size=1, max_size=2, unique=True),
    (*BLOCK, "learning_rates", "lora"): st.lists(
        st.floats(1e-7, 0.5), min_size=1, max_size=3, unique=True
    ),
    ("methods", "lora", "r"): st.integers(1, 256),
    ("training", "batch_size"): st.integers(1, 512),
    ("data", "sft", "n"): st.integers(1, 10_000),
}


@given(path=st.sampled_from(sorted(FIELDS, key=str)), chosen=st.data())
def test_any_change_gives_other_ids_and_the_same_content_gives_the_same(path, chosen):
    content = put(SMALL, path, chosen.draw(FIELDS[path]))
    one, again, plain = ids(content), ids(copy.deepcopy(content)), ids(SMALL)
    assert one == again
    assert len(set(one)) == len(one)
    assert (set(one) == set(plain)) == (content == SMALL)
