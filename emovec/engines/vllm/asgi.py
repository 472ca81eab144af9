"""What answers HTTP by itself has in common: the types of ASGI, and short answers."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


async def answer(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    """A whole answer."""
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


async def refuse(send: Send, why: str, of: str, status: int = 400) -> None:
    """An error as vLLM words its own; ``of`` is the field or parameter that is wrong."""
    kind = "BadRequestError" if status == 400 else "ServiceUnavailableError"
    body = json.dumps({"error": {"message": why, "type": kind, "param": of, "code": status}}).encode()
    await answer(send, status, body, (b"content-type", b"application/json"))
