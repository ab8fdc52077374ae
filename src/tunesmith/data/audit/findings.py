"""What an audit finds: a finding, and all of them in the order of their weight.

In: nothing. Out: frozen records. Must not know: how anything was found, how it is shown.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tunesmith.data.types import Json

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

Severity = Literal["blocker", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("blocker", "warning", "note")
SUFFIXES = (".gz", ".zst", ".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".md")
NUM_SHOWN = 10
"""Rows shown for a finding; the full list of ids is in the audit and in its JSON."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One row of a finding: its id and what was found there, short and with everything private masked."""

    id: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Mend:
    """What `tunesmith data fix` is told about one file: `--drop duplicates`, say."""

    path: str
    options: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong or worth knowing.

    `count` of `total` rows (or pairs, or held-out rows: `text` says which) are concerned; `ids` lists them all,
    `shown` the first few with what was found. `mends` say how files are mended, `advice` what else helps: a recipe key.
    """

    kind: str
    title: str
    severity: Severity
    count: int
    total: int
    ids: tuple[str, ...]
    text: str
    mends: tuple[Mend, ...] = ()
    advice: str = ""
    shown: tuple[Hit, ...] = ()

    @property
    def fix(self) -> str:
        """What to type: one command a file, or the advice; "" where nothing is to be done."""
        return "\n".join(fix_commands(self.mends)) or self.advice


def fix_commands(mends: Iterable[Mend]) -> list[str]:
    """One `tunesmith data fix` a file, with everything that is to be done to it, as it is typed into a shell."""
    options: dict[str, dict[str, None]] = {}
    for mend in mends:
        options.setdefault(mend.path, {})[mend.options] = None
    return [
        f"tunesmith data fix {shlex.quote(path)} {' '.join(wanted)} -o {shlex.quote(clean_name(path))}"
        for path, wanted in options.items()
    ]


def clean_name(path: str) -> str:
    """`rows.jsonl.gz` -> `rows.clean.jsonl`; signs that a shell or a pattern would read are replaced."""
    name = path.rstrip("/")
    while suffix := next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), ""):
        name = name[: -len(suffix)]
    return name.translate(str.maketrans("*?[]", "____")) + ".clean.jsonl"


@dataclass(frozen=True, slots=True)
class Fact:
    """A figure that describes the data, whether or not anything is wrong."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Part:
    """The findings of one file, or of one stage of a recipe, heaviest first."""

    name: str
    num_rows: int
    facts: tuple[Fact, ...]
    findings: tuple[Finding, ...]
    passed: tuple[str, ...]  # titles of the checks that found nothing

    @property
    def commands(self) -> list[str]:
        """The commands that mend every blocker and warning at once, one a file."""
        return fix_commands(mend for found in self.findings if found.severity != "note" for mend in found.mends)


@dataclass(frozen=True, slots=True)
class Audit:
    """The findings of a file or of a recipe's stages. `print` it with rich, or `write_html` it."""

    title: str
    parts: tuple[Part, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Every finding, part by part."""
        return tuple(finding for part in self.parts for finding in part.findings)

    @property
    def num_rows(self) -> int:
        """Rows looked at."""
        return sum(part.num_rows for part in self.parts)

    def count(self, severity: Severity) -> int:
        """Findings of one severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def has_blockers(self) -> bool:
        """Whether anything should be mended before training."""
        return self.count("blocker") > 0

    def to_json(self) -> dict[str, Json]:
        """The audit as plain values, with the full list of ids."""
        return {"title": self.title, "parts": [_part_json(part) for part in self.parts]}

    def jsonl(self) -> Iterator[str]:
        """One line a finding."""
        for part in self.parts:
            for finding in part.findings:
                yield json.dumps({"part": part.name, **_finding_json(finding)}, ensure_ascii=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from tunesmith.data.audit.table import render

        yield from render(self, options.max_width)


def _part_json(part: Part) -> Json:
    return {
        "name": part.name,
        "num_rows": part.num_rows,
        "facts": {fact.name: fact.value for fact in part.facts},
        "findings": [_finding_json(finding) for finding in part.findings],
        "passed": list(part.passed),
    }


def _finding_json(finding: Finding) -> dict[str, Json]:
    return {
        "kind": finding.kind,
        "severity": finding.severity,
        "count": finding.count,
        "total": finding.total,
        "text": finding.text,
        "fix": finding.fix,
        "shown": [{"id": hit.id, "note": hit.note} for hit in finding.shown],
        "ids": list(finding.ids),
    }
