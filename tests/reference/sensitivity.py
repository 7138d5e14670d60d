"""What a change of one weight costs the model, by its definition: whole model, a window at a time.

Tokens are drawn from the model's own answers; the gradient of their loss by the weight is a sample
whose products with the change, of each row by itself, are squared and added up.
"""

import torch

ROWS = 256  # of logits that are drawn from together


def drawn(model, windows, seed):
    """For each window, the tokens that the model draws at its places."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for window in windows:
        shares = model(window.unsqueeze(0)).logits[0].float().softmax(-1)
        parts = [torch.multinomial(part, 1, generator=generator) for part in shares.split(ROWS)]
        found.append(torch.cat(parts).squeeze(1))
    return found


def loss_of(model, weight, change, windows, seed):
    """In nats a token, by the second order, for a `change` of the parameter `weight` [out, in]."""
    with torch.no_grad():
        tokens = drawn(model, windows, seed)
    total = 0.0
    for window, targets in zip(windows, tokens, strict=True):
        logits = model(window.unsqueeze(0)).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, weight)
        for row in range(len(gradient)):
            total += float((gradient[row] * change[row]).sum()) ** 2
    return total / (2 * windows.numel())


def divergence(model, weight, change, windows):
    """The mean divergence of the changed model's answers from the model's, in nats a token."""
    with torch.no_grad():
        before = model(windows).logits.log_softmax(-1)
        weight += change
        after = model(windows).logits.log_softmax(-1)
        weight -= change
        return float((before.exp() * (before - after)).sum(-1).mean())
