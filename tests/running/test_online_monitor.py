"""The online monitor: right numbers, the same weights as without it, and an alarm when representations collapse."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import set_seed

from hf_equissl.data import ImageViewDataset, load_images
from hf_equissl.encoders import FrozenEncoder
from hf_equissl.encoders.base_image import base_image
from hf_equissl.evaluation import ImageSet
from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel
from hf_equissl.pretraining.arguments import EquiSSLTrainingArguments
from hf_equissl.pretraining.model import EquiSSLForPreTraining, EquiSSLPreTrainingConfig
from hf_equissl.pretraining.trainer import EquiSSLTrainer
from hf_equissl.recipes.monitor_settings import MonitorSettings
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running import online_monitor
from hf_equissl.running.online_monitor import OnlineMonitor, build_monitor, load_monitor_images, load_records
from hf_equissl.running.run import prepare, pretrain
from hf_equissl.utils.feature_statistics import effective_rank, feature_std
from hf_equissl.utils.suggestions import RecipeError
from hf_equissl.views.pipelines import build_pipeline
from tests.objectives.helpers import run_processes

CLASSES, SIZE = 4, 16
ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 4,
    "feature_size": 32,
    "equivariant_size": 16,
    "drop_path_rate": 0.1,  # draws from the global generator, which the monitor must leave alone
}
NORMALISATION = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
SETTINGS = MonitorSettings(every_steps=2, train_images=48, test_images=16, neighbours=3)
LOGGER = "hf_equissl.running.online_monitor"


def picture(rng: np.random.Generator, label: int) -> Image.Image:
    """A coloured ramp whose direction is its class, with noise."""
    y, x = np.mgrid[0:20, 0:20] / 20
    ramp = (x, y, 1 - x, 1 - y)[label][..., None] * rng.uniform(80, 200, 3) + rng.uniform(0, 40, 3)
    return Image.fromarray((ramp + rng.uniform(0, 15, (20, 20, 3))).astype(np.uint8))


@pytest.fixture(autouse=True)
def _no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without matplotlib, which takes most of a measurement here; ``plots`` asks for it."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr(online_monitor, "find_spec", lambda name: None)


@pytest.fixture
def plots() -> None:
    pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 images in four class folders."""
    folder, rng = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for number in range(64):
        path = folder / str(number % CLASSES) / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        picture(rng, number % CLASSES).save(path)
    return folder


def make_model(**invariance: Any) -> EquiSSLForPreTraining:
    set_seed(0)
    head = {"expander_sizes": [32, 32]} if invariance.get("name", "vicreg") == "vicreg" else {}
    head = {"name": "vicreg", **head, **invariance}
    return EquiSSLForPreTraining(EquiSSLPreTrainingConfig(encoder=EquiSSLConfig(**ENCODER), invariance=head))


def make_monitor(source: Path, settings: MonitorSettings = SETTINGS) -> OnlineMonitor:
    images = load_monitor_images(settings, load_images(str(source)), {"source": str(source)})
    return OnlineMonitor(settings, images, **NORMALISATION)


