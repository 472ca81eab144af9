"""Who writes stories: a model behind an OpenAI-compatible endpoint, or one in this process."""

from __future__ import annotations

import http.client
import json
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from emovec.bank_layer import shown

_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT = 60.0  # seconds
_LONGEST_ANSWER = 8 << 20  # bytes


class EndpointError(OSError):
    """An endpoint refuses, cannot be reached, or does not answer as it should; the message says which and what it said."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote; ``whole``: it came to an end by itself."""

    text: str
    whole: bool = True


class Writer(Protocol):
    """Answers prompts; may be called from several threads at once if ``threads`` is above 1."""

    name: str
    threads: int
    requests: int
    retries: int

    def __call__(self, prompt: str, seed: int | None) -> Answer: ...

    def stop(self) -> None:
        """Give up waiting, in all threads."""


class Endpoint:
    """A model behind ``POST <url>/chat/completions``.

    What may pass (429, 5xx, no connection, no answer in time, an answer that is not one) is tried again after a wait that
    doubles each time, or that the server asks for. What will not (401, 404, ...) is an error at once.

    Args:
        url: such as ``https://api.example.com/v1``.
        model: the model's name there.
        key: sent as a bearer token.
        threads: requests under way at the same time.
        temperature: of the sampling.
        max_tokens: of an answer.
        extra: more fields of the request; None takes a field out.
        timeout: seconds without a byte.
        tries: of one request.
        wait: seconds before the second try.

    Raises:
        ValueError: a URL that is not http or https.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        *,
        threads: int = 4,
        temperature: float = 1.0,
        max_tokens: int = 1024,
        extra: Mapping[str, Any] | None = None,
        timeout: float = 120.0,
        tries: int = 6,
        wait: float = 1.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"an endpoint is a URL such as http://localhost:8000/v1, got {shown(url)}")
        self.name, self.threads, self.requests, self.retries = model, threads, 0, 0
        self._url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self._key = key
        self._fields = {"model": model, "temperature": temperature, "max_tokens": max_tokens, **(extra or {})}
        self._timeout, self._tries, self._wait = timeout, tries, wait
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._lock, self._stopped = threading.Lock(), threading.Event()

    def __call__(self, prompt: str, seed: int | None) -> Answer:
        content = {**self._fields, "messages": [{"role": "user", "content": prompt}], **({} if seed is None else {"seed": seed})}
        body = json.dumps({name: value for name, value in content.items() if value is not None}).encode()
        for number in range(1, self._tries + 1):
            with self._lock:
                self.requests += 1
                self.retries += number > 1
            wait = min(self._wait * 2 ** (number - 1), _LONGEST_WAIT) * random.uniform(0.75, 1.25)
            try:
                return _answer(self._post(body))
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {self._said(error)}"
                if error.code not in _AGAIN:
                    raise EndpointError(f"{self._url}: {problem}") from None
                wait = _asked(error.headers.get("Retry-After"), wait)
            except (OSError, http.client.HTTPException, _NotAnAnswer) as error:
                problem = str(getattr(error, "reason", None) or error or type(error).__name__)
            if number < self._tries and self._stopped.wait(wait):
                raise EndpointError("stopped")
        raise EndpointError(f"{self._url}: gave up after {self._tries} tries; the last one: {problem}")

    def stop(self) -> None:
        self._stopped.set()

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "emovec"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, data=body, headers=headers, method="POST")
        with self._opener.open(request, timeout=self._timeout) as response:
            answer: bytes = response.read(_LONGEST_ANSWER)
            if response.length:  # bytes that should have come, and have not
                raise http.client.IncompleteRead(answer, response.length)
            return answer

    def _said(self, error: urllib.error.HTTPError) -> str:
        """The server's own words, cut short, without the key should it repeat it."""
        try:
            text = error.read(4096).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        text = text.replace(self._key, "***") if self._key else text
        try:
            said = json.loads(text)
            said = said.get("error", said) if isinstance(said, dict) else said
            text = str(said.get("message", said) if isinstance(said, dict) else said)
        except (ValueError, RecursionError):
            pass
        return " ".join(text.split())[:300] or str(error.reason)


class Local:
    """A model of transformers in this process; one story at a time.

    Args:
        model: what :func:`emovec.models.load_model` takes.
        device, dtype: likewise.
        temperature: of the sampling; 0 takes the likeliest token each time.
        max_tokens: of an answer.
    """

    threads = 1

    def __init__(self, model: str, *, device: Any = None, dtype: Any = None, temperature: float = 1.0, max_tokens: int = 1024) -> None:
        from emovec.models import load_model

        self.name, self.requests, self.retries = model, 0, 0
        self._model, self._tokenizer = load_model(model, dtype=dtype, device=device)
        self._temperature, self._max_tokens = temperature, max_tokens

    def __call__(self, prompt: str, seed: int | None) -> Answer:
        import torch

        from emovec.models import encode

        self.requests += 1
        inputs = encode(self._tokenizer, prompt, device=self._model.device)
        sampled = {"do_sample": True, "temperature": self._temperature, "top_k": 0} if self._temperature > 0 else {"do_sample": False}
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            if seed is not None:
                torch.manual_seed(seed)
            out = self._model.generate(**inputs, max_new_tokens=self._max_tokens, pad_token_id=self._tokenizer.pad_token_id, **sampled)
        ids = out[0, inputs["input_ids"].shape[1] :].tolist()
        return Answer(self._tokenizer.decode(ids, skip_special_tokens=True), whole=len(ids) < self._max_tokens)

    def stop(self) -> None:
        pass


class _NotAnAnswer(Exception):  # noqa: N818
    pass


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: followed, it would turn the request into a GET and carry the key elsewhere."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None


def _answer(body: bytes) -> Answer:
    try:
        choice = json.loads(body)["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise _NotAnAnswer(f"not an answer of a chat model: {shown(body.decode('utf-8', 'replace'))}") from None
    if text is not None and not isinstance(text, str):
        raise _NotAnAnswer(f"the answer's content is not text: {shown(text)}")
    return Answer(text or "", whole=reason != "length")


def _asked(header: str | None, otherwise: float) -> float:
    """The seconds that a server asks to wait for, within reason."""
    try:
        return min(max(float(header or ""), 0.0), _LONGEST_WAIT)
    except ValueError:
        return otherwise
