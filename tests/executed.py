"""The code of a notebook, cell by cell, in this process: no kernel and no papermill."""

from typing import Any

import nbformat
from IPython.core.interactiveshell import InteractiveShell

from driftbook.study.files import ROOT


def run_notebook(stem: str, folder, monkeypatch, **parameters: Any) -> None:
    """Run a notebook on the study in `folder`; of the parameters it takes those that it has."""
    monkeypatch.setattr("driftbook.study.study_file.Study.folder", property(lambda study: folder))
    shell = InteractiveShell()
    shell.display_pub.publish = lambda *args, **kwargs: None
    for cell in nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", 4).cells:
        if cell.cell_type == "code":
            shell.run_cell(cell.source, silent=True).raise_error()
            if "parameters" in cell.metadata.get("tags", []):
                known = shell.user_ns
                known |= {name: one for name, one in parameters.items() if name in known}
