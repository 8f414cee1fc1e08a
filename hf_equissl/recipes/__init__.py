"""Recipes of runs: YAML files, values from the command line, sweeps over them."""
