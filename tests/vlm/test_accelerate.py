"""`vistoken.accelerate` against the model's own `generate`, on tiny models with random weights."""

import pytest
import torch

pytest.importorskip("transformers")

from decode_models import IMAGE, PAD, batch_of, make_llava, make_llava_next, make_onevision, plain

import vistoken
from vistoken.errors import (
    BackendUnavailableError,
    ConfigError,
    UnsupportedBackboneError,
    UnsupportedMethodError,
)
from vistoken.vlm import decode, decode_plan
from vistoken.vlm.accelerate import left_aligned, read_sampling
from vistoken.vlm.decode import Sampling, cut
from vistoken.vlm.decode_layers import Plan, chain_layer, find_parts
from vistoken.vlm.decode_plan import layer_error

MAKERS = {"llava": make_llava, "llava_next": make_llava_next, "onevision": make_onevision}
NEW = 19


@pytest.fixture(scope="module")
def llava():
    return make_llava()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("rows", [[5], [3, 9], [7, 7, 1]], ids=str)
def test_greedy_ids_are_those_of_generate(name, rows):
    model = MAKERS[name]()
    inputs = batch_of(model, rows)
    fast = vistoken.accelerate(model, max_new_tokens=NEW)
    wanted = plain(model, inputs, NEW)
    assert wanted[:, -NEW:].unique().numel() > 5
    assert torch.equal(fast.generate(**inputs), wanted)
    assert fast.execution == "fused chain"


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_models_own_modules_decode_the_same(name, attention):
    model = MAKERS[name]()
    model.set_attn_implementation(attention)
    handle = model.model.language_model.layers[1].register_forward_hook(lambda *_: None)
    inputs = batch_of(model, [3, 9])
    fast = vistoken.accelerate(model, max_new_tokens=NEW)
    assert torch.equal(fast.generate(**inputs), plain(model, inputs, NEW))
    assert "has hooks" in fast.execution
    handle.remove()


def test_padding_on_the_right_changes_nothing(llava):
    fast = vistoken.accelerate(llava, max_new_tokens=NEW)
    left, right = (batch_of(llava, [2, 8, 5], side=side) for side in ("left", "right"))
    assert torch.equal(fast.generate(**left)[:, -NEW:], fast.generate(**right)[:, -NEW:])


def test_rows_of_a_batch_do_not_see_each_other(llava):
    fast = vistoken.accelerate(llava, max_new_tokens=NEW)
    inputs = batch_of(llava, [2, 8, 5])
    together = fast.generate(**inputs)
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        alone = fast.generate(
            input_ids=inputs["input_ids"][row : row + 1, real],
            pixel_values=inputs["pixel_values"][row : row + 1],
        )
        assert torch.equal(alone[0, -NEW:], together[row, -NEW:])


@pytest.mark.parametrize("column", [0, 4, 8, 18])
def test_end_token_stops_rows_as_generate_does(llava, column):
    inputs = batch_of(llava, [2, 8, 5])
    free = plain(llava, inputs, NEW)[:, -NEW:]
    fast = vistoken.accelerate(llava, max_new_tokens=NEW)
    ends = [int(free[0, column]), int(free[1, min(column + 3, NEW - 1)])]
    for eos in (ends[0], ends):
        wanted = plain(llava, inputs, NEW, eos_token_id=eos, pad_token_id=PAD)
        assert torch.equal(fast.generate(**inputs, eos_token_id=eos, pad_token_id=PAD), wanted)


def test_all_rows_ended_ends_early(llava, monkeypatch):
    inputs = batch_of(llava, [2])
    first = int(plain(llava, inputs, 1)[0, -1])
    fast = vistoken.accelerate(llava, max_new_tokens=100)
    steps = []
    original = decode.chain_logits
    monkeypatch.setattr(decode, "chain_logits", lambda *a: steps.append(1) or original(*a))
    got = fast.generate(**inputs, eos_token_id=first)
    assert torch.equal(got, plain(llava, inputs, 100, eos_token_id=first))
    assert len(steps) <= 2 * decode.STEPS


SAMPLERS = [
    {"temperature": 0.7, "top_k": 0, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 5, "top_p": 1.0},
    {"temperature": 1.3, "top_k": 0, "top_p": 0.6},
    {"temperature": 2.0, "top_k": 20, "top_p": 0.9},
    {},
]


