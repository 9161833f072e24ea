"""Rows of token ids for training: crops of the tales and packed conversations.

A row is (tokens, loss weight of each token, document number), each [length + 1].
"""
import functools
import random
import re

import numpy as np
import torch
from tokenizers import Tokenizer

from conversations import pieces
from tokenizer import tale_text
from words import Source, tale_words

BLOCK = 20000  # characters; every hundredth block of the tales is held out


def split_tales(path):
    """(training text, held-out text)."""
    text = tale_text(path)
    blocks = [text[i:i + BLOCK] for i in range(0, len(text), BLOCK)]
    return "".join(b for i, b in enumerate(blocks) if i % 100 != 50), "".join(b for i, b in enumerate(blocks) if i % 100 == 50)


def encode(tokenizer, text):
    """Ids of a long text, cut at line ends so that the encoder's memory stays small."""
    return np.concatenate([np.array(e.ids, np.int32) for e in tokenizer.encode_batch(text.splitlines(keepends=True), add_special_tokens=False)])


# Places where no pre-token can span: round control tokens, after a line end before a letter, after a sentence.
SEAMS = re.compile(r"(<\|\w+\|>)|(?<=\n)(?=[A-Za-z#])|(?<=[a-z]\.)(?= [A-Z])")


def cached_encoder(tokenizer):
    """text -> ids; conversations repeat most of their lines and sentences, so these are looked up."""
    @functools.lru_cache(maxsize=1 << 16)
    def part(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    return lambda text: [i for t in SEAMS.split(text) if t for i in part(t)]


class Rows(torch.utils.data.IterableDataset):
    """Endless blocks [rows, 3, length + 1]; `share` of the rows are tales."""

    def __init__(self, tales, tokenizer_path, length, rows, share, seed):
        self.tales, self.tokenizer_path = tales, tokenizer_path
        self.length, self.rows, self.share, self.seed = length, rows, share, seed
        self.words = tale_words(tales)
        self.tale_ids = encode(Tokenizer.from_file(tokenizer_path), split_tales(tales)[0])

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        self.rng = random.Random(self.seed * 1000 + (worker.id if worker else 0))
        self.source = Source(self.rng, self.words)
        self.encode = cached_encoder(Tokenizer.from_file(self.tokenizer_path))
        self.waiting = []
        while True:
            yield torch.from_numpy(np.stack([self.tale_row() if self.rng.random() < self.share else self.packed_row() for _ in range(self.rows)]))

    def tale_row(self):
        start = self.rng.randrange(len(self.tale_ids) - self.length - 1)
        tokens = self.tale_ids[start:start + self.length + 1]
        return np.stack((tokens, np.ones_like(tokens), np.zeros_like(tokens)))

    def document(self):
        tokens, weights = [], []
        for text, trained in pieces(self.source):
            ids = self.encode(text)
            tokens += ids
            weights += [int(trained)] * len(ids)
        return tokens, weights

    def packed_row(self):
        """Whole documents only: the longest waiting one that still fits, until none does."""
        row, used, number = np.zeros((3, self.length + 1), np.int32), 0, 0
        while True:
            while len(self.waiting) < 48:
                self.waiting.append(self.document())
                self.waiting = [d for d in self.waiting if len(d[0]) <= self.length]
            fitting = [d for d in self.waiting if len(d[0]) <= self.length + 1 - used]
            if not fitting:
                row[2, used:] = number + 1
                return row
            tokens, weights = best = fitting[0] if used == 0 else max(fitting, key=lambda d: len(d[0]))
            self.waiting.remove(best)
            row[:, used:used + len(tokens)] = tokens, weights, [number] * len(tokens)
            used, number = used + len(tokens), number + 1
