"""Checks of constructor arguments."""

from __future__ import annotations

from collections.abc import Sequence


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless a value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose from {', '.join(map(repr, choices))}")


def check_at_least(least: float, **values: float) -> None:
    """Raise ValueError for an argument below ``least``, or NaN."""
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{name}={value} must be at least {least}")


def check_positive(**values: float) -> None:
    """Raise ValueError for an argument that is not above 0, or NaN."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}={value} must be positive")
