"""The README with absolute links, because PyPI shows it outside of the repository; all else is in setup.cfg."""

import re
from pathlib import Path

from setuptools import setup

REPOSITORY = "aselect-hf/aselect-hf"
PICTURE = re.compile(r"(!\[[^\]]*\]\()(?!https?:)([^)]+)")
LINK = re.compile(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)([^)]+)")


def absolute(readme: str) -> str:
    """The README with pictures and links that lead into the repository."""
    readme = PICTURE.sub(rf"\1https://raw.githubusercontent.com/{REPOSITORY}/main/\2", readme)
    return LINK.sub(rf"\1https://github.com/{REPOSITORY}/blob/main/\2", readme)


if __name__ == "__main__":
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    setup(long_description=absolute(readme), long_description_content_type="text/markdown")
