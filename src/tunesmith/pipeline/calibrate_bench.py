"""What the probes of a calibration share, and a probe: the stage's own training over fewer steps, from the start.

In: a recipe's stage whose earlier stages are finished. Out: a bench that trains and measures at one pair of values.
Must not know: which pairs are tried, and what is made of them.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.plan import num_steps
from tunesmith.data.store import Chosen, Joined
from tunesmith.data.types import Branch, Tree
from tunesmith.engine.engine import Engine
from tunesmith.engine.parity import checked_engine
from tunesmith.engine.reference import default_cache_folder, reference_logprobs
from tunesmith.errors import NumericsError, RecipeError
from tunesmith.model.fingerprint import weights_sha
from tunesmith.model.kernels import apply_kernels
from tunesmith.model.load import forward_dtype
from tunesmith.model.machine import Machine
from tunesmith.model.policy import Weights, policy_for_training
from tunesmith.objectives import objective_of
from tunesmith.pipeline.calibrate_search import Limits, Place, Probe, figures_of, probe_line, values_at
from tunesmith.pipeline.memory import plan_stage_memory
from tunesmith.pipeline.prepare import prepare_run
from tunesmith.pipeline.starts import start_weights
from tunesmith.recipe.models import Recipe, Stage
from tunesmith.recipe.preferences import PreferenceStage
from tunesmith.runs.folder import RunFolder, StageFolder
from tunesmith.runs.records import read_records
from tunesmith.sample.generate import generate
from tunesmith.train.loop import References, train_stage
from tunesmith.train.modes import Checkpointing, eval_mode
from tunesmith.train.optim import trainable_parameters
from tunesmith.train.precision import autocast_of
from tunesmith.train.progress import Silent
from tunesmith.train.step import Batch, score

FULL_LIMITS = Limits(kl=10.0, fall=0.1)
"""Of a whole stage: the budget of KL that the diagnoses have, too; and a token of a chosen answer may become a tenth
less likely (e^-0.1 = 0.905)."""
FEWEST_STEPS, SHARE_OF_STEPS = 20, 0.25
"""A probe is a quarter of the stage, but no fewer steps than a warm-up and a fall of the rate need to show."""
MOST_HELDOUT = 256
"""Held-out rows of a probe: their accuracy has a standard error of at most 3 %."""
HELDOUT_FRACTION = 0.1
"""Of the training rows, where the recipe holds none out."""
NUM_PROMPTS, MAX_NEW_TOKENS = 32, 64
"""Sampled answers that the KL is estimated on."""
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """Everything that the probes share. start: the trained weights at the stage's start, in the host's memory."""

    engine: Engine
    stage: Stage
    beta: float | None
    train: Sequence[Tree]
    heldout: Sequence[Tree]
    replay: Sequence[Tree]
    references: References | None
    start: Mapping[str, Tensor]
    stop_ids: Sequence[int]
    forest_tokens: int
    limits: Limits
    num_steps: int
    stage_steps: int
    seed: int
    machine: Machine
    folder: Path
    tell: Tell

    def probe(self, place: Place) -> Probe:
        """Train from the start with the settings of a place, and measure."""
        began = time.monotonic()
        rate, beta = values_at(place, learning_rate=self.stage.learning_rate, beta=self.beta)
        update = {"learning_rate": rate, **({} if beta is None else {"beta": beta})}
        self._reset()
        try:
            with tempfile.TemporaryDirectory(dir=self.folder, prefix="probe-") as temporary:
                figures = self._figures(self.stage.model_copy(update=update), StageFolder(Path(temporary)), beta)
        except NumericsError as error:
            figures, problem = {}, error.what.splitlines()[0][:200]
        else:
            loss = figures["loss"]
            problem = "" if loss is not None and math.isfinite(loss) else "the held-out loss is no number"
        seconds = time.monotonic() - began
        made = Probe(place, rate, beta, seconds, problem=problem, **({} if problem else figures))  # type: ignore[arg-type]
        self.tell(f"{probe_line(made, self.limits, is_best=False)}  ({seconds:.1f} s)")
        return made

    def _figures(self, stage: Stage, folder: StageFolder, beta: float | None) -> dict[str, float | int | None]:
        train_stage(
            engine=self.engine,
            stage=stage,
            objective=objective_of(stage),
            train=self.train,
            heldout=self.heldout,
            replay=self.replay,
            references=self.references,
            folder=folder,
            seed=self.seed,
            machine=self.machine,
            observer=Silent(),
            forest_tokens=self.forest_tokens,
        )
        records = read_records(folder.eval_path)
        return {**figures_of(records[0], records[-1], beta=beta), "kl": self._kl()}

    def _kl(self) -> float | None:
        """Mean log-ratio of the policy's own answers to the stage's start, nats an answer: an estimate of the KL.

        The weights are those of the start afterwards.
        """
        if not self.stage.makes_policy or not isinstance(self.stage, PreferenceStage):
            return None
        trees = list(self.heldout[:NUM_PROMPTS])
        prompts = [tree.prompt_ids.tolist() for tree in trees if len(tree.prompt_ids)]
        if not prompts:
            return None
        answers = generate(
            self.engine.model,
            prompts,
            max_new_tokens=MAX_NEW_TOKENS,
            stop_ids=self.stop_ids,
            temperature=1.0,
            seed=self.seed,
        )
        sampled = [
            _answered(f"sample {number}", prompt, answer.all_ids)
            for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        policy = self._scored(sampled)
        self._reset()
        return (policy - self._scored(sampled)) / len(sampled)

    def _scored(self, trees: Sequence[Tree]) -> float:
        with eval_mode(self.engine.model):
            logprob_N = score(self.engine, Batch(trees), forest_tokens=self.forest_tokens, machine=self.machine)
        return float(logprob_N.double().sum())

    def _reset(self) -> None:
        with torch.no_grad():
            for name, parameter in trainable_parameters(self.engine.model).items():
                parameter.copy_(self.start[name])


def _answered(name: str, prompt: Sequence[int], answer: Sequence[int]) -> Tree:
    branch = Branch(np.array(answer, np.int32), np.ones(len(answer), np.bool_))
    return Tree(name, np.array(prompt, np.int32), (branch,))


def make_bench(recipe: Recipe, index: int, run: RunFolder, *, steps: int | None, folder: Path, tell: Tell) -> Bench:
    """Rows, model and reference of a stage's probes. Raises RecipeError where it has no rows to probe with."""
    stage = recipe.stages[index]
    if not stage.heldout and stage.heldout_fraction == 0:
        tell(f"stage {stage.name} holds no rows out: the probes hold out {HELDOUT_FRACTION:.0%} of its rows")
        stage = stage.model_copy(update={"heldout_fraction": HELDOUT_FRACTION})
    machine = Machine.detect(recipe.threads)
    prepared_run = prepare_run(recipe.model_copy(update={"stages": [stage]}), tell)
    prepared, renderer = prepared_run.stages[stage.name], prepared_run.renderers[stage.name]
    whole = num_steps(len(prepared.train), stage.batch_size, stage.epochs)
    whole = min(whole, stage.max_steps or whole)
    few = min(steps or max(FEWEST_STEPS, round(SHARE_OF_STEPS * whole)), whole)
    train = sample(prepared.train, few * stage.batch_size, seed=recipe.seed)
    heldout = sample(prepared.heldout, MOST_HELDOUT, seed=recipe.seed)
    if not train or not heldout:
        raise RecipeError("has no rows to probe with", where=f"stage {stage.name}")
    weights = start_weights(recipe, index, run)
    engine = _engine(recipe, stage, weights, Joined(train, heldout), machine=machine, tell=tell)
    plan = plan_stage_memory(
        engine,
        stage,
        trees=Joined(train, heldout),
        model=weights.full,
        memory=recipe.memory,
        machine=machine,
        folder=folder,
        tell=tell,
    )
    return Bench(
        engine=engine,
        stage=_probed(stage, few, len(train), gradient_checkpointing=plan.gradient_checkpointing),
        beta=_searched_beta(stage, tell),
        train=train,
        heldout=heldout,
        replay=prepared.replay,
        references=_references(engine, stage, train, heldout, forest_tokens=plan.forest_tokens, tell=tell),
        start={name: each.detach().clone() for name, each in trainable_parameters(engine.model).items()},
        stop_ids=renderer.stop_ids,
        forest_tokens=plan.forest_tokens,
        limits=Limits(FULL_LIMITS.kl * few / whole, FULL_LIMITS.fall * few / whole),
        num_steps=few,
        stage_steps=whole,
        seed=recipe.seed,
        machine=machine,
        folder=folder,
        tell=tell,
    )


