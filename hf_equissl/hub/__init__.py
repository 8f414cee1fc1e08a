"""What leaves this machine: encoders as folders that ``AutoModel`` loads."""

from .export import save_encoder

__all__ = ["save_encoder"]
