"""Two processes at once."""
