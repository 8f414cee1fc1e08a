"""The pair of encoders that ships under model_cards/: it loads right after a clone, with this package's code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from hf_equissl.hub.publishable import check_licence, check_publishable

ROOT = Path(__file__).resolve().parents[2]
PAIR = {name: ROOT / "model_cards" / f"equissl-cifar10-{name}" for name in ("reconstruction", "base")}


@pytest.mark.parametrize("folder", PAIR.values(), ids=PAIR)
def test_it_is_a_repository_that_could_be_published(folder: Path) -> None:
    check_publishable(folder)
    check_licence(folder)
    assert (folder / "model.safetensors").stat().st_size < 5_000_000
    stale = [
        file.name for file in folder.glob("*.py") if file.read_text() != (ROOT / "modeling" / file.name).read_text()
    ]
    assert not stale, "modeling/ has changed: copy its files here"


def test_both_see_and_one_paints() -> None:
    encoders = {name: AutoModel.from_pretrained(folder).eval() for name, folder in PAIR.items()}
    processor = AutoImageProcessor.from_pretrained(PAIR["base"])
    noise = torch.randint(0, 256, (2, 3, 48, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = processor(list(noise), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 32, 32)
    with torch.no_grad():
        tokens = {name: encoder(pixels).last_hidden_state for name, encoder in encoders.items()}
        assert encoders["reconstruction"].reconstruct(pixels, pixels.flip(3)).shape == (2, 2, 3, 32, 32)
        with pytest.raises(ValueError, match="has no decoder"):
            encoders["base"].reconstruct(pixels, pixels)
    assert tokens["base"].shape == tokens["reconstruction"].shape == (2, 17, 128)
    assert not torch.allclose(tokens["base"], tokens["reconstruction"])
