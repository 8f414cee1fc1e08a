"""What an encoder can be converted to, and what that needs to be installed. Needs no torch."""

from __future__ import annotations

from importlib.util import find_spec

# Target -> what it is.
TARGETS = {
    "equissl": "an EquiSSL encoder",
    "native": "a stock dinov2 or dinov2_with_registers model",
    "onnx": "a program for onnxruntime",
    "torch_export": "a program of torch.export",
}
PROGRAM_FILES = {"onnx": "model.onnx", "torch_export": "model.pt2"}
INT8_FILE = "model_int8.onnx"
RECORD_FILE = "program.json"


def check_target(target: str, *, tokens_only: bool = False, int8: bool = False) -> None:
    """Refuse what cannot be written, before any work.

    Raises:
        ValueError: There is no such target, an option is not for it, or a package is missing.
    """
    if target not in TARGETS:
        raise ValueError(f"to={target!r} (--to): expected one of {', '.join(TARGETS)}.")
    if int8 and target != "onnx":
        raise ValueError(f"int8 (--int8) is for to='onnx' (--to onnx), and to is {target!r}.")
    if tokens_only and target not in PROGRAM_FILES:
        raise ValueError(
            f"tokens_only (--tokens_only) is for to='onnx' or 'torch_export' (--to), and to is {target!r}."
        )
    needed = ("onnx", "onnxscript", "onnxruntime") if target == "onnx" else ()
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ValueError(f"to='onnx' (--to onnx) needs {', '.join(missing)}: pip install 'hf-equissl[onnx]'.")
