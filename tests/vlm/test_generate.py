"""Shortened prompts against a reference: the plain language model on a hand-made short prompt."""

import copy

import pytest
import torch
import transformers

import vistoken
from tests.support import vlm_models as m
from tests.support.vlm_prompts import (
    NEW,
    ROWS,
    inputs_of,
    one_by_one,
    reference,
    run,
    selection,
)
from vistoken.errors import ConfigError, UnsupportedMethodError
from vistoken.vlm.prompt import prepare

SIZES = [(56, 56), (40, 56), (28, 56)]


METHODS = ["hired:budget=0.4", "random_tokens:budget=0.3", "pool_tokens:budget=0.4"]


CASES = [(m.llava, None), (m.llava_next, (40, 56)), (m.llava_next, (56, 56))]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("build", "size"), CASES)
@pytest.mark.parametrize("positions", ["compact", "original"])
@torch.no_grad()
def test_equals_a_hand_made_short_prompt(build, size, method, positions):
    model = build()
    inputs = inputs_of(model, [[size]])
    vistoken.wrap(model, f"{method},positions={positions}")
    kept = selection(model, inputs)
    out = run(model, inputs)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :length], inputs["input_ids"])
    cached = run(model, inputs, return_dict_in_generate=True).past_key_values
    dropped = inputs["input_ids"].eq(m.IMAGE).sum() - len(kept[0][0])
    assert dropped > 0
    assert cached.layers[0].keys.shape[-2] == length - dropped + NEW - 1
    vistoken.unwrap(model)
    assert torch.equal(out[:, length:], reference(model, inputs, [kept], positions))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [m.llava, m.llava_next])
@torch.no_grad()
def test_whole_budget_changes_nothing_to_the_bit(build, attention):
    model = build(attention=attention)
    size = None if build is m.llava else (40, 56)
    inputs = inputs_of(model, [[size], [size, size]])
    plain, logits = run(model, inputs), model(**inputs).logits
    vistoken.wrap(model, vistoken.HiRED(budget=1.0))
    assert torch.equal(run(model, inputs), plain)
    assert torch.equal(model(**inputs).logits, logits)
    assert "get_image_features" not in model.model.__dict__


@torch.no_grad()
def test_unwrap_restores_exactly():
    model = m.llava_next()
    inputs = inputs_of(model, [[(40, 56)]])
    plain, logits = run(model, inputs), model(**inputs).logits
    names = [name for module in model.modules() for name in module.__dict__]
    hooks = sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in model.modules())
    vistoken.wrap(model, "hired:budget=0.2")
    assert not torch.equal(run(model, inputs), plain)
    vistoken.unwrap(model)
    assert torch.equal(run(model, inputs), plain)
    assert torch.equal(model(**inputs).logits, logits)
    assert hooks == sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in model.modules())
    assert names == [name for module in model.modules() for name in module.__dict__]


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_batch_equals_one_by_one(method, pad, positions):
    model = vistoken.wrap(m.llava_next(), f"{method},positions={positions}")
    inputs = inputs_of(model, ROWS, pad)
    new = run(model, inputs)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(new, one_by_one(model, ROWS))


@torch.no_grad()
def test_beams_and_return_sequences_equal_one_by_one():
    model = vistoken.wrap(m.llava_next(), "hired:budget=0.3")
    rows = [[(56, 56)], [(40, 56)]]  # one image each: what every release expands alike
    inputs = inputs_of(model, rows)
    length = inputs["input_ids"].shape[1]
    both = run(model, inputs, num_beams=3)[:, length:]
    assert torch.equal(both, one_by_one(model, rows, num_beams=3))
    many = run(model, inputs, num_beams=3, num_return_sequences=2)
    assert many.shape[0] == 4
    assert torch.equal(many[::2, length:], both)
    torch.manual_seed(0)
    drawn = run(model, inputs, do_sample=True, num_return_sequences=3)
    torch.manual_seed(0)
    assert torch.equal(drawn, run(model, inputs, do_sample=True, num_return_sequences=3))


@pytest.mark.skipif(
    not hasattr(transformers.GenerationMixin, "_expand_multimodal_outputs"),
    reason="this release repeats images without regard to their rows",
)
@pytest.mark.parametrize("method", ["hired:budget=0.3", "fastv:budget=0.3,layer=1"])
@torch.no_grad()
def test_beams_with_several_images_per_row(method):
    model = vistoken.wrap(m.llava_next(), method)
    rows = [[(56, 56)], [(40, 56), (28, 56)]]
    inputs = inputs_of(model, rows)
    both = run(model, inputs, num_beams=3)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(both, one_by_one(model, rows, num_beams=3))


