"""Which layers of an encoder get adapters by default."""

from __future__ import annotations

# Every linear map of the blocks. Adapters on the attention's projections alone, as in the first paper
# (https://arxiv.org/abs/2106.09685), leave two thirds of a block's weights (the MLP) out; with all maps a small rank
# comes closest to full fine-tuning (https://arxiv.org/abs/2305.14314, section 4). Patch embedding, stem and decoders
# have layers of the same names: the pattern asks for the block's number before them.
_BLOCK_LAYERS = r"(attention\.[qkvo]_proj|mlp\.fc[12])"
_DINOV2 = rf"(.*\.)?encoder\.layer\.\d+\.{_BLOCK_LAYERS}"
_VIT = rf"(.*\.)?layers\.\d+\.{_BLOCK_LAYERS}"

# model_type -> regular expression for the full name of a module, as ``LoraConfig.target_modules`` takes it.
LORA_TARGETS: dict[str, str] = {
    "equissl": _DINOV2,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "vit": _VIT,
    "ijepa": _VIT,
}


def register_lora_targets() -> None:
    """Make PEFT's ``LoraConfig()`` without ``target_modules`` work for the model types of ``LORA_TARGETS``.

    For code that uses PEFT itself; our own functions name the modules. PEFT's choice stays where it has one, and
    calling this again changes nothing.

    Raises:
        ImportError: without PEFT.
    """
    from peft.utils import constants

    for model_type, pattern in LORA_TARGETS.items():
        constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(model_type, pattern)
