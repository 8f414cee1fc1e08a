from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_equissl.objectives.contrast import info_nce
from hf_equissl.objectives.moco_v3 import MoCoV3Objective
from hf_equissl.pretraining.model import EquiSSLForPreTraining, EquiSSLPreTrainingConfig
from hf_equissl.views.needs import Needs

from .helpers import encode, make_views, random_features, teacher_features, tiny_config, tiny_encoder

# What the battery builds it with.
SMALL = {"hidden_size": 16, "projection_size": 8}


def reference(queries: np.ndarray, keys: np.ndarray, temperature: float) -> float:
    """Eq. 1 times 2 tau with loops, in float64: row i of the keys is the one that query i looks for."""
    q, k = ([row / math.sqrt(float(row @ row)) for row in rows] for rows in (queries, keys))
    total = 0.0
    for i, query in enumerate(q):
        scores = [math.exp(float(query @ key) / temperature) for key in k]
        total -= math.log(scores[i] / sum(scores))
    return 2 * temperature * total / len(q)


def head(module: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    """A head in float64: linear layers, each normalised over the batch; then gain, bias and ReLU but at the end."""
    weights = [value.detach().double().numpy() for value in module.state_dict().values()]
    matrices, gains = [w for w in weights if w.ndim == 2], [w for w in weights if w.ndim == 1]
    for number, matrix in enumerate(matrices):
        x = x @ matrix.T
        x = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
        if number < len(matrices) - 1:
            x = np.maximum(x * gains[2 * number] + gains[2 * number + 1], 0)
    return x


def test_equals_the_reference_through_all_heads():
    config, views = tiny_config(), make_views(Needs())
    objective = MoCoV3Objective(config, **SMALL)
    for parameter in (*objective.projector.parameters(), *objective.teacher_projector.parameters()):
        parameter.data += 0.2 * torch.randn_like(parameter)  # they differ, and so do gains
    student, teacher = random_features(config, views, seed=1), random_features(config, views, seed=2)

    def rows(features) -> list[np.ndarray]:
        return [features.stem(tokens[:, 0], part="invariant").double().numpy() for tokens in features.tokens]

    queries = [head(objective.predictor, head(objective.projector, x)) for x in rows(student)]
    keys = [head(objective.teacher_projector, x) for x in rows(teacher)]
    expected = reference(queries[0], keys[1], 0.2) + reference(queries[1], keys[0], 0.2)
    output = objective(student, teacher, views)
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)
    objective.eval()  # as a teacher's head is: nothing changes
    assert objective(student, teacher, views).loss.item() == pytest.approx(expected, rel=1e-4)

    # Local crops, and images that join all crops, are queries of both keys; local crops are no keys.
    student.local_tokens = torch.randn(3, *student.tokens.shape[1:2], 1, config.hidden_size)
    student.joined, student.joined_local = torch.randn(2, 2, config.hidden_size), torch.randn(3, 2, config.hidden_size)
    teacher.joined = torch.randn(2, 2, config.hidden_size)
    objective.local_crops = True
    student_rows, teacher_rows = (
        [features.stem(cls, part="invariant").double().numpy() for cls in (*features.cls, *more)]
        for features, more in ((student, student.local_cls), (teacher, ()))
    )
    queries = [head(objective.predictor, head(objective.projector, x)) for x in student_rows]
    keys = [head(objective.teacher_projector, x) for x in teacher_rows]
    expected = sum(reference(q, k, 0.2) for i, q in enumerate(queries) for j, k in enumerate(keys) if i != j)
    assert objective.needs == Needs(teacher=True, local_crops=True)
    output = objective(student, teacher, views)
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)
    assert output.projections.shape == (2, views.batch_size + 2, 8)


