"""Records as they lie on disk: JSON lines, JSON, parquet. They are read as they are asked for, not all at once."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

KINDS = (".parquet", ".jsonl", ".json")
AT_ONCE = 16  # rows of a parquet file in memory: each may hold several images
SHARD = re.compile(r"-\d+-of-\d+.*$")  # of hub names such as test-00000-of-00003-1a2b.parquet


@dataclass(frozen=True)
class Row:
    """One record, and where it is from: `number` counts from 1 within its file."""

    file: Path
    number: int
    fields: Mapping[str, Any]

    @property
    def where(self) -> str:
        return f"record {self.number} of {self.file}"


def rows(files: Sequence[Path]) -> Iterator[Row]:
    """Records of files that `find` found, in order. Raises ValueError for a file that is not what its name says."""
    for path in files:
        for number, fields in enumerate(read(path), 1):
            if not isinstance(fields, Mapping):
                raise ValueError(f"record {number} of {path} is {type(fields).__name__}, and has no named fields")
            yield Row(path, number, fields)


def find(source: str) -> list[Path]:
    """The files of a path, a folder (one kind of file in it, of one split) or a pattern with *.

    Raises ValueError when there is none, or when a folder leaves open which.
    """
    path = Path(source)
    if path.is_dir():
        return _inside(path)
    found = [path] if path.is_file() else [Path(name) for name in sorted(glob(source, recursive=True))]
    found = [file for file in found if file.is_file()]
    if not found:
        raise ValueError(f"there is no file {source}; name a file, a folder, or files by a pattern with *, in quotes")
    if odd := [file for file in found if file.suffix not in KINDS]:
        raise ValueError(f"{odd[0]} is none of {', '.join(KINDS)}, which are what can be read")
    return found


def _inside(folder: Path) -> list[Path]:
    kinds = [found for kind in KINDS if (found := sorted(folder.glob(f"*{kind}")))]
    if not kinds:
        raise ValueError(
            f"{folder} holds no {', '.join(KINDS)}; name files in its folders by a pattern with *, in quotes"
        )
    splits = sorted({SHARD.sub("", file.name) for file in kinds[0] if SHARD.search(file.name)})
    if len(splits) > 1:
        raise ValueError(f"{folder} holds the splits {', '.join(splits)}; name one, such as '{folder}/{splits[-1]}-*'")
    return kinds[0]


def count(files: Sequence[Path]) -> int:
    """Records in the files."""
    return sum(_count(path) for path in files)


def _count(path: Path) -> int:
    if path.suffix == ".parquet":
        return _parquet(path).metadata.num_rows
    return sum(1 for _ in read(path))


def read(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        return _rows_of(_parquet(path))
    return _lines(path) if path.suffix == ".jsonl" else iter(_json(path))


def _rows_of(file: Any) -> Iterator[dict[str, Any]]:
    """Row group by row group: read on through all of them, pyarrow would hold several."""
    for group in range(file.num_row_groups):
        for batch in file.iter_batches(batch_size=AT_ONCE, row_groups=[group], use_threads=False):
            yield from batch.to_pylist()


def _lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parsed(line, f"line {number} of {path}")


def _json(path: Path) -> list[Any]:
    """A list of records, or the values of {id: record}."""
    records = _parsed(path.read_text(encoding="utf-8"), str(path))
    return list(records.values()) if isinstance(records, dict) else records


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error})") from None


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ImportError(f"reading {path} needs pyarrow: pip install 'xmodal-opd[vision]'") from None
    try:
        return ParquetFile(path, pre_buffer=False)
    except (ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet ({error})") from None
