"""The rules in words: the list in a docstring, and the page of the documentation."""

from __future__ import annotations

from aselect_hf.reporting.markdown import code, markdown_table
from aselect_hf.selection.rule import AUTO, WITH_LABELS, WITHOUT_LABELS, Rule
from aselect_hf.selection.rule_options import option_sentences
from aselect_hf.selection.rules import RULES

LABELS = {"none": "no", "few": "a few", "all": "all"}


def by_labels() -> list[Rule]:
    """The rules that need no labels first, then those that need a few, then those that need all."""
    return sorted(RULES.values(), key=lambda rule: [*LABELS].index(rule.labels))


def rule_list(indent: int) -> str:
    """One line per rule, for a docstring: its name, its labels and what it does."""
    lines = [f'- `"{rule.name}"` ({LABELS[rule.labels]} labels): {rule.explanation}' for rule in by_labels()]
    return f"\n{' ' * indent}".join(lines)


def rule_table() -> str:
    """One row per rule, in Markdown."""
    return str(
        markdown_table(
            [
                {
                    "rule": code(rule.name),
                    "labels": LABELS[rule.labels],
                    "images": "-" if not rule.runs else str(rule.num_images or "all"),
                    "runs": str(rule.runs),
                    "what it does": rule.explanation,
                }
                for rule in by_labels()
            ]
        )
    )


def option_list(rule: Rule) -> str:
    """One line per option of a rule, in Markdown."""
    return "\n".join(f"- `{name}`: {sentence}" for name, sentence in option_sentences(rule).items())


def rules_page() -> str:
    """The whole of `docs/rules.md`."""
    sections = [f"## {rule.name}\n\n{option_list(rule)}\n" for rule in by_labels()]
    return PAGE.format(table=rule_table(), sections="\n".join(sections))


PAGE = f"""# The rules that choose a timestep

`python -m benchmarks.selection.rules_page` makes this page from the rules themselves. [evidence.md](evidence.md) shows
how well they do.

In the table, "images" is the default number of images that a rule looks at, and "runs" is the default number of network
runs per image and timestep. `{AUTO}` is `{WITH_LABELS}` with masks or labels of two classes, else `{WITHOUT_LABELS}`.

{{table}}

The options below have the same names everywhere: as keyword arguments of `select_timestep` and `audit_timestep`, in
`strategy_options` of `compare_strategies`, as options of `aselect`, and as arguments of the training scripts.

{{sections}}"""
