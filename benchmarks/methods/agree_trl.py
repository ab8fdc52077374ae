"""Our losses beside TRL's own, on the same fixed log-probs: each method's value and its derivative by every log-prob.

    python -m benchmarks.methods.agree_trl [--peer-python PYTHON] [--json FILE]

In: `agree_cases`, a Python with TRL 1.16 (`make bench` installs one). Out: a table on the standard output and
`benchmarks/results/methods-trl.json`; exit 1 where a method disagrees, or where a known difference is none.
Two processes: ours writes rows and compares, `worker_trl` runs TRL's trainers on them. Must not know: models.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, tensor

from benchmarks.methods.agree_cases import ABSENT, COMPARISONS, ELSEWHERE, Comparison
from benchmarks.processes import HERE, WORK, run
from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives import METHODS, Carried, Objective, Result, objective_of
from tunesmith.recipe.models import Stage
from tunesmith.recipe.stages import StageBase

TOLERANCE = 1e-6
"""Of a loss relative to its size (at least 1), and of a derivative by one log-prob relative to the largest."""
NUM_ROWS = 8
RESULTS = HERE / "results" / "methods-trl.json"
STAGES: TypeAdapter[StageBase] = TypeAdapter(Stage)

Row = dict[str, Any]


def stage_of(comparison: Comparison) -> StageBase:
    """The recipe stage of our side."""
    fixed = {"name": "stage", "method": comparison.method, "train": [{"path": "rows.jsonl"}]}
    return STAGES.validate_python(fixed | dict(comparison.settings))


def make_rows(kind: str) -> list[Row]:
    """Rows with two answers of unequal length; of labels the second is the mismatched one, of rewards the only token
    of an answer is its score. Log-ratios of whole answers are of about a nat, so that no loss is saturated."""
    draw = np.random.default_rng(0)
    rows = []
    for number in range(NUM_ROWS):
        answers = []
        for length in draw.integers(2, 13, 2):
            size = 1 if kind == "reward" else int(length)
            policy = draw.normal(0, 1, size) if kind == "reward" else -draw.uniform(0.01, 2, size)
            reference = np.minimum(policy + draw.normal(-0.05, 0.3, size), -0.001)
            answers.append(
                {
                    "policy": policy.round(6).tolist(),
                    "reference": reference.round(6).tolist(),
                    "collision": (-draw.uniform(0.01, 0.5, size)).round(6).tolist(),
                }
            )
        prompt = (-draw.uniform(0.01, 4, 5)).round(6).tolist()
        scores = draw.normal(0, 1, 2).round(3).tolist()
        rows.append({"answers": answers, "prompt": prompt, "scores": scores, "label": number % 3 != 1})
    return rows


def seen(rows: list[Row], objective: Objective, kind: str, dtype: torch.dtype) -> Logprobs:
    """The rows as an objective sees them."""
    answers = [answer for row in rows for answer in (row["answers"][:1] if kind == "answers" else row["answers"])]
    per_row = len(answers) // len(rows)

    def flat(name: str) -> Tensor:
        return tensor([value for answer in answers for value in answer[name]], dtype=dtype)

    lengths_B = tensor([len(answer["policy"]) for answer in answers])
    numbers_B = torch.arange(len(answers))
    return Logprobs(
        flat("policy").requires_grad_(),
        numbers_B.repeat_interleave(lengths_B),
        numbers_B // per_row,
        flat("reference") if objective.needs_reference else None,
        {name: flat(name) for name in objective.wants},
        score_B=tensor([score for row in rows for score in row["scores"]], dtype=dtype) if per_row == 2 else None,
        label_G=tensor([float(row["label"]) for row in rows], dtype=dtype) if kind == "labels" else None,
    )


def unshifted(objective: Objective, logprobs: Logprobs) -> Objective:
    """BCO after steps whose rewards make up for this one's, so that its shift is 0."""
    metrics = objective.function(logprobs).metrics
    total = float((metrics["reward_chosen"].total + metrics["reward_rejected"].total).detach())
    return objective.bound(Carried({"reward_sum": -total, "num_rewards": 0.0}))


def ours(comparison: Comparison, rows: list[Row]) -> tuple[float, list[float]]:
    """Our mean loss of a step of all rows, and its derivative by each of the policy's log-probs."""
    stage = stage_of(comparison)
    kind = "reward" if comparison.trainer == "reward" else stage.rows
    objective = objective_of(stage)
    logprobs = seen(rows, objective, kind, getattr(torch, comparison.dtype))
    if comparison.no_shift:
        objective = unshifted(objective, logprobs)
    found: Result = objective.function(logprobs)
    loss = found.loss.total / found.loss.count
    (slope_N,) = torch.autograd.grad(loss, logprobs.logprob_N)
    return float(loss.detach()), _all_answers(slope_N, rows, kind)


