"""Image encoders: a name -> a module, how an image becomes its input, and the width of its features.

    open_clip:ViT-B-32/laion2b_s34b_b79k    an architecture and a pretrained tag of open_clip (downloaded once)
    open_clip:ViT-B-32@FILE                 the same architecture, weights from a file
    timm:NAME, timm:NAME@FILE               pooled features of a timm model; downloaded, or weights from a file
    pixels:SIZE                             the picture itself: SIZE × SIZE grey values, d = SIZE²
    module:FILE.py:FACTORY                  a function of yours that returns a module
    module:package.module:FACTORY           the same, from an installed package

Weights come as safetensors or through `torch.load(weights_only=True)`; nothing is ever unpickled. A `module:` factory
is code that runs: name only what you trust. An encoder is made anew from its spec in each process.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from ops import images as pictures
from ops.checks import check_choice
from ops.hub import FORMS, check_hub_answers

_ATTRIBUTES = ("image_size", "mean", "std", "interpolation")


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """A frozen float32 image encoder. Made by `load_encoder`.

    Attributes
    ----------
    spec : str
        What `load_encoder` makes this encoder from, in any process and folder of this machine: paths are absolute.
    module : nn.Module
        (B, 3, image_size, image_size) float32 -> (B, width); in eval mode.
    image_size : int
        Side of the input, in pixels.
    mean, std : tuple of 3 floats
        Of pixel values in [0, 1].
    interpolation : {"bicubic", "bilinear"}
    resize_mode : {"shortest", "squash"}
        See `ops.images.resize`.
    l2 : bool
        Whether features are scaled to length 1.
    width : int
        d, the length of a feature vector.
    fingerprint : str
        SHA-256 (hex) of layers, parameters, buffers and preparation: the same weights have the same fingerprint
        under whatever path and spec.
    """

    spec: str
    module: nn.Module
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    l2: bool = False
    width: int = 0
    fingerprint: str = ""

    @property
    def device(self) -> torch.device:
        """Where the weights are (the CPU for a module that has none)."""
        tensors = (*self.module.parameters(), *self.module.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    def to(self, device: str | torch.device) -> "Encoder":
        """This encoder with its module moved to `device` (in place, as `nn.Module.to` does)."""
        return dataclasses.replace(self, module=self.module.to(device))

    def prepare(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Decoded images, each uint8 (3, H, W) on the CPU, as a float32 batch (B, 3, S, S)."""
        return pictures.normalize(self.resize(images).contiguous(), self.mean, self.std)

    def resize(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """`prepare` without its normalisation: uint8 (B, 3, S, S), a quarter of the bytes to move to a GPU."""
        return pictures.resize(images, self.image_size, self.interpolation, self.resize_mode)

    @torch.no_grad()  # not inference_mode: its tensors could not become a head's training data
    def encode(self, batch: torch.Tensor, autocast: bool = False) -> torch.Tensor:
        """Features of a batch, on the device of the batch, which must be the module's.

        Parameters
        ----------
        batch : tensor of shape (B, 3, image_size, image_size)
            float32 from `prepare`, or uint8 from `resize` (normalised here, on its device), in the memory format that the
            module takes: `resize` gives channels-last.
        autocast : bool
            Compute in bfloat16 where torch's autocast does.

        Returns
        -------
        features : tensor of shape (B, width), float32
        """
        expected = (3, self.image_size, self.image_size)
        if batch.ndim != 4 or tuple(batch.shape[1:]) != expected:
            raise ValueError(f"batch: expected shape (B, {', '.join(map(str, expected))}), got {tuple(batch.shape)}")
        if batch.dtype == torch.uint8:
            batch = pictures.normalize(batch, self.mean, self.std)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast):
            features = self.module(batch)
        features = features.float()
        return nn.functional.normalize(features, dim=1) if self.l2 else features

    __call__ = encode


