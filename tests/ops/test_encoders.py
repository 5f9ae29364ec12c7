"""Each form of an encoder's name, from files made here; preparation, identity, and what a wrong name or file says."""

import functools
import json
import os
import pickle
import subprocess
import sys

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from ops.encoders import load_encoder, resolve_spec
from ops.images import normalize, resize

FACTORY = '''
import pathlib
import torch
from torch import nn

HERE = pathlib.Path(__file__).resolve().parent


class Means(nn.Module):
    """The mean of each quarter of each channel, and of its square: d = 24."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view(1, 3, 1, 1))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        both = torch.cat([x, x**2 * self.scale], dim=1)
        return self.drop(nn.functional.adaptive_avg_pool2d(both, 2).view(len(x), -1))


def ready(image_size=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bicubic"):
    module = Means()
    module.image_size, module.mean, module.std, module.interpolation = image_size, mean, std, interpolation
    return module


def narrow_std(): return ready(std=(0.2, 0.3, 0.0))
def lanczos(): return ready(interpolation="lanczos")
def bare(): return Means()
def none(): return None
def fails(): raise RuntimeError("no weights\\nhere")


def maps():
    module = nn.Conv2d(3, 4, 3)
    module.image_size, module.mean, module.std, module.interpolation = 8, (0.0,) * 3, (1.0,) * 3, "bilinear"
    return module
'''


@pytest.fixture
def factory(tmp_path):
    path = tmp_path / "my encoders.py"
    path.write_text(FACTORY)
    return path


def some_images(shapes=((40, 30), (16, 16), (5, 80))):
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 256, (3, *shape), dtype=np.uint8)) for shape in shapes]


# module:


