"""Builds small tokenizers of four kinds, all with the same chat template and its control tokens."""

from __future__ import annotations

import string
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import CHAT

_CONTROL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
_SYMBOLS = [*string.ascii_letters, *string.digits, *string.punctuation]


def byte_level() -> PreTrainedTokenizerFast:
    """Returns byte-level BPE, as in GPT-2, Llama 3 and Qwen, with merges of characters that a template may write."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "t"), ("t", "h"), ("<", "|"), ("|", ">"), (">", "<"), ("a", "b")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_chat(tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def sentencepiece() -> PreTrainedTokenizerFast:
    """Returns BPE over words that begin with ▁, with byte fallback, as in Llama 2, Mistral and Gemma."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *_SYMBOLS, "▁a", "▁<"]
    merges = [("▁", "a"), ("▁", "<")]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _with_chat(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """Returns a unigram model over words that begin with ▁; its special tokens are words that text can match."""
    words = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("\n", -3.0), *((word, -4.0) for word in ["▁", *_SYMBOLS])]
    tokenizer = Tokenizer(models.Unigram(words, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _with_chat(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    """Returns lower-case WordPiece, as in BERT."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    lower = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    words = [*special, *lower, *(f"##{letter}" for letter in lower)]
    tokenizer = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    token_names = {"sep_token": "[SEP]", "cls_token": "[CLS]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    return _with_chat(tokenizer, unk_token="[UNK]", eos_token="[SEP]", **token_names)


def _with_chat(tokenizer: Tokenizer, **special: Any) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.add_special_tokens({"additional_special_tokens": _CONTROL})
    fast.add_tokens(["<think>", "<tool>"])
    fast.chat_template = CHAT
    return fast
