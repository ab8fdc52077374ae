"""Figures of answers that the policy writes at an evaluation, and of what it remembers of an earlier stage.

In: a session with a probe. Out: keys of a line of eval.jsonl. Must not know: when an evaluation is due, what follows.

The same prompts and the same draws at every evaluation, so that two of them differ by the policy alone. Everything is
measured on tokens but the language.

- sample_kl: mean over the answers of log p(answer) - log p_start(answer), in nats an answer: at temperature 1 an
  unbiased estimate of KL(policy || policy at the stage's start).
- sample_tokens: mean length, without the stop token. sample_truncated: share that did not end themselves.
- sample_repetition: of all 4-grams of the answers, the share that the same answer had before.
- sample_language: share of answers in the prompts' main language, of those long enough to tell.
- retained_loss: nats a token on the held-out rows of the nearest earlier SFT stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.audit.identify import MIN_LETTERS_DENSE, UNKNOWN, identifier
from tunesmith.data.types import Branch, Ids, Tree
from tunesmith.engine.retry import Budget, memory_problem
from tunesmith.objectives import supervised
from tunesmith.runs.records import Record
from tunesmith.sample.generate import Answer, generate
from tunesmith.train.evaluate import evaluate
from tunesmith.train.live import exchanged
from tunesmith.train.modes import eval_mode
from tunesmith.train.probe import Probe
from tunesmith.train.session import Session
from tunesmith.train.step import Batch, score
from tunesmith.train.stopping import leave_evaluation

N_GRAM = 4
"""Tokens: three repeat in ordinary prose, four seldom do."""
_PROMPT_CHARACTERS = 400
"""Of a prompt's end: its start is often a system message in another language."""


def probed(session: Session, step: int) -> Record:
    """The figures of the session's probe; what cannot be told is left out.

    Raises LeftError where a stop is asked for meanwhile, and ResourceError where a single row does not fit in memory.
    """
    probe = session.probe
    if probe is None:
        return {}
    between = leave_evaluation(session, step)
    record: Record = {}
    if probe.prompts:
        between()
        answers = _drawn(session, probe, step)
        record |= {} if answers is None else _figures(session, probe, answers, step, between=between)
    if probe.retained:
        record["retained_loss"] = _retained_loss(session, probe.retained, step, between=between)
    return record


def _drawn(session: Session, probe: Probe, step: int) -> list[Answer] | None:
    """An answer a prompt; None, and said, where memory does not allow for any."""
    engine, settings = session.engine, probe.settings
    device = engine.model.device.type
    cast = nullcontext() if engine.autocast is None else torch.autocast(device, dtype=engine.autocast)
    found: list[Answer] = []

    def work(batch_size: int) -> None:
        with cast:
            found[:] = generate(
                engine.model,
                [prompt_ids.tolist() for prompt_ids in probe.prompts],
                max_new_tokens=settings.max_new_tokens,
                stop_ids=probe.stop_ids,
                temperature=settings.temperature or None,
                seed=session.seed,
                batch_size=batch_size,
            )

    problem = memory_problem(lambda: work(len(probe.prompts))) and memory_problem(lambda: work(1))
    if session.machine.largest(int(problem is not None)):
        session.observer.noted(f"step {step}: no answers were sampled, as memory ran out ({problem})")
        return None
    return found


def _figures(
    session: Session, probe: Probe, answers: Sequence[Answer], step: int, *, between: Callable[[], None]
) -> Record:
    record: Record = {
        "sample_count": len(answers),
        "sample_tokens": sum(len(answer.ids) for answer in answers) / len(answers),
        "sample_truncated": sum(not answer.stopped for answer in answers) / len(answers),
        "sample_repetition": repetition([answer.ids for answer in answers]),
    }
    if probe.start is not None:
        trees = [sampled_tree(*pair) for pair in zip(probe.prompts, answers, strict=True)]
        record["sample_kl"] = _kl(session, probe.start, trees, step, between=between)
    language = same_language(
        [probe.decode(prompt_ids.tolist())[-_PROMPT_CHARACTERS:] for prompt_ids in probe.prompts],
        [probe.decode(answer.ids) for answer in answers],
    )
    return record if language is None else {**record, "sample_language": language}


def repetition(answers: Sequence[Sequence[int]]) -> float:
    """Of all 4-grams, the share that stood in the same answer before; 0 where no answer has any."""
    repeated = total = 0
    for ids in answers:
        grams = [tuple(ids[place : place + N_GRAM]) for place in range(len(ids) - N_GRAM + 1)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else 0.0


def same_language(prompts: Sequence[str], answers: Sequence[str]) -> float | None:
    """Share of the answers whose language is the commonest of the prompts; None where the texts say too little."""
    if max((len(text) for text in answers), default=0) < MIN_LETTERS_DENSE:
        return None  # the identifier takes a second to load
    known = identifier()
    spoken = Counter(code for text in prompts if (code := known.language(text)) != UNKNOWN)
    given = [code for text in answers if (code := known.language(text)) != UNKNOWN]
    if not spoken or not given:
        return None
    (main, _), *_ = sorted(spoken.items(), key=lambda pair: (-pair[1], pair[0]))
    return sum(code == main for code in given) / len(given)


def sampled_tree(prompt_ids: Ids, answer: Answer) -> Tree:
    """A prompt with the tokens that were drawn for it, the stop token among them."""
    ids = np.array(answer.all_ids, np.int32)
    return Tree("sample", prompt_ids, (Branch(ids, np.ones(len(ids), np.bool_)),))


def _kl(
    session: Session,
    start: Mapping[str, Tensor],
    trees: Sequence[Tree],
    step: int,
    *,
    between: Callable[[], None],
) -> float:
    """Mean log-ratio of the answers, policy over its start, in nats an answer."""

    def work(budget: Budget) -> float:
        with eval_mode(session.engine.model):
            policy_N = _scored(session, trees, budget, between)
            with exchanged(session.trainable, start):
                start_N = _scored(session, trees, budget, between)
        return float((policy_N - start_N).sum()) / len(trees)

    return session.memory.run(work, trees, step=step, phase="eval")


def _scored(session: Session, trees: Sequence[Tree], budget: Budget, between: Callable[[], None]) -> Tensor:
    logprob_N = score(
        session.engine,
        Batch(trees),
        forest_tokens=budget.forest_tokens,
        tree_tokens=budget.tree_tokens,
        machine=session.machine,
        between=between,
    )
    return logprob_N.cpu().double()


def _retained_loss(session: Session, trees: Sequence[Tree], step: int, *, between: Callable[[], None]) -> float:
    def work(budget: Budget) -> Record:
        return evaluate(
            session.engine,
            Batch(trees),
            objective=supervised("sft"),
            forest_tokens=budget.forest_tokens,
            tree_tokens=budget.tree_tokens,
            machine=session.machine,
            between=between,
        )

    loss = session.memory.run(work, trees, step=step, phase="eval")["loss"]
    assert isinstance(loss, float)
    return loss
