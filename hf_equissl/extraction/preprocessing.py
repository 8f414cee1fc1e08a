"""Turn a decoded picture into the encoder's input, as the image processor beside it does."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from ..encoders.base_image import base_image, resized_side
from ..encoders.frozen import FrozenEncoder
from ..encoders.loading import read_image_settings

# Settings of an image processor that change no pixel.
_WITHOUT_EFFECT = ("image_processor_type", "processor_class", "feature_extractor_type", "_processor_class")
_CLOSE = 1e-5


class Preprocessing:
    """Makes an encoder's input from pictures.

    Where an image processor lies beside the encoder, the pixels are its own (with its Pillow backend, which every
    machine has, so that all machines make the same). They travel as uint8 and are normalised on the encoder's device
    where that gives what the processor gives, which is tried out on a picture. Without a processor, or with an
    ``image_size`` of the user's, pictures are resized and cropped as for the probes: ``base_image``.

    Args:
        source: Folder or Hub id of the encoder.
        encoder: The loaded encoder.
        image_size: The user's choice of a side in pixels.
        **load_options: As for ``load_encoder``.

    Attributes:
        settings: What is done to a picture, for the record.
        size: Side of the images in pixels.
        normalised: Whether pixels come as normalised floats instead of uint8.

    Raises:
        ValueError: The image processor makes images of several sizes.
    """

    def __init__(self, source: str, encoder: FrozenEncoder, image_size: int | None = None, **load_options: Any) -> None:
        self.size, self.normalised = encoder.image_size, False
        self._processor: Any = None
        normalisation = {"mean": encoder.image_mean, "std": encoder.image_std}
        hub_options = {key: value for key, value in load_options.items() if key != "trust_remote_code"}
        if image_size is not None or not read_image_settings(source, **hub_options):
            self.settings: dict[str, Any] = {"shorter_side": resized_side(self.size), "center_crop": self.size}
            self.settings |= {"resample": "bicubic", **normalisation}
            return
        self._processor = _load_processor(source, **load_options)
        settings = {key: value for key, value in sorted(self._processor.to_dict().items()) if value is not None}
        settings = {key: value for key, value in settings.items() if key not in _WITHOUT_EFFECT}
        self.settings = json.loads(json.dumps(settings))  # tuples become lists, as they are read back
        self._try_out(source, encoder)

    def __call__(self, image: Image.Image) -> Tensor:
        """Turn one RGB picture into (3, S, S), uint8, or float32 where ``normalised``."""
        if self._processor is None:
            return base_image(image, self.size)
        steps = {} if self.normalised else {"do_rescale": False, "do_normalize": False}
        return self._processor(image, return_tensors="pt", **steps)["pixel_values"][0]

    def _try_out(self, source: str, encoder: FrozenEncoder) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (3 * self.size // 2, 2 * self.size, 3), dtype=np.uint8)
        wide, tall = Image.fromarray(noise), Image.fromarray(noise.transpose(1, 0, 2))
        self.normalised = True
        wanted, shape = self(wide), self(tall).shape
        if wanted.shape != shape or shape[-1] != shape[-2]:
            raise ValueError(
                f"The image processor of {source!r} makes {tuple(wanted.shape[-2:])} pixels of a wide picture and "
                f"{tuple(shape[-2:])} of a tall one. Features need images of one square size: give --image_size."
            )
        self.size, self.normalised = int(shape[-1]), False
        try:
            pixels = self(wide)
        except (TypeError, ValueError):  # a processor that does not know these two steps
            self.normalised = True
            return
        mean, std = (torch.tensor(values)[:, None, None] for values in (encoder.image_mean, encoder.image_std))
        same = pixels.dtype == torch.uint8 and pixels.shape == wanted.shape
        self.normalised = not (
            same and torch.allclose((pixels.float() / 255 - mean) / std, wanted, rtol=0, atol=_CLOSE)
        )


def _load_processor(source: str, *, trust_remote_code: bool = False, **hub_options: Any) -> Any:
    """Load the image processor; left unsaid, ``trust_remote_code`` would be asked for at the terminal.

    Raises:
        ValueError: It needs code of its own, which may not run.
    """
    try:
        return AutoImageProcessor.from_pretrained(
            source, backend="pil", trust_remote_code=trust_remote_code, **hub_options
        )
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"The image processor of {source!r} comes with code of its own. Read that code, then pass "
            "--trust_remote_code; or give --image_size, which uses none of it."
        ) from error
