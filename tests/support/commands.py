"""The command `tunesmith` as a process of its own, many times, without paying for its imports each time.

A server process imports everything once, does nothing with it and forks; each fork is one command with its own number,
signals and exit code. `prepare` is Python that runs in it first, to make a step slow or to let it hang.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Command:
    """A command that runs, or has run."""

    server: Server
    pid: int
    output: Path

    def text(self) -> str:
        """What it has written so far, both streams."""
        return self.output.read_text("utf-8", errors="replace")

    def wait(self) -> int:
        """Its exit code, as a shell has it: 128 + the number of the signal that killed it."""
        code = self.server.ask({"wait": self.pid})["code"]
        return code if code >= 0 else 128 - code

    def send(self, number: signal.Signals, *, group: bool = False) -> None:
        """A signal to it, or to it and every process that it started, as a terminal does."""
        if group:
            os.killpg(self.pid, number)
        else:
            os.kill(self.pid, number)

    def until(self, is_there: Callable[[], object], what: str = "") -> None:
        """Wait until something is there; fails where that takes too long."""
        end = time.monotonic() + WAIT_SECONDS
        while not is_there():
            if time.monotonic() > end:
                raise AssertionError(f"{what or 'it'} did not come:\n{self.text()}")
            time.sleep(0.002)

    def until_said(self, text: str) -> None:
        """Wait for a text in its output."""
        self.until(lambda: text in self.text(), text)


class Server:
    """Starts commands; see `serving`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._number = 0

    def ask(self, request: dict[str, object]) -> dict[str, int]:
        """One line there, one line back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert isinstance(answer, dict)
        return answer

    def start(self, folder: Path, *arguments: str, prepare: str = "") -> Command:
        """`tunesmith ARGUMENTS` in `folder`, with caches of its own there."""
        self._number += 1
        output = folder / f"output-{self._number}.txt"
        output.touch()
        request = {"folder": str(folder), "output": str(output), "arguments": arguments, "prepare": prepare}
        return Command(self, self.ask(request)["pid"], output)

    def run(self, folder: Path, *arguments: str, prepare: str = "") -> tuple[int, str]:
        """The same to its end: the exit code and what was said."""
        command = self.start(folder, *arguments, prepare=prepare)
        return command.wait(), command.text()


@contextmanager
def serving(project: Path) -> Iterator[Server]:
    """A server for the length of the block."""
    command = [sys.executable, "-m", "tests.support.commands"]
    with subprocess.Popen(command, cwd=project, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Server(process)
        assert process.stdin is not None
        process.stdin.close()


def _serve() -> None:
    import torch  # before the fork: what is imported here is imported for every command
    import transformers  # noqa: F401

    import tunesmith.comparison.run
    import tunesmith.export.merge
    import tunesmith.pipeline.run
    import tunesmith.serve.chat  # noqa: F401

    torch.set_num_threads(1)
    with suppress(KeyboardInterrupt):
        for line in sys.stdin:
            request = json.loads(line)
            if "wait" in request:
                _, status = os.waitpid(request["wait"], 0)
                answer = {"code": os.waitstatus_to_exitcode(status)}
            else:
                answer = {"pid": os.fork() or _become(request)}
            print(json.dumps(answer), flush=True)


def _become(request: dict[str, str]) -> int:
    """In the fork: the command, to its end."""
    from tunesmith.cli.main import main

    code = 70
    try:
        os.setsid()
        os.chdir(request["folder"])
        os.environ["XDG_CACHE_HOME"] = f"{request['folder']}/cache"
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT, 0o600)
        for number, handle in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
            os.dup2(handle, number)
        sys.stdin = os.fdopen(0, encoding="utf-8")  # what the server has read ahead is not the command's
        exec(request["prepare"], {})
        main(request["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:  # what would be a traceback in the real process
        print(f"Traceback: {error!r}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
