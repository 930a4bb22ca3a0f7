"""Whether probes find the layers into which alignment was put, and what they cost beside training:
`python -m bench mechanisms probing`.

The unaligned checkpoint of a deep miniature is aligned anew with other seeds, with only a third of
its layers free, or all; the probes of the base model then name a third, or none.
"""

import tempfile
from pathlib import Path

from bench.harness import least_seconds, row

from driftbook.analyses import mechanisms
from driftbook.batch.preparing import prepare
from driftbook.miniature.building import build_branch
from driftbook.miniature.learning import Recipe, Stage
from driftbook.models import adapters
from driftbook.models.loading import load
from driftbook.study.sources import made_folder
from driftbook.study.study_file import Study
from driftbook.study.study_file import load as study_of
from driftbook.training import examples, fit, probes, stage

SEEDS, GOAL = 10, 9
MOST_COST = 0.1  # of the seconds of training
NAME, STUDY, BASE = "llama-6", "mechanisms", "deep"
PLANTED = {"early": "early", "middle": "middle", "late": "late", "all": None}
SHORT = Recipe(aligned=Stage(120, 2e-3, warmup=10))  # enough to refuse; a third less than usual


def found_third(folder: Path, study: Study) -> tuple[str | None, float]:
    """The third that the probes of a checkpoint name, and how much alignment changed its refusals
    (points).
    """
    own = study.bases[BASE].model_copy()
    source = type(own)(**own.model_dump(exclude={"source", "path"}) | {"source": str(folder)})
    planted = study.model_copy(update={"bases": {**study.bases, BASE: source}})
    base = load(source, BASE, planted)
    reference = probes.Reference(base, planted, BASE)
    variant = next(one for one in study.of_base(BASE) if one.method == "none")
    rows = probes.probed(reference, base.model, variant, None)
    begins = rows[rows["probe"].eq(mechanisms.BEGINS)].set_index("part")["value"]
    change = float(begins[mechanisms.OF_BASE] - begins[mechanisms.ALL])
    return mechanisms.named_third(mechanisms.carried(rows)), change


def rows(seeds: int = SEEDS) -> list[dict]:
    """For each planted third, and for alignment in all layers: in how many seeds the probes name
    what is true.
    """
    study, made = study_of(STUDY), []
    prepare(BASE, study)
    home = made_folder(study, "miniature").resolve()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch, NAME)
        place.mkdir()
        (place / "unaligned").symlink_to(home / NAME / "unaligned")
        for part, truth in PLANTED.items():
            right, changes = 0, []
            for seed in range(1, seeds + 1):
                build_branch(NAME, f"aligned-{part}", Path(scratch), seed, SHORT)
                named, change = found_third(place / f"aligned-{part}", study)
                right += named == truth
                changes.append(change)
                print(f"alignment in {part}, seed {seed}: named {named}, {change:+.0f} points")
            setting = f"{part}; refusals changed by {min(changes):.0f} to {max(changes):.0f} points"
            goal = GOAL * seeds / SEEDS
            made.append(row("planted alignment found, seeds", setting, right, goal, "seeds"))
    return made


def cost_rows(seeds: int = 5) -> list[dict]:
    """The CPU seconds of every probe of a base model and its runs, over those of training them: of
    the first seed of each setting, for a study of so many.
    """
    study = study_of(STUDY)
    prepare(BASE, study)
    base, first = load(study.bases[BASE], BASE, study), {}
    for one in study.of_base(BASE):
        first.setdefault((one.method, one.layers), one)
    prepared = stage.prepare_all(list(first.values()), base, study)
    probing, reference = least_seconds(probes.Reference, base, study, BASE)
    training = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for one in first.values():
            folder, n = (Path(scratch, one.run_id), seeds) if one.dataset else (None, 1)
            if folder:
                own = prepared[examples.way(one)]
                training += (
                    n * least_seconds(fit.train, one, base, own, study, folder, repeats=1)[0]
                )
            with adapters.attached(base.model, folder) as model:
                probing += n * least_seconds(probes.probed, reference, model, one, folder)[0]
    setting = f"{STUDY}, base {BASE}, {seeds} seeds"
    share = probing / training
    return [
        row(
            "probing, share of training's CPU seconds",
            setting,
            share,
            MOST_COST,
            "CPU s",
            probing,
            training,
            least=False,
        )
    ]
