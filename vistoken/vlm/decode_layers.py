"""The decoder of a vision-language model, one token at a time: its own modules, or a short chain.

Chain, per layer (five launches on a GPU):

    qkv = [q, k, v](norm(x))            a = attention(rotary(qkv), cache)
    x   = x + o(a)                      x = x + down(silu(gate(norm(x))) * up(norm(x)))

The model's own layers run wherever a class is another than the chain knows, or a layer did not
agree with the model's own on random input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from vistoken.errors import UnsupportedBackboneError
from vistoken.kernels.decode_attention import decode_attention
from vistoken.kernels.decode_linear import Tile, decode_linear
from vistoken.spec import class_path

LAYERS = tuple(
    f"transformers.models.{family}.modeling_{family}.{name}DecoderLayer"
    for family, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"))
)
"""Decoder layers that the chain reproduces."""

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
SCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@dataclass(frozen=True)
class Plan:
    """How the chain's products are cut; None is torch's own product.

    Attributes:
        qkv: the joint projection.
        back: the projections that add to the residual stream.
        gate: the gated projection.
        head: the logits.
        early: kernels start before those before them have ended.
    """

    qkv: Tile | None = None
    back: Tile | None = None
    gate: Tile | None = None
    head: Tile | None = None
    early: bool = False

    def tile(self, name: str) -> Tile | None:
        """The tile of one product."""
        found: Tile | None = getattr(self, name)
        return None if found is None else replace(found, early=self.early)


@dataclass(frozen=True)
class Parts:
    """The pieces of a vision-language model that decoding needs.

    Attributes:
        model: the whole model.
        decoder: its language model, without head.
        head: the layer from hidden states to logits.
        config: of the language model.
    """

    model: Any
    decoder: Any
    head: Any
    config: Any

    @property
    def window(self) -> int | None:
        """Tokens that a token can look back on, where that is limited."""
        found: int | None = getattr(self.config, "sliding_window", None)
        return found if getattr(self.config, "use_sliding_window", True) else None

    @property
    def cache_shape(self) -> tuple[int, int]:
        """Key heads and their width."""
        heads = self.config.num_attention_heads
        groups = getattr(self.config, "num_key_value_heads", None) or heads
        return groups, getattr(self.config, "head_dim", None) or self.config.hidden_size // heads


def find_parts(model: Any) -> Parts:
    """The pieces of a model, checked.

    Raises:
        UnsupportedBackboneError: no language model is in it, or one that cannot be carried.
    """
    decoder = getattr(getattr(model, "base_model", None), "language_model", None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if decoder is None or not isinstance(head, nn.Module) or not hasattr(decoder, "layers"):
        raise UnsupportedBackboneError(
            f"{class_path(type(model))}: needs a *ForConditionalGeneration model of transformers "
            "with a language model 'model.language_model' of decoder layers, and a head"
        )
    config = decoder.config
    scaled = [name for name in SCALED if getattr(config, name, None) not in (None, 1.0)]
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    rope = str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))
    if scaled or types != {"full_attention"} or rope in ("dynamic", "longrope"):
        raise UnsupportedBackboneError(
            f"{class_path(type(decoder))}: layer types {sorted(types)}, rope '{rope}', "
            f"{scaled or 'plain'} logits; accelerate carries full attention, rotary tables that "
            "depend on positions alone, and plain logits; use model.generate"
        )
    if config._attn_implementation not in ("sdpa", "eager"):
        raise UnsupportedBackboneError(
            f"attention '{config._attn_implementation}' cannot run over a static cache; load the "
            "model with attn_implementation='sdpa'"
        )
    devices = {str(weight.device) for weight in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise UnsupportedBackboneError(
            f"the model lies on {', '.join(sorted(devices))}; accelerate needs it on one device"
        )
    return Parts(model, decoder, head, config)


class Rows(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a static cache whose rows have lengths of their own, on the device."""

    is_compileable = False
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.lengths = keys, values, lengths
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the buffers exist."""

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Many tokens are a prompt and start the rows anew; one is appended to each row."""
        if k.shape[2] > 1:
            self.keys[:, :, : k.shape[2]].copy_(k)
            self.values[:, :, : v.shape[2]].copy_(v)
            return k, v
        slot = self.lengths.view(-1, 1, 1, 1).expand_as(k)
        self.keys.scatter_(2, slot, k)
        self.values.scatter_(2, slot, v)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])

    def get_max_cache_shape(self) -> int:
        return int(self.keys.shape[2])


