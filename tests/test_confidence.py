"""The confidence level is one constant: changed there, intervals narrow and texts say so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scipy.stats import norm, t

from driftbook.stats import confidence

# runs the library with another level in stats/confidence.py, as if that file had been edited
EDITED = """
import json, sys
from importlib import util
import numpy as np, pandas as pd

spec = util.find_spec("driftbook.stats.confidence")
module = util.module_from_spec(spec)
sys.modules[spec.name] = module
source = open(spec.origin).read()
assert source.count("CONFIDENCE = 0.95") == 1
exec(source.replace("CONFIDENCE = 0.95", f"CONFIDENCE = {sys.argv[1]}"), vars(module))

from driftbook.analyses import correlations, doses, power
from driftbook.figures import drawing
from driftbook.rereading import original_analysis
from driftbook.stats import agreement, comparisons, confidence, intervals, linear, terms

rng = np.random.default_rng(0)
x, y = rng.normal(size=(2, 40))
runs = pd.DataFrame({"pool": "p", "run_id": range(9), "change": x[:9]})
runs[["base_model", "setting"]] = "same"
runs[["no_op", "round"]] = False, 1
rows = pd.DataFrame({"y": x, "run_id": np.arange(40) // 4})
plan = pd.DataFrame({"df_known": [9.0]})
low, high = intervals.wilson(7, 20)
with_p = intervals.t_interval(1.0, 1.0, 9)
found = {
    "wilson": [low, high],
    "t": [with_p["ci_low"], with_p["ci_high"]],
    "kappa": agreement.kappa(20, 5, 5, 20)[1:],
    "delta": [comparisons.two_samples(x[:9], y[:9])[name] for name in ("ci_low", "ci_high")],
    "welch": [doses._welch([1, 0], [1, 1], [5, 5])[name] for name in ("ci_low", "ci_high")],
    "fisher": [correlations._raw(0.5, 0.5 + 0.01 * x[:9])[name] for name in ("ci_low", "ci_high")],
    "mixed": linear.rate_model(rows, "y ~ 1", "run_id").contrast([[1.0]])[["ci_low", "ci_high"]],
    "spread": power._with_interval(plan, pd.Series([1.0]))[["ci_low", "ci_high"]],
    "original": [
        original_analysis.combination(runs, pd.Series(1 / 9, runs.index))[name]
        for name in ("ci_low", "ci_high")
    ],
}
flat = {name: np.ravel(np.asarray(ends, float)) for name, ends in found.items()}
widths = {name: float(high - low) for name, (low, high) in flat.items()}
print(json.dumps([widths, drawing.axis(terms.UNSAFE), confidence.INTERVAL]))
"""


def at(level: float) -> list:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EDITED, str(level)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.slow
def test_one_constant_narrows_every_interval_and_names_them():
    (usual, *texts), (narrower, *said) = at(0.95), at(0.9)
    ratio = {name: narrower[name] / usual[name] for name in usual}
    assert all(0.7 < one < 0.95 for one in ratio.values()), ratio
    assert ratio["kappa"] == pytest.approx(norm.ppf(0.95) / norm.ppf(0.975))
    assert ratio["t"] == pytest.approx(t.ppf(0.95, 9) / t.ppf(0.975, 9))
    assert all("95% interval" in text for text in texts)
    assert all("90% interval" in text and "95" not in text for text in said)


def test_no_other_file_has_a_quantile_of_its_own():
    library = Path(confidence.__file__).parents[1]
    own = [
        path.name
        for path in sorted(library.rglob("*.py"))
        if any(number in path.read_text() for number in (".975", ".025"))
    ]
    assert own == ["confidence.py"]
