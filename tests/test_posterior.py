"""Posterior: mean, variance, entropy and mode against plain formulas."""

import itertools
import math

import numpy as np
import pytest
import scipy.special
import torch

from em_lightning.competition import Posterior, softmin


class TestPosterior:
    def posterior(self, *shape, dim=-1):
        return softmin(torch.randn(*shape, dtype=torch.float64), dim=dim)

    def test_mean_and_variance_are_weighted_sums(self):
        posterior, values = self.posterior(2, 5, 3), torch.randn(3, 4, dtype=torch.float64) + 1e4
        r = posterior.responsibilities
        for b, n, v in itertools.product(range(2), range(5), range(4)):
            mean = sum(r[b, n, k] * values[k, v] for k in range(3))
            variance = sum(r[b, n, k] * (values[k, v] - mean) ** 2 for k in range(3))
            torch.testing.assert_close(posterior.mean(values)[b, n, v], mean)
            torch.testing.assert_close(posterior.variance(values)[b, n, v], variance)
        torch.testing.assert_close(posterior.mean(values[:, 0]), posterior.mean(values)[..., 0])
        torch.testing.assert_close(posterior.variance(values[:, 0]), posterior.variance(values)[..., 0])

    def test_batched_values_follow_matmul(self):
        posterior, values = self.posterior(2, 5, 3), torch.randn(2, 3, 4, dtype=torch.float64)
        torch.testing.assert_close(posterior.mean(values), posterior.responsibilities @ values)
        one = Posterior(*(x[0, 0] for x in posterior))
        assert one.mean(values).shape == one.variance(values).shape == (2, 4)
        torch.testing.assert_close(one.variance(values)[1], posterior.variance(values[1])[0, 0])

    def test_value_axis_replaces_the_hypothesis_axis(self):
        last, values = self.posterior(2, 5, 7, 3), torch.randn(3, 4, dtype=torch.float64)
        first = Posterior(last.energies.movedim(-1, 1), last.responsibilities.movedim(-1, 1), last.free_energy)
        for name in ("mean", "variance"):
            torch.testing.assert_close(getattr(first, name)(values, dim=1).movedim(1, -1), getattr(last, name)(values))
            scalar = values[:, 0]
            torch.testing.assert_close(getattr(first, name)(scalar, dim=1), getattr(last, name)(scalar))

    def test_float16_variance_whose_squares_overflow(self):
        posterior = softmin(torch.tensor([[0.0, 0.0, 9.0]], dtype=torch.float16))
        values = torch.tensor([150.0, 150.0, -250.0], dtype=torch.float16)
        r = posterior.responsibilities.double()
        mean = r @ values.double()
        found = posterior.variance(values)
        assert found.dtype == torch.float16 and (values.double() - mean).square().max() > 65504
        torch.testing.assert_close(found.double(), r @ (values.double() - mean).square(), rtol=1e-3, atol=0)

    def test_entropy_mode_and_perplexity(self):
        posterior = self.posterior(4, 3, dim=0)
        r = posterior.responsibilities.numpy()
        np.testing.assert_allclose(posterior.entropy(0), scipy.special.entr(r).sum(0), atol=1e-14)
        np.testing.assert_allclose(posterior.perplexity(0), np.exp(scipy.special.entr(r).sum(0)))
        np.testing.assert_array_equal(posterior.mode(0), r.argmax(0))
        even = softmin(torch.zeros(8))
        assert even.entropy().item() == pytest.approx(math.log(8)) and even.perplexity().item() == pytest.approx(8)

    def test_entropy_gradient_is_finite_at_zero(self):
        d = torch.tensor([0.0, 1.0, torch.inf], requires_grad=True)
        softmin(d).entropy().backward()
        assert d.grad.isfinite().all() and d.grad[2] == 0

    def test_wrong_number_of_values_raises(self):
        with pytest.raises(ValueError, match=r"values.*\(4, 2\).*3.*dim=-1"):
            self.posterior(5, 3).mean(torch.zeros(4, 2))
        with pytest.raises(ValueError, match=r"values.*\(3,\).*4.*dim=0"):
            self.posterior(4, 2, 3, dim=0).mean(torch.zeros(3), dim=0)
        with pytest.raises(ValueError, match=r"values.*\(\).*1"):
            self.posterior(5, 1).mean(torch.tensor(2.0))

    def test_statistics_ignore_autocast(self):
        posterior, values = softmin(torch.randn(5, 3)), torch.randn(3, 2)
        with torch.autocast("cpu", torch.bfloat16):
            mean, variance = posterior.mean(values), posterior.variance(values)
        torch.testing.assert_close((mean, variance), (posterior.mean(values), posterior.variance(values)))
