"""StreamedModel: a causal language model whose `generate` is transformers' own; each of its steps
is one weight pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ollm_core.contracts.kv import CacheKind
from ollm_core.engine.batch import NewTokens
from ollm_core.engine.engine import Engine
from ollm_core.errors import DamagedKVError, InputError, UnsupportedError
from ollm_core.generate.arguments import refuse_others
from ollm_core.generate.cache import SequenceCache
from ollm_core.generate.hooks import GenerationHooks
from ollm_core.generate.limits import check_tokens
from ollm_core.generate.loss import room_for_loss
from ollm_core.generate.opened import OpenStore
from ollm_core.generate.padding import PaddedBatch, padded_batch
from ollm_core.generate.served import ServesRequests
from ollm_core.generate.surface import FixedModel, only_what_works
from ollm_core.memory.accounts import Accounts
from ollm_core.model.skeleton import Skeleton
from ollm_core.weights.streamer import TieredStreamer


@only_what_works
class StreamedModel(  # type: ignore[misc]  # torch overloads `to`
    GenerationHooks, ServesRequests, FixedModel, PreTrainedModel, GenerationMixin
):
    """A causal language model whose weights are streamed. Open it with `ollm.load`, close it after
    use.

    `generate`, `forward` and the caches work as in transformers. There are no parameters to look
    at: what `ollm_core.generate.surface` does not list raises UnsupportedError.
    """

    _supports_sdpa = True
    _is_stateful = False

    def __init__(
        self,
        skeleton: Skeleton,
        weights: TieredStreamer,
        engine: Engine,
        accounts: Accounts,
        open_store: OpenStore,
        kinds: Sequence[CacheKind],
        *,
        weight_bytes: int,
        generation_config: GenerationConfig | None = None,
        tokenizer: Any = None,
        demand: Callable[[str], None],
    ) -> None:
        """`demand` raises UnsupportedError for a capability that the adapter does not have."""
        config = copy.deepcopy(skeleton.config)
        config._attn_implementation = "eager"
        super().__init__(config)
        if generation_config is not None:
            self.generation_config = generation_config
        # Checkpoints saved while training say False, and every token would be a whole prefill.
        self.generation_config.use_cache = True
        self.tokenizer = tokenizer
        self.training = False
        self.loss_type = "ForCausalLM"
        self._own(weights, engine, accounts, open_store, kinds, demand, weight_bytes, skeleton)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        past_key_values: SequenceCache | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """One weight pass over a batch: `input_ids` [B, T] after what the cache has -> logits [B,
        n, V].

        - `attention_mask` [B, past + T] marks padding with 0, anywhere; such positions are left out
          of the pass and their logits are 0. Without it, nothing new is padding.
        - `logits_to_keep`: a number n of last positions, or which, [n]. Default: all T.
        - `labels`, `shift_labels` [B, T], `num_items_in_batch`: for transformers' own loss.
        - `use_cache` makes a cache and returns it where none is given; by default it does not.
        - `return_dict` False returns a tuple; the default is the config's.

        Of transformers' other arguments, those that say what happens anyway are taken, as
        `ollm_core.generate.arguments` lists them. Raises InputError for any other, UnsupportedError
        for one that transformers knows, and what `Engine.run` does.
        """
        if not self._close.alive:
            raise InputError("the model is closed", hint="open it again with ollm.load")
        if input_ids is None:
            raise UnsupportedError("a streamed model takes input_ids, not inputs_embeds or nothing")
        if past_key_values is not None and not isinstance(past_key_values, SequenceCache):
            raise InputError(
                f"past_key_values is a {type(past_key_values).__name__}",
                hint="leave it out, or make one with model.new_cache()",
            )
        past = [] if past_key_values is None else past_key_values.kept
        batch = padded_batch(input_ids, attention_mask, past, logits_to_keep)
        refuse_others(others, batch)
        check_tokens(batch, self.config)
        beside = shift_labels, num_items_in_batch
        with ExitStack() as stack:
            loss_of: Callable[[Tensor], Tensor] | None = None
            if labels is not None:
                room = room_for_loss(self, self.loss_function, batch, labels, *beside)
                loss_of = stack.enter_context(room)
            elif any(value is not None for value in beside):
                raise InputError("shift_labels and num_items_in_batch need labels")
            cache = past_key_values
            if cache is None:
                num_real = int(batch.kept.sum())
                cache = self.new_cache(num_tokens=batch.ids.numel(), at_least=num_real)
                if not use_cache:
                    stack.callback(cache.close)
            logits = self._pass(batch, cache)
            loss = loss_of(logits) if loss_of else None
        keep = cache if past_key_values is not None or use_cache else None
        found = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=keep)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return found if as_dict else found.to_tuple()

    def _pass(self, batch: PaddedBatch, cache: SequenceCache) -> Tensor:
        """The logits of a batch; the cache then has its tokens."""
        if len(batch.ids) > 1:
            self._demand("batch")
        cache.begin(len(batch.ids))
        tokens = batch.tokens
        run = self._continue if cache.get_seq_length() else self._start
        rows = run(cache, tokens, batch.num_logits)
        cache.extend(batch.kept, tokens)
        return batch.spread(rows)

    def _start(
        self, cache: SequenceCache, tokens: Sequence[Tensor], num_logits: Sequence[int]
    ) -> list[Tensor]:
        """Run rows that are empty: of each, what the store has not kept of an earlier run."""
        num_cached: int | None = None
        while True:
            try:
                cache.restore([ids[:-n] for ids, n in zip(tokens, num_logits, strict=True)])
                starts = [cache.num_tokens(row) for row in range(len(tokens))]
                rest = [ids[start:] for ids, start in zip(tokens, starts, strict=True)]
                found = self._continue(cache, rest, num_logits)
            except DamagedKVError:
                cache.clear()
                if sum(starts) == 0 or (num_cached is not None and sum(starts) >= num_cached):
                    raise
                num_cached = sum(starts)  # what is damaged is not found again
            except BaseException:
                cache.clear()
                raise
            else:
                self.engine.counters.count_cached(sum(starts))
                return found

    def _continue(
        self, cache: SequenceCache, tokens: Sequence[Tensor], num_logits: Sequence[int]
    ) -> list[Tensor]:
        """Run each row's tokens after those that it has."""
        work = []
        for row, (ids, n) in enumerate(zip(tokens, num_logits, strict=True)):
            num_drafted = n - 1 if cache.drafting else 0
            work.append(NewTokens(cache.rows[row], ids, cache.num_tokens(row), n, num_drafted))
        return self.engine.run(cache.store, work)
