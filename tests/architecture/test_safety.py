"""What no file may hold: pickles, remote code, bare excepts, places of one machine."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.architecture.source import CODE_FOLDERS, PROJECT, Module, imports, modules

PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
LOADERS = {"torch.load", "torch.save", "torch.serialization.load", "torch.serialization.save"}
# Written in two halves, so that this file does not hold what it looks for.
PLACES = re.compile(
    "|".join(
        [
            r"(?<![\w.-])/wo" + r"rk/",
            r"/opt/(py" + r"pi|wheels)",
            r"py" + r"pi\.org",
            r"python" + r"hosted",
            r"download\.py" + r"torch",
            r"npm" + r"js\.(com|org)",
            r"/home/\w+/",
        ]
    )
)


def test_nothing_is_pickled() -> None:
    wrong = [f"{module.name}:{line}" for module in modules("src") for line in pickles(module)]
    assert not wrong, f"{wrong} read or write pickles (TRAPS S1 to S3); use safetensors or JSON"


def test_remote_code_is_never_trusted() -> None:
    wrong = [f"{module.name}:{line}" for module in modules(*CODE_FOLDERS) for line in trusting(module.tree)]
    assert not wrong, f"{wrong} trust remote code (TRAPS S4)"


def test_no_bare_except() -> None:
    wrong = [
        f"{module.name}:{node.lineno}"
        for module in modules("src")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert not wrong, f"bare except in {wrong}"


def pickles(module: Module) -> Iterator[int]:
    """Lines that import a pickle module, touch one of torch's loaders, or allow numpy to unpickle."""
    for line, name in imports(module, typing_too=True):
        if name.split(".")[0] in PICKLES or name in LOADERS:
            yield line
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in LOADERS:
            yield node.lineno
    yield from (line for line, name, value in settings(module.tree) if name == "allow_pickle" and value)


def trusting(tree: ast.AST) -> Iterator[int]:
    """Lines that set trust_remote_code to anything but a literal false."""
    return (line for line, name, value in settings(tree) if name == "trust_remote_code" and value)


def test_no_places_of_one_machine() -> None:
    wrong = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" in data[:4096] or data[:2] == b"\x1f\x8b":
            continue
        for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), start=1):
            if PLACES.search(line):
                wrong.append(f"{path.relative_to(PROJECT)}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)


def settings(tree: ast.AST) -> Iterator[tuple[int, str, object]]:
    """Every literal given by name: keyword arguments, entries of dict displays, assignments to names and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg and isinstance(node.value, ast.Constant):
            yield node.value.lineno, node.arg, node.value.value
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    yield value.lineno, str(key.value), value.value
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                yield node.lineno, ast.unparse(target).split(".")[-1], node.value.value


def test_what_the_searches_find() -> None:
    code = "f(trust_remote_code=True)\nx = {'trust_remote_code': 1}\nc.trust_remote_code = True\n"
    code += "f(trust_remote_code=False)\n"
    assert sorted(trusting(ast.parse(code))) == [1, 2, 3]
    code = "import pickle\nfrom torch import load\ntorch.load(f)\nnp.load(f, allow_pickle=True)\n"
    code += "safetensors.torch.load(f)\n"
    assert sorted(pickles(Module(PROJECT / "x.py", code, ast.parse(code)))) == [1, 2, 3, 4]


def tracked() -> list[Path]:
    """The files of the repository; a source tree without git counts every file outside hidden folders."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        paths = [PROJECT / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [
            path for path in PROJECT.rglob("*") if not any(p.startswith(".") for p in path.relative_to(PROJECT).parts)
        ]
    return [path for path in paths if path.is_file()]
