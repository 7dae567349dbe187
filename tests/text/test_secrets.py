"""Credentials and keys are redacted in every text."""

from __future__ import annotations

import base64
import json
import time
from urllib.parse import quote

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lmpipe.text.secrets import redact, redact_and_truncate, strip_credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("nothing to hide", "nothing to hide"),
        ("https://host:8000/v1", "https://host:8000/v1"),
        ("https://user:word@host:8000/v1", "https://***@host:8000/v1"),
        ("https://token@host/v1", "https://***@host/v1"),
        ("https://host/v1?api_key=word", "https://host/v1?***"),
        ("https://host/v1?api_key=word&x=a@b", "https://host/v1?***"),
        ("https://user:w@r/d@host/v1", "https://***@host/v1"),
        ("https://user:w?rd@host/v1", "https://***@host/v1"),
        ("https://user:w/rd@host/v1", "https://***@host/v1"),
        ("https://user:w'rd@host/v1", "https://***@host/v1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("http://host/@scope/v1", "http://host/@scope/v1"),
        ("openai:m@https://u:word@a/v1,https://u:word@b/v1", "openai:m@https://***@a/v1,https://***@b/v1"),
        ("('https://u:word@host/v1?k=word'); do", "('https://***@host/v1?***'); do"),
        ("see https://host/page.", "see https://host/page."),
        ("mlflow:postgresql+psycopg2://u:word@db/runs", "mlflow:postgresql+psycopg2://***@db/runs"),
    ],
)
def test_credentials_and_queries_of_urls_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize("url", ["https://user:word@host:1/v1?a=b#c", "https://host:1/v1?a", "https://host:1/v1"])
def test_a_url_without_credentials_is_the_same_for_all(url: str) -> None:
    assert strip_credentials(url) == "https://host:1/v1"
    assert strip_credentials("runs/index") == "runs/index"


def test_keys_are_redacted_in_all_their_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    key = 'sk-"quoted" /key'
    for text in (key, json.dumps({"key": key}), f"?key={quote(key, safe='')}"):
        assert "quoted" not in redact(text, [key])
    assert redact("m: a cat sat at home", ["at", "m"]) == "***: a cat sat *** home"  # short secrets only as whole words
    assert redact("text", ["", " "]) == "text"
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("MONKEY", "see nothing")
    monkeypatch.setenv("SOME_KEY", "short")
    assert redact("hf_abcdefgh and short") == "*** and short"


SECRET = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=8, max_size=20)


@given(SECRET, st.text(max_size=30), st.text(max_size=30))
def test_no_secret_is_left_anywhere(secret: str, before: str, after: str) -> None:
    assert secret not in redact(before + secret + after, [secret])
    word = quote(secret, safe="")
    assume(word not in before + after)
    assert word not in redact(f"{before} https://user:{word}@host/v1 {after}")
    assert strip_credentials(f"https://user:{word}@host/v1") == "https://host/v1"


@given(st.text(max_size=200), st.lists(st.text(max_size=5), max_size=3))
def test_any_text_can_be_redacted(text: str, secrets: list[str]) -> None:
    redact(text, secrets)
    redact("://" + text + "://u:p@" + text, secrets)
    strip_credentials(text)
    strip_credentials("http://" + text)


@pytest.mark.parametrize("length", [10, 1000, 9000])
def test_the_beginning_of_a_long_text_ends_with_no_part_of_a_secret(length: int) -> None:
    key = "".join(chr(ord("a") + n * n % 26) for n in range(length))
    shown = redact_and_truncate(f"{key} " * 999, 500, [key])
    assert set(shown) <= set("* …")
    assert redact_and_truncate("short", 500, [key]) == "short"
    assert redact_and_truncate("a" * 501, 500) == "a" * 500 + " …"


def test_long_texts_take_no_time() -> None:
    started = time.process_time()
    for text in ("a" * 200_000, "a://" * 50_000, "https://" + "u:" * 100_000, "," * 200_000):
        redact(text, [base64.b64encode(b"something").decode()])
    assert time.process_time() - started < 10
