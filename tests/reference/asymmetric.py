"""What an asymmetric pruning aims at, by running two whole models: the dense one and the pruned.

Least squares of all tokens at once, in float64.
"""

import copy

import torch

# A block's Linears in the order in which they run, those with one input together; and what the
# stream that they add to enters next: a module in the block, "" after it. None: they add to none.
STAGES = {
    "llama": (
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), None),
        (("self_attn.o_proj",), "post_attention_layernorm"),
        (("mlp.gate_proj", "mlp.up_proj"), None),
        (("mlp.down_proj",), ""),
    ),
    "opt": (
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), None),
        (("self_attn.out_proj",), "final_layer_norm"),
        (("fc1",), None),
        (("fc2",), ""),
    ),
    "gemma3_text": (
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), None),
        (("self_attn.o_proj",), None),
        (("mlp.gate_proj", "mlp.up_proj"), None),
        (("mlp.down_proj",), None),
    ),
}


def seen(model, windows, module, *, output=False):
    """What enters a module of the model, or leaves it, for every token, [tokens, width]."""
    rows = []

    def record(_, inputs, given):
        one = given if output else inputs[0]
        rows.append((one[0] if isinstance(one, tuple) else one).reshape(-1, one.shape[-1]).double())

    handle = model.get_submodule(module).register_forward_hook(record)
    with torch.no_grad():
        for window in windows:
            model(window.unsqueeze(0), use_cache=False)
    handle.remove()
    return torch.cat(rows)


def counted(wanted, found, windows):
    """The error of each token, as far as it counts."""
    error = wanted - found
    length = len(error) // windows
    for start in range(0, len(error), length):
        most = wanted[start : start + length].norm(dim=1).median() / 2
        for one in error[start : start + length]:
            one *= min(1, most / one.norm()) if one.any() else 1
    return error


def aims(dense, pruned, windows, blocks, stages, ridge=16):
    """For each Linear, in order, the weight to keep in place of the dense one.

    `pruned`: the whole result; a Linear's own inputs come from those before it alone. `blocks`: the
    blocks' names.
    """
    state = copy.deepcopy(dense)
    found = {}
    for block in blocks:
        for names, stream in stages:
            for name in names:
                linear = f"{block}.{name}"
                rows = seen(state, windows, linear)
                weight = dense.get_submodule(linear).weight.detach().double()
                if stream is None:
                    both = seen(dense, windows, linear), rows
                    wanted = counted(*both, len(windows)) @ weight.T
                else:
                    what = {"module": f"{block}.{stream}" if stream else block}
                    both = [seen(one, windows, **what, output=not stream) for one in (dense, state)]
                    wanted = counted(*both, len(windows))
                share = ridge * rows.shape[1] / len(rows)
                squares = rows.square().sum(0)
                least = 0.01 * float(squares[squares > 0].median())
                at_least = torch.where(squares > 0, squares.clamp(min=least), 0)
                sizes = ((1 + share) * at_least - squares).sqrt()
                change = torch.linalg.lstsq(
                    torch.cat([rows, sizes.diag()]),
                    torch.cat([wanted, torch.zeros(rows.shape[1], len(weight)).double()]),
                ).solution.T
                found[linear] = (weight + change).float()
            for name in names:
                own = state.get_submodule(f"{block}.{name}").weight
                own.data = pruned.get_submodule(f"{block}.{name}").weight.data.clone()
    return found
