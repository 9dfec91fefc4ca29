"""Encoders to compare DecoderFreeEncoder with: a sparse autoencoder, and a Gaussian mixture."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from em_lightning.checks import check_at_least
from em_lightning.competition import softmin
from em_lightning.modules import EnergyLayer
from em_lightning.modules.parameters import PlainMixture
from em_lightning.operators import EMOperator
from em_lightning.statistics import STATISTICS


class SparseAutoencoder(EnergyLayer):
    r"""The standard sparse autoencoder: activations :math:`a = \mathrm{relu}(W x + b)` and a linear decoder.

    The loss is :math:`\mathrm{MSE} + \lambda\,\mathrm{mean}|a|` with :math:`\lambda` = ``sparsity``. The output is the
    reconstruction (N, D). The other arguments are those of :class:`~em_lightning.modules.EnergyLayer`.

    Example:
        >>> import torch
        >>> module = SparseAutoencoder(num_features=64, num_components=16)
        >>> module(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 64])
    """

    def __init__(
        self,
        num_features: int = 784,
        num_components: int = 64,
        sparsity: float = 0.01,
        lr: float = 1e-3,
        optimizer: Literal["adam", "sgd"] = "adam",
    ) -> None:
        super().__init__(num_features, num_components, lr, optimizer)
        check_at_least(0, sparsity=sparsity)
        self.save_hyperparameters()
        self.sparsity = sparsity
        self.decoder = nn.Linear(num_components, num_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction (N, D) of items (N, ...)."""
        return self.decoder(self.energies(x))

    def loss_terms(self, x: Tensor, y: Tensor, energies: Tensor, stage: str) -> dict[str, Tensor]:
        """Return both terms."""
        error = functional.mse_loss(self.decoder(energies), x.flatten(1))
        return {"reconstruction": error, "sparsity": self.sparsity * energies.abs().mean()}


class MixtureEncoder(EnergyLayer):
    r"""An encoder that is a Gaussian mixture in the principal subspace of the items, fitted by EM.

    Energies are :math:`d_k(x) = -\log \pi_k - \log N(U^\top (x - m) \mid \mu_k, \Sigma_k)` with the mean m and Q
    principal axes U (D, Q) of the training items. Noise of one variance outside the subspace would add the same to all
    energies, so responsibilities are those of a mixture over whole items.

    The loss is the negative log-likelihood, in which :math:`\log \det \Sigma_k` is the volume control. EM fits the
    mixture to the training set before the first epoch, so one epoch is enough; with ``fast_dev_run``, to 32 K items.

    Args:
        num_features: D.
        num_components: K.
        subspace: Q, the number of principal axes.
        num_iters: EM iterations; 0 keeps the initialization.
        covariance: ``"full"``, ``"diag"``, ``"spherical"`` or ``"tied"``.
        covariance_floor: added to every variance, in squared units of the items.
        init: ``"kmeans++"``, ``"random"`` or ``"farthest"``.
        output: what ``forward`` returns, a key of ``STATISTICS`` that needs no values: by default
            ``"neg_log_responsibilities"``, :math:`d + \log \sum_j e^{-d_j}`.

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
        del self.encoder
        self.mean = nn.Parameter(torch.zeros(num_features), requires_grad=False)
        self.basis = nn.Parameter(torch.zeros(num_features, subspace), requires_grad=False)
        self.mixture = PlainMixture(num_components, subspace, covariance).float()

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Fit the mean, the principal axes and the mixture to items (N, ...)."""
        x = x.flatten(1)
        self.mean.copy_(x.mean(0))
        centred = x - self.mean
        axes = torch.linalg.eigh((centred.mT @ centred / len(x)).double()).eigenvectors
        self.basis.copy_(axes[:, -self.basis.shape[1] :].flip(1))
        self.mixture.assign(self.operator((centred @ self.basis).unsqueeze(0)))

    def on_fit_start(self) -> None:
        """Fit the mixture to the training set, unless it was loaded from a checkpoint."""
        if not self.basis.any():
            trainer: Any = self.trainer
            x = trainer.datamodule.whole("train").x
            self.fit((x[: 32 * len(self.prototypes)] if trainer.fast_dev_run else x).to(self.device))

    @property
    def prototypes(self) -> Tensor:
        """The means (K, D) of the components, as items."""
        return self.mean + self.mixture.means[0] @ self.basis.mT

    def energies(self, x: Tensor) -> Tensor:
        """Return the energies (N, K) of items (N, ...)."""
        return -self.mixture().log_joint(((x.flatten(1) - self.mean) @ self.basis).unsqueeze(0))[0]

    def features(self, x: Tensor) -> Tensor:
        """Return the inputs (N, K) of a linear probe for items (N, ...): the output of ``forward``."""
        return self(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the statistic (N, K) of the posterior of items (N, ...)."""
        return self.statistic(softmin(self.energies(x)))

    def loss_terms(self, x: Tensor, y: Tensor, energies: Tensor, stage: str) -> dict[str, Tensor]:
        """Return the mean free energy, the negative log-likelihood in the subspace."""
        return {"free_energy": softmin(energies).free_energy.mean()}

    def configure_optimizers(self) -> list[Any]:
        """Return no optimizer: EM has fitted the mixture."""
        return []
