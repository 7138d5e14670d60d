"""What the Trainer trains: a model that gives its own loss, with a teacher beside it if asked."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from owl_deploy.finetune.logits import (
    Likeliest,
    TeacherCache,
    cut_distillation_loss,
    distilled_loss,
    likeliest,
)
from owl_deploy.models.sparse_linear import sparse_linears


@dataclass(frozen=True)
class Distillation:
    """A teacher, and what is learnt from it.

    The loss gets the share `weight` of the distillation loss of logits over `temperature`, with
    `top` of the teacher's `top` likeliest tokens, which `cache` keeps if it is there; and
    `feature_weight` times the feature loss, between `blocks` of the teacher and `of_student`, as
    many.
    """

    teacher: Any
    temperature: float = 1.0
    weight: float = 0.0
    feature_weight: float = 0.0
    blocks: Sequence[nn.Module] = ()
    of_student: Sequence[nn.Module] = ()
    top: int | None = None
    cache: TeacherCache | None = None


class Trainee(nn.Module):
    """A causal language model whose state is what it trains, and nothing else.

    `dtype`: what matrix products are computed in (torch's autocast); sums and losses are float32.
    In training with a `distillation` the loss is (1 - its weight) times the cross-entropy plus
    what it says; in evaluation, and without one, the cross-entropy alone. `sharded`: whether the
    model is (see `shard`), whose state is then written elsewhere.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - transformers is untyped
        distillation: Distillation | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        sharded: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        # The Trainer's name: it then leaves devices and gradients to the model.
        self.is_distributed_loading_by_transformers = sharded
        self.teacher = None if distillation is None else distillation.teacher
        self.distillation, self.dtype = distillation, dtype

    def train(self, mode: bool = True) -> "Trainee":
        """Switch the student's dropout; the teacher never drops anything."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        windows: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The mean loss, in nats a predicted token; ids and labels: [batch, length], the same.

        `windows`: the windows' numbers [batch], for the teacher's cache.
        """
        if self.distillation is not None and self.training:
            return {"loss": self._distilled(self.distillation, input_ids, labels, windows)}
        logits = self._logits(self.model, input_ids)
        return {"loss": nn.functional.cross_entropy(logits, labels[:, 1:].flatten())}

    def _distilled(
        self,
        how: Distillation,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        windows: torch.Tensor | None,
    ) -> torch.Tensor:
        with _outputs(how.of_student) as own:
            logits = self._logits(self.model, input_ids)
        with _outputs(how.blocks) as theirs:
            loss = self._of_logits(how, logits, input_ids, labels[:, 1:].flatten(), windows)
        return loss + how.feature_weight * feature_loss(own, theirs) if own else loss

    def _of_logits(
        self,
        how: Distillation,
        logits: torch.Tensor,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        windows: torch.Tensor | None,
    ) -> torch.Tensor:
        """The loss by the student's `logits` and by what the teacher says of the same places."""
        if how.top is None:
            with torch.no_grad():
                wanted = self._logits(how.teacher, input_ids)
            return distilled_loss(logits, wanted, labels, how.temperature, how.weight)
        with torch.no_grad():
            cut = self._likeliest(how, how.top, input_ids, windows)
        distilled = cut_distillation_loss(logits, cut, how.temperature)
        true = nn.functional.cross_entropy(logits, labels)
        return (1 - how.weight) * true + how.weight * distilled

    def _likeliest(
        self, how: Distillation, top: int, input_ids: torch.Tensor, windows: torch.Tensor | None
    ) -> Likeliest:
        def ask(places: torch.Tensor) -> Likeliest:
            return likeliest(self._logits(how.teacher, input_ids[places]), top, how.temperature)

        if how.cache is None or windows is None:
            return ask(torch.arange(len(input_ids), device=input_ids.device))
        return how.cache.of(windows, ask)

    def _logits(self, model: Any, ids: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        """What predicts ids[:, 1:], as float32 [batch * (length - 1), vocabulary]."""
        lower = self.dtype != torch.float32
        with torch.autocast(ids.device.type, self.dtype if lower else None, enabled=lower):
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return logits[:, :-1].flatten(0, 1).float()

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """All but what trains: torch's DistributedDataParallel, whose name this is, sends no more.

        Each rank has the rest from the same files, and makes the same weights of the survivors.
        """
        named = (*self.named_parameters(), *self.named_buffers())
        return [name for name, one in named if not one.requires_grad]

    def state_dict(self, **_: Any) -> dict[str, Any]:  # type: ignore[override]  # noqa: ANN401
        """What trains: the rest is in the checkpoint that the run started from."""
        if self.is_distributed_loading_by_transformers:
            return {}
        return {name: parameter.detach() for name, parameter in self.trained().items()}

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        strict: bool = True,
        assign: bool = False,
    ) -> Any:  # noqa: ANN401 - torch's named tuple
        """Take back what `state_dict` gave."""
        del assign
        found = super().load_state_dict(state_dict, strict=False)
        wanted = self.state_dict()
        lost = [name for name in wanted if name not in state_dict]
        if lost or found.unexpected_keys:
            raise RuntimeError(f"the saved state lacks {lost} or has {found.unexpected_keys}")
        self.refresh()
        return found._replace(missing_keys=[])

    def refresh(self) -> None:
        """Bring the sparse layers' weights up to date, after the optimizer's step."""
        for _, sparse in sparse_linears(self.model):
            sparse.refresh()


@contextlib.contextmanager
def _outputs(blocks: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Yield a list that gets the hidden states that leave each block, [batch, length, width]."""
    found: list[torch.Tensor] = []

    def note(_block: nn.Module, _inputs: object, left: Any) -> None:  # noqa: ANN401
        found.append(left[0] if isinstance(left, tuple) else left)

    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def feature_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """SquareHead (arXiv 2310.06927): the squared error of each block's output over its square.

    Summed over the blocks, a mean over the windows; both are [batch, length, width] a block. The
    scale makes early blocks, whose outputs are small, count as later ones do. It is a window's own:
    so a step does not depend on how its windows are divided.
    """
    pairs = [(own.float(), wanted.float()) for own, wanted in zip(student, teacher, strict=True)]
    shares = [
        ((own - wanted).square().mean((1, 2)) / wanted.square().mean((1, 2))).mean()
        for own, wanted in pairs
    ]
    return torch.stack(shares).sum()
