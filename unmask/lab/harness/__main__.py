"""Runs lm-eval's own command line, which knows the model `unmask` then."""

from lm_eval.__main__ import cli_evaluate

import unmask.lab.harness.model  # noqa: F401 (registers the model)

if __name__ == "__main__":
    cli_evaluate()
