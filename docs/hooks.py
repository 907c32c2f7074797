"""What `mkdocs` does beyond its plugins: links to files outside of the pages, and the help of every command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")
"""A link from a page to a file of the repository that is not a page."""
COMMAND = re.compile(r"^<!-- help of (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Point links outside of the pages to the repository, and put the help of commands where a page asks for it.

    Raises:
        FileNotFoundError: a link leads to a file that does not exist.
    """
    for target in OUTSIDE.findall(markdown):
        if not (REPOSITORY / target).exists():
            raise FileNotFoundError(f"a page links to {target}, which does not exist")
    markdown = OUTSIDE.sub(rf"]({config['repo_url']}/blob/main/\1", markdown)
    return COMMAND.sub(lambda found: help_of(found[1]), markdown)


def help_of(command: str) -> str:
    """The help of a command of `aselect`, as a code block."""
    shown = subprocess.run(
        [sys.executable, "-m", "aselect_hf", command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"},
    )
    return f"```text\n{shown.stdout.strip()}\n```"
