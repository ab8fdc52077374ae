"""A stage: what all of them have, and the supervised ones.

In: plain values. Out: frozen, checked settings. Must not know: files, models, what a method computes.

The docstring under a field is its documentation everywhere: in the JSON Schema, in `tunesmith recipe explain` and in
the editor.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tunesmith.recipe.sources import Replay, Source
from tunesmith.recipe.tuning import Lora, Optimizer, Tuning
from tunesmith.recipe.values import Checkpoints, Examples, Passes, Percent, Prompts, Share, Steps, Strict, Tokens

RowKind = Literal["text", "answers", "pairs", "labels", "rankings"]
"""What a method trains on: plain texts, one answer a prompt, two of which one is chosen, one with a label whether it is
desirable, or several that are ranked."""


class Samples(Strict):
    """Answers that are drawn at every evaluation; figures of them stand in eval.jsonl as `sample_...`."""

    num_prompts: Prompts = Field(8, ge=0)
    """Held-out prompts that are answered, the same each time; 0: none."""
    max_new_tokens: Tokens = Field(64, ge=1)
    """Longest answer; one that has not ended by then counts as truncated."""
    temperature: float = Field(1.0, ge=0)
    """Temperature of the draws; 0: the likeliest token. Only at 1 is `sample_kl` an estimate of the KL."""


class StageBase(Strict):
    """What every stage has. `rows` says what a row holds for it; `makes_policy`: its result answers prompts."""

    rows: ClassVar[RowKind] = "answers"
    makes_policy: ClassVar[bool] = True

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")
    """Folder name of the stage in the run."""
    method: str
    """What the stage does."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    start: str = Field("previous", min_length=1)
    """previous: the stage before (a reward model is passed over), or the base; base: the base; else an adapter, model
    or run folder (`runs/x`, `runs/x:sft`)."""
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
    optimizer: Optimizer = "adamw"
    """adamw: its moments in float32; adamw_8bit: in 8 bits (Dettmers et al. 2021); paged ones: moments move to the
    host's memory when the card is full; adafactor: of a matrix one running square a row and a column (Shazeer and Stern
    2018); muon: matrices move along orthogonal directions, their steps as long as AdamW's, and AdamW has embeddings,
    head and vectors (Jordan 2024); lion: the sign of one running mean (Chen et al. 2023), wants about a fifth of
    AdamW's rate; schedule_free: AdamW on an average of its steps in place of a schedule (Defazio et al. 2024). 8-bit,
    paged and lion need bitsandbytes (`gpu`), schedule_free the package schedulefree (`optimizers`)."""
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
    samples: Samples | None = None
    """Answers that are drawn at every evaluation, to see length, repetition, language and KL move; null: `{}` (its
    defaults) in preference stages that set `eval_every`, none in others."""
    save_every: Steps = Field(100, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: Checkpoints = Field(2, ge=1)
    """Newest checkpoints kept, beside the best."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop the run, or leave the update out, up to `max_nonfinite` times. Either
    way the rows and a reproducer are written down. (Overflows of float16 are not meant: the loss scale has them.)"""
    max_nonfinite: Steps = Field(3, ge=1)
    """Steps of the stage that `on_nonfinite: skip` may leave out before the run stops after all."""
    on_diagnosis: Literal["warn", "stop", "rollback"] = "warn"
    """What a problem in the curves leads to (`tunesmith diagnose` lists them): warn says it; stop saves and ends the
    run with exit code 4; rollback ends the stage with its best checkpoint from before the problem as the result."""
    keep: Literal["final", "best"] = "final"
    """The stage's result: its last step, or the step that was best on the held-out rows by `best_metric`."""
    best_metric: str = Field("loss", pattern=r"^[a-z0-9_]+$")
    """Figure of the evaluations (eval.jsonl) by which `keep: best` and `patience` judge: loss, accuracy, margin, ..."""
    best_mode: Literal["min", "max"] | None = None
    """Whether that figure is to be low or high; null: as is known of it."""
    patience: int = Field(0, ge=0)
    """End the stage after this many evaluations in a row without improvement; 0: never."""
    min_improvement: float = Field(0.0, ge=0)
    """An evaluation has improved if the figure is better by more than this than at the last improvement."""


class SupervisedStage(StageBase):
    """What the supervised stages share."""

    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate. 2e-4 suits LoRA; full fine-tuning wants about a tenth of it."""
    label_smoothing: Share = Field(0.0, ge=0, lt=1)
    """Share of each target that is spread evenly over the vocabulary (Szegedy et al. 2016); 0: none."""
    neftune_alpha: float = Field(0.0, ge=0)
    """Strength of uniform noise on the embeddings while training (NEFTune, Jain et al. 2023); 5 is usual, 0: none."""


class SftStage(SupervisedStage):
    """Supervised fine-tuning: the answers' tokens are trained."""

    method: Literal["sft"] = "sft"
    """Supervised fine-tuning on answers."""
    train_on: Literal["assistant", "last_assistant", "all", "weights"] = "assistant"
    """Which turns of a conversation are trained: every assistant turn, the last one, every token, or the assistant
    turns by the weights that the rows give them: 0 is not trained, and the tokens of a turn of 0.5 count half."""
    replay: Replay | None = None
    """Plain text mixed into every step."""


class CompletionStage(SupervisedStage):
    """Continued pre-training: every token of a text is trained."""

    rows: ClassVar[RowKind] = "text"

    method: Literal["completion"] = "completion"
    """Every token of plain text."""
