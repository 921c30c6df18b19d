"""Routed attention in torch operators against a dense mask, and what the operators promise."""

import math
import random

import pytest
import torch
from naive_routing import attend, multiplicity, region_ids

from vistoken.errors import ConfigError
from vistoken.kernels import routing_ops as ops
from vistoken.kernels import routing_reference as reference
from vistoken.kernels.routing import block_list_attention, routed_attention
from vistoken.kernels.routing_regions import (
    count_regions,
    inside,
    inverse_lists,
    merge,
    partition,
    region_means,
    route,
    route_op,
)

DOUBLE = torch.float64


def lists(batch, heads, regions, total, listed, rng):
    """Distinct regions in random order, with a legal entry, sometimes with numbers to skip."""
    index = torch.tensor(
        [[[rng.sample(range(total), listed) for _ in range(regions)] for _ in range(heads)]
         for _ in range(batch)], dtype=torch.int64,
    )  # fmt: skip
    return index


def leaves(*shapes):
    return [torch.randn(shape, dtype=DOUBLE, requires_grad=True) for shape in shapes]


def agree(found, wanted, inputs, up, up_lse):
    (out, lse), (exact, exact_lse) = found, wanted
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-11)
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=1e-11)
    finite = torch.isfinite(exact_lse)
    got = torch.autograd.grad((out * up).sum() + (lse * up_lse)[finite].sum(), inputs)
    want = torch.autograd.grad(
        (exact * up).sum() + (exact_lse * up_lse)[finite].sum(), inputs, allow_unused=True
    )
    for mine, other in zip(got, want, strict=True):
        other = torch.zeros_like(mine) if other is None else other
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


def zero_keys(index, grid, size, times, n_queries):
    """Zero keys that each query gets from the ragged regions it lists, `[B, H, N]`."""
    rows, columns = count_regions(grid, size)
    whole = torch.full((rows * columns,), size[0] * size[1])
    for region in region_ids(grid, size):
        whole[region] -= 1
    ids = region_ids(grid, size)
    b, h = times.shape[:2]
    lack = whole[index.expand(b, h, -1, -1)].sum(-1)
    return lack[:, :, ids].double()


