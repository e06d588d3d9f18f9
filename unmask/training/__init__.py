"""The training of a denoiser under a masking process."""
