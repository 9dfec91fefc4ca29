"""Sets to smaller sets: the components of a mixture as tokens that know what lies around them."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from em_lightning.operators.em import EMOperator

# Of an exponent: beyond, a bump is as good as zero, and what exp makes of it (a subnormal) is slow to compute with.
_FARTHEST = -16.0
# Sets whose bumps are worked out at once when nothing has to be kept for a gradient: more would leave the cache.
_BLOCK = 8


class EMAbstraction(nn.Module):
    r"""Summarize each set by K tokens: EM places them, and Gaussian bumps around each say what lies where.

    .. math::
        y_{kj} = \sum_n \phi_j(x_n - \mu_k)\, h_n, \qquad
        \phi_j(d) = \exp\big(-\lVert d - o_j \rVert^2 / s^2\big), \qquad
        t_k = \mathrm{relu}(\mathrm{BN}(W y_k))

    :math:`\mu_k` are the means of the mixture that an :class:`EMOperator` fits to the items' coordinates, and the
    offsets :math:`o_j` are a lattice of ``grid`` places along each axis, ``pitch`` s apart. Without features
    :math:`h_n = 1`: the bumps then count the items, relative to the size of the set. It is a convolution whose
    output lies where the items are. Layers follow that do the same from token to token: residual, of 3 places along
    each axis, ``inner_pitch`` apart. Several abstractions after each other, the last of one component, make a pyramid.

    The result is invariant to the order of the items. Features have gradients, coordinates have none: with
    ``init="learned"``, which is cheap, EM starts from a random template that stays as it is.

    Args:
        num_components: K.
        num_coordinates: D.
        num_features: F, of the items; ``None`` where there are none.
        out_features: of a token.
        pitch: s, in units of the coordinates.
        grid: places along each axis; there are ``grid ** D`` bumps.
        blocks: residual layers from token to token.
        inner_pitch: theirs; ``None`` takes 1.5 ``pitch``.
        **operator: further arguments of :class:`EMOperator`.

    Shape:
        - coordinates: (B, N, D); features: (B, N, F); mask: (B, N), true for items that count.
        - output: the means (B, K, D), and tokens (B, K, ``out_features``).

    Raises:
        ValueError: an argument is out of range, or features are given where none are expected, or lack.

    Example:
        >>> first = EMAbstraction(16, 2, None, 32, pitch=0.2, grid=5)
        >>> second = EMAbstraction(1, 2, 32, 64, pitch=0.5)
        >>> centers, tokens = first(torch.rand(4, 100, 2))
        >>> second(centers, tokens)[1].shape
        torch.Size([4, 1, 64])

    Source: the set abstraction of Qi et al., PointNet++, 2017, with EM in place of farthest points and balls; the
    Gaussian bumps are the kernels of Monti et al., "Geometric deep learning on graphs and manifolds using mixture model
    CNNs", 2017, on a lattice.
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
        for name, value in {"grid": grid, "out_features": out_features}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if blocks < 0:
            raise ValueError(f"blocks={blocks} must not be negative")
        inner_pitch = 1.5 * pitch if inner_pitch is None else inner_pitch
        for name, size in {"pitch": pitch, "inner_pitch": inner_pitch}.items():
            if not size > 0:
                raise ValueError(f"{name}={size} must be positive, in units of the coordinates")
        self.num_features = num_features
        self.out_features = out_features
        self.grid = grid
        self.pitch = pitch
        self.inner_pitch = inner_pitch
        options: dict[str, Any] = {
            "num_iters": 4,
            "init": "learned",
            "covariance": "spherical",
            "residual": False,
            "prior": {"mean_strength": 0.0, "covariance_strength": 1.0},
        }
        self.operator = EMOperator(num_components, num_coordinates, **(options | operator))
        self.operator.requires_grad_(False)
        places = grid**num_coordinates
        self.scale = nn.BatchNorm1d(places) if num_features is None else nn.Identity()
        self.embed = _Layer(places * (num_features or 1), out_features)
        self.blocks = nn.ModuleList(_Block(3**num_coordinates, out_features) for _ in range(blocks))

    def forward(
        self, coordinates: Tensor, features: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the means (B, K, D) and the tokens (B, K, ``out_features``) of sets of items."""
        given = None if features is None else features.shape[-1]
        if given != self.num_features:
            raise ValueError(f"features have {given} columns; the abstraction was made for {self.num_features}")
        with torch.no_grad(), torch.autocast(coordinates.device.type, enabled=False):
            x = coordinates.to(torch.promote_types(coordinates.dtype, torch.float32))
            centers = self.operator(x, mask).means
            size = x.new_tensor(x.shape[1]) if mask is None else mask.sum(1).clamp(min=1)[:, None, None]
            if mask is not None:
                x = torch.where(mask.unsqueeze(-1), x, 0.0)
            if features is None:
                masks = repeat(None) if mask is None else mask.split(_BLOCK)
                blocks = zip(x.split(_BLOCK), centers.split(_BLOCK), masks, strict=False)
                parts = [counts(points, means, self.grid, self.pitch, own) for points, means, own in blocks]
                found = torch.cat(parts) / size
            else:
                outer = bumps(x, centers, self.grid, self.pitch)  # under features of zero where masked
            inner = bumps(centers, centers, 3, self.inner_pitch) if len(self.blocks) else None
        if features is not None:
            valid = features if mask is None else torch.where(mask.unsqueeze(-1), features, 0.0)
            found = _gather(outer, valid)
        tokens = self.embed(self.scale(found.flatten(0, 1)).view_as(found))
        for block in self.blocks:
            tokens = block(tokens, inner)
        return centers.to(coordinates.dtype), tokens


def counts(x: Tensor, centers: Tensor, grid: int, pitch: float, mask: Tensor | None = None) -> Tensor:
    """Return sum_n phi_j(x_n - mu_k) for items (B, N, D), of a mask (B, N), and centers (B, K, D): (B, K, J)."""
    *most, last = _axes(x, centers, grid, pitch)
    if mask is not None:
        last = last * mask[:, None, None]
    product = _product(most) if most else torch.ones_like(last[:, :, :1])
    return (product @ last.mT).flatten(2)


def bumps(x: Tensor, centers: Tensor, grid: int, pitch: float) -> Tensor:
    """Return phi_j(x_n - mu_k) of items (B, N, D) and centers (B, K, D): (B, K, J, N)."""
    return _product(_axes(x, centers, grid, pitch))


def _product(factors: list[Tensor]) -> Tensor:
    """Return the products (B, K, J, N) of one bump of each axis."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product.unsqueeze(3) * factor.unsqueeze(2)).flatten(2, 3)
    return product


def _axes(x: Tensor, centers: Tensor, grid: int, pitch: float) -> list[Tensor]:
    """Return the factors (B, K, grid, N) of the bumps, one for each coordinate."""
    places = torch.arange(grid, device=x.device, dtype=x.dtype) - (grid - 1) / 2
    factors = []
    # One coordinate after the other, as they are used.
    items_of, means_of = ((points / pitch).mT.contiguous().unbind(1) for points in (x, centers))
    for items, means in zip(items_of, means_of, strict=True):
        distance = items[:, None, None] - (means.unsqueeze(-1) + places).unsqueeze(-1)
        factors.append(distance.square_().neg_().clamp_(min=_FARTHEST).exp_())
    return factors


def _gather(kernel: Tensor, features: Tensor) -> Tensor:
    """Return sum_n phi_kjn h_n as (B, K, J F)."""
    return torch.bmm(kernel.flatten(1, 2), features).unflatten(1, kernel.shape[1:3]).flatten(2)


class _Layer(nn.Module):
    """A linear map of tokens, batch normalization, and a ReLU unless it is left out."""

    def __init__(self, in_features: int, out_features: int, relu: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)
        self.norm = nn.BatchNorm1d(out_features)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        return y.relu() if self.relu else y


class _Block(nn.Module):
    """A residual layer: bumps around each token, over the tokens."""

    def __init__(self, bumps: int, width: int) -> None:
        super().__init__()
        self.around = _Layer(bumps * width, width)
        self.mix = _Layer(width, width, relu=False)

    def forward(self, tokens: Tensor, kernel: Tensor) -> Tensor:
        return (tokens + self.mix(self.around(_gather(kernel, tokens)))).relu()
