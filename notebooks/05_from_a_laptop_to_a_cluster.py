# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From a laptop to a cluster
#
# One recipe, one script; what differs is the launcher. Plan the run where you are, then start the same recipe on one GPU,
# eight, or eight machines. Nothing here needs a GPU.

# %%
# On Colab, or wherever the package is missing:
import os
import warnings
from importlib.util import find_spec

if find_spec("hf_equissl") is None:
    # %pip install --quiet "hf-equissl[quickstart]"
    pass
os.environ["TQDM_DISABLE"] = "1"  # a page that is stored needs no progress bars
warnings.filterwarnings("ignore", message="IProgress")

# %% [markdown]
# ## What a recipe says
#
# A recipe extends another one and changes what it must. `hf-equissl recipes` lists those that ship, `hf-equissl recipes NAME`
# prints one with all its values.

# %%
# !hf-equissl recipes | grep -E "vit[sl]16_(ibot|dinov2)"

# %%
# !hf-equissl recipes vitl16_dinov2_se2 | head -60

# %% [markdown]
# ## Will it fit, and which engine?
#
# Memory of the fullest moment of a step on each GPU, bytes that are sent, images per second under assumptions that are
# printed with it, for each engine:

# %%
# !hf-equissl plan --recipe vitl16_dinov2_se2 --gpus 8 --memory 40 2>/dev/null

# %% [markdown]
# It fits eight 40 GB GPUs under plain DDP. What changes with smaller ones? 24 GB, and one engine in detail:

# %%
# !hf-equissl plan --recipe vitl16_dinov2_se2 --gpus 8 --memory 24 --engine fsdp2 2>/dev/null

# %% [markdown]
# ## The launchers
#
# One YAML file of accelerate for each engine; the comment at its top says when to choose it.

# %%
from importlib.resources import files
from pathlib import Path

for path in sorted(files("hf_equissl.training.accelerate_configs").iterdir(), key=lambda path: path.name):
    if path.name.endswith(".yaml"):
        print(f"{path.name:<28}", path.read_text().splitlines()[0].lstrip("# "))

# %% [markdown]
# ```bash
# # eight GPUs of one machine
# accelerate launch --config_file training/accelerate_configs/ddp.yaml --num_processes 8 \
#     -m hf_equissl.training.pretrain --recipe vitl16_dinov2_se2 --data ILSVRC/imagenet-1k --output_dir runs/vitl
# # the same, sharded
# accelerate launch --config_file training/accelerate_configs/fsdp2.yaml --num_processes 8 \
#     -m hf_equissl.training.pretrain --recipe vitl16_dinov2_se2 --data ILSVRC/imagenet-1k --output_dir runs/vitl
# # Slurm: training/slurm/pretrain.sbatch; a job that is preempted is queued again and goes on
# sbatch training/slurm/pretrain.sbatch
# ```
#
# The global batch is the product of batch per device, processes and accumulation. With fewer GPUs raise the accumulation, so that a run that is
# continued elsewhere keeps its batch; a launch with another batch is refused with the values that fit.

# %% [markdown]
# ## Kill it, and go on
#
# A tiny run of two processes, killed after its first checkpoint and started again. On the CPU it ends in the weights of a run
# that nobody killed.

# %%
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

workspace = Path(tempfile.mkdtemp())
(workspace / "photos").mkdir()
rng = np.random.default_rng(0)
for number in range(64):
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(workspace / "photos" / f"{number}.png")


def start(folder, processes=2):
    """Start a training of 12 steps that saves every 4, in a process group of its own."""
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--cpu"]
    launcher += ["--num_processes", str(processes), "-m", "hf_equissl.training.pretrain"]
    words = ["--recipe", "quickstart", "--data", str(workspace / "photos"), "--output_dir", str(workspace / folder)]
    words += ["--training.max_steps", "12", "--training.warmup_steps", "2", "--training.save_steps", "4"]
    words += ["--training.per_device_train_batch_size", "8", "--training.use_cpu", "true"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(launcher + words, start_new_session=True, **quiet)


# %%
run = start("killed")
while not list((workspace / "killed").glob("checkpoint-*")):
    time.sleep(0.05)
os.killpg(run.pid, signal.SIGKILL)
run.wait()
print("killed; left:", sorted(path.name for path in (workspace / "killed").glob("checkpoint-*")))

print("exit code of the same command:", start("killed").wait())
print("exit code of a run that nobody kills:", start("whole").wait())

# %%
from safetensors.torch import load_file

killed, whole = (load_file(workspace / name / "encoder/model.safetensors") for name in ("killed", "whole"))
print("equal weights:", all(killed[name].equal(whole[name]) for name in whole))

# %% [markdown]
# What else a long run needs is in the documentation: streams of shards, faults and what is left after each, the monitor that
# sees collapse while it happens, publishing checkpoints during training.
