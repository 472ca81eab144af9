"""An extraction that is killed goes on from its last checkpoint; several processes share the work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import plain_extraction as plain
import pytest
import tiny
import torch
from safetensors.torch import save_file
from test_extraction import close

from emovec.bank import Bank, load_bank
from emovec.extraction import StateError, extract
from emovec.extraction.blocks import Blocks

CORPUS = plain.Corpus((6, 7, 8))


def bank(corpus: plain.Corpus = CORPUS, model: Any = None, **options: Any) -> Bank:
    options = {"skip": 8, "batch_tokens": 60, "progress": False, **options}
    return extract(model or tiny.model(), plain.tokenizer(), *corpus.sources, **options)


class Stop(Exception):  # noqa: N818
    pass


@pytest.fixture
def stopped_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Checkpoints after every batch, and an error in the pass after ``passes``."""

    def stop(passes: int) -> None:
        run, count = Blocks.run, iter(range(passes))

        def limited(self: Blocks, batch: Any) -> None:
            if next(count, None) is None:
                monkeypatch.setattr(Blocks, "run", run)
                raise Stop
            run(self, batch)

        monkeypatch.setattr(Blocks, "run", limited)

    monkeypatch.setattr("emovec.extraction.run.CHECKPOINT_SECONDS", 0.0)
    return stop


def passes_of(monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """Forward passes that an extraction takes."""
    run, count = Blocks.run, 0

    def counted(self: Blocks, batch: Any) -> None:
        nonlocal count
        count += 1
        run(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Blocks, "run", counted)
        bank(**options)
    return count


@pytest.mark.parametrize("passes", [0, 1, 5, 9, 14])
def test_a_resumed_extraction_gives_the_same_bank_bit_for_bit(tmp_path: Path, stopped_after: Any, passes: int) -> None:
    stopped_after(passes)
    with pytest.raises(Stop):
        bank(resume=tmp_path / "state", out=tmp_path / "bank")
    assert not (tmp_path / "bank").exists()
    assert bank(resume=tmp_path / "state", out=tmp_path / "bank") == bank()
    assert [file.name for file in tmp_path.iterdir()] == ["bank"], "the state goes once the bank is there"


def test_a_resumed_extraction_does_not_start_anew(tmp_path: Path, stopped_after: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = passes_of(monkeypatch)
    stopped_after(5)
    with pytest.raises(Stop):
        bank(resume=tmp_path / "state")
    assert passes_of(monkeypatch, resume=tmp_path / "state") == everything - 5


def test_without_a_file_for_the_bank_the_state_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bank(resume=tmp_path / "state")
    stories = passes_of(monkeypatch) - passes_of(monkeypatch, resume=tmp_path / "state")
    assert stories > 5, "only the passes over neutral and ordinary text are left to do"
    assert bank(resume=tmp_path / "state") == first


WORKER = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
import torch
torch.set_num_threads({threads})
import test_extraction_resume as here
from emovec.extraction import run
from emovec.extraction.blocks import Blocks
kill_after, options = {kill_after}, {options!r}
run.CHECKPOINT_SECONDS = 0.0
forward, done = Blocks.run, 0
def killing(self, batch):
    global done
    if done == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)
    done += 1
    forward(self, batch)
Blocks.run = killing
here.bank(**options)
"""


def worker(options: dict[str, str], *, kill_after: int = -1) -> str:
    tests = str(Path(__file__).parent)
    return WORKER.format(tests=tests, threads=torch.get_num_threads(), kill_after=kill_after, options=options)


def test_after_a_real_kill(tmp_path: Path) -> None:
    options = {"resume": str(tmp_path / "state"), "out": str(tmp_path / "bank")}
    killed = subprocess.run([sys.executable, "-c", worker(options, kill_after=7)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "state").exists()
    assert not (tmp_path / "bank").exists()
    assert bank(**options) == bank() == load_bank(tmp_path / "bank")


@pytest.mark.slow
def test_two_processes_give_the_same_bank_to_rounding(tmp_path: Path) -> None:
    """As ``torchrun`` starts them; killed in the middle and started again."""
    (tmp_path / "worker.py").write_text(worker({"resume": str(tmp_path / "state"), "out": str(tmp_path / "bank")}))
    (tmp_path / "killed.py").write_text(worker({"resume": str(tmp_path / "state"), "out": str(tmp_path / "bank")}, kill_after=3))
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([*start, str(tmp_path / "killed.py")], capture_output=True, text=True, env=environment)
    assert killed.returncode != 0
    assert {"state.0", "state.1"} & {file.name for file in tmp_path.iterdir()}
    assert not (tmp_path / "bank").exists()
    done = subprocess.run([*start, str(tmp_path / "worker.py")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    close(load_bank(tmp_path / "bank"), bank(), tolerance=1e-4)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith("state")]


# --- states that are not this extraction's --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"corpus": plain.Corpus((6, 7, 8), seed=1)}, "corpus: the file's is"),
        ({"skip": 9}, "recipe.skip: the file's is 8, this one's is 9. Remove it"),
        ({"layers": [1]}, r"layers: the file's is \[0, 1, 2, 3\], this one's is \[1\]"),
        ({"batch_tokens": 61}, "batch_tokens: the file's is 60, this one's is 61"),
        ({"model": tiny.fresh("mistral")}, "model: the file's is"),
        ({"model": tiny.fresh().double()}, "dtype: the file's is 'torch.float32', this one's is 'torch.float64'"),
        ({"names": ["emotion 2", "emotion 0", "emotion 1"]}, "names: the file's is"),
    ],
)
def test_the_state_of_another_extraction_is_refused(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    bank(resume=tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    with pytest.raises(StateError, match=f"state of another extraction, which cannot be continued here. {message}"):
        bank(resume=tmp_path / "state", out=tmp_path / "bank", **other)
    assert (tmp_path / "state").read_bytes() == before
    assert not (tmp_path / "bank").exists()


def test_a_state_serves_whatever_is_made_of_its_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other: dict[str, Any] = {"shrinkage": 0.9, "level": False, "denoise": "dialogues", "variance": 0.2}
    whole, expected = passes_of(monkeypatch, **other), bank(**other)
    bank(resume=tmp_path / "state")
    assert passes_of(monkeypatch, resume=tmp_path / "state", **other) < whole
    assert bank(resume=tmp_path / "state", **other) == expected


@pytest.mark.parametrize("content", [b"", b"rubbish" * 100, None])
def test_a_file_that_is_not_a_state(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "state"
    if content is None:
        save_file({"a": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(StateError, match="state: not the state of an extraction"):
        bank(resume=path)
    assert path.read_bytes() == before
