"""Target `deepsparse`: one ONNX graph, traced from the real model, with DeepSparse's KV cache.

The contract (tried on DeepSparse 1.8, whose engine aborts the process on much else):

- inputs `input_ids [B, S]`, `attention_mask [B, T]`, `positions [B, S]`, `causal_mask [B, 1, S, T]`
  (int64; 1 = attend) and `past_key_values.{i}.{key,value} [B, H, T - S, D]`; outputs `logits
  [B, S, V]` first, then `present.{i}.{key,value} [B, H, T, D]`. All inputs take part.
- the rotary embedding is a table, gathered at `positions`;
- grouped-query heads are repeated to all H *before* the cache, by Unsqueeze, Expand, Reshape;
- one Concat on axis 2 makes what is both `present` and the input of attention.

No family is named here. transformers calls the attention function, the cache and the rotary
module through seams of its own, and each is replaced by one that traces into that contract.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import nn
from transformers import AttentionInterface

from owl_deploy.errors import BadInput, first_line
from owl_deploy.export import onnx_file, passes
from owl_deploy.export.rotary import (
    LENGTH_DEPENDENT,
    head_size,
    layer_types,
    modules,
    parameters,
    tables,
)
from owl_deploy.export.source import Source, cache_keyword

OPSET = 14  # DeepSparse's core is ONNX Runtime 1.15; its readers know IR 9 at most, torch writes 7
_ATTENTION = "owl_traced"
_MASKED = 3e38  # taken from the scores that must not count; finite, since inf - inf is NaN


@dataclass(frozen=True)
class Heads:
    """The sizes of attention: `layers`, query `heads`, `groups` (KV heads), head `size`."""

    layers: int
    heads: int
    groups: int
    size: int

    @classmethod
    def of(cls, config: Any) -> "Heads":  # noqa: ANN401 - a transformers config
        """The sizes in a transformers config."""
        heads = int(config.num_attention_heads)
        return cls(
            layers=int(config.num_hidden_layers),
            heads=heads,
            groups=int(getattr(config, "num_key_value_heads", None) or heads),
            size=head_size(config),
        )

    def past_names(self) -> list[str]:
        """The cache's names in order, without the prefix that says past or present."""
        return [f"{layer}.{kind}" for layer in range(self.layers) for kind in ("key", "value")]


