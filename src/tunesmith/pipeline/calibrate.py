"""`tunesmith calibrate`: a stage's learning rate and beta, found by short probes on a sample of its rows.

In: a recipe and one of its stages. Out: the probes, the recommended pair, what it cost; a table, a page with a plot,
and the same as JSON. Must not know: the command line.

The model is loaded once and the reference is scored once (and cached by content); between probes the trained weights
go back to the start. A probe is the stage's own training, with its schedule over fewer steps. Limits on how far the
policy may move hold for the whole stage, so a probe's are their share of it by steps.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from tunesmith.model.policy import policy_for_training
from tunesmith.objectives import objective_of
from tunesmith.pipeline.calibrate_page import page
from tunesmith.pipeline.calibrate_search import (
    Choice,
    Limits,
    Place,
    Probe,
    choose,
    coarse_places,
    figures_of,
    next_places,
    probe_line,
    values_at,
)
from tunesmith.pipeline.memory import plan_stage_memory
from tunesmith.pipeline.prepare import prepare_run
from tunesmith.pipeline.run import run_recipe
from tunesmith.pipeline.starts import start_weights
from tunesmith.recipe.load import LoadedRecipe
from tunesmith.recipe.models import Recipe, Stage
from tunesmith.recipe.preferences import PreferenceStage
from tunesmith.runs.atomic import make_folder, write_json, write_text
from tunesmith.runs.folder import RunFolder, StageFolder
from tunesmith.runs.records import read_records
from tunesmith.sample.generate import generate
from tunesmith.train.loop import References, train_stage
from tunesmith.train.modes import eval_mode
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


@dataclass(frozen=True, slots=True)
class Calibration:
    """What came out. seconds: of everything; num_steps of stage_steps: of a probe and of the stage."""

    stage: str
    method: str
    probes: tuple[Probe, ...]
    choice: Choice
    limits: Limits
    num_steps: int
    stage_steps: int
    num_rows: int
    seconds: float
    folder: Path


def calibrate(
    loaded: LoadedRecipe,
    *,
    stage: str | None = None,
    steps: int | None = None,
    exhaustive: bool = False,
    tell: Tell = lambda text: None,
) -> Calibration:
    """Probe a stage (the last one with a beta, if none is named), and write what was found beside the run.

    Earlier stages that it starts from are run first, in a run of their own, `NAME-calibrate`, which takes what the run
    has finished and which the run takes from later. exhaustive: every point of the grid. steps: of a probe.
    """
    began = time.monotonic()
    bench = bench_of(loaded, stage=stage, steps=steps, tell=tell)
    chosen, folder, searches_beta = bench.stage, bench.folder, bench.beta is not None
    probes = [bench.probe(place) for place in _places(exhaustive, searches_beta=searches_beta)]
    if all(probe.problem for probe in probes):
        remedy = "Set another `learning_rate` in the recipe: the grid lies around it."
        raise NumericsError(f"every probe failed: {probes[0].problem}", where=f"stage {chosen.name}", remedy=remedy)
    while places := next_places(probes, bench.limits, searches_beta=searches_beta):
        probes += [bench.probe(place) for place in places]
    found = Calibration(
        chosen.name,
        chosen.method,
        tuple(probes),
        choose(probes, bench.limits),
        bench.limits,
        bench.num_steps,
        bench.stage_steps,
        len(bench.train),
        time.monotonic() - began,
        folder,
    )
    write_json(folder / "calibrate.json", {**asdict(found), "folder": str(folder), "lines": lines(found)})
    write_text(folder / "calibrate.html", page(found.stage, lines(found), probes, found.choice, found.limits))
    return found


def bench_of(
    loaded: LoadedRecipe, *, stage: str | None = None, steps: int | None = None, tell: Tell = lambda text: None
) -> Bench:
    """What the probes of a stage share, made once: the stages before it finished, rows, model, reference."""
    index = _stage_number(loaded.recipe, stage)
    run = _earlier_stages(loaded, index, tell)
    folder = run.path / "calibrate" / loaded.recipe.stages[index].name
    make_folder(folder)
    return _bench(loaded.recipe, index, run, steps=steps, folder=folder, tell=tell)


def lines(found: Calibration) -> list[str]:
    """What was found, for a person: a probe a line, the recommendation, and what it cost."""
    table = [probe_line(probe, found.limits, is_best=probe is found.choice.probe) for probe in found.probes]
    best = found.choice.probe
    beta = "" if best.beta is None else f" stages.{found.stage}.beta={best.beta:g}"
    trained = found.num_steps * len(found.probes)
    return [
        *table,
        f"recommended: stages.{found.stage}.learning_rate={best.learning_rate:g}{beta}",
        f"because: {found.choice.why}",
        f"limits of a probe of {found.num_steps} of the stage's {found.stage_steps} steps: "
        f"KL {found.limits.kl:.3g} nats an answer, chosen answers fall {found.limits.fall:.3g} nats a token",
        f"cost: {len(found.probes)} probes, {trained} steps ({trained / found.stage_steps:.1f} times the stage), "
        f"{found.num_rows} rows, {found.seconds:.0f} s",
    ]


def _places(exhaustive: bool, *, searches_beta: bool) -> list[Place]:
    coarse = coarse_places(searches_beta=searches_beta)
    rates, betas = ({place[axis] for place in coarse} for axis in (0, 1))
    if not exhaustive:
        return coarse
    return [(rate, beta) for rate in range(min(rates), max(rates) + 1) for beta in range(min(betas), max(betas) + 1)]


def _stage_number(recipe: Recipe, name: str | None) -> int:
    names = [stage.name for stage in recipe.stages]
    if name is None:
        with_beta = [number for number, stage in enumerate(recipe.stages) if _beta_of(stage) is not None]
        return with_beta[-1] if with_beta else len(names) - 1
    if name not in names:
        raise RecipeError(f"has no stage {name!r}", where="--stage", remedy=f"Its stages: {', '.join(names)}.")
    return names.index(name)


def _beta_of(stage: Stage) -> float | None:
    """The stage's beta, where it has one and answers are compared: losses of other betas are other scales."""
    if not isinstance(stage, PreferenceStage):
        return None
    value = stage.model_dump(include={"beta"}).get("beta")
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _earlier_stages(loaded: LoadedRecipe, index: int, tell: Tell) -> RunFolder:
    """The run beside the recipe's own whose stages the probed one starts from, finished."""
    recipe = loaded.recipe
    name = f"{recipe.name}-calibrate"
    if recipe.stages[index].start == "previous" and index > 0:
        tell(f"the stages before {recipe.stages[index].name}: taken from runs with equal inputs, or run now, as {name}")
        before = recipe.model_copy(update={"name": name, "stages": recipe.stages[:index]})
        run_recipe(replace(loaded, recipe=before))
    return RunFolder(Path(recipe.runs_folder) / name)


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