def test_gradient_equals_central_differences_of_the_reference():
    rng = np.random.default_rng(0)
    queries, keys = rng.standard_normal((2, 5, 4))
    tensor = torch.tensor(queries, requires_grad=True)
    unit = torch.nn.functional.normalize(torch.tensor(keys), dim=1)
    info_nce(tensor, unit, 0.2)[0].backward()
    for entry in [(0, 0), (3, 2), (4, 3)]:
        step = np.zeros_like(queries)
        step[entry] = 1e-6
        difference = reference(queries + step, keys, 0.2) - reference(queries - step, keys, 0.2)
        assert tensor.grad[entry].item() == pytest.approx(difference / 2e-6, rel=1e-5)
        assert abs(tensor.grad[entry].item()) > 1e-3


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_known_values_and_the_scale_that_the_temperature_leaves(temperature):
    alike, _ = info_nce(torch.ones(6, 3), torch.ones(6, 3) / 3**0.5, temperature)
    assert alike.item() == pytest.approx(2 * temperature * math.log(6))
    # Where the keys are alike but for one, what a query is drawn with is 2 (1 - p): no 1 / tau is left of it.
    keys, queries = torch.eye(4), torch.eye(4).roll(1, 0).requires_grad_(True)  # each at another's key
    loss, accuracy = info_nce(queries, keys, temperature)
    loss.backward()
    drawn = 2 / 4 * (1 - 1 / (3 + math.exp(1 / temperature)))
    assert -queries.grad[torch.arange(4), torch.arange(4)] == pytest.approx([drawn] * 4, rel=1e-5)
    assert accuracy == 0


def test_what_learns_and_what_follows():
    config, views = tiny_config(), make_views(Needs(teacher=True))
    objective, encoder = MoCoV3Objective(config, **SMALL), tiny_encoder()
    objective(encode(encoder, views), teacher_features(objective.needs, views), views).loss.backward()
    assert all(parameter.grad is None for parameter in objective.teacher_projector.parameters())
    for parameter in (*objective.projector.parameters(), *objective.predictor.parameters()):
        assert parameter.grad.any()
    gradient = encoder.stem.weight.grad.abs().amax(dim=1)
    assert gradient[: config.invariant_size].min() > 0
    assert gradient[config.invariant_size :].max() == 0
    pairs = [(objective.projector, objective.teacher_projector)]
    assert list(objective.ema_pairs()) == pairs  # no predictor
    assert (objective.exports, list(objective.buffers())) == ("student", [])


def build(**invariance) -> EquiSSLForPreTraining:
    torch.manual_seed(0)
    encoder = tiny_config(hidden_size=48)
    return EquiSSLForPreTraining(
        EquiSSLPreTrainingConfig(encoder=encoder, invariance={"name": "moco_v3", **SMALL, **invariance})
    )


def test_xavier_initialisation_is_an_option_that_the_teacher_shares():
    plain, model = build(), build(xavier_init=True)
    block = model.student.encoder.layer[0]
    embeddings = model.student.embeddings
    bounds = {
        block.attention.attention.q_proj if hasattr(block.attention, "attention") else block.attention.q_proj: 96,
        block.mlp.fc1: 48 + 192,
        embeddings.patch_embeddings.projection: 3 * 8 * 8 + 48,
    }
    for module, fans in bounds.items():
        assert module.weight.abs().max().item() == pytest.approx(math.sqrt(6 / fans), rel=0.02)
        assert not module.bias.any()
    assert 0 < embeddings.cls_token.abs().max() < 1e-5
    assert all(torch.equal(value, model.teacher.state_dict()[key]) for key, value in model.student.state_dict().items())
    assert plain.student.embeddings.cls_token.abs().max() > 1e-3
    assert torch.equal(plain.student.stem.weight, model.student.stem.weight)


def test_defaults_are_those_of_the_paper():
    with torch.device("meta"):
        objective = MoCoV3Objective(tiny_config())
    sizes = [
        [m.out_features for m in module if isinstance(m, torch.nn.Linear)]
        for module in (objective.projector, objective.predictor)
    ]
    assert sizes == [[4096, 4096, 256], [4096, 256]]
    assert (objective.temperature, objective.xavier_init) == (0.2, False)
    assert objective.needs == Needs(teacher=True)


@pytest.mark.parametrize(
    ("crops", "batch", "message"),
    [(1, 4, "exactly 2"), (3, 4, "exactly 2"), (2, 1, "at least 2"), (2, 4, "no teacher")],
)
def test_wrong_batches_and_temperatures(crops, batch, message):
    views = make_views(Needs(), batch=batch, crops=crops)
    student = random_features(tiny_config(), views)
    with pytest.raises(ValueError, match=message):
        MoCoV3Objective(tiny_config(), **SMALL)(student, None if "teacher" in message else student, views)
    with pytest.raises(ValueError, match=r"`temperature` is 0, expected a value above 0"):
        MoCoV3Objective(tiny_config(), temperature=0)
