"""An unsupervised encoder whose energies are those of a mixture of Gaussians, each with a metric of its own."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from em_lightning.competition import softmin
from em_lightning.mixture import Mixture
from em_lightning.modules.layer import EnergyLayer
from em_lightning.operators import EMOperator
from em_lightning.statistics import STATISTICS


class SubspaceMixture(nn.Module):
    r"""Energies :math:`d_k(x) = -\log \pi_k - \log N(U^\top (x - m) \mid \mu_k, \Sigma_k)` in a subspace U of pixels.

    What lies outside the subspace is the same for all components, if it is noise of one variance, and competition does
    not see it: responsibilities are those of a mixture over whole items.

    Args:
        num_features: D.
        num_components: K.
        subspace: Q, the number of principal axes U (D, Q).
        covariance: ``"full"``, ``"diag"``, ``"spherical"`` or ``"tied"``.
    """

    def __init__(self, num_features: int, num_components: int, subspace: int, covariance: str) -> None:
        super().__init__()
        shapes: dict[str, tuple[int, ...]] = {
            "full": (num_components, subspace, subspace),
            "tied": (1, subspace, subspace),
            "diag": (num_components, subspace),
            "spherical": (num_components,),
        }
        self.mean = nn.Parameter(torch.zeros(num_features), requires_grad=False)
        self.basis = nn.Parameter(torch.zeros(num_features, subspace), requires_grad=False)
        self.log_weights = nn.Parameter(torch.zeros(num_components), requires_grad=False)
        self.means = nn.Parameter(torch.zeros(num_components, subspace), requires_grad=False)
        self.covariances = nn.Parameter(torch.zeros(shapes[covariance]), requires_grad=False)

    @torch.no_grad()
    def fit(self, x: Tensor, operator: EMOperator) -> None:
        """Take the principal axes of items (N, D), and the mixture that the operator finds there."""
        mean = x.mean(0)
        centred = x - mean
        axes = torch.linalg.eigh((centred.mT @ centred / len(x)).double()).eigenvectors
        basis = axes[:, -self.basis.shape[1] :].flip(1).to(x.dtype)
        mixture = operator((centred @ basis).unsqueeze(0))
        for name, value in {"mean": mean, "basis": basis, **mixture._asdict()}.items():
            getattr(self, name).copy_(value.squeeze(0) if name in Mixture._fields else value)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energies (N, K) of items (N, D)."""
        mixture = Mixture(self.log_weights[None], self.means[None], self.covariances[None])
        return -mixture.log_joint(((x - self.mean) @ self.basis).unsqueeze(0))[0]

    @property
    def prototypes(self) -> Tensor:
        """The means of the components as items (K, D)."""
        return self.mean + self.means @ self.basis.mT


class MixtureEncoder(EnergyLayer):
    r"""An encoder that is a mixture of Gaussians in the principal subspace, fitted by exact EM.

    The decoder-free encoder has one linear map a unit, and needs variance and decorrelation against collapse. Here a
    unit has its own metric, :math:`\Sigma_k`, so its energy is a quadratic form; the loss is minus the mixture's
    log-likelihood :math:`-\log \sum_k e^{-d_k(x)}`, whose volume control is the :math:`\log \det \Sigma_k` in the
    energies: nothing else is needed. The fit is that of an :class:`~em_lightning.EMOperator` without corrections to the
    whole training set of the Trainer's data module, before the first epoch: run it for one. With ``fast_dev_run`` a few
    of the items have to do.

    Args:
        num_features: D.
        num_components: K.
        subspace: Q, the number of principal axes.
        num_iters: EM iterations; 0 keeps the start.
        covariance: ``"full"``, ``"diag"``, ``"spherical"`` or ``"tied"``.
        covariance_floor: added to every variance, in squared units of the items: the noise of a pixel.
        init: ``"kmeans++"``, ``"random"`` or ``"farthest"``.
        output: what ``forward`` returns, a key of ``STATISTICS`` that needs no values: by default
            ``"neg_log_responsibilities"``, :math:`d + \log \sum_j e^{-d_j}`.

    Shape:
        - batch: x (N, ...) of D features in all, and labels y (N,), which are not used.
        - ``energies(x)`` and ``forward(x)``: (N, K).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> module = MixtureEncoder(num_features=9, num_components=4, subspace=3)
        >>> module.fit(torch.rand(200, 9, generator=torch.Generator().manual_seed(0)))
        >>> module(torch.rand(5, 1, 3, 3)).exp().reciprocal().sum(-1).round(decimals=3)
        tensor([1., 1., 1., 1., 1.])
    """

    def __init__(
        self,
        num_features: int = 784,
        num_components: int = 64,
        subspace: int = 32,
        num_iters: int = 20,
        covariance: Literal["full", "diag", "spherical", "tied"] = "full",
        covariance_floor: float = 0.01,
        init: Literal["kmeans++", "random", "farthest"] = "kmeans++",
        output: str = "neg_log_responsibilities",
    ) -> None:
        super().__init__(num_features, num_components)
        if not 1 <= subspace <= num_features:
            raise ValueError(f"subspace={subspace} must be from 1 to num_features={num_features}")
        self.operator = EMOperator(
            num_components,
            subspace,
            num_iters=num_iters,
            covariance=covariance,
            covariance_floor=covariance_floor,
            init=init,
            residual=False,
        )
        self.statistic = STATISTICS.build(output)
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.encoder: Any = SubspaceMixture(num_features, num_components, subspace, covariance)

    def fit(self, x: Tensor) -> None:
        """Fit the mixture to items (N, ...)."""
        self.encoder.fit(x.flatten(1), self.operator)

    def on_fit_start(self) -> None:
        """Fit the mixture to the training set, unless a checkpoint brought one."""
        if not self.encoder.basis.any():
            trainer: Any = self.trainer
            x = trainer.datamodule.whole("train").x
            self.fit((x[: 32 * len(self.encoder.means)] if trainer.fast_dev_run else x).to(self.device))

    @property
    def prototypes(self) -> Tensor:
        """The means (K, D) of the components."""
        return self.encoder.prototypes

    def energies(self, x: Tensor) -> Tensor:
        """Return the energies (N, K) of items (N, ...)."""
        return self.encoder(x.flatten(1))

    def features(self, x: Tensor) -> Tensor:
        """Return what a linear probe reads of items (N, ...): the summary of the posterior (N, K)."""
        return self(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the posterior of items (N, ...), summarized as (N, K)."""
        return self.statistic(softmin(self.energies(x)))

    def objective(self, x: Tensor, y: Tensor, energies: Tensor, stage: str) -> dict[str, Tensor]:
        """Return the mean free energy, minus the log-likelihood in the subspace."""
        return {"free_energy": softmin(energies).free_energy.mean()}

    def configure_optimizers(self) -> list[Any]:
        """Return no optimizer, as EM needs none."""
        return []
