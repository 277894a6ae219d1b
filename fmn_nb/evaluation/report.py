"""What an evaluation found, as tables, figures and metrics."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from fmn_nb.concepts import Concept, JudgeLike, Vocabulary
from fmn_nb.evaluation.measures import FIGURES, Measures, judge_images, measure
from fmn_nb.evaluation.oracle import NO_ORACLE, OracleReport, no_oracle
from fmn_nb.evaluation.probes import PROBES
from fmn_nb.evaluation.protocol import Drawing, evenly, share_of
from fmn_nb.evaluation.quality import FeatureMismatchError
from fmn_nb.files import replacing
from fmn_nb.plots import as_png, attention_figure, collateral_figure, confusion_figure, floor_figure, image_grid

EXAMPLES = 6  # images of each set in the figure


@dataclass(frozen=True, eq=False)
class Report:
    """What `evaluate` found.

    Attributes:
        before, after: figures of the base model and of the patched one (None without a patch).
        attention: means over layers: mass_before, mass_after on the concept's words, later_before, later_after on the
            positions after them. attention_layers: the same by layer.
        outcomes: a row per image and model: what was asked, what the judge saw; empty without a judge.
        wanted: the drawings, in the order of `images["before"]` and `images["after"]`: forget set, retain set, probes.
            Without a judge, only the retain set, if there was something to compare it with.
        similarity: how similar each other name of the domain is to the concept, most similar first; empty if no CLIP
            could tell.
        oracle: floors of attacks and distances to a model that was never taught the concept; empty, with the reason,
            if none was given.
        cost: seconds, peak memory and bytes of forgetting and of this evaluation (`costs` with units).
    """

    concept: Concept
    seed: int
    size: str
    before: Measures
    after: Measures | None
    attention: dict[str, float] = field(default_factory=dict)
    outcomes: pd.DataFrame = field(repr=False, default_factory=pd.DataFrame)
    images: dict[str, list[Image.Image]] = field(repr=False, default_factory=dict)
    wanted: list[Drawing] = field(repr=False, default_factory=list)
    attention_layers: pd.DataFrame = field(repr=False, default_factory=pd.DataFrame)
    similarity: pd.Series = field(repr=False, default_factory=lambda: pd.Series(dtype=float))
    cost: dict[str, float | int] = field(default_factory=dict)
    vocabulary: Vocabulary | None = field(repr=False, default=None)
    oracle: OracleReport = field(repr=False, default_factory=no_oracle)

    @property
    def models(self) -> dict[str, Measures]:
        """The available measures, by "before" and "after"."""
        return {"before": self.before} | ({"after": self.after} if self.after else {})

    def table(self) -> pd.DataFrame:
        """Measures as rows, before and after as columns, with 95% intervals. The same seed gives the same table."""
        first, second = self.before.features, (self.after or self.before).features
        if first != second:
            raise FeatureMismatchError(
                f"distances on the features {first!r} and {second!r} can't be compared; measure both on the same")

        def cell(measures: Measures, name: str) -> str:
            value = getattr(measures, name)
            if value is None:
                return "skipped"
            if name in measures.ci95:
                return _with_interval(value, *measures.ci95[name])
            return f"{value:.3f}" if isinstance(value, float) else str(value)

        return pd.DataFrame({when: {name: cell(m, name) for name in (*FIGURES, "images")}
                             for when, m in self.models.items()})

    def probes(self) -> pd.DataFrame:
        """Paraphrases, two objects, similar and unrelated concepts, classes and readings, before and after.

        Probes as rows: each share with its interval, images, aim ("forget" or "keep") and what the share says.
        """
        rows = {}
        for name, probe in PROBES.items():
            if found := {when: m.probes[name] for when, m in self.models.items() if name in m.probes}:
                cells = {when: _with_interval(s.value, s.low, s.high) for when, s in found.items()}
                rows[name] = {**cells, "images": next(iter(found.values())).images,
                              "aim": "forget" if probe.forgetting else "keep", "meaning": probe.meaning}
        return pd.DataFrame.from_dict(rows, orient="index")

    def costs(self) -> pd.DataFrame:
        """What forgetting and this evaluation cost, as far as known: value and unit of each.

        It is separate from `table`, because seconds and memory depend on the machine, and no two runs have the same.
        """
        rows = {name: (value, "s" if name.endswith("seconds") else "bytes") for name, value in self.cost.items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "unit"], dtype=object).rename_axis("cost")

    def skipped(self) -> pd.Series:
        """What could not be measured, by model and figure, with the reason."""
        reasons = {(when, name): why for when, m in self.models.items() for name, why in m.skipped.items()}
        reasons |= {("oracle", name): why for name, why in self.oracle.skipped.items() if why != NO_ORACLE}
        index = pd.MultiIndex.from_tuples(list(reasons), names=["model", "figure"]) if reasons else None
        return pd.Series(list(reasons.values()), index=index, name="reason", dtype=object)

    def confusion(self, when: str = "after", what: str = "label") -> pd.DataFrame:
        """How often each label or style asked for (rows) was seen as each other one (columns), in images of forget and
        retain set.

        The columns begin in the rows' order, so that right verdicts are on the diagonal.

        Raises:
            ValueError: nothing was evaluated `when`.
        """
        there = self.outcomes["when"].unique() if len(self.outcomes) else []
        if when not in there:
            raise ValueError(f"nothing was evaluated {when!r}; choose from: {', '.join(there) or 'nothing'}")
        rows = self.outcomes[(self.outcomes["when"] == when) & self.outcomes["role"].isin(["forget", "retain"])]
        table = pd.crosstab(rows[f"asked_{what}"], rows[f"seen_{what}"])
        never_asked = [name for name in table.columns if name not in table.index]
        return table.reindex(columns=[*table.index, *never_asked], fill_value=0)

    def collateral(self) -> pd.DataFrame:
        """The retain set's accuracy for each name asked for, before and after, worst loss first.

        Index: name; columns: domain ("label" or "style"), before, after, change, images, and similarity to the
        concept (within its own domain, if a CLIP could tell).

        Raises:
            ValueError: no judge judged the images.
        """
        self._check_judged()
        rows = self.outcomes[self.outcomes["role"] == "retain"]
        parts = []
        for what, right in (("label", "right"), ("style", "right_style")):
            asked = rows.astype({right: float}).groupby([f"asked_{what}", "when"])[right]
            parts.append(asked.mean().unstack().assign(domain=what, images=asked.size().unstack()["before"]))
        table = pd.concat(parts).rename_axis(index="name", columns=None)
        table["similarity"] = self.similarity.reindex(table.index)
        columns = ["domain", "before", "images", "similarity"]
        if "after" in table:
            table["change"] = table["after"] - table["before"]
            table = table.sort_values(["change", "similarity"], ascending=[True, False], kind="stable")
            columns[2:2] = ["after", "change"]
        return table[columns]

    def second_opinion(self, judge: JudgeLike) -> pd.DataFrame:
        """Another judge on the same images: its figures beside the first judge's interval, and how often both agree.

        Index: (model, figure), of ua, ira, cra, h, and the shares of images with the same label and the same style;
        columns: first, second, low, high (the first's 95% interval, or that of the share), within.

        Raises:
            ValueError: no judge has judged the images yet.
        """
        self._check_judged()
        rows = {}
        for when, first in self.models.items():
            seen = judge_images(judge, self.concept, self.wanted, self.images[when], self.vocabulary)
            second, own = measure(seen, self.concept, self.seed), self.outcomes[self.outcomes["when"] == when]
            for name in ("ua", "ira", "cra", "h"):
                value, (low, high) = getattr(second, name), first.ci95[name]
                rows[when, name] = (getattr(first, name), value, low, high, low <= value <= high)
            for what in ("label", "style"):
                same = share_of(pd.Series(own[f"seen_{what}"].to_numpy() == seen[f"seen_{what}"].to_numpy()))
                rows[when, f"same {what}"] = (1.0, same.value, same.low, same.high, None)
        return pd.DataFrame(list(rows.values()), columns=["first", "second", "low", "high", "within"],
                            index=pd.MultiIndex.from_tuples(list(rows), names=["model", "figure"]))

    def _check_judged(self) -> None:
        if self.outcomes.empty:
            raise ValueError("no judge judged these images: evaluate with clip=FOLDER or judge=...")

    def to_metrics(self) -> dict[str, Any]:
        """The sections before, after, attention and cost of metrics.json, and oracle if one was given."""
        found = {when: m.to_metrics() for when, m in self.models.items()}
        if self.oracle.skipped.get("oracle") != NO_ORACLE:
            found["oracle"] = self.oracle.to_metrics()
        return found | {"attention": dict(self.attention), "cost": dict(self.cost)}

    def figures(self) -> dict[str, Figure]:
        """Figures by name: images, confusion, collateral, oracle, attention, if they have something to show."""
        found: dict[str, Figure] = {}
        if self.images:
            places = {role: [i for i, d in enumerate(self.wanted) if d.role == role] for role in ("forget", "retain")}
            columns = min([EXAMPLES, *(len(some) for some in places.values() if some)])
            shown = {f"{role} set, {when}": [self.images[when][i] for i in evenly(some, columns)]
                     for role, some in places.items() if some for when in self.images}
            found["images"] = image_grid(sum(shown.values(), []), columns=columns, row_names=list(shown))
        if len(self.outcomes):
            what = "style" if self.concept.kind == "style" else "label"
            last = "after" if self.after else "before"
            found["confusion"] = confusion_figure(self.confusion(last, what), f"{self.concept.name}, {last}")
            if self.after:
                found["collateral"] = collateral_figure(self.collateral())
        if len(self.oracle.attacks):
            found["oracle"] = floor_figure(self.oracle.attacks)
        if len(self.attention_layers.columns) > 2:
            found["attention"] = attention_figure(self.attention_layers)
        return found

    def save(self, folder: str | Path) -> Path:
        """Save what the figures were made of: outcomes.csv (a row per image and model) and collateral.csv.

        Raises:
            ValueError: no judge judged the images, so there is nothing to save.
        """
        folder = Path(folder)
        for name, table in (("outcomes", self.outcomes), ("collateral", self.collateral())):
            with replacing(folder / f"{name}.csv") as temporary:
                table.to_csv(temporary, index=name == "collateral", lineterminator="\n")
        return folder

    def _repr_html_(self) -> str:
        tables = {"": self.table(), "Probes": self.probes()}
        if len(self.skipped()):
            tables["Not measured"] = self.skipped().to_frame()
        if len(self.oracle.attacks):
            tables["Attacks, above the oracle's floor"] = self.oracle.attacks.round(3)
        if self.oracle.distances:
            tables["Distance to the oracle"] = self.oracle.distance_table().round(4)
        if self.cost:
            tables["Cost"] = self.costs()
        parts = [f"<h4>{escape(title)}</h4>{table.to_html()}" if title else table.to_html()
                 for title, table in tables.items() if len(table)]
        for name, figure in self.figures().items():
            shown, alt = base64.b64encode(as_png(figure)).decode("ascii"), escape(f"{name} of {self.concept.name}")
            parts.append(f'<img alt="{alt}" src="data:image/png;base64,{shown}">')
        return "\n".join(parts)


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"
