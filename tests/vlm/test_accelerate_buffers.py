"""What `vistoken.accelerate` keeps between calls, and what makes it record anew."""

import pytest
import torch

pytest.importorskip("transformers")

from decode_models import IMAGE, batch_of, make_llava, plain

import vistoken
from vistoken.errors import BackendUnavailableError
from vistoken.vlm import accelerate, decode

NEW = 19


@pytest.fixture(scope="module")
def llava():
    return make_llava()


def test_buffers_serve_other_prompts_lengths_and_batches(llava):
    fast = vistoken.accelerate(llava, max_new_tokens=NEW)
    calls = [([4], 0), ([4], 1), ([2, 90], 0), ([70], 3), ([3, 3], 2), ([4], 0)]
    for rows, seed in calls:
        inputs = batch_of(llava, rows, seed=seed)
        assert torch.equal(fast.generate(**inputs), plain(llava, inputs, NEW)), rows
    (single,) = [d for (batch, _), d in fast._decoders.items() if batch == 1]
    assert single.state.capacity == 128 + NEW
    fast.clear()
    assert torch.equal(fast.generate(**inputs), plain(llava, inputs, NEW))


def test_recorded_once_per_rounded_length(llava, monkeypatch):
    made = []

    class Counting(decode.Replay):
        def __init__(self, *args):
            made.append(1)
            super().__init__(*args)

    monkeypatch.setattr(decode, "Replay", Counting)
    fast = vistoken.accelerate(llava, max_new_tokens=NEW)
    for words, total in ((60, 3), (50, 3), (4, 4), (60, 4)):
        fast.generate(**batch_of(llava, [words]))
        assert len(made) == total, words
    fast.generate(**batch_of(llava, [4]), do_sample=True, top_k=3)
    assert len(made) == 7


def test_inference_mode_and_plain_calls_share_buffers(llava):
    inputs = batch_of(llava, [4, 9])
    wanted = plain(llava, inputs, NEW)
    fast = vistoken.accelerate(llava, max_new_tokens=NEW)
    with torch.inference_mode():
        assert torch.equal(fast.generate(**inputs), wanted)
    assert torch.equal(fast.generate(**inputs), wanted)


def test_graphs_of_few_ways_of_sampling_are_kept(llava):
    fast = vistoken.accelerate(llava, max_new_tokens=2)
    inputs = batch_of(llava, [4])
    fast.generate(**inputs)
    (decoder,) = fast._decoders.values()
    greedy = next(iter(decoder._steps))
    for number in range(3 * decode.SAMPLINGS):
        fast.generate(**inputs, do_sample=True, temperature=1 + number / 10)
        fast.generate(**inputs)  # used all the time: never among those that go
        (prompt,) = decoder._prompts.values()
        for kept in (decoder._steps, prompt.replay):
            assert greedy in kept
            assert len(kept) <= decode.SAMPLINGS
    made = decoder._steps[greedy]
    fast.generate(**inputs)
    assert decoder._steps[greedy] is made


def test_recent_drops_what_was_used_least_recently():
    kept, made = {}, []

    def make(key):
        made.append(key)
        return key * 10

    for key in (1, 2, 3, 1, 4, 2):
        assert decode.recent(kept, key, lambda key=key: make(key), 3) == key * 10
    assert made == [1, 2, 3, 4, 2]
    assert list(kept) == [1, 4, 2]


def test_buffers_of_few_batch_sizes_are_kept(llava, monkeypatch):
    monkeypatch.setattr(accelerate, "BATCHES", 2)
    fast = vistoken.accelerate(llava, max_new_tokens=2)
    for rows in (1, 2, 1, 3, 1):
        fast.generate(input_ids=torch.randint(1, IMAGE, (rows, 5)))
        assert len(fast._decoders) <= 2
    assert {batch for batch, _ in fast._decoders} == {1, 3}


