"""Classifiers: shapes, standardisation, parameter counts of the papers, and a checkpoint that gives the same logits."""

import json

import numpy as np
import pytest
import torch

from ops.models import (
    ClassifierSpec,
    build_classifier,
    load_classifier,
    save_classifier,
    update_extra,
)


def head(model="linear", **kwargs):
    return build_classifier(ClassifierSpec("embeddings", model, 3, ("a", "b", "c"), width=5, **kwargs))


def network(model, size=32, **kwargs):
    return build_classifier(ClassifierSpec("images", model, 10, image_size=size, **kwargs))


@pytest.mark.parametrize("model, penultimate", [("linear", 5), ("mlp:7", 7), ("mlp:7x4", 4)])
def test_heads_map_features_to_logits_through_their_last_layer(model, penultimate):
    net, x = head(model).eval(), torch.randn(6, 5)
    features = net.features(x)
    assert features.shape == (6, penultimate)
    np.testing.assert_allclose(net.last_layer()(features).detach(), net(x).detach(), atol=1e-6)


def test_standardised_head_sees_zero_mean_and_unit_variance():
    x = torch.randn(400, 5) * torch.tensor([1.0, 10, 0.1, 3, 0]) + 4
    net = head()
    net.standardize(x.mean(0), x.std(0, correction=0))
    z = net.features(x)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(z.std(0, correction=0), [1, 1, 1, 1, 0], atol=1e-4)


# Parameters: He et al. 2015, table 6 (0.27 M, 0.85 M, 1.7 M); Zagoruyko and Komodakis 2016, table 5 (36.5 M).
SIZES = {"resnet20": 0.27, "resnet56": 0.85, "resnet110": 1.73, "wrn28_10": 36.5, "preact_resnet56": 0.85}


@pytest.mark.parametrize("model, millions", SIZES.items())
def test_cifar_networks_have_the_papers_size(model, millions):
    with torch.device("meta"):
        net = network(f"cifar_{model}")
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.011 if millions < 30 else 0.05
    )


@pytest.mark.parametrize(
    "model", ["cifar_resnet20", "cifar_preact_resnet20", "cifar_wrn10_2", "resnet18", "timm:mobilenetv3_small_050"]
)
def test_networks_take_bytes_or_floats(model):
    net = network(model, small_images=not model.startswith("cifar")).eval()
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        logits = net(x)
        np.testing.assert_allclose(net(x.float() / 255), logits, atol=1e-5)
        np.testing.assert_allclose(net.last_layer()(net.features(x)), logits, atol=1e-5)
    assert logits.shape == (2, 10)


@pytest.mark.parametrize(("model", "channels"), [("resnet20", 64), ("preact_resnet20", 64), ("wrn10_2", 128)])
def test_cifar_networks_end_at_a_quarter_of_the_resolution(model, channels):
    features = network(f"cifar_{model}").net.forward_features(torch.rand(2, 3, 32, 32))
    assert features.shape == (2, channels, 8, 8)


def test_small_images_keep_the_resolution():
    net = network("resnet18", small_images=True)
    assert net.net.forward_features(torch.randn(1, 3, 32, 32)).shape[-2:] == (4, 4)


@pytest.mark.parametrize("make", [lambda: head("mlp:4", dropout=0.2), lambda: network("cifar_resnet20", 16)])
def test_a_checkpoint_gives_the_same_logits(make, tmp_path):
    net = make()
    x = torch.randn(4, 5) if net.input == "embeddings" else torch.rand(4, 3, 16, 16)
    net(x)  # moves the running statistics of batch normalisation
    net.eval()
    save_classifier(net, tmp_path / "best", loss="cross_entropy")
    update_extra(tmp_path, calibration={"temperature": 1.5})
    loaded = load_classifier(tmp_path)  # a training's output stands for its best
    assert torch.equal(loaded(x), net(x)) and loaded.spec == net.spec
    assert loaded.extra == {"loss": "cross_entropy", "calibration": {"temperature": 1.5}}
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["model.json", "model.safetensors"]


def test_a_foreign_folder_is_a_mistake_in_one_line(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.json").write_text(json.dumps({"weights": 1}))
    save_classifier(head(), tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"\x08")
    for name in ("absent", "foreign", "cut"):
        with pytest.raises(ValueError, match=name) as error:
            load_classifier(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("model", ["mlp", "mlp:0", "mlp:4y", "resnet18"])
def test_a_head_that_does_not_exist(model):
    with pytest.raises(ValueError, match=r"^model "):
        head(model)


@pytest.mark.parametrize(
    "model, small",
    [("no_such_net", False), ("cifar_resnet21", False), ("cifar_wrn28", False), ("vit_tiny_patch16_224", True)],
)
def test_a_network_that_does_not_exist(model, small):
    with pytest.raises(ValueError, match=r"^(model|small_images)\b"):
        network(model, small_images=small)


def test_one_class_is_no_classification():
    with pytest.raises(ValueError, match="at least 2"):
        ClassifierSpec("embeddings", "linear", 1, width=4)
