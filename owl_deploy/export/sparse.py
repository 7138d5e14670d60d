"""Turn the graph of onnxruntime-genai's model builder into one of this package's operators.

The builder's process does so before anything is saved (builder.py): each weight is cast, packed and
let go by itself, and no fp32 copy of the model reaches memory or disk. The result opens in stock
onnxruntime-genai: the operator library lies in the folder and `genai_config.json` names it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir

from owl_deploy.errors import BadInput
from owl_deploy.export import onnx_file
from owl_deploy.export.grid import Grid
from owl_deploy.export.program import knows_logits
from owl_deploy.export.rewriter import DOMAIN, Cache, Head, Rewriter
from owl_deploy.export.rewrites import REPLACEMENTS, REWRITES, drop_unused, replace_attention
from owl_deploy.inference.drivers.onnxruntime import LAST_LOGITS
from owl_deploy.inference.loading import GENAI_CONFIG
from owl_deploy.models.families import heads
from owl_deploy.runtime import LIBRARY_NAME, LIBRARY_NAMES, library_path
from owl_deploy.runtime.value_types import TRAITS, Values


def sparsify(
    model: ir.Model,
    folder: Path,
    precision: Values = "bf16",
    cache: Cache | None = None,
    *,
    head: Head | None = None,
    grid: Grid | None = None,
    join: bool = True,
) -> dict[str, object]:
    """Rewrite the builder's fp32 graph `model` and save it in `folder`, beside what it wrote there.

    `precision` is that of the weights, `cache` that of the KV cache: fp16 unless `precision` is
    fp32; `head` is screened for integers unless it was rounded to few bits, else whole; `grid`,
    which the weights were rounded to, is kept where `precision` can hold it. Without `join` every
    operator stays a node of its own: slower, but the runtime's profile then shows each. Returns
    statistics.
    """
    library = library_path()
    config = json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8"))
    rewriter = Rewriter(
        model,
        precision,
        cache or ("fp32" if precision == "fp32" else "fp16"),
        head or _usual_head(precision, grid),
        int(config["model"]["decoder"].get("head_size", 0)),
        grid,
    )
    rewrites = REWRITES if join else (*REPLACEMENTS, drop_unused)
    counts = {rewrite.__name__: rewrite(rewriter) for rewrite in rewrites}
    if not rewriter.packed:
        raise BadInput("No linear layer of the builder's graph could be replaced.")
    rewriter.model.graph.opset_imports[DOMAIN] = 1
    onnx_file.save(rewriter.model, folder)
    # A deployment's is known by its name, whatever that is called which OWL_RUNTIME_LIBRARY names.
    name = library.name if library.name in LIBRARY_NAMES else LIBRARY_NAME
    shutil.copyfile(library, folder / name)
    _configure(config, folder, name, last_logits=knows_logits(rewriter.model.graph))
    kept = rewriter.cache if counts[replace_attention.__name__] else "fp32"
    return {"cache": kept, "replaced": counts, **_statistics(rewriter)}


def _usual_head(precision: Values, grid: Grid | None) -> Head:
    """Screened beside integers; whole where it is to have few bits, and was rounded to them."""
    traits = TRAITS[precision]
    if not traits.levels:
        return "whole"
    bits = min(grid.bits.get(name, 8) for name in heads()) if grid else 8
    return "whole" if max(bits, traits.stored_bits) < 8 else "screened"


def _configure(
    config: dict[str, Any], destination: Path, library: str, *, last_logits: bool
) -> None:
    options = config["model"]["decoder"].setdefault("session_options", {})
    options["custom_ops_library"] = library
    if last_logits:
        # onnxruntime-genai takes memory for the logits of each token of a prompt, 400 MB for 2048
        # tokens of a vocabulary of 49152, and reads the last token's. By this the engine knows, and
        # neither computes the others nor touches their memory.
        options[LAST_LOGITS] = "1"
    (destination / GENAI_CONFIG).write_text(json.dumps(config, indent=4) + "\n")


def _statistics(rewriter: Rewriter) -> dict[str, object]:
    """How many weights and bytes there are now."""
    infos = rewriter.packed.values()
    return {
        "screened_head": any(info.planes for info in infos),
        "sparse_weights": sum(info.sparse for info in infos),
        "dense_weights": sum(not info.sparse for info in infos),
        "elements": sum(info.rows * info.cols for info in infos),
        "nonzeros": sum(info.nonzeros for info in infos),
        "packed_bytes": sum(info.size_bytes for info in infos),
        "weights_on_grid": rewriter.on_grid,
    }
