"""Read images and label maps from files; errors name the file."""

import importlib
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

VOID = 255
LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".pgm", ".ppm")  # formats without loss
IMAGE_SUFFIXES = (*LABEL_SUFFIXES, ".jpg", ".jpeg", ".jfif", ".avif", ".heic", ".heif")
ORIENTATION = 0x0112  # EXIF tag

# The exceptions of Pillow's decoders for truncated files and files that are not images.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
_BROKEN += (Image.DecompressionBombError,)


def _open(path, what: str, *, header_only: bool = False) -> Image.Image:
    """Decode a file with Pillow; FileNotFoundError if it is missing, ValueError if it cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {what}")
    if path.suffix.lower() in (".heic", ".heif"):
        try:
            importlib.import_module("pillow_heif").register_heif_opener()
        except ImportError as error:
            raise ValueError(f"{path}: HEIC needs `pip install pillow-heif`; or convert it to JPEG") from error
    try:
        with Image.open(path) as picture:
            picture.getexif() if header_only else picture.load()
            return picture
    except _BROKEN as error:
        raise ValueError(f"{path}: cannot be read completely as {what} ({error})") from error


def _eight_bits(picture: Image.Image, path, bits: int | None) -> Image.Image:
    """Convert an image of more than 8 bits per channel to 8 bits; other images are returned unchanged."""
    if picture.mode == "F":
        raise ValueError(f"{path}: floating-point pixels have no defined range; expected 8- or 16-bit integers")
    if picture.mode.startswith("I"):
        deep = np.asarray(picture).astype(np.int64)
    elif (low := _low_bytes(path)) is not None:
        deep = 256 * np.asarray(picture).astype(np.int64) + low
    else:
        return picture
    if deep.size and (deep.min() < 0 or deep.max() > 65535):
        raise ValueError(f"{path}: values are {deep.min()}..{deep.max()}; expected 8 or 16 bits per channel")
    if bits is None:
        head = Path(path).read_bytes().split(b"IDAT")[0] if picture.format == "PNG" else b""
        stated = head.find(b"sBIT") + 4  # a PNG may state its significant bits
        largest = deep[..., :3].max() if deep.ndim == 3 else deep.max()
        bits = head[stated] if stated > 4 else 8 if largest < 256 else 12 if largest < 4096 else 16
        if bits == 12 and stated < 4:
            warnings.warn("16-bit images with values below 4096 are read as 12-bit data (see bits=)", stacklevel=2)
    white = min(2**bits - 1, 65535)
    shallow = Image.fromarray((deep / (white / 255)).round().clip(0, 255).astype(np.uint8))
    shallow.getexif()[ORIENTATION] = picture.getexif().get(ORIENTATION, 1)
    return shallow


def _low_bytes(path) -> np.ndarray | None:
    """The low bytes of a colour image with 16 bits per channel, of which Pillow keeps the high bytes; else None."""
    with Image.open(path) as picture:
        tiles = [(tile, (tile.args,) if isinstance(tile.args, str) else tile.args) for tile in picture.tile]
        other = {f"{mode};16{a}": f"{mode};16{b}" for mode in ("RGB", "RGBA") for a, b in ("BL", "LB")}
        if not tiles or any(not args or args[0] not in other for _, args in tiles):
            return None
        picture.tile = [tile._replace(args=(other[args[0]], *args[1:])) for tile, args in tiles]
        return np.asarray(picture)


def read_image_uint8(path, *, bits: int | None = None) -> torch.Tensor:
    """Read an image as `read_image` does, but uint8 [3, H, W]."""
    picture = ImageOps.exif_transpose(_eight_bits(_open(path, "an image"), path, bits))
    if picture.has_transparency_data:
        page = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(page, picture.convert("RGBA"))
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def read_image(path, *, bits: int | None = None) -> torch.Tensor:
    """Read any image that Pillow opens: float32 RGB [3, H, W] in [0, 1].

    The image is rotated by its EXIF tag, and grey becomes three equal channels. Transparent pixels are drawn over
    white, as by a viewer: their own colours are arbitrary. Of an animation, the first frame is read.

    Args:
        bits: significant bits of a 16-bit image. None: as the PNG states; else 12 if all values are below 4096 (with a
            warning: 12-bit data would otherwise be almost black), 8 if they are below 256, and 16 in all other cases.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is truncated, no image, or floating-point.
    """
    return read_image_uint8(path, bits=bits).float() / 255


def read_label_values(path, palette=None) -> np.ndarray:
    """Read the stored values of a label file, rotated by its EXIF tag: integers [H, W] or uint8 colours [H, W, 3 or 4].

    A colour image with three equal channels counts as grey; with `palette`, uint8 [K + 1, 3], it gives its colours. A
    palette image gives its numbers; its greys, if it has only greys in another order than from black to white; or its
    colours, if one of them is in `palette`.
    ValueError if the file is broken, partly transparent grey, or compressed with loss, which changes values at borders.
    """
    picture = _open(path, "a label map")
    file = Path(path).read_bytes() if picture.format == "WEBP" else b""
    lossy_webp = 0 < file.find(b"VP8 ") < (file.find(b"VP8L") % (len(file) + 1))
    if picture.format in ("JPEG", "MPO", "AVIF", "HEIF") or lossy_webp or picture.info.get("compression") == "jpeg":
        raise ValueError(f"{path}: lossy compression changes labels; expected PNG, TIFF, BMP, GIF or lossless WebP")
    is_gif, picture = picture.format == "GIF", ImageOps.exif_transpose(picture)
    if picture.mode not in ("1", "L", "P", "LA", "RGB", "RGBA") and not picture.mode.startswith("I"):
        raise ValueError(f"{path}: a label map in mode {picture.mode}; expected grey, palette or RGB")
    if picture.mode == "P" and _shows_colours(picture, palette, is_gif):
        picture = picture.convert("RGB")
    values = np.array(picture)
    if values.ndim == 3 and picture.mode in ("LA", "RGBA") and (values[..., -1] == 255).all():
        values = values[..., :-1]
    is_grey = values.ndim == 3 and (picture.mode == "LA" or palette is None)
    if is_grey and (values.shape[2] == 1 or (values[..., :1] == values).all()):
        values = values[..., 0]
    elif is_grey and values.shape[2] in (2, 4) and (values[..., :1] == values[..., :-1]).all():
        raise ValueError(f"{path}: the label is partly transparent; export it on a black background, without alpha")
    return values.astype(np.uint8) if values.dtype == bool else values


def _shows_colours(picture: Image.Image, palette, is_gif: bool) -> bool:
    """Whether the colours of a palette image are its labels; else the numbers of the colours are.

    An encoder makes the palette of a picture and orders it as it likes, so numbers mean nothing if a colour is listed
    in `palette`, or if there are only greys that do not rise from black. One colour, even unused, makes greys the
    colours of class numbers, as in VOC's palette, and so does one grey for two numbers. A GIF has a palette in any
    case: its used colours decide.
    """
    entries = np.zeros((256, 3), np.uint8)
    entries.reshape(-1)[: len(picture.getpalette())] = picture.getpalette()
    used = np.flatnonzero(np.bincount(np.asarray(picture).ravel()))
    count = 1 + np.flatnonzero(entries.any(axis=1)).max(initial=0)  # encoders fill up with black
    if 1 < count > used.max() and (entries[:count] == np.arange(count)[:, None]).all():
        return False  # 0 0 0, 1 1 1, 2 2 2, ...: a grey image; 0 0 0 alone may be the only colour of a mask
    if palette is not None and (entries[used, None] == np.asarray(palette)).all(2).any():
        return True
    greys, grey = np.ptp(entries, axis=1) == 0, entries[:, 0].astype(int)
    first = np.unique(grey, return_index=True)[1]  # the number of each grey
    rising = grey[0] == 0 and (np.diff(grey[: max(count, 1 + used.max())]) > 0).all()
    return bool(greys[used].all() if is_gif else greys.all() and np.isin(used, first).all() and not rising)


def read_label(path, palette=None) -> torch.Tensor:
    """Read a label map: uint8 [H, W], the values of `read_label_values`.

    Colours are decoded with `palette`, uint8 [K + 1, 3] with void last. ValueError if the file is broken, has values
    above 255, is a colour image without a palette, or contains a colour that is not in the palette.
    """
    values = read_label_values(path, palette)
    if values.ndim == 3:
        if palette is None:
            raise ValueError(f"{path}: a label map in colour without a palette; expected one channel of class numbers")
        values = decode_colours(values, palette, path)
    if values.size and (values.min() < 0 or values.max() > 255):
        raise ValueError(f"{path}: label values reach {values.max()}; expected class numbers, or {VOID} for void")
    return torch.from_numpy(values.astype(np.uint8))


def decode_colours(colours: np.ndarray, palette, path) -> np.ndarray:
    """Convert colours, uint8 [H, W, 3 or 4], to the row numbers of a palette, uint8 [H, W]; the last row is void.

    Transparent pixels of an unknown colour are void. ValueError with counts if other pixels have an unknown colour.
    """
    codes = np.asarray(palette).astype(np.int64) @ (65536, 256, 1)
    # Reversed, so that a class wins that has the same colour as void.
    lookup = {code: VOID if row == len(codes) - 1 else row for row, code in reversed(list(enumerate(codes.tolist())))}
    values, inverse = np.unique(colours[..., :3].astype(np.int64) @ (65536, 256, 1), return_inverse=True)
    table = np.array([lookup.get(value, -1) for value in values.tolist()])
    index = table[inverse.reshape(colours.shape[:2])]  # [H, W], -1: unknown
    if colours.shape[2] == 4:
        index[(index < 0) & (colours[..., 3] == 0)] = VOID
    if (unknown := index < 0).any():
        found, counts = np.unique(colours[unknown][:, :3], axis=0, return_counts=True)
        colour = tuple(found[counts.argmax()].tolist())
        raise ValueError(
            f"{path}: {len(found)} colours of {unknown.sum()} pixels are not in the palette; the most frequent is "
            f"colour {colour} ({counts.max()} pixels)"
        )
    return index.astype(np.uint8)


def image_size(path) -> tuple[int, int]:
    """(H, W) of the image that `read_image` returns, from the header; ValueError if Pillow cannot open the file."""
    picture = _open(path, "an image", header_only=True)
    width, height = picture.size
    return (width, height) if picture.getexif().get(ORIENTATION, 1) >= 5 else (height, width)


def check_size(size, name: str) -> tuple[int, int]:
    """Return `size` as (height, width); ValueError unless it is two whole numbers of at least 1 px."""
    if not isinstance(size, Sequence) or len(size) != 2 or any(int(side) != side or side < 1 for side in size):
        raise ValueError(f"{name}: size {size} is not (height, width) in pixels, at least 1")
    return int(size[0]), int(size[1])


def resize_image(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize an image [3, H, W] bilinearly, with antialiasing."""
    from torchvision.transforms.v2 import functional as F

    return F.resize_image(image, list(size), interpolation=F.InterpolationMode.BILINEAR, antialias=True)


def resize_label(label: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize a label map [H, W]: each pixel takes the label under its centre (torch's "nearest-exact").

    torchvision's resize of masks takes the label under the corner, which shifts it against the image.
    """
    rows, columns = (((torch.arange(new) + 0.5) * old / new).long() for new, old in zip(size, label.shape, strict=True))
    return label[rows[:, None], columns]
