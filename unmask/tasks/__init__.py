"""Tasks: data, and what counts as solved."""
