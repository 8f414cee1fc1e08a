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
# # Measure and compare encoders
#
# How much does an encoder know of how an image was transformed? Freeze it, transform images by known amounts, and let a small
# network, a *probe*, regress the amount from the features before and after. R² is 1 where it is always found, and 0 where
# guessing the mean would do as well. That is *transformation regression*, the measurement of the EquiSSL paper, and it can
# mislead. This notebook compares the two encoders that come with the package, and shows what such a number needs beside it.

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
# ## Encoders and images
#
# `base` was trained by VICReg alone, `reconstruction` had to reconstruct images between its views as well; all else is equal
# (notebook 01). The images are crops of photographs that come with scikit-image, scikit-learn and matplotlib. Encoders have
# never seen them, and the test images are of three photographs from which the probes see nothing.

# %%
import shutil
import tempfile
from pathlib import Path

from hf_equissl.demo import shipped_checkpoint
from hf_equissl.training.photographs import cut_tiles

os.chdir(tempfile.mkdtemp())
for name in ("base", "reconstruction"):
    shutil.copytree(shipped_checkpoint(name), name)
print(cut_tiles(Path("tiles"), per_photograph=40))

# %% [markdown]
# ## Four columns, not two
#
# Beside the two encoders stand two *controls*. `raw_pixels` is no encoder at all: the probe reads the image itself.
# `untrained:` is the same network with random weights. What they reach is what probe and task give for nothing. Two
# transformations are asked for, rotation up to 45 degrees and Gaussian blur. Few images, a small probe and one epoch's
# worth of draws keep this short; a real comparison has thousands of images and leaves the settings alone.

# %%
common = (
    "--encoder reconstruction --encoder base --encoder untrained:reconstruction --encoder raw_pixels --data tiles "
    "--evaluators transformation_regression --seeds 2 --epochs 30 --num_draws 1 --output_dir probes "
    "--set transformation_regression.batch_size=64 --set transformation_regression.hidden_width=256"
)
# !hf-equissl probe {common} --tests rotation gaussian_blur --fill zeros 2> probe.log

# %% [markdown]
# `r2`, of a small neural network, is the paper's number. `r2_linear` is of a linear probe, and `r2_few_shot` of a linear probe
# that saw 100 pairs alone. The less a probe can learn by itself, the more its R² is a property of the features.
#
# Blur first: a linear probe reads it off both trained encoders better than off the same network with random weights, and off
# raw pixels not at all. From 100 pairs `reconstruction` gives 0.35 where `base` gives 0.05; the spread over the two seeds says
# that the first decimal is all one may quote. And rotation? Both encoders know nothing of it, random weights something, and raw
# pixels most of all. Before you throw the encoders away, look at what the probe was shown.

# %% [markdown]
# ## The lesson of the black corners
#
# What did the probe see? A turned image has corners that no pixel of the image fills. Left black, they show the angle to
# anyone, whatever is in the image. Two other ways to fill them take that hint away: `reflect` mirrors the image there, and
# `circle` shows both images through a disk that turning never leaves empty.

# %%
import numpy as np
import torch
from hf_equissl.evaluation.circular_mask import DiskFamily
from hf_equissl.views import RotationFamily
from matplotlib import pyplot
from PIL import Image

tile = Image.open(sorted(Path("tiles/test").glob("coffee*"))[0])
tile = torch.from_numpy(np.array(tile)).permute(2, 0, 1)[None] / 255
families = {fill: RotationFamily(fill=fill) for fill in ("zeros", "reflect")}
families["circle"] = DiskFamily(RotationFamily(fill="zeros"))
_, axes = pyplot.subplots(1, 6, figsize=(8, 1.6), dpi=75, layout="constrained")
for number, (fill, family) in enumerate(families.items()):
    before, after = family.path(tile, torch.tensor([[30.0]]), torch.tensor([0.0, 1.0]))[0]
    for axis, image, title in ((axes[2 * number], before, f"{fill}: I"), (axes[2 * number + 1], after, "g(I)")):
        axis.imshow(image.permute(1, 2, 0))
        axis.set(title=title, xticks=[], yticks=[])

