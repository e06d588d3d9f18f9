"""Masking processes: how training sequences are masked."""