@pytest.mark.parametrize("settings", SAMPLERS, ids=str)
def test_sampling_draws_what_generate_draws(llava, settings):
    inputs = batch_of(llava, [2, 6])
    fast = vistoken.accelerate(llava, max_new_tokens=NEW)
    torch.manual_seed(5)
    wanted = llava.generate(**inputs, max_new_tokens=NEW, do_sample=True, **settings)
    torch.manual_seed(5)
    assert torch.equal(fast.generate(**inputs, do_sample=True, **settings), wanted)
    torch.manual_seed(6)
    assert not torch.equal(fast.generate(**inputs, do_sample=True, **settings), wanted)


def test_draws_follow_the_shares():
    torch.manual_seed(0)
    logits = torch.tensor([3.0, 1.0, 2.0, -1.0]).log_softmax(-1)
    draws = Sampling(True, temperature=0.8).pick(logits.expand(40000, 4))
    wanted = (logits / 0.8).softmax(-1)
    torch.testing.assert_close(draws.bincount() / 40000, wanted, atol=0.01, rtol=0)
    kept = Sampling(True, top_p=0.5).pick(logits.expand(1000, 4))
    assert kept.unique().tolist() == [0]


def test_fewer_tokens_on_request(llava):
    inputs = batch_of(llava, [4])
    fast = vistoken.accelerate(llava, max_new_tokens=NEW)
    for count in (1, 2, 9, NEW):
        assert torch.equal(
            fast.generate(**inputs, max_new_tokens=count), plain(llava, inputs, count)
        )


def test_text_alone(llava):
    inputs = {"input_ids": torch.randint(1, IMAGE, (2, 30))}
    fast = vistoken.accelerate(llava, max_new_tokens=NEW)
    assert torch.equal(fast.generate(**inputs), plain(llava, inputs, NEW))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3}, {"num_return_sequences": 2}, {"repetition_penalty": 1.2},
        {"max_length": 50}, {"max_new_tokens": 0}, {"max_new_tokens": NEW + 1},
        {"temperature": 0.0, "do_sample": True}, {"top_p": 0.0, "do_sample": True},
        {"top_k": -1, "do_sample": True}, {"streamer": object()}, {"min_new_tokens": 3},
    ],
    ids=lambda settings: "-".join(settings),
)  # fmt: skip
def test_what_is_not_carried_is_named(llava, settings):
    fast = vistoken.accelerate(llava, max_new_tokens=NEW)
    name = next(iter(settings))
    with pytest.raises(ConfigError, match=name):
        fast.generate(**batch_of(llava, [4]), **settings)


def test_models_settings_count_too(llava):
    llava.generation_config.num_beams = 4
    try:
        with pytest.raises(ConfigError, match="num_beams=4"):
            vistoken.accelerate(llava).generate(**batch_of(llava, [4]))
    finally:
        llava.generation_config.num_beams = None


def test_wrong_models_are_refused(llava):
    with pytest.raises(ConfigError, match="max_new_tokens"):
        vistoken.accelerate(llava, max_new_tokens=0)
    with pytest.raises(UnsupportedBackboneError, match="ForConditionalGeneration"):
        vistoken.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(BackendUnavailableError, match="CUDA"):
        vistoken.accelerate(llava, graphs=True)
    llava.train()
    with pytest.raises(BackendUnavailableError, match="eval"):
        vistoken.accelerate(llava)
    llava.eval()


def test_methods_inside_the_language_model_are_refused():
    model = make_llava()
    with pytest.raises(UnsupportedMethodError, match="fastv drops tokens inside"):
        vistoken.accelerate(model, "fastv:budget=0.5,layer=1")
    fast = vistoken.accelerate(model, max_new_tokens=2)
    vistoken.wrap(model, "fastv:budget=0.5,layer=1")
    with pytest.raises(UnsupportedMethodError, match="fastv drops tokens inside"):
        fast.generate(**batch_of(model, [4]))
    vistoken.unwrap(model)
    assert fast.generate(**batch_of(model, [4])).shape[1] == 4 + 16 + 2 + 2


def test_a_model_on_two_devices_is_refused():
    model = make_llava()
    model.lm_head.to("meta")
    with pytest.raises(UnsupportedBackboneError, match="cpu, meta"):
        vistoken.accelerate(model)


def test_a_sliding_window_must_hold_everything():
    fits, short = make_llava_next(sliding_window=300), make_llava_next(sliding_window=130)
    inputs = batch_of(fits, [4])
    got = vistoken.accelerate(fits, max_new_tokens=NEW).generate(**inputs)
    assert torch.equal(got, plain(fits, inputs, NEW))
    with pytest.raises(ConfigError, match="sliding window"):
        vistoken.accelerate(short, max_new_tokens=NEW).generate(**inputs)


def test_no_hook_stays_behind(llava):
    llava.generate(**batch_of(llava, [4]), max_new_tokens=1)
    before = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in llava.modules()]
    vistoken.accelerate(llava, max_new_tokens=2).generate(**batch_of(llava, [4]))
    after = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in llava.modules()]
    assert before == after


