"""EquiSSL encoder (a ViT with a stem whose output is split, and a decoder), its image classifier and its backbone."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.utils.generic import ModelOutput, can_return_tuple

from .base_equissl import EquiSSLEncoder, EquiSSLPreTrainedModel, check_keywords
from .configuration_equissl import EquiSSLConfig
from .decoders_equissl import build_decoder
from .layers_equissl import EquiSSLEmbeddings, EquiSSLStem

__all__ = [
    "EquiSSLBackbone",
    "EquiSSLForImageClassification",
    "EquiSSLModel",
    "EquiSSLModelOutput",
]

# Parts of a published encoder that a model without them leaves in the file.
UNREAD_PARTS = r"^(equissl\.)?(stem|decoder)\."
CLASSIFIER = r"^classifier\."


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

    _keys_to_ignore_on_load_unexpected = [CLASSIFIER]

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
        """Number of rows before the patches in `last_hidden_state`: CLS and registers."""
        return 1 + self.config.num_register_tokens

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        output_features: bool = True,
        output_patches: bool = True,
        last_layer: int | None = None,
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
            last_layer: Stop after so many blocks: `last_hidden_state` is that block's output, without the final
                LayerNorm; where CLS is inserted later it holds patches alone. There are no other features then.
            **kwargs: `output_hidden_states` (bool, or indices of those to keep), `output_attentions`, `return_dict`,
                and arguments of the attention kernel.

        Raises:
            ValueError: If an input has the wrong shape or dtype.
            TypeError: For an unknown keyword argument.
        """
        kwargs = check_keywords(kwargs)
        tokens, prefix = self.embeddings(pixel_values, bool_masked_pos=bool_masked_pos)
        num_queries = None if output_patches else self.num_prefix_tokens
        # can_return_tuple has taken the caller's wish; what happens inside is an object.
        encoded = self.encoder(tokens, prefix, num_queries, last_layer, return_dict=True, **kwargs)
        if last_layer is not None:
            return EquiSSLModelOutput(
                last_hidden_state=encoded.last_hidden_state,
                hidden_states=encoded.hidden_states,
                attentions=encoded.attentions,
            )
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
        """Map (B, 1 + R + N, D) -> (B, 1 + N, d_inv), (B, 1 + N, d_equi), or nothing without a stem."""
        if self.stem is None:
            return None, None
        if self.num_prefix_tokens > 1:
            tokens = torch.cat((tokens[:, :1], tokens[:, self.num_prefix_tokens :]), dim=1)
        features = self.stem(tokens)
        return features[..., : self.stem.invariant_size], features[..., self.stem.invariant_size :]

    def reconstruct(self, pixel_values_1: Tensor, pixel_values_2: Tensor) -> Tensor:
        """Reconstruct images from the equivariant features of two views.

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
        return self.decoder(*features.chunk(2), (height // self.config.patch_side, width // self.config.patch_side))


class EquiSSLForImageClassification(EquiSSLPreTrainedModel):
    """An encoder with a linear classifier on its pooled tokens; `config.pooling` says which.

    Holds no decoder, and a stem only if the pooling reads it: its `config` says so, and a checkpoint of it loads as an
    [`EquiSSLModel`] of that shape. Loaded from an encoder, the classifier alone is new.

    Args:
        config: The architecture, with `num_labels` or `id2label`, and `pooling`.

    Raises:
        ValueError: If `config` makes no network, or has no stem for `pooling="invariant"` or `"equivariant"`.
    """

    _keys_to_ignore_on_load_unexpected = [UNREAD_PARTS]

    def __init__(self, config: EquiSSLConfig) -> None:
        config.check()
        reads_stem = config.pooling in ("invariant", "equivariant")
        if reads_stem and config.feature_size is None:
            raise ValueError(
                f"pooling={config.pooling!r} reads the stem, and this encoder has none (feature_size=None): choose "
                "pooling='cls', 'patches' or 'cls_patches', or an encoder that was trained with a stem."
            )
        config = config.encoder_only(keep_stem=reads_stem)
        super().__init__(config)
        self.num_labels = cast(int, config.num_labels)
        self.equissl = EquiSSLModel(config)
        self.classifier = nn.Linear(config.pooled_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (B, C, H, W), normalised as the encoder's image processor does.
            labels: (B,) class indices, (B, num_labels) floats for several labels, or (B,) floats for a regression;
                `config.problem_type`, or else dtype and `num_labels`, tell which.
            **kwargs: As in [`EquiSSLModel`]. With `pooling="cls"` the last block gives CLS and registers alone, and so
                do the last of its hidden states and attentions.

        Returns:
            `logits` (B, num_labels), `loss` if labels are given, `hidden_states` and `attentions` if asked for.

        Raises:
            ValueError: If an input has the wrong shape or dtype.
        """
        outputs = self.equissl(
            pixel_values, output_features=False, output_patches=self.config.pooling != "cls", return_dict=True, **kwargs
        )
        logits = self.classifier(self._pool(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _pool(self, tokens: Tensor) -> Tensor:
        """Pool tokens: (B, 1 + R + N, D) -> (B, classifier.in_features)."""
        pooling, cls = self.config.pooling, tokens[:, 0]
        if pooling == "cls":
            return cls
        patches = tokens[:, self.equissl.num_prefix_tokens :].mean(dim=1)
        if pooling == "patches":
            return patches
        if pooling == "cls_patches":
            return torch.cat((cls, patches), dim=-1)
        # The stem is affine: it maps the mean of the patches to the mean of their features.
        return cast(EquiSSLStem, self.equissl.stem)(torch.stack((cls, patches), dim=1), part=pooling).flatten(1)


class EquiSSLBackbone(BackboneMixin, EquiSSLPreTrainedModel):
    """Feature maps of chosen blocks, for transformers' segmentation, detection and pose models.

    Load it with its class: `EquiSSLBackbone.from_pretrained(folder_or_id, out_indices=[3, 6, 9, 12])`. (transformers
    5.23's `AutoBackbone.from_pretrained` asks the Hub first: it fails for a folder, and offline.) Stage 0 is "stem",
    the embeddings; stage i is "stage{i}", the output of block i.

    A model around it is made from its configuration and starts with random weights; pretrained ones are put in:

    ```python
    backbone = EquiSSLBackbone.from_pretrained("user/encoder", out_indices=[3, 6, 9, 12])
    model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone.config, num_labels=11))
    model.backbone.load_state_dict(backbone.state_dict())
    ```

    `model.save_pretrained` then holds all of it, and `from_pretrained` rebuilds it (after `import hf_equissl`). DETRs
    call the attribute `model.model.backbone.model`, Mask2Former `model.model.pixel_level_module.encoder`. VitPose reads
    its pictures' size from the configuration: load with `patch_size=(16, 16)` and `reshape_hidden_states=False`, then
    call `backbone.resize_positions((256, 192))`. RT-DETR wants maps that halve from stage to stage, which a plain ViT
    does not have.

    Args:
        config: The architecture, `out_features` or `out_indices`, `apply_layernorm` and `reshape_hidden_states`.

    Raises:
        ValueError: If `config` makes no network or names a stage that does not exist.
    """

    _keys_to_ignore_on_load_unexpected = [UNREAD_PARTS, CLASSIFIER]

    def __init__(self, config: EquiSSLConfig) -> None:
        config.check()
        config = config.encoder_only()
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.embeddings = EquiSSLEmbeddings(config)
        self.encoder = EquiSSLEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BackboneOutput:
        """Compute feature maps of images.

        Args:
            pixel_values: (B, C, H, W); H and W are multiples of the patch size.
            **kwargs: As in [`EquiSSLModel`].

        Returns:
            `feature_maps`, one per stage of `out_features`: (B, D, H / patch, W / patch), or (B, N, D) without
            `reshape_hidden_states`; patches only, no CLS, no registers. `hidden_states` and `attentions` if asked for.

        Raises:
            ValueError: If `pixel_values` has the wrong shape.
            TypeError: For an unknown keyword argument.
        """
        kwargs = check_keywords(kwargs)
        tokens, prefix = self.embeddings(pixel_values)
        encoded = self.encoder(tokens, prefix, return_dict=True, **kwargs)
        rows, columns = (side // self.config.patch_side for side in pixel_values.shape[2:])
        stages = zip(self.stage_names, encoded.hidden_states, strict=True)
        wanted = [state for name, state in stages if name in self.out_features]
        maps: Any = tuple(self._feature_map(state, (rows, columns)) for state in wanted)
        return BackboneOutput(feature_maps=maps, hidden_states=encoded.hidden_states, attentions=encoded.attentions)

    def _feature_map(self, hidden_state: Tensor, grid: tuple[int, int]) -> Tensor:
        """Lay patches out: (B, ... + N, D) -> (B, D, rows, columns) or (B, N, D)."""
        # From the back: with a late CLS the first stages have no tokens before the patches.
        patches = hidden_state[:, -grid[0] * grid[1] :]
        if self.config.apply_layernorm:
            patches = self.layernorm(patches)
        return (
            patches.transpose(1, 2).unflatten(-1, grid).contiguous() if self.config.reshape_hidden_states else patches
        )


EquiSSLModel.register_for_auto_class("AutoModel")
EquiSSLForImageClassification.register_for_auto_class("AutoModelForImageClassification")
EquiSSLBackbone.register_for_auto_class("AutoBackbone")
