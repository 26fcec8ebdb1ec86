"""The mean-field update and the free energy against float64 loops over nodes and labels, and enumeration."""

import itertools
import math

import pytest
import torch

from pwlib.mean_field import free_energy, mean_field

N, K = 4, 3


def problem(seed=0):
    """Unary energies [N, K] and pair energies [N, N, K, K] with pair[i, j, a, b] = pair[j, i, b, a]."""
    generator = torch.Generator().manual_seed(seed)
    unary = torch.randn(N, K, generator=generator, dtype=torch.float64)
    pair = torch.randn(N, N, K, K, generator=generator, dtype=torch.float64)
    pair = pair + pair.permute(1, 0, 3, 2)
    pair[range(N), range(N)] = 0
    return unary, pair


def expected(pair):
    return lambda q: torch.einsum("ijab,...jb->...ia", pair, q)


def loop(unary, pair, iterations, initial=None):
    """The marginals [T + 1, N, K] of every iteration, one number at a time."""
    start = unary if initial is None else initial
    found = [[[math.exp(-e) / sum(math.exp(-f) for f in row) for e in row] for row in start.tolist()]]
    for _ in range(iterations):
        q, new = found[-1], []
        for i in range(N):
            weight = []
            for a in range(K):
                energy = unary[i, a].item()
                for j, b in itertools.product(range(N), range(K)):
                    energy += pair[i, j, a, b].item() * q[j][b]
                weight.append(math.exp(-energy))
            new.append([w / sum(weight) for w in weight])
        found.append(new)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("iterations", [0, 1, 5])
@pytest.mark.parametrize("given", [False, True])
def test_mean_field_is_the_loop(iterations, given):
    unary, pair = problem()
    initial = problem(1)[0] if given else None
    want = loop(unary, pair, iterations, initial)
    seen = []
    options = {"initial": initial, "observe": lambda q, energy: seen.append((q, energy))}
    log_q = mean_field(unary, expected(pair), iterations, **options)
    torch.testing.assert_close(log_q.exp(), want[-1])
    torch.testing.assert_close(mean_field(unary, expected(pair), iterations, initial=initial, log=False), want[-1])
    torch.testing.assert_close(torch.stack([q for q, _ in seen]), want)
    torch.testing.assert_close(torch.stack([energy for _, energy in seen]), expected(pair)(want))


def test_the_images_of_a_batch_are_independent():
    (one, pair), (two, _) = problem(), problem(1)
    both = mean_field(torch.stack([one, two]), expected(pair), 3)
    torch.testing.assert_close(both, torch.stack([mean_field(unary, expected(pair), 3) for unary in (one, two)]))


def test_gradients_by_finite_differences():
    unary, pair = problem()
    unary.requires_grad_(), pair.requires_grad_()
    assert torch.autograd.gradcheck(lambda u, p: mean_field(u, expected(p), 3), (unary, pair))


def test_free_energy_is_the_expected_energy_minus_the_entropy():
    """By enumeration of all labellings."""
    unary, pair = problem()
    q = torch.softmax(problem(1)[0], -1)
    want = 0.0
    for x in itertools.product(range(K), repeat=N):
        probability = math.prod(q[i, x[i]].item() for i in range(N))
        energy = sum(unary[i, x[i]].item() for i in range(N))
        energy += sum(pair[i, j, x[i], x[j]].item() for i, j in itertools.combinations(range(N), 2))
        want += probability * (energy + math.log(probability))
    assert free_energy(q, unary, expected(pair)(q)).item() == pytest.approx(want)
