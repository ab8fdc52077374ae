"""What the README and the docs show exists: commands with their options, recipes, names, files."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

import tunesmith
from tests.architecture.source import PROJECT
from tunesmith.cli.main import cli
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.resources import shipped_recipes

PAGES = [
    *(PROJECT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
    *sorted((PROJECT / "docs").glob("*.md")),
]
COMMAND = re.compile(r"^\s*(?:\$ )?(tunesmith|make)((?: +[^#\n`]*)?)(?:\s+#.*)?$")


def shown_commands(page: Path) -> list[str]:
    """The lines of code blocks, fenced or indented, and the code spans that begin with one of our commands."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [line for line in text.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`((?:tunesmith|make) [^`\n]+)`", text)
    return [" ".join((match[1] + match[2]).split()) for line in lines if (match := COMMAND.match(line))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for shown in shown_commands(page):
        words = shlex.split(re.split(r"[>|&]", shown.replace("...", ""))[0])
        if words[0] == "make":
            assert words[1:] and words[1] in targets, f"{page.name}: `{shown}`: no such target"
        else:
            parse(words[1:], f"{page.name}: `{shown}`")


def parse(words: list[str], where: str) -> None:
    """Parse a command line down to its command, without running it."""
    command: click.Command = cli
    given = list(words)
    while isinstance(command, click.Group) and given and not given[0].startswith("-"):
        name = given.pop(0)
        assert name in command.commands, f"{where}: no such command {name!r}"
        command = command.commands[name]
    if not given:
        return  # a command spoken of by its name
    try:
        with command.make_context(command.name, [word for word in given if word != "--debug"]):
            pass
    except (click.exceptions.Exit, click.exceptions.NoArgsIsHelpError):
        return  # --help, --version and bare groups print and end
    except click.ClickException as error:
        raise AssertionError(f"{where}: {error.format_message()}") from None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_load(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page, "yaml")):
        if "\nstages:" in block:
            path = tmp_path / f"{page.stem}-{number}.yaml"
            path.write_text(block, encoding="utf-8")
            load_recipe(path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_uses_public_names(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "tunesmith":
                assert node.attr in tunesmith.__all__, f"{page.name}: tunesmith.{node.attr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_the_readme_shows_the_two_commands() -> None:
    shown = shown_commands(PAGES[0])
    assert "make quickstart" in shown
    assert "make test" in shown


def test_a_wrong_command_is_found() -> None:
    with pytest.raises(AssertionError, match="no such command 'trian'"):
        parse(["trian", "x"], "page")
    with pytest.raises(AssertionError, match="--stge"):
        parse(["chat", "runs/x", "--stge", "dpo"], "page")


def test_recipes_that_are_named_are_shipped() -> None:
    for shown in shown_commands(PAGES[0]):
        match = re.match(r"tunesmith (?:run|check|recipe explain) ([a-z][\w.-]*)(?: |$)", shown)
        if match and not match[1].endswith((".yaml", ".yml")):
            assert match[1] in shipped_recipes(), shown
