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
# # Pretrain on your own images
#
# All that is needed is a folder of images. Neither labels nor sub-folders, and nothing that says how an image was turned:
# the network finds that out by reconstructing the images between two views.
#
# This notebook trains a tiny encoder for a minute on a CPU. The same commands train ViT-L/16 on a cluster; only the recipe
# and the launcher differ (notebook 05).

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
# ## A folder of images
#
# Yours, as it is. Here it is filled with crops of photographs that come with scikit-image, so that nothing is downloaded.

# %%
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

workspace = Path(tempfile.mkdtemp())
photos = workspace / "photos"
photos.mkdir()
rng = np.random.default_rng(0)
for name in ("astronaut", "brick", "camera", "coffee", "gravel", "rocket"):
    photograph = Image.fromarray(getattr(data, name)()).convert("RGB")
    for number in range(60):
        side = int(rng.integers(64, min(photograph.size) // 2))
        left, top = (int(rng.integers(length - side)) for length in photograph.size)
        crop = photograph.crop((left, top, left + side, top + side)).resize((48, 48), Image.Resampling.LANCZOS)
        crop.save(photos / f"{name}_{number:02d}.png")
print(len(list(photos.iterdir())), "images")

# %% [markdown]
# ## Look before you train
#
# `--dry_run` reads the recipe, opens the first images, prints what a step will be and what it costs, and draws the views.
# It needs no GPU, also for recipes that do.

# %%
os.chdir(workspace)
# !hf-equissl pretrain --recipe quickstart --data photos --dry_run --output_dir plan > plan.txt 2>&1; grep -A 60 ^Batch plan.txt

# %%
from IPython.display import Image as Show

Show(filename=str(next(workspace.glob("plan/*.png"))), width=520)

# %% [markdown]
# *What to see: every row is one image. View 2 is u, turned; the images between u and view 2, at a third and at two thirds of
# the angle, are what the decoders have to paint.* Each run of the same recipe and seed makes these very views, whatever the
# number of workers and processes.

# %% [markdown]
# ## Train
#
# Any value of a recipe is an option with its dotted name. A mistyped one is refused, with the nearest right one.

# %%
# !hf-equissl pretrain --recipe quickstart --data photos --output_dir run --training.max_step 100 2>&1 | tail -1

# %%
# !hf-equissl pretrain --recipe quickstart --data photos --output_dir run --training.max_steps 100 \
#     --training.warmup_steps 20 --training.logging_steps 5 --training.save_steps 50 > training.log 2>&1; ls run

# %% [markdown]
# The run left its complete recipe, a record of what happened (`run.json`), checkpoints, and `encoder`, the folder that
# `AutoModel` loads. Stop a run whenever you like: the same command goes on from the newest checkpoint, and on a CPU ends in
# the same weights, bit for bit. Start it again now, and it says that nothing is left to do:

# %%
# !hf-equissl pretrain --recipe quickstart --data photos --output_dir run --training.max_steps 100 \
#     --training.warmup_steps 20 --training.logging_steps 5 --training.save_steps 50 2>/dev/null | tail -1

# %% [markdown]
# ## The curve

# %%
import json

from matplotlib import pyplot

history = json.loads((workspace / "run/checkpoint-100/trainer_state.json").read_text())["log_history"]
lines = [line for line in history if "loss_ssl" in line]
figure, axes = pyplot.subplots(1, 2, figsize=(8, 2.6), dpi=70, layout="constrained")
titles = {"loss_ssl": "VICReg", "reconstruction/loss_recon": "reconstruction (MSE)"}
for axis, (key, title) in zip(axes, titles.items(), strict=True):
    axis.plot([line["step"] for line in lines], [line[key] for line in lines])
    axis.set(title=title, xlabel="step")

# %% [markdown]
# *What to see: both losses fall together, most of the way in the first twenty steps.*
#
# ## What do its features tell about a rotation?
#
# The probe turns images and regresses the angle from the features before and after. What a probe learns by itself is not the
# encoder's merit, so an R² is read beside two columns: `untrained`, the same network with random weights, and `raw_pixels`.
# Of so few images read `r2_linear`, a ridge regression: the MLP of `r2` overfits them (an R² below 0 is worse than guessing
# the mean). A minute of training runs through every step of this and is not enough to beat pixels; `make quickstart` trains
# for longer, and `docs/results.md` has the tables.

# %%
# !hf-equissl probe --encoder run/encoder --encoder untrained:run/encoder --encoder raw_pixels --data photos \
#     --evaluators transformation_regression --tests rotation --epochs 5 --num_draws 1 --seeds 1 --output_dir probes \
#     2>/dev/null | tail -12

# %% [markdown]
# ## Use it

# %%
import hf_equissl  # makes AutoModel know EquiSSL encoders
import torch
from transformers import AutoImageProcessor, AutoModel, logging

logging.disable_progress_bar()

encoder = AutoModel.from_pretrained(workspace / "run/encoder")
processor = AutoImageProcessor.from_pretrained(workspace / "run/encoder")
images = [Image.open(path) for path in sorted(photos.iterdir())[:4]]
with torch.inference_mode():
    output = encoder(**processor(images, return_tensors="pt"))
print("CLS and patches", tuple(output.last_hidden_state.shape))
print("invariant part ", tuple(output.invariant_features.shape))
print("equivariant    ", tuple(output.equivariant_features.shape))

# %% [markdown]
# Next: measure and compare encoders (03), fine-tune with adapters and publish (04), go from here to a cluster (05).
