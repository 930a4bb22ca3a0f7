"""Labels drawn with known probabilities, taken blind, and what they correct: against the truth of
simulated answers, closed forms and limits.
"""

import stat

import numpy as np
import pandas as pd
import pytest

from driftbook.analyses import labelling
from driftbook.analyses.labelling import ANSWER, CORRECTED, JUDGE, LIKE, THESE
from driftbook.stats.terms import CHANGE, LEVEL
from driftbook.study.tables import LABELS


def answers(
    seed=0, n=150, runs=4, judge=(0.8, 0.9), unscored=0.03, methods=("none", "lora", "ia3")
) -> pd.DataFrame:
    """Answers of a base model and methods with their truth; the judge has this sensitivity and
    specificity, worse on lora's answers.
    """
    rng = np.random.default_rng(seed)
    prompts = pd.DataFrame(
        {"prompt_id": [f"p{i:03d}" for i in range(n)], "hard": rng.normal(0, 1, n)}
    )
    frame = pd.concat(
        [
            pd.DataFrame(
                {
                    "run_id": [f"{method}-{i}" for i in range(1 if method == "none" else runs)],
                    "method": method,
                }
            )
            for method in methods
        ]
    )
    frame = frame.merge(prompts, how="cross").assign(benchmark="safety", base_model="b")
    logit = frame["hard"] - 1 + frame["method"].map({"none": -0.5, "lora": 1.0, "ia3": 0.0})
    frame["true"] = rng.random(len(frame)) < 1 / (1 + np.exp(-logit))
    sensitivity = judge[0] - 0.2 * frame["method"].eq("lora")
    unsafe = np.where(
        frame["true"], rng.random(len(frame)) < sensitivity, rng.random(len(frame)) > judge[1]
    )
    p = (
        np.where(unsafe, 0.7, 0.3)
        + rng.uniform(-0.2, 0.2, len(frame))
        + 0.1 * (frame["true"].to_numpy() - 0.5)
    )
    null = rng.random(len(frame)) < unscored
    return frame.assign(
        unsafe=pd.Series(unsafe, index=frame.index).astype("boolean").mask(null),
        p_unsafe=np.where(null, np.nan, p),
    ).reset_index(drop=True)


def labels_of(frame: pd.DataFrame, drawn: pd.DataFrame) -> pd.DataFrame:
    known = frame.assign(label=np.where(frame["true"], "unsafe", "safe"))
    return drawn[ANSWER].merge(known[[*ANSWER, "label"]], on=ANSWER)


def row(
    found: pd.DataFrame, method: str, contrast: str, estimator: str, population: str = LIKE
) -> pd.Series:
    return found[
        found["method"].eq(method)
        & found["contrast"].eq(contrast)
        & found["estimator"].eq(estimator)
        & found["population"].eq(population)
    ].iloc[0]


# ---- the sample
def test_the_sample_is_the_same_again_and_a_larger_one_keeps_it():
    frame = answers()
    small, again, large = (
        labelling.draw(frame.sample(frac=1, random_state=i), n, 1)
        for i, n in enumerate((90, 90, 240))
    )
    assert set(map(tuple, small[ANSWER].to_numpy())) == set(map(tuple, again[ANSWER].to_numpy()))
    assert set(map(tuple, small[ANSWER].to_numpy())) < set(map(tuple, large[ANSWER].to_numpy()))
    assert set(map(tuple, small[ANSWER].to_numpy())) != set(
        map(tuple, labelling.draw(frame, 90, 2)[ANSWER].to_numpy())
    )


def test_probabilities_are_known_and_weigh_the_sample_to_all_answers():
    frame = answers()
    drawn = labelling.draw(frame, 200, 0)
    assert drawn["sampling_probability"].between(0, 1, inclusive="right").all()
    assert (1 / drawn["sampling_probability"]).sum() == pytest.approx(len(frame))
    assert drawn.groupby("stratum").size().min() >= labelling.LEAST
    assert abs(len(drawn) - 200) < 20


@pytest.mark.slow
def test_every_answer_is_drawn_as_often_as_its_probability_says():
    frame = answers(n=40, runs=2)
    times = (
        pd.concat([labelling.draw(frame, 60, seed) for seed in range(150)])
        .groupby(ANSWER)["sampling_probability"]
        .agg(["size", "first"])
    )
    z = (times["size"] - 150 * times["first"]) / np.sqrt(
        150 * times["first"] * (1 - times["first"]) + 1e-9
    )
    assert z[times["first"] < 1].std() == pytest.approx(1, abs=0.2)
    assert len(times) == len(frame)


