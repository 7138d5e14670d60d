"""Where a model is computed: device and dtype, and how many samples at once a user wants."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from owl_deploy.errors import BadInput, unknown_name
from owl_deploy.utils import container
from owl_deploy.utils.ranks import local_rank

_DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Hardware:
    """Where and how to compute; "auto" and None are chosen by what is there.

    Raises `BadInput` for a batch of no samples.
    """

    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise BadInput("--batch-size must be at least 1.")


ANY_HARDWARE = Hardware()


@contextlib.contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """Compute on `count` of PyTorch's threads in this block, as the run did that is gone on with:
    sums are made in another order on others. None: on as many as ever, or as a container's quota
    keeps busy.
    """
    usual = torch.get_num_threads()
    torch.set_num_threads(count or math.ceil(min(usual, container.processors())))
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise unknown_name("device", name, _DEVICES) from error
    if device.type not in _DEVICES:
        raise unknown_name("device", name, _DEVICES)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"This torch finds no device {name}.", "Use another, or --device cpu.")
    return device if device.type == "cpu" else _own(device)


def _own(device: torch.device) -> torch.device:
    """The GPU of this process, where torchrun has started several on its node."""
    place = local_rank()
    if place is None:
        return device
    count = torch.cuda.device_count()
    if place >= count:
        raise BadInput(
            f"This node has {count} GPUs, and more processes.",
            f"Use --nproc-per-node {count}, or --device cpu.",
        )
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


def find_dtype(
    name: str, stored: object, device: torch.device, *, exact: bool = False
) -> torch.dtype:
    """The dtype to compute in: `auto` is that of the `stored` weights where the device is fast.

    A CPU is not in float16, nor any device in bfloat16 without instructions for it: float32 then,
    and on a CPU always where `exact`, so that a result does not depend on which it was.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        dtype = known.get(str(stored), torch.float32)
        if device.type == "cpu" and (exact or dtype == torch.float16):
            return torch.float32
        slow = dtype == torch.bfloat16 and not multiplies_bfloat16(device)
        return torch.float32 if slow else dtype
    if name not in known:
        raise unknown_name("dtype", name, ("auto", *known))
    return known[name]


def name_of(dtype: torch.dtype) -> str:
    """What `--dtype` and manifests call it."""
    return str(dtype).removeprefix("torch.")


def find_training_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the products of a training whose parameters, sums and losses are float32.

    `auto` is bfloat16 where the device is fast in it; float16 would need its losses scaled.
    """
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether it has instructions for that, a CPU AVX-512 BF16 or AMX: twice as fast as float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # which is asked of the current one
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
