"""Checkpoints: one file with the model, its vocabulary, its recipe, and all that an exact resume needs. Written in one
move.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from charrnn_fast.errors import InputError
from charrnn_fast.lm.data import Sampler, Vocabulary
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.lm.recipes import Recipe
from charrnn_fast.lm.training import Trainer
from charrnn_fast.reference.language_model import RNNLM

FORMAT = "charrnn_fast checkpoint"
VERSION = 1
LAST, BEST = "last.ckpt", "best.ckpt"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory. `kind` is the form of the model: fused, reference or torch."""

    path: Path
    kind: str
    seed: int
    config: dict[str, Any]  # CharRNN's arguments
    parameters: dict[str, torch.Tensor]  # CharRNN's state_dict
    vocab: Vocabulary
    recipe: dict[str, Any]
    source: str  # where the training text came from
    trainer: dict[str, Any]
    generator: torch.Tensor  # state of the sampler's generator

    @property
    def epoch(self) -> int:
        return len(self.trainer["history"])

    def build(self, device: torch.device | str = "cpu") -> CharRNN:
        """The model, ready to decode or to evaluate."""
        model = CharRNN(**self.config, dtype=self.parameters["head.weight"].dtype)
        self.restore(model)
        return model.to(device).eval()

    def restore(self, model: CharRNN) -> None:
        """Load the parameters into a model. Raises InputError if its sizes are others."""
        try:
            model.load_state_dict(self.parameters)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(f"{self.path} is a checkpoint of another model: {reason}") from None


def save(
    path: Path,
    trainer: Trainer,
    sampler: Sampler,
    vocab: Vocabulary,
    recipe: Recipe,
    *,
    kind: str,
    seed: int,
    source: str,
) -> None:
    """Write a checkpoint. The file is complete or absent at every moment: it is written beside its place and moved
    there.
    """
    model = trainer.model
    if isinstance(model, RNNLM):
        model = _as_char_rnn(model)
    try:
        model.require_as_built("a checkpoint is of")
    except ValueError as error:
        raise InputError(str(error)) from None
    content = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "seed": seed,
        "config": model.config(),
        "parameters": model.state_dict(),
        "vocab": {"symbols": vocab.symbols, "letters": vocab.letters},
        "recipe": _plain(asdict(recipe)),
        "source": source,
        "trainer": trainer.state_dict(),
        "generator": sampler.generator.get_state(),
    }
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"cannot write the checkpoint {path}: {error.strerror or error}") from None


def find(path: str | Path) -> Path:
    """The checkpoint file that a path stands for: itself, or in a run's folder best.ckpt, else last.ckpt."""
    path = Path(path)
    if path.is_dir():
        for name in (BEST, LAST):
            if (path / name).is_file():
                return path / name
        raise InputError(f"{path} holds no checkpoint: expected {BEST} or {LAST} in it")
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    return path


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint file, or a run's folder. Raises InputError if it is missing, cut short, or something else."""
    path = find(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load lets through whatever the zip reader and the unpickler raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path} cannot be read as a checkpoint: it is cut short or is another kind of file ({reason[:120]})"
        ) from None
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise InputError(
            f"{path} is not a charrnn_fast checkpoint: expected a file that `charrnn-fast train --out` wrote"
        )
    if content["version"] != VERSION:
        raise InputError(
            f"{path} has checkpoint version {content['version']}: this charrnn_fast reads version {VERSION}"
        )
    vocab = Vocabulary(content["vocab"]["symbols"], content["vocab"]["letters"])
    names = ("kind", "seed", "config", "parameters", "recipe", "source", "trainer", "generator")
    return Checkpoint(path, vocab=vocab, **{name: content[name] for name in names})


def resume(checkpoint: Checkpoint, trainer: Trainer, sampler: Sampler, recipe: Recipe) -> None:
    """Bring a fresh trainer and sampler to where the checkpoint was written, so that the run goes on as if never
    stopped.

    Raises InputError if the run was started with other settings; the number of epochs may differ.
    """
    then, now = dict(checkpoint.recipe), _plain(asdict(recipe))
    other = [name for name in now if name != "epochs" and then.get(name) != now[name]]
    if other:
        shown = ", ".join(f"{name} {then.get(name)!r} there, {now[name]!r} now" for name in other)
        raise InputError(f"{checkpoint.path} was written by a run with other settings: {shown}")
    if isinstance(trainer.model, RNNLM):
        raise InputError(
            "a run of --model reference cannot be resumed: its optimisers keep no checkpoint; start it anew"
        )
    checkpoint.restore(trainer.model)
    trainer.load_state_dict(checkpoint.trainer)
    sampler.generator.set_state(checkpoint.generator)


def _as_char_rnn(net: RNNLM) -> CharRNN:
    """The reference model's parameters in the form that checkpoints have."""
    model = CharRNN(
        net.vocab_size,
        net.num_hiddens,
        len(net.cells),
        nonlinearity=net.nonlinearity,
        embedding="onehot" if net.W_embed is None else net.W_embed.shape[1],
        second_bias=net.cells[0].b_hh is not None,
        dtype=net.W_hq.dtype,
    )
    return model.load_reference(net)


def _plain(value: Any) -> Any:
    """Tuples as lists, as they come back from a file."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