class ConcatCache:
    """In the place of transformers' cache: repeats heads, appends to the past, keeps `present`."""

    is_compileable = False

    def __init__(self, heads: Heads, past: tuple[torch.Tensor, ...]) -> None:
        self._heads = heads
        self._past = past
        self.present: list[torch.Tensor] = list(past)

    def update(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        layer_idx: int,
        *_: object,
        **__: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New key and value [B, groups, S, D] of a layer to those of all tokens [B, H, T, D]."""
        for index, new in ((2 * layer_idx, key), (2 * layer_idx + 1, value)):
            repeated = self._repeat(new)
            self.present[index] = torch.cat([self._past[index], repeated], dim=2)
        return self.present[2 * layer_idx], self.present[2 * layer_idx + 1]

    def _repeat(self, new: torch.Tensor) -> torch.Tensor:
        """[B, groups, S, D] to [B, H, S, D]: each group's head for the queries that share it."""
        heads = self._heads
        if heads.groups == heads.heads:
            return new
        spread = new.unsqueeze(2).expand(-1, -1, heads.heads // heads.groups, -1, -1)
        return spread.reshape(new.shape[0], heads.heads, -1, heads.size)

    def get_seq_length(self, *_: object) -> int:
        """Asked for by models that count positions themselves; ours are given."""
        return 0


class TracedAttention:
    """The attention function of the trace; the mask it is given is 1 where a key may be seen."""

    def __init__(self) -> None:
        self._bias: dict[int | None, torch.Tensor] = {}

    def reset(self) -> None:
        """Forget the masks of the last forward pass."""
        self._bias.clear()

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        """query [B, H, S, D], key and value [B, H, T, D] -> [B, S, H, D]."""
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        # Scaling the query costs S x D, scaling the scores would cost S x T.
        scores = torch.matmul(query * scaling if scaling != 1 else query, key.transpose(2, 3))
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        shares = torch.softmax(scores + self._masked(attention_mask, sliding_window), dim=-1)
        return torch.matmul(shares, value).transpose(1, 2), None

    def _masked(self, allowed: torch.Tensor, window: int | None) -> torch.Tensor:
        """What is added to the scores, made once for all layers with the same window."""
        if window not in self._bias:
            seen = allowed if window is None else allowed * _within(allowed, window)
            self._bias[window] = (seen - 1.0) * _MASKED
        return self._bias[window]


def _within(allowed: torch.Tensor, window: int) -> torch.Tensor:
    """1 where a key is among the last `window` that its query may see.

    Counting what is allowed from a key to the query, not positions, is right with padding too.
    """
    counted = torch.cumsum(allowed, dim=-1)
    from_key_on = counted[..., -1:] - counted + allowed
    return (from_key_on <= window).to(allowed.dtype)


class RotaryTable(nn.Module):
    """A rotary module as a table of its own results at positions 0 to `length` - 1."""

    def __init__(self, rotary: nn.Module, length: int) -> None:
        super().__init__()
        for kind in layer_types(rotary):
            cosine, sine = tables(rotary, torch.arange(length), kind)
            self.register_buffer(f"cosine_{kind}" if kind else "cosine", cosine.clone())
            self.register_buffer(f"sine_{kind}" if kind else "sine", sine.clone())

    def forward(
        self, _: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine [B, S, D] at `position_ids` [B, S]."""
        end = f"_{layer_type}" if layer_type else ""
        cosine, sine = getattr(self, f"cosine{end}"), getattr(self, f"sine{end}")
        return nn.functional.embedding(position_ids, cosine), nn.functional.embedding(
            position_ids, sine
        )


class Decoder(nn.Module):
    """The model with the contract's inputs and outputs."""

    def __init__(self, model: Any, heads: Heads, attention: TracedAttention) -> None:  # noqa: ANN401
        super().__init__()
        self.decoder = model
        self._heads = heads
        self._attention = attention
        self._cache_keyword = cache_keyword(model)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        positions: torch.Tensor,
        causal_mask: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """See the module's docstring for shapes and names."""
        self._attention.reset()
        allowed = (causal_mask * attention_mask[:, None, None, :]).to(torch.float32)
        cache = ConcatCache(self._heads, past)
        output = self.decoder(
            input_ids=input_ids,
            attention_mask=allowed,
            position_ids=positions,
            use_cache=True,
            **{self._cache_keyword: cache},
        )
        return (output.logits, *cache.present)


def max_context(config: Any) -> int:  # noqa: ANN401 - a transformers config
    """The number of positions for which the traced graph is exact."""
    limit = int(config.max_position_embeddings)
    for row in parameters(config):
        if row.get("rope_type") in LENGTH_DEPENDENT:
            limit = min(limit, int(row.get("original_max_position_embeddings") or limit))
    return limit


@contextlib.contextmanager
def traceable(model: Any) -> Iterator[Decoder]:  # noqa: ANN401 - transformers is partly typed
    """The model as a `Decoder`, with our attention and rotary tables; restored afterwards."""
    before = model.config._attn_implementation
    attention = TracedAttention()
    # A name without a registered mask: transformers then hands our mask through as it is.
    AttentionInterface.register(_ATTENTION, attention)
    rotaries = modules(model)
    try:
        for name, module in rotaries.items():
            model.set_submodule(name, RotaryTable(module, max_context(model.config)))
        model.set_attn_implementation(_ATTENTION)
        # eval(): the exporter leaves a module, with all in it, in the mode that it found it in.
        yield Decoder(model, Heads.of(model.config), attention).eval()
    finally:
        for name, module in rotaries.items():
            model.set_submodule(name, module)
        model.set_attn_implementation(before)


def example(heads: Heads, batch: int, tokens: int, past: int) -> dict[str, torch.Tensor]:
    """Inputs of the given sizes, in the contract's order."""
    total = past + tokens
    inputs = {
        "input_ids": torch.zeros(batch, tokens, dtype=torch.long),
        "attention_mask": torch.ones(batch, total, dtype=torch.long),
        "positions": torch.arange(past, total).expand(batch, -1).contiguous(),
        "causal_mask": torch.ones(batch, 1, tokens, total, dtype=torch.long),
    }
    for name in heads.past_names():
        inputs[f"past_key_values.{name}"] = torch.zeros(batch, heads.heads, past, heads.size)
    return inputs


def _axes(heads: Heads) -> dict[str, dict[int, str]]:
    axes = {
        "input_ids": {0: "batch", 1: "tokens"},
        "attention_mask": {0: "batch", 1: "total"},
        "positions": {0: "batch", 1: "tokens"},
        "causal_mask": {0: "batch", 2: "tokens", 3: "total"},
        "logits": {0: "batch", 1: "tokens"},
    }
    for name in heads.past_names():
        axes[f"past_key_values.{name}"] = {0: "batch", 2: "past"}
        axes[f"present.{name}"] = {0: "batch", 2: "total"}
    return axes


def trace(decoder: Decoder, heads: Heads) -> ir.Model:
    """The graph with its weights as inputs that have a value.

    Weights stay out of the exporter: it would copy them several times, and fail above 2 GB.
    """
    inputs = example(heads, batch=2, tokens=3, past=4)
    file: Any = io.BytesIO()  # taken, though annotated as a path only
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        warnings.catch_warnings(),
        _small_inference(),
    ):
        warnings.simplefilter(
            "ignore"
        )  # of the tracer, about Python values; parity checks the result
        torch.onnx.export(
            decoder,
            tuple(inputs.values()),
            file,
            input_names=list(inputs),
            output_names=["logits", *(f"present.{name}" for name in heads.past_names())],
            dynamic_axes=_axes(heads),
            opset_version=OPSET,
            dynamo=False,  # the newer exporter starts at opset 18: more than DeepSparse reads
            export_params=False,
            do_constant_folding=False,
        )
    model = ir.from_proto(onnx.load_model_from_string(file.getvalue()))
    state = decoder.state_dict()
    for value in model.graph.inputs:
        if value.name in state:
            value.const_value = TorchTensor(state[value.name], value.name)
    return model


@contextlib.contextmanager
def _small_inference() -> Iterator[None]:
    """Keep the weights out of the exporter's own shape inference, which copies them all, twice."""
    name = "_jit_pass_onnx_graph_shape_type_inference"
    original = getattr(torch._C, name, None)
    if original is None:
        yield
        return
    with mock.patch.object(torch._C, name, lambda graph, _, opset: original(graph, {}, opset)):
        yield


def build(source: Source, folder: Path, external_bytes: int) -> dict[str, Any]:
    """Write `model.onnx` into `folder`; weights go beside it above `external_bytes` of them.

    Returns what the manifest says of it. Raises `BadInput` for a model that does not trace.
    """
    heads = Heads.of(source.model.config)
    try:
        with traceable(source.model) as decoder:
            model = trace(decoder, heads)
            passes.simplify(model, [example(heads, 2, 3, 4), example(heads, 3, 5, 6)])
            onnx_file.save(model, folder, external=passes.take_weights(model) > external_bytes)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        raise BadInput(
            f"The {source.config['model_type']!r} model in {source.folder} does not trace: "
            f"{first_line(error)}"
        ) from error
    return {"graph": "traced", "opset": OPSET, "max_context": max_context(source.model.config)}
