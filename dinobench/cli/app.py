"""The command `dinobench`. Verbs are in the files beside this one; heavy imports happen inside their functions.

Exit codes: 0 ok, 1 bug, 2 usage, 3 the user can mend it, 4 a check failed, 130/143 interrupted after a checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from dinobench.cli import compare, doctor, export, figure, ls, page, runs, show, table, ui, verify
from dinobench.cli import eval as evaluation
from dinobench.cli import pretrain as pretraining
from pretrain.errors import DinobenchError

app = typer.Typer(
    name="dinobench",
    help="Pretrain DINO and its relatives, benchmark every checkpoint, compare the methods side by side.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # plain help: Rich's panels import a Markdown parser and a syntax highlighter, half a second of nothing
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MENDABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENODEV)
"""Failures of a disk, a mount or a limit; others, as a file that is not there, may be a mistake of ours."""

_NO_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EILSEQ)
"""Paths that are none, wherever they are looked at first."""


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Pretrain DINO and its relatives, benchmark every checkpoint, compare the methods side by side."""


app.command("pretrain")(pretraining.run_pretraining)
app.command("eval")(evaluation.run_evaluation)
app.command("compare")(compare.run_comparison)
app.command("verify")(verify.run_verification)
app.command("table")(table.run_tables)
app.command("report")(page.write_page)
app.command("ui")(ui.run_server)
app.command("show")(show.show)
app.command("ls")(ls.list_catalogue)
app.command("export")(export.run_export)
app.add_typer(runs.app, name="runs")
app.add_typer(figure.app, name="figure")
app.command("doctor")(doctor.run_checks)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code. Errors become one sentence on stderr."""
    # accepted anywhere on the line: the one who needs it adds it at the end of the command that failed
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    # names of files may hold what no terminal can show: half a character, or é where the locale is C
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminate)
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2"):  # Windows has none of them
        number = getattr(signal, name, None)
        # nohup has SIGHUP ignored, submitit has handlers of its own
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _terminate)
    if sys.stdout is None:  # closed, as by `>&-`: the work counts, not the words
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
    try:
        code = app(arguments, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return _tell("interrupted", 130)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BrokenPipeError:
        # `dinobench ls ... | head` closed the pipe: not an error, but Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        return _explain(error)


def _explain(error: Exception) -> int:
    if isinstance(error, DinobenchError):
        return _tell(f"error: {error}", error.exit_code)
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's, wherever Typer keeps it
        return _tell(_usage_message(error), 2) if error.format_message() else 2  # type: ignore[attr-defined]
    if type(error).__name__ == "Abort":
        return _tell("interrupted", 130)
    if (text := _told_of_machine(error)) is not None:
        return _tell(f"error: {text}", 3)
    reason = " ".join(str(error).split())
    return _tell(
        f"bug: {type(error).__name__}: {reason} (this should not happen; run it again with --debug for the traceback "
        "and report it)",
        1,
    )


def _told_of_machine(error: Exception) -> str | None:
    """What the user can mend of a failure that no one nearer to it has told: no memory, no room, no permission."""
    from dinobench.files import FULL
    from pretrain.faults import is_out_of_memory

    if is_out_of_memory(error):
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return f"out of memory ({reason}): give the command more of it, or less to do at once"
    if not isinstance(error, OSError) or error.errno not in (*FULL, *_MENDABLE, *_NO_NAMES):
        return None
    place = f"{error.filename}: " if error.filename else ""
    if error.errno in _NO_NAMES:
        return f"{place}{(error.strerror or str(error)).lower()}: give the name of a file or folder"
    return (
        f"{place}{(error.strerror or str(error)).lower()}: free some space, change the permissions or raise the limit"
    )


def _usage_message(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "dinobench"
    return f"error: {error.format_message()} (see `{command} --help`)"  # type: ignore[attr-defined]


def _tell(text: str, code: int) -> int:
    from dinobench.addresses import masked

    with contextlib.suppress(OSError):  # a terminal that is gone
        print(masked(text), file=sys.stderr)
    return code


def _terminate(number: int, frame: FrameType | None) -> None:
    """Told to stop outside the training loop (which has its own handler): leave through the `finally` blocks."""
    raise SystemExit(128 + number)