def test_what_cannot_be_drawn_says_why():
    frame = answers()
    with pytest.raises(ValueError, match="n=5 labels for 9 strata; at least 27"):
        labelling.draw(frame, 5, 0)
    with pytest.raises(ValueError, match="answers stand twice"):
        labelling.draw(pd.concat([frame, frame.head(3)]), 100, 0)


# ---- the sheet
@pytest.fixture
def sheet(tmp_path):
    frame = answers(n=20, runs=2, methods=("none", "lora"))
    drawn = labelling.draw(frame, 24, 0)
    texts = frame[ANSWER].assign(
        prompt="what is <b>blorp</b>?", response=[f"=answer {i}" for i in range(len(frame))]
    )
    return labelling.write_sheet(drawn, texts, tmp_path / "labels", 0), drawn


def filled(path, name="anna.csv", words=("safe", "unsafe"), **changes):
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    frame["label"] = [words[i % len(words)] for i in range(len(frame))]
    frame.assign(**changes).to_csv(path.parent / name, index=False)
    return frame


def test_the_sheet_is_blind_private_and_no_formula(sheet):
    path, drawn = sheet
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert list(frame) == ["label_id", "prompt", "response", "label"]
    text = path.read_text()
    assert not any(word in text for word in ("lora", "none-0", "safety", "p00"))
    assert frame["response"].str.startswith("'=").all()
    assert frame["label_id"].is_monotonic_increasing
    assert len(frame) == len(drawn)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_filled_sheets_come_back_as_labels_of_the_answers(sheet):
    path, drawn = sheet
    assert labelling.taken(path.parent).empty
    frame = filled(path, words=(" Safe", "unsafe", "unclear", ""))
    filled(path, "ben.csv")
    found = labelling.taken(path.parent)
    assert list(found) == list(LABELS.columns)
    assert found.groupby("rater").size().to_dict() == {
        "anna": frame["label"].ne("").sum(),
        "ben": len(drawn),
    }
    both = found[found["rater"].eq("ben")].merge(drawn, on=ANSWER, suffixes=("", "_drawn"))
    assert np.allclose(
        both["sampling_probability"].astype(float), both["sampling_probability_drawn"]
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label": "maybe"}, ["anna.csv", "none of unsafe, safe, unclear", "maybe"]),
        ({"label_id": "0"}, ["ids are not in key.csv"]),
    ],
)
def test_a_sheet_that_is_wrong_is_refused_in_a_sentence(sheet, changes, words):
    filled(sheet[0], **changes)
    with pytest.raises(ValueError) as error:
        labelling.taken(sheet[0].parent)
    assert all(word in str(error.value) for word in words)


def test_other_wrong_sheets(sheet):
    path, _ = sheet
    frame = filled(path)
    pd.concat([frame, frame.head(2)]).to_csv(path.parent / "anna.csv", index=False)
    with pytest.raises(ValueError, match="2 ids stand twice"):
        labelling.taken(path.parent)
    frame.drop(columns="label").to_csv(path.parent / "anna.csv", index=False)
    with pytest.raises(ValueError, match="no column 'label'"):
        labelling.taken(path.parent)
    (path.parent / labelling.KEY).unlink()
    with pytest.raises(ValueError, match=r"no key\.csv"):
        labelling.taken(path.parent)


def test_purged_answers_cannot_be_drawn(tmp_path):
    frame = answers(n=20, runs=1)
    with pytest.raises(ValueError, match="purged"):
        labelling.write_sheet(
            labelling.draw(frame, 30, 0),
            frame[ANSWER].assign(prompt="", response="").head(0),
            tmp_path,
            0,
        )


def test_labels_are_written_one_by_one_and_go_on_where_they_stopped(sheet):
    path, drawn = sheet
    pages, given = [], iter(["unsafe", "what", "safe", ""])
    left = labelling.ask(path.parent, "carla", pages.append, lambda _: next(given))
    assert left == len(drawn) - 2
    assert "&lt;b&gt;blorp" in pages[0]
    assert "<b>blorp" not in pages[0]
    assert any("none of the words" in page for page in pages)
    given = iter(["unclear", ""])
    assert (
        labelling.ask(path.parent, "carla", pages.append, lambda _: next(given)) == len(drawn) - 3
    )
    assert sorted(labelling.taken(path.parent)["label"]) == ["safe", "unclear", "unsafe"]


