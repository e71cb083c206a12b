"""What a run has recorded, kept from epoch to epoch: the steps of its training and those of its validation."""

from typing import Any

import torch
from torch import Tensor

from charrnn_fast.lm.capture import CudaGraphRecorder, RecordedSteps, Recorder, dependencies, why_not
from charrnn_fast.lm.language_model import LanguageModel
from charrnn_fast.lm.step import Evaluation, TrainingStep


class Recordings:
    """The recorded steps of a model, all by one recorder, made when they are first wanted.

    Args:
        model: whose steps. required: whether a training step that cannot be recorded is a TrainingError.
    """

    def __init__(self, model: LanguageModel, required: bool = False):
        self.model, self.required = model, required
        self._recorder: Recorder | None = None
        self._training: tuple[tuple[bool, TrainingStep], RecordedSteps] | None = None
        self._evaluation: dict[bool, RecordedSteps] = {}

    @property
    def reason(self) -> str | None:
        """Why training steps are not recorded any more: one clause, or None."""
        return None if self._training is None else self._training[1].reason

    def training(self, step: TrainingStep, carry_state: bool, *, changing_lr: bool) -> RecordedSteps:
        """A training step recorded, for an epoch that begins now. changing_lr: learning rates that are numbers become
        tensors, as a number would be a part of the recording.
        """
        optimizer: Any = step.optimizer
        if changing_lr:
            for group in optimizer.param_groups:
                if not isinstance(group["lr"], Tensor):
                    group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=self.model.device)
        if self._training is None or self._training[0] != (carry_state, step):
            made = self._recorded(step, carry_state, optimizer, self.required)
            self._training = (carry_state, step), made
        self._training[1].refresh()
        return self._training[1]

    def evaluation(self, carry_state: bool) -> Evaluation | RecordedSteps:
        """The loss of a batch in evaluation mode, for a validation that begins now; recorded where it can be."""
        if why_not(self.model, 1, self.required) is not None:
            return Evaluation(self.model)
        if carry_state not in self._evaluation:
            self._evaluation[carry_state] = self._recorded(Evaluation(self.model), carry_state, None, False)
        self._evaluation[carry_state].refresh()
        return self._evaluation[carry_state]

    def _recorded(self, step: Any, carry_state: bool, optimizer: Any, required: bool) -> RecordedSteps:
        if self._recorder is None:
            self._recorder = CudaGraphRecorder(self.model.device)
        return RecordedSteps(
            step,
            self._recorder,
            lambda: dependencies(self.model, optimizer),
            self.model.zero_state if carry_state else None,
            required=required,
        )
