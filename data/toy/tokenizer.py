"""The toy world's tokenizer: a real CLIP tokenizer (BPE files in the usual layout) with one token per word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from data.toy.world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


CAPTION_TOKENS = 16
_WORD_END = "</w>"


def words() -> list[str]:
    """Every word of the caption grammar, sorted."""
    stated = [*SHAPES, *COLOURS, *BACKGROUNDS, *SIZES, *RELATIONS, "a", "an", "on", "background"]
    return sorted({word for phrase in stated for word in phrase.split()})


def build_tokenizer() -> CLIPTokenizer:
    """Learns the merges from the words; the end token has the highest id, as open_clip's pooling expects.

    Deterministic, which the trainer of the tokenizers package is not: its order of equally frequent pairs varies from call to
    call, and with it the ids and what a seed trains.
    """
    from transformers import CLIPTokenizer

    spelled = [[*word[:-1], word[-1] + _WORD_END] for word in words()]
    symbols = sorted({symbol for word in spelled for symbol in word})
    merges = _merges(spelled)
    vocabulary = dict.fromkeys([*symbols, *("".join(merge) for merge in merges)])
    ids = {token: index for index, token in enumerate([*vocabulary, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=CAPTION_TOKENS)


def _merges(spelled: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """Byte-pair encoding until every word is one symbol: the most frequent pair first, of equal ones the first alphabetically.

    Source: Sennrich et al., arXiv:1508.07909, algorithm 1.
    """
    merges: list[tuple[str, str]] = []
    current = [list(word) for word in spelled]
    while True:
        counts = Counter(pair for word in current for pair in pairwise(word))
        if not counts:
            return merges
        merge = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(merge)
        for word in current:
            for i in range(len(word) - 2, -1, -1):
                if tuple(word[i : i + 2]) == merge:
                    word[i : i + 2] = ["".join(merge)]