def test_a_factory_in_a_file(factory):
    encoder = load_encoder(f"module:{factory}:ready")
    assert (encoder.width, encoder.image_size, encoder.interpolation) == (24, 16, "bicubic")
    assert not encoder.module.training and all(p.dtype == torch.float32 for p in encoder.module.parameters())
    images = some_images()
    batch = encoder.prepare(images)
    assert torch.equal(batch, normalize(resize(images, 16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    features = encoder(batch)
    assert features.shape == (3, 24) and features.dtype == torch.float32 and not features.requires_grad
    quarters = batch.numpy().astype(np.float64).reshape(3, 3, 2, 8, 2, 8)
    expected = np.concatenate([quarters, quarters**2 * np.arange(1, 4).reshape(3, 1, 1, 1, 1)], 1).mean(axis=(3, 5))
    np.testing.assert_allclose(features.numpy(), expected.reshape(3, 24), rtol=1e-5, atol=1e-6)
    assert torch.equal(encoder.encode(encoder.resize(images).contiguous()), features)  # uint8 is normalised on the way


def test_a_relative_file_becomes_absolute(factory, monkeypatch):
    monkeypatch.chdir(factory.parent)
    spec = load_encoder(f"module:./{factory.name}:ready").spec
    assert spec == f"module:{factory}:ready"
    monkeypatch.chdir("/")
    assert load_encoder(spec).width == 24


def test_files_of_one_name_do_not_collide(tmp_path):
    for folder, width in (("a", 4), ("b", 9)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "torch.py").write_text(
            f"from ops.encoders import Pixels\n"
            f"def make():\n    m = Pixels(); m.image_size = {width}\n"
            f"    m.mean, m.std, m.interpolation = (0.,) * 3, (1.,) * 3, 'bilinear'\n    return m\n"
        )
    widths = [load_encoder(f"module:{tmp_path / folder / 'torch.py'}:make").width for folder in "ab"]
    assert widths == [16, 81]
    assert sys.modules["torch"] is torch


def test_a_factory_in_a_package(tmp_path, monkeypatch):
    (tmp_path / "a_package_of_encoders").mkdir()
    (tmp_path / "a_package_of_encoders" / "__init__.py").write_text("")
    (tmp_path / "a_package_of_encoders" / "small.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_encoder("module:a_package_of_encoders.small:ready").width == 24


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bare", "lacks the attributes image_size, mean, std, interpolation"),
        ("none", r"none\(\) must return an nn.Module, got NoneType"),
        ("fails", "RuntimeError: no weights here"),
        ("redy", "has no function 'redy'; did you mean ready"),
        ("narrow_std", "std must be 3 finite numbers, above 0"),
        ("lanczos", "interpolation: must be one of bicubic, bilinear, got 'lanczos'"),
        ("maps", r"expected features of shape \(B, d\), got \(2, 4, 6, 6\)"),
    ],
)
def test_what_a_wrong_factory_says(factory, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(f"module:{factory}:{name}")
    assert "\n" not in str(caught.value) and str(factory) in str(caught.value)


def test_a_file_that_does_not_run(tmp_path):
    (tmp_path / "broken.py").write_text("def (")
    before = set(sys.modules)
    with pytest.raises(ValueError, match="SyntaxError"):
        load_encoder(f"module:{tmp_path / 'broken.py'}:make")
    assert not [name for name in set(sys.modules) - before if name.startswith("encoder_file")]


# pixels:


def test_pixels_are_grey_values():
    encoder = load_encoder("pixels:8")
    assert encoder.width == 64
    (image,) = some_images([(8, 8)])
    grey = torch.full((3, 8, 8), 51, dtype=torch.uint8)
    features = encoder(encoder.prepare([image, grey])).numpy()
    luminance = np.tensordot([0.299, 0.587, 0.114], image.numpy() / 255.0, axes=1)
    np.testing.assert_allclose(features[0], luminance.ravel(), atol=1e-6)
    np.testing.assert_allclose(features[1], 0.2, atol=1e-6)
    assert np.linalg.matrix_rank(features[1:] - 0.2, tol=1e-5) == 0  # grey stays grey: no noise from the weights


# What every encoder does


def test_l2_and_autocast(factory):
    plain, unit = load_encoder(f"module:{factory}:ready"), load_encoder(f"module:{factory}:ready", l2=True)
    batch = plain.prepare(some_images())
    expected = plain(batch) / plain(batch).norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit(batch), expected, rtol=1e-6, atol=1e-6)
    half = plain.encode(batch, autocast=True)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain(batch), rtol=0.05, atol=0.05)


def test_to_keeps_everything_else(factory):
    encoder = load_encoder(f"module:{factory}:ready")
    moved = encoder.to("cpu")
    assert (moved.spec, moved.fingerprint, moved.width) == (encoder.spec, encoder.fingerprint, 24)
    assert moved.device == torch.device("cpu")


def test_a_batch_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"batch: expected shape \(B, 3, 8, 8\), got \(2, 3, 9, 8\)"):
        load_encoder("pixels:8")(torch.zeros(2, 3, 9, 8))


def test_the_fingerprint_is_of_weights_and_preparation_not_of_paths(factory, tmp_path):
    def fingerprint(text=FACTORY, name="elsewhere.py", **options):
        (tmp_path / name).write_text(text)
        return load_encoder(f"module:{tmp_path / name}:ready", **options).fingerprint

    here = load_encoder(f"module:{factory}:ready").fingerprint
    assert len(here) == 64 and here == fingerprint()
    others = [
        fingerprint(FACTORY.replace("2.0, 3.0]", "2.0, 3.0000002]")),
        fingerprint(FACTORY.replace("mean=(0.5", "mean=(0.51")),
        fingerprint(FACTORY.replace("image_size=16", "image_size=18")),
        fingerprint(FACTORY.replace('interpolation="bicubic"', 'interpolation="bilinear"')),
        fingerprint(FACTORY.replace("self.scale", "self.factor")),
        fingerprint(FACTORY.replace("nn.Dropout(0.5)", "nn.Identity()")),
        fingerprint(l2=True),
    ]
    assert len({here, *others}) == 8


@pytest.mark.slow  # a process that imports torch
def test_the_spec_is_enough_in_another_process(factory):
    encoder = load_encoder(f"module:{factory}:ready")
    code = f"from ops.encoders import load_encoder; print(load_encoder({encoder.spec!r}).fingerprint)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == encoder.fingerprint