@dataclass
class State:
    """Everything a decoding step reads and writes, at fixed addresses.

    Attributes:
        keys: `[layers, B, G, M, D]`.
        values: the same.
        lengths: `[B]` int64, tokens in the cache.
        positions: `[B]` or `[3, B]` int64, rotary position of the next token.
        current: `[B]` int64, the token to feed next.
        finished: `[B]` bool.
        out: `[B, T]` int64, the new tokens.
        step: `[1]` int64, columns of `out` that are filled.
        arrivals: `[B G]` int32, counters of the attention kernel.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    positions: Tensor
    current: Tensor
    finished: Tensor
    out: Tensor
    step: Tensor
    arrivals: Tensor

    @property
    def capacity(self) -> int:
        """Tokens per row."""
        return int(self.keys.shape[3])

    def cache(self) -> Cache:
        """The same buffers as a cache of transformers."""
        return Cache(
            layers=[Rows(k, v, self.lengths) for k, v in zip(self.keys, self.values, strict=True)]
        )


def make_state(parts: Parts, batch: int, capacity: int, new: int, planes: int) -> State:
    """Empty buffers; `planes` is 0 for plain positions, else how many there are per token."""
    device, dtype = parts.head.weight.device, parts.head.weight.dtype
    groups, dim = parts.cache_shape
    shape = (len(parts.decoder.layers), batch, groups, capacity, dim)
    index = torch.zeros((), dtype=torch.int64, device=device)
    return State(
        keys=torch.zeros(shape, device=device, dtype=dtype),
        values=torch.zeros(shape, device=device, dtype=dtype),
        lengths=index.new_zeros(batch),
        positions=index.new_zeros((planes, batch) if planes else (batch,)),
        current=index.new_zeros(batch),
        finished=torch.zeros(batch, dtype=torch.bool, device=device),
        out=index.new_zeros(batch, new),
        step=index.new_zeros(1),
        arrivals=torch.zeros(batch * groups, dtype=torch.int32, device=device),
    )


def host_logits(parts: Parts, state: State) -> Tensor:
    """Logits `[B, V]` of the next token by the model's own modules."""
    x = parts.decoder.get_input_embeddings()(state.current)[:, None]
    cells = torch.arange(state.capacity, device=x.device)
    mask = mask_for(parts, (cells <= state.lengths[:, None])[:, None, None], x.dtype)
    out = parts.decoder(
        inputs_embeds=x,
        attention_mask=mask,
        position_ids=state.positions[..., None],
        past_key_values=state.cache(),
        use_cache=True,
    )
    return parts.head(out.last_hidden_state[:, -1])  # type: ignore[no-any-return]


def chain_logits(parts: Parts, state: State, plan: Plan) -> Tensor:
    """Logits `[B, V]` of the next token by the chain."""
    x = parts.decoder.get_input_embeddings()(state.current)
    cos, sin = _tables(parts, x, state.positions)
    for layer, keys, values in zip(parts.decoder.layers, state.keys, state.values, strict=True):
        x = chain_layer(layer, x, cos, sin, keys, values, state.lengths, state.arrivals, plan)
    return head_logits(parts, x, plan)


def head_logits(parts: Parts, x: Tensor, plan: Plan) -> Tensor:
    """Logits `[B, V]` of the last layer's output `[B, C]`."""
    return _linear(x, (parts.head,), _norm(parts.decoder.norm), tile=plan.tile("head"))


def chain_layer(
    layer: Any,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    arrivals: Tensor,
    plan: Plan,
) -> Tensor:
    """One decoder layer on the newest tokens `[B, C]`; appends to the cache."""
    own, mlp = layer.self_attn, layer.mlp
    joint = (own.q_proj, own.k_proj, own.v_proj)
    qkv = _linear(x, joint, _norm(layer.input_layernorm), tile=plan.tile("qkv"))
    a = decode_attention(qkv, cos, sin, keys, values, lengths, arrivals, own.scaling, plan.early)
    x = _linear(a, (own.o_proj,), residual=x, tile=plan.tile("back"))
    norm = _norm(layer.post_attention_layernorm)
    h = _linear(x, (mlp.gate_proj, mlp.up_proj), norm, gated=True, tile=plan.tile("gate"))
    return _linear(h, (mlp.down_proj,), residual=x, tile=plan.tile("back"))


def why_not_chain(parts: Parts) -> str | None:
    """The reason why the chain does not know the model's layers, or None."""
    for layer in parts.decoder.layers:
        if class_path(type(layer)) not in LAYERS:
            return f"its layers are {class_path(type(layer))}"
        for name in LINEARS:
            part = layer.get_submodule(name)
            if type(part) is not nn.Linear:
                return f"'{name}' is {class_path(type(part))}"
        biased = [layer.get_submodule(name).bias is not None for name in LINEARS]
        if len(set(biased[:3])) > 1 or len(set(biased[4:6])) > 1:
            return "only some of the joint projections have a bias"
        for module in layer.modules():
            if user_hooks(module):
                return f"'{type(module).__name__}' of a layer has hooks"
            if "forward" in vars(module):
                return f"'{type(module).__name__}' of a layer has a forward of its own"
        if type(layer.mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
            return f"its activation is {type(layer.mlp.act_fn).__name__}"
    for module in (parts.decoder, parts.decoder.norm, parts.head):
        if user_hooks(module) or "forward" in vars(module):
            return f"'{type(module).__name__}' has hooks or a forward of its own"
    if type(parts.head) is not nn.Linear:
        return f"its head is {class_path(type(parts.head))}"
    return None


def user_hooks(module: nn.Module) -> tuple[Any, ...]:
    """Hooks that may change what a module does; those of transformers only take notes."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ours = (h for h in hooks if not str(getattr(h, "__module__", "")).startswith("transformers."))
    return tuple(ours)


def _linear(
    x: Tensor,
    layers: tuple[nn.Linear, ...],
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """`decode_linear` of modules."""
    biases = tuple(layer.bias for layer in layers if layer.bias is not None)
    weights = tuple(layer.weight for layer in layers)
    return decode_linear(x, weights, biases or None, norm, residual, gated, tile)


def _norm(module: Any) -> tuple[Tensor, float]:
    """Weight and epsilon of an RMS norm of transformers."""
    return module.weight, module.variance_epsilon


def _tables(parts: Parts, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary tables `[B, D]`; text has the same position in all planes."""
    flat = positions if positions.ndim == 1 else positions[0]
    cos, sin = parts.decoder.rotary_emb(x[:, None], flat[:, None])
    return cos[:, 0].contiguous(), sin[:, 0].contiguous()


def mask_for(parts: Parts, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask `keep` in the form that the model's attention takes."""
    if parts.config._attn_implementation == "sdpa":
        return keep
    return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill(
        ~keep, torch.finfo(dtype).min
    )
