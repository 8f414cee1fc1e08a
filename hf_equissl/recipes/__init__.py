"""What a run is told: YAML files, values from the command line, sweeps over them."""
