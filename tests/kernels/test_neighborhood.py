"""Neighborhood attention in torch operators against loops, and what the operators promise."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from neighborhood_oracle import attend, dense_mask, keys_of

from vistoken.errors import ConfigError
from vistoken.kernels import neighborhood_ops as ops
from vistoken.kernels.neighborhood import na1d, na2d, na3d
from vistoken.kernels.neighborhood_windows import inverse_bounds, window_bounds

CALL = {1: na1d, 2: na2d, 3: na3d}

ROWS = [
    ((7, 3), [(0, 2), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6), (4, 6)]),
    ((7, 4), [(0, 3), (0, 3), (0, 3), (1, 4), (2, 5), (3, 6), (3, 6)]),
    ((8, 5, 2), [(0, 4)] * 2 + [(1, 5)] * 2 + [(3, 7)] * 4),
    ((8, 4, 4), [(0, 3)] * 4 + [(4, 7)] * 4),
    ((10, 4, 3), [(0, 3)] * 3 + [(2, 5)] * 3 + [(5, 8)] * 3 + [(6, 9)]),
    ((7, 3, 1, True), [(0, 0), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)]),
    ((8, 4, 2, True), [(0, 0), (0, 1), (0, 2), (0, 3), (2, 4), (2, 5), (4, 6), (4, 7)]),
]


@pytest.mark.parametrize(("problem", "rows"), ROWS, ids=str)
def test_windows_of_the_worked_examples(problem, rows):
    length, window, stride, causal = (*problem, 1, False)[:4] if len(problem) == 2 else (
        *problem, False)[:4]  # fmt: skip
    low, high = window_bounds(length, window, stride, causal)
    assert [(a, b - 1) for a, b in zip(low, high, strict=True)] == rows
    assert [keys_of(p, length, window, stride, 1, causal) for p in range(length)] == [
        list(range(a, b + 1)) for a, b in rows
    ]


@pytest.mark.parametrize(
    ("length", "window", "options", "means"),
    [
        (7, 3, {}, [1, 1, 2, 3, 4, 5, 5]),
        (7, 4, {}, [1.5, 1.5, 1.5, 2.5, 3.5, 4.5, 4.5]),
        (8, 5, {"stride": 2}, [2, 2, 3, 3, 5, 5, 5, 5]),
        (10, 3, {"dilation": 3}, [3, 4, 5, 3, 4, 5, 6, 4, 5, 6]),
        (7, 3, {"is_causal": True}, [0, 0.5, 1, 2, 3, 4, 5]),
        (8, 4, {"stride": 2, "is_causal": True}, [0, 0.5, 1, 1.5, 3, 3.5, 5, 5.5]),
        (11, 3, {"dilation": 3}, [3, 4, 5, 3, 4, 5, 6, 7, 5, 6, 7]),
        (12, 5, {"stride": 5, "dilation": 2}, [4, 5] * 5 + [6, 7]),
    ],
)
def test_equal_logits_give_the_mean_position(length, window, options, means):
    zero = torch.zeros(1, length, 1, 4, dtype=torch.float64)
    value = torch.arange(length, dtype=torch.float64).view(1, length, 1, 1).expand_as(zero)
    out, lse = na1d(zero, zero, value, window, **options, return_lse=True)
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor(means, dtype=torch.float64))
    if "is_causal" not in options:
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(window)))


def wave(shape, a):
    return torch.sin(a * torch.arange(math.prod(shape), dtype=torch.float64)).view(shape)


@pytest.mark.parametrize(
    ("grid", "options", "extra", "sums"),
    [
        ((5, 6), {"kernel_size": 3}, 0, (-0.6563136551, 0.5979496916, 141.6157558521)),
        ((7, 7), {"kernel_size": 3, "dilation": 2}, 0,
         (0.1290896404, 5.7087874879, 231.2391841007)),
        ((6, 6), {"kernel_size": 4, "stride": 2}, 0, (0.0431693670, 1.0832231418, 210.9106676844)),
        ((5, 5), {"kernel_size": 3, "is_causal": True}, 0,
         (29.8121330401, 27.3821725809, 86.7371742986)),
        ((5, 6), {"kernel_size": 3}, 3, (1.6759281403, 0.8987506051, 159.0333874972)),
    ],
)  # fmt: skip
def test_published_sums(grid, options, extra, sums):
    q, k, v = (wave((1, *grid, 2, 4), a) for a in (0.7, 1.3, 0.31))
    more = {}
    if extra:
        shape = (1, extra, 2, 4)
        more = {"additional_keys": wave(shape, 0.9), "additional_values": wave(shape, 0.5)}
    out, lse = na2d(q, k, v, **options, **more, return_lse=True)
    got = out.sum().item(), out.square().sum().item(), lse.sum().item()
    assert got == pytest.approx(sums, abs=2e-10)


def test_inverse_neighborhood_is_exact():
    for length in range(1, 22):
        for window in range(1, length + 1):
            for stride in range(1, window + 1):
                for causal in (False, True):
                    mask = torch.zeros(length, length, dtype=torch.bool)
                    for i, (a, b) in enumerate(
                        zip(*window_bounds(length, window, stride, causal), strict=True)
                    ):
                        mask[i, a:b] = True
                    low, high = inverse_bounds(length, window, stride, causal)
                    for j in range(length):
                        expected = mask[:, j].nonzero().flatten().tolist()
                        assert list(range(low[j], high[j])) == expected


def draw_problem(seed):
    """Grid, window, stride, dilation and causality of a random problem with ragged groups."""
    rng = random.Random(seed)
    rank = 1 + seed % 3
    axes = []
    for _ in range(rank):
        window, dilation = rng.randint(1, 5 if rank < 3 else 3), rng.randint(1, 3)
        stride = rng.choice([1, rng.randint(1, window)])
        length = window * dilation + rng.randint(0, 5 if rank < 3 else 2)
        axes.append((length, window, stride, dilation, rng.random() < 0.3))
    return tuple(zip(*axes, strict=True)), rng


@pytest.mark.parametrize("seed", range(36))
def test_random_problems_and_their_gradients(seed):
    (grid, window, stride, dilation, causal), rng = draw_problem(seed)
    torch.manual_seed(seed)
    key_heads = rng.choice([1, 2])
    heads = key_heads * rng.choice([1, 3])
    dim, value_dim = rng.choice([3, 24]), rng.choice([3, 5])
    q = torch.randn(2, *grid, heads, dim, dtype=torch.float64)
    k = torch.randn(2, *grid, key_heads, dim, dtype=torch.float64)
    v = torch.randn(2, *grid, key_heads, value_dim, dtype=torch.float64)
    inputs = [q, k, v]
    extra = (None, None)
    if seed % 2:
        extra = tuple(
            torch.randn(2, 3, key_heads, d, dtype=torch.float64) for d in (dim, value_dim)
        )
        inputs += extra
    rpb = None
    if seed % 4 == 0:
        causal = (False,) * len(grid)
        rpb = torch.randn(heads, *(2 * w - 1 for w in window), dtype=torch.float64)
        inputs.append(rpb)
    for x in inputs:
        x.requires_grad_()
    out, lse = CALL[len(grid)](
        q, k, v, window, stride, dilation, causal, 0.4, *extra, rpb, return_lse=True
    )
    expected, expected_lse = attend(q, k, v, window, stride, dilation, causal, 0.4, extra, rpb)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)
    up, up_lse = torch.randn_like(out), torch.randn_like(lse)
    if rpb is not None:
        # The oracle's bias is no function of the table to autograd.
        inputs.pop()
    got = torch.autograd.grad([out, lse], inputs, [up, up_lse])
    want = torch.autograd.grad([expected, expected_lse], inputs, [up, up_lse])
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"dilation": (1, 2)}, {"stride": (1, 2)}], ids=str)
def test_gradcheck_with_bias(options):
    torch.manual_seed(0)
    shape = (1, 4, 5, 2, 2)
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))
    rpb = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, rpb):
        return na2d(q, k, v, (3, 2), rpb=rpb, return_lse=True, **options)

    assert torch.autograd.gradcheck(call, (q, k, v, rpb))


def test_float32_is_close_to_float64():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 14, 15, 3, 48) for _ in range(3))
    exact = na2d(q.double(), k.double(), v.double(), 7)
    assert (na2d(q, k, v, 7) - exact).norm() / exact.norm() < 1e-5
    half = na2d(q.bfloat16(), k.bfloat16(), v.bfloat16(), 7)
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() / exact.norm() < 1e-2


def test_whole_windows_are_full_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 5, 3, 8, dtype=torch.float64) for _ in range(3))
    flat = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    full = F.scaled_dot_product_attention(*flat).transpose(1, 2).view_as(q)
    torch.testing.assert_close(na2d(q, k, v, (4, 5)), full)
    torch.testing.assert_close(na2d(q, k, v, (4, 5), stride=(2, 3)), full)
    torch.testing.assert_close(na2d(q, k, v, (4, 5), return_lse=True)[0], full)
    causal = na1d(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), 20, is_causal=True)
    expected = F.scaled_dot_product_attention(*flat, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(causal, expected)


def test_whole_windows_take_extra_tokens_and_groups():
    torch.manual_seed(0)
    q = torch.randn(2, 4, 5, 4, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 4, 5, 2, 8, dtype=torch.float64) for _ in range(2))
    extra = tuple(torch.randn(2, 3, 2, 8, dtype=torch.float64) for _ in range(2))
    out = na2d(q, k, v, (4, 5), scale=0.2, additional_keys=extra[0], additional_values=extra[1])
    on, off = (1, 1), (False, False)
    torch.testing.assert_close(out, attend(q, k, v, (4, 5), on, on, off, 0.2, extra)[0])


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 6, 7, 1, 4, dtype=torch.float64) for _ in range(3))
    on, off = (1, 1), (False, False)
    torch.testing.assert_close(
        na2d(q, k, v, 3, scale=scale), attend(q, k, v, (3, 3), on, on, off, scale)[0]
    )


def test_views_of_a_packed_projection():
    torch.manual_seed(0)
    packed = torch.randn(2, 6, 7, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    views = packed.unbind(3)
    copies = [x.detach().contiguous().requires_grad_() for x in views]
    out = na2d(*views, 3)
    assert out.is_contiguous()
    assert torch.equal(out, na2d(*copies, 3))
    up = torch.randn(2, 7, 6, 8, 2, dtype=torch.float64).permute(0, 2, 1, 4, 3)
    (grad,) = torch.autograd.grad(out, packed, up)
    grads = torch.autograd.grad(na2d(*copies, 3), copies, up)
    assert torch.equal(grad, torch.stack(grads, 3))


def test_steps_split_by_memory_change_nothing(monkeypatch):
    from vistoken.kernels import neighborhood_reference

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, 11, 2, 4, dtype=torch.float64) for _ in range(3))
    whole = na2d(q, k, v, 3, dilation=(1, 2))
    monkeypatch.setattr(neighborhood_reference, "MAX_SCORES", 300)
    torch.testing.assert_close(na2d(q, k, v, 3, dilation=(1, 2)), whole)


def test_merging_with_extra_tokens_by_lse():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 6, 6, 2, 4, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    ek, ev = (torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in "kv")
    near, near_lse = na2d(q, k, v, 3, return_lse=True)
    score = torch.einsum("bxyhd,behd->bxyhe", q, ek) * 0.5
    far = torch.einsum("bxyhe,behd->bxyhd", score.softmax(-1), ev)
    part = (score.logsumexp(-1) - near_lse).sigmoid()[..., None]
    merged = near - part * (near - far)
    fused = na2d(q, k, v, 3, additional_keys=ek, additional_values=ev)
    torch.testing.assert_close(fused, merged)
    up = torch.randn_like(fused)
    inputs = q, k, v, ek, ev
    for mine, other in zip(torch.autograd.grad(fused, inputs, up),
                           torch.autograd.grad(merged, inputs, up), strict=True):  # fmt: skip
        torch.testing.assert_close(mine, other)


def test_mask_has_the_published_count_and_sum():
    def sums(grid, window, stride=(1, 1), dilation=(1, 1), causal=(False, False)):
        mask = dense_mask(grid, window, stride, dilation, causal).long()
        return mask.sum().item(), (mask * torch.arange(len(mask))).sum().item()

    assert sums((6, 5), (4, 2)) == (240, 3208)
    assert sums((9, 10), (3, 3), dilation=(3, 2)) == (810, 36045)
    assert sums((13, 11), (5, 4), (3, 2), (2, 2), (False, True)) == (2015, 144200)


BAD = [
    ({"kernel_size": 0}, "kernel_size is 0"),
    ({"kernel_size": 7}, "axis 0 has 6"),
    ({"kernel_size": (3, 3, 3)}, "3 entries"),
    ({"kernel_size": 3.5}, "kernel_size"),
    ({"kernel_size": 3, "stride": 4}, "stride is 4"),
    ({"kernel_size": 3, "dilation": 3}, "spans 9"),
    ({"kernel_size": 3, "dilation": 0}, "dilation is 0"),
    ({"kernel_size": 3, "is_causal": 1}, "is_causal"),
    ({"kernel_size": 3, "rpb": torch.zeros(2, 5, 4)}, "rpb has shape"),
    ({"kernel_size": 3, "rpb": torch.zeros(2, 5, 5), "is_causal": True}, "is_causal"),
    ({"kernel_size": 3, "additional_keys": torch.zeros(1, 2, 2, 4)}, "together"),
    (
        {"kernel_size": 3, "additional_keys": torch.zeros(1, 2, 1, 4),
         "additional_values": torch.zeros(1, 2, 2, 4)},
        "additional_keys has shape",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda x: str(x)[:40])
def test_wrong_settings_are_refused(options, message):
    q = torch.zeros(1, 6, 7, 2, 4)
    with pytest.raises((ConfigError, TypeError), match=message):
        na2d(q, q, q, **options)


def test_wrong_tensors_are_refused():
    q = torch.zeros(1, 6, 7, 3, 4)
    with pytest.raises(ConfigError, match="q has 5 axes"):
        na3d(q, q, q, 3)
    with pytest.raises(ConfigError, match="same batch and grid"):
        na2d(q, q[:, :5], q, 3)
    with pytest.raises(ConfigError, match="no multiple"):
        na2d(q, q[..., :2, :], q[..., :2, :], 3)
    with pytest.raises(ConfigError, match="width of q"):
        na2d(q, q[..., :2], q, 3)
    with pytest.raises(ConfigError, match=r"k is torch\.float64"):
        na2d(q, q.double(), q, 3)
    with pytest.raises(ConfigError, match="floating type"):
        na2d(q.int(), q.int(), q.int(), 3)


def test_vmap_is_refused():
    q = torch.zeros(2, 1, 6, 7, 2, 4)
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda x: na2d(x, x, x, 3))(q)


def test_autocast_decides_the_type():
    q = torch.randn(1, 6, 7, 2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert na2d(q, q, q, 3).dtype == torch.bfloat16
        assert na2d(q.double(), q.double(), q.double(), 3).dtype == torch.float64


class Model(torch.nn.Module):
    def forward(self, q):
        out, lse = na2d(q, q, q, 3, dilation=2, return_lse=True)
        return out * lse[..., None]


def test_compiles_without_a_break_and_exports():
    torch.manual_seed(0)
    q = torch.randn(2, 6, 7, 2, 4, requires_grad=True)
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(q), Model()(q))
    mine = torch.autograd.grad(compiled(q).sum(), q)
    other = torch.autograd.grad(Model()(q).sum(), q)
    torch.testing.assert_close(mine, other)
    compiled(torch.randn(3, 8, 9, 2, 4))
    program = torch.export.export(Model(), (q.detach(),))
    torch.testing.assert_close(program.module()(q), Model()(q))


def test_operator_registration():
    from vistoken.kernels.neighborhood_ops import neighborhood

    q = torch.randn(1, 4, 5, 2, 4, requires_grad=True)
    turned = torch.randn(1, 2, 5, 4, 4).transpose(1, 3).requires_grad_()
    extra = torch.randn(1, 3, 2, 4, requires_grad=True)
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    args = (q, turned, turned, extra, extra, rpb, [3, 3], [1, 1], [1, 1], [False, False], 0.5)
    torch.library.opcheck(neighborhood, args)


def test_empty_batches():
    q = torch.zeros(0, 4, 5, 2, 4, requires_grad=True)
    out = na2d(q, q, q, 3)
    assert out.shape == q.shape
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


def test_flops_are_the_useful_ones():
    from torch.utils.flop_counter import FlopCounterMode

    import vistoken.kernels.neighborhood_flops  # noqa: F401

    q = torch.randn(2, 6, 7, 2, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = na2d(q, q, q, (3, 2))
    assert counter.get_total_flops() == 4 * 2 * 42 * 2 * 4 * 6
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 10 * 2 * 42 * 2 * 4 * 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_into_the_operators(dtype):
    torch.manual_seed(0)
    leaves = [torch.randn(1, 5, 6, 2, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    rpb = torch.randn(2, 5, 5, requires_grad=True)

    def run(on):
        with torch.autocast("cpu", dtype=dtype, enabled=on):
            out, lse = na2d(*leaves, 3, rpb=rpb, return_lse=True)
            return out, lse, *torch.autograd.grad(out.float().sum() + lse.sum(), [*leaves, rpb])

    for mine, other in zip(run(True), run(False), strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_no_extra_tokens_are_none(monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 5, 2, 8, requires_grad=True) for _ in range(3))
    extra = torch.zeros(1, 0, 2, 8, requires_grad=True)
    seen = []
    monkeypatch.setattr(ops, "neighborhood", lambda *args: seen.append(args) or (None, None))
    na2d(q, k, v, 3, additional_keys=extra, additional_values=extra)
    monkeypatch.undo()
    assert seen[0][3] is None and seen[0][4] is None, "the kernels cannot walk no extra tokens"
    out = na2d(q, k, v, 3, additional_keys=extra, additional_values=extra)
    assert torch.equal(out, na2d(q, k, v, 3))
    assert all(g is not None for g in torch.autograd.grad(out.sum(), (q, k, v)))
    with pytest.raises(ConfigError, match="additional_values has shape"):
        na2d(q, k, v, 3, additional_keys=extra, additional_values=extra[..., :3])


def test_meta_tensors_have_no_autocast():
    q, k, v = (torch.empty(1, 5, 6, 2, 8, device="meta", requires_grad=True) for _ in range(3))
    out = na2d(q, k, v, 3)
    assert out.shape == q.shape and out.is_meta
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.shape == q.shape
