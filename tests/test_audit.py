"""The audit: what is counted in each area, what the words need, and what is refused before work."""

import json
from collections import defaultdict
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import audited
from driftbook.analyses import audit
from driftbook.batch import audit_record, audit_setup, auditing
from driftbook.batch.auditing import Audit
from driftbook.benchmarks import bbq_scores
from driftbook.stats.harm import DETECTOR
from driftbook.stats.noninferiority import CANNOT_TELL
from driftbook.stats.picking import picked
from driftbook.stats.terms import BIAS_AMB, CHANGE, REFUSED, RUN, UNSAFE
from driftbook.stats.words import BETTER, WORSE
from driftbook.study import code, study_file
from driftbook.study.sections import Base
from driftbook.study.tables import ESTIMATES, RUNS
from executed import run_notebook

pytest_plugins = ["batches"]
AREA_OF = {"safety": "safety", "over_refusal": "over_refusal", "utility": "utility"}


def watched(scores: pd.DataFrame, margin: float) -> pd.DataFrame:
    return audit.watched(scores, margin, 5)


def watched_categories(scores: pd.DataFrame, margin: float) -> pd.DataFrame:
    return audit.watched_categories(scores, margin, 5)


def words(found: pd.DataFrame) -> dict[str, str]:
    return dict(zip(found["area"], found["word"], strict=True))


@pytest.mark.parametrize("decide", [audit.decided, watched])
def test_plain_damage_is_worse_in_the_direction_of_each_area(decide):
    scores = audited.scores(
        {"safety": (0.95, 0.4), "over_refusal": (0.6, 0.1), "utility": (0.1, 0.9)}
    )
    found = decide(scores, 3.0)
    assert words(found) == {"safety": WORSE, "over_refusal": BETTER, "utility": BETTER}
    for row in found.to_dict("records"):
        assert np.isclose(row["candidate"] - row["base"], row["difference"])
        assert row["ci_low"] < row["difference"] < row["ci_high"]
        assert row["tipping"]
        assert pd.isna(row["needed"])


@pytest.mark.parametrize("decide", [audit.decided, watched])
def test_two_equal_sides_are_never_worse_or_better(decide):
    scores = audited.scores({"safety": (0.9, 0.9), "utility": (0.5, 0.5)})
    same = scores[scores["side"].eq("base")]
    scores = pd.concat([same, same.assign(side="candidate")], ignore_index=True)
    found = decide(scores, 3.0)
    assert found["difference"].eq(0).all()
    assert not found["word"].isin([WORSE, BETTER]).any()
    assert audit.moved(scores)["change"].eq("same").all()


def test_unscored_answers_that_could_overturn_a_word_take_it_away():
    scores = audited.scores({"safety": (0.95, 0.75)}, n=100)
    assert words(audit.decided(scores, 3.0)) == {"safety": WORSE}
    gone = scores["side"].eq("candidate") & scores["item"].isin(scores["item"].unique()[:70])
    scores.loc[gone, "score"] = pd.NA
    for decide in (audit.decided, watched):
        [row] = decide(scores, 3.0).to_dict("records")
        assert (row["word"], row["n_unscored"]) == (CANNOT_TELL, 70)
    assert audit.moved(scores)["change"].eq("unscored").sum() == 70


@pytest.mark.parametrize("decide", [audit.decided, watched])
def test_an_area_of_which_nothing_was_read_stays_and_cannot_be_told(decide):
    scores = audited.scores({"safety": (0.9, 0.9), "utility": (0.5, 0.5)})
    scores.loc[scores["area"].eq("safety") & scores["side"].eq("candidate"), "score"] = pd.NA
    rows = decide(scores, 3.0).set_index("area")
    assert rows.loc["safety", "word"] == CANNOT_TELL
    assert (rows.loc["safety", "n_items"], rows.loc["safety", "n_unscored"]) == (0, 200)
    said = audit.in_words({"area": "safety", **rows.loc["safety"]})
    assert said == "Safety: none of 200 items could be read on both sides: cannot tell."
    assert rows.loc["utility", "n_items"] == 200


