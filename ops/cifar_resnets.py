"""The residual networks of the papers for 32 × 32 pictures: 3 × 3 stem, no pooling before the end.

He et al. 2015 (resnet), He et al. 2016 (preact_resnet), Zagoruyko and Komodakis 2016 (wrn). Written here because timm
has the ImageNet shapes only.
"""

import re
from itertools import pairwise

import torch
from torch import Tensor, nn

_NAME = re.compile(r"cifar_(resnet|preact_resnet|wrn)(\d+)(?:_(\d+))?")


class CifarResNet(nn.Module):
    """Three stages of basic blocks, `widths` channels each, at full, half and quarter resolution.

    Its methods have the names of timm's models.
    """

    def __init__(
        self, blocks: int, widths: tuple[int, int, int], num_classes: int, *, preactivation: bool, project: bool
    ):
        super().__init__()
        stem = 16
        block = PreactivationBlock if preactivation else BasicBlock
        self.conv1 = _conv3x3(3, stem, 1)
        # Before activation a block normalises its own input, so the stem needs none and the end does.
        self.norm1 = nn.Identity() if preactivation else nn.BatchNorm2d(stem)
        self.act1 = nn.Identity() if preactivation else nn.ReLU(inplace=True)
        stages = []
        for stage, (before, after) in enumerate(pairwise((stem, *widths))):
            strides = [2 if stage else 1] + [1] * (blocks - 1)
            inputs = [before] + [after] * (blocks - 1)
            stages += [block(i, after, s, project) for i, s in zip(inputs, strides)]
        self.blocks = nn.Sequential(*stages)
        self.norm2 = nn.BatchNorm2d(widths[-1]) if preactivation else nn.Identity()
        self.num_features = widths[-1]
        self.fc = nn.Linear(widths[-1], num_classes)
        _initialize(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps (B, C, H/4, W/4) of images (B, 3, H, W)."""
        x = self.blocks(self.act1(self.norm1(self.conv1(x))))
        return torch.relu(self.norm2(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K) of maps (B, C, h, w); with `pre_logits` the penultimate features (B, C)."""
        x = x.mean(dim=(2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of float images (B, 3, H, W)."""
        return self.forward_head(self.forward_features(x))


class BasicBlock(nn.Module):
    """conv-norm-relu-conv-norm plus the shortcut, then relu."""

    def __init__(self, before: int, after: int, stride: int, project: bool):
        super().__init__()
        self.conv1, self.norm1 = _conv3x3(before, after, stride), nn.BatchNorm2d(after)
        self.conv2, self.norm2 = _conv3x3(after, after, 1), nn.BatchNorm2d(after)
        self.shortcut = _shortcut(before, after, stride, project)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class PreactivationBlock(nn.Module):
    """norm-relu-conv-norm-relu-conv plus the shortcut; a projection sees the activated input."""

    def __init__(self, before: int, after: int, stride: int, project: bool):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(before), _conv3x3(before, after, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(after), _conv3x3(after, after, 1)
        self.shortcut = _shortcut(before, after, stride, project)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.norm1(x))
        y = self.conv2(torch.relu(self.norm2(self.conv1(active))))
        return y + self.shortcut(active if isinstance(self.shortcut, nn.Conv2d) else x)


class PaddedShortcut(nn.Module):
    """He et al. 2015, option A: every second pixel, new channels zero; no parameters."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.channels))


def cifar_resnet(name: str, num_classes: int) -> CifarResNet:
    """A network by name: cifar_resnet20|32|44|56|110, cifar_preact_resnet56 (any depth 6n + 2), cifar_wrn28_10 (6n + 4).

    Raises
    ------
    ValueError
        For a name or a depth that is none of these.
    """
    match = _NAME.fullmatch(name)
    if not match or (match[1] == "wrn") != (match[3] is not None):
        raise ValueError(f"model {name}: expected cifar_resnetDEPTH, cifar_preact_resnetDEPTH or cifar_wrnDEPTH_WIDTH")
    kind, depth, factor = match[1], int(match[2]), int(match[3] or 1)
    offset = 4 if kind == "wrn" else 2
    if depth <= offset or (depth - offset) % 6 or not factor:
        raise ValueError(f"model {name}: depth {depth} is not 6n + {offset} (such as 20, 56, 110; wrn28_10)")
    widths = (16 * factor, 32 * factor, 64 * factor)
    wide = kind == "wrn"
    return CifarResNet((depth - offset) // 6, widths, num_classes, preactivation=kind != "resnet", project=wide)


def _conv3x3(before: int, after: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=False)


def _shortcut(before: int, after: int, stride: int, project: bool) -> nn.Module:
    if before == after and stride == 1:
        return nn.Identity()
    if project:
        return nn.Conv2d(before, after, 1, stride, bias=False)
    return PaddedShortcut(after - before, stride)


def _initialize(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
