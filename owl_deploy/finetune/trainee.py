"""What the Trainer trains: a model that gives its own loss, with a teacher beside it if asked."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from owl_deploy.survivors import sparse_linears


class Trainee(nn.Module):
    """A causal language model whose state is what it trains, and nothing else.

    `dtype`: what matrix products are computed in (torch's autocast); sums and losses are float32.
    In training the loss is (1 - `weight`) times the cross-entropy plus `weight` times the
    distillation loss; in evaluation, and without a teacher, the cross-entropy alone.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - transformers is untyped
        teacher: Any = None,  # noqa: ANN401
        *,
        dtype: torch.dtype = torch.float32,
        temperature: float = 1.0,
        weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.teacher = teacher
        self.dtype, self.temperature, self.weight = dtype, temperature, weight

    def train(self, mode: bool = True) -> "Trainee":
        """Switch the student's dropout; the teacher never drops anything."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The mean loss, in nats a predicted token; ids and labels: [batch, length], the same."""
        logits = self._logits(self.model, input_ids)
        loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        if self.teacher is not None and self.training:
            with torch.no_grad():
                wanted = self._logits(self.teacher, input_ids)
            distilled = distillation_loss(logits, wanted, self.temperature)
            loss = (1 - self.weight) * loss + self.weight * distilled
        return {"loss": loss}

    def _logits(self, model: Any, ids: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        """What predicts ids[:, 1:], as float32 [batch * (length - 1), vocabulary]."""
        lower = self.dtype != torch.float32
        with torch.autocast(ids.device.type, self.dtype if lower else None, enabled=lower):
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return logits[:, :-1].flatten(0, 1).float()

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def state_dict(self, **_: Any) -> dict[str, Any]:  # type: ignore[override]  # noqa: ANN401
        """What trains: the rest is in the checkpoint that the run started from."""
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
        lost = [name for name in self.trained() if name not in state_dict]
        if lost or found.unexpected_keys:
            raise RuntimeError(f"the saved state lacks {lost} or has {found.unexpected_keys}")
        self.refresh()
        return found._replace(missing_keys=[])

    def refresh(self) -> None:
        """Bring the sparse layers' weights up to date, after the optimizer's step."""
        for _, sparse in sparse_linears(self.model):
            sparse.refresh()


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Hinton's loss (arXiv 1503.02531): T^2 KL(teacher / T || student / T), mean over the rows.

    Both are logits [rows, vocabulary]; the factor keeps the gradients' size whatever T is.
    """
    divergence = nn.functional.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        reduction="sum",
        log_target=True,
    )
    return divergence * temperature**2 / len(student)
