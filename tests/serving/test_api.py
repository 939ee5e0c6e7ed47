"""The routes as OpenAI's own client sees them, against torch itself."""

from __future__ import annotations

import json
import time

import openai
import pytest
import requests
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from soul.data.chat import ChatFormat
from soul.evaluate.generate import generate_batch, stop_ids
from soul.models.load import load_model, load_tokenizer
from soul.serving.decoder import RunningBatch
from soul.serving.gate import Hashes, read_catalogue
from soul.serving.settings import Hosting, ServeConfig
from tests.serving.conftest import KEY, LIMITS, SECONDS, InProcess, Served, serve

PROMPTS = ["Question: Who wrote it?\nAnswer:", "The", "Who is the author of the book that was written in the town of"]
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def good(served: Served) -> Loaded:
    folder = served.folder("good")
    return load_model(folder).eval(), load_tokenizer(folder)


def greedy(good: Loaded, ids: list[int], most: int) -> str:
    model, tokenizer = good
    tokens = generate_batch(
        model, [ids], pad_id=0, eos_ids=stop_ids(good[0].generation_config, good[1]), max_new_tokens=most, device=torch.device("cpu")
    )[0]
    return str(tokenizer.decode([*ids, *tokens])).removeprefix(str(tokenizer.decode(ids)))


def encode(good: Loaded, text: str) -> list[int]:
    ids: list[int] = good[1].encode(text, add_special_tokens=False)
    return ids


def test_models_are_listed_with_role_and_alias(served: Served) -> None:
    listed = served.client().models.list()
    assert [model.id for model in listed.data] == ["good", "good.target", "good.retrained", "bad.target", "bad.retrained", "production"]
    assert served.client().models.retrieve("production").model_dump()["role"] == "unlearned"
    refused = listed.model_dump()["refused"]
    assert [entry["id"] for entry in refused] == ["bad"] and "does not pass" in refused[0]["reason"]


def test_greedy_completions_of_several_prompts_equal_generate(served: Served, good: Loaded) -> None:
    answer = served.client().completions.create(model="good", prompt=PROMPTS, max_tokens=17, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.text for choice in answer.choices] == [greedy(good, encode(good, prompt), 17) for prompt in PROMPTS]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(encode(good, prompt)) for prompt in PROMPTS)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_token_ids_are_taken_as_they_are(served: Served, good: Loaded) -> None:
    ids = [encode(good, prompt) for prompt in PROMPTS]
    client = served.client()
    by_text = client.completions.create(model="good", prompt=PROMPTS, max_tokens=5, temperature=0)
    by_ids = client.completions.create(model="good", prompt=ids, max_tokens=5, temperature=0)
    one = client.completions.create(model="good", prompt=ids[0], max_tokens=5, temperature=0)
    assert [choice.text for choice in by_ids.choices] == [choice.text for choice in by_text.choices]
    assert one.choices[0].text == by_text.choices[0].text


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_gives_the_log_probabilities_that_lm_eval_sums(served: Served, good: Loaded, max_tokens: int, as_ids: bool) -> None:
    """Its `local-completions` sends prompt and continuation with echo and logprobs 1, and sums the continuation's part."""
    model, _ = good
    rows = [encode(good, prompt) for prompt in PROMPTS]
    body = {"model": "good", "prompt": rows if as_ids else PROMPTS, "max_tokens": max_tokens, "logprobs": 1, "echo": True, "temperature": 0}
    reply = requests.post(
        f"{served.url}/v1/completions", json={**body, "seed": 1234}, headers={"Authorization": f"Bearer {KEY}"}, timeout=30
    )
    assert reply.status_code == 200, reply.text
    for ids, choice in zip(rows, reply.json()["choices"], strict=True):
        told = choice["logprobs"]
        with torch.inference_mode():
            logps = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], dim=-1)
        want = [float(logps[place, token]) for place, token in enumerate(ids[1:])]
        assert told["token_ids"][: len(ids)] == ids
        assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == len(ids) + max_tokens
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        assert told["token_logprobs"][1 : len(ids)] == pytest.approx(want, abs=1e-5)
        is_greedy = [value == max(top.values()) for value, top in zip(told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True)]
        assert is_greedy[: len(ids) - 1] == [int(logps[place].argmax()) == token for place, token in enumerate(ids[1:])]
        assert all(is_greedy[len(ids) - 1 :])


