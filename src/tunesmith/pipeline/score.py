"""Scoring a file: each answer's score by a run's reward model, written beside the row's own fields.

In: a run with a reward stage, a file of answers, pairs or rankings. Out: a JSON-lines file, and what came out in
figures. Must not know: the command line, training.

Rows are rendered as the stage's own were, and a score is read where the stage read it: at the end of the answer. The
same file and the same reward model give the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tunesmith.data.formats import DegenerateRow, FormatPlan, decode_row, plan_format
from tunesmith.data.reading import bad_line
from tunesmith.data.render import Renderer
from tunesmith.data.sources import read_rows
from tunesmith.data.types import BadRow, Row, Tree
from tunesmith.engine.engine import Engine
from tunesmith.engine.parity import checked_engine
from tunesmith.engine.scoring import score
from tunesmith.errors import DataError
from tunesmith.model.load import forward_dtype
from tunesmith.model.stage import LoadedStage, load_stage
from tunesmith.pipeline.scored import COLUMN, Scored, kept, make_pairs, refuse_taken, with_scores
from tunesmith.recipe.models import FormatName, Source
from tunesmith.runs.atomic import make_folder, write_text
from tunesmith.train.precision import autocast_of

FOREST_TOKENS = 4096
"""Tokens scored at a time; it changes time and memory only."""
MAX_SHOWN = 20
"""Malformed rows named in an error."""


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """What is written. column: its name. make_pairs: the best and the worst answer of each prompt instead of the rows.
    keep_above, keep_top: only rows (pairs) whose score (difference) is above, or in the top share."""

    column: str = COLUMN
    make_pairs: bool = False
    keep_above: float | None = None
    keep_top: float | None = None
    format: FormatName = "auto"


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """What came out. accuracy: share of the file's pairs whose chosen answer has the higher score, a tie half."""

    path: Path
    num_read: int
    num_written: int
    unscored: tuple[tuple[str, int], ...]
    mean: float | None
    spread: float | None
    accuracy: float | None


def score_file(
    run: str,
    file: Path,
    out: Path,
    options: ScoreOptions | None = None,
    *,
    tell: Callable[[str], None] = lambda text: None,
) -> ScoreReport:
    """Score every answer of `file` by the reward model `run` (`runs/x`, `runs/x:rm`) and write `out`.

    Raises DataError where `out` exists, a row is malformed or has the column, RunFolderError where the run has no
    finished reward model, ModelError where it cannot be loaded.
    """
    options = options or ScoreOptions()
    _refuse_target(out)
    rows = _read(Source(path=str(file), format=options.format))  # before a model is loaded
    if not options.make_pairs:
        refuse_taken(rows, options.column)
    folder, _, name = run.partition(":")
    stage = load_stage(Path(folder), name or None, scores=True)
    rows = _scored(stage, rows, tell=tell)
    written = make_pairs(rows, options.column) if options.make_pairs else rows
    written = kept(written, above=options.keep_above, top=options.keep_top)
    make_folder(out.parent)
    lines = [json.dumps(with_scores(row, options.column), ensure_ascii=False) for row in written]
    write_text(out, "".join(f"{line}\n" for line in lines))
    return _report(out, rows, len(written))


def _refuse_target(out: Path) -> None:
    if out.exists():
        raise DataError("exists already", where=str(out), remedy="Give another file with --out, or remove it.")
    if out.suffix != ".jsonl":
        raise DataError("is no .jsonl file", where=str(out), remedy="Scores are written as JSON lines: end it so.")


def _read(source: Source) -> list[Scored]:
    """The file's rows with their examples; rows that teach nothing (an empty answer) with the reason."""
    rows = read_rows(source)
    if not rows:
        raise DataError("has no rows", where=source.path, remedy="Give a file with answers, pairs or rankings.")
    plan = plan_format(rows, source)
    found = [_decoded(row, plan) for row in rows]
    bad = [each for each in found if isinstance(each, BadRow)]
    if bad:
        lines = [f"  {bad_line(each)}" for each in bad[:MAX_SHOWN]]
        more = [f"  ... and {len(bad) - MAX_SHOWN} more"] if len(bad) > MAX_SHOWN else []
        what = f"{len(bad)} of {len(rows)} rows do not fit the format {plan.format} ({plan.reason}):"
        remedy = "Mend or delete these rows, or name another format with --format."
        raise DataError("\n".join([what, *lines, *more]), where=source.path, remedy=remedy)
    return [each for each in found if isinstance(each, Scored)]


def _decoded(row: Row, plan: FormatPlan) -> Scored | BadRow:
    found = decode_row(row, plan)
    if isinstance(found, BadRow):
        return found
    if isinstance(found, DegenerateRow):
        return Scored(row.id, row.fields, reason=found.reason)
    return Scored(row.id, row.fields, found)


def _scored(stage: LoadedStage, rows: Sequence[Scored], *, tell: Callable[[str], None]) -> list[Scored]:
    """The rows with their scores. Rows that cannot be rendered keep their reason."""
    renderer = Renderer(
        stage.tokenizer,
        stage.renderer.template,
        stage.renderer.max_length,
        train_on="last_assistant",  # a conversation is scored at its end
        reads_end=True,
    )
    examples = [row.example for row in rows if row.example is not None]
    rendered = iter(renderer.render_many(examples))
    done: list[Scored] = []
    trees: list[Tree] = []
    places: list[int] = []
    for place, row in enumerate(rows):
        result = None if row.example is None else next(rendered)
        if result is not None and result.error is not None:
            row = replace(row, reason=result.error.what.partition(":")[0])
        elif result is not None:
            places.append(place)
            trees.append(result.trees[-1])
        done.append(row)
    if not trees:
        reasons = ", ".join(sorted({row.reason for row in done}))
        raise DataError(f"no row can be scored: {reasons}", remedy="Give rows with a prompt and an answer.")
    tell(f"{stage.name}: scoring {sum(len(tree.branches) for tree in trees):,} answers of {len(trees):,} rows")
    for place, values in zip(places, score(_engine(stage, trees), trees, forest_tokens=FOREST_TOKENS), strict=True):
        done[place] = replace(done[place], scores=tuple(float(value) for value in values))
    return done


def _engine(stage: LoadedStage, trees: Sequence[Tree]) -> Engine:
    """The engine that is right for the model on these rows, checked with every token of them read."""
    autocast = autocast_of(forward_dtype(stage.policy.weights.full, stage.model.device), stage.model.device)
    longest = sorted(trees, key=lambda tree: tree.num_tokens)[-4:]
    read = [
        replace(
            tree,
            branches=tuple(replace(branch, trained=np.ones(len(branch.ids), np.bool_)) for branch in tree.branches),
        )
        for tree in longest
    ]
    return checked_engine(stage.model, read, autocast=autocast)[0]


def _report(out: Path, rows: Sequence[Scored], num_written: int) -> ScoreReport:
    scores = np.array([score for row in rows for score in row.scores], np.float64)
    margins = np.array([row.scores[0] - row.scores[1] for row in rows if len(row.scores) == 2], np.float64)
    wins = (margins > 0) + 0.5 * (margins == 0)
    reasons = Counter(row.reason for row in rows if not row.scores)
    return ScoreReport(
        path=out,
        num_read=len(rows),
        num_written=num_written,
        unscored=tuple(reasons.most_common()),
        mean=float(scores.mean()) if len(scores) else None,
        spread=float(scores.std()) if len(scores) else None,
        accuracy=float(wins.mean()) if len(wins) else None,
    )
