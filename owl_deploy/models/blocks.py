"""Run a model one block at a time, for what need not, or cannot, hold all of it.

The model's own forward passes are used, with hooks: masks, positions and rotary tables are made by
the model, never by hand, so that every architecture and version is right by construction.
"""

import contextlib
import functools
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from owl_deploy.errors import BadInput, first_line, is_out_of_memory
from owl_deploy.models.checkpoint import Checkpoint
from owl_deploy.models.families import FAMILIES, Family
from owl_deploy.utils.ranks import free_memory

_LOGIT_ROWS = 256  # rows of logits at once: 2048 x 150,000 words in float32 would be 1.2 GB


class Seen(Exception):
    """Ends a forward pass that has shown what it was run for."""


class Skeleton:
    """A model without weights, whose parts are filled from a checkpoint while they are needed.

    `blocks`: the decoder blocks, on the meta device until `loaded`; `names`: their dotted names, as
    in the checkpoint: model.layers.3.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.family: Family = checkpoint.family
        self.names = checkpoint.blocks
        self.model: Any = _empty_model(checkpoint, dtype)
        self._check_tied()
        self.blocks: list[nn.Module] = list(self._module_list())

    @property
    def head(self) -> nn.Linear:
        """The output head, on the meta device until it is loaded."""
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head

    @property
    def head_weights(self) -> list[str]:
        """The tensors of the checkpoint that are the head's weight: the embedding's, if tied."""
        modules = [self.family.head]
        if self.model.config.tie_word_embeddings:
            modules.insert(0, self.family.embeddings[0])
        return [f"{name}.weight" for name in modules if f"{name}.weight" in self.checkpoint.files]

    def _check_tied(self) -> None:
        """A checkpoint may hold a tied matrix under both its names; transformers would untie two
        that differ, and what else reads config.json would not.
        """
        names = self.head_weights
        if self.model.config.tie_word_embeddings and len(names) == 2:
            embedding, head = map(self.checkpoint.read, names)
            if embedding.shape != head.shape or not bool((embedding == head).all()):
                raise BadInput(
                    f"config.json in {self.checkpoint.folder} says that embedding and output head "
                    "are one matrix (tie_word_embeddings), and the weights hold two.",
                    "Set it to false, if both are meant.",
                )

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The Linears of block `index`, by their names within the block, in model order."""
        return {
            name: module
            for name, module in self.blocks[index].named_modules()
            if isinstance(module, nn.Linear)
        }

    @contextlib.contextmanager
    def loaded(
        self, name: str, weights: dict[str, torch.Tensor] | None = None
    ) -> Iterator[nn.Module]:
        """The module `name` on the device, in the computing dtype, for as long as the block runs.

        Its tensors come from the checkpoint, or are `weights`, keyed as in its state_dict.
        """
        tensors = self.checkpoint.read_module(self._stored(name)) if weights is None else weights
        module = self.fill(name, tensors)
        try:
            yield module
        finally:
            _release(module)

    def fill(self, name: str, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """Put `tensors` into the module `name`, on the device and in the computing dtype."""
        module: nn.Module = self.model.get_submodule(name)
        state = {key: value.to(self.device, self.dtype) for key, value in tensors.items()}
        try:
            module.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise BadInput(
                f"The weights of {name} do not fit config.json: {first_line(error)}",
                "The checkpoint is incomplete or of another model: get it again.",
            ) from error
        return module.to(self.device)

    @torch.no_grad()
    def embed(
        self, windows: torch.Tensor, batch: int, scratch: Path, table: torch.Tensor | None = None
    ) -> "Activations":
        """What enters the first block for `windows` [samples, length], and each one's arguments.

        `batch` windows at a time; `scratch` is a folder for states that memory does not hold;
        `table` [words, width]: of the tokens, in the place of the checkpoint's.
        """
        tables = {} if table is None else {self.family.embeddings[0]: {"weight": table}}
        backbone = self.model.get_submodule(self.family.backbone)
        with contextlib.ExitStack() as stack:
            for name in self.family.embeddings:
                stack.enter_context(self.loaded(name, tables.get(name)))
            _move_buffers(backbone, self.device)
            # All windows have one length and no padding: one look at the arguments serves them all.
            first, arguments = self._first_hidden(backbone, windows[:1])
            shape = (len(windows), *first.shape[1:])
            hidden = room_for(shape, first.dtype, self.device, scratch)
            for start in range(0, len(windows), batch):
                part = slice(start, start + batch)
                hidden[part] = self._first_hidden(backbone, windows[part])[0].to(hidden.device)
        return Activations(hidden, arguments, batch, self.device)

    @torch.no_grad()
    def run(
        self,
        windows: torch.Tensor,
        batch: int,
        scratch: Path,
        advance: Callable[[float], None],
        table: torch.Tensor | None = None,
    ) -> "Activations":
        """What leaves the last block for `windows`, a block at a time; the others as in `embed`.

        `advance` is called with the number of windows that a block has done.
        """
        hidden = self.embed(windows, batch, scratch, table)
        for index, name in enumerate(self.names):
            with self.loaded(name) as block:
                hidden.through(block, index, advance, keep=True)
        return hidden

    @torch.no_grad()
    def losses(
        self,
        windows: torch.Tensor,
        state: "Activations",
        loss: Callable[[Any, torch.Tensor], float],
    ) -> list[float]:
        """The loss of each of `windows`, in nats a token.

        `state`: what left the last block for them. The model itself turns it into logits: its
        blocks are replaced by one that gives it. `loss`: of the model and a window [length].
        """
        found = []
        with self._outside_loaded():
            for ids, hidden in zip(windows.to(self.device), state.hidden, strict=True):
                given = _Given(hidden.unsqueeze(0).to(self.device))
                with self._blocks_replaced([given] * len(self.blocks)):
                    found.append(loss(self.model, ids))
        return found

    @torch.no_grad()
    def divergences(
        self,
        windows: torch.Tensor,
        dense: "Activations",
        states: Sequence["Activations"],
        head: torch.Tensor | None = None,
    ) -> list[float]:
        """How far what each of `states` foresees is from what `dense` does, in nats a token.

        All left the last block for `windows`. The Kullback-Leibler divergence of the distributions
        of the next token, from the dense model's, mean over all places. `head` [words, width]: of
        `states`, in the place of the model's own.
        """
        totals = [0.0] * len(states)
        head = None if head is None else head.to(self.device, self.dtype)
        with self._outside_loaded():
            for place, ids in enumerate(windows.to(self.device)):
                of_dense, *others = (self._left(ids, one.hidden[place]) for one in (dense, *states))
                for part in torch.split(torch.arange(len(ids)), _LOGIT_ROWS):
                    logits = _logits(self.model, of_dense[part]).log_softmax(dim=-1)
                    shares = logits.exp()
                    entropy = _dot(shares, logits)
                    for number, other in enumerate(others):
                        logits = _logits(self.model, other[part], head)
                        foreseen = _dot(shares, logits) - logits.logsumexp(dim=-1).sum()
                        totals[number] += float(entropy - foreseen)
        check_finite(torch.tensor(totals), "what the output head gives")
        return [total / windows.numel() for total in totals]

    def loss_gradients(
        self, windows: torch.Tensor, state: "Activations", seed: int
    ) -> torch.Tensor:
        """The gradients of the summed loss by `state`, what left the last block, shaped like it.

        The loss is that of predicting tokens which the model draws itself, one for every place in
        `windows`: the mean square of such gradients is the Fisher information.
        """
        drawing = torch.Generator().manual_seed(seed)
        gradients = torch.empty_like(state.hidden)
        with self._outside_loaded():
            self.model.requires_grad_(False)
            for place, ids in enumerate(windows.to(self.device)):
                hidden = state.hidden[place].to(self.device, copy=True).requires_grad_()
                left = self._left(ids, hidden)
                by_left = torch.cat(
                    [
                        _drawn_gradient(self.model, rows.detach(), drawing)
                        for rows in torch.split(left, _LOGIT_ROWS)
                    ]
                )
                (found,) = torch.autograd.grad(left, hidden, by_left)
                gradients[place] = found.to(gradients.device)
        check_finite(gradients, "the gradient of the loss")
        return gradients

    @torch.no_grad()
    def enter_head(
        self, windows: torch.Tensor, state: "Activations", advance: Callable[[float], None]
    ) -> None:
        """Run `state`, what left the last block for `windows`, up to the head and no further.

        For the hooks that see what enters it. `advance` is called with the number of windows done.
        """
        with self._outside_loaded(), _stopping(self.head):
            for start in range(0, len(windows), state.batch):
                part = slice(start, start + state.batch)
                given = _Given(state.hidden[part].to(self.device))
                with self._blocks_replaced([given] * len(self.blocks)), contextlib.suppress(Seen):
                    self.model(input_ids=windows[part].to(self.device), use_cache=False)
                advance(len(given.hidden))

    @contextlib.contextmanager
    def running(self) -> Iterator[Any]:
        """The whole model, to be run as any other, with only the block that runs in memory.

        The blocks share one block's room: before each runs, its weights are copied there from the
        checkpoint's files, which are mapped. Raises `BadInput` for tensors that are missing, of
        other shapes or not finite.
        """
        self.checkpoint.check_shapes(self.stored_shapes())
        room: dict[tuple[str, torch.Size], torch.Tensor] = {}
        with self._outside_loaded(), contextlib.ExitStack() as stack:
            for name, block in zip(self.names, self.blocks, strict=True):
                tensors = self.checkpoint.read_module(name)
                stored = {key: tensors[key] for key in block.state_dict()}
                for key, tensor in stored.items():
                    room.setdefault((key, tensor.shape), torch.empty_like(tensor, dtype=self.dtype))
                own = {key: room[key, tensor.shape] for key, tensor in stored.items()}
                block.load_state_dict(own, assign=True)
                fill = functools.partial(_fill, own, stored)
                stack.callback(block.register_forward_pre_hook(fill).remove)
            yield self.model

    def stored_shapes(self) -> dict[str, list[int]]:
        """What a checkpoint has to hold: the shape of each tensor, by its name there."""
        found = {}
        for name, tensor in self.model.state_dict().items():
            module, _, own = name.rpartition(".")
            is_head = self.model.get_submodule(module) is self.head
            if not (is_head and own == "weight" and self.model.config.tie_word_embeddings):
                found[f"{self._stored(module)}.{own}"] = list(tensor.shape)
        return found

    @contextlib.contextmanager
    def _outside_loaded(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.callback(_release, self.model)  # a tied head, too
            for name in self._outside_blocks():
                stack.enter_context(self.loaded(name))
            self.model.tie_weights()
            _move_buffers(self.model, self.device)
            yield

    def _outside_blocks(self) -> list[str]:
        """The modules outside the blocks that have weights of their own (a tied head has none)."""
        found = {
            name.rpartition(".")[0]
            for name, _ in self.model.named_parameters()
            if not name.startswith(f"{self.family.blocks}.")
        }
        return [name for name in sorted(found) if self.checkpoint.names(self._stored(name))]

    def _stored(self, name: str) -> str:
        """What checkpoints call the module `name`: the head may have another name in the model."""
        return self.family.head if self.model.get_submodule(name) is self.head else name

    def _left(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What enters the head [length, width], of what left the last block for `ids` [length]."""
        given = _Given(hidden.unsqueeze(0).to(self.device))
        with self._blocks_replaced([given] * len(self.blocks)):
            left: torch.Tensor = self.model.base_model(input_ids=ids[None], use_cache=False)[0]
        return left[0]

    def _first_hidden(
        self, backbone: nn.Module, ids: torch.Tensor
    ) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        recorders = [_Recorder() for _ in self.blocks]
        recorders[-1].last = True
        with self._blocks_replaced(recorders), contextlib.suppress(Seen):
            backbone(input_ids=ids.to(self.device), use_cache=False)
        hidden = recorders[0].hidden
        assert hidden is not None
        return hidden, [recorder.arguments for recorder in recorders]

    @contextlib.contextmanager
    def _blocks_replaced(self, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
        parent, _, attribute = self.family.blocks.rpartition(".")
        owner = self.model.get_submodule(parent)
        real = getattr(owner, attribute)
        setattr(owner, attribute, _keep_attributes(real, stand_ins))
        try:
            yield
        finally:
            setattr(owner, attribute, real)

    def _module_list(self) -> nn.ModuleList:
        modules = self.model.get_submodule(self.family.blocks)
        assert isinstance(modules, nn.ModuleList)
        return modules


class Activations:
    """The hidden states between two blocks, [samples, length, width], changed in place.

    They lie on the device, in memory, or in a mapped file; `batch` samples at a time go through a
    block. `arguments`: what the model gives each block besides (masks, rotary tables), by block.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        arguments: list[dict[str, Any]],
        batch: int,
        device: torch.device,
    ) -> None:
        self.hidden, self.arguments, self.batch, self.device = hidden, arguments, batch, device

    def copy(self, scratch: Path) -> "Activations":
        """The same states, to be changed by another pass; `scratch` as in `embed`."""
        hidden = room_for(tuple(self.hidden.shape), self.hidden.dtype, self.device, scratch)
        return Activations(hidden.copy_(self.hidden), self.arguments, self.batch, self.device)

    @torch.no_grad()
    def through(
        self,
        block: Callable[..., torch.Tensor],
        index: int,
        advance: Callable[[float], None],
        *,
        keep: bool,
    ) -> None:
        """Run every sample through `block`; with `keep` its outputs become the new hidden states.

        Without, a hook may end a pass early with `Seen`. `advance` is called with the number of
        samples done.
        """
        for start in range(0, len(self.hidden), self.batch):
            part = slice(start, start + self.batch)
            inputs = self.hidden[part].to(self.device)
            if keep:
                output = block(inputs, **self.arguments[index])
                self.hidden[part] = output.to(self.hidden.device)
            else:
                with contextlib.suppress(Seen):
                    block(inputs, **self.arguments[index])
            advance(len(inputs))


def window_loss(
    model: Any,  # noqa: ANN401 - transformers is untyped
    ids: torch.Tensor,
    see: Callable[[torch.Tensor], object] | None = None,
) -> float:
    """The mean negative log-likelihood of ids[1:] given what stands before each, in nats a token.

    `ids` [length]. Added up in float32 and more, whatever the dtype of the model. `see` is called
    with the logits [rows, words], in order, a part at a time.
    """
    hidden = model.base_model(input_ids=ids.unsqueeze(0), use_cache=False)[0][0, :-1]
    total = 0.0
    for rows, targets in zip(
        torch.split(hidden, _LOGIT_ROWS), torch.split(ids[1:], _LOGIT_ROWS), strict=True
    ):
        logits = _logits(model, rows)
        if see is not None:
            see(logits)
        total += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return total / len(hidden)


def check_finite(values: torch.Tensor, what: str) -> None:
    """Raise `BadInput` where a computation has left the numbers: nothing after it would be right.

    `what` the `values` are, for the error.
    """
    if not bool(values.isfinite().all()):
        raise BadInput(
            f"The calibration text overflows: {what} is infinite, or no number.",
            "Use --dtype float32 or bfloat16, or look for what is wrong with the weights.",
        )


def _logits(
    model: Any,  # noqa: ANN401 - transformers is untyped
    hidden: torch.Tensor,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The logits [rows, words], float32, of what enters the head [rows, width].

    `weight` [words, width]: in the place of the head's.
    """
    head = model.get_output_embeddings()  # called as it is, it has what an adapter adds to it
    logits = head(hidden) if weight is None else nn.functional.linear(hidden, weight, head.bias)
    logits = logits.float()
    if not FAMILIES[model.config.model_type].capped:
        return logits
    cap = model.config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The sum of the products of two tensors alike [rows, words], without a tensor of them all."""
    return torch.einsum("rw,rw->r", one, other).sum()


def _drawn_gradient(
    model: Any,  # noqa: ANN401
    hidden: torch.Tensor,
    drawing: torch.Generator,
) -> torch.Tensor:
    """The gradient by `hidden` [rows, width], what enters the head, of the loss of drawn tokens."""
    logits = _logits(model, hidden.requires_grad_())
    check_finite(logits, "what the output head gives")
    shares = logits.detach().softmax(dim=-1).cpu()  # the same draw on every device
    drawn = torch.multinomial(shares, 1, generator=drawing).squeeze(1).to(logits.device)
    loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
    (found,) = torch.autograd.grad(loss, hidden)
    return found


def free_on(device: torch.device) -> int:
    """The bytes that a device, or else the host, has free; those that PyTorch keeps for itself
    count as that.
    """
    if device.type != "cuda":
        return free_memory()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def room_for(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, scratch: Path
) -> torch.Tensor:
    """An empty tensor on the device where half of what is free holds it, else in memory, else
    in a file that is mapped."""
    size = math.prod(shape) * dtype.itemsize
    if device.type == "cuda" and size < free_on(device) / 2:
        return torch.empty(shape, dtype=dtype, device=device)
    if size < free_memory() / 2:
        return torch.empty(shape, dtype=dtype)
    with tempfile.TemporaryFile(dir=scratch) as file:  # without a name, which a kill would leave
        # The mapping outlives the file: the space is given back with the tensor, or the process.
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error now, not a crash later
        path = f"/proc/self/fd/{file.fileno()}"
        flat = torch.from_file(path, shared=True, size=math.prod(shape), dtype=dtype)
    return flat.view(shape)


class _Recorder(nn.Module):
    """Stands in for a block: notes what it is called with, and passes the hidden states on."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None
        self.arguments: dict[str, Any] = {}
        self.last = False

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:  # noqa: ANN401
        self.hidden, self.arguments = hidden, arguments
        if self.last:
            raise Seen
        return hidden


class _Given(nn.Module):
    """Stands in for a block: gives the hidden states that it was made with."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:  # noqa: ANN401
        return self.hidden


@contextlib.contextmanager
def _stopping(module: nn.Module) -> Iterator[None]:
    """End forward passes with `Seen` where `module` would begin."""

    def stop(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        raise Seen

    handle = module.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def _keep_attributes(real: nn.ModuleList, stand_ins: Sequence[nn.Module]) -> nn.ModuleList:
    """The stand-ins with the plain attributes by which a model chooses a block's mask."""
    for block, stand_in in zip(real, stand_ins, strict=True):
        for name, value in vars(block).items():
            if isinstance(value, str | int | bool) and not hasattr(stand_in, name):
                setattr(stand_in, name, value)
    return nn.ModuleList(stand_ins)


def _empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    import accelerate
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
        with accelerate.init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
            )
    except Exception as error:  # a config can be wrong in any way; transformers raises many types
        if is_out_of_memory(error):
            raise
        raise BadInput(
            f"{checkpoint.folder / 'config.json'} describes no model that transformers can build "
            f"({first_line(error)})."
        ) from error
    return model.eval()  # type: ignore[no-any-return]


def _fill(
    room: dict[str, torch.Tensor],
    stored: dict[str, torch.Tensor],
    *_: Any,  # noqa: ANN401
) -> None:
    for key, tensor in stored.items():
        room[key].copy_(tensor)


def _release(module: nn.Module) -> None:
    """Drop the weights; the small tables beside them, which no checkpoint holds, stay."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move the small tables (rotary frequencies) that are not weights to the device."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if not buffer.is_meta:
                setattr(part, name, buffer.to(device))
