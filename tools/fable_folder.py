#!/usr/bin/env python3
"""Turns models/fable.gguf into a Hugging Face folder laid out as OpenAI publishes gpt-oss.

    fable_folder.py models/fable.gguf OUT_DIR

Reads any gpt-oss GGUF with MXFP4 experts and F32 or BF16 for the rest. Needs numpy only.
"""
import json
import os
import struct
import sys

import numpy as np

F32, BF16, MXFP4 = 0, 30, 39
BLOCK_BYTES = {F32: (1, 4), BF16: (1, 2), MXFP4: (32, 17)}
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
SPLIT = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])


class Reader:
    """A cursor over the bytes of a GGUF file."""

    def __init__(self, raw):
        self.raw, self.at = raw, 0

    def take(self, form):
        value, = struct.unpack_from("<" + form, self.raw, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def string(self):
        size = self.take("Q")
        self.at += size
        return self.raw[self.at - size:self.at].decode()

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, count = self.take("I"), self.take("Q")
            return [self.value(inner) for _ in range(count)]
        return self.take(SCALARS[kind])


def read_gguf(path):
    """(keys, tensors by name as (type, shape outermost first, raw bytes))."""
    with open(path, "rb") as f:
        r = Reader(f.read())
    assert r.raw[:4] == b"GGUF"
    r.at = 8
    tensor_count, key_count = r.take("Q"), r.take("Q")
    keys, infos = {}, []
    for _ in range(key_count):
        name = r.string()
        keys[name] = r.value(r.take("I"))
    for _ in range(tensor_count):
        name = r.string()
        dims = [r.take("Q") for _ in range(r.take("I"))]
        infos.append((name, dims[::-1], r.take("I"), r.take("Q")))
    alignment = keys.get("general.alignment", 32)
    base = (r.at + alignment - 1) // alignment * alignment
    tensors = {}
    for name, shape, kind, offset in infos:
        per, size = BLOCK_BYTES[kind]
        raw = np.frombuffer(r.raw, np.uint8, int(np.prod(shape)) // per * size, base + offset)
        tensors[name] = (kind, shape, raw)
    return keys, tensors


def as_bf16(tensor):
    """uint16 array; F32 values of fable are bfloat16 values already, others are rounded."""
    kind, shape, raw = tensor
    if kind == BF16:
        return raw.view("<u2").reshape(shape)
    bits = raw.view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").reshape(shape)


def as_mxfp4(tensor):
    """(blocks [..., groups, 16], scales [..., groups]) with neighbours 2b, 2b+1 in byte b."""
    _, shape, raw = tensor
    rows = raw.reshape(*shape[:-1], shape[-1] // 32, 17)
    packed = rows[..., 1:]
    codes = np.concatenate((packed & 15, packed >> 4), -1)
    return codes[..., 0::2] | codes[..., 1::2] << 4, rows[..., 0]


def interleaved(gate, up):
    """Rows gate 0, up 0, gate 1, up 1, ... along axis 1."""
    return np.stack((gate, up), 2).reshape(gate.shape[0], -1, *gate.shape[2:])


def safetensors_of(keys, tensors):
    """name -> (dtype name, array)."""
    out = {}
    plain = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
    parts = {"attn_norm.weight": "input_layernorm.weight", "post_attention_norm.weight": "post_attention_layernorm.weight", "attn_sinks.weight": "self_attn.sinks",
             "ffn_gate_inp.weight": "mlp.router.weight", "ffn_gate_inp.bias": "mlp.router.bias", "ffn_down_exps.bias": "mlp.experts.down_proj_bias"}
    parts.update({f"attn_{a}.{kind}": f"self_attn.{b}_proj.{kind}" for a, b in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o")) for kind in ("weight", "bias")})
    for layer in range(keys["gpt-oss.block_count"]):
        plain.update({f"blk.{layer}.{a}": f"model.layers.{layer}.{b}" for a, b in parts.items()})
        source, target = f"blk.{layer}.ffn_", f"model.layers.{layer}.mlp.experts."
        gate, up, down = (as_mxfp4(tensors[f"{source}{part}_exps.weight"]) for part in ("gate", "up", "down"))
        for i, kind in enumerate(("blocks", "scales")):
            out[f"{target}gate_up_proj_{kind}"] = ("U8", interleaved(gate[i], up[i]))
            out[f"{target}down_proj_{kind}"] = ("U8", down[i])
        out[f"{target}gate_up_proj_bias"] = ("BF16", interleaved(as_bf16(tensors[source + "gate_exps.bias"]), as_bf16(tensors[source + "up_exps.bias"])))
    out.update({name: ("BF16", as_bf16(tensors[gguf])) for gguf, name in plain.items()})
    return out


def write_safetensors(path, tensors):
    header, bodies, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name, (dtype, array) in sorted(tensors.items()):
        body = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + len(body)]}
        bodies.append(body)
        offset += len(body)
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        f.writelines(bodies)


def config_of(keys):
    k = {name.removeprefix("gpt-oss."): value for name, value in keys.items()}
    eos, pad = keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.padding_token_id"]
    return {"architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": eos, "experts_per_token": k["expert_used_count"],
            "head_dim": k["attention.key_length"], "hidden_act": "silu", "hidden_size": k["embedding_length"], "initial_context_length": k["rope.scaling.original_context_length"],
            "initializer_range": 0.02, "intermediate_size": k["expert_feed_forward_length"],
            "layer_types": [("sliding_attention", "full_attention")[i % 2] for i in range(k["block_count"])], "max_position_embeddings": k["context_length"], "model_type": "gpt_oss",
            "num_attention_heads": k["attention.head_count"], "num_experts_per_tok": k["expert_used_count"], "num_hidden_layers": k["block_count"],
            "num_key_value_heads": k["attention.head_count_kv"], "num_local_experts": k["expert_count"], "output_router_logits": False, "pad_token_id": pad,
            "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"], "quant_method": "mxfp4"},
            "rms_norm_eps": 1e-05, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": k["rope.scaling.factor"],
                                                    "original_max_position_embeddings": k["rope.scaling.original_context_length"], "rope_type": "yarn", "truncate": False},
            "rope_theta": int(k["rope.freq_base"]), "router_aux_loss_coef": 0.9, "sliding_window": k["attention.sliding_window"], "swiglu_limit": 7.0, "tie_word_embeddings": False,
            "use_cache": True, "vocab_size": len(keys["tokenizer.ggml.tokens"])}


