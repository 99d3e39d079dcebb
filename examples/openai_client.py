"""OpenAI's own client: a chat, a stream, and eight questions at once.

Needs `pip install 'ollm-core[serve]' openai`. python examples/openai_client.py [MODEL]
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from openai import OpenAI
from served import served


def ask(client: OpenAI, question: str) -> str:
    """The whole answer."""
    answer = client.chat.completions.create(
        model="any", max_tokens=12, temperature=0, messages=[{"role": "user", "content": question}]
    )
    return answer.choices[0].message.content or ""


path = sys.argv[1] if len(sys.argv) > 1 else "models/smollm2-135M"
with served(path) as address, OpenAI(base_url=f"{address}/v1", api_key="none") as client:
    print(ask(client, "What is the capital of France?"))
    for chunk in client.chat.completions.create(
        model="any",
        max_tokens=12,
        temperature=0,
        stream=True,
        messages=[{"role": "user", "content": "Count to five."}],
    ):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
    questions = [f"What is {n} and {n}?" for n in range(8)]
    with ThreadPoolExecutor(8) as pool:  # they share the weight passes
        answers = list(pool.map(lambda question: ask(client, question), questions))
    print(len(answers), "answers at once")
