"""Fine-tuning the plain way: dense weights, and every gradient multiplied by the mask."""

import copy

import torch


def train_under_a_mask(model, blocks, window, steps, learning_rate):
    """Train all parameters of the `blocks` (dotted names) on one window [length], in place.

    Returns the loss before each step. The learning rate, a share of the root mean square of what a
    tensor has left at the start (of one that has nothing, the least of the others'), falls
    linearly; gradients are clipped to norm 1, as the Trainer does.
    """
    model.train()
    model.requires_grad_(False)
    parameters = [p for name in blocks for p in model.get_submodule(name).parameters()]
    masks = [(p != 0).float() if p.ndim == 2 else torch.ones_like(p) for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    sizes = [
        p.detach()[m != 0].square().mean().sqrt() for p, m in zip(parameters, masks, strict=True)
    ]
    least = min(size for size in sizes if size > 0)
    sizes = [size if size > 0 else least for size in sizes]
    optimizer = torch.optim.AdamW([{"params": [p]} for p in parameters], weight_decay=0.0)
    losses = []
    for step in range(steps):
        for group, size in zip(optimizer.param_groups, sizes, strict=True):
            group["lr"] = learning_rate * float(size) * (1 - step / steps)
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, window[1:])
        optimizer.zero_grad()
        loss.backward()
        for parameter, mask in zip(parameters, masks, strict=True):
            parameter.grad.mul_(mask)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def distillation_loss(student, teacher, temperature):
    """T^2 KL(teacher / T || student / T) of logits [rows, vocabulary], the mean over the rows."""
    p, q = ((one / temperature).softmax(-1) for one in (teacher, student))
    return temperature**2 * (p * (p / q).log()).sum(-1).mean()


def merge_under_the_mask(weight, a, b, scale):
    """(W + scale B A) where W is not zero; weight [out, in], a [rank, in], b [out, rank]."""
    return (weight + scale * (b @ a)) * (weight != 0)


def block_errors(student, teacher, blocks, ids):
    """For each of the `blocks` |student's output - teacher's|^2 / |teacher's|^2, over all tokens.

    A block's output is found by cutting the model off behind it: what follows is left out, and the
    norm that comes last becomes nothing.
    """

    def output(model, count):
        cut = copy.deepcopy(model)
        path, _, _ = blocks[0].rpartition(".")
        layers = cut.get_submodule(path)
        cut.set_submodule(path, torch.nn.ModuleList(layers[:count]))
        parent = cut.get_submodule(path.rpartition(".")[0])
        for name in ("norm", "final_layer_norm"):
            if hasattr(parent, name):
                setattr(parent, name, torch.nn.Identity())
        cut.config.num_hidden_layers = parent.config.num_hidden_layers = count
        with torch.no_grad():
            return cut.base_model(input_ids=ids, use_cache=False).last_hidden_state

    errors = []
    for count in range(1, len(blocks) + 1):
        own, wanted = output(student, count), output(teacher, count)
        errors.append(float((own - wanted).pow(2).sum() / wanted.pow(2).sum()))
    return errors