# %% [markdown]
# *What to see: in the first pair the corners give the angle away, without a look at the photograph; in the last one nothing but
# the photograph does.* The same measurement, without the hint:

# %%
# !hf-equissl probe {common} --tests rotation --fill circle 2>> probe.log

# %% [markdown]
# ## Records
#
# Every number is kept as a *record* with all that is needed to read it: data, split, every setting of the probe, a digest of
# the encoder's weights, versions, the command. `load_records` reads them back, and a picture of your own is a few lines.

# %%
from hf_equissl.evaluation import load_records

records = load_records("probes/results.json")
one = records[0]
print(len(records), "records; the first one:")
for name in ("task", "metric", "features", "values", "dataset", "split", "encoder", "encoder_digest", "comparability"):
    print(f"  {name:<15} {getattr(one, name)}")
print("  protocol       ", {name: one.protocol[name] for name in ("family", "probe_train_images", "epochs")})

# %%
names = list(dict.fromkeys(record.encoder for record in records))
panels = {
    "rotation, black corners": ("rotation", "zeros"),
    "rotation, circle": ("rotation", "circle"),
    "Gaussian blur": ("gaussian_blur", None),
}
_, axes = pyplot.subplots(1, 3, figsize=(9, 2.8), dpi=75, layout="constrained", sharey=True)
for axis, (title, (task, fill)) in zip(axes, panels.items(), strict=True):
    found = {
        record.encoder: record.value
        for record in records
        if (record.task, record.metric, record.protocol["family"].get("fill")) == (task, "r2_linear", fill)
    }
    labels = [name.split(":")[0] for name in names]
    axis.bar(labels, [found[name] for name in names], color=["tab:orange", "tab:blue", "lightgrey", "grey"])
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_title(title, fontsize=10)
    axis.tick_params(axis="x", labelrotation=20, labelsize=8)
    axis.set_ylabel("R², linear probe")

# %% [markdown]
# *What to see: the grey bars of the first panel belong to the corners. Behind a disk they are gone, and a linear probe reads the
# angle off nothing. Blur is not given away by corners: there the trained encoders lead, and pixels say nothing.*

# %% [markdown]
# ## One report
#
# `hf-equissl report` lays records of any number of folders side by side, and says by how much each encoder is better or worse
# than a baseline. Numbers of different protocols never share a column: there is one for each way to fill the corners.

# %%
# !hf-equissl report probes --baseline base --output_dir report 2>> probe.log

# %%
from IPython.display import Image as Show

Show(filename="report/r2.png", width=560)

# %% [markdown]
# *What to see: the paper's R², of the small neural network, with its spread over two seeds. Of blur `reconstruction` knows something,
# the three others nothing. Of the angle raw pixels know most; behind the disk they lose more than half of it. Bars below zero are
# probes that fitted their few training images and nothing else.* `report/differences.png` has the differences to the baseline.

# %% [markdown]
# ## How to read such a table honestly
#
# 1. **Read R² beside its controls.** What raw pixels and random weights reach is not the encoder's merit. A difference between
#    two encoders that is smaller than that between two seeds says nothing.
# 2. **Ask what gives the answer away.** Black corners do. So may borders, resizing, and whatever else comes with the
#    transformation and not with the image.
# 3. **Take the probe into account.** An MLP of a million weights learns much by itself; a linear probe, or few images, leave more
#    to the features.
# 4. **Compare like with like.** Same images, same split, same settings: `comparability` is a digest of all these, and equal
#    only where numbers may be compared.
# 5. **A negative R² is an answer.** The probe learned something of its training images that does not hold for others.
# 6. **One measurement is not all.** An encoder that keeps the angle may have paid for it elsewhere: `hf-equissl probe` on labelled
#    images adds linear probe and kNN, and `--tests` knows other transformations.
#
# Next: adapt an encoder to a task, and publish it (notebook 04).
