#!/usr/bin/env python3
"""Write a folder shaped like openai/gpt-oss-20b (or -120b) with random weights: MXFP4 experts, BF16 the rest.

    bench/gptoss_folder.py OUT [--layers 24] [--experts 32] [--vocab 201088] [--seed 1]

Same tensors, names, types and order of magnitude as the published checkpoint, so `orcd bench OUT` reads the bytes
that the real one would make it read. Values come from a pool that repeats: 13.8 GB are written in seconds. There is
no tokenizer.
"""
import argparse
import array
import json
import math
import os
import random
import struct

D, F, HEADS, KV_HEADS, HEAD_DIM = 2880, 2880, 64, 8, 64
SHARD = 5 << 30
POOL = 1 << 20  # values


def tensors(layers, experts, vocab):
    """(name, type, shape, standard deviation, mean); MXFP4 comes as two tensors of bytes."""
    yield "model.embed_tokens.weight", "BF16", (vocab, D), 1.0, 0.0
    for i in range(layers):
        p = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield p + norm + ".weight", "BF16", (D,), 0.1, 1.0
        for name, rows, cols in (("q", HEADS * HEAD_DIM, D), ("k", KV_HEADS * HEAD_DIM, D),
                                 ("v", KV_HEADS * HEAD_DIM, D), ("o", D, HEADS * HEAD_DIM)):
            yield p + f"self_attn.{name}_proj.weight", "BF16", (rows, cols), cols**-0.5, 0.0
            yield p + f"self_attn.{name}_proj.bias", "BF16", (rows,), 0.1, 0.0
        yield p + "self_attn.sinks", "BF16", (HEADS,), 1.0, 0.0
        yield p + "mlp.router.weight", "BF16", (experts, D), 2 * D**-0.5, 0.0
        yield p + "mlp.router.bias", "BF16", (experts,), 0.1, 0.0
        for name, rows, cols in (("gate_up", 2 * F, D), ("down", D, F)):
            name = p + f"mlp.experts.{name}_proj"
            yield name + "_blocks", "U8", (experts, rows, cols // 32, 16), None, 0.0
            yield name + "_scales", "U8", (experts, rows, cols // 32), cols**-0.5, 0.0
            yield name + "_bias", "BF16", (experts, rows), 0.1, 0.0
    yield "model.norm.weight", "BF16", (D,), 0.1, 1.0
    yield "lm_head.weight", "BF16", (vocab, D), 2.5 * D**-0.5, 0.0


class Pool:
    """Bytes of a kind, from a place that the seed decides."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.normal = [self.rng.gauss(0, 1) for _ in range(POOL)]
        self.made = {}

    def of(self, kind, std, mean):
        key = kind, std, mean
        if key not in self.made:
            if kind == "BF16":  # the upper halves of floats
                f32 = array.array("f", [v * std + mean for v in self.normal]).tobytes()
                data = bytearray(2 * POOL)
                data[0::2], data[1::2] = f32[2::4], f32[3::4]
            else:
                data = self.rng.randbytes(POOL)
            if kind == "U8" and std is not None:  # block scales: four bits have a standard deviation of 2.926
                exponent = round(127 + math.log2(std / 2.926))
                data = data.translate(bytes(exponent - 1 + i % 3 for i in range(256)))
            self.made[key] = memoryview(bytes(data) * 8)
        return self.made[key]

    def write(self, f, n, kind, std, mean):
        data = self.of(kind, std, mean)
        at = self.rng.randrange(POOL // 2) * 2
        while n:
            part = data[at:at + n]
            f.write(part)
            n -= len(part)
            at = 0


def size(kind, shape):
    n = 2 if kind == "BF16" else 1
    for d in shape:
        n *= d
    return n


def shards(layers, experts, vocab):
    group, total = [], 0
    for t in tensors(layers, experts, vocab):
        group.append(t)
        total += size(t[1], t[2])
        if total > SHARD:
            yield group
            group, total = [], 0
    if group:
        yield group


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("out")
    for name, value in (("layers", 24), ("experts", 32), ("vocab", 201088), ("seed", 1)):
        ap.add_argument("--" + name, type=int, default=value)
    a = ap.parse_args()
    os.makedirs(a.out, exist_ok=True)
    pool, groups, where, total = Pool(a.seed), list(shards(a.layers, a.experts, a.vocab)), {}, 0
    for i, group in enumerate(groups):
        name = f"model-{i:05}-of-{len(groups) - 1:05}.safetensors"
        header, at = {}, 0
        for t, kind, shape, _, _ in group:
            n = size(kind, shape)
            header[t] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + n]}
            where[t] = name
            at += n
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(os.path.join(a.out, name), "wb", buffering=0) as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for _, kind, shape, std, mean in group:
                pool.write(f, size(kind, shape), kind, std, mean)
        total += at
    with open(os.path.join(a.out, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": where}, f)
    with open(os.path.join(a.out, "config.json"), "w") as f:
        json.dump({
            "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True,
            "num_hidden_layers": a.layers, "hidden_size": D, "intermediate_size": F, "head_dim": HEAD_DIM,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "num_local_experts": a.experts,
            "num_experts_per_tok": 4, "vocab_size": a.vocab, "sliding_window": 128, "swiglu_limit": 7.0,
            "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(a.layers)],
            "max_position_embeddings": 131072, "initial_context_length": 4096, "rms_norm_eps": 1e-05,
            "rope_theta": 150000, "tie_word_embeddings": False,
            "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                             "original_max_position_embeddings": 4096, "truncate": False},
            "quantization_config": {"quant_method": "mxfp4"}}, f, indent=1)
    print(f"{a.out}: {len(where)} tensors, {total / 1e9:.2f} GB in {len(groups)} files")


if __name__ == "__main__":
    main()
