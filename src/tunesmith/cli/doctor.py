"""The command about this machine: doctor.

In: words of the command line. Out: what the machine has, and whether its numbers are right.
Must not know: how anything is found out or proved.
"""

from __future__ import annotations

import click

from tunesmith.errors import NumericsError


@click.command()
@click.option("--self-test", is_flag=True, help="Rerun the numerical proofs here, in under two minutes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs and reports.")
def doctor(self_test: bool, as_json: bool) -> None:
    """What this machine has, and whether its numbers are right.

    The exit code is 4 where a proof of the self-test fails, else 0.
    """
    import json

    from rich.console import Console

    from tunesmith.pipeline.doctor import examine, run_self_test

    console = Console()
    report = examine()
    if not as_json:
        console.print(report)
    tested = None
    if self_test:
        tested = run_self_test(lambda line: click.echo(line, err=as_json))
    if as_json:
        values = report.as_json() | ({} if tested is None else {"self_test": tested.as_json()})
        click.echo(json.dumps(values, indent=2, ensure_ascii=False))
    elif tested is not None:
        console.print(tested)
    if tested is not None and not tested.ok:
        click.get_current_context().exit(NumericsError.exit_code)
