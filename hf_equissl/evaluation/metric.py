"""What a metric is, and those that evaluators declare. Needs no torch: records are read and compared without it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What a number is, so that tables, records and cards can show one that they have never heard of.

    Attributes:
        name: As records and logs call it, in snake_case.
        unit: "%" for shares from 0 to 1, which are shown times 100; otherwise what stands behind the number.
        digits: Decimals that are shown.
        higher_is_better: Direction, for choosing the best of several.
        hub_type: Name of the metric in the ``model-index`` of a card; ``None`` keeps the number out of it.
        library: Distribution that computes it; records keep its version.
    """

    name: str
    unit: str = ""
    digits: int = 4
    higher_is_better: bool = True
    hub_type: str | None = None
    library: str = "hf-equissl"

    @property
    def scale(self) -> float:
        """What a value is multiplied by when it is shown."""
        return 100.0 if self.unit == "%" else 1.0

    def text(self, value: float, std: float | None = None) -> str:
        """Write a value for readers, with its standard deviation where there is one: "71.25 +- 0.31"."""
        numbers = [value] if std is None else [value, std]
        text = " +- ".join(f"{number * self.scale:.{self.digits}f}" for number in numbers)
        return text if self.unit in ("", "%") else f"{text} {self.unit}"

    def round(self, value: float) -> float:
        """Round a value, not scaled, to the digits that ``text`` shows."""
        return round(value, self.digits + (2 if self.unit == "%" else 0))


TOP1 = Metric("top1", "%", digits=2, hub_type="accuracy")
MEAN_PER_CLASS = Metric("mean_per_class", "%", digits=2)
TOP5 = Metric("top5", "%", digits=2, hub_type="top5")
R2 = Metric("r2", hub_type="r_squared")
R2_SCALAR = Metric("r2_scalar")
R2_LINEAR = Metric("r2_linear")
R2_FEW_SHOT = Metric("r2_few_shot")
EQUIVARIANCE = Metric("equivariance", hub_type="equivariance_score")
EQUIVARIANCE_FLOOR = Metric("equivariance_floor")
LIE_DERIVATIVE = Metric("lie_derivative", higher_is_better=False, hub_type="lie_derivative")
EFFECTIVE_RANK = Metric("effective_rank", digits=2, hub_type="effective_rank")
FEATURE_STD = Metric("feature_std", hub_type="feature_std")
