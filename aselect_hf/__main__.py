"""`python -m aselect_hf` is `aselect`."""

from aselect_cli.app import main

main()
