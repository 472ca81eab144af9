"""vLLM itself, eager and compiled, with requests that are steered and read side by side."""

from __future__ import annotations

import random
from itertools import permutations

import pytest
import torch
from vllm_engine import ESSAY, SIXTEEN, TEXTS, generate, params

pytest.importorskip("vllm")
psutil = pytest.importorskip("psutil")


pytestmark = pytest.mark.engine

SOAK = 1000


@pytest.fixture(autouse=True)
def nothing_is_left_over(request):
    yield
    engine = request.getfixturevalue("engine")
    engine.reset_prefix_cache()
    generate(engine, [[1, 2, 3]], [params(max_tokens=1)])  # the worker learns with the next step who has left
    assert engine.collective_rpc("emovec_counts")[0]["requests"] == 0


def resident():
    """The memory of the engine's processes, in MiB."""
    return sum(child.memory_info().rss for child in psutil.Process().children(recursive=True)) >> 20


def prompts(oracle, count):
    return [oracle.ids(TEXTS[i % len(TEXTS)]) for i in range(count)]


def test_sixteen_configurations_in_one_batch_equal_sixteen_single_runs(engine, oracle):
    ids = prompts(oracle, 16)
    outputs = generate(engine, ids, [params(value, True) for value in SIXTEEN])
    same = [oracle.check(*case) for case in zip(ids, SIXTEEN, outputs, strict=True)]
    assert sum(same) > 0.9 * 12 * 16
    texts = {tuple(output.token_ids) for output in outputs}
    assert len(texts) > 8, "the values do differ in what they do"


def test_an_unsteered_request_is_the_same_whatever_runs_beside_it(engine, oracle):
    ids = prompts(oracle, 4)
    alone = generate(engine, ids, [params()] * 4)
    engine.reset_prefix_cache()
    beside = [oracle.ids(text) for text in TEXTS]
    mixed = generate(engine, [*ids, *beside], [params()] * 4 + [params({"desperate": 0.15})] * 4)
    assert [output.token_ids for output in mixed[:4]] == [output.token_ids for output in alone]
    assert [output.token_ids for output in mixed[4:]] != [output.token_ids for output in alone]
    assert all(output.reading is None for output in mixed)


@pytest.mark.parametrize("length", [63, 64, 65, 128, 150])
def test_prompts_in_chunks(engine, oracle, length):
    """A budget of 64 tokens a step cuts prompts at, before and after their end; each token is steered by its own kind."""
    ids = oracle.ids(ESSAY, chat=False)[:length]
    values = [{"calm": 0.06, "on": "prompt"}, {"calm": 0.06, "on": "generated"}, {"desperate": {"at_most": 0.5}}, None]
    outputs = generate(engine, [ids] * 4, [params(value, {"on": "all"}) for value in values])
    for value, output in zip(values, outputs, strict=True):
        oracle.check(ids, value, output, on="all")


def test_who_may_read_which_block_of_the_prefix_cache(engine, oracle):
    ids = oracle.ids(ESSAY, chat=False)[:100]  # three whole blocks of 32
    engine.reset_prefix_cache()

    def ask(value, prompt=ids, tokens=12):
        (output,) = engine.generate([{"prompt_token_ids": prompt}], [params(value, max_tokens=tokens)], use_tqdm=False)
        oracle.check(prompt, value, output.outputs[0], tokens=tokens)
        return output.num_cached_tokens, list(output.outputs[0].token_ids)

    whole, later = {"calm": 0.08}, {"desperate": 0.08, "on": "generated"}
    assert ask(whole)[0] == 0
    assert ask(None)[0] == 0, "an unsteered request reads no block of a steered one"
    assert ask(whole)[0] == 96, "the same value reads its own"
    assert ask({"calm": 0.09})[0] == 0, "the same concept with another strength is another value"
    assert ask(None)[0] == 96
    cached, written = ask(later, tokens=40)  # fills the fourth block
    assert cached == 96, "steering of generated tokens alone reads the prompt's blocks as they are"
    # the next turn holds what was written under steering, which nobody may read as unsteered text
    turn = [*ids, *written, *oracle.ids(" And then", chat=False), *ids[:20]]
    assert len(written) == 40
    assert ask(None, turn)[0] == 96
    assert ask(later, turn)[0] > 96, "only what has been computed as a prompt since"


def test_the_same_names_with_other_strengths(engine, oracle):
    ids = oracle.ids(TEXTS[0])
    for strength in (0.02, 0.1, -0.1, 0.02):
        (output,) = generate(engine, [ids], [params({"calm": strength}, True)])
        oracle.check(ids, {"calm": strength}, output)


def test_an_abort_leaves_others_as_they_are(engine, oracle):
    core = engine.llm_engine
    cases = [({"calm": 0.05}, TEXTS[0]), ({"desperate": 0.1}, TEXTS[1]), (None, TEXTS[2])]
    for number, (value, text) in enumerate(cases):
        core.add_request(str(number), {"prompt_token_ids": oracle.ids(text)}, params(value, True))
    finished = {}
    for step in range(60):
        for output in core.step():
            if output.finished:
                finished[output.request_id] = output.outputs[0]
        if step == 4:
            core.abort_request(["1"])
        if not core.has_unfinished_requests():
            break
    assert set(finished) == {"0", "2"}
    for number in (0, 2):
        oracle.check(oracle.ids(cases[number][1]), cases[number][0], finished[str(number)])


