"""Checks of where generation stops, and of the tokenizer of a real model."""

from __future__ import annotations

from typing import Any

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.compare import same_tokens
from ollm_conformance.subject import Subject, generate


class Language(AdapterSuite):
    """Text in, text out."""

    @check(
        "language.stop",
        "Generation ends with the first end-of-sequence token, the token included.",
        look="generation_config.json of the checkpoint",
    )
    def test_stop(self, subject: Subject) -> None:
        prompt = subject.prompt(50)
        tokens = subject.reference().greedy(prompt, 20)[0]
        # Others come after it, where it does not end the text.
        last = max(i for i in range(16) if tokens[i] not in tokens[:i])
        plain: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        with subject.open() as model:
            before = model.generate(prompt[None], **plain)  # type: ignore[misc]
            found = generate(model, prompt[None], 20, eos_token_id=tokens[last])
            generate(model, prompt[None], 4, eos_token_id=tokens[0], do_sample=True)
            after = model.generate(prompt[None], **plain)  # type: ignore[misc]
        same_tokens(after[0].tolist(), before[0].tolist(), "tokens after calls with other options")
        same_tokens(found[0, 50:].tolist(), tokens[: last + 1], "tokens up to the end")

    @check(
        "language.chat-template",
        "A real model's tokenizer opens, its chat template marks the turns, and it knows its stop "
        "tokens.",
        look="the files of the real checkpoint: tokenizer.json, chat_template, generation_config",
    )
    def test_chat_template(self, subject: Subject) -> None:
        if subject.real_checkpoint is None:
            does_not_apply("no real checkpoint was named")
        with subject.open(subject.real_checkpoint) as model:
            tokenizer, config = model.tokenizer, model.generation_config
        assert tokenizer is not None, f"{subject.real_checkpoint}: expected a tokenizer, got none"
        question = [{"role": "user", "content": "What is one and one?"}]
        text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        assert question[0]["content"] in text, f"expected the question in the prompt, got {text!r}"
        shorter = tokenizer.apply_chat_template(question, tokenize=False)
        whole = f"expected {shorter!r} and the start of an answer, got {text!r}"
        assert text.startswith(shorter), f"chat template: {whole}"
        assert len(text) > len(shorter), f"chat template: {whole}"
        back = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
        assert back == text, f"tokens of the chat template: expected {text!r} back, got {back!r}"
        stops = config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        assert tokenizer.eos_token_id in stops, (
            f"expected the tokenizer's {tokenizer.eos_token_id} among the stop tokens, got {stops}"
        )
