"""simonw's `llm` in Python, with a model of this disk by the plugin llm-ollm.

Needs `pip install llm-ollm`, and MODEL in the models directory or in ./models.
python examples/llm_plugin.py [MODEL]
"""

from __future__ import annotations

import sys

from llm_ollm import OllmModel

path = sys.argv[1] if len(sys.argv) > 1 else "models/smollm2-135M"
model = OllmModel(path)  # llm.get_model("ollm/NAME") is the same for one that `llm models` lists
talk = model.conversation()
for question in ("What is the capital of France?", "And of Italy?"):
    for text in talk.prompt(question, max_tokens=12, device="cpu"):
        print(text, end="", flush=True)
    print()
model.close()