def test_categories_are_told_within_their_area():
    scores = audited.scores({"safety": (0.9, 0.9)})
    hurt = scores["side"].eq("candidate") & scores["category"].eq("category 1")
    scores.loc[hurt, "score"] = 0.0
    for each in (audit.decided_categories, watched_categories):
        found = each(scores, 3.0).set_index("category")["word"]
        assert found["category 1"] == WORSE
        assert found["category 0"] != WORSE


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_the_mean_of_ambiguous_scores_is_bbqs_bias_score(seed):
    """Against bbq_scores.scores, wherever all answers were read."""
    rng, n = np.random.default_rng(seed), 40
    choice = rng.choice(["biased", "other", "unknown"], n)
    answers = pd.DataFrame(
        {
            "run_id": "base",
            "item_id": [str(number) for number in range(n)],
            "answer_mode": "letters",
            "prompt_variant": "default",
            "option_order": "ABC",
            "dimension": "Age",
            "context": "ambiguous",
            "polarity": "negative",
            "question_family": [f"Age-{number // 4}" for number in range(n)],
            **dict.fromkeys(("p_a", "p_b", "p_c"), 1 / 3),
            "option_mass": 1.0,
            "answer": "A",
            "correct": choice == "unknown",
            "unknown": choice == "unknown",
            "biased": [None if one == "unknown" else one == "biased" for one in choice],
            "unscored_reason": None,
        }
    )
    items = answers[["item_id", "dimension", "question_family"]].assign(target=0)
    sides = dict.fromkeys(audit.SIDES, answers)
    scores = audit.item_scores("bbq", sides, items, {})
    mine = scores[scores["area"].eq("bias_ambiguous") & scores["side"].eq("base")]["score"]
    official = bbq_scores.scores(answers, by=("run_id",), n_boot=0)
    column = "bias_amb"
    assert np.isclose(100 * (2 * mine.astype(float).mean() - 1), 100 * official[column].iloc[0])


def test_what_would_tell_and_what_would_overturn_are_counted():
    row = {"word": CANNOT_TELL, "worse": audit.FALL, "difference": 0.0, "margin": 3.0}
    row |= {"area": "safety", "n_items": 100, "ci_low": -6.0, "ci_high": 6.0}
    assert audit.needed(row) == 400  # half the width takes four times the items
    assert audit.tipping(row) is None
    worse = row | {"word": WORSE, "difference": -20.0, "ci_low": -30.0, "ci_high": -10.0}
    assert audit.tipping(worse).startswith("10 answers of one side (10 % of its 100)")
    kept = row | {"word": audit.NO_WORSE, "ci_low": -1.0, "ci_high": 1.0}
    assert audit.tipping(kept).startswith("2 answers")


# ---- what is asked
@pytest.mark.parametrize(
    ("text", "seconds", "prompts"),
    [
        ("all", None, None),
        ("10 minutes", 600, None),
        ("300 prompts", None, 300),
        ("2 GPU-hours", 7200, None),
        ("90 seconds", 90, None),
    ],
)
def test_a_budget_is_read(text, seconds, prompts):
    found = audit_setup.budget(text)
    assert (found.seconds, found.prompts) == (seconds, prompts)
    assert found.watched == (text != "all")


@pytest.mark.parametrize("text", ["", "ten minutes", "0 minutes", "-3 prompts", "5", "$(id)"])
def test_another_budget_is_refused(text):
    with pytest.raises(ValueError, match="is no budget; give all"):
        audit_setup.budget(text)


def test_what_is_no_adapter_is_refused_in_a_sentence(tmp_path):
    def refused(adapter: str, model: str = "") -> str:
        with pytest.raises(ValueError) as told:
            audit_setup.candidate(adapter, model)
        return str(told.value)

    assert "give ADAPTER= or MODEL=" in refused("")
    assert "one of the two" in refused("a", "b")
    assert "there is no such folder" in refused("no/such/folder/anywhere")
    assert "it is empty" in refused(str(tmp_path))
    settings_of = tmp_path / "adapter_config.json"
    settings_of.write_text("{")
    assert refused(str(tmp_path))
    known = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None}
    settings_of.write_text(json.dumps(known))
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    assert "safetensors" in refused(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    settings_of.write_text(json.dumps(known | {"task_type": "SEQ_CLS"}))
    assert "SEQ_CLS" in refused(str(tmp_path))


def test_an_adapter_without_a_known_base_needs_one(tmp_path):
    folder = tmp_path
    known = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(known))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    one = audit_setup.candidate(str(folder), "")
    with pytest.raises(ValueError, match="does not say which base model"):
        audit_setup.audit_study(one, "", "", "", {})
    with pytest.raises(ValueError, match="there is no such folder or file"):
        audit_setup.audit_study(one, "no/such/base/model", "", "", {})


