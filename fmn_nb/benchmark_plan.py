"""What the results table is made of: which concepts, presets, settings and seeds, as a list of jobs.

A job is one concept forgotten with one preset and one seed. What it is made from is written beside its result, so that
a finished one is never repeated, and a stale one (other settings, another model) never counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from fmn_nb.concepts import Concept
from fmn_nb.emoji.world import AMBIGUOUS, IDENTITIES, OBJECTS, STYLES, kind_of
from fmn_nb.forgetting_settings import PRESETS, Settings, SettingsError, settings_for
from fmn_nb.protocol import REPEATS, check_concept

SETTINGS_FILE = "settings.yaml"
EVERYTHING = "all"  # asks for every preset and variant of the settings file
_BASE = "preset"  # in a variant's settings: the preset that it changes
_SEEDS = "seeds"  # in a preset's settings: the only seeds that it is made with, of those asked for
#: to be raised whenever forgetting or measuring changes so that equal settings give other results: older ones are stale
ALGORITHM = 2
GROUPS: dict[str, tuple[str, ...]] = {
    "objects": tuple(OBJECTS), "styles": tuple(STYLES), "identities": tuple(IDENTITIES), "words": tuple(AMBIGUOUS),
}


@dataclass(frozen=True)
class Job:
    """One concept, one preset, one seed.

    Attributes:
        towards: for an ambiguous word the reading that is to show instead (a correction), else None.
        settings: the preset's, with the overrides that were asked for.
    """

    concept: Concept
    towards: str | None
    preset: str
    settings: Settings
    seed: int
    size: str

    @property
    def name(self) -> str:
        """A file's name for it: "birthday-cake-balanced-seed0"."""
        return f"{self.concept.name.replace(' ', '-')}-{self.preset}-seed{self.seed}"

    @property
    def group(self) -> str:
        """The row's kind in the table: object, style, identity or word (an ambiguous word, corrected)."""
        return "word" if self.towards else self.concept.kind

    def made_from(self) -> dict[str, Any]:
        """Everything about the job that its result depends on, as JSON holds it."""
        return {"algorithm": ALGORITHM, "concept": asdict(self.concept), "towards": self.towards, "preset": self.preset,
                "settings": self.settings.to_dict(), "seed": self.seed, "size": self.size}


def plan(concepts: Sequence[str] = (), presets: Sequence[str] = ("balanced", "paper"), seeds: Sequence[int] = (0,),
         size: str = "quick", overrides: Mapping[str, Mapping[str, Any]] | None = None) -> list[Job]:
    """All jobs in the order in which they are done: a seed's concepts, each with every preset.

    Args:
        concepts: names or groups (objects, styles, identities, words); all four groups where empty.
        presets: names of presets, or of variants that `overrides` define.
        overrides: preset -> settings to replace (`read_overrides`). One that says which "preset" it changes is a
            variant, with a name of its own; one that names "seeds" is made with these alone, of those asked for.

    Raises:
        ValueError: an unknown name, size or seed, or nothing to do; the text lists what there is.
        SettingsError: an unknown preset or setting.
    """
    if size not in REPEATS:
        raise ValueError(f"{size!r} is no size of evaluation; choose quick or full")
    unused = [name for name in overrides or {} if name not in presets]
    if unused:
        raise SettingsError(f"settings for '{unused[0]}', which isn't asked for; presets: {', '.join(presets)}")
    wrong = [seed for seed in seeds if type(seed) is not int or seed < 0]
    if wrong or not seeds or not presets:
        raise ValueError(f"give at least one preset and seeds that are whole numbers from 0, not {list(seeds)}")
    settings = {preset: settings_of(preset, (overrides or {}).get(preset, {})) for preset in presets}
    known = [_concept(name) for name in _names(concepts)]
    its_seeds = {preset: (overrides or {}).get(preset, {}).get(_SEEDS, seeds) for preset in presets}
    jobs = [Job(concept, towards, preset, settings[preset], seed, size) for seed in dict.fromkeys(seeds)
            for concept, towards in known for preset in settings if seed in its_seeds[preset]]
    if not jobs:
        raise ValueError(f"nothing to do: no preset is made with the seeds {list(seeds)}, by its settings")
    return jobs


def settings_of(name: str, changes: Mapping[str, Any]) -> Settings:
    """The settings of a preset or variant, from what `read_overrides` says of it."""
    seeds = changes.get(_SEEDS, ())
    if not isinstance(seeds, (list, tuple)):
        raise SettingsError(f"the seeds of '{name}' are a list, [0, 1], not {seeds!r}")
    return settings_for(changes.get(_BASE, name),
                        {key: value for key, value in changes.items() if key not in (_BASE, _SEEDS)})


def _names(wanted: Sequence[str]) -> Iterable[str]:
    """Names with the groups spelled out, each once."""
    return dict.fromkeys(name for item in wanted or GROUPS for name in GROUPS.get(item, (item,)))


def _concept(name: str) -> tuple[Concept, str | None]:
    kind = kind_of(name)
    if kind is None:
        raise ValueError(f"the emoji world has no '{name}'; groups: {', '.join(GROUPS)}; names: "
                         + ", ".join(one for group in GROUPS.values() for one in group))
    concept = Concept(name, kind=kind)
    check_concept(concept)
    return concept, AMBIGUOUS[name][1].phrase if name in AMBIGUOUS else None


def read_overrides(file: Path | None, single: Sequence[str] = (),
                   presets: Sequence[str] = tuple(PRESETS)) -> dict[str, dict[str, Any]]:
    """Settings to replace, preset -> name -> value, from a YAML or JSON file and from texts "preset.name=value".

    The file may hold more presets than are asked for (["all"] asks for everything in it); the texts, which replace what
    the file says, may not. Settings under another name are a variant of the preset that they name:

        paper:
          learning_rate: 1e-4
        paper-words:
          preset: paper
          positions: [words]
          seeds: [0]        # whatever seeds are asked for, it is made with this one alone

    Raises:
        SettingsError: the file or a text isn't of this shape, names an unknown preset, or gives a variant a name that
            is no word (results are filed under it).
    """
    content = _read(file) if file is not None else {}
    for name, settings in content.items():
        preset = settings.get(_BASE, name)
        if str(preset) not in PRESETS:
            raise SettingsError(f"no preset '{preset}'; there are {', '.join(PRESETS)}")
        if not re.fullmatch(r"[\w.-]+", str(name)) or name == EVERYTHING or (name in PRESETS and preset != name):
            raise SettingsError(f"'{name}' is no name for a variant of '{preset}': letters, digits, '.', '-' and '_', "
                                f"but not {EVERYTHING} or another preset's")
    if list(presets) != [EVERYTHING]:
        content = {preset: settings for preset, settings in content.items() if preset in presets}
    for text in single:
        left, equals, value = text.partition("=")
        preset, dot, name = left.rpartition(".")
        if not (equals and dot and preset and name):
            raise SettingsError(f"a setting is given as preset.name=value, not '{text}'")
        content.setdefault(preset, {})[name] = yaml.safe_load(value)
    return {preset: {name: _number(value) for name, value in settings.items()} for preset, settings in content.items()}


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"{file} can't be read as YAML or JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise SettingsError(f"{file} must hold presets, each with its settings (paper: {{learning_rate: 1.0e-4}})")
    return {str(preset): dict(settings) for preset, settings in content.items()}


def _number(value: Any) -> Any:
    """YAML reads "1e-4" as a text; a text that is a number is meant as one. Lists become tuples, as settings hold."""
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