@torch.no_grad()
def test_sampling_equals_the_reference_distribution():
    model = vistoken.wrap(m.llava(), "hired:budget=0.4")
    inputs = inputs_of(model, [[None]])
    out = run(model, inputs, do_sample=True, output_logits=True, return_dict_in_generate=True)
    prepared = prepare(model, inputs)
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    embeds = torch.cat([prepared.inputs_embeds, model.get_input_embeddings()(tokens)], 1)
    hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state
    logits = model.lm_head(hidden)[:, prepared.inputs_embeds.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", ["compact", "original"])
@torch.no_grad()
def test_without_cache_equals_with_cache(positions):
    model = vistoken.wrap(m.llava_next(), f"hired:budget=0.3,positions={positions}")
    for rows in ([[(56, 56)]], ROWS):
        inputs = inputs_of(model, rows)
        assert torch.equal(run(model, inputs), run(model, inputs, use_cache=False))


@torch.no_grad()
def test_gapped_positions_without_cache_and_mask():
    model = vistoken.wrap(m.llava(), "hired:budget=0.4,positions=original")
    inputs = inputs_of(model, [[None]])
    with_mask = model(**inputs, use_cache=False).logits
    del inputs["attention_mask"]
    torch.testing.assert_close(model(**inputs, use_cache=False).logits, with_mask)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_labels_give_the_loss_of_the_short_prompt(pad, positions):
    model = m.llava()
    inputs = inputs_of(model, [[None], [None, None]], pad)
    labels = inputs["input_ids"].clone()
    labels[(labels == m.IMAGE) | (inputs["attention_mask"] == 0)] = -100
    vistoken.wrap(model, f"hired:budget=0.4,positions={positions}")
    pixels = inputs["pixel_values"].requires_grad_()
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert pixels.grad.abs().sum() > 0
    kept = selection(model, inputs)
    kept = [kept[:1], kept[1:]]
    total, count = 0.0, 0
    for row in range(2):
        real = inputs["attention_mask"][row].bool()
        ids, image, at, chain, targets, places = inputs["input_ids"][row][real], -1, 0, [], [], []
        for position, token in enumerate(ids.tolist()):
            if token == m.IMAGE:
                image, at = (image + 1, 0) if ids[position - 1] != m.IMAGE else (image, at)
                hit = (kept[row][image][0] == at).nonzero()
                at += 1
                if len(hit):
                    chain.append(kept[row][image][1][int(hit)])
                    targets.append(-100)
                    places.append(position)
            else:
                chain.append(model.get_input_embeddings().weight[token])
                targets.append(token)
                places.append(position)
        spots = torch.arange(len(chain)) if positions == "compact" else torch.tensor(places)
        hidden = model.model.language_model(
            inputs_embeds=torch.stack(chain)[None], position_ids=spots[None],
            attention_mask=torch.ones(1, len(chain)),
        ).last_hidden_state  # fmt: skip
        logits = model.lm_head(hidden)[0, :-1]
        target = torch.tensor(targets)[1:]
        total += torch.nn.functional.cross_entropy(logits, target, reduction="sum")
        count += int((target != -100).sum())
    torch.testing.assert_close(loss, total / count)


@torch.no_grad()
def test_prepare_is_what_the_language_model_gets():
    for wrapped in (False, True):
        model = m.llava_next()
        if wrapped:
            vistoken.wrap(model, "hired:budget=0.3")
        inputs = inputs_of(model, ROWS)
        p = prepare(model, inputs)
        out = model.model.language_model(
            inputs_embeds=p.inputs_embeds, attention_mask=p.attention_mask,
            position_ids=p.position_ids,
        )  # fmt: skip
        logits = model.lm_head(out.last_hidden_state[:, -1])
        expected = model(**inputs).logits[:, -1]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        assert p.inputs_embeds.shape[1] == max(p.lengths)
        assert p.attention_mask.sum(1).tolist() == list(p.lengths)
        for row, length in enumerate(p.lengths):
            assert p.position_ids[row, -length:].tolist() == list(range(length))
        assert p.prompt_length == inputs["input_ids"].shape[1]


def test_two_models_do_not_touch_each_other_and_copies_work():
    model, other = m.llava(), m.llava()
    inputs = inputs_of(model, [[None]])
    plain = run(other, inputs)
    vistoken.wrap(model, "hired:budget=0.3")
    short = run(model, inputs)
    assert torch.equal(run(other, inputs), plain)
    twin = copy.deepcopy(model)
    vistoken.unwrap(model)
    assert torch.equal(run(twin, inputs), short)
    assert torch.equal(run(model, inputs), plain)


def test_what_cannot_work_raises():
    model = vistoken.wrap(m.llava_next(), "hired:budget=0.3")
    inputs = inputs_of(model, [[(56, 56)]])
    with pytest.raises(UnsupportedMethodError, match="prefill_chunk_size"):
        run(model, inputs, prefill_chunk_size=16)
    with pytest.raises(ConfigError, match="input_ids"):
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        rest = {n: inputs[n] for n in ("pixel_values", "image_sizes")}
        model(inputs_embeds=embeds, **rest)
    with pytest.raises(vistoken.AlreadyWrappedError, match="carries hired"):
        vistoken.wrap(model, "random_tokens")
    with pytest.raises(UnsupportedMethodError, match="class token"):
        vistoken.wrap(m.onevision(), "hired:budget=0.3")
    with pytest.raises(UnsupportedMethodError, match="layer 9"):
        vistoken.wrap(m.llava(), "hired:budget=0.3,last=9")
    with pytest.raises(vistoken.UnsupportedBackboneError, match="LLaVA-NeXT"):
        vistoken.wrap(torch.nn.Linear(2, 2), "hired:budget=0.3")
    with pytest.raises(ConfigError, match="budget=0"):
        vistoken.HiRED(budget=0)
    plain = m.llava()
    with pytest.raises(UnsupportedMethodError):
        vistoken.wrap(plain, "hired:budget=0.3,last=9")
    assert "_vistoken" not in plain.__dict__
    assert not plain.model.vision_tower.encoder.layers[0].self_attn.k_proj._forward_hooks


def test_info_says_what_was_cut():
    model = vistoken.wrap(m.llava_next(), "hired:budget=0.25,newlines=drop")
    assert "not yet seen" in str(vistoken.info(model))
    inputs = inputs_of(model, [[(56, 56)], [(28, 56)]])
    run(model, inputs, max_new_tokens=1)
    info = vistoken.info(model)
    assert info.images == ((88, 20), (52, 12))
    assert str(info) == (
        "hired:budget=0.25,newlines=drop on LLaVA-NeXT: image tokens 88 -> 20, 52 -> 12"
    )
    with pytest.raises(vistoken.NotWrappedError, match="cuts prompts"), vistoken.trace(model):
        pass
    vistoken.unwrap(model)
    with pytest.raises(vistoken.NotWrappedError):
        vistoken.info(model)
    vistoken.wrap(model, "fastv:budget=0.5,layer=1")
    run(model, inputs, max_new_tokens=1)
    assert vistoken.info(model).images == ((88, 44), (52, 26))
    with pytest.raises(UnsupportedMethodError, match="inside the language model"):
        prepare(model, inputs)


@torch.no_grad()
def test_rows_do_not_depend_on_their_order():
    model = vistoken.wrap(m.llava_next(), "hired:budget=0.3")
    rows = [[(56, 56)], [(28, 56)]]
    inputs = inputs_of(model, rows)
    turned = {name: value.flip(0) for name, value in inputs.items()}
    assert torch.equal(run(model, inputs)[:, -NEW:], run(model, turned).flip(0)[:, -NEW:])


@torch.no_grad()
def test_positions_in_the_call_are_the_users():
    model = vistoken.wrap(m.llava_next(), "hired:budget=0.3")
    inputs = inputs_of(model, [[(56, 56)], [(28, 56)]])
    plain = model(**inputs, logits_to_keep=1)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    given = model(**inputs, position_ids=positions, logits_to_keep=1)
    assert torch.equal(given.logits, plain.logits)
    assert given.image_hidden_states.shape[0] == sum(
        len(index) for index, _ in selection(model, inputs)
    )
    # A step by hand, without positions: the cache knows where it stands.
    token = plain.logits.argmax(-1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    bare = model(input_ids=token, attention_mask=mask, past_key_values=plain.past_key_values)
    out = run(model, inputs, max_new_tokens=2)
    assert torch.equal(bare.logits[:, -1].argmax(-1), out[:, -1])


def test_swapped_images_of_equal_total_are_caught():
    model = vistoken.wrap(m.llava_next(), "hired:budget=0.3")
    inputs = inputs_of(model, [[(56, 56), (28, 56)]])
    inputs["image_sizes"] = inputs["image_sizes"].flip(0)
    inputs["pixel_values"] = inputs["pixel_values"].flip(0)
    with pytest.raises(ConfigError, match="in a row"):
        run(model, inputs)


@torch.no_grad()
def test_features_of_another_method_are_not_taken_for_its_own():
    model = vistoken.wrap(m.llava_next(), "hired:budget=0.4")
    inputs = inputs_of(model, [[(56, 56)]])
    images = {n: inputs.pop(n) for n in ("pixel_values", "image_sizes")}
    encoded = {"mm_encoder_outputs": {"image": model.model.get_image_features(**images)}}
    vistoken.unwrap(model)
    assert prepare(model, {**inputs, **encoded}).images == ((88, 88),)
    vistoken.wrap(model, "random_tokens:budget=0.2")
    with pytest.raises(UnsupportedMethodError, match="another method"):
        model(**inputs, **encoded)


@pytest.mark.parametrize("build", [m.llava, m.llava_next])
@torch.no_grad()
def test_a_method_on_the_tower_keeps_every_image_token_in_its_place(build):
    model = build()
    size = (40, 56) if build is m.llava_next else None
    inputs = inputs_of(model, [[size]])
    plain, tower = run(model, inputs), copy.deepcopy(model.model.vision_tower)
    pixels = inputs["pixel_values"].flatten(0, -4)
    vistoken.wrap(tower, "tome:r=3")
    states = tower(pixels, output_hidden_states=True).hidden_states
    wanted = model.model.multi_modal_projector(states[model.config.vision_feature_layer][:, 1:])
    vistoken.wrap(model, "tome:r=3")
    seen = []
    projector = model.model.multi_modal_projector
    handle = projector.register_forward_hook(lambda _, __, out: seen.append(out))
    assert run(model, inputs).shape == plain.shape
    handle.remove()
    assert torch.equal(seen[0], wanted)
    vistoken.unwrap(model)
    assert torch.equal(run(model, inputs), plain)
