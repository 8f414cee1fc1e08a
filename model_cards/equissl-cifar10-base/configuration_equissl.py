"""Configuration of the EquiSSL encoder: what the network is, nothing of how it is trained."""

import copy
import difflib
import os
from pathlib import Path
from typing import Any, Self

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

__all__ = ["EquiSSLConfig"]

# What a saved configuration says of itself. It rises when files of a new form would be misread by older code.
FORMAT_VERSION = 1
# Which class in which file beside the weights serves which Auto class.
AUTO_MAP = {
    "AutoConfig": "configuration_equissl.EquiSSLConfig",
    "AutoModel": "modeling_equissl.EquiSSLModel",
    "AutoModelForImageClassification": "modeling_equissl.EquiSSLForImageClassification",
    "AutoBackbone": "modeling_equissl.EquiSSLBackbone",
}
DECODER_TYPES = ("conv", "cross_attention")
POOLINGS = ("cls", "patches", "cls_patches", "invariant", "equivariant")
DROP_PATH_MODES = ("linear", "uniform")
# hidden_size, num_hidden_layers, num_attention_heads
PRESET_SIZES = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_giant": (1536, 40, 24),
}
# What is more is a mistake, or a file that shall stop whoever loads it: building it would take hours, or all memory.
LARGEST = {
    "hidden_size": 2**16,
    "num_hidden_layers": 10_000,
    "mlp_ratio": 1024,
    "image_size": 2**14,
    "num_channels": 2**12,
    "num_register_tokens": 2**12,
    "feature_size": 2**20,
    "num_intermediate_images": 2**10,
    "decoder_hidden_size": 2**16,
    "decoder_num_layers": 2**10,
    "initializer_range": 1e4,
    "layer_norm_eps": 1e4,
    "layerscale_value": 1e4,
}
PRESET_PATCHES = (4, 8, 14, 16)


