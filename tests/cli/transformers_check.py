#!/usr/bin/env python3
"""Load a GGUF file with transformers and compare its logits with golden ones: FILE.gguf GOLDEN_FOLDER BOUND."""
import glob
import os
import sys

import numpy as np
import torch
import transformers

path, golden, bound = sys.argv[1], sys.argv[2], float(sys.argv[3])
transformers.logging.set_verbosity_error()
model = transformers.AutoModelForCausalLM.from_pretrained(
    os.path.dirname(path), gguf_file=os.path.basename(path), config=transformers.AutoConfig.from_pretrained(golden),
    dtype=torch.float32, attn_implementation="eager").eval()  # without tokens the file does not say the vocabulary
worst = 0.0
for prompt in sorted(glob.glob(os.path.join(golden, "prompt*.i32"))):
    ids = np.fromfile(prompt, "<i4")
    want = np.fromfile(prompt.replace("prompt", "logits").replace(".i32", ".f32"), "<f4").reshape(-1, model.config.vocab_size)
    if len(ids) > 1000:
        continue
    with torch.no_grad():
        got = model(torch.tensor(ids.astype(np.int64))[None]).logits[0].numpy()[-len(want):]
    worst = max(worst, float(np.abs(got - want).max()))
print(f"worst difference of a logit: {worst:.2e}")
sys.exit(not worst <= bound)
