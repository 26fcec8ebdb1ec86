"""A user's own labels: class lists, values and colours, formats, and the checks before training."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from pwlib import probabilities_from_labels
from pwlib.annotations.check import check_folder
from pwlib.annotations.classes import LabelReader, label_arguments, parse_values, read_classes
from pwlib.data import VOID, load, read_image, read_label, voc_palette
from pwlib.data.images import image_size

RNG = np.random.default_rng(0)
COLOURS = np.array([[0, 0, 0], [128, 64, 0], [0, 200, 30], [255, 255, 255]], np.uint8)  # the last: void


def blobs(count=3, size=(24, 32), seed=0):
    """A label map [H, W] with `count` classes in rectangles that fill it."""
    rows = np.arange(size[0])[:, None] * count // size[0]
    columns = np.arange(size[1])[None] * count // size[1]
    return ((rows + columns + seed) % count).astype(np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(path, **options)
    return path


def write_folder(root, labels, suffix=".png", **options):
    """root/{train,val}/{images,labels} with one file per label map: the last one is for validation."""
    for index, label in enumerate(labels):
        base = root / ("val" if index == len(labels) - 1 else "train")
        shape = label.size[::-1] if isinstance(label, Image.Image) else label.shape[:2]
        save(base / "images" / f"im{index}.png", RNG.integers(0, 256, (*shape, 3), dtype=np.uint8))
        save(base / "labels" / f"im{index}{suffix}", label, **options)
    return root


# --------------------------------------------------------------------------------------------------------- class lists

LISTS = {
    "names": ("sky\nsea\n\n", ("sky", "sea"), None),
    "spaces and comments": ("# my classes\n  wet sand \nsea 2\n", ("wet sand", "sea 2"), None),
    "name r g b": ("background 0 0 0\nred car\t255 0 10\n", ("background", "red car"), [[0, 0, 0], [255, 0, 10]]),
    "name,r,g,b": ("a,1,2,3\nb, 4, 5, 6\n", ("a", "b"), [[1, 2, 3], [4, 5, 6]]),
    "r g b name": ("64 128 64\tAnimal\n192 0 128\t\tArchway\n", ("Animal", "Archway"), [[64, 128, 64], [192, 0, 128]]),
    "cvat": ("# label:color_rgb:parts:actions\nbackground:0,0,0::\nroof:250,50,83::\n",
             ("background", "roof"), [[0, 0, 0], [250, 50, 83]]),
    "void": ("sky 1 1 1\nVoid 0 0 0\nsea 2 2 2\n", ("sky", "sea"), [[1, 1, 1], [2, 2, 2]]),
}  # fmt: skip


@pytest.mark.parametrize("kind", LISTS)
def test_class_lists(kind, tmp_path):
    text, names, colours = LISTS[kind]
    path = tmp_path / "classes.txt"
    path.write_text(text, encoding="utf-8")
    found, palette = read_classes(path)
    assert found == names
    assert (palette is None) == (colours is None)
    if colours:
        assert palette[:-1].tolist() == colours and palette[-1].tolist() not in colours
        assert kind != "void" or palette[-1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16"])
def test_encodings_of_class_lists(encoding, tmp_path):
    (tmp_path / "classes.txt").write_text("Straße\ncafé\n", encoding=encoding, newline="\r\n")
    assert read_classes(tmp_path / "classes.txt")[0] == ("Straße", "café")
    write_folder(tmp_path, [blobs(2)] * 2)
    assert load("folder", "train", tmp_path).class_names == ("Straße", "café")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "contains no class"),
        ("# nothing\n", "contains no class"),
        ("sky\nsky\n", "the name sky occurs twice"),
        ("a 1 2 3\nb 1 2 3\n", r"the colour \(1, 2, 3\) occurs twice"),
        ("a 1 2 3\nb\n", "'b' has no colour"),
        ("a 1 2 300\n", "has the value 300"),
    ],
)
def test_faulty_class_lists(text, message, tmp_path):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_classes(tmp_path / "classes.txt")
    with pytest.raises(FileNotFoundError, match=r"other\.txt: no such file"):
        read_classes(tmp_path / "other.txt")


def test_mappings_of_values():
    assert parse_values("0=0,255=1, 128 = void") == {0: 0, 255: 1, 128: VOID}
    assert parse_values("0-2=0, 3 - 4 = void,5=1") == {0: 0, 1: 0, 2: 0, 3: VOID, 4: VOID, 5: 1}
    for text in ("", "0", "0=", "a=1", "0=256", "0=255", "0=-1", "0=1;1=2", "4-3=0", "-3=0", "0-=1", "0-99999999999=0"):
        with pytest.raises(ValueError, match="is not a mapping"):
            parse_values(text)
    assert label_arguments("a,b", None, [(0, 0)], "none") == {
        "class_names": ["a", "b"],
        "values": [[0, 0]],
        "void": None,
    }


# ----------------------------------------------------------------------------------------------------- values, colours


def test_values_become_classes(tmp_path):
    stored = np.array([[0, 255, 7], [200, 0, 255]], np.uint8)
    path = save(tmp_path / "a.png", stored)
    assert LabelReader(values={0: 0, 255: 1, 7: 2, 200: VOID})(path).tolist() == [[0, 1, 2], [255, 0, 1]]
    assert LabelReader(values={0: 0, 7: 2, 200: 3})(path).tolist() == [[0, 255, 2], [3, 0, 255]]  # 255 is void
    with pytest.raises(
        ValueError, match=r"a\.png: the label has the values 7, 255 in 3 pixels; --values or --void must"
    ):
        LabelReader(values={0: 0, 200: 3}, void=None)(path)
    deep = save(tmp_path / "deep.png", np.array([[0, 26000]], np.uint16))
    assert LabelReader(values={0: 0, 26000: 1})(deep).tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="label values reach 26000; map them"):
        LabelReader()(deep)
    eleven = save(tmp_path / "eleven.png", np.array([[0, 11]], np.uint8))
    assert LabelReader(void=11)(eleven).tolist() == [[0, VOID]]


FORMATS = {
    ".png": {},
    ".PNG": {},
    ".tif": {},
    ".TIFF": {},
    ".bmp": {},
    ".gif": {},
    ".webp": {"lossless": True},
    ".ppm": {},
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", ["grey", "colour"])
def test_label_formats(suffix, kind, tmp_path):
    index = blobs(3)
    index[0] = VOID
    pixels = index if kind == "grey" else COLOURS[np.where(index == VOID, 3, index)]
    write_folder(tmp_path, [pixels] * 3, suffix, **FORMATS[suffix])
    options = {} if kind == "grey" else {"palette": COLOURS}
    dataset = load("folder", "train", tmp_path, **options)
    assert dataset.num_classes == 3 and len(dataset) == 2
    assert np.array_equal(dataset[0][1], index)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "P with colours", "LA"])
def test_modes_of_image_editors(mode, tmp_path):
    """Editors save a grey mask as RGB, RGBA or LA, and a colour mask as a palette image with their own numbers."""
    index = blobs(3)
    if mode == "P with colours":
        picture = Image.fromarray(COLOURS[index]).quantize(8)
        assert not np.array_equal(picture, index), "the palette must have another order"
        assert np.array_equal(LabelReader(COLOURS)(save(tmp_path / "a.png", picture)), index)
        other = Image.fromarray(index).convert("P")  # class numbers under colours that are not the palette's
        other.putpalette(RNG.integers(0, 256, 768, dtype=np.uint8).tolist())
        assert np.array_equal(LabelReader(COLOURS)(save(tmp_path / "b.png", other)), index)
    else:
        path = save(tmp_path / "a.png", Image.fromarray(index).convert(mode))
        assert np.array_equal(LabelReader()(path), index) and np.array_equal(read_label(path), index)


def indexed(numbers, entries):
    """A palette image of the numbers [H, W], with the colours `entries` [N, 3]."""
    picture = Image.fromarray(numbers.astype(np.uint8))
    picture.putpalette(np.asarray(entries, np.uint8).ravel().tolist())
    return picture


GREYS = np.array([[255, 0, 0], [0, 0, 0], [255, 255, 255], [9, 9, 9]], np.uint8)  # cat, background, wall; void


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".gif", ".webp"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_masks_that_contain_only_greys(mode, suffix, tmp_path):
    """A mask without the only class in colour is still a colour mask."""
    if mode == "P" and suffix == ".bmp":
        pytest.skip("Pillow reads a BMP with a palette of black alone as a grey image")
    options = {"lossless": True} if suffix == ".webp" else {}
    for name, used in {"all": [0, 1, 2], "black": [1, 1, 1], "white": [2, 2, 2], "both": [1, 2, 1]}.items():
        index = np.array(used)[blobs(3)]
        picture = Image.fromarray(GREYS[index])
        picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
        path = save(tmp_path / f"{name}{suffix}", picture, **options)
        assert np.array_equal(LabelReader(GREYS)(path), index) and np.array_equal(read_label(path, GREYS), index)
    write_folder(tmp_path, [GREYS[np.array([1, 2])[blobs(2)]]] * 3)
    (tmp_path / "classes.txt").write_text("cat 255 0 0\nbackground 0 0 0\nwall 255 255 255\n")
    assert np.array_equal(load("folder", "val", tmp_path)[0][1], 1 + blobs(2))


def test_grey_images_have_class_numbers_although_there_is_a_palette(tmp_path):
    """`convert` writes index PNGs and colours in classes.txt; a palette 0 0 0, 1 1 1, ... is a grey image, too."""
    index = blobs(3)
    pictures = {"L.png": index, "P.png": Image.fromarray(index).convert("P"), "L.gif": index, "L.tif": index}
    pictures |= {"LA.png": Image.fromarray(index).convert("LA"), "16.png": index.astype(np.uint16)}
    for name, picture in pictures.items():
        path = save(tmp_path / name, picture)
        assert np.array_equal(LabelReader(GREYS)(path), index) and np.array_equal(LabelReader()(path), index), name


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".gif"])
def test_palettes_of_greys_in_another_order_are_read_by_grey(suffix, tmp_path):
    """Pictures that look the same are the same labels, if white is 1 or 255; rising greys from black stay numbers."""
    white = blobs(2) == 1
    for name, picture in {
        "black first": indexed(white, [[0] * 3, [255] * 3]),
        "white first": indexed(~white, [[255] * 3, [0] * 3]),
        "filled up": indexed(~white, [[255] * 3] + [[0] * 3] * 255),
        "quantized": Image.fromarray(np.uint8(255 * white)).convert("RGB").quantize(2),
    }.items():
        if suffix == ".bmp" and name in ("black first", "filled up"):
            continue  # Pillow reads the first as 1 bit, as it does for grey PNGs of 1 bit
        path = save(tmp_path / f"{name}{suffix}", picture)
        assert np.array_equal(LabelReader(values={0: 0, 1: 1, 255: 1})(path), white), name
        if name in ("white first", "filled up"):
            assert np.array_equal(LabelReader(values={0: 0, 255: 1})(path), white), name
    only = save(tmp_path / f"only{suffix}", indexed(np.zeros((4, 5)), [[255] * 3]))
    assert (LabelReader(values={0: 0, 255: 1})(only) == 1).all()
    three = save(tmp_path / f"three{suffix}", indexed(blobs(3), [[255] * 3, [0] * 3, [128] * 3]))
    assert np.array_equal(LabelReader(values={255: 0, 0: 1, 128: 2})(three), blobs(3))


ENTRIES = {
    "VOC's": voc_palette(256)[:256],
    "VOC's 0 and 7": voc_palette(256)[:256],  # black and a grey, with which the file alone would look grey
    "grey numbers": np.arange(256)[:, None].repeat(3, 1),
    "black": np.zeros((256, 3)),
    "black and white": np.array([[0] * 3, [255] * 3]),
    "rising greys": np.array([[0] * 3, [100] * 3, [101] * 3, [255] * 3]),
    "few entries": np.array([[0] * 3, [255] * 3] + [[0] * 3] * 254),  # of a file that also uses 255 for void
    "black and white, the rest in colour": np.array([[0] * 3, [255] * 3, [255, 0, 0], [0, 255, 0]]),
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_palettes_that_do_not_change_class_numbers(kind, tmp_path):
    numbers = {
        "VOC's 0 and 7": [0, 7],
        "black and white": [0, 1],
        "few entries": [0, 1, 255],
        "black and white, the rest in colour": [0, 1],
    }
    index = np.array(numbers.get(kind, [0, 1, 3]), np.uint8)[blobs(len(numbers.get(kind, "abc")))]
    path = save(tmp_path / "a.png", indexed(index, ENTRIES[kind]))
    assert Image.open(path).mode == "P" and np.array_equal(Image.open(path), index)
    assert np.array_equal(LabelReader()(path), index) and np.array_equal(read_label(path), index)


def test_palette_images_with_an_unlisted_colour(tmp_path):
    """Their numbers are classes only if none of their colours is listed."""
    index, stray = blobs(3), blobs(3)
    stray[0, 0] = 3
    entries = [COLOURS[1], COLOURS[0], COLOURS[2], (250, 250, 0)]
    good = save(tmp_path / "good.png", indexed(index, entries))
    assert np.array_equal(LabelReader(COLOURS)(good), np.array([1, 0, 2])[index])
    message = r"1 colours of 1 pixels are not in the palette; the most frequent is colour \(250, 250, 0\)"
    for read in (LabelReader(COLOURS), lambda path: read_label(path, COLOURS)):
        with pytest.raises(ValueError, match=message):
            read(save(tmp_path / "stray.png", indexed(stray, entries)))
    write_folder(tmp_path / "data", [indexed(index, entries), indexed(stray, entries)])
    report = check_folder(tmp_path / "data", palette=COLOURS)
    assert len(report.errors) == 1 and report.errors[0][0].endswith("im1.png")
    other = save(tmp_path / "other.png", indexed(index, [(1, 0, 0), (2, 0, 0), (3, 0, 0)]))
    assert np.array_equal(LabelReader(COLOURS)(other), index)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_partly_transparent_grey_masks(mode, tmp_path):
    picture = Image.fromarray(np.dstack([blobs(2), 200 * blobs(2) + 1]), "LA").convert(mode)
    write_folder(tmp_path, [picture] * 2)
    assert "partly transparent" in check_folder(tmp_path).errors[0][1]
    if mode == "LA":
        assert "partly transparent" in check_folder(tmp_path, palette=COLOURS).errors[0][1]


def test_transparent_pixels_of_colour_masks(tmp_path):
    index = blobs(3)
    pixels = np.dstack([COLOURS[index], np.full(index.shape, 255, np.uint8)])
    pixels[0] = (9, 9, 9, 0)  # transparent, and not in the palette
    label = LabelReader(COLOURS)(save(tmp_path / "a.png", pixels))
    assert (label[0] == VOID).all() and np.array_equal(label[1:], index[1:])
    pixels[0, :5] = (9, 9, 9, 40)
    pixels[0, 5] = (8, 9, 9, 255)
    with pytest.raises(ValueError, match=r"2 colours of 6 pixels .* most frequent is colour \(9, 9, 9\) \(5 pixels\)"):
        LabelReader(COLOURS)(save(tmp_path / "a.png", pixels))


@pytest.mark.parametrize(("suffix", "options"), [(".webp", {"lossless": False}), (".tif", {"compression": "jpeg"})])
def test_lossy_labels_are_rejected(suffix, options, tmp_path):
    pixels = COLOURS[blobs(3)]
    path = save(tmp_path / f"a{suffix}", pixels, **options)
    for read in (read_label, LabelReader(COLOURS)):
        with pytest.raises(ValueError, match="lossy compression changes labels"):
            read(path)
    save(tmp_path / "b.png", pixels, format="JPEG")
    with pytest.raises(ValueError, match="lossy compression changes labels"):
        read_label(tmp_path / "b.png")
    write_folder(tmp_path / "jpeg", [blobs(3)] * 2, ".jpg")
    with pytest.raises(FileNotFoundError, match=r"contains no label maps.*found \.jpg"):
        load("folder", "train", tmp_path / "jpeg")


# --------------------------------------------------------------------------------------------------------------- files


def test_stray_files_and_folders_are_ignored(tmp_path):
    write_folder(tmp_path, [blobs(2)] * 3)
    train = tmp_path / "train"
    for part in ("images", "labels"):
        (train / part / "._im0.png").write_bytes(b"Mac OS X resource fork")
        (train / part / ".DS_Store").write_bytes(b"x")
        (train / part / "Thumbs.db").write_bytes(b"x")
        save(train / part / "__MACOSX" / "im9.png", np.full((4, 4), 9, np.uint8))
        (train / part / "folder.png").mkdir()
    save(tmp_path / "old" / "labels" / "im0.png", np.full((4, 4), 77, np.uint8))
    save(tmp_path / "__MACOSX" / "labels" / "im0.png", np.full((4, 4), 99, np.uint8))
    dataset = load("folder", "train", tmp_path)
    assert dataset.names == ["im0", "im1"] and dataset.num_classes == 2
    assert not check_folder(tmp_path).errors


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_names_of_splits_are_named(name, tmp_path):
    write_folder(tmp_path, [blobs(2)] * 3)
    (tmp_path / "val").rename(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=f"has no folder 'val' but '{name}'; rename it"):
        load("folder", "val", tmp_path)
    (tmp_path / name).rename(tmp_path / "holidays")
    with pytest.raises(FileNotFoundError, match="has no folder 'val'; it has train"):
        load("folder", "val", tmp_path)


def test_jfif(tmp_path):
    """Browsers on Windows save JPEG under this suffix."""
    write_folder(tmp_path, [blobs(2)] * 3)
    photo = tmp_path / "train" / "images" / "im0.png"
    with Image.open(photo) as picture:
        picture.save(photo.with_suffix(".jfif"), format="JPEG")
    photo.unlink()
    dataset = load("folder", "train", tmp_path)
    assert dataset.names == ["im0", "im1"] and dataset[0][0].shape == (3, 24, 32)
    assert not check_folder(tmp_path, decode_images=True).errors


def test_heic_without_its_plugin(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    write_folder(tmp_path, [blobs(2)] * 2)
    (tmp_path / "train" / "images" / "im0.png").rename(tmp_path / "train" / "images" / "im0.HEIC")
    with pytest.raises(ValueError, match=r"im0\.HEIC: HEIC needs `pip install pillow-heif`"):
        load("folder", "train", tmp_path)


@pytest.mark.parametrize("tag", [1, 6])
def test_heic_with_its_plugin(tag, tmp_path):
    plugin = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed (pip install '.[annotations]')")
    plugin.register_heif_opener()
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :24] = (200, 40, 40)  # upper left, as stored
    exif = Image.Exif()
    exif[0x0112] = tag
    save(tmp_path / "a.heic", pixels, quality=95, exif=exif.tobytes())
    image = read_image(tmp_path / "a.heic")
    expected = np.rot90(pixels, -1) if tag == 6 else pixels
    assert image.shape == (3, *expected.shape[:2]) and image_size(tmp_path / "a.heic") == expected.shape[:2]
    assert np.abs(255 * image.permute(1, 2, 0).numpy() - expected).mean() < 8


# ------------------------------------------------------------------------------------------------------ bits, rotation


def png16(pixels, sbit=None):
    """The bytes of a 16-bit PNG, grey [H, W] or RGB [H, W, 3], which Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    colour = 2 if pixels.ndim == 3 else 0
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    data += chunk(b"sBIT", bytes([sbit] * (3 if colour else 1))) if sbit else b""
    return data + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize(
    ("largest", "sbit", "bits", "white"),
    [
        (65535, None, None, 65535),
        (5000, None, None, 65535),  # a dark photo
        (4095, None, None, 4095),  # 12-bit data
        (900, None, None, 4095),  # the same, underexposed
        (255, None, None, 255),  # 8-bit data in 16 bits
        (4095, None, 16, 65535),
        (16383, None, 14, 16383),
        (1000, 10, None, 1023),  # as the file states
        (4095, 16, None, 65535),
    ],
)
def test_significant_bits_of_deep_images(channels, largest, sbit, bits, white, tmp_path):
    deep = RNG.integers(0, largest + 1, (6, 9, *channels))
    deep.flat[0] = largest
    (tmp_path / "deep.png").write_bytes(png16(deep, sbit))
    expected = np.broadcast_to(deep[..., None] if not channels else deep, (6, 9, 3)) / white
    if white == 4095:
        with pytest.warns(UserWarning, match="read as 12-bit data"):
            image = read_image(tmp_path / "deep.png", bits=bits)
    else:
        image = read_image(tmp_path / "deep.png", bits=bits)
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() < 0.5 / 255 + 1e-6


