"""Two models compared from tables and from small logs, against scipy, statsmodels and counts by
hand.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp, ttest_rel
from statsmodels.stats.contingency_tables import mcnemar

from conftest import one_sentence
from driftbook import stats
from driftbook.stats.confidence import ALPHA

RNG = np.random.default_rng(0)
RIGHT = {side: RNG.random((3, 120)) < share for side, share in (("base", 0.7), ("candidate", 0.6))}


def table(score, **more) -> pd.DataFrame:
    """A table of one run, its items in another order than they came."""
    score = np.asarray(score)
    frame = pd.DataFrame({"item": range(len(score)), "score": score, **more})
    return frame.sample(frac=1, random_state=len(score))


def of(scores: dict, seeds: list, **more) -> pd.DataFrame:
    return pd.concat(
        [table(scores[at], seed=seed, **more) for at, seed in enumerate(seeds)], ignore_index=True
    )


def said(*arguments, **more) -> str:
    with pytest.raises(ValueError) as error:
        stats.compare(*arguments, **more)
    return one_sentence(error.value)


# ---- numbers
def assert_near_t(row: pd.Series, expected) -> None:
    """The interval is the t interval, made wider for shares by up to one item (Clopper-Pearson)."""
    ends = expected.confidence_interval()
    assert row["ci_low"] <= ends.low + 1e-9
    assert row["ci_high"] >= ends.high - 1e-9
    assert row["ci_high"] - row["ci_low"] <= ends.high - ends.low + 2 * 100 / row["n_items"]
    assert row["p"] == pytest.approx(expected.pvalue, abs=0.06)
    assert row["p"] >= expected.pvalue - 1e-9


def test_one_run_each_is_the_paired_t_test():
    base, candidate = RIGHT["base"][0].astype(float), RIGHT["candidate"][0].astype(float)
    row = stats.compare(table(base), table(candidate)).iloc[0]
    assert_near_t(row, ttest_rel(100 * candidate, 100 * base))
    assert row["base_rate"] == pytest.approx(100 * base.mean())
    assert row["candidate_rate"] == pytest.approx(100 * candidate.mean())
    assert row["difference"] == pytest.approx(row["candidate_rate"] - row["base_rate"])
    counts = pd.crosstab(base, candidate)
    assert row["p"] == pytest.approx(
        mcnemar(counts, exact=False, correction=False).pvalue, abs=0.02
    )
    assert row["population"].startswith("these runs")
    assert (row["n_items"], row["n_unpaired"], row["n_unscored"]) == (120, 0, 0)


def test_clusters_of_equal_size_are_a_t_test_on_their_means():
    base, candidate = RIGHT["base"][0].astype(float), RIGHT["candidate"][0].astype(float)
    topics = np.repeat(np.arange(24), 5)
    row = stats.compare(
        table(base, topic=topics), table(candidate, topic=topics), cluster="topic"
    ).iloc[0]
    expected = ttest_1samp(100 * (candidate - base).reshape(24, 5).mean(1), 0)
    assert_near_t(row.replace(120, 24), expected)  # the units are the topics
    assert "families of prompts" in row["population"]
    named = [table(one, cluster=topics) for one in (base, candidate)]
    assert stats.compare(*named).iloc[0]["p"] == row["p"]


def test_bounded_scores_and_further_answers_are_means_of_items():
    base, candidate = RNG.random((2, 2, 50))
    drawn = [of(side, [1, 1]).assign(sample=np.repeat([0, 1], 50)) for side in (base, candidate)]
    row = stats.compare(*drawn).iloc[0]
    assert_near_t(row, ttest_rel(100 * candidate.mean(0), 100 * base.mean(0)))
    assert row["n_candidate_runs"] == 1


def test_seeds_are_repetitions_and_one_base_run_serves_all():
    row = stats.compare(table(RIGHT["base"][0]), of(RIGHT["candidate"], [1, 2, 3])).iloc[0]
    assert row["n_candidate_runs"] == 3
    assert row["population"].startswith("seeds like these")
    assert row["difference"] == pytest.approx(
        100 * (RIGHT["candidate"].mean() - RIGHT["base"][0].mean())
    )
    alone = stats.compare(table(RIGHT["base"][0]), table(RIGHT["candidate"][0])).iloc[0]
    assert row["ci_high"] - row["ci_low"] != pytest.approx(alone["ci_high"] - alone["ci_low"])


def test_equal_seeds_are_paired_whatever_their_order():
    base = of(RIGHT["base"], ["a", "b", "c"])
    moved = [RIGHT["base"][at] ^ (np.arange(120) < 6) for at in (2, 0, 1)]  # six items flip in each
    row = stats.compare(base, of(moved, ["c", "a", "b"])).iloc[0]
    assert row["difference"] == pytest.approx(100 * (np.mean(moved) - RIGHT["base"].mean()))
    apart = stats.compare(base, of(moved, ["c", "a", "x"])).iloc[0]  # other seeds: independent runs
    assert apart["difference"] == pytest.approx(row["difference"])
    assert apart["ci_high"] - apart["ci_low"] > row["ci_high"] - row["ci_low"]
    assert apart["ci_low"] < 0 < apart["ci_high"]


def test_what_is_not_on_both_sides_is_counted():
    base = pd.DataFrame({"item": [1, 2, 3, 4, 5, 6], "score": [1, 1, 0, None, None, 1]})
    candidate = pd.DataFrame({"item": [2, 3, 4, 5, 6, 7, 8], "score": [1, 1, 1, None, 0, 1, 1]})
    row = stats.compare(base, candidate).iloc[0]
    assert row["n_items"] == 3  # 2, 3 and 6
    assert row["n_unpaired"] == 3  # 1, 7 and 8
    assert row["n_unscored"] == 2  # 4 on one side, 5 on both
    assert row["difference"] == pytest.approx(0)
    assert "3 items were asked of one side only" in row["sentence"]
    assert "2 items lack a score" in row["sentence"]


# ---- words
def counted(n: int, lost: int, gained: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two models on n items, of which the candidate loses some and gains others."""
    base = np.arange(n) >= gained
    return table(base), table(np.where(np.arange(n) < gained + lost, ~base, base))


