"""The figure of notebook 14 on second tunings: what holds once, and what holds twice."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from driftbook.analyses import second_tuning
from driftbook.analyses.second_tuning import GROUP, ONCE, SWEEP, TWICE
from driftbook.figures.drawing import (
    WIDTH,
    bases,
    dots,
    drawn,
    floats,
    handle,
    intervals_of,
    name_rows,
    nothing,
    under,
    zero,
)
from driftbook.figures.repairs import NULL, OTHER, SAFE, small_legend
from driftbook.figures.ticks import few_ticks
from driftbook.stats import harm
from driftbook.stats.confidence import ALPHA, INTERVAL, PERCENT
from driftbook.stats.populations import counted
from driftbook.study.methods import MITIGATION_KINDS

WHEN = {"training": (OTHER, "defence while training"), "after": (SAFE, "repair after it")}
WHEN["test"] = (NULL, "system prompt when asked")


@drawn("14_safe_lora")
def tuned_again(tables: dict) -> tuple[Figure, str]:
    """Unsafe answers of each defence minus the plain run alike: once, and after a second tuning at
    each rate and at its worst one.
    """
    made, rows = bases(tables), tables["estimates"]
    rows = rows[rows["group"].isin([GROUP, SWEEP]) & rows["outcome"].isin(harm.OF_SAFETY)]
    rows = floats(rows[rows["base_model"].eq("all" if len(made) > 1 else made[0])])
    if rows.empty:
        return nothing("Nothing to draw: the study tunes nothing once more on every base model.")
    order, panels = list(dict.fromkeys(rows["member"])), _panels(rows)
    size = {"figsize": (WIDTH, 1.05 + 0.2 * len(order))}
    fig, axes = plt.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False, **size)
    known = second_tuning.second_tunings(tables["variants"], tables["runs"])
    when = {row.name: MITIGATION_KINDS[row.kind].when for row in _kinds(known)}
    for ax, (title, own) in zip(axes[0], panels.items(), strict=True):
        zero(ax)
        places = [order.index(name) for name in own["member"]]
        colours = [WHEN[when[name]][0] for name in own["member"]]
        dots(ax, own, places, colours, own["p_adjusted"].lt(ALPHA).tolist())
        ax.set_title(title, fontsize=7.5)
        few_ticks(ax)
    name_rows(axes[0, 0], [name.replace("_", " ") for name in order])
    axes[0, 0].tick_params(axis="y", labelsize=7)
    outcome = harm.COUNTED[harm.safety_outcome(rows)]
    under(axes[0], f"{outcome.capitalize()} minus the plain run's (points, {INTERVAL})")
    there = [one for one in WHEN if one in when.values()]
    small_legend(fig, [handle(WHEN[one][1], WHEN[one][0]) for one in there], len(there))
    return (
        fig,
        (
            f"What each defence changed in {outcome}, in the mean of"
            f" {counted(len(made), 'base model')}: after one tuning against the plain run of the"
            " same seed, and after a second, benign one against the plain run that was tuned again"
            " alike; at each of its rates, and at the worst one at which that tuning still does"
            f" its work, which was chosen on other prompts. Lines: {PERCENT} intervals. Filled: not"
            " chance after Holm's adjustment over all defences; of single rates nothing is tested."
            " A defence holds twice where more than"
            f" {second_tuning.LEFT:.0%} of its first effect is left.{intervals_of(rows)}"
        ),
    )


def _kinds(known: pd.DataFrame) -> list:
    rows = known[known["kind"].ne(second_tuning.UNDEFENDED)].drop_duplicates("name")
    return list(rows[["name", "kind"]].itertuples(index=False, name="Kind"))


def _panels(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each panel by its title: once, at each rate, and at the worst one."""
    own, sweep = rows[rows["group"].eq(GROUP)], rows[rows["group"].eq(SWEEP)]
    rates = sorted(sweep["against"].unique(), key=float)
    found = {"once": own[own["contrast"].eq(ONCE)]}
    found |= {f"twice, at {rate}": sweep[sweep["against"].eq(rate)] for rate in rates}
    return found | {"twice, worst": own[own["contrast"].eq(TWICE)]}
