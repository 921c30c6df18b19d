"""`vistoken.accelerate`: a vision-language model whose `generate` runs from CUDA graphs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from vistoken.api import KEY, wrap
from vistoken.errors import BackendUnavailableError, ConfigError, UnsupportedMethodError
from vistoken.methods import parse
from vistoken.methods.base import is_int
from vistoken.vlm.decode import Decoder, Sampling, recent, round_up
from vistoken.vlm.decode_layers import Parts, Plan, find_parts
from vistoken.vlm.decode_plan import choose_plan
from vistoken.vlm.decode_watch import Snapshot
from vistoken.vlm.inside import LayerMethod
from vistoken.vlm.prompt import prepare

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_return_sequences": (1,), "num_beam_groups": (1,), "min_length": (0,),
    "min_new_tokens": (0,), "max_time": (), "stop_strings": (), "min_p": (0.0,), "top_h": (),
    "typical_p": (1.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,), "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "bad_words_ids": (),
    "renormalize_logits": (False,), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "remove_invalid_values": (False,), "exponential_decay_length_penalty": (),
    "suppress_tokens": (), "begin_suppress_tokens": (), "sequence_bias": (),
    "token_healing": (False,), "guidance_scale": (1.0,), "watermarking_config": (),
    "output_attentions": (False,), "output_hidden_states": (False,), "output_scores": (False,),
    "output_logits": (False,), "return_dict_in_generate": (False,), "penalty_alpha": (0.0,),
    "prompt_lookup_num_tokens": (), "dola_layers": (), "constraints": (), "force_words_ids": (),
    "prefill_chunk_size": (), "use_mtp": (False,),
}  # fmt: skip
"""Generation settings that must stay at one of these values, or None."""

BATCHES = 8
"""Batch sizes whose buffers and graphs are kept."""

UNFUSED: tuple[None, str] = (None, "the model's own modules: fuse=False")
NO_PAD = -1
"""An id that no token has."""

SETTINGS = ("do_sample", "temperature", "top_k", "top_p", "eos_token_id", "pad_token_id")
DEFAULTS = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""What transformers takes where neither the call nor the model says."""


