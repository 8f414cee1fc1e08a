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
# # Load an encoder, and look at its features
#
# Two small encoders come with the package, so that there is something to try before you train. Both are ViTs of 4 blocks that
# saw CIFAR-10's images of 32 pixels, with the same views, steps and seed. `base` was trained by VICReg alone, `reconstruction`
# had to reconstruct the images between its two views as well. This notebook loads them, and looks at what that changed.

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
# ## Load it
#
# **With the package.** `import hf_equissl` is all that `AutoModel` needs to know these encoders. A Hub id stands where the
# folder stands.

# %%
import subprocess
import sys
import tempfile
from pathlib import Path

import hf_equissl  # makes AutoModel know EquiSSL encoders
import torch
from hf_equissl.demo import shipped_checkpoint
from transformers import AutoImageProcessor, AutoModel, logging

logging.disable_progress_bar()
os.chdir(tempfile.mkdtemp())
folder = shipped_checkpoint("reconstruction")
encoder = AutoModel.from_pretrained(folder)
processor = AutoImageProcessor.from_pretrained(folder)
print(f"{type(encoder).__name__}, {encoder.num_parameters() / 1e6:.2f} million parameters")

# %% [markdown]
# It returns the usual outputs of a ViT, and the two parts that give EquiSSL its name. 32 pixels in patches of 8 are 16
# patches; with CLS in front that makes 17 rows.

# %%
torch.manual_seed(0)
pixels = torch.rand(2, 3, 32, 32)
with torch.inference_mode():
    output = encoder(pixels)
for name in ("last_hidden_state", "pooler_output", "invariant_features", "equivariant_features"):
    print(f"{name:<21}", tuple(output[name].shape))

# %% [markdown]
# **Without the package.** The folder holds the code of its model: `trust_remote_code=True` lets it run. Read it first, as you
# would any code of others. **Without any code of ours**, `--to native` writes the same backbone as a stock `dinov2` model; the
# two parts are not in it, as `dinov2` has no place for them. The process below cannot import `hf_equissl`, and gets the same
# numbers both ways.

# %%
# !hf-equissl convert {folder} --to native --output_dir native > convert.log 2>&1; ls native

# %%
program = """
import sys
sys.modules["hf_equissl"] = None  # from here on, importing it fails
import torch
from safetensors.torch import load_file
from transformers import AutoModel, logging
logging.disable_progress_bar()

given = load_file("given.safetensors")
for name, model in (
    ("its own code", AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)),
    ("stock model", AutoModel.from_pretrained("native")),
):
    with torch.inference_mode():
        tokens = model(given["pixels"]).last_hidden_state
    print(f"{name:<13} {type(model).__name__:<13} {type(model).__module__.split('.')[0]:<22}", end="")
    print("largest difference", f"{(tokens - given['tokens']).abs().max():.1e}")
"""
from safetensors.torch import save_file

save_file({"pixels": pixels, "tokens": output.last_hidden_state}, "given.safetensors")
done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
print(done.stdout, end="")

# %% [markdown]
# ## Six photographs
#
# They come with scikit-image and scikit-learn, and have nothing to do with CIFAR-10. Each is cut out of a larger one, so that
# it can be turned without corners that are black or made up: real pixels fill them.

# %%
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_image

windows = {  # photograph, centre (x, y) and side of the square that is cut out
    "cat": (data.chelsea(), (190, 150), 200),
    "coffee": (data.coffee(), (290, 205), 270),
    "pagoda": (load_sample_image("china.jpg"), (258, 213), 300),
    "flower": (load_sample_image("flower.jpg"), (310, 205), 280),
    "astronaut": (data.astronaut(), (225, 120), 168),
    "cameraman": (data.camera(), (230, 190), 260),
}


def cut(name, angle=0, side=128):
    """Turn a photograph about the centre of its window, counter-clockwise, and cut the window out."""
    photograph, (x, y), window = windows[name]
    reach = round(window * 0.71)  # half of the diagonal: what is seen at any angle
    around = Image.fromarray(photograph).convert("RGB").crop((x - reach, y - reach, x + reach, y + reach))
    turned = around.resize((round(1.42 * side),) * 2, Image.Resampling.LANCZOS).rotate(angle, Image.Resampling.BICUBIC)
    left = (turned.width - side) // 2
    return turned.crop((left, left, left + side, left + side))


def prepare(images, side=32):
    """Resize and normalise as the encoder's processor says, to another side if asked."""
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return processor(images, return_tensors="pt", **sizes)["pixel_values"]


# %% [markdown]
# ## Colours of patches
#
# What does a patch's feature vector say? Take the patches of all six images, find the three directions in which their
# features differ most (a principal component analysis, PCA), and show the three numbers as red, green and blue. The encoders
# learned on 4 x 4 patches; position embeddings are interpolated, so images of 128 pixels go in, too, and give 16 x 16.

# %%
# %config InlineBackend.figure_formats = ["jpeg"]
from matplotlib import pyplot

encoders = {name: AutoModel.from_pretrained(shipped_checkpoint(name)) for name in ("reconstruction", "base")}


def colours(features):
    """Show (B, N, d) patches by their first three principal components: (B, rows, columns, 3) in [0, 1]."""
    centred = features.flatten(0, 1) - features.mean((0, 1))
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    components = centred @ directions.T
    low, high = components.quantile(torch.tensor([0.02, 0.98]), dim=0)
    side = round(features.shape[1] ** 0.5)
    return ((components - low) / (high - low)).clamp(0, 1).unflatten(0, (len(features), side, side))


