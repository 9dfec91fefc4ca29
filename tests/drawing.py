"""Hypothesis strategies: tensors of any dtype and magnitude, with zeros, ties and extremes; masks and weights."""

import torch
from hypothesis import strategies as st

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDE = DTYPES[:2]


@st.composite
def tensors(draw, shape, dtype=torch.float64, least=-30, most=30):
    """Draw a finite tensor: of one magnitude from 10^least to 10^most, of mixed magnitudes, or with ties."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    kind = draw(st.sampled_from(("normal", "mixed", "ties", "constant", "zeros", "offset")))
    size = 10.0 ** draw(st.integers(least, most))
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "mixed":
        power = torch.randint(least, most + 1, noise.shape, generator=generator)
        noise = noise.sign() * 10.0 ** power.double()
    elif kind == "ties":
        noise = noise.round() * size
    elif kind == "constant":
        noise = torch.full_like(noise, size)
    elif kind == "offset":
        noise = size + noise * min(size, 1.0)
    else:
        noise = noise * (size if kind == "normal" else 0.0)
    limit = torch.finfo(dtype).max
    return noise.clamp(-limit, limit).to(dtype)


@st.composite
def holes(draw, shape):
    """Draw None, or a mask with some or all entries false."""
    kind = draw(st.sampled_from(("none", "some", "all")))
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return torch.rand(shape, generator=generator) < (0.6 if kind == "some" else 0.0)


@st.composite
def counts(draw, shape, dtype=torch.float64):
    """Draw None, or weights: some zero, all zero, or all small."""
    kind = draw(st.sampled_from(("none", "some", "zero", "tiny")))
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    numbers = torch.rand(shape, generator=generator, dtype=torch.float64) * 3
    scale = {"some": (numbers > 1).double(), "zero": 0.0, "tiny": 1e-6}[kind]
    return (numbers * scale).to(dtype)
