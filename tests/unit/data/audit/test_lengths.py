from __future__ import annotations

from tests.unit.data.audit.rows import clean, lines, only
from tunesmith.data.audit.lengths import length_facts, truncation
from tunesmith.data.audit.subject import Subject


def test_truncation_counts_rows_and_tokens() -> None:
    rows = Subject(clean(10), lengths=[10] * 8 + [60, 120], max_length=50)
    found = only(truncation(rows))
    assert lines(found) == [10, 9]  # longest first
    # 260 tokens in all; dropping loses 60 + 120, cutting 10 + 70
    assert "dropping them loses 180 of 260 (69 %) tokens, cutting them 80 of 260 (31 %)" in found.text
    assert found.severity == "blocker"
    assert found.fix == "max_length: 128  # keeps every row"


def test_nothing_is_lost_where_all_fits() -> None:
    assert truncation(Subject(clean(3), lengths=[5, 6, 50], max_length=50)) == []
    assert truncation(Subject(clean(3))) == []


def test_percentiles() -> None:
    assert length_facts(Subject(clean(3), lengths=[1, 2, 9]))[0].value == "median 2, 95 % up to 8, longest 9"
    assert length_facts(Subject([])) == []
