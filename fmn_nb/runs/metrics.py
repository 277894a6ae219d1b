"""The metrics: one table, and made from it the schema of `metrics.json` (schema 1).

A metric's name, title and meaning, which way is better and what values it can have are here and nowhere else: the check
of a run's figures, a run's page and the command's table are made from this table. A new metric is a new line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from fmn_nb.concepts.concept import KINDS
from fmn_nb.evaluation.probes import PROBES


@dataclass(frozen=True)
class Metric:
    """One figure of a model, before or after forgetting.

    Attributes:
        name: its key in metrics.json. short: its title in tables.
        more_is_better: whether a larger value is the better one.
        least, most: the values it can have, None for no bound.
    """

    name: str
    short: str
    meaning: str
    more_is_better: bool = True
    least: float | None = 0
    most: float | None = 1

    @property
    def is_fraction(self) -> bool:
        """Whether it is a share of images, or made of such shares."""
        return (self.least, self.most) == (0, 1)


METRICS = (
    Metric("ua", "UA", "forgotten: share of the concept's images in which the judge no longer sees it"),
    Metric("ira", "IRA", "kept nearby: judge accuracy on the other concepts of the same kind"),
    Metric("cra", "CRA", "kept elsewhere: judge accuracy in the other domain"),
    Metric("h", "H", "harmonic mean of UA, IRA and CRA"),
    Metric("frechet", "Frechet", "distance of the images' distribution to real ones", False, most=None),
    Metric("kernel", "Kernel", "distance to real ones as a squared maximum mean discrepancy, unbiased", False,
           None, None),
    Metric("clip_score", "CLIP score", "agreement of image and prompt", True, None, None),
)
#: figures beyond the protocol's prompts
PROBE_METRICS = tuple(Metric(name, name.replace("_", " ").replace("ua", "UA"), probe.meaning)
                      for name, probe in PROBES.items())
#: what notebooks measure; a section that is absent from a run's metrics.json has its reason under "skipped"
MEASURED = ("forgetting", "before", "after", "attention", "m_score")

Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]
Count = Annotated[float, Field(ge=0, multiple_of=1)]  # as JSON has it: 2.0 is whole
Text = Annotated[str, Field(min_length=1)]
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class Section(BaseModel):
    """A part of metrics.json: what it names is absent or has its type, never null; anything else in it may stay."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    skipped: dict[str, Text] = {}


class Forgetting(Section):
    """The fine-tune and its cost."""

    steps: Count
    seconds: Amount
    stopped_because: Text
    loss_first: float = None
    loss_last: float = None
    trainable_parameters: Count = None
    patch_bytes: Count = None
    peak_memory_bytes: Count = None


class Attention(Section):
    """The concept's share of attention."""

    mass_before: Share = None
    mass_after: Share = None
    later_before: Share = None
    later_after: Share = None


class Cost(Section):
    """What forgetting and measuring took."""

    forgetting_seconds: Amount = None
    forgetting_peak_memory_bytes: Count = None
    patch_bytes: Count = None
    evaluation_seconds: Amount = None
    evaluation_peak_memory_bytes: Count = None


class NamedConcept(Section):
    """What was forgotten."""

    name: Text
    kind: Literal[KINDS]


Measured = create_model(
    "Measured", __base__=Section, __doc__="One model's figures.",
    ceiling=(Share, None), features=(Text, None), images=(Count, None), ci95=(dict[str, Interval], None),
    **{one.name: (Annotated[float, Field(ge=one.least, le=one.most)], None) for one in (*METRICS, *PROBE_METRICS)},
)


class Content(Section):
    """All of metrics.json."""

    version: Literal[1] = Field(alias="schema")
    model: Text
    concept: NamedConcept
    preset: Text
    seed: Count
    versions: dict[str, str]
    forgetting: Forgetting = None
    before: Measured = None
    after: Measured = None
    attention: Attention = None
    cost: Cost = None
    m_score: dict[str, Any] = None
    oracle: dict[str, Any] = None


SECTIONS = tuple(field.alias or name for name, field in Content.model_fields.items())


class MetricsError(ValueError):
    """A metrics.json breaks the schema, or a value has no place in one."""


def validate(metrics: Any, sections: tuple[str, ...] = ()) -> None:
    """Raise MetricsError, naming the place, unless `metrics` follows schema 1 and holds all of `sections`.

    A section may be missing if "skipped" tells why. Fractions lie in [0, 1], counts are whole and not negative.
    """
    try:
        Content.model_validate(metrics)
    except ValidationError as error:
        raise MetricsError(first_fault(error, "metrics.json")) from None
    missing = [name for name in sections if name not in metrics and name not in metrics.get("skipped", {})]
    if missing:
        raise MetricsError(f"the notebooks left no {', '.join(missing)} in metrics.json, and no reason under 'skipped'")


_FAULTS = {
    "missing": "is missing",
    "extra_forbidden": "is not a known key",
    "literal_error": "must be {expected}",
    "less_than_equal": "must be at most {le:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "int_type": "must be a whole number",
    "multiple_of": "must be a whole number",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "string_too_short": "must not be empty",
    "list_type": "must be a list",
    "too_short": "must hold at least {min_length}",
    "too_long": "must hold at most {max_length}",
}


def first_fault(error: ValidationError, whole: str) -> str:
    """The first fault, in one line: its place ("after.ua"; `whole` if it is everything), and why it is one."""
    fault = error.errors(include_url=False)[0]
    where, cause = ".".join(map(str, fault["loc"])) or whole, fault.get("ctx", {})
    if fault["type"] == "value_error":  # raised by a check of ours, which says it all
        return str(cause["error"])
    said = _FAULTS.get(fault["type"], "must hold names and values").format(**cause)
    return f"{where} {said}" + ("" if fault["type"] == "missing" else f", not {shortened(fault['input'])}")


def plain(value: Any, where: str) -> Any:
    """`value` in JSON's own types, converting numpy and torch scalars; `where` is the dotted name for errors.

    Raises:
        MetricsError: a NaN, an infinity, or what JSON can't hold.
    """
    if isinstance(value, dict):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, str | int | float | bool | None) and getattr(value, "shape", None) == ():
        value = value.item()  # a numpy or torch scalar
    if isinstance(value, float) and not math.isfinite(value):
        raise MetricsError(f'{where} is {value}: leave it out and give the reason under "skipped"')
    if not isinstance(value, str | int | float | bool | None):
        raise MetricsError(f"{where} is a {type(value).__name__}, which metrics.json cannot hold")
    return value


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"after": {"ua": 1, "ci95": {"ua": [0, 1]}}} as {"after.ua": 1, "after.ci95.ua.0": 0, ...}."""
    row = {}
    for name, value in content.items():
        if isinstance(value, list):
            value = {str(index): item for index, item in enumerate(value)}
        row |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return row


def comparison(before: dict[str, Any], after: dict[str, Any], metrics: tuple[Metric, ...] = METRICS,
               ) -> list[tuple[Metric, Any, Any]]:
    """(metric, value before, value after) of every metric that either side has; None for a missing value."""
    return [(one, before.get(one.name), after.get(one.name)) for one in metrics
            if one.name in before or one.name in after]
