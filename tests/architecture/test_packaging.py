"""What is installed: pinned, small, and with the files that the package needs."""

from __future__ import annotations

import os
import re
import tomllib
from fnmatch import fnmatch
from typing import Any

import pytest

from tests.architecture.source import PACKAGE, PROJECT
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.resources import shipped_recipes

MAX_CORE_PACKAGES = 55
PIN = re.compile(r"([a-z0-9][a-z0-9-]*)==(\S+)\Z")


def project_table() -> dict[str, Any]:
    return tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))


def pins() -> dict[str, dict[str, str]]:
    """Section -> package -> version, as constraints.txt has them; a line that is no exact pin fails."""
    sections: dict[str, dict[str, str]] = {}
    current = ""
    for line in (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line in ("# core", "# dev"):
            current = line.removeprefix("# ")
        elif line and not line.startswith("#"):
            match = PIN.match(line)
            assert match, f"not an exact pin: {line}"
            sections.setdefault(current, {})[match[1]] = match[2]
    return sections


def name_of(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match
    return match[0].lower().replace(".", "-").replace("_", "-")


def test_every_direct_dependency_is_pinned() -> None:
    table = project_table()["project"]
    pinned = pins()
    assert {name_of(requirement) for requirement in table["dependencies"]} <= set(pinned["core"])
    dev = {name_of(requirement) for requirement in table["optional-dependencies"]["dev"]}
    assert dev <= set(pinned["core"]) | set(pinned["dev"])


def test_the_core_is_small() -> None:
    assert len(pins()["core"]) + 1 <= MAX_CORE_PACKAGES  # and Tunesmith itself


def test_torch_is_pinned_exactly_and_alike() -> None:
    dependencies = project_table()["project"]["dependencies"]
    assert f"torch=={pins()['core']['torch']}" in dependencies
    assert "+" not in pins()["core"]["torch"]  # a local version exists on one index only


def test_the_build_backend_is_pinned_alike() -> None:
    assert project_table()["build-system"]["requires"] == [f"setuptools=={pins()['core']['setuptools']}"]


def test_package_data_reaches_the_wheel() -> None:
    patterns = project_table()["tool"]["setuptools"]["package-data"]["tunesmith"]
    for path in PACKAGE.rglob("*"):
        name = path.relative_to(PACKAGE).as_posix()
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            assert any(fnmatch(name, pattern.replace("**/", "*")) for pattern in patterns), f"not packaged: {name}"


def test_the_embedded_weights_are_small() -> None:
    for path in (PACKAGE / "embedded").rglob("*.safetensors"):
        assert path.stat().st_size <= 8 * 2**20


def test_ci_can_be_run() -> None:
    assert os.access(PROJECT / ".ci" / "run", os.X_OK)


def test_the_quickstart_is_shipped() -> None:
    assert "quickstart" in shipped_recipes()


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_every_shipped_recipe_loads(name: str) -> None:
    assert load_recipe(shipped_recipes()[name]).recipe.name == name
