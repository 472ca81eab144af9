"""vLLM with its model cut into two ranks: the same as in one piece, which runs beside it in the same program with another bank."""

from __future__ import annotations

import pytest
import torch
from vllm_engine import CLOSE, EAGER, generate, params, preemptions, started
from vllm_small import SIXTEEN, configured, other_bank, prompts, renamed, saved

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine

TOKENS = 48


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def one(small, tmp_path_factory):
    oracle, options = small
    path = tmp_path_factory.mktemp("other") / "bank.safetensors"
    other_bank(oracle.bank).save(path)
    where = {"layers": list(oracle.bank.read_layers), "steer_layers": list(oracle.bank.steer_layers)}
    with started(**{**options, **configured(path, **where)}, enforce_eager=EAGER) as engine:
        yield engine


@pytest.fixture(scope="module")
def two(small):
    """Without a prefix cache, and with a cache of blocks that eight long requests do not fit into."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # by default each rank wants a NUMA node
        options = {"tensor_parallel_size": 2, "enable_prefix_caching": False, "num_gpu_blocks_override": 20}
        with started(**small[1], **options, enforce_eager=EAGER, disable_log_stats=False) as engine:
            yield engine


def test_two_ranks_do_what_one_does(small, one, two):
    oracle = small[0]
    ids = prompts(16)
    outputs = generate(two, ids, [params(value, {"on": "all"}) for value in SIXTEEN])
    same = [oracle.check(*case, on="all") for case in zip(ids, SIXTEEN, outputs, strict=True)]
    assert sum(same) > 0.9 * 12 * 16
    alone = generate(one, ids, [params(renamed(value), {"on": "all"}) for value in SIXTEEN])
    for mine, theirs in zip(outputs, alone, strict=True):
        assert mine.token_ids == theirs.token_ids
        torch.testing.assert_close(mine.reading.scores, theirs.reading.scores, **CLOSE)
    counts = two.collective_rpc("emovec_counts")
    assert counts == [counts[0]] * 2


def test_each_of_two_engines_in_a_program_has_its_own_bank(small, one, two):
    names = small[0].bank.names
    for engine, expected in ((one, tuple(f"x{name}" for name in names)), (two, names), (one, tuple(f"x{name}" for name in names))):
        (output,) = generate(engine, prompts(1), [params(scores=True)])
        assert output.reading.names == expected
    with pytest.raises(ValueError, match="nearest known: xcalm"):
        generate(one, prompts(1), [params({"calm": 0.1})])


def test_ranks_that_preempt(small, two):
    oracle, before = small[0], preemptions(two)
    ids, values = prompts(8, 40), SIXTEEN[5:13]
    outputs = generate(two, ids, [params(value, {"on": "all"}, max_tokens=TOKENS) for value in values])
    assert preemptions(two) > before, "the cache was large enough: this shows nothing"
    same = [oracle.check(*case, on="all", tokens=TOKENS) for case in zip(ids, values, outputs, strict=True)]
    assert sum(same) > 0.75 * 8 * TOKENS


def test_a_pipeline_is_refused_at_start(small):
    with pytest.raises(ValueError, match="pipeline parallelism"), started(**small[1], pipeline_parallel_size=2):
        pass
