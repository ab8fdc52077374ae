"""An audit as one self-contained HTML page.

In: an audit. Out: a file that opens offline, runs nothing and loads nothing. Must not know: checks, sources.

Everything from a file is text: the template escapes it all, there is no script, and a content security policy forbids
scripts, forms and every load (TRAPS S14). Private data was masked when the findings were made (S22).
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tunesmith.data.audit.findings import SEVERITIES, Audit
from tunesmith.runs.atomic import write_text
from tunesmith.version import VERSION


def write_html(audit: Audit, path: Path) -> None:
    """Writes the page at `path`, complete or not at all."""
    write_text(path, audit_html(audit))


def audit_html(audit: Audit) -> str:
    """The page's text. Lone surrogates, which no file can hold, become U+FFFD."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(audit=audit, severities=SEVERITIES, version=VERSION)
    return page.encode("utf-8", "replace").decode("utf-8")
