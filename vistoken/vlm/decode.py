"""The generation loop: sampling and stopping on the device, several steps per CUDA graph.

A prompt's rows start at cell 0 of the cache, so plain causal attention is right without any mask,
padding at the end is never looked at, and one graph serves every prompt of about the same length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from vistoken.graphs import record
from vistoken.vlm.decode_layers import (
    Parts,
    Plan,
    chain_logits,
    head_logits,
    host_logits,
    make_state,
)
from vistoken.vlm.prefill import prefill_layers

K = TypeVar("K")
V = TypeVar("V")

STEPS = 8
"""Decoding steps per replay; the host looks for the end once per replay, one replay behind."""

BUCKET = 64
"""Prompt lengths are rounded up to a multiple of this, so that graphs are shared."""

PROMPTS = 8
"""Prompt lengths whose graphs are kept per batch size."""

SAMPLINGS = 4
"""Ways of sampling whose graphs are kept, per prompt length and for the steps."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when a row ends.

    Attributes:
        sample: draw; False takes the most likely token.
        temperature: divides the logits.
        top_k: draw among this many; 0 is all.
        top_p: draw among the most likely tokens that hold this share.
        eos: tokens that end a row.
        pad: follows the end.
    """

    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    eos: tuple[int, ...] = ()
    pad: int = 0

    def pick(self, logits: Tensor) -> Tensor:
        """Token ids `[B]` for logits `[B, V]`, without a look from the host."""
        if not self.sample:
            return logits.argmax(-1)
        scores = logits.float() / self.temperature
        if self.top_k:
            least = scores.topk(min(self.top_k, scores.shape[-1]))[0][:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p < 1:
            ascending, order = scores.sort(-1)
            tail = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            tail[:, -1] = False
            scores = scores.masked_fill(tail.scatter(1, order, tail), -torch.inf)
        shares = scores.softmax(-1)
        # A race of exponential clocks draws by share; `multinomial` does the same, with checks.
        return (shares / torch.empty_like(shares).exponential_(1)).argmax(-1)


class Replay:
    """A function that runs on fixed buffers: recorded once on CUDA, called as it is elsewhere."""

    def __init__(self, run: Callable[[], None], warm: Callable[[], None], pool: Any) -> None:
        self._call = run
        if pool is None:
            return
        graph, _ = record(run, warm, pool=pool)
        # The function is let go: it holds the buffers' owner, which holds this.
        self._call = graph.replay

    def __call__(self) -> None:
        self._call()


@dataclass
class Prompt:
    """Fixed inputs of a prefill: embeddings `[B, L, C]`, positions `[(planes,) B, L]`."""

    embeds: Tensor
    positions: Tensor
    replay: dict[Sampling, Replay]


class Decoder:
    """Prefill and decoding of one batch size, on fixed buffers.

    Args:
        parts: the model.
        batch: rows.
        length: longest prompt, in tokens after reduction.
        new_tokens: most new tokens.
        planes: 0 for plain positions, 3 where a token has three.
        graphs: record CUDA graphs; they share one memory pool.
        plan: how the chain runs; None is the model's own modules.
    """

    def __init__(
        self,
        parts: Parts,
        batch: int,
        length: int,
        new_tokens: int,
        planes: int,
        graphs: bool,
        plan: Plan | None,
    ) -> None:
        self.parts, self.batch = parts, batch
        self.pool = torch.cuda.graph_pool_handle() if graphs else None
        self.length = round_up(length)
        self.planes, self.new_tokens = planes, new_tokens
        self.state = make_state(parts, batch, self.length + new_tokens, new_tokens, planes)
        self.plan = plan
        self._prompts: dict[int, Prompt] = {}
        self._steps: dict[Sampling, dict[int, Replay]] = {}

    def prepare(self, length: int, sampling: Sampling) -> None:
        """Record what this length needs and is not there yet; draws no random number."""
        cuda = self.pool is not None
        prompt = self._prompt(round_up(length))
        before = torch.cuda.get_rng_state() if cuda else None

        def prefill() -> None:
            self._prefill(prompt, sampling)

        def record() -> Replay:
            prompt.embeds.zero_()
            prompt.positions.zero_()
            self.state.lengths.fill_(1)
            return Replay(prefill, prefill, self.pool)

        def record_steps() -> dict[int, Replay]:
            return {count: self._record(sampling, count) for count in (STEPS, 1)}

        recent(prompt.replay, sampling, record, SAMPLINGS)
        recent(self._steps, sampling, record_steps, SAMPLINGS)
        if before is not None:
            torch.cuda.set_rng_state(before)

    def run(
        self, embeds: Tensor, lengths: Tensor, positions: Tensor, count: int, sampling: Sampling
    ) -> Tensor:
        """New tokens `[B, <= count]`; rows of the prompt start at its first column.

        Args:
            embeds: `[B, L, C]`.
            lengths: `[B]`, tokens per row.
            positions: `[B, L]` or `[planes, B, L]`.
            count: most new tokens.
            sampling: how to choose.
        """
        width = embeds.shape[1]
        self.prepare(width, sampling)
        prompt, state = self._prompt(round_up(width)), self.state
        prompt.embeds[:, :width].copy_(embeds)
        prompt.positions[..., :width].copy_(positions)
        state.lengths.copy_(lengths)
        last = (lengths - 1).expand(positions.shape[:-1])[..., None]
        state.positions.copy_(positions.gather(-1, last)[..., 0] + 1)
        prompt.replay[sampling]()
        self._decode(count - 1, sampling)
        return cut(state.out[:, :count].cpu(), sampling.eos).to(embeds.device)

    def _decode(self, count: int, sampling: Sampling) -> None:
        """Up to `count` more tokens; ends early once all rows have ended."""
        ended, replays = Ended(self.state.finished), self._steps[sampling]
        while count > 0:
            steps = STEPS if count >= STEPS else 1
            replays[steps]()
            count -= steps
            if sampling.eos and steps == STEPS and ended.look():
                return

    def _prompt(self, length: int) -> Prompt:
        """Buffers for prompts of one rounded length."""
        weight = self.parts.head.weight
        shape = (self.planes, self.batch, length) if self.planes else (self.batch, length)

        def make() -> Prompt:
            embeds = weight.new_zeros(self.batch, length, weight.shape[1])
            positions = torch.zeros(shape, dtype=torch.int64, device=weight.device)
            return Prompt(embeds, positions, {})

        return recent(self._prompts, length, make, PROMPTS)

    def _record(self, sampling: Sampling, count: int) -> Replay:
        """The replay of `count` steps."""

        def steps() -> None:
            for _ in range(count):
                self._step(sampling)

        def warm() -> None:
            self.state.step.zero_()
            self.state.lengths.zero_()
            self._step(sampling)

        return Replay(steps, warm, self.pool)

    def _prefill(self, prompt: Prompt, sampling: Sampling) -> None:
        """The prompt through the model, and the first new token."""
        parts, state = self.parts, self.state
        rows = torch.arange(self.batch, device=prompt.embeds.device)
        if self.plan is not None and not self.planes:
            caches = state.keys, state.values
            x = prefill_layers(parts, prompt.embeds, prompt.positions, *caches)
            logits = head_logits(parts, x[rows, state.lengths - 1], self.plan)
        else:
            hidden = parts.decoder(
                inputs_embeds=prompt.embeds,
                position_ids=prompt.positions,
                past_key_values=state.cache(),
                use_cache=True,
            ).last_hidden_state
            logits = parts.head(hidden[rows, state.lengths - 1])
        state.finished.zero_()
        state.step.zero_()
        state.out.fill_(sampling.pad)
        self._take(logits, sampling)

    def _step(self, sampling: Sampling) -> None:
        """One more token per row."""
        if self.plan is None:
            logits = host_logits(self.parts, self.state)
        else:
            logits = chain_logits(self.parts, self.state, self.plan)
        self.state.lengths.add_(1)
        self.state.positions.add_(1)
        self._take(logits, sampling)

    def _take(self, logits: Tensor, sampling: Sampling) -> None:
        """Choose, write down, and note which rows have ended."""
        state = self.state
        token = sampling.pick(logits)
        if sampling.eos:
            token = token.masked_fill(state.finished, sampling.pad)
            for end in sampling.eos:
                state.finished.logical_or_(token == end)
        state.out.index_copy_(1, state.step, token[:, None])
        state.step.add_(1)
        state.current.copy_(token)


class Ended:
    """Whether all rows have ended, as of the replay before the last: the GPU never waits."""

    def __init__(self, finished: Tensor) -> None:
        self._finished = finished
        self._seen: deque[tuple[Tensor, Any]] = deque()

    def look(self) -> bool:
        """Note the present state; the answer is about the one noted before."""
        if not self._finished.is_cuda:
            return bool(self._finished.all())
        copy = torch.empty(self._finished.shape, dtype=torch.bool, pin_memory=True)
        copy.copy_(self._finished, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._seen.append((copy, event))
        if len(self._seen) < 2:
            return False
        before, event = self._seen.popleft()
        event.synchronize()
        return bool(before.all())


def recent(kept: dict[K, V], key: K, make: Callable[[], V], most: int) -> V:
    """`kept[key]`, made if it is not there; beyond `most`, what was used least recently goes."""
    found = kept.pop(key) if key in kept else None
    while found is None and len(kept) >= most:
        del kept[next(iter(kept))]
    kept[key] = make() if found is None else found
    return kept[key]


def round_up(length: int) -> int:
    """The next multiple of `BUCKET`."""
    return -(-length // BUCKET) * BUCKET


def cut(tokens: Tensor, eos: tuple[int, ...]) -> Tensor:
    """Tokens `[B, T]` up to the column where the last row ends."""
    ends = torch.zeros_like(tokens, dtype=torch.bool)
    for end in eos:
        ends |= tokens == end
    first = torch.where(ends.any(1), ends.int().argmax(1) + 1, tokens.shape[1])
    return tokens[:, : int(first.max())]
