"""ColBERT encoders: the token vectors of colbert-ai, checkpoints in both formats, and damaged checkpoints."""

from __future__ import annotations

import importlib.util
import json
import logging
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lmpipe.errors import ConfigError
from lmpipe.retrieval.colbert import ColbertEncoder, load_encoder
from lmpipe.retrieval.colbert.settings import ColbertSettings
from tests.retrieval.colbert_ai import reference
from tests.tiny_bert import TEXTS, as_pylate, tiny_checkpoint

needs_colbert = pytest.mark.skipif(importlib.util.find_spec("colbert") is None, reason="colbert-ai is absent")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny checkpoint in the format of ColBERTv2."""
    tiny_checkpoint().save(tmp_path / "tiny")
    return tmp_path / "tiny"


def passages_of(encoder: ColbertEncoder, texts: list[str] = TEXTS) -> list[torch.Tensor]:
    encoded = encoder.encode_passages(texts)
    return list(encoded.vectors.split(encoded.lengths.tolist()))


@needs_colbert
@pytest.mark.parametrize(
    "changes",
    [{}, {"attend_to_mask_tokens": True}, {"query_maxlen": 12, "doc_maxlen": 64}, {"query_prefix": "[unused1]"}],
    ids=["default", "attending to masks", "other lengths", "another marker"],
)
def test_vectors_are_those_of_colbert_ai(tmp_path: Path, changes: dict[str, Any]) -> None:
    tiny_checkpoint(replace(ColbertSettings(doc_maxlen=40), **changes)).save(tmp_path / "tiny")
    encoder = load_encoder(str(tmp_path / "tiny"), precision="float32")
    with reference(tmp_path / "tiny") as colbert:
        queries, passages = colbert.queryFromText(TEXTS), colbert.docFromText(TEXTS, keep_dims=False)
    assert torch.allclose(encoder.encode_queries(TEXTS), queries, atol=1e-5)
    for vectors, expected in zip(passages_of(encoder), passages, strict=True):
        assert vectors.shape == expected.shape
        assert torch.allclose(vectors, expected, atol=1e-5)


@needs_colbert
def test_special_tokens_in_texts_are_read_as_colbert_ai_reads_them(tmp_path: Path) -> None:
    """Checkpoints were trained in this way: colbert-ai's tokenizer reads special tokens anywhere in a text."""
    tiny_checkpoint().save(tmp_path / "tiny")
    encoder = load_encoder(str(tmp_path / "tiny"), precision="float32")
    special = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert set(encoder.checkpoint.tokenizer.all_special_tokens) <= set(special)
    texts = [*special, *(f"the {token} film{token}" for token in special), " ".join(special)]
    with reference(tmp_path / "tiny") as colbert:
        queries, passages = colbert.queryFromText(texts), colbert.docFromText(texts, keep_dims=False)
    assert torch.allclose(encoder.encode_queries(texts), queries, atol=1e-5)
    for vectors, expected in zip(passages_of(encoder, texts), passages, strict=True):
        assert vectors.shape == expected.shape
        assert torch.allclose(vectors, expected, atol=1e-5)


@given(st.lists(st.text(st.characters(), max_size=20), min_size=1, max_size=3))
def test_any_text_has_vectors_and_invalid_characters_are_replaced(texts: list[str]) -> None:
    odd = [f"{text}\ud83d\0\x1b" for text in texts]
    clean = [f"{text}\ufffd\ufffd\ufffd" for text in texts]
    assert torch.equal(TINY.encode_queries(odd), TINY.encode_queries(clean))
    assert TINY.encode_queries(odd).isfinite().all()
    assert torch.equal(TINY.encode_passages(odd).vectors, TINY.encode_passages(clean).vectors)


TINY = ColbertEncoder(tiny_checkpoint(), "tiny")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda folder: TINY.encode_queries("a film"),  # type: ignore[arg-type]
        lambda folder: TINY.encode_passages("a film"),  # type: ignore[arg-type]
        lambda folder: TINY.encode_passages([b"a"]),  # type: ignore[list-item]
        lambda folder: load_encoder(folder, query_maxlen=0),
        lambda folder: load_encoder(folder, doc_maxlen=2.5),  # type: ignore[arg-type]
        lambda folder: load_encoder(folder, doc_maxlen=True),
        lambda folder: load_encoder(folder, precision="float16"),  # type: ignore[arg-type]
        lambda folder: load_encoder(folder, device="gpu"),
    ],
)
def test_arguments_that_are_nearly_right_are_refused(wrong: Callable[[str], object], folder: Path) -> None:
    with pytest.raises(ConfigError):
        wrong(str(folder))


def test_texts_may_come_from_a_generator() -> None:
    assert torch.equal(TINY.encode_queries(text for text in TEXTS), TINY.encode_queries(TEXTS))  # type: ignore[arg-type]


