"""The tokens of a layout: ids of each part, found in two ways, decoded and compared with the text.

In: layouts, their texts tokenized. Out: trees; or RowError with the offending tokens where no ids write the text.
Must not know: templates, limits on length, files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np

from tunesmith.data.layout import Layout, Part
from tunesmith.data.tokens import MARK, Codec, Encoded, says
from tunesmith.data.turns import NOTHING, Chosen
from tunesmith.data.types import Branch, Conversation, Ids, RowError, Tree

MERGED = "a token would reach across a turn's edge: its parts were tokenized one by one"
SPELLED = "a message spells control tokens: they were tokenized as ordinary text"
RAW_CONTROL = "raw text spells control tokens: they were tokenized as such, as the tokenizer's own call does"
EQUAL = "chosen equals rejected"

Notices = set[str]
Piece = list[int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example's trees, or the error that it gave; and what was noticed on the way.

    `trimmed` says what was left out so that it fits, "" for nothing; `num_tokens` is the length before that
    (prompt and longest answer; 0 where it is not known).
    """

    trees: tuple[Tree, ...] = ()
    error: RowError | None = None
    notices: tuple[str, ...] = ()
    trimmed: str = ""
    num_tokens: int = 0


@dataclass(slots=True)
class Draft:
    """A tree on its way: the ids of its prompt and of each part of each branch; `merged`: tokenized one by one."""

    tree_id: str
    layout: Layout
    prompt_ids: Piece
    branches: list[list[Piece]]
    merged: bool = False
    error: RowError | None = None

    @property
    def num_tokens(self) -> int:
        """The prompt and the longest branch."""
        extra = 1 if self.layout.raw else 0  # the end-of-text token
        return len(self.prompt_ids) + max(sum(map(len, pieces)) for pieces in self.branches) + extra


def texts_of(layout: Layout) -> Iterator[str]:
    """Every text that a tree is tokenized from."""
    yield layout.prompt
    for parts in layout.branches:
        yield from (part.text for part in parts) if layout.raw else _prefixes(layout.prompt, parts)


def _prefixes(prompt: str, parts: tuple[Part, ...]) -> list[str]:
    """The render up to the end of the prompt, and to the end of every part; the last is the whole."""
    return list(accumulate((part.text for part in parts), initial=prompt))


def draft_of(codec: Codec, tree_id: str, layout: Layout, encoded: dict[str, Encoded]) -> Draft:
    """The ids of a layout's parts, not yet compared with their texts."""
    prompt = encoded[layout.prompt].ids
    if layout.raw:
        alone = codec.additive or not layout.prompt
        branches = [[encoded[part.text].ids if alone else codec.continuation(part.text)] for (part,) in layout.branches]
        # The end-of-text token is added once: here it is taken from a text that has it already.
        branches = [[ids[:-1] if ids[-1:] == [codec.eos_id] else ids] for (ids,) in branches]
        return Draft(tree_id, layout, [*codec.head_ids, *prompt], branches)
    found = [
        _pieces_of_whole(layout.prompt, parts, [encoded[text] for text in _prefixes(layout.prompt, parts)])
        for parts in layout.branches
    ]
    merged = any(pieces is None for pieces in found)
    pairs = zip(found, layout.branches, strict=True)
    pieces = [_alone(codec, parts) if each is None else each for each, parts in pairs]
    return Draft(tree_id, layout, prompt, pieces, merged)


def _pieces_of_whole(prompt: str, parts: tuple[Part, ...], prefixes: list[Encoded]) -> list[Piece] | None:
    """The ids of each part within the whole render, where both ways of finding the edges agree; else None."""
    whole = prefixes[-1].ids
    places = list(accumulate((len(part.text) for part in parts), initial=len(prompt)))
    by_offsets = [*(prefixes[-1].cut(place) for place in places[:-1]), len(whole)]
    by_prefixes = [len(prefix.ids) if whole[: len(prefix.ids)] == prefix.ids else None for prefix in prefixes]
    if by_offsets != by_prefixes or None in by_offsets:
        return None
    edges = [edge for edge in by_offsets if edge is not None]
    return [whole[start:end] for start, end in pairwise(edges)]


