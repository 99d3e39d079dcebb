"""Models of oLLM for `llm`: those on this disk, by `ollm/` and their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import llm
from llm.parts import TextPart
from pydantic import Field

import ollm

_SAMPLING = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop",
)  # fmt: skip


@llm.hookimpl
def register_models(register: Callable[..., None]) -> None:
    """Every model on this disk. None where its directory cannot be read, which `ollm` tells."""
    try:
        found = ollm.models_on_disk()
    except ollm.OllmError:
        return
    for name in dict.fromkeys(one.name for one in found):
        register(OllmModel(name))


class OllmModel(llm.Model):
    """One model, opened when it is first asked, and kept open for what follows."""

    can_stream = True

    class Options(llm.Options):
        """How to sample, and how to open the model."""

        temperature: float = Field(default=0, ge=0, description="Sampling temperature; 0 is greedy")
        max_tokens: int = Field(default=256, ge=1, description="Most new tokens")
        top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus sampling")
        top_k: int | None = Field(default=None, ge=1, description="Sample among so many tokens")
        min_p: float | None = Field(default=None, ge=0, le=1, description="Leave unlikely ones out")
        repetition_penalty: float | None = Field(default=None, gt=0, description="Above 1: less")
        seed: int | None = Field(default=None, description="Repeats a sampled answer")
        stop: str | None = Field(default=None, description="A text that ends the answer")
        device: str | None = Field(default=None, description="For example cpu or cuda:0")
        dtype: str | None = Field(default=None, description="For example float32")
        device_memory: str | None = Field(default=None, description="Its limit, as 8GB")
        host_memory: str | None = Field(default=None, description="Its limit, as 16GB")
        precision: Literal["fast", "exact"] | None = Field(
            default=None, description="exact: bit for bit transformers"
        )
        kv: str | None = Field(default=None, description="auto, device, host or disk")
        kv_dir: str | None = Field(default=None, description="Directory of a KV cache on disk")

    def __init__(self, name: str) -> None:
        """`name` is what `ollm.load` opens."""
        self.model_id = f"ollm/{name}"
        self._name = name
        self._opened: ollm.LLM | None = None
        self._opened_with: dict[str, Any] = {}

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,
        conversation: llm.Conversation | None,
    ) -> Iterator[str]:
        """The texts of the answer. Raises llm.ModelError."""
        options = prompt.options.model_dump(exclude_none=True)
        sampling = {name: options.pop(name) for name in _SAMPLING if name in options}
        messages = [
            {"role": one.role, "content": "".join(_texts(one))}
            for one in prompt.messages
            if any(_texts(one))
        ]
        event: Any = None
        try:
            answer = self._open(options).stream(messages, ollm.SamplingParams(**sampling))
            for event in answer:
                if event.text:
                    yield event.text
        except ollm.OllmError as error:
            raise llm.ModelError(str(error)) from error
        counts = event.counts
        response.set_usage(input=counts.num_prompt_tokens, output=counts.num_new_tokens)
        response.response_json = {
            "finish_reason": event.reason, "num_cached_tokens": counts.num_cached_tokens
        }  # fmt: skip

    def _open(self, options: dict[str, Any]) -> ollm.LLM:
        """The model, opened with these options."""
        if self._opened is None or self._opened_with != options:
            self.close()
            self._opened = ollm.LLM(self._name, **options)
            self._opened_with = options
        return self._opened

    def close(self) -> None:
        """Give back its memory. The next prompt opens it again."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None


def _texts(message: Any) -> list[str]:
    return [part.text for part in message.parts if isinstance(part, TextPart)]
