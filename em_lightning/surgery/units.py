"""Which axis holds the units of a site, and how many there are: read off the layers around it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from em_lightning.surgery.find import Site

_CHANNELS_FIRST = (_ConvNd, _NormBase, nn.GroupNorm)


def num_units(module: nn.Module) -> int | None:
    """Return the width of what a layer puts out, None where its type does not tell."""
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    for name in ("out_features", "out_channels", "num_features", "num_channels", "embedding_dim", "embed_dim"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return None


def axis_of(site: Site, dim: int | str) -> int:
    """Return the axis of a site's units: ``dim``, or what the layers around it tell where that is "auto"."""
    return units_of(site)[1] if dim == "auto" else int(dim)


def units_of(site: Site) -> tuple[int | None, int]:
    """Return the number of units of a site's output and the axis they are on.

    The layer itself tells or, for an activation or a container, the last layer in it or before it that does; failing
    that the first one behind it. A convolution and the norms of its kind have units on axis 1, all others on the last.
    """
    inside = [module for module in site.module.modules() if num_units(module) is not None]
    if num_units(site.module) is not None:
        inside = [site.module]
    for owner in reversed(site.ancestors) if not inside else ():
        before: list[nn.Module] = []
        behind: list[nn.Module] = []
        side = before
        for module in (m for child in owner._modules.values() if child is not None for m in child.modules()):
            if module is site.module:
                side = behind
            elif num_units(module) is not None:
                side.append(module)
        inside = before or behind[:1]
        if inside:
            break
    if not inside:
        return None, -1
    return num_units(inside[-1]), 1 if isinstance(inside[-1], _CHANNELS_FIRST) else -1
