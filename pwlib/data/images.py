"""Files to arrays: any image Pillow opens, and label maps, with errors that name the file."""

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

# What Pillow's decoders raise on files that are cut short or are no image at all.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def _decode(path, what: str, upright: bool) -> Image.Image:
    """The whole file, turned by its EXIF tag if `upright`. FileNotFoundError if missing, ValueError if broken."""
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
    """Bring greyscale deeper than 8 bits to 8; other modes pass."""
    if picture.mode == "F":
        raise ValueError(f"{path}: floating-point pixels have no agreed white; expected 8- or 16-bit integers")
    if picture.mode.startswith("I"):
        deep = np.asarray(picture).astype(np.int64)
        if deep.size and (deep.min() < 0 or deep.max() > 65535):
            raise ValueError(
                f"{path}: grey values {deep.min()}..{deep.max()} do not fit; expected 8 or 16 bits a pixel"
            )
        return Image.fromarray((deep / 257).round().astype(np.uint8))
    return picture


def read_image_uint8(path) -> torch.Tensor:
    """As `read_image`, in uint8: what the data sets resize and cache."""
    picture = _eight_bits(_decode(path, "an image", upright=True), path)
    if picture.has_transparency_data:
        page = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(page, picture.convert("RGBA"))
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def read_image(path) -> torch.Tensor:
    """Read any image Pillow opens: float32 RGB [3, H, W] in [0, 1].

    Rotated as its EXIF tag says. Grey becomes three equal channels, 16 bits become 8. Transparency is laid on white, as
    a viewer shows it: the colours hidden under alpha 0 are arbitrary. Of an animation, the first frame.
    FileNotFoundError if there is no such file; ValueError if it is truncated, no image, or floating-point.
    """
    return read_image_uint8(path).float() / 255


def read_label(path, palette=None) -> torch.Tensor:
    """Read a label map: uint8 [H, W], values as stored.

    Index images (grey or palette; a palette PNG's colours are ignored) are read as they are. A colour image is decoded
    by `palette` (uint8 [K+1, 3], last row void) if one is given. ValueError if the file is broken, has values above
    255, is in colour with no palette, or shows a colour that is not in it.
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
    # Void last in the palette, so that a class which shares its colour wins.
    lookup = {code: VOID if row == len(codes) - 1 else row for row, code in reversed(list(enumerate(codes.tolist())))}
    values, inverse = np.unique(colour, return_inverse=True)
    unknown = [value for value in values.tolist() if value not in lookup]
    if unknown:
        red, rest = divmod(unknown[0], 65536)
        raise ValueError(f"{path}: colour {(red, *divmod(rest, 256))} is not in the palette")
    table = np.array([lookup[value] for value in values.tolist()], np.uint8)
    return torch.from_numpy(table[inverse.reshape(colour.shape)])


def image_size(path) -> tuple[int, int]:
    """(H, W) as `read_image` will give it, from the header alone. ValueError if Pillow cannot open the file."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            turned = picture.getexif().get(0x0112, 1) >= 5
    except _BROKEN as error:
        raise ValueError(f"{path}: is not an image Pillow can open ({error})") from error
    return (width, height) if turned else (height, width)


def check_size(size, name: str) -> tuple[int, int]:
    """`size` as (height, width); ValueError if it is not two whole numbers of pixels, one at least."""
    if not isinstance(size, Sequence) or len(size) != 2 or any(int(side) != side or side < 1 for side in size):
        raise ValueError(f"{name}: size {size} is not (height, width) in pixels, one at least")
    return int(size[0]), int(size[1])


def resize_image(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[3, H, W] to `size`, bilinear and antialiased."""
    return F.resize_image(image, list(size), interpolation=F.InterpolationMode.BILINEAR, antialias=True)


def resize_label(label: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[H, W] to `size`: each pixel the label under its centre.

    (torchvision's resize of masks takes the label under the pixel's corner, half a source pixel or more from where the
    image has it; torch calls this one nearest-exact.)
    """
    rows, columns = (((torch.arange(new) + 0.5) * old / new).long() for new, old in zip(size, label.shape, strict=True))
    return label[rows[:, None], columns]
