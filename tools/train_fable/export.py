"""Writes models/fable.gguf from the rounded weights of a training run.

    export.py RUN_DIR TOKENIZER.json OUT.gguf
"""
import json
import os
import struct
import sys

import numpy as np
import torch

from model import Config

U32, F32_VALUE, STRING, ARRAY, I32 = 4, 6, 8, 9, 5
F32, BF16, MXFP4 = 0, 30, 39
LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
ALIGNMENT = 32


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key, kind, value):
    packed = text(value) if kind == STRING else struct.pack("<I" if kind == U32 else "<f", value)
    return text(key) + struct.pack("<I", kind) + packed


def strings(key, values):
    return text(key) + struct.pack("<IIQ", ARRAY, STRING, len(values)) + b"".join(map(text, values))


def integers(key, values):
    return text(key) + struct.pack("<IIQ", ARRAY, I32, len(values)) + np.asarray(values, "<i4").tobytes()


def pack_mxfp4(w):
    """Blocks {scale, 16 bytes: element j low, element j + 16 high} of weights that are already rounded."""
    blocks = w.reshape(-1, 32)
    largest = np.abs(blocks).max(1)
    exponent = np.floor(np.log2(np.where(largest > 0, largest, 1))).astype(np.int32) - 2
    x = np.ldexp(blocks, -exponent[:, None])
    codes = np.searchsorted(LEVELS, np.abs(x)).astype(np.uint8)
    assert np.array_equal(LEVELS[codes], np.abs(x)), "weights are not MXFP4 values"
    codes |= (np.signbit(x) & (codes > 0)).astype(np.uint8) << 3
    packed = codes[:, :16] | codes[:, 16:] << 4
    return np.concatenate(((exponent + 127).astype(np.uint8)[:, None], packed), 1).tobytes()


def pack_bf16(w):
    bits = np.ascontiguousarray(w, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any(), "weights are not bfloat16 values"
    return (bits >> 16).astype("<u2").tobytes()


PACK = {F32: lambda w: np.ascontiguousarray(w, "<f4").tobytes(), BF16: pack_bf16, MXFP4: pack_mxfp4}
LAYER = {"attn_norm": ("attn_norm.weight", F32), "ffn_norm": ("post_attention_norm.weight", F32), "q": ("attn_q.weight", BF16), "q_bias": ("attn_q.bias", F32),
         "k": ("attn_k.weight", BF16), "k_bias": ("attn_k.bias", F32), "v": ("attn_v.weight", BF16), "v_bias": ("attn_v.bias", F32), "o": ("attn_output.weight", BF16),
         "o_bias": ("attn_output.bias", F32), "sinks": ("attn_sinks.weight", F32), "router": ("ffn_gate_inp.weight", F32), "router_bias": ("ffn_gate_inp.bias", F32),
         "gate": ("ffn_gate_exps.weight", MXFP4), "gate_bias": ("ffn_gate_exps.bias", F32), "up": ("ffn_up_exps.weight", MXFP4), "up_bias": ("ffn_up_exps.bias", F32),
         "down": ("ffn_down_exps.weight", MXFP4), "down_bias": ("ffn_down_exps.bias", F32)}
GLOBAL = {"embedding": ("token_embd.weight", BF16), "norm": ("output_norm.weight", F32), "head": ("output.weight", BF16)}


def tensor_name(parameter):
    """(name in the file, type)."""
    if parameter in GLOBAL:
        return GLOBAL[parameter]
    _, layer, part = parameter.split(".")
    name, kind = LAYER[part]
    return f"blk.{layer}.{name}", kind


def model_entries(c):
    a = "gpt-oss."
    return [entry("general.architecture", STRING, "gpt-oss"), entry("general.name", STRING, "fable"), entry("general.license", STRING, "apache-2.0"),
            entry("general.description", STRING, "Small demo model of orcd: tales, one-digit sums, function calls"),
            entry("general.file_type", U32, 38), entry("general.quantization_version", U32, 2), entry("general.alignment", U32, ALIGNMENT),
            entry(a + "context_length", U32, 131072), entry(a + "embedding_length", U32, c.hidden), entry(a + "block_count", U32, c.layers),
            entry(a + "feed_forward_length", U32, c.intermediate), entry(a + "attention.head_count", U32, c.heads), entry(a + "attention.head_count_kv", U32, c.kv_heads),
            entry(a + "attention.key_length", U32, c.head_dim), entry(a + "attention.value_length", U32, c.head_dim),
            entry(a + "attention.layer_norm_rms_epsilon", F32_VALUE, c.eps), entry(a + "attention.sliding_window", U32, c.window),
            entry(a + "rope.dimension_count", U32, c.head_dim), entry(a + "rope.freq_base", F32_VALUE, c.rope_theta), entry(a + "rope.scaling.type", STRING, "yarn"),
            entry(a + "rope.scaling.factor", F32_VALUE, c.rope_factor), entry(a + "rope.scaling.original_context_length", U32, c.rope_original),
            entry(a + "rope.scaling.yarn_beta_fast", F32_VALUE, c.beta_fast), entry(a + "rope.scaling.yarn_beta_slow", F32_VALUE, c.beta_slow),
            entry(a + "expert_count", U32, c.experts), entry(a + "expert_used_count", U32, c.active), entry(a + "expert_feed_forward_length", U32, c.intermediate)]


def tokenizer_entries(path):
    with open(path, encoding="utf-8") as f:
        made = json.load(f)
    control = {t["content"]: t["id"] for t in made["added_tokens"]}
    ids = {**made["model"]["vocab"], **control}
    tokens = sorted(ids, key=ids.get)
    assert [ids[t] for t in tokens] == list(range(Config.vocabulary))
    merges = [m if isinstance(m, str) else " ".join(m) for m in made["model"]["merges"]]
    return [entry("tokenizer.ggml.model", STRING, "gpt2"), entry("tokenizer.ggml.pre", STRING, "gpt-4o"), strings("tokenizer.ggml.tokens", tokens),
            integers("tokenizer.ggml.token_type", [3 if t in control else 1 for t in tokens]), strings("tokenizer.ggml.merges", merges),
            entry("tokenizer.ggml.bos_token_id", U32, ids["<|startoftext|>"]), entry("tokenizer.ggml.eos_token_id", U32, ids["<|return|>"]),
            entry("tokenizer.ggml.padding_token_id", U32, ids["<|endoftext|>"])]


def padded(raw):
    return raw + b"\0" * (-len(raw) % ALIGNMENT)


def write(weights, tokenizer_path, out):
    infos, bodies, offset = [], [], 0
    for parameter, value in weights.items():
        name, kind = tensor_name(parameter)
        body, dims = padded(PACK[kind](value)), value.shape[::-1]
        infos.append(text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset))
        bodies.append(body)
        offset += len(body)
    entries = model_entries(Config()) + tokenizer_entries(tokenizer_path)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(entries)) + b"".join(entries) + b"".join(infos)
    with open(out, "wb") as f:
        f.write(padded(head))
        f.writelines(bodies)


def main(run, tokenizer_path, out):
    weights = {n: t.float().numpy() for n, t in torch.load(os.path.join(run, "rounded.pt"), map_location="cpu").items()}
    write(weights, tokenizer_path, out)
    print(out, os.path.getsize(out), "bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