def load_encoder(spec: str, *, l2: bool = False, projected: bool = True) -> Encoder:
    """Make the encoder that `spec` names.

    Parameters
    ----------
    spec : str
        One of the forms at the head of this file. Relative paths are from the current folder.
    l2 : bool
        Scale features to length 1.
    projected : bool
        open_clip only: True gives the features that CLIP compares with texts (`encode_image`), False those of the layer
        before the projection.

    Returns
    -------
    encoder : Encoder
        On the CPU, float32, eval mode, no gradients.

    Raises
    ------
    ValueError
        An unknown form, model or tag, a missing or unsafe file, weights of another model, weights that could
        not be downloaded, a factory that fails or whose module is not of the contract: one line that says what was
        found and what would do.

    Notes
    -----
    timm's `crop_pct` is not used: the whole centre square is seen, as with every other encoder.
    """
    spec = resolve_spec(spec)
    form, _, rest = spec.partition(":")
    with _one_line_errors(spec):
        loaded = _open_clip(rest, projected) if form == "open_clip" else _FORMS[form](rest)
    loaded.module.cpu().float().eval().requires_grad_(False)
    encoder = _checked(dataclasses.replace(loaded, spec=spec, l2=l2))
    encoder = dataclasses.replace(encoder, width=_width(encoder))
    return dataclasses.replace(encoder, fingerprint=_fingerprint(encoder))


def resolve_spec(spec: str) -> str:
    """`spec` with its file, if it names one, as an absolute path; ValueError if the form is unknown or the file missing."""
    form, _, rest = spec.partition(":")
    if form not in _FORMS or not rest:
        raise ValueError(f"encoder {spec!r}: no such form{_suggest(form, _FORMS)}; one of {FORMS}")
    if form == "module":
        target, colon, factory = rest.rpartition(":")
        if not colon or not factory.isidentifier() or not target:
            raise ValueError(f"encoder {spec!r}: expected module:FILE.py:FACTORY or module:package.module:FACTORY")
        if target.endswith(".py") or "/" in target:
            return f"module:{_existing(target, spec)}:{factory}"
    elif form in ("open_clip", "timm") and "@" in rest:
        name, _, file = rest.partition("@")
        return f"{form}:{name}@{_existing(file, spec)}"
    return spec


class Pixels(nn.Module):
    """The picture as its own features: luminance (ITU-R BT.601, as Pillow's "L") in [0, 1], row by row, d = S²."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("luminance", torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1), persistent=False)

    def forward(self, x_b3ss: torch.Tensor) -> torch.Tensor:
        return (x_b3ss * self.luminance).sum(dim=1).flatten(1)


def _pixels(size: str) -> Encoder:
    if not size.isdecimal() or not 1 <= int(size) <= 256:
        raise ValueError("SIZE must be a whole number from 1 to 256, in pixels")
    return Encoder("", Pixels(), int(size), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear")


def _open_clip(rest: str, projected: bool) -> Encoder:
    import open_clip

    name, at, file = rest.partition("@")
    tag = "" if at else rest.partition("/")[2]
    name = name if at else rest.partition("/")[0]
    _check_known("open_clip model", name, open_clip.list_models())
    if at:
        _read_weights(file)  # refuses what isn't plain weights, before open_clip reads it in its own way
    else:
        tags = open_clip.list_pretrained_tags_by_model(name)
        _check_known(f"pretrained tag of {name}", tag, tags, " (for weights of your own: open_clip:MODEL@FILE)")
        check_hub_answers(open_clip.get_pretrained_cfg(name, tag).get("hf_hub", ""))
    model = open_clip.create_model(name, pretrained=file if at else tag, weights_only=True)
    config = open_clip.get_model_preprocess_cfg(model)
    tower = ImageTower(model.visual if projected else _without_projection(model.visual))
    size = config["size"]
    return Encoder(
        "",
        tower,
        size if isinstance(size, int) else _square(size),
        tuple(config["mean"]),
        tuple(config["std"]),
        config["interpolation"],
        config["resize_mode"],
    )


class ImageTower(nn.Module):
    """The image half of an open_clip model, as its `encode_image(normalize=False)`."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, x_b3ss: torch.Tensor) -> torch.Tensor:
        features = self.visual(x_b3ss)
        return features[0] if isinstance(features, tuple) else features  # CoCa gives its tokens too


