"""Fixtures and settings of all tests: one thread, a fixed seed, hypothesis profiles."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# No deadlines, since machines may be busy. CI runs the same examples every time, the nightly run new ones.
settings.register_profile(
    "ci", max_examples=200, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "nightly", max_examples=5000, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
