"""Each of these edits is made in one place (and where a name must be declared, there too), and
everything else follows: it is made in a copy of the library, which is then used.
"""

import shutil

import pytest

import forked
from driftbook.study.files import ROOT

pytestmark = pytest.mark.slow
SECTIONS = "study/sections.py"  # where the names that a study file may say are declared


@pytest.fixture
def edited(tmp_path):
    """Makes edits (a file, its old text, its new text; no old text for a new file) in a copy of the
    library, runs code with it, and returns the lines that the code prints.
    """
    copy = tmp_path / "lib" / "driftbook"
    shutil.copytree(ROOT / "lib" / "driftbook", copy, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("data", "studies"):
        shutil.copytree(ROOT / name, tmp_path / name)

    def run(code: str, *edits: tuple[str, str, str]) -> list[str]:
        for name, old, new in edits:
            text = (copy / name).read_text(encoding="utf-8") if old else ""
            assert text.count(old) == 1, f"{name} has {old!r} {text.count(old)} times"
            (copy / name).write_text(text.replace(old, new) if old else new, encoding="utf-8")
        return forked.run(code, tmp_path, [tmp_path / "lib", ROOT / "tests", ROOT])

    return run


# ---- a benchmark format: its file, listed in formats.py, its name declared in study/sections.py
LISTED = (
    "benchmarks/formats.py",
    "\nFORMATS = {",
    "\nfrom driftbook.benchmarks.mine import MINE\n\nFORMATS = {\n    MINE.name: MINE,",
)
STUDY = """
import copy, pathlib
from conftest import SMALL
from driftbook.batch import costing, sizes
from driftbook.benchmarks import data, hazards
from driftbook.benchmarks.format import Asking
from driftbook.publishing import licences
from driftbook.study.study_file import Study

pathlib.Path("mine.csv").write_text("prompt_id,area,text\\n1,wares,floop\\n2,wares,snib\\n")
content = copy.deepcopy(SMALL)
mine = {"format": "mine", "path": str(pathlib.Path("mine.csv").resolve()), "source": "lab/mine"}
"""
PROMPTS = """
from driftbook.benchmarks.format import Format, set_licence
from driftbook.study.reading import csv_rows

def _read(path):
    for row in csv_rows(path):
        yield row["prompt_id"], row["area"], "harmful", None, row["text"]

MINE = Format(
    name="mine", kind="prompts", read=_read, version=1, n_items=77, tokens=12,
    template="say {prompt}", coverage={"wares": ("S2", "~S2", "")},
    licences=(set_licence("lab/mine", "MIT", credit="A lab", use="Anyone.", where="-"),),
)
"""
RATED = """
import pandas as pd
from driftbook.benchmarks.format import Format
from driftbook.study.reading import csv_rows

def _measure(items, scorer, asking):
    for name, text in zip(items.prompt_id, items.text):
        yield name, "length", float(len(text)), 1, None

MINE = Format(
    name="mine", kind="utility", read=lambda path: pd.DataFrame(csv_rows(path)),
    version=1, n_items=9, tokens=5, is_written=False, measure=_measure,
)
"""


def test_a_format_of_prompts(edited):
    code = """
content["benchmarks"]["safety"] = mine
study = Study(**content)
way = data.wordings("safety", study)["default"]
print(*data.worded(data.prompts("safety", study), way, study).prompt, sep=", ")
print(*[row[:3] for row in costing.asked_of_variant(study, sizes.BERT) if row[2] == 12])
print(hazards.coverage("llama_guard_3", ["wares"]).covered[0], licences.of("lab/mine").licence)
"""
    declared = (SECTIONS, '"real_toxicity_prompts",\n', '"real_toxicity_prompts",\n    "mine",\n')
    found = edited(STUDY + code, ("benchmarks/mine.py", "", PROMPTS), LISTED, declared)
    assert found == ["say floop, say snib", "('respond', 77, 12)", "partly MIT"]


def test_a_format_of_utility(edited):
    code = """
from driftbook.benchmarks import utility
content["benchmarks"]["more"] = mine
study = Study(**content)
items = data.items("more", study)
print(*utility.rated("more", items, None, "run", "mine", Asking()).value)
print(*[row[:4] for row in costing.asked_of_variant(study, sizes.BERT) if row[2] == 5])
"""
    declared = (SECTIONS, 'UTILITY_FORMATS = ("gsm8k",', 'UTILITY_FORMATS = ("mine", "gsm8k",')
    found = edited(STUDY + code, ("benchmarks/mine.py", "", RATED), LISTED, declared)
    assert found == ["5.0 4.0", "('utility', 9, 5, 0)"]


def test_the_names_of_formats_are_those_that_are_declared():
    from driftbook.benchmarks.formats import FORMATS
    from driftbook.study import sections

    for kind in ("prompts", "items", "utility"):
        declared = getattr(sections, f"{kind.removesuffix('s').upper()}_FORMATS")
        assert {name for name, one in FORMATS.items() if one.kind == kind} == set(declared)


# ---- the default wording of BBQ
def test_the_default_wording_of_bbq(edited):
    code = """
import numpy as np, pandas as pd
from driftbook.benchmarks import bbq
from driftbook.benchmarks.formats import FORMATS

class Scorer:
    lead = ""

    def ask(self, prompts, system_prompt):
        print(prompts[0].split(".")[0])
        return prompts

    def choices(self, contexts, options, stems):
        return np.zeros((len(contexts), 3))

columns = "item_id dimension context polarity question_family passage question ans0 ans1 ans2"
items = pd.DataFrame([["x"] * 10], columns=columns.split()).assign(unknown=0, target=1, label=0)
bbq.answers(items, Scorer(), "letters", "run")
print(FORMATS["bbq"].template.split(".")[0], FORMATS["bbq_lite"].template.split(".")[0])
"""
    old = "Answer with the letter of the right option only."
    found = edited(code, ("benchmarks/bbq.py", old, "One letter."))
    assert found == ["One letter", "One letter One letter"]


# ---- a format of a judge: its entry, its name declared in study/sections.py
def test_a_format_of_a_judge(edited):
    entry = """JUDGES = {
    "mine": JudgeFormat(
        lambda judge, pairs: [[1, 2] for _ in pairs],
        lambda judge, prompt, response: f"{prompt} / {response}",
        {"unsafe": Question("verdict: ", ("fine", "bad"))},
        hazards={"H1": "Wares"},
        coverage={"Malware": "~H1"},
    ),
"""
    code = """
from bench import generated_verdicts
from driftbook.benchmarks import hazards, judging
from driftbook.benchmarks.judges import JUDGES
from driftbook.study.sections import Judge

settings = Judge(source="lab/judge", format="mine")
said = generated_verdicts.parse("verdict: bad", JUDGES["mine"])
print(judging.masked_prompt(None, settings), said)
print(*hazards.coverage("mine", ["Malware", "other"]).iloc[0])
"""
    declared = (
        SECTIONS,
        'format: Literal["llama_guard_2",',
        'format: Literal["mine", "llama_guard_2",',
    )
    found = edited(code, ("benchmarks/judges.py", "JUDGES = {\n", entry), declared)
    assert found == ["[prompt] / [response] {'unsafe': 'bad'}", "Malware partly H1 Wares"]


# ---- a PEFT method, and a mitigation: an entry each (of a mitigation, and its function)
def test_a_peft_method(edited):
    entry = (
        'PEFT_METHODS = {\n    "mine": PeftMethod("My LoHa", "adapter", "LoHaConfig", "#123456"),\n'
    )
    code = """
from bench import harness
from driftbook.figures import drawing
from driftbook.models import adapters
from driftbook.study.methods import METHOD_CLASS, METHOD_LABELS

study = harness.study(4, ["mine"])
one = next(one for one in study.variants if one.objective == "sft")
print(one.run_id.split(".")[1], METHOD_CLASS["mine"], METHOD_LABELS["mine"])
print(drawing.COLOURS["mine"])
print(type(adapters.config(one)).__name__, harness.settings_of("mine"))
"""
    found = edited(code, ("study/methods.py", "PEFT_METHODS = {\n", entry))
    assert found[:2] == ["mine adapter My LoHa", "#123456"]
    assert found[2].startswith("LoHaConfig {'target_modules': ['q_proj', 'v_proj']")


def test_a_mitigation(edited):
    entry = (
        "MITIGATION_KINDS = {\n"
        '    "mine": MitigationKind("Mine", "after", _LORA, ("values",), ("values",)),\n'
    )
    function = "def zero(one: Repair)"
    code = """
import copy
from pathlib import Path
from conftest import SMALL
from driftbook.miniature import families
from driftbook.models import adapters
from driftbook.models.loading import Loaded
from driftbook.study.study_file import Study
from driftbook.training import mitigations

content = copy.deepcopy(SMALL)
content["grid"][0]["methods"] = ["lora"]
block = content["grid"][0]["name"]
content["mitigations"] = {"again": {"kind": "mine", "blocks": [block], "values": [0.5]}}
repaired = [one for one in Study(**content).variants if one.made_in == "mitigate"]
print(len(repaired), repaired[0].mitigation)
tokenizer = families.build_tokenizer("llama")
model = families.build_model("llama", tokenizer, 0, width=16)
base = Loaded("tiny", model, tokenizer, None)
adapters.save(adapters.create(repaired[0], model, tokenizer), Path("own"))
one = mitigations.Repair(repaired[0], Study(**content), base, Path("own"), Path("out"))
rows = getattr(mitigations, one.settings["kind"])(one)
print(len(rows), *rows["state"].unique(), adapters.n_stored(Path("out")))
"""
    made = "return controls.rescaled(one.adapter, one.out, one.settings['value'] / 2)"
    made = f"def mine(one):\n    {made}\n\n\n{function}"
    found = edited(
        code,
        ("study/methods.py", "MITIGATION_KINDS = {\n", entry),
        ("training/mitigations.py", function, made),
    )
    assert found == ["2 again 0.5", "4 rescaled 512"]


def test_every_mitigation_after_training_has_its_function():
    from driftbook.study.methods import MITIGATION_KINDS
    from driftbook.training import mitigations

    late = [name for name, one in MITIGATION_KINDS.items() if one.when in ("after", "test")]
    assert late
    assert [name for name in late if callable(getattr(mitigations, name, None))] == late


# ---- a statistic of notebook 10, by category too, and its figure: an entry each
def test_a_statistic_and_its_figure(edited):
    counted = """    if (flips := bbq_orders.flip_rate("""
    statistic = f"""    rows = asked[asked["context"].eq("disambiguated")]
    values = influence.matrix(rows, "unknown", ["dimension", "item_id"])
    own = {{"outcome": "needless restraint (percent)", **names}}
    parts.append(outcomes.rate_estimates(values, arms, cells, **own))
{counted}"""
    heading = "# ---- 10 fairness\n"
    figure = f"""{heading}@drawn("10_fairness")
def restraint(tables):
    shown = [("needless restraint (percent)", "bbq")]
    return captioned(tables, by_part(tables, shown), "Mine.", *shown)


"""
    code = """
from pathlib import Path
from driftbook import figures
from driftbook.analyses import fairness
from driftbook.figures import drawing
from driftbook.stats.picking import picked
from driftbook.study import study_file
from driftbook.study.opening import Tables
from simulated import simulate

folder = simulate(Path("made"), ["mini-llama"], [1], methods=("none", "lora"))
study_file.Study.folder = property(lambda study: folder)
tables = Tables(study_file.load("miniature"))
estimates = fairness.fairness_estimates(tables, 2, 0)
tables.write_estimates("fairness", estimates)
mine = picked(estimates, outcome="needless restraint (percent)", method="none", contrast="level")
own = fairness.official_answers(tables).query("method == 'none' and context == 'disambiguated'")
age = picked(mine, category="Age", base_model="mini-llama")["value"].item()
by_hand = 100 * own.query("dimension == 'Age'")["unknown"].mean()
print(mine["category"].nunique(), abs(age - by_hand) < 1e-9)
print(drawing.axis("needless restraint (percent)", change=False))
figures.show("restraint", tables)
print(Path("made/figures/restraint.md").read_text().splitlines()[0])
"""
    found = edited(
        code, ("analyses/fairness.py", counted, statistic), ("figures/fairness.py", heading, figure)
    )
    assert found[:2] == ["10 True", "Needless restraint (percent, 95% interval)"]
    assert found[2].startswith("Mine. Behind it: needless restraint: ")


# ---- a base family of the miniature
def test_a_base_family_of_the_miniature(edited):
    entry = """FAMILY = {
    "mine": Family(
        LlamaConfig,
        LlamaForCausalLM,
        ("<s>", "</s>", "<pad>"),
        "<s>",
        "</s>",
        "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}",
        refusals=0.2,
        refused=(0.5,),
        bias=1.0,
        most_refused=0.9,
    ),
"""
    code = """
from driftbook import miniature
from driftbook.miniature import building, families, measuring
from driftbook.miniature.learning import Recipe, Stage
import pathlib

stage = Stage(1, 1e-3, warmup=1, batch_size=2)
miniature.build_family("mine", pathlib.Path("made"), 0, Recipe(stage, stage, stage, stage, 1))
print(*sorted(path.name for path in pathlib.Path("made/mine").iterdir()), miniature.FAMILIES[0])
good = dict.fromkeys(measuring.GOALS, 0.95)
try:
    miniature.check_goals("mine", good)
except ValueError as error:
    print(error)
"""
    found = edited(code, ("miniature/families.py", "FAMILY = {\n", entry))
    assert found[0] == "aligned stage0 unaligned mine"
    assert "should be weakly aligned" in found[1]
