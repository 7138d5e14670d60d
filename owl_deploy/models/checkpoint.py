"""Read and write checkpoints: safetensors weights, config and tokenizer, recipe, manifest.

What is written loads in current transformers and in SparseML 1.8 (transformers 4.40, tokenizers
0.19), which read some keys under older names: `write_compatible` writes both.
"""

import contextlib
import functools
import json
import math
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owl_deploy.errors import (
    BadInput,
    EnvironmentFailed,
    first_line,
    is_full_disk,
    is_out_of_memory,
    too_long,
    unknown_token,
)
from owl_deploy.models import digests
from owl_deploy.models.families import family_of
from owl_deploy.models.manifest import what_it_is
from owl_deploy.utils.artefact import check_path, copy, link, own, read_object, save_tensors, sha256
from owl_deploy.utils.progress import quiet_transformers

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GRID = "grid.safetensors"  # the scales of rounded weights
SHARD_BYTES = 2 * 1024**3  # small enough to be put together in memory beside a block
# One of them is in every folder that has a tokenizer; the others below may lie there without one.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
TOKENIZER_FILES = (
    *_TOKENIZER,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
CHAT_TEMPLATES = "additional_chat_templates"  # a folder of them; transformers reads its *.jinja
# What old checkpoints hold besides weights: masks and frequencies, which models compute now, and
# transformers leaves unread (`_keys_to_ignore_on_load_unexpected`).
_COMPUTED = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.rotary_emb\.inv_freq$")
# What safetensors calls them: the narrowest dtype of torch, up to float32, that holds them.
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float32"}


class Checkpoint:
    """A Hugging Face model folder whose tensors are read one by one, or all at once by `load`.

    Attributes: `folder`; `config`, the parsed config.json; `files`, tensor name to file, of all
    that the model takes; `family`, its row; `blocks`, the names of the decoder blocks, as
    config.json counts them.
    Raises `BadInput`, with the file's name, for anything missing, corrupt or unsafe (pickle), for a
    family without a row and a quantized model, and where the weights are not those that config.json
    describes, by its count of blocks or its vocabulary.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.family = family_of(self.config)
        if (folder / "adapter_config.json").is_file():  # transformers would apply it, unasked
            raise BadInput(
                f"{folder} holds an adapter beside the model.",
                "Move its files (adapter_*) to a folder of their own, and give that to --adapter.",
            )
        if self.config.get("transformers_weights"):  # transformers would load what we never read
            raise BadInput(
                f"{folder / 'config.json'} names weights of its own (transformers_weights).",
                f"Take that line out; {WEIGHTS}, or the index of its shards, is read.",
            )
        if self.config.get("quantization_config"):
            raise BadInput(f"{folder} is quantized.", "Give the model as it was before.")
        found = _tensor_files(folder)
        self.files = {name: file for name, file in found.items() if not _COMPUTED.search(name)}
        self.blocks = self._blocks()
        self._check_vocabulary()

    def read(self, name: str) -> "torch.Tensor":
        """The tensor `name`, on the CPU, refused if a value is not finite."""
        path = self.files.get(name)
        if path is None:
            raise BadInput(
                f"{self.folder} has no tensor {name!r}.",
                "The checkpoint is incomplete: get it again.",
            )
        with _open_safetensors(path) as file:
            return self._read(file, name)

    def _read(self, file: Any, name: str) -> "torch.Tensor":  # noqa: ANN401 - see _open_safetensors
        import torch

        path = self.files[name]
        tensor: torch.Tensor = file.get_tensor(name)
        floats = tensor.is_floating_point()
        if (floats and tensor.itemsize < 2) or (name.endswith(".weight") and not floats):
            held = str(tensor.dtype).removeprefix("torch.")
            raise BadInput(
                f"The tensor {name!r} in {path} is quantized: it holds {held}.",
                "Give the model as it was before.",
            )
        # The extremes are NaN or infinite if any value is: one quick reading of the tensor.
        extremes = torch.aminmax(tensor) if floats and tensor.numel() else ()
        if not all(bool(value.isfinite()) for value in extremes):
            raise BadInput(
                f"The tensor {name!r} in {path} holds NaN or infinity.",
                "Such a model cannot be pruned: get it again, or mend the training run.",
            )
        return tensor

    def identity(self) -> dict[str, Any]:
        """What tells it from another, or from itself after a change, without reading weights."""
        return {
            "folder": str(self.folder.absolute()),
            "config": sha256(self.folder / "config.json"),
            "files": {
                path.name: [path.stat().st_size, path.stat().st_mtime_ns]
                for path in sorted(set(self.files.values()))
            },
        }

    def content(self) -> str:
        """One digest of config.json and the weights' files, wherever they lie."""
        files = [self.folder / "config.json", *sorted(set(self.files.values()))]
        return digests.of_files((file.name, digests.digest(file)) for file in files)

    @property
    def is_large(self) -> bool:
        """Whether it is more than one shard."""
        return sum(path.stat().st_size for path in set(self.files.values())) > SHARD_BYTES

    def weights(self) -> int:
        """How many numbers the tensors hold, without reading them."""
        total = 0
        for path in set(self.files.values()):
            with _open_safetensors(path) as file:
                shapes = (file.get_slice(name).get_shape() for name in file.keys())  # noqa: SIM118
                total += sum(math.prod(shape) for shape in shapes)
        return total

    def dtype(self) -> "torch.dtype":
        """The narrowest dtype, up to float32, that holds all weights as the files hold them."""
        import torch

        held: set[torch.dtype] = set()
        for path in set(self.files.values()):
            with _open_safetensors(path) as file:
                own = [name for name in file.keys() if name in self.files]  # noqa: SIM118
                names = {file.get_slice(name).get_dtype() for name in own}
                held |= {getattr(torch, _FLOATS[name]) for name in names & _FLOATS.keys()}
        return functools.reduce(torch.promote_types, held or {torch.float32})

    def _blocks(self) -> list[str]:
        """A model built by a count that is not the weights' would take long, or other weights."""
        blocks = self.family.blocks
        count = self.config.get("num_hidden_layers")
        if type(count) is not int or count < 1:
            raise BadInput(f"config.json in {self.folder} counts {reprlib.repr(count)} blocks.")
        held = {int(n) for n in map(_leading, self.names(blocks)) if n.isdecimal()}
        first = next((index for index in range(count) if index not in held), count)
        name = f"{blocks}.{first}"
        wrong = f"no {name}" if first < count else f"{name} as well" if first in held else ""
        if wrong:
            raise BadInput(
                f"config.json in {self.folder} counts {count} blocks, and the weights hold "
                f"{wrong}.",
                "Give the config.json that belongs to them.",
            )
        return [f"{blocks}.{index}" for index in range(count)]

    def _check_vocabulary(self) -> None:
        """As transformers does: an embedding has as many rows as config.json says, no padding."""
        if "vocab_size" not in self.config:
            return
        told = self.config["vocab_size"]
        for name in (f"{part}.weight" for part in (self.family.embeddings[0], self.family.head)):
            rows = next(iter(self.shape(name)), 0) if name in self.files else told
            if type(told) is not int or rows != told:
                raise BadInput(
                    f"config.json in {self.folder} says a vocab_size of {reprlib.repr(told)}, and "
                    f"{name} has {rows} rows.",
                    "Give the config.json that belongs to the weights.",
                )

    def shape(self, name: str) -> list[int]:
        """The shape of the tensor `name`, without reading it."""
        with _open_safetensors(self.files[name]) as file:
            shape: list[int] = file.get_slice(name).get_shape()
        return shape

    def check_ids(self, ids: "torch.Tensor") -> None:
        """Raise `BadInput` for tokens that the model does not have: another's tokenizer."""
        name = f"{self.family.embeddings[0]}.weight"
        known = self.shape(name)[0] if name in self.files else math.inf  # reading it will say so
        largest = int(ids.max()) if len(ids) else 0
        if largest >= known:
            hint = "Give the model's own tokenizer, or its weights as they were resized for it."
            raise unknown_token(self.folder, largest, known, hint)

    def check_length(self, tokens: int, option: str) -> None:
        """Raise `BadInput` where the model takes fewer than the `tokens` of `option`."""
        check_length(self.config, tokens, option, str(self.folder))

    def check_shapes(self, wanted: Mapping[str, list[int]]) -> None:
        """Raise `BadInput` unless there is a tensor of each name and shape in `wanted`."""
        self._refuse_missing(wanted.keys() - self.files.keys())
        for name, shape in wanted.items():
            if self.shape(name) != shape:
                raise BadInput(
                    f"The weights of {self.folder} do not fit config.json: {name} is "
                    f"{self.shape(name)}, and {shape} is asked for.",
                    "Get both again.",
                )

    def _refuse_missing(self, names: Collection[str]) -> None:
        if names:
            raise BadInput(
                f"{self.folder} lacks {len(names)} tensors, {min(names)!r} the first.",
                "The checkpoint is incomplete: get it again.",
            )

    def outside(self, blocks: Sequence[str]) -> list[str]:
        """The names of the tensors that belong to none of the `blocks`."""
        starts = tuple(f"{block}." for block in blocks)
        return [name for name in self.files if not name.startswith(starts)]

    def names(self, prefix: str = "") -> list[str]:
        """The names of the tensors under the module `prefix`, without `prefix.`."""
        start = f"{prefix}." if prefix else ""
        return [name[len(start) :] for name in self.files if name.startswith(start)]

    def read_module(self, prefix: str) -> dict[str, "torch.Tensor"]:
        """All tensors under the module `prefix`, keyed as in its state_dict."""
        whole = {name: f"{prefix}.{name}" for name in self.names(prefix)}
        with contextlib.ExitStack() as stack:
            # A file is opened once: its header tells of all tensors.
            files = {self.files[name] for name in whole.values()}
            opened = {path: stack.enter_context(_open_safetensors(path)) for path in files}
            return {own: self._read(opened[self.files[name]], name) for own, name in whole.items()}

    def load(self, dtype: "torch.dtype") -> Any:  # noqa: ANN401 - transformers is untyped
        """The whole model in memory, on the CPU, for inference: 4 bytes a weight in float32.

        Raises `BadInput` where a value is not finite, or the tensors are not those of the model
        that config.json describes, and `EnvironmentFailed` where the system does not let them be
        read; a full memory or disk stays the error that it is.
        """
        import transformers

        for name in self.files:
            self.read(name)  # finite values in every file, or one sentence
        try:
            with quiet_transformers():
                model, info = transformers.AutoModelForCausalLM.from_pretrained(
                    self.folder,
                    dtype=dtype,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                    output_loading_info=True,
                )
        except Exception as error:  # transformers' errors for a bad folder are of many types
            if is_out_of_memory(error) or is_full_disk(error):
                raise
            if isinstance(error, OSError) and error.errno is not None:  # transformers' own has none
                raise _unreadable(self.folder, error) from error
            reason = first_line(error)
            if "ignore_mismatched_sizes" in reason:  # the advice is for programmers
                raise BadInput(
                    f"transformers cannot load {self.folder}: the weights' shapes are not those of "
                    "config.json."
                ) from error
            raise BadInput(f"transformers cannot load {self.folder}: {reason}") from error
        # Transformers would go on with random weights in their place.
        self._refuse_missing(info["missing_keys"])
        within = f"{self.family.blocks}."
        surplus = sorted(
            name
            for name in info["unexpected_keys"]
            if name in self.files and name.startswith(within)
        )
        if surplus:  # what is written of a block has all that is read of it
            raise BadInput(
                f"{self.folder} holds {surplus[0]!r}, which the model of its config.json has not.",
                "Give the config.json that belongs to the weights.",
            )
        return model.eval().requires_grad_(False)


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a local folder, or a model of the Hugging Face Hub by name (`org/name`).

    A Hub model is taken from the local Hub cache and downloaded only when it is not there.
    """
    folder = Path(model)
    if not folder.exists() and _looks_like_hub_name(str(model)):
        folder = _from_hub(str(model))
    hint = "Check the path. A name on the Hub has the form ORGANIZATION/MODEL."
    return Checkpoint(local_folder(folder, hint))


def local_folder(folder: Path, hint: str) -> Path:
    """`folder`, if it is one that may hold a model; the `hint` says what to do about none.

    Raises `BadInput` for any other, and for a path that libraries do not take.
    """
    check_path(folder)
    if folder.is_file():
        raise BadInput(
            f"{folder} is a file, and a model is a folder.", _no_safetensors_hint(folder)
        )
    if not folder.is_dir():
        raise BadInput(f"There is no model folder {str(folder)!r}.", hint)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model's folder; raises `BadInput` where there is none to read."""
    if not (folder / "config.json").is_file():
        hint = what_it_is(folder) or "Give a Hugging Face model folder."
        raise BadInput(f"{folder / 'config.json'} is missing.", hint)
    return read_object(folder / "config.json", "Get the file again.")


def check_length(
    config: Mapping[str, Any], tokens: int, option: str, model: str = "The model"
) -> None:
    """Raise `BadInput` where the `model` of a `config` takes fewer than the `tokens` of `option`.

    So too where it does not say in a number how many it takes.
    """
    longest = config.get("max_position_embeddings") or math.inf
    if not isinstance(longest, int | float):
        raise BadInput(
            f"max_position_embeddings is {longest!r} in {model}'s config.json, and is a number.",
            "Get the file again.",
        )
    if tokens > longest:
        raise too_long(model, longest, tokens, option)


def _looks_like_hub_name(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~"))


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError as error:
        raise BadInput(
            f"The Hub gives {name!r} to those alone who accepted its licence.",
            f"Accept it at https://huggingface.co/{name}, then run: hf auth login",
        ) from error
    except Exception as error:  # the Hub client's errors are many: no network, no such model
        raise BadInput(
            f"There is no folder {name!r}, and the Hub did not give that model "
            f"({type(error).__name__}).",
            "Check the name and the network, or download the model and give its folder.",
        ) from error


def _leading(name: str) -> str:
    """The first part of a dotted name."""
    return name.partition(".")[0]


def _open_safetensors(path: Path) -> Any:  # noqa: ANN401 - safetensors has no stubs
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, ValueError) as error:
        raise BadInput(f"{path} is corrupt ({error}).", "Get the file again.") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> EnvironmentFailed:
    """What is said of what the system does not read: of a share that is away, it may come back."""
    return EnvironmentFailed(f"{path} cannot be read ({error}).", "Try again.")


def _tensor_bytes(path: Path) -> int:
    """The bytes of all tensors in a file: what is neither its header nor the header's length."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - length


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name to file, from the index when there is one; every file's header is checked."""
    if (folder / INDEX).is_file():
        weight_map = read_object(folder / INDEX, "Get the file again.").get("weight_map")
        if not isinstance(weight_map, dict):
            raise BadInput(f"{folder / INDEX} has no weight_map.", "Get the file again.")
        files = {folder / str(name) for name in weight_map.values()}
    elif (folder / WEIGHTS).is_file():
        files = {folder / WEIGHTS}
    else:
        raise BadInput(f"{folder} has no {WEIGHTS}.", _no_safetensors_hint(folder))
    found: dict[str, Path] = {}
    for path in sorted(files):
        if path.parent != folder:
            raise BadInput(f"{folder / INDEX} names {path}, which lies outside the model's folder.")
        if not path.is_file():
            raise BadInput(f"{path} is missing, though the index names it.", "Get the file again.")
        with _open_safetensors(path) as file:
            found.update(dict.fromkeys(file.keys(), path))
    if (folder / WEIGHTS).is_file() and folder / WEIGHTS not in files:  # transformers reads that
        raise BadInput(
            f"{folder} holds two models: {WEIGHTS}, and the files that {INDEX} names.",
            "Delete the one that is not meant.",
        )
    return found


def _no_safetensors_hint(folder: Path) -> str:
    """The way out for a `folder` without safetensors, or a file in the place of one."""
    if folder.suffix == ".gguf" or any(folder.glob("*.gguf")):
        return (
            "Give the checkpoint that the GGUF was made of; without one, transformers can expand "
            "it (gguf_file=... of from_pretrained, then save_pretrained)."
        )
    if any(folder.glob("*.onnx")):
        return f"{what_it_is(folder)} Give the checkpoint that it was exported from."
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        return "Pickled weights are not read, since they can run code: convert them to safetensors."
    return "Give a Hugging Face model folder."


def shards(
    tensors: Iterator[tuple[str, "torch.Tensor"]], folder: Path, ready: Sequence[Path] = ()
) -> None:
    """Write `tensors` under `folder` as one safetensors file, or as shards with an index.

    Holds one shard (`SHARD_BYTES`) in memory at a time. The files `ready`, on the same disk, become
    the first shards as they are, without a copy, and stay where they are too.
    """
    parts: list[tuple[Path, list[str]]] = []
    for path in ready:
        with _open_safetensors(path) as file:
            part = folder / f"part-{len(parts)}"
            part.unlink(missing_ok=True)
            link(path, part)
            parts.append((part, list(file.keys())))
    total = sum(map(_tensor_bytes, ready))

    def flush(shard: dict[str, "torch.Tensor"]) -> None:
        path = folder / f"part-{len(parts)}"
        save_tensors(shard, path)
        parts.append((path, list(shard)))

    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush(shard)
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    if shard:
        flush(shard)
    if len(parts) == 1:
        parts[0][0].rename(folder / WEIGHTS)
        return
    weight_map = {}
    for number, (path, names) in enumerate(parts, start=1):
        final = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        (folder / final).unlink(missing_ok=True)  # renaming a link onto its own file does nothing
        path.rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def check_links(folder: Path, others: Sequence[str] = ()) -> None:
    """Raise `BadInput` where what goes from a model into what is made of it is a link elsewhere.

    That are config, tokenizer, and `others` by their names.
    """
    for name in ("config.json", *TOKENIZER_FILES, *others):
        own(folder / name)
    own(folder / CHAT_TEMPLATES)
    for path in (folder / CHAT_TEMPLATES).glob("*"):
        own(path)


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder holds a tokenizer, or a part of one."""
    return any((folder / name).is_file() for name in _TOKENIZER)


def chat_templates(folder: Path) -> list[str]:
    """The templates that transformers reads beside a tokenizer's own, as paths within `folder`.

    One that is called "default" goes before the folder's chat_template.jinja.
    """
    found = (folder / CHAT_TEMPLATES).glob("*.jinja")
    return sorted(f"{CHAT_TEMPLATES}/{path.name}" for path in found if path.is_file())


def file_names(folder: Path) -> list[str]:
    """The files of a model or a deployment, as paths within `folder`: those that lie in it, and of
    what lies deeper the chat templates alone, since nothing else there is read.
    """
    own_files = (path.name for path in folder.iterdir() if path.is_file())
    return sorted([*own_files, *chat_templates(folder)])


def write_compatible(source: Checkpoint, folder: Path) -> None:
    """Copy config and tokenizer so that transformers 5.x and 4.40 (SparseML 1.8) both read them."""
    config = compatible_config(source.config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (source.folder / name).is_file():
            copy(source.folder / name, folder / name)
    own(source.folder / CHAT_TEMPLATES)
    for name in chat_templates(source.folder):
        (folder / CHAT_TEMPLATES).mkdir(exist_ok=True)
        copy(source.folder / name, folder / name)
    _rewrite(folder / "tokenizer.json", _string_merges)
    _rewrite(folder / "tokenizer_config.json", _known_tokenizer_class)


def compatible_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with both the 5.x and the 4.x names of what was renamed between them.

    4.40 ignores `rope_parameters` and would silently take rope_theta = 10000.
    """
    both = {key: value for key, value in config.items() if key != "_name_or_path"}
    rope = both.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        both.setdefault("rope_theta", rope["rope_theta"])
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        if both.get("model_type") == "gpt_neox":
            both.setdefault("rotary_emb_base", rope["rope_theta"])
            if (part := scaling.pop("partial_rotary_factor", None)) is not None:
                both.setdefault("rotary_pct", part)
        kind = scaling.get("rope_type", "default")
        if kind in ("linear", "dynamic") and scaling.keys() == {"rope_type", "factor"}:
            scaling = {"type": kind, "factor": scaling["factor"]}  # 4.40 takes no other form
        if kind != "default":
            both.setdefault("rope_scaling", scaling)
    dtype = stored_dtype(both)
    if dtype:
        both["dtype"] = both["torch_dtype"] = dtype
    return both


def stored_dtype(config: Mapping[str, Any]) -> Any:  # noqa: ANN401 - a JSON value
    """What a config.json says that its weights are stored in, by the name of today or before."""
    return config.get("dtype") or config.get("torch_dtype")


def _rewrite(path: Path, change: Any) -> None:  # noqa: ANN401 - a function from JSON to JSON
    if path.is_file():
        content = change(read_object(path, "Get the file again."))
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _string_merges(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Merges as "a b", the only form that tokenizers before 0.20 reads.

    A part that holds a space has no such form; then the pairs stay, and only 4.40 is lost.
    """
    model = tokenizer.get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    pairs = [merge for merge in merges or [] if isinstance(merge, list)]
    if (
        pairs
        and isinstance(model, dict)
        and not any(" " in part for pair in pairs for part in pair)
    ):
        model["merges"] = [" ".join(m) if isinstance(m, list) else m for m in merges or []]
    return tokenizer


def _known_tokenizer_class(config: dict[str, Any]) -> dict[str, Any]:
    """4.40 does not know TokenizersBackend, the 5.x name of the class that both load."""
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in (
        "is_local",
        "local_files_only",
        "backend",
    ):  # where it was loaded from, not what it is
        config.pop(key, None)
    return config
