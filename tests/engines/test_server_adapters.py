"""Loading adapters on servers at run time."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from lmpipe import EngineError
from tests.engines.openai_server import FakeServer, client, request, serving, texts


def adapter_folder(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_an_adapter_is_loaded_once_at_each_url_when_it_is_first_used(dialect: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        fakes = [stack.enter_context(serving(dialect=dialect)) for _ in range(2)]
        lm = stack.enter_context(client(*[fake.url for fake in fakes], path_map={str(tmp_path): "/srv/runs/"}))
        lm.register_adapter("d1", adapter_folder(tmp_path, "blobs/d1"))
        assert not fakes[0].adapter_calls
        assert texts(lm.complete([request(f"{n}", "d1") for n in range(8)])) == [f"d1: {n}" for n in range(8)]
        assert texts(lm.complete([request()])) == ["m: hi"]
        assert [fake.adapter_calls for fake in fakes] == [[("load_lora_adapter", "d1")]] * 2
        assert fakes[0].adapters == {"d1": "/srv/runs/blobs/d1"}


def test_the_least_recently_used_adapter_is_unloaded(server: FakeServer, tmp_path: Path) -> None:
    with client(server.url, max_adapters=2) as lm:
        for name in ("a", "b", "c"):
            lm.register_adapter(name, adapter_folder(tmp_path, name))
        for name in ("a", "b", "a", "c", "b"):
            assert texts(lm.complete([request(adapter=name)])) == [f"{name}: hi"]
    assert server.adapter_calls == [
        ("load_lora_adapter", "a"),
        ("load_lora_adapter", "b"),
        ("unload_lora_adapter", "b"),
        ("load_lora_adapter", "c"),
        ("unload_lora_adapter", "a"),
        ("load_lora_adapter", "b"),
    ]


def test_a_restarted_server_and_an_adapter_loaded_by_another_process_are_handled(
    server: FakeServer, tmp_path: Path
) -> None:
    server.adapters["d1"] = "loaded by another process"
    with client(server.url) as lm:
        lm.register_adapter("d1", adapter_folder(tmp_path, "d1"))
        assert texts(lm.complete([request(adapter="d1")])) == ["d1: hi"]
        server.adapters.clear()
        assert texts(lm.complete([request(adapter="d1")])) == ["d1: hi"]


def test_errors_of_adapters_say_what_to_do(server: FakeServer, tmp_path: Path) -> None:
    with client(server.url) as lm:
        with pytest.raises(EngineError, match="adapter d0 is not registered"):
            lm.complete([request(adapter="d0")])
        with pytest.raises(EngineError, match="not a PEFT adapter; a server loads full weights only when it starts"):
            lm.register_adapter("full", tmp_path)
        lm.register_adapter("d1", adapter_folder(tmp_path, "large"))
        with pytest.raises(EngineError, match=r"large: .*max_lora_rank 16.*must see that folder"):
            lm.complete([request(adapter="d1")])
    with serving(runtime_adapters=False) as fake, client(fake.url) as lm:
        lm.register_adapter("d1", adapter_folder(tmp_path, "d1"))
        with pytest.raises(EngineError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
            lm.complete([request(adapter="d1")])
    with (
        serving(dialect="tgi") as fake,
        client(fake.url) as lm,
        pytest.raises(EngineError, match="'tgi' servers cannot load adapters at run time; serve m with vLLM or SGLang"),
    ):
        lm.register_adapter("d2", adapter_folder(tmp_path, "d2"))
