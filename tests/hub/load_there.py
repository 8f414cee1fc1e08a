"""What a user does who loads an encoder, in one process of its own: ``environments.run_there`` runs this file.

It imports nothing of ours but the package itself, where the job says that it is installed. Standard input: a job.
Written: its "out", a safetensors file with a tensor per check. Last line of the output: facts. Both are JSON.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    pipeline,
)

job = json.load(sys.stdin)
if job["way"] == "package":
    importlib.import_module("hf_equissl")  # makes the Auto classes know our model type
REPO, OPTIONS = job["repo"], job["options"]
pictures = [Image.open(path).convert("RGB") for path in job["pictures"]]
processor = AutoImageProcessor.from_pretrained(REPO, **OPTIONS)
pixels = processor(pictures, return_tensors="pt")["pixel_values"]
tensors = {"pixels": pixels}
facts: dict[str, Any] = {}


def load(**options: Any) -> Any:
    return AutoModel.from_pretrained(REPO, **{**OPTIONS, **options}).eval()


def tokens(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(pixels.to(model.device, model.dtype)).last_hidden_state.float().cpu()


def check_models() -> None:
    config = AutoConfig.from_pretrained(REPO, **OPTIONS)
    model = load()
    facts.update(config=type(config).__name__, model=type(model).__name__, module=type(model).__module__)
    facts.update(processor=type(processor).__name__, dtype=str(model.dtype))
    tensors["tokens"] = tokens(model)
    eager = load(attn_implementation="eager")
    facts["eager"] = eager.config._attn_implementation
    tensors["eager"] = tokens(eager)
    half = load(dtype="bfloat16")
    facts["bfloat16"] = str(half.dtype)
    tensors["bfloat16"] = tokens(half)
    for device_map in ("cpu", "auto"):
        tensors[f"device_map_{device_map}"] = tokens(load(device_map=device_map))
    for revision in job["old_revisions"]:
        tensors[f"revision_{revision}"] = tokens(load(revision=revision))
    if "sharded" in job:
        tensors["sharded"] = tokens(load(subfolder=job["sharded"]))


def check_heads() -> None:
    backbone = AutoBackbone.from_pretrained(REPO, **OPTIONS, out_indices=[1, 2]).eval()
    with torch.no_grad():
        first, second = backbone(pixels).feature_maps
    tensors.update(stage1=first, stage2=second)
    new = AutoModelForImageClassification.from_pretrained(REPO, **OPTIONS, num_labels=3).eval()
    with torch.no_grad():
        facts["new_head"] = list(new(pixels).logits.shape)
    body = getattr(new, new.base_model_prefix)
    tensors["new_head_tokens"] = tokens(body)


def check_pipelines() -> None:
    options = {name: value for name, value in OPTIONS.items() if name == "trust_remote_code"}
    model: Any = REPO if "subfolder" not in OPTIONS else load()
    extract = pipeline("image-feature-extraction", model=model, image_processor=processor, **options)
    tensors["pipeline"] = torch.tensor(extract(pictures[0]))
    if "classifier" not in job:
        return
    classifier = AutoModelForImageClassification.from_pretrained(job["classifier"], **options).eval()
    with torch.no_grad():
        tensors["logits"] = classifier(pixels).logits
    answers = pipeline("image-classification", model=job["classifier"], **options)(pictures[0], top_k=3)
    facts["classes"] = {answer["label"]: answer["score"] for answer in answers}


check_models()
if not job.get("short"):
    check_heads()
    check_pipelines()
package = importlib.util.find_spec("hf_equissl")
facts["package"] = package and package.origin
modules = set(sys.modules)
facts["imported"] = sorted(modules & {"hf_equissl", "torchvision"})
facts["remote_code"] = any(name.startswith("transformers_modules.") and "equissl" in name for name in modules)
save_file({name: value.contiguous() for name, value in tensors.items()}, job["out"])
print(json.dumps(facts))