# timm:


@functools.cache
def timm_model():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", pretrained=False).eval()


@pytest.mark.parametrize("save", ["safetensors", "torch", "nested", "parallel", "headless"])
def test_timm_from_a_file(tmp_path, save):
    weights = timm_model().state_dict()
    path = tmp_path / ("w@1.safetensors" if save == "safetensors" else "w@1.pth")
    if save == "safetensors":
        save_file(weights, path)
    elif save == "nested":
        torch.save({"state_dict": weights, "epoch": 3}, path)
    elif save == "parallel":
        torch.save({f"module.{name}": value for name, value in weights.items()}, path)
    else:
        kept = {name: value for name, value in weights.items() if save == "torch" or not name.startswith("fc.")}
        torch.save(kept, path)
    encoder = load_encoder(f"timm:test_resnet@{path}")
    config = timm.data.resolve_model_data_config(timm_model())
    assert (encoder.image_size, encoder.mean, encoder.interpolation) == (160, config["mean"], config["interpolation"])
    batch = encoder.prepare(some_images([(50, 60)]))
    with torch.no_grad():
        expected = timm_model().forward_head(timm_model().forward_features(batch), pre_logits=True)
    torch.testing.assert_close(encoder(batch), expected, rtol=1e-5, atol=1e-6)
    assert encoder.width == expected.shape[1]


def test_weights_of_another_model(tmp_path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"weights of another model .*Missing key"):
        load_encoder(f"timm:test_resnet@{tmp_path / 'w.pth'}")


# open_clip:


SMALL_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 64, "heads": 1, "layers": 1},
}
SMALL_RESNET = SMALL_CLIP | {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}}