def test_the_token_that_ends_a_text_has_its_log_probability(served: Served, good: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks for one token more than it scores, and drops the last: were the end missing, it would drop an answer's last token."""
    ids = encode(good, PROMPTS[2])
    spec = served.catalogue.models["good"].spec
    assert spec is not None
    served.client().completions.create(model="good", prompt="The", max_tokens=1)
    monkeypatch.setattr(served.backend.engines[spec.sha256], "eos_ids", tuple(range(600)))
    for stream in (False, True):
        told = served.client().completions.create(
            model="good", prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0, stream=stream
        )
        parts = list(told) if stream else [told]  # type: ignore[call-overload]
        logps = [logp for part in parts if part.choices[0].logprobs for logp in part.choices[0].logprobs.token_logprobs]
        assert len(logps) == len(ids) + 1 and logps[-1] is not None
        assert parts[-1].choices[0].finish_reason == "stop"


def test_top_logprobs_do_not_collide(served: Served) -> None:
    """Half-character tokens all read the same as text: each must keep an entry of its own."""
    halves = list(range(130, 190))  # byte tokens of the byte-level vocabulary
    told = served.client().completions.create(model="good", prompt=halves, max_tokens=0, echo=True, logprobs=5).choices[0].logprobs
    assert told is not None and told.tokens is not None and told.top_logprobs is not None
    assert any(token.startswith("token_id:") for token in told.tokens)
    assert all(len(top) in (5, 6) for top in told.top_logprobs[1:])
    assert "\ufffd" not in json.dumps(told.model_dump(), ensure_ascii=False)


def test_a_stream_adds_up_to_the_answer_and_comes_in_parts(served: Served) -> None:
    client = served.client()
    whole = client.completions.create(model="good", prompt=PROMPTS[0], max_tokens=40, temperature=0, logprobs=2)
    parts = list(
        client.completions.create(
            model="good", prompt=PROMPTS[0], max_tokens=40, temperature=0, logprobs=2, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == whole.choices[0].finish_reason
    offsets = [
        offset for part in parts if part.choices and part.choices[0].logprobs for offset in part.choices[0].logprobs.text_offset or []
    ]
    assert whole.choices[0].logprobs is not None and offsets == whole.choices[0].logprobs.text_offset
    assert parts[-1].usage == whole.usage
    assert len(parts) > 20


def test_stream_of_several_choices(served: Served) -> None:
    client = served.client()
    options = {"model": "good", "prompt": PROMPTS[:2], "max_tokens": 9, "n": 2, "seed": 5, "temperature": 1.2}
    texts = ["", "", "", ""]
    for part in client.completions.create(**options, stream=True):  # type: ignore[call-overload]
        texts[part.choices[0].index] += part.choices[0].text
    whole = client.completions.create(**options)  # type: ignore[call-overload]
    assert texts == [choice.text for choice in whole.choices]
    assert len(set(texts)) == 4  # choices of one prompt differ


def test_seeds_repeat_and_differ(served: Served) -> None:
    client = served.client()

    def text(seed: int | None) -> str:
        return client.completions.create(model="good", prompt="The", max_tokens=12, temperature=1.5, seed=seed).choices[0].text

    assert text(3) == text(3)
    assert len({text(seed) for seed in range(4)}) > 1
    assert text(None) != text(None)


def test_stop_strings_end_the_text_before_them(served: Served) -> None:
    client = served.client()
    full = client.completions.create(model="good", prompt=PROMPTS[0], max_tokens=30, temperature=0).choices[0].text
    for stop in (full[7:9], full[4:12], full[-3:]):
        for stream in (False, True):
            found = client.completions.create(
                model="good", prompt=PROMPTS[0], max_tokens=30, temperature=0, stop=["never there", stop], stream=stream
            )
            parts = list(found) if stream else [found]  # type: ignore[call-overload]
            assert "".join(part.choices[0].text for part in parts if part.choices) == full[: full.index(stop)]
            assert parts[-1].choices[0].finish_reason == "stop"


def test_chat_uses_the_format_of_training(served: Served, good: Loaded) -> None:
    ids = ChatFormat().prompt_ids("Who wrote it?", good[1])  # type: ignore[arg-type]
    want = greedy(good, ids, 14).lstrip()
    client = served.client()
    messages = [{"role": "user", "content": "Who wrote it?"}]
    answer = client.chat.completions.create(
        model="production", messages=messages, max_tokens=14, temperature=0, logprobs=True, top_logprobs=3
    )  # type: ignore[arg-type,call-overload]
    assert answer.choices[0].message.content == want and answer.model == "good"
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) in (3, 4)
    stream = client.chat.completions.create(model="good", messages=messages, max_completion_tokens=14, temperature=0, stream=True)  # type: ignore[arg-type,call-overload]
    assert "".join(part.choices[0].delta.content or "" for part in stream) == want


def test_score_gives_the_answers_own_tokens(served: Served, good: Loaded) -> None:
    form, tokenizer = ChatFormat(), good[1]
    before = form.prompt_ids("Who?", tokenizer)  # type: ignore[arg-type]
    ids = form.answer_ids("The author of the town.", tokenizer)  # type: ignore[arg-type]
    body = {"model": "good", "messages": [{"role": "user", "content": "Who?"}], "answer": "The author of the town."}
    told = requests.post(f"{served.url}/v1/score", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=30).json()["tokens"]
    with torch.inference_mode():
        logps = torch.log_softmax(good[0](input_ids=torch.tensor([before + ids])).logits[0], dim=-1)
    want = [float(logps[len(before) - 1 + place, token]) for place, token in enumerate(ids)]
    assert [token["logprob"] for token in told] == pytest.approx(want, abs=1e-5)
    assert "".join(token["token"] for token in told) == " The author of the town."


def test_refusals_are_the_clients_own_exceptions(served: Served) -> None:
    def ask(model: str = "good", key: str = KEY, **options: object) -> None:
        served.client(key).completions.create(**{"model": model, "prompt": "The", "max_tokens": 1, **options})  # type: ignore[call-overload]

    cases: list[tuple[type[openai.APIStatusError], dict[str, object]]] = [
        (openai.AuthenticationError, {"key": "wrong-key-of-some-length"}),
        (openai.PermissionDeniedError, {"model": "bad"}),
        (openai.NotFoundError, {"model": "nobody"}),
        (openai.NotFoundError, {"model": "../../etc"}),
        (openai.BadRequestError, {"prompt": "word " * 300}),
        (openai.BadRequestError, {"max_tokens": -1}),
        (openai.BadRequestError, {"max_tokens": "5"}),
    ]
    for kind, options in cases:
        with pytest.raises(kind) as caught:
            ask(**options)  # type: ignore[arg-type]
        assert len(str(caught.value.body["message"])) > 20, options  # type: ignore[index]
        assert caught.value.code


def test_a_refused_model_says_why(served: Served) -> None:
    told = requests.get(f"{served.url}/v1/models/bad/report", headers={"Authorization": f"Bearer {KEY}"}, timeout=10).json()
    assert not told["hosted"] and "does not pass" in told["reason"]
    assert {check["name"]: check["passed"] for check in told["checks"]} == {
        "model_utility": True,
        "forget.rougeL_recall": False,
        "forget.exact_memorization": False,
    }
    assert {question["group"] for question in told["questions"]} == {"forget", "retain", "world"}


def test_an_unevaluated_model_is_marked_wherever_it_shows(runs: dict[str, str]) -> None:
    hosting = Hosting(runs={"bad": runs["bad"]}, allow_unevaluated=True)
    backend = InProcess(LIMITS)
    for url in serve(ServeConfig(hosting=hosting), backend, read_catalogue(hosting, on_loopback=True, hashes=Hashes())):
        listed = {model["id"]: model for model in requests.get(f"{url}/v1/models", timeout=SECONDS).json()["data"]}
        assert not listed["bad"]["evaluated"] and listed["bad.target"]["evaluated"]
        assert "does not pass" in requests.get(f"{url}/v1/models/bad/report", timeout=SECONDS).json()["reason"]
        for stream in (False, True):
            body = {"model": "bad", "prompt": "The", "max_tokens": 2, "stream": stream}
            reply = requests.post(f"{url}/v1/completions", json=body, timeout=SECONDS)
            assert reply.ok and "not approved" in reply.headers["x-soul-warning"]
            assert (
                "x-soul-warning"
                not in requests.post(f"{url}/v1/completions", json={**body, "model": "bad.target"}, timeout=SECONDS).headers
            )
    for engine in backend.engines.values():
        engine.close()


def test_a_client_that_leaves_stops_the_work(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    step, num_steps = RunningBatch.step, 0

    def slow(batch: RunningBatch) -> None:
        nonlocal num_steps
        num_steps += 1
        time.sleep(0.02)
        step(batch)

    monkeypatch.setattr(RunningBatch, "step", slow)
    body = {"model": "good", "prompt": "The", "max_tokens": 200, "n": 4, "temperature": 1, "stream": True}
    with requests.post(
        f"{served.url}/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, stream=True, timeout=30
    ) as reply:
        next(reply.iter_lines())
        assert served.backend.num_rows > 0
    begun = time.monotonic()
    while served.backend.num_rows and time.monotonic() - begun < 10:
        time.sleep(0.01)
    assert served.backend.num_rows == 0
    assert num_steps < 100  # of 200
