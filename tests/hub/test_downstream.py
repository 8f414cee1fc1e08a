"""EquiSSLBackbone inside transformers' segmentation, detection and pose models; both pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    PreTrainedModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VitPoseConfig,
    VitPoseForPoseEstimation,
    pipeline,
)
from transformers.utils import logging as transformers_logging

from hf_equissl.encoders import save_encoder
from hf_equissl.modeling import EquiSSLBackbone, EquiSSLConfig, EquiSSLForImageClassification, EquiSSLModel

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DETR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5, "num_labels": 3} | {
    name: 2 if name.endswith("heads") else 16
    for name in (
        "encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim"
    )
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tiny_config(**overrides) -> EquiSSLConfig:
    fields = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64, "patch_size": 8}
    return EquiSSLConfig(**{**fields, "num_register_tokens": 1, **overrides})


def upernet_config(backbone_config: EquiSSLConfig, **overrides) -> UperNetConfig:
    width = backbone_config.hidden_size
    return UperNetConfig(
        backbone_config=backbone_config, hidden_size=32, auxiliary_in_channels=width, auxiliary_channels=16, **overrides
    )


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published encoder with a stem and a decoder, which backbones and classifiers leave in the file."""
    torch.manual_seed(1)
    config = tiny_config(feature_size=24, equivariant_size=8, decoder_type="conv")
    return save_encoder(EquiSSLModel(config), tmp_path_factory.mktemp("hub") / "encoder", MEAN, STD)


