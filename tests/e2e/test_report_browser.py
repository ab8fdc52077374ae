"""The report in a real browser: no script runs, nothing is asked from the network, and it looks like something."""

from __future__ import annotations

import http.server
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.comparison.build import hostile_report
from tunesmith.comparison.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--hide-scrollbars",
)


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine: the report was not opened in a browser")
    return found


def ask(browser: str, folder: Path, *arguments: str) -> str:
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [browser, *FLAGS, profile, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@contextmanager
def listener() -> Iterator[tuple[int, list[str]]]:
    """A server on this machine that notes every request it gets."""
    heard: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port, heard
    finally:
        server.shutdown()
        thread.join()


def aim(html: str, port: int) -> str:
    """The hostile texts' beacons pointed at the listener, so that a request would be heard."""
    return html.replace("127.0.0.1:9/", f"127.0.0.1:{port}/")


def test_hostile_texts_run_nothing_and_ask_for_nothing(browser: str, tmp_path: Path) -> None:
    path = write_report(*hostile_report(tmp_path / "runs"))
    with listener() as (port, heard):
        path.write_text(aim(path.read_text("utf-8"), port), "utf-8")
        dom = ask(browser, tmp_path, "--dump-dom", path.as_uri())
        assert heard == []
    head = dom[: dom.index("</head>")]
    assert "&lt;script&gt;document.title" in head  # the title is the run's name, as text
    assert "<title>CANARY" not in dom
    assert "<script" not in dom and "<img" not in dom and "<iframe" not in dom
    assert dom.count("<figure") >= 8


def test_the_check_itself_hears_a_page_that_runs_and_asks(browser: str, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    with listener() as (port, heard):
        bad = (
            "<!doctype html><title>x</title><img src=http://127.0.0.1:9/beacon><script>document.title='CANARY'</script>"
        )
        page.write_text(aim(bad, port), "utf-8")
        dom = ask(browser, tmp_path, "--dump-dom", page.as_uri())
        assert "/beacon" in heard
    assert "<title>CANARY</title>" in dom


@pytest.mark.parametrize("width", [1280, 420])
def test_the_page_draws_at_desk_and_phone_width(browser: str, tmp_path: Path, width: int) -> None:
    path = write_report(*hostile_report(tmp_path / "runs"))
    image = tmp_path / "page.png"
    ask(browser, tmp_path, f"--window-size={width},2000", f"--screenshot={image}", path.as_uri())
    assert image.stat().st_size > 20_000  # an empty page of this size compresses to a few kB
