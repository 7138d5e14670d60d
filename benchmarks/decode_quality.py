"""What a deployment loses against its checkpoint: whole texts at once, and token by token.

    python benchmarks/decode_quality.py CHECKPOINT TEXT DEPLOYMENT ... [--windows 6] [-o FILE]

A text at once goes through the many-row kernels, as prompts and `owl eval` do; one token at a time
is what decoding does, where an int8 head is screened. Reports perplexity relative to the
checkpoint's, the mean Kullback-Leibler divergence from its distribution, and how often the
likeliest token is the same.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from owl_deploy.bench.machine import look
from owl_deploy.data.tokens import load_tokens
from owl_deploy.export.parity import Session


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def reference(checkpoint: Path, windows: NDArray[np.int64]) -> list[NDArray[np.float64]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        logits = (model(torch.from_numpy(window[None])).logits[0, :-1] for window in windows)
        return [log_softmax(window.numpy()).astype(np.float32) for window in logits]


def compare(
    session: Session,
    windows: NDArray[np.int64],
    expected: list[NDArray[np.float64]],
    *,
    single: bool,
) -> dict[str, float]:
    losses, divergences, same = [], [], []
    for window, wanted in zip(windows, expected, strict=True):
        session.start()
        fed = window[:-1].tolist()
        if single:
            logits = np.concatenate([session.step([token]) for token in fed])
        else:
            logits = session.step(fed)
        found = log_softmax(logits)
        places = np.arange(len(fed)), window[1:]
        losses.append((wanted[places] - found[places]).mean())
        divergences.append((np.exp(wanted) * (wanted - found)).sum(axis=-1).mean())
        same.append((wanted.argmax(axis=-1) == found.argmax(axis=-1)).mean())
    return {
        "perplexity": float(np.exp(np.mean(losses)) - 1),
        "kl_divergence": float(np.mean(divergences)),
        "same_first_token": float(np.mean(same)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text")
    parser.add_argument("deployments", nargs="+", type=Path)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    tokens = load_tokens(arguments.checkpoint, [arguments.text]).numpy()
    size = arguments.windows * arguments.length
    windows = tokens[:size].reshape(arguments.windows, arguments.length)
    expected = reference(arguments.checkpoint, windows)
    result = {
        "cpu": look().cpu,
        "checkpoint": arguments.checkpoint.name,
        "windows": arguments.windows,
        "length": arguments.length,
        "deployments": {},
    }
    for folder in arguments.deployments:
        session = Session(folder)
        found = {
            name: compare(session, windows, expected, single=single)
            for name, single in (("at once", False), ("token by token", True))
        }
        result["deployments"][folder.name] = found
        for name, row in found.items():
            print(
                f"{folder.name:24} {name:15} perplexity {100 * row['perplexity']:+.2f} %, "
                f"KL {row['kl_divergence']:.2e}, same first token {row['same_first_token']:.3f}",
                flush=True,
            )
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
