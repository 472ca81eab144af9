"""The command line: what it prints, its exit codes, and that no mistake of a user ends in a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import tokenizers
import torch
import transformers
from banks import NAMES, make_bank
from typer.testing import CliRunner

from emovec import Bank, load_bank
from emovec.cli import app as application
from emovec.cli import common
from emovec.cli.read import inner
from emovec.monitor import Reading


def emovec(*arguments: str, text: str | None = None, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the real command in a process of its own."""
    command = [sys.executable, "-m", "emovec", *arguments]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", **environment}
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def run(*arguments: str, text: str | None = None, code: int = 0) -> str:
    """Run a command in this process, as far as errors are typer's or raised."""
    result = CliRunner().invoke(application.app, list(arguments), input=text, env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def bank_path(tmp_path: Path) -> Path:
    path = tmp_path / "bank.safetensors"
    make_bank().save(path)
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A small random model under any name, and the path of its bank."""
    path = tmp_path / "tiny.safetensors"
    tiny.bank().save(path)
    monkeypatch.setattr(common, "load_model", lambda name, **_: (tiny.model(), letters()))
    return path


def letters() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with a token for each of the 128 ASCII characters."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({chr(code): code for code in range(tiny.VOCAB)}, unk_token="\0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("[\\s\\S]"), "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="\0", unk_token="\0")


# --- help and info --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [(), ("read",), ("generate",), ("extract",), ("bank",), ("bank", "convert"), ("info",), ("demo",)])
def test_every_command_explains_itself(command: tuple[str, ...]) -> None:
    said = run(*command, "--help")
    assert "Usage" in said
    assert len(said) > 200


def test_info_names_the_kernels_and_plans() -> None:
    facts = json.loads(run("info", "--json"))
    assert facts["kernels"]["cpu_scalar"] == "runs"
    assert facts["kernels"][facts["default on a CPU"]] == "runs"
    assert {plan["device"] for plan in facts["plans"]} <= {"cpu", "cuda"}
    plan = json.loads(run("info", "--plan", "64", "4096", "--device", "cpu", "--json"))["plans"]
    assert [(row["device"], row["tokens"], row["width"]) for row in plan] == [("cpu", 64, 4096)]
    assert plan[0]["operations"] == 2 * 64 * 4096 * 171
    assert "N and d" in run("info", "--plan", "0", "4096", code=2)


# --- banks ----------------------------------------------------------------------------------------------------------


def test_bank_show(bank_path: Path) -> None:
    facts = json.loads(run("bank", "show", str(bank_path), "--json"))
    assert facts["concepts"] == list(NAMES)
    assert str(facts["read_layer"]) in run("bank", "show", str(bank_path), "--names")


def test_bank_show_is_short_and_takes_any_text(bank_path: Path) -> None:
    bank = Bank(load_bank(bank_path).values(), families={"[/odd]": NAMES[:1]}, meta={"[/key]": "[/value]", "evidence": list(range(1000))})
    bank.save(bank_path)
    said = run("bank", "show", str(bank_path), "--names")
    assert "[/key]: [/value]" in said
    assert "[/odd]: " in said
    assert "evidence: long; --json prints it" in said
    assert json.loads(run("bank", "show", str(bank_path), "--json"))["meta"]["evidence"] == list(range(1000))


def test_bank_convert_there_and_back(bank_path: Path, tmp_path: Path) -> None:
    bank = load_bank(bank_path)
    name = bank.names[0]
    run("bank", "convert", str(bank_path), str(tmp_path / "v.gguf"), "--bias", f"{name}=0.05")
    run("bank", "convert", str(tmp_path / "v.gguf"), str(tmp_path / "back.safetensors"), "--name", "theirs")
    back = load_bank(tmp_path / "back.safetensors")
    assert back.names == ("theirs",)
    for index in back.layers:
        torch.testing.assert_close(back[index].direction("theirs"), bank[index].direction(name), rtol=0, atol=1e-6)


def test_bank_convert_needs_to_know_what(bank_path: Path, tmp_path: Path) -> None:
    assert "--bias" in run("bank", "convert", str(bank_path), str(tmp_path / "v.gguf"), code=2)
    assert ".gguf" in run("bank", "convert", str(bank_path), str(tmp_path / "v.txt"), "--bias", "calm=1", code=2)
    assert list(tmp_path.glob("v.*")) == []


# --- reading and writing --------------------------------------------------------------------------------------------


def test_read_shows_the_strongest(small: Path) -> None:
    facts = json.loads(run("read", "a quiet lake", "-b", str(small), "--json", "--tokens", "--top", "3", "--raw"))
    assert facts["tokens"] == len("a quiet lake")
    assert len(facts["top"]) == 3
    assert list(facts["top"].values()) == sorted(facts["top"].values(), reverse=True)
    assert len(facts["per_token"]) == facts["tokens"]
    assert "calm" in run("read", "-b", str(small), "--concept", "calm", "--raw", text="from standard input")


def test_read_writes_a_page(small: Path, tmp_path: Path) -> None:
    run("read", "a quiet lake", "-b", str(small), "--raw", "--html", str(tmp_path / "page.html"))
    assert "a quiet lake" in (tmp_path / "page.html").read_text()


def test_generate_steers(small: Path) -> None:
    common_options = ("generate", "a quiet lake", "-b", str(small), "--raw", "--max-new-tokens", "12", "--json")
    plain = json.loads(run(*common_options))
    biased = json.loads(run(*common_options, "--bias", "calm=2", "--bias", 'angry={"at_most": 0.5}', "--scores"))
    assert biased["bias"] == {"calm": 2.0, "angry": {"at_most": 0.5}}
    assert biased["text"] != plain["text"]
    assert len(biased["top"]) == len(tiny.CONCEPTS)
    assert plain["bias"] == {}


def test_generate_ends_with_3_when_the_guard_fires(small: Path) -> None:
    common_options = ("generate", "a quiet lake", "-b", str(small), "--raw", "--max-new-tokens", "12", "--hold", "1")
    facts = json.loads(run(*common_options, "--guard", "calm > -50", "--json", code=3))
    assert facts["events"][0]["action"] == "stop"
    assert facts["text"] == ""
    assert "no further" in run(*common_options, "--guard", "calm>-50", "--refuse", "no further", code=3)
    assert json.loads(run(*common_options, "--guard", "calm>-50", "--calm-down", "calm=0.1", "--json"))["events"][0]["action"] == "steer"


def test_a_text_is_found_among_the_tokens_around_it() -> None:
    words = Reading(
        {1: torch.zeros(7, 1)}, ["calm"], ["prompt"] * 7, torch.arange(7), tokenizer=_Pieces("<u>", "\n", "so ", "be", " it", ".", "<e>")
    )
    assert inner(words, "so be it.").text == "so be it."
    assert inner(words, "  be ").text == "be"
    assert len(inner(words, "absent")) == 7


class _Pieces:
    """A tokenizer whose tokens are given."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(self.pieces[token] for token in tokens)


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("bank", "show", "no-such-bank"), 1, "no-such-bank"),
        (("read", "x", "-b", "no-such-bank"), 1, "no-such-bank"),
        (("read", "x", "--top", "0"), 2, "top"),
        (("read", "x", "--dtype", "int4", "-b", "BANK"), 2, "int4"),
        (("read", "", "-b", "BANK"), 2, "empty"),
        (("generate", "x", "--refuse", "no"), 2, "--guard"),
        (("generate", "x", "--guard", "calm", "-b", "BANK"), 1, "no calibrated bound for 'calm'"),
        (("generate", "x", "--guard", "clam", "-b", "BANK"), 2, "clam"),
        (("calibrate", "m", "BANK", "--out", "bank.bin"), 2, "bank.bin"),
        (("calibrate", "m", "BANK", "--out", "b.safetensors", "--rate", "7"), 1, "rate must be above 0 and below 1, got 7"),
        (("extract", "m", "--out", "bank.bin"), 2, "bank.bin"),
        (("extract", "m", "--out", "nowhere/bank.safetensors"), 2, "nowhere"),
        (("frobnicate",), 2, "frobnicate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistakes_are_explained(small: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    arguments = tuple(str(small) if part == "BANK" else part for part in arguments)
    if code == 1:
        assert said in emovec(*arguments, code=1).stderr
    else:
        assert said in run(*arguments, code=code)


@pytest.mark.parametrize(
    ("bias", "said"),
    [
        ("clam=0.1", "calm"),
        ("calm=NaN", "nan"),
        ("calm=lots", "lots"),
        ("calm", "NAME=VALUE"),
        ("{", "JSON"),
        ('{"calm": {"atmost": 1}}', "at_most"),
    ],
)
def test_wrong_biases_are_explained(small: Path, bias: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run("generate", "x", "-b", str(small), "--raw", "--bias", bias)


def test_a_truncated_bank_is_refused_in_one_line(bank_path: Path) -> None:
    bank_path.write_bytes(bank_path.read_bytes()[:100])
    said = emovec("bank", "show", str(bank_path), code=1).stderr
    assert said.startswith("error:")
    assert str(bank_path) in said
    assert said.count("\n") == 1


def test_layers_are_numbers_and_ranges() -> None:
    assert common.integers("9,12, 15-17", "--layers") == [9, 12, 15, 16, 17]
    assert common.integers(None, "--layers") is None
    with pytest.raises(Exception, match="twelve"):
        common.integers("9,twelve", "--layers")


def test_without_typer_it_says_what_is_missing() -> None:
    code = "import sys; sys.modules['typer'] = None\nfrom emovec.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "emovec[cli]" in done.stderr


# --- the real model -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_commands_of_the_readme_run_on_the_packaged_model(tmp_path: Path) -> None:
    read = json.loads(emovec("read", "I can hear someone moving downstairs, and I live alone.", "--json").stdout)
    assert "frightened" in read["top"]
    assert emovec("generate", "Describe your morning.", "--bias", "calm=0.05", "--max-new-tokens", "8").stdout.strip()
    emovec("bank", "check", "smollm2-135m-instruct", "smollm2-135m-instruct")
    page = tmp_path / "page.html"
    emovec("generate", "Describe your morning.", "--max-new-tokens", "8", "--html", str(page))
    assert page.stat().st_size > 10_000


@pytest.mark.slow
def test_the_demo_writes_its_page_and_picture(tmp_path: Path) -> None:
    said = emovec("demo", "--out", str(tmp_path)).stdout
    assert [f"{step}/6" for step in range(1, 7) if f"{step}/6" not in said] == []
    assert "stop" in said
    assert (tmp_path / "index.html").stat().st_size > 50_000
    assert (tmp_path / "picture.svg").read_text().startswith("<svg")
