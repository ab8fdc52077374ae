"""What is wrong with a recipe's values, in words.

In: pydantic's validation error and the values. Out: one `Problem` (key path, sentence) for each thing to mend.
Must not know: files, lines, overrides.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tunesmith.recipe.fields import TAG_KEYS, child, model_at, models_in
from tunesmith.recipe.models import Full, Lora, Recipe, Strict
from tunesmith.recipe.yaml12 import KeyPath, Value

_STAGES = models_in(Recipe.model_fields["stages"].annotation)
_TAGS = {str(stage.model_fields["method"].default) for stage in _STAGES} | {
    *(tuning.model_fields["kind"].default for tuning in (Lora, Full))
}
_SHOWN = 3
"""Methods named in a hint; the rest are counted."""
_UNION_MEMBERS = ("literal[", "list[")  # how pydantic names the members of a union of plain types

# Words of TRL, Axolotl, LLaMA-Factory and Unsloth that no spelling distance leads from.
_PEER_WORDS = {
    "base_model": "model.path",
    "datasets": "train",
    "dataset": "train",
    "gradient_accumulation_steps": "batch_size (examples an update; micro-batches are found by the engine)",
    "load_in_4bit": "model.quantization: nf4",
    "lora_alpha": "tuning.alpha",
    "lora_dropout": "tuning.dropout",
    "lora_r": "tuning.r",
    "lora_rank": "tuning.r",
    "lora_target_modules": "tuning.target_modules",
    "lr": "learning_rate",
    "lr_scheduler_type": "schedule",
    "micro_batch_size": "batch_size (examples an update; micro-batches are found by the engine)",
    "model_name_or_path": "model.path",
    "num_train_epochs": "epochs",
    "output_dir": "runs_folder and name",
    "per_device_train_batch_size": "batch_size (examples an update; micro-batches are found by the engine)",
    "save_total_limit": "keep_checkpoints",
    "sequence_len": "max_length",
    "val_set_size": "heldout_fraction",
    "warmup_ratio": "warmup_fraction",
    "warmup_steps": "warmup_fraction",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """`path` is where the fault shows; `at_key` says that the key is wrong rather than its value."""

    path: KeyPath
    text: str
    at_key: bool = False


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no known word is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def problems_of(error: ValidationError, values: Value) -> list[Problem]:
    """Every problem, in the order of the models' fields; the members of a union are told in one sentence."""
    wanted: dict[KeyPath, list[str]] = {}
    problems: dict[KeyPath, Problem] = {}
    for detail in error.errors(include_url=False, include_context=True):
        path = _key_path(detail["loc"], values)
        member = isinstance(detail["loc"][-1], str) and detail["loc"][-1].startswith(_UNION_MEMBERS)
        if detail["type"] == "literal_error" and member and isinstance(detail["input"], list):
            continue  # a list was meant; its items have problems of their own
        if member:
            wanted.setdefault(path, []).append(_wanted(detail))
            text = f"must be {' or '.join(wanted[path])}, not {_show(detail['input'])}"
            problems[path] = Problem(path, text)
            continue
        problem = _problem(detail, path, values)
        problems.setdefault(problem.path, problem)
    return list(problems.values())


def _key_path(location: Sequence[str | int], values: Value) -> KeyPath:
    """The location without the names of union members, which are pydantic's and stand in no recipe."""
    path: list[str | int] = []
    for part in location:
        known = isinstance(values, dict) and part in values
        if isinstance(part, str) and not known and (part in _TAGS or part.startswith(_UNION_MEMBERS)):
            continue
        path.append(part)
        values = child(values, part)
    return tuple(path)


def _problem(detail: ErrorDetails, path: KeyPath, values: Value) -> Problem:
    kind, given = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return Problem(path, _unknown_key(path, values), at_key=True)
    if kind == "missing":
        return Problem(path, "this key is required")
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return _wrong_tag(detail, path, values)
    if kind == "string_too_short":
        return Problem(path, "must not be empty")
    if kind == "too_short":
        return Problem(path, "must have at least one item")
    return Problem(path, f"must be {_wanted(detail)}, not {_show(given)}{_near_literal(detail)}")


def _unknown_key(path: KeyPath, values: Value) -> str:
    name = str(path[-1])
    model = model_at(values, path[:-1])
    known = list(model.model_fields) if model is not None else []
    hint = nearest(name, known)
    if not hint and name in _PEER_WORDS:
        hint = f"; here it is {_PEER_WORDS[name]}"
    if not hint and len(path) == 3 and path[0] == "stages":
        methods = [str(stage.model_fields["method"].default) for stage in _STAGES if name in stage.model_fields]
        more = f" and {len(methods) - _SHOWN} more" if len(methods) > _SHOWN else ""
        hint = f"; it belongs to the method {', '.join(methods[:_SHOWN])}{more}" if methods else ""
    return f"unknown key {name!r}{hint or '; known are ' + ', '.join(known)}"


def _wrong_tag(detail: ErrorDetails, path: KeyPath, values: Value) -> Problem:
    given = detail["input"]
    if not isinstance(given, dict):
        return Problem(path, f"must be a mapping, not {_show(given)}")
    key = TAG_KEYS[0] if path[:1] == ("stages",) and len(path) == 2 else TAG_KEYS[1]
    members: list[type[Strict]] = _STAGES if key == "method" else [Lora, Full]
    known = [str(model.model_fields[key].default) for model in members]
    choice = " or ".join([", ".join(map(repr, known[:-1])), repr(known[-1])])
    if key not in given:
        return Problem((*path, key), f"this key is required: {choice}")
    tag = given[key]
    return Problem((*path, key), f"must be {choice}, not {_show(tag)}{nearest(str(tag), known)}")


def _wanted(detail: ErrorDetails) -> str:
    """What would have been right, as it reads after `must be`."""
    plain = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "text",
        "list_type": "a list",
        "dict_type": "a mapping",
        "model_type": "a mapping",
        "model_attributes_type": "a mapping",
    }
    kind = detail["type"]
    if kind in plain:
        return plain[kind]
    if kind == "literal_error":
        return str(detail["ctx"]["expected"])
    if kind == "string_pattern_mismatch":
        return f"text that matches {detail['ctx']['pattern']}"
    return detail["msg"].removeprefix("Input should be ")


def _near_literal(detail: ErrorDetails) -> str:
    if detail["type"] != "literal_error" or not isinstance(detail["input"], str):
        return ""
    return nearest(detail["input"], [word.strip("'") for word in str(detail["ctx"]["expected"]).split("'")[1::2]])


def _show(value: object) -> str:
    """A value as the recipe would write it, cut to a readable length."""
    if value is None:
        return "null (nothing)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
