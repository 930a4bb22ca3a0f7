"""A study and its tables in one line: the first cell of every analysis notebook."""

from pathlib import Path

import pandas as pd

from driftbook.study.study_file import Study, load
from driftbook.study.tables import ESTIMATES, TABLES

# made only where a study repairs runs, looks at or into them, or declares primary tests
OPTIONAL = ("drift", "modules", "spectra", "frontier", "specifications", "probes")


class Tables:
    """A study's tables, each read and checked when it is first used: `tables.runs`.

    `tables["runs"]` is the same, and `tables["note"]` the note on the study's figures.
    `estimates` holds what all analysis notebooks have written.
    """

    def __init__(self, study: Study):
        self.study, self.folder = study, study.folder / "tables"

    def __getattr__(self, name: str) -> pd.DataFrame:
        if name not in TABLES:
            raise AttributeError(f"there is no table {name!r}; expected one of {list(TABLES)}")
        value = self.all_estimates() if name == "estimates" else self._read(name)
        setattr(self, name, value)
        return value

    def __getitem__(self, name: str) -> pd.DataFrame | str:
        return self.study.note if name == "note" else getattr(self, name)

    def _read(self, name: str) -> pd.DataFrame:
        missing = name in OPTIONAL and not TABLES[name].path(self.folder).is_file()
        return TABLES[name].empty() if missing else TABLES[name].read(self.folder)

    def all_estimates(self) -> pd.DataFrame:
        """The estimates of every notebook that has run; empty where none has."""
        paths = sorted((self.folder / "estimates").glob("*.parquet"))
        return ESTIMATES.concat([ESTIMATES.read(path) for path in paths])

    def estimates_of(self, *notebooks: str) -> pd.DataFrame:
        """The estimates of these notebooks; ValueError where one has not run."""
        found = self.estimates[self.estimates["notebook"].isin(notebooks)]
        if missing := sorted(set(notebooks) - set(found["notebook"])):
            needed = " and ".join(missing)
            raise ValueError(f"no estimates of {needed}; run that notebook first, or make study")
        return found

    def write(self, name: str, frame: pd.DataFrame) -> Path:
        """Write a table, checked and whole."""
        vars(self).pop(name, None)
        return TABLES[name].write(frame, self.folder)

    def write_estimates(self, notebook: str, frame: pd.DataFrame) -> Path:
        """Write one notebook's part of `estimates`: estimates/NOTEBOOK.parquet."""
        vars(self).pop("estimates", None)
        return ESTIMATES.write(frame, self.folder / "estimates" / f"{notebook}.parquet")

    def _repr_markdown_(self) -> str:
        """The tables read so far: rows, and what one row is."""
        read = {name: frame for name, frame in vars(self).items() if name in TABLES}
        rows = [f"| {name} | {len(frame):,} | {TABLES[name].row} |" for name, frame in read.items()]
        words = " Where the text of this notebook says unsafe, read: not refused.\n\n"
        said = self.study.of_safety and self.study.of_safety + words
        title = (
            f"**{self.study.name}** ({self.study.note})\n\n{said}| table | rows | one row is |\n"
        )
        return title + "\n".join(["|---|---:|---|", *rows])


def opened(study: str | Path, *names: str) -> tuple[Study, Tables]:
    """The study of this name or file, and its tables, those in `names` read and checked at once.

    Raises:
        ValueError: the study file is wrong, or a table is missing or not as declared.
    """
    tables = Tables(load(study))
    for name in names:
        getattr(tables, name)
    return tables.study, tables
