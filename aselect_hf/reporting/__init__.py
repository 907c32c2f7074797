"""Presentation of results: Markdown and pictures."""
