"""The demo in the browser: a Gradio app around an ``Analyst``. No network is needed, and nothing is sent anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..data import ImageDecodeError, decode_image
from .analysis import Analysis, Analyst, Reading, in_a_row, to_picture
from .change import LIMITS, Change
from .lens import Lens

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
try:
    import gradio as gr
except ImportError as missing:
    raise ImportError("The app needs Gradio: pip install 'hf-equissl[demo]'.") from missing

if TYPE_CHECKING:
    from gradio.data_classes import ImageData

TITLE = "What turning an image does to its features"
INTRODUCTION = """\
# What turning an image does to its features
Drop an image, or choose one below; then turn, shift, recolour or blur it. Two encoders look at the image and at the
changed one, {side} pixels wide. Neither was ever told what an angle is.
"""
HELP = """\
- **Images on the way**, painted from the *equivariant* features of both images alone. Only the encoder that was trained
  with reconstruction has decoders.
- **Angle**: a linear probe, fitted on other images, reads it off the frozen features of both.
- **Patches**: their features in the colours of their first three principal components.
- **Nearest neighbours** of the changed image by its *invariant* features.
- **Cosine** between the features of the image and of the changed one: the invariant part should stay, the equivariant
  part should tell.
"""
# Field of a change -> label, step of its slider, and its value when the app opens.
SLIDERS: Mapping[str, tuple[str, float, float]] = {
    "angle": ("Turn (degrees, counter-clockwise)", 1, 30),
    "shift_right": ("Shift right (% of the width)", 0.5, 0),
    "shift_down": ("Shift down (% of the height)", 0.5, 0),
    "brightness": ("Brightness", 0.05, 0),
    "contrast": ("Contrast", 0.05, 0),
    "saturation": ("Saturation", 0.05, 0),
    "hue": ("Hue (turns of the colour circle)", 0.01, 0),
    "blur": ("Blur (pixels that the encoders see)", 0.1, 0),
}
API_NAME = "analyse"
CSS = """
footer {display: none !important}
.examples .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr)) !important}
"""


def build_app(analyst: Analyst | None = None) -> gr.Blocks:
    """Make the app.

    Its API has one endpoint, ``/analyse``: a path or URL of an image and the fields of a ``Change``, in their order; it
    returns the numbers of ``Analysis.numbers``, the picture of both images, and what is shown of each encoder.

    Args:
        analyst: The encoders and the gallery; default: those that ship.

    Raises:
        ImportError: Without Gradio.
        LoadError: The encoders that ship are not there.
    """
    seen: Analyst = analyst or Analyst()
    first = next(iter(seen.lenses.values()))
    with gr.Blocks(title=TITLE, analytics_enabled=False) as app:
        gr.Markdown(INTRODUCTION.format(side=first.encoder.image_size))
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                image: Any = gr.Image(
                    label="Image", sources=["upload", "clipboard"], format="png", height=240, buttons=[]
                )
                image.preprocess = _path_of  # what is no image is refused in this package's words, not in Pillow's
                gr.Markdown("or choose one of these:")
                shown: Any = gr.Gallery(
                    list(seen.gallery.values()),
                    show_label=False,
                    columns=4,
                    height=240,
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_classes="examples",
                )
                sliders: list[Any] = [
                    gr.Slider(*LIMITS[name], value=value, step=step, label=label, buttons=[])
                    for name, (label, step, value) in SLIDERS.items()
                ]
                reset: Any = gr.Button("Change nothing", size="sm")
            with gr.Column(scale=3, min_width=600):
                gr.Markdown("The image, and the changed image, as the encoders see them:")
                both = _picture()
                with gr.Row():
                    columns = [part for lens in seen.lenses.values() for part in _column(lens)]
                gr.Markdown(HELP)
                with gr.Accordion("Numbers (API endpoint /analyse)", open=False):
                    numbers = gr.JSON(show_label=False)

        def analyse(path: str | None, *values: float) -> tuple[Any, ...]:
            return tuple(_show(seen, path, dict(zip(SLIDERS, values, strict=True))))

        def choose(event: gr.SelectData) -> Image.Image:
            return list(seen.gallery.values())[event.index]

        inputs, outputs = [image, *sliders], [numbers, both, *columns]
        shown.select(choose, None, image, api_visibility="private")
        reset.click(lambda: [0.0] * len(sliders), None, sliders, api_visibility="private")
        events: Any = app
        events.load(lambda: next(iter(seen.gallery.values())), None, image, api_visibility="private")
        gr.on(
            [image.change, *(slider.change for slider in sliders)],
            analyse,
            inputs,
            outputs,
            api_name=API_NAME,
            trigger_mode="always_last",
            show_progress="minimal",
        )
    return app


def launch_app(analyst: Analyst | None = None, **options: Any) -> Any:
    """Start the app.

    Args:
        analyst: As in ``build_app``.
        **options: Arguments of ``gradio.Blocks.launch``: ``server_name``, ``server_port``, ``prevent_thread_lock``, ...

    Returns:
        The app, whose ``local_url`` says where it answers.
    """
    app = build_app(analyst)
    app.launch(css=CSS, theme=_theme(), share=False, ssr_mode=False, show_error=True, **options)
    return app


def _path_of(payload: ImageData | None) -> str | None:
    """Return the path of an uploaded file, unread."""
    return None if payload is None else payload.path


def _theme() -> gr.themes.Base:
    """Make the look: fonts of the reader's machine, so that none is fetched."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def _picture() -> gr.Image:
    return gr.Image(format="png", image_mode=None, height=150, interactive=False, show_label=False, buttons=[])


