"""The rules in words: the list in a docstring, and the tables of the documentation."""

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
    """A line a rule, for a docstring: its name, its labels, what it does."""
    lines = [f'- `"{rule.name}"` ({LABELS[rule.labels]} labels): {rule.explanation}' for rule in by_labels()]
    return f"\n{' ' * indent}".join(lines)


def rule_table() -> str:
    """A row a rule, in Markdown."""
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
    """A line an option of a rule, in Markdown."""
    return "\n".join(f"- `{name}`: {sentence}" for name, sentence in option_sentences(rule).items())


def rules_page() -> str:
    """The whole of `docs/rules.md`."""
    sections = [f"## {rule.name}\n\n{option_list(rule)}\n" for rule in by_labels()]
    return PAGE.format(table=rule_table(), sections="\n".join(sections))


PAGE = f"""# The rules that choose a timestep

Made by `python -m benchmarks.selection.rules_page` from the rules themselves. How well they do:
[evidence.md](evidence.md).

Images: how many it looks at by default. Runs: of the network, per image and timestep, by default.
`{AUTO}` is `{WITH_LABELS}` where there are labels of two classes or masks, else `{WITHOUT_LABELS}`.

{{table}}

Options below are keyword arguments of `select_timestep`, `audit_timestep` and `compare_strategies`
(`strategy_options`), options of `aselect`, and arguments of the training scripts, under the same names.

{{sections}}"""
