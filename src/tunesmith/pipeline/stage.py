"""One stage of a run: start weights -> parity -> reference -> training -> result, each on disk when it is done.

In: the recipe's stage and its trees. Out: the stage's folder, with result.json as its last file.
Must not know: what is compared afterwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from tunesmith.data.plan import packing_report
from tunesmith.data.prepare import Prepared
from tunesmith.data.render import Renderer
from tunesmith.data.store import Joined
from tunesmith.data.types import Tree
from tunesmith.engine.engine import VERSION, Engine
from tunesmith.engine.reference import default_cache_folder, reference_logprobs
from tunesmith.errors import ResumeError
from tunesmith.model.compiled import compile_layers
from tunesmith.model.fingerprint import weights_sha
from tunesmith.model.kernels import apply_kernels
from tunesmith.model.load import forward_dtype
from tunesmith.model.machine import Machine
from tunesmith.model.policy import Policy, Weights, policy_for_training, save_policy
from tunesmith.model.results import StageResult, read_result, write_result
from tunesmith.model.shapes import weight_bytes
from tunesmith.objectives import Objective, objective_of
from tunesmith.pipeline.changes import RowsOf
from tunesmith.pipeline.disk import refuse_needs, stage_need_bytes
from tunesmith.pipeline.memory import plan_stage_memory
from tunesmith.pipeline.options import RunOptions
from tunesmith.pipeline.probes import probe_of
from tunesmith.pipeline.resumed import engine_as_before, stage_as_before
from tunesmith.pipeline.starts import weights_sha_on_disk
from tunesmith.recipe.later import settings_of
from tunesmith.recipe.models import Model, Stage
from tunesmith.runs.atomic import publish_folder, remove_file
from tunesmith.runs.folder import RunFolder
from tunesmith.runs.stop import StopRequest
from tunesmith.train.loop import References, train_stage
from tunesmith.train.precision import autocast_of
from tunesmith.train.probe import Probe
from tunesmith.train.progress import Observer

CADENCE = {"save_every", "eval_every", "samples", "keep_checkpoints", "on_nonfinite", "max_nonfinite"}
MEMORY = {"forest_tokens", "gradient_checkpointing", "offload_activations"}
"""Settings that change no weight beyond rounding: a finished stage stays finished when they change."""
POLICY = {"on_diagnosis", "kl_budget"}
"""What a diagnosis leads to changes the result only where it rolls back."""
LENGTH = {"epochs", "max_steps"}
"""Settings that may be raised after the end; whether the steps taken stay right, `recipe.diff` has decided."""


@dataclass(frozen=True, slots=True, eq=False)
class StageJob:
    """A stage to be run: its settings, its rows, where it starts, and who watches.

    model, memory: what the recipe says of them; the weights may be another model's, that an earlier run left.
    rows: what the stage's result goes by; after an accepted change that is not only what is `prepared`.
    retained: held-out rows of an earlier stage, to see what is forgotten.
    """

    stage: Stage
    prepared: Prepared
    renderer: Renderer
    weights: Weights
    model: Model
    memory: str
    run: RunFolder
    seed: int
    machine: Machine
    observer: Observer
    options: RunOptions
    rows: RowsOf
    retained: Sequence[Tree] = ()
    stop: StopRequest = field(default_factory=StopRequest)

    @property
    def trees(self) -> Sequence[Tree]:
        """All rows of the stage."""
        return Joined(self.prepared.train, self.prepared.heldout, self.prepared.replay)


def inputs_sha(job: StageJob) -> str:
    """sha256 over everything that the stage's result depends on."""
    free = CADENCE | MEMORY | LENGTH | (POLICY if job.stage.on_diagnosis != "rollback" else set())
    content = {
        "settings": settings_of(job.stage, without=free),
        "seed": job.seed,
        "start": weights_sha_on_disk(job.weights),
        "template": job.renderer.template.sha,
        "rows": list(job.rows.digests),
        "engine": VERSION,
        **({"rows_before": list(job.rows.before)} if job.rows.before else {}),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_finished(job: StageJob, inputs: str) -> bool:
    """True where the folder holds the result of exactly these inputs; ResumeError where it holds another's.

    A result of fewer steps is not finished: training goes on behind its last checkpoint.
    """
    if not job.run.stage(job.stage.name).result_path.is_file():
        return False
    result = read_result(job.run, job.stage.name)
    if result.files is None:
        job.observer.noted(f"stage {job.stage.name}: its result is of an earlier version, without hashes of its files")
    same_length = (result.epochs, result.max_steps) == (job.stage.epochs, job.stage.max_steps)
    if result.inputs_sha == inputs:
        return same_length
    if job.rows.before and not same_length:
        return False  # more steps are asked for, on rows that were accepted
    raise ResumeError(
        "the finished stage was trained on other rows, weights or settings than the recipe gives now",
        where=f"stage {job.stage.name}",
        remedy="Give the run another `name`; nothing was changed.",
    )


def run_stage(job: StageJob) -> None:
    """Train a stage to its end, or go on where it stopped; a finished stage with the same inputs is left as it is."""
    inputs = inputs_sha(job)
    if is_finished(job, inputs):
        job.observer.noted(f"stage {job.stage.name}: finished before, with the same inputs; not run again")
        return
    job.observer.noted(f"stage {job.stage.name}: {job.stage.method}, {_described(job)}")
    safe_point = partial(job.stop.raise_if_requested, f"stage {job.stage.name}", "what is saved stands")
    safe_point()
    autocast = _autocast(job)  # it may refuse, so before the model is loaded
    policy = _policy(job)
    engine, report = engine_as_before(
        policy.model,
        job.trees,
        attention=job.model.attention,
        autocast=autocast,
        folder=job.run.stage(job.stage.name),
        tell=job.observer.noted,
    )
    job.observer.noted(report.line())
    objective = objective_of(job.stage)
    safe_point()
    plan = plan_stage_memory(
        engine,
        stage_as_before(job.stage, job.run.stage(job.stage.name)),
        trees=job.trees,
        model=job.weights.full,
        memory=job.memory,
        machine=job.machine,
        folder=job.run.stage(job.stage.name).path,
        tell=job.observer.noted,
    )
    packing = packing_report(job.prepared.train, plan.forest_tokens, batch_size=job.stage.batch_size, seed=job.seed)
    job.observer.noted(packing.line())
    outcome = train_stage(
        engine=engine,
        stage=job.stage,
        objective=objective,
        train=job.prepared.train,
        heldout=job.prepared.heldout,
        replay=job.prepared.replay,
        references=_references(job, engine, objective, forest_tokens=plan.forest_tokens),
        folder=job.run.stage(job.stage.name),
        seed=job.seed,
        machine=job.machine,
        observer=job.observer,
        inputs={"start": weights_sha_on_disk(job.weights), "template": job.renderer.template.sha},
        forest_tokens=plan.forest_tokens,
        gradient_checkpointing=plan.gradient_checkpointing,
        rows_changed=bool(job.rows.before),
        strict=job.options.strict,
        stop=job.stop,
        probe=_probe(job, policy),
    )
    _save(job, policy, num_steps=outcome.result_step, inputs=inputs)


def _policy(job: StageJob) -> Policy:
    """The policy at the stage's start, with the kernels that the recipe asks for; the disk is asked first."""
    tuning, scores = job.stage.tuning, not job.stage.makes_policy
    policy = policy_for_training(job.weights, tuning, device=job.machine.device, seed=job.seed, scores=scores)
    if policy.added.note:
        job.observer.noted(policy.added.note)
    refuse_needs({job.stage.name: stage_need_bytes(job.stage, weight_bytes(policy.model), job.run)}, job.run.path)
    job.observer.noted(apply_kernels(policy.model, job.model.kernels))
    if job.model.compile:
        job.observer.noted(compile_layers(policy.model))
    return policy


def _autocast(job: StageJob) -> torch.dtype | None:
    """The type that the forward pass computes in; None for float32."""
    return autocast_of(forward_dtype(job.weights.full, job.machine.device), job.machine.device)


def _probe(job: StageJob, policy: Policy) -> Probe | None:
    """What evaluations look at besides the held-out loss."""
    heldout, stop_ids = job.prepared.heldout, job.renderer.stop_ids
    return probe_of(job.stage, heldout, job.retained, tokenizer=policy.tokenizer, stop_ids=stop_ids)


def _described(job: StageJob) -> str:
    """What is trained, and where it starts, in words."""
    tuning = job.stage.tuning
    trained = tuning.described
    adapter = f" with the adapter {job.weights.adapter}" if job.weights.adapter is not None else ""
    return f"{trained}, from {job.weights.full.path}{adapter}"


def _references(job: StageJob, engine: Engine, objective: Objective, *, forest_tokens: int) -> References | None:
    """Log-probs of training and held-out rows under the policy as it is now, which is the stage's reference."""
    if not objective.needs_reference:
        return None
    trees = Joined(job.prepared.train, job.prepared.heldout)
    where = f"stage {job.stage.name}, reference"
    scores, cached = reference_logprobs(
        engine,
        trees,
        forest_tokens=forest_tokens,
        fingerprint=weights_sha(engine.model),
        cache_folder=default_cache_folder(),
        tell=job.observer.noted,
        between=partial(job.stop.raise_if_requested, where, "the rows that were scored are kept"),
    )
    source = (
        "from the cache, a sample of them recomputed and equal" if cached else "computed once, cached for later runs"
    )
    job.observer.noted(f"reference: the policy at the start of this stage, {len(trees)} rows {source}")
    num_train = len(job.prepared.train)
    return scores[:num_train], scores[num_train:]


def _save(job: StageJob, policy: Policy, *, num_steps: int, inputs: str) -> None:
    """Publish the trained weights in one rename, then result.json."""
    folder = job.run.stage(job.stage.name)
    target = folder.model_path if policy.adapted is None else folder.adapter_path
    remove_file(folder.result_path)  # of fewer steps: it would name files that are no longer its own
    with publish_folder(target) as temporary:
        template = job.renderer.template.source
        save_policy(policy, temporary, stop_ids=job.renderer.stop_ids, chat_template=template)
    finish_stage(job, target, is_adapter=policy.adapted is not None, num_steps=num_steps, inputs=inputs)
    job.observer.noted(f"stage {job.stage.name}: done, {policy.kind} in {target}")


def finish_stage(job: StageJob, target: Path, *, is_adapter: bool, num_steps: int, inputs: str) -> None:
    """Write result.json, the last file of a stage, for the weights that lie at `target`."""
    weights = result_weights(job.weights, target, is_adapter=is_adapter)
    result = StageResult(
        stage=job.stage.name,
        method=job.stage.method,
        weights=weights,
        num_steps=num_steps,
        stop_ids=job.renderer.stop_ids,
        inputs_sha=inputs,
        epochs=job.stage.epochs,
        max_steps=job.stage.max_steps,
    )
    write_result(job.run, result, weights_sha=weights_sha_on_disk(weights), template_sha=job.renderer.template.sha)


def result_weights(start: Weights, target: Path, *, is_adapter: bool) -> Weights:
    """Where a stage's result lies that was trained from `start` and saved at `target`."""
    if is_adapter:
        return replace(start, adapter=target)
    full = start.full.model_copy(update={"path": str(target), "revision": None, "quantization": "none"})
    return Weights(full)
