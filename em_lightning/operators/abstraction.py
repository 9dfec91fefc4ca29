"""Set abstraction: the components of a mixture as tokens that describe the items around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from em_lightning.checks import check_at_least, check_positive
from em_lightning.operators.em import EMOperator

# Smallest exponent of an axis: exp(-16) is float32's round-off at 1, and exp(-80), of 5 axes, is not yet subnormal.
_SMALLEST_EXPONENT = -16.0
_CHUNK = 8  # sets per call of :func:`counts`: 128 sets of 160 items took a quarter less time in chunks of 4 to 32
_TOKEN_GRID = 3  # ``grid`` of the residual layers, whose items are tokens; chosen, not compared


class EMAbstraction(nn.Module):
    r"""Summarize each set by K tokens: means of a mixture, and sums of Gaussian bumps around them as features.

    .. math::
        y_{kj} = \sum_n \phi_j(x_n - \mu_k)\, h_n, \qquad
        \phi_j(d) = \exp\big(-\lVert d - o_j \rVert^2 / s^2\big), \qquad
        t_k = \mathrm{relu}(\mathrm{BN}(W y_k))

    with features :math:`h_n` of item n, means :math:`\mu_k` of the mixture that an :class:`EMOperator` fits to the
    coordinates, a matrix W and batch normalization BN. The offsets :math:`o_j` form a lattice, ``grid`` places per axis
    with spacing s. Without features, y is the batch-normalized fraction of items per bump. ``blocks`` residual layers
    t <- relu(t + BN(V relu(BN(U y)))) follow, with matrices U and V. In them, y is computed with the tokens as items,
    on a lattice of 3 places per axis. To get one token per set, stack modules and give the last one K = 1.

    The result is invariant to the order of the items. The coordinates and the operator get no gradient.

    Args:
        num_components: K.
        num_coordinates: D.
        num_features: F, features per item; ``None`` for items without features.
        out_features: size of a token.
        pitch: s, in units of the coordinates.
        grid: places along each axis; there are ``grid ** D`` bumps.
        blocks: number of residual layers.
        inner_pitch: s of the residual layers; ``None`` uses 1.5 ``pitch`` (chosen), as tokens are farther apart.
        **operator: arguments of :class:`EMOperator`; by default 4 iterations without corrections, spherical covariances
            with a prior of strength 1, and random centers that are drawn once and never trained.

    Shape:
        - coordinates: (B, N, D); features: (B, N, F); mask: (B, N), true for items that count.
        - output: the means (B, K, D), and tokens (B, K, ``out_features``).

    Raises:
        ValueError: an argument is out of range, or features are missing or unexpected.

    Example:
        >>> first = EMAbstraction(16, 2, None, 32, pitch=0.2, grid=5)
        >>> second = EMAbstraction(1, 2, 32, 64, pitch=0.5)
        >>> centers, tokens = first(torch.rand(4, 100, 2))
        >>> second(centers, tokens)[1].shape
        torch.Size([4, 1, 64])

    Source: the set abstraction of Qi et al., PointNet++, 2017, with EM instead of farthest points and balls; Gaussian
    bumps: Monti et al., "Geometric deep learning on graphs and manifolds using mixture model CNNs", 2017.
    """

    def __init__(
        self,
        num_components: int,
        num_coordinates: int,
        num_features: int | None,
        out_features: int,
        *,
        pitch: float,
        grid: int = 3,
        blocks: int = 0,
        inner_pitch: float | None = None,
        **operator: Any,
    ) -> None:
        super().__init__()
        inner_pitch = 1.5 * pitch if inner_pitch is None else inner_pitch
        check_at_least(1, grid=grid, out_features=out_features)
        check_at_least(0, blocks=blocks)
        check_positive(pitch=pitch, inner_pitch=inner_pitch)
        self.num_features, self.out_features = num_features, out_features
        self.grid, self.pitch, self.inner_pitch = grid, pitch, inner_pitch
        options: dict[str, Any] = {
            "num_iters": 4,
            "init": "learned",
            "covariance": "spherical",
            "residual": False,
            "prior": {"mean_strength": 0.0, "covariance_strength": 1.0},
        }
        self.operator = EMOperator(num_components, num_coordinates, **(options | operator))
        self.operator.requires_grad_(False)
        num_bumps = grid**num_coordinates
        self.scale = nn.BatchNorm1d(num_bumps) if num_features is None else nn.Identity()
        self.embed = nn.Sequential(*_layer(num_bumps * (num_features or 1), out_features), nn.ReLU())
        self.blocks = nn.ModuleList(_Block(_TOKEN_GRID**num_coordinates, out_features) for _ in range(blocks))

    def forward(
        self, coordinates: Tensor, features: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the means (B, K, D) and the tokens (B, K, ``out_features``)."""
        num_features = None if features is None else features.shape[-1]
        if num_features != self.num_features:
            raise ValueError(f"features have {num_features} columns; num_features is {self.num_features}")
        valid = torch.ones_like(coordinates[..., 0], dtype=torch.bool) if mask is None else mask
        with torch.no_grad(), torch.autocast(coordinates.device.type, enabled=False):
            x = coordinates.to(torch.promote_types(coordinates.dtype, torch.float32))
            centers = self.operator(x, mask).means
            x = torch.where(valid.unsqueeze(-1), x, 0.0)
            if features is None:
                chunks = zip(x.split(_CHUNK), centers.split(_CHUNK), valid.to(x).split(_CHUNK), strict=True)
                sums = torch.cat([counts(*chunk, self.grid, self.pitch) for chunk in chunks])
                sums = sums / valid.sum(1).clamp(min=1)[:, None, None]
            else:
                item_bumps = bumps(x, centers, self.grid, self.pitch)
            dtype = next(self.embed.parameters()).dtype  # the module may be of half precision
            token_bumps = bumps(centers, centers, _TOKEN_GRID, self.inner_pitch).to(dtype)
        if features is not None:  # outside of no_grad, because features get a gradient
            sums = _gather(item_bumps, torch.where(valid.unsqueeze(-1), features, 0.0).to(item_bumps.dtype))
        tokens = self.embed(self.scale(sums.to(dtype).flatten(0, 1)))
        for block in self.blocks:
            tokens = block(tokens, token_bumps)
        return centers.to(coordinates.dtype), tokens.unflatten(0, centers.shape[:2])


