"""What others add from their own code: an objective with views of its own, and a transformation family.

Each costs what is between the lines here, and one line that registers it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from hf_equissl.checkpoints import list_checkpoints
from hf_equissl.objectives import EQUIVARIANCE_OBJECTIVES, LossOutput, Objective
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running.run import prepare, pretrain
from hf_equissl.training import plan, sweep
from hf_equissl.training import pretrain as pretrain_script
from hf_equissl.utils.suggestions import RecipeError
from hf_equissl.views import TRANSFORMATIONS, TransformationFamily
from hf_equissl.views.makers import ViewMaker
from hf_equissl.views.needs import ExtraViews, Needs
from tests.objectives.helpers import run_processes

# ---------------------------------------------------------------------------------------------------------------------


class TurnedShare(ViewMaker):
    """Some images of each batch, all turned as often; how often is drawn per batch."""

    def takes_from_batch(self, images: int) -> int:
        return 2

    def collate(self, own, samples, rng) -> dict[str, Any]:
        crops = torch.stack([sample["global_crops"] for sample in samples])
        return {"crops": crops, "turns": int(rng.integers(4))}

    def __call__(self, batch) -> tuple[list[Tensor], Any]:
        plain = batch["crops"].float().div(255).contiguous()
        return [plain[:, 0], plain[:, 1].rot90(batch["turns"], dims=(-2, -1))], batch["turns"]


class CountTurnsObjective(Objective):
    """Says from two token maps after block 1 how often the second view was turned."""

    citation: ClassVar[str] = ""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.head = nn.Linear(2 * config.hidden_size, 4)

    @property
    def needs(self) -> Needs:
        return Needs(extra=(ExtraViews("turned", TurnedShare, hidden_layers=(1,), joins=(0, 1)),))

    def forward(self, student, teacher, views) -> LossOutput:
        first, second = (student.extra["turned"][view].hidden[1].patches.mean(dim=1) for view in (0, 1))
        turns = views.facts["turned"]
        loss = F.cross_entropy(self.head(torch.cat([first, second], dim=1)).float(), torch.full((2,), turns))
        return LossOutput(loss, {"loss_turns": loss.detach(), "turns": torch.tensor(float(turns))})


class FadeFamily(TransformationFamily):
    """Fades to black."""

    parameter_names = ("shade",)
    num_draws = 1

    def sample(self, draws: Tensor) -> Tensor:
        return draws / 2

    def path(self, images: Tensor, parameters: Tensor, fractions: Tensor) -> Tensor:
        return images[:, None] * (1 - parameters[:, None] * fractions[:, None])[..., None, None]

    def targets(self, parameters: Tensor) -> Tensor:
        return 4 * parameters - 1


# ---------------------------------------------------------------------------------------------------------------------

STEPS = 6


def register() -> None:
    EQUIVARIANCE_OBJECTIVES.register("count_turns")(CountTurnsObjective)
    TRANSFORMATIONS.register("fade")(FadeFamily)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """For these tests alone: the batteries of other files go through all that is registered."""
    register()
    yield
    del EQUIVARIANCE_OBJECTIVES["count_turns"], TRANSFORMATIONS["fade"]


def recipe(data: Path, **training: Any) -> Recipe:
    return Recipe.from_dict({
        "model": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
                  "patch_size": 8, "feature_size": 16, "equivariant_size": 8, "drop_path_rate": 0.2},
        "objectives": {
            "invariance": {"name": "vicreg", "expander_sizes": [16, 16]},
            "equivariance": [{"name": "reconstruction", "decoder_widths": [8, 8, 8]}, {"name": "count_turns"}],
        },
        "views": {"pipeline": {"name": "vicreg"}, "transformation": {"name": "joint", "families": [
            {"name": "fade"}, {"name": "rotation"}]}},
        "data": {"source": str(data)},
        "training": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
                     "max_steps": STEPS, "save_steps": 3, "save_total_limit": 5, "logging_steps": 1, "seed": 0,
                     "use_cpu": True, "disable_tqdm": True, "report_to": "none", **training},
    })  # fmt: skip


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


def test_trains_and_resumes_bit_for_bit(photo_folder: Path, tmp_path: Path) -> None:
    run = prepare(recipe(photo_folder), tmp_path / "whole")
    assert run.cost().view_bytes > 0
    pretrain(run)
    saved = [path.name for path in list_checkpoints(tmp_path / "whole")]
    assert saved == ["checkpoint-3", "checkpoint-6"]

    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", broken / "checkpoint-3")
    shutil.copy(tmp_path / "whole" / "recipe.yaml", broken)
    pretrain(prepare(recipe(photo_folder, dataloader_num_workers=1), broken))
    first, second = weights(tmp_path / "whole", STEPS), weights(broken, STEPS)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["equivariance.1.head.weight"], weights(broken, 3)["equivariance.1.head.weight"])


def train_one_of_several(rank: int, processes: int, data: Path, folder: Path) -> dict[str, Tensor]:
    """Train as one of the processes that ``run_processes`` has brought together."""
    register()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1")
    run = prepare(recipe(data, per_device_train_batch_size=4), folder)
    pretrain(run)
    return weights(folder, STEPS)


def test_trains_on_two_processes(photo_folder: Path, tmp_path: Path) -> None:
    first, second = run_processes(train_one_of_several, tmp_path, photo_folder, tmp_path / "run", timeout=300)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) and value.isfinite().all() for name, value in first.items())


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'fade' exists"):
        TRANSFORMATIONS.register("fade")(type("Other", (FadeFamily,), {}))


MODULE = """
from hf_equissl.objectives import EQUIVARIANCE_OBJECTIVES
from tests.test_extensions import CountTurnsObjective


