"""Streams of training examples."""
