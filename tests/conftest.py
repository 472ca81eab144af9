"""What the tests of the vLLM plugin share: a bank, the plugin's configuration, its check of requests; engines, and what they should do."""

from __future__ import annotations

import pytest
import torch
from banks import make_bank

from emovec.engines.vllm import config
from emovec.engines.vllm.requests import Admission

BLOCKS = 40  # of 32 tokens


@pytest.fixture(scope="session")
def oracle():
    from vllm_engine import Oracle

    return Oracle()


@pytest.fixture(scope="session")
def audit(tmp_path_factory):
    return tmp_path_factory.mktemp("audit") / "events.jsonl"


@pytest.fixture(scope="session", params=["eager", "compiled"])
def engine(request, audit, tmp_path_factory):
    """An engine takes half a minute to start, compiled two: the files of tests share these. Its cache is small enough to preempt."""
    from vllm_engine import NAME, profiles, started

    path = profiles(tmp_path_factory.mktemp("profiles") / "profiles.toml", {"steady": {"calm": 0.05, "on": '"generated"'}})
    config = {"emovec": {"bank": NAME, "profiles": path, "audit": str(audit)}}
    options = {"num_gpu_blocks_override": BLOCKS, "disable_log_stats": False}
    with started(enforce_eager=request.param == "eager", additional_config=config, **options) as engine:
        yield engine


@pytest.fixture
def bank():
    return make_bank()


@pytest.fixture
def settings(bank):
    return config.Config(bank, (2, 4), (1, 2), {"steady": {"calm": 0.1, "on": "generated"}})


@pytest.fixture
def admission(settings):
    return Admission(settings, torch.float32)
