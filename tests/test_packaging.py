"""What is published: declared versions that are tested, and a README that PyPI can show."""

from __future__ import annotations

import configparser
import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTED_AT_THE_LOWEST = ("train", "test", "export")
"""Extras whose bounds `make test-min` installs."""


def declared() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_the_lowest_versions_are_those_of_setup_cfg():
    extras = declared()["options.extras_require"]
    lists = [declared()["options"]["install_requires"], *(extras[name] for name in TESTED_AT_THE_LOWEST)]
    lowest = {each.replace(">=", "==") for each in "\n".join(lists).split()}
    lines = (ROOT / "constraints-min.txt").read_text().splitlines()
    assert lines[1:] == sorted(lowest)
    assert all("==" in each for each in lowest), "every requirement has a lower bound"


def test_all_links_of_the_readme_lead_somewhere_and_are_absolute_on_pypi():
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", readme)
    inside = [link for link in links if not link.startswith("https:")]
    assert [link for link in inside if not (ROOT / link).is_file()] == []
    shown = runpy.run_path(str(ROOT / "setup.py"))["absolute"](readme)
    assert len(inside) > 10
    assert [link for link in re.findall(r"\]\(([^)]+)\)", shown) if not link.startswith("https:")] == []
    assert "![" in shown
    assert all(f"main/{link}" in shown for link in inside)
