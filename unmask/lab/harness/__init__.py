"""lm-evaluation-harness (extra `lm_eval`): importing `unmask.lab.harness.model` registers the model `unmask` there."""
