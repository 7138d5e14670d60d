"""Compare DeepSparse's own clients with `owl bench`'s worker, on one deployment.

python benchmarks/deepsparse_clients.py DEPLOYMENT --python PYTHON [-o RESULT.json]

PYTHON is that of an environment made from requirements/deepsparse-clients.lock. Latency is compared
twice, like with like: `deepsparse.benchmark` with the one token in its cache that it has unless
told otherwise, and with a cache as full as `owl bench` has it; each beside our own loop with as
many tokens. The rounds alternate, each in a fresh process. The text is compared greedily. Every
client gets a private copy, because DeepSparse's rewrite the model file in place.
"""

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from owl_deploy.bench.machine import look
from owl_deploy.inference import EngineProcess, default_threads

CONTEXT, STEPS, WARMUP, SECONDS, NEW = 512, 32, 8, 5, 32
PROMPT = (
    "The water clock is one of the oldest instruments for measuring time. A vessel with a small "
    "hole near its base was filled to a mark, and the falling level showed how many hours had "
    "passed since sunrise. In 1656 a Dutch scientist built the first pendulum clock, which lost "
    "only 15 seconds a day; before that, a good clock was wrong by a quarter of an hour."
)
PIPELINE = """
import json, sys
from deepsparse import Pipeline
folder, prompt, count, context = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
pipeline = Pipeline.create(task="text_generation", model_path=folder, sequence_length=context,
                           prompt_sequence_length=64)
answer = pipeline(prompt=prompt, max_new_tokens=count, do_sample=False)
print()
print(json.dumps({"text": answer.generations[0].text}))
"""


@contextlib.contextmanager
def private_copy(deployment: Path) -> Iterator[Path]:
    """A copy whose graph may be rewritten; the weights beside it are linked."""
    with tempfile.TemporaryDirectory(prefix="owl-clients-") as folder:
        for path in sorted(deployment.iterdir()):
            target = Path(folder) / path.name
            if path.suffix == ".data":
                target.symlink_to(path.absolute())
            else:
                target.write_bytes(path.read_bytes())
        yield Path(folder)


def client(python: Path, *arguments: str, cwd: Path) -> str:
    """Run the environment's Python; its stdout. Its own failure is shown whole."""
    done = subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env={
            **os.environ,
            "NM_DISABLE_ANALYTICS": "True",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": "",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{arguments} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def their_latency(python: Path, deployment: Path, filled: int, threads: int) -> float:
    """`deepsparse.benchmark`, ms a token (median) with `filled` tokens in a cache of CONTEXT."""
    with private_copy(deployment) as folder:
        module = ("-m", "deepsparse.benchmark.benchmark_model", str(folder / "model.onnx"))
        shape = ("--sequence_length", str(CONTEXT), "--input_ids_length", "1")
        how = ("--num_cores", str(threads), "--time", str(SECONDS), "--quiet")
        cache = ("--num_kv_cache_tokens", str(filled))
        client(python, *module, *shape, *how, *cache, "-x", str(folder / "out.json"), cwd=folder)
        found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return float(found["benchmark_result"]["median"])


def our_latency(deployment: Path, filled: int, threads: int) -> float:
    """`owl bench`'s loop, ms a token (median); the last token attends to `filled` + 1."""
    prompt = [1] * max(1, filled - STEPS - WARMUP)
    with EngineProcess("deepsparse", deployment, threads=threads, context=CONTEXT) as process:
        answer = process.request("decode", prompt=prompt, steps=STEPS, warmup=WARMUP)
    return float(statistics.median(answer["latencies_ms"]))


def their_text(python: Path, deployment: Path, prompt: str, count: int) -> str:
    """The `count` tokens that DeepSparse's text_generation pipeline answers, greedily."""
    with private_copy(deployment) as folder:
        asked = (str(folder), prompt, str(count - 1), "256")  # it gives one more than it is asked
        out = client(python, "-c", PIPELINE, *asked, cwd=folder)
    text: str = json.loads(out.splitlines()[-1])["text"]
    return text


def our_text(deployment: Path, prompt: str, count: int) -> str:
    """What our driver of DeepSparse answers, greedily."""
    tokenizer = Tokenizer.from_file(str(deployment / "tokenizer.json"))
    with EngineProcess("deepsparse", deployment, context=256) as process:
        answer = process.request("greedy", tokens=tokenizer.encode(prompt).ids, count=count)
    text: str = tokenizer.decode(answer["tokens"])
    return text


def compare_latency(
    python: Path, deployment: Path, rounds: int, threads: int
) -> dict[str, dict[str, Any]]:
    """Both loops with a nearly empty and a full cache: samples in ms, and the median ratio."""
    table: dict[str, dict[str, Any]] = {}
    for name, filled in (("nearly empty cache", 1), ("full cache", CONTEXT - 1)):
        theirs, ours = [], []
        for index in range(rounds):
            for mine in (False, True) if index % 2 == 0 else (True, False):
                if mine:
                    ours.append(our_latency(deployment, filled, threads))
                else:
                    theirs.append(their_latency(python, deployment, filled, threads))
        ratios = [b / a for a, b in zip(theirs, ours, strict=True)]
        table[name] = {
            "deepsparse.benchmark_ms": theirs,
            "owl_ms": ours,
            "owl_over_deepsparse": statistics.median(ratios),
        }
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("deployment", type=Path)
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    python = arguments.python.absolute()
    here = look()
    load = os.getloadavg()
    theirs = their_text(python, arguments.deployment, PROMPT, NEW)
    ours = our_text(arguments.deployment, PROMPT, NEW)
    result = {
        "command": " ".join(sys.argv),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": here.model_dump(),
        "load_average": load,
        "threads": arguments.threads,
        "latency": compare_latency(
            python, arguments.deployment, arguments.rounds, arguments.threads
        ),
        "text": {"deepsparse": theirs, "owl": ours, "same": theirs == ours},
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
