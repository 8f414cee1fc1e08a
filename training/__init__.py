"""Scripts that are launched, and their recipes."""
