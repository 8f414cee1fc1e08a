"""Count files that do not decode, and stop a run that has too many of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from .dataset import SkippedImage
from .errors import TooManyBadImages

logger = logging.getLogger(__name__)


class SkippedImages:
    """Counts the files that did not decode, in the training process, and stops the run when there are too many.

    Each bad file is logged once. The share is that of distinct bad files among the images that were seen (each counted
    once): by this process, with ``update`` alone, or by all that ``exchange``. Few bad files early in a run say little,
    so nothing stops before ``min_bad`` of them, except when all images were seen or none may be bad (``max_share=0``).
    Of a stream, whose length is not known, a bad file that comes up again says that all were seen once.

    Args:
        max_share: Largest share that is put up with, in [0, 1]; 1 never stops.
        min_bad: Distinct bad files before the share is judged.
        num_images: Images in the data set, where that is known.

    Attributes:
        bad: Names of the bad files, with the reasons.
        seen: Images seen so far.
    """

    def __init__(self, max_share: float = 0.01, *, min_bad: int = 10, num_images: int | None = None) -> None:
        if not 0.0 <= max_share <= 1.0:
            raise ValueError(f"max_share is {max_share}, expected a share in [0, 1].")
        self.max_share, self.min_bad, self.num_images = max_share, min_bad, num_images
        self.bad: dict[str, str] = {}
        self.seen = 0
        self._untold: dict[str, str] = {}
        self._seen_untold = 0
        self._came_again = False

    @property
    def count(self) -> int:
        """Number of distinct bad files."""
        return len(self.bad)

    @property
    def share(self) -> float:
        """Share of distinct bad files among the images seen."""
        return self.count / max(1, self._distinct_seen())

    def take_from(self, batch: dict[str, Any], judge: bool = True) -> None:
        """Take ``skipped`` out of a batch, where no device needs it, and ``update``; leave a batch without as it is."""
        if "skipped" in batch:
            self.update(batch.pop("skipped"), seen=len(batch["index"]), judge=judge)

    def update(self, skipped: Iterable[SkippedImage], seen: int, judge: bool = True) -> None:
        """Add one batch.

        Args:
            skipped: The batch's ``skipped``.
            seen: Number of images in the batch, B.
            judge: Compare the share at once. One of several processes leaves that to ``exchange``: the others would
                wait for one that stops alone.

        Raises:
            TooManyBadImages: The share is above ``max_share``.
        """
        skipped = list(skipped)
        self.seen += seen + len(skipped)
        self._seen_untold += seen + len(skipped)
        for item in skipped:
            if item.name in self.bad:
                self._came_again = True
            else:
                self.bad[item.name] = self._untold[item.name] = item.reason
                logger.warning("Skipped %s: %s", item.name, item.reason)
        if judge and skipped:
            self._note_length(self._came_again)
            self._judge()

    def exchange(self, collect: Callable[[Any], list[Any]]) -> None:
        """Add what all processes saw since the last exchange, and judge the share of all. All have to call it.

        Args:
            collect: A value -> the values of all processes (``distributed.gather_objects``).

        Raises:
            TooManyBadImages: on all of them alike.
        """
        own = self._untold, self._seen_untold, self._came_again
        told = collect(own)
        self._untold, self._seen_untold = {}, 0
        self.seen += sum(seen for _, seen, _ in told) - own[1]
        for bad, _, _ in told:
            self.bad |= bad
        self._note_length(any(again for _, _, again in told))
        if self.bad:
            self._judge()

    def _note_length(self, came_again: bool) -> None:
        """Take what a stream has shown for its length as soon as a bad file came up again."""
        if came_again and self.num_images is None:
            self.num_images = self.seen

    def _judge(self) -> None:
        enough = self.count >= self.min_bad or self.max_share == 0.0 or self._distinct_seen() == self.num_images
        if enough and self.share > self.max_share:
            listed = "\n".join(f"  {name}: {reason}" for name, reason in list(self.bad.items())[:10])
            raise TooManyBadImages(
                f"{self.count} of {self._distinct_seen()} images seen ({self.share:.1%}) did not decode; "
                f"{self.max_share:.1%} are allowed. The first:\n{listed}\n"
                "Repair or remove these files, or raise max_bad_share if their loss is acceptable."
            )

    def _distinct_seen(self) -> int:
        return self.seen if self.num_images is None else min(self.seen, self.num_images)
