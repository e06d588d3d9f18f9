"""The task of long addition."""
