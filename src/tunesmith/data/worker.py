"""A chunk of rows to trees: the part of the preparation that may run in another process.

In: an undecoded chunk, how to read it, a renderer. Out: the fate of every row in columns, and its trees in flat
arrays. Must not know: other chunks, the cache, policies (what a bad row does to the run is the caller's business).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tunesmith.data.examples import example_line
from tunesmith.data.formats import DegenerateRow, Feedback, FormatPlan, decode_row, feedback_of, kind_of
from tunesmith.data.formats.transcripts import JOINED
from tunesmith.data.render import Rendered, Renderer
from tunesmith.data.shape import AS_READ, Shape, shaped_example, shaped_trees
from tunesmith.data.sources import RawChunk, read_chunk
from tunesmith.data.split import content_key, is_heldout, prompt_sha
from tunesmith.data.store import Packed, pack
from tunesmith.data.types import BadRow, Example, Row, Tree
from tunesmith.recipe.models import FormatName, Source

KEY_DIGITS = 16  # hex digits of a sha256 that fill 64 bits: among 10^7 rows a chance meeting has odds of 10^-6


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What a worker is given: a chunk, how to read it, what it is for. `heldout_fraction`: of rows that leave the
    training side."""

    raw: RawChunk
    source: Source
    plan: FormatPlan
    heldout_fraction: float
    keep_examples: bool
    count_only: bool = False
    shape: Shape = AS_READ


@dataclass(slots=True)
class Fates:
    """The rows of a chunk in columns, in the order of the file. `reason` is "" for rows with trees."""

    ids: list[str] = field(default_factory=list)
    shas: list[str] = field(default_factory=list)
    heldout: list[bool] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    trimmed: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # tokens of the row's longest side before trimming, 0 if unknown
    num_trees: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    trained_tokens: list[int] = field(default_factory=list)
    content_keys: list[int] = field(default_factory=list)  # 0 for rows that never became an example
    prompt_keys: list[int] = field(default_factory=list)
    examples: list[bytes] = field(default_factory=list)  # of held-out rows, "" for others


@dataclass(frozen=True, slots=True, eq=False)
class ChunkResult:
    """A chunk's rows, their trees in order, and what was noticed. `bad` are malformed, `stops` end the run."""

    fates: Fates
    packed: Packed
    bad: list[BadRow]
    stops: list[BadRow]
    kinds: Counter[FormatName | None]
    notices: Counter[str]
    keys: frozenset[str]
    num_joined: int
    feedback: Feedback


def process(task: Task, renderer: Renderer) -> ChunkResult:
    """Reads, decodes and renders one chunk."""
    rows = read_chunk(task.raw, task.source)
    kinds = Counter(kind_of(row.fields) for row in rows if isinstance(row, Row))
    keys = frozenset(key for row in rows if isinstance(row, Row) for key in row.fields)
    if task.count_only:
        return ChunkResult(Fates(), pack([]), [], [], kinds, Counter(), keys, 0, Feedback())
    notices: Counter[str] = Counter()
    decoded = [_decoded(row, task, notices) if isinstance(row, Row) else row for row in rows]
    examples = [each for each in decoded if isinstance(each, Example)]
    rendered = iter(renderer.render_many(examples, sanitize=task.source.sanitize))
    fates, trees, stops = Fates(), list[Tree](), list[BadRow]()
    bad: list[BadRow] = []
    for each in decoded:
        if isinstance(each, DegenerateRow):
            _enter(fates, each.row.id, each.row.sha, reason=each.reason)
            continue
        if isinstance(each, BadRow):
            bad.append(each)
            _enter(fates, each.id, each.sha, reason=f"malformed: {each.field}: found {each.found}")
            continue
        result = next(rendered)
        result = replace(result, trees=shaped_trees(each, result.trees, task.shape))
        notices.update(result.notices)
        malformed = _enter_example(fates, each, result, task)
        trees += result.trees
        if malformed is not None and result.error is not None and result.error.num_tokens:
            stops.append(malformed)  # too long, and the recipe says `too_long: stop`
        elif malformed is not None:
            bad.append(malformed)
    joined = sum(JOINED in example.tags for example in examples)
    # of ranked answers, two are no pair whose first was chosen
    feedback = Feedback() if task.plan.format == "ranked" else feedback_of(examples)
    return ChunkResult(fates, pack(trees), bad, stops, kinds, notices, keys, joined, feedback)


def _decoded(row: Row, task: Task, notices: Counter[str]) -> Example | BadRow | DegenerateRow:
    """A row as the stage trains on it."""
    decoded = decode_row(row, task.plan)
    if not isinstance(decoded, Example):
        return decoded
    return shaped_example(row, decoded, task.shape, notices, is_ranked=task.plan.format == "ranked")


def _enter(fates: Fates, row_id: str, sha: str, *, reason: str) -> None:
    """A row that never became an example; it counts on the training side of its source."""
    fates.ids.append(row_id)
    fates.shas.append(sha)
    fates.heldout.append(False)
    fates.reasons.append(reason)
    fates.trimmed.append("")
    fates.examples.append(b"")
    for column in (fates.lengths, fates.num_trees, fates.tokens, fates.prompt_tokens, fates.trained_tokens):
        column.append(0)
    fates.content_keys.append(0)
    fates.prompt_keys.append(0)


def _enter_example(fates: Fates, example: Example, result: Rendered, task: Task) -> BadRow | None:
    """An example's fate; returns it as malformed where the template or a policy calls it so."""
    error = result.error
    prompt = prompt_sha(example)
    held = task.heldout_fraction > 0 and is_heldout(prompt, task.heldout_fraction)
    fates.ids.append(example.id)
    fates.shas.append(example.sha)
    fates.heldout.append(held)
    fates.reasons.append("" if error is None else f"malformed: {error.what}" if error.fatal else error.what)
    fates.trimmed.append(result.trimmed)
    fates.lengths.append(result.num_tokens or (error.num_tokens if error else 0) or _longest(result.trees))
    fates.num_trees.append(len(result.trees))
    fates.tokens.append(sum(tree.num_tokens for tree in result.trees))
    fates.prompt_tokens.append(sum(len(tree.prompt_ids) for tree in result.trees))
    fates.trained_tokens.append(sum(tree.num_trained for tree in result.trees))
    fates.content_keys.append(int(content_key(example)[:KEY_DIGITS], 16))
    fates.prompt_keys.append(int(prompt[:KEY_DIGITS], 16))
    fates.examples.append(example_line(example) if (held or task.keep_examples) and error is None else b"")
    if error is None or not error.fatal:
        return None
    return BadRow(example.id, "", error.what, "", example.sha)


def _longest(trees: Sequence[Tree]) -> int:
    rows = (len(tree.prompt_ids) + max(len(branch.ids) for branch in tree.branches) for tree in trees)
    return max(rows, default=0)