@pytest.mark.parametrize("order", ["<", ">"])
def test_deep_colour_tiff(order, tmp_path):
    """An uncompressed TIFF with 16 bits per channel, written by hand in either byte order."""
    deep = RNG.integers(0, 4096, (6, 9, 3))
    tags = [(256, 9), (257, 6), (258, 16), (259, 1), (262, 2), (273, 8), (277, 3), (278, 6), (279, deep.size * 2)]
    data = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + deep.size * 2)
    data += deep.astype(f"{order}u2").tobytes() + struct.pack(f"{order}H", len(tags))
    bits = 8 + deep.size * 2 + 2 + 12 * len(tags) + 4  # offset of the three values of BitsPerSample
    for tag, value in tags:
        entry = (tag, 3, 3, bits) if tag == 258 else (tag, 4, 1, value)
        data += struct.pack(f"{order}HHII", *entry)
    data += struct.pack(f"{order}I", 0) + struct.pack(f"{order}3H", 16, 16, 16)
    (tmp_path / "deep.tif").write_bytes(data)
    with pytest.warns(UserWarning, match="read as 12-bit data"):
        image = read_image(tmp_path / "deep.tif")
    assert np.abs(image.permute(1, 2, 0).numpy() - deep / 4095).max() < 0.5 / 255 + 1e-6


