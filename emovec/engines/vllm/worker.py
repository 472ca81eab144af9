"""The worker's side: the model is hooked once it is loaded and before it is compiled, and proved once it is warm."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

from emovec.engines.vllm import config, selfcheck
from emovec.engines.vllm.runner import Runner
from emovec.engines.vllm.seams import after

logger = init_logger("vllm.emovec")


def install(worker: Any) -> None:
    """Take part in a worker's start."""
    loaded = config.load(worker.vllm_config)
    assert loaded is not None

    def hook(_: None, *args: Any, **kwargs: Any) -> None:
        worker.emovec = Runner(worker.model_runner, loaded)

    def prove(_: Any, *args: Any, **kwargs: Any) -> None:
        selfcheck.check(worker.emovec, worker.model_runner)
        worker.emovec.install()
        where = f"reads layers {list(loaded.layers)}, steers layers {list(loaded.steer_layers)}"
        logger.info("emovec: %d concepts, %s; proved with a pass at each", len(loaded.bank.names), where)

    worker.emovec_counts = lambda: worker.emovec.counts()  # for collective_rpc
    after(worker, "load_model", hook)
    after(worker, "compile_or_warm_up_model", prove)
