"""The command line: each verb of a `Session` as a command, and commands for the models on this machine."""

import os
import sys
from io import TextIOWrapper
from typing import NoReturn

from irkit.cli.loop import prompt_loop
from irkit.cli.terminal import quit_on_ctrl_c, say
from irkit.errors import IrkitError, OptionError

__all__ = ["main", "prompt_loop"]


def main() -> None:
    """Run the command that `sys.argv` names: the console entry point.

    The exit code is 0 for success, 1 where an `IrkitError` ended it, 2 for a mistake in the command itself
    and 130 after Ctrl-C.
    """
    quit_on_ctrl_c()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    try:
        try:
            from irkit.cli.commands import app

            app(prog_name="irkit")
        finally:
            sys.stdout.flush()
    except OptionError as error:
        _fail(error, 2)
    except IrkitError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has gone; without this Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _fail(error: IrkitError, code: int) -> NoReturn:
    say(f"irkit: {error}")
    sys.exit(code)
