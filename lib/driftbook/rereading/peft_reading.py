"""PEFT's published runs read again, whole: the runs, their curves, and every estimate."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from driftbook.rereading import peft_front, peft_models, peft_results
from driftbook.study.tables import ESTIMATES


@dataclass(frozen=True)
class PeftReading:
    """A row per run, a row per point of a curve, and what is known of where they come from."""

    runs: pd.DataFrame
    points: pd.DataFrame
    source: str

    @property
    def repeated(self) -> str:
        """A sentence: how often settings were repeated, and what follows."""
        return peft_front.repeated(self.runs)

    @property
    def figures(self) -> Path:
        return peft_results.FOLDER / "figures"

    def write(self, parts: dict[str, pd.DataFrame]) -> dict:
        """Write all parts as one table of estimates, with the other tables: what figures read."""
        estimates = ESTIMATES.concat(list(parts.values()))
        made = peft_results.declared(self.runs, self.points)
        folder = peft_results.write_peft(made, peft_results.FOLDER)
        ESTIMATES.write(estimates, folder / "estimates" / f"{peft_results.PEFT_NAME}.parquet")
        return {**made, "estimates": estimates, "note": peft_results.PEFT_NOTE}


def read_peft(folder: str = "") -> PeftReading:
    """The runs and curves of PEFT's result files: a local folder, else GitHub at a pinned commit.

    Raises:
        ValueError: the files are not there, or not those of the registry.
    """
    found = peft_results.located(folder)
    return PeftReading(*peft_results.read(found), peft_results.provenance(found))


def peft_estimates(
    reading: PeftReading, n_draws: int, seed: int, correlation: float, rerun: tuple[float, float]
) -> tuple[dict[str, pd.DataFrame], dict]:
    """All estimates by what they answer, in the notebook's order; and the fits, by name."""
    runs, rows = reading.runs, peft_models.modelled(reading.runs)
    parts, fits = {"each run": peft_results.measured(runs)}, {}
    for outcome in (peft_results.ACCURACY, peft_results.FORGETTING):
        means, alone = peft_models.means_of_methods(rows, outcome)
        settings, equal = peft_models.terms(rows, outcome)
        models = {"methods alone": alone, "at equal size, rate and class": equal}
        parts |= {f"methods: {outcome}": means, f"settings: {outcome}": settings}
        parts |= {f"spread: {outcome}": peft_models.spreads(rows, outcome, models)}
        fits |= {f"{outcome}, {name}": fit for name, fit in models.items()}
    parts["curves"], curves = peft_models.growth(reading.points, rows)
    fits |= {f"curves, {name}": fit for name, fit in curves.items()}
    parts["front"] = peft_front.on_front(runs, n_draws, seed, correlation, rerun)
    return parts, fits
