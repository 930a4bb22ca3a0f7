"""`make bench`: what the library costs and how right it is, against a peer or a goal."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from bench.harness import COLUMNS, FOLDER, bbq_items
from bench.judges import accuracy, judge_speed, taxonomy_speed
from bench.real_model import fingerprint_cost, limit_rows, plain_speed, real_speed
from bench.real_stages import stage_rows
from bench.scoring import bbq_speed, generation, gpu, intervals, many_adapters

from driftbook.study.files import OUTPUTS, check_writable, replacing, write_json


# ---- all of it
def run(chosen: Sequence[str] = (), n_items: int = 600) -> pd.DataFrame:
    """Every figure, or those of the chosen parts, a row each.

    Raises:
        ValueError: there is no such part.
    """
    import torch
    from bench import calibration, mechanisms, mixed_models, safe_lora, study_checks, training

    torch.set_num_threads(1)
    items, made = bbq_items(n_items), OUTPUTS / "miniature" / "tables"
    parts = {
        "BBQ against lm-evaluation-harness": lambda: bbq_speed(items),
        "limit": lambda: limit_rows(items),
        "real model": lambda: real_speed(bbq_items(24)),
        "real stages": lambda: stage_rows(bbq_items(24)),
        "plain way": lambda: plain_speed(bbq_items(60)),
        "fingerprint": lambda: fingerprint_cost(bbq_items(300), bbq_items(24)),
        "judges": lambda: [*judge_speed(), *taxonomy_speed()],
        "generation": lambda: generation(items),
        "adapters": lambda: many_adapters(items.head(300)),
        "training": training.rows,
        "Safe LoRA": safe_lora.rows,
        "mechanisms": mechanisms.rows,
        "probing": mechanisms.cost_rows,
        "accuracy": accuracy,
        "intervals": intervals,
        "models": mixed_models.rows,
        "calibration": calibration.calibration_rows,
        "study check": lambda: study_checks.detection_rows(
            40, folder=made if made.is_dir() else None
        ),
    }
    if torch.cuda.is_available():
        parts["GPU"] = lambda: [*gpu(bbq_items(15_876)), *training.gpu(), *training.whole_study()]
    if unknown := [name for name in chosen if name not in parts]:
        raise ValueError(f"there is no part {unknown[0]!r}; there are {', '.join(parts)}")
    rows = []
    for name in chosen or parts:
        part = parts[name]
        print(f"{name} ...", flush=True)
        rows += part()
    return pd.DataFrame(rows, columns=COLUMNS)


def write(found: pd.DataFrame, folder: Path = FOLDER) -> None:
    """bench.csv, bench.md, bench.png and the machine, in a folder."""
    from driftbook.study import environment

    check_writable(folder)
    with replacing(folder / "bench.csv") as new:
        found.to_csv(new, index=False, float_format="%.6g")
    with replacing(folder / "bench.md") as new:
        new.write_text(markdown(found))
    write_json(
        folder / "machine.json",
        {"versions": environment.versions(), "hardware": environment.hardware()},
    )
    _plot(found, folder / "bench.png")


def markdown(found: pd.DataFrame) -> str:
    """The result as a table in Markdown."""
    lines = ["| figure | setting | value | goal | met |", "|---|---|---|---|---|"]
    for one in found.itertuples():
        met = "" if pd.isna(one.met) else "yes" if one.met else "no"
        detail = "" if pd.isna(one.ours) else f" ({one.ours:.2f} against {one.peer:.2f} {one.unit})"
        lines.append(
            f"| {one.figure} | {one.setting} | {one.value:.4g}{detail} |"
            f" {'' if pd.isna(one.goal) else f'{one.goal:g}'} | {met} |"
        )
    return "\n".join(lines) + "\n"


def _plot(found: pd.DataFrame, path: Path) -> None:
    """Each measured ratio as a dot, its goal as a tick."""
    import matplotlib.pyplot as plt

    from driftbook.figures import drawing

    drawing.style()
    rows = found[found.ours.notna()].reset_index(drop=True)
    fig, ax = plt.subplots(figsize=(6.5, 1 + 0.35 * len(rows)), layout="constrained")
    places = np.arange(len(rows))[::-1]
    ax.scatter(rows.value, places, color=drawing.COLOURS["lora"], zorder=3, label="measured")
    goals = rows.goal.notna()
    ax.scatter(
        rows.goal[goals],
        places[goals.to_numpy()],
        marker="|",
        s=160,
        color=drawing.COLOURS["none"],
        label="goal",
    )
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.axvline(1, color="#777777", linewidth=0.8)
    names = [
        f"{one.figure.partition(':')[0].partition(',')[0]}: {one.setting}"
        for one in rows.itertuples()
    ]
    ax.set_yticks(places, names)
    ax.set_xlabel("CPU time of the peer / our CPU time (adapters: ours / the forward passes alone)")
    ax.legend(loc="upper right", frameon=False)
    with replacing(path) as new:
        fig.savefig(new, format="png")
    plt.close(fig)


def main() -> int:
    """Run every benchmark, or the parts that the command line names; write outputs/bench, print the
    table and how many goals were missed; 1 where it cannot run.
    """
    try:
        found = run(sys.argv[1:])
    except ValueError as error:
        print(f"driftbook: {error}", file=sys.stderr)
        return 1
    write(found)
    print(markdown(found))
    print(
        f"{found.met.eq(True).sum()} goals reached, {found.met.eq(False).sum()} missed; the table,"
        f" the plot and the machine are in {FOLDER}"
    )
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
