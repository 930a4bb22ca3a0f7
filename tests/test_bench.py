"""The benchmark's parts on a small piece of work: what it compares must be the same work, and its
table must say what was missed.
"""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from bench import __main__, calibration, harness, judges, real_equality, scoring, training
from bench.harness import least_seconds

from driftbook.models import scoring as scoring_models

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def items(shared):
    return harness.bbq_items(24)


def found(rows):
    return pd.DataFrame(rows, columns=harness.COLUMNS)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(
        harness,
        "SHAPES",
        {
            name: shape | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
            for name, shape in harness.SHAPES.items()
        },
    )
    for part in (scoring, training):
        monkeypatch.setattr(part, "least_seconds", once)


def once(work, *given, repeats=1):
    """harness.least_seconds of a single run: what is compared here is the work, not its time."""
    return least_seconds(work, *given, repeats=1)


def test_the_same_log_likelihoods_and_choices_as_lm_evaluation_harness(items):
    table = found(scoring.bbq_speed(items, batch_sizes=(8,)))
    differences, same = (
        table[table.figure == figure].value
        for figure in ("largest difference of a log-likelihood", "same most probable option")
    )
    assert len(differences) == len(same) == 4
    assert (differences < 1e-4).all()
    assert (same == 1).all()
    assert (table.value > 0).all()


def test_generation_in_batches_gives_the_text_of_single_prompts_for_every_method(items):
    table = found(scoring.generation(items, n=6, max_new_tokens=5, batch=3))
    assert table[table.figure == "same greedy text"].value.tolist() == [1.0] * 4


def test_adapters_come_and_go_and_the_gpu_part_runs_anywhere(items):
    assert found(scoring.many_adapters(items.head(8), n=2)).value.gt(0).all()
    assert (
        found(
            scoring.gpu(
                items,
                harness.SHAPES["vocabulary of 8,192"],
                "float32",
                n_answers=3,
                max_new_tokens=2,
            )
        )
        .value.gt(0)
        .all()
    )


def test_the_refusal_detector_is_measured_on_answers_that_it_was_not_tuned_on(shared):
    table = found(judges.refusal_accuracy())
    people = table.figure == "refusal detector against people: kappa"
    assert table[people].met.all()
    learned = table.figure.str.startswith("judge trained")
    assert not table[learned].met.all()  # else it would serve where there is no judge
    assert len(table) == 9


def test_a_missed_goal_is_said_and_the_page_is_written(tmp_path):
    rows = [
        harness.row("speed", "a", 3.0, 8.0, "CPU s", 1.0, 3.0),
        harness.row("cost", "b", 1.05, 1.1, "CPU s", 1.0, 1.05, least=False),
        harness.row("share", "c", 0.5, None, "share"),
    ]
    assert [one["met"] for one in rows] == [False, True, None]
    __main__.write(found(rows), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "bench.csv",
        "bench.md",
        "bench.png",
        "machine.json",
    }
    lines = (tmp_path / "bench.md").read_text().splitlines()
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["no", "yes", ""]


def test_without_real_data_it_says_where_to_get_it(monkeypatch, capsys):
    monkeypatch.delenv("DRIFTBOOK_SHARED", raising=False)
    assert judges.refusal_accuracy() == []
    assert "set DRIFTBOOK_SHARED" in capsys.readouterr().out


def test_training_is_the_same_work_as_trls_and_its_gpu_part_runs_anywhere(shared, monkeypatch):
    monkeypatch.setattr(training, "MOST", 500)  # tokens of an example
    shapes = {"small": harness.SHAPES["vocabulary of 8,192"] | {"vocab_size": 2_048}}
    table = found(training.speed(n=6, methods=("lora", "prompt_tuning"), shapes=shapes))
    assert len(table) == 2 * 2 * 4
    differences = table[table.figure.str.contains("largest difference")]
    assert (differences.value < training.NOISE).all(), differences
    assert table.value.gt(0).all()
    large = found(training.gpu(shapes["small"], "float32", length=128, n=4, methods=("lora",)))
    assert large.value.gt(0).all()
    assert large.met.isna().all(), "the goals are of a GPU"


@pytest.fixture
def random_model(items, monkeypatch):
    """A random Llama in place of the real weights; with its head tied it repeats what it reads."""
    tokenizer = harness.tokenizer_of(harness.texts_of(items))
    shape = harness.SHAPES["vocabulary of 8,192"] | {"vocab_size": len(tokenizer)}
    model = harness.random_llama(shape, tokenizer)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight), False)
    base = SimpleNamespace(model=model, tokenizer=tokenizer)
    monkeypatch.setattr(real_equality, "real_model", lambda: base)
    monkeypatch.setattr(real_equality, "NEW_TOKENS", 6)
    monkeypatch.setattr(real_equality, "SPREAD", 2.0)