def test_a_vector_does_not_depend_on_the_batch(folder: Path) -> None:
    encoder = load_encoder(str(folder), precision="float32")
    together = passages_of(encoder, TEXTS * 40)
    assert len(together) == 40 * len(TEXTS)
    for number, text in enumerate(TEXTS):
        alone = passages_of(encoder, [text])[0]
        assert torch.allclose(together[number], alone, atol=1e-5)
        assert torch.allclose(alone.norm(dim=1), torch.ones(len(alone)))
    queries = encoder.encode_queries(TEXTS * 40)
    assert queries.shape == (40 * len(TEXTS), 32, 16) == (len(queries), encoder.query_maxlen, encoder.dim)
    assert torch.allclose(queries[-1], encoder.encode_queries(TEXTS[-1:])[0], atol=1e-5)


def test_bfloat16_is_near_float32_and_only_for_passages(folder: Path) -> None:
    exact, halved = (load_encoder(str(folder), precision=name) for name in ("float32", "bfloat16"))
    assert torch.equal(exact.encode_queries(TEXTS), halved.encode_queries(TEXTS))
    for one, other in zip(passages_of(exact), passages_of(halved), strict=True):
        assert 0.97 < float((one * other).sum(1).min()) < float((one * other).sum(1).max())
        assert not torch.equal(one, other)


def test_progress_counts_passages_and_empty_lists_are_encoded(folder: Path) -> None:
    encoder, done = load_encoder(str(folder)), []
    encoder.encode_passages(TEXTS * 40, done.append)
    assert sum(done) == 40 * len(TEXTS)
    assert len(done) > 1
    nothing = encoder.encode_passages([])
    assert nothing.vectors.shape == (0, 16)
    assert len(nothing.lengths) == 0
    assert encoder.encode_queries([]).shape == (0, 32, 16)


def test_punctuation_has_no_vector_and_long_passages_are_cut_with_one_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = load_encoder(str(folder))
    with caplog.at_level(logging.WARNING):
        lengths = encoder.encode_passages([TEXTS[-1], "?!,.", "a", TEXTS[-1]]).lengths.tolist()
        encoder.encode_passages(TEXTS[-1:])
    assert [record.getMessage() for record in caplog.records] == [
        "a passage has more than 40 tokens; longer texts are truncated"
    ]
    assert lengths[1:3] == [3, 4]  # the markers, and the word of the second passage
    assert lengths[0] == lengths[3] <= 40
    longer = load_encoder(str(folder), doc_maxlen=1000, query_maxlen=2000)
    with caplog.at_level(logging.WARNING):  # as far as the model has positions
        longer.encode_passages(["a " * 300])
    assert "more than 128 tokens" in caplog.text
    assert longer.query_maxlen == 128


def test_a_checkpoint_of_pylate_gives_the_same_vectors(tmp_path: Path, folder: Path) -> None:
    settings = {"query_prefix": "[unused0]", "document_prefix": "[unused1]", "query_length": 32, "document_length": 40}
    other = load_encoder(str(as_pylate(tiny_checkpoint(), tmp_path / "pylate", **settings)))
    encoder = load_encoder(str(folder))
    assert torch.equal(encoder.encode_queries(TEXTS), other.encode_queries(TEXTS))
    assert torch.equal(encoder.encode_passages(TEXTS).vectors, other.encode_passages(TEXTS).vectors)
    assert encoder.digest == other.digest


def test_settings_of_pylate_are_kept_when_saved(tmp_path: Path) -> None:
    settings = {
        "query_prefix": "",
        "document_prefix": "[unused1]",
        "do_query_expansion": False,
        "skiplist_words": ["?"],
    }
    encoder = load_encoder(str(as_pylate(tiny_checkpoint(), tmp_path / "pylate", **settings)))
    queries = encoder.encode_queries(["who directed the film", "a"])
    assert queries[1].norm(dim=1).bool().tolist() == [True] * 3 + [False] * 29  # the word, between CLS and SEP
    assert encoder.encode_passages(["?!"]).lengths.tolist() == [4]
    encoder.save_pretrained(tmp_path / "saved")
    again = load_encoder(str(tmp_path / "saved"))
    assert torch.equal(again.encode_queries(["a"]), queries[1:])
    assert again.encode_passages(["?!"]).lengths.tolist() == [4]
    assert again.digest == encoder.digest


def test_a_digest_tells_weights_vocabularies_and_settings_apart(folder: Path) -> None:
    checkpoint = tiny_checkpoint()
    assert load_encoder(str(folder)).digest == load_encoder(str(folder), precision="bfloat16").digest
    assert load_encoder(str(folder)).digest == checkpoint.digest
    others = [
        replace(checkpoint, projection=checkpoint.projection * 2),
        replace(checkpoint, weights={name: weight + 1 for name, weight in checkpoint.weights.items()}),
        replace(checkpoint, settings=ColbertSettings(doc_maxlen=41)),
    ]
    assert len({checkpoint.digest, *(other.digest for other in others)}) == 4


