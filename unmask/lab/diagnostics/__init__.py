"""Measurements on a run's checkpoint that explain its training, one file for each diagnostic."""
