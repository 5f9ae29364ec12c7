"""Heads in one product equal heads one by one."""

import pytest
import torch
from torch import nn

from ops.confusion import epoch_entropies
from ops.head_ensemble import HeadEnsemble, HeadEntropies, PackedHeads, rows_per_product

FORMS = pytest.mark.parametrize("hidden", [None, 5])


def as_modules(state):
    """The same head, from nn.Linear layers."""
    layers = []
    for depth in range(len(state) // 2):
        weight = state[f"{depth}.weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": state[f"{depth}.bias"]})
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@FORMS
def test_packed_heads_equal_a_loop_over_modules(hidden):
    ensemble = HeadEnsemble(range(6), 7, 4, hidden)
    heads = [[ensemble.head(2 * epoch + member) for member in range(2)] for epoch in range(3)]
    features = torch.randn(11, 7)
    logits = PackedHeads(heads).logits(features)
    for epoch in range(3):
        for member in range(2):
            expected = as_modules(heads[epoch][member])(features)
            torch.testing.assert_close(logits[:, epoch, member], expected, rtol=1e-5, atol=1e-5)


@FORMS
def test_training_form_equals_modules_on_rows_of_their_own(hidden):
    ensemble = HeadEnsemble([3, 8], 7, 4, hidden)
    features = torch.randn(2, 9, 7)
    for member in range(2):
        expected = as_modules(ensemble.head(member))(features[member])
        torch.testing.assert_close(ensemble(features)[member], expected, rtol=1e-5, atol=1e-5)


@FORMS
def test_a_heads_start_and_gradient_do_not_depend_on_its_neighbours(hidden):
    features, targets = torch.randn(9, 7), torch.randint(4, (9,))
    alone, among = HeadEnsemble([5], 7, 4, hidden), HeadEnsemble([1, 5, 2], 7, 4, hidden)
    for ensemble, copies in ((alone, 1), (among, 3)):
        loss, _ = ensemble.losses(features.expand(copies, -1, -1), targets.expand(copies, -1))
        loss.mean(dim=1).sum().backward()
    for name in alone.head(0):
        torch.testing.assert_close(alone.head(0)[name], among.head(1)[name])
    for a, b in zip(alone.parameters(), among.parameters()):
        torch.testing.assert_close(a.grad[0], b.grad[1], rtol=1e-5, atol=1e-6)


def test_heads_start_as_linear_layers_do():
    ensemble = HeadEnsemble(range(20), 400, 30, 100)
    for depth, inside in ((0, 400), (1, 100)):
        layer = nn.Linear(inside, 30)
        for ours, theirs in ((ensemble.weights[depth], layer.weight), (ensemble.biases[depth], layer.bias)):
            assert (
                ours.abs().max().item() == pytest.approx(inside**-0.5, rel=0.01) and theirs.abs().max() <= inside**-0.5
            )
            assert ours.std().item() == pytest.approx((3 * inside) ** -0.5, rel=0.05)


def test_load_head_brings_back_what_head_gave():
    one, other = HeadEnsemble([1, 2], 5, 3, 4), HeadEnsemble([7, 8], 5, 3, 4)
    other.load_head(0, one.head(1))
    for name, tensor in one.head(1).items():
        assert torch.equal(other.head(0)[name], tensor)


def test_heads_of_two_forms_and_features_of_another_width_are_refused():
    linear, hidden = HeadEnsemble([0], 5, 3).head(0), HeadEnsemble([0], 5, 3, 4).head(0)
    with pytest.raises(ValueError, match="heads: expected"):
        PackedHeads([[linear], [hidden]])
    with pytest.raises(ValueError, match="features: expected shape"):
        PackedHeads([[linear]]).logits(torch.zeros(2, 4))


@FORMS
@pytest.mark.parametrize("rows", [None, 1, 4])
def test_entropies_in_blocks_are_those_of_the_whole(hidden, rows, monkeypatch):
    ensemble = HeadEnsemble(range(6), 7, 4, hidden)
    heads = [[ensemble.head(2 * epoch + member) for member in range(2)] for epoch in range(3)]
    features = torch.randn(11, 7)
    expected = epoch_entropies(PackedHeads(heads).logits(features)).detach()
    torch.testing.assert_close(HeadEntropies(heads, rows=rows)(features), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr("ops.head_ensemble.BLOCK_BYTES", 4 * 512 * 2 * (hidden or 4))
    blocked = HeadEntropies(heads, rows=rows)
    assert [product.num_epochs for product in blocked.products] == [1, 1, 1]
    torch.testing.assert_close(blocked(features), expected, rtol=1e-5, atol=1e-6)


def test_rows_per_product_bounds_the_logits():
    assert rows_per_product(60 * 10) == 8192
    assert 4 * rows_per_product(60 * 1000) * 60 * 1000 <= 32 << 20
    assert rows_per_product(10**9) == 1
