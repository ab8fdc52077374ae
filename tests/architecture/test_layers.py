"""A module imports from the layers below it and from its own package only."""

from __future__ import annotations

import subprocess
import sys

from tests.architecture.source import PACKAGE, imports, modules

# From the top down; packages of one row never import each other. web and synth have their place before they exist.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__init__", "__main__"),  # the public names, and the command
    ("cli",),
    ("web",),
    ("pipeline",),
    ("selftest",),
    ("train", "comparison", "export", "serve", "synth"),
    ("diagnosis",),
    ("objectives", "sample"),
    ("engine",),
    ("model",),
    ("data",),
    ("runs",),
    ("recipe",),
    ("errors", "version"),
    ("redact",),
)
DEPTH = {package: depth for depth, layer in enumerate(LAYERS) for package in layer}
WITHOUT_TORCH = ("diagnosis", "data", "runs", "recipe", "errors", "version", "redact", "cli")
# What a layer may import inside a function, when it needs it: the sandbox of chat templates, saved and hub data sets.
BORROWED = {"data": ("transformers.utils.chat_template_utils", "datasets")}
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "pandas")


def ours(name: str) -> str | None:
    """`tunesmith.data.types.Row` -> `data`; None for what is not ours."""
    parts = name.split(".")
    return parts[1] if parts[0] == "tunesmith" and len(parts) > 1 else None


def test_every_package_has_its_layer() -> None:
    assert {module.package for module in modules("src")} <= set(DEPTH)


def test_imports_point_down() -> None:
    wrong = []
    for module in modules("src"):
        for line, name in imports(module, typing_too=True):
            package = ours(name)
            if package is None or package == module.package:
                continue
            if package not in DEPTH or DEPTH[package] <= DEPTH[module.package]:
                wrong.append(f"{module.name}:{line}: {module.package} must not import {name}")
    assert not wrong, "\n".join(wrong)


def test_the_lower_layers_import_no_torch() -> None:
    wrong = [
        f"{module.name}:{line}: imports {name}"
        for module in modules("src")
        if module.package in WITHOUT_TORCH
        for line, name in imports(module, typing_too=False)
        if name.split(".")[0] in HEAVY and not name.startswith(BORROWED.get(module.package, ("-",)))
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_below_model_brings_torch_along() -> None:
    files = [module.path.relative_to(PACKAGE.parent) for module in modules("src") if module.package in WITHOUT_TORCH]
    names = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
