"""The toy world's tokenizer: a real CLIP tokenizer (BPE files in the usual layout) with one token per word."""

from __future__ import annotations

import json

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from data.toy.world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES

CAPTION_TOKENS = 16


def words() -> list[str]:
    """Every word of the caption grammar, sorted."""
    stated = [*SHAPES, *COLOURS, *BACKGROUNDS, *SIZES, *RELATIONS, "a", "an", "on", "background"]
    return sorted({word for phrase in stated for word in phrase.split()})


def build_tokenizer() -> CLIPTokenizer:
    """Learns the merges from the words; the end token has the highest id, as open_clip's pooling expects."""
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = Whitespace()
    trainer = BpeTrainer(vocab_size=4096, end_of_word_suffix="</w>", min_frequency=1, show_progress=False)
    learner.train_from_iterator([" ".join(words())], trainer)
    learned = learner.get_vocab()
    merges = _merges_of(learner)
    vocabulary = sorted(learned, key=learned.__getitem__)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=CAPTION_TOKENS)


def _merges_of(learner: Tokenizer) -> list[tuple[str, str]]:
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]
