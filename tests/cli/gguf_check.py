#!/usr/bin/env python3
"""Compare GGUF files with the PyPI package `gguf`: values OLD NEW, same OLD NEW, write OLD NEW, split OLD NEW
(NEW-00001-of-N.gguf and so on, the first without tensors)."""
import sys

import gguf
import numpy as np

# relative error that each type may bring to normally distributed values
BOUND = {0: 0, 1: 3e-4, 30: 3e-3, 8: 8e-3, 2: .12, 12: .09, 14: .03, 39: .13}


def floats(tensor):
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)


def values(old, new):
    worst = {}
    for name, a in old.items():
        b = new[name]
        assert list(a.shape) == list(b.shape), name
        x, y = floats(a), floats(b)
        error = np.sqrt(((x - y) ** 2).sum() / (x ** 2).sum())
        worst[int(b.tensor_type)] = max(worst.get(int(b.tensor_type), 0), error)
    print({k: round(float(v), 5) for k, v in worst.items()})
    assert all(v <= BOUND[k] for k, v in worst.items()), worst


def same(a, b, old, new):
    for key in b.fields:
        if key.startswith(('gpt-oss.', 'tokenizer.', 'general.architecture')):
            assert a.fields[key].contents() == b.fields[key].contents(), key
    assert set(old) == set(new)
    for name in old:
        assert old[name].data.tobytes() == new[name].data.tobytes(), name


def write(a, old, path, **parts):
    w = gguf.GGUFWriter(path, 'gpt-oss', **parts)
    for key, field in a.fields.items():
        if key.startswith('GGUF.') or key == 'general.architecture':
            continue
        kind, sub = field.types[0], field.types[1] if len(field.types) > 1 else None
        w.add_key_value(key, field.contents(), kind, sub)
    for name, t in old.items():
        w.add_tensor(name, t.data, raw_dtype=t.tensor_type)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


a = gguf.GGUFReader(sys.argv[2])
old = {t.name: t for t in a.tensors}
if sys.argv[1] == 'write':
    write(a, old, sys.argv[3])
elif sys.argv[1] == 'split':
    write(a, old, sys.argv[3], split_max_tensors=20, small_first_shard=True)
else:
    b = gguf.GGUFReader(sys.argv[3])
    new = {t.name: t for t in b.tensors}
    values(old, new) if sys.argv[1] == 'values' else same(a, b, old, new)
