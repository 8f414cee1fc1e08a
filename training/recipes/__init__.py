"""Recipes that ship, as YAML files."""
