"""The rules, one file per family. Importing a file registers its rules in `RULES`; this package imports all files."""

from importlib import import_module
from pkgutil import iter_modules

from aselect_hf.selection.rule import RULES

__all__ = ["RULES"]

for module in sorted(each.name for each in iter_modules(__path__)):
    import_module(f"{__name__}.{module}")
