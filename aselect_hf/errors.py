"""A user's mistake ends in one line, not in a stack trace."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn the errors that bad input raises into `<program>: error: ...` and exit code 2.

    What the terminal's encoding cannot show is printed as an escape: a name in another script ends no run.

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
        print(f"{program}: interrupted; what was finished is kept, run the same command to go on", file=sys.stderr)
        raise SystemExit(130) from None
