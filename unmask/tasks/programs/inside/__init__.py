"""Code that runs in the sandbox's processes. Standard library only: no site-packages, a quick start."""
