import os

import pytest
import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))  # the bars are for two threads


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
