"""Checks an exported folder against the training model and writes golden vectors by transformers.

    golden.py RUN_DIR HF_FOLDER TALES.txt.gz TESTS_DIR OUT_DIR

Logits are float32 on the CPU with dequantised weights; only the last 8 rows of each are kept.
"""
import json
import os
import sys

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import GptOssConfig, GptOssForCausalLM

from data import split_tales
from evaluate import load

LEVELS = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6])
ROWS, NEW = 8, 48


def dequantised(blocks, scales):
    """[experts, rows, columns] of OpenAI's layout."""
    values = torch.stack((LEVELS[(blocks & 15).long()], LEVELS[(blocks >> 4).long()]), -1).flatten(-2)
    return (values * torch.exp2(scales.float() - 127)[..., None]).flatten(-2)


def transformers_model(folder):
    with open(f"{folder}/config.json") as f:
        raw = json.load(f)
    raw.pop("quantization_config")
    config = GptOssConfig(**raw)
    config._attn_implementation = "eager"
    model = GptOssForCausalLM(config).float().eval()
    state = load_file(f"{folder}/model.safetensors")
    for name in [n for n in state if n.endswith("_blocks")]:
        weights = dequantised(state.pop(name), state.pop(name.replace("_blocks", "_scales")))
        state[name.removesuffix("_blocks")] = weights.transpose(1, 2).contiguous()
    missing = model.load_state_dict({n: t.float() for n, t in state.items()}, strict=True)
    assert not missing.missing_keys
    return model


def prompts(tokenizer, tales, tests):
    """About 30, 300 and 700 ids: an opening, held-out tale text, and tool conversations."""
    with open(f"{tests}/tool_results.jsonl", encoding="utf-8") as f:
        rendered = [json.loads(line)["prompt_ids"] for line in f]
    text = tokenizer.encode(split_tales(tales)[1][3000:9000], add_special_tokens=False).ids
    return text[:30], min(rendered, key=lambda ids: abs(len(ids) - 300)), text[100:800]


def texts(tokenizer, tales, tests):
    """100 strings: tale lines, requests, and awkward ones."""
    odd = ["", " ", "\n", "\t\n  \r\n", "Hello  world", "I'm you're HE'LL", "1234567890 12 345 6,789.01", "snake_case camelCase HTTPServer", "naïve café e\u0301 ß ﬁ", "日本語 中文 한국어", "🙂👩‍👩‍👧 🏳️‍🌈",
           "مرحبا שלום", "x" * 100, " " * 40, "<|start|>user<|message|>hi<|end|>", "text <|return|> more", "<|start|", "def f(x):\n    return x**2\n\n", '{"k":[1,2.5e-3,null,true]}', "\u0000\u0001\u007f"]
    with open(f"{tests}/tool_calls.jsonl", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    lines = [line for line in split_tales(tales)[1].split("\n") if len(line) > 20][:50]
    return (odd + [r["messages"][-1]["content"] for r in rows[:20]] + [r["prompt_text"] for r in rows[:10]] + lines)[:100]


def main(run, folder, tales, tests, out):
    torch.set_float32_matmul_precision("highest")
    os.makedirs(out, exist_ok=True)
    tokenizer, model, ours = Tokenizer.from_file(f"{folder}/tokenizer.json"), transformers_model(folder), load(run, "cpu")
    for n, ids in enumerate(prompts(tokenizer, tales, tests)):
        batch = torch.tensor([ids])
        with torch.no_grad():
            logits = model(batch).logits[0].float()
            greedy = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(ids):]
        mine = ours.step(batch, torch.arange(len(ids))[None], ours.cache(1, len(ids)))[0]
        print(f"prompt {n}: {len(ids)} ids, largest difference {(mine - logits).abs().max():.2e}, logits up to {logits.abs().max():.1f}")
        np.array(ids, "<i4").tofile(f"{out}/prompt{n}.i32")
        logits[-ROWS:].numpy().astype("<f4").tofile(f"{out}/logits{n}.f32")
        greedy.numpy().astype("<i4").tofile(f"{out}/greedy{n}.i32")
    with open(f"{out}/tokens_vectors.jsonl", "w", encoding="utf-8") as f:
        for text in texts(tokenizer, tales, tests):
            f.write(json.dumps({"text": text, "ids": tokenizer.encode(text, add_special_tokens=False).ids}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
