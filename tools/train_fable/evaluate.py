"""Scores the rounded weights on the held-out files under greedy decoding, and the held-out loss.

    evaluate.py RUN_DIR TALES.txt.gz TOKENIZER.json TESTS_DIR OUT_DIR
"""
import json
import os
import re
import sys

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from data import encode, split_tales
from model import Config, Fable

MAX_NEW = 200
SETS = ("tool_calls", "arithmetic", "who", "tool_results", "effort")


def load(run, device):
    model = Fable(Config()).to(device)
    model.load_state_dict(torch.load(os.path.join(run, "rounded.pt"), map_location=device))
    return model.eval()


@torch.no_grad()
def greedy(model, prompts, stops, count=MAX_NEW):
    """The ids that follow each prompt, up to and with a stop id."""
    device, lengths = model.head.device, [len(p) for p in prompts]
    tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.long, device=device)
    for i, p in enumerate(prompts):
        tokens[i, :len(p)] = torch.tensor(p, device=device)
    cache = model.cache(len(prompts), max(lengths) + count)
    position = torch.tensor(lengths, device=device)
    grid = torch.arange(max(lengths), device=device).expand(len(prompts), -1)
    # padding is written at later positions, masked by causality and overwritten by what follows
    logits = model.step(tokens, grid, cache)[torch.arange(len(prompts), device=device), position - 1]
    out, alive = [[] for _ in prompts], [True] * len(prompts)
    for n in range(count):
        following = logits.argmax(-1)
        for i, t in enumerate(following.tolist()):
            if alive[i]:
                out[i].append(t)
                alive[i] = t not in stops
        if not any(alive) or n + 1 == count:
            return out
        logits = model.step(following[:, None], (position + n)[:, None], cache)[:, 0]


def channels(text):
    """(analysis, final, call as (name, arguments text) or None) of what the model said."""
    analysis = " ".join(re.findall(r"<\|channel\|>analysis<\|message\|>(.*?)<\|end\|>", text, re.S))
    final = re.findall(r"<\|channel\|>final<\|message\|>(.*?)<\|return\|>", text, re.S)
    call = re.search(r"<\|channel\|>commentary to=functions\.(\S+) <\|constrain\|>json<\|message\|>(.*?)<\|call\|>", text, re.S)
    return analysis, final[-1] if final else "", (call[1], call[2]) if call else None


def same_call(call, expect):
    try:
        return call is not None and call[0] == expect["name"] and json.loads(call[1]) == expect["arguments"]
    except json.JSONDecodeError:
        return False


def correct(kind, said, expect):
    analysis, final, call = channels(said)
    if kind == "tool_calls":
        return same_call(call, expect)
    if kind == "arithmetic":
        return re.findall(r"-?\d+", final)[-1:] == [expect]
    return bool(final) and expect.lower() in final.lower()


def words(said):
    return len(channels(said)[0].split())


def effort_score(said):
    """How many of the questions have low < medium and 3 x medium <= high (in words of analysis)."""
    lengths = [tuple(words(s) for s in said[i:i + 3]) for i in range(0, len(said), 3)]
    return sum(low < medium and 3 * medium <= high for low, medium, high in lengths), lengths


@torch.no_grad()
def heldout_loss(model, tokenizer, text, length=1024):
    """(nats per token, nats per byte) with rows of `length` tokens."""
    ids = torch.from_numpy(encode(tokenizer, text)).long().to(model.head.device)
    rows = ids[:len(ids) // length * length].view(-1, length)
    total = 0.0
    for part in rows.split(16):
        grid = torch.arange(length, device=ids.device).expand(len(part), -1)
        logits = model.step(part, grid, model.cache(len(part), length))
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    count = rows[:, 1:].numel()
    byte_count = len(text.encode()) * count / len(ids)
    return total / count, total / byte_count


def main(run, tales, tokenizer_path, tests, out):
    torch.set_float32_matmul_precision("highest")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(run, device), Tokenizer.from_file(tokenizer_path)
    stops = {tokenizer.token_to_id(t) for t in ("<|return|>", "<|call|>", "<|endoftext|>")}
    scores, log = {}, open(os.path.join(out, "said.jsonl"), "w", encoding="utf-8")
    for kind in SETS:
        with open(f"{tests}/{kind}.jsonl", encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        said = [tokenizer.decode(ids, skip_special_tokens=False) for ids in greedy(model, [r["prompt_ids"] for r in rows], stops)]
        right = [correct(kind, s, r["expect"]) for s, r in zip(said, rows)]
        scores[kind] = f"{sum(right)}/{len(rows)}"
        if kind == "effort":
            good, lengths = effort_score(said)
            scores[kind] = f"{good}/{len(lengths)}"
            scores["analysis_words"] = [sum(l[i] for l in lengths) / len(lengths) for i in range(3)]
        for r, s, ok in zip(rows, said, right):
            log.write(json.dumps({"set": kind, "right": ok, "expect": r["expect"], "user": r["messages"][-1]["content"], "said": s}, ensure_ascii=False) + "\n")
    scores["loss_per_token"], scores["loss_per_byte"] = heldout_loss(model, tokenizer, split_tales(tales)[1])
    for start in ("Once upon a time there was a fox who", "The king looked out of the window and", "\"Who are you?\" said the old woman."):
        text = tokenizer.decode(greedy(model, [tokenizer.encode(start).ids], stops, 80)[0])
        log.write(json.dumps({"set": "tale", "start": start, "said": text}, ensure_ascii=False) + "\n")
    with open(os.path.join(out, "scores.json"), "w") as f:
        json.dump(scores, f, indent=1)
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
