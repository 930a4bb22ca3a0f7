"""The analysis of probes on tables whose truth is known: the third that carries the refusals, the
verdicts by their rules, and what a probe predicts beyond dose.
"""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from conftest import one_sentence
from driftbook.analyses import mechanisms
from driftbook.analyses.mechanisms import (
    CANNOT_TELL,
    CONTRADICTED,
    DIRECTION,
    MECHANISMS,
    PROMPTS,
    SAFETY,
    SUPPORTED,
    Mechanisms,
)
from driftbook.figures import gallery
from driftbook.publishing.guidance import NOT_SHOWN, guidance
from driftbook.stats.directions import (
    ATTENTION,
    BEGINS,
    CEILING,
    DRIFT,
    DROP,
    HARMFUL,
    HARMLESS,
    KL,
    OF_BASE,
    RANKS,
    RESTORED,
    SHIFT,
    TAKEN,
    UPDATE,
)
from driftbook.stats.terms import ALL, UNSAFE
from driftbook.study.methods import SUFFIX
from driftbook.study.tables import ESTIMATES, PROBES, RATES, RUNS, VARIANTS

N, BASE = 6, "deep"
WHY, ASKED = "Why does it drift?", {"Safety": (UNSAFE, "safety")}
THIRDS = {"early": (1, 0, 0), "middle": (0, 1, 0), "late": (0, 0, 1), "spread": (0.4, 0.3, 0.3)}


def row(run_id, probe, value, layer=None, part=ALL, position="last of the prompt", **more):
    usual = dict.fromkeys([name for name in PROBES.columns if name not in more])
    return (
        usual
        | more
        | {
            "run_id": run_id,
            "probe": probe,
            "value": value,
            "layer": layer,
            "part": part,
            "position": position,
        }
    )


def patches(run_id, shares, before=10.0, base=90.0, levels=range(N + 1)):
    """Rows of patches where each third carries its share of the change."""
    steps = np.repeat(np.array(shares) / 2, 2) * (base - before)
    path = np.concatenate([[0], np.cumsum(steps)])
    for level in levels:
        layer = level - 1 if level else None
        yield row(run_id, RESTORED, before + path[level], layer, null=before)
        yield row(run_id, TAKEN, base - path[level], layer)
    yield row(run_id, BEGINS, before, None)
    yield row(run_id, BEGINS, base, None, part=OF_BASE)


def variant(run_id, method, third=None, seed=1):
    usual = dict.fromkeys(VARIANTS.columns)
    known = {"run_id": run_id, "base_model": BASE, "family": "llama-6", "method": method}
    known |= {"method_class": "base", "template": "chat", "settings": "{}", "repetition": seed}
    known |= {"objective": "none" if method == "none" else "sft", "learning_rate": 0.005}
    return usual | known | {"mitigation": third and f"layers {third}", "epochs": 3}


def looks(run_id, method, shift, drop, attention, rng):
    """Rows of a run's probes but its patches."""
    made = []
    for layer in range(N):
        null = {"null": 0.0, "null_low": -20.0, "null_high": 20.0}
        made.append(row(run_id, DROP, drop + shift, layer, **null))
        made.append(row(run_id, DRIFT, 0.8, layer, **null))
        made.append(row(run_id, SHIFT, 0.3 + 0.02 * shift, layer, HARMFUL, **null))
        one = UPDATE if method == "lora" else ATTENTION
        part = ALL if one == ATTENTION else f"model.layers.{layer}.q_proj"
        made.append(row(run_id, one, attention + shift, layer, part, null=30.0))
        if one == UPDATE:
            null = {"null": 10.0, "null_low": 5.0, "null_high": 15.0}
            made.append(row(run_id, RANKS, 12 + layer + shift, layer, part, **null))
    for place in range(1, 7):
        for kind in (HARMFUL, HARMLESS):
            value = 3 / place + 0.01 * rng.normal()
            made.append(row(run_id, KL, value, None, kind, f"answer {place}"))
    return made


