"""The data set class, holding out, augmentation, colours."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from pwlib.data import VOID, Augment, SegmentationDataset, camvid, colorize, hold_out, load, scenes, voc_palette


class Counting:
    """A reader that returns constant images of value i and counts its calls."""

    def __init__(self, size=(4, 6), label=0):
        self.calls, self.size, self.label = 0, size, label

    def __call__(self, index):
        self.calls += 1
        return torch.full((3, *self.size), index, dtype=torch.uint8), torch.full(
            self.size, self.label, dtype=torch.uint8
        )


def dataset(names, groups=None, read=None, **options):
    options = {"class_names": ("a", "b"), "palette": voc_palette(2)} | options
    return SegmentationDataset(read or Counting(), name="made", split="train", names=names, groups=groups, **options)


# ------------------------------------------------------------------------------------------------------- the data set


def test_an_item_is_a_float_image_and_an_integer_label():
    image, label = dataset("xyz")[2]
    assert image.dtype == torch.float32 and image.shape == (3, 4, 6) and torch.allclose(image, torch.tensor(2 / 255))
    assert label.dtype == torch.int64 and label.shape == (4, 6)


def test_subsets_keep_every_attribute_and_do_not_change_the_whole():
    whole = dataset("uvwxyz", groups="aabbcc", size=(2, 3), transform=lambda image, label: (image, label + 1))
    part = whole.subset([5, 1, 3]).subset(torch.tensor([2, 0]))
    assert part.names == ["x", "z"] and part.groups == ["b", "c"] and len(part) == 2
    assert [round(float(part[i][0].mean()) * 255) for i in (0, 1)] == [3, 5]
    for attribute in ("name", "split", "class_names", "num_classes", "size", "transform"):
        assert getattr(part, attribute) == getattr(whole, attribute)
    assert part[0][1].unique().tolist() == [1]
    assert part.with_transform(None)[0][1].unique().tolist() == [0] and part[0][1].unique().tolist() == [1]
    assert len(whole) == 6 and whole.names == list("uvwxyz")


def test_iteration_ends():
    assert len(list(dataset("xyz"))) == 3
    with pytest.raises(IndexError):
        dataset("xyz").subset([0])[1]


def test_cached_items_are_read_once_and_equal():
    plain, cached = Counting(), Counting()
    first, second = dataset("xyz", read=plain), dataset("xyz", read=cached, cache=True)
    for _ in range(3):
        for index in range(3):
            assert torch.equal(first[index][0], second[index][0])
            second.subset([index])[0][0].zero_()  # items are copies
    assert plain.calls == 9 and cached.calls == 3


def test_resizing_keeps_image_and_label_aligned():
    # The label is the thresholded image. It still is after resizing, except for pixels on the edge.
    def read(index):
        wave = 127 + 120 * torch.sin(torch.arange(96) / 7.0)
        image = wave.round().to(torch.uint8).expand(3, 64, 96).clone()
        return image, (image[0] > 127).to(torch.uint8)

    for size in ((16, 24), (23, 31), (128, 192)):
        image, label = dataset("x", read=read, size=size)[0]
        sure = (image[0] - 0.5).abs() > 0.06
        assert image.shape == (3, *size) and sure.float().mean() > 0.8
        assert ((image[0] > 0.5).long() == label)[sure].all()


def test_errors_of_inconsistent_items_name_the_item():
    with pytest.raises(ValueError, match="item 'y': the image is 4x6 but its label is 4x7"):
        dataset("xy", read=lambda i: (torch.zeros(3, 4, 6, dtype=torch.uint8), torch.zeros(4, 7, dtype=torch.uint8)))[1]
    with pytest.raises(ValueError, match="item 'x': label value 2 is outside the 2 classes"):
        dataset("xy", read=Counting(label=2))[0]
    with pytest.raises(ValueError, match="label value 2"):
        dataset("xy", read=Counting(label=2)).check()
    with pytest.raises(ValueError, match="palette has shape"):
        dataset("xy", palette=voc_palette(5))
    assert (dataset("xy", read=Counting(label=VOID))[0][1] == VOID).all()


@pytest.mark.parametrize("size", [(0, 4), (3,), (2, 2.5), 7])
def test_impossible_sizes(size):
    with pytest.raises(ValueError, match="not \\(height, width\\)"):
        dataset("xy", size=size)


def test_unknown_names():
    with pytest.raises(
        ValueError, match="unknown data set 'cityscapes'; expected one of scenes, camvid, voc2012, folder"
    ):
        load("cityscapes", "train")
    for name in ("scenes", "camvid", "voc2012"):
        with pytest.raises(ValueError, match=f"{name}: unknown split 'dev'"):
            load(name, "dev")
    with pytest.raises(TypeError, match="colour"):
        load("scenes", "train", colour=3)


# -------------------------------------------------------------------------------------------------------- holding out


def parts(names, groups=None, fraction=0.25, split=0):
    whole = dataset(names, groups=groups)
    fit, held = hold_out(whole, fraction, split)
    assert sorted(fit.names + held.names) == sorted(whole.names) and not set(fit.names) & set(held.names)
    assert fit.names and held.names
    return fit, held


def test_items_without_groups_are_split_at_random_but_reproducibly():
    names = [f"{i:03d}" for i in range(100)]
    _, held = parts(names)
    assert len(held) == 25 and held.names == parts(names)[1].names != parts(names, split=1)[1].names
    assert len(parts(names[:2], fraction=0.01)[1]) == 1 == len(parts(names[:2], fraction=0.99)[0])


@pytest.mark.parametrize("split", range(5))
def test_many_groups_stay_whole(split):
    groups = [f"drive{i // 7}" for i in range(84)]
    fit, held = parts([f"{i:03d}" for i in range(84)], groups, split=split)
    assert not set(fit.groups) & set(held.groups) and len(held) == 21


def test_groups_of_different_sizes():
    groups = [*"a" * 90, *"bcde"]
    for split in range(10):
        fit, held = parts([f"{i:03d}" for i in range(94)], groups, split=split)
        assert not set(fit.groups) & set(held.groups)


@pytest.mark.parametrize("split", range(3))
@pytest.mark.parametrize(("fraction", "expected"), [(0.1, "a"), (0.25, "b"), (0.6, "c")])
def test_of_few_drives_the_one_of_the_closest_size_is_held_out(split, fraction, expected):
    groups = [*"a" * 62, *"b" * 101, *"c" * 204]  # CamVid's
    _, held = parts([f"{group}{i:03d}" for i, group in enumerate(groups)], groups, fraction, split)
    assert Counter(held.groups) == {expected: groups.count(expected)}


@pytest.mark.parametrize("split", range(3))
def test_of_a_single_drive_the_last_frames_are_held_out_in_any_order_of_items(split):
    names = [f"{i:03d}" for i in np.random.default_rng(0).permutation(40)]
    _, held = parts(names, ["drive"] * 40, split=split)
    assert sorted(map(int, held.names)) == list(range(30, 40))
    for fraction, count in ((0.001, 1), (0.999, 39)):
        assert len(parts(names, ["drive"] * 40, fraction)[1]) == count


def test_impossible_splits():
    for fraction in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match="not between 0 and 1"):
            hold_out(dataset("xyz"), fraction)
    with pytest.raises(ValueError, match="too few items"):
        hold_out(dataset("x"))


# ------------------------------------------------------------------------------------------------------- augmentation


def address_pair(height=40, width=56):
    """An image with the row in red and the column in green, and a label with the address of the 8x8 cell of a pixel."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([rows / 64, columns / 64, torch.ones(height, width)])
    return image, rows // 8 * 8 + columns // 8


