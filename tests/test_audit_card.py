"""An audit's section of a model card, its metadata, and its records in others' formats."""

import hashlib
import json
import re

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from audited import record, verdict
from driftbook.publishing.audit_card import BEGIN, END, audited_card, card_section, escaped_markdown
from driftbook.publishing.audit_files import licences_of
from driftbook.publishing.audit_formats import NOT_EVIDENCE, ci_json, eval_results, every_eval_ever
from driftbook.publishing.audit_gate import gate, parse_gate
from driftbook.publishing.audit_page import write_audit_page

HOSTILE = (
    "<script>alert(1)</script> [x](javascript:alert(1)) ![y](https://evil.example/z.png) |a|b|"
    " `code` **bold** <!-- driftbook audit: end --> https://evil.example www.evil.example"
    " me@evil.example @someone $x$ &lt; \n\n# Heading\n- item\n\x1b[31m\u202egnp.exe"
)
MARKDOWN = MarkdownIt("gfm-like", {"html": True})


def tokens(text: str) -> list:
    """All tokens of a text of Markdown, those inside of lines too."""
    found = MARKDOWN.parse(text)
    return found + [one for token in found for one in token.children or ()]


# ---- the section
def test_the_section_has_every_field():
    text = card_section(record(system_prompt="Be brief.", merged_hash="e" * 64))
    flat = text.replace("\\", "")
    for one in ("a" * 64, "b" * 64, "c" * 64, "d" * 64, "e" * 64, "Be brief.", "llama_guard_2"):
        assert one in flat
    for one in ("threshold 0.5", "error of judge guard: not known", "KL 0.20 nats", "no-op): no"):
        assert one in flat
    for one in ("seed: 0", "margin (points): 3.0", "2026-11-29", "Apache-2.0", NOT_EVIDENCE):
        assert one in flat
    for one in ("Several turns were not tested.", "training compute: not known", "95% interval"):
        assert one in flat
    assert "| −1.0 | −2.0 to 0.5 | 3 | 100 | no worse by the margin |" in text


def test_the_table_has_a_row_for_each_verdict():
    (rows,) = re.findall(r"(?:^\|.*\n)+", card_section(record()), re.MULTILINE)
    kinds = [token.type for token in MARKDOWN.parse(rows)]
    assert kinds.count("tr_open") == 1 + len(record()["verdicts"])


def test_what_is_not_known_is_said():
    rows = [verdict(difference=None, low=None, high=None, base=None, n_items=None)]
    text = card_section(record(rows, judges=[], licences=[], not_tested=[]))
    assert "| not known | not known | not known | not known | 3 | not known |" in text
    assert "judge: none; refusals by a detector" in text
    assert "licences: not known" in text


@pytest.mark.parametrize("where", ["name", "system_prompt", "sentence", "word", "title", "judge"])
def test_texts_of_others_make_no_markup(where):
    row = {where: HOSTILE} if where in ("sentence", "word", "title") else {}
    more = {where: HOSTILE} if where in ("name", "system_prompt") else {}
    if where == "judge":
        more = {"judges": [{"name": HOSTILE, "format": HOSTILE, "threshold": 1, "error": HOSTILE}]}
    made = record([verdict(**row)], **more)
    made["candidate"]["source"] = HOSTILE if where == "name" else "o/m"
    plain = {token.type for token in tokens(card_section(record([verdict()])))}
    found = tokens(card_section(made))
    assert {token.type for token in found} - {"text_special", "hardbreak"} <= plain | {"text"}
    blocks = [token.content.strip() for token in found if token.type == "html_block"]
    assert blocks == [BEGIN, END]
    assert not [one for one in found if one.type in ("link_open", "image", "html_inline")]
    assert card_section(made).count(END) == 1


@given(st.text(max_size=80))
def test_an_escaped_text_is_one_line_of_plain_text(text):
    shown = f"x {escaped_markdown(text)} y"
    found = tokens(shown)
    kinds = {token.type for token in found}
    assert kinds <= {"paragraph_open", "inline", "paragraph_close", "text", "text_special"}
    assert not any(ord(one) < 32 for one in shown)


def test_a_long_text_is_cut_and_a_long_system_prompt_has_its_hash():
    assert len(escaped_markdown("x" * 10_000)) < 700
    long = "Be brief. " * 100
    section = card_section(record(system_prompt=long))
    assert hashlib.sha256(long.encode()).hexdigest() in section
    assert long not in section


# ---- the card and model-index
def test_a_card_round_trips(tmp_path):
    made = record()
    path = tmp_path / "README.md"
    audited_card(made).save(path)
    read = ModelCard.load(path)
    assert read.data.base_model == "HuggingFaceTB/SmolLM2-135M"
    assert read.data.eval_results == eval_results(made)
    name, again = model_index_to_eval_results(read.data.to_dict()["model-index"])
    assert (name, again) == (made["name"], eval_results(made))
    (one,) = [one for one in again if one.metric_type == "safety_difference"]
    assert one.metric_value == -1.0
    assert one.metric_args["ci_low"] == -2.0
    assert one.metric_args["level"] == 0.95