WORDS = [
    ((2000, 20, 22), "preserves"),
    ((2000, 0, 0), "preserves"),
    ((50, 0, 0), "cannot tell"),  # nothing moved in 50 items: up to 7 % of others may
    ((2000, 200, 20), "worse"),
    ((2000, 20, 200), "better"),
    ((100, 12, 9), "cannot tell"),
    ((4000, 60, 20), "preserves"),  # a loss, and a smaller one than the margin
]


@pytest.mark.parametrize(("counts", "word"), WORDS)
def test_the_word_is_the_tests_decision(counts, word):
    base, candidate = counted(*counts)
    assert stats.compare(base, candidate).iloc[0]["word"] == word


@pytest.mark.parametrize(("counts", "word"), WORDS[3:5])
def test_the_word_turns_with_what_is_better(counts, word):
    flipped = [side.assign(score=~side["score"]) for side in counted(*counts)]
    row = stats.compare(*flipped, higher_is_better=False).iloc[0]
    assert row["word"] == word
    assert "lower is better" in row["sentence"]


def test_words_are_adjusted_over_the_tasks_of_a_call():
    close = counted(300, 27, 12)  # p between .01 and .05
    sides = [
        pd.concat([one[at].assign(task=f"t{number}") for number, one in enumerate([close] * 4)])
        for at in (0, 1)
    ]
    alone, among = stats.compare(*close).iloc[0], stats.compare(*sides)
    assert 0.01 < alone["p"] < ALPHA
    assert alone["word"] == "worse"
    assert among["word"].eq("cannot tell").all()
    assert among["p_adjusted"].to_numpy() == pytest.approx(4 * alone["p"])
    assert among["task"].tolist() == ["t0", "t1", "t2", "t3"]


def test_a_word_that_the_unscored_could_overturn_is_not_said():
    base, candidate = counted(2000, 20, 22)
    few, many = (
        candidate.assign(score=candidate["score"].astype(object).mask(candidate["item"].ge(at)))
        for at in (1995, 1900)
    )
    assert stats.compare(base, few).iloc[0]["word"] == "preserves"
    row = stats.compare(base, many).iloc[0]
    assert row["word"] == "cannot tell"
    assert "100 items lack a score, which could overturn the word" in row["sentence"]


def test_the_sentence_has_the_numbers():
    row = stats.compare(*counted(2000, 200, 20)).iloc[0]
    assert row["sentence"].startswith(
        "the table: the candidate has 90.0 %, the base 99.0 %, −9.0 points (95% interval −10.5 to"
        " −7.6) on 2,000 items of both: worse; for these runs"
    )
    assert "nothing says which is better" in row["sentence"]


