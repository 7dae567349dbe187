"""Constrained decoding: decides which tokens may come next, so that the completion matches a regular expression.

outlines-core compiles a regular expression to an automaton over tokens (Willard and Louf 2023, arXiv 2307.09702).
In addition, a token is allowed only if the expression can still be matched within the remaining tokens, so even a
completion that reaches max_tokens matches. Knows nothing about sampling or models.
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

_UNREACHABLE = 1 << 30  # distance of a state from which no final state can be reached


@final
class Automaton:
    """A finite automaton that matches a regular expression token by token.

    Args:
        regex: A regular expression.
        vocabulary: Token ids by the bytes that they stand for, without special tokens.
        end_tokens: Token ids that end a completion.

    Attributes:
        initial: Initial state.
        distance: Fewest tokens from each state to a final state; states that cannot reach one are absent.
        forbidden: Cached function: state and remaining tokens → mask of the forbidden tokens, shape (vocabulary,).

    Raises:
        EngineError: If the expression cannot be compiled.
    """

    def __init__(self, regex: str, vocabulary: Mapping[bytes, list[int]], end_tokens: Iterable[int]) -> None:
        self._end_tokens = sorted(end_tokens)
        if not self._end_tokens:
            raise EngineError("structured output needs a token that ends a completion, but the tokenizer has none")
        try:
            index = Index(regex, Vocabulary(self._end_tokens[0], dict(vocabulary)))
        except (ValueError, TypeError) as error:
            raise EngineError(f"cannot constrain completions to the regex {regex!r}: {error}") from error
        self._size = 1 + max([*self._end_tokens, *(token for tokens in vocabulary.values() for token in tokens)])
        self.initial = int(index.get_initial_state())
        self._final = frozenset(index.get_final_states())
        self._transitions = {
            state: {token: target for token, target in transitions.items() if token not in self._end_tokens}
            for state, transitions in index.get_transitions().items()
        }
        self.distance = _distances_to_final(self._transitions, self._final)
        self._farthest = {
            state: max((self.distance.get(target, 0) for target in transitions.values()), default=0)
            for state, transitions in self._transitions.items()
        }
        self.forbidden = lru_cache(maxsize=4096)(self._forbidden)

    def next(self, state: int, token: int) -> int:
        """Returns the state after an allowed token."""
        return int(self._transitions[state][token])

    def is_dead_end(self, state: int) -> bool:
        """Whether no token can follow this state."""
        return not self._transitions.get(state)

    def clamp_tokens_left(self, state: int, tokens_left: int) -> int:
        """Returns `tokens_left`, or a smaller number that allows the same tokens, for more cache hits."""
        return min(tokens_left, 1 + self._farthest.get(state, 0))

    def _forbidden(self, state: int, tokens_left: int) -> torch.Tensor:
        """Returns the mask of the tokens that must not come next; see `Guide.forbidden`."""
        forbidden = np.ones(self._size, dtype=bool)
        transitions = self._transitions.get(state, {})
        count = len(transitions)
        tokens = np.fromiter(transitions.keys(), dtype=np.int64, count=count)
        distances = (self.distance.get(target, _UNREACHABLE) for target in transitions.values())
        forbidden[tokens[np.fromiter(distances, dtype=np.int64, count=count) < tokens_left]] = False
        if state in self._final:
            forbidden[self._end_tokens] = False
        return torch.from_numpy(forbidden)


@final
class Guide:
    """The state of one completion in an automaton."""

    def __init__(self, automaton: Automaton) -> None:
        self._automaton = automaton
        self._state = automaton.initial

    @property
    def min_tokens(self) -> int:
        """Fewest tokens that complete a match from here."""
        return self._automaton.distance.get(self._state, _UNREACHABLE)

    @property
    def is_finished(self) -> bool:
        """Whether no token can follow."""
        return self._automaton.is_dead_end(self._state)

    def restart(self) -> None:
        """Returns to the initial state."""
        self._state = self._automaton.initial

    def forbidden(self, tokens_left: int) -> torch.Tensor:
        """Returns the mask of the tokens that must not come next.

        Args:
            tokens_left: Number of remaining tokens, including the next one.

        Returns:
            Mask that is true for forbidden tokens, shape (vocabulary,).
        """
        return self._automaton.forbidden(self._state, self._automaton.clamp_tokens_left(self._state, tokens_left))

    def advance(self, token: int) -> None:
        """Moves to the state after an allowed token."""
        self._state = self._automaton.next(self._state, token)


def can_constrain(tokenizer: Any) -> bool:
    """Whether the bytes of a tokenizer's tokens are known: byte-level BPE, or SentencePiece with byte fallback."""
    return _is_byte_level(tokenizer) or "▁" in "".join(tokenizer.get_vocab())


def _is_byte_level(tokenizer: Any) -> bool:
    return "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)


def token_bytes(tokenizer: Any) -> dict[bytes, list[int]]:
    """Maps byte strings to the ids of the ordinary tokens that stand for them.

    Raises:
        EngineError: If the tokenizer is neither byte-level BPE nor SentencePiece with byte fallback.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    vocabulary = tokenizer.get_vocab()
    byte_of = _byte_decoder()
    byte_level = _is_byte_level(tokenizer)
    if not can_constrain(tokenizer):
        raise EngineError(f"structured output does not support the tokenizer {type(tokenizer).__name__}")
    tokens_of: dict[bytes, list[int]] = defaultdict(list)
    for text, token in vocabulary.items():
        if token in special:
            continue
        if not byte_level:
            tokens_of[_sentencepiece_bytes(text)].append(token)
        elif all(char in byte_of for char in text):
            tokens_of[bytes(byte_of[char] for char in text)].append(token)
    tokens_of.pop(b"", None)
    return dict(tokens_of)


def _sentencepiece_bytes(text: str) -> bytes:
    """Returns the bytes of a SentencePiece token, which is a byte such as ``<0x0A>``, or text with ▁ for a space."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace("▁", " ").encode()


def _byte_decoder() -> dict[str, int]:
    """Returns GPT-2's map from characters to bytes: U+0100 and above stand for the bytes that are not printable."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _distances_to_final(transitions: Mapping[int, Mapping[int, int]], final_states: Iterable[int]) -> dict[int, int]:
    """Returns the fewest tokens from each state to a final state, found by breadth-first search backwards."""
    sources: dict[int, set[int]] = defaultdict(set)
    for state, targets in transitions.items():
        for target in set(targets.values()):
            sources[target].add(state)
    distance = dict.fromkeys(final_states, 0)
    frontier = list(distance)
    while frontier:
        reached = {state for target in frontier for state in sources[target] if state not in distance}
        steps = distance[frontier[0]] + 1
        distance |= dict.fromkeys(reached, steps)
        frontier = list(reached)
    return distance
