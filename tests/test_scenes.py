"""The five properties in the docstring of `pwlib.data.scenes`, measured, with controls where possible."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.utils.data import DataLoader

from pwlib.data import VOID, load
from pwlib.data.scenes import BOAT, CLASS_NAMES, LAND, PLANE, POLE, ROOF, SEA, SKY, TENT, TREE, WALL

CLASSES = len(CLASS_NAMES)
OBJECTS = [k for k in range(CLASSES) if k not in (SKY, SEA, LAND)]


def arrays(split, length, **options):
    """Images int [N, H, W, 3] in grey levels and labels [N, H, W]."""
    pairs = [load("scenes", split, length=length, **options)[i] for i in range(length)]
    images = np.stack([(image * 255).round().permute(1, 2, 0).numpy() for image, _ in pairs]).astype(int)
    return images, np.stack([label.numpy() for _, label in pairs])


@pytest.fixture(scope="module")
def train():
    return arrays("train", 200)


@pytest.fixture(scope="module")
def test():
    return arrays("test", 40)


# ------------------------------------------------------------------------------------------------- reproducible


def test_a_scene_depends_only_on_seed_split_and_index():
    def scene(split, index, **options):
        return load("scenes", split, **options)[index]

    image, label = scene("train", 3)
    for again in (scene("train", 3, length=4), scene("train", 3, cache=False), next(iter(loader(3)))):
        assert torch.equal(image, again[0].view_as(image)) and torch.equal(label, again[1].view_as(label))
    others = [scene("train", 4), scene("val", 3), scene("test", 3), scene("train", 3, seed=1)]
    assert all(not torch.equal(label, other) for _, other in others)


def loader(index):
    """One item, read in a worker process."""
    return DataLoader(load("scenes", "train").subset([index]), num_workers=1)


def test_the_splits_share_no_scene():
    keys = [
        load("scenes", split, length=50, size=(16, 24))[i][0].numpy().tobytes()
        for split in ("train", "val", "test")
        for i in range(50)
    ]
    assert len(set(keys)) == 150


def test_lengths_types_and_ranges():
    assert [len(load("scenes", split)) for split in ("train", "val", "test")] == [400, 100, 100]
    image, label = load("scenes", "val", length=1)[0]
    assert image.shape == (3, 64, 96) and image.dtype == torch.float32 and 0 <= image.min() and image.max() <= 1
    assert label.shape == (64, 96) and label.dtype == torch.int64


@pytest.mark.parametrize("size", [(1, 1), (7, 200), (50, 20), (128, 192)])
def test_any_size(size):
    image, label = load("scenes", "train", size=size, length=1)[0]
    assert image.shape == (3, *size) and label.shape == size
    assert set(label.unique().tolist()) <= {*range(CLASSES), VOID}


def test_class_shares_do_not_depend_on_the_size():
    _, small = arrays("train", 20)
    _, large = arrays("train", 20, size=(128, 192))
    shares = [[(labels == k).mean() for k in range(CLASSES) if k != POLE] for labels in (small, large)]
    np.testing.assert_allclose(shares[0], shares[1], atol=0.05)


@pytest.mark.slow
def test_every_class_is_common(train):
    _, labels = train
    present = [np.mean([(label == k).any() for label in labels]) for k in range(CLASSES)]
    assert min(present) > 0.6, dict(zip(CLASS_NAMES, present, strict=True))


@pytest.mark.parametrize("options", [{"length": 0}, {"seed": -1}, {"size": (0, 5)}, {"size": 64}, {"size": (1.5, 2)}])
def test_impossible_options(options):
    with pytest.raises(ValueError, match="scenes: "):
        load("scenes", "train", **options)


# --------------------------------------------------------------------------- 1. colour does not determine the class


@pytest.mark.slow
def test_colour_separates_classes_within_an_image_but_not_across_images(train, test):
    (images, labels), (new_images, new_labels) = train, test

    # A per-pixel classifier: the most frequent class in each cell of a colour histogram with 16 levels per channel.
    def cells(pixels):
        return pixels // 16 @ (256, 16, 1)

    known = labels != VOID
    counts = np.zeros((4096, CLASSES))
    np.add.at(counts, (cells(images[known]), labels[known]), 1)
    known = new_labels != VOID
    truth, guess = new_labels[known], counts.argmax(1)[cells(new_images[known])]
    accuracy = (guess == truth).mean()
    by_class = np.mean([(guess[truth == k] == k).mean() for k in range(CLASSES)])
    assert accuracy < 0.62 and by_class < 0.4, (accuracy, by_class)

    # Control: with the mean colours of the classes in that scene, the class of the nearest mean is mostly right.
    right = []
    for image, label in zip(new_images, new_labels, strict=True):
        there = [k for k in np.unique(label) if k != VOID]
        means = np.stack([image[label == k].mean(0) for k in there])
        nearest = np.array(there)[((image[label != VOID][:, None] - means) ** 2).sum(-1).argmin(1)]
        right.append((nearest == label[label != VOID]).mean())
    assert np.mean(right) > accuracy + 0.15, (np.mean(right), accuracy)


def test_sky_and_sea_share_their_colours(train):
    images, labels = train
    sky, sea = (np.stack([i[l == k].mean(0) for i, l in zip(images, labels, strict=True)]) for k in (SKY, SEA))
    # Over all scenes the means differ by less than half a standard deviation; within a scene they differ clearly.
    assert (abs(sky.mean(0) - sea.mean(0)) < 0.5 * sky.std(0)).all()
    assert np.median(np.sqrt(((sky - sea) ** 2).mean(1))) > 30


def test_light_and_texture_vary(train):
    images, labels = train
    light = [image.mean() for image in images]
    assert np.std(light) > 12
    within = [
        np.median([image[label == k].std(0).mean() for k in np.unique(label) if k != VOID])
        for image, label in zip(images, labels, strict=True)
    ]
    assert np.median(within) > 7


# -------------------------------------------------------------------------------------------- 2. crisp colour edges


def test_edges_are_crisp(train):
    images, labels = train

    def steps(apart):
        """RMS colour difference of pixels `apart` along rows, and the labels at both ends."""
        gap = np.sqrt(((images[:, :, apart:] - images[:, :, :-apart]) ** 2).mean(-1))
        return gap, labels[:, :, :-apart], labels[:, :, apart:]

    gap, left, right = steps(1)
    inside = np.median(gap[(left == right) & (left != VOID)])
    # Across an outline: from the last pixel of an object to the first one outside, with a void pixel between them.
    gap, left, right = steps(2)
    border = gap[(left != right) & (left != VOID) & (right != VOID) & (labels[:, :, 1:-1] == VOID)]
    assert inside < 15 and np.median(border) > 40, (inside, np.median(border))
    assert np.mean(border > 2 * inside) > 0.85


# ------------------------------------------------------------------- 3. the same appearance, different surroundings


def things(images, labels, label):
    """Appearance (size, shape, colours) of every unhidden object, and the most frequent class around and below it."""
    looks, around, below = [], [], []
    for image, truth in zip(images, labels, strict=True):
        parts, count = ndimage.label(truth == label)
        for part in range(1, count + 1):
            mask = parts == part
            ys, xs = np.nonzero(mask)
            near = ndimage.binary_dilation(mask, iterations=2) & ~mask & (truth != VOID)
            under = np.zeros_like(mask)
            under[min(ys.max() + 2, mask.shape[0] - 1) :, xs.min() : xs.max() + 1] = True
            hidden = {POLE, TREE} & set(np.unique(truth[near]))
            if hidden or xs.min() == 0 or xs.max() == mask.shape[1] - 1 or len(ys) < 40:
                continue
            upper = mask & (np.arange(len(mask))[:, None] < ys.mean())
            colours = [*image[upper].mean(0), *image[mask & ~upper].mean(0), *image[mask].std(0)]
            looks.append([len(ys), np.ptp(ys), np.ptp(xs), *colours])
            around.append(np.bincount(truth[near], minlength=CLASSES).argmax())
            below.append(np.bincount(truth[under & near], minlength=CLASSES).argmax() if (under & near).any() else -1)
    return np.array(looks, float), np.array(around), np.array(below)


def told_apart(one, other):
    """Held-out accuracy of a quadratic discriminant on the appearance of two classes of objects; 0.5 is chance."""
    count = min(len(one), len(other))
    looks, truth = np.concatenate([one[:count], other[:count]]), np.repeat([0, 1], count)
    fit = np.arange(2 * count) % 2 == 0
    scores = []
    for k in (0, 1):
        known = looks[fit & (truth == k)]
        covariance = np.cov(known.T) + np.diag(1e-2 * looks.var(0) + 1e-6)
        off = looks - known.mean(0)
        scores.append(-0.5 * (off @ np.linalg.inv(covariance) * off).sum(1) - 0.5 * np.linalg.slogdet(covariance)[1])
    return (np.argmax(scores, 0) == truth)[~fit].mean()


def test_similar_classes_differ_in_their_surroundings_only(train):
    plane, boat, roof, tent = (things(*train, label) for label in (PLANE, BOAT, ROOF, TENT))
    assert min(len(looks) for looks, _, _ in (plane, boat, roof, tent)) > 50
    assert told_apart(plane[0], boat[0]) < 0.65
    assert told_apart(roof[0], tent[0]) < 0.65
    assert told_apart(plane[0], roof[0]) > 0.9  # control: the discriminant can separate classes

    assert (plane[1] != SEA).all() and (boat[1] != SKY).mean() > 0.95  # around them
    assert (roof[2] == WALL).mean() > 0.95 and (tent[2] != WALL).mean() > 0.95  # below them


# ------------------------------------------------------------------------------------------------- 4. thin structures


def test_poles_are_thin(train):
    _, labels = train
    square = np.ones((1, 3, 3))

    def kept(label):
        """Share of a class's pixels that survive an opening by 3x3."""
        mask = labels == label
        return ndimage.binary_opening(mask, square).sum() / mask.sum()

    assert kept(POLE) < 0.1
    assert min(kept(label) for label in OBJECTS if label != POLE) > 0.6


