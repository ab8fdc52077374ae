"""The kinds of optimizers: which library makes each, and the state that it starts with.

In: groups of weights, learning rate, betas. Out: an optimizer of torch's form, its state made.
Must not know: data, objectives, files, models.

The state is made at once, not in the first step: an optimizer that runs out of memory in the middle of a step would
leave some weights updated and others not. A group's `lr_ratio` is its learning rate over the stage's.

Sources: Loshchilov and Hutter 2019, arXiv:1711.05101 (adamw, by torch); Dettmers et al. 2021, arXiv:2110.02861 (8-bit
and paged, by bitsandbytes); Shazeer and Stern 2018, arXiv:1804.04235 (adafactor, by transformers); Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon, with the step length of Liu et al. 2025, arXiv:2502.16982, equation 4 (muon,
by torch); Chen et al. 2023, arXiv:2302.06675 (lion, by bitsandbytes); Defazio et al. 2024, arXiv:2405.15682
(schedule_free, by the authors' package).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn
from transformers import Adafactor

from tunesmith.recipe.extras import need_extra
from tunesmith.recipe.tuning import Optimizer as OptimizerKind

LION_BETAS = (0.9, 0.99)
"""The paper's; AdamW's usual 0.999 would make Lion's mean ten times as slow."""


class Group(TypedDict):
    """Weights that are updated alike. `is_matrix`: a matrix inside the model, not one of its tables of tokens."""

    params: list[nn.Parameter]
    weight_decay: float
    lr_ratio: float
    is_matrix: bool


class Joined(torch.optim.Optimizer):
    """Several optimizers as one, each with groups of its own."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([{"params": [nn.Parameter(torch.zeros(0))]}], {})  # torch refuses an empty one
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """A step of each."""
        assert closure is None
        for part in self.parts:
            part.step()


def optimizer_of(
    kind: OptimizerKind, groups: Sequence[Group], *, learning_rate: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """The optimizer with its state. Raises MissingExtraError where the kind needs a package that is not installed."""
    plain = [dict(group) for group in groups]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")  # they work, without pages
        optimizer = _MAKE[kind](plain, learning_rate, betas)
        _make_state(optimizer)
    return optimizer


_Groups = list[dict[str, object]]


def _adamw(groups: _Groups, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    devices = {parameter.device.type for parameter in _parameters(groups)}
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=devices <= {"cpu", "cuda"})


def _of_bitsandbytes(name: str) -> Callable[[_Groups, float, tuple[float, float]], torch.optim.Optimizer]:
    def make(groups: _Groups, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        library = need_extra("bitsandbytes", "gpu")
        made: torch.optim.Optimizer = vars(library.optim)[name](groups, lr=lr, betas=betas)
        return made

    return make


def _lion(groups: _Groups, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    return _of_bitsandbytes("Lion")(groups, lr, LION_BETAS)


def _adafactor(groups: _Groups, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """With the stage's learning rate as it is: neither the relative step nor the scale by the weights' own size."""
    return Adafactor(groups, lr=lr, scale_parameter=False, relative_step=False, warmup_init=False)


def _muon(groups: _Groups, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Steps are as long as AdamW's usual ones, so that one learning rate and decay suit both parts."""
    matrices = [group for group in groups if group["is_matrix"]]
    others = [group for group in groups if not group["is_matrix"]]
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw"))
    if others:
        parts.append(_adamw(others, lr, betas))
    return Joined(parts)


def _schedule_free(groups: _Groups, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    library = need_extra("schedulefree", "optimizers")
    made: torch.optim.Optimizer = library.AdamWScheduleFree(groups, lr=lr, betas=betas)
    return made


_MAKE: dict[OptimizerKind, Callable[[_Groups, float, tuple[float, float]], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _of_bitsandbytes("AdamW8bit"),
    "paged_adamw": _of_bitsandbytes("PagedAdamW"),
    "paged_adamw_8bit": _of_bitsandbytes("PagedAdamW8bit"),
    "adafactor": _adafactor,
    "muon": _muon,
    "lion": _lion,
    "schedule_free": _schedule_free,
}


def _parameters(groups: _Groups) -> list[nn.Parameter]:
    found: list[nn.Parameter] = []
    for group in groups:
        params = group["params"]
        assert isinstance(params, list)
        found += params
    return found


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """The whole state, as the optimizer's own first step would make it."""
    if isinstance(optimizer, Joined):
        for part in optimizer.parts:
            _make_state(part)
        return
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if isinstance(optimizer, torch.optim.AdamW):
                optimizer.state[parameter] = _zero_moments(parameter, fused=group["fused"])
            elif isinstance(optimizer, torch.optim.Muon):
                optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
            elif isinstance(optimizer, Adafactor):
                optimizer.state[parameter] = _zero_factors(parameter)
            elif "train_mode" in group:
                optimizer.state[parameter] = {
                    "z": parameter.detach().clone(),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
                group["train_mode"] = True  # at the start all three points of the method are the same
            else:
                optimizer.init_state(group, parameter, number, place)  # type: ignore[attr-defined]


def _zero_moments(parameter: nn.Parameter, *, fused: bool) -> dict[str, Tensor]:
    """The fused kernel wants `step` beside the weight, the plain one on the CPU."""
    device = parameter.device if fused else torch.device("cpu")
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def _zero_factors(parameter: nn.Parameter) -> dict[str, Tensor | int]:
    """Of a matrix the running squares of its rows and columns; `RMS` is of the weight, at its last step."""
    shape, zeros = parameter.shape, parameter.new_zeros
    state: dict[str, Tensor | int] = {"step": 0}
    if len(shape) < 2:
        state["exp_avg_sq"] = zeros(shape)
    else:
        state["exp_avg_sq_row"] = zeros(shape[:-1])
        state["exp_avg_sq_col"] = zeros(shape[:-2] + shape[-1:])
    return {**state, "RMS": zeros(())}
