"""What is wrong with data, before anything is trained on it.

In: examples, a source or a recipe. Out: an audit: findings with counts, ids and the commands that mend them.
Must not know: training, models, the command line.
"""

from __future__ import annotations

from tunesmith.data.audit.findings import Audit, Fact, Finding, Hit, Part, Severity
from tunesmith.data.audit.page import write_html
from tunesmith.data.audit.run import Measure, audit_examples, audit_recipe, audit_source, token_counter

__all__ = [
    "Audit",
    "Fact",
    "Finding",
    "Hit",
    "Measure",
    "Part",
    "Severity",
    "audit_examples",
    "audit_recipe",
    "audit_source",
    "token_counter",
    "write_html",
]
