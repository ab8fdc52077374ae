"""What differs between two versions of some rows, or between the rows of two runs.

In: two sources, or two ledgers. Out: rows added, removed, changed and moved, with counts and a few examples.
Must not know: tokenizers, training, the command line.

Rows are known by the hash of their content, so their order does not matter. A removed and an added row are one changed
row where they share an `id` column, else a prompt, else (in files of equally many rows) a place.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from tunesmith.data.audit.subject import excerpt, plural
from tunesmith.data.formats import to_examples
from tunesmith.data.sources import read_rows
from tunesmith.data.split import prompt_sha
from tunesmith.data.types import Json, Row
from tunesmith.errors import DataError
from tunesmith.recipe.models import Source

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

MAX_SHOWN = 20
ID_KEYS = ("id", "row_id", "uid", "uuid", "_id")
COLUMNS = ("id", "sha", "stage", "split", "outcome", "reason")


@dataclass(frozen=True, slots=True)
class Difference:
    """One row that differs: where it stands in each version ("" for nowhere), and what changed, private text masked."""

    before: str
    after: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Differences of one kind: how many, and the first of them."""

    name: str
    num_rows: int
    shown: tuple[Difference, ...]


@dataclass(frozen=True, slots=True)
class DataDiff:
    """Two versions compared. `groups` are added, removed, changed, moved, and between runs what became of a row."""

    before: str
    after: str
    num_before: int
    num_after: int
    num_same: int
    groups: tuple[Group, ...]

    def count(self, name: str) -> int:
        """Rows of one group."""
        return next((group.num_rows for group in self.groups if group.name == name), 0)

    @property
    def is_equal(self) -> bool:
        """Whether the same rows stand in the same order (and, of runs, had the same fate)."""
        return not any(group.num_rows for group in self.groups)

    def to_json(self) -> dict[str, Json]:
        """The comparison as plain values."""
        groups: dict[str, Json] = {}
        for group in self.groups:
            shown: list[Json] = [{"before": row.before, "after": row.after, "note": row.note} for row in group.shown]
            groups[group.name] = {"num_rows": group.num_rows, "shown": shown}
        return {
            "before": {"name": self.before, "num_rows": self.num_before},
            "after": {"name": self.after, "num_rows": self.num_after},
            "num_same": self.num_same,
            "groups": groups,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        yield Text(f"before: {self.before}, {plural(self.num_before, 'row')}")
        yield Text(f"after:  {self.after}, {plural(self.num_after, 'row')}")
        counts = ", ".join(f"{group.num_rows:,} {group.name}" for group in self.groups)
        yield Text(f"{self.num_same:,} the same; {counts}" if not self.is_equal else "The rows are the same.")
        styles = {"added": "green", "removed": "red"}
        for group in self.groups:
            if group.num_rows:
                yield Text(f"\n{group.name}", style=f"bold {styles.get(group.name, 'yellow')}")
            for row in group.shown:
                place = " -> ".join(dict.fromkeys(part for part in (row.before, row.after) if part))
                yield Text.assemble(f"  {place}", (f"  {row.note}", "dim"))
            if group.num_rows > len(group.shown):
                yield Text(f"  and {group.num_rows - len(group.shown):,} more", style="dim")


def diff_sources(before: Source, after: Source) -> DataDiff:
    """Rows added, removed, changed and moved from one version of a source to another.

    Raises DataError where one of them cannot be read.
    """
    old, new = read_rows(before), read_rows(after)
    same, gone, come = _match([row.sha for row in old], [row.sha for row in new])
    changed = _changed(old, new, gone, come, before, after)
    taken_old, taken_new = {one for one, _ in changed}, {two for _, two in changed}
    groups = (
        _group("added", [Difference("", new[two].id, _said(new[two])) for two in come if two not in taken_new]),
        _group("removed", [Difference(old[one].id, "", _said(old[one])) for one in gone if one not in taken_old]),
        _group("changed", [Difference(old[one].id, new[two].id, _what(old[one], new[two])) for one, two in changed]),
        _group("moved", [Difference(old[one].id, new[two].id) for one, two in moved(same)]),
    )
    return DataDiff(before.path, after.path, len(old), len(new), len(same), groups)


def diff_ledgers(before: Path, after: Path) -> DataDiff:
    """What two runs read, and what became of each row: run folders, or their ledger.parquet.

    Beside added, removed and changed rows there are rows whose split (train, held-out) or fate (kept, dropped)
    changed. Raises DataError where a file is not a ledger.
    """
    old, new = _ledger(before), _ledger(after)
    same, gone, come = _match([row["stage"] + row["sha"] for row in old], [row["stage"] + row["sha"] for row in new])
    places: dict[str, list[int]] = defaultdict(list)
    for two in come:
        places[_place(new[two])].append(two)
    changed = _pair(gone, places, lambda one: _place(old[one]))
    taken_old, taken_new = {one for one, _ in changed}, {two for _, two in changed}
    both = [(old[one], new[two]) for one, two in same]
    splits = [_entry(*rows, f"{rows[0]['split']} -> {rows[1]['split']}") for rows in both if _differ(rows, "split")]
    fates = [_entry(*rows, f"{_fate(rows[0])} -> {_fate(rows[1])}") for rows in both if _differ(rows, "outcome")]
    groups = (
        _group("added", [Difference("", new[two]["id"], _fate(new[two])) for two in come if two not in taken_new]),
        _group("removed", [Difference(old[one]["id"], "", _fate(old[one])) for one in gone if one not in taken_old]),
        _group("changed", [_entry(old[one], new[two], f"stage {old[one]['stage']}") for one, two in changed]),
        _group("on another side", splits),
        _group("of another fate", fates),
    )
    return DataDiff(str(before), str(after), len(old), len(new), len(same), groups)


def _match(old: Sequence[str], new: Sequence[str]) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Places of equal hashes in both (copies are matched one by one), and what is left of either."""
    places: dict[str, list[int]] = defaultdict(list)
    for two, sha in enumerate(new):
        places[sha].append(two)
    same = _pair(range(len(old)), places, lambda one: old[one])
    taken_old, taken_new = {one for one, _ in same}, {two for _, two in same}
    return (
        same,
        [one for one in range(len(old)) if one not in taken_old],
        [two for two in range(len(new)) if two not in taken_new],
    )


def _pair(places: Iterable[int], wanted: dict[str, list[int]], key: Callable[[int], str]) -> list[tuple[int, int]]:
    """Each place with the first place of the same key that is still free; "" is no key."""
    free = {name: iter(values) for name, values in wanted.items() if name}
    pairs = []
    for one in places:
        two = next(free.get(key(one), iter(())), None)
        if two is not None:
            pairs.append((one, two))
    return pairs


def moved(same: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The fewest rows that must have moved for the others to keep their order (a longest increasing subsequence)."""
    ends: list[int] = []  # the smallest last place of an increasing run, by its length
    lengths: list[int] = []
    for _, two in same:
        length = bisect_left(ends, two)
        ends[length : length + 1] = [two]
        lengths.append(length)
    kept = set()
    wanted = len(ends) - 1
    for place in range(len(same) - 1, -1, -1):
        if lengths[place] == wanted:  # of those of one length the last is the smallest, so it precedes what follows
            kept.add(place)
            wanted -= 1
    return [pair for place, pair in enumerate(same) if place not in kept]


def _changed(
    old: Sequence[Row], new: Sequence[Row], gone: list[int], come: list[int], before: Source, after: Source
) -> list[tuple[int, int]]:
    """Removed and added rows that are one row in two versions, by id, by prompt and by place, in this order."""
    prompts_old, prompts_new = _prompts([old[one] for one in gone], before), _prompts([new[two] for two in come], after)
    ways: list[tuple[Callable[[int], str], Callable[[int], str]]] = [
        (lambda one: _own_id(old[one]), lambda two: _own_id(new[two])),
        (lambda one: prompts_old.get(old[one].id, ""), lambda two: prompts_new.get(new[two].id, "")),
    ]
    if len(old) == len(new):
        ways.append((str, str))
    pairs: list[tuple[int, int]] = []
    for key_old, key_new in ways:
        places: dict[str, list[int]] = defaultdict(list)
        for two in come:
            places[key_new(two)].append(two)
        found = _pair(gone, places, key_old)
        pairs += found
        taken = ({one for one, _ in found}, {two for _, two in found})
        gone = [one for one in gone if one not in taken[0]]
        come = [two for two in come if two not in taken[1]]
    return sorted(pairs)


def _own_id(row: Row) -> str:
    """The row's own id column, where it has one."""
    value = next((row.fields[key] for key in ID_KEYS if row.fields.get(key) not in (None, "")), None)
    return f"{type(value).__name__} {value}" if isinstance(value, str | int) else ""


def _prompts(rows: Sequence[Row], source: Source) -> dict[str, str]:
    """The prompt hash of each row that a format can read; none where the format is not known."""
    if not rows:
        return {}
    try:
        examples = to_examples(rows, source).examples
    except DataError:
        return {}
    return {example.id: prompt_sha(example) for example in examples if example.prompt}


def _said(row: Row) -> str:
    return excerpt(" ".join(str(value) for value in row.fields.values() if isinstance(value, str | list | dict)))


def _what(old: Row, new: Row) -> str:
    """The columns in which two versions of a row differ."""
    keys = dict.fromkeys([*old.fields, *new.fields])
    absent = object()
    different = [key for key in keys if not _equal(old.fields.get(key, absent), new.fields.get(key, absent))]
    return excerpt(f"differs in {', '.join(different)}")


def _equal(one: object, two: object) -> bool:
    return type(one) is type(two) and one == two


def _group(name: str, rows: Sequence[Difference]) -> Group:
    return Group(name, len(rows), tuple(rows[:MAX_SHOWN]))


def _ledger(path: Path) -> list[dict[str, str]]:
    file = path / "ledger.parquet" if path.is_dir() else path
    if not file.is_file():
        raise DataError("no such ledger", where=str(file), remedy="Name a run folder, or the ledger.parquet in it.")
    try:
        table = pq.read_table(file, columns=list(COLUMNS))
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"not a ledger: {error}", where=str(file), remedy="Name a run folder.") from error
    missing = sorted(set(COLUMNS) - set(table.column_names))
    if missing:
        raise DataError(f"not a ledger: no column {', '.join(missing)}", where=str(file), remedy="Name a run folder.")
    return [{key: str(value) for key, value in row.items()} for row in table.to_pylist()]


def _place(row: dict[str, str]) -> str:
    return f"{row['stage']} {row['id']}"


def _fate(row: dict[str, str]) -> str:
    return f"{row['outcome']} ({row['reason']})" if row["reason"] else row["outcome"]


def _differ(rows: tuple[dict[str, str], dict[str, str]], key: str) -> bool:
    return rows[0][key] != rows[1][key]


def _entry(old: dict[str, str], new: dict[str, str], note: str) -> Difference:
    return Difference(old["id"], new["id"], note)
