"""Errors of other libraries in public calls of engines, and the errors of lmpipe that they become."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lmpipe import Completion, EngineError, Request, RunStore, Sampling, Session, WeightState
from lmpipe.engines import load_embedder, load_lm
from lmpipe.engines.library_errors import INVALID_INPUT_ERRORS, ErrorTranslator
from lmpipe.engines.loading import loading_errors
from lmpipe.engines.local import LocalLM
from lmpipe.engines.training import LocalTrainer, TuningConfig
from lmpipe.errors import ConfigError, LmpipeError
from lmpipe.lm import Message
from lmpipe.trainer import DPOLoss, TrainingRow
from tests.engines.letters import BASE, ROWS, answers, trainer
from tests.tiny import tiny_llama

ANSWER = httpx.Response(403, request=httpx.Request("GET", "https://hub/model"))
HUB = [
    HfHubHTTPError("503 Server Error", response=ANSWER),
    RepositoryNotFoundError("404 Client Error", response=ANSWER),
    GatedRepoError("403 Client Error", response=ANSWER),
    LocalEntryNotFoundError("nothing in the cache"),
    OfflineModeIsEnabled("offline mode is enabled"),
    HFValidationError("Repo id must be alphanumeric"),
]


@pytest.mark.parametrize("error", HUB, ids=lambda error: type(error).__name__)
def test_errors_of_the_hub_name_the_model(error: Exception) -> None:
    with (
        pytest.raises(ConfigError, match=f"cannot load a causal LM from 'org/model': {type(error).__name__}") as caught,
        loading_errors("a causal LM", "org/model"),
    ):
        raise error
    assert ("hf auth login" in str(caught.value)) == isinstance(error, GatedRepoError)


def test_errors_of_lmpipe_and_interrupts_pass_and_long_messages_are_truncated() -> None:
    with pytest.raises(ConfigError, match=r"^mine$"), loading_errors("a causal LM", "x"):
        raise ConfigError("mine")
    with pytest.raises(KeyboardInterrupt), loading_errors("a causal LM", "x"):
        raise KeyboardInterrupt
    with (
        pytest.raises(EngineError) as caught,
        ErrorTranslator(INVALID_INPUT_ERRORS, lambda error: EngineError(str(error)[:9])),
    ):
        raise Exception("as tokenizers raises it")
    assert str(caught.value) == "as tokeni"
    with pytest.raises(ConfigError) as caught, loading_errors("a causal LM", "x"):
        raise ValueError("long " * 10_000)
    assert len(str(caught.value)) < 1200


def config(**changes: Any) -> Callable[[Path], None]:
    """Returns a function that changes the configuration of a model."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def replaced(name: str, data: bytes | None) -> Callable[[Path], None]:
    """Returns a function that replaces a file, or removes it if there is no data."""

    def change(folder: Path) -> None:
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)

    return change


