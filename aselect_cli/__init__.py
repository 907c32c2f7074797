"""The command line, `aselect`.

It lies beside `aselect_hf`, not inside, because Python imports a package before any module in it, and that takes
seconds. Help, completion and mistyped options need none of it. Each command is a thin shell over a function of the
library, and imports what it needs when it runs.
"""
