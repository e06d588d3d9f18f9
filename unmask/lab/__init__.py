"""Compares and explains runs: benchmarks, diagnostics, comparisons and the report. Only `cli/` imports it."""
