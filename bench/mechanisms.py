"""Whether probes find the layers into which alignment was put: `python -m bench mechanisms`.

The unaligned checkpoint of a deep miniature is aligned anew with other seeds, with only a third of
its layers free, or all; the probes of the base model then name a third, or none.
"""

import tempfile
from pathlib import Path

from bench.harness import row

from driftbook.analyses import mechanisms
from driftbook.batch.preparing import prepare
from driftbook.miniature.building import build_branch
from driftbook.miniature.learning import Recipe, Stage
from driftbook.models.loading import load
from driftbook.study.sources import made_folder
from driftbook.study.study_file import Study
from driftbook.study.study_file import load as study_of
from driftbook.training import probes

SEEDS, GOAL = 10, 9
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
