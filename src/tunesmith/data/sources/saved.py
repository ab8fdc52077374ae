"""Data sets of the `datasets` library: saved folders, and what was downloaded from the hub.

In: a source and its folder. Out: chunks of the rows of its split. Must not know: the network, what columns mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.data.sources.chunks import CHUNK_BYTES, TableChunk, table_chunk
from tunesmith.data.sources.paths import Found, locate
from tunesmith.data.sources.tables import check_columns
from tunesmith.errors import DataError
from tunesmith.recipe.models import Source

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULT_SPLIT = "train"
_NUMBER = r"-?\d{1,12}%?"
_PART = re.compile(rf"\s*(?P<split>[\w.-]+)(?:\[(?P<start>{_NUMBER})?:(?P<stop>{_NUMBER})?\])?\s*")
_TABLE_OF_SPLITS, _STATE = "dataset_dict.json", "state.json"


def is_saved(place: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    if not place.is_dir():
        return False
    whole = (place / _STATE).is_file() and (place / "dataset_info.json").is_file()
    return whole or (place / _TABLE_OF_SPLITS).is_file()


def files_of(name: str, folder: Path) -> Found:
    """The folder's files. Raises DataError where one of them, or one that it names, lies outside."""
    root = folder.resolve()
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        if not path.resolve().is_relative_to(root):
            raise DataError(f"{path.name} is a link that leads out of the folder", where=name)
    for state in (path for path in paths if path.name == _STATE):
        _check_state(state, name)
    relative = tuple(path.relative_to(folder).as_posix() for path in paths)
    base = name.rstrip("/")
    return Found(tuple((f"{base}/{item}", path) for item, path in zip(relative, paths, strict=True)), relative)


def _check_state(state: Path, name: str) -> None:
    try:
        names = [item["filename"] for item in json.loads(state.read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state.name} is damaged", where=name, remedy="Save the data set again.") from error
    outside = [item for item in names if not isinstance(item, str) or Path(item).name != item]
    if outside:
        raise DataError(f"{state.name} names a file outside its folder: {outside[0]!r}", where=name)


def read_saved(source: Source, num_rows: int) -> Iterator[TableChunk]:
    """Chunks of a saved data set's split. Raises DataError where it cannot be read or has no such split."""
    from datasets import Dataset, load_from_disk

    folder = locate(source.path)
    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # Arrow, JSON, features of another version: no common ancestor but this
        raise _unreadable(source.path, error) from error
    if isinstance(loaded, Dataset):
        own = str(loaded.split or DEFAULT_SPLIT).partition("[")[0].partition("+")[0]
        splits, wanted = {own: loaded}, source.split or own
    else:
        splits, wanted = {str(name): part for name, part in loaded.items()}, source.split or DEFAULT_SPLIT
    yield from _chunks(splits, wanted, source, num_rows)


def read_hub_folder(folder: Path, source: Source, num_rows: int) -> Iterator[TableChunk]:
    """Chunks of a split of data files that were downloaded from the hub, with the names that its card gives them."""
    from datasets import DatasetDict, load_dataset

    from tunesmith.data.sources.hub import quiet_datasets

    try:
        with quiet_datasets():
            loaded = load_dataset(str(folder), source.config)
    except Exception as error:  # readers of seven file types, a YAML card: no common ancestor but this
        raise _unreadable(source.path, error) from error
    assert isinstance(loaded, DatasetDict)
    splits = {str(name): part for name, part in loaded.items()}
    yield from _chunks(splits, source.split or DEFAULT_SPLIT, source, num_rows)


def _unreadable(name: str, error: Exception) -> DataError:
    cause = error.__cause__ or error
    lines = str(cause).splitlines() or [type(cause).__name__]
    return DataError(
        f"the data set cannot be loaded: {lines[0]}",
        where=name,
        remedy="Check `config` and the files; only data files are read, never a script.",
    )


def _chunks(splits: Mapping[str, Dataset], wanted: str, source: Source, num_rows: int) -> Iterator[TableChunk]:
    left = source.limit
    for split, start, stop in slices(wanted, {name: len(part) for name, part in splits.items()}, source.path):
        if left is not None:
            stop = min(stop, start + left)
            left -= max(0, stop - start)
        yield from _slice(splits[split], f"{source.path}:{split}", range(start, stop), num_rows)


def _slice(dataset: Dataset, name: str, rows: range, num_rows: int) -> Iterator[TableChunk]:
    """Rows of one split as they are stored: images and sounds stay bytes, nothing is decoded."""
    check_columns(dataset.column_names, name)
    tables = dataset.with_format("arrow")
    size = max(1, min(num_rows, CHUNK_BYTES * len(dataset) // max(1, dataset.data.nbytes)))
    for first in range(rows.start, rows.stop, size):
        yield table_chunk(tables[first : min(first + size, rows.stop)], name, first)


def slices(wanted: str, lengths: Mapping[str, int], where: str) -> list[tuple[str, int, int]]:
    """`train[:5000]+test[10%:]` as (split, start, stop). Raises DataError, naming the splits, where it is none.

    Bounds are as in Python: they may be negative, and past the end they mean the end. A share is rounded.
    """
    found = []
    for part in wanted.split("+"):
        match = _PART.fullmatch(part)
        if match is None:
            raise DataError(
                f"`split: {wanted}` is no split",
                where=where,
                remedy="Write `train`, `train[:5000]`, `train[10%:]` or several, joined by `+`.",
            )
        split, length = match["split"], lengths.get(match["split"])
        if length is None:
            known = ", ".join(f"{name} ({length} rows)" for name, length in lengths.items())
            raise DataError(f"there is no split `{split}`", where=where, remedy=f"Set `split` to one of: {known}.")
        start, stop, _ = slice(_bound(match["start"], length), _bound(match["stop"], length)).indices(length)
        found.append((split, start, stop))
    return found


def _bound(text: str | None, length: int) -> int | None:
    if not text:
        return None
    return round(length * int(text[:-1]) / 100) if text.endswith("%") else int(text)
