"""LangChain: a prompt, a model and a parser in a chain, through the server.

Needs `pip install 'ollm-core[serve]' langchain-openai`. python examples/langchain_client.py [MODEL]
"""

from __future__ import annotations

import sys

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from served import served

path = sys.argv[1] if len(sys.argv) > 1 else "models/smollm2-135M"
with served(path) as address:
    model = ChatOpenAI(
        base_url=f"{address}/v1", api_key="none", model="any", temperature=0, max_tokens=12
    )
    prompt = ChatPromptTemplate.from_messages(
        [("system", "You are brief."), ("user", "What is the capital of {country}?")]
    )
    chain = prompt | model | StrOutputParser()
    print(chain.invoke({"country": "France"}))
    for answer in chain.batch([{"country": "Italy"}, {"country": "Spain"}]):
        print(answer)
    for part in chain.stream({"country": "Japan"}):
        print(part, end="", flush=True)
    print()