def test_deep_images_are_rotated(tmp_path):
    deep = RNG.integers(0, 65536, (6, 9, 3))
    (tmp_path / "plain.png").write_bytes(png16(deep))
    exif = Image.Exif()
    exif[0x0112] = 6
    data, turned = png16(np.rot90(deep, 1)), exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(turned)) + b"eXIf" + turned + struct.pack(">I", zlib.crc32(b"eXIf" + turned))
    place = data.index(b"IDAT") - 4
    (tmp_path / "turned.png").write_bytes(data[:place] + chunk + data[place:])
    assert torch.equal(read_image(tmp_path / "turned.png"), read_image(tmp_path / "plain.png"))


TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    6: "ROTATE_90",
    8: "ROTATE_270",
}  # to store


def photo_and_label(root, tag, *, square, raw):
    """A photo that is stored rotated, and its label: as the viewer shows it, or as stored (raw)."""
    side = (40, 40) if square else (40, 56)
    label = np.zeros(side, np.uint8)
    label[3:18, 5:14] = 1  # at no symmetric place
    label[25:37, 20:33] = 2
    photo = (40 + 80 * label[..., None] + RNG.integers(0, 20, (*side, 3))).astype(np.uint8)
    turn = getattr(Image.Transpose, TURNS[tag])
    exif = Image.Exif()
    exif[0x0112] = tag
    for split in ("train", "val"):
        save(root / split / "images" / "a.png", Image.fromarray(photo).transpose(turn), exif=exif)
        picture = Image.fromarray(label)
        save(root / split / "labels" / "a.png", picture.transpose(turn) if raw else picture)
    return root


