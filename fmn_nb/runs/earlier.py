"""What a benchmark's folder already holds, so that its table can grow: the rows, and what was measured beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn_nb.files import read_json
from fmn_nb.runs.means import TUNED_ON

if TYPE_CHECKING:
    import pandas as pd

    from fmn_nb.runs.benchmark import Job

TABLE_FILE, RESULTS_FILE, EXCESS_FILE = "results.csv", "results.json", "excess.csv"
DISTANCES_FILE = "distances.csv"
OF_ROWS = ("summary", "distances")  # in results.json's oracle: what was made of the rows
Place = tuple[str, str, int]  # concept, preset, seed


@dataclass(frozen=True)
class Earlier:
    """A table of before, by concept, preset and seed.

    Attributes:
        made: its results.json. rows, excess, distances: the rows of its tables.
    """

    made: Mapping[str, Any]
    rows: Mapping[Place, list[dict[str, Any]]]
    excess: Mapping[Place, list[dict[str, Any]]]
    distances: Mapping[Place, list[dict[str, Any]]]

    @classmethod
    def read(cls, out: Path, identity: Mapping[str, Any], size: str) -> Earlier | None:
        """The table in `out`; None if there is none, or if it was made of another model or in another way."""
        import pandas as pd

        def table(name: str) -> dict[Place, list[dict[str, Any]]]:
            return _by_job(pd.read_csv(out / name)) if (out / name).is_file() else {}

        try:
            made = read_json(out / RESULTS_FILE)
            if {name: made[name] for name in identity} != identity or made["size"] != size or "settings" not in made:
                return None
            return cls(made, _by_job(pd.read_csv(out / TABLE_FILE)), table(EXCESS_FILE), table(DISTANCES_FILE))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def result(self, job: Job) -> dict[str, Any] | None:
        """{"row": the job's row}, with `attack` and `oracle` as a result has them if the row has these; None if the
        table lacks the job, or has it with other settings."""
        place = job.concept.name, job.preset, job.seed
        if place not in self.rows or self.made["settings"].get(job.preset) != job.settings.to_dict():
            return None
        (row,) = self.rows[place]
        found: dict[str, Any] = {"row": row}
        if (budget := self.made.get("attack", {}).get("budget")) and isfinite(row.get("attack_success", nan)):
            found["attack"] = {"budget": budget}
        excess = self.excess.get(place, [])
        whole = all("floor_images" in one for one in excess)  # what came before is measured anew
        if whole and (excess or place in self.distances):
            beside = {name: value for name, value in self.made["oracle"].items() if name not in OF_ROWS}
            found["oracle"] = {"compared_with": beside, "excess": excess,
                               "distances": self.distances.get(place, [])}
        return found

    @property
    def commands(self) -> list[str]:
        """The commands that made it, first ones first."""
        return [*self.made.get("earlier_commands", ()), *filter(None, [self.made.get("command")])]


def _by_job(table: pd.DataFrame) -> dict[Place, list[dict[str, Any]]]:
    """A written table's rows as they were measured, by concept, preset and seed."""
    measured = table.drop(columns=TUNED_ON, errors="ignore")
    if "budget" in measured:
        measured["budget"] = measured["budget"].astype(object).where(measured["budget"].notna(), "")
    return {place: rows.to_dict("records") for place, rows in measured.groupby(["concept", "preset", "seed"])}
