"""What the routes share."""

from __future__ import annotations

import asyncio

import pytest

from ollm_core.errors import InputError
from ollm_core.server.errors import RefusedRequestError
from ollm_core.server.service import Service


def test_bodies_are_read_with_a_tokenizer_of_their_own(service):
    """The session decodes with the model's in another thread meanwhile."""
    assert service.tokenizer is not service.model.tokenizer
    assert service.tokenizer("hello")["input_ids"] == service.model.tokenizer("hello")["input_ids"]


def test_a_model_without_a_tokenizer_is_refused(tiny):
    """It has nothing to understand bodies with."""
    from ollm_core.api import load

    with load(tiny, device="cpu") as model, pytest.raises(InputError, match="has no tokenizer"):
        Service(model, "tiny")


def test_a_closed_service_says_so(model):
    """With 503; it may be closed twice, and the model is still there."""
    service = Service(model, "tiny")
    service.close()
    service.close()
    with pytest.raises(RefusedRequestError) as refused:
        service.ask([])
    assert refused.value.status == 503

    async def read():
        with pytest.raises(RefusedRequestError) as refused:
            await service.read(int)
        assert refused.value.status == 503

    asyncio.run(read())
    assert model.stats
