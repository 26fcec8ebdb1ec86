"""Conversion of LabelMe, COCO and mask annotations, against even-odd tests in loops and against pycocotools."""

import base64
import io
import json
import math
import re
import sys

import numpy as np
import pytest
from PIL import Image

from pwlib.annotations.check import check_folder
from pwlib.annotations.convert import convert, draw_polygon
from pwlib.cli.parser import main
from pwlib.data import VOID, load, read_label

RNG = np.random.default_rng(0)
SIZE = (40, 60)
HOUSE = [[10, 12], [30.5, 12], [30.5, 33], [10, 33]]  # a rectangle
ROOF = [[8, 12], [20, 2.5], [33, 12]]  # a triangle


def photo(path, size=SIZE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path, **options)
    return path


def shape(label, points, kind="polygon", **more):
    return {"label": label, "points": points, "shape_type": kind, **more}


def labelme(path, shapes, image="", size=SIZE):
    content = {"imagePath": image, "imageHeight": size[0], "imageWidth": size[1], "imageData": None, "shapes": shapes}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def inside(polygon, x, y):
    """Whether a ray from (x, y) to the right crosses the polygon's edges an odd number of times."""
    crossings = 0
    for (x0, y0), (x1, y1) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        if (y0 > y) != (y1 > y):
            crossings += x < x0 + (y - y0) * (x1 - x0) / (y1 - y0)
    return crossings % 2 == 1


POLYGONS = {
    "rectangle": HOUSE,
    "triangle": ROOF,
    "concave": [[2, 2], [50, 5], [25, 15], [52, 35], [4, 38]],
    "outside": [[-20, -10], [30, 20], [90, -5], [70, 80]],
    "self-intersecting": [[5.3, 5.2], [45.1, 34.9], [45.2, 5.1], [5.4, 35.3]],
    "thin": [[1, 1], [59, 38.2], [59, 38.9]],
    "smaller than a pixel": [[10.6, 10.6], [10.9, 10.6], [10.9, 10.9]],
    "beyond the image": [[100, 100], [120, 100], [110, 130]],
}


@pytest.mark.parametrize("name", POLYGONS)
def test_pixels_with_their_centre_in_the_polygon(name):
    polygon = POLYGONS[name]
    mask = draw_polygon(np.array(polygon, float), SIZE)
    expected = [[inside(polygon, x + 0.5, y + 0.5) for x in range(SIZE[1])] for y in range(SIZE[0])]
    assert mask.shape == SIZE and np.array_equal(mask, expected)
    assert not draw_polygon(np.array(polygon[:2], float), SIZE).any()


# ------------------------------------------------------------------------------------------------------------- LabelMe


def test_labelme_shapes(tmp_path):
    """Polygon, rectangle, circle and mask; a point has no area; later shapes cover earlier ones."""
    stamp = np.zeros((6, 8), np.uint8)
    stamp[1:5, 2:7] = 1
    data = io.BytesIO()
    Image.fromarray(stamp * 255).save(data, "PNG")
    encoded = base64.b64encode(data.getvalue()).decode()
    shapes = [
        shape("wall", HOUSE),
        shape("roof", ROOF),
        shape("sun", [[50, 8], [54, 11]], "circle"),
        shape("door", [[20, 33], [15, 25]], "rectangle"),  # any two opposite corners
        shape("sign", [[40, 20], [47, 25]], "mask", mask=encoded),
        shape("__ignore__", [[0, 36], [60, 36], [60, 40], [0, 40]]),
        shape("bird", [[3, 3]], "point"),
    ]
    photo(tmp_path / "in" / "a.jpg")
    labelme(tmp_path / "in" / "a.json", shapes, "a.jpg")
    summary = convert(tmp_path / "in", tmp_path / "out")
    assert summary.names == ("background", "bird", "door", "roof", "sign", "sun", "wall")
    assert summary.notes == {"shapes of type point have no area and were left out": 1}
    label = read_label(tmp_path / "out" / "labels" / "a.png").numpy()
    numbers = {name: k for k, name in enumerate(summary.names)}
    for y in range(SIZE[0]):
        for x in range(SIZE[1]):
            px, py = x + 0.5, y + 0.5
            expected = 0
            expected = numbers["wall"] if inside(HOUSE, px, py) else expected
            expected = numbers["roof"] if inside(ROOF, px, py) else expected
            distance = math.hypot(px - 50, py - 8)
            if abs(distance - 5) < 0.01:  # the circle is drawn as a polygon
                continue
            expected = numbers["sun"] if distance < 5 else expected
            expected = numbers["door"] if 15 <= px <= 20 and 25 <= py <= 33 else expected
            if 40 <= x < 48 and 20 <= y < 26 and stamp[y - 20, x - 40]:
                expected = numbers["sign"]
            expected = VOID if y >= 36 else expected
            assert label[y, x] == expected, (x, y)