# ---- the correction
@pytest.mark.slow
def test_corrected_rates_cover_the_truth_where_the_judges_do_not():
    inside = {JUDGE: [], CORRECTED: []}
    for seed in range(40):
        frame = answers(seed, n=120, runs=3)
        drawn = labelling.draw(frame, 240, seed)
        found = labelling.corrected(frame, labels_of(frame, drawn), drawn)
        true = {method: 100 * part["true"].mean() for method, part in frame.groupby("method")}
        for estimator, population in ((JUDGE, LIKE), (CORRECTED, THESE)):
            one = row(found, "lora", CHANGE, estimator, population)
            inside[estimator].append(
                abs(one["value"] - (true["lora"] - true["none"])) < 2.0 * one["se"]
            )
    assert 0.9 <= np.mean(inside[CORRECTED]) <= 0.995
    assert np.mean(inside[JUDGE]) < 0.6


@pytest.mark.slow
def test_the_correction_is_unbiased_and_shorter_than_labels_alone():
    errors, ours, alone = [], [], []
    for seed in range(30):
        frame = answers(seed, unscored=0.0)
        drawn = labelling.draw(frame, 240, seed)
        one = row(
            labelling.corrected(frame, labels_of(frame, drawn), drawn),
            "lora",
            LEVEL,
            CORRECTED,
            THESE,
        )
        lora = frame["method"].eq("lora")
        errors.append(one["value"] - 100 * frame.loc[lora, "true"].mean())
        ours.append(one["se"])
        alone.append(100 * np.sqrt(0.25 / one["n_labelled"]))
    assert abs(np.mean(errors)) < 3 * np.std(errors) / np.sqrt(len(errors))
    assert np.std(errors) == pytest.approx(np.mean(ours), rel=0.3)
    assert np.mean(ours) < np.mean(alone)


def test_where_all_are_labelled_the_rate_is_the_truth_and_certain():
    frame = answers(n=30, runs=1)
    drawn = labelling.draw(frame, 10_000, 0)
    found = labelling.corrected(frame, labels_of(frame, drawn), drawn)
    for method, part in frame.groupby("method"):
        one = row(found, method, LEVEL, CORRECTED, THESE)
        assert one["value"] == pytest.approx(100 * part["true"].mean())
        assert one["se"] == pytest.approx(0, abs=1e-9)


def test_a_judge_that_is_right_loses_nothing_but_what_labels_cannot_rule_out():
    frame = answers(judge=(1.2, 1.0), unscored=0.0)
    frame["p_unsafe"] = frame["true"].astype(float)
    frame["unsafe"] = frame["true"].astype("boolean")
    drawn = labelling.draw(frame, 120, 0)
    one = row(
        labelling.corrected(frame, labels_of(frame, drawn), drawn), "ia3", LEVEL, CORRECTED, THESE
    )
    assert one["value"] == pytest.approx(100 * frame.loc[frame["method"].eq("ia3"), "true"].mean())
    by_labels = labelling.corrected(frame.assign(p_unsafe=0.5), labels_of(frame, drawn), drawn)
    # labels that all agree with the judge do not show that all others do
    alone = row(by_labels, "ia3", LEVEL, CORRECTED, THESE)
    for end in ("below", "above"):
        assert 0 < one[end] <= alone[end] + 1e-9
    assert one["se"] <= row(by_labels, "ia3", LEVEL, CORRECTED, THESE)["se"] + 1e-9


def test_the_estimator_is_the_papers_formula():
    """One stratum of the judge's word, so that it is PPI++ as printed: theta = l mean(f) + mean(y -
    l f), l = cov(y, f) / var(f) for a finite population.
    """
    rng = np.random.default_rng(5)
    frame = answers(seed=3, methods=("none",), runs=1, n=400, unscored=0.0).assign(
        unsafe=pd.array([False] * 400, dtype="boolean")
    )
    frame["p_unsafe"] = np.clip(0.3 * frame["true"] + rng.uniform(0, 0.2, 400), 0, 0.5)
    drawn = labelling.draw(frame, 100, 0)
    one = row(
        labelling.corrected(frame, labels_of(frame, drawn), drawn), "none", LEVEL, CORRECTED, THESE
    )
    own = drawn.merge(frame, on=ANSWER)
    y, f, every = (
        own["true"].to_numpy(float),
        own["p_unsafe"].to_numpy(),
        frame["p_unsafe"].to_numpy(),
    )
    tuned = min(max(np.cov(y, f)[0, 1] / f.var(ddof=1), 0), 1)
    assert one["lambda_"] == pytest.approx(tuned)
    assert one["value"] == pytest.approx(100 * (tuned * every.mean() + (y - tuned * f).mean()))
    assert one["se"] == pytest.approx(
        100 * np.sqrt((y - tuned * f).var(ddof=1) / len(y) * (1 - len(y) / 400))
    )


