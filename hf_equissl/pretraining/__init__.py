"""The pretraining model and the Trainer that trains it."""
