"""What a declared table is: columns with dtype, meaning, nullable, volatile. Writing and reading
refuse what does not fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from driftbook.study.files import remedy_of, replacing
from driftbook.study.nameless import nameless_column

DTYPES = {
    kind: pd.api.types.pandas_dtype(name)
    for kind, name in (
        ("text", "string"),
        ("real", "Float64"),
        ("whole", "Int64"),
        ("truth", "boolean"),
    )
}
FEW = 300  # rows up to which a set of keys is made sooner than pandas' table of their codes


@dataclass(frozen=True, eq=False)
class Column:
    """A column: its kind (text, real, whole, truth), what it means, whether it may be null, whether
    a re-run may change it.
    """

    kind: str
    meaning: str
    nullable: bool = False
    volatile: bool = False


@dataclass(frozen=True, eq=False)
class Table:
    """A declared table: its name, what one row is, its key and its columns."""

    name: str
    row: str
    key: tuple[str, ...]
    columns: dict[str, Column] = field(repr=False)
    private: bool = False  # holds text of prompts or responses: never published

    def check(self, frame: pd.DataFrame, where: str = "") -> pd.DataFrame:
        """The frame with the declared columns, order and dtypes.

        Raises:
            ValueError: missing or undeclared columns, undeclared nulls, values of another kind, or
                repeated keys.
        """
        where = where or f"table {self.name}"
        missing = [name for name in self.columns if name not in frame]
        extra = [name for name in frame if name not in self.columns]
        if missing or extra:
            raise ValueError(f"{where}: missing columns {missing}, undeclared columns {extra}")
        frame = frame[list(self.columns)]
        dtypes = {name: DTYPES[column.kind] for name, column in self.columns.items()}
        other = {name for name, dtype in frame.dtypes.items() if dtype != dtypes[name]}
        try:
            frame = frame.astype({name: dtypes[name] for name in other}) if other else frame
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{where}: a column holds values of another kind: {error}") from None
        full = [name for name, column in self.columns.items() if not column.nullable]
        if nulls := [name for name in full if frame[name].isna().any()]:
            raise ValueError(f"{where}: null in {nulls}, which may not be null")
        if self._repeats(frame):
            repeated = frame.loc[frame.duplicated(list(self.key)), list(self.key)]
            first = repeated.iloc[0].to_dict()
            raise ValueError(f"{where}: {len(repeated)} repeated keys, first {first}")
        return frame.reset_index(drop=True)

    def _repeats(self, frame: pd.DataFrame) -> bool:
        """Whether two rows have the same key."""
        if len(frame) > FEW:
            return bool(frame.duplicated(list(self.key)).any())
        keys = zip(*(frame[name].to_numpy(object) for name in self.key), strict=True)
        return len(set(keys)) < len(frame)

    def write(self, frame: pd.DataFrame, path: Path) -> Path:
        """Write the checked frame as parquet, whole or not at all; `path` is the file, or the
        folder that holds NAME.parquet. Texts of a table that may be published are nameless.
        """
        path = self.path(path)
        checked = self.nameless(self.check(frame, str(path)))
        table = pa.Table.from_pandas(checked, preserve_index=False)
        with replacing(path) as new:
            pq.write_table(table, new, compression="zstd")
        return path

    def nameless(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The checked frame without users' names and folders in its texts, keys apart; of a private
        table as it is.
        """
        if self.private:
            return frame
        texts = [name for name, column in self.columns.items() if column.kind == "text"]
        free = {name: nameless_column(frame[name]) for name in texts if name not in self.key}
        return frame.assign(**free)

    def read(self, path: Path) -> pd.DataFrame:
        """The table at `path` (a file or the folder that holds NAME.parquet), checked.

        Raises:
            ValueError: there is no such file, it is torn, or it does not fit the declaration.
        """
        path = self.path(path)
        if not path.is_file():
            run = f"run the notebook that writes {self.name}, or make study"
            raise ValueError(f"there is no table {path}; {run}")
        return self.check(_parquet(path, path).to_pandas(), str(path))

    def read_all(self, paths: Sequence[Path]) -> pd.DataFrame:
        """The tables of many files below each other, checked once; a torn file raises a ValueError
        that names it.
        """
        parts = [_parquet(path, path.parent) for path in paths]
        if not parts:
            return self.empty()
        whole = pa.concat_tables(parts, promote_options="permissive")
        return self.check(whole.to_pandas(), f"{self.name}, all runs")

    def path(self, path: Path) -> Path:
        """The file of this table in a folder, or the path itself if it is a file's."""
        return path if path.suffix == ".parquet" else path / f"{self.name}.parquet"

    def comparable(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The frame without its volatile columns, sorted by key: what must be equal between two
        runs.
        """
        stable = [name for name, column in self.columns.items() if not column.volatile]
        return frame[stable].sort_values(list(self.key)).reset_index(drop=True)

    def empty(self) -> pd.DataFrame:
        """A frame of no rows with the declared columns."""
        return self.check(pd.DataFrame(columns=list(self.columns)))

    def concat(self, frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
        """All frames below each other, checked; no frames give an empty table."""
        frames = [frame for frame in frames if len(frame)]
        return self.check(pd.concat(frames, ignore_index=True)) if frames else self.empty()


def _parquet(path: Path, what: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy_of(what)}") from None
