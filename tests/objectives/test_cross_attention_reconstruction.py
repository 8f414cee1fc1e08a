from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_equissl.objectives.cross_attention_reconstruction import CrossAttentionReconstructionObjective
from hf_equissl.views.needs import Needs

from .helpers import make_views, random_features, tiny_config

# What the battery builds it with.
SMALL = {"decoder_num_layers": 1, "decoder_hidden_size": 16, "decoder_num_heads": 2}


def setup(**kwargs):
    torch.manual_seed(0)
    config = tiny_config()
    objective = CrossAttentionReconstructionObjective(config, **SMALL, **kwargs)
    views = make_views(objective.needs)
    return objective, random_features(config, views), views


class Recorder(torch.nn.Module):
    """A decoder that keeps what it is given and paints the mean of its key/value tokens."""

    def forward(self, query, key_value, grid):
        self.query, self.key_value, self.grid = query, key_value, grid
        return key_value.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1).expand(-1, 1, 3, 32, 32)


def numpy_mse(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a.detach().double().numpy() - b.double().numpy()) ** 2).mean())


def test_loss_is_the_error_of_the_second_view():
    objective, student, views = setup()
    pictures = objective.reconstruct(student, views)
    assert pictures.shape == (6, 1, 3, 32, 32)
    output = objective(student, None, views)
    assert output.loss.item() == pytest.approx(numpy_mse(pictures[:, 0], views.global_crops[1]), rel=1e-5)
    assert output.logs["mse_view_2"].item() == output.loss.item()
    assert objective.needs == Needs()


def test_symmetric_averages_both_directions():
    objective, student, views = setup(symmetric=True)
    pictures = objective.reconstruct(student, views)
    assert pictures.shape == (6, 2, 3, 32, 32)
    first, last = (student.stem(tokens[:, 1:], part="equivariant") for tokens in student.tokens)
    torch.testing.assert_close(pictures[:, :1], objective.decoder(first, last, (4, 4)))
    torch.testing.assert_close(pictures[:, 1:], objective.decoder(last, first, (4, 4)))
    errors = [numpy_mse(pictures[:, 0], views.global_crops[1]), numpy_mse(pictures[:, 1], views.global_crops[0])]
    output = objective(student, None, views)
    assert [output.logs["mse_view_2"].item(), output.logs["mse_view_1"].item()] == pytest.approx(errors, rel=1e-5)
    assert output.loss.item() == pytest.approx(sum(errors) / 2, rel=1e-5)


def test_the_first_view_asks_and_the_last_answers():
    objective, student, views = setup()
    objective.decoder = Recorder()
    loss = objective(student, None, views).loss
    for given, tokens in zip((objective.decoder.query, objective.decoder.key_value), student.tokens, strict=True):
        torch.testing.assert_close(given, student.stem(tokens[:, 1:], part="equivariant"))
    assert objective.decoder.grid == (4, 4)
    painted = objective.decoder.key_value.mean(dim=(1, 2)).view(-1, 1, 1, 1)
    torch.testing.assert_close(loss, (painted - views.global_crops[-1]).square().mean())


def test_what_the_decoder_is_built_from():
    objective, _, _ = setup()
    config = objective.decoder_config
    assert (config.decoder_type, config.decoder_num_layers, config.decoder_hidden_size) == ("cross_attention", 1, 16)
    assert objective.config.decoder_type is None
    defaults = CrossAttentionReconstructionObjective(tiny_config()).decoder_config
    assert (defaults.decoder_num_layers, defaults.decoder_hidden_size) == (4, 256)


def test_wrong_inputs():
    with pytest.raises(ValueError, match="feature_size"):
        CrossAttentionReconstructionObjective(tiny_config(feature_size=None, equivariant_size=None))
    objective, student, views = setup()
    with pytest.raises(ValueError, match="at least two global crops"):
        objective(replace(student, tokens=student.tokens[:1]), None, views)
