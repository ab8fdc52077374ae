"""SFT, then DPO, in one flat file: the teaching twin of `tunesmith run`, on the same parts.

    python examples/minimal_dpo.py [STEPS_SFT STEPS_DPO]

Read it top to bottom: rows become trees, trees become forests, forests become log-probs, an objective makes them a
loss, and one line divides by the count of the whole step. The real loop (src/tunesmith/train) adds what a long run
needs: checkpoints, resuming, evaluation, ranks, refusals. It takes the same steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tunesmith.data.plan import plan_forests, step_examples
from tunesmith.data.prepare import read_examples
from tunesmith.data.render import Renderer
from tunesmith.data.template import choose_template
from tunesmith.data.types import Tree
from tunesmith.engine.engine import Engine
from tunesmith.engine.logprobs import Logprobs
from tunesmith.engine.parity import check_parity
from tunesmith.model.adapters import add_adapter, inner_model
from tunesmith.model.load import load_model, load_tokenizer
from tunesmith.objectives import dpo, supervised
from tunesmith.objectives.base import Objective, Result
from tunesmith.recipe.models import Lora, Model, Source
from tunesmith.train.schedule import lr_multiplier

BASE = Model(path="embedded:quickstart/model")
FOREST_TOKENS = 4096  # tokens of a micro-batch: it cannot change the result, only time and memory
SEED = 0


def read_trees(path: str, renderer: Renderer) -> list[Tree]:
    """Rows of a file -> examples -> trees: the prompt's ids once, and every answer's ids with what is trained."""
    return [renderer.tree(example) for example in read_examples(Source(path=path)).examples]


def train(
    engine: Engine,
    trees: Sequence[Tree],
    objective: Objective,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    with_reference: Callable[[Logprobs, Sequence[int]], Logprobs] = lambda logprobs, numbers: logprobs,
) -> list[float]:
    """AdamW on the trainable weights; returns the loss of every step."""
    parameters = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    losses: list[float] = []
    for step in range(num_steps):
        chosen = step_examples(len(trees), batch_size, seed=SEED, step=step)  # a pure function: resuming needs no state
        batch = [trees[number] for number in chosen]
        count = sum(objective.units(tree) for tree in batch)  # of the whole step, before the first backward
        total = 0.0
        for forest in plan_forests(batch, FOREST_TOKENS):
            logprobs = engine.logprobs([batch[place] for place in forest])
            logprobs = with_reference(logprobs, [chosen[place] for place in forest])
            result: Result = objective.function(logprobs)
            (result.loss.total / count).backward()  # the one line that divides
            total += float(result.loss.total.detach())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        scale = lr_multiplier(step + 1, num_steps, warmup_fraction=0.03, kind="cosine")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * scale
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / count)
    return losses


def main(num_sft: int = 60, num_dpo: int = 20) -> tuple[list[float], list[float]]:
    """SFT with a LoRA adapter on the embedded model, then DPO on the same adapter; returns both losses."""
    torch.manual_seed(SEED)
    tokenizer = load_tokenizer(BASE)
    renderer = Renderer(tokenizer, choose_template(tokenizer, None), max_length=512)
    base = load_model(BASE, device=torch.device("cpu"), dtype=torch.float32)
    engine = Engine(inner_model(add_adapter(base, Lora(), seed=SEED)))

    answers = read_trees("embedded:quickstart/sft.jsonl.gz", renderer)
    print(check_parity(engine.model, answers).line())
    sft = train(engine, answers, supervised("sft"), num_steps=num_sft, batch_size=32, learning_rate=2e-3)
    print(f"SFT: loss {sft[0]:.3f} -> {sft[-1]:.3f} nats a token")

    pairs = read_trees("embedded:quickstart/preferences.jsonl.gz", renderer)
    with torch.no_grad():  # the reference is the policy as it is now; it is scored once, and never held twice
        reference: list[Tensor] = [engine.logprobs([pair]).logprob_N for pair in pairs]

    def with_reference(logprobs: Logprobs, numbers: Sequence[int]) -> Logprobs:
        return logprobs.with_reference(torch.cat([reference[number] for number in numbers]))

    tuned = train(
        engine, pairs, dpo(0.3), num_steps=num_dpo, batch_size=16, learning_rate=3e-4, with_reference=with_reference
    )
    print(f"DPO: loss {tuned[0]:.4f} (ln 2 = 0.6931) -> {tuned[-1]:.4f}")
    return sft, tuned


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
