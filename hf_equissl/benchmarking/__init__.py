"""What a training step costs, on one device and on more processes."""