@pytest.mark.parametrize("size", [None, (28, 40), (64, 80), (17, 90)])
def test_image_and_label_stay_aligned(size):
    image, label = address_pair()
    augment = Augment(size, scale=(0.6, 1.6), colour=0, seed=0)
    filled = 0
    for _ in range(50):
        moved, moved_label = augment(image, label)
        assert moved.shape == (3, *(size or (40, 56))) and moved_label.shape == moved.shape[1:]
        assert moved.dtype == torch.float32 and moved_label.dtype == torch.int64
        void = moved_label == VOID
        # Outside, grey and void. (Blue is 1 inside the image.)
        assert torch.equal(moved[2] == 0.5, void) and (moved[:, void] == 0.5).all()
        filled += int(void.any())
        # Inside, the label is the address in the image, except near edges of cells, where resampling blurs it.
        rows, columns = moved[0] * 64, moved[1] * 64
        sure = ~void
        for address in (rows, columns):
            sure &= ((address + 0.5) / 8 - ((address + 0.5) / 8).round()).abs() > 0.15
        expected = (rows / 8 + 1 / 16).floor() * 8 + (columns / 8 + 1 / 16).floor()
        assert sure.sum() > 0.3 * (~void).sum()
        assert torch.equal(expected[sure].long(), moved_label[sure])
    assert filled > 5


