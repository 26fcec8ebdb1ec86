"""The functions of notebook 02 against the library, on other problems than in the notebook."""

import itertools
import math

import torch

from pwlib import DenseCRF, graph


def problem(nodes, labels, seed=1):
    generator = torch.Generator().manual_seed(seed)
    unary = 2 * torch.rand(nodes, labels, generator=generator, dtype=torch.float64)
    edges = graph.all_pairs(nodes)[::2]
    return unary, edges


def test_gibbs_is_exact(pull):
    unary, edges = problem(5, 3)
    w = 0.6
    labellings, probabilities, log_z = pull("02", "gibbs")(unary.tolist(), edges.tolist(), w)
    marginals = pull("02", "marginals_of")(labellings, probabilities, 5, 3)
    pair = (w * (1 - torch.eye(3, dtype=torch.float64))).expand(len(edges), 3, 3)
    wanted = graph.infer(unary, edges, pair)
    assert math.isclose(log_z, wanted.log_z.item(), rel_tol=1e-9)
    torch.testing.assert_close(marginals, wanted.marginals)
    energies = graph.energies(torch.tensor(labellings), unary, edges, pair)
    ours = [pull("02", "energy")(x, unary.tolist(), edges.tolist(), w) for x in labellings]
    torch.testing.assert_close(torch.tensor(ours).double(), energies, rtol=1e-5, atol=1e-5)


def test_sequential_updates_lower_the_free_energy_and_it_exceeds_minus_log_z(pull):
    unary, edges = problem(6, 3)
    w, potts = 1.1, 1 - torch.eye(3, dtype=torch.float64)
    coupling = torch.zeros(6, 6, dtype=torch.float64)
    coupling[edges[:, 0], edges[:, 1]] = w
    coupling = coupling + coupling.T
    history = pull("02", "mean_field_in_turn")(unary, coupling, potts, 8)
    f = [pull("02", "free_energy")(q, unary, coupling, potts).item() for q in history]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(f))
    log_z = graph.infer(unary, edges, (w * potts).expand(len(edges), 3, 3)).log_z.item()
    assert f[0] > f[-1] > -log_z


def test_parallel_mean_field_and_free_energy_equal_the_librarys_trace(pull):
    generator = torch.Generator().manual_seed(2)
    image, logits = torch.rand(3, 6, 7, generator=generator), 2 * torch.randn(4, 6, 7, generator=generator)
    options = dict(theta_alpha=3.0, theta_beta=60.0, theta_gamma=1.5, w_bilateral=2.0, w_spatial=0.7)
    crf = DenseCRF(4, **options, filtering="exact")
    trace = crf.trace(logits, image, iterations=4)
    ours = pull("02", "dense_mean_field")(logits, image, **options, iterations=4)
    torch.testing.assert_close(ours, trace.q[-1], rtol=1e-4, atol=1e-5)

    pixels = crf.filters(image[None]).messages(torch.eye(42)[None])
    coupling = (crf.log_w.exp()[:, None, None] * torch.cat(pixels)).sum(0).detach().double()
    unary, potts = trace.unary.flatten(1).T.double(), 1 - torch.eye(4, dtype=torch.float64)
    for step, q in enumerate(pull("02", "mean_field")(unary, coupling, potts, 4)):
        torch.testing.assert_close(q.T.reshape(4, 6, 7).float(), trace.q[step], rtol=1e-4, atol=1e-5)
        f = pull("02", "free_energy")(q, unary, coupling, potts)
        torch.testing.assert_close(f, trace.free_energy[step], rtol=1e-4, atol=1e-3)
