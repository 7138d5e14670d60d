"""What 4 bits of the output head cost the model, for a budget that pays for the head, too.

The model is run, not estimated: what the head is given is known, and where the table of the tokens
is the same matrix a second run begins with the rounded one.
"""

import torch
from pydantic import TypeAdapter

from owl_deploy.compression.allocation.sensitivity import remembered
from owl_deploy.compression.input_statistics import Inputs
from owl_deploy.compression.layer import Maker
from owl_deploy.compression.measure import gather_head
from owl_deploy.compression.quantization.formats import Format
from owl_deploy.compression.request import Request
from owl_deploy.compression.store import Store
from owl_deploy.models.manifest import Cost
from owl_deploy.utils.progress import bar

_BITS = 4


def measure_head(request: Request, store: Store) -> list[Cost]:
    """The costs of a head in planes, by which nothing is lost here, and of one in 4 bits.

    The latter's is the divergence from the dense model, in nats a token, on the windows that are
    held out. The cache folder keeps them, as those of the blocks.
    """
    assert request.room is not None
    assert request.room.head is not None
    asked = {"head_bits": _BITS}
    loss = remembered(
        request, request.settings, asked, TypeAdapter(float), lambda: _loss(request, store)
    )
    found = zip((8, _BITS), request.room.head, (0.0, loss), strict=True)
    return [Cost(bits=b, sparsity=0.0, bytes=s, loss=x) for b, s, x in found]


@torch.no_grad()
def _loss(request: Request, store: Store) -> float:
    assert request.windows is not None
    skeleton, windows, held_out = request.skeleton, request.windows, request.measured_by
    tied = skeleton.model.config.tie_word_embeddings
    passes = len(skeleton.names) * (len(windows) + (1 + tied) * len(held_out)) + len(windows)
    with bar("Measuring the head", passes) as advance:
        hidden = skeleton.run(windows, request.batch, store.folder, advance)
        statistics = gather_head(request, hidden, advance, hessian=True)
        inputs = Inputs(statistics, skeleton.family.head)
        dense = request.checkpoint.read(skeleton.head_weights[0])
        weight = dense.to(skeleton.device, torch.float32)
        left = Maker(request.settings).rounded(weight, inputs, Format(_BITS)).weight.to(dense.dtype)
        del hidden
        asked = (held_out, request.batch, store.folder, advance)
        whole = skeleton.run(*asked)
        rounded = skeleton.run(*asked, left) if tied else whole
        (loss,) = skeleton.divergences(held_out, whole, [rounded], left)
    return max(loss, 0.0)