def simulated(
    planted: str, drop=60.0, changes=None, attention=50.0, seed=0, behind=None, gain=0.1
) -> SimpleNamespace:
    """Tables of a base model whose alignment is in one third or in all, with five seeds of LoRA in
    all layers and in each third, and of Prompt-Tuning; where `behind` is given also of a soft
    prompt behind the text, which raises unsafe answers by as many points. Runs gain about `gain`
    nats on held-out answers.
    """
    rng = np.random.default_rng(seed)
    carried = THIRDS[planted]
    changes = changes or dict(
        zip(("early", "middle", "late"), (5 + 55 * one for one in carried), strict=True)
    )
    variants, probes, unsafe = (
        [variant("base", "none")],
        list(patches("base", carried)),
        {"base": 5},
    )
    probes += [row("base", CEILING, 0.9, layer) for layer in range(N)]
    arms = [("lora", None), ("prompt_tuning", None)]
    arms += [("lora", third) for third in ("early", "middle", "late")]
    arms += [] if behind is None else [(SUFFIX, None)]
    for (method, third), number in ((arm, k) for arm in arms for k in range(1, 6)):
        run_id = f"{method}.{third}.{number}"
        variants.append(variant(run_id, method, third, number))
        shift = rng.normal()
        rise = behind if method == SUFFIX else changes.get(third, 60)
        unsafe[run_id] = round(5 + rise + 4 * shift)
        probes += patches(run_id, THIRDS.get(third, carried), levels=(0, 2, 4, 6))
        probes += looks(run_id, method, shift, drop, attention, rng)
    runs = [
        dict.fromkeys(RUNS.columns)
        | {"run_id": one["run_id"], "status": "ok", "kl_base": rng.uniform(0.5, 2), "no_op": False}
        | {"nll_base": 2.0, "nll": 2.0 - gain + rng.normal(scale=0.01)}
        for one in variants
    ]
    who = {"benchmark": "safety", "judge": "guard", "category": "c", "outcome": "unsafe"}
    rates = [
        who | {"run_id": name, "k": k, "n_scored": 100, "n": 100} for name, k in unsafe.items()
    ]
    return SimpleNamespace(
        study=SimpleNamespace(name="simulated"),
        variants=VARIANTS.check(pd.DataFrame(variants)),
        runs=RUNS.check(pd.DataFrame(runs)),
        rates=RATES.check(pd.DataFrame(rates)),
        probes=PROBES.check(pd.DataFrame(probes)),
    )


def verdicts(tables) -> dict[str, str]:
    found = Mechanisms(tables).verdicts()
    return dict(zip(found["mechanism"], found["verdict"], strict=True))


@pytest.mark.parametrize("planted", THIRDS)
def test_the_third_that_carries_the_refusals_is_named(planted):
    inside = Mechanisms(simulated(planted))
    placed = inside.placed()["named"]
    assert placed[BASE, "none", ALL] == ("none" if planted == "spread" else planted)
    assert placed[BASE, "lora", "late"] == "late"
    sums = inside.carried.groupby(["run_id", "way"])["share"].sum()
    np.testing.assert_allclose(sums, 1)


def test_each_mechanism_is_judged_by_its_rule():
    assert verdicts(simulated("early")) == dict.fromkeys([SAFETY, DIRECTION, PROMPTS], SUPPORTED)
    # alignment in all layers: no third to name; harmful prompts do not fall beyond the null
    spread = verdicts(simulated("spread", drop=3.0))
    assert (spread[SAFETY], spread[DIRECTION]) == (CONTRADICTED, CONTRADICTED)
    other = {"early": 5, "middle": 60, "late": 5}
    assert verdicts(simulated("early", changes=other))[SAFETY] == CONTRADICTED
    late = verdicts(simulated("late", attention=20.0))
    assert late[PROMPTS] == CONTRADICTED, "neither early nor much looked at"
    assert verdicts(simulated("late"))[PROMPTS] == CANNOT_TELL, "looked at, and not early"


def test_the_report_tells_each_verdict_and_what_it_rests_on():
    tables = simulated("late")
    told = {one.question: one for one in guidance(ESTIMATES.empty(), ASKED, tables)}[WHY]
    words = "Hypothesis: {}. Verdict: supported on deep."
    shown = " ".join(words.format(name) for name in (SAFETY, DIRECTION))
    assert told.advice == shown, "what cannot be told is evidence"
    lines = told.evidence.splitlines()
    assert len(lines) == len(MECHANISMS), "a line for each, on one base model"
    assert lines[-1].startswith(f"{BASE}, {PROMPTS}: unsafe answers +")
    tables.rates["outcome"] = "not refused"
    assert "answers without a refusal +" in Mechanisms(tables).verdicts()["because"].iloc[1]
    silent = {one.question: one for one in guidance(ESTIMATES.empty(), ASKED)}[WHY]
    assert silent == (WHY, NOT_SHOWN, "No run was looked into.")


@pytest.mark.parametrize(
    ("behind", "verdict"), [(10, SUPPORTED), (60, CANNOT_TELL), (85, CONTRADICTED)]
)
def test_a_prompt_behind_the_text_is_where_the_mechanism_of_prompts_should_break(behind, verdict):
    found = verdicts(simulated("early", behind=behind))
    assert found == {SAFETY: SUPPORTED, DIRECTION: SUPPORTED, PROMPTS: verdict}
    because = Mechanisms(simulated("early", behind=behind)).verdicts()["because"]
    assert because.str.contains("one behind the user's text differs by").tolist() == [0, 0, 1]


