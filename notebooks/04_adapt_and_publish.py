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
# # Adapt an encoder, and publish it
#
# An encoder that somebody trained on other images, and a small folder with labels: train a head on frozen features, or adapters
# inside the encoder as well? This notebook does both, merges the better one into one plain model, and goes through everything
# that a publication asks, without sending anything.

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
# ## A small folder with labels
#
# One sub-folder for each class, in `train/` and `test/`. Here: handwritten digits that come with scikit-learn, 50 of each for
# training. They are 8 x 8 pixels and look like nothing the encoder has seen: it was trained on CIFAR-10's photographs.

# %%
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from hf_equissl.demo import shipped_checkpoint
from matplotlib import pyplot
from PIL import Image
from sklearn.datasets import load_digits

os.chdir(tempfile.mkdtemp())
shutil.copytree(shipped_checkpoint("reconstruction"), "encoder")

digits, seen = load_digits(), Counter()
for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
    seen[label] += 1
    if seen[label] <= 80:
        place = Path("digits", "train" if seen[label] <= 50 else "test", f"digit_{label}")
        place.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((pixels * 255 / 16).astype(np.uint8))
        grey.resize((32, 32), Image.Resampling.BICUBIC).save(place / f"{number}.png")

_, axes = pyplot.subplots(1, 10, figsize=(7, 0.9), dpi=75, layout="constrained")
for label, axis in enumerate(axes):
    axis.imshow(Image.open(next(Path(f"digits/train/digit_{label}").iterdir())), cmap="gray")
    axis.set(title=label, xticks=[], yticks=[])

# %% [markdown]
# *What to see: one training image of each class, as the encoder gets it.*
#
# ## A head alone
#
# `--method linear` freezes the encoder and trains one linear layer on CLS and the mean patch. A mirrored digit is another sign
# or none, so mirrored images (`--no_flip`) and small crops (`--crop_scale`) are turned off: such defaults suit photographs.

# %%
options = "--encoder encoder --data digits --no_flip --crop_scale 0.8 1 --batch_size 32 --epochs 6 --eval_steps 1000"
# !hf-equissl finetune {options} --method linear --learning_rate 0.03 --output_dir linear 2> linear.log | grep "^|"

# %% [markdown]
# ## Adapters inside
#
# `--method lora` also puts a product of two thin matrices beside every linear map of the encoder, and trains these and the
# head. The encoder's own weights stay as they are; what is saved is the adapter, with the name and the digest of its base.
# `--merge` adds the products to the weights, and writes one plain model. Defaults of the learning rate suit larger encoders;
# both of these are the better one of two that were tried.

# %%
# !hf-equissl finetune {options} --method lora --learning_rate 0.006 --merge --output_dir lora 2> lora.log | grep "^|"
# !du -sh --apparent-size encoder/model.safetensors lora/adapter lora/merged

# %% [markdown]
# Adapters read 62 of 100 test digits right, the head alone 50: features of photographs were not made for digits, and adapters
# may change them. Each row trained one seed and was judged on 300 images, so a difference of a few per cent would mean nothing.
# The adapter takes a tenth of the space of a model, which counts when one encoder serves many tasks.

# %% [markdown]
# The merged model needs neither PEFT nor the adapter:

# %%
import hf_equissl  # makes the Auto classes know EquiSSL encoders
import torch
from transformers import pipeline, logging

logging.disable_progress_bar()
classify = pipeline("image-classification", model="lora/merged")
tests = sorted(Path("digits/test").glob("*/*.png"))[::30]
_, axes = pyplot.subplots(1, len(tests), figsize=(7, 1.1), dpi=75, layout="constrained")
for path, axis, found in zip(tests, axes, classify([str(path) for path in tests]), strict=True):
    axis.imshow(Image.open(path), cmap="gray")
    axis.set(title=f"{found[0]['label'][-1]}\n{found[0]['score']:.0%}", xticks=[], yticks=[])

# %% [markdown]
# *What to see: the class that is predicted for one test image of each digit, and how sure the model is. Eight of ten are right;
# the 3 that is read as 2 and the 6 that is read as 4 are among the three of which it was least sure.*

# %% [markdown]
# ## What would be published?
#
# `hf-equissl push FOLDER --repo_id NAME --dry_run` lists every file that would be sent, and prints the card that was written
# from what happened: data, settings, numbers, the command, code that loads it.

# %%
# !hf-equissl push lora/merged --repo_id me/digits --dry_run 2> push.log | head -70

# %% [markdown]
# ## Whose images, whose weights?
#
# Weights carry the terms of the weights they started from and of the images they saw. Where these are known and free, a
# push inherits them. Where they are unknown or restrict, it stops and asks before anything is sent; nothing is ever called
# `apache-2.0` on its own. Nobody has said whose images the folder `digits` holds, so this would stop the
# same command without `--dry_run`:

# %%
from hf_equissl.hub import PublishError
from hf_equissl.hub.publishable import check_licence

try:
    check_licence("lora/merged")
except PublishError as error:
    print(error)

# %% [markdown]
# You know the answer, the command does not. These digits are CC BY 4.0 (Alpaydin and Kaynak, UCI Machine Learning Repository):
#
# ```bash
# hf auth login
# # ... are the words of the LoRA run above
# hf-equissl finetune ... --push_to_hub --repo_id me/digits --private --license cc-by-4.0
# ```
#
# finds the finished run, trains nothing again, and publishes the merged model; `--private` keeps it for your own eyes first. Data that
# restricts (ImageNet, non-commercial licences) wants `--license inherit`, or your word that you may give another one; a licence
# of your own is `--license other --license_name NAME --license_link URL`. An encoder that you pretrained goes up with
# `hf-equissl push runs/mine --repo_id me/mine`, with the same questions. What a push refuses, and which terms are known, is in the
# documentation: `docs/publish.md`.
#
# Next: from a laptop to a cluster (notebook 05).
