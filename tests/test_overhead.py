"""What a wrapped model does in Python per block: shortcuts that must notice every change."""

import copy
import pickle
import sys

import pytest
import timm
import torch

import vistoken
from vistoken.api import attachment_of
from vistoken.attach import undisturbed


@pytest.fixture
def chain(monkeypatch):
    """The chain runs on the CPU, its kernels on their torch references."""
    monkeypatch.setattr(vistoken.fast, "use_triton", lambda x: True)


def build(method="tome:r=2"):
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_small_patch16_224", img_size=64, embed_dim=32, num_heads=2, depth=3, num_classes=5
    ).eval()
    return vistoken.wrap(model, method)


def blocks_on_the_chain(model, x):
    """Indices of the blocks that take the chain in one forward pass."""
    taken = []
    own = vistoken.fast.FusedBlock.run
    try:
        vistoken.fast.FusedBlock.run = lambda self, x: taken.append(self.block) or own(self, x)
        with torch.no_grad():
            model(x)
    finally:
        vistoken.fast.FusedBlock.run = own
    return taken


def test_exchanged_parts_are_seen(chain):
    # A method that reads nothing: the hooks of the old attention are gone with it.
    model, x = build("random:keep_rate=0.5,at=[1]"), torch.randn(2, 3, 64, 64)
    assert blocks_on_the_chain(model, x) == [0, 1, 2]
    new = type(model.blocks[1].attn)(32, num_heads=2, qkv_bias=True).eval()
    # A new attention of the same classes, whose inner layer someone watches.
    seen = []
    handle = new.qkv.register_forward_hook(lambda *_: seen.append(1))
    model.blocks[1].attn = new
    assert blocks_on_the_chain(model, x) == [0, 2] and seen
    handle.remove()
    assert blocks_on_the_chain(model, x) == [0, 1, 2], "the hook is gone"
    model.blocks[1].attn.qkv = torch.nn.Sequential(new.qkv)
    assert blocks_on_the_chain(model, x) == [0, 2], "inside the new attention"


def test_one_hook_for_another_is_seen(chain):
    model, x = build(), torch.randn(2, 3, 64, 64)
    part = model.blocks[2].mlp.fc1
    part.register_forward_hook(vistoken.hooks.PatchGrid(attachment_of(model)))
    taken = blocks_on_the_chain(model, x)
    assert taken == [0, 1, 2], "a hook of this package does not count"
    part._forward_hooks.clear()
    part.register_forward_hook(lambda *_: None)
    assert blocks_on_the_chain(model, x) == [0, 1], "as many hooks as before, but another one"


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_look_at_their_own_parts(chain, twin_of):
    model, x = build(), torch.randn(2, 3, 64, 64)
    blocks_on_the_chain(model, x)
    twin = twin_of(model)
    assert twin.blocks[0].__dict__["forward"].watch.seen is None
    twin.blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)
    assert blocks_on_the_chain(twin, x) == [1, 2]
    assert blocks_on_the_chain(model, x) == [0, 1, 2]


def test_undisturbed(monkeypatch):
    def state():
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    assert state() == (True, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert undisturbed("cpu", state) == (False, False)
        with torch.no_grad():
            assert undisturbed("cpu", state) == (False, False)
        assert state() == (True, True)
    assert undisturbed("cpu", state) == (False, False)
    with torch.no_grad():
        monkeypatch.setattr(torch, "autocast", None)
        assert undisturbed("cpu", state) == (False, False), "no context where none is needed"


def test_addresses_are_noted_only_for_passes_that_can_come_again():
    model, x = build(), torch.randn(2, 3, 64, 64)
    attachment, frames = attachment_of(model), []
    opened = attachment.open
    attachment.open = lambda x: frames.append(opened(x)) or frames[-1]
    with torch.no_grad():
        model(x)
    assert frames[-1].inputs == [None] * 3 and not attachment.past
    model(x)
    assert None not in frames[-1].inputs and attachment.past[-1] is frames[-1]
    with torch.no_grad():
        model(x)
    assert frames[-1].inputs == [None] * 3


def own_calls(model, x):
    """Python functions of this package that one forward pass enters, per block."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        name = frame.f_code.co_filename
        count += event == "call" and "vistoken" in name and "kernels" not in name

    with torch.no_grad():
        model(x)
        sys.setprofile(note)
        try:
            model(x)
        finally:
            sys.setprofile(None)
    return count / len(model.blocks)


def test_python_per_block_stays_small(request):
    x = torch.randn(1, 3, 64, 64)
    idle, busy = build("tome:r=0"), build("tome:r=2")
    assert own_calls(idle, x) <= 45
    assert own_calls(busy, x) <= 90
    request.getfixturevalue("chain")
    assert own_calls(idle, x) <= 60
    assert own_calls(busy, x) <= 80