def test_a_base_model_made_for_another_study_is_found_where_it_lies(study, standins):
    name, base = next(iter(study.bases.items()))
    one = audit_setup.Candidate("adapter", "x", "x", None, None, base, study, name)
    other = study.model_copy(update={"name": "other"})
    found = audit_setup._base_of(one, other)
    assert found.local.is_dir()
    assert found.answer_mode == base.answer_mode
    assert audit_setup._base_of(one, study) is base


def test_models_larger_than_the_free_memory_are_refused(study, monkeypatch):
    name, base = next(iter(study.bases.items()))
    monkeypatch.setattr(audit_setup, "_free_bytes", lambda: 1e12)
    audit_setup.check_memory({name: base}, study)
    monkeypatch.setattr(audit_setup, "_free_bytes", lambda: 1e3)
    with pytest.raises(ValueError, match=r"are free: about .* billion weights would fit"):
        audit_setup.check_memory({name: base}, study)


def test_a_name_is_one_of_a_folder():
    names = {"/o/x/lora r8/": "lora-r8", "org/lora@" + "0" * 40: "lora", "runs/a/adapter": "a"}
    names |= {"adapter": "adapter", "/": "adapter", "..": "adapter", "_x": "x", "é": "adapter"}
    assert {text: audit_setup.name_of(text, "") for text in names} == names
    deployed = {"http://127.0.0.1:8000/v1": "127.0.0.1", "https://u:p@api.x.org/v1": "api.x.org"}
    deployed |= {"http://[::1]:80": "endpoint", "no address": "no-address"}
    assert {url: audit_setup.name_of("", "", url) for url in deployed} == deployed
    assert audit_setup.name_of("", "org/m", "http://h:1/v1") == "m"


def test_two_adapters_of_one_name_have_two_folders(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "a" / "lora")
    places = [f"{tmp_path}/a/lora", f"{tmp_path}/b/lora", "a/lora", "org/lora@" + "0" * 40]
    found = [audit_setup.place_of(one, "") for one in places]
    assert len(set(found)) == len(found)
    assert all(one.startswith("lora-") for one in found)
    same = [f"{tmp_path}/b/../a/lora/adapter", f"{tmp_path}/a/lora/"]
    assert {audit_setup.place_of(one, "") for one in same} == {found[0]}
    assert audit_setup.place_of("./a/lora", "") == found[2]
    assert audit_setup.place_of(f"{tmp_path}/link", "").endswith(found[0][-6:])
    served = {audit_setup.place_of("", "", f"http://127.0.0.1:{port}/v1") for port in (8000, 8001)}
    assert len(served) == 2


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("package:smollm2==0.1.2/SmolLM2-135M.Q4_1.gguf", "SmolLM2-135M.Q4_1"),
        ("HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M"),
        ("/m/models--org--Tiny-1B/snapshots/0123456789abcdef", "Tiny-1B"),
        ("/m/models/Tiny-1B/", "Tiny-1B"),
        ("/m/miniature-0123456789ab-s0/llama/base", "llama-base"),
        ("/m/Tiny-1B/checkpoint-500", "Tiny-1B-checkpoint-500"),
        ("/m/Tiny-1B/0123456789abcdef", "Tiny-1B"),
        ("/base", "base"),
    ],
)
def test_a_base_model_has_its_own_name(source, name, study):
    base = Base(family="given", source=source)
    assert audit_setup.own_name(base) == name
    known = audit_setup._free_name(name, study)
    assert not {".", "/"} & set(known)
    assert known not in study.models
    assert audit_setup._free_name("tiny guard", study) == "tiny-guard-base"


def test_a_part_of_a_prompt_is_no_budget():
    with pytest.raises(ValueError, match="is not one prompt"):
        audit_setup.budget("0.5 prompts")


def test_what_a_study_makes_is_no_model_by_its_name():
    with pytest.raises(ValueError, match="give its folder"):
        audit_setup.candidate("", "miniature:base")


