"""One-line messages, instead of stack traces, for a user's mistakes."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn errors from bad input into `<program>: error: ...` and exit code 2.

    Characters that the terminal's encoding cannot show are printed as escapes, so that they do not end a run.

    Set `ASELECT_TRACEBACK=1` to see where an error was raised.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("ASELECT_TRACEBACK"):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = lines[-1].removeprefix("ValueError: ").removeprefix("TypeError: ") if lines else repr(error)
        print(f"{program}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted; finished work is kept, run the same command to continue", file=sys.stderr)
        raise SystemExit(130) from None
