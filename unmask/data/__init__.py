"""Streams of training examples, stores of rows, and vocabularies."""
