"""What every test stands on: one thread, a fixed seed, and no state left behind."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
