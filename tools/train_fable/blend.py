"""Mixes the master weights of two runs, one of which went on from the other.

    blend.py RUN_A RUN_B SHARE_OF_B OUT_DIR

The later run calls tools better, the earlier one knows the tales less by heart; the mean of the
weights keeps most of both.
"""
import os
import sys

import torch

from model import Fable
from train import load_master


def main(first, second, share, out):
    a, b, mixed = Fable(), Fable(), Fable()
    load_master(a, first)
    load_master(b, second)
    state = b.state_dict()
    mixed.load_state_dict({n: (1 - share) * t + share * state[n] for n, t in a.state_dict().items()})
    os.makedirs(out, exist_ok=True)
    torch.save({n: t.to(torch.bfloat16) for n, t in mixed.rounded().items()}, os.path.join(out, "rounded.pt"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4])
