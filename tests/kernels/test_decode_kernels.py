"""Kernels of a decoding step against plain loops and float64, in Triton's interpreter."""

import math

import pytest
import torch
import torch.nn.functional as F

from vistoken.kernels.decode_attention import decode_attention_reference
from vistoken.kernels.decode_linear import Tile, decode_linear, fits, tiles

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)


def naive_linear(x, weights, biases, norm, residual, gated):
    h = x.double()
    if norm is not None:
        h = h / (h.pow(2).mean(-1, keepdim=True) + norm[1]).sqrt() * norm[0].double()
    parts = []
    for i, weight in enumerate(weights):
        y = h @ weight.double().T
        parts.append(y if biases is None else y + biases[i].double())
    y = F.silu(parts[0]) * parts[1] if gated else torch.cat(parts, -1)
    return y if residual is None else y + residual.double()


LINEAR = [
    # batch, width, counts, bias, norm, residual, gated
    (1, 80, (64, 32, 32), True, True, False, False),
    (1, 96, (40,), False, False, True, False),
    (1, 1504, (24, 24), False, True, False, True),
    (1, 64, (50,), False, True, False, False),
    (3, 80, (64, 32, 32), True, True, False, False),
    (5, 304, (40,), False, False, True, False),
    (16, 96, (24, 24), True, True, False, True),
    (2, 64, (50,), False, True, False, False),
]


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_is_the_product(case):
    batch, width, counts, bias, norm, residual, gated = case
    torch.manual_seed(0)
    x = torch.randn(batch, width)
    weights = [torch.randn(n, width) / width**0.5 for n in counts]
    biases = [torch.randn(n) for n in counts] if bias else None
    rms = (torch.randn(width), 1e-5) if norm else None
    rest = torch.randn(batch, sum(counts)) if residual else None
    wanted = naive_linear(x, weights, biases, rms, rest, gated)
    for tile in (None, *tiles(batch, "gate" if gated else "back" if residual else "qkv")):
        assert tile is None or fits(tile, weights, gated) or len(weights) == 3
        got = decode_linear(x, weights, biases, rms, rest, gated, tile)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


def test_tiles_do_not_straddle_two_weights():
    tile = Tile(8, 64, 4)
    assert not fits(tile, [torch.randn(9, 32), torch.randn(16, 32)], False)
    assert not fits(tile, [torch.randn(32, 16).T], False)
    assert fits(tile, [torch.randn(16, 32), torch.randn(9, 32)], False)
    assert fits(tile, [torch.randn(9, 32), torch.randn(9, 32)], True)
    assert not tiles(17, "qkv") and tiles(16, "gate") and tiles(1, "head")


def naive_attention(qkv, cos, sin, keys, values, lengths, scale):
    batch, groups, _, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * groups
    out = torch.zeros(batch, heads, dim, dtype=torch.float64)
    for b in range(batch):
        rows = qkv[b].double().view(-1, dim)
        turned = torch.zeros_like(rows)
        half = dim // 2
        for i in range(half):
            c, s = cos[b, i].double(), sin[b, i].double()
            turned[:, i] = rows[:, i] * c - rows[:, i + half] * s
            turned[:, i + half] = rows[:, i + half] * c + rows[:, i] * s
        for h in range(heads):
            g = h // (heads // groups)
            n = int(lengths[b])
            k = torch.cat([keys[b, g, :n].double(), turned[heads + g][None]])
            v = torch.cat([values[b, g, :n].double(), rows[heads + groups + g][None]])
            out[b, h] = ((k @ turned[h]) * scale).softmax(0) @ v
    return out.flatten(1)


ATTENTION = [
    # batch, heads, groups, dim, capacity, lengths
    (1, 4, 4, 32, 200, [150]),
    (1, 4, 1, 16, 64, [0]),
    (2, 6, 2, 48, 320, [319, 64]),
    (3, 2, 2, 64, 130, [1, 63, 128]),
]


@pytest.mark.parametrize("kind", ["reference", "kernel"])
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_reads_real_keys_only(case, kind):
    from vistoken.kernels.triton_decode_attention import decode_attention_triton

    batch, heads, groups, dim, capacity, rows = case
    torch.manual_seed(0)
    qkv = torch.randn(batch, (heads + 2 * groups) * dim)
    angle = torch.rand(batch, dim // 2) * 6
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    lengths = torch.tensor(rows)
    cache = torch.randn(2, batch, groups, capacity, dim)
    for b, n in enumerate(rows):
        cache[:, b, :, n:] = math.nan
    keys, values = cache[0].contiguous(), cache[1].contiguous()
    before = keys.clone()
    wanted = naive_attention(qkv, cos, sin, keys, values, lengths, dim**-0.5)
    arrivals = torch.zeros(batch * groups, dtype=torch.int32)
    run = decode_attention_reference if kind == "reference" else decode_attention_triton
    if kind == "reference":
        # Torch operators read the whole cache; what lies beyond need not be finite for values.
        keys = keys.nan_to_num(0)
    args = (qkv, cos, sin, keys, values, lengths, arrivals, dim**-0.5)
    got = run(*args)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)
    assert not arrivals.any()
    split = qkv.view(batch, -1, dim)
    for b, n in enumerate(rows):
        torch.testing.assert_close(values[b, :, n], split[b, heads + groups :])
        torch.testing.assert_close(keys[b, :, :n], before[b, :, :n], rtol=0, atol=0)
        assert keys[b, :, n].isfinite().all()
        assert torch.equal(keys[b, :, n + 1 :].isnan(), before[b, :, n + 1 :].isnan()) or (
            kind == "reference"
        )


def test_keys_are_split_until_the_gpu_is_full():
    from vistoken.kernels.triton_decode_attention import splits_of

    assert [splits_of(32, n) for n in (64, 128, 704, 3000)] == [1, 2, 16, 16]
    assert [splits_of(pairs, 3000) for pairs in (1, 64, 256, 512, 4096)] == [16, 8, 2, 1, 1]