def test_a_judge_is_checked_before_work(study):
    with pytest.raises(ValueError, match="its format is one of "):
        audit_setup._judges(study, "guard=org/model")
    with pytest.raises(ValueError, match="cannot read judge from"):
        audit_setup._judges(study, f"llama_guard_3={Path(__file__).parent}")


def test_each_item_is_asked_once_however_often_a_study_asks_it(monkeypatch):
    monkeypatch.setattr(audit_setup.loading, "check_source", lambda *_: None)
    trained = study_file.load("corrected")
    name, base = next(iter(trained.bases.items()))
    one = audit_setup.Candidate("adapter", "x", "x", None, None, base, trained, name)
    asked, _, _ = audit_setup.audit_study(one, "", "none", "", {})
    assert any(one.samples for one in trained.benchmarks.values())
    assert any(one.wordings for one in trained.benchmarks.values())
    assert set(asked.benchmarks) == set(trained.benchmarks)
    assert not any(one.samples or one.wordings for one in asked.benchmarks.values())


def test_a_whole_model_is_asked_as_its_base():
    base = Base(family="llama", source="org/base", dtype="bfloat16", template="{{ messages }}")
    model = Base(family="given", source="org/model", revision="0" * 40)
    found = audit_setup.beside(model, base)
    assert (found.dtype, found.template) == ("bfloat16", "{{ messages }}")
    assert (found.source, found.revision) == (model.source, model.revision)


# ---- in which order, and how long
def opened(budget: str, benchmarks: dict[str, pd.DataFrame], **more) -> Audit:
    """An audit that is to ask these items, in this order."""
    audit_of = Audit(None, None, "base", audit_setup.budget(budget), 3.0, 0, None, "x", **more)
    audit_of.__dict__["asked"] = benchmarks  # in place of what a study asks
    return audit_of


def some(n: int, per_family: int = 1) -> pd.DataFrame:
    families = [f"family {number // per_family}" for number in range(n)]
    return pd.DataFrame({"prompt_id": map(str, range(n)), "family": families})


def test_every_benchmark_is_begun_however_short_the_budget():
    """Else a model that takes long to load is asked nothing, or in one area alone."""
    late = opened("1 second", {"safety": some(60), "utility": some(40)}, started=-1e9)
    assert [name for name, _ in late.blocks([])] == ["safety", "utility"]
    few_asked = opened("30 prompts", {"safety": some(60), "utility": some(40)})
    assert [len(rows) for _, rows in few_asked.blocks([])] == [15, 15]
    more = opened("70 prompts", {"safety": some(60), "utility": some(40)})
    assert [len(rows) for _, rows in more.blocks([])] == [25, 25, 20]


@pytest.mark.parametrize("budget", ["10 minutes", "40 prompts", "all"])
def test_no_look_comes_in_the_middle_of_a_family(budget):
    rows = some(90, per_family=7)
    blocks = [part for _, part in opened(budget, {"safety": rows}).blocks([])]
    families = [set(part["family"]) for part in blocks]
    assert not any(one & other for one, other in pairwise(families))
    if budget != "40 prompts":
        assert pd.concat(blocks)["prompt_id"].tolist() == rows["prompt_id"].tolist()


def test_an_area_of_which_nothing_was_asked_yet_cannot_be_told():
    ambiguous = some(8).assign(context=["disambiguated"] * 4 + ["ambiguous"] * 4, target=0)
    scores = audited.scores({"safety": (0.9, 0.9)}).assign(area="accuracy", benchmark="bbq")
    found = opened("4 prompts", {"bbq": ambiguous}).verdicts(scores)
    assert words(found)["bias_ambiguous"] == CANNOT_TELL
    no_targets = opened("4 prompts", {"bbq": ambiguous.assign(target=None)}).verdicts(scores)
    assert set(no_targets["area"]) == {"accuracy"}


# ---- what both sides are
def test_likelihoods_of_other_tokens_are_not_compared(monkeypatch):
    ratings = pd.DataFrame({"prompt_id": ["a", "b"], "metric": "nll", "value": [0.1, 0.2]})
    ratings = ratings.astype({"value": "Float64"})
    monkeypatch.setattr(Audit, "_served", lambda *_: ratings)
    monkeypatch.setattr(Audit, "_begun", lambda *_: {})
    rows = pd.DataFrame({"prompt_id": ["a", "b"]})
    for same in (True, False):
        one = opened("all", {"utility": rows})
        one.__dict__["same_words"] = same
        assert one.ask("utility", rows)["score"].notna().all() == same


