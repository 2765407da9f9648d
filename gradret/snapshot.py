"""What a run changes, as tensors with names: of the encoder and of its optimizer, out of them and into them."""

import torch
from torch import Tensor, nn

from gradret.processes import Processes


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """What a run changes: the parameters that are trained (a tied one once) and, unless some are frozen, buffers."""
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    whole = len(trained) == sum(1 for _ in module.parameters())
    return trained + list(module.named_buffers()) * whole


def get_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of named_tensors, without gradients."""
    return {name: tensor.detach().contiguous() for name, tensor in named_tensors(module)}


def put_tensors(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Overwrite the tensors of named_tensors with those that get_tensors gave."""
    with torch.no_grad():
        for name, target in named_tensors(module):
            target.copy_(tensors[name])


def get_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer knows of each parameter, as `parameter:key`."""
    return {
        f"{name}:{key}": value.contiguous()
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def put_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give the optimizer what get_optimizer gave."""
    parameters = dict(module.named_parameters())
    for place, value in tensors.items():
        name, key = place.rsplit(":", 1)
        parameter = parameters[name]
        # AdamW keeps its step count on the CPU.
        optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)


def share_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes) -> None:
    """Give the optimizers of all processes what the first one's knows, tensor by tensor."""
    found = get_optimizer(module, optimizer)
    forms = processes.broadcast({place: (value.shape, value.dtype) for place, value in found.items()})
    if not processes.is_first:
        put_optimizer(
            module, optimizer, {place: torch.empty(shape, dtype=dtype) for place, (shape, dtype) in forms.items()}
        )
        found = get_optimizer(module, optimizer)
    processes.share_tensors(list(found.values()))
