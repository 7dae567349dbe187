"""Small tokenizers of four kinds, made here: what they have in common is a chat template and its control tokens."""

from __future__ import annotations

import string
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import CHAT

_CONTROL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
_SYMBOLS = [*string.ascii_letters, *string.digits, *string.punctuation]


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it, with merges that begin in what a template may write."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "t"), ("t", "h"), ("<", "|"), ("|", ">"), (">", "<"), ("a", "b")]
    words = [*letters, *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return _with_chat(made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def sentencepiece() -> PreTrainedTokenizerFast:
    """BPE over words that begin with ▁, bytes for what it does not know, as Llama 2, Mistral and Gemma have it."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *_SYMBOLS, "▁a", "▁<"]
    merges = [("▁", "a"), ("▁", "<")]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _with_chat(made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """A unigram LM over words that begin with ▁, whose special tokens are words of it: plain text may become them."""
    words = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("\n", -3.0), *((word, -4.0) for word in ["▁", *_SYMBOLS])]
    made = Tokenizer(models.Unigram(words, unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return _with_chat(made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    """WordPiece with lower case, as BERT has it."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    lower = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    words = [*special, *lower, *(f"##{letter}" for letter in lower)]
    made = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    named = {"sep_token": "[SEP]", "cls_token": "[CLS]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    return _with_chat(made, unk_token="[UNK]", eos_token="[SEP]", **named)


def _with_chat(made: Tokenizer, **special: Any) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    fast.add_special_tokens({"additional_special_tokens": _CONTROL})
    fast.add_tokens(["<think>", "<tool>"])
    fast.chat_template = CHAT
    return fast
