"""EquiSSL encoder: a ViT in the current transformers way, with a stem whose output is split, and a decoder."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_equissl import EquiSSLConfig
from .decoders_equissl import build_decoder
from .layers_equissl import EquiSSLAttention, EquiSSLLayer, EquiSSLLayerScale, EquiSSLStem

__all__ = ["EquiSSLModel", "EquiSSLModelOutput", "EquiSSLPreTrainedModel"]


@dataclass
class EquiSSLModelOutput(ModelOutput):
    """What an [`EquiSSLModel`] returns, for B images of N patches with R registers.

    Attributes:
        last_hidden_state: (B, 1 + R + N, D), after the final LayerNorm: CLS, registers, patches in row-major order.
        pooler_output: (B, D), the CLS row.
        invariant_features: (B, 1 + N, d_inv), CLS first, no registers; `None` without a stem.
        equivariant_features: (B, 1 + N, d_equi), likewise.
        hidden_states: Input of block 1 and output of every block, before the final LayerNorm. With
            `cls_insertion_layer` = L > 0 the first L + 1 hold patches only.
        attentions: (B, H, T, T) per block, with `attn_implementation="eager"`.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    invariant_features: Tensor | None = None
    equivariant_features: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class EquiSSLPatchEmbeddings(nn.Module):
    """Image -> one embedding per patch."""

    def __init__(self, config: EquiSSLConfig) -> None:
        super().__init__()
        self.patch_size, self.num_channels = config.patch_size, config.num_channels
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        self._check(pixel_values)
        return self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)

    def _check(self, pixel_values: Tensor) -> None:
        if not isinstance(pixel_values, Tensor) or pixel_values.ndim != 4:
            came = tuple(pixel_values.shape) if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
            raise ValueError(f"pixel_values: expected a tensor (B, C, H, W), got {came}. Add the batch dimension.")
        _, channels, height, width = pixel_values.shape
        if channels != self.num_channels:
            raise ValueError(
                f"pixel_values has {channels} channels, expected num_channels={self.num_channels} in (B, C, H, W); "
                f"got {tuple(pixel_values.shape)}."
            )
        if min(height, width) < self.patch_size or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"pixel_values is {height} x {width} pixels, expected multiples of patch_size={self.patch_size}. "
                "Resize or crop the images."
            )