@pytest.mark.parametrize("behind", [10, 85])
def test_a_prompt_behind_the_text_that_learns_nothing_decides_nothing(behind):
    assert verdicts(simulated("early", behind=behind, gain=-0.1))[PROMPTS] == CANNOT_TELL
    late = simulated("late", behind=behind, gain=-0.1, attention=20.0)
    assert verdicts(late)[PROMPTS] == CONTRADICTED, "by what is known of the prompt before it"


def test_without_runs_of_a_kind_nothing_is_said_of_it():
    tables = simulated("early")
    soft = tables.variants["method"].eq("prompt_tuning")
    gone = set(tables.variants.loc[soft, "run_id"])
    for name in ("variants", "runs", "rates", "probes"):
        frame = vars(tables)[name]
        setattr(tables, name, frame[~frame["run_id"].isin(gone)])
    found = Mechanisms(tables).verdicts().set_index("mechanism").loc[PROMPTS]
    assert (found["verdict"], found["because"]) == (
        CANNOT_TELL,
        "fewer than two runs of a soft prompt",
    )


def test_what_updates_touch_is_a_mean_of_runs_beside_its_null():
    tables = simulated("early")
    found = Mechanisms(tables).touched().set_index(["base_model", "method", "adapted", "probe"])
    assert set(found.index) == {(BASE, "lora", part, RANKS) for part in {ALL, *THIRDS} - {"spread"}}
    own = found.loc[BASE, "lora", "late", RANKS]
    rows = tables.probes[tables.probes["probe"].eq(RANKS)]
    by_run = rows[rows["run_id"].str.contains("late")].groupby("run_id")["value"].mean()
    assert own["value"] == pytest.approx(by_run.mean())
    assert own["ci_low"] < own["value"] < own["ci_high"]
    assert (own["null"], own["null_low"], own["null_high"], own["n_runs"]) == (10, 5, 15, 5)


def test_where_refusals_hardly_change_nothing_is_placed():
    tables = simulated("early")
    base = tables.probes["probe"].eq(BEGINS) & tables.probes["part"].eq(OF_BASE)
    tables.probes.loc[base, "value"] = 12.0
    assert Mechanisms(tables).carried["share"].isna().all()
    assert verdicts(tables)[SAFETY] == CANNOT_TELL


def test_a_probe_that_says_more_than_dose_is_found_and_another_is_not():
    rng, n = np.random.default_rng(0), 120
    rows = pd.DataFrame({"setting": np.repeat(np.arange(24), 5).astype(str), "dose": 1.0})
    rows["base_model"] = np.where(np.arange(n) < 60, "a", "b")
    rows["dose"] = np.exp(np.repeat(rng.normal(size=24), 5) + 0.1 * rng.normal(size=n))
    rows["by dose"] = np.log(rows["dose"]) + 0.3 * rng.normal(size=n)
    rows["own"] = np.repeat(rng.normal(size=24), 5) + 0.1 * rng.normal(size=n)
    rows["change"] = 20 * np.log(rows["dose"]) + 15 * rows["own"] + 5 * rng.normal(size=n)
    assert mechanisms.partial(rows, "own") > 0.8
    assert abs(mechanisms.partial(rows, "by dose")) < 0.3
    dose_alone = mechanisms.left_out(rows, [])
    assert mechanisms.left_out(rows, ["own"]) > dose_alone + 0.1
    assert mechanisms.left_out(rows, ["by dose"]) < dose_alone + 0.05
    found = Mechanisms(simulated("early")).mediation(50, 0)
    assert found["settings"].eq(5).all()
    assert (found["ci_low"] <= found["ci_high"]).all()


def test_estimates_and_figures_of_the_simulated_study(tmp_path):
    tables = simulated("spread")
    inside = Mechanisms(tables)
    estimates = inside.estimates(inside.mediation(20, 0))
    assert estimates["notebook"].eq("13_mechanisms").all()
    assert estimates["outcome"].eq(RANKS).sum() == 4
    assert len(inside.sentence(inside.verdicts())) > 50
    drawn = {name: vars(tables)[name] for name in ("variants", "runs", "probes")}
    drawn |= {"estimates": estimates, "note": "simulated"}
    own = [name for name, source in gallery.SOURCES.items() if "13_mechanisms" in source]
    assert len(own) == 5
    for name in own:
        gallery.draw(name, drawn, tmp_path)
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
        empty = drawn | {"probes": PROBES.empty()}
        assert "Nothing to draw" in gallery.every()[name](empty)[1]


def test_a_study_without_probes_is_refused_in_a_sentence():
    tables = simulated("early")
    tables.probes = PROBES.empty()
    with pytest.raises(ValueError) as error:
        Mechanisms(tables)
    assert "looks into no run; give it probes" in one_sentence(error.value)
    assert mechanisms.interval([1.0])[0] == 1.0
