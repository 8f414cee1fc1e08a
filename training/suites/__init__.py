"""Suites of tasks that ship, as YAML files."""
