"""Configurations for ``accelerate launch --config_file``: each says when to choose it."""