def test_flip_and_scale_cover_their_ranges():
    image, label = address_pair()
    augment = Augment(scale=(0.7, 1.2), flip=0.25, colour=0, seed=1)
    flips, zooms = [], []
    for _ in range(300):
        moved, moved_label = augment(image, label)
        inside = moved_label != VOID
        row = int(inside.any(1).nonzero()[0]) + 3
        columns = moved[1, row, inside[row]] * 64
        flips.append(bool(columns[-1] < columns[0]))
        zooms.append(1 / float((columns[1:] - columns[:-1]).abs().median()))
    assert 0.15 < np.mean(flips) < 0.35
    assert 0.69 < min(zooms) < 0.75 and 1.15 < max(zooms) < 1.22
    still, still_label = Augment(scale=(1, 1), flip=0, colour=0)(image, label)
    assert torch.equal(still, image) and torch.equal(still_label, label)


def test_colour_changes_only_the_image_and_stays_in_range():
    image, label = load("scenes", "val", length=1)[0]
    augment = Augment(scale=(1, 1), flip=0, colour=0.4, seed=0)
    for _ in range(20):
        moved, moved_label = augment(image, label)
        assert torch.equal(moved_label, label) and 0 <= moved.min() and moved.max() <= 1
        assert 0.002 < (moved - image).abs().mean() < 0.4


def test_a_seed_determines_the_augmentation():
    image, label = address_pair()

    def run(augment):
        return [augment(image, label)[0] for _ in range(5)]

    same, again, other = (run(Augment(seed=seed)) for seed in (3, 3, 4))
    assert all(map(torch.equal, same, again)) and not any(map(torch.equal, same, other))
    torch.manual_seed(5)
    before = run(Augment())
    torch.manual_seed(5)
    assert all(map(torch.equal, before, run(Augment())))
    state = torch.get_rng_state()
    run(Augment(seed=3))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("seed", [None, 3])
def test_workers_draw_different_numbers_reproducibly(seed):
    image, label = address_pair()
    reader = dataset(
        "abcdefgh",
        read=lambda i: ((image * 255).to(torch.uint8), label.to(torch.uint8)),
        class_names=[str(k) for k in range(64)],
        palette=voc_palette(64),
    )
    data = reader.with_transform(Augment(seed=seed))

    def epochs():
        loader = DataLoader(
            data, num_workers=2, generator=torch.Generator().manual_seed(0), multiprocessing_context="fork"
        )
        return [[batch[0] for batch in loader] for _ in range(2)]

    first, second = epochs()
    everything = [*first, *second]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(everything, 2))
    again = [item for epoch in epochs() for item in epoch]
    assert all(map(torch.equal, everything, again))


def test_augmentation_can_be_pickled():
    image, label = address_pair()
    augment = Augment(seed=2)
    augment(image, label)
    copy = pickle.loads(pickle.dumps(augment))
    assert torch.equal(augment(image, label)[0], copy(image, label)[0])


def test_impossible_augmentations():
    for options in ({"scale": (1.2, 0.7)}, {"scale": (0, 1)}, {"flip": 2}, {"colour": 1}, {"size": (0, 3)}):
        with pytest.raises(ValueError, match="Augment"):
            Augment(**options)
    with pytest.raises(ValueError, match="differ in size"):
        Augment()(torch.zeros(3, 4, 5), torch.zeros(4, 6, dtype=torch.long))


