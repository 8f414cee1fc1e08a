"""The cards of published encoders, and the two encoders that ship with the package."""
