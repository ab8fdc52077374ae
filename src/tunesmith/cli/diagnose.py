"""The command `tunesmith diagnose`: what the curves of a run show, why, and what to change.

In: a run folder, also of a run that is still going. Out: text, or JSON. Must not know: how a curve is judged.
"""

from __future__ import annotations

import json
import math
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tunesmith.diagnosis.diagnose import StageFindings

_WIDEST = 110


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--stage", metavar="NAME", help="One stage of the run; all that have begun if not given.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def diagnose(run: Path, stage: str | None, as_json: bool) -> None:
    """Name what is wrong in a run's curves, with evidence, cause and remedy."""
    from tunesmith.diagnosis.diagnose import read_run

    findings = read_run(run, stage)
    if as_json:
        content = {"run": str(run), "stages": [_plain(each) for each in findings]}
        click.echo(json.dumps(content, ensure_ascii=False, allow_nan=False, indent=2))
        return
    click.echo("\n".join(described(findings, width=min(_WIDEST, shutil.get_terminal_size().columns))))


def described(findings: Sequence[StageFindings], *, width: int = _WIDEST) -> list[str]:
    """The findings in lines of at most `width` characters."""
    lines: list[str] = []
    for each in findings:
        lines += [*([""] if lines else []), f"{each.stage}: {each.method}, {each.num_steps} steps; {_summed(each)}"]
        for one in each.now:
            lines += ["", f"  {one.severity.upper()}: {one.name} (step {one.step})"]
            for title, text in (("evidence", one.evidence), ("cause", one.cause), ("remedy", one.remedy)):
                lines += _wrapped(f"    {title:<10}", text, width)
        for title, said in (("seen earlier, and no longer", each.earlier), ("warned of in training", each.warnings)):
            lines += ["", f"  {title}:"] if said else []
            for line in said:
                lines += _wrapped("    ", f"step {line['step']}: {line['text']}", width)
    return lines or ["No stage of the run has begun."]


def _summed(each: StageFindings) -> str:
    problems = sum(one.severity == "problem" for one in each.now)
    notices = len(each.now) - problems
    counts = [(problems, "problem"), (notices, "notice")]
    return ", ".join(f"{count} {word}{'s' * (count > 1)}" for count, word in counts if count) or "nothing found"


def _wrapped(head: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, max(40, width), initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
    )


def _plain(each: StageFindings) -> dict[str, object]:
    return {
        "stage": each.stage,
        "method": each.method,
        "num_steps": each.num_steps,
        "diagnoses": [
            {
                "name": one.name,
                "severity": one.severity,
                "step": one.step,
                "evidence": one.evidence,
                "cause": one.cause,
                "remedy": one.remedy,
                "figures": {name: value if math.isfinite(value) else None for name, value in one.figures.items()},
            }
            for one in each.now
        ],
        "earlier": list(each.earlier),
        "warnings": list(each.warnings),
    }
