"""The JSON Schema that editors use."""

from __future__ import annotations

import json

from tunesmith.recipe.schema import recipe_schema


def test_head_and_strictness() -> None:
    schema = recipe_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"] == "urn:tunesmith:recipe"
    assert schema["title"] == "Tunesmith recipe"
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["name", "model", "stages"]
    json.dumps(schema, allow_nan=False)


def test_every_property_has_a_description() -> None:
    schema = recipe_schema()
    definitions = schema["$defs"]
    assert isinstance(definitions, dict)
    for definition in [schema, *definitions.values()]:
        assert isinstance(definition, dict)
        properties = definition["properties"]
        assert isinstance(properties, dict)
        for name, entry in properties.items():
            assert isinstance(entry, dict)
            assert entry.get("description"), f"{definition['title']}.{name}"


def test_the_choosing_keys_are_required() -> None:
    definitions = recipe_schema()["$defs"]
    assert isinstance(definitions, dict)
    required = {name: entry.get("required", []) for name, entry in definitions.items() if isinstance(entry, dict)}
    assert "method" in required["DpoStage"]
    assert "method" in required["SftStage"]
    assert "method" in required["CompletionStage"]
    assert "kind" in required["Full"]
    assert "kind" not in required["Lora"]  # `tuning: {r: 32}` means LoRA


def test_units_are_in_the_schema() -> None:
    text = json.dumps(recipe_schema()["$defs"])
    assert '"x-unit": "tokens"' in text
