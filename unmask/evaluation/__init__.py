"""Measures of a model: likelihood bounds, solve rates, and samples of text."""