def _without_projection(visual: nn.Module) -> nn.Module:
    """`visual` up to the layer before the projection into the space shared with texts; changed in place."""
    if isinstance(getattr(visual, "proj", None), nn.Parameter):  # open_clip's vision transformer
        visual.proj = None
    elif hasattr(visual, "attnpool"):  # CLIP's ResNets: the attention pool without its output projection
        width = visual.attnpool.c_proj.in_features
        visual.attnpool.c_proj = nn.Linear(width, width)
        nn.init.eye_(visual.attnpool.c_proj.weight)
        nn.init.zeros_(visual.attnpool.c_proj.bias)
    elif hasattr(visual, "trunk") and hasattr(visual, "head"):  # a timm trunk within open_clip
        visual.head = nn.Identity()
    else:
        raise ValueError(f"projected=False: don't know the projection of {type(visual).__name__}")
    return visual


def _timm(rest: str) -> Encoder:
    import timm

    name, at, file = rest.partition("@")
    if not timm.is_model(name):
        _check_known("timm model", name, timm.list_models())
    if not at:
        _check_timm_has_weights(name)
        check_hub_answers((timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()).hf_hub_id or "")
    model = timm.create_model(name, pretrained=not at, num_classes=0)
    if at:
        _fill(model, _read_weights(file), file)
    config = timm.data.resolve_model_data_config(model)
    size = _square(config["input_size"][1:])
    return Encoder("", model, size, tuple(config["mean"]), tuple(config["std"]), config["interpolation"])


def _check_timm_has_weights(name: str) -> None:
    import timm

    if not timm.models.is_model_pretrained(name.partition(".")[0]):
        raise ValueError(f"timm has no weights of {name!r}; give your own: timm:{name}@FILE")
    tag = name.partition(".")[2]
    if tag:
        known = timm.list_models(name.partition(".")[0] + ".*", pretrained=True)
        _check_known("timm model", name, known)


def _fill(model: nn.Module, weights: dict[str, torch.Tensor], file: str) -> None:
    """Load all of the model's weights; only a classifier, which was left off the model, may be over."""
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    kept = {name: value for name, value in weights.items() if not name.startswith(tuple(f"{head}." for head in heads))}
    try:
        model.load_state_dict(kept)
    except RuntimeError as error:
        raise ValueError(f"{file}: weights of another model ({_one_line(error)})") from None


def _module(rest: str) -> Encoder:
    target, _, factory_name = rest.rpartition(":")
    source = _import_file(Path(target)) if target.endswith(".py") or "/" in target else importlib.import_module(target)
    factory = getattr(source, factory_name, None)
    if not callable(factory):
        functions = [name for name, value in vars(source).items() if callable(value) and not name.startswith("_")]
        raise ValueError(f"{target} has no function {factory_name!r}{_suggest(factory_name, functions)}")
    module = factory()
    if not isinstance(module, nn.Module):
        raise ValueError(f"{factory_name}() must return an nn.Module, got {type(module).__name__}")
    missing = [name for name in _ATTRIBUTES if not hasattr(module, name)]
    if missing:
        raise ValueError(f"the module of {factory_name}() lacks the attributes {', '.join(missing)}")
    return Encoder("", module, *(getattr(module, name) for name in _ATTRIBUTES))


def _import_file(path: Path) -> ModuleType:
    """Run a Python file as a module of a name of its own, so that it can't shadow or be shadowed."""
    name = f"encoder_file_{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}"
    described = importlib.util.spec_from_file_location(name, path)
    if described is None or described.loader is None:
        raise ValueError(f"{path}: not a Python file (.py)")
    module = importlib.util.module_from_spec(described)
    sys.modules[name] = module  # dataclasses and the like look their module up there
    try:
        described.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


_FORMS: dict[str, Callable[..., Encoder]] = {
    "open_clip": _open_clip,
    "timm": _timm,
    "pixels": _pixels,
    "module": _module,
}


