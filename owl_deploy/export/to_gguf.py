"""llama.cpp's own converter, started as `python to_gguf.py SOURCE PACKAGES CHECKPOINT FILE NAMES`.

It needs torch and transformers, which are in the Python that has owl; SOURCE is the folder with the
converter, PACKAGES that of the other packages that it imports, those of the engine's environment.
NAMES is a JSON file for what each of the checkpoint's tensors is called in the GGUF.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Write the checkpoint as a GGUF in fp32."""
    source, packages, checkpoint, file, names = sys.argv[1:]
    home = Path(source) / "vendor" / "llama.cpp"
    sys.path[:0] = [str(home), str(home / "gguf-py")]
    sys.path.append(packages)  # last: what is in both is taken from here
    refuse_code()
    _keep_older_names()
    _accept_any_tokenizer()
    called = _noted_names()
    script = str(home / "convert_hf_to_gguf.py")
    sys.argv = [script, checkpoint, "--outfile", file, "--outtype", "f32"]
    runpy.run_path(script, run_name="__main__")
    Path(names).write_text(json.dumps(called), encoding="utf-8")


def refuse_code() -> None:
    """Run no code that comes with a model: for some families the converter asks for that."""
    import transformers

    for kind in (transformers.AutoConfig, transformers.AutoTokenizer):
        read = kind.from_pretrained

        def plain(*places: Any, _read: Any = read, **options: Any) -> Any:  # noqa: ANN401
            return _read(*places, **{**options, "trust_remote_code": False})

        kind.from_pretrained = plain


def _keep_older_names() -> None:
    """Give the converter what transformers 5 renamed in a config.json by the name that it reads."""
    from conversion import ModelBase

    read = ModelBase.load_hparams

    def renamed(*arguments: Any, **options: Any) -> dict[str, Any]:  # noqa: ANN401
        config: dict[str, Any] = read(*arguments, **options)
        ropes = config.get("rope_parameters") or {}
        if "partial_rotary_factor" in ropes:  # GPT-NeoX
            config.setdefault("rotary_pct", ropes["partial_rotary_factor"])
        return config

    ModelBase.load_hparams = staticmethod(renamed)


def _noted_names() -> dict[str, str]:
    """What the converter calls each tensor, once it has run."""
    from conversion import ModelBase

    find, called = ModelBase.map_tensor_name, {}

    def noted(self: Any, name: str, *arguments: Any, **options: Any) -> str:  # noqa: ANN401
        called[name] = str(find(self, name, *arguments, **options))
        return called[name]

    ModelBase.map_tensor_name = noted
    return called


def _accept_any_tokenizer() -> None:
    """Let a byte-level BPE that llama.cpp has no name for pass as one of the usual kind.

    The converter would refuse it; owl gives llama.cpp tokens, and never asks it for any.
    """
    from conversion import TextModel

    known = TextModel.get_vocab_base_pre

    def name(self: Any, tokenizer: Any) -> str:  # noqa: ANN401
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            print("owl: unknown tokenizer")  # noqa: T201 - read by export/gguf.py
            return "default"

    TextModel.get_vocab_base_pre = name


if __name__ == "__main__":
    main()
