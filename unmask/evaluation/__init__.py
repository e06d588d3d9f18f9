"""What a model is worth: likelihood bounds and solve rates."""
