"""A feature pyramid on a plain ViT, as a backbone of its own: maps that halve from level to level."""

from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from transformers import AutoBackbone
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import PreTrainedModel

from .configuration_pyramid_equissl import DOUBLINGS, FeaturePyramidConfig

__all__ = ["FeaturePyramidBackbone"]


class FeaturePyramidLayerNorm(nn.LayerNorm):
    """Normalise each position over its channels: (B, C, H, W)."""

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise over dimension 1."""
        return super().forward(maps.movedim(1, -1)).movedim(-1, 1)


class FeaturePyramidBackbone(BackboneMixin, PreTrainedModel):
    """Levels of several strides from a plain ViT, for heads that want maps which halve: RT-DETR, D-FINE, Mask2Former.

    As in BEiT and iBOT (https://github.com/bytedance/ibot, `evaluation/semantic_segmentation/mmcv_custom`) the levels
    come from chosen blocks: scale 4 by two transposed convolutions with a norm and GELU between, scale 2 by one, scale
    1 as it is, scale 0.5 by max-pooling. With one stage all levels come from the same map, as in ViTDet
    (https://arxiv.org/abs/2203.16527). Any backbone of `AutoBackbone` with maps of one size serves:

    ```python
    vit = EquiSSLBackbone.from_pretrained("user/encoder", out_indices=[4, 6, 8, 12])
    pyramid = FeaturePyramidConfig(backbone_config=vit.config, out_indices=[1, 2, 3])
    model = RTDetrForObjectDetection(RTDetrConfig(backbone_config=pyramid, encoder_in_channels=[384] * 3))
    model.model.backbone.model.backbone.load_state_dict(vit.state_dict())
    ```

    `model.save_pretrained` then holds all of it, and `from_pretrained` rebuilds it (after `import hf_equissl`).

    Args:
        config: Backbone, scales and the levels that are returned; no parameters are made for others.
    """

    config: FeaturePyramidConfig
    base_model_prefix = "pyramid"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    has_attentions = False

    def __init__(self, config: FeaturePyramidConfig) -> None:
        super().__init__(config)
        self.backbone: Any = AutoBackbone.from_config(config.backbone_config)
        channels = self.backbone.channels
        if len(channels) == 1:
            channels = channels * len(config.scales)
        self.num_features = list(channels)
        chosen = zip(self.stage_names, channels, config.scales, strict=True)
        self.levels = nn.ModuleDict(
            {name: _rescale(width, float(scale), config.norm) for name, width, scale in chosen if name in self._wanted}
        )
        # The backbone inside records its hidden states already; recorded twice they would be twice as many.
        self._output_capturing_hooks_installed = True
        self.post_init()

    @property
    def _wanted(self) -> list[str]:
        return list(self.out_features)

    def forward(  # type: ignore[override]
        self, pixel_values: Tensor, return_dict: bool | None = None, **kwargs: Any
    ) -> Any:
        """Compute the levels of images.

        Args:
            pixel_values: (B, C, H, W) with sides that the backbone takes.
            return_dict: `False`: a tuple.
            **kwargs: `output_hidden_states` and `output_attentions`, those of the backbone.

        Returns:
            `feature_maps`, one per level of `out_features`: (B, D, H / patch x scale, W / patch x scale).

        Raises:
            ValueError: If a map is too small to be halved, or the backbone's maps differ in size.
        """
        given = {name: value for name, value in kwargs.items() if value is not None}
        output = self.backbone(pixel_values, return_dict=True, **given)
        maps = output.feature_maps
        sizes = [tuple(one.shape[2:]) for one in maps]
        if any(one != other for one, other in pairwise(sizes)):
            raise ValueError(f"The backbone's maps differ in size ({sizes}): it has a pyramid already.")
        if min(sizes[0]) < 2 and any(isinstance(level, nn.MaxPool2d) for level in self.levels.values()):
            raise ValueError(f"Maps of {sizes[0]} patches cannot be halved: give larger images.")
        if len(maps) == 1:
            maps = maps * len(self.stage_names)
        by_level = dict(zip(self.stage_names, maps, strict=True))
        levels = tuple(self.levels[name](by_level[name]) for name in self._wanted)
        found = BackboneOutput(feature_maps=levels, hidden_states=output.hidden_states, attentions=output.attentions)
        return found if return_dict in (None, True) else found.to_tuple()


def _rescale(width: int, scale: float, norm: str) -> nn.Module:
    """Make what brings maps of `width` channels to `scale` times their size."""
    doublings = DOUBLINGS[scale]
    if doublings == 0:
        return nn.Identity()
    if doublings < 0:
        return nn.MaxPool2d(2)
    doubling = [nn.ConvTranspose2d(width, width, kernel_size=2, stride=2) for _ in range(doublings)]
    if doublings == 1:
        return doubling[0]
    between = FeaturePyramidLayerNorm(width, eps=1e-6) if norm == "layer" else nn.BatchNorm2d(width)
    return nn.Sequential(doubling[0], between, nn.GELU(), doubling[1])
