"""Settings: sections and their checks, the components that they name, recipes, and the configuration of a run."""