def test_a_changed_probe_is_not_served_from_older_results(monkeypatch, tmp_path):
    """The prefill, the dropped template and the benign first turn are in no stage's code."""
    parts = code.closure({auditing.PROBES_CODE})
    names = {name for module, name in parts if module == "driftbook.benchmarks.deployed"}
    assert {"BEGINNING", "FIRST_TURN", "probed_contexts", "probed_responses"} <= names
    found = []
    monkeypatch.setattr(Audit, "_key", lambda *_: {})
    monkeypatch.setattr(Audit, "_weights", lambda *_: [])
    monkeypatch.setattr(Audit, "_place", lambda *_: tmp_path)
    monkeypatch.setattr(Audit, "_kept", lambda _, key, *__: found.append(key))
    one = opened("all", {})
    for name in ("safety", "safety, second turn"):
        for text in ("before", "after"):
            monkeypatch.setattr(code, "fingerprint", lambda *_, text=text: text)
            one._served("respond", name, some(1), "base")
    assert found[0] == found[1]
    assert found[2] != found[3]


def test_a_judge_of_safety_judges_it_in_every_way_it_is_asked():
    judges = {
        "first": SimpleNamespace(benchmarks=()),
        "second": SimpleNamespace(benchmarks=["safety"]),
    }
    one = opened("all", {})
    object.__setattr__(one, "study", SimpleNamespace(judges=judges))
    assert one.judges_of("safety, second turn") == one.judges_of("safety") == ["first", "second"]
    assert one.judges_of("over_refusal") == ["first"]


def test_refusals_are_the_detectors_whoever_judges_harm():
    rows = audit.decided(audited.scores({"safety": (0.9, 0.8), "over_refusal": (0.2, 0.2)}), 3.0)
    asked = SimpleNamespace(judges_of=lambda _: ["guard"], asked=defaultdict(lambda: some(200)))
    told = {row["area"]: audit_record._of_area(row, asked) for row in rows.to_dict("records")}
    assert [told[area]["judge"] for area in ("safety", "over_refusal")] == ["guard", DETECTOR]
    asked.judges_of = lambda _: []
    row = audit_record._of_area(rows.to_dict("records")[0], asked)
    assert (row["judge"], row["outcome"]) == (DETECTOR, audit.REFUSED)


def test_usefulness_without_right_answers_is_called_what_it_is():
    scores = audited.scores({"utility": (0.9, 0.8)})
    [row] = audit.decided(scores, 3.0).to_dict("records")
    asked = SimpleNamespace(judges_of=lambda _: [], asked=defaultdict(lambda: some(200)))
    for metric, outcome in (("nll", audit.LIKELY), ("correct", audit.AREAS["utility"].outcome)):
        known = scores.assign(detail=[{"metric": metric}] * len(scores))
        likely = audit_record._is_likelihood(known)
        assert audit_record._of_area(row, asked, likely)["outcome"] == outcome


def configured(folder, kind="LORA", **settings):
    """The folder of an adapter, of which only its configuration is looked at."""
    content = json.dumps({"peft_type": kind, **settings})
    (folder / "adapter_config.json").write_text(content)
    return folder


SOFT = {"num_virtual_tokens": 8}
OF_KINDS = {"LORA": (0, 0), "PROMPT_TUNING": (0, 8), "SUFFIX_TUNING": (8, 8)}


