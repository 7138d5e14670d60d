"""Runs onnxruntime-genai's model builder on a config that it reads as it was meant.

A script of its own, which `genai.py` starts: `builder.py OPTIONS [the builder's own arguments]`.
OPTIONS are `null`, or the arguments of `sparse.sparsify` as JSON: then the builder's graph is
rewritten in memory, where a weight is no more than a promise to read it from the checkpoint, and
only the result is saved. What `sparsify` returns is the last line that is printed, or what it
refuses, with that refusal's exit code.

Version 0.18 of the builder misreads some configs of transformers 5; what it is given instead is
below.
"""

import copy
import importlib
import itertools
import json
import runpy
import sys
from pathlib import Path
from typing import Any

_GEMMA = ("gemma3", "gemma3_text")
# What the builder applies wherever a config has it, and the types of model that do so too.
_READERS: dict[str, tuple[str, ...]] = {
    "final_logit_softcapping": _GEMMA,
    "attn_logit_softcapping": (),
    "hidden_activation": _GEMMA,  # the others' is hidden_act
}


def adapted(config: Any, builder: Any) -> Any:  # noqa: ANN401 - neither has types
    """The config with its facts where the builder looks for them.

    `builder` is the class of its models, which is given the rotary tables of this one.
    """
    ropes = getattr(config, "rope_parameters", None) or {}
    if ropes:
        give_tables(config, builder)
    if "full_attention" in ropes:  # Gemma 3: two rotary bases, which transformers 4 kept apart
        config.rope_local_base_freq = ropes["sliding_attention"]["rope_theta"]
        config.rope_parameters = ropes["full_attention"]
    if ropes.get("rope_type") == "longrope":  # Phi-3: its name in transformers 4
        config.rope_parameters["type"] = "longrope"
    if any(getattr(config, key, None) is not None for key in ("sliding_window", "layer_types")):
        give_windows(config)
    for key, readers in _READERS.items():
        if hasattr(config, key) and config.model_type not in readers:
            setattr(config, key, None)
    if hasattr(config, "seq_length"):  # which would go before max_position_embeddings
        del config.seq_length
    return config


def give_windows(config: Any) -> None:  # noqa: ANN401
    """Name the layers that have the config's sliding window, as the model has it.

    The builder drops a window that no layer claims (Mistral's, Phi-3's), gives one to families that
    have none, and believes a list of layers that the model does not read.
    """
    from owl_deploy.export import windows

    slides = windows.sliding(config)
    if not any(slides):
        config.sliding_window = None
    if any(slides) or getattr(config, "layer_types", None) is not None:
        kinds = {True: "sliding_attention", False: "full_attention"}
        config.layer_types = [kinds[one] for one in slides]


def give_tables(config: Any, builder: Any) -> None:  # noqa: ANN401
    """Let the builder take the model's own rotary tables, and believe that they are not scaled.

    Left to itself it scales all of Gemma 3's layers where only some are, does not scale Llama's
    linearly, ignores most of what YaRN is told, and refuses in one architecture what it does in
    another. Two kinds change with a text's length. Phi-3's `longrope` has a graph that does so,
    with two tables; elsewhere it is refused, as the builder words it. Of `dynamic` all is left to
    the builder: it begins where the tables end.
    """
    from owl_deploy.export import rotary

    kinds = {row["rope_type"] for row in rotary.parameters(config)}
    if "dynamic" in kinds:
        return
    if "longrope" in kinds and config.model_type != "phi3":
        raise NotImplementedError("The longrope RoPE style is not currently supported.")
    module = rotary.of_config(copy.deepcopy(config))
    several = rotary.layer_types(module) != [None]
    # In the order in which the builder asks for them.
    types = itertools.cycle(("full_attention", "sliding_attention") if several else (None,))
    builder.make_rotary_embedding_caches_from_scratch = lambda model: rotary.halves(
        module, model.rope_attrs["cache_length"], next(types)
    )
    if rotary.is_whole(module, config):  # the builder would rotate a part wherever one is named
        for row in (*rotary.parameters(config), vars(config)):
            if "partial_rotary_factor" in row:
                row["partial_rotary_factor"] = 1.0
    if "longrope" not in kinds:
        unscale(config)


