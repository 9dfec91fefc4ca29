"""Activations at any shape, dtype and magnitude, against plain Python, and decimals where energies nearly cancel."""

import math
from decimal import Decimal, localcontext

import drawing
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from em_lightning import ACTIVATIONS
from em_lightning.activations import SignedActivation


def shares(logits):
    """Return softmax of numbers by the definition."""
    top = max(logits)
    powers = [math.exp(z - top) for z in logits]
    return [power / math.fsum(powers) for power in powers]


def log_total(logits):
    top = max(logits)
    return top + math.log(math.fsum(math.exp(z - top) for z in logits))


def on_simplex(logits):
    """Return the nearest point of the simplex, by a search through every size of the support."""
    logits = [z - max(logits) for z in logits]
    ordered = sorted(logits, reverse=True)
    for size in range(len(logits), 0, -1):
        threshold = (math.fsum(ordered[:size]) - 1.0) / size
        if ordered[size - 1] > threshold:
            return [max(z - threshold, 0.0) for z in logits]
    raise AssertionError(logits)


def direction(row, t):
    norm = math.hypot(*row)
    return [norm * r for r in shares([z / norm / t for z in row])] if norm else [0.0] * len(row)


def in_groups(row, t):
    pairs = [row[i : i + 2] for i in range(0, len(row), 2)]
    return [z * r for pair in pairs for z, r in zip(pair, shares([z / t for z in pair]), strict=True)]


def gate(z, t):
    return 1 / (1 + math.exp(-z / t)) if z > -700 * t else 0.0


# Reference outputs, as functions of the units of an item and T.
FORMULAS = {
    "neg_log_softmin": lambda row, t: [z + t * log_total([-z / t for z in row]) for z in row],
    "log_softmax": lambda row, t: [z / t - log_total([z / t for z in row]) for z in row],
    "softmax_gated": lambda row, t: [z * r for z, r in zip(row, shares([z / t for z in row]), strict=True)],
    "relu_gated": lambda row, t: [max(z, 0.0) * r for z, r in zip(row, shares([z / t for z in row]), strict=True)],
    "residual_softmax": lambda row, t: [z + r for z, r in zip(row, shares([z / t for z in row]), strict=True)],
    "grouped": in_groups,
    "sparsemin": lambda row, t: on_simplex([-z / t for z in row]),
    "direction": direction,
    "signed": lambda row, t: [math.tanh(z / t) for z in row],
    "gated": lambda row, t: [z * gate(z, t) for z in row],
}


def slack_of(key, row, t, units):
    """Return the error of each unit caused by rounding z / T, in units of eps."""
    reach = max(abs(z) for z in row)
    if key == "neg_log_softmin":
        return [reach + t * (1 + math.log(units))] * units
    if key == "log_softmax":
        return [reach / t + 1 + math.log(units)] * units
    if key in ("signed", "sparsemin"):
        return [1.0 + (reach / t if key == "sparsemin" else 0.0)] * units
    if key == "direction":
        return [math.hypot(*row) * (1 + 1 / t)] * units
    return [abs(z) * (2 + reach / t) + (reach / t if key == "residual_softmax" else 0.0) for z in row]


@pytest.mark.parametrize("key", list(ACTIVATIONS))
@given(values=st.data())
def test_activations_of_any_input(key, values):
    dtype = values.draw(st.sampled_from(drawing.DTYPES))
    items, units = values.draw(st.integers(0, 3)), values.draw(st.integers(1, 5))
    temperature = 10.0 ** values.draw(st.integers(-3, 3))
    axis = values.draw(st.sampled_from((-1, 1, 0)))
    activation = ACTIVATIONS.build(key, temperature=temperature, dim=axis)
    rows = values.draw(drawing.tensors((items, units), dtype))
    if values.draw(st.booleans()):
        activation = ACTIVATIONS.build(key, temperature=temperature, dim=axis, learnable=True).to(dtype)
    z = (rows if axis else rows.T.contiguous()).requires_grad_()
    y = activation(z)
    assert y.shape == z.shape and y.dtype == dtype
    (slope,) = torch.autograd.grad(y.float().sum() if y.dtype != torch.float64 else y.sum(), z)
    found, slopes = (part.detach().double() if axis else part.detach().double().T for part in (y, slope))
    info, inner = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
    for row, own, steep in zip(rows.detach().double().tolist(), found.tolist(), slopes.tolist(), strict=True):
        reach = max(abs(z) for z in row)
        if reach / temperature > 0.1 * inner.max:
            continue  # documented: z / T lies in the range of the dtype
        for value, expected, slack in zip(
            own, FORMULAS[key](row, temperature), slack_of(key, row, temperature, units), strict=True
        ):
            if abs(expected) > 0.9 * info.max or slack > 0.1 * inner.max:
                assert not math.isnan(value)
                continue
            # A responsibility below the smallest number is zero.
            lost = 64 * info.smallest_normal + reach * inner.smallest_normal
            allowed = 32 * inner.eps * slack + info.eps * abs(expected) + lost
            assert abs(value - expected) <= allowed, (value, expected, allowed)
        assert all(map(math.isfinite, steep)) or dtype == torch.float16 and not any(map(math.isnan, steep)), steep


# Decimals of a hundred digits: the difference of two energies is much smaller than both.
ENERGIES = {
    "gaussian": lambda z: z**2 / 2,
    "laplace": abs,
    "logistic": lambda z: (1 + (-abs(z)).exp()).ln() + max(-z, 0),
    "student_t": lambda z: (1 + z**2).ln(),
    "huber": lambda z: z**2 / 2 if abs(z) <= 1 else abs(z) - Decimal("0.5"),
    "pseudo_huber": lambda z: (1 + z**2).sqrt() - 1,
}


def tangent(x):
    power = (-2 * abs(x)).exp()
    return float(((1 - power) / (1 + power)).copy_sign(x))


@pytest.mark.parametrize("kernel", ENERGIES)
@given(values=st.data())
def test_signed_activations_of_any_kernel(kernel, values):
    dtype = values.draw(st.sampled_from(drawing.DTYPES))
    margin, temperature = (10.0 ** values.draw(st.integers(-2, 2)) for _ in range(2))
    z = values.draw(drawing.tensors((values.draw(st.integers(0, 2)),), dtype)).requires_grad_()
    y = SignedActivation(kernel, margin=margin, temperature=temperature)(z)
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    with localcontext() as context:
        context.prec = 100
        for number, value in zip(z.tolist(), y.tolist(), strict=True):
            low, high = (ENERGIES[kernel](Decimal(number) + side * Decimal(margin)) for side in (1, -1))
            expected = tangent((low - high) / (2 * Decimal(temperature)))
            # Error of the difference caused by rounding z, and for the logistic kernel its softplus.
            slack = 64 * eps * (1 + (1 + margin + abs(number)) / temperature * (abs(number) < 1e3 * (1 + margin)))
            assert abs(value - expected) <= slack + torch.finfo(dtype).eps, (number, value, expected)
            assert -1 <= value <= 1
    (slope,) = torch.autograd.grad(y.float().sum(), z)
    assert slope.isfinite().all() or (dtype == torch.float16 and not slope.isnan().any()), (z, slope)
