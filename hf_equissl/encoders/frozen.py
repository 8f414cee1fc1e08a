"""One way to read features off any frozen encoder, whoever trained it."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..utils.devices import Precision, choose_precision
from ..utils.hostile import check_image_settings
from .base_image import square_side
from .block_features import final_norm, read_last_blocks
from .feature_names import BLOCK_FEATURES, FEATURES, PATCH_TOKENS
from .loading import load_encoder, read_image_settings
from .outputs import as_map, last_state, read_states

logger = logging.getLogger(__name__)

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteFeaturesError(ValueError):
    """An encoder gives features that are infinite or not a number."""


class FrozenEncoder:
    """Features of an encoder that stays as it is: eval mode, no gradients, weights and training mode untouched.

    Reads every vision encoder that ``AutoModel`` loads and every module that maps ``pixel_values`` (B, C, H, W) to
    tokens (B, T, D), a map (B, D, h, w), a vector (B, D), or an object with such a ``last_hidden_state``. How many
    tokens stand before the patches follows from their number: T - N. Where no CLS exists (I-JEPA, SigLIP, maps),
    ``cls`` is the mean of the patches, and a log line says so. ViT-MAE is read unmasked, with its patches in order.

    Feature names, each (B, .), float32:
        cls: The CLS token after the final norm, D.
        patches: The mean of the patch tokens after the final norm, D.
        backbone: [cls ; patches], 2 D.
        cls_4, cls_4_patches: The CLS tokens of the last 4 blocks after the final norm, 4 D; these and ``patches``, 5 D.
        invariant, equivariant: [CLS ; mean patch] of that slice of the linear stem (EquiSSL encoders), twice its width.
        stem: [invariant ; equivariant].
        invariant_cls, invariant_patches, equivariant_cls, equivariant_patches: One half of these.

    Attributes:
        predictor: What predicts this encoder's embeddings of transformed images, where it was trained with such a thing
            and it was loaded beside it; for evaluators that judge it.

    ``features`` and ``encode`` also give ``patch_tokens``, (B, N, D): the patch tokens after the final norm.
    """

    def __init__(
        self,
        encoder: nn.Module | str | Path,
        *,
        image_size: int | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        name: str | None = None,
        precision: Precision | Literal["auto"] = "fp32",
        batch_size: int = 256,
        device: str | torch.device | None = None,
        **load_options: Any,
    ) -> None:
        """Wrap an encoder.

        Args:
            encoder: A module (it stays on its device), or a folder or Hub id for ``load_encoder``.
            image_size: Side of the square images; default: the image processor's, else ``config.image_size``.
            image_mean: Default: the image processor's, else ImageNet's.
            image_std: Default: the image processor's, else ImageNet's.
            name: What records call the encoder; default: its path or id, or the class of the module.
            precision: "bf16" and "fp16" run the encoder under autocast; features are returned in float32 either way.
                "auto": bf16 where the encoder's device has units for it, else fp32.
            batch_size: Images per forward pass.
            device: Where an encoder given by path is put; default: CUDA if there is one.
            **load_options: ``trust_remote_code``, ``revision``, ``subfolder``, ... for an encoder given by path.
        """
        if precision not in ("auto", *_AUTOCAST):
            raise ValueError(f"precision must be one of auto, {', '.join(_AUTOCAST)}, got {precision!r}.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        check_image_settings(
            {"image_size": image_size, "image_mean": image_mean, "image_std": image_std}, "The encoder"
        )
        saved: dict[str, Any] = {}
        if isinstance(encoder, nn.Module):
            if device is not None or load_options:
                raise ValueError("device and load options are for encoders given by path; move a module yourself.")
            self.module, self.name = encoder, name or type(encoder).__name__
        else:
            self.module = load_encoder(encoder, **load_options)
            self.module.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self.name = name or str(encoder)
            hub_options = {key: value for key, value in load_options.items() if key != "trust_remote_code"}
            saved = read_image_settings(encoder, **hub_options)
            if not saved and (image_mean is None or image_std is None):
                logger.info("No image processor beside %s: ImageNet mean and std, image size of the config.", self.name)
        self.precision, self.batch_size = choose_precision(precision, self.device), batch_size
        self.image_mean = [float(value) for value in image_mean or saved.get("image_mean") or IMAGENET_DEFAULT_MEAN]
        self.image_std = [float(value) for value in image_std or saved.get("image_std") or IMAGENET_DEFAULT_STD]
        self.image_size = square_side(image_size or saved.get("image_size") or self._setting("image_size"))
        if image_size is not None:
            self._check_patches()
        self.predictor: Any = None
        self._digest: tuple[tuple[int, ...], str] | None = None
        inputs = inspect.signature(self.module.forward).parameters
        self._inputs = set(inputs)
        takes_more = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in inputs.values())
        self._gives_states = takes_more or "output_hidden_states" in inputs

    def _setting(self, name: str) -> Any:
        return getattr(getattr(self.module, "config", self.module), name, None)

    @property
    def patch_size(self) -> int | None:
        """Side of the encoder's patches in pixels; ``None`` where its config does not say."""
        size = self._setting("patch_size")
        size = size[0] if isinstance(size, (list, tuple)) else size
        return size if isinstance(size, int) else None

    def _check_patches(self) -> None:
        """Refuse a chosen size that patches do not fill; the encoder's own size is its maker's business."""
        patch = self.patch_size
        if patch and self.image_size % patch and self.image_size not in _sides(self._setting("image_size")):
            lower = self.image_size // patch * patch
            near = f"{lower} or {lower + patch}" if lower else f"{patch}"
            raise ValueError(
                f"image_size (--image_size) is {self.image_size}, not a multiple of the {patch}-pixel patches of "
                f"{self.name}. Give {near}."
            )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        tensor = next(chain(self.module.parameters(), self.module.buffers()), None)
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def backbone_parts(self) -> tuple[str, ...]:
        """The features that make up ``backbone``: of a module that says ``gives_vectors`` its one vector."""
        return ("cls",) if getattr(self.module, "gives_vectors", False) else ("cls", "patches")

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The features that this encoder has."""
        stem = callable(getattr(self.module, "stem", None)) and self._setting("equivariant_size")
        blocks = final_norm(self.module) is not None and self._setting("num_hidden_layers")
        return (
            *FEATURES[:3],
            *(BLOCK_FEATURES if blocks else ()),
            *(FEATURES[3 + len(BLOCK_FEATURES) :] if stem else ()),
        )

    def check_features(self, names: Sequence[str], *, tokens: bool = False) -> None:
        """Raise ``ValueError`` for names that this encoder does not have; ``tokens`` allows ``patch_tokens``, too."""
        known = (*self.feature_names, PATCH_TOKENS) if tokens else self.feature_names
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise ValueError(
                f"{self.name} ({type(self.module).__name__}) has no features {unknown}: choose among "
                f"{', '.join(known)}."
            )

    @property
    def version(self) -> tuple[int, ...]:
        """A value that changes when weights or buffers are written to: what was cached before is then stale."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)

    def digest(self) -> str:
        """Compute 16 hexadecimal digits of SHA-256 over weights, buffers, and the image settings."""
        version = self.version
        if self._digest is not None and self._digest[0] == version:
            return self._digest[1]
        sha = hashlib.sha256(json.dumps([self.image_size, self.image_mean, self.image_std]).encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            data = tensor.detach().cpu().contiguous()
            sha.update(f"{name}{data.dtype}{tuple(data.shape)}".encode())
            sha.update(data.view(-1).view(torch.uint8).numpy().data)
        self._digest = version, sha.hexdigest()[:16]
        return self._digest[1]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Set eval mode, no gradients, MAE unmasked; restore every module's own mode afterwards."""
        modes = [(module, module.training) for module in self.module.modules()]
        config: Any = getattr(self.module, "config", None)
        mask_ratio = getattr(config, "mask_ratio", None)
        self.module.eval()
        if mask_ratio is not None:
            config.mask_ratio = 0.0
        try:
            with torch.no_grad():
                yield
        finally:
            if mask_ratio is not None:
                config.mask_ratio = mask_ratio
            for module, training in modes:
                module.training = training

    def features(self, pixel_values: Tensor, names: Sequence[str] = ("cls", "patches")) -> dict[str, Tensor]:
        """Compute features of normalised images.

        Args:
            pixel_values: (B, C, H, W), normalised with this encoder's mean and std.
            names: Which features; the encoder runs once for all of them.

        Returns:
            name -> (B, .) float32, on the encoder's device; ``patch_tokens`` (B, N, D).

        Raises:
            ValueError: for features that the encoder does not have.
            NonFiniteFeaturesError: when features are not finite.
        """
        chosen = self.unchecked_features(pixel_values, names)
        self.check_finite(extremes(chosen))
        return chosen

    def unchecked_features(self, pixel_values: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Compute ``features`` without waiting for the device: they may not be finite. Raises ``ValueError`` only."""
        self.check_features(names, tokens=True)
        dtype = _AUTOCAST[self.precision]
        with self.frozen(), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            of_blocks = any(name in BLOCK_FEATURES for name in names)
            output = self._forward(pixel_values, states=of_blocks)
            cls, patches, tokens = self._read(output, pixel_values)
            made = {"cls": cls, "patches": patches}
            if of_blocks:
                made["cls_4"] = read_last_blocks(self.module, output, self._num_patches(pixel_values) or 0, self.name)
                made["cls_4_patches"] = torch.cat([made["cls_4"], patches], 1)
            if "backbone" in names:
                made["backbone"] = torch.cat([made[part] for part in self.backbone_parts], 1)
            if PATCH_TOKENS in names:
                if tokens is None:
                    raise ValueError(f"{self.name} gives one vector per image: it has no {PATCH_TOKENS}.")
                made[PATCH_TOKENS] = tokens
            for part in ("invariant", "equivariant"):
                if any(name == "stem" or name.startswith(part) for name in names):
                    # The stem is linear: the stem of the mean patch is the mean of the patches' stems.
                    rows = self.module.stem(torch.stack([cls, patches], 1), part=part)  # type: ignore[operator]
                    made[part] = rows.flatten(1)
                    made[f"{part}_cls"], made[f"{part}_patches"] = rows.unbind(1)
            if "stem" in names:
                made["stem"] = torch.cat([made["invariant"], made["equivariant"]], 1)
        return {name: made[name].float() for name in names}

    def check_finite(self, extremes: Tensor) -> None:
        """Raise ``NonFiniteFeaturesError`` for features whose ``extremes`` are not finite."""
        if bool(torch.isfinite(extremes).all()):
            return
        reason = "its training has diverged."
        if self.precision == "fp16":
            reason = "fp16 holds no number above 65504. Give the precision (--precision) bf16 or fp32."
        raise NonFiniteFeaturesError(f"{self.name} gives features that are not finite: {reason}")

    def maps(self, pixel_values: Tensor, layers: Sequence[int] = (-1,)) -> list[Tensor]:
        """Compute feature maps of normalised images, in one pass.

        Of a transformer these are the patch tokens in their grid: of the last layer after the final norm, as in
        ``patch_tokens``, of earlier ones as the block leaves them. Other encoders give maps of several sizes.

        Args:
            pixel_values: (B, C, H, W), normalised with this encoder's mean and std.
            layers: Numbers of layers: 0 is the input of the first block, 1 its output, -1 the output of the last.

        Returns:
            One (B, D, rows, columns) float32 per layer, on the encoder's device.

        Raises:
            ValueError: the encoder gives one vector per image, or has no such layer.
            NonFiniteFeaturesError: when features are not finite.
        """
        dtype = _AUTOCAST[self.precision]
        with self.frozen(), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            states = self._hidden_states(pixel_values, all_of_them=set(layers) != {-1})
            if any(not -len(states) <= layer < len(states) for layer in layers):
                raise ValueError(
                    f"{self.name} gives {len(states)} hidden states, and layers {list(layers)} were asked for."
                )
            patch = self.patch_size
            found = [as_map(states[layer], pixel_values.shape[-2:], patch, self.name).float() for layer in layers]
        self.check_finite(extremes({str(position): value for position, value in enumerate(found)}))
        return found

    def check_maps(self) -> None:
        """Raise ``ValueError`` where the encoder has no maps; found out by one pass over one black image."""
        self.maps(self._black_image())

    def count_layers(self) -> int:
        """Count the layers that ``maps`` can give, the input of the first block among them, by a pass."""
        with self.frozen():
            return len(self._hidden_states(self._black_image(), all_of_them=True))

    def _black_image(self) -> Tensor:
        return torch.zeros(1, len(self.image_mean), self.image_size, self.image_size)

    def _hidden_states(self, pixel_values: Tensor, *, all_of_them: bool) -> tuple[Any, ...]:
        """Run once; return the states after each layer, the last one after the final norm, or that one alone."""
        return read_states(self._forward(pixel_values, states=all_of_them))

    def _forward(self, pixel_values: Tensor, *, states: bool) -> Any:
        """Run the module: unmasked, positions interpolated where the size asks for it, without the stem.

        With ``states`` it is asked for its hidden states, if it can be.
        """
        options: dict[str, Any] = {"output_hidden_states": True} if states and self._gives_states else {}
        rows, columns = pixel_values.shape[-2:]
        if "interpolate_pos_encoding" in self._inputs and {square_side(self._setting("image_size"))} != {rows, columns}:
            options["interpolate_pos_encoding"] = True
        num_patches = self._num_patches(pixel_values)
        if "noise" in self._inputs and num_patches is not None:  # ViT-MAE sorts patches by it
            options["noise"] = (
                torch.arange(num_patches, device=pixel_values.device).float().expand(len(pixel_values), -1)
            )
        if "output_features" in self._inputs:
            options["output_features"] = False  # the stem of every token is not needed
        weight = next(self.module.parameters(), pixel_values)
        return self.module(pixel_values.to(weight.device, weight.dtype), **options)

    def _num_patches(self, pixel_values: Tensor) -> int | None:
        """Count the patches of such an image; ``None`` for an encoder without a patch size."""
        patch = self.patch_size
        rows, columns = pixel_values.shape[-2:]
        return (rows // patch) * (columns // patch) if patch else None

    def _read(self, output: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return CLS (B, D), mean patch (B, D), and the patches (B, N, D) where there are any."""
        tokens = last_state(output)
        if tokens.ndim == 2:
            return tokens, tokens, None
        if tokens.ndim == 4:
            mean = tokens.mean((2, 3))
            return mean, mean, tokens.flatten(2).transpose(1, 2)
        num_patches = self._num_patches(pixel_values)
        prefix = getattr(self.module, "num_prefix_tokens", None)
        if prefix is None:
            prefix = tokens.shape[1] - num_patches if num_patches else 1
        if not 0 <= prefix < tokens.shape[1]:
            raise ValueError(f"{self.name}: {tokens.shape[1]} tokens for {num_patches} patches; cannot tell CLS apart.")
        mean = tokens[:, prefix:].mean(1)
        if prefix == 0:
            logger.info("%s has no CLS token: its mean patch token stands in.", self.name)
        return (tokens[:, 0] if prefix else mean), mean, tokens[:, prefix:]

    def encode(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Compute features of images as they are: (B, C, H, W), uint8 or floats in [0, 1], on any device, any B.

        Returns:
            name -> (B, .) float32 on the CPU; ``patch_tokens`` (B, N, D).

        Raises:
            ValueError: for features that the encoder does not have.
            NonFiniteFeaturesError: when features are not finite.
        """
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for chunk in images.split(self.batch_size):
            for name, value in self.features(self.normalise(chunk), names).items():
                # Always a copy: one row of tokens, as a view, would keep all of them.
                parts[name].append(value.to("cpu", copy=True, memory_format=torch.contiguous_format))
        return {name: values[0] if len(values) == 1 else torch.cat(values) for name, values in parts.items()}

    def normalise(self, images: Tensor) -> Tensor:
        """Turn images as for ``encode`` into what ``features`` reads, on the encoder's device; do not wait for it."""
        device, constants = self.device, (torch.tensor(self.image_mean), torch.tensor(self.image_std))
        pixels, mean, std = (value.to(device, non_blocking=device.type == "cuda") for value in (images, *constants))
        pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        return (pixels - mean[:, None, None]) / std[:, None, None]


def extremes(features: dict[str, Tensor]) -> Tensor:
    """Find the least and the greatest number of each feature, (F, 2); NaN where there is one."""
    ends = [torch.stack(value.aminmax()) if value.numel() else value.new_zeros(2) for value in features.values()]
    return torch.stack(ends)


def as_frozen(encoder: FrozenEncoder | nn.Module | str | Path) -> FrozenEncoder:
    """Wrap an encoder with the default settings, unless it is frozen already."""
    return encoder if isinstance(encoder, FrozenEncoder) else FrozenEncoder(encoder)


def _sides(size: Any) -> tuple[Any, ...]:
    return tuple(size) if isinstance(size, (list, tuple)) else (size,)
