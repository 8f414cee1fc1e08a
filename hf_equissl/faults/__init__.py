"""What stops a run: signals, which end it for a while, and faults, which end it for good."""
