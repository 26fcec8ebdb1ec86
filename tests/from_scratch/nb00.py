"""The functions of notebook 00 against the library and plain loops."""

import math

import torch

from pwlib import metrics


def some_labels(generator, classes=4, missing=3):
    label = torch.randint(classes, (3, 11, 13), generator=generator)
    label[label == missing] = 0
    label[torch.rand(label.shape, generator=generator) < 0.2] = 255
    return label


def test_confusion_matrix_and_scores(pull):
    generator = torch.Generator().manual_seed(1)
    label = some_labels(generator)
    prediction = torch.randint(3, label.shape, generator=generator)
    matrix = pull("00", "confusion")(prediction, label, 4)
    library = metrics.ConfusionMatrix(4)
    library.update(prediction, label)
    scores = library.scores()
    assert torch.equal(matrix, library.matrix)
    torch.testing.assert_close(pull("00", "class_iou")(matrix), scores["per_class_iou"], equal_nan=True)
    assert math.isnan(scores["per_class_iou"][3])
    torch.testing.assert_close(pull("00", "mean_iou")(matrix), scores["miou"])
    torch.testing.assert_close(pull("00", "pixel_accuracy")(matrix), scores["pixel_accuracy"])


def test_table_of_colour_and_height(pull):
    generator = torch.Generator().manual_seed(2)
    image, label = torch.rand(3, 3, 11, 13, generator=generator), some_labels(generator)
    cells = pull("00", "cell")(image, 4, 5)
    counts = pull("00", "count_table")(cells, label, 4**3 * 5, 4)
    wanted = torch.zeros(4, 4, 4, 5, 4, dtype=torch.int64)
    for n in range(3):
        for y in range(11):
            for x in range(13):
                if label[n, y, x] != 255:
                    r, g, b = (min(int(4 * c), 3) for c in image[n, :, y, x])
                    wanted[r, g, b, y * 5 // 11, label[n, y, x]] += 1
    assert torch.equal(counts, wanted.view(-1, 4))
    shares = pull("00", "probabilities")(counts)
    torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)))
    empty = counts.sum(1) == 0
    torch.testing.assert_close(shares[empty][0], counts.sum(0) / counts.sum())


def test_agreement_is_the_share_of_equal_pairs(pull):
    """Vertical stripes of width 8, coloured by class: pairs of similar colour always agree, others never."""
    agreement, pairs_at_distance = pull("00", "agreement"), pull("00", "pairs_at_distance")
    stripes = (torch.arange(64) // 8 % 2).expand(2, 48, 64)
    image = stripes[:, None].expand(-1, 3, -1, -1).float()
    pairs = pairs_at_distance(stripes.shape, 8)
    assert agreement(stripes, image, *pairs) == [1.0, 0.0]
    # In one colour: all pixels and angles, and all pairs that end inside the image.
    alike, _ = agreement(stripes, torch.zeros(2, 3, 48, 64), *pairs_at_distance(stripes.shape, 5))
    equal = total = 0
    for degree in range(360):
        dy, dx = round(5 * math.sin(math.radians(degree))), round(5 * math.cos(math.radians(degree)))
        ys, xs = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
        inside = (ys + dy >= 0) & (ys + dy < 48) & (xs + dx >= 0) & (xs + dx < 64)
        y, x = ys[inside], xs[inside]
        equal += (stripes[0, y, x] == stripes[0, y + dy, x + dx]).sum()
        total += len(y)
    assert abs(alike - equal / total) < 0.01


def test_agreement_leaves_out_void_and_compares_colours_in_grey_levels(pull):
    label = torch.tensor([[[0, 0, 255, 1]]])
    image = torch.tensor([10.0, 20, 30, 40]).expand(1, 3, 1, 4) / 255
    pairs = [(a, b) for a in range(4) for b in range(4)]
    first, second = (torch.tensor([[0, 0, pair[side]] for pair in pairs]).T for side in (0, 1))
    # Without void: 0-0, 1-1, 3-3 and both directions of 0-1 lie within 15 levels; 0-3 and 1-3 do not.
    assert pull("00", "agreement")(label, image, first, second, similar=15.0) == [1.0, 0.0]


def test_random_pairs_lie_in_one_scene_or_in_two(pull):
    shape = (5, 7, 9)
    for same_scene in (True, False):
        first, second = pull("00", "random_pairs")(shape, same_scene, count=20_000)
        for pixels in (first, second):
            assert pixels.min() == 0 and pixels.amax(1).tolist() == [4, 6, 8]
        assert ((first[0] == second[0]) == same_scene).all()
        scenes = torch.bincount(5 * first[0] + second[0], minlength=25)
        possible = torch.eye(5, dtype=torch.bool).flatten() == same_scene
        expected = 20_000 / possible.sum()
        assert (scenes[~possible] == 0).all() and ((scenes[possible] - expected).abs() < 6 * expected**0.5).all()
