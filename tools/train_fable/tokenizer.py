"""Trains fable's byte-level BPE: 4096 ids, the pre-tokenizer and the control tokens of gpt-oss.

    tokenizer.py TALES.txt.gz OUT.json
"""
import gzip
import random
import re
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from conversations import pieces
from words import Source, tale_words

VOCABULARY = 4096
CONTROL = ["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>"]
RESERVED = 7
SPLIT = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])


def empty_tokenizer():
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def control_tokens():
    first = VOCABULARY - len(CONTROL) - RESERVED
    return CONTROL + [f"<|reserved_{first + len(CONTROL) + i}|>" for i in range(RESERVED)]


def tale_text(path):
    with gzip.open(path, "rt", encoding="utf-8") as f:
        return re.sub(r"<<<BOOK[^\n]*>>>\n*", "", f.read())


def samples(path, conversations=12000):
    """The tales, then conversations without their control tokens."""
    text = tale_text(path)
    yield from (text[i:i + 10000] for i in range(0, len(text), 10000))
    src = Source(random.Random(1), tale_words(path))
    for _ in range(conversations):
        yield from re.split(r"<\|\w+\|>", "".join(text for text, _ in pieces(src)))


def train(tales):
    control = control_tokens()
    tokenizer = empty_tokenizer()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - len(control), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[])
    tokenizer.train_from_iterator(samples(tales), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return tokenizer


if __name__ == "__main__":
    made = train(sys.argv[1])
    made.save(sys.argv[2])
    print(made.get_vocab_size(), [made.token_to_id(t) for t in ("<|startoftext|>", "<|return|>", "<|call|>", "assistant", "functions", '{"')])