def test_several_sequences_of_one_prompt(engine, oracle):
    ids = oracle.ids(TEXTS[1])
    (output,) = engine.generate([{"prompt_token_ids": ids}], [params({"calm": 0.05}, True, n=3, temperature=1.0, seed=1)], use_tqdm=False)
    assert len({tuple(one.token_ids) for one in output.outputs}) > 1
    for one in output.outputs:
        assert one.reading.tokens.tolist() == list(one.token_ids)[:-1]
        assert len(one.reading.scores) == len(one.token_ids) - 1


@pytest.mark.parametrize("lengths", [(12, 1, 7, 3, 12, 5), *permutations((2, 4, 7))], ids=str)
def test_requests_finish_in_any_order(engine, oracle, lengths):
    ids = prompts(oracle, len(lengths))
    values = [SIXTEEN[i] for i in (0, 3, 6, 8, 10, 15)][-len(lengths) :]
    outputs = generate(engine, ids, [params(value, max_tokens=length) for value, length in zip(values, lengths, strict=True)])
    for prompt, value, output, length in zip(ids, values, outputs, lengths, strict=True):
        oracle.check(prompt, value, output, tokens=length)


def test_chosen_concepts_profiles_and_chat(engine, oracle):
    ids = oracle.ids(TEXTS[0])
    (output,) = generate(engine, [ids], [params("steady", {"concepts": ["calm", "afraid"]})])
    (whole,) = generate(engine, [ids], [params({"calm": 0.05, "on": "generated"}, True)])
    assert output.token_ids == whole.token_ids
    assert output.reading.names == ("calm", "afraid")
    for name in output.reading.names:
        assert torch.equal(output.reading.of(name), whole.reading.of(name))
    talk = engine.chat([{"role": "user", "content": TEXTS[0]}], params({"calm": 0.05}, True), use_tqdm=False)
    oracle.check(ids, {"calm": 0.05}, talk[0].outputs[0])


def test_a_soak(engine, oracle):
    """Requests of random values, lengths and aborts; then nothing is left over, and a fixed request comes to what it came to before."""
    dice = random.Random(0)
    ids = oracle.ids(TEXTS[0])
    probe = {"calm": 0.05}

    def ask():
        (output,) = generate(engine, [ids], [params(probe, True)])
        oracle.check(ids, probe, output)
        return output.token_ids, output.reading.scores

    tokens, scores = ask()
    core, essay, names = engine.llm_engine, oracle.ids(ESSAY, chat=False), oracle.bank.names
    waiting, running, finished, memory = list(range(SOAK)), set(), 0, 0
    while waiting or running:
        while waiting and len(running) < 32:
            name = str(waiting.pop())
            kind = dice.choice([None, "add", "rule", "gate"])
            a, b = dice.sample(names, 2)
            value = {None: None, "add": {a: 0.05, b: -0.03}, "rule": {a: {"at_most": 1.0}}, "gate": {a: {"add": 0.05, "when": f"{b} > 0"}}}[
                kind
            ]
            if value is not None and dice.random() < 0.5:
                value["on"] = dice.choice(["prompt", "generated"])
            wanted = dice.choice([None, True, {"on": "all"}, {"concepts": [a]}])
            prompt = essay[: dice.randrange(1, 100 if dice.random() < 0.06 else 20)]  # some come in chunks
            core.add_request(name, {"prompt_token_ids": prompt}, params(value, wanted, max_tokens=dice.randrange(1, 9)))
            running.add(name)
        for output in core.step():
            if output.finished:
                running.discard(output.request_id)
                finished += 1
                reading = output.outputs[0].reading
                assert reading is None or bool(reading.scores.isfinite().all())
        if running and dice.random() < 0.1:
            name = dice.choice(sorted(running))
            core.abort_request([name])
            running.discard(name)
        memory = memory or (resident() if len(waiting) < SOAK // 2 else 0)
    assert finished > SOAK // 2
    assert resident() < memory + 64, "MiB, of which half a soak adds nothing"
    again, their_scores = ask()
    assert again == tokens
    assert torch.equal(their_scores, scores)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"emotion_bias": {"clam": 0.1}}, "nearest known: calm"),
        ({"emotion_bias": {"calm": float("nan")}}, "must be from"),
        ({"emotion_bias": {"calm": 1e308}}, "must be from"),
        ({"emotion_bias": "stedy"}, "nearest known: steady"),
        ({"emotion_bias": 3}, "must be an object"),
        ({"emotion_bias": '{"calm": 0.1, "calm": 0.2}'}, "duplicate"),
        ({"emotion_bias": "{" * 60000}, "not JSON"),
        ({"emotion_bias": {"x" * 1_000_000: 0.1}}, "unknown concept"),
        ({"emotion_bias": {f"calm{i}": 0.1 for i in range(10_000)}}, "unknown concept"),
        ({"emotion_bias.calm": 0.1, "emotion_bias": {"calm": 0.1}}, "given twice"),
        ({"emotion_scores": {"concepts": ["clam"]}}, "nearest known: calm"),
        ({"emotion_scores": {"on": "never"}}, "on must be one of"),
        ({"emovec": {"steer": "{}"}}, "the engine's own"),
    ],
    ids=lambda case: str(case)[:40],
)
def test_what_is_refused_is_refused_before_it_reaches_the_engine(engine, extra, said):
    with pytest.raises(ValueError, match=said) as raised:
        generate(engine, [[1, 2, 3]], [params(extra_args=extra)])
    assert len(str(raised.value)) < 1000
