"""Reconstruction the plain way: dense weights, gradients multiplied by the mask, Adam written out.

The halves of two families are written out, too, from the parts of their blocks.
"""

import torch


def llama_attention(block, hidden, arguments):
    return hidden + block.self_attn(block.input_layernorm(hidden), **arguments)[0]


def llama_mlp(block, hidden, _):
    return hidden + block.mlp(block.post_attention_layernorm(hidden))


def opt_attention(block, hidden, arguments):
    return hidden + block.self_attn(block.self_attn_layer_norm(hidden), **arguments)[0]


def opt_mlp(block, hidden, _):
    inner = block.activation_fn(block.fc1(block.final_layer_norm(hidden)))
    return hidden + block.fc2(inner)


HALVES = {"llama": (llama_attention, llama_mlp), "opt": (opt_attention, opt_mlp)}


def error(output, target):
    """Of each token the squared error over the target's squared norm; then the mean."""
    ratios = []
    for y, t in zip(output.flatten(0, 1), target.flatten(0, 1), strict=True):
        ratios.append(((y - t) ** 2).sum() / (t**2).sum())
    return torch.stack(ratios).mean()


def train(block, half, windows, epochs, learning_rate, arguments):
    """Train the parameters that `half` uses in place, all windows at each step, one an epoch.

    `windows`: what enters and what should come out, [n, length, width]. Adam (arXiv 1412.6980,
    algorithm 1) with a rate that falls linearly to zero, a share of the root mean square of what a
    tensor has left at the start (of one that has nothing, the least of the others'). Yields the
    loss before each step.
    """
    inputs, target = windows
    parameters = [p.requires_grad_() for p in block.parameters()]
    masks = [(p != 0).float() if p.ndim == 2 else torch.ones_like(p) for p in parameters]
    means = [torch.zeros_like(p) for p in parameters]
    squares = [torch.zeros_like(p) for p in parameters]
    sizes = [
        (p[m != 0] ** 2).mean().sqrt().detach() for p, m in zip(parameters, masks, strict=True)
    ]
    least = min(size for size in sizes if size > 0)
    sizes = [size if size > 0 else least for size in sizes]
    for step in range(epochs):
        loss = error(half(block, inputs, arguments), target)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        rate = learning_rate * (1 - step / epochs)
        for p, gradient, mask, mean, square, size in zip(
            parameters, gradients, masks, means, squares, sizes, strict=True
        ):
            if gradient is None:
                continue
            gradient = gradient * mask
            mean.mul_(0.9).add_(0.1 * gradient)
            square.mul_(0.999).add_(0.001 * gradient**2)
            first = mean / (1 - 0.9 ** (step + 1))
            second = square / (1 - 0.999 ** (step + 1))
            p.data -= rate * size * first / (second.sqrt() + 1e-8)
        yield float(loss.detach())
