"""What the demo computes, against direct calls; the page that it writes; the command's words."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from hf_equissl.data import decode_image
from hf_equissl.demo import AngleProbe, Change, shipped_photographs
from hf_equissl.demo import shipped as shipped_module
from hf_equissl.demo.analysis import Analyst, to_picture
from hf_equissl.demo.angle_probe import PROBE_FILE, fit_angle_probe
from hf_equissl.demo.cli import main
from hf_equissl.demo.page import PAGE
from hf_equissl.demo.shipped import CHECKPOINTS, shipped_checkpoint
from hf_equissl.encoders import FrozenEncoder
from hf_equissl.evaluation import EvaluationData
from hf_equissl.utils.load_errors import LoadError
from hf_equissl.views import build_transformation
from tests.demo.conftest import tiny_encoder


def test_changes_are_those_of_the_families() -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Change().apply(images), images)
    turned = build_transformation("rotation", max_degrees=45, fill="reflect").apply(images, torch.tensor([[30.0]] * 2))
    assert torch.allclose(Change(angle=30).apply(images), turned, atol=1e-6)
    shift = build_transformation("translation", max_shift=1.0, unit="fraction", fill="reflect")
    moved = shift.apply(images, torch.tensor([[0.03125, -0.03125]] * 2))  # one pixel right, one up
    assert torch.allclose(Change(shift_right=3.125, shift_down=-3.125).apply(images), moved, atol=1e-6)
    assert torch.allclose(moved[:, :, 5, 7], images[:, :, 6, 6], atol=1e-5)
    way = Change(angle=30).path(images, [0.5, 1.0])
    assert torch.allclose(way[:, 0], Change(angle=15).apply(images), atol=1e-5)
    for wrong in ({"angle": 46}, {"blur": -1}, {"hue": math.nan}, {"brightness": None}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .* expected a number from"):
            Change(**wrong)


def test_readings_are_those_of_direct_calls(analyst: Analyst, encoders: dict[str, Path], photo_folder: Path) -> None:
    image, change = decode_image(photo_folder / "03.png"), Change(angle=-20, blur=0.5)
    found = analyst.analyse(image, change)
    encoder = FrozenEncoder(encoders["painter"])
    pixels = analyst.pixels(analyst.lenses["painter"])[3][None].float() / 255
    changed = change.apply(pixels)
    assert torch.equal(found.changed, changed[0])
    reading = found.readings["painter"]
    with torch.no_grad():
        painted = encoder.module.reconstruct(encoder.normalise(pixels), encoder.normalise(changed))[0]
        outputs = [encoder.module(encoder.normalise(images)) for images in (pixels, changed)]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.image_mean, encoder.image_std))
    assert list(reading.painted) == list(found.between) == [1 / 3, 2 / 3]
    assert torch.allclose(reading.painted[2 / 3], (painted[1] * std + mean).clamp(0, 1), atol=1e-5)
    expected = {
        "invariant": F.cosine_similarity(*(out.invariant_features[0, 0] for out in outputs), dim=0),
        "equivariant": F.cosine_similarity(*(out.equivariant_features[0, 1:] for out in outputs), dim=1).mean(),
    }
    assert reading.cosines == pytest.approx({part: value.item() for part, value in expected.items()}, abs=1e-5)
    assert next(iter(Analyst(encoders, photo_folder).analyse(image, Change()).readings["painter"].neighbours)) == "03"
    assert max(reading.neighbours.values()) == next(iter(reading.neighbours.values())) <= 1.0001
    base = found.readings["base"]
    assert (base.painted, base.angle) == ({}, None)
    assert base.before.shape == reading.before.shape == (3, 4, 4)
    assert not torch.equal(base.before, base.after)
    numbers = found.numbers()["encoders"]["painter"]
    assert numbers["angle"] == round(reading.angle, 4)
    assert numbers["neighbours"][0][0] == next(iter(reading.neighbours))


def test_patches_of_one_image_keep_their_colours_in_the_picture(analyst: Analyst) -> None:
    colours = analyst.analyse(next(iter(analyst.gallery.values())), Change()).readings["base"].before
    picture = np.asarray(to_picture(colours, 160, smooth=False))
    assert picture.shape == (160, 160, 3)
    assert np.array_equal(picture[50, 130], (colours[:, 1, 3] * 255).round().numpy())


class _Moments(torch.nn.Module):
    """One token, where the light is: it turns with the image, so that two images tell the angle and one does not."""

    num_prefix_tokens = 0

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.patch_size = self.image_size = 32

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        place = torch.linspace(-1, 1, 32)
        light = pixel_values.mean(1) - pixel_values.mean((1, 2, 3))[:, None, None]
        moments = [(light * place[None, None, :]).mean((1, 2)), (light * place[None, :, None]).mean((1, 2))]
        return F.normalize(torch.stack(moments, 1), dim=1)[:, None] * self.scale


def test_the_probe_reads_angles_where_features_tell_them(tmp_path: Path) -> None:
    """Discs off the centre, on any side of it."""
    y, x = np.mgrid[-16:16, -16:16]
    rng = np.random.default_rng(0)
    for number in range(240):
        side, size = rng.uniform(0, 2 * np.pi), rng.uniform(3, 5)
        disc = (x - 9 * np.cos(side)) ** 2 + (y - 9 * np.sin(side)) ** 2 < size**2
        picture = np.where(disc[..., None], rng.uniform(180, 255, 3), rng.uniform(60, 90, 3))
        Image.fromarray(picture.astype(np.uint8)).save(tmp_path / f"{number:03d}.png")
    data = EvaluationData.load(str(tmp_path), train_images=200, test_images=24, progress=False)
    encoder = FrozenEncoder(_Moments(), image_size=32, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    probe = fit_angle_probe(encoder, data)
    assert probe.facts["r2"] > 0.95
    assert probe.facts["r2_changed"] > 0.9
    assert probe.facts["mean_error_degrees"] < 5
    assert (probe.facts["train_pairs"], probe.facts["test_pairs"]) == (200, 24)
    tokens = torch.tensor([[[0.6, 0.8]]])
    assert abs(probe.predict(tokens, tokens).item()) < 1  # nothing was turned


def test_the_probe_belongs_to_its_encoder(encoders: dict[str, Path], tmp_path: Path) -> None:
    path = encoders["painter"] / PROBE_FILE
    encoder = FrozenEncoder(encoders["painter"])
    probe = AngleProbe.load(path, encoder)
    assert probe.facts["test_pairs"] == 8
    probe.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    with pytest.raises(LoadError, match=r"fitted on other weights.*Fit it again"):
        AngleProbe.load(path, FrozenEncoder(encoders["base"]))
    (tmp_path / "again.safetensors").write_bytes(path.read_bytes()[:100])
    with pytest.raises(LoadError, match="damaged"):
        AngleProbe.load(tmp_path / "again.safetensors", encoder)


def test_the_command_writes_pictures_and_a_page(
    encoders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = [word for path in encoders.values() for word in ("--encoder", str(path))]
    assert main([*words, "--output_dir", str(output)]) == 0
    assert "demo.md says what to look at" in capsys.readouterr().out
    page = (output / PAGE).read_text()
    named = {"reconstructions.png", "patches.png", "cosines.png", "angles.png"}
    assert {path.name for path in output.iterdir()} == {PAGE, *named}
    assert all(f"]({name})" in page for name in named)
    assert page.count("**Look at**") == 4
    sheet = Image.open(output / "reconstructions.png")
    assert sheet.width > 5 * 96
    assert len(shipped_photographs()) == 8
    assert "| base: invariant | 1.00 |" in page


def test_mistakes_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], encoders: dict[str, Path]) -> None:
    painter = str(encoders["painter"])
    (tmp_path / "one").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "one" / "a.png")
    (tmp_path / "broken").mkdir()
    for name in "ab":
        (tmp_path / "broken" / f"{name}.jpg").write_bytes(b"no picture")
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").touch()
    headless = tiny_encoder(tmp_path / "headless", 0)
    text = (headless / "config.json").read_text().replace('"feature_size": 16', '"feature_size": null')
    (headless / "config.json").write_text(text.replace('"equivariant_size": 8', '"equivariant_size": null'))
    for words, said in (
        (["--fit_probe"], "--fit_probe needs images"),
        (["--data", str(tmp_path)], "--data is what --fit_probe fits on"),
        (["--encoder", str(tmp_path / "none")], "there is no such folder"),
        (["--images", str(tmp_path / "none")], "no such folder"),
        (["--encoder", painter, "--images", str(tmp_path / "one")], "1 images lie there, expected two"),
        (["--encoder", painter, "--images", str(tmp_path / "broken")], "a.jpg is not an image"),
        (["--encoder", str(headless)], "has no invariant and equivariant part"),
        (["--space", str(full)], "holds files already"),
    ):
        assert main([*words, "--output_dir", str(tmp_path / "out")] if "--space" not in words else words) == 2, words
        assert said in capsys.readouterr().err, words
    assert not (tmp_path / "out").exists()


def test_what_is_missing_of_the_shipped_encoders_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped_module, "model_cards", lambda: tmp_path)
    folder = tmp_path / CHECKPOINTS["base"]
    folder.mkdir()
    (folder / "config.json").touch()
    with pytest.raises(LoadError, match=r"lacks model.safetensors, preprocessor_config.json\. Install"):
        shipped_checkpoint("base")
    with pytest.raises(ValueError, match="Did you mean 'reconstruction'"):
        shipped_checkpoint("reconstructions")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_shipped_encoders_load_with_their_probes(name: str) -> None:
    try:
        folder = shipped_checkpoint(name)
    except LoadError as error:
        pytest.skip(str(error))
    encoder = FrozenEncoder(folder)
    assert (getattr(encoder.module, "decoder", None) is not None) == (name == "reconstruction")
    assert AngleProbe.load(folder / PROBE_FILE, encoder).facts["train_pairs"] >= 5000
