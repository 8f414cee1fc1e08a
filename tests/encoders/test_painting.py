"""What decoders paint between two views, from images to images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_equissl import EquiSSLConfig, EquiSSLModel, paint_intermediate_images
from hf_equissl.encoders import FrozenEncoder, save_encoder

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4, "image_size": 16}
STEM = {"feature_size": 16, "equivariant_size": 8}


def encoder(**fields: object) -> EquiSSLModel:
    torch.manual_seed(0)
    return EquiSSLModel(EquiSSLConfig(**SIZES, **STEM, **fields)).eval()  # type: ignore[arg-type]


def test_images_in_images_out(tmp_path: Path) -> None:
    model = encoder(decoder_type="conv", num_intermediate_images=3, decoder_widths=[4, 4, 4])
    save_encoder(model, tmp_path, MEAN, STD)
    first, second = torch.rand(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    painted = paint_intermediate_images(tmp_path, first, second)
    assert list(painted) == [1 / 4, 2 / 4, 3 / 4]
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = model.reconstruct((first - mean) / std, (second - mean) / std) * std + mean
    for column, images in enumerate(painted.values()):
        assert (images - expected[:, column].clamp(0, 1)).abs().max() < 1e-5
    assert not torch.equal(painted[1 / 4], painted[2 / 4])
    bytes_ = [(images * 255).round().to(torch.uint8) for images in (first, second)]
    again = paint_intermediate_images(FrozenEncoder(tmp_path), *bytes_)
    assert (again[3 / 4] - painted[3 / 4]).abs().max() < 0.01


def test_fractions_of_the_other_decoders() -> None:
    views = torch.rand(2, 1, 3, 16, 16)
    final = encoder(
        decoder_type="conv", num_intermediate_images=1, decoder_reconstructs_final=True, decoder_widths=[4] * 3
    )
    assert list(paint_intermediate_images(final, *views)) == [1 / 2, 1.0]
    crossing = encoder(
        decoder_type="cross_attention", decoder_num_layers=1, decoder_hidden_size=16, decoder_num_heads=2
    )
    assert list(paint_intermediate_images(crossing, *views)) == [1.0]


def test_an_encoder_without_decoders_says_so() -> None:
    views = torch.rand(2, 1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"has no decoder.*objective `reconstruction`"):
        paint_intermediate_images(encoder(), *views)
    with pytest.raises(ValueError, match="has no decoder"):
        paint_intermediate_images(FrozenEncoder(torch.nn.Conv2d(3, 4, 4), image_size=16), *views)