def _alone(codec: Codec, parts: tuple[Part, ...]) -> list[Piece]:
    return [codec.continuation(part.text) for part in parts]


# --- decoded and compared


def check_drafts(codec: Codec, drafts: Sequence[Draft]) -> None:
    """Decodes every trained part of every draft and compares it with its text.

    A draft that does not write its text is tokenized part by part; if that does not either, it gets an error.
    """
    failed = [draft for draft in drafts if not _written(codec, [draft])] if not _written(codec, drafts) else []
    for draft in failed:
        if not draft.layout.raw:
            draft.merged = True
            draft.branches = [_alone(codec, parts) for parts in draft.layout.branches]
        draft.error = _not_written(codec, draft)


def _written(codec: Codec, drafts: Sequence[Draft]) -> bool:
    claims = [claim for draft in drafts for claim in _claims(draft)]
    for continues in (False, True):
        chosen = [(ids, text) for ids, text, each in claims if each == continues]
        decoded = codec.decode_many([ids for ids, _ in chosen], continues=continues)
        if not all(says(found, text) for found, (_, text) in zip(decoded, chosen, strict=True)):
            return False
    return True


def _claims(draft: Draft) -> Iterator[tuple[Piece, str, bool]]:
    """Ids, the text that they should write, and whether they stand after others."""
    layout = draft.layout
    for parts, pieces in zip(layout.branches, draft.branches, strict=True):
        for part, ids in zip(parts, pieces, strict=True):
            if part.trained or layout.whole:
                yield ids, part.text, bool(layout.prompt) or not layout.raw
    if layout.whole and layout.prompt and not layout.raw:
        yield draft.prompt_ids, layout.prompt, False


def _not_written(codec: Codec, draft: Draft) -> RowError | None:
    for ids, text, continues in _claims(draft):
        found, wanted = codec.decode(ids, continues=continues), text.replace(MARK, "")
        if draft.layout.raw and wanted.startswith(found) and wanted[len(found) :] == codec.eos_text:
            continue
        if not says(found, text):
            place = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), 0)
            around = slice(max(0, place - 10), place + 20)
            tokens = " ".join(codec.spell(ids, place))
            return RowError(
                f"the tokenizer cannot write the answer: {wanted[around]!r} comes back as {found[around]!r}, "
                f"by the tokens {tokens}"
            )
    return None


# --- trees


def to_tree(codec: Codec, draft: Draft, sanitize: bool, notices: Notices, ends: Callable[[int], bool]) -> Tree:
    """The tree of a checked draft. Raises RowError where an invariant does not hold.

    `ends` says whether generation stops at a token: every trained turn must end by such a one.
    """
    if draft.error is not None:
        raise draft.error
    if draft.merged:
        notices.add(MERGED)
    if draft.layout.raw:
        return _raw_tree(codec, draft, notices)
    _check_controls(codec, draft, sanitize, notices)
    prompt_ids = np.array(draft.prompt_ids, dtype=np.int32)
    branches = []
    for parts, pieces in zip(draft.layout.branches, draft.branches, strict=True):
        for part, piece in zip(parts, pieces, strict=True):
            if part.trained and not ends(piece[-1]):
                raise RowError(f"a turn ends by token {piece[-1]}, at which generation would not stop", fatal=True)
        ids = np.array([token_id for piece in pieces for token_id in piece], dtype=np.int32)
        lengths = [len(piece) for piece in pieces]
        trained = np.repeat([part.trained for part in parts], lengths)
        is_plain = all(part.weight in (0, 1) for part in parts)
        weights = None if is_plain else np.repeat([part.weight for part in parts], lengths).astype(np.float32)
        branches.append(Branch(ids, trained, weights))
    if codec.bos_id is not None and [*draft.prompt_ids[:2], *branches[0].ids[:2].tolist()][:2] == [codec.bos_id] * 2:
        raise RowError("the text begins with two BOS tokens", fatal=True)
    tree = Tree(draft.tree_id, prompt_ids, tuple(branches))
    return _whole(codec, tree) if draft.layout.whole else tree


