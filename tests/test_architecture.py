"""Who may import whom, what the wheel holds, and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hf_equissl

ROOT = Path(__file__).resolve().parent.parent
# Room -> rooms of this package that it may import. Files at the top of hf_equissl/ are rooms of their own.
ARROWS = {
    "modeling": set(),
    "needs": set(),
    "strict": set(),
    "files": set(),
    "figures": set(),
    "loading": set(),
    "redaction": set(),
    "signals": set(),
    "versions": set(),
    "distributed": set(),
    "engines": set(),
    "monitors": set(),
    "compilation": {"modeling"},
    "training_arguments": {"engines"},
    "schedules": {"training_arguments"},
    "throughput": {"distributed"},
    "loss_history": {"distributed"},
    "views": {"needs", "strict"},
    "data": {"views", "strict"},
    "run_record": {"data", "files", "redaction", "training_arguments", "versions", "views"},
    "objectives": {"needs", "modeling", "distributed", "schedules", "strict", "views"},
    "pretraining": {"objectives", "modeling", "needs", "distributed", "monitors", "schedules", "views"},
    "optimization": {"distributed", "pretraining", "training_arguments"},
    "zero": {"engines", "optimization", "training_arguments"},
    "callbacks": {"pretraining", "schedules", "throughput", "training_arguments"},
    "checkpoints": {"distributed", "engines", "files", "loss_history"},
    "data_feed": {"checkpoints", "data", "signals", "throughput", "training_arguments"},
    "trainer": {
        "callbacks",
        "checkpoints",
        "compilation",
        "data",
        "data_feed",
        "distributed",
        "engines",
        "hub",
        "loss_history",
        "optimization",
        "pretraining",
        "publishing",
        "run_record",
        "schedules",
        "training_arguments",
        "views",
        "zero",
    },
    "evaluation": {
        "data",
        "distributed",
        "files",
        "loading",
        "modeling",
        "monitors",
        "redaction",
        "signals",
        "strict",
        "timing",
        "versions",
        "views",
    },
    "hub": {
        "checkpoints",
        "evaluation",
        "figures",
        "files",
        "loading",
        "modeling",
        "objectives",
        "pretraining",
        "redaction",
        "run_record",
        "strict",
        "training_arguments",
        "versions",
    },
    "publishing": {"hub"},
    "extraction": {
        "data",
        "distributed",
        "evaluation",
        "files",
        "hub",
        "redaction",
        "strict",
        "throughput",
        "versions",
    },
    "faults": {
        "checkpoints",
        "data",
        "distributed",
        "files",
        "hub",
        "loss_history",
        "run_record",
        "signals",
        "strict",
    },
    "sweep": {"overrides", "strict"},
    "planning": {
        "engines",
        "flop_counts",
        "pretraining",
        "recipes",
        "run_plan",
        "strict",
        "training_arguments",
        "views",
    },
    "launching": {
        "checkpoints",
        "data",
        "distributed",
        "engines",
        "faults",
        "files",
        "figures",
        "flop_counts",
        "hub",
        "loading",
        "modeling",
        "needs",
        "objectives",
        "online_monitor",
        "optimization",
        "optimizer_table",
        "overrides",
        "planning",
        "pretraining",
        "recipes",
        "run_plan",
        "run_record",
        "schedules",
        "signals",
        "strict",
        "trainer",
        "training_arguments",
        "views",
    },
    "benchmarking": {
        "data",
        "engines",
        "launching",
        "modeling",
        "objectives",
        "optimization",
        "pretraining",
        "recipes",
        "schedules",
        "strict",
        "timing",
        "trainer",
        "training_arguments",
        "views",
    },
    "finetuning": {
        "checkpoints",
        "data",
        "data_feed",
        "distributed",
        "engines",
        "evaluation",
        "faults",
        "figures",
        "files",
        "hub",
        "launching",
        "loading",
        "loss_history",
        "modeling",
        "needs",
        "optimization",
        "redaction",
        "run_plan",
        "run_record",
        "signals",
        "strict",
        "training_arguments",
        "versions",
        "views",
    },
}


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
    return parts[0] if parts[0] != "hf_equissl" else parts[1].removesuffix(".py")


def library_files() -> list[Path]:
    return sorted([*(ROOT / "hf_equissl").rglob("*.py"), *(ROOT / "modeling").glob("*.py")])


@pytest.mark.parametrize("room", ARROWS)
def test_arrows_run_one_way(room: str) -> None:
    files = [path for path in library_files() if room_of(path) == room]
    assert files, f"room {room} is empty"
    for path in files:
        backwards = imported_rooms(path) - ARROWS[room] - {room}
        assert not backwards, f"{path.relative_to(ROOT)} imports {sorted(backwards)}"


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
    names = {".".join(folder.parts) for folder in folders}
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
        "save_encoder",
    }
    assert set(hf_equissl.__all__) == expected
    assert all(getattr(hf_equissl, name) is not None for name in expected)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hf_equissl.nothing  # noqa: B018


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
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    room = "hf_equissl.modeling"
    assert out.split() == [
        f"{room}.configuration_equissl.EquiSSLConfig",
        f"{room}.modeling_equissl.EquiSSLModel",
        f"{room}.modeling_equissl.EquiSSLForImageClassification",
        f"{room}.modeling_equissl.EquiSSLBackbone",
    ]
