"""Later turns on a returned cache, static caches and prompt lookup, against runs without them."""

import copy

import pytest
import torch
from transformers import StaticCache
from transformers.generation.streamers import BaseStreamer

import vistoken
from tests.support import vlm_models as m
from tests.support.vlm_prompts import (
    NEW,
    ROWS,
    inputs_of,
    prompt,
    run,
)
from vistoken.errors import ConfigError


@pytest.mark.parametrize("positions", ["compact", "original"])
@torch.no_grad()
def test_second_turn_with_a_new_image(positions):
    model = vistoken.wrap(m.llava_next(), f"hired:budget=0.3,positions={positions}")
    first = inputs_of(model, [[(56, 56)]])
    out = run(model, first, return_dict_in_generate=True)
    cache = out.past_key_values
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    tail = prompt(model, [(40, 56)], seed=5)
    ids = torch.cat([out.sequences, torch.tensor([tail])], 1)
    mask = torch.ones_like(ids)
    second = m.anyres(model, [(40, 56)], 3)
    turn = {"input_ids": ids, "attention_mask": mask}
    going_on = run(model, {**turn, **second}, past_key_values=copy.deepcopy(cache))
    both = {**turn}
    parts = first["pixel_values"].shape[1]
    pad = torch.zeros(1, parts - second["pixel_values"].shape[1], 3, 28, 28)
    later = torch.cat([second["pixel_values"], pad], 1)
    both["pixel_values"] = torch.cat([first["pixel_values"], later])
    both["image_sizes"] = torch.cat([first["image_sizes"], second["image_sizes"]])
    assert torch.equal(going_on, run(model, both))
    # Text alone in turn 2, and a third turn after it.
    ids = torch.cat([out.sequences, torch.tensor([m.words(4, 9)])], 1)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    going_on = run(model, text, past_key_values=cache)
    whole = {"pixel_values": first["pixel_values"], "image_sizes": first["image_sizes"]}
    assert torch.equal(going_on, run(model, {**text, **whole}))


@pytest.mark.parametrize("method", ["hired:budget=0.3", "fastv:budget=0.5,layer=1"])
@pytest.mark.parametrize("positions", ["compact", "original"])
@torch.no_grad()
def test_second_turn_after_padding_on_either_side(method, positions):
    if method.startswith("hired"):
        method += f",positions={positions}"
    model = vistoken.wrap(m.llava_next(), method)
    found = []
    for pad in ("left", "right"):
        first = inputs_of(model, [[(56, 56)], [(28, 56)]], pad)
        out = run(model, first, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, torch.tensor([m.words(4, 9), m.words(4, 10)])], 1)
        mask = torch.cat([first["attention_mask"], torch.ones(2, NEW + 4, dtype=torch.long)], 1)
        turn = {"input_ids": ids, "attention_mask": mask}
        new = run(model, turn, past_key_values=out.past_key_values)[:, -2 * NEW - 4 :]
        found.append(new)
    assert torch.equal(*found)


@torch.no_grad()
def test_second_turn_of_a_padded_batch():
    model = vistoken.wrap(m.llava_next(), "hired:budget=0.3")
    first = inputs_of(model, [[(56, 56)], [(28, 56)]])
    out = run(model, first, return_dict_in_generate=True)
    more = torch.tensor([m.words(4, 9), m.words(4, 10)])
    ids = torch.cat([out.sequences, more], 1)
    mask = torch.cat([first["attention_mask"], torch.ones(2, NEW + 4, dtype=torch.long)], 1)
    turn = {"input_ids": ids, "attention_mask": mask}
    going_on = run(model, turn, past_key_values=out.past_key_values)
    images = {n: first[n] for n in ("pixel_values", "image_sizes")}
    assert torch.equal(going_on, run(model, {**turn, **images}))


@torch.no_grad()
def test_prompt_lookup_static_cache_and_streaming():
    model = vistoken.wrap(m.llava_next(), "hired:budget=0.3")
    inputs = inputs_of(model, [[(56, 56)]])
    plain = run(model, inputs, max_new_tokens=12)
    lookup = run(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(lookup, plain)
    static = run(
        model, inputs, max_new_tokens=12, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(static, plain)

    class Words(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            pass

    words = Words()
    run(model, inputs, max_new_tokens=12, streamer=words)
    assert words.tokens == plain[0].tolist()


@torch.no_grad()
def test_static_cache_with_padding():
    model = vistoken.wrap(m.llava_next(), "hired:budget=0.3")
    inputs = inputs_of(model, ROWS)
    plain = run(model, inputs)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=256)
    static = run(model, inputs, past_key_values=cache, disable_compile=True)
    assert torch.equal(static, plain)


@torch.no_grad()
def test_a_later_turn_of_several_rows_on_a_static_cache_is_refused():
    model = vistoken.wrap(m.llava_next(), "hired:budget=0.3")
    inputs = inputs_of(model, ROWS)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=256)
    ids = run(model, inputs, past_key_values=cache, disable_compile=True)
    more = torch.cat([ids, ids.new_tensor([[5, 6, 7]]).expand(len(ids), -1)], 1)
    seen = torch.cat(
        [
            inputs["attention_mask"],
            more.new_ones(len(more), more.shape[1] - inputs["input_ids"].shape[1]),
        ],
        1,
    )
    with pytest.raises(ConfigError, match="in a later turn of a static cache"):
        run(
            model,
            {"input_ids": more, "attention_mask": seen},
            past_key_values=cache,
            disable_compile=True,
        )
