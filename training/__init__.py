"""What is launched: scripts and their recipes."""
