"""A pass without the head: which layer is shown, and models whose layers lie in several places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plain_extraction as plain
import pytest
import tiny
import torch
import transformers
from torch import Tensor

from emovec.extraction import extract
from emovec.extraction.blocks import Blocks
from emovec.extraction.tokens import Batch, Tokens


def batch() -> Batch:
    return Batch.of([Tokens(row.tolist(), [0] * len(row)) for row in (tiny.tokens(1, 9)[0], tiny.tokens(1, 5, seed=1)[0])])


def shown(blocks: Blocks, what: Batch) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    with blocks.shown_to(lambda layer, hidden: found.update({layer: hidden.clone()})):
        blocks.run(what)
    return found


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_layer_l_is_the_output_of_block_l(family: str) -> None:
    model = tiny.model(family)
    what = batch()
    with torch.no_grad():
        states = model(input_ids=what.ids, attention_mask=what.mask, output_hidden_states=True).hidden_states
    states = states[: tiny.LAYERS - 1] if family == "mamba" else states[1:-1]  # mamba's do not begin with the embeddings
    found = shown(Blocks(model), what)
    assert sorted(found) == list(range(tiny.LAYERS))
    for layer, state in enumerate(states):
        for row, length in enumerate((9, 5)):
            torch.testing.assert_close(found[layer][row, :length], state[row, :length], rtol=1e-4, atol=1e-4)


def test_hooks_go_also_after_an_error() -> None:
    model = tiny.model()
    blocks = Blocks(model, [2, 1, 2])
    assert blocks.layers == (1, 2)

    def fails(layer: int, hidden: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), blocks.shown_to(fails):
        blocks.run(batch())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_head_is_not_computed() -> None:
    model = tiny.fresh()
    called: list[object] = []
    model.lm_head.register_forward_hook(lambda *args: called.append(args))
    shown(Blocks(model), batch())
    assert not called


def test_a_compiled_model_is_looked_into() -> None:
    model = tiny.model()
    found, expected = (shown(Blocks(which), batch()) for which in (torch.compile(model), model))
    assert all(torch.equal(found[layer], expected[layer]) for layer in expected)


def test_outputs_that_are_not_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.fresh()
    monkeypatch.setattr(model.model.layers[1], "forward", lambda *args, **options: {"hidden": 1})
    with pytest.raises(TypeError, match="the output of layer 1, a LlamaDecoderLayer, is not a tensor"):
        shown(Blocks(model, [1]), batch())


def test_layers_in_several_places(tmp_path: Path) -> None:
    """Half the blocks are offloaded to disk, where weights have no device and are fetched when their block runs."""
    tiny.fresh().save_pretrained(tmp_path / "model")
    places: dict[str, Any] = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{layer}": "cpu" if layer % 2 else "disk" for layer in range(tiny.LAYERS)}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "disk"))
    assert next(model.model.layers[0].parameters()).device.type == "meta"
    options: dict[str, Any] = {"skip": 8, "progress": False}
    found = extract(model.eval(), plain.tokenizer(), *plain.Corpus().sources, **options)
    expected = extract(tiny.model(), plain.tokenizer(), *plain.Corpus().sources, **options)
    assert list(found.values()) == list(expected.values())
