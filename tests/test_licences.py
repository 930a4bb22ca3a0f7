"""The register of licences is whole, covers what the studies name, and refuses what it must before
anything leaves the machine.
"""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from conftest import one_sentence
from driftbook.benchmarks.formats import FORMATS
from driftbook.publishing import licences, publish
from driftbook.publishing.licences import (
    FACTS,
    REGISTER,
    allowed_items,
    check_export,
    covers,
    notice,
    of,
    of_study,
    register,
)
from driftbook.study.files import ROOT
from driftbook.study.study_file import Study, load
from driftbook.study.tables import TABLES

HEX_PHI, GUARD, LLAMA, GEMMA = (
    "LLM-Tuning-Safety/HEx-PHI",
    "meta-llama/Meta-Llama-Guard-2-8B",
    "meta-llama/Meta-Llama-3-8B-Instruct",
    "google/gemma-7b-it",
)
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))
RAW = yaml.safe_load(REGISTER.read_text(encoding="utf-8"))
OF_BENCHMARKS = {one.source: one for form in FORMATS.values() for one in form.licences}


def sources(part) -> set[str]:
    """The values of `source` at any depth of a study file."""
    if isinstance(part, dict):
        own = {part["source"]} if isinstance(part.get("source"), str) else set()
        return own.union(*map(sources, part.values()))
    return set().union(*map(sources, part)) if isinstance(part, list) else set()


@pytest.fixture
def real(content) -> Study:
    """A study of real models and sets, HEx-PHI among them, at local paths."""
    content["bases"] = {
        "llama": {"family": "llama", "source": LLAMA, "path": "/somewhere/llama"},
        "gemma": {"family": "gemma", "source": GEMMA},
        "qwen": {"family": "qwen2", "source": "Qwen/Qwen2.5-7B-Instruct"},
    }
    content["judges"] = {"guard": {"format": "llama_guard_2", "source": GUARD}}
    content["raters"] = {"rater": {"source": LLAMA}}
    content["benchmarks"]["safety"] = {
        "format": "hex_phi",
        "source": HEX_PHI,
        "path": "/somewhere/hex_phi",
    }
    content["benchmarks"]["over_refusal"]["source"] = "github:paul-rottger/exaggerated-safety"
    content["benchmarks"]["bbq"]["source"] = "github:nyu-mll/BBQ/data"
    content["benchmarks"]["utility"]["source"] = "openai/gsm8k"
    content["data"]["sft"]["source"] = "HuggingFaceH4/ultrachat_200k"
    return Study(**content)


def changed(study: Study, **sections) -> Study:
    """The study with other keys, checked again."""
    return Study(**study.model_dump(exclude_unset=True) | sections)


def asked_of(study: Study, source: str, benchmark: str = "safety") -> Study:
    """The study with another source of a benchmark."""
    dumped = study.model_dump(exclude_unset=True)
    dumped["benchmarks"][benchmark]["source"] = source
    return Study(**dumped)


# ---- the register
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_source_of_the_studies_is_in_the_register(path):
    named = sources(yaml.safe_load(path.read_text()))
    assert named
    twins = {source for source in named if source.startswith("twin:")}  # as their base model
    assert not {source for source in named - twins if of(source) is None}
    study = load(path)
    check_export(study, items=False)
    assert of_study(study)["known"].all()
    assert allowed_items(study) == tuple(
        name for name, one in study.benchmarks.items() if one.source != HEX_PHI
    )


@pytest.mark.parametrize("source", RAW)
def test_entries_say_everything(source):
    entry = RAW[source]
    assert set(entry) == {*FACTS, "url", "credit", "seen", "where"}
    assert type(entry["items"]) is bool
    assert type(entry["text"]) is bool
    assert set(entry["seen"]) == set(FACTS)
    assert {type(was_read) for was_read in entry["seen"].values()} == {bool}


@pytest.mark.parametrize("source", [*RAW, *OF_BENCHMARKS])
def test_entries_are_well_formed(source):
    entry = register()[source]
    assert entry.seen <= set(FACTS)
    assert re.fullmatch(r"https://[a-z0-9.-]+(/[\w./-]*)?", entry.url)
    for text in (entry.licence, entry.use, entry.credit, entry.where):
        assert text.strip()
    for sentence in filter(None, (entry.use, entry.outputs, entry.adapters)):
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        assert "\n" not in sentence


def test_no_path_of_a_machine_and_no_key_twice():
    text = REGISTER.read_text(encoding="utf-8")
    assert not re.search(r"(^|[\s\"'])(/(home|root|work|tmp|Users|mnt)/|[A-Z]:\\|~/)", text)
    assert str(Path.home()) not in text or Path.home() == Path("/")
    keys = re.findall(r"^(\S+):(?= *(?:&|#|$))", text, re.MULTILINE)
    assert len(keys) == len({key.casefold() for key in keys}) == len(RAW)