def _bench(recipe: Recipe, index: int, run: RunFolder, *, steps: int | None, folder: Path, tell: Tell) -> Bench:
    """Rows, model and reference of a stage's probes."""
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
    policy = policy_for_training(
        weights, stage.tuning, device=machine.device, seed=recipe.seed, scores=not stage.makes_policy
    )
    tell(apply_kernels(policy.model, recipe.model.kernels))
    trees = Joined(train, heldout)
    autocast = autocast_of(forward_dtype(weights.full, machine.device), machine.device)
    engine, report = checked_engine(policy.model, trees, attention=recipe.model.attention, autocast=autocast)
    tell(report.line())
    plan = plan_stage_memory(
        engine,
        stage,
        trees=trees,
        model=weights.full,
        memory=recipe.memory,
        machine=machine,
        folder=folder,
        tell=tell,
    )
    probed = stage.model_copy(
        update={
            "max_steps": few,
            "epochs": math.ceil(few * stage.batch_size / len(train)),
            "eval_every": 0,
            "save_every": 0,
            "keep": "final",
            "patience": 0,
            "keep_checkpoints": 1,
            "on_nonfinite": "stop",
            "on_diagnosis": "warn",
            "gradient_checkpointing": plan.gradient_checkpointing,
        }
    )
    references: References | None = None
    if objective_of(stage).needs_reference:
        scores, cached = reference_logprobs(
            engine,
            trees,
            forest_tokens=plan.forest_tokens,
            fingerprint=weights_sha(engine.model),
            cache_folder=default_cache_folder(),
            tell=tell,
        )
        tell(f"reference: {len(trees)} rows, {'from the cache' if cached else 'scored once for all probes'}")
        references = (scores[: len(train)], scores[len(train) :])
    return Bench(
        engine=engine,
        stage=probed,
        beta=_searched_beta(stage, tell),
        train=train,
        heldout=heldout,
        replay=prepared.replay,
        references=references,
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


def _searched_beta(stage: Stage, tell: Tell) -> float | None:
    beta = _beta_of(stage)
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
