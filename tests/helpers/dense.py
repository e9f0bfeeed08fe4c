"""Dense float64 references, written for clarity and independently of the package.

The package is used for one thing only: the uniform numbers behind sampled targets, which are part of its contract.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from kfac_dist.draws import uniforms
from tests.helpers.cases import Case
from tests.helpers.explicit import explicit

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Layers with one factor, their Fisher block; of PReLU, which no layer type treats, its diagonal.
JOINT = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU)
TREATED = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, nn.Embedding, *JOINT)


def treated(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that own a matrix; a weight that several share belongs to the first that is no table.

    Of fused modules copies of their linear maps, by the layers' names.
    """
    found, model = {}, explicit(model)
    for name, module in model.named_modules():
        if isinstance(module, TREATED) and module.weight.requires_grad and sharing(model, module)[0] is module:
            found[name] = module
    return found


def sharing(model: nn.Module, module: nn.Module) -> list[nn.Module]:
    alike = [m for m in model.modules() if getattr(m, "weight", None) is module.weight]
    return sorted(alike, key=lambda m: isinstance(m, nn.Embedding))


def theta(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[W | b] with the bias as the last column, (groups, d_out, d_in); one row where the block has one factor."""
    if isinstance(module, JOINT):
        return torch.cat([part.flatten() for part in (weight, bias) if part is not None])[None, None]
    if isinstance(module, nn.Embedding):  # a column per token, but for padding
        return weight[[v for v in range(len(weight)) if v != module.padding_idx]].T[None]
    groups = getattr(module, "groups", 1)
    if isinstance(module, TRANSPOSED):  # (groups C_in, C_out, ..) to (groups C_out, C_in, ..)
        weight = torch.cat([part.transpose(0, 1) for part in weight.chunk(groups)])
    w = weight.flatten(1)
    matrix = w if bias is None else torch.cat([w, bias[:, None]], dim=1)
    return matrix.reshape(groups, -1, matrix.shape[1])


def gradient_matrix(module: nn.Module) -> Tensor:
    return theta(module, module.weight.grad, None if _bias(module) is None else module.bias.grad)


def _bias(module: nn.Module) -> Tensor | None:
    return getattr(module, "bias", None)


def patches(module: nn.Module, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """(B, T, groups, d_in with the constant), entry by entry; a token as a one-hot vector.

    ``size`` is that of a transposed convolution's output, where a call asked for it.
    """
    if isinstance(module, nn.Embedding):
        one_hot = torch.eye(module.num_embeddings).double()[x.flatten()]
        rows = theta(module, one_hot.T, None)[0]
        return rows.view(x.shape[0], -1, 1, rows.shape[1])
    if isinstance(module, nn.Linear):
        rows = x.reshape(x.shape[0], -1, 1, x.shape[-1])
    elif isinstance(module, TRANSPOSED):
        each = zip(x.shape[2:], module.stride, module.padding, module.dilation, module.kernel_size, strict=True)
        fitting = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in each]
        rows = _scattered(module, x, size or [a + b for a, b in zip(fitting, module.output_padding, strict=True)])
    else:
        rows = _cut_out(module, x)
    if _bias(module) is None:
        return rows
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)


def _cut_out(module: nn.Module, x: Tensor) -> Tensor:
    reach = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    sides: list[int] = []
    for axis, total in enumerate(reach):
        if module.padding == "same":
            sides = [total // 2, total - total // 2, *sides]
        else:
            sides = [module.padding[axis], module.padding[axis], *sides]
    x = nn.functional.pad(x, sides, mode={"zeros": "constant"}.get(module.padding_mode, module.padding_mode))
    counts = [(n - r - 1) // s + 1 for n, r, s in zip(x.shape[2:], reach, module.stride, strict=True)]
    cut = []
    for place in product(*map(range, counts)):
        starts = [i * s for i, s in zip(place, module.stride, strict=True)]
        window = [slice(b, b + r + 1, d) for b, r, d in zip(starts, reach, module.dilation, strict=True)]
        cut.append(x[(slice(None), slice(None), *window)].reshape(x.shape[0], module.groups, -1))
    return torch.stack(cut, dim=1)


def _scattered(module: nn.Module, x: Tensor, size: Sequence[int]) -> Tensor:
    """Entry i of the input meets entry k of the kernel in entry i stride - padding + k dilation of the output."""
    kernel = module.kernel_size
    rows = x.new_zeros(x.shape[0], *size, x.shape[1], *kernel)
    for place in product(*map(range, x.shape[2:])):
        for tap in product(*map(range, kernel)):
            each = zip(place, tap, module.stride, module.padding, module.dilation, strict=True)
            out = [i * s - p + k * d for i, k, s, p, d in each]
            if all(0 <= o < n for o, n in zip(out, size, strict=True)):
                rows[(slice(None), *out, slice(None), *tap)] = x[(slice(None), slice(None), *place)]
    return rows.reshape(x.shape[0], math.prod(size), module.groups, -1)


def output_rows(module: nn.Module, g: Tensor) -> Tensor:
    """(B, T, groups, d_out)."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return g.reshape(g.shape[0], -1, 1, g.shape[-1])
    return g.flatten(2).mT.reshape(g.shape[0], -1, module.groups, g.shape[1] // module.groups)


def reached(module: nn.Module, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """(B, T): ones, and zeros where a token is padding."""
    rows = patches(module, x, size)[:, :, 0]
    return rows.sum(-1) if isinstance(module, nn.Embedding) else rows.new_ones(rows.shape[:2])


def cotangents(
    case: Case, logits: Tensor, y: Tensor, fisher: str, samples: int | str, seed: int, step: int, ids: Tensor
) -> Iterator[tuple[Tensor, float]]:
    """d(sum of losses)/d(logits) at the targets that make the Fisher, each with its weight."""
    logits = logits.detach().requires_grad_()
    if fisher == "empirical":
        (gradient,) = torch.autograd.grad(case.sum_loss(logits, y), logits)
        yield gradient, 1.0
    elif samples == "exact":
        yield from exact_columns(case.likelihood, logits.detach())
    else:
        for draw in range(int(samples)):
            target = sampled_targets(case.likelihood, logits.detach(), seed, step, draw, ids)
            (gradient,) = torch.autograd.grad(case.sum_loss(logits, target), logits)
            yield gradient, 1.0 / int(samples)


def sampled_targets(likelihood: str, logits: Tensor, seed: int, step: int, draw: int, ids: Tensor) -> Tensor:
    if likelihood == "categorical":
        p = logits.movedim(1, -1).softmax(-1)
        u = uniforms(seed, step, draw, ids, math.prod(p.shape[1:-1])).view(*p.shape[:-1], 1)
        return (p.cumsum(-1) < u).sum(-1)
    u = uniforms(seed, step, draw, ids, logits[0].numel()).view_as(logits)
    return (u < logits.sigmoid()).double() if likelihood == "bernoulli" else logits + torch.special.ndtri(u)


def exact_columns(likelihood: str, logits: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Weighted by the probability of each target, one target entry at a time; all entries are independent."""
    if likelihood == "categorical":
        p = logits.softmax(1)
        for position in range(math.prod(logits.shape[2:])):
            for c in range(logits.shape[1]):
                gradient = torch.zeros_like(logits)
                flat, probability = gradient.flatten(2) if logits.dim() > 2 else gradient[..., None], p
                probability = p.flatten(2)[..., position] if logits.dim() > 2 else p
                flat[..., position] = probability
                flat[:, c, position] -= 1.0
                flat[..., position] *= probability[:, c : c + 1].sqrt()
                yield gradient, 1.0
    else:
        p = logits.sigmoid() if likelihood == "bernoulli" else None
        for k in range(logits.shape[1]):
            gradient = torch.zeros_like(logits)
            gradient[:, k] = 1.0 if p is None else (p[:, k] * (1 - p[:, k])).sqrt()
            yield gradient, 1.0


def kronecker_factors(
    case: Case,
    model: nn.Module,
    x: Tensor,
    make_cotangents: Callable[[Tensor], Iterator[tuple[Tensor, float]]],
    reduced: Callable[[str], bool] = lambda name: False,
    sides: str = "both",
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Layer -> (A, G, T), A and G (groups, d, d): averages over samples, locations and calls.

    The locations of layers that are ``reduced`` are averaged (inputs) and summed (gradients) beforehand. With the input
    side alone the calls of a table that is the weight of a Linear say nothing.
    What has one factor has (that, 1, 1.0): the blocks of scale and shift of every channel, and zeros between them.
    """
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    handles = []
    model = explicit(model)
    modules = {name: m for name, m in treated(model).items() if not isinstance(m, JOINT)}
    for name, module in modules.items():

        def hook(m: nn.Module, inputs: tuple, out: Tensor, name: str = name) -> Tensor:
            calls.append((name, m, inputs[0].detach().clone(), out))
            return out.clone()  # so that an in-place activation leaves the recorded output alone

        users = [user for user in sharing(model, module) if sides == "both" or type(user) is type(module)]
        handles += [user.register_forward_hook(hook) for user in users]
    logits = model(x)
    for handle in handles:
        handle.remove()
    A: dict[str, list[Tensor]] = {name: [] for name in modules}
    G: dict[str, list[Tensor]] = {name: [] for name in modules}
    counts = dict.fromkeys(modules, 0.0)
    for number, (cotangent, weight) in enumerate(make_cotangents(logits)):
        gradients = torch.autograd.grad(logits, [out for *_, out in calls], cotangent, retain_graph=True)
        for (name, user, a, _), g in zip(calls, gradients, strict=True):
            kept = reached(user, a, g.shape[2:])
            rows, cut = output_rows(user, g) * kept[..., None, None], patches(user, a, g.shape[2:])
            left, right = G[name], A[name]
            if isinstance(user, nn.Embedding) and user is not modules[name]:  # a table that is the weight of a Linear
                left, right = right, left
                rows = torch.cat([rows, rows.new_zeros(*rows.shape[:3], int(_bias(modules[name]) is not None))], dim=3)
                one_hot = torch.eye(user.num_embeddings).double()[a.reshape(len(a), -1, 1)]
                cut = one_hot * kept[..., None, None]
            rows = rows.sum(1, keepdim=True) if reduced(name) else rows
            left.append(torch.einsum("btgi,btgj->gij", rows, rows) * weight)
            if number == 0:
                cut = cut.sum(1, keepdim=True) / kept.sum(1)[:, None, None, None] if reduced(name) else cut
                right.append(torch.einsum("btgi,btgj->gij", cut, cut))
                counts[name] += len(kept) if reduced(name) else float(kept.sum())
    result = {name: (sum(A[name]) / n, sum(G[name]) / n, n / x.shape[0]) for name, n in counts.items()}
    for name, module in modules.items():
        if type(module) is not type(sharing(model, module)[-1]):  # a token meets no other in the table
            A_of, G_of, T = result[name]
            result[name] = (A_of, G_of * torch.eye(G_of.shape[-1]).double(), T)
    for name, module in treated(model).items():
        if isinstance(module, JOINT):
            channels = torch.arange(theta(module, module.weight, _bias(module)).shape[2])
            channels %= module.weight.numel()
            block = fisher_block(model, module, x, list(make_cotangents(logits)))
            result[name] = ((block * (channels[:, None] == channels))[None], torch.ones(1, 1, 1).double(), 1.0)
    return {name: result[name] for name in treated(model)}


def fisher_block(model: nn.Module, module: nn.Module, x: Tensor, cotangents: list[tuple[Tensor, float]]) -> Tensor:
    """The mean over samples of u u^T, u a sample's gradient of one module, by a forward and a backward for each."""
    block: Tensor = torch.zeros(()).double()
    for cotangent, weight in cotangents:
        for b in range(len(x)):
            model.zero_grad()
            model(x[b : b + 1]).backward(cotangent[b : b + 1])
            u = gradient_matrix(module).flatten()
            block = block + torch.outer(u, u) * weight / len(x)
    return block


def kfac_direction(
    A: Tensor, G: Tensor, T: float, gradient: Tensor, lam: float, method: str = "eigen", sides: str = "both"
) -> Tensor:
    """(K + damping)^-1 grad by a dense solve on the row-major vector, group by group."""
    out = []
    for a, g, x in zip(A, G, gradient, strict=True):
        eye_a, eye_g = torch.eye(len(a)).double(), torch.eye(len(g)).double()
        if sides == "input":
            matrix = torch.kron(eye_g, a + lam * eye_a)
        elif method == "eigen":
            matrix = T * torch.kron(g, a) + lam * torch.kron(eye_g, eye_a)
        else:
            pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
            s = (lam / T) ** 0.5
            matrix = T * torch.kron(g + s / pi * eye_g, a + s * pi * eye_a)
        out.append(torch.linalg.solve(matrix, x.flatten()).view_as(x))
    return torch.stack(out)
