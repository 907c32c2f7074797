"""The page on failure modes is the one that its command writes."""

from __future__ import annotations

import re

from PIL import Image

from aselect_hf.audit import VERDICTS
from benchmarks.selection.failure_modes import DOCS, MODES, gratings, page


def test_the_page_tells_of_every_mode_with_its_picture():
    text = (DOCS / "failure-modes.md").read_text()
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == [mode.title for mode in MODES.values()]
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert {f"failure-modes/{name}.png" for name in MODES} <= set(pictures)
    assert {f"failure-modes/{path.name}" for path in (DOCS / "failure-modes").iterdir()} == set(pictures)
    for path in pictures:
        with Image.open(DOCS / path) as picture:
            picture.verify()
    for section in text.split("\n## ")[1:]:
        assert re.search(rf"^> ({'|'.join(VERDICTS)}): ", section, re.MULTILINE), section
        assert "**Noticed?**" in section
        assert "**What to do.**" in section


def test_gratings_are_the_same_every_time():
    one, other = (gratings(8, seed=0) for _ in range(2))
    assert one.fingerprint == other.fingerprint
    assert one.labels.tolist() == [0, 1, 2, 3] * 2
    assert page({}).startswith("# ")
