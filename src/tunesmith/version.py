"""The version of the package; the one place that says it.

In: nothing. Out: `VERSION`. Must not know: anything else. `pyproject.toml` reads it without importing it.
"""

VERSION = "0.1.0"
