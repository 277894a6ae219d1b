"""A notebook's bench: its model's oracle, or why there is none."""

from pathlib import Path

from gated import gated

from fmn_nb.concepts import Concept
from fmn_nb.models import UnknownModelError
from fmn_nb.runs import bench
from fmn_nb.runs.bench import Lesson


def test_a_lesson_has_an_oracle_where_there_is_one_of_its_concept(emoji, oracle, monkeypatch):
    def lesson(name, kind="object", pipe=emoji):
        concept = Concept(name, kind=kind)
        return Lesson(pipe, concept, Path("runs"), pipe, concept)

    def missing(name):
        raise UnknownModelError(f"the model {name!r} isn't there yet; train it")

    monkeypatch.setattr(bench, "load", missing)
    assert lesson("cat").oracle() == (None, "the model 'emoji-oracle' isn't there yet; train it")
    assert "'emoji-oracle-grounded'" in lesson("cat", pipe=gated(emoji)).oracle()[1], "boxes have one of their own"
    monkeypatch.setattr(bench, "load", lambda name: oracle)
    assert lesson("cat").oracle() == (oracle, "") and lesson("fluent", "style").oracle()[0] is oracle
    none, why = lesson("frog").oracle()
    assert none is None and why == "the oracle was taught 'frog'; it never learned cat, fluent, Milo, Luna"
