"""Test the server with OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import npllama
from npllama.chat import chat_format
from npllama.cli import main
from npllama.sampling import log_probabilities
from npllama.text import batching, completion

openai = pytest.importorskip("openai", reason="openai is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("starlette", reason="starlette is not installed")

from npllama.serve.app import Settings, make_app  # noqa: E402
from npllama.serve.worker import Worker  # noqa: E402

from serving import served  # noqa: E402
from system import hear_signals  # noqa: E402

PROMPT = "ROMEO:"


@pytest.fixture(scope="module")
def model():
    return npllama.load()


@pytest.fixture(scope="module")
def server(model):
    with served(model) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with server.client as found:
        yield found


def test_models(client):
    assert [entry.id for entry in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "npllama"


def test_a_completion_is_what_complete_makes(client, model):
    expected = npllama.complete(model, PROMPT, max_tokens=12, temperature=0.9, top_p=0.9, seed=5)
    found = client.completions.create(model="demo", prompt=PROMPT, max_tokens=12, temperature=0.9, top_p=0.9, seed=5)
    assert found.choices[0].text == expected.text
    assert found.choices[0].finish_reason == "length"
    prompt = len(expected.prompt_tokens)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (prompt, 12, prompt + 12)


def test_a_stream_is_the_same_text_in_pieces(client, model):
    expected = npllama.complete(model, PROMPT, max_tokens=12)
    arguments = {"model": "demo", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stream": True}
    events = list(client.completions.create(**arguments, stream_options={"include_usage": True}))
    assert "".join(event.choices[0].text for event in events[:-1]) == expected.text
    assert len(events) > 6
    assert [event.choices[0].finish_reason for event in events[:-1]] == [None] * (len(events) - 2) + ["length"]
    assert events[-1].usage.completion_tokens == 12


def test_a_stop_string_ends_a_text(client):
    found = client.completions.create(model="demo", prompt=PROMPT, max_tokens=50, temperature=0, stop=["you,"])
    assert found.choices[0].text == "\nI'll tell "
    assert found.choices[0].finish_reason == "stop"


def test_prompts_in_arrays_and_several_choices_of_each(client, model):
    prompts = [model.tokenizer.encode(text, bos=True) for text in (PROMPT, "Once more")]
    found = client.completions.create(model="demo", prompt=prompts, max_tokens=5, temperature=1, n=2, seed=3)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in found.choices]
    assert len(set(texts)) == 4
    again = client.completions.create(model="demo", prompt=[PROMPT, "Once more"], max_tokens=5, temperature=1, n=2, seed=3)
    assert [choice.text for choice in again.choices] == texts
    assert found.usage.prompt_tokens == sum(map(len, prompts))


@pytest.mark.parametrize("stream", [False, True])
def test_echo_and_log_probabilities_are_those_of_the_logits(stream, client, model):
    ids = model.tokenizer.encode(text := "ROMEO:\nI'll tell thee", bos=True)
    arguments = {"model": "demo", "prompt": text, "max_tokens": 2, "temperature": 0, "logprobs": 3, "echo": True}
    if stream:
        parts = [event.choices[0] for event in client.completions.create(**arguments, stream=True)]
    else:
        parts = [client.completions.create(**arguments).choices[0]]
    made = npllama.complete(model, text, max_tokens=2)
    whole = text + made.text
    assert "".join(part.text for part in parts) == whole
    expected = log_probabilities(npllama.forward(model.params, model.config, ids + made.tokens))
    found = [x for part in parts for x in part.logprobs.token_logprobs]
    assert found[0] is None
    chosen = expected[np.arange(len(ids) + 1), (ids + made.tokens)[1:]]
    np.testing.assert_allclose(found[1:], chosen, atol=2e-5)
    tops = [x for part in parts for x in part.logprobs.top_logprobs]
    for row, top in zip(expected, tops[1:], strict=False):
        assert max(top.values()) == pytest.approx(row.max(), abs=2e-5)
        assert len(top) == 3
    tokens = [x for part in parts for x in part.logprobs.tokens]
    offsets = [x for part in parts for x in part.logprobs.text_offset]
    assert (tokens[0], offsets[0]) == ("<|begin_of_text|>", 0)
    assert all(whole[offset:].startswith(token) for offset, token in zip(offsets[1:], tokens[1:], strict=True))


@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_id_that_ends_a_text_has_its_log_probability(stream, client, model, monkeypatch):
    """Include it, as OpenAI does: lm-eval drops the last token, without the stop id one of the prompt."""
    made = npllama.complete(model, PROMPT, max_tokens=9, logprobs=2)
    at = next(i for i in range(3, 9) if made.tokens[i] not in made.tokens[:i])
    monkeypatch.setattr(completion, "stop_ids_of", lambda model, ids: {made.tokens[at]})
    arguments = {"model": "demo", "prompt": PROMPT, "max_tokens": 9, "temperature": 0, "logprobs": 2, "echo": True}
    if stream:
        parts = [event.choices[0] for event in client.completions.create(**arguments, stream=True)]
    else:
        parts = [client.completions.create(**arguments).choices[0]]
    assert "".join(part.text for part in parts) == PROMPT + model.tokenizer.decode(made.tokens[:at])
    assert parts[-1].finish_reason == "stop"
    found = [x for part in parts for x in part.logprobs.token_logprobs][len(made.prompt_tokens) :]
    np.testing.assert_allclose(found, [entry.logprob for entry in made.logprobs[: at + 1]], atol=2e-5)


def test_half_a_surrogate_pair_is_echoed_as_it_is_encoded(server):
    status, reply = server.post("/v1/completions", {"prompt": "a\ud800b", "max_tokens": 0, "echo": True})
    assert (status, reply["choices"][0]["text"]) == (200, "a\ufffdb")
    status, reply = server.post("/v1/completions", {"prompt": "a", "\ud800": 1})
    assert (status, reply["error"]["param"]) == (400, "\\ud800")


def test_no_new_tokens_but_the_prompts_log_probabilities(client):
    found = client.completions.create(model="demo", prompt=PROMPT, max_tokens=0, logprobs=1, echo=True)
    assert found.choices[0].text == PROMPT
    assert found.choices[0].logprobs.token_logprobs[1] == pytest.approx(-3.735281, abs=1e-5)
    assert found.usage.completion_tokens == 0


def test_chat(client, model):
    messages = [{"role": "user", "content": "Good morrow"}]
    ids = chat_format(model).prompt(messages).ids
    expected = npllama.complete(model, ids, max_tokens=9)
    arguments = {"model": "demo", "messages": messages, "temperature": 0, "max_completion_tokens": 9}
    found = client.chat.completions.create(**arguments, logprobs=True, top_logprobs=2)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].message.role == "assistant"
    content = found.choices[0].logprobs.content
    assert [len(entry.top_logprobs) for entry in content] == [2] * 9
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == expected.text
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "morrow"}]
    arguments["messages"] = [{"role": "user", "content": parts}]
    events = [event.choices[0] for event in client.chat.completions.create(**arguments, stream=True)]
    assert events[0].delta.role == "assistant"
    assert "".join(event.delta.content or "" for event in events) == expected.text
    assert events[-1].finish_reason == "length"


def test_many_clients_at_once_get_what_each_gets_alone(client, model):
    prompts = ["To be", "Once more unto", "ROMEO:", "My lord,", "O", "What light through yonder", "Now", "JULIET:\nGood"]
    expected = [npllama.complete(model, prompt, max_tokens=10).text for prompt in prompts]

    def ask(prompt):
        return client.completions.create(model="demo", prompt=prompt, max_tokens=10, temperature=0).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, prompts)) == expected


HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("completions", {"prompt": "x", "grammar": "y"}, "grammar", "the parameter 'grammar' is not supported"),
        ("completions", {"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias", "which is not supported"),
        ("completions", {"prompt": "x", "max_tokens": -1}, "max_tokens", "max_tokens is -1, expected 0 or more"),
        ("completions", {"prompt": "x", "max_tokens": True}, "max_tokens", "max_tokens is True"),
        ("completions", {"prompt": "x", "temperature": "warm"}, "temperature", "temperature is 'warm', expected 0 to 100"),
        ("completions", {"prompt": "x", "n": 0}, "n", "n is 0"),
        ("completions", {"prompt": "x", "stop": [""]}, "stop", "none of them empty"),
        ("completions", {"prompt": "x", "best_of": 3}, "best_of", "best_of is 3 with n of 1"),
        ("completions", {"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options", "with stream: true"),
        ("completions", {"prompt": "x", "top_p": 0}, "top_p", "top_p is 0, expected more than 0"),
        ("completions", {"prompt": []}, "prompt", "prompt is []"),
        ("completions", {"prompt": [1 << 70]}, "prompt", "expected a text, a list of token ids"),
        ("completions", {"prompt": [999999]}, "prompt", "999999 is outside the vocabulary"),
        ("completions", {"prompt": [-1]}, "prompt", "-1 is outside the vocabulary"),
        ("completions", {}, "prompt", "prompt is None"),
        ("completions", {"prompt": "x " * 3000}, "prompt", "the context holds 512"),
        ("chat/completions", {"messages": []}, "messages", "messages is []"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages", "expected role and content as texts"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "of type text"),
        ("chat/completions", {"messages": HELLO, "tools": [{}]}, "tools", "which is not supported"),
        ("chat/completions", {"messages": HELLO, "top_logprobs": 1}, "top_logprobs", "without logprobs"),
        (
            "chat/completions",
            {"messages": HELLO, "max_tokens": 5, "max_completion_tokens": 9},
            "max_completion_tokens",
            "max_completion_tokens is 9 with max_tokens of 5: expected one of them",
        ),
        (
            "chat/completions",
            {"messages": HELLO, "response_format": {"type": "json_object"}},
            "response_format",
            "not supported",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(path, body, param, message, client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(f"/{path}", body=body, cast_to=object)
    error = caught.value.body
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_parameters_that_change_nothing_are_taken(client):
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "me", "best_of": 1}
    client.completions.create(model="demo", prompt="x", max_tokens=1, **neutral)


def test_errors_have_the_right_status(server, client):
    with pytest.raises(openai.NotFoundError, match="expected demo"):
        client.completions.create(model="gpt-4o", prompt="x")
    assert server.raw("GET", "/nowhere")[0] == 404
    status, _, data = server.raw("GET", "/v1/completions")
    assert (status, json.loads(data)["error"]["type"]) == (405, "invalid_request_error")
    assert server.raw("POST", "/v1/completions", b"{nonsense")[0] == 400
    assert server.raw("POST", "/v1/completions", b"[" * 100_000)[0] == 400
    assert server.post("/v1/completions", [1])[0] == 400
    assert server.raw("POST", "/v1/completions", b'{"prompt": "' + b"x" * (1 << 20) + b'"}')[0] == 413
    assert server.raw("POST", "/v1/completions", b'{"prompt": "x"}', Content_Type="text/plain")[0] == 415


def test_a_page_elsewhere_can_neither_read_nor_ask(server):
    assert server.post("/v1/completions", {"prompt": "x"}, Host="evil.example")[0] == 403
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}, Host=f"localhost:{server.port}")[0] == 200
    asking = {"Origin": "https://evil.example", "Access_Control_Request_Method": "POST"}
    status, headers, _ = server.raw("OPTIONS", "/v1/completions", **asking)
    assert status == 405
    assert not any(name.startswith("access-control") for name in headers)


def test_a_key_and_an_origin_that_may(model):
    with served(model, api_key="s3cret", origins=("https://good.example",)) as guarded:
        with guarded.client as client:
            assert client.models.list().data
        assert guarded.raw("GET", "/health")[0] == 200
        assert guarded.raw("GET", "/v1/models")[0] == 401
        for given in ("Bearer s3cre", "Bearer s3crets", "Bearer é"):
            assert guarded.raw("GET", "/v1/models", Authorization=given)[0] == 401
        asking = {"Origin": "https://good.example", "Access_Control_Request_Method": "POST"}
        status, headers, _ = guarded.raw("OPTIONS", "/v1/completions", **asking)
        assert (status, headers["access-control-allow-origin"]) == (200, "https://good.example")


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def wait_until_idle(worker: Worker) -> None:
    wait_until(lambda: worker.idle)


def test_a_full_queue_is_429_and_one_that_goes_makes_room(model):
    with served(model, rows=1, most=1) as narrow, narrow.client as client:
        arguments = {"model": "demo", "temperature": 0, "max_tokens": 100, "stream": True}
        first = client.completions.create(prompt="O", **arguments)
        next(iter(first))
        second = client.completions.create(prompt="To be", **arguments)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(prompt="x", **arguments)
        assert caught.value.response.headers["retry-after"] == "1"
        first.close()  # disconnects, and the second request takes its row
        assert len(list(second)) > 5
        wait_until_idle(narrow.worker)


def test_more_texts_than_ever_fit_are_refused_before_any_is_made(model, monkeypatch):
    """Refuse a small body that asks for millions of texts; those that fit later get 429."""
    monkeypatch.setattr("npllama.serve.app.Continuation", None)
    with served(model, rows=1, most=2) as narrow:
        for body, param, n in (
            ({"prompt": "x", "n": 4}, "n", 4),
            ({"prompt": ["x"] * 4}, "prompt", 4),
            ({"prompt": [[1]] * 100_000, "n": 3}, "prompt", 300_000),
        ):
            status, reply = narrow.post("/v1/completions", body)
            assert (status, reply["error"]["param"]) == (400, param)
            assert reply["error"]["message"].startswith(f"the request asks for {n:,} texts (")
            assert reply["error"]["message"].endswith("), expected at most 3")
        assert narrow.post("/v1/chat/completions", {"messages": HELLO, "n": 4})[0] == 400


def test_a_client_that_goes_before_the_first_event_is_noticed(model):
    """End the texts of a stream that is never begun: its client has gone while the prompt was encoded."""
    worker = Worker(model, 1, 4)
    application = make_app(model, worker, chat_format(model), Settings("demo", 512, hosts=None))
    body = json.dumps({"prompt": "O", "max_tokens": 500, "stream": True}).encode()
    cancelled = []
    cancel = worker.cancel
    worker.cancel = lambda jobs: (cancelled.extend(jobs), cancel(jobs))
    received = iter([{"type": "http.request", "body": body}])

    async def receive():
        return next(received, {"type": "http.disconnect"})

    async def send(message):
        pass

    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST"}
    scope |= {"path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": ""}
    scope |= {"scheme": "http", "headers": [(b"content-type", b"application/json")], "client": None, "server": None}
    asyncio.run(application(scope, receive, send))
    assert len(cancelled) == 1
    worker.close()
    assert worker.join(60)
    assert len(cancelled[0].continuation.completion.tokens) < 500


def test_a_client_that_goes_while_it_waits_is_noticed(model):
    with served(model, rows=1) as narrow, narrow.client as client:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).completions.create(model="demo", prompt="O", max_tokens=500, temperature=2)
        wait_until_idle(narrow.worker)


def test_the_time_limit(model):
    with served(model, most_seconds=0.05) as hasty, hasty.client as client:
        with pytest.raises(openai.InternalServerError, match=r"longer than 0\.05 seconds"):
            client.completions.create(model="demo", prompt="O " * 200, max_tokens=300)
        wait_until_idle(hasty.worker)


def test_a_failing_pass_ends_its_texts_and_not_the_server(client, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(batching, "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
            client.completions.create(model="demo", prompt="x")
    assert client.completions.create(model="demo", prompt="x", max_tokens=1).choices


def test_an_error_outside_of_a_pass_ends_its_texts_and_not_the_server(client, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(completion.Continuation, "push", lambda *args: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
            client.completions.create(model="demo", prompt="x")
    assert client.completions.create(model="demo", prompt="x", max_tokens=1).choices


def test_tokens_as_llama_cpp_has_them(server, model):
    ids = model.tokenizer.encode("Good morrow")
    assert server.post("/tokenize", {"content": "Good morrow"}) == (200, {"tokens": ids})
    assert server.post("/tokenize", {"content": "Good", "add_special": True})[1]["tokens"][0] == model.tokenizer.bos_id
    pieces = server.post("/tokenize", {"content": "Good", "with_pieces": True})[1]["tokens"]
    assert [entry["piece"] for entry in pieces] == [model.tokenizer.piece(entry["id"]) for entry in pieces]
    eos = next(iter(model.tokenizer.special_tokens))
    assert len(server.post("/tokenize", {"content": eos})[1]["tokens"]) == 1
    assert len(server.post("/tokenize", {"content": eos, "parse_special": False})[1]["tokens"]) > 1
    assert server.post("/detokenize", {"tokens": ids}) == (200, {"content": "Good morrow"})
    assert server.post("/detokenize", {"tokens": [1 << 40]})[0] == 400


def test_the_page_asks_the_network_for_nothing(server):
    status, headers, data = server.raw("GET", "/")
    assert status == 200
    assert "connect-src 'self'" in headers["content-security-policy"]
    assert not re.search(rb"https?://|src=|@import|url\(", data)


# -------------------------------------------------------------------------------------------------------------- as a process


@pytest.fixture
def process(tmp_path):
    command = [sys.executable, "-m", "npllama", "serve", "--port", "0"]
    with open(tmp_path / "err", "wb") as errors:
        found = subprocess.Popen(command, stderr=errors, stdout=subprocess.PIPE, preexec_fn=hear_signals)
        try:
            wait_until(lambda: b"http://" in (tmp_path / "err").read_bytes() or found.poll() is not None)
            (port,) = re.findall(r"http://127\.0\.0\.1:(\d+)/v1", (tmp_path / "err").read_text())
            yield found, int(port), tmp_path / "err"
        finally:
            found.kill()
            found.communicate()


def test_sigterm_finishes_what_runs(process):
    server, port, errors = process
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="demo", prompt="My secret is", max_tokens=60, temperature=0, stream=True)
        next(iter(stream))
        server.send_signal(signal.SIGTERM)
        assert [event.choices[0].finish_reason for event in stream][-1] == "length"
    assert server.wait(10) == 0
    assert len(errors.read_text().splitlines()) == 1
    assert "secret" not in errors.read_text()


def test_a_client_that_goes_within_its_request_leaves_no_traceback(process):
    server, port, errors = process
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head)
        time.sleep(0.2)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        assert client.models.list().data
    server.send_signal(signal.SIGTERM)
    assert server.wait(10) == 0
    assert len(errors.read_text().splitlines()) == 1


def test_ctrl_c_is_130(process):
    server, _, errors = process
    server.send_signal(signal.SIGINT)
    assert server.wait(10) == 130
    assert "Traceback" not in errors.read_text()


def test_an_address_that_is_taken_is_one_line(server, capsys):
    assert main(["serve", "--port", str(server.port)]) == 2
    err = capsys.readouterr().err
    assert err == f"npllama serve: can't listen on 127.0.0.1 port {server.port}: Address already in use\n"
