"""Several concepts: what each way trains on, and that every stage's figures are the judge's."""

from __future__ import annotations

import pytest
import torch
from judges import Puppet
from quick import QUICK
from sessions import session
from snapshots import assert_unchanged, snapshot
from tiny import tiny_sd

from fmn_nb.concepts import Concept
from fmn_nb.emoji.world import VOCABULARY
from fmn_nb.evaluation import rebound, sequence_table, stages, together_table
from fmn_nb.evaluation.sequence import FORGOTTEN, OTHERS, kept_drawings
from fmn_nb.forgetting import forget_several, settings_for
from fmn_nb.patches import combine
from fmn_nb.plots import sequence_figure

CAT, DOG, NOTO = Concept("cat"), Concept("dog"), Concept("noto", kind="style")
SHORT = {name: value for name, value in QUICK.items() if name != "retain_prompts"}


def several(pipe, concepts, way, **options):
    return forget_several(pipe, concepts, way, preset=settings_for("balanced", SHORT), **options)


def test_each_way_trains_on_what_it_says() -> None:
    pipe = tiny_sd()
    before = snapshot(pipe)
    after, apart = (several(pipe, [CAT, DOG], way) for way in ("one after another", "apart"))
    (once,) = several(pipe, [CAT, DOG], "all at once")
    assert_unchanged(pipe, before)
    assert after[1].info["on_top_of"] == [after[0].info["concepts"]] and "on_top_of" not in apart[1].info
    assert all(torch.equal(tensor, apart[0].tensors[name]) for name, tensor in after[0].tensors.items())
    assert any(not torch.equal(tensor, apart[1].tensors[name]) for name, tensor in after[1].tensors.items())
    assert [concept["name"] for concept in once.info["concepts"]] == ["cat", "dog"]
    kept = several(pipe, [CAT, DOG], "apart", patches=apart[:1])
    assert kept[0] is apart[0], "a patch that is there isn't made again"


def nothing_seen():
    return Puppet(lambda call, image: ("nothing", "noto"))


def test_every_stage_by_hand() -> None:
    pipe, concepts = tiny_sd(), [CAT, DOG]
    patches = several(pipe, concepts, "apart")
    before, others = snapshot(pipe), kept_drawings(concepts, VOCABULARY, 4)

    def sees(call, image):
        stage, call = divmod(call, 3)  # each stage judges the cat, the dog, and all others
        if call == 2:  # all others: the labels right at first, then one less a stage; the style never
            return ("nothing" if image < stage else others[image].label), "another"
        gone = {(1, 0): 4, (2, 0): 3, (2, 1): 4}.get((stage, call), 0)  # of four images
        return ("nothing" if image < gone else concepts[call].name), "noto"

    table = sequence_table(session(pipe, Puppet(sees)), concepts, patches, images=4, retain_images=4)
    assert_unchanged(pipe, before)
    wide = stages(table)
    assert wide["cat, UA"].tolist() == [0, 1, 0.75] and wide["dog, UA"].tolist() == [0, 0, 1]
    assert wide[f"{OTHERS}, label"].tolist() == [1, 0.75, 0.5] and wide[f"{OTHERS}, style"].tolist() == [0, 0, 0]
    assert rebound(table, "cat") == 0.25 and rebound(table, "dog") == 0
    first = table[table["stage"] == 1]
    assert first["state"].tolist() == ["forgotten", "waiting", "retained", "retained"]
    assert table.groupby("stage")["forgotten"].first().tolist() == [0, 1, 2]
    assert "apart: cat ua 0.75, dog ua 1.00" in sequence_figure({"apart": table}).words
    first, second = sequence_figure({"apart": table, "backwards": table[::-1]}).axes[:2]
    looks = [{line.get_label(): line.get_color() for line in axes.get_lines()} for axes in (first, second)]
    assert looks[0] == looks[1], "one legend holds for all panels"


def test_a_single_patch_is_one_stage() -> None:
    pipe = tiny_sd()
    (patch,) = several(pipe, [CAT, DOG], "all at once")
    table = sequence_table(session(pipe, nothing_seen()), [CAT, DOG], [patch], images=2, retain_images=2)
    assert table.groupby("stage")["forgotten"].first().tolist() == [0, 2]
    assert set(table.loc[table["stage"] == 1, "state"]) == {"forgotten", "retained"}


def test_patches_for_several_at_once_by_hand() -> None:
    pipe, concepts = tiny_sd(), [CAT, DOG, Concept("frog")]
    made, before, drawn = several(pipe, concepts[:2], "apart"), snapshot(pipe), []

    def sees(call, image):  # patch for one: the cat, all others; patch for two: the cat, the dog, all others
        drawn.append(call)
        gone = {0: 4, 2: 2, 3: 1}.get(call, 0)  # of four images, then of two each
        return ("nothing" if image < gone else {0: "cat", 2: "cat", 3: "dog"}.get(call, "nothing")), "another"

    table = together_table(session(pipe, Puppet(sees)), concepts, {2: combine(made), 1: made[0]}, images=4,
                           retain_images=3)
    assert_unchanged(pipe, before)
    assert stages(table)[f"{FORGOTTEN}, UA"].to_dict() == {1: 1.0, 2: 0.75}
    assert table.query("measure == 'ua'")["images"].tolist() == [4, 4]
    assert table.query("measure == 'label'")["value"].tolist() == [0, 0]
    assert [drawn.count(call) for call in range(5)] == [4, 3, 2, 2, 3]
    for patches in ({}, {0: made[0]}, {4: made[0]}):
        with pytest.raises(ValueError, match="of 3 concepts; give them for 1 to 3"):
            together_table(pipe, concepts, patches)


def test_patches_one_after_the_other_are_their_sum() -> None:
    pipe = tiny_sd()
    one, two = several(pipe, [CAT, DOG], "apart")
    with combine([one, two]).applied(pipe):
        together = {name: p.detach().clone() for name, p in pipe.unet.named_parameters()}
    with one.applied(pipe), two.applied(pipe):
        for name, parameter in pipe.unet.named_parameters():
            torch.testing.assert_close(parameter, together[name], atol=1e-6, rtol=1e-5)


def test_what_is_kept_names_none_of_the_concepts() -> None:
    wanted = kept_drawings([CAT, NOTO, DOG], VOCABULARY, 12)
    assert len(wanted) == 12 and not any(word in d.prompt for d in wanted for word in ("cat", "dog", "noto"))
    with pytest.raises(ValueError, match="prompts name none of the concepts"):
        kept_drawings([CAT], VOCABULARY, 1000)


def test_wrong_requests_are_clear_errors() -> None:
    pipe = tiny_sd()
    for concepts, way in (([], "apart"), ([CAT, CAT], "apart"), ([CAT], "together")):
        with pytest.raises(ValueError, match="each concept once and a way"):
            forget_several(pipe, concepts, way)
    patches = several(pipe, [CAT, DOG], "apart")
    with pytest.raises(ValueError, match="2 patches for 3 concepts"):
        sequence_table(pipe, [CAT, DOG, NOTO], patches)
    table = sequence_table(session(pipe, nothing_seen()), [CAT, DOG], patches, images=1, retain_images=1)
    with pytest.raises(ValueError, match="'frog' was never forgotten"):
        rebound(table, "frog")
