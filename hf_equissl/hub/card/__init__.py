"""The model card of a published encoder: text, figures, limits, metadata, and code that was run."""