@pytest.mark.parametrize("kind", OF_KINDS)
@pytest.mark.parametrize("own", [True, False])
def test_the_dose_is_on_answers_that_were_held_out_of_the_adapters_training(
    own, kind, tmp_path, monkeypatch
):
    asked, trained = (SimpleNamespace(name=n, data={"heldout": 1}) for n in ("asked", "trained"))
    read = []

    def taken(_, *given):
        read.extend(given)
        return [1, 2], None

    monkeypatch.setattr(auditing, "held_out", taken)
    monkeypatch.setattr(auditing.adapters, "attached", lambda *_: nullcontext())
    found = {"nll_base": 2.0, "nll": 1.5, "kl_base": 0.25, "no_op": False}
    monkeypatch.setattr(auditing, "measure_dose", lambda *_: found)
    one = opened("all", {})
    one.__dict__["base"] = SimpleNamespace(model=None)
    one.__dict__["study"] = asked
    folder = configured(tmp_path, kind, **({} if kind == "LORA" else SOFT))
    given = SimpleNamespace(kind="adapter", folder=folder, study=trained if own else None)
    one.__dict__["candidate"] = given
    told = audit_record._dose(one)
    assert read == [trained if own else asked, *OF_KINDS[kind]]
    assert (told["kl"], told["loss_base"], told["loss_candidate"]) == (0.25, 2.0, 1.5)
    assert told["sentence"].startswith(f"On 2 held-out answers of {read[0].name}")
    assert ("if the adapter was not trained on them" in told["sentence"]) != own


def test_a_dose_without_held_out_answers_is_not_known(study, tmp_path, monkeypatch):
    def fails(*_):
        raise ValueError("data.heldout: /data/her/x.json is not there")

    one = opened("all", {})
    folder = configured(tmp_path)
    one.__dict__["candidate"] = SimpleNamespace(kind="adapter", study=None, folder=folder)
    one.__dict__["base"] = None
    one.__dict__["study"] = SimpleNamespace(name="mine", data={})
    told = audit_record._dose(one)
    assert told["sentence"].endswith("is not known: mine has no held-out answers.")
    assert [told[name] for name in ("kl", "loss_base", "loss_candidate", "no_op")] == [None] * 4
    monkeypatch.setattr(auditing, "held_out", fails)
    one.__dict__["study"] = study
    assert audit_record._dose(one)["sentence"].endswith(
        "is not known: data.heldout: x.json is not there."
    )


def test_an_adapter_of_another_base_is_said_beside_the_verdicts():
    found = pd.DataFrame(
        {
            "finding": ["base", "base", "rank"],
            "severity": ["warning", "note", "warning"],
            "sentence": ["it was trained on x, and the base model given is y", "a", "b"],
            "module": None,
        }
    )
    one = opened("all", {})
    object.__setattr__(one, "candidate", SimpleNamespace(kind="adapter"))
    one.__dict__["_findings"] = found
    assert one.notes == ["of the adapter: it was trained on x, and the base model given is y"]


@pytest.mark.parametrize("template", ["", "base", "adapter"])
def test_another_chat_template_stops_an_audit_unless_one_is_chosen(template):
    said = "its chat template differs from the base model's"
    row = {"finding": "chat_template", "severity": "warning", "sentence": said, "module": None}
    one = opened("all", {}, given={"TEMPLATE": template} if template else {})
    one.__dict__["candidate"] = SimpleNamespace(kind="adapter", source="lora")
    one.__dict__["_findings"] = pd.DataFrame([row] * (template != "adapter") or None, columns=row)
    if template:
        one.examined()
        notes = {"base": f"of the adapter: {said}", "adapter": "both sides are asked by a chat"}
        assert [note.startswith(notes[template]) for note in one.notes] == [True]
    else:
        with pytest.raises(ValueError, match=r"TEMPLATE=adapter .* or TEMPLATE=base"):
            one.examined()


def test_a_chosen_template_is_asked_of_both_sides(tmp_path, study, monkeypatch):
    monkeypatch.setattr(audit_setup.loading, "check_source", lambda *_: None)
    name, base = next(iter(study.bases.items()))
    one = audit_setup.Candidate("adapter", "x", "x", tmp_path, None, base, study, name)
    with pytest.raises(ValueError, match="no chat template beside x; give TEMPLATE=base"):
        audit_setup.template_text("adapter", one)
    (tmp_path / "chat_template.jinja").write_text("{{ mine }}")
    assert audit_setup.template_text("adapter", one) == "{{ mine }}"
    assert [audit_setup.template_text(text, one) for text in ("", "base")] == [None, None]
    with pytest.raises(ValueError, match="is no file"):
        audit_setup.audit_study(one, "", "none", "", {"template": "no/such.jinja"})
    asked, known, _ = audit_setup.audit_study(one, "", "none", "", {"template": "{{ mine }}"})
    assert asked.bases[known].chat_template == "{{ mine }}"


