"""`owl prune`: what is asked, what is planned, the walk over the blocks, what is left behind.

The passes over the blocks are those that are needed and no more: with dense weights one where the
allocation looks at scores (`measure`), or two, forward and back, where it looks at losses, as a
budget does (`sensitivity`); and one that prunes (`walk`), in which each block sees what the pruned
blocks before it make of the calibration text.
"""

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from owl_deploy.compression import write
from owl_deploy.compression.allocation.sparsities import resolved_layers
from owl_deploy.compression.methods import ROUNDS_ONLY
from owl_deploy.compression.picture import has_picture, sparsity_svg
from owl_deploy.compression.plan import Plan, resolve
from owl_deploy.compression.recipe import RESOLVED, dump_resolved, merged
from owl_deploy.compression.request import Request, as_settings, check
from owl_deploy.compression.sequential import Walk
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.compression.store import PLAN, Store
from owl_deploy.data.calibration import Calibration, as_calibration
from owl_deploy.data.text import source_files
from owl_deploy.models.manifest import CheckpointManifest, versions
from owl_deploy.utils.artefact import all_to_disk, only_writer
from owl_deploy.utils.hardware import ANY_HARDWARE, Hardware, on_threads
from owl_deploy.utils.progress import error_console
from owl_deploy.utils.ranks import Ranks, join
from owl_deploy.utils.resume import ROUNDING, asked_before, kept_for_resuming, partial_folder


def prune(
    model: str | Path,
    output: str | Path,
    settings: PruneSettings | dict[str, Any],
    calibration: Calibration | str | Path | None = None,
    hardware: Hardware = ANY_HARDWARE,
    *,
    force: bool = False,
    resume: bool = False,
    origin: dict[str, Any] | None = None,
) -> CheckpointManifest:
    """Prune `model` (a folder or a Hub name) into the checkpoint folder `output`.

    `settings`, or those that are given, as a dict; `calibration`, or its source alone, may be None
    when neither method nor allocation looks at inputs; `hardware` says where to compute.
    `force` replaces an output that is there. Every finished block is durable: a run that was
    stopped continues with `resume`, to bit-identical weights (on a CPU, with as many processes and
    the same batch size). `origin` (see `recipe.origin`) is recorded in the manifest: what the
    settings were made from.
    Returns the manifest, which says of each block what share of its weights was asked to go and
    went. Raises `BadInput` before any work for whatever can be known to be wrong by then,
    `EnvironmentFailed` for a full disk or memory.
    """
    started, output = time.perf_counter(), Path(output)
    settings, calibration = as_settings(settings), as_calibration(calibration)
    ranks = join(versions())
    with contextlib.ExitStack() as stack:
        if ranks.leads:
            # Without `force` nothing that is there is replaced, whatever lies in it.
            text = source_files(str(calibration.source)) if calibration and force else []
            stack.enter_context(only_writer(output, force, model, *text))
        before, planned = ranks.from_leader(
            lambda: _before(asked_before(output, resume=resume, force=force), output, ranks)
        )
        stack.enter_context(on_threads(before.get("threads")))
        request = check(
            model,
            settings,
            calibration,
            _as_before(hardware, before),
            ranks=ranks,
            planned=planned,
        )
        asked = request.deciding()
        alike = {what: asked[what] for what in ("model", "settings", "device", "dtype")}
        ranks.check_alike({"text": asked["calibration"]} | alike)
        store = ranks.from_leader(lambda: Store(output, asked, resume=resume, force=force))
        with kept_for_resuming(store, "A smaller --batch-size takes less."):
            store.check_seen(ranks)
            if (whole := ranks.from_leader(store.finished)) is not None:
                return whole
            plan, first = resolve(request, store)
            walk = Walk(request, plan, store, first)
            del first  # the walk lets it go after the first block
            if ranks.leads:
                _write_recipe(request, plan, store)
            reports = [
                write.report(part, plan.outlier_ratio(index), plan.costs_of(index))
                for index, part in enumerate(walk.parts())
            ]
            facts = write.describe(request, plan, reports, str(model))
            facts |= {"recipe": origin, "resumed": store.resumed}
            return ranks.from_leader(lambda: _complete(request, plan, store, facts, started))


def quantize(
    model: str | Path,
    output: str | Path,
    settings: dict[str, Any] | None = None,
    calibration: Calibration | str | Path | None = None,
    hardware: Hardware = ANY_HARDWARE,
    *,
    force: bool = False,
    resume: bool = False,
) -> CheckpointManifest:
    """Round the weights of `model` to few bits by GPTQ, and remove none of them.

    `settings`: those of `PruneSettings` that say how weights are rounded (`bits`, 4 without a
    `budget`; `bits_group`, `head_bits`, `skip`, `asymmetric`, `reconstruct`), by name. All else is
    as in `prune`, which raises what this raises.
    """
    values = {"method": ROUNDS_ONLY, **(settings or {})}
    if values.get("budget") is None:
        values.setdefault("bits", 4)
    return prune(
        model, output, merged(None, values), calibration, hardware, force=force, resume=resume
    )


def _before(asked: dict[str, Any], output: Path, ranks: Ranks) -> tuple[dict[str, Any], bool]:
    """What the run that is resumed was asked of `ROUNDING`, nothing where it had other processes,
    and whether it has come to a plan. `asked`: all that it was, empty where none is resumed.
    """
    of_rounding = asked.get(ROUNDING, {})
    same = of_rounding.get("processes") == ranks.size
    has_plan = bool(asked) and (partial_folder(output) / PLAN).is_file()
    return of_rounding if same else {}, has_plan


def _as_before(hardware: Hardware, before: dict[str, Any]) -> Hardware:
    """The `hardware`, with the batch that the run before chose by the memory that was free then."""
    if hardware.batch_size is not None or not before:
        return hardware
    return replace(hardware, batch_size=before.get("batch_size"))


def _complete(
    request: Request, plan: Plan, store: Store, facts: dict[str, Any], started: float
) -> CheckpointManifest:
    """Make the finished blocks the output, with the manifest of these `facts`."""
    store.check_unchanged(lambda: {"model": request.checkpoint.identity()})
    write.assemble(request, plan, store)
    facts["wall_seconds"] = time.perf_counter() - started
    manifest = CheckpointManifest.model_validate(facts)
    if has_picture(manifest):
        (store.folder / "sparsity.svg").write_text(sparsity_svg(manifest), encoding="utf-8")
    all_to_disk(store.folder)
    manifest.write(store.folder)  # last: with it the checkpoint is whole
    store.finish()
    return manifest


def _write_recipe(request: Request, plan: Plan, store: Store) -> None:
    """The resolved recipe, if SparseML has what reproduces the method."""
    if request.method.modifier is None:
        if request.method.removes:  # of what only rounds nobody expects a recipe of SparseML's
            error_console().print(
                f"SparseML has nothing that prunes as {plan.settings.method} does: the checkpoint "
                f"gets no {RESOLVED}.",
                soft_wrap=True,
            )
        return
    skeleton = request.skeleton
    counts = [len(skeleton.linears(index)) for index in range(len(skeleton.names))]
    layers = resolved_layers(request.shape, plan.sparsities, counts)
    if plan.settings.group:
        # No N:M keeps all. A Linear that is not named stays dense; a list names every block.
        layers = {name: one for name, one in layers.items() if one or name in skeleton.names}
    if plan.settings.head_sparsity is not None:
        layers[skeleton.family.head] = plan.settings.head_sparsity
    text = dump_resolved(plan.settings, layers)
    (store.folder / RESOLVED).write_text(text, encoding="utf-8")
