"""A tiny hub on this machine: what a download of a data set's or a model's files asks for, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Hub:
    """One repository, the data set or model `org/rows`: its commits, and the one that `main` is now. Every request is
    logged."""

    commits: dict[str, Files] = field(default_factory=dict)
    main: str = ""
    refusal: tuple[int, str] | None = None  # status and X-Error-Code of every answer
    num_refused: int = 1 << 30  # so many answers are refused, then it is over
    num_cut: int = 0  # so many bodies of files break off in the middle
    log: list[str] = field(default_factory=list)
    endpoint: str = ""
    kind: str = "datasets"  # or "models"

    def push(self, files: Files) -> str:
        """A new commit, which `main` moves to."""
        listing = "".join(f"{name} {hashlib.sha1(data).hexdigest()}\n" for name, data in sorted(files.items()))
        self.main = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[self.main] = files
        return self.main

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        if self.refusal is not None and self.num_refused > 0:
            self.num_refused -= 1
            status, code = self.refusal
            return status, {"X-Error-Code": code, "X-Error-Message": code}, b"{}"
        if path.startswith(f"/api/{self.kind}/org/rows/revision/"):
            sha = self._commit(path.rpartition("/")[2])
            if sha is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            return 200, {}, json.dumps({"id": "org/rows", "sha": sha, "siblings": []}).encode()
        if path.startswith(f"/api/{self.kind}/org/rows/tree/"):
            files = self.commits.get(path.rpartition("/")[2])
            if files is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return 200, {}, json.dumps(entries).encode()
        resolve = "/org/rows/resolve/" if self.kind == "models" else f"/{self.kind}/org/rows/resolve/"
        if path.startswith(resolve):
            revision, _, name = path.removeprefix(resolve).partition("/")
            sha = self._commit(revision)
            data = self.commits[sha].get(name) if sha else None
            if sha is None or data is None:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            return 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha}, data
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def _commit(self, revision: str) -> str | None:
        sha = self.main if revision == "main" else revision
        return sha if sha in self.commits else None


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub at `hub.endpoint`, for as long as the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Nothing on stderr."""

        def do_HEAD(self) -> None:
            self._send(with_body=False)

        def do_GET(self) -> None:
            self._send(with_body=True)

        def _send(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.log.append(f"{self.command} {path}")
            status, headers, body = hub.answer(path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            is_cut = with_body and hub.num_cut > 0 and "/resolve/" in path
            hub.num_cut -= is_cut
            if with_body:
                self.wfile.write(body[: len(body) // 2] if is_cut else body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
