"""Peak memory of `owl prune` on a model far larger than the memory it may take.

    python benchmarks/prune_memory.py --shape 7b --samples 2 --length 128 [-o FILE]

Writes a random Llama-shaped checkpoint (bfloat16, sharded) into a scratch folder, prunes it in a
process of its own, and reports that process's peak resident memory as the kernel counts it, pages
of mapped files included.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from owl_deploy.bench.machine import look
from owl_deploy.demo_input import CALIBRATION, MODEL, demo_input

SHAPES: dict[str, dict[str, int]] = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def write_random_model(folder: Path, shape: dict[str, int]) -> int:
    """A random Llama in bfloat16, a shard a block, with the demo's tokenizer; its size in bytes."""
    source = demo_input() / MODEL
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=4096, tie_word_embeddings=False, **shape
    )
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[:3]) if ".layers." in name else "rest"
        parts.setdefault(part, {})[name] = parameter
    weight_map, size = {}, 0
    for number, (_, tensors) in enumerate(parts.items(), start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        real = {
            name: torch.ones(meta.shape, dtype=torch.bfloat16)
            if "norm" in name
            else torch.randn(meta.shape, dtype=torch.bfloat16) * 0.02
            for name, meta in tensors.items()
        }
        save_file(real, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(real, file))
        size += sum(tensor.nbytes for tensor in real.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def main() -> None:
    """Make the model, prune it, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--allocation", default="owl")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--scratch", type=Path, help="a folder on a disk with room for two models")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        model, out = Path(scratch) / "model", Path(scratch) / "pruned"
        size = write_random_model(model, SHAPES[given.shape])
        command = [sys.executable, "-m", "owl_deploy", "prune", str(model), "-o", str(out)]
        command += ["--calibration", str(demo_input() / CALIBRATION), "--method", given.method]
        command += ["--allocation", given.allocation, "--samples", str(given.samples)]
        command += ["--sequence-length", str(given.length), "--json"]
        started = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        manifest: dict[str, Any] = json.loads(done.stdout)
    result = {
        "cpu": look().cpu,
        "shape": given.shape,
        "method": f"{given.allocation}-{given.method}",
        "samples": given.samples,
        "length": given.length,
        "model_bytes": size,
        "peak_resident_bytes": peak,
        "seconds": seconds,
        "sparsity": manifest["sparsity"],
    }
    print(json.dumps(result, indent=2))
    if given.output:
        given.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