def make_trainer(
    source: Path,
    output: Path,
    settings: MonitorSettings | None,
    arguments: dict[str, Any] | None = None,
    **invariance: Any,
) -> EquiSSLTrainer:
    model = make_model(**invariance)
    pipeline = build_pipeline("vicreg", image_size=SIZE, transformation=None, needs=model.needs, **NORMALISATION)
    defaults = {
        "output_dir": str(output),
        "per_device_train_batch_size": 16,
        "max_steps": 5,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    args = EquiSSLTrainingArguments(**{**defaults, **(arguments or {})})
    dataset = ImageViewDataset(load_images(str(source)), pipeline, seed=0)
    trainer = EquiSSLTrainer(model=model, args=args, pipeline=pipeline, train_dataset=dataset)
    if settings is not None:
        monitor = make_monitor(source, settings)
        monitor.log = trainer.log
        trainer.add_callback(monitor)
    return trainer


def monitored(trainer: EquiSSLTrainer) -> list[dict[str, float]]:
    """Log entries of the monitor, without the time that they took."""
    entries = [log for log in trainer.state.log_history if "monitor/effective_rank" in log]
    return [{key: value for key, value in log.items() if key != "monitor/seconds"} for log in entries]


# ---- numbers ----


def test_numbers_equal_a_slow_reference(labelled: Path) -> None:
    encoder = make_model().student
    monitor = make_monitor(labelled)
    monitor.decode(SIZE)
    frozen = FrozenEncoder(encoder, batch_size=7, **NORMALISATION)
    measured = monitor.measure(frozen)

    source = load_images(str(labelled))
    rows = [source.row(index) for index in range(64)]
    paths = [source.item_name(row, index) for index, row in enumerate(rows)]
    pixels = torch.stack([base_image(Image.open(path), SIZE) for path in paths]).float() / 255
    with torch.no_grad():
        features = encoder.eval()((pixels - 0.5) / 0.25).last_hidden_state[:, 0].double()
    labels = torch.tensor([row[source.label_column] for row in rows])
    queries = monitor._is_query
    assert int(queries.sum()) == 16
    unit = features / features.norm(dim=1, keepdim=True)
    hits = 0
    for row in queries.nonzero().flatten().tolist():
        similarity = (unit @ unit[row]).masked_fill(queries, -2)  # neighbours come from the bank alone
        votes = torch.zeros(CLASSES, dtype=torch.float64)
        for neighbour in similarity.topk(3).indices.tolist():
            votes[labels[neighbour]] += math.exp(similarity[neighbour] / 0.07)
        hits += int(votes.argmax() == labels[row])
    assert measured["monitor/knn_top1"] == pytest.approx(hits / 16)
    assert hits > 4  # a reference that never hits would agree with anything broken
    assert measured["monitor/effective_rank"] == pytest.approx(effective_rank(features[~queries]).item(), rel=1e-4)
    assert measured["monitor/feature_std"] == pytest.approx(feature_std(features[~queries]).item(), rel=1e-4)
    assert monitor.measure(frozen) == measured


def test_labels_that_are_wrong_give_chance(labelled: Path) -> None:
    """Accuracy follows from the labels: those of the directions are found on pixels, shuffled ones are not."""
    right, wrong = make_monitor(labelled), make_monitor(labelled)
    wrong._labels = wrong._labels[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    frozen = FrozenEncoder(make_model().student, **NORMALISATION)
    accuracies = []
    for monitor in (right, wrong):
        monitor.decode(SIZE)
        accuracies.append(monitor.measure(frozen)["monitor/knn_top1"])
    assert accuracies[0] > 0.6 > accuracies[1]


def test_the_teacher_is_measured_where_there_is_one(labelled: Path, tmp_path: Path) -> None:
    model = make_model(name="dino", num_prototypes=8, head_hidden_size=8, bottleneck_size=4)
    for parameter in model.teacher.parameters():
        parameter.data.normal_(std=0.5)
    encoder, role = online_monitor._find_exported(model)
    assert role == "teacher"
    exported, pixels = model.export_encoder(), torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(exported(pixels).pooler_output, encoder.eval()(pixels).pooler_output)
    assert online_monitor._find_exported(make_model())[1] == "student"


def _of_a_process(rank: int, processes: int, folder: str) -> dict[str, float]:
    monitor = make_monitor(Path(folder), MonitorSettings(every_steps=1, train_images=40, test_images=13, neighbours=3))
    monitor.decode(SIZE)
    measured = monitor.measure(FrozenEncoder(make_model().student, **NORMALISATION))
    return {"bytes": monitor._images.num_bytes, **measured}  # type: ignore[union-attr]


def test_processes_share_the_images_and_agree_with_one(labelled: Path, tmp_path: Path) -> None:
    """53 images do not divide by two: one process pads its share."""
    one = _of_a_process(0, 1, str(labelled))
    two = run_processes(_of_a_process, tmp_path, str(labelled))
    assert [result.pop("bytes") for result in (one, *two)] == [n * 3 * SIZE * SIZE for n in (53, 27, 26)]
    assert two[0] == two[1]
    assert two[0] == pytest.approx(one, rel=1e-4)


# ---- nothing else changes ----


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_weights_are_bit_for_bit_those_without(labelled: Path, tmp_path: Path, precision: dict[str, bool]) -> None:
    plain = make_trainer(labelled, tmp_path / "plain", None, precision)
    plain.train()
    watched = make_trainer(labelled, tmp_path / "watched", MonitorSettings(every_steps=1, test_images=10), precision)
    watched.train()
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[key]), key
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (plain, watched)]
    assert len(losses[0]) == 5  # steps with a measurement still log their losses
    assert losses[0] == losses[1]
    assert [log["step"] for log in monitored(watched)] == [0, 1, 2, 3, 4, 5]