def test_the_register_is_read_as_it_is_written():
    found = register()
    assert set(found) == {*RAW, *OF_BENCHMARKS}
    assert not set(RAW) & set(OF_BENCHMARKS)
    assert all(
        found[source].items is entry["items"] and found[source].licence == entry["licence"]
        for source, entry in RAW.items()
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        of(HEX_PHI).items = True


def test_unseen_facts_are_those_that_allow_and_were_not_read():
    assert of("miniature:judge").unseen == ()
    assert of(HEX_PHI).unseen == ()  # its items and its text are refused
    assert set(of("github:google/BIG-bench").unseen) == {"licence", "use", "items", "text"}
    assert "outputs" not in of(LLAMA).unseen


def test_the_data_card_and_the_register_agree():
    card = (ROOT / "data" / "README.md").read_text()
    for source, licence in {
        "github:nyu-mll/BBQ": "CC-BY-4.0",
        "github:hiyouga/LLaMA-Factory": "Apache-2.0",
        "github:openai/grade-school-math": "MIT",
    }.items():
        row = next(
            line for line in card.splitlines() if source.replace("github:", "github ") in line
        )
        assert f"| {licence} |" in row
        assert of(source).licence == licence


# ---- which entry covers a source
@pytest.mark.parametrize(
    ("source", "entry"),
    [
        ("github:nyu-mll/BBQ/data", "github:nyu-mll/BBQ"),
        ("github:nyu-mll/BBQ", "github:nyu-mll/BBQ"),
        ("github:NYU-MLL/bbq/data", "github:nyu-mll/BBQ"),
        ("github:nyu-mll/BBQ-other/data", None),
        ("github:nyu-mll", None),
        ("nyu-mll/BBQ", None),
        ("google/gemma-7b-it", GEMMA),
        ("google/gemma-7b-it-pytorch", None),
        ("google/gemma-7b", None),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B*"),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B*"),
        ("Qwen/Qwen2.5-72B-Instruct", "Qwen/Qwen2.5-72B*"),
        ("Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-3B*"),
        ("Qwen/Qwen2.5-32B", "Qwen/Qwen2.5-32B*"),
        ("Qwen/Qwen2.5-Math-7B", None),
        ("miniature:data/bbq", "miniature:"),
        ("random:gemma", "random:"),
        ("miniature", None),
        ("lab/model", None),
        ("", None),
    ],
)
def test_prefixes(source, entry):
    found = of(source)
    assert (found.source if found else None) == entry


def test_the_longest_name_counts(monkeypatch):
    entries = {
        name: dataclasses.replace(of(HEX_PHI), source=name)
        for name in ("lab:", "lab:a", "lab:a/b", "lab:a*")
    }
    monkeypatch.setattr(licences, "register", lambda: entries)
    assert [of(source).source for source in ("lab:a/b/c", "lab:a/c", "lab:ab", "lab:c")] == [
        "lab:a/b",
        "lab:a*",
        "lab:a*",
        "lab:",
    ]
    assert not covers("lab:a/b", "lab:a")


def test_qwen_differs_by_size():
    names = {
        size: of(f"Qwen/Qwen2.5-{size}-Instruct").licence
        for size in ("0.5B", "1.5B", "3B", "7B", "72B")
    }
    assert {size for size, name in names.items() if name == "Apache-2.0"} == {"0.5B", "1.5B", "7B"}
    assert len(set(names.values())) == 3


# ---- a study's licences
def test_of_study_has_a_row_per_source_whatever_its_path(real):
    frame = of_study(real)
    assert tuple(frame.columns) == licences.COLUMNS
    assert frame["role"].value_counts().to_dict() == {
        "base model": 3,
        "judge": 1,
        "rater": 1,
        "training data": 3,
        "benchmark": 4,
        "init texts": 1,
    }
    assert frame["known"].all()
    assert (frame["source"] == HEX_PHI).sum() == 1
    assert frame.set_index("name").loc["llama", "licence"] == "Meta Llama 3 Community License"
    assert not frame.set_index("name").loc["safety", "items"]
    assert (
        not frame.astype(str).apply(lambda column: column.str.contains("/somewhere")).any(axis=None)
    )


def test_a_statement_of_the_study_file(real):
    unknown = asked_of(real, "lab/prompts")
    row = of_study(unknown).set_index("name").loc["safety"]
    assert row[list(FACTS)].isna().all()
    assert not row["known"]
    assert "safety" not in allowed_items(unknown)

    stated = changed(unknown, licences={"lab/prompts": "the lab's own"})
    row = of_study(stated).set_index("name").loc["safety"]
    assert (row["licence"], row["items"], row["text"], row["known"]) == (
        "the lab's own",
        True,
        False,
        False,
    )
    check_export(stated, items=True)
    assert "safety" in allowed_items(stated)
    assert "the lab's own" in notice(stated)


@pytest.mark.parametrize("source", [HEX_PHI, HEX_PHI.lower(), f"{HEX_PHI}/more"])
def test_a_statement_does_not_overrule_the_register(real, source):
    study = changed(asked_of(real, source), licences={source: "MIT"})
    assert "safety" not in allowed_items(study)
    with pytest.raises(ValueError, match="rates only"):
        check_export(study, items=True)


