"""What explains a training: measured on a run's checkpoint, one file a diagnostic."""
