from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_equissl.objectives.supervised import SupervisedObjective
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running.run import prepare
from hf_equissl.utils.suggestions import RecipeError
from hf_equissl.views.base import UNLABELLED
from hf_equissl.views.needs import Needs

from .helpers import FACTS, encode, make_views, random_features, run_processes, tiny_config, tiny_encoder

LABELS = Needs(labels=True)


def build(**kwargs) -> SupervisedObjective:
    torch.manual_seed(1)
    return SupervisedObjective(tiny_config(), facts=FACTS, **kwargs)


def reference(logits: np.ndarray, labels: list[int], smoothing: float) -> float:
    """Mean cross-entropy with loops, in float64, of views (V, B, C); images without a class are passed over."""
    total, count = 0.0, 0
    for view in logits:
        for row, label in zip(view, labels, strict=True):
            if label < 0:
                continue
            normaliser = math.log(sum(math.exp(value) for value in row))
            for c, value in enumerate(row):
                target = (1 - smoothing) * (c == label) + smoothing / len(row)
                total -= target * (value - normaliser)
            count += 1
    return total / count


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 0, 1], [0, UNLABELLED, 2, -1, 0, 1]])
def test_loss_equals_the_reference(smoothing, labels):
    config, views = tiny_config(), replace(make_views(LABELS), labels=torch.tensor(labels))
    objective, student = build(label_smoothing=smoothing), random_features(config, views)
    weight, bias = (p.detach().double().numpy() for p in objective.classifier.parameters())
    h = student.stem(student.tokens[:, :, 0], part="invariant").double().numpy()
    logits = h @ weight.T + bias
    output = objective(student, None, views)
    assert output.loss.item() == pytest.approx(reference(logits, labels, smoothing), rel=1e-5)
    hits = [view[b].argmax() == label for view in logits for b, label in enumerate(labels) if label >= 0]
    assert output.logs["accuracy"].item() == pytest.approx(np.mean(hits))


def test_gradient_of_the_logits_is_probability_less_target():
    views = make_views(LABELS)
    objective, student = build(), random_features(tiny_config(), views)
    objective(student, None, views).loss.backward()
    h = student.stem(student.tokens[:, :, 0], part="invariant")
    probabilities = objective.classifier(h).softmax(dim=-1)
    errors = probabilities - torch.nn.functional.one_hot(views.labels, 4)
    torch.testing.assert_close(objective.classifier.bias.grad, errors.mean(dim=(0, 1)))
    assert errors.abs().max() > 0.1


def test_images_that_join_the_usual_ones_have_their_classes_behind_them():
    views = make_views(LABELS)
    student = random_features(tiny_config(), views)
    plain = build()(student, None, views).loss
    student.joined = student.tokens[:, :2, 0]
    joined = replace(views, labels=torch.cat([views.labels, views.labels[:2]]))
    first = replace(views, labels=views.labels.masked_fill(torch.arange(6) > 1, UNLABELLED))
    student_of_two = build()(random_features(tiny_config(), views), None, first).loss
    torch.testing.assert_close(build()(student, None, joined).loss, (6 * plain + 2 * student_of_two) / 8)


def test_without_any_class_nothing_is_learnt_and_nothing_breaks():
    views = replace(make_views(LABELS), labels=torch.full((6,), UNLABELLED))
    objective, encoder = build(), tiny_encoder()
    output = objective(encode(encoder, views), None, views)
    output.loss.backward()
    assert output.loss == 0
    assert not objective.classifier.weight.grad.any()


def share_of_two(rank: int, processes: int) -> dict[str, torch.Tensor]:
    """Four labelled images on one process, one on the other; or all of them on one."""
    views = make_views(LABELS, batch=10)
    labels = views.labels.clone()
    labels[[4, 6, 7, 8, 9]] = UNLABELLED
    student = random_features(tiny_config(), views)
    objective = build()
    if processes == 2:
        part = slice(5 * rank, 5 * rank + 5)
        student.tokens, labels = student.tokens[:, part], labels[part]
    output = objective(student, None, replace(views, labels=labels))
    output.loss.backward()
    return {"loss": output.loss.detach(), "gradient": objective.classifier.weight.grad}


def test_every_labelled_image_weighs_alike_on_whatever_process(tmp_path):
    first, second = run_processes(share_of_two, tmp_path)
    for key, value in share_of_two(0, 1).items():
        torch.testing.assert_close((first[key] + second[key]) / 2, value)
        assert value.abs().max() > 0.01


def test_wrong_arguments_and_views_without_labels():
    assert build().needs == LABELS
    assert SupervisedObjective.reads_num_classes
    with pytest.raises(ValueError, match=r"`label_smoothing` is 1, expected a value in \[0, 1\)"):
        build(label_smoothing=1)
    views = make_views(Needs())
    with pytest.raises(ValueError, match="needs the class of every image, and the views have no labels"):
        build()(random_features(tiny_config(), views), None, views)


def test_data_without_classes_is_refused_before_the_first_step(photo_folder, tmp_path):
    objectives = {"invariance": {"name": "supervised"}}
    recipe = Recipe.from_dict({
        "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
                  "patch_size": 8},
        "objectives": objectives, "views": {"pipeline": {"name": "vicreg"}}, "data": {"source": str(photo_folder)},
        "training": {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True},
    })  # fmt: skip
    with pytest.raises(RecipeError, match=r"supervised needs the class of every image.*--data\.label_column"):
        prepare(recipe, tmp_path / "run")
