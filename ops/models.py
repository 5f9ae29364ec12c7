"""Classifiers: heads on embeddings, networks on images; and the checkpoint that holds one.

A checkpoint is a folder of two files and no code: `model.safetensors` has weights and buffers (standardisation too),
`model.json` everything needed to build the module again, and what later commands add (a calibration).
"""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ops.checks import check_choice, check_shape
from ops.cifar_resnets import cifar_resnet

FORMAT = "hardset classifier 1"
WEIGHTS, RECORD = "model.safetensors", "model.json"
INPUTS = ("embeddings", "images")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HEAD = re.compile(r"linear|mlp:\d+(x\d+)*")
_SMALL = 64  # pixels; up to here an ImageNet stem would leave nothing to look at


@dataclasses.dataclass(frozen=True)
class ClassifierSpec:
    """What a classifier is built from; every value goes to `model.json`.

    Attributes
    ----------
    input : {"embeddings", "images"}
    model : str
        A head: `linear`, `mlp:512`, `mlp:512x256` (hidden widths). A network: a name of timm's (`timm:` before it is
        allowed), or `cifar_resnet20` and its like (`ops.cifar_resnets`).
    num_classes : int
        K, at least 2.
    class_names : tuple of str
        K names; empty if they have none.
    width : int or None
        Heads: d of the embeddings.
    encoder, encoder_fingerprint : str or None
        Heads: what made the embeddings. The fingerprint decides whether a run fits.
    image_size : int or None
        Networks: side in pixels.
    mean, std : tuple of 3 floats
        Networks: of the pixels, on the scale [0, 1].
    small_images : bool
        timm networks: first convolution 3 × 3 of stride 1, no max-pooling.
    dropout : float
        Heads: before the last layer, in [0, 1). timm: `drop_rate`.
    """

    input: str
    model: str
    num_classes: int
    class_names: tuple[str, ...] = ()
    width: int | None = None
    encoder: str | None = None
    encoder_fingerprint: str | None = None
    image_size: int | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    small_images: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_choice("input", self.input, INPUTS)
        if self.num_classes < 2:
            raise ValueError(f"a classifier needs at least 2 classes, got {self.num_classes}")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names: expected {self.num_classes} names, got {len(self.class_names)}")
        size = self.width if self.input == "embeddings" else self.image_size
        if size is None or size < 1:
            raise ValueError(
                f"a classifier on {self.input} needs {'width' if self.input == 'embeddings' else 'image_size'}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout}: expected a fraction in [0, 1)")


class Classifier(nn.Module):
    """What heads and networks share. `forward` and `features` take the same batch, on the module's device.

    Attributes
    ----------
    spec : ClassifierSpec
    extra : dict
        Whatever else the checkpoint holds: `calibration`, metrics, lineage. JSON-able.
    """

    def __init__(self, spec: ClassifierSpec):
        super().__init__()
        self.spec, self.extra = spec, {}

    @property
    def input(self) -> str:
        """What a batch is: "embeddings", (B, d) float, or "images", (B, 3, S, S) uint8 or float in [0, 1]."""
        return self.spec.input

    @property
    def num_classes(self) -> int:
        """K."""
        return self.spec.num_classes

    def features(self, batch: Tensor) -> Tensor:
        """Penultimate features (B, p): what the last linear layer sees."""
        raise NotImplementedError

    def last_layer(self) -> nn.Linear | None:
        """The linear layer from `features` to logits, None for a network that has another end."""
        raise NotImplementedError


class Head(Classifier):
    """Standardisation, hidden layers with ReLU, a linear layer."""

    def __init__(self, spec: ClassifierSpec):
        super().__init__(spec)
        if not _HEAD.fullmatch(spec.model):
            raise ValueError(f"model {spec.model}: on embeddings expected linear, mlp:512 or mlp:512x256")
        hidden = [] if spec.model == "linear" else [int(w) for w in spec.model.removeprefix("mlp:").split("x")]
        if 0 in hidden:
            raise ValueError(f"model {spec.model}: a hidden layer of width 0")
        self.register_buffer("mean", torch.zeros(spec.width))
        self.register_buffer("std", torch.ones(spec.width))
        layers, before = [], spec.width
        for width in hidden:
            layers += [nn.Linear(before, width), nn.ReLU()]
            before = width
        self.body = nn.Sequential(*layers, *([nn.Dropout(spec.dropout)] if spec.dropout else []))
        self.last = nn.Linear(before, spec.num_classes)

    def standardize(self, mean: Tensor, std: Tensor) -> None:
        """Take the training embeddings' mean and standard deviation (d,); a constant feature keeps its scale."""
        check_shape("mean", mean, (self.spec.width,))
        check_shape("std", std, (self.spec.width,))
        self.mean.copy_(mean)
        self.std.copy_(std.where(std > 0, 1.0))

    def features(self, batch: Tensor) -> Tensor:
        """Penultimate features (B, p) of embeddings (B, d)."""
        check_shape("batch", batch, ("n", self.spec.width))
        return self.body((batch.to(self.mean.dtype) - self.mean) / self.std)

    def forward(self, batch: Tensor) -> Tensor:
        """Logits (B, K) of embeddings (B, d)."""
        return self.last(self.features(batch))

    def last_layer(self) -> nn.Linear:
        return self.last


