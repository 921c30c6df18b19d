"""A wrapped model lives like any other: copies, files, failure, processes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from naive import NaiveToMe, fingerprint, randomise
from naive_timm import timm_head, timm_trail
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import vistoken

TINY = {"img_size": 64, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}


def vit(**more: object) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model("vit_tiny_patch16_224", **TINY, **more).double())


def images(count: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 64, 64, generator=generator, dtype=torch.float64)


def run(model: nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        return model(image)


# Copies and files ---------------------------------------------------------------------------------


def test_deepcopy_works_on_its_own() -> None:
    model, image = vit(), images()
    dense = run(model, image)
    vistoken.wrap(model, "tome:r=3")
    reduced = run(model, image)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, image), reduced)
    with vistoken.trace(twin) as seen, vistoken.trace(model) as unseen:
        run(twin, image)
    assert len(seen.blocks) == 4 and unseen.blocks == []
    with torch.no_grad():
        twin.blocks[0].mlp.fc1.weight.zero_()
    assert torch.equal(run(model, image), reduced)
    assert not torch.equal(run(twin, image), reduced)
    twin = vistoken.unwrap(copy.deepcopy(model))
    assert torch.equal(run(twin, image), dense)
    assert fingerprint(twin)["keys"] == fingerprint(vit())["keys"]
    assert torch.equal(run(model, image), reduced)
    assert torch.equal(run(vistoken.unwrap(model), image), dense)
    again = copy.deepcopy(vistoken.wrap(model, "evit"))
    assert torch.equal(run(vistoken.unwrap(again), image), dense)


def test_copy_taken_while_tracing_and_after_a_graph_was_built() -> None:
    model, image = vistoken.wrap(vit(), "tome:r=3"), images()
    with vistoken.trace(model) as trace:
        loss = model(image).sum()
        twin = copy.deepcopy(model)
    loss.backward()
    blocks = len(trace.blocks)
    assert torch.equal(run(twin, image), run(model, image)) and len(trace.blocks) == blocks


@pytest.mark.parametrize("save", [pickle.dumps, torch.save])
def test_pickle_of_the_wrapped_model(save: Callable) -> None:
    model, image = vit(), images()
    dense = run(model, image)
    vistoken.wrap(model, vistoken.EViT(keep_rate=0.6, at=(1,)), fill="zeros")
    reduced, features = run(model, image), model.forward_features(image)
    if save is pickle.dumps:
        twin = pickle.loads(pickle.dumps(model))
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    assert torch.equal(run(twin, image), reduced)
    assert torch.equal(twin.forward_features(image), features)
    assert vistoken.info(twin) == vistoken.info(model)
    assert torch.equal(run(vistoken.unwrap(twin), image), dense)
    assert torch.equal(run(model, image), reduced)


def test_state_dict_is_the_plain_models(tmp_path: Path) -> None:
    plain, model, image = vit(), vit(), images()
    vistoken.wrap(model, "tome:r=3")
    run(model, image)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert list(loaded) == list(plain.state_dict())
    other = randomise(vit(), seed=9)
    other.load_state_dict(loaded)
    assert torch.equal(run(other, image), run(plain, image))
    reduced = run(model, image)
    model.load_state_dict(randomise(vit(), seed=9).state_dict())
    assert not torch.equal(run(model, image), reduced)
    model.load_state_dict(loaded)
    assert torch.equal(run(model, image), reduced)


def test_modes_and_types() -> None:
    model, image = vit(proj_drop_rate=0.5), images()
    assert vistoken.wrap(model, "tome:r=3") is model
    assert model.train() is model and model.training and model.blocks[0].training
    torch.manual_seed(1)
    first = model(image)
    assert not torch.equal(first, model(image)), "dropout is off in train mode"
    assert model.eval() is model
    exact = run(model, image)
    for dtype, tolerance in (
        (torch.float32, 1e-3),
        (torch.bfloat16, 1.0),
        (torch.float16, 0.3),
        (torch.float64, 1e-9),
    ):
        twin = copy.deepcopy(model).to(dtype)
        with vistoken.trace(twin) as trace:
            found = run(twin, image.to(dtype))
        assert found.dtype == dtype and torch.isfinite(found).all()
        assert trace.counts == (14, 11, 8, 5)
        assert all(size.dtype == torch.float32 for size in trace.sizes)
        assert all((size.sum(1) == 17).all() for size in trace.sizes)
        if dtype in (torch.float32, torch.float64):
            assert (found.double() - exact).abs().max() < tolerance
    for cast in ("half", "bfloat16", "float", "double"):
        assert getattr(copy.deepcopy(model), cast)().forward(getattr(image, cast)()).shape == (2, 5)


def test_nothing_is_recorded_outside_a_trace() -> None:
    model, image = vistoken.wrap(vit(), "tome:r=3"), images()
    run(model, image)
    with vistoken.trace(model) as trace:
        assert trace.blocks == []
        with pytest.raises(RuntimeError, match="nothing was traced"):
            _ = trace.source_map
        run(model, image[:1])
        first = trace.blocks
        assert len(first) == 4 and trace.sizes[0].shape == (1, 14)
        run(model, image)
        assert trace.sizes[0].shape == (2, 14)
    last = trace.blocks
    run(model, image[:1])
    assert trace.blocks is last and trace.sizes[0].shape == (2, 14)
    with pytest.raises(ZeroDivisionError), vistoken.trace(model) as trace:
        raise ZeroDivisionError
    run(model, image)
    assert trace.blocks == []


# Failure ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tome:r=2", "evit:at=[1,2]", "zero_tprune:at=[1,2]"])
@pytest.mark.parametrize("place", ["mlp", "attn.proj", "attn.k_norm", "norm1", "norm2"])
def test_an_exception_inside_a_forward_leaves_nothing(method: str, place: str) -> None:
    model, image = vistoken.wrap(vit(), method), images()
    expected = run(model, image)
    owner = model.blocks[2].get_submodule(place.rpartition(".")[0])
    child = place.rpartition(".")[2]
    healthy = getattr(owner, child)

    def fail(*_: object) -> None:
        raise ArithmeticError("broken on purpose")

    handle = healthy.register_forward_hook(fail)
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="on purpose"):
            run(model, image)
        assert _get_current_function_mode_stack() == []
    handle.remove()
    q = torch.randn(1, 1, 17, 8)
    attention = nn.functional.scaled_dot_product_attention
    assert torch.equal(attention(q, q, q), attention(q, q, q, attn_mask=None))
    assert torch.equal(run(model, image), expected)
    smaller = images(1)
    plain = vistoken.unwrap(copy.deepcopy(model))
    assert torch.equal(run(vistoken.wrap(plain, method), smaller), run(model, smaller))


def test_an_exception_inside_the_fused_call_leaves_nothing(monkeypatch) -> None:
    model, image = vistoken.wrap(vit(), "tome:r=2"), images()
    expected = run(model, image)

    def fail(*args: object, **kwargs: object) -> None:
        raise ArithmeticError("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(vistoken.ToMe, "assign", fail)
        with pytest.raises(ArithmeticError):
            run(model, image)
    assert _get_current_function_mode_stack() == []
    with pytest.raises(AssertionError, match="Input height"):
        run(model, image[..., :63, :])
    assert torch.equal(run(model, image), expected)


def test_a_tap_that_never_fires_raises(monkeypatch) -> None:
    model, image = vit(), images()
    vistoken.wrap(model, "tome:r=2")
    expected = run(model, image)
    for block in model.blocks:
        block.attn.fused_attn = False
    with pytest.raises(vistoken.TapError, match="set_fused_attn"):
        model(image)
    assert _get_current_function_mode_stack() == []
    for block in model.blocks:
        block.attn.fused_attn = True
    assert torch.equal(run(model, image), expected)
    vistoken.unwrap(model)
    for block in model.blocks:
        block.attn.fused_attn = False
    with pytest.raises(vistoken.UnsupportedBackboneError, match="set_fused_attn"):
        vistoken.wrap(model, "tome:r=2")


def test_wrap_refuses_what_it_cannot_carry() -> None:
    model = vit()
    before = fingerprint(model)
    with pytest.raises(vistoken.UnsupportedBackboneError, match="DistributedDataParallel"):
        vistoken.wrap(nn.DataParallel(model), "tome:r=2")
    with pytest.raises(vistoken.UnsupportedBackboneError, match="wrap the model first"):
        vistoken.wrap(torch.compile(vit(), backend="eager"), "tome:r=2")
    with pytest.raises(vistoken.UnsupportedBackboneError, match="compiled already"):
        vistoken.wrap(torch.jit.trace(vit(), images()), "tome:r=2")
    with pytest.raises(vistoken.UnsupportedBackboneError, match=r"torch\.nn\.Module"):
        vistoken.wrap("vit_tiny_patch16_224", "tome:r=2")
    with pytest.raises(vistoken.UnsupportedBackboneError, match="wrap one of them"):
        vistoken.wrap(nn.ModuleList([vit(), vit()]), "tome:r=2")
    for bad in (3, None, vistoken.ToMe):
        with pytest.raises(vistoken.ConfigError, match="must be a vistoken method"):
            vistoken.wrap(model, bad)
    with pytest.raises(vistoken.ConfigError, match="nearest"):
        vistoken.wrap(model, "tome", fill="mean")
    assert fingerprint(model) == before


def test_a_module_compiled_in_place_is_refused() -> None:
    model = vit()
    model.compile(backend="eager")
    with pytest.raises(vistoken.UnsupportedBackboneError, match="wrap the model first"):
        vistoken.wrap(model, "tome:r=2")


# Processes ----------------------------------------------------------------------------------------


def train_step(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    model = vistoken.wrap(vit(), "tome:r=3")
    parallel = nn.parallel.DistributedDataParallel(model)
    share = images(4).chunk(world)[rank]
    for _ in range(2):
        parallel.zero_grad()
        parallel(share).square().mean().backward()
    torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    mp.spawn(train_step, (2, str(tmp_path)), nprocs=2)
    model = vistoken.wrap(vit(), "tome:r=3")
    model(images(4)).square().mean().backward()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for a, b, p in zip(*ranks, model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, p.grad, rtol=1e-9, atol=1e-11)
        assert p.grad.abs().max() > 0


def test_gradients_equal_those_of_the_forward_written_out() -> None:
    model = vit()
    plain = copy.deepcopy(model)
    vistoken.wrap(model, "tome:r=3")
    image = images().requires_grad_()
    (found,) = torch.autograd.grad(model(image).square().sum(), image)
    step, direction = 1e-6, torch.randn_like(image)

    def loss(x: Tensor) -> Tensor:
        return timm_head(plain, timm_trail(plain, x, NaiveToMe(r=3)).steps[-1]).square().sum()

    with torch.no_grad():
        slope = (loss(image + step * direction) - loss(image - step * direction)) / (2 * step)
    assert abs((found * direction).sum() - slope) < 1e-5 * slope.abs()


@pytest.mark.parametrize("grad", [False, True])
def test_wrapped_models_run_on_the_meta_device(grad: bool) -> None:
    model = vistoken.wrap(vit(), "tome:r=3").to("meta")
    with torch.set_grad_enabled(grad):
        shape = model(images(2).to("meta")).shape
    assert shape == model.to_empty(device="cpu")(images(2)).shape