def test_buffers_of_other_batch_sizes_make_room(llava, monkeypatch):
    fast = vistoken.accelerate(llava, max_new_tokens=2)
    inputs = batch_of(llava, [4, 9])
    fast.generate(**batch_of(llava, [4]))

    class Tight(decode.Decoder):
        def __init__(self, *args):
            if fast._decoders:
                raise torch.OutOfMemoryError("full")
            super().__init__(*args)

    monkeypatch.setattr(accelerate, "Decoder", Tight)
    assert torch.equal(fast.generate(**inputs), plain(llava, inputs, 2))

    class Full(decode.Decoder):
        def __init__(self, *args):
            raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(accelerate, "Decoder", Full)
    with pytest.raises(torch.OutOfMemoryError):
        fast.generate(**batch_of(llava, [4]))
    assert not fast._decoders


@pytest.mark.parametrize("change", ["head", "hook", "forward", "weights", "layer", "dtype"])
def test_changes_after_the_first_call_are_noticed(change):
    model = make_llava()
    inputs = batch_of(model, [4])
    fast = vistoken.accelerate(model, max_new_tokens=NEW)
    before = fast.generate(**inputs)
    made = dict(fast._decoders)
    fast.generate(**inputs)
    assert fast._decoders == made, "an unchanged model is not recorded again"
    head, layer = model.lm_head, model.model.language_model.layers[1]
    if change == "head":
        model.lm_head = torch.nn.Linear(head.in_features, head.out_features, bias=False)
        torch.nn.init.normal_(model.lm_head.weight)
    elif change == "hook":
        handle = layer.mlp.register_forward_hook(lambda _, __, out: out * -1)
    elif change == "forward":
        plain_forward = layer.mlp.forward
        layer.mlp.forward = lambda x: plain_forward(x) * -1
    elif change == "weights":
        layer.mlp.up_proj.weight = torch.nn.Parameter(torch.randn_like(layer.mlp.up_proj.weight))
    elif change == "layer":
        layer.mlp.down_proj = torch.nn.Sequential(layer.mlp.down_proj, torch.nn.Tanh())
    else:
        model.double()
        inputs["pixel_values"] = inputs["pixel_values"].double()
    got = fast.generate(**inputs)
    assert torch.equal(got, plain(model, inputs, NEW))
    assert change == "dtype" or not torch.equal(got, before)
    if change == "hook":
        assert "has hooks" in fast.execution
        handle.remove()
        assert torch.equal(fast.generate(**inputs), before)
        assert fast.execution == "fused chain"
    model.train()
    with pytest.raises(BackendUnavailableError, match="eval"):
        fast.generate(**inputs)


def test_weights_that_change_in_place_are_followed(llava):
    inputs = batch_of(llava, [4])
    fast = vistoken.accelerate(llava, max_new_tokens=NEW)
    before, made = fast.generate(**inputs), dict(fast._decoders)
    weight = llava.lm_head.weight
    old = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(old.flip(0))
    assert torch.equal(fast.generate(**inputs), plain(llava, inputs, NEW))
    assert fast._decoders == made
    with torch.no_grad():
        weight.copy_(old)
    assert torch.equal(fast.generate(**inputs), before)


def test_settings_of_modules_are_noticed():
    """As an adapter that is switched off is: no weight, hook or class changes."""

    class Adapted(torch.nn.Linear):
        def __init__(self, *sizes, **more):
            super().__init__(*sizes, **more)
            self.active = ["default"]

        def forward(self, x):
            return super().forward(x) * (-1 if self.active else 1)

    model = make_llava()
    layer = model.model.language_model.layers[1].mlp
    adapted = Adapted(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)
    layer.up_proj = adapted
    fast = vistoken.accelerate(model, max_new_tokens=2)
    fast.generate(**batch_of(model, [4]))
    seen = fast._snapshot
    fast.generate(**batch_of(model, [4]))
    assert fast._snapshot is seen
    adapted.active.clear()
    fast.generate(**batch_of(model, [4]))
    assert fast._snapshot is not seen