@pytest.mark.slow
def test_a_dense_crf_gains_on_a_blurred_unary_and_erodes_the_poles(train):
    """Unary: labels averaged over 8x8 cells, with class weights. Then mean field with explicit dense kernels."""
    shares = torch.from_numpy(np.bincount(train[1][train[1] != VOID]) / (train[1] != VOID).sum())
    position = torch.cartesian_prod(torch.arange(64.0), torch.arange(96.0))
    smooth = gaussian(position / 1.5)
    confusion = np.zeros((2, CLASSES, CLASSES))
    for image, label in load("scenes", "val", length=4):
        known = label != VOID
        one_hot = torch.nn.functional.one_hot(label.where(known, torch.zeros_like(label)), CLASSES).permute(2, 0, 1)
        seen = torch.nn.functional.avg_pool2d((one_hot * known).float()[None], 8) + 0.02
        blurred = torch.nn.functional.interpolate(seen, label.shape, mode="bilinear")[0].flatten(1).T / shares.sqrt()
        unary = (blurred / blurred.sum(1, keepdim=True)).log().float()
        kernel = smooth + 3 * gaussian(torch.cat([position / 20, image.flatten(1).T * 255 / 15], 1))
        q = unary.exp()
        for _ in range(4):
            q = (unary + kernel @ q).softmax(1)
        for row, scores in enumerate((unary, q)):
            np.add.at(confusion[row], (label[known].numpy(), scores.argmax(1).view_as(label)[known].numpy()), 1)
    hits = confusion.diagonal(axis1=1, axis2=2)
    iou = hits / (confusion.sum(1) + confusion.sum(2) - hits)
    recall = hits / confusion.sum(2)
    assert iou[1].mean() > iou[0].mean() + 0.03, iou.mean(1)
    assert (iou[1] > iou[0])[:POLE].all(), iou
    assert recall[0, POLE] > 0.2 and recall[1, POLE] < 0.75 * recall[0, POLE], recall[:, POLE]


def gaussian(features):
    """Row-normalised exp(-|f_i - f_j|^2 / 2), [N, N]."""
    return torch.softmax(-0.5 * torch.cdist(features, features) ** 2, 1)


# ------------------------------------------------------------------------------------------------------------ 5. void


def test_void_is_at_the_borders_of_objects_only(train):
    _, labels = train
    objects = np.isin(labels, OBJECTS)
    cross = ndimage.generate_binary_structure(2, 1)[None]
    void = labels == VOID
    assert 0.04 < void.mean() < 0.15
    # The outline is one pixel wide: an object is at most two pixels away (one, unless another object hides it).
    near = ndimage.binary_dilation(objects, cross, iterations=2)
    assert (near & void).sum() > 0.99 * void.sum()
    # No object touches another class.
    for first, second in ((labels[:, 1:], labels[:, :-1]), (labels[:, :, 1:], labels[:, :, :-1])):
        touch = (first != second) & (first != VOID) & (second != VOID)
        assert not (touch & (np.isin(first, OBJECTS) | np.isin(second, OBJECTS))).any()
