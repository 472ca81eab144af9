"""Several processes under ``torchrun``, each with a copy of the model: who does which batch, and how the sums come together.

They talk through gloo whatever the device: the sums are small, and two processes may then share a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


_group: Any = None


def join() -> None:
    """Join the group that ``torchrun`` describes in the environment, unless there is none or it was joined already."""
    global _group
    if dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    if _group is None and world() > 1 and dist.get_backend() != "gloo":
        _group = dist.new_group(backend="gloo")


def device() -> torch.device | None:
    """The GPU that is this process's share under ``torchrun``; None: whichever is the default."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if world() == 1 or not torch.cuda.is_available():
        return None
    return torch.device("cuda", local % torch.cuda.device_count())


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(items: Iterable[T]) -> Iterator[T]:
    """Every ``world()``-th of ``items``, from this rank's on."""
    return islice(items, rank(), None, world())


def add(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` over all ranks, on each of them."""
    if world() == 1:
        return tensor
    total = tensor.cpu().clone()  # not in place: what was made in inference mode cannot be changed outside it
    dist.all_reduce(total, group=_group)
    return total.to(tensor.device)


def gather(value: Any) -> list[Any]:
    """``value`` of each rank."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value, group=_group)
    return values
