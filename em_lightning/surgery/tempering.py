"""Temperatures of a model from outside."""

from __future__ import annotations

from torch import nn

from em_lightning.competition.base import Tempered
from em_lightning.surgery.find import Where, find_modules


def set_temperature(model: nn.Module, temperature: float, where: Where = "*") -> dict[str, Tempered]:
    """Set the temperature of the competitions and activations in a model, and return these by path.

    Args:
        model: any module.
        temperature: T > 0, which divides the energies.
        where: which of them; see :func:`em_lightning.surgery.find_modules`.

    Raises:
        NoMatchError: nothing that is selected has a temperature; the message lists what is there.

    Example:
        >>> from em_lightning.activations import ACTIVATIONS
        >>> list(set_temperature(nn.Sequential(nn.Linear(2, 2), ACTIVATIONS.build("signed")), 0.5))
        ['1']
    """
    found: dict[str, Tempered] = {}
    for site in find_modules(model, Tempered, where):
        if isinstance(site.module, Tempered):
            site.module.temperature = temperature
            found[site.path] = site.module
    return found
