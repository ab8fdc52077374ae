"""The recipe: every knob of a run, its bounds, unit, default and the reason for the default.

In: plain values as YAML gave them. Out: frozen, checked objects that the layers above read.
Must not know: torch, files, where a value came from (`load` and `explain` know that).

The docstring under a field is its documentation everywhere: in the JSON Schema, in
`tunesmith recipe explain` and in the editor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, GetJsonSchemaHandler, Tag
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

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


@dataclass(frozen=True, slots=True)
class Unit:
    """What a number counts; it shows in `explain` and, as `x-unit`, in the JSON Schema."""

    name: str

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "x-unit": self.name}


Examples = Annotated[int, Unit("examples")]
Prompts = Annotated[int, Unit("prompts")]
Rows = Annotated[int, Unit("rows")]
Tokens = Annotated[int, Unit("tokens")]
Words = Annotated[int, Unit("words")]
Steps = Annotated[int, Unit("steps")]
Passes = Annotated[int, Unit("passes")]
Checkpoints = Annotated[int, Unit("checkpoints")]
Threads = Annotated[int, Unit("threads")]
Workers = Annotated[int, Unit("processes")]
Resamples = Annotated[int, Unit("resamples")]
Share = Annotated[float, Unit("share")]


class Strict(BaseModel):
    """Unknown keys are errors, nothing is coerced, nothing changes after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Model(Strict):
    """The base model that the run starts from."""

    path: str = Field(min_length=1)
    """A folder with config.json and safetensors weights, a Hugging Face id, or `embedded:quickstart/model`."""
    revision: str | None = None
    """Commit of a Hugging Face model id; null takes the newest."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the frozen weights and the forward pass; auto: bfloat16 where the card has it, float32 on a CPU."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """nf4: 4-bit base weights with double quantization; int8: 8-bit base weights. Both need bitsandbytes and LoRA."""
    attention: Literal["auto", "varlen", "flex", "sdpa", "plain"] = "auto"
    """How a micro-batch attends; every choice is checked against the plain forward before it is used. varlen:
    flash-style kernels over spans; flex: FlexAttention, compiled; sdpa: a loop over spans, on every device; plain: one
    answer at a time through the model's own attention; auto: the fastest that passes here."""
    kernels: Literal["auto", "torch", "liger"] = "auto"
    """Kernels of norms, rotary embeddings and gated layers. liger: fused ones, on a GPU with liger-kernel installed;
    auto: liger where it is there and passes the check; torch: the model's own."""
    compile: bool = False
    """Compile the layers' elementwise parts (torch.compile): half a minute at the start, then faster steps."""
    chat_template: str | None = None
    """A Jinja file, or the built-in `plain` or `chatml`; null uses the model's own, and where it has none `chatml` if
    the tokenizer holds its tokens, else `plain`."""


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


def _percent(value: object) -> object:
    """`1%` means 0.01; everything else is left to the field's own check."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


Duration = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(s|m|h)$")]
"""A time such as 90s, 110m or 11.5h."""


def duration_seconds(text: str) -> float:
    """Seconds of a `Duration`."""
    return float(text[:-1]) * {"s": 1.0, "m": 60.0, "h": 3600.0}[text[-1]]


Percent = Annotated[float, BeforeValidator(_percent), Unit("share")]


class Replay(Strict):
    """Plain text trained beside the stage's own examples, so that the base knowledge stays."""

    sources: list[Source] = Field(min_length=1)
    """Files in the `text` format."""
    examples_per_step: Examples = Field(8, ge=1)
    """Replay rows added to every step; they come on top of `batch_size` and share the per-token mean."""


class Lora(Strict):
    """Low-rank adapters (Hu et al. 2021); the base stays frozen."""

    kind: Literal["lora"] = "lora"
    """Low-rank adapters."""
    r: int = Field(16, ge=1)
    """Rank."""
    alpha: float = Field(32.0, gt=0)
    """The adapter's output is scaled by alpha / r."""
    dropout: Share = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input; 0 keeps runs independent of how micro-batches are split."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Module names that get an adapter; all-linear: every linear layer but the LM head."""


class Full(Strict):
    """Every weight is trained, in float32."""

    kind: Literal["full"] = "full"
    """All weights."""