def _column(lens: Lens) -> Iterator[Any]:
    """Make what is shown of one encoder."""
    way = "painted by decoders, then the true ones" if lens.can_paint else "this encoder has no decoders"
    with gr.Column(min_width=280):
        yield gr.Markdown(f"## {lens.name}")
        gr.Markdown(f"Images on the way: {way}")
        yield _picture()
        gr.Markdown("Patches of the image, and of the changed image")
        yield _picture()
        gr.Markdown("Nearest neighbours of the changed image")
        yield gr.Gallery(show_label=False, columns=3, height=170, allow_preview=False, interactive=False, buttons=[])


def _show(analyst: Analyst, path: str | None, values: Mapping[str, float]) -> Iterator[Any]:
    """Analyse an image file, and yield what the parts of the page show, in their order.

    Raises:
        gr.Error: It is no image.
    """
    if path is None:
        yield from [None] * (2 + 4 * len(analyst.lenses))
        return
    try:
        image = decode_image(path)
    except ImageDecodeError as error:
        raise gr.Error(f"This is no image that can be read: {error}.", title="Not an image", duration=None) from error
    change = Change(**values)
    found = analyst.analyse(image, change)
    yield found.numbers()
    yield in_a_row([to_picture(found.image), to_picture(found.changed)])
    for name, reading in found.readings.items():
        yield f"## {name}\n{_say(reading, change)}"
        yield _between(found, reading)
        yield in_a_row([to_picture(image, smooth=False) for image in (reading.before, reading.after)])
        yield [(analyst.gallery[other], f"{other} {cosine:.2f}") for other, cosine in reading.neighbours.items()]


def _between(found: Analysis, reading: Reading) -> Image.Image | None:
    """Lay out what decoders paint, and beside it the true images on the way; ``None`` without decoders."""
    if not reading.painted:
        return None
    rows = [in_a_row([to_picture(image) for image in images.values()]) for images in (reading.painted, found.between)]
    return in_a_row(rows, gap=24)


def _say(reading: Reading, change: Change) -> str:
    """Put the numbers of one encoder into words."""
    if reading.angle is None:
        angle = "No probe of angles is stored beside this encoder."
    else:
        angle = f"Turned by **{change.angle:+.0f}°**, read off the features: **{reading.angle:+.1f}°**."
    cosines = ", ".join(f"{part} **{value:.2f}**" for part, value in reading.cosines.items())
    return f"{angle}<br>Cosine with the image: {cosines}."
