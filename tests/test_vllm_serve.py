"""`emovec serve` up to the command that it runs."""

from __future__ import annotations

import json
import os
import shlex
import sys
from importlib import metadata
from pathlib import Path

import pytest
from banks import make_bank
from typer.testing import CliRunner

from emovec.cli import app as application
from emovec.cli import serve


@pytest.fixture
def bank(tmp_path):
    path = tmp_path / "bank.safetensors"
    make_bank().save(path)
    return path


@pytest.fixture
def installed(monkeypatch):
    """vLLM, as far as it is looked for; what would have been run."""
    ran = []
    monkeypatch.setattr(serve, "find_spec", lambda name: object())
    monkeypatch.setattr(metadata, "version", lambda name: "0.32.0")
    monkeypatch.setattr(os, "execve", lambda path, command, environment: ran.append((command, environment)))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return ran


def run(*arguments, code=0):
    result = CliRunner().invoke(application.app, ["serve", *map(str, arguments)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def test_the_command(bank, installed, tmp_path):
    profiles, guard = tmp_path / "profiles.toml", tmp_path / "guard.json"
    profiles.write_text("[steady]\ncalm = 0.05\n")
    guard.write_text('[{"of": "calm", "above": 3}]')
    shown = run("some/model", "--bank", bank, "--layers", "2,4", "--profiles", profiles, "--guard", guard, "--port", 9, "--enforce-eager")
    ((command, environment),) = installed
    assert command[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "some/model"]
    config = json.loads(command[command.index("--additional-config") + 1])["emovec"]
    assert config == {"bank": str(bank), "layers": [2, 4], "profiles": str(profiles), "guard": [{"of": "calm", "above": 3}]}
    assert command[command.index("--middleware") + 1] == serve.MIDDLEWARE
    assert command[-3:] == ["--port", "9", "--enforce-eager"]
    assert shlex.split(shown) == command
    assert "VLLM_PLUGINS" not in environment


def test_what_is_shown_of_all_tokens(bank, installed):
    run("some/model", "--bank", bank, "--metrics", "calm, Fear", "--live")
    run("some/model", "--bank", bank, "--metrics", "all")
    first, second = (json.loads(command[command.index("--additional-config") + 1])["emovec"] for command, _ in installed)
    assert first == {"bank": str(bank), "metrics": ["calm", "Fear"], "live": True}
    assert second == {"bank": str(bank), "metrics": "all"}


def test_the_dashboard_is_printed():
    assert json.loads(run("--grafana"))["panels"]


def test_builds_for_cpus_are_started_another_way(bank, installed, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    run("some/model", "--bank", bank)
    assert installed[0][0][2:5] == ["vllm.entrypoints.openai.api_server", "--model", "some/model"]


def test_the_plugin_is_among_those_that_are_loaded(bank, installed, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    run("some/model", "--bank", bank)
    assert installed[0][1]["VLLM_PLUGINS"] == "other,emovec"


def test_a_dry_run_runs_nothing(bank, installed):
    assert "some/model" in run("some/model", "--bank", bank, "--dry-run")
    assert installed == []


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (["--layers", "3"], KeyError, "no layer 3"),
        (["--bank", "no-such"], ValueError, "no such file"),
        (["--metrics", "calm,clam"], ValueError, "nearest known: calm"),
    ],
    ids=str,
)
def test_what_is_wrong_is_found_before_vllm_starts(bank, installed, options, error, said):
    with pytest.raises(error, match=said):
        run("some/model", "--bank", bank, *options)
    assert installed == []


def test_a_guard_that_is_not_json_is_named(bank, installed, tmp_path):
    (tmp_path / "guard.json").write_text('[{"of": "calm", "above": 3},]')
    with pytest.raises(ValueError, match=r"guard\.json is not JSON: .* line 1 column"):
        run("some/model", "--bank", bank, "--guard", tmp_path / "guard.json")


def test_our_own_flags_are_not_to_be_given(bank, installed):
    assert "is set by emovec serve" in run("some/model", "--bank", bank, "--additional-config", "{}", code=2)
    assert "is set by emovec serve" in run("some/model", "--bank", bank, "--middleware=other", code=2)


def test_without_vllm_the_extra_is_named(bank, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    monkeypatch.setattr(serve.extras, "require", _missing)
    with pytest.raises(ModuleNotFoundError, match=r"emovec\[vllm\]"):
        run("some/model", "--bank", bank)


def _missing(module, *, extra):
    raise ModuleNotFoundError(f"{module} is not installed; it comes with `pip install emovec[{extra}]`")


def test_the_cost_is_that_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    bench = __import__("serving")
    try:
        found = bench.provenance.read("serving")
        page = bench.PAGE.read_text(encoding="utf-8")
        assert bench.pages.written(page, {"cost": bench.table(found["results"], found["provenance"]["name"])}) == page
    finally:
        for name in ("serving", "pages", "provenance"):
            sys.modules.pop(name, None)