def test_the_keys_of_a_digest_never_change() -> None:
    """Indexes store the digest of their encoder, and must open after settings have been renamed."""
    checkpoint = tiny_checkpoint()
    assert checkpoint.settings.identity == {
        "type": "ColbertSettings",
        "query_marker": "[unused0]",
        "passage_marker": "[unused1]",
        "query_tokens": 32,
        "passage_tokens": 40,
        "skipped": list(string.punctuation),
        "expands": True,
        "attends_to_masks": False,
    }


def test_weights_in_the_old_form_are_read(folder: Path) -> None:
    encoder = load_encoder(str(folder))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert load_encoder(str(folder)).digest == encoder.digest


def _rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _poison(path: Path) -> None:
    weights = load_file(path)
    weights["linear.weight"][0, 0] = float("nan")
    save_file(weights, path)


def _as_pickle(path: Path, content: object) -> None:
    path.unlink()
    torch.save(content, path.with_name("pytorch_model.bin"))


def _drop(path: Path, name: str) -> None:
    weights = load_file(path)
    del weights[name]
    save_file(weights, path)


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda at: (at / "artifact.metadata").unlink(), "neither artifact.metadata nor modules.json"),
        (lambda at: (at / "artifact.metadata").write_text("{"), "artifact.metadata is missing or damaged"),
        (lambda at: (at / "model.safetensors").unlink(), "no file model.safetensors or pytorch_model.bin"),
        (lambda at: (at / "model.safetensors").write_bytes(b"12345678901"), "model.safetensors is missing or damaged"),
        (lambda at: _drop(at / "model.safetensors", "linear.weight"), "model.safetensors has no linear.weight"),
        (
            lambda at: _drop(at / "model.safetensors", "bert.encoder.layer.1.output.dense.bias"),
            "model.safetensors lacks encoder.layer.1.output.dense.bias",
        ),
        (lambda at: (at / "config.json").unlink(), "config.json is missing or damaged"),
        (lambda at: _rewrite(at / "artifact.metadata", dim=64), "no linear.weight of the shape"),
        (lambda at: _rewrite(at / "artifact.metadata", doc_token_id="[D]"), r"has no token '\[D\]'"),
        (lambda at: _rewrite(at / "artifact.metadata", doc_maxlen=3), "leaves no room"),
        (lambda at: (at / "artifact.metadata").write_text("[1]"), "artifact.metadata is missing or damaged"),
        (lambda at: (at / "artifact.metadata").write_text("[" * 10**5), "artifact.metadata is missing or damaged"),
        (lambda at: _rewrite(at / "artifact.metadata", query_maxlen="many"), "artifact.metadata is missing or damaged"),
        (lambda at: _rewrite(at / "artifact.metadata", query_token_id=5), "prefixes must be text"),
        (lambda at: _rewrite(at / "artifact.metadata", skiplist_words=[5]), "skiplist_words"),
        (lambda at: _rewrite(at / "config.json", hidden_size="wide"), "config.json is missing or damaged"),
        (lambda at: _rewrite(at / "config.json", num_attention_heads=0), "config.json is missing or damaged"),
        (lambda at: _rewrite(at / "config.json", hidden_size=64), "model.safetensors has no linear.weight|lacks"),
        (lambda at: _rewrite(at / "config.json", model_type="nothing"), "config.json is missing or damaged"),
        (lambda at: (at / "config.json").write_text("[1]"), "config.json is missing or damaged"),
        (
            lambda at: _rewrite(at / "config.json", vocab_size=20),
            "a token with the id .* and the encoder has 20 embeddings",
        ),
        (lambda at: (at / "tokenizer.json").write_text('{"version": "1.0"}'), "tokenizer.json is missing or damaged"),
        (lambda at: _poison(at / "model.safetensors"), "linear.weight contains values that are not finite"),
        (lambda at: _as_pickle(at / "model.safetensors", b"nothing"), "pytorch_model.bin is missing or damaged"),
        (lambda at: _as_pickle(at / "model.safetensors", [1, 2]), "pytorch_model.bin is missing or damaged"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_file(folder: Path, damage: Any, names: str) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=names):
        load_encoder(str(folder))


def test_other_models_of_sentence_transformers_are_refused(tmp_path: Path) -> None:
    folder = as_pylate(tiny_checkpoint(), tmp_path / "pylate")
    (folder / "1_Dense" / "config.json").write_text(json.dumps({"activation_function": "torch.nn.modules.Tanh"}))
    with pytest.raises(ConfigError, match="not one linear layer"):
        load_encoder(str(folder))
    (folder / "modules.json").write_text(json.dumps([{"path": "", "type": "x.Transformer"}]))
    with pytest.raises(ConfigError, match="one Transformer and one Dense"):
        load_encoder(str(folder))


def test_a_checkpoint_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        load_encoder(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="from the hub"):  # tests are offline
        load_encoder("nobody/absent")


def test_a_checkpoint_is_saved_only_to_a_new_or_empty_folder(folder: Path) -> None:
    with pytest.raises(ConfigError, match="already exists"):
        load_encoder(str(folder)).save_pretrained(folder)
