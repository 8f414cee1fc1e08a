"""Load an encoder and the settings of its images from a folder or the Hub."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..utils.hostile import check_image_settings
from ..utils.load_errors import LoadError, explain_load_errors, read_config
from .base_image import square_side

# Weights that no feature depends on: their absence from a checkpoint does no harm.
_UNUSED_WEIGHTS = ("pooler", "mask_token", "decoder")


def load_encoder(source: str | Path, *, trust_remote_code: bool = False, **hub_options: Any) -> nn.Module:
    """Load an encoder from a folder or a Hub id with ``AutoModel``, in float32.

    Args:
        source: Folder with ``config.json`` and weights, or Hub id.
        trust_remote_code: Whether code stored beside the weights may run.
        **hub_options: ``revision``, ``subfolder``, ``cache_dir``, ``token`` as in ``AutoModel.from_pretrained``.

    Raises:
        LoadError: if there is no encoder there, if it cannot be read, if it does not read images, or if weights are
            missing: features of half-initialised networks would be reported as if they meant something.
    """
    options = {"trust_remote_code": trust_remote_code, **hub_options}
    config, keywords = _architecture(source, options)
    with explain_load_errors(source, **options):
        model, report = AutoModel.from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True, **options, **keywords
        )
    _check_reads_images(type(model), source)
    missing = sorted(key for key in report["missing_keys"] if not any(name in key for name in _UNUSED_WEIGHTS))
    if missing:
        raise LoadError(
            f"{len(missing)} weights of {type(model).__name__} are missing from {str(source)!r}, e.g. {missing[:3]}: "
            "this is not a checkpoint of that encoder. Give the folder that holds the exported encoder."
        )
    return model


def untrained_encoder(
    source: str | Path, *, seed: int = 0, trust_remote_code: bool = False, **hub_options: Any
) -> nn.Module:
    """Make an encoder of the architecture that ``source`` describes, with random weights of ``seed``, in float32.

    The weights there are not read. The caller's random numbers stay as they are.

    Raises:
        LoadError: there is no config, or it describes no encoder of images.
    """
    options = {"trust_remote_code": trust_remote_code, **hub_options}
    config, keywords = _architecture(source, options)
    with explain_load_errors(source, **options), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code, **keywords)
    _check_reads_images(type(model), source)
    return model


def _architecture(source: str | Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Read the config, and what the class of the encoder is built with besides."""
    config = read_config(source, what="encoder", **options)
    keywords: dict[str, Any] = {}
    if type(config) in AutoModel._model_mapping:
        model_class: Any = AutoModel._model_mapping[type(config)]
        _check_reads_images(model_class, source)
        if "add_pooling_layer" in inspect.signature(model_class).parameters:
            keywords["add_pooling_layer"] = False  # it would be random where the checkpoint has none, and is not used
    return config, keywords


def _check_reads_images(model_class: type[nn.Module], source: str | Path) -> None:
    name = getattr(model_class, "main_input_name", "pixel_values")
    if name != "pixel_values":
        raise LoadError(
            f"{model_class.__name__} at {str(source)!r} reads {name!r}, not images. "
            "Give a vision encoder (of a two-tower model, its vision tower)."
        )


def read_image_size(source: str | Path) -> int:
    """Read the side in pixels of the images that an encoder sees, as ``FrozenEncoder`` does; weights are not read.

    Raises:
        ValueError: nothing says it.
    """
    config = read_config(source, what="encoder")
    return square_side(read_image_settings(source).get("image_size") or getattr(config, "image_size", None))


def read_image_settings(source: str | Path, **hub_options: Any) -> dict[str, Any]:
    """Read image size, mean and std from the image processor beside an encoder; empty where there is none.

    Returns:
        ``image_size`` (pixels, may be absent), ``image_mean``, ``image_std`` (three floats each).

    Raises:
        ValueError: if the processor makes images that are not square, or is there and cannot be read: with another
            mean and std every number would be wrong.
    """
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(str(source), **hub_options)
    except OSError as error:
        if not isinstance(error.__context__, ValueError):  # JSON or UTF-8 that is damaged
            return {}
        raise LoadError(
            f"The image processor of {str(source)!r} cannot be read: preprocessor_config.json is cut short or damaged. "
            "Copy or download it again, or export the encoder again."
        ) from error
    check_image_settings(settings, f"The image processor of {str(source)!r}")
    normalise = settings.get("do_normalize", True)
    found: dict[str, Any] = {
        "image_mean": list(settings.get("image_mean") or IMAGENET_DEFAULT_MEAN) if normalise else [0.0] * 3,
        "image_std": list(settings.get("image_std") or IMAGENET_DEFAULT_STD) if normalise else [1.0] * 3,
    }
    crop = settings.get("crop_size") if settings.get("do_center_crop", "crop_size" in settings) else None
    size = crop or settings.get("size")
    if isinstance(size, dict):
        sides = {size[name] for name in ("height", "width", "shortest_edge") if size.get(name)}
        if len(sides) > 1:
            raise ValueError(
                f"The image processor of {str(source)!r} makes {size} images; give one side as image_size."
            )
        size = sides.pop() if sides else None
    if size:
        found["image_size"] = int(size)
    return found
