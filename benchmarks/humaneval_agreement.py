"""Whether deployments answer HumanEval's problems with PyTorch's tokens, and where they part.

    python benchmarks/humaneval_agreement.py CHECKPOINT DEPLOYMENT ... [--problems 20] [-o FILE]

PyTorch computes in float32, greedily, as `owl eval --tasks humaneval` asks (in the chat template
where there is one), on problems spread over the 164. A deployment is compared up to its first other
token: "near" is by how many nats PyTorch preferred its own there. A float32 deployment parts only
where that is next to nothing; a quantized one where it is less than what its weights lost.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from draft_speed import prompt_of, spread

from owl_deploy.bench.machine import look
from owl_deploy.data.text import load_tokenizer
from owl_deploy.evaluate.subject import engine_of
from owl_deploy.inference import EngineProcess, get_engine, open_deployment, threads_for
from owl_deploy.models.checkpoint import open_checkpoint

_KEPT = 8  # of the likeliest tokens at each place


@dataclass(frozen=True)
class Answer:
    """PyTorch's: `tokens` up to the end or the limit; at each place the likeliest [token, nats]."""

    problem: str
    prompt: list[int]
    tokens: list[int]
    likeliest: list[list[tuple[int, float]]]


@dataclass(frozen=True)
class Parting:
    """How many `tokens` are the same of `of`; where they part, both next ones, and how near."""

    problem: str
    tokens: int
    of: int
    deployment: str = ""
    pytorch: str = ""
    near: float | None = None


def in_pytorch(
    model: Any,  # noqa: ANN401 - transformers is untyped
    problem: str,
    prompt: list[int],
    end: int,
    most: int,
) -> Answer:
    """The greedy answer of `model` to `prompt`, of `most` tokens at most."""
    plainly = transformers.GenerationConfig(  # and not with the penalties that a model comes with
        do_sample=False,
        max_new_tokens=most,
        eos_token_id=end,
        pad_token_id=end,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plainly)
    best = [row[0].log_softmax(-1).topk(_KEPT) for row in out.logits]
    likeliest = [list(zip(b.indices.tolist(), b.values.tolist(), strict=True)) for b in best]
    return Answer(problem, prompt, out.sequences[0, len(prompt) :].tolist(), likeliest)


def compare(answer: Answer, found: list[int], tokenizer: Any) -> Parting:  # noqa: ANN401
    """Where the tokens `found` leave those of PyTorch."""
    wanted = answer.tokens
    same = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b), None)
    if same is None:
        return Parting(answer.problem, len(wanted), len(wanted))
    places = dict(answer.likeliest[same])
    least = min(places.values())
    return Parting(
        answer.problem,
        same,
        len(wanted),
        tokenizer.decode([found[same]]),
        tokenizer.decode([wanted[same]]),
        places[wanted[same]] - places.get(found[same], least),
    )


def in_deployment(
    folder: Path,
    answers: list[Answer],
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
    threads: int | None,
) -> list[Parting]:
    """Where the deployment parts from each of `answers`."""
    engine = engine_of(open_deployment(folder), None)
    room = get_engine(engine).context_for(max(len(a.prompt) + len(a.tokens) for a in answers))
    partings = []
    with EngineProcess(
        engine, folder, threads=threads_for(threads), context=room, all_logits=True
    ) as process:
        for answer in answers:
            asked = {"tokens": answer.prompt, "count": len(answer.tokens)}
            partings.append(
                compare(answer, process.request("greedy", **asked)["tokens"], tokenizer)
            )
    return partings


def show(folder: Path, partings: list[Parting]) -> None:
    whole = sum(one.tokens == one.of for one in partings)
    print(f"{folder.name}: {whole} of {len(partings)} answers are PyTorch's to the last token")
    for one in partings:
        if one.tokens < one.of:
            print(
                f"  {one.problem:14} parts after {one.tokens:4} of {one.of:4} tokens: "
                f"{one.deployment!r} for {one.pytorch!r}, near {one.near:.2g}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("deployments", nargs="+", type=Path)
    parser.add_argument("--problems", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--threads", type=int, help="of an engine [the physical cores]")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.checkpoint)
    chosen = spread(arguments.problems)
    model = open_checkpoint(arguments.checkpoint).load(torch.float32).eval()
    answers, started = [], time.monotonic()
    for one in chosen:
        prompt = prompt_of(tokenizer, one)
        end = tokenizer.eos_token_id
        answers.append(in_pytorch(model, one["task_id"], prompt, end, arguments.tokens))
        print(f"PyTorch: {one['task_id']}, {time.monotonic() - started:.0f} s", flush=True)
    del model  # the engines need the memory
    result: dict[str, Any] = {
        "cpu": look().cpu,
        "checkpoint": arguments.checkpoint.name,
        "tokens": arguments.tokens,
        "deployments": {},
    }
    for folder in arguments.deployments:
        partings = in_deployment(folder, answers, tokenizer, arguments.threads)
        show(folder, partings)
        result["deployments"][folder.name] = [asdict(one) for one in partings]
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