def truncated(name: str) -> Callable[[Path], None]:
    """Returns a function that truncates a file to its first half."""

    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Returns a function that changes the weights of a model."""

    def change_file(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change_file


def tokenizer(change: Callable[[Any], object]) -> Callable[[Path], None]:
    """Returns a function that changes the tokenizer of a model."""

    def change_file(folder: Path) -> None:
        loaded = AutoTokenizer.from_pretrained(folder)
        change(loaded)
        loaded.save_pretrained(folder)

    return change_file


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "cannot load a causal LM"),
    "no config": (replaced("config.json", None), "cannot load a causal LM"),
    "half a config": (truncated("config.json"), "cannot load a causal LM"),
    "config not text": (replaced("config.json", b"\xff\xfe\x00"), "cannot load a causal LM"),
    "config a list": (replaced("config.json", b"[]"), "cannot load a causal LM"),
    "config a number": (replaced("config.json", b"3"), "cannot load a causal LM"),
    "config empty": (replaced("config.json", b"{}"), "cannot load a causal LM"),
    "config too deep": (replaced("config.json", b"[" * 100_000), "cannot load a causal LM"),
    "unknown model": (config(model_type="no-such-model"), "cannot load a causal LM"),
    "size a word": (config(hidden_size="wide"), "cannot load a causal LM"),
    "size negative": (config(hidden_size=-32), "cannot load a causal LM"),
    "no heads": (config(num_attention_heads=0), "cannot load a causal LM"),
    "other size": (config(hidden_size=64), "cannot load a causal LM"),
    "more layers": (config(num_hidden_layers=3), "lacks 9 weights of its model, such as model.layers.2"),
    "no weights": (replaced("model.safetensors", None), "cannot load a causal LM"),
    "half the weights": (truncated("model.safetensors"), "SafetensorError.*damaged: download or copy it again"),
    "weights empty": (replaced("model.safetensors", b""), "cannot load a causal LM"),
    "weights garbage": (replaced("model.safetensors", b"garbage" * 99), "cannot load a causal LM"),
    "a weight missing": (
        weights(lambda tensors: tensors.pop("lm_head.weight")),
        "lacks 1 weights of its model, such as lm_head",
    ),
    "no tokenizer": (replaced("tokenizer.json", None), "cannot load a causal LM"),
    "half a tokenizer": (truncated("tokenizer.json"), "cannot load a causal LM"),
    "tokenizer empty": (replaced("tokenizer.json", b"{}"), "cannot load a causal LM"),
    "tokenizer settings": (replaced("tokenizer_config.json", b"{"), "cannot load a causal LM"),
    "token beyond": (
        tokenizer(lambda loaded: loaded.add_tokens(["<tool>"])),
        "tokenizer .* has 262 tokens, the model 261",
    ),
    "no template": (replaced("chat_template.jinja", b""), "has no chat template"),
    "broken template": (replaced("chat_template.jinja", b"{% if %}"), "fails on a plain chat: TemplateSyntaxError"),
}


@pytest.mark.parametrize("situation", DAMAGED)
def test_a_model_that_cannot_be_used_is_rejected_when_it_is_loaded(situation: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    damage, message = DAMAGED[situation]
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        load_lm(f"hf:{folder}")


@pytest.mark.parametrize(
    "situation", ["no folder", "half a config", "half the weights", "half a tokenizer", "more layers"]
)
def test_an_encoder_that_cannot_be_used_is_rejected_when_it_is_loaded(situation: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    damage, message = DAMAGED[situation]
    damage(folder)
    with pytest.raises(
        ConfigError, match=message.replace("a causal LM", "an encoder").replace("model.layers", "layers")
    ):
        load_embedder(f"hf:{folder}")


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("hf:org/no-such-model", {}, "cannot load a causal LM from 'org/no-such-model'"),
        ("hf:a//b::c", {}, "cannot load a causal LM from 'a//b::c'"),
        ("hf:\0", {}, "cannot load a causal LM"),
        ("hf:org/model", {"dtyp": "float32"}, "there is no option dtyp; options are name, dtype, quantization"),
        ("bundled", {"rows": 3}, "there is no option rows; options are name, dtype"),
        ("openai:model@http://host", {"key": "x"}, "there is no option key; options are"),
        ("hf:org/model", {"dtype": 3}, "there is no dtype '3'"),
    ],
)
def test_an_unknown_model_or_option_is_a_config_error(spec: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_lm(spec, **options)


def test_limits_below_1_and_an_unusable_cache_folder_are_rejected(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for options in ({"max_sequences": 0}, {"max_sequences": -1}, {"memory": -5}):
        with pytest.raises(ConfigError, match="must be at least 1, or left out"):
            load_lm(f"hf:{tiny_folder}", **options)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LMPIPE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot load the bundled LM from .*(NotADirectory|FileExists)Error"):
        load_lm("bundled")
    assert "converting" not in caplog.text, "the folder is tried before the minute that a conversion takes"


def test_tokens_beyond_the_vocabulary_are_never_sampled(tmp_path: Path) -> None:
    """The model has more embeddings than the tokenizer has tokens, and assigns the highest logits to the extra ones."""
    folder = tiny_llama(tmp_path / "model")
    config(vocab_size=320)(folder)

    def pad(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][:59] * 9])

    weights(pad)(folder)
    lm = LocalLM.from_pretrained(str(folder), name="tiny")
    requests = [
        Request(row.messages, Sampling(max_tokens=8, temperature=n, logprobs=True), BASE)
        for n in (0, 1)
        for row in ROWS
    ]
    for answer in lm.complete(requests):
        assert isinstance(answer, Completion)
        assert len(answer.logprobs or ()) == answer.usage.completion_tokens == 8


ADAPTERS: dict[str, Callable[[Path], object]] = {
    "gone": shutil.rmtree,
    "no weights": replaced("adapter_model.safetensors", None),
    "half the weights": truncated("adapter_model.safetensors"),
    "half a config": truncated("adapter_config.json"),
    "config a list": replaced("adapter_config.json", b"[]"),
    "unknown type": replaced("adapter_config.json", b'{"peft_type": "NO_SUCH"}'),
    "no type": replaced("adapter_config.json", b"{}"),
    "config not text": replaced("adapter_config.json", b"\xff\xfe"),
}


def test_adapters_that_cannot_be_loaded_leave_the_engine_as_it_was(
    tiny_lm: LocalLM, store: RunStore, tmp_path: Path
) -> None:
    session = Session(lm=tiny_lm, store=store)
    good = trainer(tiny_lm, epochs=1).train(ROWS, BASE, session).weights
    source = store.folder(str(good.adapter))
    wide = LocalLM.from_pretrained(str(tiny_llama(tmp_path / "wide", hidden_size=64)), name="tiny")
    others = {
        f"other {method}": trainer(wide, method=method, epochs=2)
        .train(ROWS, BASE, Session(lm=wide, store=store))
        .weights.adapter
        for method in ("lora", "prefix", "full")
    }
    before = answers(tiny_lm, BASE)
    for situation in [*ADAPTERS, *others]:
        folder = tmp_path / situation
        shutil.copytree(store.folder(str(others[situation])) if situation in others else source, folder)
        if situation in ADAPTERS:
            ADAPTERS[situation](folder)
        tiny_lm.register_adapter(situation, folder)
        for loaded in (False, True):  # without another adapter in the model, and with one
            with pytest.raises(EngineError, match=situation):
                answers(tiny_lm, WeightState(base="tiny", adapter=situation))
            assert answers(tiny_lm, BASE) == before
            tiny_lm.register_adapter(str(good.adapter), source)
            if not loaded:
                assert len(answers(tiny_lm, good)) == len(ROWS)
    assert trainer(tiny_lm, epochs=1).train(ROWS, good, session).steps == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ("q_porj",)}, "has no layer 'q_porj'; write a tuple of some of down_proj"),
        ({"target_modules": ("q_proj", "k_porj")}, "has no layer 'k_porj'"),
        ({"target_modules": ("mlp",)}, "has no layer 'mlp'"),
        ({"target_modules": ("q_proj", "norm")}, "has no layer 'norm'"),
        ({"target_modules": "q_proj"}, "has no layer 'q_proj'; .* a regular expression for whole names such as"),
        ({"target_modules": "*"}, "is not a regular expression"),
        ({"target_modules": ()}, r"has no layer for \(\)"),
    ],
)
def test_target_modules_that_do_not_exist_are_reported_when_the_trainer_is_created(
    tiny_lm: LocalLM, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        LocalTrainer(tiny_lm, TuningConfig(**settings))
    assert LocalTrainer(tiny_lm, TuningConfig(target_modules=r".*\.0\..*_proj"))
    assert LocalTrainer(tiny_lm, TuningConfig(target_modules=("layers.1.self_attn.q_proj", "embed_tokens")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": "8"}, "rank is '8'; it must be a whole number"),
        ({"rank": True}, "rank is True; it must be a whole number"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be a finite number"),
        ({"learning_rate": -1e-4}, "learning_rate is -0.0001; it must be greater than 0"),
        ({"method": "lorra"}, "method is 'lorra'; it must be 'lora', .*; did you mean 'lora'"),
        ({"schedule": "sine"}, "schedule is 'sine'; it must be 'constant_with_warmup', "),
        ({"target_modules": [3]}, r"target_modules\[0\] is 3; it must be text"),
        ({"target_modules": None}, "target_modules is None; it must be text or must be a tuple"),
        ({"top_layers": 0}, "top_layers is 0; it must be greater than 0"),
        ({"top_layers": 2}, "top_layers is 2; it must be at most 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be greater than 0"),
        ({"micro_batch_size": -2}, "micro_batch_size is -2; it must be greater than 0"),
        ({"eval_fraction": 1.0}, "eval_fraction is 1.0; it must be less than 1"),
        ({"dropout": 1.5}, "dropout is 1.5; it must be less than 1"),
        ({"warmup_steps": -1}, "warmup_steps is -1; it must be at least 0"),
    ],
)
def test_settings_of_a_wrong_type_or_out_of_range_are_reported(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^TuningConfig: {message}"):
        TuningConfig(**settings)


def test_only_lora_can_leave_lower_layers_out() -> None:
    with pytest.raises(ConfigError, match=r"top_layers=0.5 is for LoRA, and method is 'full'; leave it out, or choose"):
        TuningConfig(method="full", top_layers=0.5)


@pytest.mark.parametrize(
    ("rows", "share", "message"),
    [
        (1, 0.5, "eval_fraction=0.5 of 1 rows holds out 0, which leaves none to measure the loss on"),
        (4, 0.1, "eval_fraction=0.1 of 4 rows holds out 0"),
        (2, 0.9, "eval_fraction=0.9 of 2 rows holds out 2, which leaves none to train on"),
    ],
)
def test_both_evaluation_rows_and_training_rows_are_required(
    tiny_lm: LocalLM, store: RunStore, rows: int, share: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tiny_lm, eval_fraction=share).train(ROWS[:rows], BASE, Session(lm=tiny_lm, store=store))


def test_a_trainer_needs_the_local_lm_itself(tiny_folder: Path, tmp_path: Path) -> None:
    cached: Any = load_lm(f"hf:{tiny_folder}", cache=tmp_path / "cache.db")
    with pytest.raises(ConfigError, match="CachedLM cannot be trained; pass the LocalLM itself"):
        LocalTrainer(cached)


def test_out_of_memory_in_training_is_an_engine_error_with_advice(tiny_lm: LocalLM, store: RunStore) -> None:
    before = answers(tiny_lm, BASE)

    def fail(module: Any, args: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    handle = tiny_lm.model.model.layers[1].register_forward_pre_hook(fail)
    pairs = [replace(row, rejected="no") for row in ROWS]
    for rows, objective in ((ROWS, None), (pairs, DPOLoss())):
        with pytest.raises(
            EngineError, match=r"training tiny failed: RuntimeError: .*; free memory, set micro_batch_size"
        ):
            trainer(tiny_lm).train(rows, BASE, Session(lm=tiny_lm, store=store), *([objective] if objective else []))
    handle.remove()
    assert answers(tiny_lm, BASE) == before


def test_text_that_cannot_be_encoded_fails_its_request_alone(tiny_lm: LocalLM, store: RunStore) -> None:
    requests = [Request((Message("user", text),), Sampling(max_tokens=2), BASE) for text in ("a", "half \ud83d", "b")]
    kinds = [type(answer) for answer in tiny_lm.complete(requests)]
    assert kinds == [Completion, EngineError, Completion]
    with pytest.raises(LmpipeError, match="tiny cannot encode a completion"):
        trainer(tiny_lm).train([TrainingRow(ROWS[0].messages, "\ud83d")], BASE, Session(lm=tiny_lm, store=store))


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    for load in (load_lm, load_embedder):
        with pytest.raises(ConfigError, match=f"from '{tmp_path}/absent': there is no such folder"):
            load(f"hf:{tmp_path}/absent")
