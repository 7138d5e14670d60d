"""What a benchmark compares: each deployment in each of its engines, under a name of its own."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from owl_deploy.bench.decision import scores_of
from owl_deploy.bench.plan import BenchPlan
from owl_deploy.bench.result import SPARSE_IN_3_BITS, Block, Role, Subject
from owl_deploy.errors import BadInput
from owl_deploy.inference import Deployment, Engine, engine_for, get_engine, open_deployment
from owl_deploy.inference.draft import open_draft
from owl_deploy.models.manifest import BlockShares


def entries_of(plan: BenchPlan) -> list[tuple[Subject, Deployment]]:
    """Each deployment in each of its engines, under a name of its own: candidates first."""
    roles: tuple[tuple[Role, tuple[Path, ...]], ...] = (
        ("candidate", plan.candidates),
        ("baseline", plan.baselines),
    )
    opened = [
        (role, open_deployment(path, trust_library=plan.trust_library))
        for role, paths in roles
        for path in _unique(paths)
    ]
    chosen = [
        (role, deployment, engine)
        for role, deployment in opened
        for engine in engines_for(deployment.path, deployment.target, plan.engines)
    ]
    names = _names([(deployment, engine) for _, deployment, engine in chosen])
    entries = [
        (_subject(name, role, deployment, engine), deployment)
        for name, (role, deployment, engine) in zip(names, chosen, strict=True)
    ]
    return entries if plan.draft is None else list(_with_draft(plan, plan.draft, entries))


def _with_draft(
    plan: BenchPlan, asked: str, entries: list[tuple[Subject, Deployment]]
) -> Iterator[tuple[Subject, Deployment]]:
    """Each candidate with the draft, and as a baseline without; the other baselines as they are."""
    for subject, deployment in entries:
        if subject.role == "candidate":
            draft = open_draft(
                deployment, asked, plan.draft_tokens, trust_library=plan.trust_library
            )
            update = {
                "name": f"{subject.name} with {draft.name}",
                "draft": draft.place,
                "draft_tokens": draft.tokens,
            }
            yield subject.model_copy(update=update), deployment
    for subject, deployment in entries:
        yield subject.model_copy(update={"role": "baseline"}), deployment


def _subject(name: str, role: Role, deployment: Deployment, engine: Engine) -> Subject:
    return Subject(
        name=name,
        path=str(deployment.path),
        role=role,
        target=deployment.target,
        engine=engine.name,
        precision=deployment.precision,
        zeros=deployment.zeros,
        perplexity=deployment.perplexity,
        perplexity_on=deployment.perplexity_on,
        scores=scores_of(deployment.path),
        size_bytes=deployment.size_bytes,
        blocks=_pruned(deployment.blocks),
    )


def _pruned(blocks: Sequence[BlockShares]) -> tuple[Block, ...]:
    """The blocks of a pruned model; none of one that was only rounded, whatever zeros that left.

    One that was rounded after it was pruned says of itself that nothing was asked to go.
    """
    share = statistics.fmean(one.achieved for one in blocks) if blocks else 0.0
    if not any(one.sparsity for one in blocks) and share < SPARSE_IN_3_BITS:
        return ()
    return tuple(
        Block(name=one.name, sparsity=one.achieved, outlier_ratio=one.outlier_ratio)
        for one in blocks
    )


def _unique(paths: Iterable[Path]) -> list[Path]:
    return list({path.resolve(): path for path in paths}.values())


def engines_for(path: Path, target: str, asked: tuple[str, ...]) -> list[Engine]:
    """The engines to run a deployment in; raises `BadInput` if none of those asked opens it."""
    if not asked:
        return [engine_for(target)]
    fitting = [get_engine(name) for name in dict.fromkeys(asked)]
    fitting = [engine for engine in fitting if target in engine.targets]
    if not fitting:
        raise BadInput(
            f"{path} is made for the target {target!r}, which {' and '.join(asked)} cannot open.",
            f"Leave --engine out, or export it again with --target {asked[0]}.",
        )
    return fitting


def _names(pairs: list[tuple[Deployment, Engine]]) -> list[str]:
    """Short names that differ: the folder's, with the engine or the parents where need be."""
    plain = [deployment.path.resolve().name for deployment, _ in pairs]
    with_engine = [f"{name} in {engine.name}" for name, (_, engine) in zip(plain, pairs)]  # noqa: B905
    names = [
        short if plain.count(short) == 1 else longer
        for short, longer in zip(plain, with_engine, strict=True)
    ]
    return [
        name if names.count(name) == 1 else f"{deployment.path} in {engine.name}, {index + 1}"
        for index, (name, (deployment, engine)) in enumerate(zip(names, pairs, strict=True))
    ]
