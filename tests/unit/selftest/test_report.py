from __future__ import annotations

import io
import json
import math

from rich.console import Console

from tunesmith.selftest.proof import Proof, broken, skipped
from tunesmith.selftest.report import SelfTestReport, progress_line
from tunesmith.selftest.run import CHAPTERS, Outcome

LONG = "no card " * 20
GOOD = Outcome(CHAPTERS[0], (Proof("head: log-probs", "against float64", 2e-7, 1e-5), skipped("card", LONG)), 1.5)
BAD = Outcome(CHAPTERS[1], (Proof("dpo: loss", "against the paper", 0.3, 1e-5), broken("rest", OSError("gone"))), 0.5)


def printed(report: SelfTestReport) -> str:
    out = io.StringIO()
    Console(file=out, width=80).print(report)
    return out.getvalue()


def test_a_failure_is_seen() -> None:
    assert SelfTestReport((GOOD,)).ok
    report = SelfTestReport((GOOD, BAD))
    assert not report.ok
    assert report.line() == "self-test: 1 passed, 2 failed, 1 skipped, 2 s"
    shown = printed(report)
    assert max(map(len, shown.splitlines())) <= 80
    for line in (
        ["head:", "log-probs", "2.0e-07", "limit", "1e-05", "passed"],
        ["dpo:", "loss", "3.0e-01", "limit", "1e-05", "FAILED"],
        ["rest", "inf", "limit", "0e+00", "FAILED"],
    ):
        assert line in [found.split() for found in shown.splitlines()]
    assert "  skipped: no card no card" in shown
    assert "OSError: gone" in shown
    assert "Do not train" in shown
    assert "Do not train" not in printed(SelfTestReport((GOOD,)))


def test_json_has_every_proof_and_no_infinity() -> None:
    values = json.loads(json.dumps(SelfTestReport((GOOD, BAD)).as_json(), allow_nan=False))
    assert values["ok"] is False
    assert [(proof["name"], proof["verdict"], proof["error"]) for proof in values["proofs"]] == [
        ("head: log-probs", "passed", 2e-7),
        ("card", "skipped", None),
        ("dpo: loss", "FAILED", 0.3),
        ("rest", "FAILED", None),
    ]
    assert BAD.proofs[1].error == math.inf


def test_progress_lines() -> None:
    count = len(CHAPTERS)
    assert progress_line(1, GOOD) == f"[1/{count}] log-probs: 1 passed (1.5 s)"
    assert progress_line(2, BAD) == f"[2/{count}] objectives: 2 of 2 FAILED (0.5 s)"
    only_skipped = Outcome(CHAPTERS[2], (skipped("x", "y"),), 0.0)
    assert progress_line(3, only_skipped) == f"[3/{count}] splits: skipped (0.0 s)"
