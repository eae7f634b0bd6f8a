"""The model of an evaluation behind an OpenAI-compatible server that runs already: `--server URL[,URL]`.

The samples of a batch are asked at once, as streams, and the server batches them as it likes. A server of `vlm-fix serve` lists
its methods with its model, and each request says what it wants of them; any other server is the baseline. Each run goes to the
first server that can answer it. A sample whose request fails has an error for an answer.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import dataclasses
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vlm_fix.calibrated import Calibration, apply
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.prompts import chat, starts_itself
from vlm_fix.families import arch_of
from vlm_fix.method import Baseline, Method
from vlm_fix.serving import options, refusals
from vlm_fix.serving.engine import ServedEngine

from .elsewhere import Batch, Elsewhere, Gone

WAITS = (1.0, 3.0)  # seconds before a request is sent again that found no server, or a busy one
BUSY = (429, 502, 503, 504)
EVERY = (401, 403, 404)  # what no other request would be spared
SECONDS = 600  # without a word from the server
ENDS = {"stop": True, "length": False}  # why an answer ends -> whether it is finished


class RequestError(RuntimeError):
    """The server could not answer one request."""


class _Passing(Exception):
    """What may pass. server: what still fails after WAITS is the server, not the request."""

    def __init__(self, said: str, server: bool) -> None:
        super().__init__(said)
        self.server = server


@dataclasses.dataclass
class Answer:
    """One request's."""

    text: str
    tokens: int
    finished: bool
    first: float | None  # seconds from the start of its batch to its first token
    error: str | None = None


