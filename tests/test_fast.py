"""The fused chain gives what the bypass gives, and steps aside when anything is unusual."""

import os
import sys

import pytest
import timm
import torch

import vistoken
from vistoken.api import attachment_of
from vistoken.patches import unfold_linear

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1 where there is no GPU", allow_module_level=True)

METHODS = [
    "tome:r=3",
    "diffrate:gflops=0.0045",
    "evit:keep_rate=0.6,at=[1,2]",
    "evit:keep_rate=0.6,at=[1,2],fuse=false",
    "tofu:r=3,prune_blocks=2",
    "mctf:r=3",
    "pool:at=[1]",
    "zero_tprune:keep_rate=0.8,at=[0,2]",
    "random:keep_rate=0.5,at=[1]",
]


@pytest.fixture
def chain(monkeypatch):
    """Sends CPU tensors to the kernels, which the interpreter runs."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vistoken") and hasattr(module, "use_triton"):
            monkeypatch.setattr(module, "use_triton", lambda x, dtypes=None: True)


def build(name="deit3_small_patch16_224", **extra):
    torch.manual_seed(0)
    model = timm.create_model(
        name, img_size=64, embed_dim=64, num_heads=2, depth=4, num_classes=7, **extra
    ).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.dim() > 1 else p.data.add_(torch.rand_like(p) / 2)
    return model


def run(model, x):
    torch.manual_seed(1)
    with torch.no_grad(), vistoken.trace(model) as t:
        return model(x), t


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "deit_small_distilled_patch16_224"])
def test_chain_equals_bypass(method, name, request):
    x = torch.randn(2, 3, 64, 64)
    model = vistoken.wrap(build(name), method)
    own, t_own = run(model, x)
    assert not attachment_of(model).checked, "on the CPU the chain must not have run"
    request.getfixturevalue("chain")
    fused, t_fused = run(model, x)
    assert attachment_of(model).checked, "the chain must have run"
    assert attachment_of(model).fused is True
    torch.testing.assert_close(fused, own, rtol=1e-4, atol=1e-4)
    assert t_own.counts == t_fused.counts
    assert torch.equal(t_own.source_map.parent, t_fused.source_map.parent)
    torch.testing.assert_close(t_own.sizes[-1], t_fused.sizes[-1])
    with torch.no_grad():
        dense = model.forward_features(x)
    assert dense.shape[1] == model.num_prefix_tokens + 16


def ran_chain(model, x, **kwargs):
    """Whether one forward pass took the chain."""
    seen = []
    block = model.blocks[0].__dict__["forward"]
    block.run, keep = (lambda x: seen.append(1) or type(block).run(block, x)), block.run
    try:
        model(x, **kwargs)
    finally:
        del block.run
        assert keep
    return bool(seen)


def test_it_steps_aside(chain):
    model, x = vistoken.wrap(build(), "tome:r=3"), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert ran_chain(model, x)
        model.blocks[0].train()
        assert not ran_chain(model, x)
        model.eval()
        handle = model.blocks[0].mlp.fc1.register_forward_hook(lambda *a: None)
        assert not ran_chain(model, x), "a user's hook must fire"
        handle.remove()
        assert ran_chain(model, x)
        own = model.blocks[0].mlp.fc1
        model.blocks[0].mlp.fc1 = torch.nn.Sequential(own, torch.nn.Identity())
        assert not ran_chain(model, x), "a layer was exchanged"
        model.blocks[0].mlp.fc1 = own
        assert ran_chain(model, x)
    assert not ran_chain(model, x), "gradients are enabled"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m.blocks[1].mlp, "act", torch.nn.ReLU()), "'mlp.act' of a block is"),
        (lambda m: setattr(m.blocks[2].attn, "q_norm", torch.nn.LayerNorm(32)), "'attn.q_norm'"),
        (lambda m: setattr(m.blocks[0].mlp, "act", torch.nn.GELU("tanh")), "approximate"),
    ],
)
def test_other_parts_keep_their_own_forward(change, words):
    model = build()
    change(model)
    vistoken.wrap(model, "tome:r=3")
    assert words in vistoken.info(model).execution
    assert "forward" not in model.blocks[0].__dict__


def test_disagreement_switches_it_off(chain, monkeypatch):
    import vistoken.fast

    monkeypatch.setattr(vistoken.fast, "gelu_linear", lambda h, layer: layer(h))
    model, x = vistoken.wrap(build(), "tome:r=3"), torch.randn(2, 3, 64, 64)
    reference = vistoken.wrap(build(), "tome:r=3")
    attachment_of(reference).fused = "off"
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x))
    assert "is off by" in vistoken.info(model).execution


def test_a_self_check_that_gives_nan_switches_it_off(chain):
    model, x = vistoken.wrap(build(), "tome:r=3"), torch.randn(2, 3, 64, 64)
    model.blocks[0].mlp.fc2.bias.data.fill_(float("nan"))
    with torch.no_grad():
        model(x)
    assert "is off by nan" in vistoken.info(model).execution


def test_a_positional_mask_reaches_the_block(chain):
    block, x = vistoken.wrap(build(), "tome:r=0").blocks[0], torch.randn(2, 17, 64)
    mask = torch.zeros(17, 17).index_fill(1, torch.tensor([3]), float("-inf"))
    with torch.no_grad():
        torch.testing.assert_close(block(x, mask), block(x, attn_mask=mask))
        assert not torch.allclose(block(x, mask), block(x))


def test_unwrap_takes_it_off():
    model = build()
    before = {name: set(m.__dict__) for name, m in model.named_modules()}
    vistoken.unwrap(vistoken.wrap(model, "tome:r=3"))
    assert before == {name: set(m.__dict__) for name, m in model.named_modules()}


def test_the_self_check_leaves_random_numbers_alone(chain):
    model, x = vistoken.wrap(build(), "random:keep_rate=0.5,at=[1]"), torch.randn(2, 3, 64, 64)
    first, second = run(model, x)[0], run(model, x)[0]
    assert torch.equal(first, second)


def test_graphs_need_a_gpu():
    model = vistoken.wrap(build(), "tome:r=3")
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(vistoken.BackendUnavailableError, match="the model is on cpu"):
        vistoken.compile(model, torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (12, 20)])
def test_patches_as_a_matrix_product(bias, size):
    conv = torch.nn.Conv2d(3, 10, (4, 2), (4, 2), bias=bias).double()
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    mine = unfold_linear(x, conv.weight, conv.bias)
    torch.testing.assert_close(mine, conv(x))
    assert mine.flatten(2).transpose(1, 2).is_contiguous(), "the host flattens without a copy"


def test_patch_convolution_is_replaced_only_where_it_is_the_same(chain):
    model, x = build(), torch.randn(2, 3, 64, 64)
    conv = model.patch_embed.proj
    with torch.no_grad():
        own = conv(x)
        vistoken.wrap(model, "tome:r=3")
        torch.testing.assert_close(conv(x), own, rtol=1e-4, atol=1e-4)
        stand_in = conv.__dict__["forward"]
        assert stand_in.agreed and stand_in.usable(x)
        assert not stand_in.usable(x[..., :63]), "a row of half a patch"
        conv.padding = (1, 1)
        assert not stand_in.usable(x)
        conv.padding = (0, 0)
        stand_in.agreed = dict.fromkeys(stand_in.agreed, False)
        assert torch.equal(conv(x), own)
    assert not stand_in.usable(x), "gradients are enabled"
    vistoken.unwrap(model)
    assert "forward" not in conv.__dict__


@pytest.mark.parametrize("change", [{"padding": (1, 1)}, {"stride": (8, 8)}, {"groups": 1}])
def test_other_patch_embeddings_keep_their_own_forward(change):
    model = build()
    settings = {"kernel_size": 16, "stride": 16, **change}
    kind = torch.nn.Conv2d if change != {"groups": 1} else type("Mine", (torch.nn.Conv2d,), {})
    model.patch_embed.proj = kind(3, 64, **settings)
    vistoken.wrap(model, "tome:r=0")
    assert "forward" not in model.patch_embed.proj.__dict__


def same_as_bypass(model, x):
    """The model's output with the chain, and with the chain switched off."""
    with torch.no_grad():
        chain = model(x)
        attachment_of(model).fused, keep = "switched off", attachment_of(model).fused
        own = model(x)
        attachment_of(model).fused = keep
    torch.testing.assert_close(chain, own, rtol=1e-3, atol=1e-3)


