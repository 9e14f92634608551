"""The command line: each verb of a `Session` as a command, and commands for the models on this machine."""

import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, NoReturn

from irkit.cli.terminal import end_as_by_sigpipe, quit_on_ctrl_c, say
from irkit.errors import IrkitError, OptionError

if TYPE_CHECKING:
    from irkit.cli.loop import prompt_loop

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
            from irkit.cli.commands import run

            code = run()
        finally:
            sys.stdout.flush()
    except OptionError as error:
        _fail(error, 2)
    except IrkitError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        end_as_by_sigpipe()
    sys.exit(code)


def _fail(error: IrkitError, code: int) -> NoReturn:
    say(f"irkit: {error}")
    sys.exit(code)


def __getattr__(name: str) -> Any:
    # What `main` does not need yet would keep Ctrl-C waiting.
    if name == "prompt_loop":
        from irkit.cli.loop import prompt_loop

        return prompt_loop
    raise AttributeError(f"module 'irkit.cli' has no attribute {name!r}")
