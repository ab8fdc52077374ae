"""Tunesmith: from a base language model and a person's own data to an aligned model.

Everything that the command does, for notebooks. Names load on first use, so `import tunesmith` costs nothing:
`run`, `check`, `compare`, `load`, `generate`, `merge` work on recipes and run folders; `dpo_loss` and `nll_loss` are
the objectives on tensors; `tree_logprobs` gives the log-probs of trees under any Hugging Face causal model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from tunesmith.version import VERSION as __version__

if TYPE_CHECKING:
    from tunesmith.data.types import Branch, Tree
    from tunesmith.engine.attention import ordinary_attention
    from tunesmith.engine.engine import Engine, tree_logprobs
    from tunesmith.errors import TunesmithError
    from tunesmith.model.stage import LoadedStage
    from tunesmith.objectives import dpo_loss, nll_loss
    from tunesmith.pipeline.api import check, compare, generate, load, merge, run
    from tunesmith.recipe.load import load_recipe, parse_recipe

__all__ = [
    "Branch",
    "Engine",
    "LoadedStage",
    "Tree",
    "TunesmithError",
    "__version__",
    "check",
    "compare",
    "dpo_loss",
    "generate",
    "load",
    "load_recipe",
    "merge",
    "nll_loss",
    "ordinary_attention",
    "parse_recipe",
    "run",
    "tree_logprobs",
]

_HOMES = {
    "Branch": "data.types",
    "Engine": "engine.engine",
    "LoadedStage": "model.stage",
    "Tree": "data.types",
    "TunesmithError": "errors",
    "check": "pipeline.api",
    "compare": "pipeline.api",
    "dpo_loss": "objectives",
    "generate": "pipeline.api",
    "load": "pipeline.api",
    "load_recipe": "recipe.load",
    "merge": "pipeline.api",
    "nll_loss": "objectives",
    "ordinary_attention": "engine.attention",
    "parse_recipe": "recipe.load",
    "run": "pipeline.api",
    "tree_logprobs": "engine.engine",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    return import_module(f"tunesmith.{_HOMES[name]}").__dict__[name]


def __dir__() -> list[str]:
    return __all__
