"""OWL and Wanda as slowly and plainly as they can be written, to hold the package to.

Loops over weights, full sorts, the whole model in memory, one sample at a time.
"""

import torch


def block_inputs(model: torch.nn.Module, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """For each Linear in a decoder block: sqrt(sum over tokens of x^2 / samples), [in], float64."""
    norms = input_norms(model, windows)
    return {name: norm for name, norm in norms.items() if ".layers." in name}


def input_norms(model: torch.nn.Module, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same for every Linear of the model, its head among them."""
    squares: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def record(module, inputs, output):
            x = inputs[0].double().reshape(-1, inputs[0].shape[-1])
            squares[name] = squares.get(name, 0) + (x * x).sum(0)

        return record

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        for window in windows:
            model(window.unsqueeze(0), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: (value / len(windows)).sqrt() for name, value in squares.items()}


def outlier_ratios(model: torch.nn.Module, windows: torch.Tensor, multiple: float) -> list[float]:
    """Percent of each block's Wanda scores above `multiple` times the block's mean score."""
    norms = block_inputs(model, windows)
    ratios = []
    for index in range(model.config.num_hidden_layers):
        scores = []
        for name, module in model.named_modules():
            if name in norms and f".layers.{index}." in name:
                scores.append((module.weight.detach().double().abs() * norms[name]).flatten())
        block = torch.cat(scores)
        ratios.append(100.0 * (block > multiple * block.mean()).double().mean().item())
    return ratios


def owl_sparsities(ratios: list[float], target: float, spread: float) -> list[float]:
    """The paper's map from ratios to sparsities, for blocks of equal size and no bound hit."""
    low, high = min(ratios), max(ratios)
    scaled = [(ratio - low) / (high - low) * 2 * spread for ratio in ratios]
    mean = sum(scaled) / len(scaled)
    return [1 - (value - mean + 1 - target) for value in scaled]


def lowest(scores: list[float], count: int) -> set[int]:
    """The indices of the `count` lowest scores; of equal ones, the first."""
    return {index for _, index in sorted((s, i) for i, s in enumerate(scores))[:count]}


def wanda_mask(weight: torch.Tensor, norm: torch.Tensor, sparsity: float) -> torch.Tensor:
    """True where a weight goes: within each row, the lowest |w| * norm."""
    rows, columns = weight.shape
    total = round(sparsity * rows * columns)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for row in range(rows):
        count = (row + 1) * total // rows - row * total // rows
        scores = [abs(weight[row, c].item()) * norm[c].item() for c in range(columns)]
        for column in lowest(scores, count):
            mask[row, column] = True
    return mask


def magnitude_mask(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """True where a weight goes: the lowest |w| of the whole matrix."""
    flat = weight.abs().flatten().tolist()
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[list(lowest(flat, round(sparsity * len(flat))))] = True
    return mask.view_as(weight)


def wanda_prune(
    model: torch.nn.Module, windows: torch.Tensor, sparsities: list[float]
) -> torch.nn.Module:
    """Prune block after block; each sees what the pruned blocks before it give."""
    names = block_inputs(model, windows[:1])
    each = {
        name: sparsity
        for index, sparsity in enumerate(sparsities)
        for name in names
        if f".layers.{index}." in name
    }
    return wanda_prune_linears(model, windows, each)


def wanda_prune_linears(
    model: torch.nn.Module, windows: torch.Tensor, sparsities: dict[str, float]
) -> torch.nn.Module:
    """The same with a sparsity for each Linear by its name."""
    for index in range(model.config.num_hidden_layers):
        norms = block_inputs(model, windows)
        for name, sparsity in sparsities.items():
            if f".layers.{index}." in name:
                module = model.get_submodule(name)
                mask = wanda_mask(module.weight.detach(), norms[name].float(), sparsity)
                module.weight.data[mask] = 0
    return model
