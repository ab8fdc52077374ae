"""A cleaned copy of a source, with an account of what was changed.

In: a source, what to drop or mask, a path for the copy. Out: a JSONL file and, beside it, `<copy>.lineage.json`.
Must not know: how a kind of row is found (the audit's checks do), tokenizers, the command line.

The source itself is never written to, and neither is a file that is already there, unless it holds the same bytes.
Rows that are kept keep their fields as they were: their content hashes do not change.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.data.audit.checks import CHECKS, Check
from tunesmith.data.audit.leakage import leaks
from tunesmith.data.audit.private import mask
from tunesmith.data.audit.run import source_subject
from tunesmith.data.audit.subject import Subject
from tunesmith.data.sources import content_sha, iter_rows, open_source
from tunesmith.data.types import Json, Row
from tunesmith.errors import DataError
from tunesmith.runs.atomic import sha256_file, write_bytes
from tunesmith.version import VERSION

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from tunesmith.recipe.models import Source

DROPPABLE: Mapping[str, Check] = {
    kind: CHECKS[kind]
    for kind in (
        *("bad-rows", "duplicates", "near-duplicates", "repeated-prompts", "contradictions", "equal-pairs", "leakage"),
        *("empty", "boilerplate", "secrets", "personal-data", "placeholders", "mojibake", "toxic", "answer-language"),
    )
}
"""What can be dropped. Of duplicates, near duplicates and repeated prompts the first row is kept."""
KEEP_FIRST = ("duplicates", "near-duplicates", "repeated-prompts")
LINEAGE_SUFFIX = ".lineage.json"


@dataclass(frozen=True, slots=True)
class Change:
    """A row that is not in the copy as it was. `reason` names every kind that it was dropped for."""

    id: str
    sha: str
    action: str  # dropped | masked
    reason: str
    new_sha: str = ""


@dataclass(frozen=True, slots=True)
class FixReport:
    """What `fix_source` did."""

    source: str
    out: Path
    lineage: Path
    num_read: int
    num_written: int
    changes: tuple[Change, ...]
    counts: Mapping[str, int]  # rows by kind; a row may be of several

    @property
    def num_dropped(self) -> int:
        """Rows that are not in the copy."""
        return sum(change.action == "dropped" for change in self.changes)

    @property
    def num_masked(self) -> int:
        """Rows in which private text was replaced."""
        return sum(change.action == "masked" for change in self.changes)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        yield Text(
            f"{self.num_read:,} rows read, {self.num_dropped:,} dropped, {self.num_masked:,} masked, "
            f"{self.num_written:,} written to {self.out}"
        )
        for kind, count in self.counts.items():
            yield Text(f"  {kind}: {count:,}")
        yield Text(f"What was changed and why: {self.lineage}", style="dim")


def fix_source(
    source: Source, *, out: Path, drop: Sequence[str] = (), masked: bool = False, against: Sequence[Source] = ()
) -> FixReport:
    """Writes a copy of the source without the rows of these kinds (`DROPPABLE`), and its lineage.

    `masked`: e-mail addresses, numbers and secrets are replaced by placeholders, in every field of every row.
    `against`: the held-out or evaluation rows that `leakage` is judged by.
    Raises DataError: nothing to do, an unknown kind, rows that cannot be read and are not dropped, an output that is
    the source or that exists with other bytes, no row left.
    """
    _check_order(drop, masked, against, source)
    opened = open_source(source)
    inputs = [{"name": name, "sha256": sha256_file(path)} for name, path in opened.files]
    lineage = out.with_name(out.name + LINEAGE_SUFFIX)
    _refuse_source(out, lineage, [path for _, path in opened.files], source)
    subject, _ = source_subject([source], heldout=against)
    reasons = _reasons(subject, drop)
    lines, changes, num_read = _rewrite(source, reasons, masked)
    if not lines:
        raise DataError(f"all {num_read} rows would be dropped", where=source.path, remedy="Drop fewer kinds.")
    data = "".join(lines).encode()
    counts = Counter(kind for kinds in reasons.values() for kind in kinds)
    found = {"settings": _settings(source), "files": inputs, "num_rows": num_read}
    ordered = {kind: counts[kind] for kind in drop} | ({"masked": _count(changes, "masked")} if masked else {})
    account = {
        "tool": f"tunesmith {VERSION}",
        "input": {"path": source.path, "content_sha": opened.content_sha(), **found},
        "output": {"name": out.name, "sha256": hashlib.sha256(data).hexdigest(), "num_rows": len(lines)},
        "drop": list(drop),
        "mask": masked,
        "against": [each.path for each in against],
        "counts": ordered,
        "rows": [_change_json(change) for change in changes],
    }
    text = json.dumps(account, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    for path, content in ((out, data), (lineage, text.encode())):
        _refuse_other(path, content)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, data)
    write_bytes(lineage, text.encode())
    return FixReport(source.path, out, lineage, num_read, len(lines), tuple(changes), ordered)


def _check_order(drop: Sequence[str], masked: bool, against: Sequence[Source], source: Source) -> None:
    unknown = [kind for kind in drop if kind not in DROPPABLE]
    if unknown:
        what = f"{', '.join(map(repr, unknown))} cannot be dropped"
        raise DataError(what, where=source.path, remedy=f"What can be: {', '.join(DROPPABLE)}.")
    if not drop and not masked:
        remedy = f"Name what to drop ({', '.join(DROPPABLE)}), or mask private text."
        raise DataError("nothing to mend is named", where=source.path, remedy=remedy)
    if ("leakage" in drop) != bool(against):
        remedy = "Give the held-out or evaluation rows with --against, and drop `leakage`: each needs the other."
        raise DataError("leakage is judged against other rows", where=source.path, remedy=remedy)


def _reasons(subject: Subject, drop: Sequence[str]) -> dict[str, list[str]]:
    """The kinds for which each row is dropped, by row id.

    Repetitions come last, among what is left: else a row that goes for another reason could take its copies along.
    """
    reasons: dict[str, list[str]] = {}
    for kind in sorted(drop, key=lambda kind: (kind in KEEP_FIRST, drop.index(kind))):
        if kind in KEEP_FIRST and reasons:
            left = [example for example in subject.examples if example.id not in reasons]
            subject = replace(subject, examples=left)
        if kind == "leakage":
            places = sorted({leak.train for name in subject.sides for leak in leaks(subject, name)})
            ids = [subject.examples[place].id for place in places]
        else:
            ids = [row_id for finding in DROPPABLE[kind](subject) if finding.kind == kind for row_id in finding.ids]
        for row_id in ids:
            reasons.setdefault(row_id, []).append(kind)
    return reasons


def _rewrite(source: Source, reasons: Mapping[str, list[str]], masked: bool) -> tuple[list[str], list[Change], int]:
    """The lines of the copy, every change, and the number of rows read. The file's own column names are written."""
    lines: list[str] = []
    changes: list[Change] = []
    unreadable: list[str] = []
    num_read = 0
    for row in iter_rows(source.model_copy(update={"columns": {}})):
        num_read += 1
        if kinds := reasons.get(row.id):
            changes.append(Change(row.id, row.sha, "dropped", ", ".join(kinds)))
        elif not isinstance(row, Row):
            unreadable.append(f"{row.id}: {row.field}: found {row.found}; wanted {row.wanted}")
        else:
            fields = {key: _masked(value) for key, value in row.fields.items()} if masked else dict(row.fields)
            if fields != row.fields:
                changes.append(Change(row.id, row.sha, "masked", "private text", content_sha(fields)))
            lines.append(json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n")
    if unreadable:
        shown = "\n".join(f"  {mask(line)}" for line in unreadable[:20])
        what = f"{len(unreadable)} of {num_read} rows cannot be read, so they cannot be copied:\n{shown}"
        raise DataError(what, where=source.path, remedy="Add `--drop bad-rows`, or mend them by hand.")
    return lines, changes, num_read


def _masked(value: Json) -> Json:
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, list):
        return [_masked(item) for item in value]
    if isinstance(value, dict):
        return {key: _masked(item) for key, item in value.items()}
    return value


def _refuse_source(out: Path, lineage: Path, files: Sequence[Path], source: Source) -> None:
    """A copy is never written over what it is a copy of."""
    targets = {out.resolve(), lineage.resolve()}
    if any(path.resolve() in targets for path in files):
        raise DataError("the copy would replace its own source", where=source.path, remedy="Give another name with -o.")


def _refuse_other(path: Path, content: bytes) -> None:
    if path.is_dir() or (path.exists() and path.read_bytes() != content):
        remedy = "Give another name with -o, or remove it first."
        raise DataError("there already, with other content; nothing was written", where=str(path), remedy=remedy)


def _settings(source: Source) -> Json:
    """What decides which rows were read, where it is not the default."""
    chosen: dict[str, Json] = source.model_dump(exclude_defaults=True)
    return {key: value for key, value in chosen.items() if key != "path"}


def _change_json(change: Change) -> Json:
    value: dict[str, Json] = {"id": change.id, "sha": change.sha, "action": change.action, "reason": change.reason}
    return value | ({"new_sha": change.new_sha} if change.new_sha else {})


def _count(changes: Sequence[Change], action: str) -> int:
    return sum(change.action == action for change in changes)
