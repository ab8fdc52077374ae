"""A preparation that was broken off goes on where it stopped, and ends in the same bytes (F1, F24, F39, F42)."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.data.build import CHATML, renderer, write_jsonl
from tests.unit.data.test_prepare import qa
from tunesmith.data import cache, kept, reading
from tunesmith.data.kept import SUFFIX, decoded, encoded, task_sha
from tunesmith.data.prepare import Prepared, prepare_stage
from tunesmith.data.sources import OpenedSource, RawChunk
from tunesmith.data.worker import ChunkResult, Task, process
from tunesmith.errors import DataError, ResourceError
from tunesmith.recipe.models import SftStage

NUM_CHUNKS = 6


class Stopped(Exception):
    """What `between` raises here."""


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """24 rows in chunks of four, each of them kept."""
    real = OpenedSource.raw_chunks
    monkeypatch.setattr(reading, "KEPT_BYTES", 0)
    monkeypatch.setattr(OpenedSource, "raw_chunks", lambda self, num_rows=4: real(self, num_rows))
    return write_jsonl(tmp_path / "a.jsonl", *(qa(number) for number in range(4 * NUM_CHUNKS)))


def prepared(path: Path, folder: str = "cache", *, workers: int = 1, **calls: Callable[..., None]) -> Prepared:
    stage = SftStage.model_validate(
        {"name": "s", "method": "sft", "train": [{"path": str(path)}], "heldout_fraction": 0.2}
    )
    return prepare_stage(stage, renderer(CHATML), workers=workers, cache_folder=path.parent / folder, **calls)


def content(folder: Path) -> dict[str, bytes]:
    """Every byte of the one entry in a cache folder, which must hold nothing else."""
    (entry,) = folder.iterdir()
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in entry.rglob("*") if path.is_file()}


def after(count: int, act: Callable[[], None]) -> Callable[[], None]:
    """Acts at the call with this number."""
    calls = iter(range(1000))
    return lambda: act() if next(calls) == count else None


def stop() -> None:
    raise Stopped


def kept_files(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"cache/.tmp-*-chunks/*{SUFFIX}"))


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The chunks that were computed in this process."""
    done: list[str] = []
    real = reading.process

    def spy(task: Task, renderer: object) -> ChunkResult:
        done.append(task_sha(task))
        return real(task, renderer)  # type: ignore[arg-type]

    monkeypatch.setattr(reading, "process", spy)
    return done


@pytest.mark.parametrize("at", [0, 3, NUM_CHUNKS - 1])
def test_a_stopped_preparation_goes_on_and_ends_in_the_same_bytes(rows: Path, worked: list[str], at: int) -> None:
    prepared(rows, "whole")
    worked.clear()
    with pytest.raises(Stopped):
        prepared(rows, between=after(at, stop))
    assert len(kept_files(rows)) == len(worked) == at + 1
    told: list[str] = []
    second = prepared(rows, tell=told.append)
    assert len(worked) == len(set(worked)) == NUM_CHUNKS  # not one chunk was computed twice
    assert f"{at + 1} chunks" in told[0]
    assert content(rows.parent / "cache") == content(rows.parent / "whole")
    assert len(second.train) + len(second.heldout) == 4 * NUM_CHUNKS


