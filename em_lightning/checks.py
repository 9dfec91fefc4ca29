"""Checks of arguments, which raise errors that name the argument, its value and the rule, and of torch.export."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch

# Whether torch.export traces the code, which must not read sizes then: they may be dynamic. PyTorch 2.6 has only
# is_compiling, which is true under torch.compile too.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError unless a value is one of the choices."""
    known = list(choices)
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, known))}")


def check_at_least(least: float, **values: float) -> None:
    """Raise ValueError if an argument is NaN or less than ``least``."""
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{name}={value} must be at least {least}")


def check_counts(least: int, **values: Any) -> None:
    """Raise TypeError if an argument is no integer, ValueError if it is less than ``least``."""
    for name, value in values.items():
        if not isinstance(value, numbers.Integral):
            raise TypeError(f"{name}={value!r} must be an int")
        check_at_least(least, **{name: int(value)})


def check_positive(**values: float) -> None:
    """Raise ValueError if an argument is NaN or not positive; infinity is allowed."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}={value} must be positive")


def positive_number(name: str, value: Any) -> float:
    """Return ``value`` as a float; raise ValueError unless it is a positive, finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{name}={value!r} must be a positive, finite number")
    return number
