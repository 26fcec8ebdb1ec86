"""Read images and label maps from files; errors name the file."""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

VOID = 255
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif")

# The exceptions of Pillow's decoders for truncated files and files that are not images.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
_BROKEN += (Image.DecompressionBombError,)


def _decode(path, what: str, upright: bool) -> Image.Image:
    """Decode a file, rotated by its EXIF tag if `upright`; FileNotFoundError if missing, ValueError if broken."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {what}")
    try:
        with Image.open(path) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture) if upright else picture
    except _BROKEN as error:
        raise ValueError(f"{path}: cannot be read whole as {what} ({error})") from error


def _eight_bits(picture: Image.Image, path) -> Image.Image:
    """Convert greyscale of more than 8 bits to 8 bits; other modes are returned unchanged."""
    if picture.mode == "F":
        raise ValueError(f"{path}: floating-point pixels have no defined range; expected 8- or 16-bit integers")
    if picture.mode.startswith("I"):
        deep = np.asarray(picture).astype(np.int64)
        if deep.size and (deep.min() < 0 or deep.max() > 65535):
            raise ValueError(f"{path}: grey values are {deep.min()}..{deep.max()}; expected 8 or 16 bits per pixel")
        return Image.fromarray((deep / 257).round().astype(np.uint8))
    return picture


def read_image_uint8(path) -> torch.Tensor:
    """Read an image as `read_image` does, but uint8 [3, H, W]."""
    picture = _eight_bits(_decode(path, "an image", upright=True), path)
    if picture.has_transparency_data:
        page = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(page, picture.convert("RGBA"))
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def read_image(path) -> torch.Tensor:
    """Read any image that Pillow opens: float32 RGB [3, H, W] in [0, 1].

    The image is rotated by its EXIF tag. Grey becomes three equal channels, and 16 bits become 8. Transparent pixels
    are drawn over white, as by a viewer: their own colours are arbitrary. Of an animation, the first frame is read.

    FileNotFoundError if the file is missing; ValueError if it is truncated, no image, or floating-point.
    """
    return read_image_uint8(path).float() / 255


def read_label(path, palette=None) -> torch.Tensor:
    """Read a label map: uint8 [H, W].

    The values of grey and palette images are returned as stored (the colours of a palette image are ignored). A colour
    image is decoded with `palette`, uint8 [K + 1, 3] with void last. ValueError if the file is broken, has values above
    255, is a colour image without a palette, or contains a colour that is not in the palette.
    """
    picture = _decode(path, "a label map", upright=False)
    if picture.mode in ("L", "P", "1") or picture.mode.startswith("I"):
        index = np.array(picture)
        if index.dtype == bool:
            index = index.astype(np.uint8)
        if index.size and (index.min() < 0 or index.max() > 255):
            raise ValueError(f"{path}: label values reach {index.max()}; expected class numbers, or {VOID} for void")
        return torch.from_numpy(index.astype(np.uint8))
    if picture.mode != "RGB" or palette is None:
        raise ValueError(
            f"{path}: a label map in mode {picture.mode}; expected one channel of class numbers (grey or palette)"
        )
    colour = np.array(picture).astype(np.int64) @ (65536, 256, 1)
    codes = np.asarray(palette).astype(np.int64) @ (65536, 256, 1)
    # Reversed, so that a class wins that has the same colour as void.
    lookup = {code: VOID if row == len(codes) - 1 else row for row, code in reversed(list(enumerate(codes.tolist())))}
    values, inverse = np.unique(colour, return_inverse=True)
    unknown = [value for value in values.tolist() if value not in lookup]
    if unknown:
        red, rest = divmod(unknown[0], 65536)
        raise ValueError(f"{path}: colour {(red, *divmod(rest, 256))} is not in the palette")
    table = np.array([lookup[value] for value in values.tolist()], np.uint8)
    return torch.from_numpy(table[inverse.reshape(colour.shape)])


def image_size(path) -> tuple[int, int]:
    """(H, W) of the image that `read_image` returns, from the header; ValueError if Pillow cannot open the file."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            turned = picture.getexif().get(0x0112, 1) >= 5
    except _BROKEN as error:
        raise ValueError(f"{path}: is not an image Pillow can open ({error})") from error
    return (width, height) if turned else (height, width)


def check_size(size, name: str) -> tuple[int, int]:
    """Return `size` as (height, width); ValueError unless it is two whole numbers of at least 1 px."""
    if not isinstance(size, Sequence) or len(size) != 2 or any(int(side) != side or side < 1 for side in size):
        raise ValueError(f"{name}: size {size} is not (height, width) in pixels, at least 1")
    return int(size[0]), int(size[1])


def resize_image(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize an image [3, H, W] bilinearly, with antialiasing."""
    return F.resize_image(image, list(size), interpolation=F.InterpolationMode.BILINEAR, antialias=True)


def resize_label(label: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize a label map [H, W]: each pixel takes the label under its centre (torch's "nearest-exact").

    torchvision's resize of masks takes the label under the corner, which shifts it against the image.
    """
    rows, columns = (((torch.arange(new) + 0.5) * old / new).long() for new, old in zip(size, label.shape, strict=True))
    return label[rows[:, None], columns]
