"""Files with the layouts of iBOT, DINO and DINOv2 give encoders whose outputs are those of an independent ViT."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_equissl.encoders.convert import convert_encoder

from .upstream_layouts import UpstreamViT, wrapped

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def images(model: UpstreamViT, rows: int, columns: int) -> Tensor:
    return torch.randn(2, 3, rows * model.patch, columns * model.patch, generator=torch.Generator().manual_seed(1))


def ibot_full(model: UpstreamViT) -> dict:
    """What training leaves: both networks, their heads, optimizer, arguments."""
    other = {name: value + 1 for name, value in model.state_dict().items()}
    other = {f"module.backbone.{name}": value for name, value in other.items()}
    run = {"optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 3, "args": argparse.Namespace(arch="x")}
    return {"student": other, "teacher": wrapped(model), **run, "ibot_loss": {"center": torch.zeros(1, 3)}}


LAYOUTS: dict[str, tuple[dict, Callable[[UpstreamViT], dict]]] = {
    "ibot-full": ({"project": "ibot", "mask_token": False}, ibot_full),
    "ibot-student": ({"project": "ibot"}, lambda model: {"student": wrapped(model, "module."), "teacher": {"x": 1}}),
    "ibot-released": ({"project": "ibot", "mask_token": False}, lambda model: {"state_dict": model.state_dict()}),
    "ibot-scaled": ({"project": "ibot", "scaled": True}, lambda model: {"state_dict": model.state_dict()}),
    "dino-released": ({"project": "ibot", "mask_token": False, "width": 64}, lambda model: dict(model.state_dict())),
    "dinov2-released": ({"project": "dinov2", "scaled": True, "patch": 14}, lambda model: dict(model.state_dict())),
    "dinov2-registers": (
        {"project": "dinov2", "scaled": True, "registers": 4},
        lambda model: dict(model.state_dict()),
    ),
    "dinov2-training": (
        {"project": "dinov2", "scaled": True, "chunks": 2, "depth": 4},
        lambda model: {"teacher": wrapped(model, heads=("dino_head", "ibot_head"))},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_equal_upstream(layout: str, tmp_path: Path) -> None:
    settings, file = LAYOUTS[layout]
    upstream = UpstreamViT(**settings)
    torch.save(file(upstream), tmp_path / "checkpoint.pth")
    network = "student" if layout == "ibot-student" else "teacher"
    ours = convert_encoder(tmp_path / "checkpoint.pth", weights_of=network)
    assert not ours.training
    assert ours.dtype == torch.float32
    assert (ours.config.patch_size, ours.config.image_size) == (upstream.patch, 4 * upstream.patch)
    assert ours.config.use_mask_token == settings.get("mask_token", True)
    for grid in ((4, 4), (3, 5), (6, 6)):
        pixels = images(upstream, *grid)
        masks = [None, torch.rand(2, grid[0] * grid[1]) < 0.5] if ours.config.use_mask_token else [None]
        for mask in masks:
            with torch.no_grad():
                found = ours(pixels, bool_masked_pos=mask).last_hidden_state
            torch.testing.assert_close(found, upstream(pixels, mask), **TOLERANCE)


def test_upstreams_offset_is_the_only_difference_at_other_sizes(tmp_path: Path) -> None:
    """Upstream adds 0.1 patches when it resizes positions: nothing at the stored size, little elsewhere."""
    upstream = UpstreamViT("dinov2", scaled=True)
    torch.save(upstream.state_dict(), tmp_path / "vit.pth")
    ours = convert_encoder(tmp_path / "vit.pth")
    for grid, low, high in (((4, 4), 0.0, 1e-5), ((6, 6), 1e-4, 0.1)):
        pixels = images(upstream, *grid)
        with torch.no_grad():
            difference = (ours(pixels).last_hidden_state - upstream(pixels, offset=0.1)).abs().mean()
        assert low <= difference <= high


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(ibot_full(UpstreamViT("ibot")), tmp_path / "checkpoint.pth")
    with caplog.at_level(logging.INFO, logger="hf_equissl"):
        convert_encoder(tmp_path / "checkpoint.pth")
    assert "left out: args, epoch, ibot_loss, optimizer, student" in caplog.text
    assert "head (4)" in caplog.text


def test_heads_follow_from_the_width_or_are_given(tmp_path: Path) -> None:
    torch.save(UpstreamViT("ibot").state_dict(), tmp_path / "vit.pth")
    assert convert_encoder(tmp_path / "vit.pth").config.num_attention_heads == 2
    assert convert_encoder(tmp_path / "vit.pth", num_attention_heads=4).config.num_attention_heads == 4


class Dangerous:
    """Unpickled by a trusting reader, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_code_in_a_file_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"teacher": {}, "extra": Dangerous(trace)}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"holds more than weights.*save the weights alone"):
        convert_encoder(tmp_path / "bad.pth")
    assert not trace.exists()