class Plus(torch.nn.Module):
    def forward(self, x):
        return x + 0.5


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize(
    "path", ["2.norm1", "0.norm1", "1.attn.proj_drop", "1.mlp.drop2", "1.drop_path1", "0.mlp.fc1"]
)
def test_an_exchanged_layer_counts(chain, path, warm):
    model, x = vistoken.wrap(build(), "tome:r=3"), torch.randn(2, 3, 64, 64)
    if warm:
        with torch.no_grad():
            model(x)
    owner, _, name = path.rpartition(".")
    owner = model.blocks.get_submodule(owner)
    own = getattr(owner, name)
    setattr(owner, name, torch.nn.Sequential(own, Plus()))
    same_as_bypass(model, x)


@pytest.mark.parametrize("path", ["1.attn.proj_drop", "2.norm1", "1.mlp"])
def test_a_hook_or_a_forward_of_the_user_counts(chain, path):
    model, x = vistoken.wrap(build(), "tome:r=3"), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model(x)
    part = model.blocks.get_submodule(path)
    handle = part.register_forward_hook(lambda module, args, out: out + 1)
    same_as_bypass(model, x)
    handle.remove()
    part.forward = lambda x: 2 * type(part).forward(part, x)
    same_as_bypass(model, x)


@pytest.mark.parametrize("inference", [True, False])
def test_an_output_edited_in_place_is_normed_anew(chain, inference):
    model, x = vistoken.wrap(build(), "tome:r=3"), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain = model(x)

    def edit(module, args, out):
        out.add_(torch.linspace(-1, 1, out.shape[-1]))  # a norm does not take this off again

    model.blocks[0].register_forward_hook(edit)
    with torch.inference_mode(inference):
        same_as_bypass(model, x)
    with torch.no_grad():
        assert not torch.allclose(model(x), plain, atol=1e-2)