# ---- logs of lm-eval
def write_log(folder: Path, scores: dict, task="toy", date="2026-01-01T00-00-00", **more) -> Path:
    """A run as lm-eval writes it: scores by (metric, filter), each a list by document."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in dict.fromkeys(filter_ for _, filter_ in scores):
        metrics = {metric: own for (metric, filter_), own in scores.items() if filter_ == name}
        for doc in range(len(next(iter(metrics.values())))):
            row = {
                "doc_id": doc,
                "doc": {"topic": f"topic {doc // 4}"},
                "target": "t",
                "arguments": {},
                "resps": [["r"]],
                "filtered_resps": ["r"],
                "filter": name,
                "metrics": list(metrics),
                "doc_hash": f"d{doc}",
                "prompt_hash": f"p{doc}",
                "target_hash": f"t{doc}",
                **{metric: own[doc] for metric, own in metrics.items()},
            }
            lines.append(json.dumps(row | more) + "\n")
    (folder / f"samples_{task}_{date}.jsonl").write_text("".join(lines))
    better = {task: {metric: True for metric, _ in scores}}
    results = {"results": {task: {}}, "configs": {}, "higher_is_better": better}
    (folder / f"results_{date}.json").write_text(json.dumps(results))
    return folder


ACC, MORE = ("acc", "none"), ("acc_norm", "none")


@pytest.fixture
def logs(tmp_path):
    """Runs of lm-eval, the base's and the candidate's, of 120 documents."""
    for side, rows in RIGHT.items():
        for number, row in enumerate(rows, 1):
            write_log(tmp_path / side / f"run{number}", {ACC: row.astype(float).tolist()})
    return tmp_path


def test_a_log_is_its_table(logs):
    base, candidate = logs / "base" / "run1", logs / "candidate" / "run1"
    expected = stats.compare(table(RIGHT["base"][0]), table(RIGHT["candidate"][0])).iloc[0]
    samples = next(base.glob("samples_*"))
    for source in (base, str(base), samples, next(base.glob("results_*"))):
        row = stats.compare(source, candidate).iloc[0]
        assert (row["task"], row["metric"]) == ("toy", "acc")
        assert [row[name] for name in ("difference", "ci_low", "p")] == pytest.approx(
            [expected[name] for name in ("difference", "ci_low", "p")]
        )
    assert "nothing says" not in row["sentence"]
    parent = logs / "one"  # lm-eval's output path has a folder for each model
    write_log(parent / "model", {ACC: RIGHT["base"][0].astype(float).tolist()})
    assert stats.compare(parent, candidate).iloc[0]["p"] == row["p"]


def test_lists_of_logs_are_seeds_and_fields_of_documents_are_clusters(logs):
    sides = [[logs / side / f"run{number}" for number in (1, 2, 3)] for side in RIGHT]
    tables = [
        of(rows, [1, 2, 3], topic=[f"topic {doc // 4}" for doc in range(120)])
        for rows in RIGHT.values()
    ]
    found, expected = (stats.compare(*both, cluster="topic") for both in (sides, tables))
    numbers = ["difference", "ci_low", "ci_high", "p", "n_base_runs", "n_candidate_runs"]
    assert found[numbers].to_numpy() == pytest.approx(expected[numbers].to_numpy().astype(float))


def test_a_filter_is_chosen_as_lm_eval_names_it(tmp_path):
    strict, loose = [1, 0, 1, 0, 1], [1, 1, 1, 0, 1]
    scores = {("exact_match", "strict-match"): strict, ("exact_match", "flexible-extract"): loose}
    base = write_log(tmp_path / "a", scores, task="gsm8k_cot")
    candidate = write_log(tmp_path / "b", scores, task="gsm8k_cot")
    both = "'exact_match,strict-match', 'exact_match,flexible-extract'"
    assert both in said(base, candidate)
    assert both in said(base, candidate, metric="exact_match")
    for metric in ("exact_match,flexible-extract", {"gsm8k_cot": "exact_match,flexible-extract"}):
        row = stats.compare(base, candidate, metric=metric).iloc[0]
        assert (row["base_rate"], row["n_items"]) == (80.0, 5)


def test_older_samples_without_filter_and_metrics_are_read(tmp_path):
    sides = []
    for number, rows in enumerate(([1.0, 0.0, 1.0], [1.0, 1.0, 1.0])):
        path = tmp_path / f"samples_toy_{number}.jsonl"
        lines = [json.dumps({"doc_id": doc, "doc": {}, "acc": x}) for doc, x in enumerate(rows)]
        path.write_text("\n".join(lines))
        sides.append(path)
    row = stats.compare(*sides).iloc[0]
    assert (row["metric"], row["candidate_rate"]) == ("acc", 100.0)


# ---- what cannot be compared
ONES = [1.0, 0.0, 1.0, 1.0]
LOGS = {
    "other": ({ACC: ONES}, {"task": "other"}),
    "several": ({ACC: ONES, MORE: ONES}, {}),
    "prompts": ({ACC: ONES}, {"prompt_hash": "chat"}),
    "documents": ({ACC: ONES}, {"doc_hash": "v2"}),
    "pairs": ({ACC: [[3.0, 2.0]] * 4}, {}),
    "graded": ({ACC: [7.0, 3.0, 1.0, 9.0]}, {}),
    "null": ({ACC: [None] * 4}, {}),
}
REFUSED = [
    ("other", {}, "the base alone has toy, the candidate alone other"),
    ("several", {"metric": "f1"}, "toy has no metric 'f1' on both sides; both have 'acc,none'"),
    ("prompts", {}, "4 of 4 items have different prompts"),
    ("documents", {}, "4 of 4 items have different documents"),
    ("pairs", {}, "a score is a list, not one number"),
    ("graded", {}, "scores lie from 1 to 9"),
    ("null", {}, "no item has a score on both sides"),
    ("several", {"metric": {"mmlu": "acc"}}, "names the task 'mmlu'"),
    (
        "several",
        {"metric": "acc", "cluster": "subject"},
        "no field 'subject'; it has \\['topic'\\]",
    ),
]


@pytest.mark.parametrize(("name", "more", "expected"), REFUSED)
def test_logs_that_do_not_fit_are_said_in_a_sentence(tmp_path, name, more, expected):
    scores, differing = LOGS[name]
    base = write_log(tmp_path / "base", {ACC: ONES})
    candidate = write_log(tmp_path / "candidate", scores, **differing)
    with pytest.raises(ValueError, match=expected) as error:
        stats.compare(base, candidate, **more)
    assert one_sentence(error.value)


def test_folders_and_files_that_are_no_log_are_said_in_a_sentence(tmp_path):
    good = write_log(tmp_path / "good", {ACC: ONES})
    assert "not there" in said(tmp_path / "nothing", good)
    (tmp_path / "empty").mkdir()
    assert "holds no log" in said(tmp_path / "empty", good)
    (tmp_path / "table.csv").write_text("item,score\n1,1\n")
    assert "as a DataFrame" in said(tmp_path / "table.csv", good)
    assert "list of logs is empty" in said([], good)
    for name in ("a", "b"):
        write_log(tmp_path / "models" / name, {ACC: ONES})
    assert "several folders (a, b)" in said(tmp_path / "models", good)
    write_log(good, {ACC: ONES}, date="2026-02-02T00-00-00")
    assert "more than one run of toy" in said(good, tmp_path / "models" / "a")
    row = stats.compare(good / "results_2026-02-02T00-00-00.json", tmp_path / "models" / "a")
    assert row["n_items"].tolist() == [4]
    (good / "samples_toy_2026-02-02T00-00-00.jsonl").unlink()
    assert "--log_samples" in said(good / "results_2026-02-02T00-00-00.json", good)
    torn = tmp_path / "samples_toy_1.jsonl"
    torn.write_text('{"doc_id": 1, "acc"')
    assert "torn" in said(torn, tmp_path / "models" / "a")
    torn.write_text('{"question": 1}')
    assert "no sample of lm-eval" in said(torn, tmp_path / "models" / "a")
    torn.write_text("")
    assert "no samples" in said(torn, tmp_path / "models" / "a")


TABLES = [
    (table(ONES), {"margin": 0}, "percentage points above 0"),
    (table(ONES).drop(columns="score"), {}, "no column 'score'"),
    (table(ONES), {"cluster": "topic"}, "no column 'topic'"),
    (table(ONES)[:0], {}, "is empty"),
    (table(ONES).assign(item=[1, 2, None, 4]), {}, "a row without an item"),
    (table(ONES).assign(item=list("abcd")), {}, "no item in common"),
    (table(["C", "I", "C", "C"]), {}, "a score is a str"),
    (pd.concat([table(ONES)] * 2), {}, "4 answers stand twice"),
    (table(ONES, cluster=[1, 1, 2, 2]), {}, None),
    (table(ONES, better="neither"), {}, "say higher_is_better"),
]


@pytest.mark.parametrize(("wrong", "more", "expected"), TABLES)
def test_tables_that_do_not_fit_are_said_in_a_sentence(wrong, more, expected):
    base = table(ONES)
    if expected is None:  # clusters may be known on one side only
        assert stats.compare(base, wrong).iloc[0]["n_items"] == 4
        other = wrong.assign(cluster=[1, 2, 3, 4])
        assert "different clusters" in said(other, wrong)
    else:
        with pytest.raises(ValueError, match=expected) as error:
            stats.compare(wrong, base, **more)
        assert one_sentence(error.value)
