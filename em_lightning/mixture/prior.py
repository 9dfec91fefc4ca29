"""Priors of a mixture's parameters, as pseudo-counts of the M-step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from em_lightning.checks import positive_number
from em_lightning.distributed import accumulation_dtype
from em_lightning.mixture.covariance import Covariance, covariance_of, half_log_two_pi
from em_lightning.mixture.m_step import PseudoCounts
from em_lightning.mixture.mixture import Mixture
from em_lightning.mixture.points import Frame, Parameters


class MixturePrior(nn.Module):
    r"""Dirichlet prior of the weights and normal-inverse-Wishart prior of means and covariances.

    .. math::
        \log p = \sum_k (\alpha - 1) \log \pi_k - \frac12 \sum_k \left[ s \log |\Sigma_k|
        + s \operatorname{tr}(S_0 \Sigma_k^{-1}) + \kappa (\mu_k - m_0)^\top \Sigma_k^{-1} (\mu_k - m_0) \right]

    up to a constant. It acts like :math:`\kappa` points at :math:`m_0` and :math:`s` points of covariance :math:`S_0`.
    With :math:`N_k` points in component k the M-step is

    .. math::
        \pi_k \propto N_k + \alpha - 1, \quad \mu_k = \frac{N_k \bar x_k + \kappa m_0}{N_k + \kappa}, \quad
        \Sigma_k = \frac{N_k V_k + \kappa (\mu_k - m_0)(\mu_k - m_0)^\top + s S_0}{N_k + s}

    with the mean square :math:`V_k` of the points about :math:`\mu_k`. The prior of :math:`\Sigma_k` is inverse Wishart
    with :math:`s - D - 2` degrees of freedom and scale :math:`s S_0`. For diagonal covariances it is the same in each
    feature (normal-inverse-gamma), and for spherical ones traces replace matrices. A tied covariance has the terms in
    :math:`s` once. Weights of points are divided by their mean.

    Args:
        weight_concentration: :math:`\alpha \ge 1`; 1 is flat.
        mean_strength: :math:`\kappa \ge 0`, in points; the default is that of the source.
        mean: :math:`m_0` (D,), in units of the points; the mean of each set by default.
        covariance_strength: :math:`s \ge 0`, in points. The source chooses D + 2 degrees of freedom, which are
            :math:`s = 2 D + 4`. The default of 1 is weak, but makes the covariances of few points invertible.
        covariance: :math:`S_0`, diagonal: a number is a fraction of each feature's variance in the set; a sequence is
            variances (D,) in squared units; by default the fraction :math:`K^{-2/D}`, that of K equal parts of a cube.
        learnable: train those of the pseudo-counts :math:`\alpha - 1, \kappa, s` that are positive, and the scale of
            :math:`S_0` if :math:`s > 0`. Each is its value here times the exponential of a parameter (1,), at first 0.

    Raises:
        ValueError: a pseudo-count is negative, or the prior covariance is not positive.

    Example:
        >>> prior = MixturePrior(weight_concentration=2.0, mean_strength=0.0, covariance_strength=0.0)
        >>> mixture = Mixture(torch.tensor([[0.5, 0.5]]).log(), torch.zeros(1, 2, 1), torch.ones(1, 2))
        >>> prior.log_density(mixture, torch.zeros(1, 1), torch.ones(1, 1))  # log 0.5 + log 0.5
        tensor([-1.3863], dtype=torch.float64)

    Source: Fraley and Raftery, Bayesian Regularization for Normal Mixture Estimation and Model-Based Clustering, 2007.
    """

    def __init__(
        self,
        *,
        weight_concentration: float = 1.0,
        mean_strength: float = 0.01,
        mean: Tensor | Sequence[float] | None = None,
        covariance_strength: float = 1.0,
        covariance: Tensor | Sequence[float] | float | None = None,
        learnable: bool = False,
    ) -> None:
        super().__init__()
        if not 1.0 <= weight_concentration < math.inf:
            raise ValueError(f"weight_concentration={weight_concentration} must be finite and at least 1 (flat)")
        counts = {"weight": weight_concentration - 1.0, "mean": mean_strength, "covariance": covariance_strength}
        for name in ("mean", "covariance"):
            if not 0.0 <= counts[name] < math.inf:
                raise ValueError(f"{name}_strength={counts[name]} must be finite and at least 0")
        self._counts = counts
        for name, count in counts.items():  # log_weight, ...: the log of the trained pseudo-count over the given one
            if learnable and count > 0:
                self.register_parameter(f"log_{name}", nn.Parameter(torch.zeros(1)))
        self.log_spread = nn.Parameter(torch.zeros(1)) if learnable and counts["covariance"] > 0 else None  # scales S_0
        self.fraction = positive_number("covariance", covariance) if isinstance(covariance, (int, float)) else None
        # Python numbers instead of buffers, which are rounded when the module changes its dtype.
        self.mean = None if mean is None else _numbers(mean)
        self.covariance = None if covariance is None or self.fraction is not None else _numbers(covariance)
        if self.covariance is not None and not all(value > 0 for value in self.covariance):
            raise ValueError(f"covariance={list(self.covariance)} must be positive: it holds variances")

    def count(self, name: str, dtype: torch.dtype | None = None) -> Tensor | float:
        """Return the pseudo-count of ``"weight"``, ``"mean"`` or ``"covariance"``: a tensor (1,) if trained."""
        value = self._counts[name]
        log_ratio = getattr(self, f"log_{name}", None)  # a parameter if the pseudo-count is trained
        return value if log_ratio is None else value * log_ratio.to(dtype or log_ratio.dtype).exp()

    def pseudo_counts(
        self, frame: Frame, mean: Tensor, variance: Tensor, covariance: Covariance, num_components: int
    ) -> PseudoCounts:
        """Return the pseudo-counts for sets whose points have a mean (B, D) and variance (B, D) in a frame."""
        num_features, dtype = mean.shape[1], mean.dtype
        for name, value in (("mean", self.mean), ("covariance", self.covariance)):
            if value is not None and len(value) != num_features:
                raise ValueError(f"{name} of the prior has shape ({len(value)},); it must be ({num_features},)")
        if self.mean is not None:
            mean = (mean.new_tensor(self.mean) - frame.center) / frame.scale.unsqueeze(-1)
        if self.covariance is not None:
            variance = variance.new_tensor(self.covariance) / frame.scale.square().unsqueeze(-1)
        else:
            variance = variance * (num_components ** (-2.0 / num_features) if self.fraction is None else self.fraction)
        if self.log_spread is not None:
            variance = variance * self.log_spread.to(dtype).exp()
        # The matrix diag(variance) as statistics of second degree: variance_d second_degree(e_d), summed over d.
        unit_vectors = torch.eye(num_features, dtype=dtype, device=mean.device).unsqueeze(0)
        scatter = (variance @ covariance.second_degree(unit_vectors)[0].mT).unsqueeze(1)
        weight_count, mean_count, covariance_count = (
            (mean.new_ones(1, 1) * self.count(name, dtype)).to(dtype) for name in ("weight", "mean", "covariance")
        )
        return PseudoCounts(weight_count, mean_count, covariance_count, mean.unsqueeze(1), scatter)

    def log_density(self, mixture: Mixture, mean: Tensor, variance: Tensor) -> Tensor:
        """Return the logarithm of the prior density of mixtures (B,), up to a constant.

        ``mean`` and ``variance`` (B, D) are those of the points, on which the default mean and covariance depend.
        """
        dtype = accumulation_dtype(mean)
        frame = Frame(mean.detach().to(dtype), torch.ones_like(mean[:, 0], dtype=dtype))
        covariance = covariance_of(mixture.covariances, mixture.means)
        mean, variance = mean.to(dtype) - frame.center, variance.to(dtype)
        counts = self.pseudo_counts(frame, mean, variance, covariance, mixture.components)
        return log_prior(frame.enter_parameters(mixture.parameters()), covariance, counts)

    def extra_repr(self) -> str:
        """Return the pseudo-counts."""
        with torch.no_grad():
            return ", ".join(f"{name}={float(self.count(name)):g}" for name in self._counts)


def log_prior(parameters: Parameters, covariance: Covariance, counts: PseudoCounts) -> Tensor:
    """Return the log of the prior density (B,), up to a constant; parameters and counts have the same coordinates."""
    log_weights, means, covariances = parameters
    num_features = means.shape[-1]
    # P = Sigma^-1: theta of second degree times second_degree(d) is -d^T P d / 2. A shared P counts once.
    theta, peak = covariance.natural_parameters(Parameters(torch.zeros_like(log_weights), means, covariances))
    minus_half_p = theta[..., 1 + num_features :]
    log_det_root = peak + half_log_two_pi(num_features)  # log |P|^(1/2)
    mean_term = (minus_half_p * covariance.second_degree((means - counts.mean).mT).mT).sum(-1)
    covariance_term = (log_det_root + (minus_half_p * counts.scatter).sum(-1)) / covariance.sharing(means.shape[1])
    terms = counts.weight_count * log_weights + counts.mean_count * mean_term
    return (terms + counts.covariance_count * covariance_term).sum(-1)


def _numbers(values: Tensor | Sequence[float] | float) -> tuple[float, ...]:
    return tuple(torch.as_tensor(values, dtype=torch.float64, device="cpu").flatten().tolist())
