"""The ledger of a shortened cache: what it answers, copies, and when memory is free again."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache

import vistoken
from tests.support import vlm_models as m
from tests.support.vlm_prompts import NEW, inputs_of, one_by_one, run
from vistoken.vlm.cache import Short, short_of, shorten, stored
from vistoken.vlm.prompt import prepare


def filled(columns=5):
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.randn(1, 2, columns, 4), torch.randn(1, 2, columns, 4), layer)
    return cache


def test_lengths_are_the_users_and_offsets_those_of_the_store():
    cache = filled()
    assert short_of(cache) is None
    shorten(cache, Short(9, 5, None, None))
    assert type(cache) is DynamicCache
    assert (cache.get_seq_length(), cache.get_query_offset(), stored(cache)) == (9, 5, 5)
    assert cache.get_mask_sizes(3, 0) == (8, 0)
    cache.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4), 0)
    assert (cache.get_seq_length(), cache.get_query_offset()) == (10, 6)
    assert cache.get_query_offset(1) == 5
    shorten(cache, Short(20, 6, None, None))
    assert cache.get_seq_length() == 20
    assert cache.get_query_offset(7) == 0


@pytest.mark.parametrize("how", [copy.deepcopy, lambda c: pickle.load(io.BytesIO(pickle.dumps(c)))])
def test_copies_count_for_themselves(how):
    cache = filled()
    shorten(cache, Short(9, 5, None, None))
    twin = how(cache)
    twin.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), 0)
    assert (twin.get_seq_length(), cache.get_seq_length()) == (12, 9)
    assert twin._vistoken_ledger.layers is twin.layers
    twin.reset()
    assert short_of(twin) is None
    assert twin.get_seq_length() == twin.layers[0].get_seq_length()
    assert cache.get_seq_length() == 9


def test_memory_is_free_without_the_collector():
    cache = filled()
    shorten(cache, Short(9, 5, None, None))
    keys = weakref.ref(cache.layers[0].keys)
    gc.disable()
    try:
        del cache
        assert keys() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_an_emptied_cache_serves_again(kind):
    model = vistoken.wrap(m.llava_next(), "hired:budget=0.3")
    config = model.config.get_text_config()
    gone = filled()
    gone.reset()
    if kind == "dynamic" and gone.get_seq_length():
        pytest.skip("in this release a dynamic cache keeps its length when it is emptied")
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=config, max_cache_len=256)
    options = {"past_key_values": cache, "disable_compile": True}
    inputs = inputs_of(model, [[(56, 56)]])
    text = {"input_ids": torch.tensor([m.words(9)])}
    plain, alone = run(model, inputs), run(model, text)
    assert torch.equal(run(model, inputs, **options), plain)
    assert int(cache.get_seq_length()) == inputs["input_ids"].shape[1] + NEW - 1
    cache.reset()
    assert torch.equal(run(model, text, **options), alone)
    assert int(cache.get_seq_length()) == 9 + NEW - 1
    cache.reset()
    assert torch.equal(run(model, inputs, **options), plain)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["max_min:budget=0.26", "globalcom2:budget=0.26"])
def test_a_static_cache_of_rows_that_the_cut_made_equally_long(method, attention):
    model = m.llava_next(4, attention=attention)
    rows = [[(56, 56)], [(28, 28), (28, 28)]]
    inputs = inputs_of(model, rows)
    assert not inputs["attention_mask"].all()
    vistoken.wrap(model, method)
    ids = run(model, inputs, cache_implementation="static")
    assert prepare(model, inputs).attention_mask is None
    assert torch.equal(ids[:, -NEW:], one_by_one(model, rows))
