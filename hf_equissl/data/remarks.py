"""What people should know of a source before anything is computed: what is left out, and what becomes of the rest."""

from __future__ import annotations

from itertools import islice

from .decoding import AS_STORED, Decoding, find_used_range, open_image
from .errors import ImageDecodeError, explain_decode_errors
from .metadata import count_bands
from .sources import ImageSource

HOW_TO_STRETCH = "--value_range, or data.value_range of a recipe"


def list_remarks(source: ImageSource, count: int = 8) -> tuple[str, ...]:
    """List what lies beside the images and is not used, and what of the first ``count`` images is used otherwise than
    people expect: few of their 16 bits, or more bands than red, green and blue.
    """
    ranges: list[tuple[float, float]] = []
    unusual: list[str] = []
    for row in islice(iter(source.dataset), count):
        try:
            content = source.content(row)
            used = find_used_range(content, source.decoding)
            unusual += describe_bands(content, source.decoding)
        except ImageDecodeError:
            continue
        ranges += [] if used is None else [used]
    warnings = [f"warning: the first images {line}" for line in dict.fromkeys(unusual)]
    if source.decoding.value_range == "full" and ranges and max(high for _, high in ranges) < 32768:
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
        warnings.append(
            f"warning: the first images have 16 bits per band and use only {low:.0f} to {high:.0f} of 0 to 65535: they "
            f"become almost black. Set value_range ({HOW_TO_STRETCH}) to auto, or to the range of the sensor, such as "
            f"[0, {2 ** int(high).bit_length() - 1}]"
        )
    return (*(f"note: {line}" for line in source.notes), *warnings)


def describe_bands(content: bytes, decoding: Decoding = AS_STORED) -> list[str]:
    """Say what becomes of more than three bands of a TIFF image, and of CMYK; nothing of other images.

    Raises:
        ImageDecodeError: It does not decode.
    """
    bands = (count_bands(content) or (3, 8))[0]
    with explain_decode_errors():
        mode = open_image(content, decoding.max_pixels).mode
    if mode == "CMYK":
        return ["are CMYK: they are converted to RGB without their colour profile"]
    if bands <= 3:
        return []
    if mode in ("RGBA", "RGBa"):
        return [
            f"have {bands} bands, of which the fourth is taken for transparency and laid over white. If it is "
            "something else, such as near infrared, save the other three alone"
        ]
    return [f"have {bands} bands; only red, green and blue are used"]
