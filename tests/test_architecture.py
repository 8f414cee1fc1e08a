"""Who may import whom, what the wheel holds, and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hf_equissl
from tests import processes

ROOT = Path(__file__).resolve().parent.parent
# From the ground up: a room may import rooms of earlier floors, never of its own floor or a later one.
FLOORS = (
    ("modeling",),
    ("utils", "distributed"),
    ("views", "encoders", "checkpoints"),
    ("data", "objectives"),
    ("pretraining", "evaluation"),
    ("recipes", "hub"),
    ("planning", "extraction", "demo"),
    ("running",),
    ("finetuning", "benchmarking"),
    ("training",),
    ("console",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# The arrows that there are. A new one is added here, on purpose, by whoever draws it.
ARROWS: dict[str, set[str]] = {
    "modeling": set(),
    "utils": set(),
    "distributed": set(),
    "views": {"utils"},
    "encoders": {"modeling", "utils"},
    "checkpoints": {"distributed", "utils"},
    "data": {"distributed", "utils", "views"},
    "objectives": {"distributed", "modeling", "utils", "views"},
    "pretraining": {"checkpoints", "data", "distributed", "modeling", "objectives", "utils", "views"},
    "evaluation": {"data", "distributed", "encoders", "utils", "views"},
    "recipes": {"data", "modeling", "objectives", "pretraining", "utils", "views"},
    "hub": {"checkpoints", "encoders", "evaluation", "modeling", "objectives", "pretraining", "utils"},
    "planning": {"distributed", "objectives", "pretraining", "recipes", "utils", "views"},
    "extraction": {"data", "encoders", "evaluation", "hub", "utils"},
    "demo": {"data", "encoders", "evaluation", "utils", "views"},
    "running": {
        "checkpoints",
        "data",
        "distributed",
        "encoders",
        "evaluation",
        "hub",
        "modeling",
        "objectives",
        "planning",
        "pretraining",
        "recipes",
        "utils",
        "views",
    },
    "finetuning": {
        "checkpoints",
        "data",
        "distributed",
        "encoders",
        "evaluation",
        "hub",
        "modeling",
        "planning",
        "pretraining",
        "running",
        "utils",
        "views",
    },
    "benchmarking": {
        "encoders",
        "modeling",
        "data",
        "distributed",
        "evaluation",
        "objectives",
        "planning",
        "pretraining",
        "recipes",
        "running",
        "utils",
        "views",
    },
    "console": {"benchmarking", "recipes", "training", "utils"},
    "training": {
        "benchmarking",
        "checkpoints",
        "data",
        "distributed",
        "encoders",
        "evaluation",
        "extraction",
        "finetuning",
        "hub",
        "planning",
        "pretraining",
        "recipes",
        "running",
        "utils",
        "views",
    },
}
# Python files at the top of hf_equissl/, which export names, register classes and start the command: everything
# else has a room.
TOP_LEVEL = {"__init__.py", "__main__.py", "auto_classes.py"}


def imported_rooms(path: Path) -> set[str]:
    """Rooms of this package that a file imports, at the top, in functions and for types alike."""
    package = ("hf_equissl", *path.relative_to(ROOT).parts[:-1])
    if path.relative_to(ROOT).parts[0] == "hf_equissl":
        package = path.relative_to(ROOT).parts[:-1]
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("hf_equissl.")}
    return rooms


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] != "hf_equissl" else parts[1]


def library_files() -> list[Path]:
    folders = (ROOT / "hf_equissl", ROOT / "modeling", ROOT / "training")
    return sorted(path for folder in folders for path in folder.rglob("*.py") if path.parent != ROOT / "hf_equissl")


@pytest.fixture(scope="module")
def drawn() -> dict[str, dict[str, str]]:
    """Room -> each room that it imports, with one file that does."""
    arrows: dict[str, dict[str, str]] = {}
    for path in library_files():
        room = arrows.setdefault(room_of(path), {})
        room.update({other: str(path.relative_to(ROOT)) for other in imported_rooms(path) - {room_of(path)}})
    return arrows


def test_only_these_files_lie_at_the_top() -> None:
    assert {path.name for path in (ROOT / "hf_equissl").glob("*.py")} == TOP_LEVEL


def test_every_room_has_a_floor(drawn: dict[str, dict[str, str]]) -> None:
    assert drawn.keys() == FLOOR_OF.keys() == ARROWS.keys()


def test_arrows_are_those_listed(drawn: dict[str, dict[str, str]]) -> None:
    for room, others in drawn.items():
        new = {other: path for other, path in others.items() if other not in ARROWS[room]}
        assert not new, f"{room} imports {new}: list the arrow, or turn it round"
        assert not ARROWS[room] - others.keys(), f"{room} no longer imports {ARROWS[room] - others.keys()}"


def test_no_arrow_runs_back(drawn: dict[str, dict[str, str]]) -> None:
    """To an earlier floor only: with that, no circle is possible."""
    back = [
        f"{path}: {room} -> {other}"
        for room, others in drawn.items()
        for other, path in others.items()
        if FLOOR_OF[other] >= FLOOR_OF[room]
    ]
    assert not back


def test_a_back_arrow_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_architecture.ROOT", tmp_path)
    path = tmp_path / "hf_equissl" / "views" / "wrong.py"
    path.parent.mkdir(parents=True)
    path.write_text("def lazily():\n    from ..pretraining import trainer\n    import hf_equissl.hub.push\n")
    assert imported_rooms(path) == {"pretraining", "hub"}


def test_the_package_imports_itself_in_one_way() -> None:
    """Relative inside the package; scripts, which are launched by path, name it."""
    for path in library_files():
        launched = ROOT / "training" in path.parents
        for node in ast.walk(ast.parse(path.read_text())):
            absolute = isinstance(node, ast.ImportFrom) and not node.level and node.module.startswith("hf_equissl")
            assert launched or not absolute, f"{path.relative_to(ROOT)}, line {node.lineno}"


def test_modeling_imports_only_what_every_user_has() -> None:
    allowed = {"torch", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names)
    for path in (ROOT / "modeling").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (node.level == 0 and node.module.split(".")[0] in allowed), path.name


def test_every_package_is_in_the_wheel() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "hf_equissl").rglob("*.py")}
    names = {".".join(folder.parts) for folder in folders} | {"hf_equissl.model_cards"}  # code beside weights is data
    for folder in ("modeling", "training"):
        names |= {".".join(("hf_equissl", *p.parent.relative_to(ROOT).parts)) for p in (ROOT / folder).rglob("*.py")}
    assert names == listed


def test_scripts_shadow_no_library() -> None:
    """A launched script has training/ first on its import path."""
    names = {path.stem for path in (ROOT / "training").iterdir()} - {"__init__", "__pycache__"}
    libraries = {"accelerate", "datasets", "deepspeed", "evaluate", "peft", "torch", "transformers"}
    assert not names & (libraries | set(sys.stdlib_module_names))


def test_import_is_light() -> None:
    """``import hf_equissl`` loads neither torch's nor transformers' heavy parts; both come with the first use."""
    heavy = ("torch", "transformers", "datasets", "numpy")
    code = f"import sys, hf_equissl; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_public_names_exist() -> None:
    expected = {
        "EVALUATORS",
        "EQUIVARIANCE_OBJECTIVES",
        "EquiSSLBackbone",
        "EquiSSLConfig",
        "EquiSSLForImageClassification",
        "EquiSSLForPreTraining",
        "EquiSSLModel",
        "EquiSSLPreTrainingConfig",
        "EquiSSLTrainer",
        "EquiSSLTrainingArguments",
        "INVARIANCE_OBJECTIVES",
        "PIPELINES",
        "Recipe",
        "TRANSFORMATIONS",
        "__version__",
        "load_images",
        "paint_intermediate_images",
        "save_encoder",
    }
    assert set(hf_equissl.__all__) == expected
    assert all(getattr(hf_equissl, name) is not None for name in expected)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hf_equissl.nothing  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import hf_equissl",
        "from transformers import AutoModel; import hf_equissl",
        "import hf_equissl; from transformers import ViTModel",
        "import hf_equissl; from transformers import Trainer",
        "from hf_equissl import EquiSSLModel",
        "import hf_equissl.modeling.decoders_equissl",
        "import hf_equissl.objectives",
    ],
)
def test_auto_classes_know_us_whatever_is_imported_first(first: str) -> None:
    code = (
        f"{first}; from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification; "
        "config = AutoConfig.for_model('equissl', hidden_size=32, num_hidden_layers=1, num_attention_heads=2); "
        "models = [auto.from_config(config) for auto in (AutoModel, AutoModelForImageClassification, AutoBackbone)]; "
        "print(*(f'{type(thing).__module__}.{type(thing).__name__}' for thing in (config, *models)))"
    )
    out = processes.run([sys.executable, "-c", code], preloaded=processes.BARE).stdout
    room = "hf_equissl.modeling"
    assert out.split() == [
        f"{room}.configuration_equissl.EquiSSLConfig",
        f"{room}.modeling_equissl.EquiSSLModel",
        f"{room}.modeling_equissl.EquiSSLForImageClassification",
        f"{room}.modeling_equissl.EquiSSLBackbone",
    ]
