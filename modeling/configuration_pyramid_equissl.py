"""Configuration of a feature pyramid on a plain ViT: which backbone, which scales."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

__all__ = ["FeaturePyramidConfig"]

# Scale of a level relative to the backbone's own maps -> how many times it is doubled.
DOUBLINGS = {4.0: 2, 2.0: 1, 1.0: 0, 0.5: -1}
NORMS = ("layer", "batch")


@strict
class FeaturePyramidConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a [`FeaturePyramidBackbone`].

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, defaults to an EquiSSL ViT-S/16):
            Configuration of any backbone that `AutoBackbone` knows and whose maps have one size. It names as many
            stages as there are levels, lowest first, or one, from which all levels are made as in ViTDet.
        scales (`list[float]`, defaults to `[4, 2, 1, 0.5]`):
            Size of each level relative to the backbone's maps: with patches of 16 pixels, strides 4, 8, 16 and 32.
        norm (`str`, defaults to `"layer"`):
            What stands between the two transposed convolutions of scale 4: `"layer"`, over the channels, as in ViTDet;
            `"batch"` as in BEiT and iBOT, which the DETRs of transformers would freeze at its first values.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the convolutions' weights.
        out_indices, out_features: Levels that are returned, from 0 (`"level0"`); all of them by default.

    Raises:
        ValueError: For other scales or norms, or another number of stages.
    """

    model_type = "equissl_feature_pyramid"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(
            config_class=AutoConfig, model_type="equissl", init_kwargs={"out_indices": [4, 6, 8, 12]}
        ),
    }

    backbone_config: dict | PreTrainedConfig | None = None
    scales: list[float | int] | tuple[float | int, ...] = (4, 2, 1, 0.5)
    norm: str = "layer"
    initializer_range: float = 0.02
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check, and set up the levels."""
        self.scales = list(self.scales)
        if not self.scales or any(float(scale) not in DOUBLINGS for scale in self.scales):
            raise ValueError(f"scales={self.scales}: expected some of {', '.join(f'{s:g}' for s in DOUBLINGS)}.")
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r}: expected one of {', '.join(NORMS)}.")
        kwargs.pop("stage_names", None)  # derived: a stored value would outlive changed scales
        self.stage_names = [f"level{index}" for index in range(len(self.scales))]
        features, indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if features is None and indices is None:
            indices = list(range(len(self.scales)))
        self.set_output_features_output_indices(out_indices=indices, out_features=features)
        super().__post_init__(**kwargs)
        backbone: Any = self.backbone_config
        if (stages := len(backbone.out_indices)) not in (1, len(self.scales)):
            raise ValueError(
                f"The backbone has {stages} stages and the pyramid {len(self.scales)} levels: name as many stages as "
                "levels, or one."
            )

    @property
    def hidden_size(self) -> int:
        """Channels of every level."""
        backbone: Any = self.backbone_config
        return backbone.hidden_size