@pytest.mark.parametrize("tag", TURNS)
@pytest.mark.parametrize("square", [False, True])
def test_labels_in_raw_orientation_are_reported(tag, square, tmp_path):
    good = check_folder(photo_and_label(tmp_path / "good", tag, square=square, raw=False))
    assert not good.errors and not good.warnings
    bad = check_folder(photo_and_label(tmp_path / "bad", tag, square=square, raw=True))
    if tag >= 5 and not square:
        assert len([text for _, text in bad.errors if "whose EXIF tag the label must follow" in text]) == 2
        with pytest.raises(ValueError, match="seems to be rotated"):
            load("folder", "train", tmp_path / "bad")
    else:
        assert not bad.errors and len(bad.warnings) == 2
        assert "seems to have the orientation of the stored pixels" in bad.warnings[0][1]


def test_labels_with_an_exif_tag_of_their_own_are_rotated(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.ascontiguousarray(np.rot90(blobs(3), 1))
    assert np.array_equal(read_label(save(tmp_path / "a.png", stored, exif=exif)), blobs(3))


# ---------------------------------------------------------------------------------------------------------------- check


def smoothed(label, scale=4):
    """The label map as an editor exports it with anti-aliasing."""
    large = Image.fromarray(label).resize((label.shape[1] * scale, label.shape[0] * scale), Image.Resampling.NEAREST)
    disc = Image.fromarray(label).resize(large.size, Image.Resampling.BICUBIC)
    tilted = Image.blend(large, disc, 0.5).rotate(13, Image.Resampling.BICUBIC)
    return tilted.resize((label.shape[1] * 2, label.shape[0] * 2), Image.Resampling.LANCZOS)


def circle(size=64, value=255):
    y, x = np.mgrid[:size, :size]
    return (((y - size / 2) ** 2 + (x - size / 2) ** 2 < (size / 3) ** 2) * value).astype(np.uint8)


def jpeg(pixels):
    """The pixels after JPEG compression."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG")
    return np.asarray(Image.open(data))


BINARY = circle()
SPARSE = np.array([0, 7, 200], np.uint8)[blobs(3)]
DOWNSIZED = np.asarray(Image.fromarray(circle(256)).resize((64, 64), Image.Resampling.BOX))
FAULTY = {
    # what the masks are: (mask, class names, pattern of the error)
    "0 and 255": (BINARY, None, r"only class 0 occurs.*0, 255 \(a black-and-white mask.*--values 0=0,255=1"),
    "0 and 255 with names": (BINARY, ("a", "b"), "only class 0 occurs.*--values 0=0,255=1"),
    "0 and 255 as RGB": (np.dstack([BINARY] * 3), None, "only class 0 occurs.*--values 0=0,255=1"),
    "0 and 255 as 16 bits": (BINARY.astype(np.uint16), None, "only class 0 occurs.*--values 0=0,255=1"),
    "0, 7, 200": (SPARSE, None, "198 of 201 classes never occur; .* 0, 7, 200; .*--values 0=0,7=1,200=2"),
    "0, 7, 200 with names": (SPARSE, ("a", "b", "c"), "value 7 is outside the 3 classes; .*--values 0=0,7=1,200=2"),
    "0, 128, 255": (np.array([0, 128, 255], np.uint8)[blobs(3)], None, "never occur;.*--values 0=0,128=1,255=void"),
    "1 and 255": (np.where(BINARY, 255, 1).astype(np.uint8), None, "only class 1 occurs"),
    "one class": (np.zeros((9, 9), np.uint8), None, "only class 0 occurs"),
    "void": (np.full((9, 9), VOID, np.uint8), None, "no class occurs"),
    "smoothed": (np.asarray(smoothed(BINARY)), None, "many values occur only in single pixels.*without smoothing"),
    "smoothed with names": (np.asarray(smoothed(BINARY)), ("a", "b"), "many values occur only in single pixels"),
    "smoothed, 200 levels": (np.asarray(smoothed(circle(value=200))), None, "many values occur only in single pixels"),
    "downsized": (DOWNSIZED, None, "many values occur only in single pixels"),
    "JPEG": (jpeg(BINARY), None, "many values|never occur"),
    "colours": (COLOURS[blobs(3)], None, r"is a colour image \(colours .*\); list them with their names in classes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTY)
def test_labels_that_cannot_be_trained_on(kind, tmp_path):
    mask, names, message = FAULTY[kind]
    write_folder(tmp_path, [mask] * 3)
    if names:
        (tmp_path / "classes.txt").write_text("\n".join(names))
    report = check_folder(tmp_path)
    with pytest.raises(ValueError, match=message):
        report.raise_errors(tmp_path)
    if len(report.errors) > 1:
        assert {place.rsplit("/", 1)[1] for place, _ in report.errors} == {"im0.png", "im1.png", "im2.png"}


def test_smoothed_masks_can_be_mapped_by_ranges(tmp_path):
    mask = np.asarray(smoothed(BINARY))
    write_folder(tmp_path, [mask] * 3)
    place, text = check_folder(tmp_path).errors[0]
    assert "map ranges with --values 0-127=0,128-255=1" in text
    assert "map ranges" in check_folder(tmp_path, values={0: 0, 255: 1}).errors[0][1]
    report = check_folder(tmp_path, values=parse_values("0-127=0,128-255=1"))
    assert not report.errors and np.array_equal(report.reader(place), mask >= 128)


def test_the_suggested_mapping_repairs_binary_masks(tmp_path):
    write_folder(tmp_path, [BINARY] * 3)
    report = check_folder(tmp_path, values=parse_values("0=0,255=1"))
    assert not report.errors and not report.warnings
    assert report.pixels["train"].tolist() == [2 * (BINARY == 0).sum(), 2 * (BINARY == 255).sum(), 0]
    dataset = load("folder", "train", tmp_path, values={0: 0, 255: 1})
    assert dataset.num_classes == 2 and np.array_equal(dataset[0][1], BINARY // 255)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, lambda mask: mask.astype(np.int64)])
def test_binary_masks_as_labels_of_a_crf(kind):
    """255 is void, so that a mask of 0 and 255 would be the class 0 everywhere."""
    with pytest.raises(ValueError, match=r"only 0 and 255.*labels > 0"):
        probabilities_from_labels(kind(BINARY), 2)
    expected = np.where(BINARY > 0, 0.7, 0.3)
    found = probabilities_from_labels(kind(BINARY) > 0, 2)
    np.testing.assert_allclose(found[1], expected, atol=1e-6)
    strokes = np.full((4, 5), VOID, np.uint8)
    strokes[0], strokes[3] = 0, 1
    assert probabilities_from_labels(kind(strokes), 2)[1, 3, 0] == pytest.approx(0.7)
    found = probabilities_from_labels(kind(BINARY), 256, void=-1)
    np.testing.assert_allclose(found[255], np.where(BINARY, 0.7, 0.3 / 255), atol=1e-6)


def test_smoothed_colour_masks_are_reported(tmp_path):
    picture = Image.fromarray(COLOURS[circle(value=1)]).rotate(13, Image.Resampling.BICUBIC)
    write_folder(tmp_path, [picture.resize((48, 48), Image.Resampling.BILINEAR)] * 2)
    report = check_folder(tmp_path, palette=COLOURS)
    assert (
        len(report.errors) == 2 and "colours of" in report.errors[0][1] and "without smoothing" in report.errors[0][1]
    )


def test_valid_label_maps_have_no_problems(tmp_path):
    noise = RNG.choice([0, 1, 2, 3, VOID], (24, 32)).astype(np.uint8)
    detailed = np.asarray(Image.fromarray(RNG.integers(0, 12, (30, 40)).astype(np.uint8)).resize((160, 120), 0))
    for name, labels in (("blobs", [blobs(3)] * 3), ("noise", [noise] * 2), ("many classes", [detailed] * 2)):
        report = check_folder(write_folder(tmp_path / name, labels))
        assert not report.errors and not report.warnings, name
        assert "no problems found" in str(report)


def test_scenes_have_no_problems(pictures):
    report = check_folder(pictures)
    assert not report.errors and report.class_names[0] == "sky"
    train = load("folder", "train", pictures)
    assert report.pixels["train"].tolist() == train.pixel_counts().tolist()
    assert report.images["val"].tolist() == [
        sum(bool((label == k).any()) for _, label in load("folder", "val", pictures)) for k in range(10)
    ]


def test_warnings(tmp_path):
    write_folder(tmp_path, [blobs(2), blobs(2), blobs(3)])  # class 2 occurs in val only
    save(tmp_path / "train" / "images" / "im9.png", np.zeros((8, 8, 3), np.uint8))
    save(tmp_path / "train" / "labels" / "im9.png", np.full((8, 8), VOID, np.uint8))
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd")
    report = check_folder(tmp_path)
    assert not report.errors
    texts = [f"{place} {text}" for place, text in report.warnings]
    assert any("im9.png every pixel is void" in text for text in texts)
    assert any("c (class 2) occurs in val but not in train" in text for text in texts)
    assert "labels no pixel of d (class 3)" in texts


def test_every_broken_file_is_reported(tmp_path):
    write_folder(tmp_path, [blobs(3)] * 5)
    (tmp_path / "train" / "labels" / "im0.png").write_bytes(b"x")
    save(tmp_path / "train" / "labels" / "im1.png", blobs(3, (24, 31)))
    data = (tmp_path / "train" / "images" / "im2.png").read_bytes()
    (tmp_path / "train" / "images" / "im2.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "train" / "labels" / "im3.png").unlink()
    save(tmp_path / "val" / "labels" / "im9.png", blobs(3))
    report = check_folder(tmp_path, decode_images=True)
    texts = {place.rsplit("/", 1)[1]: text for place, text in report.errors}
    assert set(texts) == {"im0.png", "im1.png", "im2.png", "im3.png", "im9.png"}
    assert texts["im3.png"] == "there is no label of this name" and texts["im9.png"] == "there is no image of this name"
    assert "cannot be read completely" in texts["im0.png"] and "24x31 and its image im1.png 24x32" in texts["im1.png"]
    assert "im2.png: cannot be read completely as an image" in texts["im2.png"]
    with pytest.raises(ValueError, match=r"and 4 more: python -m pwlib labels"):
        report.raise_errors(tmp_path)


def test_palettes_default_to_vocs(tmp_path):
    report = check_folder(write_folder(tmp_path, [blobs(3)] * 2))
    assert np.array_equal(report.palette, voc_palette(3)) and report.class_names == ("class 0", "class 1", "class 2")
