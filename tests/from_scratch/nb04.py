"""The backward pass of notebook 04 against autograd and against finite differences of the library's loss."""

import torch
import torch.nn.functional as F

from pwlib import DenseCRF


def test_the_backward_pass_equals_autograd_and_finite_differences(pull):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, 5, 6, generator=generator, dtype=torch.float64)
    logits = 2 * torch.randn(1, 4, 5, 6, generator=generator, dtype=torch.float64)
    target = torch.randint(4, (1, 5, 6), generator=generator)
    mu = torch.rand(4, 4, generator=generator)
    options = dict(theta_alpha=3.0, theta_beta=60.0, theta_gamma=1.5, w_bilateral=2.0, w_spatial=0.7)
    crf = DenseCRF(4, **options, compatibility=mu, iterations=3, filtering="exact").double()
    logits.requires_grad_()
    F.nll_loss(crf(logits, image), target).backward()

    with torch.no_grad():
        kernels = torch.cat(crf.filters(image).messages(torch.eye(30, dtype=torch.float64)[None]))
        unary = -logits.log_softmax(1)[0].flatten(1).T
        history = pull("04", "unrolled")(unary, kernels, crf.log_w, crf.compatibility, 3)
        hit = F.one_hot(target.flatten(), 4) / history[-1] / 30
        of_unary, of_w, of_mu = pull("04", "unrolled_backward")(kernels, crf.log_w, crf.compatibility, history, -hit)
        # From -log_softmax back to the logits.
        p = unary.neg().exp()
        of_logits = -(of_unary - p * of_unary.sum(1, keepdim=True))
    torch.testing.assert_close(of_w, crf.log_w.grad)
    torch.testing.assert_close(of_mu, crf.compatibility.grad)
    torch.testing.assert_close(of_logits.T.reshape(logits.shape), logits.grad)

    eps = 1e-6
    for m in range(2):
        losses = []
        for shift in (eps, -eps):
            with torch.no_grad():
                crf.log_w[m] += shift
                losses.append(F.nll_loss(crf(logits, image), target).item())
                crf.log_w[m] -= shift
        assert abs((losses[0] - losses[1]) / (2 * eps) - of_w[m].item()) < 1e-7