@pytest.fixture
def small_clips(tmp_path):
    """Two architectures added to open_clip's list, as its users add theirs, and a file of weights for each."""
    (tmp_path / "configs").mkdir()
    for name, config in (("tiny-vit", SMALL_CLIP), ("tiny-resnet", SMALL_RESNET)):
        (tmp_path / "configs" / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    models = {}
    for name in ("tiny-vit", "tiny-resnet"):
        torch.manual_seed(1)
        models[name] = open_clip.create_model(name).eval()
        for parameter in models[name].parameters():  # batch norms that start at 0 would hide differences
            parameter.data += 0.02 * torch.randn_like(parameter)
        torch.save(models[name].state_dict(), tmp_path / f"{name}.pt")
    return tmp_path, models


@pytest.mark.parametrize(("name", "size", "penultimate"), [("tiny-vit", 32, 64), ("tiny-resnet", 64, 256)])
def test_open_clip_from_a_file(small_clips, name, size, penultimate):
    folder, models = small_clips
    encoder = load_encoder(f"open_clip:{name}@{folder / name}.pt")
    assert (encoder.width, encoder.image_size, encoder.interpolation) == (12, size, "bicubic")
    assert encoder.mean == open_clip.OPENAI_DATASET_MEAN and encoder.std == open_clip.OPENAI_DATASET_STD
    batch = encoder.prepare(some_images([(50, 60), (40, 33)]))
    with torch.no_grad():
        expected = models[name].encode_image(batch)
    torch.testing.assert_close(encoder(batch), expected, rtol=1e-4, atol=1e-5)

    before = load_encoder(f"open_clip:{name}@{folder / name}.pt", projected=False)
    assert before.width == penultimate and before.fingerprint != encoder.fingerprint
    visual = models[name].visual
    projected = before(batch) @ visual.proj if name == "tiny-vit" else visual.attnpool.c_proj(before(batch))
    torch.testing.assert_close(projected.detach(), expected, rtol=1e-4, atol=1e-5)


def test_open_clip_with_another_models_weights(small_clips):
    folder, _ = small_clips
    with pytest.raises(ValueError, match=r"loading state_dict for CLIP: Missing key") as caught:
        load_encoder(f"open_clip:tiny-vit@{folder / 'tiny-resnet.pt'}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["timm:test_resnet", "timm:resnet10t.c3_in1k", "open_clip:ViT-B-32/laion2b_s34b_b79k"])
def test_a_download_that_fails_is_one_line(spec, monkeypatch):
    """The real way to the hub, told to stay offline (and with nothing in its cache)."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/nonexistent")
    with pytest.raises(
        ValueError, match=r"encoder .* the weights are not on this machine, .* give a file of weights .*MODEL@FILE"
    ) as caught:
        load_encoder(spec)
    assert "\n" not in str(caught.value)


# Files that are not weights


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["timm:test_resnet", "open_clip:ViT-S-32"])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.bin"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["pickle", "torch", "torch legacy"])
def test_a_pickle_is_never_run(tmp_path, form, name, how):
    proof, path = tmp_path / "it ran", tmp_path / name
    if how == "pickle":
        path.write_bytes(pickle.dumps(Attack(proof)))
    else:
        torch.save({"w": Attack(proof)}, path, _use_new_zipfile_serialization=how == "torch")
    assert b"mkdir" in path.read_bytes()  # the attack is there
    with pytest.raises(
        ValueError, match=r"not readable as plain weights, and nothing else is ever unpickled"
    ) as caught:
        load_encoder(f"{form}@{path}")
    assert not proof.exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"<html>", b"\0" * 100])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_broken_file(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: not readable as plain weights"):
        load_encoder(f"timm:test_resnet@{tmp_path / name}")


def test_a_whole_model_is_no_state_dict(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "w.pth")
    with pytest.raises(ValueError, match="expected a state_dict of tensors, found list"):
        load_encoder(f"timm:test_resnet@{tmp_path / 'w.pth'}")


# Names that are none


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "no such form; one of open_clip:MODEL/TAG"),
        ("clip:ViT-B-32", "no such form; did you mean open_clip"),
        ("pixel:8", "did you mean pixels"),
        ("pixels:", "no such form"),
        ("pixels:0", "a whole number from 1 to 256"),
        ("pixels:8x8", "a whole number from 1 to 256"),
        ("open_clip:ViT-B-33/openai", "'ViT-B-33' is no open_clip model; did you mean ViT-B-32"),
        ("open_clip:ViT-B-32", "'' is no pretrained tag of ViT-B-32 .*known: openai"),
        ("open_clip:ViT-B-32/laion2b_s34b", "is no pretrained tag .*did you mean laion2b_s34b_b79k"),
        ("open_clip:ViT-B-32@/nonexistent/w.pt", "no file /nonexistent/w.pt"),
        ("timm:resnet10", "'resnet10' is no timm model; did you mean .*resnet10t"),
        ("timm:resnet10t.c3_in2k", "did you mean resnet10t.c3_in1k"),
        ("timm:resnet26ts_none", "is no timm model"),
        ("module:no_such_package.x:make", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("module:encoders.py", "expected module:FILE.py:FACTORY"),
        ("module:/nonexistent/e.py:make", "no file /nonexistent/e.py"),
    ],
)
def test_what_a_wrong_name_says(spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(spec)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"encoder {spec!r}: ")


def test_a_file_of_nearly_that_name_is_named(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"did you mean weights\.pth"):
        resolve_spec(f"timm:resnet10t@{tmp_path / 'weight.pth'}")


def test_a_timm_model_without_weights():
    name = next(n for n in timm.list_models() if not timm.models.is_model_pretrained(n))
    with pytest.raises(ValueError, match=f"timm has no weights of '{name}'; give your own: timm:{name}@FILE"):
        load_encoder(f"timm:{name}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(factory):
    encoder = load_encoder(f"module:{factory}:ready")
    batch = encoder.prepare(some_images())
    expected = encoder(batch)
    encoder = encoder.to("cuda")
    assert encoder.device.type == "cuda"
    torch.testing.assert_close(encoder(batch.cuda()).cpu(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.encode(batch.cuda(), autocast=True).cpu(), expected, rtol=0.05, atol=0.05)
