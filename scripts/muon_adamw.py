"""Muon for the matrices of a model, AdamW for everything else, as one optimizer.

Muon (torch.optim.Muon) makes each matrix's update orthogonal; a short training gets much further with it. It is meant
for hidden layers: embeddings, heads, norms and biases stay with AdamW.
"""

from torch import nn
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """Two optimizers of torch behind one interface.

    `param_groups` holds the very groups of both, so that one learning rate scheduler drives them.

    Args:
        model: whose parameters are trained. Weights of `nn.Linear` modules that are not tied to an embedding or the
            output head go to Muon.
        lr: learning rate of AdamW.
        matrix_lr: learning rate of Muon, on the scale of AdamW's.
        weight_decay: for matrices, embeddings included.
        betas: of AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        matrix_lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.98),
    ):
        for name, value in (("lr", lr), ("matrix_lr", matrix_lr)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        matrices = hidden_matrices(model)
        taken = {id(parameter) for parameter in matrices}
        rest = [
            parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in taken
        ]
        self.optimizers: list[Optimizer] = [
            Muon(
                matrices,
                lr=matrix_lr,
                weight_decay=weight_decay,
                momentum=0.95,
                adjust_lr_fn="match_rms_adamw",
            ),
            AdamW(
                [
                    {"params": [parameter for parameter in rest if parameter.ndim > 1], "weight_decay": weight_decay},
                    {"params": [parameter for parameter in rest if parameter.ndim < 2], "weight_decay": 0.0},
                ],
                lr=lr,
                betas=betas,
                fused=True,
            ),
        ]
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        super().__init__([dict(group) for group in groups], {})
        self.param_groups = groups

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self):
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict):
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the linear layers between the embedding and the output head."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and module.weight.requires_grad
        and id(module.weight) not in embeddings
    ]
