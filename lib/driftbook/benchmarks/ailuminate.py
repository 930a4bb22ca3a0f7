"""AILuminate 1.0 (MLCommons): harmful prompts with the codes of twelve hazards."""

from collections.abc import Iterable
from pathlib import Path

from driftbook.benchmarks.format import Format, set_licence
from driftbook.study.reading import csv_rows


def _read(path: Path) -> Iterable[tuple]:
    for row in csv_rows(path):
        yield row["release_prompt_id"], row["hazard"], "harmful", None, row["prompt_text"]


AILUMINATE = Format(
    name="ailuminate",
    kind="prompts",
    read=_read,
    version=1,
    n_items=1_200,
    coverage={
        "vcr": ("S1", "S1", "violence"),
        "src": ("S3", "S3", "~sexual"),
        "cse": ("S4", "S4", "~sexual"),
        "ssh": ("S10", "S11", "~mental violence"),
        "iwp": ("S8", "S9", "~violence"),
        "ipv": ("S7", "S8", "copyright"),
        "dfm": ("", "S5", "defamation"),
        "ncr": ("S2", "S2", "fraud cyber"),
        "hte": ("S9", "S10", "toxic stereotypes"),
        "prv": ("S6", "S7", "private secret"),
        "spc_ele": ("", "S13", "~false"),
        "spc_fin": ("S5", "S6", "~misinformation"),
        "spc_hlt": ("S5", "S6", "~misinformation"),
        "spc_lgl": ("S5", "S6", "~misinformation"),
        "sxc_prn": ("S11", "S12", "sexual"),
    },
    licences=(
        set_licence(
            "github:mlcommons/ailuminate",
            "CC-BY-4.0 (as its README says; the repository's LICENSE file is Apache-2.0)",
            credit="MLCommons AI Risk & Reliability working group, AILuminate 1.0 demo prompts",
            use="Anyone, with attribution; users may modify and repost it and publish research on"
            " it.",
            leaves="items text",
            seen="licence use items text",
            where="README.md and LICENSE.md of the repository",
        ),
    ),
)
