"""What all EquiSSL models share: loading, saving, initialisation, the blocks, and the check of keyword arguments."""

import copy
import difflib
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import TransformersKwargs, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_equissl import EquiSSLConfig
from .layers_equissl import EquiSSLAttention, EquiSSLEmbeddings, EquiSSLLayer, EquiSSLLayerScale, EquiSSLStem

__all__ = ["EquiSSLEncoder", "EquiSSLPreTrainedModel", "check_keywords"]

FORWARD_ARGUMENTS = (
    "pixel_values",
    "bool_masked_pos",
    "output_features",
    "output_patches",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "labels",
)


def check_keywords(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a `forward` that are not `None`: wrappers hand on `attention_mask=None`.

    Raises:
        TypeError: For one that nothing here reads, which would otherwise be dropped without a word.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    known = {*TransformersKwargs.__annotations__, "return_dict"}
    for name in given:
        if name not in known:
            guess = difflib.get_close_matches(name, FORWARD_ARGUMENTS, n=1, cutoff=0.5)
            hint = f" Did you mean {guess[0]!r}?" if guess else ""
            raise TypeError(
                f"forward() of an EquiSSL model does not know {name!r}.{hint} It takes {', '.join(FORWARD_ARGUMENTS)}; "
                "positions are interpolated to every image size by themselves."
            )
    return given


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
        """Draw from a truncated normal (std `initializer_range`) as ViT, iBOT, DINOv2; zero biases and mask token."""
        super()._init_weights(module)  # the parent initialises norms
        std = self.config.initializer_range
        if isinstance(module, EquiSSLStem):
            # Drawn and replaced, as the parent does with every nn.Linear: a seed gives the weights that it always gave.
            init.normal_(module.weight, std=std)
        if isinstance(module, (nn.Linear, nn.Conv2d, EquiSSLStem)):
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

    def resize_positions(self, image_size: int | tuple[int, int]) -> None:
        """Store the position embeddings at another `image_size`, in pixels: those that such images get already.

        Where a model around the encoder reads `config.image_size` (VitPose), or to spare the interpolation.

        Raises:
            ValueError: If `image_size` is not a positive multiple of the patch size; the model is as before.
        """
        config = copy.deepcopy(self.config)
        config.image_size = image_size
        config.validate_image_size()
        self.config.image_size = image_size
        cast(EquiSSLEmbeddings, self.base_model.embeddings).resize_positions(config.grid_size)


class EquiSSLEncoder(EquiSSLPreTrainedModel):
    """Run embedded patches through the blocks of the ViT, and return their tokens."""

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
        last_layer: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Map (B, T, D) -> (B, T, D); `prefix_tokens` (B, P, D) go in front after block `cls_insertion_layer`.

        With `num_queries` = Q the last block gives the first Q tokens only, (B, Q, D). `last_layer` is the number of
        the last block; `None` is that of all.
        """
        last = (last_layer or len(self.layer)) - 1
        for index, layer in enumerate(self.layer):
            if index > last:
                break
            if prefix_tokens is not None and index == self.config.cls_insertion_layer:
                hidden_states = torch.cat((prefix_tokens.to(hidden_states.dtype), hidden_states), dim=1)
            hidden_states = layer(hidden_states, num_queries if index == last else None, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)
