"""What the tests of the vLLM plugin share that need no vLLM: a bank, the plugin's configuration, and its check of requests."""

from __future__ import annotations

import pytest
import torch
from banks import make_bank

from emovec.engines.vllm import config
from emovec.engines.vllm.requests import Admission


@pytest.fixture
def bank():
    return make_bank()


@pytest.fixture
def settings(bank):
    return config.Config(bank, (2, 4), (1, 2), {"steady": {"calm": 0.1, "on": "generated"}})


@pytest.fixture
def admission(settings):
    return Admission(settings, torch.float32)