class RestlessEncoder(EquiSSLModel):
    """Draws numbers in evaluation mode, too."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        torch.rand(3), np.random.rand(3)  # noqa: NPY002
        return super().forward(*args, **kwargs)


def test_random_states_and_training_mode_are_restored(labelled: Path, tmp_path: Path) -> None:
    trainer = make_trainer(labelled, tmp_path, None)
    model = trainer.model.train()
    model.student.__class__ = RestlessEncoder
    monitor = make_monitor(labelled)
    monitor.decode(SIZE)
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    monitor.on_step_end(trainer.args, _state(2), trainer.control, model=model)
    assert len(monitor.records) == 1
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def _state(step: int, max_steps: int = 100) -> Any:
    from transformers import TrainerState

    return TrainerState(global_step=step, max_steps=max_steps)


# ---- schedule and files ----


def test_schedule_log_and_files(labelled: Path, tmp_path: Path, plots: None) -> None:
    trainer = make_trainer(labelled, tmp_path, SETTINGS)
    trainer.train()
    logs = monitored(trainer)
    assert [log["step"] for log in logs] == [0, 2, 4, 5]  # every two steps, and the last
    records = load_records(tmp_path)
    assert [{**r, "monitor/seconds": 0, "collapsing": 0, "encoder": 0, "epoch": 0} for r in records] == [
        {**log, "monitor/seconds": 0, "collapsing": 0, "encoder": 0, "epoch": 0} for log in logs
    ]
    assert all(record["encoder"] == "student" and record["monitor/seconds"] > 0 for record in records)
    with Image.open(tmp_path / "monitor.png") as plot:
        assert plot.width > 3 * plot.height  # three panels
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_without_matplotlib_there_is_no_plot(labelled: Path, tmp_path: Path) -> None:
    settings = MonitorSettings(every_steps=3, evaluate_at_start=False)
    make_trainer(labelled, tmp_path, settings, {"max_steps": 3}).train()
    assert [record["step"] for record in load_records(tmp_path)] == [3]
    assert not (tmp_path / "monitor.png").exists()


def test_a_resumed_run_has_the_records_of_the_unbroken_one(labelled: Path, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(labelled, tmp_path, SETTINGS, saving)
    whole.train()
    unbroken = load_records(tmp_path)
    resumed = make_trainer(labelled, tmp_path, SETTINGS, saving)  # steps 4 and 5 stand in the file already
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert monitored(resumed) == monitored(whole)
    again = load_records(tmp_path)
    for record in (*unbroken, *again):
        record.pop("monitor/seconds")
    assert again == unbroken


# ---- collapse ----

COLLAPSE = {"max_steps": 12, "learning_rate": 1e-2, "logging_steps": 12, "warmup_steps": 2}
WATCH = MonitorSettings(every_steps=4, train_images=48, test_images=16)


def test_collapse_is_seen_while_it_happens(labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without variance and covariance terms, and without BatchNorm in the expander, the best solution is a point."""
    setting = {"variance_weight": 0.0, "covariance_weight": 0.0, "expander_sizes": [32]}
    broken = make_trainer(labelled, tmp_path, WATCH, COLLAPSE, **setting)
    with caplog.at_level(logging.WARNING, LOGGER):
        broken.train()
    ranks = [log["monitor/effective_rank"] for log in monitored(broken)]
    assert ranks[-1] < 1.3 < 4 < ranks[0]
    said = [record.getMessage() for record in caplog.records if "collapsing" in record.getMessage()]
    assert len(said) == 1  # once, not at every measurement
    first = next(record for record in load_records(tmp_path) if record["collapsing"])
    assert first["step"] < 12  # the run still goes on
    assert said[0].startswith(f"Step {first['step']}: the representations are collapsing")
    assert "lower learning rate" in said[0]


