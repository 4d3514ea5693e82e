"""MDC: the choice of the most learnable prefix, and which images rest."""

import torch
from tiny_real import make_real

from dq_multimodal.condensation.multisize import FeatureDistance, Prefixes
from dq_multimodal.condensation.nets import ConvNet
from dq_multimodal.condensation.synthetic import Synthetic


def test_choice_and_freezing_by_hand():
    prefixes = Prefixes()
    prefixes.choose([10.0, 8.0, 6.0])  # before the first step: nothing to compare with
    assert (prefixes.chosen, prefixes.frozen) == (1, 0)
    prefixes.choose([9.0, 5.0, 5.7])  # by 1, 3, 0.3: 2 follows 1, which rests
    assert (prefixes.chosen, prefixes.frozen) == (2, 1)
    prefixes.choose([7.5, 4.0, 4.0])  # by 1.5, 1, 1.7: 3 follows 2
    assert (prefixes.chosen, prefixes.frozen) == (3, 2)
    prefixes.choose([6.5, 4.0, 5.5])  # by 1, 0, 1.5, a rise counts too: 3 stays, all learn
    assert (prefixes.chosen, prefixes.frozen) == (3, 0)
    prefixes.choose([3.0, 4.0, 3.0])  # by 3.5, 0, 2.5: back to 1, all learn
    assert (prefixes.chosen, prefixes.frozen) == (1, 0)
    prefixes.choose([3.0, 2.0, 1.0])  # by 0, 2, 2: the smaller of equals
    assert (prefixes.chosen, prefixes.frozen) == (2, 1)


def test_feature_distance_of_every_prefix_as_naively():
    real = make_real()
    torch.manual_seed(0)
    nets = [ConvNet(3, 1, 8, depth=2, width=4) for _ in range(2)]
    synthetic = Synthetic(torch.randn(12, 1, 8, 8), 3)
    found = FeatureDistance(real, nets)(synthetic)
    assert len(found) == 3
    with torch.no_grad():
        for n in (1, 2, 3):
            total = 0.0
            for net in nets:
                for k in range(3):
                    of_real = net.embed(real.normalise(real.images[real.classes == k])).mean(0)
                    ours = net.embed(synthetic.images[k::3][:n]).mean(0)
                    total += float((ours - of_real).square().sum()) / 2
            assert abs(found[n - 1] - total) < 1e-4 * total
