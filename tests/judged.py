"""The table of verdicts that a judge gives made-up answers."""

import pandas as pd

from driftbook.benchmarks import judging
from driftbook.study.tables import RESPONSES, VERDICTS


def table_of(judge, settings, texts):
    responses = pd.DataFrame(
        {
            "prompt_id": [str(i) for i in range(len(texts))],
            "response": texts,
            "n_tokens": 3,
            "finish_reason": "stop",
        }
    ).assign(run_id="r", benchmark="safety", prompt_variant="default", decoding="greedy", sample=0)
    prompts = pd.DataFrame(
        {"benchmark": "safety", "prompt_id": responses.prompt_id, "prompt": "how ?"}
    )
    return VERDICTS.check(judging.judged(RESPONSES.check(responses), prompts, judge, settings))