def test_a_killed_process_goes_on_too(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(rows, "whole")
    pid = os.fork()
    if not pid:
        prepared(rows, workers=2, between=after(3, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert len(kept_files(rows)) >= 4
    monkeypatch.setattr(cache, "UNLOCKED_SECONDS", -1)
    _until(lambda: not _owned(rows.parent / "cache"))
    prepared(rows, workers=2)
    assert content(rows.parent / "cache") == content(rows.parent / "whole")  # and its half-made entry is gone


def _owned(folder: Path) -> bool:
    """Whether some process still has an entry in the making: a worker of a killed one ends a moment after it."""
    return any(not cache._is_abandoned(path) for path in folder.glob(".tmp-*") if not path.name.endswith("-chunks"))


def _until(met: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not met() and time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other", "folder"])
def test_a_damaged_chunk_is_computed_again(rows: Path, worked: list[str], damage: str) -> None:
    prepared(rows, "whole")
    with pytest.raises(Stopped):
        prepared(rows, between=after(NUM_CHUNKS - 1, stop))
    first, second = kept_files(rows)[:2]
    data = bytearray(first.read_bytes())
    data[-3] ^= 1
    found = {"flip": bytes(data), "cut": bytes(data[:-9]), "empty": b"", "other": second.read_bytes(), "folder": b""}
    first.write_bytes(found[damage])
    if damage == "folder":
        first.unlink()
        first.mkdir()
    worked.clear()
    prepared(rows)
    assert worked == [first.stem]
    assert content(rows.parent / "cache") == content(rows.parent / "whole")


def test_changed_rows_take_no_old_chunk(rows: Path, worked: list[str]) -> None:
    with pytest.raises(Stopped):
        prepared(rows, between=after(4, stop))
    write_jsonl(rows, *(qa(number) for number in range(1, 4 * NUM_CHUNKS)))
    worked.clear()
    prepared(rows)
    assert len(worked) == NUM_CHUNKS


def test_a_killed_worker_is_named_and_leaves_nothing_half_done(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(rows, "whole")
    real = reading.process

    def fail(task: Task, renderer: object) -> ChunkResult:
        if getattr(task.raw, "numbers", ())[0] == 9:  # the third chunk
            (kept_files(rows)[0].parent / f".tmp-{os.getppid()}-{os.getpid()}").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(task, renderer)  # type: ignore[arg-type]

    monkeypatch.setattr(reading, "process", fail)
    with pytest.raises(ResourceError, match=r"process \d+ \(SIGKILL\)") as caught:
        prepared(rows, workers=2)
    assert caught.value.exit_code == 5
    assert not list(rows.parent.glob("cache/.tmp-*/.tmp-*"))
    assert kept_files(rows)
    monkeypatch.setattr(reading, "process", real)
    prepared(rows, workers=2)
    assert content(rows.parent / "cache") == content(rows.parent / "whole")


def test_a_signal_to_the_whole_group_is_a_stop_and_no_lack_of_memory(
    rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(task: Task, renderer: object) -> ChunkResult:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("a worker leaves SIGTERM to nobody")

    monkeypatch.setattr(reading, "process", fail)
    with pytest.raises(Stopped):
        prepared(rows, workers=2, between=stop)


def test_refused_rows_leave_nothing(rows: Path) -> None:
    rows.write_bytes(rows.read_bytes() + b"{\n")
    with pytest.raises(DataError):
        prepared(rows)
    assert list((rows.parent / "cache").iterdir()) == []


def test_small_sources_are_not_kept(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "KEPT_BYTES", kept.KEPT_BYTES)
    with pytest.raises(Stopped):
        prepared(rows, between=after(3, stop))
    assert list((rows.parent / "cache").iterdir()) == []


def test_nothing_is_kept_on_a_disk_that_is_nearly_full(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "free_bytes", lambda path: 7 * rows.stat().st_size)
    with pytest.raises(Stopped):
        prepared(rows, between=after(3, stop))
    assert list((rows.parent / "cache").iterdir()) == []


def test_a_disk_that_refuses_a_chunk_costs_only_the_time(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(rows, "whole")

    real = kept._write

    def full(path: Path, data: bytes, owner: int) -> None:
        shutil.rmtree(path.parent, ignore_errors=True)
        real(path, data, owner)

    monkeypatch.setattr(kept, "_write", full)
    prepared(rows)
    assert content(rows.parent / "cache") == content(rows.parent / "whole")


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    """Bad rows, dropped ones, held-out examples and odd characters included."""
    path = write_jsonl(
        tmp_path / "a.jsonl", qa(1), qa(2, "häß\u2028\U0001f600 \\"), {"question": 3, "answer": None}, qa(4, "")
    )
    path.write_bytes(path.read_bytes() + b'{"question": "\xff"}\n{"question": "\\ud800", "answer": "a"}\n')
    stage = SftStage.model_validate({"name": "s", "method": "sft", "train": [{"path": str(path)}]})
    for task in _tasks(stage):
        result = process(task, renderer(CHATML))
        found = decoded(encoded(result))
        assert found.fates == result.fates
        assert any(result.fates.examples)
        assert found.bad == result.bad != []
        others = ("stops", "kinds", "notices", "keys", "num_joined", "feedback")
        assert [getattr(found, name) for name in others] == [getattr(result, name) for name in others]
        for name in ("tokens", "trained", "edges", "num_edges"):
            one, two = getattr(found.packed, name), getattr(result.packed, name)
            assert one.dtype == two.dtype
            assert one.tolist() == two.tolist()
        assert (found.packed.ids, found.packed.shas) == (result.packed.ids, result.packed.shas)


def _tasks(stage: SftStage) -> Iterator[Task]:
    from tunesmith.data.formats import plan_format
    from tunesmith.data.sources import open_source, read_chunk
    from tunesmith.data.types import Row

    source = stage.train[0]

    def task(raw: RawChunk) -> Task:
        whole = [row for row in read_chunk(raw, source) if isinstance(row, Row)]
        return Task(raw, source, plan_format(whole[:2], source), 0.5, keep_examples=True)

    yield from map(task, open_source(source).raw_chunks())