def test_a_sound_run_gives_no_alarm(labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sound = make_trainer(labelled, tmp_path, WATCH, {**COLLAPSE, "learning_rate": 1e-3})
    with caplog.at_level(logging.WARNING, LOGGER):
        sound.train()
    assert not caplog.records
    assert not any(record["collapsing"] for record in load_records(tmp_path))


@pytest.mark.parametrize(
    ("ranks", "alarms"),
    [
        ([1.5, 2.5, 1.8], [False, False, False]),  # never was better: nothing fell
        ([None, 1.2, 1.1], [False, True, True]),  # low when it is first looked at
        ([40.0, 5.0, 3.9, 3.0, 20.0, 2.5], [False, False, True, True, False, True]),
        ([8.0, 2.1, 1.9], [False, False, True]),
        ([8.0, math.nan, 7.0], [False, False, False]),
    ],
)
def test_when_the_alarm_sounds(
    labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, ranks: list[float | None], alarms: list[bool]
) -> None:
    monitor = make_monitor(labelled)
    with caplog.at_level(logging.WARNING, LOGGER):
        for step, value in enumerate(ranks):
            if value is None:
                continue
            record = {"step": step, "encoder": "student", "monitor/effective_rank": value, "monitor/feature_std": 0.1}
            monitor._remember(record, tmp_path)
    seen = [alarm for alarm, value in zip(alarms, ranks, strict=True) if value is not None]
    assert [record["collapsing"] for record in load_records(tmp_path)] == seen
    onsets = sum(now and not before for before, now in zip([False, *alarms], alarms, strict=False))
    assert len(caplog.records) == onsets


def test_features_that_are_not_finite_are_recorded_and_left_to_the_trainer(labelled: Path, tmp_path: Path) -> None:
    trainer = make_trainer(labelled, tmp_path, None)
    next(trainer.model.student.parameters()).data.fill_(math.nan)
    monitor = make_monitor(labelled)
    monitor.decode(SIZE)
    monitor.on_step_end(trainer.args, _state(4), trainer.control, model=trainer.model)
    written = json.loads((tmp_path / "monitor.jsonl").read_text())
    assert written["monitor/effective_rank"] is None
    assert written["monitor/knn_top1"] is None
    assert math.isnan(load_records(tmp_path)[0]["monitor/feature_std"])


# ---- images ----


def test_without_labels_only_rank_and_std(photo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, LOGGER):
        trainer = make_trainer(photo_folder, tmp_path, MonitorSettings(every_steps=1), {"max_steps": 2})
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "no labels" in record.getMessage()]
    assert len(said) == 1
    assert "monitor.source" in said[0]
    for log in monitored(trainer):
        assert "monitor/knn_top1" not in log
        assert log["monitor/effective_rank"] > 1
        assert log["monitor/feature_std"] > 0


def test_images_of_another_source(labelled: Path, photo_folder: Path) -> None:
    """Training images without labels, monitor images with them."""
    settings = MonitorSettings(every_steps=1, source=str(labelled), train_images=20, test_images=10)
    images = load_monitor_images(settings, load_images(str(photo_folder)), {"source": str(photo_folder)})
    assert len(images) == 30
    assert images.labels is not None
    assert len(set(images.labels.tolist())) == CLASSES


def test_another_split_of_the_training_data(labelled: Path) -> None:
    settings = MonitorSettings(every_steps=1, split="train[:50%]")
    images = load_monitor_images(settings, load_images(str(labelled)), {"source": str(labelled), "split": "train"})
    assert len(images) == 32


def test_small_data_is_divided_in_the_same_ratio() -> None:
    arrays = list(np.random.default_rng(0).integers(0, 255, (12, 8, 8, 3), dtype=np.uint8))
    images = ImageSet(arrays, torch.arange(12) % 2, progress=False)
    monitor = OnlineMonitor(MonitorSettings(every_steps=1, train_images=200, test_images=100), images, **NORMALISATION)
    assert int(monitor._is_query.sum()) == 4


def test_too_few_images_and_absent_ones(labelled: Path, tmp_path: Path) -> None:
    for number in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    training = load_images(str(labelled))
    with pytest.raises(ValueError, match="has 2 image"):
        load_monitor_images(MonitorSettings(every_steps=1, source=str(tmp_path)), training, {})
    with pytest.raises(ValueError, match="nowhere"):
        load_monitor_images(MonitorSettings(every_steps=1, source=str(tmp_path / "nowhere")), training, {})