class Server:
    """One server, by the URL of its API (http://HOST:PORT, or with /v1)."""

    def __init__(self, url: str, name: str) -> None:
        given = url.strip().rstrip("/")
        if not given.startswith(("http://", "https://")):
            raise VlmFixError(f"--server {url!r} is no URL: give http://HOST:PORT.")
        self.url = given if given.endswith("/v1") else f"{given}/v1"
        key = os.environ.get("OPENAI_API_KEY")
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            with self._open("models", None) as reply:
                cards = {card["id"]: card for card in json.load(reply)["data"]}
        except (_Passing, RequestError) as error:
            raise VlmFixError(f"{error}.") from None
        except (ValueError, KeyError, TypeError):
            raise VlmFixError(
                f"{self.url}/models lists no models: --server takes an OpenAI-compatible server."
            ) from None
        mine = [one for one, card in cards.items() if _folder(name) in (_folder(one), _folder(card.get("root")))]
        if name not in cards and len(mine) != 1:
            raise VlmFixError(
                f"{self.url} serves {', '.join(cards) or 'nothing'}, not {name}: name the checkpoint that it serves with --model."
            )
        self.model = name if name in cards else mine[0]
        card = cards[self.model]
        self.vllm = card.get("owned_by") == "vllm"
        self.methods: list[dict[str, Any]] = card.get(options.KEY) or []

    def _open(self, path: str, body: dict[str, Any] | None) -> Any:
        """The open reply. Raises Gone for what no request would be spared, _Passing for what may pass, else RequestError."""
        data = None if body is None else json.dumps(body).encode()
        try:
            return urllib.request.urlopen(
                urllib.request.Request(f"{self.url}/{path}", data, self.headers), timeout=SECONDS
            )
        except urllib.error.HTTPError as error:
            said = f"{self.url} answers {error.code}: {_said(error)}"
            if error.code in EVERY:
                raise Gone(said) from None
            raise (_Passing(said, True) if error.code in BUSY else RequestError(said)) from None
        except OSError as error:
            why = getattr(error, "reason", None) or error
            raise _Passing(f"{self.url} does not answer ({why}): start the server, or mend --server", True) from None

    def ask(self, body: dict[str, Any], begin: float) -> Answer:
        """One chat request, sent again where that may help. Raises RequestError if it failed, Gone if the server did."""
        for wait in (*WAITS, None):
            try:
                return self._asked(body, begin)
            except _Passing as error:
                if wait is None:
                    raise (Gone if error.server else RequestError)(str(error)) from None
                time.sleep(wait)
        raise AssertionError

    def _asked(self, body: dict[str, Any], begin: float) -> Answer:
        body = {**body, "model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        text, ended, usage, first = [], None, None, None
        try:
            with self._open("chat/completions", body) as reply:
                for line in reply:
                    data = line.decode().strip().removeprefix("data:").strip()
                    if not data.startswith("{"):
                        continue
                    part = json.loads(data)
                    if part.get("error"):
                        raise RequestError(f"{self.url} broke an answer off: {_message(part)}")
                    usage = part.get("usage") or usage
                    for choice in part.get("choices") or ():
                        piece = choice.get("delta", {}).get("content") or ""
                        text.append(piece)
                        first = time.perf_counter() - begin if piece and first is None else first
                        ended = choice.get("finish_reason") or ended
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _Passing(f"{self.url} broke an answer off ({type(error).__name__}: {error})", False) from None
        if ended is None:
            raise _Passing(f"{self.url} broke an answer off", False)
        if ended not in ENDS:
            raise RequestError(f"{self.url} ended the answer for the reason {ended!r}")
        if not usage or not usage.get("completion_tokens"):
            raise RequestError(f"{self.url} does not say how many tokens an answer has (stream_options.include_usage)")
        return Answer("".join(text).strip(), int(usage["completion_tokens"]), ENDS[ended], first)


class RemoteModel(Elsewhere):
    """Behind one or more servers."""

    option = "--server"

    def __init__(self, path: str, urls: str, name: str) -> None:
        super().__init__(path, torch.device("cpu"))
        self.servers = [Server(url, name) for url in urls.split(",") if url.strip()]
        count = len(self.servers)
        self.hardware = f"behind {count} server{'s' * (count > 1)} (hardware unknown here)"
        self.server, self.asked = self.servers[0], None

    def identity(self, name: str) -> dict[str, Any]:
        return super().identity(name) | {"dtype": "the server's dtype", "device": "server", "engine": "server"}

    @contextlib.contextmanager
    def applied(self, stack: Sequence[Method], calibration: Sequence[Calibration]) -> Iterator[None]:
        """Ask the first server that can answer with these methods."""
        arch = arch_of(self.bare)
        methods = apply(calibration, [m for m in stack if not isinstance(m, Baseline)], arch)
        refusals.check_engine(ServedEngine(self.bare, methods))
        why = []
        for server in self.servers:
            try:
                self.server, self.asked = server, options.wanted(methods, server.methods, arch)
            except VlmFixError as error:
                why.append(f"{server.url} {error}")
                continue
            yield
            return
        name = "+".join(m.name for m in methods) or "the baseline"
        raise VlmFixError(f"no server can answer as {name}: {'; '.join(why)}. Name one that can: --server URL,URL.")

    def answers(self, processor: Any, images: Sequence[Any], prompts: Sequence[str], seed: int, **how: Any) -> Batch:
        common: dict[str, Any] = {"max_tokens": how["max_new_tokens"], **self.sampling(how)}
        if self.server.vllm:  # the words of generate: no settings of the checkpoint's, and its start token
            common |= {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
            common["add_special_tokens"] = not starts_itself(processor, chat(processor, prompts[0]))
        if self.asked is not None:
            common[options.KEY] = self.asked
        bodies = [
            {**common, "seed": seed + i, "messages": [{"role": "user", "content": _content(image, prompt)}]}
            for i, (image, prompt) in enumerate(zip(images, prompts, strict=True))
        ]
        begin = time.perf_counter()

        def one(body: dict[str, Any]) -> Answer:
            try:
                return self.server.ask(body, begin)
            except RequestError as error:
                return Answer("", 0, False, None, str(error))

        with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
            found = list(pool.map(one, bodies))
        seconds = time.perf_counter() - begin
        first = min((a.first for a in found if a.first is not None), default=None)
        texts, tokens, ended = [a.text for a in found], [a.tokens for a in found], [a.finished for a in found]
        return Batch(texts, tokens, ended, seconds, first, errors=[a.error for a in found])


def _folder(path: Any) -> str:
    """The last part of a path, where there is one."""
    return str(path or "").rstrip("/").rpartition("/")[2]


def _content(image: Any, prompt: str) -> list[dict[str, Any]]:
    """A user's turn: the image without loss, then the prompt."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]


def _said(error: urllib.error.HTTPError) -> str:
    """The server's own sentence."""
    text = error.read(10_000).decode(errors="replace").strip()
    try:
        return _message(json.loads(text))
    except ValueError:
        return (text.splitlines() or [error.reason])[0][:300]


def _message(reply: Any) -> str:
    found = reply.get("error", reply) if isinstance(reply, dict) else reply
    found = found.get("message", found.get("detail", found)) if isinstance(found, dict) else found
    return " ".join(str(found).split())[:300]
