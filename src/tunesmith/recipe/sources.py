"""Where rows come from: the sources of a stage.

In: plain values. Out: frozen, checked sources. Must not know: files, stages.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunesmith.recipe.values import Examples, Rows, Strict

FormatName = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "question_answer",
    "prompt_completion",
    "text",
    "preference",
    "transcripts",
    "preferred_output",
    "ranked",
    "labeled",
]


class Source(Strict):
    """One source of rows: a file, a folder or pattern of files, or a Hugging Face data set."""

    path: str = Field(min_length=1)
    """A .jsonl, .json (both also .gz and .zst), .parquet, .csv, .tsv, .txt or .md file; a folder or a pattern
    (`data/*.jsonl`) of them; a folder that `datasets` saved; a Hugging Face data set id (`org/name`); or
    `embedded:quickstart/NAME`. Paths are relative to the working directory."""
    config: str | None = None
    """Configuration of a Hugging Face data set; null where it has only one."""
    split: str | None = None
    """Split of a data set, with an optional slice (`train[:5000]`); null takes `train`."""
    revision: str | None = None
    """Commit of a Hugging Face data set; null takes the newest, which the run's manifest then names."""
    format: FormatName = "auto"
    """The shape of the rows; auto detects it from the rows and prints the decision."""
    render: Literal["auto", "chat", "text"] = "auto"
    """chat: string prompts and answers become user and assistant turns; text: they are trained as they stand;
    auto: text for plain text and prompt/completion strings, chat for the rest."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames, wanted name to the file's name: `{prompt: question}` reads the column `question` as `prompt`."""
    limit: Rows | None = Field(None, ge=1)
    """Rows to read from the start of the source; null reads all."""
    weight: float | None = Field(None, gt=0)
    """Share of this source in an epoch, relative to the stage's other sources; null (in all of them): every row is
    trained. The source that is shortest for its weight is taken whole, of the others rows are left out, by content
    hash."""
    sanitize: bool = True
    """Control tokens that a row's text spells become ordinary text; false lets rows write control tokens."""


class Replay(Strict):
    """Plain text trained beside the stage's own examples, so that the base knowledge stays."""

    sources: list[Source] = Field(min_length=1)
    """Files in the `text` format."""
    examples_per_step: Examples = Field(8, ge=1)
    """Replay rows added to every step; they come on top of `batch_size` and share the per-token mean."""
