"""TRL's own losses on given log-probs; runs in TRL's environment and imports nothing of ours.

In: a JSON file of rows and jobs. Out: JSON on the standard output: each job's loss, its derivative by every log-prob.
Must not know: what Tunesmith computes.

The trainers are made without their constructors, which want models and data, and are handed "models" that answer with
the given log-probs; what is run are the methods of TRL that turn those into a loss, untouched.

Shapes: B rows, L tokens of the longest.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import trl
from torch import Tensor
from torch.nn.functional import pad
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

Row = dict[str, Any]


def same(value: Tensor) -> Tensor:
    """What gathering over one rank returns."""
    return value


def untrained() -> torch.nn.Module:
    """What a trainer asks about its model."""
    module = torch.nn.Module()
    module.is_gradient_checkpointing = False  # type: ignore[assignment]
    return module


T = TypeVar("T")


def bare(kind: type[T], attributes: Row) -> T:
    """A trainer that has these attributes and nothing else."""
    trainer = object.__new__(kind)
    shared = {
        "accelerator": SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same),
        "model": untrained(),
        "aux_loss_enabled": False,
        "is_encoder_decoder": False,
        "padding_value": 0,
        "pad_token_id": 0,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in (shared | attributes).items():
        setattr(trainer, name, value)
    return trainer


class Leaves:
    """The policy's log-probs as leaves of the graph, in the order of the rows and of their answers."""

    def __init__(self, rows: list[Row], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.answers = [self.given(a["policy"]).requires_grad_() for row in rows for a in row["answers"]]

    def given(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=self.dtype)


def laid_out(prompts: list[Tensor], answers: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences [first token, prompt, answer, padding]: which tokens are answers and which are not padding, [B, L], and
    the log-prob of each token but the first, [B, L - 1]. A prompt's log-probs are of its tokens behind the first."""
    longest = 1 + max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    kinds, present, logprobs = [], [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        size = 1 + len(prompt) + len(answer)
        is_answer = torch.tensor([0] * (1 + len(prompt)) + [1] * len(answer))
        kinds.append(pad(is_answer, (0, longest - size)))
        present.append(pad(torch.ones(size, dtype=torch.long), (0, longest - size)))
        logprobs.append(pad(torch.cat([prompt, answer]), (0, longest - size)))
    return torch.stack(kinds), torch.stack(present), torch.stack(logprobs)


def dpo_loss(job: Row, rows: list[Row], leaves: Leaves, chosen: list[int]) -> Tensor:
    """DPOTrainer's loss of the rows."""
    numbers = [2 * row + place for place in (0, 1) for row in chosen]  # all chosen answers, then all rejected ones
    flat = [answer for row in rows for answer in row["answers"]]
    prompts = [leaves.given(rows[number // 2]["prompt"]) for number in numbers]

    def seen(answers: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        is_answer, present, logprobs = laid_out(prompts, answers)
        return is_answer, present, logprobs * is_answer[:, 1:]

    is_answer, present, policy = seen([leaves.answers[number] for number in numbers])
    reference = seen([leaves.given(flat[number]["reference"]) for number in numbers])[2]
    collision = seen([leaves.given(flat[number]["collision"]) for number in numbers])[2]
    zeros = torch.zeros_like(policy)

    def model(logprobs: Tensor) -> Callable[..., SimpleNamespace]:
        found = {"log_probs": logprobs, "log_sum_sq_probs": collision, "entropy": zeros, "mean_logits": zeros}
        return lambda **inputs: SimpleNamespace(**found, is_top1=zeros.bool())

    settings = {
        "beta": 0.1,
        "loss_weights": [1.0] * len(job["peer"]["loss_types"]),
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "ld_alpha": None,
        "use_weighting": False,
        "precompute_ref_logps": False,
        "ref_model": model(reference),
        "args": SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
    }
    trainer = bare(DPOTrainer, settings | job["peer"])
    inputs = {"input_ids": torch.zeros_like(is_answer), "attention_mask": present, "completion_mask": is_answer}
    return trainer._compute_loss(model(policy), inputs, False)  # type: ignore[no-any-return]


def free_loss(job: Row, rows: list[Row], leaves: Leaves, chosen: list[int]) -> Tensor:
    """CPOTrainer's or ORPOTrainer's loss of the rows, from logits over two tokens: the one that comes, and another."""
    numbers = [2 * row + place for place in (0, 1) for row in chosen]
    prompts = [leaves.given(rows[number // 2]["prompt"] if job["prompts"] else []) for number in numbers]
    is_answer, present, logprobs = laid_out(prompts, [leaves.answers[number] for number in numbers])
    given = torch.where(logprobs == 0, -1.0, logprobs)  # padding
    logits = torch.stack([given, torch.log(-torch.expm1(given))], -1)
    logits = pad(logits, (0, 0, 0, 1))  # what follows the last token
    inputs = {
        "concatenated_input_ids": torch.zeros_like(is_answer),
        "concatenated_attention_mask": present,
        "concatenated_labels": torch.where(is_answer == 1, 0, -100),
    }
    settings = {"beta": 0.1, "label_smoothing": 0.0, "cpo_alpha": 1.0, "alpha": 0.0, "simpo_gamma": 0.5}
    kind = ORPOTrainer if job["trainer"] == "orpo" else CPOTrainer
    made = {"concatenated_inputs": lambda batch, **rest: inputs}
    trainer = bare(kind, settings | job["peer"] | made)
    batch = {"chosen_labels": torch.zeros(len(chosen), 1)}
    loss, _ = trainer.get_batch_loss_metrics(lambda *args, **rest: SimpleNamespace(logits=logits), batch)
    return loss  # type: ignore[no-any-return]


def kto_loss(job: Row, rows: list[Row], leaves: Leaves, chosen: list[int]) -> Tensor:
    """KTOTrainer's loss of the rows; the second answer of a row is the mismatched one."""
    answers = [leaves.answers[2 * row] for row in chosen]
    is_answer, present, logprobs = laid_out([leaves.given([])] * len(chosen), answers)
    mismatched = torch.stack([leaves.answers[2 * row + 1].sum() for row in chosen]).detach()

    def reference(place: int) -> Tensor:
        return torch.stack([leaves.given(rows[row]["answers"][place]["reference"]).sum() for row in chosen])

    settings = {
        "beta": 0.1,
        "loss_type": "kto",
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "calculate_KL": True,
        "precompute_ref_logps": True,
        "_compute_kl_logps": lambda model, batch: mismatched,
    }
    trainer = bare(KTOTrainer, settings | job["peer"])
    zeros = torch.zeros_like(logprobs)
    outputs = SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros)
    batch = {
        "input_ids": torch.zeros_like(is_answer),
        "attention_mask": present,
        "completion_mask": is_answer,
        "label": torch.tensor([rows[row]["label"] for row in chosen]),
        "ref_logps": reference(0),
        "ref_KL_logps": reference(1),
    }
    return trainer._compute_loss(lambda **inputs: outputs, batch, False)  # type: ignore[no-any-return]


def reward_loss(job: Row, rows: list[Row], leaves: Leaves, chosen: list[int]) -> Tensor:
    """RewardTrainer's loss of the rows; an answer's only figure is its score."""
    scores = torch.stack([leaves.answers[2 * row + place][0] for place in (0, 1) for row in chosen])
    args = SimpleNamespace(center_rewards_coefficient=job["peer"].get("centering"))
    inputs: Row = {"attention_mask": torch.ones(1)}
    if job["peer"].get("margin"):
        pairs = [rows[row]["scores"] for row in chosen]
        inputs["margin"] = leaves.given([one - other for one, other in pairs])
    outputs = SimpleNamespace(logits=scores[:, None])
    return bare(RewardTrainer, {"args": args}).compute_loss(lambda **given: outputs, inputs)  # type: ignore[no-any-return]


LOSSES = {"dpo": dpo_loss, "cpo": free_loss, "orpo": free_loss, "kto": kto_loss, "reward": reward_loss}


def run(job: Row) -> Row:
    """The mean loss over the job's batches, and its derivative by each of the policy's log-probs."""
    rows = job["rows"]
    leaves = Leaves(rows, getattr(torch, job["dtype"]))
    numbers = list(range(len(rows)))
    half = len(rows) // 2
    batches = {"step": [numbers], "alone": [[number] for number in numbers], "halves": [numbers[:half], numbers[half:]]}
    losses = [LOSSES[job["trainer"]](job, rows, leaves, chosen) for chosen in batches[job["batches"]]]
    loss = torch.stack(losses).mean()
    found = torch.autograd.grad(loss, leaves.answers, allow_unused=True)
    slopes = [
        torch.zeros_like(leaf) if each is None else each for leaf, each in zip(leaves.answers, found, strict=True)
    ]
    return {"loss": float(loss), "slope": torch.cat(slopes).tolist()}


if __name__ == "__main__":
    found = [run(job) for job in json.loads(Path(sys.argv[1]).read_text())]
    print(json.dumps({"trl": trl.__version__, "torch": torch.__version__, "found": found}))
