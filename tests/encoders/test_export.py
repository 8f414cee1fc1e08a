from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from hf_equissl.encoders import FrozenEncoder, save_encoder, save_native
from hf_equissl.encoders.base_image import base_image
from hf_equissl.encoders.export import image_processor
from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def tiny(image_size: int | tuple[int, int] = 16, seed: int = 0) -> EquiSSLModel:
    torch.manual_seed(seed)
    config = EquiSSLConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=image_size, patch_size=4
    )
    return EquiSSLModel(config).eval()


def photograph(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(400, 300, 224), (300, 401, 224), (64, 64, 32), (32, 32, 32), (224, 224, 224), (100, 80, 96), (40, 32, 32)],
)
def test_the_processor_makes_the_pixels_that_the_probes_measure(width: int, height: int, size: int) -> None:
    image = photograph(width, height)
    processor = image_processor(size, MEAN, STD)
    measured = base_image(image, size)
    shipped = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(shipped.to(torch.uint8), measured)
    normalised = (measured.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.allclose(processor(image, return_tensors="pt")["pixel_values"][0], normalised, atol=1e-5)


def test_small_images_that_fit_stay_untouched() -> None:
    """Numbers measured on CIFAR-10 rest on it."""
    image = photograph(32, 32)
    assert np.array_equal(base_image(image, 32).permute(1, 2, 0).numpy(), np.asarray(image))


def test_the_folder_loads_with_auto_classes(tmp_path: Path) -> None:
    model = tiny()
    folder = save_encoder(model, tmp_path / "encoder", MEAN, STD)
    image = photograph(50, 40)
    pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    loaded = AutoModel.from_pretrained(folder).eval()
    frozen = FrozenEncoder(folder)
    assert (frozen.image_size, frozen.image_mean, frozen.image_std) == (16, list(MEAN), list(STD))
    with torch.no_grad():
        tokens = model(pixels).last_hidden_state
        assert torch.allclose(loaded(pixels).last_hidden_state, tokens, atol=1e-6)
    assert torch.allclose(frozen.encode(base_image(image, 16)[None], ("cls",))["cls"], tokens[:, 0], atol=1e-4)


def test_an_older_encoder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = save_encoder(tiny(), tmp_path / "encoder", MEAN, STD)
    left_over = folder / "model-00001-of-00002.safetensors"
    left_over.touch()
    (folder / ".DS_Store").touch()
    save_encoder(other := tiny(seed=1), folder, MEAN, STD)
    assert not left_over.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]
    loaded = AutoModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("save", [save_encoder, save_native])
def test_what_is_not_ours_is_not_deleted(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save(tiny(), tmp_path / "encoder", MEAN, STD)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"encoder holds notes\.txt, which is no part of a saved encoder"):
        save(tiny(seed=1), folder, MEAN, STD)
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="is a file"):
        save(tiny(), folder / "notes.txt", MEAN, STD)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_an_interrupted_save_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_encoder(old := tiny(), tmp_path / "encoder", MEAN, STD)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt  # weights are in the staging folder, the image processor is not

    with monkeypatch.context() as patch:
        patch.setattr("hf_equissl.encoders.export.image_processor", stop)
        with pytest.raises(KeyboardInterrupt):
            save_encoder(tiny(seed=1), folder, MEAN, STD)
    loaded = AutoModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in old.state_dict().items())
    save_encoder(tiny(seed=1), folder, MEAN, STD)  # what the interrupted one left behind is in nobody's way
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_images_that_are_not_square_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"crops squares, but .* \(16, 8\)"):
        save_encoder(tiny((16, 8)), tmp_path / "encoder", MEAN, STD)
    assert not list(tmp_path.iterdir())


def test_code_that_was_not_saved_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a class that a script defines: transformers copies nothing, and says nothing."""
    save = EquiSSLModel.save_pretrained

    def without_layers(self: EquiSSLModel, folder: Path) -> None:
        save(self, folder)
        (folder / "layers_equissl.py").unlink()

    monkeypatch.setattr(EquiSSLModel, "save_pretrained", without_layers)
    with pytest.raises(ValueError, match=r"layers_equissl\.py, which was not saved beside it"):
        save_encoder(tiny(), tmp_path / "encoder", MEAN, STD)
    assert not (tmp_path / "encoder").exists()