class Network(Classifier):
    """A network on images; normalises them itself, so that loaders hand over bytes."""

    def __init__(self, spec: ClassifierSpec):
        super().__init__(spec)
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1))
        self.net = _network(spec)

    def normalize(self, batch: Tensor) -> Tensor:
        """uint8, or float in [0, 1], (B, 3, S, S) -> what the network takes."""
        check_shape("batch", batch, ("n", 3, self.spec.image_size, self.spec.image_size))
        # channels_last goes through: these are elementwise.
        scaled = batch.to(self.mean.dtype) / 255 if batch.dtype == torch.uint8 else batch
        return (scaled - self.mean) / self.std

    def features(self, batch: Tensor) -> Tensor:
        """Penultimate features (B, p) of images."""
        return self.net.forward_head(self.net.forward_features(self.normalize(batch)), pre_logits=True)

    def forward(self, batch: Tensor) -> Tensor:
        """Logits (B, K) of images."""
        return self.net(self.normalize(batch))

    def last_layer(self) -> nn.Linear | None:
        last = self.net.fc if hasattr(self.net, "fc") else self.net.get_classifier()
        return last if isinstance(last, nn.Linear) else None


def build_classifier(spec: ClassifierSpec) -> Classifier:
    """A new classifier with random weights (torch's global generator).

    Raises
    ------
    ValueError
        For a model that does not exist, or does not fit the input.
    """
    return Head(spec) if spec.input == "embeddings" else Network(spec)


def save_classifier(model: Classifier, folder: str | os.PathLike, **extra: Any) -> None:
    """Write `model.safetensors` and `model.json` into `folder`, each whole or not at all.

    Parameters
    ----------
    extra
        JSON-able values to keep beside `model.extra`; they come back as `load_classifier(folder).extra`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    record = _record(model.spec, model.extra | extra)  # before anything is written: a value may be no JSON
    _replace(folder / WEIGHTS, safetensors.torch.save(tensors, {"format": FORMAT}))
    _replace(folder / RECORD, record)


def load_classifier(folder: str | os.PathLike) -> Classifier:
    """The classifier of a checkpoint, on the CPU, in evaluation mode.

    `folder` may also be a training's output: then it is its `best`.

    Raises
    ------
    ValueError
        Where there is no checkpoint, or the folder holds something else. One line.
    """
    found = _checkpoint(folder)
    spec, extra = _read_record(found)
    try:
        model = build_classifier(spec)
        model.load_state_dict(safetensors.torch.load_file(found / WEIGHTS))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"checkpoint {folder}: {WEIGHTS} does not hold the weights of {spec.model} ({reason})"
        ) from None
    model.extra = extra
    return model.eval()


def update_extra(folder: str | os.PathLike, **extra: Any) -> None:
    """Add values to a checkpoint's `model.json` (a calibration, say), the weights untouched."""
    found = _checkpoint(folder)
    spec, before = _read_record(found)
    _replace(found / RECORD, _record(spec, before | extra))


def _checkpoint(folder: str | os.PathLike) -> Path:
    """The folder itself, or its `best` if only that holds a record."""
    folder = Path(folder)
    best = folder / "best"
    return best if (best / RECORD).is_file() and not (folder / RECORD).is_file() else folder


def _record(spec: ClassifierSpec, extra: dict[str, Any]) -> bytes:
    record = {"format": FORMAT, "spec": dataclasses.asdict(spec), "extra": extra}
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()


def _read_record(folder: Path) -> tuple[ClassifierSpec, dict[str, Any]]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"checkpoint {folder}: no {RECORD} there; hardset train makes one") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {folder}: {RECORD} cannot be read ({error})") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"checkpoint {folder}: {RECORD} is not a classifier of hardset ({FORMAT})")
    try:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in record["spec"].items()}
        return ClassifierSpec(**values), dict(record.get("extra", {}))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {folder}: {RECORD} has no usable spec ({error})") from None


def _replace(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    beside.write_bytes(data)
    os.replace(beside, path)


def _network(spec: ClassifierSpec) -> nn.Module:
    name = spec.model.removeprefix("timm:")
    if name.startswith("cifar_"):
        return cifar_resnet(name, spec.num_classes)
    import timm  # a second to import, and heads do without

    if name not in timm.list_models(name):
        raise ValueError(
            f"model {spec.model}: neither one of timm's {len(timm.list_models())} names nor cifar_resnet20 and its like"
        )
    options = {"drop_rate": spec.dropout} if spec.dropout else {}
    try:
        net = timm.create_model(name, pretrained=False, num_classes=spec.num_classes, **options)
    except TypeError as error:
        raise ValueError(f"model {spec.model}: {error}") from None
    if spec.small_images:
        _shrink_stem(net, spec)
    return net


def _shrink_stem(net: nn.Module, spec: ClassifierSpec) -> None:
    """First convolution 3 × 3 of stride 1, no max-pooling after it (He et al. 2015, section 4.2, for 32 × 32)."""
    for name in ("conv1", "conv_stem"):
        first = getattr(net, name, None)
        if isinstance(first, nn.Conv2d):
            setattr(net, name, nn.Conv2d(3, first.out_channels, 3, 1, 1, bias=first.bias is not None))
            break
        if isinstance(first, nn.Sequential) and isinstance(first[0], nn.Conv2d):
            first[0].stride = (1, 1)
            break
    else:
        raise ValueError(f"small_images: {spec.model} has no stem that is known here; take a resnet, or cifar_resnet20")
    if hasattr(net, "maxpool"):
        net.maxpool = nn.Identity()
