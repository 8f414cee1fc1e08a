"""Each method trains what it says, on every kind of encoder, and leaves something that others load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_equissl.evaluation.results import load_records
from hf_equissl.finetuning import fine_tune, load_finetuned, prepare
from hf_equissl.finetuning.run import build_trainer
from hf_equissl.finetuning.settings import POOLINGS
from hf_equissl.finetuning.tasks.classification import ClassificationTask
from hf_equissl.finetuning.trainer import parameter_groups
from hf_equissl.modeling import configuration_equissl

from .conftest import CLASSES


def gradients_after_a_step(settings: Any) -> dict[str, torch.Tensor]:
    """Of every trained weight in the second step: in the first, B = 0 keeps the gradient of A at zero."""
    run = prepare(settings)
    trainer = build_trainer(run)
    optimizer = trainer.create_optimizer()
    for inputs in list(trainer.get_train_dataloader())[:2]:
        optimizer.zero_grad()
        trainer.compute_loss(run.model.train(), trainer._prepare_inputs(inputs)).backward()
        optimizer.step()
    return {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("encoder", ["equissl", "dinov2", "vit"])
@pytest.mark.parametrize("method", ClassificationTask.methods)
def test_gradients_reach_what_the_method_trains(settings: Any, method: str, encoder: str) -> None:
    found = gradients_after_a_step(settings(encoder, method=method, drop_path=0.0))
    assert all(bool(gradient.abs().sum() > 0) for gradient in found.values()), [
        name for name, gradient in found.items() if not gradient.abs().sum() > 0
    ]
    heads = {name for name in found if "classifier" in name}
    rest = set(found) - heads
    assert len(heads) == 2
    if method == "linear":
        assert not rest
    elif method == "full":
        assert {name.rpartition(".")[2] for name in rest} >= {"weight", "bias", "cls_token", "position_embeddings"}
        assert not any("mask_token" in name or "stem" in name for name in rest)
    else:
        assert all(".lora_" in name for name in rest)
        layers = {name.split(".lora_")[0].rpartition("model.")[2] for name in rest}
        assert len(layers) == 2 * 6  # four projections and two linear maps in each of two blocks
        kinds = {name.split(".lora_")[1].partition(".")[0] for name in rest}
        assert kinds == ({"A", "B", "magnitude_vector"} if method == "dora" else {"A", "B"})


@pytest.mark.parametrize("pooling", ["cls", "patches", "cls_patches", "invariant", "equivariant"])
def test_pooling_is_what_the_head_reads(settings: Any, pooling: str) -> None:
    run = prepare(settings(method="full", pooling=pooling))
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert run.description.pooling == pooling
    assert any("stem" in name for name in trained) == (pooling in ("invariant", "equivariant"))
    # Two rows, CLS and the mean patch, except for the first two.
    width = {"cls": 32, "patches": 32, "cls_patches": 64, "invariant": 32, "equivariant": 16}[pooling]
    assert run.network.classifier.in_features == width


def test_full_fine_tuning_learns_and_leaves_a_plain_model(settings: Any, flags: str) -> None:
    chosen = settings(method="full", epochs=8, layer_decay=0.8, drop_path=0.1)
    (top1,) = fine_tune(chosen, command="python training/finetune.py --encoder /some/where/encoder")
    assert (top1.metric, top1.evaluator, top1.primary, top1.seeds) == ("top1", "finetune", True, (0,))
    assert top1.value > 0.9  # chance is 1/3
    assert top1.protocol["trained_parameters"] <= top1.protocol["parameters"]
    assert load_records(Path(chosen.output_dir) / "results.json") == [top1]

    folder = Path(chosen.output_dir) / "model"
    assert top1.details["saved_bytes"] == [(folder / "model.safetensors").stat().st_size]
    classify = pipeline("image-classification", model=str(folder))
    answer = classify(Image.open(Path(flags) / "test" / "green" / "0.png"))
    assert answer[0]["label"] == "green"
    assert {entry["label"] for entry in answer} == set(CLASSES)
    # The pipeline's images are those of the evaluation: its accuracy is the recorded one.
    files = [path for name in CLASSES for path in sorted((Path(flags) / "test" / name).glob("*.png"))]
    hits = [classify(Image.open(file))[0]["label"] == file.parent.name for file in files]
    assert sum(hits) / len(hits) == pytest.approx(top1.value)

    assert load_finetuned(folder).config.id2label == dict(enumerate(CLASSES))
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results[0].metric_value == pytest.approx(top1.value, abs=1e-4)
    texts = [path.read_text() for path in folder.iterdir() if path.suffix in (".md", ".json")]
    assert len(texts) == 5  # card, results, description, config, processor
    for private in ("/some/where", flags, chosen.encoder):
        assert not any(private in text for text in texts), private


def test_a_linear_head_leaves_the_encoder_alone(settings: Any, encoders: dict[str, str]) -> None:
    run = prepare(settings(method="linear", drop_path=0.5))
    trainer = build_trainer(run)
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    trainer.train()
    after = run.network.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert not run.network.base_model.training  # stochastic depth is off: features are those of the probes
    assert "1 x 1 = 8" in run.summary()


def test_layer_decay_follows_depth(settings: Any) -> None:
    run = prepare(settings("vit", method="full", learning_rate=1.0, weight_decay=0.05, layer_decay=0.5))
    groups = parameter_groups(run.model, run.args, run.task.encoder(run.network))
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(run.model.named_parameters())
    assert rate[id(named["classifier.weight"])] == rate[id(named["vit.layernorm.weight"])] == 1.0
    assert rate[id(named["vit.layers.1.mlp.fc1.weight"])] == 0.5
    assert rate[id(named["vit.layers.0.mlp.fc1.bias"])] == 0.25
    assert rate[id(named["vit.embeddings.cls_token"])] == 0.125
    assert decay[id(named["vit.layers.0.mlp.fc1.weight"])] == 0.05
    assert decay[id(named["vit.layers.0.mlp.fc1.bias"])] == decay[id(named["vit.embeddings.cls_token"])] == 0.0
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in named.values())


def test_views_and_evaluation_see_the_processor_s_normalisation(settings: Any, flags: str) -> None:
    run = prepare(settings(method="linear", crop_scale=(1.0, 1.0), flip=False))
    trainer = build_trainer(run)
    batch = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (12, 1)
    processor = AutoImageProcessor.from_pretrained(run.settings.encoder)
    image = Image.open(Path(flags) / "test" / "blue" / "0.png")
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(batch["pixel_values"][0], expected)
    # Whole images, not mirrored: a training view is then the image itself.
    sample = trainer.train_dataset[3, 0]
    view = trainer._prepare_inputs(trainer.data_collator([sample]))["pixel_values"][0]
    image = Image.open(Path(flags) / "train" / "blue" / "0.png")
    torch.testing.assert_close(view, processor(image, return_tensors="pt")["pixel_values"][0], atol=1e-5, rtol=0)


def test_the_best_weights_are_kept_when_asked_for(settings: Any) -> None:
    # The learning rate rises until it destroys what the first epochs learned.
    chosen = settings(method="full", keep="best", epochs=5, learning_rate=1.0, warmup=0.95)
    (record,) = fine_tune(chosen)
    folders = {int(path.name[11:]): path for path in Path(chosen.output_dir).glob("checkpoint-*")}
    history = json.loads((folders[15] / "trainer_state.json").read_text())["log_history"]
    accuracies = {entry["step"]: entry["eval_top1"] for entry in history if "eval_top1" in entry}
    best = max(accuracies, key=lambda step: accuracies[step])
    assert accuracies[15] < accuracies[best] == record.value == record.details["best_of_all_evaluations"][0]
    assert record.protocol["weights"] == "best step"
    assert set(folders) == {best, 15}
    saved, kept, last = (load_file(folder / "model.safetensors") for folder in (
        Path(chosen.output_dir) / "model", folders[best], folders[15]
    ))  # fmt: skip
    assert all(torch.equal(value, kept[name]) for name, value in saved.items())
    assert not torch.equal(saved["classifier.weight"], last["classifier.weight"])


def test_accumulated_batches_give_the_weights_of_whole_ones(settings: Any, tmp_path: Path) -> None:
    found, norms = [], []
    for name, batch in (("whole", {"batch_size": 8}), ("halves", {"batch_size": 4, "accumulation": 2})):
        run = prepare(settings(method="full", output_dir=str(tmp_path / name), warmup=0.0, **batch))
        start = {key: value.clone() for key, value in run.model.state_dict().items()}
        run.args.logging_steps = 1
        trainer = build_trainer(run)
        trainer.train()
        assert trainer.state.global_step == run.steps == 6
        norms.append([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])
        found.append(run.model.state_dict())
    whole, halves = found
    # Adam would not notice gradients that are twice as large.
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    assert (whole["classifier.weight"] - start["classifier.weight"]).abs().max() > 1e-3
    for key, value in whole.items():
        # The gradient of a key's bias is zero but for rounding, which Adam turns into steps of either sign.
        if not key.endswith("k_proj.bias"):
            torch.testing.assert_close(
                halves[key], value, atol=1e-4, rtol=0, msg=lambda text, key=key: f"{key}: {text}"
            )


def test_bfloat16_is_for_the_network_alone(settings: Any) -> None:
    run = prepare(settings(method="lora", bf16=True, epochs=1))
    seen = []
    run.network.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    build_trainer(run).train()
    assert set(seen) == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())


def test_labels_are_smoothed_and_depth_is_random_in_training_only(settings: Any) -> None:
    run = prepare(settings(method="full", label_smoothing=0.3, drop_path=0.8))
    trainer = build_trainer(run)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    pixels, labels = inputs["pixel_values"], inputs["labels"]
    with torch.no_grad():
        run.model.eval()
        plain = run.model(pixels).logits
        torch.testing.assert_close(trainer.compute_loss(run.model, inputs), cross_entropy(plain, labels))
        run.model.train()
        torch.manual_seed(1)
        deep = run.model(pixels).logits
        torch.manual_seed(1)
        found = trainer.compute_loss(run.model, inputs)
    assert not torch.allclose(deep, plain)
    torch.testing.assert_close(found, 0.7 * cross_entropy(deep, labels) - 0.3 * deep.log_softmax(1).mean())
    assert not torch.isclose(found, cross_entropy(deep, labels))


@pytest.mark.parametrize("encoder", ["equissl", "vit"])
def test_a_new_head_is_no_news(settings: Any, capfd: pytest.CaptureFixture[str], encoder: str) -> None:
    prepare(settings(encoder, method="linear"))
    assert "MISSING" not in capfd.readouterr().err


def test_a_stock_model_is_loadable_without_us(settings: Any) -> None:
    chosen = settings("dinov2", method="full", epochs=1)
    fine_tune(chosen)
    folder = Path(chosen.output_dir) / "model"
    model, report = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(model).__module__.startswith("transformers.models.dinov2")


def test_poolings_are_those_of_the_classifier() -> None:
    """Written down twice: the command's help must not wait for the other list's file."""
    assert POOLINGS == configuration_equissl.POOLINGS