def _check_controls(codec: Codec, draft: Draft, sanitize: bool, notices: Notices) -> None:
    """No control token may come from a row's own text."""
    layout = draft.layout
    prompt = codec.num_controls(draft.prompt_ids), codec.num_controls_spelled(layout.prompt)
    for parts, pieces in zip(layout.branches, draft.branches, strict=True):
        text = "".join(part.text for part in parts)
        if MARK in text or MARK in layout.prompt:
            notices.add(SPELLED)
        num = prompt[0] + sum(codec.num_controls(piece) for piece in pieces)
        if sanitize and num > prompt[1] + codec.num_controls_spelled(text):
            raise RowError("the text becomes a control token when the tokenizer normalizes it", fatal=True)


def _raw_tree(codec: Codec, draft: Draft, notices: Notices) -> Tree:
    """Raw text: prompt and answers each by itself, the end-of-text token after every answer."""
    branches = []
    for (part,), (ids,) in zip(draft.layout.branches, draft.branches, strict=True):
        if codec.head_ids and [*draft.prompt_ids, *ids][:2] == codec.head_ids * 2:
            raise RowError("the text begins with the BOS token, and the tokenizer adds another", fatal=True)
        if codec.spells_control(draft.layout.prompt) or codec.spells_control(part.text):
            notices.add(RAW_CONTROL)
        branches.append(_text_branch([*ids, codec.eos_id], bool(draft.prompt_ids)))
    tree = Tree(draft.tree_id, np.array(draft.prompt_ids, dtype=np.int32), tuple(branches))
    return _whole(codec, tree) if draft.layout.whole else tree


def text_tree(tree_id: str, head: Piece, ids: Piece) -> Tree:
    """Plain text in tokens, every one trained; nothing predicts the very first token of a text."""
    return Tree(tree_id, np.array(head, dtype=np.int32), (_text_branch(ids, bool(head)),))


def _text_branch(ids: Piece, has_prompt: bool) -> Branch:
    trained = np.ones(len(ids), dtype=np.bool_)
    trained[0] = has_prompt
    return Branch(np.array(ids, dtype=np.int32), trained)


def _whole(codec: Codec, tree: Tree) -> Tree:
    """The tree with its prompt among the trained tokens; only the BOS stays before them."""
    begins = bool(codec.bos_id is not None and tree.prompt_ids[:1].tolist() == [codec.bos_id])
    rest = tree.prompt_ids[int(begins) :].tolist()
    branches = tuple(_text_branch([*rest, *branch.ids.tolist()], begins) for branch in tree.branches)
    return replace(tree, prompt_ids=tree.prompt_ids[: int(begins)], branches=branches)


def with_prompt(tree: Tree, prompt_ids: Sequence[int]) -> Tree:
    """The tree after another prompt."""
    ids: Ids = np.array(prompt_ids, dtype=np.int32)
    return replace(tree, prompt_ids=ids)


def checked(tree: Tree, when: str = "") -> Tree:
    """The tree. Raises RowError where nothing is trained, or all answers are the same."""
    if any(not branch.trained.any() for branch in tree.branches):
        raise RowError(NOTHING)
    first, *others = tree.branches
    if others and all(np.array_equal(first.ids, other.ids) for other in others):
        raise RowError(EQUAL + when)
    return tree


def turn_by_turn(chosen: Chosen) -> list[Chosen]:
    """Each trained turn of the one answer by itself, with all that stands before it as its prompt."""
    messages: Conversation = (*chosen.prompt, *chosen.answers[0])
    places = [i for i in range(len(chosen.prompt), len(messages)) if messages[i].role == "assistant"]
    weights = zip(places, chosen.weights[0], strict=True)
    return [Chosen(messages[:i], ((messages[i],),), ((weight,),)) for i, weight in weights if weight]
