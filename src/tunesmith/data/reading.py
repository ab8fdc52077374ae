"""One source after another into a stage's build, under the stage's policies for bad rows.

In: opened sources, a renderer, a build. Out: the build filled, and notes; or one DataError with up to 20 bad rows.
Must not know: the cache, training, the command line.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

from tunesmith.data.build import StageBuild
from tunesmith.data.formats import MAX_SHOWN, Feedback, FormatPlan, mixed_error, plan_format, unread_columns
from tunesmith.data.formats.detect import PAIRS
from tunesmith.data.kept import FREE_FACTOR, KEPT_BYTES, kept
from tunesmith.data.ledger import Split
from tunesmith.data.notes import histogram
from tunesmith.data.pool import in_order, num_workers
from tunesmith.data.render import Renderer
from tunesmith.data.shape import Shape, shape_of
from tunesmith.data.sources import OpenedSource, RawChunk, check_renames, empty_error, read_chunk
from tunesmith.data.types import BadRow, Row
from tunesmith.data.worker import ChunkResult, Task, process
from tunesmith.errors import DataError
from tunesmith.recipe.models import FormatName, SftStage, Source, StageBase
from tunesmith.recipe.stages import RowKind
from tunesmith.runs.disk import free_bytes

StageRecipe = StageBase
Tell = Callable[[str], None]
FITTING: dict[RowKind, tuple[RowKind, ...]] = {
    "text": ("text",),
    "answers": ("answers", "text"),
    "pairs": ("pairs", "rankings"),
    "labels": ("labels", "pairs"),
    "rankings": ("rankings", "pairs"),
}
"""What may stand in the files of a stage that trains on these rows: of several ranked answers the best and the worst
make a pair; a pair is two labeled answers, or a ranking of two."""
WORDS: dict[RowKind, str] = {
    "text": "plain text is",
    "answers": "one answer a row is",
    "pairs": "pairs of a `chosen` and a `rejected` answer are",
    "labels": "one answer with a label a row is",
    "rankings": "several ranked answers a row are",
}
REMEDIES: dict[RowKind, str] = {
    "text": "Give a file with a `text` column, or train these rows in a stage with `method: sft`.",
    "answers": "For pairs use `method: dpo`, for labels `kto`, for rankings `plackett_luce`; or, to train on the "
    "chosen answers, rename them: `columns: {answer: chosen}` with a `prompt` column.",
    "pairs": f"Formats with pairs: {', '.join(sorted(PAIRS))}, ranked. Rename with `columns`, or use `method: sft`.",
    "labels": "Give a `label` column beside one answer (true, false), or pairs; or use `method: sft`.",
    "rankings": "Give a list of answers with a list of scores (`responses`, `scores`), or pairs.",
}
NUM_ALIKE = 2  # rows with the same trouble that get a line each
TOLD_ROWS = 100_000  # rows between two lines of progress


@dataclass(slots=True)
class _SourceFigures:
    """One source as it is read."""

    num_rows: int = 0
    num_bad: int = 0
    shown: list[BadRow] = field(default_factory=list)
    kinds: Counter[FormatName | None] = field(default_factory=Counter)
    notices: Counter[str] = field(default_factory=Counter)
    keys: set[str] = field(default_factory=set)
    num_joined: int = 0
    feedback: Feedback = field(default_factory=Feedback)

    @property
    def is_mixed(self) -> bool:
        """Whether rows of several formats were met."""
        return sum(kind is not None for kind in self.kinds) > 1


@dataclass(slots=True)
class StageReader:
    """Reads the sources of a stage into a build, and gathers what a person should know.

    kept_folder: where results of chunks of large sources are left for a start that goes on after this one.
    between: called between chunks; it may raise, and what is done so far is kept.
    """

    stage: StageRecipe
    renderer: Renderer
    build: StageBuild
    workers: int = 0
    tell: Tell = lambda text: None
    kept_folder: Path | None = None
    between: Callable[[], None] = lambda: None
    notes: list[str] = field(default_factory=list)
    num_read: int = 0
    any_chat: bool = False

    def read_all(self, sources: Sequence[tuple[Split, OpenedSource]]) -> None:
        """Every source in turn; held-out ones come first, because what stands there is not trained."""
        number = 0
        told = False
        for split, opened in sources:
            if split == "train" and not told:
                self.build.heldout_is_read()
                told = True
            self._read(opened, split, number if split == "train" else 0)
            number += split == "train"
        if self.build.num_rows != self.num_read:
            raise AssertionError(f"{self.num_read} rows were read, but {self.build.num_rows} are in the ledger")

    # --- one source

    def _read(self, opened: OpenedSource, split: Split, number: int) -> None:
        source = opened.source
        chunks = opened.raw_chunks()
        first = next(chunks, None)
        if first is None:
            raise empty_error(source)
        plan = self._plan(first, source)
        check_rows(plan, source, "text" if split == "replay" else self.stage.rows)
        self.any_chat |= plan.chat
        self.notes += [f"{opened.name}: {note}" for note in opened.notes]
        self.notes.append(f"{opened.name}: format {plan.format} ({plan.reason}).")
        figures = _SourceFigures()
        tasks = self._tasks(chain([first], chunks), source, plan, split, figures)
        workers = num_workers(self.workers, opened.num_bytes)
        work = self._work(opened)
        results = in_order(work, tasks, workers=workers, where=source.path, between=self.between)
        with closing(results):  # at once, whatever is raised here: its workers end with it
            for result in results:
                self.between()
                self._take(result, plan, source, figures)
                if not figures.is_mixed:
                    self.build.add(result, source=source.path, number=number, split=split)
                    self.num_read += len(result.fates.ids)
        self._close(figures, plan, source)

    def _work(self, opened: OpenedSource) -> Callable[[Task], ChunkResult]:
        """What is done with a chunk; of a large source, its result is left on disk or found there."""
        work, folder = partial(process, renderer=self.renderer), self.kept_folder
        if folder is None or opened.num_bytes < KEPT_BYTES or free_bytes(folder) < FREE_FACTOR * opened.num_bytes:
            return work
        folder.mkdir(mode=0o700, exist_ok=True)
        return partial(kept, work=work, folder=folder, owner=os.getpid())

    def _plan(self, first: RawChunk, source: Source) -> FormatPlan:
        """How to read the source, from its first chunk."""
        rows = read_chunk(first, source)
        whole = [row for row in rows if isinstance(row, Row)]
        bad = [row for row in rows if isinstance(row, BadRow)]
        if not whole:
            raise _bad_error(bad[:MAX_SHOWN], len(bad), len(rows), source.path, "cannot be read", "Mend the file.")
        return plan_format(whole, source)

    def _tasks(
        self, chunks: Iterator[RawChunk], source: Source, plan: FormatPlan, split: Split, figures: _SourceFigures
    ) -> Iterator[Task]:
        fraction = self.stage.heldout_fraction if split == "train" else 0.0
        shape, keeps = Shape("text") if split == "replay" else shape_of(self.stage), split == "heldout"
        for chunk in chunks:
            yield Task(chunk, source, plan, fraction, keep_examples=keeps, count_only=figures.is_mixed, shape=shape)

    def _take(self, result: ChunkResult, plan: FormatPlan, source: Source, figures: _SourceFigures) -> None:
        """A chunk's figures; raises where the policy stops at malformed rows and enough of them are seen."""
        before = figures.num_rows // TOLD_ROWS
        figures.num_rows += sum(result.kinds.values()) + sum(bad.sha == "" for bad in result.bad)
        if figures.num_rows // TOLD_ROWS > before:
            self.tell(f"{source.path}: {figures.num_rows:,} rows read")
        if source.format == "auto":
            figures.kinds += result.kinds
        figures.notices += result.notices
        figures.keys |= result.keys
        figures.num_joined += result.num_joined
        figures.feedback.merge(result.feedback)
        figures.num_bad += len(result.bad)
        figures.shown += result.bad[: MAX_SHOWN - len(figures.shown)]
        if result.stops:
            raise _bad_error(
                result.stops[:MAX_SHOWN],
                len(result.stops),
                figures.num_rows,
                source.path,
                "are too long",
                "Raise `max_length`, shorten the rows, or set `too_long: drop`.",
            )
        if self.stage.on_bad_row == "stop" and len(figures.shown) >= MAX_SHOWN and not figures.is_mixed:
            self._refuse_bad(figures, plan, source)

    def _close(self, figures: _SourceFigures, plan: FormatPlan, source: Source) -> None:
        """What can be said only when all rows are seen. Raises DataError."""
        if figures.is_mixed:
            raise mixed_error(figures.kinds, source.path)
        check_renames(figures.keys, source, figures.keys)
        if figures.num_bad and self.stage.on_bad_row == "stop":
            self._refuse_bad(figures, plan, source)
        if figures.num_bad > self.stage.max_bad_rows * figures.num_rows:
            self._refuse_bad(figures, plan, source, ceiling=True)
        unread = unread_columns(figures.keys, plan.format)
        if unread:
            self.notes.append(f"{source.path}: columns not read: {', '.join(unread)}.")
        if figures.num_joined:
            self.notes.append(
                f"{source.path}: {figures.num_joined} rows: two turns of one speaker in a row became one."
            )
        self.notes += [_at(source.path, note) for note in figures.feedback.notes()]
        self.notes += [f"{source.path}: {count} rows: {text}." for text, count in sorted(figures.notices.items())]

    def _refuse_bad(self, figures: _SourceFigures, plan: FormatPlan, source: Source, *, ceiling: bool = False) -> None:
        by_template = all(not bad.field for bad in figures.shown)
        what = "cannot be rendered" if by_template else f"do not fit the format {plan.format} ({plan.reason})"
        if ceiling:
            what += f", more than `max_bad_rows: {self.stage.max_bad_rows:g}` allows"
        other = "give another `chat_template`" if by_template else "name another format with `format:`"
        drop = "" if ceiling else ", or set `on_bad_row: drop`"
        remedy = f"Mend or delete these rows, {other}{drop}."
        raise _bad_error(figures.shown, figures.num_bad, figures.num_rows, source.path, what, remedy)


