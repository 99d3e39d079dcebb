"""transformers' own pipeline over a model that is streamed from the SSD.

python examples/pipeline.py [MODEL]
"""

from __future__ import annotations

import sys

from transformers import logging, pipeline

import ollm

logging.set_verbosity(logging.CRITICAL)  # else it says that it does not know our class by name
path = sys.argv[1] if len(sys.argv) > 1 else "models/smollm2-135M"
with ollm.load(path, device="cpu", device_memory="200MB") as model:
    write = pipeline("text-generation", model=model, tokenizer=model.tokenizer)
    [answer] = write(
        [{"role": "user", "content": "What is the capital of France?"}],
        max_new_tokens=12,
        do_sample=False,
    )
    print(answer["generated_text"][-1]["content"])
    peak = model.stats.device_peak_bytes / 1e6
    print(f"peak {peak:.0f} MB of device memory", file=sys.stderr)
