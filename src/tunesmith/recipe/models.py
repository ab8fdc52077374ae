"""The recipe: every knob of a run, its bounds, unit, default and the reason for the default.

In: plain values as YAML gave them. Out: frozen, checked objects that the layers above read.
Must not know: torch, files, where a value came from (`load` and `explain` know that).

The docstring under a field is its documentation everywhere: in the JSON Schema, in
`tunesmith recipe explain` and in the editor.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.recipe.preferences import (
    AlphapoStage,
    AotStage,
    AotUnpairedStage,
    ApoDownStage,
    ApoZeroStage,
    BcoStage,
    BcoUnpairedStage,
    BestAgainstRestStage,
    CpoStage,
    DiscopopStage,
    DpoStage,
    ExoStage,
    HingeStage,
    IpoStage,
    KtoStage,
    MixtureStage,
    NcaStage,
    OrpoStage,
    PlackettLuceStage,
    RewardStage,
    RobustDpoStage,
    SigmoidNormStage,
    SimpoStage,
    SppoStage,
)
from tunesmith.recipe.sources import FormatName, Replay, Source
from tunesmith.recipe.stages import CompletionStage, SftStage, StageBase
from tunesmith.recipe.tuning import Full, Lora, Tuning
from tunesmith.recipe.values import (
    Duration,
    Prompts,
    Resamples,
    Strict,
    Threads,
    Tokens,
    Unit,
    Words,
    Workers,
    duration_seconds,
)

__all__ = [
    "Compare",
    "CompletionStage",
    "DpoStage",
    "FormatName",
    "Full",
    "Lora",
    "Model",
    "Recipe",
    "Replay",
    "SftStage",
    "Source",
    "Stage",
    "StageBase",
    "Strict",
    "Style",
    "Tuning",
    "Unit",
    "duration_seconds",
]


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


SupervisedStage = SftStage | CompletionStage
PairStage = (
    DpoStage
    | RobustDpoStage
    | HingeStage
    | IpoStage
    | ExoStage
    | NcaStage
    | BcoStage
    | SppoStage
    | AotStage
    | AotUnpairedStage
    | ApoZeroStage
    | ApoDownStage
    | DiscopopStage
    | SigmoidNormStage
    | MixtureStage
    | OrpoStage
    | SimpoStage
    | CpoStage
    | AlphapoStage
)
OtherStage = KtoStage | BcoUnpairedStage | PlackettLuceStage | BestAgainstRestStage | RewardStage
Stage = Annotated[SupervisedStage | PairStage | OtherStage, Field(discriminator="method")]


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