# ---- what is refused
def test_an_unknown_licence_is_refused_in_one_sentence(real):
    study = asked_of(real, "lab/prompts")
    for items in (False, True):
        with pytest.raises(ValueError) as error:
            check_export(study, items=items)
        text = one_sentence(error.value)
        assert (
            'say so in the study file under licences: {"lab/prompts": NAME of its licence}' in text
        )
    two = asked_of(study, "lab/more", "over_refusal")
    with pytest.raises(ValueError, match=r"the licence of lab/prompts and of 1 more is not known"):
        check_export(two, items=False)
    with pytest.raises(ValueError, match="lab/more"):
        check_export(
            changed(two, licences={"lab/prompts": "MIT", "*": "MIT", "lab": "MIT"}), items=False
        )


def test_rows_that_a_licence_forbids_are_refused_in_one_sentence(real):
    check_export(real, items=False)
    assert allowed_items(real) == ("over_refusal", "bbq", "utility")
    with pytest.raises(ValueError) as error:
        check_export(real, items=True)
    text = one_sentence(error.value)
    assert f"safety ({HEX_PHI}, HEx-PHI Dataset License Agreement)" in text
    assert "exported as rates only" in text
    assert "bbq" not in text


@pytest.mark.parametrize(
    ("forbids", "allowed"),
    [
        (("bases", "gemma"), ()),  # every benchmark is asked of every base model
        (("judges", "other"), ("bbq", "utility")),
        (("raters", "rater"), ("over_refusal", "bbq")),
        (
            ("data", "sft"),
            ("over_refusal", "bbq", "utility"),
        ),  # what was trained on has no rows of items
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else str(value),
)
def test_rows_hang_on_the_models_that_answer_and_score(real, monkeypatch, forbids, allowed):
    section, name = forbids
    dumped = real.model_dump(exclude_unset=True)
    dumped["judges"]["other"] = {
        "format": "llama_guard_2",
        "source": GUARD,
        "benchmarks": ["over_refusal"],
    }
    dumped[section][name]["source"] = "lab/strict"
    entries = register() | {"lab/strict": dataclasses.replace(of(HEX_PHI), source="lab/strict")}
    monkeypatch.setattr(licences, "register", lambda: entries)
    if section == "judges":
        assert "safety" not in allowed_items(Study(**dumped))  # HEx-PHI itself
        dumped["benchmarks"]["safety"]["source"] = "github:mlcommons/ailuminate"
        assert allowed_items(Study(**dumped)) == (
            "safety",
            *allowed,
        )  # which that judge does not judge
        dumped["judges"]["guard"]["source"] = "lab/strict"
        assert (
            allowed_items(Study(**dumped)) == allowed
        )  # no judge reads BBQ's answers or the utility's
    else:
        assert allowed_items(Study(**dumped)) == allowed


# ---- text
def test_no_licence_leads_to_text(real, monkeypatch, tmp_path):
    """`text` is a fact to know; nothing that may leave changes with it, and the tables with text
    are refused whatever it says.
    """
    before = allowed_items(real), notice(real)
    entries = {name: dataclasses.replace(entry, text=True) for name, entry in register().items()}
    assert any(entry.text for entry in register().values())
    monkeypatch.setattr(licences, "register", lambda: entries)
    assert of(HEX_PHI).text
    assert (allowed_items(real), notice(real)) == before
    with pytest.raises(ValueError, match="rates only"):
        check_export(real, items=True)
    private = {name for name, table in TABLES.items() if table.private}
    assert "responses" in private
    assert not private & set(publish.PUBLISHED)
    for name in private:
        with pytest.raises(ValueError, match="never published"):
            publish.text_free(tmp_path, name)


# ---- the notice
def test_notice_names_every_licence_and_its_terms(real):
    text = notice(real)
    for row in of_study(real).itertuples():
        assert row.source in text
        assert row.licence in text
        assert of(row.source).url in text
        assert of(row.source).credit in text
    for source in (LLAMA, GUARD, GEMMA):
        assert of(source).outputs in text
    for source in (LLAMA, GEMMA, "Qwen/Qwen2.5-7B-Instruct"):
        assert of(source).adapters in text
    assert text.count(of(LLAMA).outputs) == 1  # of the base model, the rater and the judge together
    assert f"- safety: as rates only ({HEX_PHI}, HEx-PHI Dataset License Agreement)" in text
    assert "- bbq: ids with scores" in text
    assert "no text of a prompt" in text
    assert "/somewhere" not in text


def test_notice_of_the_miniature_has_no_terms():
    text = notice(load("miniature"))
    assert text.count("- none") == 3  # on outputs, on adapters, to be checked
    assert "miniature:judge (judge mini-guard)" in text
    assert text.count("Apache-2.0. ") == 1  # one line for all that are under one entry
    assert "(init texts)" in text


def test_notice_says_what_is_not_known(real):
    text = notice(asked_of(real, "lab/prompts"))
    assert "- lab/prompts (benchmark safety): licence not known." in text
    assert "- safety: as rates only (lab/prompts, licence not known)" in text
