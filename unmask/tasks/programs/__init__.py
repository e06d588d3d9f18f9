"""Programs that models write: found in a text, run in a sandbox, compared with the right answer."""
