"""What to compare a hooked model with: plain hooks that note and change the residual stream, and the reference in fp64."""

from __future__ import annotations

import torch

from emovec import reference
from emovec.models import decoder_layers
from emovec.ops import Operands, Table

CALM = {"calm": 0.3}
RULES = {"afraid": {"at_most": -1.0}, "desperate": "ablate", "calm": {"add": 0.2, "when": "happy > 0"}}
MIXED = [CALM, None, RULES, {"angry": {"set": 2.0}, "on": "generated"}]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


class Streams:
    """Plain hooks that note what each block puts out, call by call; steered by hand if told."""

    def __init__(self, model, change=None):
        self.seen = {}
        self._blocks, self._change = decoder_layers(model), change

    def __enter__(self):
        self._handles = [block.register_forward_hook(self._hook(index)) for index, block in enumerate(self._blocks)]
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()

    def _hook(self, index):
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            self.seen.setdefault(index, []).append(hidden.detach().clone())
            if self._change is not None:
                self._change(index, hidden)

        return hook

    def scores(self, bank, layer, kinds):
        """[batch, columns, K] in fp64, each column against the baseline of its kind."""
        stream = torch.cat(self.seen[layer], 1).double()
        readers = bank[layer].directions if bank[layer].readers is None else bank[layer].readers
        projection = stream @ readers.double().T
        parts = [
            (projection[:, [column]] - bank[layer].baseline(kind).mean.double()) / bank[layer].baseline(kind).std.double()
            for column, kind in enumerate(kinds)
        ]
        return torch.cat(parts, 1)


def by_hand(bank, steering, kind):
    """Steers like ``attach``, with the reference in fp64."""

    def change(index, hidden):
        row = steering.row(bank[index], kind) if index in bank.steer_layers else None
        if row is None:
            return
        layer = bank[index]
        operands = Operands.build(layer.directions, layer.directions, layer.baseline("prompt").mean, layer.baseline("prompt").std)
        table = Table.build([row], operands)
        tokens = hidden.detach().reshape(-1, hidden.shape[-1]).clone()
        reference.apply_(tokens, layer.directions, layer.directions, operands.mean, operands.inv_std, None, None, *table.tensors())
        hidden.detach().copy_(tokens.view_as(hidden))

    return change


def assert_close(found, expected):
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-3)


def untouched(model):
    """Whether no hook, patch or class of ours is left anywhere."""
    hooks = [hook for module in model.modules() for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())]
    ours = [hook for hook in hooks if getattr(hook, "__module__", "").startswith("emovec")]
    classes = [base for module in model.modules() for base in type(module).__mro__ if "_emovec_base" in vars(base)]
    patches = [
        name for module in model.modules() for name, value in vars(module).items() if hasattr(value, "emovec_patch") or "emovec" in name
    ]
    return not ours and not classes and not patches