@pytest.mark.parametrize("seed", range(30))
def test_random_regions_and_their_gradients(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    grid = rng.randint(2, 9), rng.randint(2, 9)
    size = rng.randint(1, grid[0]), rng.randint(1, grid[1])
    regions = math.prod(count_regions(grid, size))
    listed = rng.randint(1, regions)
    key_heads = rng.choice([1, 2])
    heads, batch = key_heads * rng.choice([1, 3]), 2
    index = lists(rng.choice([1, batch]), rng.choice([1, heads]), regions, regions, listed, rng)
    q, k, v = leaves(
        (batch, *grid, heads, 4), (batch, *grid, key_heads, 4), (batch, *grid, key_heads, 5)
    )
    inputs, extra, more = [q, k, v], None, {}
    if seed % 2:
        extra = leaves((batch, 3, key_heads, 4), (batch, 3, key_heads, 5))
        inputs += extra
        more = {"additional_keys": extra[0], "additional_values": extra[1]}
    pads = "attend" if seed % 3 == 0 else "mask"
    found = routed_attention(
        q, k, v, index, size, scale=0.4, pad_keys=pads, **more, return_lse=True
    )
    ids = region_ids(grid, size)
    times = multiplicity(index, ids, ids, batch, heads)
    zeros = zero_keys(index, grid, size, times, len(ids)) if pads == "attend" else None
    flat = [x.flatten(1, 2) for x in (q, k, v)]
    wanted = tuple(
        x.unflatten(1, grid) for x in attend(*flat, times, 0.4, extra=extra, zeros=zeros)
    )
    agree(found, wanted, inputs, torch.randn_like(found[0]), torch.randn_like(found[1]))


@pytest.mark.parametrize("seed", range(24))
def test_random_block_lists_and_their_gradients(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    length, keys = rng.randint(1, 40), rng.randint(1, 40)
    block = rng.randint(1, 12), rng.randint(1, 12)
    regions, total = -(-length // block[0]), -(-keys // block[1])
    listed = rng.randint(1, total)
    heads, batch = 2, 2
    index = lists(rng.choice([1, 2]), rng.choice([1, 2]), regions, total, listed, rng)
    if seed % 4 == 1:
        index[..., -1] = rng.choice([-1, total, total + 7])  # skipped
    if seed % 4 == 2:
        index[..., 0] = index[..., -1]  # listed twice
    counts = None
    if seed % 2:
        counts = torch.tensor([rng.randint(0, listed) for _ in range(index[..., 0].numel())])
        counts = counts.view(index.shape[:3])
    causal = seed % 3 == 0
    q, k, v = leaves((batch, length, heads, 4), (batch, keys, 1, 4), (batch, keys, 1, 3))
    found = block_list_attention(q, k, v, index, block, counts, causal, scale=0.3, return_lse=True)
    own, other = [i // block[0] for i in range(length)], [i // block[1] for i in range(keys)]
    times = multiplicity(index, own, other, batch, heads, counts)
    if causal:
        ahead = torch.arange(keys)[None] > torch.arange(length)[:, None] + keys - length
        times = times.masked_fill(ahead, 0.0)
    wanted = attend(q, k, v, times, 0.3)
    agree(found, wanted, [q, k, v], torch.randn_like(found[0]), torch.randn_like(found[1]))
    if causal or counts is not None:
        assert torch.isfinite(found[0]).all()


def test_steps_do_not_change_the_result(monkeypatch):
    torch.manual_seed(0)
    rng = random.Random(0)
    q, k, v = leaves(*[(2, 6, 7, 2, 4)] * 3)
    index = lists(2, 1, 12, 12, 3, rng)

    def run():
        out = routed_attention(q, k, v, index, 2)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    whole = run()
    monkeypatch.setattr(reference, "MAX_GATHERED", 1)
    for a, b in zip(whole, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_reference_is_differentiable_itself():
    torch.manual_seed(0)
    q, k, v = leaves(*[(1, 5, 4, 2, 3)] * 3)
    index = lists(1, 2, 6, 6, 2, random.Random(1)).int()
    routing = ops._routing((2, 2), (2, 2), False, False)
    out, lse = reference.forward(q, k, v, index, None, None, None, routing, 0.5)
    noise = torch.randn_like(out), torch.randn_like(lse)
    wanted = torch.autograd.grad((out, lse), (q, k, v), noise)
    found = reference.backward(*noise, q, k, v, out, lse, index, None, None, None, routing, 0.5)
    for a, b in zip(found[:3], wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_all_regions_is_full_attention():
    torch.manual_seed(0)
    q, k, v = leaves(*[(2, 5, 7, 2, 4)] * 3)
    regions = math.prod(count_regions((5, 7), (2, 3)))
    index = torch.arange(regions).expand(1, regions, regions)
    flat = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    full = torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2)
    out = routed_attention(q, k, v, index, (2, 3))
    torch.testing.assert_close(out.flatten(1, 2), full, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_any_scale(scale):
    torch.manual_seed(0)
    q, k, v = leaves(*[(1, 4, 4, 1, 4)] * 3)
    index = torch.tensor([[[0, 3], [1, 2], [2, 0], [3, 1]]])
    ids = region_ids((4, 4), (2, 2))
    times = multiplicity(index[:, None], ids, ids, 1, 1)
    wanted, _ = attend(*(x.flatten(1, 2) for x in (q, k, v)), times, scale)
    out = routed_attention(q, k, v, index, 2, scale=scale)
    torch.testing.assert_close(out.flatten(1, 2), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 6), (3, 4)])
def test_partition_and_merge(size):
    x = torch.randn(2, 5, 6, 3, 4)
    parts = partition(x, size)
    assert torch.equal(merge(parts, (5, 6), size), x)
    ids, on = region_ids((5, 6), size), inside((5, 6), size, x.device)
    assert parts.shape[2:4] == on.shape
    for region in range(on.shape[0]):
        own = [i for i, r in enumerate(ids) if r == region]
        tokens = x.flatten(1, 2)[:, own].transpose(1, 2)
        assert torch.equal(parts[:, :, region][:, :, on[region]], tokens)
        assert (parts[:, :, region][:, :, ~on[region]] == 0).all()


def test_inverse_lists():
    rng = random.Random(0)
    index = lists(2, 3, 7, 5, 3, rng)
    index[0, 0, 2] = torch.tensor([4, 4, -1])
    counts = torch.randint(0, 4, (2, 3, 7))
    found, starts = inverse_lists(index.int(), counts, 5)
    for b in range(2):
        for h in range(3):
            for region in range(5):
                first, end = starts[b, h, region : region + 2].tolist()
                wanted = [
                    r for r in range(7) for place in range(3)
                    if place < counts[b, h, r] and index[b, h, r, place] == region
                ]  # fmt: skip
                assert found[b, h, first:end].tolist() == wanted


@pytest.mark.parametrize(("grid", "size"), [((8, 6), (2, 3)), ((7, 9), (3, 4)), ((5, 5), (5, 2))])
def test_region_means_and_routing(grid, size):
    torch.manual_seed(0)
    q, k = (torch.randn(2, *grid, 6, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    ids = torch.tensor(region_ids(grid, size))
    total = int(ids.max()) + 1
    means = [
        torch.stack([x.flatten(1, 2)[:, ids == r].mean(1) for r in range(total)], 1)
        for x in (q, k)
    ]  # fmt: skip
    torch.testing.assert_close(region_means(q, size), means[0])
    scores = means[0] @ means[1].transpose(1, 2)
    heads = [x.unflatten(-1, (3, 2)) for x in (q, k)]
    found = route(*heads, size, 3)
    assert found.dtype == torch.int32 and not found.requires_grad
    assert torch.equal(found[:, 0].long(), scores.topk(min(3, total)).indices)
    assert route(*heads, size, 99).shape == (2, 1, total, total)
    own = route(*heads, size, 1, per_head=True)
    for head in range(3):
        part = slice(2 * head, 2 * head + 2)
        scores = means[0][..., part] @ means[1][..., part].transpose(1, 2)
        assert torch.equal(own[:, head, :, 0].long(), scores.argmax(-1))
    few = route(heads[0], heads[1][..., :1, :], size, 2)
    assert torch.equal(few, route(heads[0], heads[1][..., :1, :].expand_as(heads[0]), size, 2))


def test_float32_stays_close_and_half_computes_in_float32():
    torch.manual_seed(0)
    exact = [torch.randn(1, 6, 6, 2, 8, dtype=DOUBLE) for _ in range(3)]
    index = torch.randint(0, 9, (1, 9, 2))
    wanted = routed_attention(*exact, index, 2)
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        out, lse = routed_attention(*(x.to(dtype) for x in exact), index, 2, return_lse=True)
        assert out.dtype == dtype and lse.dtype == torch.float32
        assert (out.double() - wanted).norm() / wanted.norm() < limit


def test_autocast():
    q, k, v = (torch.randn(1, 4, 4, 1, 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = routed_attention(q, k, v, torch.zeros(1, 4, 1, dtype=torch.long), 2)
    assert out.dtype == torch.bfloat16


def test_meta_tensors():
    q, k, v = (torch.empty(1, 5, 6, 2, 8, device="meta", requires_grad=True) for _ in range(3))
    index = torch.empty(1, 9, 2, dtype=torch.long, device="meta")
    out = routed_attention(q, k, v, index, 2)
    assert out.shape == q.shape and out.is_meta
    assert torch.autograd.grad(out.sum(), k)[0].shape == k.shape


def test_operator_checks_pass():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 6, 2, 4, requires_grad=True) for _ in range(3))
    extra = [torch.randn(1, 2, 2, 4, requires_grad=True) for _ in range(2)]
    index = torch.randint(0, 6, (1, 1, 6, 2), dtype=torch.int32)
    args = (q, k, v, index, None, *extra, [2, 2], [2, 2], False, False, 0.5, False)
    torch.library.opcheck(ops.routed, args)
    torch.library.opcheck(route_op, (q.detach(), k.detach(), [2, 2], 2, True))


def test_compiles_without_graph_break_and_exports():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 6, 5, 2, 4, requires_grad=True) for _ in range(3))

    class Call(torch.nn.Module):
        def forward(self, q, k, v):
            index = route(q, k, (2, 2), 2)
            return routed_attention(q, k, v, index, 2, pad_keys="attend")

    plain = Call()(q, k, v)
    compiled = torch.compile(Call(), fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(compiled, plain)
    wanted = torch.autograd.grad(plain.square().sum(), (q, k, v))
    for a, b in zip(torch.autograd.grad(compiled.square().sum(), (q, k, v)), wanted, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        exported = torch.export.export(Call(), (q.detach(), k.detach(), v.detach()))
        torch.testing.assert_close(exported.module()(q, k, v), plain)


def call(**changes):
    x = torch.randn(2, 6, 5, 2, 4)
    given = {"q": x, "k": x, "v": x, "index": torch.zeros(2, 9, 1, dtype=torch.long)}
    given |= {"region_size": 2}
    return routed_attention(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region_size": 0}, "region_size=0"),
        ({"region_size": (2, 2, 2)}, "region_size"),
        ({"region_size": (2, True)}, "region_size"),
        ({"region_size": (2, 6)}, "at most the grid"),
        ({"pad_keys": "drop"}, "pad_keys='drop'"),
        ({"index": torch.zeros(2, 8, 1, dtype=torch.long)}, "there are 9 regions"),
        ({"index": torch.zeros(2, 9, 0, dtype=torch.long)}, "one entry at least"),
        ({"index": torch.zeros(2, 9, 1)}, "integers"),
        ({"index": torch.zeros(2, 9, dtype=torch.long)}, "integers"),
        ({"index": torch.zeros(3, 9, 1, dtype=torch.long)}, "for 3 images"),
        ({"index": torch.zeros(2, 3, 9, 1, dtype=torch.long)}, "and 3 heads"),
        ({name: torch.randn(2, 5, 6, 2, 4) for name in "kv"}, "k has grid"),
        ({"k": torch.randn(2, 6, 5, 2, 3)}, "3 wide"),
        ({"v": torch.randn(2, 6, 5, 1, 4)}, "same tokens and heads"),
        ({"q": torch.randn(2, 6, 5, 3, 4)}, "no multiple"),
        ({"q": torch.randn(2, 6, 5, 2, 4).double()}, "float64"),
        ({"q": torch.randn(2, 30, 2, 4)}, "4 axes"),
        ({"additional_keys": torch.randn(2, 1, 2, 4)}, "given together"),
        ({"additional_keys": torch.randn(2, 1, 2, 4),
          "additional_values": torch.randn(2, 2, 2, 4)}, "additional_values"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, dict) else given,
)  # fmt: skip
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": 0}, "block=0"),
        ({"is_causal": 1}, "is_causal"),
        ({"counts": torch.ones(2, 3, dtype=torch.long)}, "counts"),
        ({"counts": torch.ones(1, 4)}, "counts"),
        ({"index": torch.zeros(1, 5, 1, dtype=torch.long)}, "there are 4 regions"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, dict) else given,
)
def test_wrong_block_lists_are_named(changes, message):
    x = torch.randn(1, 7, 1, 4)
    given = {"q": x, "k": x, "v": x, "index": torch.zeros(1, 4, 1, dtype=torch.long), "block": 2}
    with pytest.raises(ConfigError, match=message):
        block_list_attention(**{**given, **changes})


def test_vmap_is_refused():
    q = torch.randn(3, 1, 4, 4, 1, 4)
    index = torch.zeros(1, 4, 1, dtype=torch.long)
    with pytest.raises(NotImplementedError, match="batch axis"):
        torch.vmap(lambda x: routed_attention(x, x, x, index, 2))(q)


def test_numbers_that_are_no_region_are_skipped_however_large():
    q, k, v = (torch.randn(1, 8, 2, 4) for _ in range(3))
    large = block_list_attention(q, k, v, torch.tensor([[[0, 2**32 + 1], [-(2**32), 1]]]), block=4)
    small = block_list_attention(q, k, v, torch.tensor([[[0, -1], [-1, 1]]]), block=4)
    assert torch.equal(large, small)


def test_no_queries_give_nothing_and_no_gradient():
    q = torch.randn(2, 0, 2, 4, requires_grad=True)
    k = torch.randn(2, 9, 2, 4, requires_grad=True)
    index = torch.zeros(1, 0, 1, dtype=torch.int32)
    out, lse = block_list_attention(q, k, k, index, block=4, return_lse=True)
    assert out.shape == (2, 0, 2, 4) and lse.shape == (2, 0, 2)
    (out.sum() + lse.sum()).backward()
    assert q.grad.shape == q.shape and torch.equal(k.grad, torch.zeros_like(k))
