"""Keys and passwords are sent to the servers that they are for, and reach nothing else: not even by way of an echo."""

from __future__ import annotations

import base64
import logging
import traceback

import pytest

from lmpipe import Completion, EngineError, LmpipeError
from lmpipe.engines import load_lm
from lmpipe.engines.server import ServerLM
from lmpipe.errors import ConfigError
from tests.engines.faulty_answers import Asked, RawAnswer, always, answering, completion, http, message
from tests.engines.openai_server import request

PASSWORD, QUERY, KEY = "pass-w0rd", "query-s3cret", "sk-bearer-k3y"
BASIC = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
SECRETS = (PASSWORD, QUERY, KEY, BASIC)


def with_secrets(url: str) -> str:
    return url.replace("http://", f"http://user:{PASSWORD}@") + f"?api_key={QUERY}&version=1"


def authorization(asked: Asked) -> str:
    lines = dict(line.split(": ", 1) for line in asked.head.split("\r\n")[1:])
    return lines.get("Authorization", lines.get("authorization", ""))


def test_credentials_of_a_url_are_sent_and_count_more_than_a_key() -> None:
    with answering(always(http(completion()))) as raw:
        for url, key in ((with_secrets(raw.url), KEY), (raw.url, KEY), (raw.url.replace("//", "//tok%40en@"), "")):
            lm = ServerLM("m", [url], dialect="vllm", api_key=key)
            assert isinstance(lm.complete([request()])[0], Completion)
            lm.close()
    assert [authorization(asked) for asked in raw.asked] == [
        f"Basic {BASIC}",
        f"Bearer {KEY}",
        "Basic " + base64.b64encode(b"tok@en:").decode(),
    ]
    assert [asked.path for asked in raw.asked] == [
        f"/v1/chat/completions?api_key={QUERY}&version=1",
        *["/v1/chat/completions"] * 2,
    ]


ECHOES = {
    "400": lambda heard: http({"error": {"message": heard}}, "400 Bad Request"),
    "401": lambda heard: http({"error": {"message": heard}}, "401 Unauthorized"),
    "404 in words": lambda heard: http(heard.encode(), "404 Not Found"),
    "422 in a list": lambda heard: http([{"input": heard}], "422 Unprocessable"),
    "500": lambda heard: http({"detail": heard}, "500 Internal Server Error"),
    "a page": lambda heard: http(f"<html>{heard}</html>".encode()),
    "nonsense": lambda heard: http({"choices": heard}),
    "a finish reason": lambda heard: http(completion(choice={"finish_reason": [heard]})),
    "a redirect": lambda heard: http(b"", "302 Found", Location=f"http://elsewhere/{heard.split()[1]}"),
    "no HTTP": lambda heard: RawAnswer((heard.encode(),)),
    "a status line": lambda heard: RawAnswer((f"HTTP/9.9 {heard}\r\n\r\n".encode(),)),
    "a phrase": lambda heard: RawAnswer((message({}, f"500 {heard.split()[1]}"),)),
    "a long page": lambda heard: http((heard + " ").encode() * 9999),
}


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("dialect", [None, "vllm"])
@pytest.mark.parametrize("basic", [True, False])
def test_what_a_server_echoes_is_hidden(
    echo: str, dialect: str | None, basic: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    def heard(asked: Asked) -> RawAnswer:
        kind, proof = authorization(asked).split()
        known = base64.b64decode(proof).decode() if kind == "Basic" else proof
        return ECHOES[echo](f"{kind} {proof} {known} {known.partition(':')[2]} {asked.path}")

    with answering(heard) as raw:
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
    while chain is not None:  # also what a traceback would not show
        texts.append(repr(chain.args))
        chain = chain.__cause__ or chain.__context__
    assert raw.url.removesuffix("/v1") in texts[0] or "refused the request" in texts[0]
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
def test_a_url_that_cannot_be_used_is_refused_without_its_password(url: str) -> None:
    for make in (lambda: ServerLM("m", [url]), lambda: ServerLM.from_spec(f"m@{url}"), lambda: load_lm(f"m@{url}")):
        with pytest.raises(ConfigError) as raised:
            make()
        assert PASSWORD not in "".join(traceback.format_exception(raised.value))


def test_passwords_with_commas_and_lists_of_urls_can_be_told_apart() -> None:
    lm = load_lm("openai:m@http://user:a,b@one:1/v1, http://two:2/v1")
    assert repr(lm) == "ServerLM('m', ['http://one:1/v1', 'http://two:2/v1'])"


@pytest.mark.parametrize("key", ["sk-k3y\nX-Header: a", "sk k3y", "sk-käy", "\ud800"])
def test_a_key_that_no_header_can_hold_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ConfigError, match="API key holds spaces or characters beyond ASCII") as raised:
        ServerLM("m", ["http://127.0.0.1:9/v1"], api_key=key)
    assert key not in str(raised.value)


def test_spaces_around_a_key_are_no_part_of_it() -> None:
    with answering(always(http(completion()))) as raw:
        lm = ServerLM("m", [raw.url], dialect="vllm", api_key=f" {KEY}\n")
        lm.complete([request()])
        lm.close()
    assert authorization(raw.asked[0]) == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "proxy", ["ftp://{}@proxy", "socks5://{}@proxy", "http://{}@[pro", "://{}", "http://{}@127.0.0.1:9"]
)
def test_a_proxy_that_cannot_be_used_is_named_without_its_password(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy.format(f"user:{PASSWORD}"))
    with pytest.raises(LmpipeError, match=r"look at HTTPS_PROXY|no connection in") as raised:
        ServerLM("m", ["http://host.invalid/v1"], dialect="vllm", retries=0).complete([request()])
    assert PASSWORD not in "".join(traceback.format_exception(raised.value))
