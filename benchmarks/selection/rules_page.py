"""The page `docs/rules.md`: every rule that chooses a timestep, and its options.

python -m benchmarks.selection.rules_page
"""

from __future__ import annotations

import argparse
from pathlib import Path

from aselect_hf.files import write_text
from aselect_hf.selection.rule_table import rules_page

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write_text(PAGE, rules_page())


if __name__ == "__main__":
    main()