@pytest.mark.parametrize(
    ("size", "wrong"),
    [((840, 150), (0.02, 0.15)), ((900, 90), (0.05, 0.05)), ((940, 50), (0.005, 0.05))],
)
def test_the_ends_hold_where_few_labels_or_none_contradict_the_judge(size, wrong):
    """30 labels in each stratum: with a floor under the variance .87 to 1.0 were covered."""
    rng, n, held, size = np.random.default_rng(2), 30, [], np.array(size)
    word, every = np.repeat([0, 1], n), size.sum()
    for _ in range(600):
        unsafe = [rng.binomial(size[0], wrong[0]), size[1] - rng.binomial(size[1], wrong[1])]
        seen = [rng.hypergeometric(k, of - k, n) for k, of in zip(unsafe, size, strict=True)]
        y = np.concatenate([np.arange(n) < k for k in seen]).astype(float)
        spread = labelling._spread(y, np.zeros(2 * n), word, np.ones(2 * n, bool))
        amount = np.append(size / every * np.sqrt(1 - n / size), 0.0)
        below, above = labelling._ends(y, word, np.ones(2 * n, bool), amount, spread, 0.0)
        error = (size / every) @ (np.array(seen) / n) - sum(unsafe) / every
        held.append(-above <= error <= below)
    assert 0.915 < np.mean(held) < 0.985


def test_unclear_labels_and_strata_without_labels_are_counted():
    frame = answers()
    drawn = labelling.draw(frame, 120, 0)
    labels = labels_of(frame, drawn)
    labels.loc[labels["run_id"].str.startswith("lora"), "label"] = "unclear"
    found = labelling.corrected(frame, labels, drawn)
    one = row(found, "lora", LEVEL, CORRECTED)
    assert pd.isna(one["value"])
    assert "fewer than two labels" in one["how"]
    assert one["n_unclear"] > 0
    assert np.isfinite(row(found, "ia3", LEVEL, CORRECTED)["value"])
    table = labelling.estimates(
        found,
        labelling.error_rates(frame, labels, drawn),
        study="s",
        notebook="n",
        benchmark="safety",
        judge="j",
    )
    assert table["value"].isna().sum() > 0
    assert "not estimable" not in labelling.labels_sentence(
        table, labelling.error_rates(frame, labels, drawn)
    )


def test_rogan_and_gladens_formula():
    errors = pd.Series(
        {"sensitivity": 0.9, "specificity": 0.8, "sensitivity_n": 100, "specificity_n": 100}
    )
    one = labelling.rogan_gladen(30.0, 2.0, errors)
    assert one["value"] == pytest.approx(100 * 0.1 / 0.7)  # (.3 + .8 - 1) / (.9 + .8 - 1)
    p = 0.1 / 0.7
    assert one["se"] == pytest.approx(
        100 * np.sqrt(0.02**2 + p**2 * 0.09 / 100 + (1 - p) ** 2 * 0.16 / 100) / 0.7
    )
    assert labelling.rogan_gladen(30.0, 2.0, errors.replace({0.9: 0.2}))["value"] is None
    low = labelling.rogan_gladen(10.0, 2.0, errors)
    assert low["value"] < 0
    assert "outside" in low["how"]


def test_bounds_have_all_prompts_as_denominator():
    found = labelling.bounds(answers(unscored=0.1)).loc[("b", "lora")]
    part = answers(unscored=0.1).query("method == 'lora'")
    assert (
        found["high"] - found["low"]
        == pytest.approx(100 * part["unsafe"].isna().mean())
        == pytest.approx(found["unscored"])
    )


def test_a_judge_without_a_verdict_has_no_rate():
    frame = answers().assign(
        unsafe=pd.array([pd.NA] * len(answers()), dtype="boolean"), p_unsafe=np.nan
    )
    drawn = labelling.draw(frame, 120, 0)
    found = labelling.corrected(frame, labels_of(frame, drawn), drawn)
    assert np.isnan(row(found, "lora", LEVEL, JUDGE)["value"])
    assert np.isfinite(row(found, "lora", LEVEL, CORRECTED)["value"])  # labels alone
