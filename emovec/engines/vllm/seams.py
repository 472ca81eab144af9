"""Where the plugin meets vLLM: four constructors that see the configuration. The rest is hung on to what they make.

Without emovec's configuration each costs one look-up when the engine is built; nothing of a request or a step is touched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from emovec.engines.vllm.config import SUPPORTED, check, wanted

_registered = False


def register() -> None:
    """Called by vLLM in every process, maybe more than once."""
    global _registered
    if _registered:
        return
    _registered = True
    import vllm
    from vllm.config import VllmConfig

    version = vllm.__version__.split("+")[0]
    after(VllmConfig, "__post_init__", lambda _, config, *args, **kwargs: check(config, version) if complete(config) else None)
    if version not in SUPPORTED:
        return  # with the configuration it is refused; without, there is nothing to do

    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.worker_base import WorkerBase

    after(InputProcessor, "__init__", _front)
    after(Scheduler, "__init__", _core)
    after(WorkerBase, "__init__", _worker)


def complete(config: Any) -> bool:
    """Whether a configuration is for emovec, and of a whole engine."""
    return wanted(config) and config.model_config is not None


def after(owner: Any, name: str, then: Callable[..., None], *, first: bool = False) -> None:
    """Have ``owner.name`` be followed (or preceded) by ``then`` with its result (or None) and its arguments.

    owner: an object; or a class, whose methods have ``self`` among their arguments.
    """
    original = getattr(owner, name)

    @functools.wraps(original)
    def both(*args: Any, **kwargs: Any) -> Any:
        if first:
            then(None, *args, **kwargs)
            return original(*args, **kwargs)
        result = original(*args, **kwargs)
        then(result, *args, **kwargs)
        return result

    setattr(owner, name, both)


def _front(_: None, processor: Any, *args: Any, **kwargs: Any) -> None:
    if wanted(processor.vllm_config):
        from emovec.engines.vllm import front

        front.install(processor)


def _core(_: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    if wanted(scheduler.vllm_config):
        from emovec.engines.vllm import core

        core.install(scheduler)


def _worker(_: None, worker: Any, *args: Any, **kwargs: Any) -> None:
    if wanted(worker.vllm_config):
        from emovec.engines.vllm import worker as ours

        ours.install(worker)
