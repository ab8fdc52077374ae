"""A source, found and ready to be read.

In: a source of the recipe. Out: its files, its content hash and its rows in raw chunks; or DataError.
Must not know: what the columns mean, stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from tunesmith.data.sources import hub, saved
from tunesmith.data.sources.chunks import RawChunk
from tunesmith.data.sources.documents import read_documents
from tunesmith.data.sources.hashing import content_sha, file_sha
from tunesmith.data.sources.paths import (
    DOCUMENTS,
    Found,
    NamedFile,
    find_by_pattern,
    find_file,
    find_in_folder,
    is_pattern,
    locate,
    no_such_file,
    suffix_of,
)
from tunesmith.data.sources.readers import READERS
from tunesmith.data.types import Json
from tunesmith.errors import DataError
from tunesmith.recipe.models import Source


@dataclass(frozen=True, slots=True)
class OpenedSource:
    """A source that exists. `notes` say what was passed over; `revision` is the commit of a hub data set, else "".

    `files` are empty for a hub data set: it is downloaded when its rows are first read.
    """

    source: Source
    kind: Literal["files", "saved", "hub"]
    files: tuple[NamedFile, ...]
    relative: tuple[str, ...]
    notes: tuple[str, ...] = ()
    revision: str = ""

    @property
    def name(self) -> str:
        """The path as in the recipe."""
        return self.source.path

    @property
    def num_bytes(self) -> int:
        """Size of the files on disk; 0 for a hub data set that is not downloaded yet."""
        if self.kind == "hub":
            return hub.num_bytes(self.source, self.revision)
        return sum(path.stat().st_size for _, path in self.files)

    def content_sha(self) -> str:
        """sha256 over the files' bytes, or the hub's commit, and the settings that choose rows.

        The place on disk is no part of it: a copied folder keeps its hash. A file alone may even be renamed within
        its kind; its rows' ids then name the file as it was called when they were prepared.
        """
        try:
            shas: list[Json] = [
                [relative, file_sha(path)] for relative, (_, path) in zip(self.relative, self.files, strict=True)
            ]
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}", where=self.name) from error
        source = self.source
        hub_id: Json = [source.path, source.config, self.revision] if self.kind == "hub" else None
        return content_sha({"files": shas, "hub": hub_id, "split": source.split, "limit": source.limit})

    def raw_chunks(self, num_rows: int = 1024) -> Iterator[RawChunk]:
        """The rows in order, at most `limit` of them, in chunks of at most `num_rows` and about 8 MiB.

        Raises DataError on the way for what is wrong with a whole file; a bad row is found when its chunk is parsed.
        """
        source = self.source
        if self.kind == "hub":
            folder = hub.download(source, self.revision)
            return saved.read_hub_folder(folder, source, num_rows)
        if self.kind == "saved":
            return saved.read_saved(source, num_rows)
        return self._file_chunks(num_rows)

    def _file_chunks(self, num_rows: int) -> Iterator[RawChunk]:
        left = self.source.limit
        for is_document, group in groupby(self.files, key=lambda file: suffix_of(file[1].name) in DOCUMENTS):
            for chunk in _read_group(list(group), num_rows, left, is_document=is_document):
                yield chunk
                if left is None:
                    continue
                left -= chunk.num_rows
            if left == 0:
                return


def open_source(source: Source) -> OpenedSource:
    """Finds a source. Raises DataError where nothing is there, it is no kind that can be read, or a setting is idle."""
    place = locate(source.path)
    if place is None and not is_pattern(source.path):
        if hub.is_hub_id(source.path):
            return OpenedSource(source, "hub", (), (), revision=hub.resolve_commit(source))
        raise no_such_file(source.path, hint=hub.hint(source.path))
    if place is not None and saved.is_saved(place):
        _refuse_idle(source, "config", "revision")
        files = saved.files_of(source.path, place)
        return OpenedSource(source, "saved", files.files, files.relative)
    _refuse_idle(source, "config", "revision", "split")
    found = _find(source.path, place)
    return OpenedSource(source, "files", found.files, found.relative, found.notes)


def _find(path: str, place: Path | None) -> Found:
    if place is None:
        return find_by_pattern(path)
    return find_in_folder(path, place) if place.is_dir() else find_file(path, place)


def _read_group(files: list[NamedFile], num_rows: int, limit: int | None, *, is_document: bool) -> Iterator[RawChunk]:
    if is_document:
        yield from read_documents(files, num_rows, limit)
        return
    for name, path in files:
        if limit == 0:
            return
        for chunk in READERS[suffix_of(path.name)](path, name, num_rows, limit):
            yield chunk
            if limit is not None:
                limit -= chunk.num_rows


def _refuse_idle(source: Source, *settings: str) -> None:
    """Raises DataError for a setting that a source of this kind would not read."""
    given = {"config": source.config, "revision": source.revision, "split": source.split}
    idle = [name for name in settings if given[name] is not None]
    if idle:
        instead = " To read the first rows only, set `limit`." if "split" in idle else ""
        raise DataError(
            f"`{idle[0]}` is for data sets, and this is none",
            where=source.path,
            remedy=f"Leave `{idle[0]}` out.{instead}",
        )