@EQUIVARIANCE_OBJECTIVES.register("from_a_module")
class FromAModuleObjective(CountTurnsObjective):
    pass
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module that registers an objective, and a recipe that names the objective but not the module."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_objectives.py").write_text(MODULE)
    (tmp_path / "own_broken.py").write_text("1 / 0")
    plain = recipe(tmp_path).to_dict()
    plain["objectives"]["equivariance"] = [{"name": "from_a_module"}]
    del plain["data"]
    plain["training"] = {"per_device_train_batch_size": 8, "max_steps": 2, "use_cpu": True, "report_to": "none"}
    (tmp_path / "own.yaml").write_text(json.dumps(plain))
    grid = {"name": "lr-{learning_rate}", "extends": "own.yaml", "cross": {"training.learning_rate": [0.1, 0.2]}}
    (tmp_path / "own_sweep.yaml").write_text(json.dumps({"sweep": [grid]}))
    yield tmp_path
    EQUIVARIANCE_OBJECTIVES.pop("from_a_module", None)
    sys.modules.pop("own_objectives", None)


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (pretrain_script.main, ["--recipe", "own.yaml", "--dry_run"]),
        (plan.main, ["--recipe", "own.yaml", "--gpus", "1"]),
        (sweep.main, ["--recipe", "own_sweep.yaml", "--dry_run"]),
        (sweep.main, ["--recipe", "own_sweep.yaml", "--dry_run", "--only", "lr-0.1"]),
    ],
)
def test_commands_import_modules_of_users(own_module: Path, capsys: pytest.CaptureFixture[str], main, words) -> None:
    assert main(words) == 2
    assert "'from_a_module'" in capsys.readouterr().err
    assert main([*words, "--import", "own_objectives"]) == 0
    assert "from_a_module: heads" in capsys.readouterr().out or main is sweep.main


def test_a_run_keeps_the_names_of_modules(own_module: Path, photo_folder: Path) -> None:
    words = ["--recipe", "own.yaml", "--data", str(photo_folder), "--output_dir", "run", "--import", "own_objectives"]
    assert pretrain_script.main(words) == 0
    EQUIVARIANCE_OBJECTIVES.pop("from_a_module")
    del sys.modules["own_objectives"]
    assert Recipe.load("run/recipe.yaml").imports == ["own_objectives"]
    # The command's modules come beside those of the recipe.
    (own_module / "own_more.py").touch()
    assert Recipe.load("run/recipe.yaml", {"imports": ["own_more"]}).imports == ["own_objectives", "own_more"]


@pytest.mark.parametrize(
    ("imports", "reason"),
    [
        (["own_objektives"], "there is no module 'own_objektives'"),
        (["own_broken"], "importing 'own_broken' fails with ZeroDivisionError"),
        (["./own_objectives.py"], "is not the name of a module"),
        ("own_objectives", "imports: expected"),
    ],
)
def test_a_module_that_cannot_be_imported_is_refused(own_module: Path, imports: Any, reason: str) -> None:
    plain = json.loads((own_module / "own.yaml").read_text())
    with pytest.raises(RecipeError, match=reason):
        Recipe.from_dict({**plain, "imports": imports})
