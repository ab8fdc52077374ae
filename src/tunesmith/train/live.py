"""A reference that moves while the stage trains: its log-probs are made anew, from the policy's model.

In: a session whose objective carries the reference's weights. Out: a step's trees with the log-probs of the reference
as it is now. Must not know: when it moves (`objectives/live.py`), what a loss does with it.

The reference has no model of its own: only the trained weights differ, so they change places with the policy's while it
is scored, in eval mode, without dropout and without gradient. No optimizer ever sees them (TRAPS 43). Until it first
moves it is the policy at the stage's start, whose log-probs the cache has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tunesmith.engine.retry import Budget
from tunesmith.objectives.live import has_moved, reference_weights
from tunesmith.train.modes import eval_mode
from tunesmith.train.session import Session
from tunesmith.train.step import Batch, num_read, score


def with_live_reference(session: Session, batch: Batch, budget: Budget, *, between: Callable[[], None]) -> Batch:
    """The trees with the reference's log-probs as it is now; the batch itself where it has not moved.

    `between` is called before each forest and may raise. Raises MemoryFullError where memory runs out.
    """
    if batch.references is None or not has_moved(session.carried):
        return batch
    with eval_mode(session.engine.model), exchanged(session.trainable, reference_weights(session.carried)):
        logprob_N = score(
            session.engine,
            batch,
            forest_tokens=budget.forest_tokens,
            tree_tokens=budget.tree_tokens,
            machine=session.machine,
            between=between,
        )
    lengths = [sum(num_read(tree)) for tree in batch.trees]
    return Batch(batch.trees, [part.cpu().numpy() for part in torch.split(logprob_N, lengths)])


@contextmanager
def exchanged(trainable: Mapping[str, nn.Parameter], others: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the trained weights have the values of `others`, and those hold the trained ones; then all is as before.

    On one device nothing is copied. Else one tensor at a time is, so that a card needs no room for both.
    """
    assert trainable.keys() == others.keys()
    done: list[str] = []
    try:
        for name, parameter in trainable.items():
            _exchange(parameter, others[name])
            done.append(name)
        yield
    finally:
        for name in done:
            _exchange(trainable[name], others[name])


@torch.no_grad()
def _exchange(parameter: nn.Parameter, other: Tensor) -> None:
    if parameter.device == other.device:
        parameter.data, other.data = other.data, parameter.data
        return
    held = parameter.detach().to(other.device)
    parameter.copy_(other)
    other.copy_(held)
