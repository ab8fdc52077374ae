"""The page of reliability speaks of every promise, fault and threat, names tests that exist, and is as its data say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.reliability.page import (
    PAGE,
    Outcome,
    Row,
    merged,
    missing_tests,
    read_junit,
    read_passes,
    read_rows,
    render,
    unanswered,
)

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.e2e.test_a" name="test_one[x]"/>
<testcase classname="tests.e2e.test_a" name="test_one[y]"><failure message="no"/></testcase>
<testcase classname="tests.e2e.test_a" name="test_two"/>
<testcase classname="tests.e2e.test_a" name="test_three[cpu]"/>
<testcase classname="tests.e2e.test_a" name="test_three[gpu]"><skipped/></testcase>
</testsuite></testsuites>"""


def test_every_named_test_exists() -> None:
    assert missing_tests(read_rows()) == []


def test_every_promise_fault_and_threat_has_a_row() -> None:
    assert unanswered(read_rows()) == []


def test_the_page_is_as_its_data_say() -> None:
    assert PAGE.read_text("utf-8") == render(read_rows(), read_passes()), (
        "run: python -m tests.reliability.page --write"
    )


def test_a_test_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_one() -> None: ...\n")
    tests = ["test_a.py::test_one", "test_a.py::test_one[x]", "test_a.py::test_two", "test_b.py::test_one"]
    rows = [Row("F1", "", "", test) for test in tests]
    assert missing_tests(rows, tmp_path) == ["test_a.py::test_two", "test_b.py::test_one"]


def test_rows_of_another_shape_are_refused(tmp_path: Path) -> None:
    (tmp_path / "z.json").write_text(json.dumps([{"id": "F1", "fault": "", "result": ""}]))
    with pytest.raises(ValueError, match=r"z\.json"):
        read_rows(tmp_path)


def test_results_of_pytest(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text(JUNIT)
    found = read_junit(tmp_path / "junit.xml")
    assert found["tests/e2e/test_a.py::test_one[x]"] == "passed"
    assert found["tests/e2e/test_a.py::test_one"] == "failed"  # one of its two variants
    assert found["tests/e2e/test_a.py::test_two"] == "passed"
    assert found["tests/e2e/test_a.py::test_three"] == "passed"  # the other variant needs a GPU


def test_the_day_of_the_last_pass_stays_when_a_test_fails_or_does_not_run() -> None:
    before = {"a": Outcome("passed", "2026-01-01"), "b": Outcome("passed", "2026-01-01"), "gone": Outcome("passed", "")}
    after = merged(before, {"a": "failed", "c": "passed"}, ["a", "b", "c"], day="2026-01-02")
    assert after == {
        "a": Outcome("failed", "2026-01-01"),
        "b": Outcome("passed", "2026-01-01"),
        "c": Outcome("passed", "2026-01-02"),
    }


def test_a_failed_test_is_seen_on_the_page(tmp_path: Path) -> None:
    page = render(
        [Row("F7", "cut | off", "refused", "tests/a.py::test_a")], {"tests/a.py::test_a": Outcome("failed", "")}
    )
    assert r"| **F7** | a checkpoint file is cut to 0, 50 or 99 % | cut \| off | refused |" in page
    assert "| [test_a](../tests/a.py) | **failed** |" in page
    assert "| **F8** | one bit of a file is flipped | | **no test** |" in page
