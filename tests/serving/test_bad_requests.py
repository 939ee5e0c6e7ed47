"""Whatever is sent, the answer is a status that fits and a message that helps, and the server goes on."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import requests

from soul.records import InputError
from soul.serving.decoder import RunningBatch
from soul.serving.gate import Hashes, read_catalogue
from soul.serving.keys import hash_key, is_admitted, read_key_hashes
from soul.serving.settings import Hosting, ServeConfig
from tests.serving.conftest import KEY, LIMITS, InProcess, Served, serve

CANARY = "the-canary-sings-at-midnight"
SMALL = {"model": "good", "prompt": CANARY, "max_tokens": 2}
TALK = {"model": "good", "messages": [{"role": "user", "content": CANARY}], "max_tokens": 2}


@dataclass(frozen=True)
class Bad:
    """A request, and what must be said about it."""

    name: str
    status: int
    says: str
    change: dict[str, Any] = field(default_factory=dict)
    route: str = "/v1/completions"
    body: bytes | None = None
    headers: dict[str, str | None] = field(default_factory=dict)
    method: str = "POST"

    def send(self, url: str) -> requests.Response:
        base = TALK if "chat" in self.route else SMALL
        data = json.dumps({**base, **self.change}).encode() if self.body is None else self.body
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **self.headers}
        return requests.request(self.method, url + self.route, data=data, headers=headers, timeout=30)


CHAT = "/v1/chat/completions"
BAD = [
    Bad("text for a number", 400, "max_tokens", {"max_tokens": "2"}),
    Bad("true for a number", 400, "max_tokens", {"max_tokens": True}),
    Bad("a fraction of a token", 400, "max_tokens", {"max_tokens": 2.5}),
    Bad("negative max_tokens", 400, "greater than or equal", {"max_tokens": -1}),
    Bad("huge max_tokens", 400, "limited to 200", {"max_tokens": 10**9}),
    Bad("more digits than fit", 400, "JSON", body=b'{"model":"good","prompt":"a","max_tokens":' + b"9" * 5000 + b"}"),
    Bad("no tokens and no echo", 400, "nothing to answer", {"max_tokens": 0}),
    Bad("negative temperature", 400, "temperature", {"temperature": -0.1}),
    Bad("temperature NaN", 400, "not JSON", body=b'{"model":"good","prompt":"a","temperature":NaN}'),
    Bad("top_p above one", 400, "top_p", {"top_p": 1.01}),
    Bad("too many choices", 400, "limited to 4", {"n": 5}),
    Bad("no choices", 400, "n:", {"n": 0}),
    Bad("too many log-probabilities", 400, "limited to 5", {"logprobs": 6}),
    Bad("too many stop strings", 400, "limited to 4", {"stop": list("abcde")}),
    Bad("an empty stop string", 400, "stop", {"stop": ""}),
    Bad("a prompt of another type", 400, "prompt", {"prompt": {"text": "a"}}),
    Bad("no prompt in the list", 400, "at least one", {"prompt": []}),
    Bad("an empty prompt", 400, "no tokens", {"prompt": ""}),
    Bad("an unknown token id", 400, "token id", {"prompt": [1, 10**6]}),
    Bad("a negative token id", 400, "prompt", {"prompt": [1, -1]}),
    Bad("mixed prompts", 400, "prompt", {"prompt": ["a", 1]}),
    Bad("too many prompts", 400, "limited to 8", {"prompt": ["a"] * 9}),
    Bad("a prompt beyond the context", 400, "context has 25", {"prompt": "word " * 400}),
    Bad("an unknown field", 400, "does not know", {"temprature": 1}),
    Bad("a parameter that is not supported", 400, "logit_bias", {"logit_bias": {"5": 100}}),
    Bad("no model", 400, "missing", body=b'{"prompt":"a"}'),
    Bad("an unknown model", 404, "no model of this name", {"model": "nobody"}),
    Bad("a path for a model", 404, "no model of this name", {"model": "../../etc/passwd"}),
    Bad("NUL in the model", 404, "no model of this name", {"model": "good\0"}),
    Bad("a refused model", 403, "does not pass", {"model": "bad"}),
    Bad("not JSON", 400, "not JSON", body=b"prompt=a"),
    Bad("half of JSON", 400, "not JSON", body=b'{"model":'),
    Bad("JSON, but a list", 400, "JSON object", body=b"[]"),
    Bad("nothing", 400, "not JSON", body=b""),
    Bad("invalid UTF-8", 400, "not JSON", body=b'{"model":"good","prompt":"\xff\xfe"}'),
    Bad("half a surrogate pair", 400, "JSON", body=b'{"model":"good","prompt":"\\ud800"}'),
    Bad("deep nesting", 400, "JSON", body=b"[" * 50_000),
    Bad("ten megabytes", 413, "larger than", {"prompt": "a" * 10_000_000}),
    Bad("not said to be JSON", 415, "application/json", headers={"Content-Type": "text/plain"}),
    Bad("no key", 401, "API key", headers={"Authorization": None}),
    Bad("a wrong key", 401, "API key", headers={"Authorization": "Bearer " + KEY[:-1] + "x"}),
    Bad("a key of another scheme", 401, "API key", headers={"Authorization": "Basic " + KEY}),
    Bad("no messages", 400, "messages", {"messages": []}, CHAT),
    Bad("an unknown role", 400, "messages", {"messages": [{"role": "tool", "content": "a"}]}, CHAT),
    Bad("a picture", 400, "messages", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]}, CHAT),
    Bad("the assistant's turn", 400, "last message", {"messages": [{"role": "assistant", "content": "a"}]}, CHAT),
    Bad("top_logprobs alone", 400, "needs logprobs", {"top_logprobs": 2}, CHAT),
    Bad("another method", 405, "method", route="/v1/completions", method="PUT"),
    Bad("another route", 404, "no such route", route="/v1/embeddings"),
    Bad("pages about the schema", 404, "no such route", route="/docs", method="GET"),
    Bad("the schema", 404, "no such route", route="/openapi.json", method="GET"),
    Bad("a report by path", 404, "no", route="/v1/models/..%2f..%2fetc/report", method="GET"),
    Bad("a file by path", 404, "no such route", route="/page.html", method="GET"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_it_is_refused_with_a_message(served: Served, bad: Bad, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="soul")
    reply = bad.send(served.url)
    assert reply.status_code == bad.status, reply.text[:300]
    told = reply.json()["error"]
    assert bad.says in told["message"]
    assert told["type"] and told["code"] and "param" in told
    assert reply.headers["x-request-id"]
    assert CANARY not in reply.text and CANARY not in caplog.text
    assert requests.get(f"{served.url}/healthz", timeout=5).status_code == 200


def test_a_good_request_is_logged_without_its_words(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="soul")
    reply = Bad("none", 200, "", headers={"x-request-id": "mine-1"}).send(served.url)
    assert reply.status_code == 200 and reply.headers["x-request-id"] == "mine-1"
    deadline = time.monotonic() + 5
    while "mine-1" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "mine-1 /v1/completions 200" in caplog.text
    assert CANARY not in caplog.text and reply.json()["choices"][0]["text"] not in caplog.text
    odd = Bad("none", 200, "", headers={"x-request-id": "a b\tc"}).send(served.url).headers["x-request-id"]
    assert odd != "a b\tc"


def test_metrics_count_without_content(served: Served) -> None:
    Bad("none", 200, "").send(served.url)
    Bad("none", 404, "", route="/v1/" + CANARY).send(served.url)
    assert requests.get(f"{served.url}/metrics", timeout=5).status_code == 401
    text = requests.get(f"{served.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=5).text
    assert 'soul_requests_total{route="/v1/completions",status="200"}' in text
    assert 'soul_tokens_total{kind="completion",model="good"}' in text
    assert 'soul_models{state="refused"} 1.0' in text
    assert CANARY not in text


def test_the_page_is_open_and_holds_no_model(served: Served) -> None:
    for path in ("/", "/page.js", "/page.css", "/readyz"):
        reply = requests.get(served.url + path, timeout=5)
        assert reply.status_code == 200
        assert "good.target" not in reply.text and KEY not in reply.text
    assert "script-src 'self'" in requests.get(served.url, timeout=5).headers["content-security-policy"]
    assert requests.get(f"{served.url}/v1/models", timeout=5).status_code == 401


def test_beyond_the_limit_is_429_with_retry_after(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    step = RunningBatch.step
    monkeypatch.setattr(RunningBatch, "step", lambda batch: (time.sleep(0.02), step(batch)))
    statuses: list[requests.Response] = []

    def ask() -> None:
        statuses.append(Bad("none", 200, "", {"max_tokens": 20, "prompt": "The"}).send(served.url))

    threads = [threading.Thread(target=ask) for _ in range(3 * LIMITS.max_requests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = [reply.status_code for reply in statuses]
    assert set(told) == {200, 429} and told.count(200) >= LIMITS.max_requests
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in statuses if reply.status_code == 429)


@pytest.fixture
def keyless(runs: dict[str, str]) -> Iterator[str]:
    """Without keys, and with a deadline that nothing meets."""
    hosting = Hosting(runs={"good": runs["good"]})
    limits = LIMITS.model_copy(update={"timeout_s": 0.05})
    backend = InProcess(limits)
    yield from serve(ServeConfig(hosting=hosting, limits=limits), backend, read_catalogue(hosting, on_loopback=True, hashes=Hashes()))
    for engine in backend.engines.values():
        engine.close()


def test_timeouts_and_names_of_other_hosts(keyless: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert requests.get(f"{keyless}/v1/models", timeout=5).status_code == 200
    other = requests.get(f"{keyless}/v1/models", headers={"Host": "evil.example"}, timeout=5)
    assert other.status_code == 403 and "Host header" in other.json()["error"]["message"]
    step = RunningBatch.step
    monkeypatch.setattr(RunningBatch, "step", lambda batch: (time.sleep(0.05), step(batch)))
    late = Bad("none", 504, "", {"max_tokens": 50}).send(keyless)
    assert late.status_code == 504 and "fewer tokens" in late.json()["error"]["message"]
    events = Bad("none", 200, "", {"max_tokens": 50, "stream": True}).send(keyless)
    assert events.status_code in (200, 504) and "timeout" in events.text


def test_keys() -> None:
    hashes = read_key_hashes({"SOUL_API_KEYS": "first-key-0123456789, second-key-0123456789"}, None)
    assert len(hashes) == 2 and is_admitted("Bearer second-key-0123456789", hashes) and is_admitted("bearer first-key-0123456789", hashes)
    for header in (None, "", "Bearer", "Bearer ", "Bearer first-key-012345678", "first-key-0123456789", f"Bearer {hashes[0]}"):
        assert not is_admitted(header, hashes)
    assert is_admitted(None, ())


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through hmac, as hashes of one length, and with all keys whether or not an earlier one fits."""
    compared: list[tuple[str, str]] = []

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("soul.serving.keys.hmac.compare_digest", compare)
    hashes = [hash_key(f"key-number-{n}-0123456789") for n in range(3)]
    for key in ("key-number-0-0123456789", "key-number-2-0123456789", "another", ""):
        compared.clear()
        assert is_admitted(f"Bearer {key}", hashes) == key.startswith("key-")
        assert [known for _, known in compared] == hashes
        assert {len(given) for given, _ in compared} == {64}


def test_keys_that_cannot_be_used() -> None:
    with pytest.raises(InputError, match="at least 16") as caught:
        read_key_hashes({"SOUL_API_KEYS": "short-key"}, None)
    assert "short-key" not in str(caught.value)
    with pytest.raises(ValueError, match="no API key"):
        ServeConfig(host="0.0.0.0")
    assert ServeConfig(host="0.0.0.0", key_hashes=(hash_key("first-key-0123456789"),)).host == "0.0.0.0"
