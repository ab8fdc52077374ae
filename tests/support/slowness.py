"""Makes a part of the command slow, or lets it hang, so that a test can meet it there. Called in the command's process.

Each says on standard output when it begins.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tunesmith.data import render
from tunesmith.engine.engine import Engine
from tunesmith.train import checkpoint, loop

Check = Callable[[], bool]
_step = [0]


def slow_steps(seconds: float, *, at: int | None = None) -> None:
    """Every step, or one, waits first."""
    _before_step(lambda step: time.sleep(seconds), at, "slow step")


def hang_in_step(at: int) -> None:
    """A step stays for minutes in C, where Python runs no handler."""
    _before_step(lambda step: hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9), at, "hanging")


def slow_forests(seconds: float, *, at: int, training: bool) -> None:
    """The first forest of a step, or of the evaluation after it, takes long."""
    _before_step(lambda step: None, None, "")
    was, done = Engine.logprobs, []

    def slow(engine: Engine, trees: Any, wants: Any = ()) -> Any:
        if _step[0] == at and torch.is_grad_enabled() == training and not done:
            done.append(1)
            print("slow forest", flush=True)
            time.sleep(seconds)
        return was(engine, trees, wants)

    Engine.logprobs = slow  # type: ignore[method-assign]


def slow_scoring(seconds: float) -> None:
    """Every forest that is computed without gradients takes long."""
    was = Engine.logprobs

    def slow(engine: Engine, trees: Any, wants: Any = ()) -> Any:
        if not torch.is_grad_enabled():
            time.sleep(seconds)
        return was(engine, trees, wants)

    Engine.logprobs = slow  # type: ignore[method-assign]


def slow_saves(seconds: float) -> None:
    """Each file of a checkpoint takes long."""
    was = checkpoint.save_file

    def slow(*given: Any, **named: Any) -> None:
        print("saving", flush=True)
        time.sleep(seconds)
        was(*given, **named)

    checkpoint.save_file = slow


def slow_loading() -> None:
    """A model takes long to load."""
    was = AutoModelForCausalLM.from_pretrained

    def slow(*given: Any, **named: Any) -> Any:
        print("loading", flush=True)
        time.sleep(30)
        return was(*given, **named)

    AutoModelForCausalLM.from_pretrained = slow


def slow_rows(seconds: float) -> None:
    """Each chunk of rows takes long to render."""
    was = render.Renderer.render_many

    def slow(*given: Any, **named: Any) -> Any:
        print("rendering", flush=True)
        time.sleep(seconds)
        return was(*given, **named)

    render.Renderer.render_many = slow  # type: ignore[method-assign]


def _before_step(wait: Callable[[int], object], at: int | None, text: str) -> None:
    was = loop.step_gradient

    def slow(session: Any, batch: Any, step: int, **named: Any) -> Any:
        _step[0] = step
        if at in (None, step):
            if text:
                print(text, step, flush=True)
            wait(step)
        return was(session, batch, step, **named)

    loop.step_gradient = slow