class Accelerated:
    """A model with a fast `generate`; made by `accelerate`.

    Weights that change in place are followed. After any other change to modules, parameters or
    hooks of the language model or its head, the next call records anew.

    Args:
        model: a vision-language model of transformers, in eval mode.
        max_new_tokens: most tokens per call; the cache is sized for the prompt and these.
        graphs: record CUDA graphs; None does so on CUDA devices.
        fuse: decode by the short chain where it knows the model; False keeps to its own modules.
    """

    def __init__(
        self,
        model: Any,
        max_new_tokens: int = 64,
        graphs: bool | None = None,
        fuse: bool = True,
    ) -> None:
        if not is_int(max_new_tokens) or max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={max_new_tokens!r}: must be a whole number >= 1")
        self.model = model
        self.max_new_tokens = max_new_tokens
        self._parts: Parts = find_parts(model)
        device = self._parts.head.weight.device
        if graphs and device.type != "cuda":
            raise BackendUnavailableError(
                f"graphs=True: CUDA graphs need a CUDA device, the model is on {device}"
            )
        check_eval(model)
        self._graphs = device.type == "cuda" if graphs is None else graphs
        self._fuse = fuse
        self._plans: dict[int, tuple[Plan | None, str]] = {}
        self._decoders: dict[tuple[int, int], Decoder] = {}
        self._snapshot = Snapshot(self._parts)
        self.execution = "nothing has run yet"

    # Buffers outlive the call, and those of inference mode could not be written outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def generate(self, *, max_new_tokens: int | None = None, **inputs: Any) -> Tensor:
        """Token ids as `model.generate(**inputs)` returns them: the prompt, then the new tokens.

        Greedy, or drawn by temperature, top-k and top-p from the default random generator of the
        device, so `torch.manual_seed` makes it repeatable. The first call for a batch size and a
        rounded prompt length records graphs.

        Args:
            max_new_tokens: at most the number given to `accelerate`; None is that number.
            inputs: what the processor returned, on the model's device, and any of `do_sample`,
                `temperature`, `top_k`, `top_p`, `eos_token_id`, `pad_token_id`. Without
                `attention_mask` padding is told by its id, unless that also ends rows.

        Returns:
            `[B, L + T]` int64.

        Raises:
            ConfigError: a generation setting that this path does not carry, or an unknown name.
            UnsupportedMethodError: the model is wrapped with a method that drops tokens inside the
                language model.
            UnsupportedBackboneError: the model was changed to one that cannot be carried.
            BackendUnavailableError: the model is in training mode.
        """
        check_eval(self.model)
        check_method(getattr(self.model.__dict__.get(KEY), "method", None))
        count = self._count(max_new_tokens)
        sampling = read_sampling(self.model.generation_config, inputs)
        check_names(self.model, inputs)
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise ConfigError("input_ids: must be given as a tensor [B, L]")
        if inputs.get("attention_mask") is None and sampling.pad not in sampling.eos:
            inputs["attention_mask"] = (ids != sampling.pad).long()
        self._refresh()
        with torch.cuda.device_of(self._parts.head.weight):
            new = self._run_or_make_room(inputs, count, sampling)
        return torch.cat([ids, new], 1)

    def _refresh(self) -> None:
        """Forget what was recorded of modules, weights or hooks that are there no more."""
        head = self.model.get_output_embeddings()
        decoder = self.model.base_model.language_model
        here = head is self._parts.head and decoder is self._parts.decoder
        if here and self._snapshot.fits(self._parts):
            return
        self.clear()
        self._plans.clear()
        self._parts = find_parts(self.model)
        self._snapshot = Snapshot(self._parts)

    def _run_or_make_room(self, inputs: dict[str, Any], count: int, sampling: Sampling) -> Tensor:
        """The new tokens; buffers of other batch sizes go where memory is short."""
        others = bool(self._decoders)
        try:
            return self._run(inputs, count, sampling)
        except torch.OutOfMemoryError:
            self.clear()
            if not others:
                raise
        try:
            return self._run(inputs, count, sampling)
        except torch.OutOfMemoryError:
            self.clear()
            raise

    def _run(self, inputs: dict[str, Any], count: int, sampling: Sampling) -> Tensor:
        """The new tokens."""
        prepared = prepare(self.model, inputs)
        embeds, lengths, positions = left_aligned(
            prepared.inputs_embeds, prepared.attention_mask, prepared.position_ids
        )
        planes = 0 if positions.ndim == 2 else positions.shape[0]
        decoder = self._decoder(embeds.shape[0], embeds.shape[1], planes)
        return decoder.run(embeds, lengths, positions, count, sampling)

    def clear(self) -> None:
        """Free caches and graphs; the next call makes them again."""
        self._decoders.clear()

    def _count(self, given: int | None) -> int:
        """The number of new tokens, checked."""
        if given is None:
            return self.max_new_tokens
        if not is_int(given) or not 1 <= given <= self.max_new_tokens:
            raise ConfigError(
                f"max_new_tokens={given!r}: must be in 1 ... {self.max_new_tokens}, the number "
                "given to accelerate"
            )
        return given

    def _decoder(self, batch: int, length: int, planes: int) -> Decoder:
        """The decoder of a batch size, made anew when a prompt is longer than its cache."""
        if batch not in self._plans:
            self._plans[batch] = choose_plan(self._parts, batch) if self._fuse else UNFUSED
        plan, self.execution = self._plans[batch]
        window = self._parts.window
        if window is not None and round_up(length) + self.max_new_tokens > window:
            raise ConfigError(
                f"a prompt of {length} tokens and max_new_tokens={self.max_new_tokens}: together "
                f"at most {window}, the model's sliding window; use model.generate"
            )
        found = self._decoders.get((batch, planes))
        if found is not None and found.length < round_up(length):
            # The smaller cache is freed first: both need not fit.
            del self._decoders[batch, planes]
        del found

        def make() -> Decoder:
            return Decoder(
                self._parts, batch, length, self.max_new_tokens, planes, self._graphs, plan
            )

        return recent(self._decoders, (batch, planes), make, BATCHES)


def accelerate(
    model: Any,
    method: Any = None,
    max_new_tokens: int = 64,
    *,
    graphs: bool | None = None,
    fuse: bool = True,
) -> Accelerated:
    """A vision-language model with prefill and decoding under CUDA graphs.

    Args:
        model: a `*ForConditionalGeneration` model of transformers with a Llama-, Mistral- or
            Qwen2-like language model, wrapped by `vistoken.wrap` or not, in eval mode.
        method: wraps the model first, in place; None leaves it as it is.
        max_new_tokens: most tokens per call.
        graphs: record CUDA graphs; None does so on CUDA devices.
        fuse: decode by a chain of fused kernels where it knows the model and agrees with it.

    Returns:
        An object whose `generate` takes what `model.generate` takes.

    Raises:
        UnsupportedBackboneError: no language model that can be carried.
        BackendUnavailableError: the model is in training mode, or graphs without CUDA.
        ConfigError: a wrong setting.
        UnsupportedMethodError: a method that drops tokens inside the language model.
    """
    fast = Accelerated(model, max_new_tokens, graphs, fuse)
    if method is not None:
        method = parse(method) if isinstance(method, str) else method
        check_method(method)
        wrap(model, method)
    return fast