def test_a_bad_file_is_left_out(labelled: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for number in range(9):
        picture(rng, 0).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    monitor = make_monitor(tmp_path, MonitorSettings(every_steps=1, train_images=9, test_images=0))
    monitor.decode(SIZE)
    rows, features = monitor._images.features(FrozenEncoder(make_model().student, **NORMALISATION))  # type: ignore[union-attr]
    assert rows.tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert features.shape == (8, 32)


def test_a_stream_gives_its_first_images(shared_data: Path) -> None:
    settings = MonitorSettings(every_steps=1, train_images=30, test_images=10)
    stream = load_images(str(shared_data / "cifar10"), streaming=True)
    monitor = OnlineMonitor(settings, load_monitor_images(settings, stream, {}), **NORMALISATION)
    monitor.decode(SIZE)
    assert 0 <= monitor.measure(FrozenEncoder(make_model().student, **NORMALISATION))["monitor/knn_top1"] <= 1


def test_sharded_weights_are_not_measured(labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(labelled, tmp_path, None)
    next(trainer.model.student.parameters()).ds_shape = (1,)
    monitor = make_monitor(labelled)
    with caplog.at_level(logging.WARNING, LOGGER):
        monitor.on_train_begin(trainer.args, _state(0), trainer.control, model=trainer.model)
    monitor.on_step_end(trainer.args, _state(2), trainer.control, model=trainer.model)
    assert "sharded" in caplog.text
    assert not load_records(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"every_steps": 0}, "every_steps must be at least 1, got 0"),
        ({"train_images": 1}, "train_images must be at least 2"),
        ({"neighbours": 0}, "neighbours must be at least 1"),
        ({"label_column": "fine"}, "Name monitor.source, or set data.label_column"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MonitorSettings(**values)


def test_half_precision_of_a_run() -> None:
    args = EquiSSLTrainingArguments(output_dir="unused", bf16=True)
    assert args.precision == "bf16"
    model, pixels = make_model().student.eval(), torch.randn(4, 3, SIZE, SIZE)
    exact, rough = (FrozenEncoder(model, precision=kind).features(pixels)["cls"] for kind in ("fp32", "fp16"))
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, rtol=0.02, atol=0.02)


# ---- recipes and the command ----

RECIPE = Path(__file__).resolve().parents[2] / "training" / "recipes" / "cifar10_vicreg.yaml"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"monitor.every_step": 5}, "monitor: unknown key 'every_step'. Did you mean 'every_steps'"),
        ({"monitor.every_steps": "5"}, "monitor.every_steps: expected an integer or null"),
        ({"monitor.every_steps": 0}, "monitor: every_steps must be at least 1"),
    ],
)
def test_a_recipe_is_read_strictly(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.load(RECIPE, values)


def test_a_recipe_switches_it_on(labelled: Path) -> None:
    source = load_images(str(labelled))
    assert build_monitor(Recipe.load(RECIPE), source) is None
    assert "monitor" not in Recipe.load(RECIPE).to_dict()
    recipe = Recipe.load(RECIPE, {"monitor.every_steps": 5, "monitor.train_images": 40, "monitor.test_images": 10})
    assert Recipe.from_dict(recipe.to_dict()).monitor == recipe.monitor
    monitor = build_monitor(recipe, source)
    assert monitor is not None
    assert len(monitor._is_query) == 50
    lost = Recipe.load(RECIPE, {"monitor.every_steps": 5, "monitor.split": "holiday", "data.source": str(labelled)})
    with pytest.raises(RecipeError, match=r"monitor: .*holiday"):
        build_monitor(lost, source)


def test_the_command_runs_it(labelled: Path, tmp_path: Path) -> None:
    small = {"model.hidden_size": 32, "model.num_hidden_layers": 1, "objectives.invariance.expander_sizes": [32]}
    small |= {"training.per_device_train_batch_size": 16, "training.max_steps": 2, "training.warmup_steps": 1}
    recipe = Recipe.load(RECIPE, {**small, "data.source": str(labelled), "monitor.every_steps": 1})
    run = prepare(recipe, tmp_path)
    pretrain(run)
    assert [record["step"] for record in load_records(tmp_path)] == [0, 1, 2]
    assert (tmp_path / "recipe.yaml").read_text().count("every_steps: 1") == 1
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert [log["step"] for log in state["log_history"] if "monitor/knn_top1" in log] == [0, 1, 2]
