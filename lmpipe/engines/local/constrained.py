"""Constrained decoding: which tokens may come next so that the completion matches a regex.

outlines-core compiles a regular expression to an automaton over tokens (Willard and Louf 2023, arXiv 2307.09702).
Beyond that, a token is allowed only if the expression can still be matched within the tokens that are left, so a
completion is whole even where it reaches its length. Knows nothing of sampling or models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, final

import numpy as np
import torch
from outlines_core import Index, Vocabulary

from lmpipe.errors import EngineError


@final
class Automaton:
    """A regex over the tokens of a vocabulary.

    Args:
        regex: A regular expression.
        vocabulary: Bytes → token ids, without special tokens.
        ends: Tokens that end a completion.

    Raises:
        EngineError: If the expression cannot be compiled.
    """

    def __init__(self, regex: str, vocabulary: Mapping[bytes, list[int]], ends: Iterable[int]) -> None:
        self._ends = sorted(ends)
        if not self._ends:
            raise EngineError("structured output needs a token that ends a completion; the tokenizer has none")
        try:
            index = Index(regex, Vocabulary(self._ends[0], dict(vocabulary)))
        except (ValueError, TypeError) as error:
            raise EngineError(f"cannot hold completions to the regex {regex!r}: {error}") from error
        self._size = 1 + max([*self._ends, *(token for tokens in vocabulary.values() for token in tokens)])
        self.initial = int(index.get_initial_state())
        self._final = frozenset(index.get_final_states())
        self._moves = {
            state: {token: following for token, following in moves.items() if token not in self._ends}
            for state, moves in index.get_transitions().items()
        }
        self.distance = _distances(self._moves, self._final)
        self._farthest = {
            state: max((self.distance.get(following, 0) for following in moves.values()), default=0)
            for state, moves in self._moves.items()
        }
        self.forbidden = lru_cache(maxsize=4096)(self._forbidden)

    def next(self, state: int, token: int) -> int:
        """The state after an allowed token."""
        return int(self._moves[state][token])

    def is_dead_end(self, state: int) -> bool:
        """Whether the completion must end here."""
        return not self._moves.get(state)

    def tokens_left(self, state: int, left: int) -> int:
        """`left`, or a smaller number that allows the same tokens in this state."""
        return min(left, 1 + self._farthest.get(state, 0))

    def _forbidden(self, state: int, left: int) -> torch.Tensor:
        """Which tokens must not come next if `left` are left, the next one included; shape (vocabulary,)."""
        forbidden = np.ones(self._size, dtype=bool)
        moves = self._moves.get(state, {})
        tokens = np.fromiter(moves.keys(), dtype=np.int64, count=len(moves))
        far = np.fromiter((self.distance.get(s, 1 << 30) for s in moves.values()), dtype=np.int64, count=len(moves))
        forbidden[tokens[far < left]] = False
        if state in self._final:
            forbidden[self._ends] = False
        return torch.from_numpy(forbidden)


@final
class Guide:
    """One completion on its way through an automaton."""

    def __init__(self, automaton: Automaton) -> None:
        self._automaton = automaton
        self._state = automaton.initial

    @property
    def least_tokens(self) -> int:
        """How many tokens the shortest way to the end takes."""
        return self._automaton.distance.get(self._state, 1 << 30)

    @property
    def ended(self) -> bool:
        """Whether nothing can follow."""
        return self._automaton.is_dead_end(self._state)

    def restart(self) -> None:
        """Goes back to the beginning."""
        self._state = self._automaton.initial

    def forbidden(self, left: int) -> torch.Tensor:
        """Which tokens must not come next if `left` are left, the next one included; shape (vocabulary,)."""
        return self._automaton.forbidden(self._state, self._automaton.tokens_left(self._state, left))

    def advance(self, token: int) -> None:
        """Takes a token that was allowed."""
        self._state = self._automaton.next(self._state, token)


def token_bytes(tokenizer: Any) -> dict[bytes, list[int]]:
    """The bytes that each ordinary token of a tokenizer stands for, and its ids.

    Raises:
        EngineError: If the tokenizer is neither byte-level BPE nor SentencePiece with byte fallback.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    vocabulary = tokenizer.get_vocab()
    letters = _byte_letters()
    byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    if not byte_level and "▁" not in "".join(vocabulary):
        raise EngineError(f"structured output does not know the tokenizer {type(tokenizer).__name__}")
    found: dict[bytes, list[int]] = defaultdict(list)
    for text, token in vocabulary.items():
        if token in special:
            continue
        if not byte_level:
            found[_piece(text)].append(token)
        elif all(letter in letters for letter in text):
            found[bytes(letters[letter] for letter in text)].append(token)
    found.pop(b"", None)
    return dict(found)


def _piece(text: str) -> bytes:
    """A SentencePiece token: a byte written as ``<0x0A>``, or text with ▁ for a space."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace("▁", " ").encode()


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for what follows U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _distances(moves: Mapping[int, Mapping[int, int]], final_states: Iterable[int]) -> dict[int, int]:
    """State → fewest tokens to a final state."""
    before: dict[int, set[int]] = defaultdict(set)
    for state, following in moves.items():
        for after in set(following.values()):
            before[after].add(state)
    distance = dict.fromkeys(final_states, 0)
    wave = list(distance)
    while wave:
        reached = {state for after in wave for state in before[after] if state not in distance}
        steps = distance[wave[0]] + 1
        distance |= dict.fromkeys(reached, steps)
        wave = list(reached)
    return distance
