"""Checkpoints: one file with the model, its vocabulary, its recipe, and all that an exact resume needs. Written in one
move.
"""

import hashlib
import io
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import torch

from charrnn_fast.errors import InputError
from charrnn_fast.lm.data import UNKNOWN, Sampler, Vocabulary
from charrnn_fast.lm.files import write_whole
from charrnn_fast.lm.language_model import LanguageModel
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.lm.recipes import Recipe
from charrnn_fast.lm.training import Trainer

FORMAT = "charrnn_fast checkpoint"
VERSION = 3  # 1 had neither a checksum nor the text's hash; 2 only whole epochs
LAST, BEST = "last.ckpt", "best.ckpt"
MAY_DIFFER = ("epochs", "patience", "on_nan", "prompts", "report_every", "sample_at_reports")  # in a resumed run


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
    text_sha256: str | None = None  # of the training text; None in a file of version 1
    versions: Mapping[str, str] = field(default_factory=dict)  # of what wrote it: charrnn_fast, torch, python

    @property
    def epoch(self) -> int:
        return len(self.trainer["history"])

    def build(self, device: torch.device | str = "cpu") -> CharRNN:
        """The model, ready to decode or to evaluate."""
        try:
            model = CharRNN(**self.config, dtype=self.parameters["head.weight"].dtype)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.path} does not describe a model: {str(error).splitlines()[0]}") from None
        self.restore(model)
        return model.to(device).eval()

    def restore(self, model: LanguageModel) -> None:
        """Load the parameters into a model. Raises InputError if its sizes are others."""
        try:
            model.load_state_dict(self.parameters)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(f"{self.path} is a checkpoint of another model: {reason}") from None


def save(path: Path, *state: Any, **identity: Any) -> None:
    """Write a checkpoint; arguments and errors as in :func:`as_bytes`. The file is complete or absent at every moment:
    it is written beside its place and moved there.
    """
    write_whole(path, as_bytes(*state, **identity), "the checkpoint")


