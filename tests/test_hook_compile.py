"""Attached and compiled in either order: the hooks are in the graph while they are there, and not after."""

from __future__ import annotations

import pytest
import tiny
import torch
from streams import assert_close, untouched

from emovec.hook import Hook, attach

torch.set_num_threads(1)

CALM = {"calm": 0.3}
SLOW = pytest.mark.slow
BACKENDS = ["eager", pytest.param("aot_eager", marks=SLOW), pytest.param("inductor", marks=SLOW)]
WAYS = {
    "torch.compile(model)": lambda model, **options: torch.compile(model, **options),
    "model.compile()": lambda model, **options: model.compile(**options) or model,
    "model.forward": lambda model, **options: setattr(model, "forward", torch.compile(model.forward, **options)) or model,
    "model.__call__": lambda model, **options: torch.compile(model.__call__, **options),
    "inner model": lambda model, **options: setattr(model, "model", torch.compile(model.model, **options)) or model,
    "blocks": lambda model, **options: [block.compile(**options) for block in model.model.layers] and model,
}
EVERY_WAY = ["torch.compile(model)", *(pytest.param(way, marks=SLOW) for way in list(WAYS)[1:])]


@pytest.fixture(autouse=True)
def clean():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(call, ids):
    with torch.no_grad():
        return call(input_ids=ids).logits


@pytest.fixture
def expected():
    """Logits without hooks and with, and the scores."""
    model, ids = tiny.model(), tiny.tokens(2, 5)
    plain = run(model, ids)
    with attach(model, tiny.bank(), steer=[CALM, None]) as probe:
        steered = run(model, ids)
    return plain, steered, [reading.scores for reading in probe]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", EVERY_WAY)
def test_compiled_before_and_after(way, backend, expected):
    plain, steered, scores = expected
    model, ids = tiny.fresh(), tiny.tokens(2, 5)
    call = WAYS[way](model, backend=backend)
    torch.testing.assert_close(run(call, ids), plain, rtol=1e-3, atol=1e-3)
    for _ in range(2):
        with attach(model, tiny.bank(), steer=[CALM, None]) as probe:
            for _ in range(2):
                torch.testing.assert_close(run(call, ids), steered, rtol=1e-3, atol=1e-3)
                for reading, known in zip(probe, scores, strict=True):
                    assert_close(reading.scores, known)
        torch.testing.assert_close(run(call, ids), plain, rtol=1e-3, atol=1e-3)
    assert untouched(model)


