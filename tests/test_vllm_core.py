"""The engine core's side on a scheduler that does nothing."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm")

from emovec.engines.vllm import core, guard
from emovec.engines.vllm.config import Config
from emovec.engines.vllm.requests import ADMITTED
from emovec.engines.vllm.runner import WATCHED
from emovec.engines.vllm.scores import Chunk

pytestmark = pytest.mark.engine


class Scheduler:
    def __init__(self, request):
        self.requests = {request.request_id: request}

    def add_request(self, request):
        pass

    def schedule(self):
        pass

    def update_from_output(self, scheduled, result):
        return {}

    def finish_requests(self, name, status):
        del self.requests[name]


def test_an_audit_on_a_full_disk_does_not_end_the_engine(bank):
    given = [guard.packed(watched) for watched in guard.parse([{"of": "calm", "above": 1, "hold": 1}], bank)]
    params = SimpleNamespace(extra_args={ADMITTED: {"guard": given}})
    request = SimpleNamespace(request_id="one", client_index=0, num_prompt_tokens=1, sampling_params=params)
    ours = core._Core(Scheduler(request), Config(bank, (2,), (1,), audit="/dev/full"))
    result = SimpleNamespace(**{WATCHED: {"one": Chunk(1, np.array([[9.0]], np.float32))}})
    (output,) = ours.update_from_output(None, result)[0].outputs
    assert output.stop_reason == "emotion_guard: calm"
    assert output.kv_transfer_params[ADMITTED]["events"][0]["value"] == 9
