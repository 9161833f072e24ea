"""Trains fable.

    train.py TALES.txt.gz TOKENIZER.json OUT_DIR [--steps N] [--from MASTER_DIR] ...
"""
import argparse
import math
import os
import time

import torch
import torch.nn.functional as F

from data import Rows
from model import Config, Fable, flex_masks, rope_tables


def options():
    p = argparse.ArgumentParser()
    p.add_argument("tales"), p.add_argument("tokenizer"), p.add_argument("out")
    p.add_argument("--steps", type=int, default=4000)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--length", type=int, default=1024)
    p.add_argument("--rate", type=float, default=2e-3)
    p.add_argument("--warmup", type=int, default=200)
    p.add_argument("--decay", type=float, default=0.05)
    p.add_argument("--tales-share", type=float, default=0.12)
    p.add_argument("--workers", type=int, default=16)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--limit-seconds", type=float, default=1e9, help="the schedule ends here if the steps take longer")
    p.add_argument("--from", dest="start", help="folder with the master weights of an earlier run")
    return p.parse_args()


def rate_at(step, seconds, o):
    if step < o.warmup:
        return o.rate * (step + 1) / o.warmup
    done = max((step - o.warmup) / max(1, o.steps - o.warmup), seconds / o.limit_seconds)
    return o.rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def optimizer(model, o):
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": o.decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=o.rate, betas=(0.9, 0.97), fused=True)


def batches(o):
    rows = 16
    loader = torch.utils.data.DataLoader(Rows(o.tales, o.tokenizer, o.length, rows, o.tales_share, o.seed), batch_size=None, num_workers=o.workers, prefetch_factor=8)
    blocks = iter(loader)
    while True:
        yield torch.cat([next(blocks) for _ in range(o.batch // rows)]).pin_memory().cuda(non_blocking=True).long()


@torch.compile
def loss_of(model, tokens, weights, cos, sin, masks):
    with torch.autocast("cuda", torch.bfloat16):
        logits, balance = model(tokens[:, :-1], cos, sin, masks)
    losses = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    wanted = weights[:, 1:].flatten().float()
    return (losses * wanted).sum() / wanted.sum(), balance


def save_master(model, out):
    """Master weights as bfloat16 in two files, enough to go on from."""
    names = [n for n, _ in model.named_parameters()]
    state = {n: p.detach().to(torch.bfloat16).cpu() for n, p in model.named_parameters()}
    for half in (0, 1):
        torch.save({n: state[n] for n in names[half::2]}, os.path.join(out, f"master{half}.pt"))


def load_master(model, folder):
    state = {}
    for half in (0, 1):
        state.update(torch.load(os.path.join(folder, f"master{half}.pt")))
    model.load_state_dict({n: t.float() for n, t in state.items()})


def main():
    o = options()
    torch.manual_seed(o.seed)
    torch.set_float32_matmul_precision("high")
    model = Fable(Config()).cuda()
    if o.start:
        load_master(model, o.start)
    adam, cos_sin = optimizer(model, o), rope_tables(model.c, o.length, "cuda")
    began = last = time.time()
    for step, batch in zip(range(o.steps), batches(o)):
        tokens, weights, documents = batch.unbind(1)
        masks = flex_masks(documents[:, :-1].contiguous(), model.c.window)
        loss, balance = loss_of(model, tokens, weights, *cos_sin, masks)
        (loss + 0.01 * balance).backward()
        for group in adam.param_groups:
            group["lr"] = rate_at(step, time.time() - began, o)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        if step % 50 == 49:
            now = time.time()
            print(f"step {step + 1} loss {loss.item():.4f} balance {balance.item():.3f} {50 * o.batch * o.length / (now - last):.0f} tokens/s {now - began:.0f} s", flush=True)
            last = now
            if now - began > o.limit_seconds:
                break
    os.makedirs(o.out, exist_ok=True)
    save_master(model, o.out)
    torch.save(model.rounded(), os.path.join(o.out, "rounded.pt"))


if __name__ == "__main__":
    main()