def tokenizer_of(keys):
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    added = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} for i, (t, k) in enumerate(zip(tokens, kinds)) if k == 3]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
             "vocab": {t: i for i, (t, k) in enumerate(zip(tokens, kinds)) if k != 3}, "merges": [m.split(" ") for m in keys["tokenizer.ggml.merges"]]}
    shown = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "post_processor": {**shown, "trim_offsets": False}, "decoder": shown, "model": model}


def generation_of(keys):
    ids = {t: i for i, t in enumerate(keys["tokenizer.ggml.tokens"])}
    return {"bos_token_id": ids["<|startoftext|>"], "do_sample": True, "eos_token_id": [ids["<|return|>"], ids["<|call|>"]], "pad_token_id": ids["<|endoftext|>"]}


def tokenizer_config_of(keys):
    return {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}


def main(gguf, out):
    keys, tensors = read_gguf(gguf)
    os.makedirs(out, exist_ok=True)
    write_safetensors(f"{out}/model.safetensors", safetensors_of(keys, tensors))
    for name, make in (("config", config_of), ("generation_config", generation_of), ("tokenizer", tokenizer_of), ("tokenizer_config", tokenizer_config_of)):
        with open(f"{out}/{name}.json", "w", encoding="utf-8") as f:
            json.dump(make(keys), f, ensure_ascii=False, indent=2)
            f.write("\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
