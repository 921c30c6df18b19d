"""The registered operators: schema, shapes, gradients, and their place in compiled models."""

import os
import subprocess
import sys

import pytest
import timm
import torch
from torch._dynamo.utils import counters

import vistoken
from vistoken.kernels import attention, biased_attention, bipartite, dispatch, match, ranking
from vistoken.kernels.biased_attention_backward import biased_attention_backward

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def draw(*shape, seed=0, grad=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_(grad)


def qkv(grad=False):
    leaf = draw(2, 13, 3, 2, 16, grad=grad)
    q, k, v = leaf.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def attends(grad, masked, rows=0, lse=True):
    alive = (draw(2, 13, seed=3) > 0).float().requires_grad_(grad) if masked else None
    bias = draw(2, 13, seed=1, grad=grad)
    return *qkv(grad), bias, 0.3, rows, alive, lse


def goes_back(masked):
    q, k, v = qkv()
    bias, alive = draw(2, 13, seed=1), (draw(2, 13, seed=3) > 0) if masked else None
    out, _, lse = biased_attention.biased_attention(
        q, k, v, bias, 0.3, alive=alive, return_lse=True
    )
    grads = (draw(2, 13, 2, 16, seed=5).transpose(1, 2), draw(2, 2, 13, seed=6))
    return grads[0], q, k, v, bias, alive, out, lse, grads[1] if masked else None, 0.3, True, masked


OPS = {
    "attention": lambda: (biased_attention.biased_attention_op, attends(True, False)),
    "attention masked": lambda: (biased_attention.biased_attention_op, attends(True, True)),
    "attention rows": lambda: (
        biased_attention.biased_attention_op,
        attends(False, True, 2, False),
    ),
    "backward": lambda: (biased_attention_backward, goes_back(False)),
    "backward masked": lambda: (biased_attention_backward, goes_back(True)),
    "normalizer": lambda: (attention.log_normalizer_op, (*qkv()[:2], draw(2, 2, 13), 0.3)),
    "column sums": lambda: (
        attention.column_sums_op,
        (*qkv()[:2], draw(2, 13), 0.3, draw(2, 2, 13, seed=1) + 4, draw(2, 2, 13).abs()),
    ),
    "joined heads": lambda: (attention.join_heads_op, (draw(2, 3, 13).abs(), 0.1, 0.7)),
    "bipartite": lambda: (bipartite.bipartite_op, (qkv()[1], 1, 3, None, 1.0)),
    "bipartite factor": lambda: (
        bipartite.bipartite_op,
        (draw(2, 1, 13, 20), 1, 3, draw(2, 13, seed=4).abs(), 0.5),
    ),
    "rank": lambda: (ranking.rank_tokens_op, (draw(2, 13), 1)),
    "match": lambda: (
        match.best_match_at_op,
        (draw(2, 13, 20), torch.tensor([[1, 4], [2, 3]]), torch.tensor([[0, 5, 7], [8, 9, 1]])),
    ),
}


@pytest.fixture
def kernels(monkeypatch):
    """Sends CPU tensors to the kernels, which the interpreter runs."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vistoken") and hasattr(module, "use_triton"):
            monkeypatch.setattr(module, "use_triton", lambda x, dtypes=None: True)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", OPS)
def test_registration(name):
    op, args = OPS[name]()
    torch.library.opcheck(op, args)


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
@pytest.mark.parametrize("name", OPS)
def test_registration_describes_the_kernels(name, kernels):
    op, args = OPS[name]()
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def vit(depth=2):
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_patch16_224", img_size=64, embed_dim=32, num_heads=2, depth=depth, num_classes=5
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.dim() > 1 else p.data.add_(torch.rand_like(p) / 2)
    return model


METHODS = {
    "tome:r=3": {"biased_attention", "bipartite"},
    "mctf:r=3": {"biased_attention", "log_normalizer", "column_sums", "bipartite"},
    "evit:keep_rate=0.6,at=[0,1]": {"rank_tokens"},
    "zero_tprune:keep_rate=0.8,at=[0]": {
        "log_normalizer",
        "column_sums",
        "join_heads",
        "rank_tokens",
        "best_match_at",
    },
    "diffrate:gflops=0.0009": {"biased_attention", "rank_tokens", "best_match_at"},
}


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
@pytest.mark.parametrize("method", METHODS)
def test_compiled_models_hold_the_operators(method, kernels, monkeypatch):
    model, image = vistoken.wrap(vit(3).eval(), method), draw(2, 3, 64, 64)
    held = set()

    def backend(graph, inputs):
        names = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        held.update(name.split(".")[1] for name in names if name.startswith("vistoken."))
        return graph

    with torch.no_grad():
        expected = model(image)
        found = torch.compile(model, backend=backend, fullgraph=True)(image)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert METHODS[method] <= held
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
@pytest.mark.parametrize("compiled", [True, False])
def test_gradients_of_a_model(compiled, request, monkeypatch):
    import vistoken.kernels.triton_biased_attention_backward as triton_module

    model, image = vistoken.wrap(vit().train(), "tome:r=3"), draw(2, 3, 64, 64)

    def gradients(run):
        model.zero_grad()
        run(image).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients(model)
    request.getfixturevalue("kernels")
    calls = []
    launch = triton_module.biased_attention_backward_triton
    monkeypatch.setattr(
        triton_module,
        "biased_attention_backward_triton",
        lambda *args: calls.append(1) or launch(*args),
    )
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    found = gradients(run)
    assert calls, "the backward kernels must have run"
    for mine, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
def test_exported_models_hold_the_operators(kernels):
    model, image = vistoken.wrap(vit().eval(), "tome:r=3"), draw(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(image)
        program = torch.export.export(model, (image,), strict=False)
        torch.testing.assert_close(program.module()(image), expected, rtol=1e-4, atol=1e-4)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"vistoken.biased_attention.default", "vistoken.bipartite.default"} <= targets


def test_on_the_cpu_compilers_see_torch_operators():
    model = vistoken.wrap(vit().eval(), "tome:r=3")
    with torch.no_grad():
        program = torch.export.export(model, (draw(2, 3, 64, 64),), strict=False)
    assert not [n for n in program.graph.nodes if str(n.target).startswith("vistoken.")]


def test_registration_imports_no_triton():
    code = (
        "import sys, vistoken.kernels.biased_attention, vistoken.kernels.match, torch; "
        "assert 'triton' not in sys.modules; print(torch.ops.vistoken.biased_attention.default)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "vistoken.biased_attention.default"


def test_a_compiler_takes_the_choice_of_path_as_a_constant(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (9, 0))
    dispatch._gpu_reason.cache_clear()

    @torch.compile(fullgraph=True, backend="eager")
    def call(x):
        return x + 1 if dispatch._constant(0) is None else x - 1

    assert call(torch.zeros(2)).tolist() == [1, 1]
    dispatch._gpu_reason.cache_clear()
