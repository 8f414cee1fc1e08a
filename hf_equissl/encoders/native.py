"""An encoder as a stock transformers model, which needs neither this package nor remote code."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2Model, Dinov2WithRegistersModel
from transformers.initialization import no_init_weights

from ..modeling import EquiSSLConfig, EquiSSLModel
from ..utils.files import move_into_place, staging_folder
from .export import check_replaceable, image_processor
from .weights import SAME_NAME

logger = logging.getLogger(__name__)

# First parts of our encoder's names that a stock model does not have.
_OURS_ALONE = ("stem.", "decoder.")


def to_native(encoder: EquiSSLModel) -> Dinov2Model | Dinov2WithRegistersModel:
    """Make the stock model with the weights of an encoder, in eval mode, on its device and in its dtype.

    It is a ``Dinov2Model``, or with register tokens a ``Dinov2WithRegistersModel``. Its ``last_hidden_state`` equals
    the encoder's for every image and mask. Stem and decoder are left out. Where ours has no LayerScale the stock model
    has one of ones; where a model with registers has no mask token the stock model, which always holds one, has zeros.
    Stochastic depth of mode "uniform" is kept; stock models know no ramp over depth, so "linear" becomes 0.

    Raises:
        ValueError: No stock model computes the same: CLS enters after the first block, images are not square, or the
            MLP's ratio is not whole.
    """
    config = encoder.config
    stock, fields = _stock_fields(config)
    with no_init_weights():
        native = stock(stock.config_class(**fields))
    native.load_state_dict(_stock_state(encoder, native))
    return native.to(device=encoder.device, dtype=encoder.dtype).eval()


def save_native(
    encoder: EquiSSLModel,
    directory: str | Path,
    image_mean: Sequence[float],
    image_std: Sequence[float],
) -> Path:
    """Save ``to_native(encoder)`` and its image processor; an older one there is replaced as a whole.

    Plain ``AutoModel.from_pretrained(directory)`` loads it, here and where this package is absent. The weights' names
    in the file are those of transformers 4 and 5 alike.

    Args:
        encoder: The encoder to save.
        directory: Folder to write.
        image_mean: Mean per channel, of pixels in [0, 1].
        image_std: Standard deviation of each channel.

    Raises:
        ValueError: As ``to_native`` and ``check_replaceable``.
    """
    native = to_native(encoder)
    directory = Path(directory)
    check_replaceable(directory)
    with staging_folder(directory) as staging:
        native.save_pretrained(staging)
        side = encoder.config.grid_size[0] * encoder.config.patch_side
        image_processor(side, image_mean, image_std).save_pretrained(staging)
        move_into_place(staging, directory)
    return directory


def _stock_fields(config: EquiSSLConfig) -> tuple[Any, dict[str, Any]]:
    """Choose the stock class and the fields of its configuration."""
    if config.cls_insertion_layer > 0:
        raise ValueError(
            f"cls_insertion_layer={config.cls_insertion_layer} has no stock counterpart: in Dinov2Model CLS enters "
            "before the first block. Publish this encoder with its code (trust_remote_code=True) and without native/."
        )
    rows, columns = config.grid_size
    if rows != columns:
        raise ValueError(
            f"image_size={config.image_size} has no stock counterpart: Dinov2Model reads its position embeddings as a "
            "square grid. Publish this encoder with its code (trust_remote_code=True) and without native/."
        )
    if config.mlp_ratio != int(config.mlp_ratio):
        raise ValueError(
            f"mlp_ratio={config.mlp_ratio} has no stock counterpart: Dinov2Config takes whole ratios. "
            "Publish this encoder with its code (trust_remote_code=True) and without native/."
        )
    fields = {name: getattr(config, name) for name in SAME_NAME}
    patch = config.patch_side
    fields |= {"mlp_ratio": int(config.mlp_ratio), "patch_size": patch, "image_size": rows * patch}
    fields["layerscale_value"] = 1.0 if config.layerscale_value is None else float(config.layerscale_value)
    if config.drop_path_mode == "uniform":
        fields["drop_path_rate"] = config.drop_path_rate
    elif config.drop_path_rate:
        logger.info("drop_path_rate=%s is not carried: stock models know no ramp over depth.", config.drop_path_rate)
    if config.num_register_tokens:
        return Dinov2WithRegistersModel, {**fields, "num_register_tokens": config.num_register_tokens}
    return Dinov2Model, {**fields, "use_mask_token": config.use_mask_token}


def _stock_state(encoder: EquiSSLModel, native: torch.nn.Module) -> dict[str, Tensor]:
    """Collect the encoder's weights, with constants in place of those that it does not have."""
    state = {name: value for name, value in encoder.state_dict().items() if not name.startswith(_OURS_ALONE)}
    for name, value in native.state_dict().items():
        if name.endswith("lambda1") and encoder.config.layerscale_value is None:
            state[name] = torch.ones_like(value)
        elif name.endswith("mask_token") and not encoder.config.use_mask_token:
            state[name] = torch.zeros_like(value)
    return state
