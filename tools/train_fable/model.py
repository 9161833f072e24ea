"""gpt-oss in PyTorch, small, with the rounding of the shipped file inside the forward pass.

Every weight is used as the file will hold it: experts as MXFP4, everything else as bfloat16. The
gradient passes straight through the rounding to float32 master weights.
"""
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


@dataclasses.dataclass(frozen=True)
class Config:
    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    experts: int = 8
    active: int = 4
    intermediate: int = 256
    window: int = 128
    limit: float = 7.0
    eps: float = 1e-5
    rope_theta: float = 150000.0
    rope_factor: float = 32.0
    rope_original: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0


def straight_through(w, rounded):
    return w + (rounded - w).detach()


def bf16(w):
    return straight_through(w, w.to(torch.bfloat16).to(torch.float32))


def mxfp4_round(w):
    """Blocks of 32 along the last axis: a power of two times 0, .5, 1, 1.5, 2, 3, 4, 6.

    The largest magnitude lands in (3.5, 7] before rounding, so it becomes 4 or 6 and rounding
    twice changes nothing.
    """
    blocks = w.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True).clamp_min(2.0 ** -100)
    scale = torch.exp2(torch.ceil(torch.log2(largest / 7)))
    x = (blocks / scale).abs()
    step = torch.where(x < 2, 0.5, torch.where(x < 4, 1.0, 2.0))
    value = (torch.round(x / step) * step).clamp_max(6)
    return (value * blocks.sign() * scale).flatten(-2)


def mxfp4(w):
    return straight_through(w, mxfp4_round(w))


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope_tables(c, length, device=None):
    """cos and sin [length, head_dim/2] of YaRN without rounding of the ramp."""
    half = c.head_dim // 2
    i = torch.arange(half, dtype=torch.float64)
    frequency = c.rope_theta ** (-i / half)
    edge = lambda beta: half * math.log(c.rope_original / (beta * 2 * math.pi)) / math.log(c.rope_theta)
    ramp = ((i - edge(c.beta_fast)) / (edge(c.beta_slow) - edge(c.beta_fast))).clamp(0, 1)
    frequency = frequency / c.rope_factor * ramp + frequency * (1 - ramp)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    gain = 0.1 * math.log(c.rope_factor) + 1
    return (angle.cos() * gain).float().to(device), (angle.sin() * gain).float().to(device)