@strict
class EquiSSLConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of an [`EquiSSLModel`]: a pre-norm ViT, an optional linear stem whose output is split into an
    invariant and an equivariant part, and an optional decoder. Defaults give ViT-S/16 at 224 px without stem.

    Args:
        hidden_size (`int`, defaults to 384): Width D of the tokens.
        num_hidden_layers (`int`, defaults to 12): Number of blocks.
        num_attention_heads (`int`, defaults to 6): Heads per block; divides `hidden_size`.
        mlp_ratio (`int` or `float`, defaults to 4): Hidden width of the MLP over `hidden_size`.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLP.
        attention_probs_dropout_prob (`float`, defaults to 0.0): Dropout of attention weights.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the truncated normal initialisation.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of every LayerNorm.
        image_size (`int` or `(height, width)`, defaults to 224): Size in pixels at which position embeddings are
            stored; other multiples of `patch_size` interpolate them.
        patch_size (`int`, defaults to 16): Side of a patch in pixels; or a pair of equal sides, as VitPose reads it.
        num_channels (`int`, defaults to 3): Channels C of an image.
        qkv_bias (`bool`, defaults to `True`): Bias of the query, key and value projections.
        layerscale_value (`float`, *optional*): Initial LayerScale (DINOv2: 1e-5); `None` has none (iBOT, DINO).
        drop_path_rate (`float`, defaults to 0.0): Stochastic depth, in [0, 1).
        drop_path_mode (`str`, defaults to `"linear"`): `"linear"` ramps from 0 to the rate over depth, each sample on
            its own (iBOT); `"uniform"` drops exactly that share of the samples in every block, and does not compute
            what it drops (DINOv2).
        num_register_tokens (`int`, defaults to 0): Register tokens R (https://arxiv.org/abs/2309.16588). With
            registers, positions are interpolated with antialiasing, as in the released DINOv2 models.
        use_mask_token (`bool`, defaults to `True`): A learned token for masked patches.
        cls_insertion_layer (`int`, defaults to 0): 0 puts CLS (and registers) at the input; L > 0 appends them
            after block L without a position embedding, so that blocks 1..L see patches only (SER uses 3).
        feature_size (`int`, *optional*): Output size d of the linear stem; `None` has no stem.
        equivariant_size (`int`, *optional*): d_equi, the last dimensions of the stem's output; the first
            d - d_equi are invariant. Set together with `feature_size`, and smaller.
        decoder_type (`str`, *optional*): `"conv"`, `"cross_attention"` or `None` (no decoder).
        num_intermediate_images (`int`, defaults to 2): K, images reconstructed by the convolutional decoders.
        decoder_reconstructs_final (`bool`, defaults to `False`): One more decoder, for the transformed view itself.
        decoder_widths (`list[int]`, defaults to `[64, 32, 16, 16]`): Channels of the convolutional decoders before
            each convolution: as many convolutions as entries, at least log2(`patch_size`).
        decoder_hidden_size (`int`, defaults to 256): Width of the cross-attention decoder.
        decoder_num_layers (`int`, defaults to 4): Its self-attention blocks after the cross-attention block.
        decoder_num_heads (`int`, defaults to 8): Its attention heads.
        pooling (`str`, defaults to `"cls_patches"`): What [`EquiSSLForImageClassification`] classifies: `"cls"`,
            `"patches"` (their mean), `"cls_patches"` (both, 2 D), or `"invariant"` or `"equivariant"` (that slice of
            the stem's output for both, 2 d_inv or 2 d_equi).
        apply_layernorm (`bool`, defaults to `True`): Whether an [`EquiSSLBackbone`] norms its feature maps.
        reshape_hidden_states (`bool`, defaults to `True`): Its feature maps are (B, D, rows, columns); `False` gives
            (B, N, D), the patches in row-major order, as VitPose reads them.
        equissl_version (`int`, defaults to 1): Form of the file; absent in a file, 1.

    Raises:
        ValueError: For values or combinations that make no network, at construction; for a configuration that a newer
            version of this code has written.
    """

    model_type = "equissl"

    equissl_version: int = FORMAT_VERSION
    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    mlp_ratio: int | float = 4
    hidden_act: str = "gelu"
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    layerscale_value: float | int | None = None
    drop_path_rate: float | int = 0.0
    drop_path_mode: str = "linear"
    num_register_tokens: int = 0
    use_mask_token: bool = True
    cls_insertion_layer: int = 0
    feature_size: int | None = None
    equivariant_size: int | None = None
    decoder_type: str | None = None
    num_intermediate_images: int = 2
    decoder_reconstructs_final: bool = False
    decoder_widths: list[int] | tuple[int, ...] | None = None
    decoder_hidden_size: int = 256
    decoder_num_layers: int = 4
    decoder_num_heads: int = 8
    pooling: str = "cls_patches"
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill what follows from other fields, check, and set up the stages of a backbone."""
        # Two decoders of these widths add 3.6 % (fp32) or 4.2 % (bf16) to a ViT-S/16 step: one CPU core, 224 px.
        self.decoder_widths = [64, 32, 16, 16] if self.decoder_widths is None else list(self.decoder_widths)
        # `@strict` runs validate_* too, but wraps what they raise; called here, users get the ValueError itself.
        self.check()
        kwargs.pop("stage_names", None)  # derived: a stored value would outlive a changed num_hidden_layers
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """Make a standard architecture by name, e.g. `"vit_small_patch16"`.

        Sizes `vit_tiny` (192/12/3), `vit_small` (384/12/6), `vit_base` (768/12/12), `vit_large` (1024/24/16) and
        `vit_giant` (1536/40/24: width/blocks/heads), each with patch 4, 8, 14 or 16. All have an MLP of ratio 4 with
        GELU; DINOv2's own giant has a SwiGLU feed-forward instead, so its weights do not fit `vit_giant`.

        Args:
            name: The preset.
            **overrides: Any other field of the configuration.

        Raises:
            ValueError: For an unknown name; the message holds the nearest one.
        """
        presets = {
            f"{size}_patch{patch}": (*dimensions, patch)
            for size, dimensions in PRESET_SIZES.items()
            for patch in PRESET_PATCHES
        }
        if name not in presets:
            nearest = difflib.get_close_matches(name, presets, n=1, cutoff=0.0)[0]
            raise ValueError(f"Unknown preset {name!r}. Did you mean {nearest!r}? Presets: {', '.join(presets)}.")
        fields = zip(
            ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size"), presets[name], strict=True
        )
        return cls(**{**dict(fields), **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read as transformers does, the version first: in a newer file other fields may mean other things."""
        check_version(config_dict.get("equissl_version", FORMAT_VERSION))
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as transformers does, with an `auto_map` of the classes whose code lies in the folder.

        Saving a model copies the code there before it saves the configuration, so one folder serves every Auto class;
        a configuration alone points at no file that is missing. A derived configuration keeps the entries of its own
        classes: ours would not accept it.
        """
        folder, saved = Path(save_directory), copy.copy(self)
        saved.auto_map = {
            auto_class: reference
            for entries in (AUTO_MAP if type(self) is EquiSSLConfig else {}, getattr(self, "auto_map", {}))
            for auto_class, reference in entries.items()
            if (folder / f"{reference.partition('.')[0]}.py").is_file()
        }
        super(EquiSSLConfig, saved).save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def encoder_only(self, keep_stem: bool = False) -> Self:
        """Copy without decoder and, unless asked for, without stem: for models that do not read their output."""
        config = copy.deepcopy(self)
        config.decoder_type = None
        if not keep_stem:
            config.feature_size = config.equivariant_size = None
        return config

    @property
    def patch_side(self) -> int:
        """Side of a patch in pixels, whichever way `patch_size` gives it."""
        return self.patch_size if isinstance(self.patch_size, int) else self.patch_size[0]

    @property
    def invariant_size(self) -> int | None:
        """d_inv = feature_size - equivariant_size, or `None` without a stem."""
        if self.feature_size is None or self.equivariant_size is None:
            return None
        return self.feature_size - self.equivariant_size

    @property
    def pooled_size(self) -> int:
        """Number of dimensions that `pooling` gives per image; 0 where it reads a stem that is not there."""
        part_sizes = {"invariant": self.invariant_size or 0, "equivariant": self.equivariant_size or 0}
        count = 2 if self.pooling in ("cls_patches", *part_sizes) else 1
        return count * part_sizes.get(self.pooling, self.hidden_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height // self.patch_side, width // self.patch_side

    @property
    def num_decoder_upsamplings(self) -> int:
        """Number of doublings of the patch grid in the convolutional decoders: log2 of the patch size, rounded up."""
        return (self.patch_side - 1).bit_length()

    @property
    def num_decoded_images(self) -> int:
        """Number of images that the decoder returns per pair of views; 0 without a decoder."""
        if self.decoder_type == "conv":
            return self.num_intermediate_images + int(self.decoder_reconstructs_final)
        return int(self.decoder_type == "cross_attention")

    def check(self) -> None:
        """Raise `ValueError` if the fields make no network; models call it again, as fields may be assigned later."""
        check_version(self.equissl_version)
        self.validate_patch_size()
        self.validate_positive()
        self.validate_encoder()
        self.validate_image_size()
        self.validate_stem()
        self.validate_decoder()
        self.validate_pooling()

    def validate_patch_size(self) -> None:
        """Check that there is one side, or two equal ones."""
        if not isinstance(self.patch_size, int) and (len(self.patch_size) != 2 or len(set(self.patch_size)) != 1):
            raise ValueError(f"patch_size={self.patch_size}: expected an int or two equal sides: patches are square.")

    def validate_positive(self) -> None:
        """Check that sizes, counts and rates lie in their ranges."""
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "patch_side", "num_channels")
        for name in (*names, "initializer_range", "layer_norm_eps"):
            if not getattr(self, name) > 0:  # this refuses NaN, too
                raise ValueError(f"{name.replace('side', 'size')}={getattr(self, name)}: expected a value above 0.")
        for name, most in LARGEST.items():
            value = getattr(self, name)
            if value is not None and not max(value if isinstance(value, list | tuple) else (value,)) <= most:
                raise ValueError(f"{name}={value}: expected at most {most}.")
        if self.num_register_tokens < 0:
            raise ValueError(f"num_register_tokens={self.num_register_tokens}: expected 0 (none) or more.")
        for name in ("drop_path_rate", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a probability in [0, 1).")

    def validate_encoder(self) -> None:
        """Check heads, the mode of drop path and the place of CLS."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}: "
                "change one of them (heads of 64 dimensions are usual)."
            )
        if self.drop_path_mode not in DROP_PATH_MODES:
            raise ValueError(f"drop_path_mode={self.drop_path_mode!r}: expected one of {', '.join(DROP_PATH_MODES)}.")
        if not 0 <= self.cls_insertion_layer < self.num_hidden_layers:
            raise ValueError(
                f"cls_insertion_layer={self.cls_insertion_layer}: expected 0 (CLS at the input) to "
                f"{self.num_hidden_layers - 1} (num_hidden_layers - 1), so that at least one block sees CLS."
            )

    def validate_image_size(self) -> None:
        """Check that images consist of whole patches."""
        sides = (self.image_size,) if isinstance(self.image_size, int) else tuple(self.image_size)
        if len(sides) not in (1, 2) or (len(sides) == 1 and not isinstance(self.image_size, int)):
            raise ValueError(f"image_size={self.image_size}: expected an int or (height, width).")
        if any(side <= 0 or side % self.patch_side for side in sides):
            raise ValueError(
                f"image_size={self.image_size} is not a positive multiple of patch_size={self.patch_side}: choose e.g. "
                f"image_size={max(1, round(sides[0] / self.patch_side)) * self.patch_side}."
            )

    def validate_stem(self) -> None:
        """Check that both sizes are given or none, and that neither part is empty."""
        if (self.feature_size is None) != (self.equivariant_size is None):
            raise ValueError(
                f"feature_size={self.feature_size} and equivariant_size={self.equivariant_size}: set both (a stem) or "
                "neither (no stem), e.g. feature_size=512, equivariant_size=256."
            )
        if (
            self.feature_size is not None
            and self.equivariant_size is not None
            and not 0 < self.equivariant_size < self.feature_size
        ):
            raise ValueError(
                f"equivariant_size={self.equivariant_size}: expected 1 to {self.feature_size - 1} (feature_size - 1), "
                "so that both the invariant and the equivariant part have dimensions."
            )

    def validate_pooling(self) -> None:
        """Check that the name is known. The classifier looks for the stem itself: other models do not pool."""
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling={self.pooling!r}: expected one of {', '.join(POOLINGS)}.")

    def validate_decoder(self) -> None:
        """Check what the chosen decoder needs; fields of the other kind are not looked at."""
        if self.decoder_type is None:
            return
        if self.decoder_type not in DECODER_TYPES:
            raise ValueError(f"decoder_type={self.decoder_type!r}: expected None or one of {', '.join(DECODER_TYPES)}.")
        if self.equivariant_size is None:
            raise ValueError(
                f"decoder_type={self.decoder_type!r} reads equivariant features, and there is no stem: set "
                "feature_size and equivariant_size, or decoder_type=None."
            )
        if self.decoder_type == "conv":
            self._check_conv_decoder()
        else:
            self._check_cross_attention_decoder()

    def _check_conv_decoder(self) -> None:
        widths = self.decoder_widths or []
        if self.num_intermediate_images < 1:
            raise ValueError(f"num_intermediate_images={self.num_intermediate_images}: expected 1 or more.")
        if any(width <= 0 for width in widths):
            raise ValueError(f"decoder_widths={widths}: expected channel counts above 0.")
        if len(widths) < max(1, self.num_decoder_upsamplings):
            raise ValueError(
                f"decoder_widths={widths} gives {len(widths)} convolutions, but patch_size={self.patch_side} needs "
                f"{self.num_decoder_upsamplings} doublings of the patch grid, one per convolution: add widths."
            )

    def _check_cross_attention_decoder(self) -> None:
        size, heads = self.decoder_hidden_size, self.decoder_num_heads
        if size <= 0 or heads <= 0 or size % heads:
            raise ValueError(
                f"decoder_hidden_size={size} is not divisible by decoder_num_heads={heads} (both above 0): change one."
            )
        if size % 4:
            raise ValueError(
                f"decoder_hidden_size={size}: expected a multiple of 4 for the sines and cosines of rows and columns."
            )
        if self.decoder_num_layers < 0:
            raise ValueError(f"decoder_num_layers={self.decoder_num_layers}: expected 0 or more.")


def check_version(version: Any) -> None:
    """Raise `ValueError` for the form of a file that this code does not know."""
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"This checkpoint was written by a newer hf_equissl (equissl_version={version!r}; this one reads up to "
            f"{FORMAT_VERSION}). Upgrade it (pip install --upgrade hf-equissl), or uninstall it and load the code "
            "beside the weights with trust_remote_code=True."
        )


EquiSSLConfig.register_for_auto_class()
