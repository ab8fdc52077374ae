"""Stand-ins for the comparison's tests: questions, pairs, records, and a run folder full of hostile texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tunesmith.comparison.collect import StageRecord
from tunesmith.comparison.rows import Pair, Question, Rows
from tunesmith.comparison.summary import Answered, Summary, answered, summarize
from tunesmith.data.ledger import Ledger, LedgerEntry, write_ledgers
from tunesmith.data.types import Branch, Tree
from tunesmith.recipe.load import parse_recipe
from tunesmith.recipe.models import Compare, Recipe, Style
from tunesmith.runs.folder import RunFolder, create_or_open
from tunesmith.runs.records import append_record
from tunesmith.sample.generate import Answer

HOSTILE = (
    "<script>document.title='CANARY'</script>"
    "<img src=http://127.0.0.1:9/beacon onerror=\"document.title='CANARY'\">"
    "</script></style></title></textarea></pre>--><svg onload=document.title='CANARY'>"
    "[link](javascript:document.title='CANARY') ![](http://127.0.0.1:9/?q=) {{ 7*7 }} {% raw %} \"' &lt; \u202e \x00"
)
"""Everything that TRAPS S14 names, in one text."""


def question(name: str, *, accepted: Sequence[str] = ("yes",), value: str | None = None) -> Question:
    return Question(name, (1, 2, 3), f"prompt {name}", tuple(accepted), value)


def pair(name: str, *, cluster: str = "", kind: str = "", lengths: tuple[int, int] = (2, 2)) -> Pair:
    branches = tuple(Branch(np.full(n, 5, np.int32), np.ones(n, np.bool_)) for n in lengths)
    return Pair(Tree(name, np.array([1, 2], np.int32), branches), cluster or name, kind)


def record(
    name: str,
    texts: Sequence[str],
    *,
    sampled: Sequence[str] | None = None,
    own: Sequence[float] | None = None,
    reference: Sequence[float] | None = None,
    pairs: Sequence[tuple[float, float]] = (),
) -> StageRecord:
    answers = [Answer((5,) * (number + 1), 2) for number in range(len(texts))]
    zeros = [0.0] * len(texts)
    return StageRecord(
        name=name,
        greedy=answers,
        sampled=answers,
        drawn=answers,
        greedy_text=list(texts),
        sampled_text=list(texts if sampled is None else sampled),
        own=list(zeros if own is None else own),
        reference=list(zeros if reference is None else reference),
        pairs=list(pairs),
    )


def recipe(name: str = "trial", *, style: Style | None = None, model: str = "somewhere") -> Recipe:
    source = {"path": "rows.jsonl"}
    stages = [
        {"name": "sft", "method": "sft", "train": [source], "replay": {"sources": [source]}},
        {"name": "dpo", "method": "dpo", "train": [source]},
    ]
    loaded = parse_recipe({"name": name, "model": {"path": model}, "stages": stages})
    compare = Compare(style=style, bootstrap_samples=200, num_shown=20)
    return loaded.recipe.model_copy(update={"compare": compare})


def hostile_report(root: Path) -> tuple[RunFolder, Recipe, Summary, list[Answered]]:
    """A run in which every free text (and the file name) is HOSTILE."""
    folder = create_or_open(root, "run <script>&'\"")
    folder.recipe_path.write_text(f"name: x\nnote: {HOSTILE}\n", "utf-8")
    manifest = json.loads(folder.manifest_path.read_text("utf-8"))
    manifest |= {"tunesmith": HOSTILE, "git": HOSTILE, "platform": HOSTILE, "packages": {HOSTILE: HOSTILE}}
    folder.manifest_path.write_text(json.dumps(manifest), "utf-8")
    entry = LedgerEntry(HOSTILE, "0" * 64, HOSTILE, "train", HOSTILE, "dropped", HOSTILE, 0, 0, 0)
    write_ledgers(folder.ledger_path, [Ledger([entry])])
    for stage in ("sft", "dpo"):
        files = folder.stage(stage).create()
        for step in range(1, 61):
            metrics = {"loss": 1 / step, "lr": 1e-4, "margin": step / 10, "accuracy": 0.5, "grad_norm": 1.0}
            rewards = {"reward_chosen": 0.1, "reward_rejected": -1.0, "logratio_chosen": 1, "logratio_rejected": -2}
            append_record(files.metrics_path, {"step": step, **metrics, **rewards})
        append_record(files.eval_path, {"step": 60, "loss": 0.5, "margin": 2.0, "accuracy": 0.9})
    style = Style(description=HOSTILE, pattern=".*")
    trial = recipe(style=style, model=HOSTILE)
    rows = Rows([Question(HOSTILE, (1,), HOSTILE, (HOSTILE,), HOSTILE)], [pair("p")], [HOSTILE], no_pairs=HOSTILE)
    names = ("base", HOSTILE, "sft", "dpo")
    records = [record(name, [HOSTILE], pairs=[(-1.0, -2.0)]) for name in names]
    summary = summarize(trial.model_copy(update={"name": HOSTILE}), records, rows, reference=HOSTILE, notes=[HOSTILE])
    return folder, trial, summary, answered(trial.compare, records, rows)
