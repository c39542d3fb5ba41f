"""Exit statuses of commands, and errors as messages instead of tracebacks."""

import os
import sys
import warnings
from collections.abc import Callable

from recap_cli.files import printable

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130


def exit_status(name: str, run: Callable[[], int | None]) -> int:
    """Runs a command. An error or a warning is one message on standard error, without traceback or source.

    Args:
        name: what the user called, such as `recap caption`.
        run: the command; `None` stands for 0.
    """
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_line(message, category, *place, **options):
            if category is UserWarning:
                print(f"{name}: warning: {printable(str(message))}", file=sys.stderr)
            else:
                show(message, category, *place, **options)

        warnings.showwarning = show_line
        return _exit_status(name, run)


def _exit_status(name: str, run: Callable[[], int | None]) -> int:
    try:
        return run() or EXIT_OK
    except BrokenPipeError:
        # The reader, such as `head`, has ended: not an error. Python's own flush at exit must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        # Messages of several lines keep them; file names in them cannot move the cursor or change colours.
        message = "\n".join(map(printable, str(error).splitlines()))
        print(f"{name}: error: {message}", file=sys.stderr)
        return EXIT_FAILURE
