"""Stock encoders become EquiSSL encoders with equal outputs, and stock ones again."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BitImageProcessorPil, PreTrainedModel

from hf_equissl.encoders.convert import CONVERTERS, convert_encoder, read_normalisation
from hf_equissl.encoders.native import to_native
from hf_equissl.modeling import EquiSSLBackbone, EquiSSLConfig, EquiSSLForImageClassification, EquiSSLModel
from hf_equissl.utils.load_errors import LoadError

pytest_plugins = ["tests.hub.fixtures"]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
VIT = {**TINY, "intermediate_size": 48, "initializer_range": 0.3}
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
# Case -> class that is saved, fields of its configuration.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2": ("Dinov2Model", {**TINY, "layerscale_value": 0.3}),
    "dinov2-head": ("Dinov2ForImageClassification", {**TINY, "qkv_bias": False, "patch_size": [8, 8]}),
    "dinov2-no-mask": ("Dinov2Model", {**TINY, "use_mask_token": False, "drop_path_rate": 0.2}),
    "dinov2-backbone": ("Dinov2Backbone", TINY),
    "registers": ("Dinov2WithRegistersModel", {**TINY, "num_register_tokens": 3}),
    "registers-head": ("Dinov2WithRegistersForImageClassification", TINY),
    "vit-pooler": ("ViTModel", VIT),
    "vit-head": ("ViTForImageClassification", {**VIT, "layer_norm_eps": 1e-3, "hidden_act": "gelu_pytorch_tanh"}),
    "vit-masked": ("ViTForMaskedImageModeling", {**VIT, "encoder_stride": 8, "qkv_bias": False}),
    "vit-odd-ratio": ("ViTModel", {**VIT, "hidden_size": 28, "intermediate_size": 103}),
    "mae": ("ViTMAEModel", VIT),
    "mae-pretraining": ("ViTMAEForPreTraining", {**VIT, **DECODER, "decoder_intermediate_size": 16, "mask_ratio": 0.5}),
    "msn": ("ViTMSNModel", VIT),
}


@torch.no_grad()
def stock(name: str, fields: dict[str, Any]) -> PreTrainedModel:
    """A stock model whose parameters all have values of their own; MAE's fixed positions stay as they are."""
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**fields))
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            ones = key.endswith("lambda1") or ("norm" in key and key.endswith("weight"))
            parameter.copy_(0.2 * torch.randn(parameter.shape) + ones)
    return model.eval()


@torch.no_grad()
def stock_tokens(model: PreTrainedModel, images: Tensor, mask: Tensor | None = None) -> Tensor:
    """Tokens (B, 1 + R + N, D) of a stock model's encoder; of ViT-MAE unmasked and in order."""
    base = getattr(model, model.base_model_prefix, model)
    if type(base).__name__ == "Dinov2Backbone":  # it has the encoder's parts and another output
        whole = transformers.Dinov2Model(base.config).eval()
        whole.load_state_dict(base.state_dict())
        base = whole
    keywords: dict[str, Any] = {} if mask is None else {"bool_masked_pos": mask}
    if base.config.model_type.startswith("vit"):
        keywords["interpolate_pos_encoding"] = images.shape[-2:] != (32, 32)
    if base.config.model_type == "vit_mae":
        base.config.mask_ratio = 0.0
        number = images.shape[-2] * images.shape[-1] // 64
        keywords["noise"] = torch.arange(number, dtype=torch.float).expand(len(images), -1)
    return base(images, **keywords).last_hidden_state