def test_a_forward_of_the_users_own_stays(chain):
    model, x = build(), torch.randn(2, 3, 64, 64)
    block, conv = model.blocks[1], model.patch_embed.proj
    block.forward = lambda x, **kwargs: 1.5 * type(block).forward(block, x, **kwargs)
    conv.forward = lambda x: 0.5 * type(conv).forward(conv, x)
    kept = (block.forward, conv.forward)
    with torch.no_grad():
        own = model(x)
        vistoken.wrap(model, "tome:r=0")
        torch.testing.assert_close(model(x), own)
        assert "forward of its own" in vistoken.info(model).execution
        vistoken.unwrap(model)
    assert (block.forward, conv.forward) == kept


def test_the_self_check_disturbs_nobody_and_waits_for_an_intact_block(chain):
    model, x = vistoken.wrap(build(), "tome:r=3"), torch.randn(3, 3, 64, 64)
    seen = []
    handle = model.blocks[0].mlp.fc1.register_forward_hook(lambda m, a, out: seen.append(len(out)))
    with torch.no_grad():
        model(x)
        assert seen == [3] and not attachment_of(model).checked
        handle.remove()
        model(x)
    assert list(attachment_of(model).checked.values()) == [None]


def test_a_wrong_attention_kernel_is_noticed(chain, monkeypatch):
    import vistoken.kernels.triton_biased_attention as module

    own = module.biased_attention_triton

    def wrong(*args, **kwargs):
        out, row = own(*args, **kwargs)
        return out * 1.1, row

    monkeypatch.setattr(module, "biased_attention_triton", wrong)
    model, x = vistoken.wrap(build(), "tome:r=3"), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model(x)
    assert "is off by" in attachment_of(model).checked[(x.device, x.dtype)]


def test_attention_received_takes_the_normalizer_of_the_attention(chain, monkeypatch):
    """Without it the scores of all pairs would be made once more."""
    import vistoken.kernels.attention as module

    model, x = vistoken.wrap(build(), "mctf:r=3"), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        monkeypatch.setattr(module, "log_normalizer", None)
        torch.testing.assert_close(model(x), expected)


def test_an_empty_batch(chain):
    model = vistoken.wrap(build(), "tome:r=0")
    with torch.no_grad():
        assert model(torch.randn(0, 3, 64, 64)).shape == (0, 7)


def test_results_of_a_graph_are_copied_in_their_own_structure():
    from collections import namedtuple

    from vistoken.graphs import _copied

    pair = namedtuple("pair", "a b")
    given = {"x": pair(torch.ones(2), [torch.zeros(1), None])}
    copied = _copied(given)
    assert isinstance(copied["x"], pair) and copied["x"].b[1] is None
    assert torch.equal(copied["x"].a, given["x"].a) and copied["x"].a is not given["x"].a