def _all_answers(slope_N: Tensor, rows: list[Row], kind: str) -> list[float]:
    """With zeros for the answers that a method of single answers does not see."""
    if kind != "answers":
        return [float(value) for value in slope_N]
    parts = torch.split(slope_N, [len(row["answers"][0]["policy"]) for row in rows])
    both = [[part, torch.zeros(len(row["answers"][1]["policy"]))] for part, row in zip(parts, rows, strict=True)]
    return [float(value) for pair in both for part in pair for value in part]


def compare(comparison: Comparison, rows: list[Row], theirs: Row) -> Row:
    """Both values, how far they are apart, and whether that is as expected."""
    loss, slope = ours(comparison, rows)
    largest = max(map(abs, slope))
    apart = abs(loss - theirs["loss"]) / max(1.0, abs(loss))
    slopes_apart = max(abs(one - two) for one, two in zip(slope, theirs["slope"], strict=True)) / largest
    agrees = max(apart, slopes_apart) <= TOLERANCE
    return {
        "name": comparison.name,
        **asdict(comparison),
        "ours": loss,
        "theirs": theirs["loss"],
        "apart": apart,
        "slopes_apart": slopes_apart,
        "agrees": agrees,
        "as_expected": agrees == (not comparison.difference),
    }


def table(found: list[Row]) -> str:
    """Markdown: first what agrees, then the known differences."""
    lines = ["| method | TRL 1.16 | ours | TRL's | apart | derivatives apart |", "|---|---|---:|---:|---:|---:|"]
    for row in found:
        if not row["difference"]:
            values = f"{row['ours']:.6f} | {row['theirs']:.6f} | {row['apart']:.0e} | {row['slopes_apart']:.0e}"
            lines.append(f"| {row['name']} | {called(row)} | {values} |")
    lines += ["", "| method | TRL 1.16 | ours | TRL's | what differs |", "|---|---|---:|---:|---|"]
    for row in found:
        if row["difference"]:
            values = f"{row['ours']:.6f} | {row['theirs']:.6f} | {row['difference']}"
            lines.append(f"| {row['name']} | {called(row)} | {values} |")
    absent = [f"- {name}: {why}" for name, why in ABSENT.items() if name in METHODS]
    return "\n".join([*lines, "", "TRL 1.16 has no loss for:", *absent, "", "Not to be seen in a loss:"]) + "".join(
        f"\n- {line}" for line in ELSEWHERE
    )


def called(row: Row) -> str:
    """What TRL calls it."""
    peer = row["peer"]
    settings = [f"{key}={value}" for key, value in peer.items() if key not in ("loss_types", "loss_type", "beta")]
    losses = "+".join(peer.get("loss_types", [peer.get("loss_type", "")])) or row["trainer"]
    how = {"step": "", "alone": " one row a batch", "halves": " two micro-batches"}[row["batches"]]
    notes = [how.strip(), "" if row["prompts"] or row["trainer"] != "orpo" else "no prompt"]
    notes += ["shift 0"] if row["no_shift"] else []
    return ", ".join([f"{row['trainer']}: {losses}", *settings, *(note for note in notes if note)])


def trl_says(jobs: list[Row], python: str) -> Row:
    """What TRL's worker answers."""
    with tempfile.TemporaryDirectory(prefix="tunesmith-agree-") as name:
        path = Path(name) / "jobs.json"
        path.write_text(json.dumps(jobs))
        worker = str(Path(__file__).with_name("worker_trl.py"))
        said: Row = json.loads(run([python, worker, str(path)], folder=Path(name), threads=1, log="agree-trl"))
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=str(HERE / ".venv-bench" / "bin" / "python"), help="Python with TRL")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go")
    args = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    missing = set(METHODS) - {each.method for each in COMPARISONS} - set(ABSENT)
    assert not missing, f"methods that are neither compared nor said to be absent from TRL: {sorted(missing)}"
    chosen = [each for each in COMPARISONS if each.method in METHODS]
    rows = {kind: make_rows(kind) for kind in ("reward", "plain")}
    given = [rows["reward" if each.trainer == "reward" else "plain"] for each in chosen]
    jobs = [{**asdict(each), "rows": own} for each, own in zip(chosen, given, strict=True)]
    said = trl_says(jobs, args.peer_python)
    found = [compare(each, own, theirs) for each, own, theirs in zip(chosen, given, said["found"], strict=True)]
    print(table(found))
    agreed = [row for row in found if not row["difference"]]
    worst = {name: max(row[name] for row in agreed) for name in ("apart", "slopes_apart")}
    wrong = [row["name"] for row in found if not row["as_expected"]]
    methods = {row["method"] for row in agreed}
    print(f"\n{len(methods)} methods agree in {len(agreed)} settings, or should; furthest apart: {worst}")
    print(f"not as expected: {wrong or 'none'}")
    head = {"schema": 1, "trl": said["trl"], "torch": said["torch"], "tolerance": TOLERANCE, "worst": worst}
    lists = {"comparisons": found, "absent": ABSENT, "elsewhere": ELSEWHERE}
    args.json.write_text(json.dumps(head | lists, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