def test_another_audit_replaces_the_first_and_leaves_the_rest(tmp_path):
    card = """---
license: mit
tags: [mine]
model-index:
- name: my-name
  results:
  - task: {type: text-generation}
    dataset: {name: GSM8K, type: gsm8k}
    metrics: [{type: acc, value: 0.5}]
---

# My adapter

Words of mine.
"""
    once = audited_card(record(), card)
    twice = audited_card(record([verdict("utility", word="better")]), once)
    text = str(twice)
    assert text.count(BEGIN) == text.count(END) == 1
    assert "Words of mine." in text
    assert "# My adapter" in text
    assert (twice.data.license, twice.data.tags, twice.data.model_name) == (
        "mit",
        ["mine"],
        "my-name",
    )
    kinds = [one.metric_type for one in twice.data.eval_results]
    assert kinds == ["acc", "utility", "utility_difference"]
    assert str(audited_card(record([verdict("utility", word="better")]), twice)) == text
    path = tmp_path / "README.md"
    path.write_text(text)
    assert str(audited_card(record([verdict("utility", word="better")]), path)) == text


def test_hostile_names_in_metadata_stay_texts():
    made = record([verdict(outcome=HOSTILE, benchmark=HOSTILE)], name=HOSTILE)
    data = ModelCard(str(audited_card(made))).data
    assert data.eval_results == eval_results(made)
    assert all("\n" not in one.metric_name for one in data.eval_results)


# ---- every-eval-ever
def test_ids_of_metrics_are_plain_and_differ():
    names = ["../x", "..\\x", "a b", "a_b"]  # tasks of logs have names of their own
    found = every_eval_ever(record([verdict(name) for name in names]))["evaluation_results"]
    ids = {one["metric_config"]["metric_id"] for one in found}
    assert len(ids) == 2 * len(names)
    assert all(re.fullmatch(r"driftbook\.\w+", one) for one in ids)


def test_an_every_eval_ever_record_has_intervals():
    row = verdict(worse="rise", area="over_refusal")
    made = every_eval_ever(record([row], categories=[row | {"category": "kind 1"}]), "me")
    results = made["evaluation_results"]
    assert len(results) == 4
    ends = results[0]["score_details"]["uncertainty"]["confidence_interval"]
    assert (ends["lower"], ends["upper"], ends["confidence_level"]) == (-2.0, 0.5, 0.95)
    assert results[0]["score_details"]["score"] == -1.0
    assert results[0]["metric_config"]["lower_is_better"]
    assert "confidence_interval" not in results[1]["score_details"]["uncertainty"]
    assert len({one["evaluation_result_id"] for one in results}) == 4
    assert made["model_info"]["additional_details"]["base_hash"] == "b" * 64


def test_its_own_package_finds_no_fault(tmp_path):
    # every-eval-ever 0.3 needs Python 3.12 and huggingface_hub below 2, so it is not among ours
    core = pytest.importorskip("every_eval_ever.validator.validation_core")
    for number, made in enumerate(
        [
            record(),
            record([verdict(difference=None, low=None, high=None, base=None)]),
            record(categories=[verdict() | {"category": HOSTILE}]),
            record([verdict(HOSTILE)], name=HOSTILE, candidate={"name": "x", "kind": "log"}),
        ]
    ):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(every_eval_ever(made)))
        report = core.validate_aggregate(path)
        assert report.valid, report.errors
        assert not core.check_score_metadata(every_eval_ever(made))
        assert not core.check_model_deployment(every_eval_ever(made))


# ---- CI
def test_json_for_ci():
    made = record([verdict(low=-20, high=-10, word="worse")])
    found = json.loads(ci_json(made, *gate(made, parse_gate("safety<-3"))))
    assert (found["status"], found["meaning"]) == (1, "fail")
    assert found["verdicts"][0]["ci_high"] == -10
    nothing = json.loads(ci_json(None, 3, ["No such adapter."]))
    assert (nothing["meaning"], nothing["verdicts"]) == ("could not run", [])


def test_what_must_be_said_of_candidate_and_judge_is_said():
    made = record(notes=["another model may stand behind the name"], judges_note="no judge")
    assert "- another model may stand behind the name" in card_section(made)
    assert "- no judge" in card_section(made)


def test_a_bias_score_has_its_own_ends():
    made = record([verdict("bias_ambiguous", -20.0, -30.0, -10.0), verdict("safety")])
    ends = {
        one["evaluation_result_id"].partition("#")[0] + one["evaluation_result_id"][-6:]: (
            one["metric_config"]["min_score"],
            one["metric_config"]["max_score"],
        )
        for one in every_eval_ever(made)["evaluation_results"]
    }
    assert ends == {
        "bias_ambiguouserence": (-200, 200),
        "bias_ambiguousdidate": (-100, 100),
        "safetyerence": (-100, 100),
        "safetydidate": (0, 100),
    }


def test_licences_name_no_folder_of_this_machine(study, tmp_path):
    """Models and sets that lie in folders here are known by their last part, on card and page."""
    places = {
        name: one.model_copy(update={"source": f"/data/her own/{name}-files"})
        for name, one in {**study.bases, **study.benchmarks, **study.judges}.items()
    }
    kinds = ("bases", "benchmarks", "judges")
    moved = {kind: {name: places[name] for name in getattr(study, kind)} for kind in kinds}
    places["bbq"] = study.benchmarks["bbq"].model_copy(update={"source": "github:nyu-mll/BBQ/data"})
    moved["benchmarks"]["bbq"] = places["bbq"]
    moved["bases"]["another"] = study.bases["tiny-llama"]  # of the study, and not asked
    found = licences_of(study.model_copy(update=moved), "tiny-llama")
    assert len(found) == len(places)
    assert "base model tiny-llama: tiny-llama-files" in [one["what"] for one in found]
    assert "benchmark bbq: github:nyu-mll/BBQ/data" in [one["what"] for one in found]
    told = record(licences=found)
    page = write_audit_page(told, tmp_path / "audit.html").read_text()
    for text in (card_section(told), page):
        assert "-files" in text
        assert "her own" not in text
