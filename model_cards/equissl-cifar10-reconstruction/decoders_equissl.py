"""Decoders: equivariant features of two views -> images. Used in pretraining, optional in published encoders."""

import math

import torch
from torch import Tensor, nn

from .configuration_equissl import EquiSSLConfig
from .layers_equissl import EquiSSLMLP, EquiSSLStem

__all__ = ["EquiSSLConvDecoder", "EquiSSLCrossAttentionDecoder", "EquiSSLUpsampleConv2d", "build_decoder"]


class EquiSSLUpsampleConv2d(nn.Conv2d):
    """Nearest up-sampling by 2 followed by a 3 x 3 convolution, computed at the low resolution.

    Each output pixel sees only 2 x 2 distinct input pixels, so the pair equals a transposed convolution (kernel 4,
    stride 2, padding 1) whose kernel holds sums of the 3 x 3 one: 16 products per input pixel in place of 36, and no
    up-sampled copy of the input. Measured on one CPU core, forward and backward of two decoders take 36 % (fp32) and
    46 % (bf16) of the time of the pair (also channels first); a 2 x 2 convolution with pixel shuffle lies between.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C_in, h, w) -> (B, C_out, 2h, 2w)."""
        # Along each side output pixels 2i-1 ... 2i+2 get from input pixel i the weights w2, w1 + w2, w0 + w1, w0: the
        # sums over windows of two of the turned kernel between zeros.
        kernel = nn.functional.avg_pool2d(self.weight.flip(2, 3), 2, stride=1, padding=1, divisor_override=1)
        return nn.functional.conv_transpose2d(images, kernel.transpose(0, 1), self.bias, stride=2, padding=1)


class EquiSSLConvDecoderBranch(nn.Module):
    """The convolutions of one decoder: doublings first, each but the last followed by GroupNorm and GELU."""

    def __init__(self, widths: list[int], num_channels: int, num_upsamplings: int) -> None:
        super().__init__()
        outputs = [*widths[1:], num_channels]
        self.convs = nn.ModuleList(
            EquiSSLUpsampleConv2d(inputs, output)
            if index < num_upsamplings
            else nn.Conv2d(inputs, output, kernel_size=3, padding=1)
            for index, (inputs, output) in enumerate(zip(widths, outputs, strict=True))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(8, width), width) for width in outputs[:-1])

    def forward(self, grid: Tensor) -> Tensor:
        """Map (B, widths[0], h, w) -> (B, C, H, W)."""
        for conv, norm in zip(self.convs[:-1], self.norms, strict=True):
            grid = nn.functional.gelu(norm(conv(grid)))
        return self.convs[-1](grid)


