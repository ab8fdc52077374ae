"""The shapes that data takes on its way: row, example, tree.

In: nothing. Out: frozen records. Must not know: torch, files, tokenizers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tunesmith.errors import DataError

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Figures = npt.NDArray[np.float32]


class RowError(DataError):
    """One row cannot be trained as it stands.

    `fatal`: the row is malformed and stops the run; otherwise it is dropped and counted. What stands
    before the first colon of a reason is the same for all rows of a kind: the ledger groups by it.
    """

    def __init__(self, reason: str, *, where: str = "", fatal: bool = False, num_tokens: int = 0) -> None:
        super().__init__(reason, where=where)
        self.fatal = fatal
        self.num_tokens = num_tokens  # of an over-long row, for the histogram


@dataclass(frozen=True, slots=True)
class Row:
    """What the file held at one place. `id` is `file:line`, or `file[index]` for JSON arrays and tables."""

    id: str
    fields: Mapping[str, Json]
    sha: str  # sha256 of the fields as canonical JSON, so equal rows have equal hashes


@dataclass(frozen=True, slots=True)
class BadRow:
    """A malformed row: where it stands, which field, what was found there and what is wanted.

    `sha` is "" where the row could not even be read.
    """

    id: str
    field: str
    found: str
    wanted: str
    sha: str = ""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an assistant's turn makes; `arguments` is the text of a JSON object, keys in the file's order."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; role is system, user, assistant or tool.

    `reasoning` and `calls` belong to assistant turns, `name` and `call_id` to tool turns (whose answer it is).
    `weight` is the file's loss weight, None where it gives none.
    """

    role: str
    content: str
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    name: str = ""
    call_id: str = ""
    weight: float | None = None


Text = str
Conversation = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with k >= 1 answers, in messages or, for raw text, in strings; never mixed in one example.

    A prompt/answer pair of strings is trained as it stands, without a chat template.
    `value` is the bare answer that a comparison may look for; `accepted` are the answers it counts as exact.
    `tools` is the text of the JSON array of tools that the prompt offers, "" for none. `scores` holds one number
    an answer where the file gives them (higher is better), `label` whether the one answer is desirable (KTO), `weight`
    how much the row counts, where a stage reads that.
    """

    id: str
    sha: str
    prompt: Conversation | Text
    answers: tuple[Conversation, ...] | tuple[Text, ...]
    value: str | None = None
    accepted: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    tools: str = ""
    scores: tuple[float, ...] = ()
    label: bool | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """One answer in tokens: `ids` [B]; `trained` [B] says which tokens a loss reads.

    `weights` [B]: how much each of them counts, where the file gives fractions; None: 1 each.
    """

    ids: Ids
    trained: Mask
    weights: Figures | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """An example in tokens: the shared prompt `prompt_ids` [P] and its branches.

    P may be 0; then the first token of every branch has nothing before it, and is never trained.
    `scores` (one a branch, higher is better), `label` (is the answer desirable) and `weight` (how much the example
    counts) are the file's, for the methods that read them.
    """

    id: str
    prompt_ids: Ids
    branches: tuple[Branch, ...]
    scores: tuple[float, ...] = ()
    label: bool | None = None
    weight: float = 1.0

    @property
    def num_tokens(self) -> int:
        """Tokens that a forward pass computes: the prompt once, and every branch."""
        return len(self.prompt_ids) + sum(len(branch.ids) for branch in self.branches)

    @property
    def num_trained(self) -> int:
        """Tokens that a loss reads, over all branches."""
        return sum(int(branch.trained.sum()) for branch in self.branches)

    @property
    def num_unshared(self) -> int:
        """Tokens of the same rows without prefix sharing: the prompt once for every branch."""
        return sum(len(self.prompt_ids) + len(branch.ids) for branch in self.branches)

    def sha(self) -> str:
        """sha256 of tokens, masks and the file's figures: equal trees train equally, whatever file they came from."""
        digest = hashlib.sha256(np.int64(len(self.prompt_ids)).tobytes() + self.prompt_ids.astype("<i4").tobytes())
        for branch in self.branches:
            digest.update(np.int64(len(branch.ids)).tobytes())
            digest.update(branch.ids.astype("<i4").tobytes())
            digest.update(np.packbits(branch.trained).tobytes())
            if branch.weights is not None:
                digest.update(b"weights" + branch.weights.astype("<f4").tobytes())
        if self.scores or self.label is not None or self.weight != 1:
            digest.update(repr((self.scores, self.label, self.weight)).encode())
        return digest.hexdigest()
