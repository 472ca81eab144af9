"""What a request may carry, checked before it reaches the engine: ``emotion_bias``, ``emotion_scores`` and ``emotion_guard``.

In Python they are values in ``SamplingParams.extra_args``. Over HTTP ``vllm_xargs`` becomes ``extra_args``; its values are text
and numbers, so a steering value is JSON text there, or flat keys such as ``"emotion_bias.calm": 0.05``.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from emovec.allotment import combined, parsed
from emovec.bank_layer import nearest, shown
from emovec.engines.vllm import guard
from emovec.engines.vllm.config import Config
from emovec.engines.vllm.rows import ROWS_OF_ONE, Rows
from emovec.engines.vllm.scores import SCOPES
from emovec.ops import Table
from emovec.steer import MAX_JSON, Steering, SteeringError, unique_keys

BIAS, SCORES, GUARD = "emotion_bias", "emotion_scores", "emotion_guard"
FIELDS = (BIAS, SCORES, GUARD)
OURS = "emotion_"
"""What the names of our fields begin with, those that are misspelt too."""
ADMITTED = "emovec"
"""The key of ``extra_args`` under which an admitted request says what is to be done, for the engine alone."""
_SCORE_KEYS = ("on", "concepts", "top")
_KEPT = 1024


class RequestError(ValueError):
    """A request asks for something that cannot be done; the message names it."""


class Admission:
    """Checks requests against the configuration and turns them into what the engine works with.

    Args:
        config: the configuration.
        dtype: of the model's activations, in which rules must be solvable.
        tokenizer: for the text of refusals.
    """

    def __init__(self, config: Config, dtype: torch.dtype, tokenizer: Any = None) -> None:
        self.config, self._tokenizer = config, tokenizer
        self._operands = {index: config.bank[index].operands("cpu", dtype) for index in config.steer_layers}
        self._digest = _digest(config)
        self._known: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def admit(self, extra_args: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """What the engine is told of a request; None if it is none of ours.

        Raises:
            RequestError, SteeringError: naming the entry, with the nearest known names.
        """
        extra_args = extra_args or {}
        if not (ADMITTED in extra_args or asks(extra_args) or self.config.guard):
            return None
        if ADMITTED in extra_args:
            raise RequestError(f"extra argument {ADMITTED!r} is the engine's own; give {', '.join(FIELDS)}")
        for key in extra_args:
            if key.startswith(OURS) and key.split(".")[0] not in FIELDS:
                raise RequestError(f"unknown field {shown(key)}; nearest known: {', '.join(nearest(key, FIELDS))}")
        admitted: dict[str, Any] = {}
        steering = self._steering(extra_args)
        if steering:
            admitted |= self._solved(steering)
        scores = extra_args.get(SCORES)
        if scores is not None and scores is not False:
            admitted["scores"] = self._scores(scores)
        thresholds = self._guard(extra_args.get(GUARD), steering)
        if thresholds:
            admitted["guard"] = thresholds
        return admitted or None

    def _steering(self, extra_args: Mapping[str, Any]) -> Steering:
        names, profiles = self.config.bank.names, self.config.profiles
        flat = {key.removeprefix(f"{BIAS}."): value for key, value in extra_args.items() if key.startswith(f"{BIAS}.")}
        value = extra_args.get(BIAS)
        if flat and value is not None:
            raise RequestError(f"{BIAS} is given twice: whole, and as {BIAS}.{shown(next(iter(flat)))[1:-1]}")
        if flat:
            value = {name: _json(entry, BIAS) if _is_json(entry) else entry for name, entry in flat.items()}
        elif isinstance(value, str) and _is_json(value):
            return Steering.from_json(value, names)
        if not isinstance(value, Mapping | str | None):
            raise SteeringError(f"{BIAS} must be an object of concepts or the name of a profile, got {shown(value)}")
        if isinstance(value, str) and not profiles:
            raise SteeringError(f"{BIAS} must be an object of concepts, for this server has no profiles to name, got {shown(value)}")
        found = parsed(value, names, profiles)
        assert isinstance(found, Steering)
        return found

    def _guard(self, value: Any, steering: Steering) -> list[dict[str, Any]]:
        """The server's thresholds and the request's, each with what its action needs."""
        if _is_json(value):
            value = _json(value, GUARD)
        own = () if value is None or value is False else guard.parse(value, self.config.bank)
        return [guard.packed(watched, **self._made(watched, steering)) for watched in (*self.config.guard, *own)]

    def _made(self, watched: guard.Watched, steering: Steering) -> dict[str, Any]:
        if watched.do == "refuse":
            if self._tokenizer is None:
                raise RequestError(f"{GUARD}: without a tokenizer a request cannot be refused in words")
            # the last token of what is stopped is taken for the one that stops it, and not shown
            ending = [self._tokenizer.eos_token_id or 0]
            return {"tokens": [*self._tokenizer(watched.text, add_special_tokens=False)["input_ids"], *ending]}
        if watched.do == "steer":
            solved = self._solved(combined(steering, Steering.parse(watched.value, self.config.bank.names)))
            return {"steer": solved["steer"], "key": solved["key"]}
        return {}

    def _solved(self, steering: Steering) -> dict[str, Any]:
        """The value as the engine gets it, and the keys of the cache blocks it touches; kept for the next request like it."""
        text = steering.to_json()
        known = self._known.get(text)
        if known is None:
            width = self.config.bank.width
            layers = {index: (operands, Table.empty(ROWS_OF_ONE, width)) for index, operands in self._operands.items()}
            Rows(self.config.bank, layers).of(text, 0)  # what no layer can do is refused here
            of_prompt = Steering(tuple(entry for entry in steering.entries if entry.on != "generated"))
            known = {"steer": text, "key": self._key(steering), "prompt_key": self._key(of_prompt) if of_prompt else None}
            self._known[text] = known
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return known

    def _key(self, steering: Steering) -> str:
        return hashlib.sha256(f"{self._digest} {steering.to_json()}".encode()).hexdigest()[:32]

    def _scores(self, value: Any) -> dict[str, Any]:
        if _is_json(value):
            value = _json(value, SCORES)
        value = {} if value is True or value in ("true", 1) else value
        if not isinstance(value, Mapping):
            raise RequestError(f"{SCORES} must be true or an object, got {shown(value)}")
        for key in value:
            if key not in _SCORE_KEYS:
                raise RequestError(f"{SCORES}: unknown key {shown(key)}; nearest known: {', '.join(nearest(key, _SCORE_KEYS))}")
        on, concepts, top = value.get("on", "generated"), value.get("concepts"), value.get("top")
        if on not in SCOPES:
            raise RequestError(f"{SCORES}: on must be one of {', '.join(SCOPES)}, got {shown(on)}")
        if top is not None and (type(top) is not int or top < 1):
            raise RequestError(f"{SCORES}: top must be a positive integer, got {shown(top)}")
        if concepts is None:
            return {"on": on, "concepts": None, "top": top}
        if not isinstance(concepts, Sequence) or isinstance(concepts, str) or not 1 <= len(concepts) <= len(self.config.bank.names):
            raise RequestError(f"{SCORES}: concepts must be a list of 1 to {len(self.config.bank.names)} names, got {shown(concepts)}")
        rows = [self._concept(name) for name in concepts]
        if len(set(rows)) != len(rows):
            raise RequestError(f"{SCORES}: a concept is given twice in {shown(concepts)}")
        return {"on": on, "concepts": rows, "top": top}

    def _concept(self, name: Any) -> int:
        if not isinstance(name, str):
            raise RequestError(f"{SCORES}: a concept is named by text, got {shown(name)}")
        try:
            return self.config.bank.resolve(name)
        except ValueError as error:
            raise RequestError(f"{SCORES}: {error}") from None


def asks(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether there is something for emovec in what a client sent."""
    return any(key.startswith(OURS) for key in extra_args or ())


def _digest(config: Config) -> str:
    """What tells the effect of a steering value under this configuration from that under another."""
    digest = hashlib.sha256()
    for index in config.steer_layers:
        layer = config.bank[index]
        digest.update(f"{index} {layer.residual_norm} {layer.names}".encode())
        baselines = [part for baseline in layer.baselines.values() for part in (baseline.mean, baseline.std)]
        for tensor in (layer.directions, layer.readers, *baselines):
            if tensor is not None:
                digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _is_json(value: Any) -> bool:
    """Whether text is meant as JSON, and not as the name of a profile."""
    return isinstance(value, str) and value.lstrip().startswith(("{", "["))


def _json(text: str, what: str) -> Any:
    if len(text) > MAX_JSON:
        raise RequestError(f"{what} of {len(text)} letters is longer than {MAX_JSON}")
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except SteeringError:
        raise
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{what} is not JSON: {error}") from None