def show(rows, size=1.0):
    """Draw rows of images, each with its title on the left."""
    shape = len(rows), max(map(len, rows.values()))
    _, axes = pyplot.subplots(*shape, figsize=(size * shape[1] + 1, size * shape[0]), dpi=75, layout="constrained")
    for line, (title, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])


photographs = [cut(name) for name in windows]
rows = {"photograph": photographs}
for name, model in encoders.items():
    with torch.inference_mode():
        output = model(prepare(photographs, side=128))
    for part in ("invariant", "equivariant"):
        rows[f"{name},\n{part}"] = colours(output[f"{part}_features"][:, 1:])
show(rows)

# %% [markdown]
# *What to see: without a label ever shown, flower, cup, pagoda and cameraman stand out from what is behind them, in every row. The
# cat's eye has a colour of its own in both rows of `reconstruction`; in the invariant part of `base` the cat is nearly one
# colour.* A colour of one row has nothing to do with the same colour in another: each row has directions of its own.

# %% [markdown]
# ## Turn the image
#
# Now each photograph is turned through a whole circle, and each part of the features compared with that of the upright one.
# Both parts are read off the same place, the mean of the patches. What all features have in common, their mean, is taken off
# first: otherwise any two images have a cosine similarity near 1. The dotted line says how similar *different* photographs
# are, all upright.

# %%
angles = list(range(-180, 181, 15))
turned = torch.stack([prepare([cut(name, angle, side=32) for angle in angles]) for name in windows])


def compare(model, part):
    """Cosine similarity to the upright image, (6, angles), and the mean one between different images."""
    with torch.inference_mode():
        features = model(turned.flatten(0, 1))[f"{part}_features"][:, 1:].mean(1).unflatten(0, turned.shape[:2])
    features = torch.nn.functional.normalize(features - features.mean((0, 1)), dim=-1)
    upright = features[:, angles.index(0)]
    others = (upright @ upright.T)[~torch.eye(len(upright), dtype=torch.bool)]
    return (features * upright[:, None]).sum(-1), others.mean()


figure, axes = pyplot.subplots(1, 2, figsize=(8, 2.8), dpi=75, layout="constrained", sharey=True)
for axis, (name, model) in zip(axes, encoders.items(), strict=True):
    for part, colour in (("invariant", "tab:blue"), ("equivariant", "tab:orange")):
        similar, others = compare(model, part)
        axis.plot(angles, similar.mean(0), color=colour, label=part)
        axis.axhline(others, color=colour, linestyle=":")
    axis.legend()
    axis.set(title=name, xlabel="angle in degrees", ylabel="cosine with upright", xticks=range(-180, 181, 90))
# %% [markdown]
# *What to see: on the left the equivariant line falls steadily with the angle, and the invariant one goes up and down without
# such a trend. On the right, where nothing set the parts apart, both lines run together. Training turned images by at most 45
# degrees. Upside down, every photograph is still more like itself than like the others, far above the dotted lines.*

# %% [markdown]
# ## What the decoders paint
#
# During training, decoders saw the equivariant parts of two views, and had to paint the images on the way from one to the
# other: a third of the way, and two thirds. Nobody told them how the second view was made. They lie in the published weights,
# so you can ask them. Here the second view is turned by 40 degrees; the true images between are below what is painted.

# %%
from hf_equissl import paint_intermediate_images


def as_images(names, angle):
    """Photographs turned by an angle, as floats in [0, 1], (B, 3, 32, 32)."""
    pictures = [torch.frombuffer(bytearray(cut(name, angle, side=32).tobytes()), dtype=torch.uint8) for name in names]
    return torch.stack(pictures).view(-1, 32, 32, 3).permute(0, 3, 1, 2) / 255


first, second = as_images(windows, 0), as_images(windows, 40)
painted = paint_intermediate_images(folder, first, second)
rows = {"view 1": first}
for fraction, images in painted.items():
    rows[f"painted, {fraction:.0%}"] = images
    rows[f"true, {40 * fraction:.0f}°"] = as_images(windows, 40 * fraction)
rows["view 2, 40°"] = second
show({title: images.permute(0, 2, 3, 1) for title, images in rows.items()})

# %% [markdown]
# *What to see: colours and large shapes are right, such as the lean of the astronaut's head; everything small is gone.*
#
# And how far are the painted images turned? Compare each with true images at many angles, and take the nearest one:

# %%
candidates = list(range(-20, 61, 4))
true = torch.stack([as_images(windows, angle) for angle in candidates], dim=1)  # (6, candidates, 3, 32, 32)
for fraction, images in painted.items():
    errors = (true - images[:, None]).square().mean((2, 3, 4))
    nearest = [candidates[index] for index in errors.argmin(1)]
    print(
        f"{fraction:.0%} of 40° is {40 * fraction:.0f}°; nearest true angles: {nearest}, mean {sum(nearest) / 6:.0f}°"
    )

# %% [markdown]
# Nearly all of the 40 degrees, for either fraction. Half an hour on a CPU was enough for these decoders to learn what view 2
# looks like, and hardly how to go back from it; the earlier one goes back a little. A picture that looks right is easily taken
# for more than it shows.

# %% [markdown]
# So looking at pictures is how to begin, and not how to compare encoders: notebook 03 measures. To train one on your own images go
# to notebook 02. The same pictures of an image of yours, with sliders: `hf-equissl demo --app`.