def test_a_layer_that_differs_is_noticed(llava, monkeypatch):
    parts = find_parts(llava)
    layer = parts.decoder.layers[0]
    assert layer_error(parts, layer, Plan()) < 1e-5
    monkeypatch.setattr(
        decode_plan, "chain_layer", lambda layer, x, *rest: chain_layer(layer, x * 1.01, *rest)
    )
    assert layer_error(parts, layer, Plan()) > 1e-3
    inputs = batch_of(llava, [4])
    fast = vistoken.accelerate(llava, max_new_tokens=NEW)
    assert torch.equal(fast.generate(**inputs), plain(llava, inputs, NEW))
    assert "differs" in fast.execution


def test_rows_move_to_the_left_in_order():
    embeds = torch.arange(10.0).view(2, 5, 1)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 1, 0]])
    positions = torch.arange(5).expand(3, 2, 5)
    got, lengths, moved = left_aligned(embeds, mask, positions)
    assert lengths.tolist() == [3, 3]
    assert got[0, :3, 0].tolist() == [2, 3, 4]
    assert got[1, :3, 0].tolist() == [5, 7, 8]
    assert moved[2, :, :3].tolist() == [[2, 3, 4], [0, 2, 3]]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("method", ["hired:budget=0.5", "random_tokens:budget=0.3"])
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_wrapped_models_generate_what_they_would(name, method, positions):
    if name == "onevision" and method.startswith("hired"):
        pytest.skip("no class token")
    model = MAKERS[name]()
    inputs = batch_of(model, [3, 9])
    fast = vistoken.accelerate(model, f"{method},positions={positions}", max_new_tokens=NEW)
    assert torch.equal(fast.generate(**inputs), plain(model, inputs, NEW))
    assert fast.execution == "fused chain"
    (decoder,) = fast._decoders.values()
    assert decoder.state.lengths.max() - (NEW - 1) < inputs["input_ids"].shape[1]
    vistoken.unwrap(model)
    assert torch.equal(fast.generate(**inputs), plain(model, inputs, NEW))


def test_cut_keeps_the_last_end():
    tokens = torch.tensor([[4, 9, 0, 0, 0], [4, 5, 6, 9, 0]])
    assert cut(tokens, (9,)).shape == (2, 4)
    assert cut(tokens, (7,)).shape == (2, 5)
    assert cut(tokens, ()).shape == (2, 5)
    assert cut(tokens, (6, 4)).shape == (2, 1)


def test_defaults_are_those_of_transformers(llava):
    sampling = read_sampling(llava.generation_config, {"do_sample": True, "eos_token_id": [3, -1]})
    assert sampling == Sampling(True, 1.0, 50, 1.0, (3,), PAD)


def test_unknown_names_are_refused_as_generate_does(llava):
    fast = vistoken.accelerate(llava, max_new_tokens=2)
    with pytest.raises(ConfigError, match="temprature"):
        fast.generate(**batch_of(llava, [4]), temprature=0.5)


def test_methods_that_keep_everything_are_carried_and_the_others_tell_what_they_cut():
    model = make_llava()
    inputs = batch_of(model, [4])
    wanted = plain(model, inputs, 2)
    fast = vistoken.accelerate(model, "fastv:budget=1,layer=1", max_new_tokens=2)
    assert torch.equal(fast.generate(**inputs), wanted)
    vistoken.unwrap(model)
    vistoken.wrap(model, "random_tokens:budget=0.5")
    fast.generate(**inputs)
    assert vistoken.info(model).images == ((16, 8),)


@pytest.mark.parametrize("eos", [None, 5, PAD])
def test_without_a_mask_padding_is_inferred_as_generate_does(llava, eos):
    inputs = batch_of(llava, [9, 4])
    del inputs["attention_mask"]
    fast = vistoken.accelerate(llava, max_new_tokens=NEW)
    wanted = plain(llava, inputs, NEW, eos_token_id=eos)
    assert torch.equal(fast.generate(**inputs, eos_token_id=eos), wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": "hot"}, {"temperature": float("nan")}, {"top_k": 5.5}, {"top_p": "most"},
        {"eos_token_id": "end"}, {"eos_token_id": [3, 4.5]}, {"pad_token_id": "pad"},
        {"max_new_tokens": True},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_a_wrong_kind_are_named(llava, settings):
    fast = vistoken.accelerate(llava, max_new_tokens=NEW)
    (name,) = settings
    with pytest.raises(ConfigError, match=f"^{name}="):
        fast.generate(**batch_of(llava, [4]), do_sample=True, **settings)
