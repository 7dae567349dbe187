"""Keys and passwords are sent only to their own servers and displayed nowhere, not even if a server echoes them."""

from __future__ import annotations

import base64
import logging
import traceback

import pytest

from lmpipe import Completion, EngineError, LmpipeError
from lmpipe.engines import load_lm
from lmpipe.engines.server import ServerLM
from lmpipe.errors import ConfigError
from tests.engines.faulty_answers import RawRequest, RawResponse, always, answering, completion, http, message
from tests.engines.openai_server import request

PASSWORD, QUERY, KEY = "pass-w0rd", "query-s3cret", "sk-bearer-k3y"
BASIC = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
SECRETS = (PASSWORD, QUERY, KEY, BASIC)


def with_secrets(url: str) -> str:
    return url.replace("http://", f"http://user:{PASSWORD}@") + f"?api_key={QUERY}&version=1"


def authorization(received: RawRequest) -> str:
    lines = dict(line.split(": ", 1) for line in received.head.split("\r\n")[1:])
    return lines.get("Authorization", lines.get("authorization", ""))


def test_credentials_of_a_url_are_sent_and_take_precedence_over_a_key() -> None:
    with answering(always(http(completion()))) as raw:
        for url, key in ((with_secrets(raw.url), KEY), (raw.url, KEY), (raw.url.replace("//", "//tok%40en@"), "")):
            lm = ServerLM("m", [url], dialect="vllm", api_key=key)
            assert isinstance(lm.complete([request()])[0], Completion)
            lm.close()
    assert [authorization(received) for received in raw.requests] == [
        f"Basic {BASIC}",
        f"Bearer {KEY}",
        "Basic " + base64.b64encode(b"tok@en:").decode(),
    ]
    assert [received.path for received in raw.requests] == [
        f"/v1/chat/completions?api_key={QUERY}&version=1",
        *["/v1/chat/completions"] * 2,
    ]


ECHOES = {
    "400": lambda echo_text: http({"error": {"message": echo_text}}, "400 Bad Request"),
    "401": lambda echo_text: http({"error": {"message": echo_text}}, "401 Unauthorized"),
    "404 in words": lambda echo_text: http(echo_text.encode(), "404 Not Found"),
    "422 in a list": lambda echo_text: http([{"input": echo_text}], "422 Unprocessable"),
    "500": lambda echo_text: http({"detail": echo_text}, "500 Internal Server Error"),
    "a page": lambda echo_text: http(f"<html>{echo_text}</html>".encode()),
    "nonsense": lambda echo_text: http({"choices": echo_text}),
    "a finish reason": lambda echo_text: http(completion(choice={"finish_reason": [echo_text]})),
    "a redirect": lambda echo_text: http(b"", "302 Found", Location=f"http://elsewhere/{echo_text.split()[1]}"),
    "no HTTP": lambda echo_text: RawResponse((echo_text.encode(),)),
    "a status line": lambda echo_text: RawResponse((f"HTTP/9.9 {echo_text}\r\n\r\n".encode(),)),
    "a phrase": lambda echo_text: RawResponse((message({}, f"500 {echo_text.split()[1]}"),)),
    "a long page": lambda echo_text: http((echo_text + " ").encode() * 9999),
}


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("dialect", [None, "vllm"])
@pytest.mark.parametrize("basic", [True, False])
def test_what_a_server_echoes_is_hidden(
    echo: str, dialect: str | None, basic: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    def answer(received: RawRequest) -> RawResponse:
        kind, proof = authorization(received).split()
        credentials = base64.b64decode(proof).decode() if kind == "Basic" else proof
        return ECHOES[echo](f"{kind} {proof} {credentials} {credentials.partition(':')[2]} {received.path}")

    with answering(answer) as raw:
        url = with_secrets(raw.url) if basic else f"{raw.url}?api_key={QUERY}"
        lm = ServerLM("m", [url], dialect=dialect, api_key=KEY, retries=1, backoff=0.001)  # type: ignore[arg-type]
        try:
            (error,) = lm.complete([request()])
        except EngineError as raised:
            error = raised
        lm.close()
    assert isinstance(error, EngineError)
    texts = [str(error), repr(error), "".join(traceback.format_exception(error)), caplog.text, repr(lm), lm.name]
    chain: BaseException | None = error
    while chain is not None:  # including errors that a traceback does not show
        texts.append(repr(chain.args))
        chain = chain.__cause__ or chain.__context__
    assert raw.url.removesuffix("/v1") in texts[0] or "rejected the request" in texts[0]
    for text in texts:
        assert not [secret for secret in SECRETS if secret in text]


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{PASSWORD}@",
        f"http://user:{PASSWORD}/@host/v1",
        f"http://user:{PASSWORD}@host:port/v1",
        f"http://user:{PASSWORD}@host/@scope",
        f"http://user:{PASSWORD}@[::1/v1",
        f"http://user:{PASSWORD}@ho st/v1",
        f"user:{PASSWORD}@host/v1",
        f"ftp://user:{PASSWORD}@host/v1",
        f"http://host\ud800/v1?{PASSWORD}",
        f"http://{'a' * 300}.com:99999999/v1?{PASSWORD}",
        "",
    ],
)
def test_an_invalid_url_is_rejected_without_showing_its_password(url: str) -> None:
    for make in (lambda: ServerLM("m", [url]), lambda: ServerLM.from_spec(f"m@{url}"), lambda: load_lm(f"m@{url}")):
        with pytest.raises(ConfigError) as raised:
            make()
        assert PASSWORD not in "".join(traceback.format_exception(raised.value))


def test_passwords_with_commas_and_lists_of_urls_can_be_told_apart() -> None:
    lm = load_lm("openai:m@http://user:a,b@one:1/v1, http://two:2/v1")
    assert repr(lm) == "ServerLM('m', ['http://one:1/v1', 'http://two:2/v1'])"


@pytest.mark.parametrize("key", ["sk-k3y\nX-Header: a", "sk k3y", "sk-käy", "\ud800"])
def test_a_key_that_no_header_can_contain_is_rejected_without_being_shown(key: str) -> None:
    with pytest.raises(ConfigError, match="API key contains spaces or non-ASCII characters") as raised:
        ServerLM("m", ["http://127.0.0.1:9/v1"], api_key=key)
    assert key not in str(raised.value)


def test_spaces_around_a_key_are_removed() -> None:
    with answering(always(http(completion()))) as raw:
        lm = ServerLM("m", [raw.url], dialect="vllm", api_key=f" {KEY}\n")
        lm.complete([request()])
        lm.close()
    assert authorization(raw.requests[0]) == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "proxy", ["ftp://{}@proxy", "socks5://{}@proxy", "http://{}@[pro", "://{}", "http://{}@127.0.0.1:9"]
)
def test_an_unusable_proxy_is_reported_without_its_password(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy.format(f"user:{PASSWORD}"))
    with pytest.raises(LmpipeError, match=r"check HTTPS_PROXY|no connection in") as raised:
        ServerLM("m", ["http://host.invalid/v1"], dialect="vllm", retries=0).complete([request()])
    assert PASSWORD not in "".join(traceback.format_exception(raised.value))