def test_labelme_options(tmp_path):
    for name in "ab":
        photo(tmp_path / "photos" / f"{name}.png")
        labelme(tmp_path / "json" / f"{name}.json", [shape("wall", HOUSE)], f"C:\\Users\\me\\{name}.png")
    options = {"images": tmp_path / "photos"}
    summary = convert(tmp_path / "json", tmp_path / "a", **options, classes="roof,wall,sky", rest="sky", split="train")
    assert summary.names == ("roof", "wall", "sky") and summary.files == 2
    label = read_label(tmp_path / "a" / "train" / "labels" / "a.png")
    assert set(label.unique().tolist()) == {1, 2}
    convert(tmp_path / "json", tmp_path / "a", **options, classes="roof,wall,sky", rest="sky", split="val")
    assert load("folder", "val", tmp_path / "a").class_names == ("roof", "wall", "sky")
    convert(tmp_path / "json", tmp_path / "b", **options, rest="void")
    assert set(read_label(tmp_path / "b" / "labels" / "a.png").unique().tolist()) == {0, VOID}
    with pytest.raises(ValueError, match="the annotations contain wall, which --classes does not name"):
        convert(tmp_path / "json", tmp_path / "c", **options, classes="background,wal")
    with pytest.raises(ValueError, match="--rest sea is not in --classes"):
        convert(tmp_path / "json", tmp_path / "c", **options, classes="roof,wall", rest="sea")
    with pytest.raises(FileExistsError, match="is not empty"):
        convert(tmp_path / "json", tmp_path / "b", **options)
    with pytest.raises(ValueError, match=r"classes\.txt has other classes"):
        convert(tmp_path / "json", tmp_path / "a", **options, split="test")