def _engine(
    recipe: Recipe, stage: Stage, weights: Weights, trees: Sequence[Tree], *, machine: Machine, tell: Tell
) -> Engine:
    """The stage's policy at its start, checked on its rows."""
    scores = not stage.makes_policy
    policy = policy_for_training(weights, stage.tuning, device=machine.device, seed=recipe.seed, scores=scores)
    tell(apply_kernels(policy.model, recipe.model.kernels))
    autocast = autocast_of(forward_dtype(weights.full, machine.device), machine.device)
    engine, report = checked_engine(policy.model, trees, attention=recipe.model.attention, autocast=autocast)
    tell(report.line())
    return engine


def _probed(stage: Stage, few: int, num_rows: int, *, gradient_checkpointing: Checkpointing) -> Stage:
    """The stage as a probe trains it: fewer steps, measured at its end only, with nothing that would end it early."""
    return stage.model_copy(
        update={
            "max_steps": few,
            "epochs": math.ceil(few * stage.batch_size / num_rows),
            "eval_every": 0,
            "save_every": 0,
            "keep": "final",
            "patience": 0,
            "keep_checkpoints": 1,
            "on_nonfinite": "stop",
            "on_diagnosis": "warn",
            "gradient_checkpointing": gradient_checkpointing,
        }
    )