class EquiSSLConvDecoder(nn.Module):
    """K independent decoders, each a linear layer and four convolutions, as in EquiSSL.

    "Self-Supervised Learning based on Transformed Image Reconstruction for Equivariance-Coherent Feature
    Representation" (https://arxiv.org/abs/2503.18753), section on the decoders; kept weak on purpose. The paper leaves
    widths, kernels and activations open: `config.decoder_widths`, 3 x 3, GroupNorm and GELU here. The first
    convolutions double the patch grid, log2(patch size) times. A patch size that is no power of two (14) goes to the
    next one (16) and is resized bilinearly to the exact size.
    """

    def __init__(self, config: EquiSSLConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_side
        self.upsampled_patch_size = 2**config.num_decoder_upsamplings
        self.num_images = config.num_intermediate_images + int(config.decoder_reconstructs_final)
        self.equivariant_size = _equivariant_size(config)
        widths = list(config.decoder_widths or [])
        # The K first layers read the same tokens: their weights are rows of one matrix, independent all the same.
        self.projection = nn.Linear(2 * self.equivariant_size, self.num_images * widths[0])
        self.branches = nn.ModuleList(
            EquiSSLConvDecoderBranch(widths, config.num_channels, config.num_decoder_upsamplings)
            for _ in range(self.num_images)
        )

    def forward(self, equivariant_1: Tensor, equivariant_2: Tensor, grid: tuple[int, int]) -> Tensor:
        """Reconstruct K images per pair of views.

        Args:
            equivariant_1: (B, N, d_equi), patch rows of the first view, without CLS and registers.
            equivariant_2: (B, N, d_equi), of the second, transformed view.
            grid: Rows and columns of patches; their product is N.

        Returns:
            (B, K, C, H, W), normalised pixels; K counts the final image, where there is one, last.

        Raises:
            ValueError: If the shapes do not fit.
        """
        _check_features(equivariant_1, equivariant_2, grid, self.equivariant_size)
        return self.paint(self.projection(torch.cat((equivariant_1, equivariant_2), dim=-1)), grid)

    def project_tokens(self, tokens_1: Tensor, tokens_2: Tensor, stem: EquiSSLStem) -> Tensor:
        """Apply the stem's equivariant part and the decoders' linear layers to tokens, as one linear map.

        The stem and these layers follow each other without anything between. Their product reads D dimensions per
        token in place of d_equi (384 and 2048 in the paper's iBOT), and the features are never stored.

        Args:
            tokens_1: (B, N, D), patch rows of the first view.
            tokens_2: (B, N, D), of the second view.
            stem: The layer that would make equivariant features of them.

        Returns:
            (B, N, K * width), what `paint` reads.
        """
        first, second = self.projection.weight.split(self.equivariant_size, dim=1)
        weight_1, bias_1 = stem.fold(first, "equivariant")
        weight_2, bias_2 = stem.fold(second, "equivariant")
        bias = self.projection.bias + bias_1 + bias_2
        return nn.functional.linear(tokens_1, weight_1) + nn.functional.linear(tokens_2, weight_2, bias)

    def paint(self, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """Run the convolutions: (B, N, K * width), the linear layers' output -> (B, K, C, H, W)."""
        rows, columns = grid
        hidden = hidden.view(hidden.shape[0], rows, columns, self.num_images, -1).permute(3, 0, 4, 1, 2)
        # Channels first and one branch at a time: on CPU, channels_last costs 1.1x (fp32) to 1.8x (bf16) and grouped
        # convolutions over all K are 6-12 % slower.
        images = [branch(part.contiguous()) for branch, part in zip(self.branches, hidden, strict=True)]
        output = torch.stack(images, dim=1)
        if self.upsampled_patch_size == self.patch_size:
            return output
        size = (rows * self.patch_size, columns * self.patch_size)
        resized = nn.functional.interpolate(output.flatten(0, 1), size=size, mode="bilinear", align_corners=False)
        return resized.unflatten(0, output.shape[:2])


class EquiSSLDecoderAttention(nn.Module):
    """Multi-head attention from one sequence to another; the same sequence gives self-attention."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        """Map (B, N, D) and (B, M, D) -> (B, N, D)."""
        parts = ((self.q_proj, query), (self.k_proj, context), (self.v_proj, context))
        heads = [layer(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer, tokens in parts]
        return self.o_proj(nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class EquiSSLDecoderLayer(nn.Module):
    """Pre-norm block: attention, then MLP, each with a residual. Cross-attention norms its context on its own."""

    def __init__(self, config: EquiSSLConfig, is_cross_attention: bool = False) -> None:
        super().__init__()
        size, eps = config.decoder_hidden_size, config.layer_norm_eps
        self.norm1 = nn.LayerNorm(size, eps=eps)
        self.norm_context = nn.LayerNorm(size, eps=eps) if is_cross_attention else None
        self.attention = EquiSSLDecoderAttention(size, config.decoder_num_heads)
        self.norm2 = nn.LayerNorm(size, eps=eps)
        self.mlp = EquiSSLMLP(size)

    def forward(self, hidden_states: Tensor, context: Tensor | None = None) -> Tensor:
        """Map (B, N, D), with the context (B, M, D) of a cross-attention block -> (B, N, D)."""
        query = self.norm1(hidden_states)
        normed = query if self.norm_context is None else self.norm_context(context)
        hidden_states = hidden_states + self.attention(query, normed)
        return hidden_states + self.mlp(self.norm2(hidden_states))


class EquiSSLCrossAttentionDecoder(nn.Module):
    """One cross-attention block and L self-attention blocks: view 1 asks, view 2 answers, view 2 is rebuilt.

    "Equivariant Representation Learning for Augmentation-based Self-Supervised Learning via Image Reconstruction"
    (https://arxiv.org/abs/2412.03314). The query gives content and position of view 1, so all that is special to view
    2, i.e. the transformation, has to come through its equivariant features. Direction, L and widths are our choices.
    """

    def __init__(self, config: EquiSSLConfig) -> None:
        super().__init__()
        size = config.decoder_hidden_size
        self.patch_size, self.num_channels, self.num_images = config.patch_side, config.num_channels, 1
        self.equivariant_size = _equivariant_size(config)
        self.projection = nn.Linear(self.equivariant_size, size)
        self.cross_layer = EquiSSLDecoderLayer(config, is_cross_attention=True)
        self.layers = nn.ModuleList(EquiSSLDecoderLayer(config) for _ in range(config.decoder_num_layers))
        self.layernorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.to_pixels = nn.Linear(size, config.num_channels * config.patch_side**2)

    def forward(self, equivariant_1: Tensor, equivariant_2: Tensor, grid: tuple[int, int]) -> Tensor:
        """Reconstruct the second view.

        Args:
            equivariant_1: (B, N, d_equi), patch rows of the first view: the queries.
            equivariant_2: (B, N, d_equi), patch rows of the second view: keys and values.
            grid: Rows and columns of patches; their product is N.

        Returns:
            (B, 1, C, H, W), normalised pixels.

        Raises:
            ValueError: If the shapes do not fit.
        """
        _check_features(equivariant_1, equivariant_2, grid, self.equivariant_size)
        query, context = self.projection(equivariant_1), self.projection(equivariant_2)
        # Made per call: a non-persistent buffer would come out of `from_pretrained` (meta device) as garbage.
        positions = sincos_positions(grid, query.shape[-1], query.device).to(query.dtype)
        hidden = self.cross_layer(query + positions, context + positions)
        for layer in self.layers:
            hidden = layer(hidden)
        return unpatchify(self.to_pixels(self.layernorm(hidden)), grid, self.patch_size)[:, None]


def sincos_positions(grid: tuple[int, int], size: int, device: torch.device | None = None) -> Tensor:
    """Compute fixed 2-D positions (N, size), row-major: first [sin, cos] of the row, then of the column.

    Frequencies 10000^(-4i / size), i = 0 ... size/4 - 1, as in MAE (https://arxiv.org/abs/2111.06377).
    """
    frequencies = 10000.0 ** (-torch.arange(size // 4, device=device, dtype=torch.float32) * 4 / size)
    rows, columns = (torch.arange(count, device=device)[:, None] * frequencies for count in grid)
    rows = torch.cat((rows.sin(), rows.cos()), dim=-1)[:, None].expand(-1, grid[1], -1)
    columns = torch.cat((columns.sin(), columns.cos()), dim=-1)[None].expand(grid[0], -1, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Put together (B, N, C * p * p), row-major patches of channels, rows, columns -> (B, C, H, W)."""
    rows, columns = grid
    images = patches.unflatten(-1, (-1, patch_size, patch_size)).unflatten(1, (rows, columns))
    return images.permute(0, 3, 1, 4, 2, 5).reshape(patches.shape[0], -1, rows * patch_size, columns * patch_size)


def build_decoder(config: EquiSSLConfig) -> EquiSSLConvDecoder | EquiSSLCrossAttentionDecoder:
    """Build the decoder named by `config.decoder_type`.

    Raises:
        ValueError: If it is `None` or unknown.
    """
    if config.decoder_type == "conv":
        return EquiSSLConvDecoder(config)
    if config.decoder_type == "cross_attention":
        return EquiSSLCrossAttentionDecoder(config)
    raise ValueError(f"decoder_type={config.decoder_type!r}: expected 'conv' or 'cross_attention'.")


def _equivariant_size(config: EquiSSLConfig) -> int:
    config.check()
    if config.equivariant_size is None:
        raise ValueError("A decoder reads equivariant features: set feature_size and equivariant_size.")
    return config.equivariant_size


def _check_features(first: Tensor, second: Tensor, grid: tuple[int, int], equivariant_size: int) -> None:
    expected = (grid[0] * grid[1], equivariant_size)
    if first.ndim != 3 or first.shape != second.shape or tuple(first.shape[1:]) != expected:
        raise ValueError(
            f"Equivariant features have shapes {tuple(first.shape)} and {tuple(second.shape)}, expected (B, N, d_equi) "
            f"= (B, {expected[0]}, {expected[1]}) twice for a grid of {grid[0]} x {grid[1]} patches. Leave out the "
            "rows of CLS and registers."
        )
