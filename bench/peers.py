"""One vector added to everything that a module puts out: by our hook, and by those of the packages `steering-vectors` and `repeng`.

Both refuse the transformers or numpy that we run with, so `make bench` installs them without their dependencies. All of repeng does not
import with numpy 2, but the module that steers does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from emovec.bank_layer import BankLayer
from emovec.hook import Hook

PACKAGES = ("steering-vectors", "repeng")


def versions() -> dict[str, str]:
    """Raises PackageNotFoundError if one is not installed."""
    return {name: metadata.version(name) for name in PACKAGES}


def adders(vector: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name, what returns activations [1, N, d] plus ``vector`` [d], in its dtype."""
    return {"emovec's hook": ours(vector), "steering-vectors": steering_vectors(vector), "repeng": repeng(vector)}


def ours(vector: Tensor) -> nn.Module:
    layer = replace(BankLayer.from_directions(vector[None], ["v"]), residual_norm=float(vector.double().norm()))
    block = nn.Identity()
    block.register_forward_hook(Hook(layer, steer={"v": 1.0}, read=False, device=vector.device, dtype=vector.dtype))
    return block


def steering_vectors(vector: Tensor) -> nn.Module:
    from steering_vectors import SteeringVector

    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Identity()])})
    SteeringVector({0: vector}).patch_activations(model, {"decoder_block": "layers.{num}"})
    block: nn.Module = model["layers"][0]  # type: ignore[index]
    return block


def repeng(vector: Tensor) -> nn.Module:
    package = find_spec("repeng")
    assert package is not None
    assert package.submodule_search_locations
    spec = spec_from_file_location("repeng_control", Path(package.submodule_search_locations[0], "control.py"))
    assert spec is not None
    assert spec.loader is not None
    control: Any = module_from_spec(spec)
    spec.loader.exec_module(control)
    block: Any = control.ControlModule(nn.Identity())
    block.set_control(control.BlockControlParams(vector))
    added: nn.Module = block
    return added
