"""A stage's files to trees, with an account of every row.

In: a stage of the recipe, a renderer. Out: training, held-out and replay trees, ledger entries, notes to print;
or one DataError that says which rows cannot be used and why.
Must not know: models, training, the command line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from tunesmith.data.formats import MAX_SHOWN, Decoded, to_examples
from tunesmith.data.formats.detect import PAIRS
from tunesmith.data.formats.transcripts import JOINED
from tunesmith.data.ledger import LedgerEntry, Split
from tunesmith.data.render import Rendered, Renderer
from tunesmith.data.sources import content_sha, read_rows
from tunesmith.data.split import prompt_sha, split_examples, turns_json
from tunesmith.data.types import Example, Row, RowError, Tree
from tunesmith.errors import DataError
from tunesmith.recipe.models import CompletionStage, DpoStage, SftStage, Source

NUM_ANSWERS = {"sft": 1, "completion": 1, "dpo": 2}
HISTOGRAM_EDGES = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a stage trains and evaluates on. `heldout_examples` are the examples behind `heldout`."""

    train: list[Tree]
    heldout: list[Tree]
    replay: list[Tree]
    heldout_examples: list[Example]
    ledger: list[LedgerEntry]
    notes: list[str]


@dataclass(slots=True)
class _Side:
    """One side of the split, as it grows file by file."""

    split: Split
    trees: list[Tree] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    too_long: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Account:
    """What the whole stage gathers on the way."""

    stage: str
    ledger: list[LedgerEntry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def enter(
        self, row: Row | Example, source: Source, split: Split, *, dropped: str = "", trees: Sequence[Tree] = ()
    ) -> None:
        """One row's fate: its trees, or the reason why it was dropped."""
        self.ledger.append(
            LedgerEntry(
                id=row.id,
                sha=row.sha,
                stage=self.stage,
                split=split,
                source=source.path,
                outcome="dropped" if dropped else "kept",
                reason=dropped,
                prompt_tokens=sum(len(tree.prompt_ids) for tree in trees),
                trained_tokens=sum(tree.num_trained for tree in trees),
            )
        )


def prepare_stage(stage: SftStage | CompletionStage | DpoStage, renderer: Renderer) -> Prepared:
    """Reads, decodes, splits and renders every source of a stage.

    Raises DataError: a file that cannot be read, malformed rows (up to 20 at once), a format that does not
    suit the method, or no row left to train on (with the lengths, where length is why).
    """
    account = _Account(stage.name)
    train, heldout, replay = _Side("train"), _Side("heldout"), _Side("replay")
    for source in stage.train:
        decoded = _decode(source, stage.method, account, "train")
        kept, held = split_examples(decoded.examples, stage.heldout_fraction)
        _render(kept, source, renderer, train, account)
        _render(held, source, renderer, heldout, account)
    for source in stage.heldout:
        decoded = _decode(source, stage.method, account, "heldout")
        _render(decoded.examples, source, renderer, heldout, account)
    for source in stage.replay.sources if isinstance(stage, SftStage) and stage.replay else []:
        decoded = _decode(source, "completion", account, "replay")
        _render(decoded.examples, source, renderer, replay, account)
    _refuse_empty(train, heldout, replay, stage, account)
    account.notes += _dropped_notes(account.ledger)
    account.notes += _duplicate_notes(train.examples, heldout.examples)
    if renderer.template.note and any(not isinstance(e.prompt, str) for e in (*train.examples, *heldout.examples)):
        account.notes.insert(0, renderer.template.note)
    return Prepared(train.trees, heldout.trees, replay.trees, heldout.examples, account.ledger, account.notes)


def read_examples(source: Source, method: str | None = None) -> Decoded:
    """A file's examples for one method (any, where None). Raises DataError for malformed rows and unfit formats."""
    decoded = to_examples(read_rows(source), source)
    if method is not None:
        _check_method(decoded, source, method)
    decoded.raise_bad(source.path)
    return decoded


def _check_method(decoded: Decoded, source: Source, method: str) -> None:
    if method == "completion" and decoded.format != "text":
        raise DataError(
            f"plain text is wanted here, but the file is in the format {decoded.format} ({decoded.reason})",
            where=source.path,
            remedy="Give a file with a `text` column, or train these rows in a stage with `method: sft`.",
        )
    wanted = NUM_ANSWERS[method]
    if decoded.num_answers == wanted:
        return
    if wanted == 2:
        raise DataError(
            f"{method} compares two answers, but the file has no `chosen` and `rejected`: "
            f"it is in the format {decoded.format} ({decoded.reason})",
            where=source.path,
            remedy=f"Formats with pairs: {', '.join(sorted(PAIRS))}. Rename with `columns`, or use `method: sft`.",
        )
    raise DataError(
        f"{method} trains one answer a row, but the file holds pairs: it is in the format {decoded.format} "
        f"({decoded.reason})",
        where=source.path,
        remedy="Use `method: dpo`; or, to train on the chosen answers, rename them: "
        "`columns: {answer: chosen}` with a `prompt` column.",
    )


def _decode(source: Source, method: str, account: _Account, split: Split) -> Decoded:
    decoded = read_examples(source, method)
    account.notes.append(f"{source.path}: format {decoded.format} ({decoded.reason}).")
    if decoded.unread:
        account.notes.append(f"{source.path}: columns not read: {', '.join(decoded.unread)}.")
    joined = sum(JOINED in example.tags for example in decoded.examples)
    if joined:
        account.notes.append(f"{source.path}: {joined} rows: two turns of one speaker in a row became one.")
    for dropped in decoded.dropped:
        account.enter(dropped.row, source, split, dropped=dropped.reason)
    return decoded


def _render(examples: Sequence[Example], source: Source, renderer: Renderer, side: _Side, account: _Account) -> None:
    """Renders one file's examples onto one side. Raises DataError where rows are malformed for the template."""
    rendered = renderer.render_many(examples)
    _raise_fatal(examples, rendered, source)
    for example, result in zip(examples, rendered, strict=True):
        if result.error is None:
            side.trees += result.trees
            side.examples.append(example)
            account.enter(example, source, side.split, trees=result.trees)
            continue
        account.enter(example, source, side.split, dropped=result.error.what)
        if result.error.num_tokens:
            side.too_long.append(result.error.num_tokens)
    notices = Counter(notice for result in rendered for notice in result.notices)
    account.notes += [f"{source.path}: {count} rows: {notice}." for notice, count in sorted(notices.items())]


def _raise_fatal(examples: Sequence[Example], rendered: Sequence[Rendered], source: Source) -> None:
    fatal: list[tuple[Example, RowError]] = [
        (example, result.error)
        for example, result in zip(examples, rendered, strict=True)
        if result.error is not None and result.error.fatal
    ]
    if not fatal:
        return
    lines = [f"  {example.id}: {error.what}" for example, error in fatal[:MAX_SHOWN]]
    more = [f"  ... and {len(fatal) - MAX_SHOWN} more"] if len(fatal) > MAX_SHOWN else []
    raise DataError(
        "\n".join([f"{len(fatal)} of {len(examples)} rows cannot be rendered:", *lines, *more]),
        where=source.path,
        remedy="Mend or delete these rows, or give another `chat_template`.",
    )


def _refuse_empty(
    train: _Side, heldout: _Side, replay: _Side, stage: SftStage | CompletionStage | DpoStage, account: _Account
) -> None:
    """Raises DataError where a side that the recipe asks for has no row left."""
    has_replay = isinstance(stage, SftStage) and stage.replay is not None
    for side, needed in ((train, True), (heldout, bool(stage.heldout)), (replay, has_replay)):
        if side.trees or not needed:
            continue
        entries = [entry for entry in account.ledger if entry.split == side.split]
        if not entries:
            raise DataError(
                f"no row is left for the {side.split} side: heldout_fraction {stage.heldout_fraction} took them all",
                where=f"stage {stage.name}",
                remedy="Lower `heldout_fraction`, or give more rows.",
            )
        reasons = Counter(entry.reason.partition(":")[0] for entry in entries)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        lengths = f"\n{histogram(side.too_long)}" if side.too_long else ""
        longest = max(side.too_long, default=0)
        remedy = f"`max_length: {longest}` keeps the over-long ones." if longest else "Give rows that can be trained."
        raise DataError(
            f"all {len(entries)} rows of the {side.split} side were dropped: {why}{lengths}",
            where=f"stage {stage.name}",
            remedy=remedy,
        )
    if stage.heldout_fraction and not heldout.trees:
        account.notes.append(f"WARNING: heldout_fraction {stage.heldout_fraction} held out no row.")


def histogram(lengths: Sequence[int]) -> str:
    """Row lengths in tokens, one line a power of two."""
    edges = (0, *HISTOGRAM_EDGES, max(*lengths, HISTOGRAM_EDGES[-1]) + 1)
    lines = []
    for low, high in pairwise(edges):
        count = sum(low < length <= high for length in lengths)
        if count:
            lines.append(f"    {low + 1:>6} to {min(high, max(lengths)):>6} tokens: {count} rows")
    return "\n".join(lines)


def _dropped_notes(entries: Sequence[LedgerEntry]) -> list[str]:
    """One loud line for each kind of reason that dropped rows, with the lengths of over-long ones."""
    dropped: dict[tuple[Split, str], list[LedgerEntry]] = {}
    for entry in entries:
        if entry.outcome == "dropped":
            dropped.setdefault((entry.split, entry.reason.partition(":")[0]), []).append(entry)
    notes = []
    for (split, reason), rows in sorted(dropped.items()):
        total = sum(entry.split == split for entry in entries)
        shown = ", ".join(f"{entry.id}{entry.reason.removeprefix(reason)}" for entry in rows[:3])
        more = ", ..." if len(rows) > 3 else ""
        notes.append(f"WARNING: {len(rows)} of {total} {split} rows dropped, {reason} ({shown}{more}).")
    return notes


def _duplicate_notes(train: Sequence[Example], heldout: Sequence[Example]) -> list[str]:
    """Exact duplicates among the training rows, and prompts that stand on both sides."""
    notes = []
    repeated = sum(count - 1 for count in Counter(_content(example) for example in train).values())
    if repeated:
        notes.append(f"{repeated} of {len(train)} training rows repeat an earlier one; all are trained.")
    prompts = {prompt_sha(example) for example in train}
    leaked = [example.id for example in heldout if prompt_sha(example) in prompts]
    if leaked:
        notes.append(
            f"WARNING: {len(leaked)} of {len(heldout)} held-out rows have a prompt that is also trained "
            f"({', '.join(leaked[:3])}{', ...' if len(leaked) > 3 else ''})."
        )
    return notes


def _content(example: Example) -> str:
    turns = [answer if isinstance(answer, str) else turns_json(answer) for answer in example.answers]
    return prompt_sha(example) + content_sha(turns)