def _references(
    engine: Engine,
    stage: Stage,
    train: Sequence[Tree],
    heldout: Sequence[Tree],
    *,
    forest_tokens: int,
    tell: Tell,
) -> References | None:
    """The start's log-probs of all rows, scored once for all probes; None where the method needs none."""
    if not objective_of(stage).needs_reference:
        return None
    trees = Joined(train, heldout)
    scores, cached = reference_logprobs(
        engine,
        trees,
        forest_tokens=forest_tokens,
        fingerprint=weights_sha(engine.model),
        cache_folder=default_cache_folder(),
        tell=tell,
    )
    tell(f"reference: {len(trees)} rows, {'from the cache' if cached else 'scored once for all probes'}")
    return scores[: len(train)], scores[len(train) :]


def beta_of(stage: Stage) -> float | None:
    """The stage's beta, where it has one and answers are compared: losses of other betas are other scales."""
    if not isinstance(stage, PreferenceStage):
        return None
    value = stage.model_dump(include={"beta"}).get("beta")
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _searched_beta(stage: Stage, tell: Tell) -> float | None:
    beta = beta_of(stage)
    if beta is not None and stage.rows == "labels":
        tell(f"{stage.method} compares no answers, and losses of two betas are no measure: only the rate is searched")
        return None
    return beta


def sample(trees: Sequence[Tree], count: int, *, seed: int) -> Sequence[Tree]:
    """At most `count` of the trees, drawn by the seed, in their own order."""
    if len(trees) <= count:
        return trees
    drawn = np.random.default_rng([seed, len(trees)]).permutation(len(trees))[:count]
    return Chosen(trees, sorted(drawn.tolist()))
