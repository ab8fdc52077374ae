"""How the self-test's outcomes are shown: lines while it runs, a table of verdicts, JSON.

In: outcomes. Out: what a terminal prints in 80 columns, and plain values. Must not know: how a proof is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tunesmith.selftest.proof import Proof
from tunesmith.selftest.run import CHAPTERS, Outcome

COLOURS = {"passed": "green", "FAILED": "bold red", "skipped": "yellow"}


@dataclass(frozen=True, slots=True)
class SelfTestReport:
    """All outcomes; prints itself through rich."""

    outcomes: tuple[Outcome, ...]

    @property
    def proofs(self) -> list[Proof]:
        """Every proof, in order."""
        return [proof for outcome in self.outcomes for proof in outcome.proofs]

    @property
    def ok(self) -> bool:
        """True where nothing failed."""
        return not self._count("FAILED")

    def _count(self, verdict: str) -> int:
        return sum(proof.verdict == verdict for proof in self.proofs)

    def line(self) -> str:
        """The whole in one line."""
        seconds = sum(outcome.seconds for outcome in self.outcomes)
        counts = f"{self._count('passed')} passed, {self._count('FAILED')} failed, {self._count('skipped')} skipped"
        return f"self-test: {counts}, {seconds:.0f} s"

    def as_json(self) -> dict[str, object]:
        """Plain values; a figure that is not finite is null."""
        return {
            "ok": self.ok,
            "seconds": round(sum(outcome.seconds for outcome in self.outcomes), 1),
            "proofs": [_values(outcome, proof) for outcome in self.outcomes for proof in outcome.proofs],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for outcome in self.outcomes:
            yield Text(f"\n{outcome.chapter.title}: {outcome.chapter.claim}", style="bold")
            yield from _chapter(outcome.proofs)
        yield Text(f"\n{self.line()}", style="bold")
        if not self.ok:
            yield Text("Do not train on this machine before the FAILED lines are explained: please report them.")


def progress_line(number: int, outcome: Outcome) -> str:
    """What is said when a chapter is done; `number` counts from 1."""
    failed = sum(proof.verdict == "FAILED" for proof in outcome.proofs)
    tried = [proof for proof in outcome.proofs if proof.verdict != "skipped"]
    what = f"{failed} of {len(tried)} FAILED" if failed else f"{len(tried)} passed" if tried else "skipped"
    return f"[{number}/{len(CHAPTERS)}] {outcome.chapter.title}: {what} ({outcome.seconds:.1f} s)"


def _chapter(proofs: Iterable[Proof]) -> Iterator[Text | Table | Padding]:
    """Proofs under what they compare; the skipped ones last, under their reason."""
    groups: dict[str, list[Proof]] = {}
    for proof in sorted(proofs, key=lambda proof: proof.verdict == "skipped"):
        heading = f"skipped: {proof.reason}" if proof.verdict == "skipped" else proof.compared or proof.reason
        groups.setdefault(heading, []).append(proof)
    for heading, members in groups.items():
        yield Padding(Text(heading, style="dim"), (0, 0, 0, 2))
        if members[0].verdict == "skipped":
            yield Padding(Text("; ".join(proof.name for proof in members), style="dim"), (0, 0, 0, 4))
            continue
        table = Table.grid(padding=(0, 2))
        table.add_column(width=42)
        for proof in members:
            verdict = Text(proof.verdict, style=COLOURS[proof.verdict])
            table.add_row(Text(f"    {proof.name}"), f"{proof.error:.1e}", f"limit {proof.limit:.0e}", verdict)
        yield table


def _values(outcome: Outcome, proof: Proof) -> dict[str, object]:
    finite = proof.error is not None and math.isfinite(proof.error)
    return {
        "chapter": outcome.chapter.title,
        "name": proof.name,
        "compared": proof.compared,
        "error": proof.error if finite else None,
        "limit": proof.limit,
        "verdict": proof.verdict,
        "reason": proof.reason,
    }