SQUARE = [[10, 10], [20, 10], [20, 30], [10, 30]]  # pixels [10:30, 10:20]
LABELS = {
    # what is wrong with the shapes of a file: (the shapes, what the list of failed files says)
    "null": ([shape(None, SQUARE)], "b.json: a shape is called null; expected the name of a class"),
    "a number": ([shape(3, SQUARE)], "b.json: a shape is called 3; expected the name of a class"),
    "spaces": ([shape("  ", SQUARE)], 'b.json: a shape is called "  "; expected the name of a class'),
    "no label": ([{"points": SQUARE}], "b.json: a shape is called null"),
    "no shapes": (None, "b.json: shapes is null; expected a list"),
    "texts": (["cat"], "b.json: its annotation is damaged"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labelme_files_with_faulty_labels_are_listed(kind, tmp_path, capsys):
    for name in "ab":
        photo(tmp_path / "in" / f"{name}.jpg")
    labelme(tmp_path / "in" / "a.json", [shape("cat", SQUARE)], "a.jpg")
    shapes, message = LABELS[kind]
    labelme(tmp_path / "in" / "b.json", shapes, "b.jpg")
    assert main(["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 1
    assert f"failed: {tmp_path / 'in'}/{message}" in capsys.readouterr().out
    assert load("folder", "all", tmp_path / "out").class_names == ("background", "cat")
    assert [path.name for path in (tmp_path / "out" / "labels").iterdir()] == ["a.png"]


def test_spaces_around_labels_do_not_count(tmp_path):
    for name, label in (("a", "cat"), ("b", "cat "), ("c", " a dog")):
        photo(tmp_path / "in" / f"{name}.jpg")
        labelme(tmp_path / "in" / f"{name}.json", [shape(label, SQUARE)], f"{name}.jpg")
    convert(tmp_path / "in", tmp_path / "out")
    data = load("folder", "all", tmp_path / "out")
    assert data.class_names == ("background", "a dog", "cat") and data.names == list("abc")
    for (_, label), value in zip(data, (2, 2, 1), strict=True):
        expected = np.zeros(SIZE, np.uint8)
        expected[10:30, 10:20] = value
        assert np.array_equal(label, expected)


@pytest.mark.parametrize("name", ["#1", "a\nb", "a\u2028b", "Void", "a:1,2,3:", "cat,", "\ud800"])
def test_names_that_a_class_list_cannot_hold(name, tmp_path, capsys):
    photo(tmp_path / "in" / "a.jpg")
    labelme(tmp_path / "in" / "a.json", [shape(name, SQUARE), shape("zebra", SQUARE)], "a.jpg")
    assert main(["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    assert f"{name!r} cannot be the name of a class in classes.txt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_that_occur_twice_and_unusual_names(tmp_path):
    names = ("3 4 5 cat", "a # b", "12", "a, b", "Straße", "a:b")
    photo(tmp_path / "in" / "a.jpg")
    labelme(tmp_path / "in" / "a.json", [shape("12", SQUARE)], "a.jpg")
    with pytest.raises(ValueError, match=r"'12' cannot be the name of a class in classes\.txt, or occurs twice"):
        convert(tmp_path / "in", tmp_path / "other", classes="background,12,12")
    labelme(tmp_path / "in" / "a.json", [shape(name, SQUARE) for name in names], "a.jpg")
    convert(tmp_path / "in", tmp_path / "out")
    assert load("folder", "all", tmp_path / "out").class_names == ("background", *sorted(names))


@pytest.mark.parametrize("tag", [1, 3, 6, 8])
@pytest.mark.parametrize("raw", [True, False])
def test_annotations_of_rotated_photos(tag, raw, tmp_path):
    """Tools annotate either the rotated photo (raw=False) or its stored pixels; labels always follow the former."""
    if raw and tag in (1, 3):
        pytest.skip("the sizes are the same, so nothing tells the two apart")
    exif = Image.Exif()
    exif[0x0112] = tag
    upright = SIZE if tag in (1, 3) else SIZE[::-1]
    photo(tmp_path / "in" / "a.png", SIZE, exif=exif)
    annotated = SIZE if raw else upright
    labelme(tmp_path / "in" / "a.json", [shape("x", [[1, 2], [15, 2], [15, 8], [1, 8]])], "a.png", annotated)
    convert(tmp_path / "in", tmp_path / "out")
    label = read_label(tmp_path / "out" / "labels" / "a.png").numpy()
    expected = np.zeros(annotated, np.uint8)
    expected[2:8, 1:15] = 1
    turns = {6: -1, 8: 1}[tag] if raw else 0  # 6: the stored pixels are shown after a quarter turn clockwise
    assert label.shape == upright and np.array_equal(label, np.rot90(expected, turns))
    assert not check_folder(tmp_path / "out").errors


# ---------------------------------------------------------------------------------------------------------------- COCO


def coco(path, images, annotations, names=("wall", "roof")):
    content = {
        "images": [
            {"id": 7 + i, "file_name": name, "height": SIZE[0], "width": SIZE[1]} for i, name in enumerate(images)
        ],
        "categories": [{"id": 3 * (k + 1), "name": name} for k, name in enumerate(names)],
        "annotations": annotations,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def runs(mask):
    """COCO's uncompressed run lengths: column by column, the first run is background."""
    flat, counts, value = mask.T.ravel(), [], False
    start = 0
    for k in range(len(flat) + 1):
        if k == len(flat) or flat[k] != value:
            counts.append(k - start)
            start, value = k, not value
    return {"size": list(mask.shape), "counts": counts}


def test_coco_polygons_and_runs(tmp_path):
    """Small objects lie over large ones, whatever their order; an image without annotations is background."""
    for name in ("a.jpg", "b.jpg"):
        photo(tmp_path / "photos" / name)
    window = [[12, 14], [16, 14], [16, 18], [12, 18]]
    disc = np.hypot(*np.meshgrid(np.arange(60) - 45, np.arange(40) - 25)) < 8
    annotations = [
        {"image_id": 7, "category_id": 6, "segmentation": [np.ravel(window).tolist(), np.ravel(ROOF).tolist()]},
        {"image_id": 7, "category_id": 3, "segmentation": [np.ravel([[8, 1], [35, 1], [35, 38], [8, 38]]).tolist()]},
        {"image_id": 7, "category_id": 3, "segmentation": runs(disc), "iscrowd": 1},
        {"image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4], "segmentation": []},
    ]
    path = coco(tmp_path / "instances.json", ["a.jpg", "sub/b.jpg"], annotations)
    summary = convert(path, tmp_path / "out", images=tmp_path / "photos")
    assert summary.names == ("background", "wall", "roof") and summary.files == 2
    assert summary.notes == {"annotations are boxes without a segmentation; the pixels in the boxes are void": 1}
    expected = np.zeros(SIZE, np.uint8)
    expected[2:6, 1:4] = VOID  # the box
    expected[1:38, 8:35] = 1
    expected[disc] = 1
    for y in range(SIZE[0]):
        for x in range(SIZE[1]):
            if inside(window, x + 0.5, y + 0.5) or inside(ROOF, x + 0.5, y + 0.5):
                expected[y, x] = 2
    assert np.array_equal(read_label(tmp_path / "out" / "labels" / "a.png"), expected)
    assert (read_label(tmp_path / "out" / "labels" / "b.png") == 0).all()


LEFT = [10, 10, 20, 10, 20, 30, 10, 30]  # pixels [10:30, 10:20]
RIGHT = [40, 5, 50, 5, 50, 15, 40, 15]  # pixels [5:15, 40:50]


def coco_label(value=0):
    """The label with one value in LEFT."""
    expected = np.zeros(SIZE, np.uint8)
    expected[10:30, 10:20] = value
    return expected


def test_coco_entries_of_the_same_file_are_merged(tmp_path):
    """Merged COCO files list an image twice, with the annotations of each file."""
    photo(tmp_path / "a.jpg")
    annotations = [
        {"image_id": 7, "category_id": 3, "segmentation": [LEFT]},
        {"image_id": 8, "category_id": 6, "segmentation": [RIGHT]},
    ]
    path = coco(tmp_path / "merged.json", ["a.jpg", "a.jpg"], annotations)
    assert convert(path, tmp_path / "out").files == 1
    expected = coco_label(1)
    expected[5:15, 40:50] = 2
    assert np.array_equal(read_label(tmp_path / "out" / "labels" / "a.png"), expected)
    content = json.loads(path.read_text())
    content["images"][1]["width"] = 50
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"a\.jpg: it is listed with the sizes .*40x50"):
        convert(path, tmp_path / "other")


def test_coco_ids_as_texts_and_of_unknown_images(tmp_path):
    photo(tmp_path / "a.jpg")
    annotations = [
        {"image_id": "7", "category_id": "3", "segmentation": [LEFT]},
        {"image_id": 70, "category_id": 6, "segmentation": [RIGHT]},
    ]
    summary = convert(coco(tmp_path / "one.json", ["a.jpg"], annotations), tmp_path / "out")
    assert np.array_equal(read_label(tmp_path / "out" / "labels" / "a.png"), coco_label(1))
    assert summary.notes["annotations belong to images that the file does not list, and were left out"] == 1


def test_coco_boxes_are_void_around_the_outlines(tmp_path):
    """[[]] is an empty outline too. Without outline and box, nobody knows where the object is."""
    for name in "abc":
        photo(tmp_path / f"{name}.jpg")
    annotations = [
        {"image_id": 7, "category_id": 6, "segmentation": [LEFT]},
        {"image_id": 7, "category_id": 3, "segmentation": [[]], "bbox": [5, 5, 30, 30]},
        {"image_id": 8, "category_id": 3, "bbox": [10, 10, 10, 20]},
        {"image_id": 9, "category_id": 3, "segmentation": []},
    ]
    path = coco(tmp_path / "one.json", ["a.jpg", "b.jpg", "c.jpg"], annotations, ("wall", "background"))
    summary = convert(path, tmp_path / "out", classes="background,wall")
    expected = np.zeros(SIZE, np.uint8)
    expected[5:35, 5:35] = VOID
    expected[10:30, 10:20] = 0
    assert np.array_equal(read_label(tmp_path / "out" / "labels" / "a.png"), expected)
    assert np.array_equal(read_label(tmp_path / "out" / "labels" / "b.png"), coco_label(VOID))
    assert summary.failed == ["c.jpg: an annotation has neither a segmentation nor a bbox; expected one of them"]
    assert summary.files == 2


def test_two_coco_splits_have_the_same_classes(tmp_path):
    """The categories of the file count, not those that occur; --classes may leave out those that do not."""
    for name in "ab":
        photo(tmp_path / f"{name}.jpg")
    both = [{"image_id": 7, "category_id": k, "segmentation": [p]} for k, p in ((3, LEFT), (6, RIGHT))]
    train = coco(tmp_path / "train.json", ["a.jpg"], both)
    val = coco(tmp_path / "val.json", ["b.jpg"], [{"image_id": 7, "category_id": 6, "segmentation": [LEFT]}])
    convert(train, tmp_path / "out", split="train")
    summary = convert(val, tmp_path / "out", split="val")
    assert summary.names == load("folder", "val", tmp_path / "out").class_names == ("background", "wall", "roof")
    assert summary.notes == {"categories have no pixels; to leave them out, list the others with --classes": 1}
    assert np.array_equal(read_label(tmp_path / "out" / "val" / "labels" / "b.png"), coco_label(2))
    convert(val, tmp_path / "other", classes="background,roof")
    assert np.array_equal(read_label(tmp_path / "other" / "labels" / "b.png"), coco_label(1))
    many = coco(tmp_path / "many.json", ["b.jpg"], both, [f"c{k}" for k in range(255)])
    with pytest.raises(ValueError, match="256 classes do not fit into a label, which holds 255"):
        convert(many, tmp_path / "many")
    assert convert(many, tmp_path / "many", rest="void").names == tuple(f"c{k}" for k in range(255))


@pytest.mark.parametrize("kind", ["labelme", "masks"])
def test_other_classes_are_refused_before_a_file_is_written(kind, tmp_path):
    """The remedy that the error names then works."""
    out = tmp_path / "out"
    for split, labels in (("train", ["cat", "dog"]), ("val", ["dog"])):
        photo(tmp_path / split / f"{split}.jpg")
        if kind == "labelme":
            shapes = [shape(label, np.reshape(LEFT, (4, 2)).tolist()) for label in labels]
            labelme(tmp_path / split / f"{split}.json", shapes, f"{split}.jpg")
        else:
            grey(tmp_path / split / f"{split}.png", len(labels))
    if kind == "masks":
        label = grey(tmp_path / "train" / "train.png", 2)
        label[-1] = 1
        Image.fromarray(label).save(tmp_path / "train" / "train.png")
    options = [{"images": tmp_path / split} if kind == "masks" else {} for split in ("train", "val")]
    names = convert(tmp_path / "train", out, split="train", **options[0]).names
    with pytest.raises(ValueError, match=r"has other classes .*, for example --classes .*classes\.txt"):
        convert(tmp_path / "val", out, split="val", **options[1])
    assert not (out / "val").exists()
    assert convert(tmp_path / "val", out, split="val", classes=str(out / "classes.txt"), **options[1]).names == names
    expected = coco_label(2) if kind == "labelme" else grey(tmp_path / "expected.png", 1)
    assert np.array_equal(read_label(out / "val" / "labels" / "val.png"), expected)


COCO_FAULTS = {
    # a change of the file, and what the error says
    "no image_id": (lambda c: c["annotations"][0].pop("image_id"), "has no image_id"),
    "no category_id": (lambda c: c["annotations"][0].pop("category_id"), "has no category_id"),
    "category without id": (lambda c: c["categories"][0].pop("id"), "has no id"),
    "category without name": (lambda c: c["categories"][0].pop("name"), "a category is called null"),
    "image without id": (lambda c: c["images"][0].pop("id"), "has no id"),
    "image without name": (lambda c: c["images"][0].pop("file_name"), "id 7 has no file_name"),
    "two images with one id": (lambda c: c["images"][1].update(id=7), "a.jpg and b.jpg both have the id 7"),
    "two categories with one id": (lambda c: c["categories"][1].update(id=3), "wall and roof both have the id 3"),
    "no list": (lambda c: c.update(annotations=None), "annotations is not a list"),
}


@pytest.mark.parametrize("fault", COCO_FAULTS)
def test_faulty_coco_files(fault, tmp_path, capsys):
    for name in "ab":
        photo(tmp_path / f"{name}.jpg")
    annotations = [{"image_id": 7, "category_id": 3, "segmentation": [LEFT]}]
    path = coco(tmp_path / "one.json", ["a.jpg", "b.jpg"], annotations)
    content = json.loads(path.read_text())
    COCO_FAULTS[fault][0](content)
    path.write_text(json.dumps(content))
    assert main(["convert", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and COCO_FAULTS[fault][1] in error and not (tmp_path / "out").exists()


def test_coco_agrees_with_pycocotools(tmp_path):
    masks = pytest.importorskip(
        "pycocotools.mask", reason="pycocotools is not installed (pip install '.[annotations]')"
    )
    disc = np.hypot(*np.meshgrid(np.arange(60) - 30, np.arange(40) - 20)) < 12
    compressed = masks.encode(np.asfortranarray(disc.astype(np.uint8)))
    compressed["counts"] = compressed["counts"].decode()
    photo(tmp_path / "a.jpg")
    annotations = [{"image_id": 7, "category_id": 3, "segmentation": compressed}]
    convert(coco(tmp_path / "one.json", ["a.jpg"], annotations), tmp_path / "one")
    assert np.array_equal(read_label(tmp_path / "one" / "labels" / "a.png"), disc)
    for polygon in (HOUSE, ROOF, POLYGONS["concave"]):
        flat = np.ravel(polygon).astype(float).tolist()
        theirs = masks.decode(masks.merge(masks.frPyObjects([flat], *SIZE))).astype(bool)
        ours = draw_polygon(np.array(polygon, float), SIZE)
        assert (ours & theirs).sum() / (ours | theirs).sum() > 0.93  # it draws on a grid of fifths of a pixel


def test_compressed_masks_without_pycocotools(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    photo(tmp_path / "a.jpg")
    annotations = [{"image_id": 7, "category_id": 3, "segmentation": {"size": list(SIZE), "counts": "abc"}}]
    with pytest.raises(ValueError, match="need `pip install pycocotools`"):
        convert(coco(tmp_path / "one.json", ["a.jpg"], annotations), tmp_path / "out")


# --------------------------------------------------------------------------------------------------------------- masks


def test_colour_masks_become_index_images(tmp_path, capsys):
    """CVAT's export: colour PNGs and labelmap.txt. A mask with other colours is listed; the others are converted."""
    colours = np.array([[0, 0, 0], [250, 50, 83], [61, 61, 245]], np.uint8)
    index = {}
    for name in "abc":
        photo(tmp_path / "photos" / f"{name}.jpg")
        index[name] = RNG.integers(0, 3, SIZE)
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(colours[index[name]]).save(tmp_path / "masks" / f"{name}.png")
    Image.fromarray(np.full((*SIZE, 3), (1, 2, 3), np.uint8)).save(tmp_path / "masks" / "b.png")
    (tmp_path / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroof:250,50,83::\nwall:61,61,245::\n"
    )
    command = ["convert", str(tmp_path / "masks"), "--images", str(tmp_path / "photos"), "--out", str(tmp_path / "out")]
    assert main([*command, "--palette", str(tmp_path / "labelmap.txt")]) == 1
    out = capsys.readouterr().out
    assert "2 images" in out and "failed:" in out and "b.png" in out and "(1, 2, 3)" in out
    for name in "ac":
        assert np.array_equal(read_label(tmp_path / "out" / "labels" / f"{name}.png"), index[name])
    dataset = load("folder", "all", tmp_path / "out")
    assert dataset.class_names == ("background", "roof", "wall") and np.array_equal(dataset.palette[:-1], colours)
    assert np.array_equal(dataset[0][1], index["a"])


def test_grey_masks_with_a_mapping(tmp_path):
    photo(tmp_path / "photos" / "a.jpg")
    mask = RNG.choice([0, 255], SIZE).astype(np.uint8)
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    convert(tmp_path / "masks", tmp_path / "out", images=tmp_path / "photos", values={0: 0, 255: 1}, classes="no,yes")
    assert np.array_equal(read_label(tmp_path / "out" / "labels" / "a.png"), mask // 255)
    with pytest.raises(ValueError, match="masks need --images"):
        convert(tmp_path / "masks", tmp_path / "other")


@pytest.mark.parametrize("with_images", [True, False])
def test_a_folder_that_cvat_exports(with_images, tmp_path):
    """SegmentationClass/, labelmap.txt and, if the user asks for it, JPEGImages/."""
    colours = np.array([[0, 0, 0], [250, 50, 83]], np.uint8)
    index = RNG.integers(0, 2, SIZE)
    photo(tmp_path / ("cvat/JPEGImages" if with_images else "photos") / "a.jpg")
    (tmp_path / "cvat" / "SegmentationClass").mkdir(parents=True)
    Image.fromarray(colours[index]).save(tmp_path / "cvat" / "SegmentationClass" / "a.png")
    (tmp_path / "cvat" / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroof:250,50,83::\n"
    )
    convert(tmp_path / "cvat", tmp_path / "out", images=None if with_images else tmp_path / "photos")
    dataset = load("folder", "all", tmp_path / "out")
    assert dataset.class_names == ("background", "roof") and np.array_equal(dataset[0][1], index)


@pytest.mark.parametrize("name", ["a_mask", "a-mask", "a_Masks", "a.mask"])
def test_names_of_masks(name, tmp_path):
    photo(tmp_path / "photos" / "a.jpg")
    (tmp_path / "masks").mkdir()
    Image.fromarray(RNG.choice([0, 1], SIZE).astype(np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    convert(tmp_path / "masks", tmp_path / "out", images=tmp_path / "photos")
    assert (tmp_path / "out" / "labels" / "a.png").is_file()


def grey(path, value=1):
    """Write a mask with the value in a quarter of its pixels; return it."""
    mask = np.zeros(SIZE, np.uint8)
    mask[: SIZE[0] // 2, : SIZE[1] // 2] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)
    return mask


@pytest.mark.parametrize("image, mask", [("{}.jpg", "{}_mask.png"), ("{}.jpg", "{}.png"), ("{}.png", "{}_mask.png")])
def test_photographs_and_masks_in_one_folder(image, mask, tmp_path):
    source, out = tmp_path / "mixed", tmp_path / "out"
    photos = [photo(source / image.format(n)) for n in "ab"]
    masks = [grey(source / mask.format(n)) for n in "ab"]
    summary = convert(source, out, images=tmp_path / "mixed" / ".." / "mixed", classes="background,cat")
    assert summary.files == 2 and not summary.failed and not summary.notes
    assert sorted(path.name for path in (out / "images").iterdir()) == [path.name for path in photos]
    for n, original, expected in zip("ab", photos, masks, strict=True):
        assert (out / "images" / original.name).read_bytes() == original.read_bytes()
        assert np.array_equal(read_label(out / "labels" / f"{n}.png"), expected)


def test_a_mask_is_not_its_own_photograph(tmp_path, capsys):
    for n in "ab":
        grey(tmp_path / "masks" / f"{n}.png")
    command = ["convert", tmp_path / "masks", "--images", tmp_path / "masks", "--out", tmp_path / "out"]
    assert main(list(map(str, command))) == 2 and not (tmp_path / "out").exists()
    assert "masks has no photograph a.* for it" in capsys.readouterr().err


def test_photographs_without_a_mask_and_with_ambiguous_names(tmp_path, capsys):
    for name in ("a.jpg", "b.jpg", "b.png", "c.jpg", "d.jpg", "e.jpg"):
        photo(tmp_path / "photos" / name)
    for name in ("a.png", "b.png", "c_mask.png"):
        grey(tmp_path / "masks" / name)
    command = ["convert", tmp_path / "masks", "--images", tmp_path / "photos", "--out", tmp_path / "out"]
    assert main(list(map(str, command))) == 1
    out = capsys.readouterr().out
    assert "2 images" in out and f"note: 2 photographs in {tmp_path / 'photos'} have no mask and were left out" in out
    assert "b.png: " in out and "has several photographs for it, b.jpg and b.png; expected one" in out
    assert sorted(path.name for path in (tmp_path / "out" / "images").iterdir()) == ["a.jpg", "c.jpg"]


# -------------------------------------------------------------------------------------------------------------- faults


RAMP = np.linspace(0, 255, SIZE[1]).astype(np.uint8)
RAMP = np.where(np.abs(np.arange(SIZE[1]) - 30) < 4, RAMP, 255 * (np.arange(SIZE[1]) > 30))  # a smoothed edge
MASKS = {
    # what the masks are: (a mask, further arguments, the error)
    "0 and 255": (RNG.choice([0, 255], SIZE), [], "only class 0 occurs.*--values 0=0,255=1"),
    "0 and 255 with names": (
        RNG.choice([0, 255], SIZE),
        ["--classes", "a,b"],
        "only class 0 occurs.*--values 0=0,255=1",
    ),
    "0, 7, 200": (RNG.choice([0, 7, 200], SIZE), [], "198 of 201 classes never occur.*--values 0=0,7=1,200=2"),
    "0 and 128 with names": (RNG.choice([0, 128], SIZE), ["--classes", "a,b"], "only class 0 occurs.*0=0,128=1"),
    "smoothed": (np.tile(RAMP, (SIZE[0], 1)), ["--values", "0=0,255=1"], "the label has the values .*; --values"),
    "transparent": (np.dstack([np.full((*SIZE, 3), 255), RNG.choice([0, 255], SIZE)]), [], "partly transparent"),
    "colours": (np.array([[0, 0, 0], [9, 8, 7]])[RNG.choice([0, 1], SIZE)], [], "colours .*9 8 7.*list them"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_that_need_an_option(kind, tmp_path, capsys):
    mask, options, message = MASKS[kind]
    photo(tmp_path / "photos" / "a.jpg")
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "masks" / "a.png")
    command = ["convert", tmp_path / "masks", "--images", tmp_path / "photos", "--out", tmp_path / "out", *options]
    assert main(list(map(str, command))) == 2 and not (tmp_path / "out").exists()
    assert re.search(message, capsys.readouterr().err)


def test_faulty_sources(tmp_path, capsys):
    def fails(message, *arguments):
        assert main(["convert", *map(str, arguments), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    fails("no such file or folder", tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    fails("is neither COCO JSON, nor a folder of LabelMe JSON", tmp_path / "empty")
    photo(tmp_path / "jpeg" / "a.jpg")
    fails("JPEG changes the values of masks", tmp_path / "jpeg")
    (tmp_path / "broken.json").write_text("{")
    fails("is not JSON", tmp_path / "broken.json")
    labelme(tmp_path / "in" / "a.json", [shape("x", HOUSE)], "a.jpg")
    fails("the image a.jpg is neither in", tmp_path / "in")
    photo(tmp_path / "in" / "a.jpg", (41, 60))
    fails("is 41x60, its annotation is for 40x60", tmp_path / "in")


def test_images_that_fail_are_listed_and_the_others_converted(tmp_path, capsys):
    for name in ("a", "b", "c"):
        photo(tmp_path / "in" / f"{name}.jpg")
        labelme(tmp_path / "in" / f"{name}.json", [shape("x", HOUSE)], f"{name}.jpg")
    (tmp_path / "in" / "b.jpg").unlink()
    labelme(tmp_path / "in" / "c.json", [shape("x", HOUSE), shape("x", [[1]], "circle")], "c.jpg")
    assert main(["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 1
    out = capsys.readouterr().out
    assert "1 images" in out and "b.json: the image b.jpg is neither" in out and "c.json: cannot reshape" in out
    assert [path.name for path in (tmp_path / "out" / "labels").iterdir()] == ["a.png"]


# ------------------------------------------------------------------------------------------------- the whole workflow


def polygon_photos(folder, count=40, size=(72, 96)):
    """Photographs of two kinds of polygons on textured ground, with LabelMe files."""
    y, x = np.mgrid[: size[0], : size[1]]
    for k in range(count):
        random = np.random.default_rng(k)
        pixels = 90 + 20 * np.sin(x / random.uniform(3, 9) + y / random.uniform(3, 9))[..., None] * [1, 0.8, 0.5]
        shapes = []
        for label, colour, corners in (("tile", (200, 70, 60), 4), ("leaf", (60, 160, 70), 9)):
            centre = random.uniform(18, [size[1] - 18, size[0] - 18])
            angles = np.sort(random.uniform(0, 2 * np.pi) + np.arange(corners) * 2 * np.pi / corners)
            points = centre + random.uniform(11, 17) * np.stack([np.cos(angles), np.sin(angles)], 1)
            pixels[draw_polygon(points, size)] = colour + random.normal(0, 15, 3)
            shapes.append(shape(label, points.round(2).tolist()))
        pixels = pixels + random.normal(0, 8, pixels.shape)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"photo{k:02d}.jpg", quality=95)
        labelme(folder / f"photo{k:02d}.json", shapes, f"photo{k:02d}.jpg", size)


@pytest.mark.slow
def test_forty_annotated_photographs_in_six_commands(tmp_path, capsys, monkeypatch):
    """The commands of the README, in order, with fewer epochs."""
    monkeypatch.chdir(tmp_path)
    polygon_photos(tmp_path / "photos")
    polygon_photos(tmp_path / "new_photos", 2)
    assert main("convert photos --out mine".split()) == 0
    assert main("labels mine --sheet labels.png".split()) == 0
    assert "no problems found" in capsys.readouterr().out
    command = "train --data folder --root mine --size 72x96 --epochs 15,2,0 --quiet --out runs/mine"
    assert main(command.split()) == 0
    assert main("evaluate runs/mine --json scores.json".split()) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["stage2"]["crf"]
    assert scores["per_class_iou"].keys() == {"background", "leaf", "tile"} and scores["miou"] > 0.7, scores
    assert main("predict runs/mine new_photos --out labels".split()) == 0
    assert len(list((tmp_path / "labels").iterdir())) == 6
    assert main("export runs/mine mine.pt2".split()) == 0
