"""Two images at a time with what leads from one to the other: renders in the folders of 3DIEBench, and columns."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from scipy.spatial.transform import Rotation

from hf_equissl.data import ImageDecodeError, ImageSourceError, load_images
from hf_equissl.data.renders import relative_rotation
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running.run import build_training, prepare
from hf_equissl.utils.suggestions import RecipeError

from .image_files import encode, picture
from .render_objects import render_objects

QUATERNION = [f"rotation_{axis}" for axis in "xyzw"]
HUES = ["floor_hue", "light_hue"]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_objects(tmp_path_factory.mktemp("rendered") / "3diebench")


@pytest.fixture
def own(rendered: Path, tmp_path: Path) -> Path:
    """A copy that may be broken."""
    return shutil.copytree(rendered, tmp_path / "3diebench")


def recipe(source: Path | str, term: str | None = "sie", **changes: Any) -> Recipe:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    own = {"sie": {"expander_sizes": [8, 8], "append_one": False}}
    raw = {
        "model": {**sizes, "feature_size": 16, "equivariant_size": 8},
        "objectives": {
            "invariance": {"name": "vicreg", "expander_sizes": [8, 8]},
            "equivariance": [] if term is None else [{"name": term, **own.get(term, {})}],
        },
        "views": {"pipeline": {"name": "center"}, "transformation": {"name": "given", "parameters": QUATERNION + HUES}},
        "data": {"source": str(source)},
        "training": {"max_steps": 2, "use_cpu": True, "per_device_train_batch_size": 4, "save_strategy": "no"},
    }
    return Recipe.from_dict({key: {**value, **changes.get(key, {})} for key, value in raw.items()})


def test_rotations_are_those_of_scipy_with_their_sign() -> None:
    angles = np.random.default_rng(0).uniform(-np.pi / 2, np.pi / 2, (50, 2, 3))
    for first, second in angles:
        expected = (Rotation.from_euler("xyz", first).inv() * Rotation.from_euler("xyz", second)).as_quat()
        np.testing.assert_allclose(relative_rotation(first, second), expected, atol=1e-12)
    np.testing.assert_allclose(relative_rotation(angles[0, 0], angles[0, 0]), [0, 0, 0, 1], atol=1e-12)
    quarter = relative_rotation(np.zeros(3), np.array([0, 0, np.pi / 2]))
    np.testing.assert_allclose(quarter, [0, 0, 0.5**0.5, 0.5**0.5], atol=1e-12)


def test_an_item_is_two_renders_of_one_object_with_what_leads_from_one_to_the_other(rendered: Path) -> None:
    source = load_images(rendered)
    assert (len(source), source.num_classes) == (9, 3)
    assert source.pairs.parameter_names == (*QUATERNION, "floor_hue", "light_theta", "light_phi", "light_hue")
    seen = set()
    for seed in range(40):
        row = source.row(seed % 9)
        item = source.item(row, np.random.default_rng(seed))
        folder = rendered / Path(row["image"]).parent
        renders = [load_pixels(source, folder / f"image_{number}.jpg") for number in range(4)]
        numbers = tuple(next(n for n, r in enumerate(renders) if np.array_equal(r, image)) for image in item.images)
        first, second = (np.load(folder / f"latent_{number}.npy") for number in numbers)
        given = [item.parameters[name] for name in source.pairs.parameter_names]
        np.testing.assert_allclose(given, [*relative_rotation(first[:3], second[:3]), *(second - first)[3:]])
        assert item.label == int(row["image"].split("/")[0])
        seen.add(numbers)
    assert len(seen) == 12  # every ordered pair of different renders


def load_pixels(source: Any, path: Path) -> np.ndarray:
    return np.asarray(source.decode(path.read_bytes()))


def test_splits_subsets_and_single_images(rendered: Path) -> None:
    assert len(load_images(rendered, split="val")) == len(load_images(rendered, split="validation")) == 3
    part = load_images(rendered, split="train[:6]", subset={"share": 0.5, "stratified": True})
    assert sorted(part.label(part.row(n)) for n in range(3)) == [0, 1, 2]
    assert [info.width for info in part.check()] == [48] * 3  # probes see the first render of each object
    with pytest.raises(ImageSourceError, match=r"no split 'test'\. Splits: train, validation"):
        load_images(rendered, split="test")
    with pytest.raises(ImageSourceError, match="holds no rows"):
        load_images(rendered, split="train[:0]")
    with pytest.raises(ImageSourceError, match="Leave out streaming"):
        load_images(rendered, streaming=True)


def test_split_files_and_latents_may_be_npz(own: Path) -> None:
    for path in [own / "train_images.npy", own / "train_labels.npy", *own.glob("*/*/latent_2.npy")]:
        np.savez(path.with_suffix(".npz"), values=np.load(path))
        path.unlink()
    source = load_images(own)
    assert all(source.item(source.row(1), np.random.default_rng(seed)).parameters for seed in range(8))


def test_a_broken_render_spoils_the_pairs_that_hold_it_alone(own: Path) -> None:
    source = load_images(own)
    row = source.row(1)
    (own / row["image"]).write_bytes(b"broken")  # image_0.jpg, which names the object
    drawn = 0
    for seed in range(20):
        numbers = np.random.default_rng(seed).choice(4, size=2, replace=False)
        if 0 in numbers:
            with pytest.raises(ImageDecodeError):
                source.item(row, np.random.default_rng(seed))
        else:
            assert len(source.item(row, np.random.default_rng(seed)).images) == 2
            drawn += 1
    assert drawn
    (own / row["image"]).unlink()
    sound = next(seed for seed in range(20) if 0 not in np.random.default_rng(seed).choice(4, size=2, replace=False))
    assert source.item(row, np.random.default_rng(sound)).parameters


ABSENT = None
TWO = {"a": np.zeros(9, int), "b": np.zeros(9, int)}  # of an .npz file
FIRST = "00000000/train-0000"
BROKEN: list[tuple[str, Any, str]] = [
    ("train_images", np.array([{"a": 1}] * 9), r"train_images\.npy: cannot be read as an array .*pickle"),
    (f"{FIRST}/latent_3", np.array([None]), r"latent_3\.npy: cannot be read as an array .*pickle"),
    ("train_labels", b"\x93NUMPY", r"train_labels\.npy: cannot be read as an array"),
    ("train_labels", TWO, r"train_labels\.npz: holds 2 arrays, expected one"),
    ("train_labels", np.zeros(4, int), r"int64 of shape \(4,\), expected a class .* 9 objects"),
    ("train_labels", np.full(9, -1), "expected a class from 0 on"),
    ("train_images", np.zeros(9), "holds float64 .*expected the folders of objects"),
    ("train_images", np.array(["/a/../../b/"] * 9), "leads out of the folder"),
    ("train_images", np.array(["/a/b/"] * 9), "holds 0 renders, expected at least"),
    (f"{FIRST}/latent_1", ABSENT, r"image_1\.jpg has no latents"),
    (f"{FIRST}/latent_1", np.zeros(9), r"shape \(9,\), expected 7 finite numbers"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_broken_folders_say_what_is_wrong(own: Path, name: str, content: Any, message: str) -> None:
    path = own / f"{name}.npy"
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path.with_suffix(".npz"), **content)
    elif content is not ABSENT:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(RecipeError, match=f"data: .*{message}"):
        prepare(recipe(own), None, dry=True)


def test_a_later_object_that_is_broken_is_a_bad_image(own: Path) -> None:
    for path in own.glob("*/train-0004/latent_*"):
        path.write_bytes(b"nothing")
    source = load_images(own)
    with pytest.raises(ImageDecodeError, match=r"train-0004/latent_\d\.npy: cannot be read"):
        source.item(source.row(4), np.random.default_rng(0))


def table(count: int = 6) -> Dataset:
    rows = {
        "before": [{"bytes": encode(picture(n)), "path": None} for n in range(count)],
        "after": [{"bytes": encode(picture(n + 50)), "path": None} for n in range(count)],
        "angle": [10.0 * n for n in range(count)],
        "latent": [[n / 10, -n / 10] for n in range(count)],
        "note": ["a"] * count,
    }
    features = {"before": Image(), "after": Image(), "angle": Value("float32"), "latent": List(Value("float64"))}
    return Dataset.from_dict(rows, features=Features(**features, note=Value("string")))


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("columns") / "pairs.parquet"
    table().to_parquet(path)
    return str(path)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


PAIRS = {"second_column": "after", "parameter_columns": ["angle", "latent"]}


@pytest.mark.parametrize("streaming", [False, True])
def test_two_image_columns_and_columns_of_numbers_come_through_the_same_door(columns: str, streaming: bool) -> None:
    source = load_images(columns, streaming=streaming, **PAIRS)
    assert source.image_column == "before"  # the only one that is left
    assert source.pairs.parameter_names == ("angle", "latent_0", "latent_1")
    for n, row in enumerate(source.dataset):
        item = source.item(row, np.random.default_rng(0))
        assert list(item.parameters.values()) == pytest.approx([10 * n, n / 10, -n / 10])
        for image, number in zip(item.images, (n, n + 50), strict=True):
            assert np.array_equal(np.asarray(image), load_bytes(source, encode(picture(number))))


def load_bytes(source: Any, content: bytes) -> np.ndarray:
    return np.asarray(source.decode(content))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameter_columns": ["angle"]}, "no second_column is named"),
        (
            {"second_column": "after", "parameter_columns": ["note"]},
            "parameter column 'note' is string, expected numbers",
        ),
        ({"second_column": "after", "parameter_columns": ["angel"]}, "no column for angel"),
        ({"second_column": "behind"}, "no column for second image, such as behind"),
    ],
)
def test_wrong_columns(columns: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_images(columns, **options)


@pytest.mark.parametrize("broken", [{"latent": [0.5]}, {"latent": None}, {"angle": None}, {"angle": float("nan")}])
def test_a_row_without_its_numbers_is_a_bad_image(columns: str, broken: dict[str, Any]) -> None:
    source = load_images(columns, **PAIRS)
    with pytest.raises(ImageDecodeError, match=r"expected \d finite numbers"):
        source.item(source.row(0) | broken, np.random.default_rng(0))


@pytest.mark.parametrize("streaming", [False, True])
def test_views_are_both_images_and_theta_is_what_is_named(columns: str, streaming: bool) -> None:
    given = {"name": "given", "parameters": ["latent_1", "angle"], "ranges": [[-1, 1], [0, 50]]}
    views, data = {"transformation": given}, {**PAIRS, "streaming": streaming, "shuffle_buffer": 0}
    run = prepare(recipe(columns, views=views, data=data), None, dry=True)
    assert tuple(run.config.facts["parameter_names"]) == ("latent_1", "angle")
    first, last = run.first.global_crops
    assert not np.allclose(first, last)
    theta = [[-n / 10, (10 * n - 25) / 25] for n in range(6)]
    np.testing.assert_allclose(run.first.normalized_parameters, theta, rtol=1e-5)


def test_sie_trains_on_quaternions_and_hues_and_others_on_pairs_alone(rendered: Path, tmp_path: Path) -> None:
    for term, transformation in (("sie", "given"), ("cross_attention_reconstruction", "given"), (None, None)):
        views = {} if transformation else {"transformation": None}
        model, trainer = build_training(prepare(recipe(rendered, term, views=views), tmp_path / str(term), dry=True))
        trainer.train()
        assert np.isfinite([log["loss"] for log in trainer.state.log_history if "loss" in log]).all()
        if term == "sie":
            assert model.equivariance[0].predictor.maps.in_features == 6 * 8  # no constant: quaternions are never 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"source": "photos"}}, "has single images. Name the columns with data.second_column"),
        ({"views": {"transformation": {"name": "given", "parameters": ["w"]}}}, "does not tell w of its pairs"),
        ({"views": {"transformation": {"name": "rotation"}}}, "sie is told how two views of one image were made"),
        (
            {
                "views": {"pipeline": {"name": "vicreg"}, "transformation": None},
                "objectives": {"equivariance": [{"name": "augself"}]},
            },
            "augself is told how two views of one image were made, and .* has pairs of images",
        ),
        ({"objectives": {"equivariance": [{"name": "reconstruction"}]}}, "no path from the identity to g"),
    ],
)  # fmt: skip
def test_data_that_does_not_tell_is_refused_before_the_first_step(
    changes: dict[str, Any], message: str, rendered: Path, photo_folder: Path
) -> None:
    if changes.get("data"):
        changes = {"data": {"source": str(photo_folder)}}
    with pytest.raises(RecipeError, match=message):
        prepare(recipe(rendered, **changes), None, dry=True)
