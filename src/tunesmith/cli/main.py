"""The command `tunesmith`: its group, and what an error looks like and exits with.

In: the words of the command line. Out: an exit code.
Must not know: what a command does; each imports that when it runs, so that `--help` costs nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import StringIO

import click

from tunesmith.cli.calibrate import calibrate
from tunesmith.cli.data import data
from tunesmith.cli.diagnose import diagnose
from tunesmith.cli.doctor import doctor
from tunesmith.cli.output import keep_libraries_discreet, say_error, say_traceback
from tunesmith.cli.recipe import recipe
from tunesmith.cli.score import score
from tunesmith.cli.stages import chat, check, compare, merge, quickstart, run
from tunesmith.errors import ResourceError, StoppedError, TunesmithError
from tunesmith.redact import redact
from tunesmith.runs.stop import TERMINATED, Terminated, ends_at_once

INTERRUPTED = 130  # what a shell reports for a command that SIGINT ended
BUG = 1


class _Group(click.Group):
    """A group that lists its commands in the order in which they are used, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The order in which they were added."""
        return list(self.commands)


def _print_version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted:
        from tunesmith.version import VERSION

        click.echo(f"tunesmith {VERSION}")
        ctx.exit()


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error. Works behind a command too."
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
def cli() -> None:
    """From a base language model and your own data to an aligned model: SFT, DPO, comparison.

    Start with `tunesmith quickstart`. A recipe is a YAML file, or the name of a shipped one.
    """


for command in (quickstart, data, check, calibrate, run, diagnose, compare, chat, merge, score, recipe, doctor):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its code. A run catches signals by itself; whatever else ends at once by them."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    keep_libraries_discreet()
    with ends_at_once():
        code = _run([word for word in given if word != "--debug"], debug=debug)
    sys.exit(code)


def _run(arguments: list[str], *, debug: bool) -> int:
    try:
        # Not standalone: click would end the process itself, and turn an interrupt into code 1.
        code = cli.main(args=arguments, prog_name="tunesmith", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        shown = StringIO()
        error.show(shown)  # it may quote a word of the command line
        say_error(shown.getvalue().rstrip("\n"))
        return error.exit_code
    except (KeyboardInterrupt, click.exceptions.Abort):
        click.echo("stopped", err=True)
        return INTERRUPTED
    except Terminated:
        click.echo("stopped", err=True)
        return TERMINATED
    except TunesmithError as error:
        if debug:
            say_traceback(error)
        say_error(f"Error: {error}")
        return 128 + error.signal_number if isinstance(error, StoppedError) else error.exit_code
    except MemoryError:
        click.echo("Error: memory ran out", err=True)
        return ResourceError.exit_code
    except Exception as error:  # the last line of defence: whatever comes here is a bug of ours
        return _bug(error, debug=debug)
    return code if isinstance(code, int) else 0


def _bug(error: Exception, *, debug: bool) -> int:
    if debug:
        say_traceback(error)
    reason = " ".join(redact(str(error)).split())[:300]
    say_error(f"Error: a bug in Tunesmith: {type(error).__name__}: {reason}")
    if not debug:
        click.echo("  Run the command again with --debug for the traceback, and report it.", err=True)
    return BUG
