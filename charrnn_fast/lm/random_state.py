"""torch's own generators, which dropout draws from, as a checkpoint keeps them: those of every process."""

import torch
from torch import Tensor

from charrnn_fast.lm.distributed import Processes
from charrnn_fast.lm.language_model import LanguageModel


def random_state(model: LanguageModel, processes: Processes | None) -> dict[str, Tensor | None] | None:
    """The states of the CPU's and the model's device's generator, of several processes a row each (R, n); None where
    nothing draws from them.
    """
    if model.dropout == 0:
        return None
    device = model.device
    on_device = torch.cuda.get_rng_state(device).cpu() if device.type == "cuda" else None
    states = {"cpu": torch.get_rng_state(), "device": on_device}
    if processes is None:
        return states
    return {name: None if of is None else torch.stack(processes.of_all(of)) for name, of in states.items()}


def set_random_state(state: dict[str, Tensor | None] | None, device: torch.device, processes: Processes | None) -> None:
    """Undo `random_state`. Of another number of processes than were there, each draws numbers of its own."""
    if state is None:
        return
    cpu, on_device = (_own(state.get(name), processes) for name in ("cpu", "device"))
    if cpu is None:
        torch.manual_seed(torch.initial_seed() + (0 if processes is None else processes.rank))
        return
    torch.set_rng_state(cpu.cpu())
    if on_device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(on_device.cpu(), device)


def _own(states: Tensor | None, processes: Processes | None) -> Tensor | None:
    """This process's row; None if the rows are others'."""
    if states is None or (processes is None and states.dim() == 1):
        return states
    if processes is None or states.dim() == 1 or len(states) != processes.count:
        return None
    return states[processes.rank].clone()  # torch.set_rng_state crashes on a view that begins inside its memory