def _tuning_kind(value: object) -> object:
    """`tuning: {r: 32}` means LoRA, as an absent `tuning` does."""
    if isinstance(value, Lora | Full):
        return value.kind
    return value.get("kind", "lora") if isinstance(value, Mapping) else None


Tuning = Annotated[Annotated[Lora, Tag("lora")] | Annotated[Full, Tag("full")], Discriminator(_tuning_kind)]


class StageBase(Strict):
    """What every stage has."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")
    """Folder name of the stage in the run."""
    start: str = Field("previous", min_length=1)
    """previous: the stage before, or the base; base: the base; else an adapter, model or run folder (`runs/x`,
    `runs/x:sft`)."""
    train: list[Source] = Field(min_length=1)
    """Training rows."""
    heldout: list[Source] = Field(default_factory=list)
    """Rows that are evaluated and never trained."""
    heldout_fraction: Share = Field(0.0, ge=0, lt=1)
    """Share of the training rows moved to the held-out side, chosen by content hash."""
    max_length: Tokens = Field(2048, ge=2)
    """Longest prompt + answer in tokens; `too_long` says what becomes of longer rows."""
    too_long: Literal["drop", "truncate_prompt_start", "truncate_answer", "split", "stop"] = "drop"
    """drop: longer rows are left out, counted and listed; truncate_prompt_start: the oldest turns of the prompt are
    left out (the system message stays); truncate_answer: the last turns of the answer are left out; split (plain text
    only): the text goes on in another row; stop: the run stops. A turn is never cut in half."""
    on_bad_row: Literal["stop", "drop"] = "stop"
    """Malformed rows: stop the run with up to 20 of them shown, or drop and count them up to `max_bad_rows`."""
    max_bad_rows: Percent = Field(0.01, ge=0, le=1)
    """Share of malformed rows past which the run stops even with `on_bad_row: drop`; a number or a percentage."""
    duplicates: Literal["keep", "merge"] = "keep"
    """Exact repetitions of a training row: trained each time and reported, or merged into the first."""
    epochs: Passes = Field(1, ge=1)
    """Passes over the training rows."""
    max_steps: Steps | None = Field(None, ge=1)
    """Stop after this many steps; null: `epochs` decide. The schedule spans the steps that are run."""
    batch_size: Examples = Field(16, ge=1)
    """Examples an update, over all micro-batches; micro-batches never change the result."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up: down to 0 along a cosine or a line, or kept."""
    warmup_fraction: Share = Field(0.03, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled decay, on matrices only."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the gradient's running square."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this global norm; 0 switches clipping off."""
    tuning: Tuning = Field(default_factory=Lora)
    """Which weights are trained."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW, its moments in float32 or in 8 bits (Dettmers et al. 2021); paged: moments move to the host's memory when
    the card is full. All but adamw need bitsandbytes."""
    gradient_checkpointing: Literal["none", "selective", "full"] | None = None
    """Recompute activations in the backward pass. full: of every layer, about a third more time, least memory;
    selective: of a layer's cheap parts; none: nothing; null: the first of none, selective and full that fits."""
    offload_activations: bool = False
    """Keep activations in the host's memory between forward and backward: less memory on the card, more time. Of layers
    that are recomputed only the inputs move."""
    forest_tokens: Tokens | None = Field(None, ge=1)
    """Tokens of a micro-batch; null: what fits, found by a trial on the longest rows. It cannot change the result,
    only time and memory."""
    eval_every: Steps = Field(0, ge=0)
    """Steps between evaluations on the held-out rows; 0: only at the end."""
    save_every: Steps = Field(100, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: Checkpoints = Field(2, ge=1)
    """Newest checkpoints kept, beside the best."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop the run, or leave the update out, up to `max_nonfinite` times. Either
    way the rows and a reproducer are written down. (Overflows of float16 are not meant: the loss scale has them.)"""
    max_nonfinite: Steps = Field(3, ge=1)
    """Steps of the stage that `on_nonfinite: skip` may leave out before the run stops after all."""
    keep: Literal["final", "best"] = "final"
    """The stage's result: its last step, or the step with the lowest held-out loss."""


class SftStage(StageBase):
    """Supervised fine-tuning: the answers' tokens are trained."""

    method: Literal["sft"] = "sft"
    """Supervised fine-tuning on answers."""
    train_on: Literal["assistant", "last_assistant", "all", "weights"] = "assistant"
    """Which turns of a conversation are trained: every assistant turn, the last one, every token, or the assistant
    turns to which the rows give a weight of 1."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate. 2e-4 suits LoRA; full fine-tuning wants about a tenth of it."""
    replay: Replay | None = None
    """Plain text mixed into every step."""


class CompletionStage(StageBase):
    """Continued pre-training: every token of a text is trained."""

    method: Literal["completion"] = "completion"
    """Every token of plain text."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate. 2e-4 suits LoRA; full fine-tuning wants about a tenth of it."""


class DpoStage(StageBase):
    """Direct preference optimization (Rafailov et al. 2023)."""

    method: Literal["dpo"] = "dpo"
    """Chosen over rejected, against the policy at the stage's start."""
    learning_rate: float = Field(5e-6, gt=0)
    """Peak learning rate. DPO diverges at the rates that suit SFT; 5e-6 is safe with LoRA."""
    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to the reference: higher holds it closer."""
    label_smoothing: Share = Field(0.0, ge=0, lt=0.5)
    """Assumed share of flipped preferences (conservative DPO)."""


Stage = Annotated[SftStage | CompletionStage | DpoStage, Field(discriminator="method")]


class Style(Strict):
    """A rule that says whether an answer is written in the preferred style."""

    description: str
    """What the rule means, in words; printed in the report."""
    pattern: str = Field(min_length=1)
    """Python regular expression that the whole answer, stripped, must match."""
    max_words: Words | None = Field(None, ge=1)
    """Longest answer that still counts, in words."""


class Compare(Strict):
    """What is measured on every stage after the run."""

    prompts: list[Source] = Field(default_factory=list)
    """Held-out prompts with their answers; empty: the first SFT stage's held-out rows, else the prompts of the last
    stage's."""
    preferences: list[Source] = Field(default_factory=list)
    """Held-out pairs; empty: the last preference stage's held-out rows."""
    num_prompts: Prompts = Field(200, ge=1)
    """Prompts to generate on, from the start of the files."""
    num_shown: Prompts = Field(20, ge=0)
    """Prompts shown side by side in the report."""
    max_new_tokens: Tokens = Field(128, ge=1)
    """Longest generated answer, in tokens."""
    batch_size: Prompts = Field(32, ge=1)
    """Prompts generated at a time."""
    temperature: float = Field(0.7, gt=0)
    """Of the sampled answers that the style share is measured on."""
    style: Style | None = None
    """The preferred style; null leaves the style share out."""
    bootstrap_samples: Resamples = Field(2000, ge=100)
    """Resamples behind each confidence interval."""


class Recipe(Strict):
    """A run: a base model, the stages it goes through, and how the results are compared."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,80}$")
    """Folder name of the run."""
    model: Model
    """The base."""
    stages: list[Stage] = Field(min_length=1)
    """Run in this order."""
    compare: Compare = Field(default_factory=Compare)
    """What is measured at the end."""
    seed: int = Field(0, ge=0)
    """Every random draw is keyed by it."""
    runs_folder: str = Field("runs", min_length=1, pattern=r"^[^\x00]+$")
    """Where run folders are made, relative to the working directory."""
    memory: str = Field("auto", pattern=r"^(auto|fixed|[0-9]+(\.[0-9]+)?(GB|GiB))$")
    """auto: whatever a stage leaves open (`forest_tokens`, `gradient_checkpointing`) is chosen so that it fits the
    device; a size such as 16GB: so that it fits that much; fixed: nothing is chosen or tried."""
    threads: Threads = Field(0, ge=0)
    """CPU threads; 0 takes every core this process may use."""
    data_workers: Workers = Field(0, ge=0)
    """Processes that prepare rows; 0 takes one a core where there are enough rows for it to pay. It cannot change the
    result."""
    save_before: Duration | None = None
    """For machines with a time limit: finish the step, save and stop so long after the command began (110m); the same
    command goes on. null: no limit."""
    stop_within: Duration = "30s"
    """Longest time from a signal (SIGTERM, SIGINT, SIGUSR1) to the end of the process: the step is finished and saved
    if that fits, else the newest checkpoint stands."""