@pytest.mark.parametrize("kept", [0.5, 0.0], ids=["half", "empty"])
def test_a_torn_file_is_named(tmp_path: Path, kept: float) -> None:
    torch.save(UpstreamViT("ibot").state_dict(), tmp_path / "vit.pth")
    content = (tmp_path / "vit.pth").read_bytes()
    (tmp_path / "vit.pth").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"vit\.pth' cannot be read"):
        convert_encoder(tmp_path / "vit.pth")


def edited(**changes: Tensor | None) -> dict[str, Tensor]:
    """A good state dict with entries put in, replaced or (None) taken out; ``__`` stands for a dot."""
    state = dict(UpstreamViT("ibot").state_dict())
    for name, value in changes.items():
        state.pop(name.replace("__", "."), None)
        if value is not None:
            state[name.replace("__", ".")] = value
    return state


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (edited(blocks__1__mlp__fc2__bias=None), r"1 missing: encoder\.layer\.1\.mlp\.fc2\.bias"),
        (edited(blocks__0__attn__q_norm__weight=torch.ones(3)), r"1 unknown: encoder\.layer\.0\.attn\.q_norm\.weight"),
        (edited(norm__bias=torch.ones(3)), r"layernorm\.bias \(3,\), expected \(128,\)"),
        (edited(pos_embed=torch.zeros(1, 16, 128)), "stores 16 positions"),
        (edited(blocks__0__attn__qkv__bias=torch.ones(385)), r"q_proj\.bias \(129,\), expected \(128,\)"),
        (edited(pos_embed=torch.zeros(17, 128)), "is not a ViT of iBOT, DINO or DINOv2"),
        (edited(pos_embed=None), "is not a ViT of iBOT, DINO or DINOv2"),
        (edited(pos_embed=None, rope_embed__periods=torch.ones(3)), "rotary positions"),
        (edited(blocks__0__mlp__w12__weight=torch.ones(3)), "SwiGLU"),
        (edited(layers__0__blocks__0__norm1__weight=torch.ones(3)), "Swin"),
        (edited(norm__bias=None, fc_norm__bias=torch.ones(128)), "norms the mean patch"),
        ({"teacher": {**wrapped(UpstreamViT("ibot")), "predictor.weight": torch.ones(1)}}, "predictor.weight"),
        ({"student": edited(), "epoch": 1}, r"no 'teacher' and no 'state_dict': it holds epoch, student"),
        ([1, 2], "holds a list"),
        ({"state_dict": UpstreamViT("ibot", width=192, depth=1).state_dict() | {"cls_token": 3}}, "cls_token"),
    ],
)
def test_what_does_not_fit_is_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=message):
        convert_encoder(tmp_path / "vit.pth")


def test_a_width_without_known_heads_asks_for_them(tmp_path: Path) -> None:
    model = UpstreamViT("ibot", width=64, depth=1)
    state = {name: value[..., :48] if value.shape[-1] == 64 else value for name, value in model.state_dict().items()}
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:48]
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="give num_attention_heads"):
        convert_encoder(tmp_path / "vit.pth")


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No file at"):
        convert_encoder(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="expected 'teacher' or 'student'"):
        convert_encoder(tmp_path / "absent.pth", weights_of="ema")
