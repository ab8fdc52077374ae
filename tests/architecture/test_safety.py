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
RUNNERS = {"eval", "exec", "os.system", "os.popen", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "runpy.run_path"}
UPLOADS = {"push_to_hub", "upload_file", "upload_folder", "upload_large_folder", "create_repo", "create_commit"}
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


def test_every_load_says_whether_it_trusts() -> None:
    """transformers asks on the terminal where nothing is said, and takes `y` for an answer."""
    wrong = [f"{module.name}:{line}" for module in modules("src") for line in silent_loads(module.tree)]
    assert not wrong, f"{wrong} load without `trust_remote_code=` (TRAPS S4)"


def test_trust_comes_from_the_command_line_only() -> None:
    users = {module.name for module in modules("src") if re.search(r"(?<!def )remote_code\(\)", module.text)}
    assert users == {"src/tunesmith/cli/stages.py"}
    assert not [module.name for module in modules("src") if module.package == "recipe" and "remote_code" in module.text]


def test_no_text_is_run_as_code() -> None:
    wrong = [f"{module.name}:{line}" for module in modules("src") for line in runs_text(module.tree)]
    assert not wrong, f"{wrong} run text as code or through a shell"


def test_nothing_is_uploaded() -> None:
    wrong = [f"{module.name}:{line}" for module in modules("src") for line in uploads(module.tree)]
    assert not wrong, f"{wrong} could send something to a hub (TRAPS S19)"


def uploads(tree: ast.AST) -> Iterator[int]:
    """Lines that name one of the hub's ways to send, or a tracker that would."""
    for node in ast.walk(tree):
        name = node.attr if isinstance(node, ast.Attribute) else node.arg if isinstance(node, ast.keyword) else ""
        name = node.name if isinstance(node, ast.alias) else name
        if name in UPLOADS or str(name).split(".")[0] in ("wandb", "mlflow", "comet_ml"):
            yield node.lineno if isinstance(node, ast.expr | ast.alias | ast.keyword) else 0


def silent_loads(tree: ast.AST) -> Iterator[int]:
    """Lines that load with one of transformers' Auto classes and do not say `trust_remote_code`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        loads = node.func.attr in ("from_pretrained", "from_config") and ast.unparse(node.func.value).startswith("Auto")
        if loads and not any(keyword.arg in ("trust_remote_code", None) for keyword in node.keywords):
            yield node.lineno


def runs_text(tree: ast.AST) -> Iterator[int]:
    """Lines that call eval or exec, a shell, torch.hub or an unsafe YAML loader."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in RUNNERS:
            yield node.lineno
    yield from (line for line, name, value in settings(tree) if name == "shell" and value)


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
    code = "AutoModel.from_pretrained(f)\nAutoConfig.from_pretrained(f, trust_remote_code=x)\nA.from_pretrained(f)\n"
    assert list(silent_loads(ast.parse(code))) == [1]
    code = "m.push_to_hub(x)\nm.save(push_to_hub=True)\nfrom hub import upload_file\nm.save(x)\nimport wandb\n"
    assert sorted(uploads(ast.parse(code))) == [1, 2, 3, 5]
    code = "eval(x)\nmodel.eval()\nrun(x, shell=True)\nos.system(x)\nrun(x, shell=False)\n"
    assert sorted(runs_text(ast.parse(code))) == [1, 3, 4]
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
