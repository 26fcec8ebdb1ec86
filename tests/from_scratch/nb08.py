"""The image reader of notebook 08 against the library's, on files created in the test."""

import numpy as np
import pytest
import torch
from PIL import Image

from pwlib.data import read_image


def picture():
    return np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)


@pytest.mark.parametrize("orientation", range(9))
def test_every_orientation_is_read_as_by_the_library(pull, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture()).save(tmp_path / "turned.png", exif=exif)
    ours, library = (read(tmp_path / "turned.png") for read in (pull("08", "read_photo"), read_image))
    torch.testing.assert_close(ours, library)
    assert ours.shape == ((3, 7, 11) if orientation <= 4 else (3, 11, 7))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "16 bits"])
def test_every_mode_is_converted_as_by_the_library(pull, tmp_path, mode):
    pixels = picture()
    if mode == "16 bits":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode == "RGBA":
        image = Image.fromarray(np.concatenate([pixels, pixels[..., :1]], axis=2))
    else:
        image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "file.tif")
    ours, library = (read(tmp_path / "file.tif") for read in (pull("08", "read_photo"), read_image))
    torch.testing.assert_close(ours, library, rtol=0, atol=1.01 / 255)
