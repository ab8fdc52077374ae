"""The recipe's JSON Schema, for editors.

In: the models. Out: a draft 2020-12 schema as plain values. Must not know: files.

Put `# yaml-language-server: $schema=recipe.schema.json` at the top of a recipe after
`tunesmith recipe schema > recipe.schema.json`, and an editor completes and checks it.
"""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from tunesmith.recipe.fields import models_in
from tunesmith.recipe.models import Full, Recipe, Strict
from tunesmith.recipe.yaml12 import Value


def recipe_schema() -> dict[str, Value]:
    """The schema of a recipe file."""
    schema: dict[str, Any] = Recipe.model_json_schema()
    # The key that chooses a model must stand in the file, though the model itself has a default for it.
    stages = models_in(Recipe.model_fields["stages"].annotation)
    chosen: list[tuple[type[Strict], str]] = [*((stage, "method") for stage in stages), (Full, "kind")]
    for model, key in chosen:
        definition = schema["$defs"][model.__name__]
        definition["required"] = [*definition.get("required", []), key]
    head = {
        "$schema": GenerateJsonSchema.schema_dialect,
        "$id": "urn:tunesmith:recipe",
        "title": "Tunesmith recipe",
    }
    return head | {key: value for key, value in schema.items() if key != "title"}
