#!/usr/bin/env python3
"""Golden vectors of the weight types: tests/data/quant/<type>.f32, one file per type.

A file is N float32 values (the truth), then the blocks they come from (random bytes with scales of sane size).
The truth is the numpy dequantiser of the PyPI package `gguf` (tested with 0.19.0), which shares no code with orcd.
mxfp4_table.f32 is 256 scales x 16 codes, from the OCP definition in exact arithmetic.

    python3 -m venv /tmp/v && /tmp/v/bin/pip install gguf==0.19.0 numpy && /tmp/v/bin/python tools/quant_golden.py
"""
import math
import pathlib
from fractions import Fraction

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "quant"
N_BLOCK = 8
# type -> (bytes per block, byte offsets of the half-precision fields)
BLOCKED = {
    "q4_0": (T.Q4_0, 18, [0]),
    "q4_1": (T.Q4_1, 20, [0, 2]),
    "q5_0": (T.Q5_0, 22, [0]),
    "q5_1": (T.Q5_1, 24, [0, 2]),
    "q8_0": (T.Q8_0, 34, [0]),
    "q4_k": (T.Q4_K, 144, [0, 2]),
    "q5_k": (T.Q5_K, 176, [0, 2]),
    "q6_k": (T.Q6_K, 210, [208]),
    "mxfp4": (T.MXFP4, 17, []),
}


def save(name, values, blocks):
    (OUT / f"{name}.f32").write_bytes(values.astype("<f4").tobytes() + blocks.tobytes())


def e2m1(code):
    """Magnitude from sign, two exponent bits with bias 1 and one mantissa bit."""
    exp, man = code >> 1 & 3, code & 1
    magnitude = Fraction(man, 2) if exp == 0 else Fraction(2 + man, 2) * 2 ** (exp - 1)
    return -magnitude if code & 8 else magnitude


def mxfp4_value(scale, code):
    if scale == 255:
        return math.nan
    exact = e2m1(code) * Fraction(2) ** (scale - 127)
    if abs(exact) >= Fraction(2) ** 128:
        return math.copysign(math.inf, exact)
    return math.copysign(float(exact), -1.0 if code & 8 else 1.0)  # exact: fits a double, and a float


def main():
    rng = np.random.default_rng(20250805)
    OUT.mkdir(parents=True, exist_ok=True)
    for name, (qtype, n_bytes, halves) in BLOCKED.items():
        blocks = rng.integers(0, 256, (N_BLOCK, n_bytes), dtype=np.uint8)
        for at in halves:
            scale = rng.normal(0, 1, N_BLOCK).astype("<f2")
            scale[0] = np.float16(6e-8)  # subnormal
            blocks[:, at:at + 2] = scale.view(np.uint8).reshape(N_BLOCK, 2)
        if name == "mxfp4":
            blocks[:, 0] = [0, 1, 2, 100, 127, 128, 200, 250]
        save(name, dequantize(blocks, qtype), blocks)

    bits = np.concatenate([[0, 1, 0x3ff, 0x400, 0x7bff, 0x7c00, 0x8000, 0xfc00, 0x7e00],
                           rng.integers(0, 65536, 247)]).astype("<u2")
    save("f16", bits.view("<f2").astype("<f4"), bits)
    bits = np.concatenate([[0, 1, 0x7f, 0x80, 0x7f7f, 0x7f80, 0x8000, 0xff80, 0x7fc0],
                           rng.integers(0, 65536, 247)]).astype("<u2")
    save("bf16", dequantize(bits.view(np.uint8).reshape(1, -1), T.BF16).reshape(-1), bits)
    words = rng.integers(0, 1 << 32, 64, dtype=np.uint32)
    save("f32", words.view("<f4"), words)

    table = np.array([[mxfp4_value(s, c) for c in range(16)] for s in range(256)], dtype=np.float64)
    assert all(math.isnan(v) or np.float64(np.float32(v)) == v for v in table.reshape(-1))
    (OUT / "mxfp4_table.f32").write_bytes(table.astype("<f4").tobytes())


if __name__ == "__main__":
    main()
