"""Images from anywhere to batches of cropped views.

Names are imported when they are first used: a command that names what is not there says so without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy_names import import_when_used

__all__ = [
    "Decoding",
    "EpochSampler",
    "ImageDecodeError",
    "ImageInfo",
    "ImageSource",
    "ImageSourceError",
    "ImageViewDataset",
    "SampleDataset",
    "SkippedImage",
    "SkippedImages",
    "StreamingViewDataset",
    "Subset",
    "TooManyBadImages",
    "UnknownSplitError",
    "decode_image",
    "list_remarks",
    "load_images",
]

if TYPE_CHECKING:
    from .dataset import EpochSampler, ImageViewDataset, SampleDataset, SkippedImage
    from .decoding import Decoding, decode_image
    from .errors import ImageDecodeError, ImageSourceError, TooManyBadImages, UnknownSplitError
    from .health import SkippedImages
    from .remarks import list_remarks
    from .sources import ImageInfo, ImageSource, load_images
    from .streaming import StreamingViewDataset
    from .subsets import Subset

__getattr__, __dir__ = import_when_used(
    __name__,
    __all__,
    {
        "Decoding": "decoding",
        "EpochSampler": "dataset",
        "ImageDecodeError": "errors",
        "ImageInfo": "sources",
        "ImageSource": "sources",
        "ImageSourceError": "errors",
        "ImageViewDataset": "dataset",
        "SampleDataset": "dataset",
        "SkippedImage": "dataset",
        "SkippedImages": "health",
        "StreamingViewDataset": "streaming",
        "Subset": "subsets",
        "TooManyBadImages": "errors",
        "UnknownSplitError": "errors",
        "decode_image": "decoding",
        "list_remarks": "remarks",
        "load_images": "sources",
    },
)