def _bad_error(shown: Sequence[BadRow], num_bad: int, num_rows: int, where: str, what: str, remedy: str) -> DataError:
    lines = list(_grouped(shown))
    more = [f"  ... and {num_bad - len(shown)} more"] if num_bad > len(shown) else []
    return DataError("\n".join([f"{num_bad} of {num_rows} rows {what}:", *lines, *more]), where=where, remedy=remedy)


def _grouped(shown: Sequence[BadRow]) -> Iterator[str]:
    """A line a row; rows with one and the same trouble share a line from the third on."""
    alike: dict[tuple[str, str, str], list[BadRow]] = {}
    for bad in shown:
        alike.setdefault((bad.field, bad.found, bad.wanted), []).append(bad)
    for rows in alike.values():
        yield from (f"  {bad_line(bad)}" for bad in (rows if len(rows) <= NUM_ALIKE else rows[:1]))
        if len(rows) > NUM_ALIKE:
            yield f"    the same in {', '.join(_place(bad.id) for bad in rows[1:])}"


def _place(row_id: str) -> str:
    """`file.json[7]` as `[7]`, `file.jsonl:7` as `:7`: the file stands in the line above."""
    cut = row_id.rfind("[") if row_id.endswith("]") else row_id.rfind(":")
    return row_id[cut:] if cut > 0 else row_id