@SLOW
@pytest.mark.parametrize("way", WAYS)
def test_compiled_while_attached(way, expected):
    plain, steered, scores = expected
    model, ids = tiny.fresh(), tiny.tokens(2, 5)
    with attach(model, tiny.bank(), steer=[CALM, None]) as probe:
        call = WAYS[way](model, backend="aot_eager")
        torch.testing.assert_close(run(call, ids), steered, rtol=1e-3, atol=1e-3)
        for reading, known in zip(probe, scores, strict=True):
            assert_close(reading.scores, known)
    torch.testing.assert_close(run(call, ids), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_whole_model_is_one_graph(backend, expected):
    _, steered, scores = expected
    model, ids = tiny.fresh(), tiny.tokens(2, 5)
    compiled = torch.compile(model.model, fullgraph=True, backend=backend)
    with attach(model, tiny.bank(), steer=[CALM, None]) as probe, torch.no_grad():
        for _ in range(2):
            found = model.lm_head(compiled(input_ids=ids, use_cache=False).last_hidden_state)
            torch.testing.assert_close(found, steered, rtol=1e-3, atol=1e-3)
        for reading, known in zip(probe, scores, strict=True):
            assert_close(reading.scores, known)


@SLOW
def test_shapes_change_without_end_of_recompiling():
    """Steps of a generation share a graph, and so do batches of other sizes once they are seen to change."""
    model, bank = tiny.fresh(), tiny.bank()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    lengths = [(1, 3), (2, 5), (3, 9), (2, 17), (4, 33), (1, 60), (5, 70), (3, 4)]
    with attach(model, bank, steer=CALM) as probe:
        for batch, length in lengths:
            ids = tiny.tokens(batch, length)
            found = run(compiled, ids)
            scores = probe[0].scores
            torch.testing.assert_close(found, run(model, ids), rtol=1e-3, atol=1e-3)
            assert_close(scores, probe[0].scores)
    assert counter.frame_count <= 8


@SLOW
@pytest.mark.parametrize("way", ["torch.compile(model)", "model.compile()", "model.forward"])
def test_generate_with_a_compiled_model(way):
    model, bank = tiny.fresh(), tiny.bank()
    batch = tiny.padded([tiny.tokens(1, 4)[0], tiny.tokens(1, 6)[0]], "left")
    options = {"max_new_tokens": 5, "do_sample": False}
    with attach(tiny.model(), bank, steer=[CALM, None]) as expected:
        out = tiny.model().generate(**batch, **options)
    compiled = WAYS[way](model, backend="eager", dynamic=True)
    with attach(compiled, bank, steer=[CALM, None]) as probe:
        assert torch.equal(compiled.generate(**batch, **options), out)
    for one, other in zip(probe, expected, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert_close(one.scores, other.scores)
    with attach(compiled, bank, steer=[CALM, None]) as probe:
        assert torch.equal(compiled.generate(**batch, **options, cache_implementation="static"), out)
    assert_close(probe[1].scores, expected[1].scores)


@SLOW
def test_blocks_that_turn_out_to_be_elsewhere(monkeypatch, expected):
    """The first pass breaks the graph to lay out; the others do not."""
    _, steered, scores = expected
    monkeypatch.setattr("emovec.hook._place", lambda block: (torch.device("meta"), torch.bfloat16))
    model, ids = tiny.fresh(), tiny.tokens(2, 5)
    compiled = torch.compile(model, backend="eager")
    with attach(model, tiny.bank(), steer=[CALM, None]) as probe:
        for _ in range(3):
            torch.testing.assert_close(run(compiled, ids), steered, rtol=1e-3, atol=1e-3)
            assert_close(probe[1].scores, scores[1])


def test_a_graph_without_the_hook_says_so():
    """Captured beforehand in a way that is not guarded on anything."""
    model, ids = tiny.fresh(), tiny.tokens(2, 5)

    class Captured(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = [inner]
            self.graph = torch.export.export(Bare(inner), (ids,)).module()

        def forward(self, input_ids=None, **_):
            return self.graph(input_ids)

    class Bare(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids):
            return self.inner(input_ids=input_ids, use_cache=False).logits

    captured = Captured(model)
    model.forward = captured.forward
    with attach(model, tiny.bank(), steer=CALM), pytest.raises(RuntimeError, match="hook of decoder block 1 did not run"):
        model(input_ids=ids)


# --- a hook for any module ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_hook_registered_before_compiling(backend):
    bank = tiny.bank()
    module = torch.nn.Linear(tiny.WIDTH, tiny.WIDTH)
    hook = Hook(bank, layer=1, steer=[CALM, None], device="cpu", dtype=torch.float32)
    plain = torch.nn.Linear(tiny.WIDTH, tiny.WIDTH)
    plain.load_state_dict(module.state_dict())
    module.register_forward_hook(hook)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for length in (3, 5, 9):
        x = torch.randn(2, length, tiny.WIDTH)
        with torch.no_grad():
            expected = module(x)
            scores = hook.scores
            found = compiled(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(found[1], plain(x)[1]) or backend == "inductor"
        assert_close(hook.scores, scores)
        assert hook.scores is not scores


def test_hook_lays_out_at_its_first_call():
    module = torch.nn.Linear(tiny.WIDTH, tiny.WIDTH)
    hook = Hook(tiny.bank(), layer=1, steer=CALM)
    module.register_forward_hook(hook)
    compiled = torch.compile(module, backend="eager")
    x = torch.randn(2, 3, tiny.WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))
        assert hook.scores.shape == (2, 3, len(tiny.CONCEPTS))


def test_hook_registered_after_compiling_is_noticed():
    module = torch.nn.Linear(tiny.WIDTH, tiny.WIDTH)
    compiled = torch.compile(module, backend="eager")
    x = torch.randn(2, 3, tiny.WIDTH)
    with torch.no_grad():
        compiled(x)
        hook = Hook(tiny.bank(), layer=1, steer=CALM)
        module.register_forward_hook(hook)
        compiled(x)
    with pytest.raises(RuntimeError, match="the hook has not been called"):
        _ = hook.scores