def test_one_pixel_can_be_augmented():
    image, label = Augment(seed=0)(torch.full((3, 1, 1), 0.25), torch.zeros(1, 1, dtype=torch.long))
    assert image.shape == (3, 1, 1) and label.shape == (1, 1)


# torchvision's own transforms, each with a fill that keeps the outside void.
FILL = {tv_tensors.Mask: VOID, "others": 0.5}
V2 = {
    "flip": v2.RandomHorizontalFlip(1.0),
    "crop": v2.RandomCrop((20, 24)),
    "padded crop": v2.RandomCrop((64, 64), pad_if_needed=True, fill=FILL),
    "rotation": v2.RandomRotation((90, 90), expand=True, fill=FILL),
    "composed": v2.Compose([v2.RandomVerticalFlip(1.0), v2.ColorJitter(0.0), v2.CenterCrop((24, 24))]),
}


@pytest.mark.parametrize("name", V2)
def test_torchvision_transforms_move_the_label_with_the_image(name):
    image, address = address_pair()
    reader = dataset(
        "a",
        read=lambda i: ((image * 64).to(torch.uint8), address.to(torch.uint8)),
        class_names=[str(k) for k in range(64)],
        palette=voc_palette(64),
        transform=V2[name],
    )
    moved, label = reader[0]
    assert type(moved) is type(label) is torch.Tensor and moved.dtype == torch.float32 and label.dtype == torch.int64
    rows, columns = (moved[:2] * 255).round().long()
    inside = label != VOID
    assert torch.equal((rows // 8 * 8 + columns // 8)[inside], label[inside]) and inside.sum() >= 400
    assert not torch.equal(moved, image) and (moved[2, ~inside] == 0.5).all()


# ------------------------------------------------------------------------------------------------------------ colours


def test_voc_palette_is_the_published_one():
    # From VOC's development kit: background, aeroplane, bicycle, bird, …, tv monitor; void.
    known = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        3: (128, 128, 0),
        8: (64, 0, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
    }
    palette = voc_palette(21)
    assert palette.shape == (22, 3) and tuple(palette[21]) == (224, 224, 192)
    assert all(tuple(palette[index]) == colour for index, colour in known.items())


def test_colorize():
    palette = voc_palette(3)
    label = torch.tensor([[0, 1], [2, VOID]])
    expected = palette[[0, 1, 2, 3]].reshape(2, 2, 3)
    for kind in (label, label.numpy(), label.numpy().astype(np.uint8)):
        painted = colorize(kind, palette)
        assert painted.dtype == np.uint8 and np.array_equal(painted, expected)
    assert colorize(torch.zeros(0, 3, dtype=torch.long), palette).shape == (0, 3, 3)
    for wrong in (3, 4, -1, 254):
        with pytest.raises(ValueError, match=r"expected 0\.\.2, or 255 for void"):
            colorize(torch.tensor([[0, wrong]]), palette)
    with pytest.raises(ValueError, match="one label map"):
        colorize(label[None], palette)


# Machado, Oliveira and Fernandes 2009, severity 1; on linear RGB.
DICHROMACY = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}  # fmt: skip


def closest(palette, vision) -> float:
    """The smallest OKLab distance (Ottosson 2020) of two colours in that vision; about 0.02 is just noticeable."""
    srgb = np.asarray(palette) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4) @ np.transpose(DICHROMACY[vision])
    cones = np.clip(linear, 0, 1) @ np.transpose(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    lab = np.cbrt(cones) @ np.transpose(
        [
            [0.2104542553, 0.793617785, -0.0040720468],
            [1.9779984951, -2.428592205, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.808675766],
        ]
    )
    return min(np.linalg.norm(one - other) for one, other in itertools.combinations(lab, 2))


@pytest.mark.parametrize("vision", DICHROMACY)
def test_colours_of_scenes_are_distinguishable_with_any_colour_vision(vision):
    assert closest(scenes.PALETTE, vision) > 0.1


def test_the_check_of_colours_detects_similar_ones():
    red_green = [(200, 60, 60), (110, 115, 60)]
    assert closest(red_green, "normal") > 0.1 > 0.08 > closest(red_green, "deuteranopia")
    assert closest(camvid.PALETTE, "deuteranopia") < 0.1  # SegNet's colours, kept because they are common
