"""The report: one HTML page that shows several runs side by side."""