@pytest.mark.parametrize("memory", [False, True], ids=["folder", "memory"])
@pytest.mark.parametrize("case", CASES)
def test_round_trip(case: str, memory: bool, tmp_path: Path) -> None:
    model = stock(*CASES[case])
    model.save_pretrained(tmp_path)
    ours = convert_encoder(model if memory else tmp_path)
    assert (ours.training, ours.dtype, ours.stem, ours.decoder) == (False, torch.float32, None, None)
    has_mask = any(key.endswith("embeddings.mask_token") for key in model.state_dict())
    assert ours.config.use_mask_token == has_mask
    back = to_native(ours) if ours.config.mlp_ratio == int(ours.config.mlp_ratio) else None
    for size in ((32, 32), (48, 24), (16, 64)):
        images = torch.randn(2, 3, *size)
        for mask in [None, torch.rand(2, size[0] * size[1] // 64) < 0.4] if has_mask else [None]:
            expected = stock_tokens(model, images, mask)
            with torch.no_grad():
                torch.testing.assert_close(ours(images, mask).last_hidden_state, expected, **TOLERANCE)
                if back is not None:
                    torch.testing.assert_close(back(images, mask).last_hidden_state, expected, **TOLERANCE)


def test_ratio_of_every_width_is_exact() -> None:
    """The MLP's width survives the division, e.g. SigLIP's 4304 of 1152."""
    for hidden in (1152, 1408, 384, 28):
        for inner in (4304, 6144, 1536, 103):
            config = transformers.ViTConfig(
                **{**VIT, "hidden_size": hidden, "num_hidden_layers": 1, "intermediate_size": inner}
            )
            ratio = CONVERTERS["vit"].fields(config)["mlp_ratio"]
            assert int(hidden * ratio) == inner


def test_images_that_are_not_square_keep_their_positions() -> None:
    model = stock("ViTModel", {**VIT, "image_size": [16, 40]})
    ours = convert_encoder(model)
    assert list(ours.config.image_size) == [16, 40]
    images = torch.randn(2, 3, 16, 40)
    with torch.no_grad():
        expected = model(images).last_hidden_state
        torch.testing.assert_close(ours(images).last_hidden_state, expected, **TOLERANCE)


def test_what_patches_do_not_fill_is_not_seen() -> None:
    model = stock("ViTModel", {**VIT, "image_size": 36})
    ours = convert_encoder(model)
    assert ours.config.image_size == 32
    images = torch.randn(2, 3, 36, 36)
    with torch.no_grad():
        expected = model(images).last_hidden_state
        torch.testing.assert_close(ours(images[..., :32, :32]).last_hidden_state, expected, **TOLERANCE)


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    model = stock(*CASES["dinov2"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        ours = convert_encoder(source)
        assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
        torch.testing.assert_close(ours.layernorm.weight.data, model.layernorm.weight.data.float())


def test_weights_are_copied() -> None:
    model = stock(*CASES["vit-head"])
    before = model.vit.layernorm.weight.clone()
    with torch.no_grad():
        convert_encoder(model).layernorm.weight.add_(1)
    torch.testing.assert_close(model.vit.layernorm.weight, before)


@pytest.mark.parametrize("memory", [False, True], ids=["folder", "memory"])
@pytest.mark.parametrize(
    ("case", "left_out"),
    [
        ("vit-pooler", "pooler (2)"),
        ("vit-head", "classifier (2)"),
        ("mae-pretraining", "decoder ("),
        ("dinov2-head", "classifier (2)"),
    ],
)
def test_what_is_left_out_is_said(
    case: str, left_out: str, memory: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = stock(*CASES[case])
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        convert_encoder(model if memory else tmp_path)
    assert [record.name for record in caplog.records] == ["hf_equissl.encoders.convert"]
    assert left_out in caplog.text


def test_own_encoders_are_taken_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    encoder = EquiSSLModel(EquiSSLConfig(**TINY, feature_size=12, equivariant_size=4, cls_insertion_layer=1))
    assert convert_encoder(encoder) is encoder
    classifier = EquiSSLForImageClassification(encoder.config)
    assert convert_encoder(classifier) is classifier.equissl
    with pytest.raises(ValueError, match="EquiSSLBackbone holds no EquiSSLModel"):
        convert_encoder(EquiSSLBackbone(encoder.config))
    encoder.save_pretrained(tmp_path)
    loaded = convert_encoder(tmp_path)
    assert not loaded.training
    assert loaded.config.feature_size == 12
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value)
    classifier.save_pretrained(tmp_path / "classifier")
    with caplog.at_level(logging.INFO, logger="hf_equissl"):
        assert "classifier" not in dict(convert_encoder(tmp_path / "classifier").named_children())
    assert [record.getMessage() for record in caplog.records] == [f"Left out of {tmp_path}/classifier: classifier (2)."]


def edit(folder: Path, **changes: Tensor | None) -> None:
    """Put entries into a saved file, or (None) take them out; ``__`` stands for a dot."""
    state = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        state.pop(name.replace("__", "."), None)
        if value is not None:
            state[name.replace("__", ".")] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("vit-head", {"vit__layernorm__bias": None}, r"1 missing: layernorm\.bias"),
        ("dinov2", {"embeddings__mask_token": None}, r"1 missing: embeddings\.mask_token"),
        ("dinov2", {"embeddings__register_tokens": torch.ones(1, 4, 32)}, r"1 unknown: embeddings\.register_tokens"),
        ("registers", {"encoder__rope": torch.ones(3), "norm9__bias": torch.ones(3)}, r"2 unknown: .*norm9\.bias"),
        ("dinov2", {"layernorm__bias": torch.ones(3)}, "shapes are not those"),
    ],
)
def test_missing_and_unknown_weights_are_listed(
    case: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    stock(*CASES[case]).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        convert_encoder(tmp_path)


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("IJepaModel", VIT, "no CLS token"),
        ("DINOv3ViTModel", {**VIT, "num_register_tokens": 1}, "RoPE"),
        ("DeiTModel", VIT, "distillation token"),
        ("BeitModel", VIT, "relative position biases"),
        ("SiglipVisionModel", {k: v for k, v in VIT.items() if k != "initializer_range"}, "no CLS token"),
        ("Dinov2Model", {**TINY, "use_swiglu_ffn": True}, "SwiGLU"),
        ("Dinov2Model", {**TINY, "image_size": [16, 64]}, "square grid"),
        ("ViTModel", {**VIT, "patch_size": [8, 16]}, "expected squares"),
        ("Dinov2WithRegistersModel", {**TINY, "num_register_tokens": 0}, "num_register_tokens=0"),
        (
            "BertModel",
            {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
            "not that of a plain ViT",
        ),
    ],
)
def test_other_architectures_are_refused_with_the_reason(
    name: str, fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model_class = getattr(transformers, name)
    config = model_class.config_class(**fields)
    with torch.device("meta"):
        model = model_class(config)
    config.save_pretrained(tmp_path)  # the config alone decides, before weights are read
    for source in (model, tmp_path):
        with pytest.raises(ValueError, match=reason):
            convert_encoder(source)


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="absent"):
        convert_encoder(tmp_path / "absent")
    stock(*CASES["dinov2"]).save_pretrained(tmp_path / "good")
    with pytest.raises(ValueError, match=r"Linear does not convert: expected a folder"):
        convert_encoder(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="runs no code"):
        convert_encoder(tmp_path / "good", trust_remote_code=True)
    with pytest.raises(LoadError, match="subfolder"):
        convert_encoder(tmp_path / "good", subfolder="native")
    weights = tmp_path / "good" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(LoadError, match=r"model\.safetensors.*cut short"):
        convert_encoder(tmp_path / "good")


def test_subfolders(tmp_path: Path) -> None:
    model = stock(*CASES["dinov2"])
    model.save_pretrained(tmp_path / "native")
    ours = convert_encoder(tmp_path, subfolder="native")
    torch.testing.assert_close(ours.layernorm.weight, model.layernorm.weight)


def test_a_hub_id_at_a_revision(api: HfApi, tmp_path: Path) -> None:
    model = stock(*CASES["registers-head"])
    model.save_pretrained(tmp_path / "native")
    repo_id = f"{api.whoami()['name']}/stock"
    api.create_repo(repo_id)
    first = api.upload_folder(repo_id=repo_id, folder_path=tmp_path).oid
    api.delete_folder("native", repo_id=repo_id)
    ours = convert_encoder(repo_id, revision=first, subfolder="native", token=api.token)
    base = model.dinov2_with_registers
    torch.testing.assert_close(ours.embeddings.register_tokens, base.embeddings.register_tokens)
    assert read_normalisation(repo_id, revision=first, subfolder="native", token=api.token) is None
    with pytest.raises(LoadError, match="subfolder 'native'"):
        convert_encoder(repo_id, subfolder="native", token=api.token)
    with pytest.raises(LoadError, match="no such repository"):
        convert_encoder(f"{repo_id}-2", token=api.token)


def test_normalisation(tmp_path: Path) -> None:
    assert read_normalisation(tmp_path / "vit.pth") == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert read_normalisation(stock(*CASES["dinov2"])) is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert read_normalisation(tmp_path) is None
    BitImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    assert read_normalisation(tmp_path) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