def as_bytes(
    trainer: Trainer,
    sampler: Sampler,
    vocab: Vocabulary,
    recipe: Recipe,
    *,
    kind: str,
    seed: int,
    source: str,
    text_sha256: str | None = None,
) -> bytes:
    """The content of a checkpoint file of this moment. Raises InputError if the model is not as it was built."""
    model = trainer.model
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
        "text_sha256": text_sha256,
        "versions": {
            "charrnn_fast": own_version(),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }
    content["checksum"] = digest(content)
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of everything in a checkpoint but its field "checksum"."""
    sha256 = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            add(f"{value.dtype} {tuple(value.shape)}")
            sha256.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            add(f"{len(value)} entries")
            for key, item in value.items():
                add(key)
                add(item)
        elif isinstance(value, list | tuple):
            add(f"{len(value)} items")
            for item in value:
                add(item)
        else:
            text = repr(value).encode("utf-8", "surrogatepass")
            sha256.update(f"{type(value).__name__} {len(text)} ".encode() + text)

    add({key: value for key, value in content.items() if key != "checksum"})
    return sha256.hexdigest()


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
    version = content.get("version")
    if version not in (1, 2, VERSION):
        raise InputError(f"{path} has checkpoint version {version}: this charrnn_fast reads versions 1 to {VERSION}")
    try:
        whole = "checksum" not in content if version == 1 else content.get("checksum") == digest(content)
    except Exception:  # tensors that are no plain memory, keys of strange types
        whole = False
    if not whole:
        raise InputError(f"{path} is damaged: its content does not have the checksum that was written with it")
    if (wrong := _why_malformed(content)) is not None:
        raise InputError(f"{path} is a checkpoint of another model: {wrong}")
    vocab = Vocabulary(content["vocab"]["symbols"], content["vocab"]["letters"])
    kept = {name: content[name] for name in _FIELDS if name != "vocab"}
    versions = content.get("versions")
    return Checkpoint(
        path,
        vocab=vocab,
        text_sha256=content.get("text_sha256"),
        versions=versions if isinstance(versions, Mapping) else {},
        **kept,
    )


def own_version() -> str:
    """Of this package, as it was installed."""
    try:
        return version_of("charrnn_fast")
    except PackageNotFoundError:
        return "not installed"


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "seed": int,
    "config": Mapping,
    "parameters": Mapping,
    "vocab": Mapping,
    "recipe": Mapping,
    "source": str,
    "trainer": Mapping,
    "generator": torch.Tensor,
}
_CONFIG: dict[str, type | tuple[type, ...]] = {
    "vocab_size": int,
    "hidden_size": int,
    "num_layers": int,
    "nonlinearity": str,
    "embedding": (str, int),
    "second_bias": bool,
}


def _why_malformed(content: Mapping[str, Any]) -> str | None:
    """None if every field is there, of its type, and the parameters are those of the model that is described."""
    wrong = _why_not_fields(content, _FIELDS, "it") or _why_not_fields(content["config"], _CONFIG, "its config")
    if wrong is not None:
        return wrong
    config, vocab, history = content["config"], content["vocab"], content["trainer"].get("history")
    symbols = vocab.get("symbols")
    if not isinstance(symbols, list) or not all(isinstance(c, str) for c in symbols) or "letters" not in vocab:
        return "its vocab has no list of symbols, or does not say whether they are letters"
    if len(symbols) != config["vocab_size"] or len(set(symbols)) != len(symbols):
        return f"its vocab has {len(set(symbols))} symbols, and its model {config['vocab_size']}"
    if vocab["letters"] and UNKNOWN not in symbols:
        return f"its vocab of letters has no {UNKNOWN}"
    if not isinstance(history, list) or "optimizer" not in content["trainer"]:
        return "its trainer has no history or no optimizer"
    if set(config) != set(_CONFIG):
        return f"its config has {sorted(map(str, set(config) ^ set(_CONFIG)))} too many or too few"
    return _why_not_its_parameters(config, content["parameters"])


def _why_not_fields(values: Mapping[str, Any], fields: Mapping[str, type | tuple[type, ...]], owner: str) -> str | None:
    for name, kind in fields.items():
        if name not in values:
            return f"{owner} has no {name}"
        if not isinstance(values[name], kind):
            return f"{owner} has a {type(values[name]).__name__} as {name}"
    return None


def _why_not_its_parameters(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> str | None:
    """The parameters' shapes against the sizes that are described, before anything of these sizes is allocated."""
    V, H, L, width = (config[name] for name in ("vocab_size", "hidden_size", "num_layers", "embedding"))
    if not 1 <= L <= len(parameters):
        return f"{L} layers of {len(parameters)} parameters"
    expected: dict[str, tuple[int, ...]] = {} if width == "onehot" else {"embed.weight": (V, width)}
    for layer in range(L):
        inputs = H if layer else V if width == "onehot" else width
        expected |= {f"rnn.weight_ih_l{layer}": (H, inputs), f"rnn.weight_hh_l{layer}": (H, H)}
        expected |= {f"rnn.bias_ih_l{layer}": (H,), f"rnn.bias_hh_l{layer}": (H,)}
    expected |= {"head.weight": (V, H), "head.bias": (V,)}
    if set(parameters) != set(expected):
        return f"parameters {sorted(map(str, set(parameters) ^ set(expected)))[:4]} are missing or too many"
    dtype = getattr(parameters["head.weight"], "dtype", None)
    for name, shape in expected.items():
        value = parameters[name]
        plain = isinstance(value, torch.Tensor) and value.is_floating_point() and value.layout == torch.strided
        if not plain or value.dtype != dtype:
            return f"{name} is not a tensor of floating-point numbers, or of another dtype than head.weight"
        if tuple(value.shape) != shape:
            return f"size mismatch for {name}: {tuple(value.shape)} there, expected {shape}"
    return None


def resume(checkpoint: Checkpoint, trainer: Trainer, sampler: Sampler, recipe: Recipe) -> None:
    """Bring a fresh trainer and sampler to where the checkpoint was written, so that the run goes on as if never
    stopped.

    Raises InputError if the run was started with other settings; those of MAY_DIFFER may be others.
    """
    then, now = dict(checkpoint.recipe), _plain(asdict(recipe))
    defaults = {f.name: _plain(f.default) for f in fields(Recipe)}  # for what an older file does not know
    then = defaults | then
    other = [name for name in now if name not in MAY_DIFFER and then[name] != now[name]]
    if other:
        shown = ", ".join(f"{name} {then[name]!r} there, {now[name]!r} now" for name in other)
        raise InputError(f"{checkpoint.path} was written by a run with other settings: {shown}")
    if not trainer.keeps_optimizer:
        raise InputError(
            f"a run of --model {trainer.model.form} cannot be resumed: its optimisers keep no checkpoint; start it anew"
        )
    checkpoint.restore(trainer.model)
    try:
        trainer.load_state_dict(checkpoint.trainer)
        sampler.generator.set_state(checkpoint.generator)
    except Exception as error:  # whatever an optimiser says to a state that is none of its
        raise InputError(
            f"{checkpoint.path} cannot be resumed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        ) from None


def _plain(value: Any) -> Any:
    """Tuples as lists, as they come back from a file."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