def check_method(method: Any) -> None:
    """Raise `UnsupportedMethodError` for methods that leave layers with caches of their own."""
    if isinstance(method, LayerMethod) and not method.idle:
        raise UnsupportedMethodError(
            f"{method.name} drops tokens inside the language model, whose layers then differ in "
            "length; accelerate carries methods that cut before it; use model.generate"
        )


def check_eval(model: Any) -> None:
    """Raise `BackendUnavailableError` for models in training mode."""
    if model.training:
        raise BackendUnavailableError("accelerate is for inference; call model.eval() first")


def check_names(model: Any, inputs: dict[str, Any]) -> None:
    """Raise `ConfigError` for arguments that neither the model nor its generation knows."""
    known = {"token_type_ids", "mm_token_type_ids"}
    for function in (model.forward, model.base_model.get_image_features):
        known.update(inspect.signature(function).parameters)
    unknown = [n for n in inputs if n not in known and not hasattr(model.generation_config, n)]
    if unknown:
        raise ConfigError(f"{', '.join(unknown)}: no argument of this model's generate")


def read_sampling(config: Any, inputs: dict[str, Any]) -> Sampling:
    """Take the generation settings out of `inputs`; what they leave open comes from the model.

    Raises:
        ConfigError: a setting that the fast path does not carry.
    """
    if inputs.pop("generation_config", None) is not None:
        raise ConfigError(
            "generation_config: pass settings by name, or set model.generation_config"
        )
    for name in ("streamer", "logits_processor", "stopping_criteria", "assistant_model",
                 "past_key_values", "inputs_embeds", "max_length"):  # fmt: skip
        if inputs.get(name) is not None:
            raise ConfigError(f"{name}: not carried by the fast path; use model.generate")
    for name, neutral in NEUTRAL.items():
        value = inputs.pop(name) if name in inputs else getattr(config, name, None)
        if value is not None and value not in neutral:
            raise ConfigError(
                f"{name}={value!r}: not carried by the fast path"
                f"{f', which has {neutral[0]!r}' if neutral else ''}; use model.generate"
            )
    given: dict[str, Any] = {}
    for name in SETTINGS:
        value = inputs.pop(name, None)
        value = getattr(config, name, None) if value is None else value
        given[name] = DEFAULTS.get(name) if value is None else value
    inputs.pop("use_cache", None)
    ends = tuple(end for end in read_ids("eos_token_id", given["eos_token_id"]) if end >= 0)
    pads = read_ids("pad_token_id", given["pad_token_id"])
    pad = (pads or ends or (NO_PAD,))[0]
    if not given["do_sample"]:
        return Sampling(eos=ends, pad=pad)
    heat, most, share = (given[name] for name in ("temperature", "top_k", "top_p"))
    if not isinstance(heat, (int, float)) or not heat > 0:
        raise ConfigError(f"temperature={heat!r}: must be a number > 0")
    if not is_int(most) or most < 0:
        raise ConfigError(f"top_k={most!r}: must be a whole number >= 0; 0 is all")
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ConfigError(f"top_p={share!r}: must be a number in (0, 1]")
    return Sampling(True, float(heat), most, float(share), ends, pad)


def read_ids(name: str, value: Any) -> tuple[int, ...]:
    """One token id or several, as a number, list or tensor; None is none.

    Raises:
        ConfigError: anything else.
    """
    found = value.tolist() if isinstance(value, Tensor) else value
    found = () if found is None else found if isinstance(found, (list, tuple)) else (found,)
    if not all(map(is_int, found)):
        raise ConfigError(f"{name}={value!r}: must be a token id, or a list of them")
    return tuple(found)


def left_aligned(
    embeds: Tensor, mask: Tensor | None, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, lengths `[B]` and positions with each row's real tokens first, in order.

    Args:
        embeds: `[B, L, C]`.
        mask: `[B, L]`, 0 at padding on either side, or None.
        positions: `[B, L]` or `[axes, B, L]`.
    """
    batch, length = embeds.shape[:2]
    positions = positions.expand(*positions.shape[:-2], batch, length)
    if mask is None:
        return embeds, torch.full((batch,), length, device=embeds.device), positions
    real = mask.to(embeds.device).bool()
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    embeds = embeds.gather(1, order[..., None].expand_as(embeds))
    return embeds, real.sum(1), positions.gather(-1, order.expand_as(positions))
