from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_equissl.objectives.reconstruction import ReconstructionObjective, image_errors
from hf_equissl.views.needs import Needs

from .helpers import encode, make_views, random_features, tiny_config, tiny_encoder


def setup(**kwargs):
    torch.manual_seed(0)
    config = tiny_config()
    objective = ReconstructionObjective(config, **kwargs)
    views = make_views(objective.needs)
    return objective, random_features(config, views), views


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_loss_equals_numpy_and_targets_are_in_order(images, final):
    objective, student, views = setup(num_intermediate_images=images, reconstruct_final=final)
    pictures = objective.reconstruct(student, views).detach().double().numpy()  # (B, K, C, H, W)
    targets = [views.intermediate_images[:, k].double().numpy() for k in range(images)]
    targets += [views.global_crops[1].double().numpy()] if final else []
    assert pictures.shape == (6, len(targets), 3, 32, 32)
    errors = [((pictures[:, k] - target) ** 2).sum() / target.size for k, target in enumerate(targets)]
    output = objective(student, None, views)
    names = [f"mse_{k}" for k in range(1, images + 1)] + (["mse_final"] if final else [])
    assert [output.logs[name].item() for name in names] == pytest.approx(errors, rel=1e-5)
    assert output.loss.item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert len(set(errors)) == len(errors)


@pytest.mark.parametrize(("images", "fractions"), [(1, (1 / 2,)), (2, (1 / 3, 2 / 3)), (3, (1 / 4, 1 / 2, 3 / 4))])
def test_fractions(images, fractions):
    objective = ReconstructionObjective(tiny_config(), num_intermediate_images=images)
    assert objective.needs == Needs(fractions=fractions)


def test_the_decoder_is_given_the_equivariant_patches_of_first_and_last_crop():
    objective, student, views = setup()
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, first, last, grid):
            seen.extend([first, last, grid])
            return torch.zeros_like(views.intermediate_images)

    objective.decoder = Recorder()
    loss = objective(student, None, views).loss
    for given, tokens in zip(seen, student.tokens, strict=False):
        torch.testing.assert_close(given, student.stem(tokens[:, 1:], part="equivariant"))
    assert seen[2] == (4, 4)
    torch.testing.assert_close(loss, views.intermediate_images.square().mean())


def test_only_the_equivariant_rows_of_the_stem_learn_from_both_views():
    objective, _, views = setup()
    encoder = tiny_encoder()
    student = encode(encoder, views)
    student.tokens.retain_grad()
    objective(student, None, views).loss.backward()
    (weight,) = (p for name, p in encoder.named_parameters() if "stem" in name and p.ndim == 2)
    invariant = objective.config.invariant_size
    assert weight.grad[invariant:].abs().max(dim=1).values.min() > 0
    assert weight.grad[:invariant].abs().max() == 0
    assert student.tokens.grad[:, :, 0].abs().max() == 0  # CLS stays out of the decoders
    assert student.tokens.grad[:, :, 1:].abs().amax(dim=(2, 3)).min() > 0


def test_registers_stay_out_of_the_decoders():
    config = tiny_config(num_register_tokens=2)
    objective = ReconstructionObjective(config)
    views = make_views(objective.needs)
    student = encode(tiny_encoder(config), views)
    student.tokens.retain_grad()
    output = objective(student, None, views)
    output.loss.backward()
    assert student.tokens.shape[2] == 1 + 2 + 16
    assert student.tokens.grad[:, :, :3].abs().max() == 0
    assert student.tokens.grad[:, :, 3:].abs().amax(dim=(0, 1, 3)).min() > 0


def test_widths_and_a_config_that_rebuilds_the_decoder():
    config = tiny_config()
    objective = ReconstructionObjective(config, num_intermediate_images=3, reconstruct_final=True)
    assert objective.decoder_config.decoder_type == "conv"
    assert objective.decoder_config.num_intermediate_images == 3
    assert objective.decoder_config.decoder_reconstructs_final
    assert config.decoder_type is None  # the encoder's own is left alone
    twin = ReconstructionObjective(config, num_intermediate_images=3, reconstruct_final=True)
    twin.decoder.load_state_dict(objective.decoder.state_dict())
    narrow = [width // 2 for width in objective.decoder_config.decoder_widths]
    small = ReconstructionObjective(config, decoder_widths=narrow)
    assert list(small.decoder_config.decoder_widths) == narrow
    sizes = [sum(p.numel() for p in o.decoder.parameters()) for o in (small, ReconstructionObjective(config))]
    assert sizes[0] < sizes[1]


def test_bfloat16_predictions_are_compared_in_fp32():
    g = torch.Generator().manual_seed(0)
    predictions = torch.randn(2, 2, 3, 8, 8, generator=g).bfloat16().requires_grad_(True)
    targets = torch.randn(2, 2, 3, 8, 8, generator=g)
    errors = image_errors(predictions, targets.unbind(dim=1))
    assert errors.dtype == torch.float32
    torch.testing.assert_close(errors, (predictions.float() - targets).square().mean(dim=(0, 2, 3, 4)))
    errors.sum().backward()
    assert predictions.grad.dtype == torch.bfloat16


def test_an_encoder_without_equivariant_part_is_refused():
    with pytest.raises(ValueError, match="feature_size"):
        ReconstructionObjective(tiny_config(feature_size=None, equivariant_size=None))


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="`num_intermediate_images` is 0, expected at least 1"):
        ReconstructionObjective(tiny_config(), num_intermediate_images=0)


def test_absent_too_few_or_unfit_targets_and_a_single_crop_are_refused():
    objective, student, views = setup()
    with pytest.raises(ValueError, match="carry 0 intermediate images per sample, expected 2"):
        objective(student, None, replace(views, intermediate_images=None))
    with pytest.raises(ValueError, match="carry 1 intermediate images"):
        objective(student, None, replace(views, intermediate_images=views.intermediate_images[:, :1]))
    with pytest.raises(ValueError, match="image_size"):
        objective(student, None, replace(views, intermediate_images=views.intermediate_images[..., :16]))
    with pytest.raises(ValueError, match="at least two global crops"):
        objective(replace(student, tokens=student.tokens[:1]), None, views)