def _at(path: str, note: str) -> str:
    """A note with its source; the word that calls for attention stays in front."""
    warning = "WARNING: "
    return f"{warning}{path}: {note.removeprefix(warning)}" if note.startswith(warning) else f"{path}: {note}"


def bad_line(bad: BadRow) -> str:
    """A malformed row as one line: where, which field, found and wanted."""
    if not bad.field:
        return f"{bad.id}: {bad.found}"
    return f"{bad.id}: {bad.field}: found {bad.found}; wanted {bad.wanted}"


def check_rows(plan: FormatPlan, source: Source, wanted: RowKind) -> None:
    """Raises DataError where rows of a format are not what a method trains on."""
    held = _held(plan)
    if held in FITTING[wanted]:
        return
    raise DataError(
        f"{WORDS[wanted]} wanted here, but the file holds {WORDS[held].removesuffix(' are').removesuffix(' is')}: "
        f"it is in the format {plan.format} ({plan.reason})",
        where=source.path,
        remedy=REMEDIES[wanted],
    )


def _held(plan: FormatPlan) -> RowKind:
    """What the rows of a format hold."""
    if plan.format == "text":
        return "text"
    if plan.format == "ranked":
        return "rankings"
    if plan.format == "labeled":
        return "labels"
    return "pairs" if plan.num_answers == 2 else "answers"


def refuse_empty(build: StageBuild, stage: StageRecipe) -> None:
    """Raises DataError where a side that the recipe asks for has no row left."""
    has_replay = isinstance(stage, SftStage) and stage.replay is not None
    needed: dict[Split, bool] = {"train": True, "heldout": bool(stage.heldout), "replay": has_replay}
    for split, side in build.sides.items():
        if side.num_kept or not needed[split]:
            continue
        if not side.num_rows:
            raise DataError(
                f"no row is left for the {split} side: heldout_fraction {stage.heldout_fraction} took them all",
                where=f"stage {stage.name}",
                remedy="Lower `heldout_fraction`, or give more rows.",
            )
        why = ", ".join(f"{count} {reason}" for reason, count in side.dropped.most_common())
        lengths = f"\n{histogram(side.too_long)}" if side.too_long else ""
        longest = max(side.too_long, default=0)
        remedy = f"`max_length: {longest}` keeps the over-long ones." if longest else "Give rows that can be trained."
        raise DataError(
            f"all {side.num_rows} rows of the {split} side were dropped: {why}{lengths}",
            where=f"stage {stage.name}",
            remedy=remedy,
        )