def test_scoring_is_found_equal_to_transformers_own_for_every_method(random_model):
    table = found(real_equality.rows(4, 3, 2, 600))
    assert table.met.dropna().all()
    assert table[table.figure.str.startswith("greedy texts")].value.eq(4).all()
    exact = table[table.unit == "nats"]
    assert len(exact) == 5 * 6
    assert exact.value.gt(0).any()  # two computations, not one
    changed = table[table.figure == "answers that the adapter changes"]
    assert len(changed) == 4


def test_scoring_that_is_not_transformers_own_is_found(random_model, monkeypatch):
    right, written = scoring_models.Scorer.token_logprobs, scoring_models.Scorer.generate

    def wrong(self, pairs):
        return [values + 1e-3 for values in right(self, pairs)]

    def shorter(self, contexts, most):
        return written(self, contexts, most - 1)

    monkeypatch.setattr(scoring_models.Scorer, "token_logprobs", wrong)
    monkeypatch.setattr(scoring_models.Scorer, "generate", shorter)
    table = found(real_equality.rows(3, 2, 2, 600, ["base"]))
    assert not table.met[table.unit == "nats"].any()
    assert table[table.figure.str.startswith("greedy texts")].value.eq(0).all()


def test_a_method_without_the_base_is_not_said_to_change_nothing(random_model):
    table = found(real_equality.rows(1, 1, 1, 200, ["ia3"]))
    assert len(table) == 4 + 6


# ---- calibration
def test_simulated_verdicts_have_the_rates_that_are_said_to_be_true():
    cell = calibration.Cell(
        rate=0.3,
        seeds=((3, 2), (2, 1)),
        by_setting=(0.0, 6.0),
        shared=0.5,
        families=20,
        base_sd=0.3,
        bases=2,
    )
    rng, apart, closer = np.random.default_rng(0), [], []
    for _ in range(150):
        study = calibration.simulated(rng, cell)
        seen = study.values.mean(axis=1)
        missed = study.rates.rsub(seen, axis=0)[study.variants["method"].ne("none").to_numpy()]
        apart.append(missed.mean())
        closer.append((missed**2).mean())
    apart, closer = pd.DataFrame(apart), pd.DataFrame(closer).mean()
    assert (apart.mean().abs() < 4 * apart.sem()).all(), apart.mean()
    assert closer["these prompts"] < closer["like"]
    assert closer["these runs"] < closer["like"]
    assert study.rates["like"].nunique() > 1
    wrong = [calibration.simulated(rng, calibration.GRID["judge errs"]) for _ in range(2)]
    assert all((one.values != one.true).to_numpy().any() for one in wrong)


def test_calibration_sees_intervals_that_are_too_short_and_true_nulls_that_are_refuted(monkeypatch):
    cells = ["one setting on one base", "repairs without effect"]
    held, errors = calibration.calibration(6, names=cells)
    assert held[held["kind"].ne(calibration.NAIVE)]["covered"].mean() > 85
    assert errors["percent"].mean() < 15
    assert set(held["cell"]) == set(cells)
    again, _ = calibration.calibration(6, names=cells[1:])
    assert again.equals(held[held["cell"].eq(cells[1])].reset_index(drop=True))

    def shorter(*given, means=calibration.estimation.means, **labels):
        found = means(*given, **labels)
        ends = {
            name: found["value"] + (found[name] - found["value"]) / 5
            for name in ("ci_low", "ci_high")
        }
        return found.assign(**ends, p=found["p"] / 20)

    monkeypatch.setattr(calibration.estimation, "means", shorter)
    held, errors = calibration.calibration(6, names=cells)
    short = held[held["kind"].isin(["change", "repair minus its own parent"])]
    assert short["covered"].mean() < 70
    assert errors["percent"].mean() > 15
    with pytest.raises(ValueError, match="no cell 'elsewhere'"):
        calibration.calibration(1, names=["elsewhere"])


def test_calibration_names_its_worst_cells():
    line = {"kind": "change", "where": "all base models", "n": 40, "none": 0, "se": 1.0}
    held = pd.DataFrame(
        [
            line | {"cell": "main", "covered": 95.0},
            line | {"cell": "null", "covered": 88.0},
            line | {"cell": "one seed", "covered": 20.0},
            line | {"cell": calibration.SKEWED, "covered": 70.0},
            line | {"cell": calibration.SKEWED, "kind": calibration.NAIVE, "covered": 50.0},
        ]
    )
    errors = pd.DataFrame([{"cell": "null", "kind": "Holm", "where": "x", "n": 9, "percent": 7.0}])
    rows = calibration.summary(held, errors)
    assert [row["value"] for row in rows] == [0.7, 0.88, 0.95, 0.07]
    assert [row["met"] for row in rows] == [False, False, True, False]
    assert ": null, all base models" in rows[1]["setting"]
    assert rows[0]["peer"] == 0.5
