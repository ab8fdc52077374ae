"""TRL's best settings for a task, found on a few rows, each setting once.

In: a task and the work folder. Out: the fastest setting, and what every other one did.
Must not know: Tunesmith.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, Setting, Side, candidates
from benchmarks.processes import Failed, TooSlow, measure
from benchmarks.report import LOSS_TOLERANCE, NORM_TOLERANCE

NUM_ROWS = 8
"""Pairs of the search: one step of them."""
PATIENCE, SLACK_SECONDS = 1.5, 15.0
"""A setting is ended once its whole process has taken this many times as long as the fastest one's, and the slack:
starting one takes some seconds more or less."""


@dataclass(frozen=True)
class Trial:
    """What a setting did: seconds of its step, or why there are none."""

    setting: Setting
    seconds: float | None
    peak_rss_gib: float | None = None
    problem: str = ""


def reason(problem: Exception) -> str:
    """The last line of a worker's error, which names it."""
    lines = str(problem).strip().splitlines()
    return lines[-1][:200] if lines else type(problem).__name__


def find_best(
    case: Case, *, folder: Path, threads: int, peer_python: str, num_rows: int, one_step: bool
) -> tuple[Setting, list[Trial]]:
    """Try every candidate once; raises Failed where none ran.

    Only a setting whose first loss and gradient are those of the first setting is taken: others are other work.
    """
    trials: list[Trial] = []
    fastest_wall, first = float("inf"), None
    for setting in candidates(case.task, rows_per_step=num_rows, one_step=one_step):
        side = Side("search", "", "trl", setting, rows="search.json")
        limit = None if fastest_wall == float("inf") else PATIENCE * fastest_wall + SLACK_SECONDS
        begin = time.perf_counter()
        try:
            result = measure(
                side,
                case.task,
                folder=folder,
                threads=threads,
                peer_python=peer_python,
                log=f"search-{case.key}-{setting.text()}",
                seconds=limit,
            )
        except (Failed, TooSlow) as problem:
            trials.append(Trial(setting, None, problem=reason(problem)))
        else:
            trials.append(_judged(setting, result, first))
            if not trials[-1].problem:
                fastest_wall = min(fastest_wall, time.perf_counter() - begin)
                first = first or result
        print(f"  search {case.key}: {described(trials[-1])}", flush=True)
    done = [trial for trial in trials if trial.seconds is not None and not trial.problem]
    if not done:
        raise Failed("no setting of TRL ran:\n" + "\n".join(map(described, trials)))
    return min(done, key=lambda trial: trial.seconds or 0.0).setting, trials


def _judged(setting: Setting, result: dict[str, Any], first: dict[str, Any] | None) -> Trial:
    seconds, peak = result["seconds"], result["peak_rss_gib"]
    if first is None:
        return Trial(setting, seconds, peak)
    loss, wanted_loss = result["losses"][0], first["losses"][0]
    norm, wanted_norm = result["gradient_norms"][0], first["gradient_norms"][0]
    if abs(loss - wanted_loss) > LOSS_TOLERANCE or abs(norm / wanted_norm - 1) > NORM_TOLERANCE:
        what = f"loss {loss:.6f} and gradient norm {norm:.6f}, not {wanted_loss:.6f} and {wanted_norm:.6f}"
        return Trial(setting, seconds, peak, f"other work: {what}")
    return Trial(setting, seconds, peak)


def described(trial: Trial) -> str:
    """One line."""
    time_taken = "" if trial.seconds is None else f"{trial.seconds:.1f} s, peak {trial.peak_rss_gib:.2f} GiB"
    return f"{trial.setting.name(NUM_ROWS)}: {'; '.join(filter(None, [time_taken, trial.problem]))}"
