"""How a command ends: its exit status, and errors told in a line instead of a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

__all__ = ["EXIT_FAILURE", "EXIT_OK", "EXIT_USAGE", "exit_status"]

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130


def exit_status(name: str, run: Callable[[], int | None]) -> int:
    """Run a command; what went wrong is told on the standard error.

    Args:
        name: what the user called, as in `recap caption` or `python -m recap_hf.reranking`.
        run: the command; None stands for 0.
    """
    try:
        return run() or EXIT_OK
    except BrokenPipeError:
        # The reader (`head`, say) has gone: not an error, and Python must not complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return EXIT_FAILURE