def unscale(config: Any) -> None:  # noqa: ANN401
    """Make it the config of a model whose rotary tables are not scaled."""
    from owl_deploy.export import rotary

    for row in rotary.parameters(config):
        for key in row.keys() - {"rope_theta", "partial_rotary_factor"}:
            del row[key]
        row["rope_type"] = "default"
    if hasattr(config, "original_max_position_embeddings"):  # Phi-3: another means longrope
        config.original_max_position_embeddings = config.max_position_embeddings


def refuse_heads(builder: Any) -> None:  # noqa: ANN401
    """Let the builder refuse, before it reads a weight, heads that no runtime would take.

    ONNX Runtime has the rule: its GroupQueryAttention takes multiples of 16.
    """
    begin = builder.make_attention_init

    def checked(model: Any, config: Any) -> None:  # noqa: ANN401
        begin(model, config)
        grouped = model.attention_attrs["op_type"] == "GroupQueryAttention"
        if grouped and model.head_size % 16:
            size = model.head_size
            raise NotImplementedError(f"A head size of {size} is not currently supported.")

    builder.make_attention_init = checked


def find_head(builder: Any) -> None:  # noqa: ANN401
    """Let the builder take a model's own head for it, and not each Linear with as many outputs as
    the vocabulary.
    """
    builder.has_lm_head = lambda model, module: module is model.weights.get_output_embeddings()


def exact(model: Any) -> Any:  # noqa: ANN401
    """The model with its norms in float32: of Gemma's the builder adds 1 to the weights, which
    rounds them in what else they are stored in.
    """
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):
            module.float()
    return model


def run(checkpoint: Path, *, save: bool) -> Any:  # noqa: ANN401 - the builder's, without types
    """The builder's own command line for `checkpoint`; unless `save`, what it would have saved.

    The weights are loaded as they are stored, whatever config.json says of them: it may say less.
    """
    import transformers

    from owl_deploy.models.checkpoint import Checkpoint

    # Its modules know each other by bare names, once their package is there.
    importlib.import_module("onnxruntime_genai.models")
    Model = importlib.import_module("builders").Model
    read = transformers.AutoConfig.from_pretrained
    transformers.AutoConfig.from_pretrained = lambda *arguments, **options: adapted(
        read(*arguments, **options), Model
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    dtype = Checkpoint(checkpoint).dtype()
    transformers.AutoModelForCausalLM.from_pretrained = lambda *arguments, **options: exact(
        load(*arguments, **options, dtype=dtype)
    )
    refuse_heads(Model)
    find_head(Model)
    built: list[Any] = []
    if not save:
        Model.save_model = lambda model, _: built.append(model)
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)
    return built[0] if built else None


def rewrite(built: Any, checkpoint: Path, folder: Path, options: dict[str, Any]) -> object:  # noqa: ANN401
    """Save in `folder`, where the builder wrote all but the graph, that graph made sparse."""
    from owl_deploy.export.grid import Grid
    from owl_deploy.export.sparse import sparsify

    # As the builder saves it, and as it would be read again.
    built.model.graph.sort()
    built.stamp_build_metadata(built.model)
    for node in built.model.graph:
        for index, value in enumerate(node.inputs):
            if value is not None and not value.name:  # an optional input that is left out
                node.replace_input_with(index, None)
    return sparsify(built.model, folder, grid=Grid.read(checkpoint), **options)


def main() -> None:
    """See above."""
    options = json.loads(sys.argv.pop(1))
    checkpoint, folder = (Path(sys.argv[sys.argv.index(name) + 1]) for name in ("-i", "-o"))
    sys.path.append(str(Path(__file__).parents[2]))  # where this package is, if not installed
    built = run(checkpoint, save=options is None)
    if options is None:
        return
    from owl_deploy.errors import BadInput

    sys.stdout.write("\nPacking the weights\n")
    try:
        said, code = rewrite(built, checkpoint, folder, options), 0
    except BadInput as error:
        said, code = (error.message, error.hint), error.exit_code
    sys.stdout.write(json.dumps(said) + "\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
