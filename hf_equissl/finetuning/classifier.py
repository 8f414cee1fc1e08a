"""An encoder with a new classification head, and which of its weights are trained."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from ..encoders.convert import advise_conversion
from ..encoders.weights import without_load_report
from ..utils.load_errors import explain_load_errors, read_config

# What the heads of stock classes read, for records; ours say it in their config.
_STOCK_POOLING = {"dinov2": "cls_patches", "dinov2_with_registers": "cls_patches", "vit": "cls", "ijepa": "patches"}
# Weights whose absence from a checkpoint does no harm: no logit depends on them, or the head is to be new.
_UNUSED = ("mask_token", "pooler")
_NEW = ("classifier", *_UNUSED)


def load_classifier(
    source: str,
    classes: Sequence[str],
    *,
    pooling: str | None = None,
    drop_path: float = 0.0,
    trust_remote_code: bool = False,
    **hub_options: Any,
) -> PreTrainedModel:
    """Load an encoder from a folder or the Hub with a head for ``classes``, in float32.

    Args:
        source: Folder or Hub id: an EquiSSL encoder, or one that ``AutoModelForImageClassification`` knows.
        classes: Names, in the order of the labels.
        pooling: What the head of an EquiSSL encoder reads; ``None``: its config's.
        drop_path: Stochastic depth.
        trust_remote_code: Whether code stored beside the weights may run.
        **hub_options: ``revision``, ``subfolder``, ``cache_dir``, ``token``.

    Raises:
        ValueError: no encoder there, no classification class for it, a pooling or stochastic depth that it does not
            have, or weights that are missing.
    """
    options = {"trust_remote_code": trust_remote_code, **hub_options}
    config = read_config(source, what="encoder", **options)
    config.num_labels = len(classes)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}
    if pooling is not None:
        if not hasattr(config, "pooling"):
            raise ValueError(
                f"--pooling {pooling}: {source} is a {config.model_type} model, whose classification class has a fixed "
                f"head (it reads {_STOCK_POOLING.get(config.model_type, 'what its class says')}). Leave --pooling out."
            )
        config.pooling = pooling
    set_drop_path(config, source, drop_path)
    if reason := why_unclassified(config, source):
        raise ValueError(reason)
    with explain_load_errors(source, "encoder", **hub_options), without_load_report():
        model, report = AutoModelForImageClassification.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    check_report(source, model, report, new=_NEW)
    return model


def set_drop_path(config: Any, source: str, drop_path: float) -> None:
    """Set the stochastic depth of an encoder that is about to be loaded.

    Raises:
        ValueError: it has none.
    """
    if hasattr(config, "drop_path_rate"):
        config.drop_path_rate = drop_path
    elif drop_path:
        raise ValueError(
            f"--drop_path {drop_path}: {source} is a {config.model_type} model, which has no stochastic depth. Leave "
            "--drop_path out."
        )


def load_trained_classifier(source: str, *, trust_remote_code: bool = False, **hub_options: Any) -> PreTrainedModel:
    """Load a whole classifier from a folder or the Hub.

    Raises:
        ValueError: none there, or an encoder without a trained head.
    """
    read_config(source, what="fine-tuned model", trust_remote_code=trust_remote_code, **hub_options)
    with explain_load_errors(source, "fine-tuned model", **hub_options), without_load_report():
        model, report = AutoModelForImageClassification.from_pretrained(
            source, trust_remote_code=trust_remote_code, output_loading_info=True, **hub_options
        )
    check_report(source, model, report, new=_UNUSED)
    return model


def commit_of(source: str, **hub_options: Any) -> str | None:
    """Find the commit that a repository stands at, so that all of a run reads the same; ``None`` for a folder.

    Raises:
        LoadError: there is no such repository, or no config in it.
    """
    if os.path.isdir(source):
        return None
    with explain_load_errors(source, "encoder", **hub_options):
        return extract_commit_hash(cached_file(source, "config.json", **hub_options), None)


def why_unclassified(config: Any, source: str) -> str:
    """Say why there is no class with a classification head for an encoder; "" where there is one."""
    own = getattr(config, "auto_map", None) or {}
    if type(config) in AutoModelForImageClassification._model_mapping or "AutoModelForImageClassification" in own:
        return ""
    return (
        f"{source} is a {config.model_type} model, for which transformers has no image classification class. "
        f"{advise_conversion(config)}"
    )


def check_report(source: str, model: PreTrainedModel, report: dict[str, Any], new: Sequence[str]) -> None:
    """Raise ``ValueError`` for weights that are missing or of another shape, unless named with a part of ``new``."""
    mismatched = [item[0] if isinstance(item, tuple) else item for item in report["mismatched_keys"]]
    bad = sorted(key for key in {*report["missing_keys"], *mismatched} if not any(part in key for part in new))
    if bad:
        head = all("classifier" in key for key in bad)
        hint = "it is an encoder that was not fine-tuned" if head else "this is not a checkpoint of that encoder"
        raise ValueError(
            f"{len(bad)} weights of {type(model).__name__} are missing from {source!r} or have another shape, e.g. "
            f"{bad[:3]}: {hint}."
        )


def pooling_of(config: Any) -> str:
    """Name what the head reads, for records."""
    return getattr(config, "pooling", None) or _STOCK_POOLING.get(config.model_type, "pooled")
