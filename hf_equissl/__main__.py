"""``python -m hf_equissl``: the command ``hf-equissl``."""

from __future__ import annotations

from .console.main import main

if __name__ == "__main__":
    main()