def street_scenes(folder: Path, batch_size: int, side: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of random crops at a third of the size: images (B, 3, S, S) normalised, class ids (B, S, S)."""
    generator = np.random.default_rng(0)
    files = sorted((folder / "camvid/images/train").glob("*.jpg"))
    while True:
        images, masks = [], []
        for file in generator.choice(np.array(files), batch_size, replace=False):
            with Image.open(file) as image, Image.open(folder / f"camvid/masks/train/{file.stem}.png") as mask:
                size = (image.width // 3, image.height // 3)
                pixels = np.array(image.resize(size, Image.Resampling.BILINEAR), dtype=np.float32) / 255
                classes = np.array(mask.resize(size, Image.Resampling.NEAREST), dtype=np.int64)
            y, x = (int(generator.integers(0, length - side + 1)) for length in classes.shape)
            images.append(((pixels - MEAN) / STD)[y : y + side, x : x + side].transpose(2, 0, 1))
            masks.append(classes[y : y + side, x : x + side])
        yield torch.tensor(np.stack(images), dtype=torch.float32), torch.tensor(np.stack(masks))


def assert_trains(model: PreTrainedModel, loss: Tensor) -> None:
    """Every parameter of the backbone gets a gradient (zero for the mask token: nothing is masked)."""
    backbones = [module for module in model.modules() if isinstance(module, EquiSSLBackbone)]
    assert len(backbones) == 1
    assert torch.isfinite(loss)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in backbones[0].named_parameters()}
    assert {name for name, grad in gradients.items() if grad is None or grad.abs().max() == 0} == {
        "embeddings.mask_token"
    }


def assert_same_after_reload(model: PreTrainedModel, folder: Path, images: Tensor, output: str) -> None:
    model.eval().save_pretrained(folder)
    loaded, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        torch.testing.assert_close(loaded(images)[output], model(images)[output], rtol=0, atol=1e-6)


def test_upernet_learns_street_scenes(shared_data: Path, encoder_folder: Path, tmp_path: Path) -> None:
    backbone = EquiSSLBackbone.from_pretrained(encoder_folder, out_indices=[0, 1, 2, 3])
    model = UperNetForSemanticSegmentation(upernet_config(backbone.config, num_labels=11, loss_ignore_index=11))
    model.backbone.load_state_dict(backbone.state_dict())
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=5e-3), []
    model.train()
    for images, masks in islice(street_scenes(shared_data, batch_size=8, side=96), 20):
        loss = model(images, labels=masks).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss at step 1: {losses[0]:.3f}, at step 20: {losses[-1]:.3f}")
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5]), losses
    moved = (model.backbone.encoder.layer[0].mlp.fc1.weight - backbone.encoder.layer[0].mlp.fc1.weight).abs().max()
    assert moved > 1e-3  # the backbone learned too
    assert_same_after_reload(model, tmp_path / "upernet", images[:2], "logits")


def test_upernet_reads_images_that_are_not_square(tmp_path: Path) -> None:
    model = UperNetForSemanticSegmentation(upernet_config(tiny_config(out_indices=[1, 2, 3]), num_labels=4)).train()
    images = torch.randn(2, 3, 48, 96)
    output = model(images, labels=torch.randint(0, 4, (2, 48, 96)))
    assert output.logits.shape == (2, 4, 48, 96)
    assert_trains(model, output.loss)
    assert_same_after_reload(model, tmp_path, images, "logits")


@pytest.mark.parametrize(
    ("model_class", "config_class", "stages", "settings"),
    [
        (DetrForObjectDetection, DetrConfig, [3], {}),
        (ConditionalDetrForObjectDetection, ConditionalDetrConfig, [3], {}),
        (DeformableDetrForObjectDetection, DeformableDetrConfig, [1, 2, 3], {"num_feature_levels": 3}),
    ],
    ids=["detr", "conditional-detr", "deformable-detr"],
)
def test_detection(encoder_folder: Path, tmp_path: Path, model_class, config_class, stages, settings) -> None:
    backbone = EquiSSLBackbone.from_pretrained(encoder_folder, out_indices=stages)
    model = model_class(config_class(backbone_config=backbone.config, **DETR, **settings))
    inner: nn.Module = model.model.backbone.model
    inner.load_state_dict(backbone.state_dict())
    images = torch.randn(2, 3, 64, 96)
    boxes = [
        {"class_labels": torch.tensor([1, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.3, 0.4, 0.2, 0.1]])}
    ]
    assert_trains(model, model.train()(images, labels=2 * boxes).loss)
    assert_same_after_reload(model, tmp_path, images, "logits")


def test_pose_estimation(encoder_folder: Path, tmp_path: Path) -> None:
    # Stored at 64 x 64 pixels; the pictures of people are upright, and VitPose reads their size from the configuration.
    backbone = EquiSSLBackbone.from_pretrained(encoder_folder, patch_size=(8, 8), reshape_hidden_states=False)
    images = torch.randn(2, 3, 96, 64)
    before = backbone(images).feature_maps[0]
    backbone.resize_positions((96, 64))
    model = VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone.config, num_labels=4))
    model.backbone.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(model.eval().backbone(images).feature_maps[0], before)
    heatmaps = model.train()(images).heatmaps
    assert heatmaps.shape == (2, 4, 48, 32)  # 12 x 8 patches, four times as fine
    assert_trains(model, (heatmaps - torch.rand_like(heatmaps)).square().mean())
    assert_same_after_reload(model, tmp_path, images, "heatmaps")


def test_pipelines_and_processor(encoder_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8))
    encoder = EquiSSLModel.from_pretrained(encoder_folder).eval()
    EquiSSLForImageClassification.from_pretrained(
        encoder_folder, id2label={0: "cat", 1: "dog", 2: "fox"}
    ).save_pretrained(tmp_path)
    capfd.readouterr()
    transformers_logging.disable_progress_bar()
    try:
        processor = AutoImageProcessor.from_pretrained(encoder_folder)
        processor.save_pretrained(tmp_path)
        features = pipeline("image-feature-extraction", model=str(encoder_folder))
        classify = pipeline("image-classification", model=str(tmp_path))
        tokens, pooled, scores = features(image), features(image, pool=True), classify(image, top_k=2)
    finally:
        transformers_logging.enable_progress_bar()
    assert capfd.readouterr().err == ""
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    with torch.no_grad():
        expected = encoder(pixels).last_hidden_state
        logits = EquiSSLForImageClassification.from_pretrained(tmp_path).eval()(pixels).logits[0]
    torch.testing.assert_close(torch.tensor(tokens), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(pooled), expected[:, 0], atol=1e-6, rtol=1e-5)
    best = logits.softmax(0).sort(descending=True)
    assert [score["label"] for score in scores] == [("cat", "dog", "fox")[index] for index in best.indices[:2]]
    assert [score["score"] for score in scores] == pytest.approx(best.values[:2].tolist(), abs=1e-6)
