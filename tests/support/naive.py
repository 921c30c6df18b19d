"""Token reduction written out: explicit attention matrices and Python loops over tokens.

Nothing here calls the package; tests compare it with wrapped models in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Slot = tuple[int, list[tuple[int, float]], float, float]
"""Token that lends its position, members with weights, divisor, size."""


@dataclass
class Tokens:
    """Tokens between two blocks: values, sizes, where each original token went, and who lends."""

    x: Tensor
    prefix: int
    size: Tensor
    origin: Tensor
    parent: Tensor

    @staticmethod
    def start(x: Tensor, prefix: int) -> Tokens:
        index = torch.arange(x.shape[1]).expand(x.shape[0], -1)
        return Tokens(x, prefix, x.new_ones(x.shape[:2]), index, index)

    def apply(self, slots: list[list[Slot]]) -> Tokens:
        values, sizes, origins, parents = [], [], [], []
        for b, image in enumerate(slots):
            rows, home = [], {}
            for slot, (_, members, divisor, _) in enumerate(image):
                rows.append(sum(w * self.x[b, i] for i, w in members) / divisor)
                home.update({i: slot for i, _ in members})
            values.append(torch.stack(rows))
            sizes.append([size for *_, size in image])
            origins.append([int(self.origin[b, owner]) for owner, *_ in image])
            parents.append([home.get(p, -1) for p in self.parent[b].tolist()])
        return Tokens(
            torch.stack(values),
            self.prefix,
            self.x.new_tensor(sizes),
            torch.tensor(origins),
            torch.tensor(parents),
        )

    def unmerged(self, y: Tensor, grid: tuple[int, int], fill: str = "nearest") -> Tensor:
        """Values y of these tokens, one per original token."""
        out = y.new_zeros(self.parent.shape[0], self.parent.shape[1], y.shape[2])
        for b in range(out.shape[0]):
            for cell, slot in enumerate(self.parent[b].tolist()):
                if slot < 0 and fill == "nearest":
                    slot = self.nearest(b, cell, grid[1])
                if slot >= 0:
                    out[b, cell] = y[b, slot]
        return out

    def nearest(self, b: int, cell: int, columns: int) -> int:
        def place(token: int) -> tuple[int, int]:
            return divmod(token - self.prefix, columns)

        row, col = place(cell)
        owners = self.origin[b].tolist()
        spots = [(place(owners[slot]), slot) for slot in range(self.prefix, len(owners))]
        return min(((row - r) ** 2 + (col - c) ** 2, slot) for (r, c), slot in spots)[1]


def attend(q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """The whole attention matrix `[B, H, N, N]`."""
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if bias is not None:
        scores = scores + bias
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


@dataclass
class Reducer:
    """What a block does to its tokens; `where` as in the package, `proportional` too."""

    where: str = "mlp"
    proportional: bool = False
    cls: int = 1

    def slots(self, block: int, depth: int, tokens: Tokens, q: Tensor, k: Tensor, scale: float):
        raise NotImplementedError

    def bias(self, tokens: Tokens) -> Tensor | None:
        return tokens.size.log()[:, None, None] if self.proportional else None


def alone(i: int, size: float) -> Slot:
    return (i, [(i, 1.0)], 1.0, size)


@dataclass
class NaiveToMe(Reducer):
    r: int = 8
    proportional: bool = True

    def slots(self, block, depth, tokens, q, k, scale):
        prefix, count = tokens.prefix, tokens.x.shape[1]
        r = min(self.r, (count - prefix) // 2)
        if r == 0:
            return None
        out = []
        for b in range(q.shape[0]):
            key = k[b].mean(0)
            key = key / key.norm(dim=-1, keepdim=True)
            even = [i for i in range(prefix, count) if i % 2 == 0]
            odd = [i for i in range(prefix, count) if i % 2 == 1]
            cosine = (key @ key.T).tolist()
            pairs = []
            for i in even:
                best = max(odd, key=lambda j: cosine[i][j])
                pairs.append((cosine[i][best], i, best))
            chosen = {i: j for _, i, j in sorted(pairs, reverse=True)[:r]}
            size = tokens.size[b].tolist()
            image = [alone(i, size[i]) for i in range(prefix)]
            image += [alone(i, size[i]) for i in even if i not in chosen]
            for j in odd:
                members = [j] + [i for i, to in chosen.items() if to == j]
                total = sum(size[i] for i in members)
                image.append((j, [(i, size[i]) for i in members], total, total))
            # Odd-position prefix tokens take part in no pair, but their order is theirs.
            out.append(image)
        return out


@dataclass
class NaiveRandom(Reducer):
    """Draws as `torch.rand(batch, patches)`, like the package: seed both alike."""

    rate: float = 0.7
    at: tuple[int, ...] = (0, 1, 2)

    def slots(self, block, depth, tokens, q, k, scale):
        patches = tokens.x.shape[1] - tokens.prefix
        kept = max(1, math.ceil(self.rate * patches - 1e-9))
        if block not in self.at or kept == patches:
            return None
        noise = torch.rand(tokens.x.shape[0], patches).tolist()
        out = []
        for b in range(len(noise)):
            order = sorted(range(patches), key=lambda i: noise[b][i])
            chosen = list(range(tokens.prefix)) + [tokens.prefix + i for i in sorted(order[:kept])]
            out.append([alone(i, float(tokens.size[b, i])) for i in chosen])
        return out


@dataclass
class NaiveEViT(Reducer):
    rate: float = 0.6
    at: tuple[int, ...] = (0, 1, 2)
    fuse: bool = True

    def slots(self, block, depth, tokens, q, k, scale):
        prefix, patches = tokens.prefix, tokens.x.shape[1] - tokens.prefix
        kept = math.ceil(self.rate * patches - 1e-9)
        if block not in self.at or kept + self.fuse >= patches:
            return None
        row = attend(q, k, scale)[:, :, : self.cls].mean((1, 2)).tolist()
        out = []
        for b in range(len(row)):
            order = sorted(range(prefix, prefix + patches), key=lambda i: -row[b][i])
            size = tokens.size[b].tolist()
            image = [alone(i, size[i]) for i in [*range(prefix), *order[:kept]]]
            if self.fuse:
                tail = order[kept:]
                members = [(i, row[b][i]) for i in tail]
                image.append((tail[0], members, 1.0, sum(size[i] for i in tail)))
            out.append(image)
        return out


@dataclass
class NaiveZeroTPrune(Reducer):
    rate: float = 0.7
    at: tuple[int, ...] = (0, 1, 2)
    iterations: tuple[int, int, int] = (6, 3, 1)
    where: str = "block"

    def slots(self, block, depth, tokens, q, k, scale):
        prefix, patches = tokens.prefix, tokens.x.shape[1] - tokens.prefix
        kept = max(1, round(self.rate * patches))
        if block not in self.at or kept == patches:
            return None
        steps = self.iterations[0 if block < 3 else (2 if block >= depth - 3 else 1)]
        out = []
        for b in range(q.shape[0]):
            first = list(range(prefix))
            score = self.rank(q[b], k[b], scale, prefix, 1).tolist()
            order = sorted(range(prefix, prefix + patches), key=lambda i: -score[i])
            half = -(-patches // 2)
            best, rest = order[:half], order[half:]
            key = k[b].mean(0)
            key = key / key.norm(dim=-1, keepdim=True)
            cosine = (key @ key.T).tolist()
            near = {i: max(cosine[i][j] for j in best) for i in rest}
            drop = min(int((patches - kept) * 0.5), len(rest))
            left = best + sorted(rest, key=lambda i: near[i])[: len(rest) - drop]
            index = first + left
            score = self.rank(q[b][:, index], k[b][:, index], scale, prefix, steps).tolist()
            rank = sorted(range(prefix, len(index)), key=lambda i: -score[i])[:kept]
            chosen = first + sorted(index[i] for i in rank)
            out.append([alone(i, float(tokens.size[b, i])) for i in chosen])
        return out

    def rank(self, q: Tensor, k: Tensor, scale: float, prefix: int, steps: int) -> Tensor:
        a = attend(q[None], k[None], scale)[0]
        count = a.shape[-1]
        start = a.new_ones(count)
        if prefix:
            start[0] = count**0.5
        heads = []
        for matrix in a:
            s = start / start.sum()
            for _ in range(steps):
                s = matrix.T @ s
            heads.append(s)
        spread = [float((s * count).var(unbiased=False)) for s in heads]
        passed = [s for s, v in zip(heads, spread, strict=True) if 0.01 <= v <= 0.7] or heads
        return (sum(s * s for s in passed) / len(passed)).sqrt()


@dataclass
class Trail:
    """Tokens that enter block 0 and leave every block."""

    steps: list[Tokens] = field(default_factory=list)

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(step.x.shape[1] for step in self.steps[1:])


def run_blocks(x: Tensor, prefix: int, blocks, reducer: Reducer) -> Trail:
    """The residual stream through `blocks`.

    Args:
        x: tokens `[B, N0, C]`.
        prefix: prefix tokens.
        blocks: objects with `attention(tokens, bias) -> (branch, q, k, scale)` and `mlp(x)`.
        reducer: what happens between the branches, or after the block.
    """
    tokens = Tokens.start(x, prefix)
    trail = Trail([tokens])
    for index, block in enumerate(blocks):
        branch, q, k, scale = block.attention(tokens, reducer.bias(tokens))
        tokens = replace_x(tokens, tokens.x + branch)
        slots = reducer.slots(index, len(blocks), tokens, q, k, scale)
        if slots is not None and reducer.where == "mlp":
            tokens = tokens.apply(slots)
        tokens = replace_x(tokens, tokens.x + block.mlp(tokens.x))
        if slots is not None and reducer.where == "block":
            tokens = tokens.apply(slots)
        trail.steps.append(tokens)
    return trail


def replace_x(tokens: Tokens, x: Tensor) -> Tokens:
    return Tokens(x, tokens.prefix, tokens.size, tokens.origin, tokens.parent)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


# Comparing a module with its past self -----------------------------------------------------------

HOOKS = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
]


def fingerprint(model: nn.Module) -> dict[str, object]:
    """Hook counts, attribute names, class and storage addresses of every module of a model."""
    found: dict[str, object] = {}
    for path, module in model.named_modules():
        hooks = tuple(len(getattr(module, name, ())) for name in HOOKS)
        found[path] = (type(module), hooks, tuple(sorted(vars(module))), module.training)
    found["keys"] = tuple(model.state_dict())
    found["storage"] = tuple(p.data_ptr() for p in model.parameters())
    return found


def randomise(model: nn.Module, seed: int = 0, gain: float = 1.6) -> nn.Module:
    """Weights large enough that attention is not uniform and every scale and token counts."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2 and "embed" not in name and "token" not in name:
                p.normal_(0, gain / p.shape[-1] ** 0.5)
            else:
                p.add_(torch.randn_like(p) * 0.3)
    return model.eval()
