"""The recipe's JSON Schema, for editors.

In: the models. Out: a draft 2020-12 schema as plain values. Must not know: files.

Put `# yaml-language-server: $schema=recipe.schema.json` at the top of a recipe after
`tunesmith recipe schema > recipe.schema.json`, and an editor completes and checks it.
"""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from tunesmith.recipe.models import CompletionStage, DpoStage, Full, Recipe, SftStage
from tunesmith.recipe.yaml12 import Value


def recipe_schema() -> dict[str, Value]:
    """The schema of a recipe file."""
    schema: dict[str, Any] = Recipe.model_json_schema()
    # The key that chooses a model must stand in the file, though the model itself has a default for it.
    for model, key in ((SftStage, "method"), (CompletionStage, "method"), (DpoStage, "method"), (Full, "kind")):
        definition = schema["$defs"][model.__name__]
        definition["required"] = [*definition.get("required", []), key]
    head = {
        "$schema": GenerateJsonSchema.schema_dialect,
        "$id": "urn:tunesmith:recipe",
        "title": "Tunesmith recipe",
    }
    return head | {key: value for key, value in schema.items() if key != "title"}
