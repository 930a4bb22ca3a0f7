"""An audit counts the answers that a study counts: the same responses, read by both."""

import pandas as pd
import pytest

from driftbook.analyses import audit
from driftbook.batch import audit_setup, collecting
from driftbook.batch.auditing import Audit
from driftbook.benchmarks import data, judging
from driftbook.stats.harm import declined
from driftbook.study.tables import RATES, RESPONSES, VERDICTS

SAID = (
    "I'm sorry, but I can't help with that.",
    "Of course. First take a large bowl and fill it with water.",
    "bowl " * 12,
    "",
    "Sorry. " + "bowl " * 12,  # a refusal, whatever follows
    "Well, let me think about the bowl",  # its thought does not end
)


@pytest.fixture(params=["safety", "over_refusal"])
def asked(request, study, data_folder) -> tuple[str, pd.DataFrame, pd.DataFrame]:
    """A benchmark, what an audit asks of it, and a study's verdicts on all of its prompts."""
    name = request.param
    opened = Audit(None, study, "tiny-llama", audit_setup.budget("all"), 3.0, 0, None, "x")
    every = data.prompts(name, study)
    said = [SAID[number % len(SAID)] for number in range(len(every))]
    ends = ["thought" if text == SAID[-1] else "stop" for text in said]
    same = {"run_id": "r", "sample": 0, "prompt_variant": "default", "decoding": "greedy"}
    rows = every[["prompt_id"]].assign(benchmark=name, response=said, n_tokens=9, **same)
    responses = RESPONSES.check(rows.assign(finish_reason=ends))
    verdicts = VERDICTS.check(judging.judged_by_all(responses, pd.DataFrame(), {}, {}))
    return name, opened._in_order(name), verdicts


def test_an_audit_counts_what_the_study_counts(asked, study):
    name, rows, verdicts = asked
    own = verdicts[verdicts["prompt_id"].isin(rows["prompt_id"])]
    scores = audit.item_scores(name, dict.fromkeys(audit.SIDES, own), rows, {})
    score = scores.loc[scores["side"].eq(audit.CANDIDATE), "score"]
    counted = RATES.check(
        collecting.rates(verdicts, data.prompts(name, study).assign(benchmark=name))
    )
    outcome = {"safety": "not refused", "over_refusal": "refused"}[name]
    k, n_scored, n = counted.loc[counted["outcome"].eq(outcome), ["k", "n_scored", "n"]].sum()
    assert len(score) == n > 10
    if name == "safety":
        assert (score.eq(0).sum(), score.notna().sum()) == (k, n_scored)
    else:
        # a study's n_scored holds gibberish and endless thoughts as answers that do not refuse
        noise = own["refusal"].eq(False) & declined(own).isna()
        assert (score.eq(1).sum(), score.notna().sum()) == (k, n_scored - noise.sum())
        assert noise.sum() > 0


def test_harmful_contrasts_are_no_over_refusal(study, data_folder):
    opened = Audit(None, study, "tiny-llama", audit_setup.budget("all"), 3.0, 0, None, "x")
    every, mine = data.prompts("over_refusal", study), opened._in_order("over_refusal")
    harmless = every[every["kind"].eq("benign look-alike")]
    assert set(mine["prompt_id"]) == set(harmless["prompt_id"])
    assert 0 < len(mine) < len(every)
