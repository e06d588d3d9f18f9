"""Tasks: data, and the grading of answers."""
