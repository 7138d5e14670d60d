"""Stream text from an `owl` deployment; needs `pip install onnxruntime-genai` and nothing else.

python examples/generate.py DEPLOYMENT "The capital of France is" [THREADS]
"""

import argparse
import json
import os
import sys

import onnxruntime_genai as og


def main(folder: str, prompt: str, threads: int, max_new_tokens: int = 64) -> None:
    """The model's own `genai_config.json` names the operator library that lies beside it.

    Without a number of threads ONNX Runtime takes one on some virtual machines of two cores. The
    physical cores are best: half of what `os.cpu_count` says where each runs two threads.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else its builds report to Microsoft
    config = og.Config(folder)
    options = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    model = og.Model(config)
    tokenizer = og.Tokenizer(model)
    # The tokens that the model's own tokenizer puts before a text: a BOS, mostly.
    tokenizer.update_options(add_special_tokens="true")
    tokens = tokenizer.encode(prompt)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(tokens) + max_new_tokens, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(tokens)
    stream = tokenizer.create_stream()
    sys.stdout.write(prompt)
    while not generator.is_done():
        generator.generate_next_token()
        sys.stdout.write(stream.decode(generator.get_next_tokens()[0]))
        sys.stdout.flush()
    sys.stdout.write("\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Stream text from an owl deployment.")
    parser.add_argument("folder", metavar="DEPLOYMENT")
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument(
        "threads", metavar="THREADS", type=int, nargs="?", default=os.cpu_count() or 1
    )
    main(**vars(parser.parse_args()))
