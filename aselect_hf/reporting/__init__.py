"""How results are shown: Markdown and pictures."""