def _read_weights(file: str) -> dict[str, torch.Tensor]:
    """Named tensors of a .safetensors file or of what torch saved, without unpickling anything but tensors."""
    try:
        if file.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = _one_line(error).partition(". ")[0]
        raise ValueError(
            f"{file}: not readable as plain weights, and nothing else is ever unpickled ({reason}); "
            "save a state_dict as .safetensors or with torch.save"
        ) from None
    for nested in ("state_dict", "model"):
        if isinstance(weights, dict) and isinstance(weights.get(nested), dict):
            weights = weights[nested]
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{file}: expected a state_dict of tensors, found {type(weights).__name__}")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def _existing(file: str, spec: str) -> str:
    path = Path(file).expanduser().absolute()
    if not path.is_file():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(f"encoder {spec!r}: no file {path}{_suggest(path.name, beside)}")
    return os.path.normpath(path)


def _check_known(what: str, name: str, known: Sequence[str], otherwise: str = "") -> None:
    if name in known:
        return
    instead = _suggest(name, known) or f"; known: {', '.join(known[:8])}{', …' if len(known) > 8 else ''}"
    raise ValueError(f"{name!r} is no {what}{otherwise}{instead}")


def _suggest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3) or [other for other in known if name and other.startswith(name)]
    return f"; did you mean {' or '.join(close[:3])}?" if close else ""


def _square(size: Sequence[int]) -> int:
    height, width = size
    if height != width:
        raise ValueError(f"its input is {height} × {width}; only square inputs are made")
    return int(height)


@contextlib.contextmanager
def _one_line_errors(spec: str) -> Iterator[None]:
    """Whatever goes wrong in a library, a download or a factory: a ValueError of one line that names the spec."""
    try:
        yield
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        hint = ""
        if not isinstance(error, ValueError) and spec.startswith(("open_clip:", "timm:")) and "@" not in spec:
            hint = "; if this is a download that failed, fetch the weights elsewhere and give them as MODEL@FILE"
        raise ValueError(f"encoder {spec!r}: {kind}{_one_line(error)}{hint}") from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{text[:400]}{'…' * (len(text) > 400)}" or repr(error)


def _checked(encoder: Encoder) -> Encoder:
    """The encoder with mean and std as tuples of floats; ValueError where its preparation makes no sense."""
    name = f"encoder {encoder.spec!r}"
    if not isinstance(encoder.image_size, int) or encoder.image_size < 1:
        raise ValueError(f"{name}: image_size must be a positive int, got {encoder.image_size!r}")
    for field in ("mean", "std"):
        values = getattr(encoder, field)
        fits = isinstance(values, tuple | list) and len(values) == 3 and all(map(math.isfinite, values))
        if not fits or (field == "std" and min(values) <= 0):
            raise ValueError(
                f"{name}: {field} must be 3 finite numbers{', above 0' * (field == 'std')}, got {values!r}"
            )
    check_choice(f"{name}: interpolation", encoder.interpolation, pictures.INTERPOLATIONS)
    check_choice(f"{name}: resize_mode", encoder.resize_mode, pictures.RESIZE_MODES)
    return dataclasses.replace(encoder, mean=tuple(map(float, encoder.mean)), std=tuple(map(float, encoder.std)))


def _width(encoder: Encoder) -> int:
    """d, from the features of two black images."""
    blank = torch.zeros((2, 3, encoder.image_size, encoder.image_size), dtype=torch.uint8)
    with _one_line_errors(encoder.spec):
        features = encoder.encode(blank)
    shape = tuple(features.shape)
    if len(shape) != 2 or shape[0] != 2:
        raise ValueError(f"encoder {encoder.spec!r}: expected features of shape (B, d), got {shape} for B = 2")
    return shape[1]


def _fingerprint(encoder: Encoder) -> str:
    digest = hashlib.sha256()
    for name, layer in encoder.module.named_modules():
        digest.update(f"{name} {type(layer).__qualname__}\n".encode())  # equal weights under another activation differ
    for name, value in sorted(encoder.module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    fields = ("image_size", "mean", "std", "interpolation", "resize_mode", "l2", "width")
    digest.update(repr([getattr(encoder, field) for field in fields]).encode())
    return digest.hexdigest()
