"""What ``--additional-config '{"emovec": {...}}'`` may say, and what vLLM must be like for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from emovec.bank import Bank, load_bank
from emovec.bank_layer import nearest, shown
from emovec.engines.vllm import tally
from emovec.engines.vllm.guard import Watched, parse
from emovec.fingerprint import differences
from emovec.steer import load_profiles

KEY = "emovec"
SUPPORTED = ("0.32.0",)
_KEYS = ("bank", "layers", "steer_layers", "profiles", "guard", "audit", "metrics", "live", "force")


class ConfigError(ValueError):
    """The configuration is wrong, or vLLM is not one that it can be used with; the message says what to change."""


@dataclass(frozen=True, eq=False)
class Config:
    """The plugin's configuration with its bank.

    layers: where to read. steer_layers: where to steer. profiles: name -> steering value. guard: thresholds for every request.
    audit: a file that records what fires. metrics: concepts and families whose scores are counted. live: the live view is served.
    force: use a bank of another model.
    """

    bank: Bank
    layers: tuple[int, ...]
    steer_layers: tuple[int, ...]
    profiles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    guard: tuple[Watched, ...] = ()
    audit: str | None = None
    metrics: tuple[str, ...] = ()
    live: bool = False
    force: bool = False

    @property
    def sees(self) -> bool:
        """Whether every generated token is scored, whoever asks."""
        return self.live or bool(self.metrics)

    @property
    def hooked(self) -> tuple[int, ...]:
        return tuple(sorted({*self.layers, *self.steer_layers}))


def wanted(vllm_config: Any) -> bool:
    """Whether this engine is configured for emovec at all."""
    additional = getattr(vllm_config, "additional_config", None)
    return isinstance(additional, Mapping) and KEY in additional


def load(vllm_config: Any) -> Config | None:
    """The configuration of an engine; None without one.

    Raises:
        ConfigError: naming the key and its value.
        BankError, SteeringError: the bank or the profiles cannot be used.
    """
    if not wanted(vllm_config):
        return None
    given = vllm_config.additional_config[KEY]
    if not isinstance(given, Mapping):
        raise ConfigError(f'additional_config["emovec"] must be an object, got {shown(given)}')
    for key in given:
        if key not in _KEYS:
            raise ConfigError(f"emovec: unknown key {shown(key)}; nearest known: {', '.join(nearest(key, _KEYS))}")
    name, profiles = given.get("bank"), given.get("profiles")
    if not isinstance(name, str):
        raise ConfigError(f"emovec: bank must be the name of a shipped bank or a path, got {shown(name)}")
    if profiles is not None and not isinstance(profiles, str):
        raise ConfigError(f"emovec: profiles must be the path of a TOML file, got {shown(profiles)}")
    if not isinstance(given.get("audit"), str | None):
        raise ConfigError(f"emovec: audit must be the path of a file, got {shown(given['audit'])}")
    for key in ("live", "force"):
        if not isinstance(given.get(key, False), bool):
            raise ConfigError(f"emovec: {key} must be true or false, got {shown(given[key])}")
    bank = load_bank(name)
    layers = _layers(given, "layers", bank, bank.read_layers)
    steer_layers = _layers(given, "steer_layers", bank, bank.steer_layers)
    named = {} if profiles is None else load_profiles(profiles, bank.names)
    guard = parse(given["guard"], bank) if "guard" in given else ()
    metrics = tally.parse(given["metrics"], bank) if "metrics" in given else ()
    live, force = given.get("live", False), given.get("force", False)
    return Config(bank, layers, steer_layers, named, guard, given.get("audit"), metrics, live, force)


def check(vllm_config: Any, version: str) -> None:
    """Refuse what the plugin cannot serve rightly, before anything is loaded.

    Raises:
        ConfigError: saying what it is and what to change.
    """
    if version not in SUPPORTED:
        raise ConfigError(f"emovec supports vLLM {', '.join(SUPPORTED)}, this is {version}; without its configuration vLLM runs as usual")
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    refused = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1,
        "sequence parallelism": parallel.use_sequence_parallel_moe,
        "dual batch overlap": parallel.use_ubatching,
        "pooling models": model.runner_type != "generate",
        "encoder-decoder models": model.is_encoder_decoder,
    }
    found = [what for what, there in refused.items() if there]
    if found:
        raise ConfigError(f"emovec cannot be used with {'; '.join(found)}")
    config = load(vllm_config)
    assert config is not None
    _check_servers(config, parallel)
    _check_audit(config.audit)
    _check_model(config, model.hf_text_config)
    # graphs depend on these, and with them the key of the compile cache: a file of a bank may change, and its layers with it
    where = {"layers": list(config.layers), "steer_layers": list(config.steer_layers)}
    vllm_config.additional_config = {**vllm_config.additional_config, KEY: {**vllm_config.additional_config[KEY], **where}}


def _check_servers(config: Config, parallel: Any) -> None:
    """Of several API servers each would see a part of the tokens; and metrics that are shared through files know no scores."""
    if config.sees and parallel._api_process_count > 1:
        raise ConfigError(f"emovec: metrics and live need one API server, not {parallel._api_process_count}; set --api-server-count 1")
    if config.metrics and "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        raise ConfigError("emovec: metrics cannot be shown in Prometheus' multiprocess mode; unset PROMETHEUS_MULTIPROC_DIR")


def _check_audit(path: str | None) -> None:
    """That it can be written, and not only once something fires."""
    if path is None:
        return
    try:
        with open(path, "a"):
            pass
    except OSError as error:
        raise ConfigError(f"emovec: the audit {shown(path)} cannot be written: {error.strerror}") from None


def _check_model(config: Config, hf: Any) -> None:
    """By its shape alone: an engine's weights are merged and packed in ways that cannot be compared with a fingerprint."""
    found = {"model_type": getattr(hf, "model_type", None), "d": hf.hidden_size, "layers": hf.num_hidden_layers}
    expected = {"d": config.bank.width, **config.bank.meta.get("fingerprint", {})}
    different = differences(expected, found)
    missing = [index for index in config.hooked if index >= hf.num_hidden_layers]
    if missing or found["d"] != config.bank.width:
        raise ConfigError(f"the bank does not fit the model: {'; '.join(different) or f'layers {missing} do not exist'}")
    if different and not config.force:
        raise ConfigError(f'the bank was made for another model; {"; ".join(different)}; "force": true uses it all the same')


def _layers(given: Mapping[str, Any], key: str, bank: Bank, default: tuple[int, ...]) -> tuple[int, ...]:
    layers = given.get(key, default)
    if not isinstance(layers, list | tuple) or not layers or not all(type(index) is int for index in layers):
        raise ConfigError(f"emovec: {key} must be a list of layers, got {shown(layers)}")
    for index in layers:
        bank[index]
    return tuple(sorted(set(layers)))