class EquiSSLEmbeddings(nn.Module):
    """Patch embeddings with positions, CLS, registers, and mask token."""

    def __init__(self, config: EquiSSLConfig) -> None:
        super().__init__()
        rows, columns = config.grid_size
        self.grid_size = (rows, columns)
        self.is_cls_late = config.cls_insertion_layer > 0
        # The released DINOv2 models resize positions with antialiasing if and only if they have registers.
        self.antialias = config.num_register_tokens > 0
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(1, config.hidden_size)) if config.use_mask_token else None
        has_registers = config.num_register_tokens > 0
        registers = torch.zeros(1, config.num_register_tokens, config.hidden_size)
        self.register_tokens = nn.Parameter(registers) if has_registers else None
        self.patch_embeddings = EquiSSLPatchEmbeddings(config)
        num_positions = rows * columns + (0 if self.is_cls_late else 1)
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, config.hidden_size))

    def interpolate_patch_positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings (1, N, D) for a grid of patches, bicubic in fp32 unless it is the stored one."""
        positions = self.position_embeddings if self.is_cls_late else self.position_embeddings[:, 1:]
        if grid == self.grid_size and not torch.jit.is_tracing():
            return positions
        positions = positions.unflatten(1, self.grid_size).permute(0, 3, 1, 2)
        # Half precision would shift the embeddings.
        resized = nn.functional.interpolate(
            positions.float(), size=grid, mode="bicubic", align_corners=False, antialias=self.antialias
        )
        return resized.to(positions.dtype).flatten(2).transpose(1, 2)

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, C, H, W) -> tokens (B, 1 + R + N, D) and `None`; for a late CLS (B, N, D) and the prefix (B, 1 + R, D).

        Masked patches take the mask token before positions are added.
        """
        patches = self.patch_embeddings(pixel_values)
        cls_token: Tensor = self.cls_token
        if bool_masked_pos is not None:
            patches = self._mask(patches, bool_masked_pos)
        elif self.mask_token is not None and self.training:
            # A trainable parameter without gradient breaks resuming under FSDP2 and needs DDP's slow search for unused
            # ones. On the one CLS row the zero term is free; a `where` over all patches would not be.
            cls_token = cls_token + 0.0 * self.mask_token
        rows, columns = (side // self.patch_embeddings.patch_size for side in pixel_values.shape[2:])
        patches = patches + self.interpolate_patch_positions((rows, columns))
        if not self.is_cls_late:
            cls_token = cls_token + self.position_embeddings[:, :1]
        prefix = cls_token if self.register_tokens is None else torch.cat((cls_token, self.register_tokens), dim=1)
        prefix = prefix.expand(len(patches), -1, -1)
        if self.is_cls_late:
            # Copied: it is used after this module has returned, when FSDP may have freed the parameters.
            return patches, prefix.to(patches.dtype).clone()
        return torch.cat((prefix, patches), dim=1), None

    def _mask(self, patches: Tensor, bool_masked_pos: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError("bool_masked_pos was given, but this encoder has no mask token: set use_mask_token=True.")
        if bool_masked_pos.dtype != torch.bool or bool_masked_pos.shape != patches.shape[:2]:
            raise ValueError(
                f"bool_masked_pos: expected a torch.bool tensor (B, N) = {tuple(patches.shape[:2])}, one entry per "
                f"patch in row-major order, got {bool_masked_pos.dtype} {tuple(bool_masked_pos.shape)}."
            )
        return torch.where(bool_masked_pos[..., None], self.mask_token.to(patches.dtype), patches)


class EquiSSLPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation, common to all EquiSSL models."""

    config: EquiSSLConfig
    base_model_prefix = "equissl"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["EquiSSLEmbeddings", "EquiSSLLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": EquiSSLLayer, "attentions": EquiSSLAttention}
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normal (std `initializer_range`) as ViT, iBOT and DINOv2; zero biases and mask token."""
        super()._init_weights(module)  # norms
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, EquiSSLEmbeddings):
            init.trunc_normal_(module.position_embeddings, std=std)
            init.trunc_normal_(module.cls_token, std=std)
            if module.mask_token is not None:
                init.zeros_(module.mask_token)
            if module.register_tokens is not None:
                # From zero, as in transformers, registers would all receive one gradient and stay equal.
                init.trunc_normal_(module.register_tokens, std=std)
        elif isinstance(module, EquiSSLLayerScale):
            init.constant_(module.lambda1, module.initial_value)


class EquiSSLEncoder(EquiSSLPreTrainedModel):
    """The blocks."""

    def __init__(self, config: EquiSSLConfig) -> None:
        super().__init__(config)
        self.layer = nn.ModuleList(EquiSSLLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        hidden_states: Tensor,
        prefix_tokens: Tensor | None = None,
        num_queries: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """(B, T, D) -> (B, T, D); `prefix_tokens` (B, P, D) go in front after block `cls_insertion_layer`.

        With `num_queries` = Q the last block gives the first Q tokens only, (B, Q, D).
        """
        last = len(self.layer) - 1
        for index, layer in enumerate(self.layer):
            if prefix_tokens is not None and index == self.config.cls_insertion_layer:
                hidden_states = torch.cat((prefix_tokens.to(hidden_states.dtype), hidden_states), dim=1)
            hidden_states = layer(hidden_states, num_queries if index == last else None, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class EquiSSLModel(EquiSSLPreTrainedModel):
    """A ViT encoder with an optional stem (invariant and equivariant features) and an optional decoder.

    Structure and parameter names follow transformers' `Dinov2Model`; with equal weights the outputs are equal.

    Args:
        config: The architecture.

    Attributes:
        stem: [`EquiSSLStem`] or `None`.
        decoder: Decoder of two views' equivariant features, or `None`.

    Raises:
        ValueError: If `config` makes no network.
    """

    def __init__(self, config: EquiSSLConfig) -> None:
        config.check()  # fields may have been assigned since construction, e.g. by from_pretrained(..., patch_size=8)
        super().__init__(config)
        self.embeddings = EquiSSLEmbeddings(config)
        self.encoder = EquiSSLEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.stem = None
        if config.feature_size is not None and config.equivariant_size is not None:
            self.stem = EquiSSLStem(config.hidden_size, config.feature_size, config.equivariant_size)
        self.decoder = None if config.decoder_type is None else build_decoder(config)
        self.post_init()

    @property
    def num_prefix_tokens(self) -> int:
        """Rows before the patches in `last_hidden_state`: CLS and registers."""
        return 1 + self.config.num_register_tokens

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        output_features: bool = True,
        output_patches: bool = True,
        **kwargs: Any,
    ) -> EquiSSLModelOutput:
        """Encode images.

        Args:
            pixel_values: (B, C, H, W), normalised as the encoder's image processor does; H and W are multiples of the
                patch size, positions are interpolated.
            bool_masked_pos: (B, N), `torch.bool`; `True` replaces a patch by the mask token.
            output_features: Compute `invariant_features` and `equivariant_features` of all tokens. They are large (d up
                to 8192); `model.stem(tokens, part=...)` gives a part for chosen tokens.
            output_patches: `False` gives CLS and registers alone (N = 0) and spares most of the last block.
            **kwargs: `output_hidden_states` (bool, or indices of those to keep), `output_attentions`, `return_dict`,
                and arguments of the attention kernel.

        Raises:
            ValueError: If an input has the wrong shape or dtype.
        """
        tokens, prefix = self.embeddings(pixel_values, bool_masked_pos=bool_masked_pos)
        encoded = self.encoder(tokens, prefix, None if output_patches else self.num_prefix_tokens, **kwargs)
        last_hidden_state = self.layernorm(encoded.last_hidden_state)
        invariant, equivariant = self._features(last_hidden_state) if output_features else (None, None)
        return EquiSSLModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=last_hidden_state[:, 0],
            invariant_features=invariant,
            equivariant_features=equivariant,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _features(self, tokens: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(B, 1 + R + N, D) -> (B, 1 + N, d_inv), (B, 1 + N, d_equi), or nothing without a stem."""
        if self.stem is None:
            return None, None
        if self.num_prefix_tokens > 1:
            tokens = torch.cat((tokens[:, :1], tokens[:, self.num_prefix_tokens :]), dim=1)
        features = self.stem(tokens)
        return features[..., : self.stem.invariant_size], features[..., self.stem.invariant_size :]

    def reconstruct(self, pixel_values_1: Tensor, pixel_values_2: Tensor) -> Tensor:
        """Images that the decoder reads off the equivariant features of two views.

        Args:
            pixel_values_1: (B, C, H, W), first view, normalised.
            pixel_values_2: (B, C, H, W), second, transformed view.

        Returns:
            (B, K, C, H, W), normalised: the K images on the way to the second view (and it, if it has a decoder), or
            the second view alone (K = 1) with the cross-attention decoder.

        Raises:
            ValueError: Without a decoder, or if the views differ in shape.
        """
        if self.decoder is None or self.stem is None:
            raise ValueError(
                "This encoder has no decoder (config.decoder_type is None): load a checkpoint that was published with "
                "one, without overriding decoder_type."
            )
        if pixel_values_1.shape != pixel_values_2.shape:
            raise ValueError(
                f"The views have shapes {tuple(pixel_values_1.shape)} and {tuple(pixel_values_2.shape)}, expected one "
                "shape (B, C, H, W) for both."
            )
        views = torch.cat((pixel_values_1, pixel_values_2))
        tokens = self(views, output_features=False, return_dict=True).last_hidden_state
        features = self.stem(tokens[:, self.num_prefix_tokens :], part="equivariant")
        height, width = views.shape[-2:]
        return self.decoder(*features.chunk(2), (height // self.config.patch_size, width // self.config.patch_size))


EquiSSLModel.register_for_auto_class("AutoModel")
