"""Programs that models write: found in a text, run in a sandbox, held against the right answer."""
