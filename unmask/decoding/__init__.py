"""Decoding: the decoder, what it reads in a step, how values are drawn, and its settings."""
