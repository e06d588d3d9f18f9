"""Comparing and explaining runs: benchmarks, diagnostics and the report. Nothing outside imports it but `cli/`."""