def rotate(x, cos, sin):
    """x [batch, heads, tokens, head_dim], tables broadcast over [batch, 1, tokens, head_dim/2]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def flex_masks(documents, window):
    """Block masks of a packed batch: (sliding, full); attention stays inside a document."""
    batch, length = documents.shape

    def full(b, h, q, k):
        return (q >= k) & (documents[b, q] == documents[b, k])

    def sliding(b, h, q, k):
        return full(b, h, q, k) & (q - k < window)

    return tuple(create_block_mask(f, batch, None, length, length, device=documents.device) for f in (sliding, full))


def attend_packed(q, k, v, sink, mask):
    """A sink is one more softmax column without a value, so it only scales the plain result."""
    out, lse = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, return_lse=True)
    return out * torch.sigmoid(lse - sink[:, None])[..., None].to(out.dtype)


def attend_dense(q, k, v, sink, mask):
    """The same by definition; mask is boolean [batch, 1, queries, keys]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    scores = torch.cat((scores, sink.float()[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
    return scores.softmax(-1)[..., :-1].to(v.dtype) @ v


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim

        def weight(*shape, gain=1.0):
            return nn.Parameter(torch.randn(*shape) * gain * 0.5 * shape[-1] ** -0.5)

        def zeros(*shape):
            return nn.Parameter(torch.zeros(*shape))

        small = (2 * c.layers) ** -0.5
        self.attn_norm, self.ffn_norm = nn.Parameter(torch.ones(c.hidden)), nn.Parameter(torch.ones(c.hidden))
        self.q, self.q_bias = weight(q, c.hidden), zeros(q)
        self.k, self.k_bias = weight(kv, c.hidden), zeros(kv)
        self.v, self.v_bias = weight(kv, c.hidden), zeros(kv)
        self.o, self.o_bias = weight(c.hidden, q, gain=small), zeros(c.hidden)
        self.sinks = zeros(c.heads)
        self.router, self.router_bias = weight(c.experts, c.hidden), zeros(c.experts)
        self.gate, self.gate_bias = weight(c.experts, c.intermediate, c.hidden), zeros(c.experts, c.intermediate)
        self.up, self.up_bias = weight(c.experts, c.intermediate, c.hidden), zeros(c.experts, c.intermediate)
        self.down, self.down_bias = weight(c.experts, c.hidden, c.intermediate, gain=small), zeros(c.experts, c.hidden)

    def qkv(self, x, cos, sin):
        split = lambda t: t.unflatten(-1, (-1, self.c.head_dim)).transpose(1, 2)
        q, k, v = (split(F.linear(x, bf16(w), bf16(b))) for w, b in ((self.q, self.q_bias), (self.k, self.k_bias), (self.v, self.v_bias)))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def route(self, x):
        """Weights [tokens, experts], zero outside the chosen four, and the balance loss."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), bf16(self.router), bf16(self.router_bias))
            top, chosen = logits.topk(self.c.active, -1)
            weights = torch.zeros_like(logits).scatter(-1, chosen, top.softmax(-1))
            share = (weights > 0).float().mean(0) / self.c.active
            return weights, self.c.experts * (share * logits.softmax(-1).mean(0)).sum()

    def experts(self, x):
        """All experts on all tokens as two plain products; the routing weights select."""
        c, flat = self.c, x.flatten(0, -2)
        weights, balance = self.route(flat)
        gate = F.linear(flat, mxfp4(self.gate).flatten(0, 1), bf16(self.gate_bias).flatten())
        up = F.linear(flat, mxfp4(self.up).flatten(0, 1), bf16(self.up_bias).flatten())
        gate, up = gate.clamp_max(c.limit), up.clamp(-c.limit, c.limit)
        act = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        act = (act.unflatten(-1, (c.experts, c.intermediate)) * weights[..., None].to(act.dtype)).flatten(-2)
        out = F.linear(act, mxfp4(self.down).transpose(0, 1).flatten(1)) + weights @ bf16(self.down_bias)
        return out.view(x.shape), balance

    def forward(self, h, cos, sin, attend):
        """attend(q, k, v, sinks) knows the masks and where keys are kept."""
        out = attend(*self.qkv(rms_norm(h, bf16(self.attn_norm), self.c.eps), cos, sin), bf16(self.sinks))
        h = h + F.linear(out.transpose(1, 2).flatten(2), bf16(self.o), bf16(self.o_bias))
        out, balance = self.experts(rms_norm(h, bf16(self.ffn_norm), self.c.eps))
        return h + out, balance


class Fable(nn.Module):
    def __init__(self, config=Config()):
        super().__init__()
        self.c = config
        self.embedding = nn.Parameter(torch.randn(config.vocabulary, config.hidden) * 0.1)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.Parameter(torch.ones(config.hidden))
        self.head = nn.Parameter(torch.randn(config.vocabulary, config.hidden) * 0.02)

    def run(self, tokens, cos, sin, attend):
        """attend(layer number, q, k, v, sinks) -> logits, mean balance loss."""
        h, balance = F.embedding(tokens, bf16(self.embedding)), 0.0
        for i, layer in enumerate(self.layers):
            h, b = layer(h, cos, sin, lambda *a, i=i: attend(i, *a))
            balance = balance + b / len(self.layers)
        return F.linear(rms_norm(h, bf16(self.norm), self.c.eps), bf16(self.head)), balance

    def forward(self, tokens, cos, sin, masks):
        """Training on packed rows; masks = (sliding, full)."""
        attend = attend_dense if isinstance(masks[0], torch.Tensor) else attend_packed
        return self.run(tokens, cos, sin, lambda i, q, k, v, s: attend(q, k, v, s, masks[i % 2]))

    @torch.no_grad()
    def step(self, tokens, positions, cache):
        """Logits of new tokens [batch, n] at positions [batch, n]; cache holds keys and values by position."""
        cos, sin = (t[positions][:, None] for t in cache["rope"])
        at = torch.arange(cache["k"].shape[3], device=tokens.device)
        full = at <= positions[:, None, :, None]
        sliding = full & (positions[:, None, :, None] - at < self.c.window)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]

        def attend(i, q, k, v, sinks):
            cache["k"][i, rows, :, positions] = k.transpose(1, 2)
            cache["v"][i, rows, :, positions] = v.transpose(1, 2)
            return attend_dense(q, cache["k"][i], cache["v"][i], sinks, full if i % 2 else sliding)

        return self.run(tokens, cos, sin, attend)[0]

    def cache(self, batch, length):
        device, c = self.head.device, self.c
        shape = (c.layers, batch, c.kv_heads, length, c.head_dim)
        return {"k": torch.zeros(shape, device=device), "v": torch.zeros(shape, device=device), "rope": rope_tables(c, length, device)}

    @torch.no_grad()
    def rounded(self):
        """The weights as the file holds them, by parameter name."""
        return {n: mxfp4_round(p) if n.split(".")[-1] in ("gate", "up", "down") else p.to(torch.bfloat16).float() for n, p in self.named_parameters()}
