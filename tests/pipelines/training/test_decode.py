"""Pictures for training: resized and cropped as torchvision does."""

import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipelines.training.decode import fit_square


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(40, 64, 32), (33, 33, 32), (64, 41, 31), (16, 17, 32), (500, 375, 224), (375, 501, 97)],
)
def test_a_picture_is_fitted_as_torchvision_fits_it(height, width, size):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = F.center_crop(F.resize(image, [size], InterpolationMode.BICUBIC, antialias=True), [size, size])
    assert torch.equal(fit_square(image, size), theirs)
