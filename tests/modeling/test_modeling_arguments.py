"""What others hand to our models: adapters on every linear layer, arguments of text models, words nobody knows."""

from __future__ import annotations

import pytest
import torch

from hf_equissl import EquiSSLBackbone, EquiSSLConfig, EquiSSLForImageClassification, EquiSSLModel

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
STEM = {"feature_size": 16, "equivariant_size": 8}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_adapters_on_every_linear_layer_leave_the_stem_whole() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    encoder = EquiSSLModel(EquiSSLConfig(**SMALL, **STEM)).eval()
    with torch.no_grad():
        before = encoder(IMAGES).equivariant_features
        adapted = peft.get_peft_model(encoder, peft.LoraConfig(r=2, target_modules="all-linear"))
        torch.testing.assert_close(adapted(IMAGES).equivariant_features, before)  # adapters begin at zero
    names = {name.split(".lora_A")[0].split(".")[-1] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}
    classifier = EquiSSLForImageClassification(EquiSSLConfig(**SMALL, **STEM, pooling="equivariant", num_labels=3))
    adapted = peft.get_peft_model(classifier, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert adapted(IMAGES).logits.shape == (2, 3)


def test_feature_extraction_of_peft() -> None:
    """Its wrapper hands ``attention_mask=None`` and further arguments of text models on."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="FEATURE_EXTRACTION")
    adapted = peft.get_peft_model(EquiSSLModel(EquiSSLConfig(**SMALL)), config)
    assert adapted(pixel_values=IMAGES).last_hidden_state.shape == (2, 17, 16)


@pytest.mark.parametrize("kind", [EquiSSLModel, EquiSSLForImageClassification, EquiSSLBackbone])
def test_unknown_arguments_do_not_vanish(kind: type) -> None:
    model = kind(EquiSSLConfig(**SMALL))
    for name, hint in [
        ("output_hidden_state", "Did you mean 'output_hidden_states'"),
        ("interpolate_pos_encoding", "interpolated to every image size by themselves"),
        ("attention_mask", "does not know 'attention_mask'"),
    ]:
        with pytest.raises(TypeError, match=hint):
            model(IMAGES, **{name: torch.ones(1) if name == "attention_mask" else True})
    assert model(IMAGES, attention_mask=None, output_hidden_states=True).hidden_states is not None
