"""Networks, and the denoiser around them."""