def test_an_adapters_own_words_are_fetched_from_the_hub_if_it_has_them(tmp_path, monkeypatch):
    asked = []

    def fetch(_, __, patterns):
        asked.append(patterns)
        if len(asked) > 1:
            raise ValueError("it has none")
        return tmp_path

    monkeypatch.setattr(audit_setup.access, "fetch", fetch)
    assert audit_setup._adapter_folder(f"org/lora@{'0' * 40}") == tmp_path
    assert asked[1:] == [[pattern] for pattern in audit_setup.WORDS]


def test_only_its_owner_may_enter_the_folder_of_texts(tmp_path, monkeypatch):
    monkeypatch.setattr("driftbook.batch.auditing.AUDITS", tmp_path)
    (tmp_path / "x" / "text").mkdir(parents=True)
    (tmp_path / "x" / "text").chmod(0o755)
    text = opened("all", {}).texts
    assert text.stat().st_mode & 0o777 == 0o700


# ---- a whole audit
@pytest.mark.slow
@pytest.mark.parametrize("budget", ["all", "40 prompts"])
def test_an_audit_finds_what_the_study_of_the_same_run_found(finished, monkeypatch, budget):
    """The small study scored the same adapter on the same prompts; with a budget, on fewer."""
    run_id = next(one.run_id for one in finished.study().variants if one.method == "lora")
    folder = finished.folder / "audit"
    monkeypatch.setattr("driftbook.batch.auditing.AUDITS", folder)
    asked = {"adapter": str(finished.folder / "runs" / run_id), "benchmarks": str(finished.file)}
    probes = ["second turn"] if budget == "all" else []
    asked |= {"budget": budget, "probes": probes}
    run_notebook("21_audit", finished.folder, monkeypatch, **asked)
    [path] = folder.glob("*/audit.json")
    record = json.loads(path.read_text())
    path.unlink()
    verdicts = {row["area"]: row for row in record["verdicts"]}
    unasked = {area for probe, area in audit.PROBED.items() if probe not in probes}
    assert set(verdicts) == set(audit.AREAS) - unasked  # each is begun, however short the budget
    paths = sorted((finished.folder / "tables" / "estimates").glob("*.parquet"))
    mine = picked(ESTIMATES.read_all(paths), group=RUN, member=run_id, contrast=CHANGE)
    safety = verdicts["safety"]
    if budget == "all":
        assert record["how"]["stopped"] == "every prompt was asked"
        judge = record["judges"][0]["name"]
        [own] = picked(mine, outcome=UNSAFE, benchmark="safety", judge=judge)["value"]
        assert np.isclose(own, -verdicts["safety"]["difference"])
        [bias] = picked(mine, outcome=BIAS_AMB, benchmark="bbq", category="all")["value"]
        lean = verdicts["bias_ambiguous"]
        assert lean["n_unscored"] or np.isclose(bias, lean["difference"])
        assert safety["n_items"] + safety["n_unscored"] == safety["n_available"]
    else:
        assert record["looks"]
        assert record["how"]["stopped"] == "the budget of 40 prompts is spent"
        assert safety["n_items"] < safety["n_available"]
    text = path.parent / "text"
    assert text.stat().st_mode & 0o777 == 0o700
    assert all(one.stat().st_mode & 0o777 == 0o600 for one in text.glob("*.jsonl"))
    assert (path.parent / "ci.json").exists()
    assert record["base"]["name"] == "llama-aligned"  # as its folder has it
    [run] = RUNS.read(finished.folder / "tables").query("run_id == @run_id").to_dict("records")
    dose = record["dose"]
    assert np.isclose(dose["kl"], run["kl_base"], rtol=1e-4)
    assert np.isclose(dose["loss_base"] - dose["loss_candidate"], run["dose_nll"], atol=1e-4)
    [refused] = picked(mine, outcome=REFUSED, benchmark="over_refusal", category="all")["value"]
    over = verdicts["over_refusal"]
    if budget == "all":  # the study counts an unreadable answer as not refused
        spread = 200 * over["n_unscored"] / (over["n_items"] + over["n_unscored"]) + 1e-6
        assert abs(refused - over["difference"]) <= spread
