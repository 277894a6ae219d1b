"""Distances and CLIP scores: values computed by hand, named features, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fmn_nb.concepts import NotThereError
from fmn_nb.emoji.judges import Judge
from fmn_nb.evaluation.quality import Features, frechet_distance, inception_features, judge_features, kernel_distance
from fmn_nb.models import digest_of


class Means(nn.Module):
    """Two features that can be computed by hand: mean red and mean green, from 0 to 1."""

    num_features = 2

    def forward(self, images):
        return images[:, :2].float().mean(dim=(2, 3)) / 255


MEANS = Features("means", Means(), 4)


def colours(*pairs):
    return [Image.new("RGB", (4, 4), (red, green, 0)) for red, green in pairs]


REAL = colours((0, 0), (255, 0), (0, 255), (255, 255))
SHIFTED = colours((51, 51), (255, 51), (51, 255), (255, 255))


def test_frechet_distance_by_hand():
    # Independent features: the distance is the squared difference of means plus that of the standard deviations.
    red, shifted = np.array([0, 1, 0, 1.0]), np.array([0.2, 1, 0.2, 1])
    by_hand = 2 * ((red.mean() - shifted.mean()) ** 2 + (red.std(ddof=1) - shifted.std(ddof=1)) ** 2)
    assert frechet_distance(MEANS, REAL, SHIFTED) == pytest.approx(by_hand, abs=1e-6)
    assert frechet_distance(MEANS, REAL, REAL) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_by_hand():
    real = np.array([[0, 0], [1, 0], [0, 1], [1, 1.0]])
    other = np.array([[0.2, 0.2], [1, 0.2], [0.2, 1], [1, 1]])

    def kernel(a, b):
        return (a @ b.T / 2 + 1) ** 3

    def within(a):
        return (kernel(a, a).sum() - np.trace(kernel(a, a))) / (len(a) * (len(a) - 1))

    by_hand = within(real) + within(other) - 2 * kernel(real, other).mean()
    assert kernel_distance(MEANS, REAL, SHIFTED) == pytest.approx(by_hand, abs=1e-5)


def test_kernel_distance_on_its_own_scale_does_not_depend_on_the_features_scale():
    class Larger(Means):
        def forward(self, images):
            return 300 * super().forward(images)

    distances = [kernel_distance(Features("means", module, 4, own_scale=True), REAL, SHIFTED)
                 for module in (Means(), Larger())]
    assert distances[0] == pytest.approx(distances[1], rel=1e-4)
    assert distances[0] != pytest.approx(kernel_distance(MEANS, REAL, SHIFTED), rel=1e-2)


def test_kernel_distance_is_the_same_for_the_same_seed_and_leaves_the_generator_alone():
    rng = np.random.default_rng(0)
    real, images = (rng.integers(0, 256, (120, 4, 4, 3), dtype=np.uint8) for _ in range(2))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = kernel_distance(MEANS, real, images, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == kernel_distance(MEANS, real, images, seed=1) != kernel_distance(MEANS, real, images, seed=2)
    assert abs(first) < 0.01, "two draws of one distribution"


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_too_few_images_are_an_error(distance):
    with pytest.raises(ValueError, match="at least 2 images a side, not 4 and 1"):
        distance(MEANS, REAL, SHIFTED[:1])


def test_features_are_named_by_their_weights():
    torch.manual_seed(0)
    one, other = Judge(), Judge()
    assert judge_features(one).name == judge_features(one).name != judge_features(other).name


def test_a_digest_sees_every_bit():
    one = nn.Linear(2, 2)
    before = digest_of(one)
    with torch.no_grad():
        one.bias[0] = torch.nextafter(one.bias[0], torch.tensor(9.0))
    assert digest_of(one) != before


def test_inception_says_what_is_missing(monkeypatch):
    def missing(**_):
        raise ModuleNotFoundError("no module torch_fidelity")

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", missing)
    with pytest.raises(NotThereError, match="pip install torch-fidelity"):
        inception_features()