def counts(x: Tensor, centers: Tensor, valid: Tensor, grid: int, pitch: float) -> Tensor:
    """Return sum_n valid_n phi_j(x_n - mu_k) (B, K, grid^D) of items (B, N, D), mask (B, N) and centers (B, K, D)."""
    *others, last = _bumps_by_axis(x, centers, grid, pitch)
    product = _product(others) if others else torch.ones_like(last[:, :, :1])
    return (product @ (last * valid[:, None, None]).mT).flatten(2)


def bumps(x: Tensor, centers: Tensor, grid: int, pitch: float) -> Tensor:
    """Return phi_j(x_n - mu_k) (B, K, J, N) of items (B, N, D) and centers (B, K, D), for J = grid^D bumps j."""
    return _product(_bumps_by_axis(x, centers, grid, pitch))


def _product(factors: list[Tensor]) -> Tensor:
    """Return all products (B, K, J, N) of one bump per axis, given the factors (B, K, grid, N) of each axis."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product.unsqueeze(3) * factor.unsqueeze(2)).flatten(2, 3)
    return product


def _bumps_by_axis(x: Tensor, centers: Tensor, grid: int, pitch: float) -> list[Tensor]:
    """Return the factors (B, K, grid, N) of the bumps, one per axis."""
    offsets = torch.arange(grid, device=x.device, dtype=x.dtype) - (grid - 1) / 2
    items, means = ((points / pitch).mT.contiguous() for points in (x, centers))
    factors = []
    for item, mean in zip(items.unbind(1), means.unbind(1), strict=True):
        difference = item[:, None, None] - (mean.unsqueeze(-1) + offsets).unsqueeze(-1)
        factors.append(difference.square_().neg_().clamp_(min=_SMALLEST_EXPONENT).exp_())
    return factors


def _gather(phi: Tensor, features: Tensor) -> Tensor:
    """Return sum_n phi_kjn h_n as (B, K, J F), for phi (B, K, J, N) and features h (B, N, F)."""
    return torch.bmm(phi.flatten(1, 2), features).unflatten(1, phi.shape[1:3]).flatten(2)


def _layer(in_features: int, out_features: int) -> tuple[nn.Module, nn.Module]:
    return nn.Linear(in_features, out_features, bias=False), nn.BatchNorm1d(out_features)


class _Block(nn.Module):
    """Residual layer whose items and centers are the tokens (B K, ``width``)."""

    def __init__(self, num_bumps: int, width: int) -> None:
        super().__init__()
        self.around = nn.Sequential(*_layer(num_bumps * width, width), nn.ReLU())
        self.mix = nn.Sequential(*_layer(width, width))

    def forward(self, tokens: Tensor, phi: Tensor) -> Tensor:
        sums = _gather(phi, tokens.unflatten(0, phi.shape[:2])).flatten(0, 1)
        return (tokens + self.mix(self.around(sums))).relu()
