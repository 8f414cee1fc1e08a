"""Images from anywhere to batches of cropped views."""

from __future__ import annotations

from .dataset import EpochSampler, ImageViewDataset, SampleDataset, SkippedImage
from .decoding import Decoding, decode_image
from .errors import ImageDecodeError, ImageSourceError, TooManyBadImages, UnknownSplitError
from .health import SkippedImages
from .remarks import list_remarks
from .sources import ImageInfo, ImageSource, load_images
from .streaming import StreamingViewDataset
from .subsets import Subset

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
