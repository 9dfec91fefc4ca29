"""Posterior: the result of a competition, and its mean, variance, mode, entropy and perplexity."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Posterior(NamedTuple):
    """Energies, responsibilities and free energy of a competition between K hypotheses.

    All tensors keep the layout of the energies: the hypotheses stay on the axis ``dim`` of the competition, as in
    :func:`torch.softmax`, and the free energy lacks that axis.

    Attributes:
        energies: d_k, shape (..., K).
        responsibilities: r_k = dF/dd_k, shape (..., K).
        free_energy: F, shape (...).

    Example:
        >>> posterior = Posterior(torch.tensor([0.0, 0.0]), torch.tensor([0.5, 0.5]), torch.tensor(-0.6931))
        >>> posterior.mean(torch.tensor([-1.0, 1.0])), posterior.variance(torch.tensor([-1.0, 1.0]))
        (tensor(0.), tensor(1.))
        >>> posterior.perplexity()
        tensor(2.)
    """

    energies: Tensor
    responsibilities: Tensor
    free_energy: Tensor

    def mean(self, values: Tensor, dim: int = -1) -> Tensor:
        """Return the posterior mean sum_k r_k v_k; shapes follow :func:`torch.matmul` along the hypothesis axis.

        Args:
            values: one number per hypothesis (K,), with result (...); or one vector per hypothesis (..., K, V), with
                result (..., V) whose last axis is moved to ``dim``.
            dim: axis of the hypotheses.

        Raises:
            ValueError: the number of ``values`` differs from the number of hypotheses.
        """
        responsibilities = self._with_hypotheses_last(values, dim)
        dtype = torch.promote_types(responsibilities.dtype, values.dtype)
        with torch.autocast(values.device.type, enabled=False):
            mean = torch.matmul(responsibilities.to(dtype), values.to(dtype))
        return mean if values.ndim == 1 else mean.movedim(-1, dim)

    def variance(self, values: Tensor, dim: int = -1) -> Tensor:
        """Return the posterior variance sum_k r_k (v_k - mean)^2 of each value; shapes as in :meth:`mean`.

        In float16, its derivative with respect to r_k, (v_k - mean)^2, overflows if v_k is 256 or more from the mean.
        """
        responsibilities = self._with_hypotheses_last(values, dim).unsqueeze(-1)  # (..., K, 1)
        vectors = values.unsqueeze(-1) if values.ndim == 1 else values  # (..., K, V)
        vectors = vectors if responsibilities.ndim == 2 else vectors.unsqueeze(-3)  # (..., 1, K, V), for each item
        dtype = torch.promote_types(responsibilities.dtype, values.dtype)
        vectors = vectors.to(torch.promote_types(dtype, torch.float32))  # squares above 65504 overflow in float16
        # Two passes, because E[v^2] - E[v]^2 cancels if the mean is large.
        mean = (responsibilities * vectors).sum(-2, keepdim=True)
        variance = (responsibilities * (vectors - mean).square()).sum(-2).to(dtype)
        return variance.squeeze(-1) if values.ndim == 1 else variance.movedim(-1, dim)

    def mode(self, dim: int = -1) -> Tensor:
        """Return the index of the hypothesis with the largest responsibility, shape (...)."""
        return self.responsibilities.argmax(dim)

    def entropy(self, dim: int = -1) -> Tensor:
        """Return the entropy -sum_k r_k log r_k in nats, shape (...); its gradient is finite at r = 0."""
        r = self.responsibilities
        wide = r.float() if r.dtype in (torch.float16, torch.bfloat16) else r
        return -(wide * wide.clamp_min(torch.finfo(wide.dtype).tiny).log()).sum(dim).to(r.dtype)

    def perplexity(self, dim: int = -1) -> Tensor:
        """Return exp(H), the effective number of hypotheses, shape (...)."""
        return self.entropy(dim).exp()

    def _with_hypotheses_last(self, values: Tensor, dim: int) -> Tensor:
        """Return the responsibilities with the hypothesis axis last; raise ValueError if the values do not fit it."""
        responsibilities = self.responsibilities.movedim(dim, -1)
        num_values = values.shape[-min(values.ndim, 2)] if values.ndim else 0  # K of (K,) or (..., K, V)
        if num_values != responsibilities.shape[-1]:
            raise ValueError(
                f"values of shape {tuple(values.shape)} must have shape (K,) or (..., K, V) with "
                f"K={responsibilities.shape[-1]}, the number of hypotheses on axis dim={dim}"
            )
        return responsibilities
