"""What a run is made of: a recipe, varied by a configuration file, varied by the command line.

    recipe -> --config FILE.toml (or, resuming, the folder's own config.toml) -> the command line

A file's keys are the options' names, so that both have one set of types, ranges and messages.
"""

import argparse
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from charrnn_fast.cli.options import (
    BATCH,
    LAYERS,
    SEED,
    WIDTH,
    at_least,
    between,
    clip_norm,
    embedding_kind,
    or_none,
    positive,
    shares,
)
from charrnn_fast.errors import InputError
from charrnn_fast.lm import toml
from charrnn_fast.lm.forms import FORMS
from charrnn_fast.lm.optimizers import NAMES
from charrnn_fast.lm.recipes import RECIPES, Prompt, Recipe
from charrnn_fast.lm.schedule import KINDS
from charrnn_fast.lm.training_options import MAX_ACCUMULATE, MAX_GRAPH_BATCHES, ON_NAN

CONFIG = "config.toml"  # the resolved configuration in a run's folder
SAMPLERS = ("windows", "sequential", "random", "pieces")
OR_NONE = ("clip", "max_chars", "patience", "split")  # given as "none": argparse's None is "not given"
RENAMED = {"num_layers": "layers", "graph_batches": "no_detach_state"}  # fields whose options have other names


def add_settings(p: argparse.ArgumentParser) -> None:
    """The options that a configuration file may hold, all without a default of their own."""
    p.add_argument("--recipe", choices=RECIPES, help="what to train (default: scratch)")
    p.add_argument(
        "--model",
        choices=FORMS,
        help="fused: this library's kernels (default); reference: from scratch; torch: torch.nn.RNN",
    )
    p.add_argument(
        "--seed", type=at_least(*SEED), metavar="S", help="seed of the parameters and of the batches (default: 0)"
    )
    p.add_argument("--device", metavar="D", help="cpu (default), cuda, cuda:1, ...")
    p.add_argument("--backend", metavar="B", help="auto (default), triton, native, torch: what runs a fused model")
    p.add_argument(
        "--capture",
        choices=("auto", "on", "off"),
        help="training steps as CUDA graphs, captured once and replayed: auto (default, where they can), on, off",
    )
    p.add_argument(
        "--text",
        metavar="F",
        nargs="+",
        help="train on these files instead of the recipe's book: one after the other; a folder stands for the files "
        "in it, - for standard input",
    )
    p.add_argument("--encoding", metavar="C", help="the files' encoding (default: utf-8)")
    p.add_argument("--errors", choices=("strict", "replace", "ignore"), help="what to do with bytes that are not in it")

    g = p.add_argument_group("the data of a recipe (default: as the recipe has it)")
    add = g.add_argument
    add("--sampler", choices=SAMPLERS, help="how batches are drawn from the text")
    add("--batch-size", type=at_least(1, BATCH), metavar="B", help="sequences in a batch")
    add("--num-steps", type=at_least(1, BATCH), metavar="T", help="characters that a gradient reaches back")
    add("--letters", action=argparse.BooleanOptionalAction, help="only a-z and the space, or characters as they are")
    add("--max-chars", type=or_none(at_least(2)), metavar="N", help="train on the first N characters only, or none")
    add(
        "--split",
        type=or_none(shares),
        metavar="A,B[,C]",
        help="shares of the text, by place, for training, validation and test, as 0.9,0.1; or none",
    )

    g = p.add_argument_group("its model")
    add = g.add_argument
    add("--hidden-size", type=at_least(1, WIDTH), metavar="H", help="hidden units")
    add("--layers", type=at_least(1, LAYERS), metavar="L", help="stacked cells")
    add("--nonlinearity", choices=("tanh", "relu"), help="the cell's activation")
    add("--embedding", type=embedding_kind, metavar="E", help="onehot, or the width of a learned embedding")
    add("--dropout", type=between(0, 1, last=False), metavar="P", help="between layers, and before the head")
    add(
        "--init", choices=("normal", "uniform", "orthogonal"), help="0.01 N(0, 1); PyTorch's; that with orthogonal W_hh"
    )
    add("--second-bias", action=argparse.BooleanOptionalAction, help="whether cells have PyTorch's second bias")

    g = p.add_argument_group("its training")
    add = g.add_argument
    add("--epochs", "--iterations", type=at_least(1), metavar="N", help="epochs (santa: iterations) in all")
    add("--optimizer", choices=NAMES, help="what updates the parameters")
    add("--lr", type=positive, metavar="X", help="learning rate")
    add("--momentum", type=between(0, 1, last=False), metavar="X", help="of sgd and rmsprop")
    add("--weight-decay", type=between(0, math.inf), metavar="X", help="as torch's optimizers take it")
    add("--clip", type=clip_norm, metavar="X", help="largest global gradient norm, or none")
    add("--schedule", choices=KINDS, help="how the learning rate changes")
    add("--warmup", type=at_least(0), metavar="N", help="updates over which it rises from near 0 first")
    add("--lr-final", type=between(0, 1), metavar="X", help="cosine: the share of it that is left at the end")
    add("--lr-every", type=at_least(1), metavar="N", help="step: epochs between two steps down")
    add("--lr-gamma", type=between(0, 1, first=False), metavar="X", help="step: what each of them multiplies it by")
    add("--accumulate", type=at_least(1, MAX_ACCUMULATE), metavar="N", help="batches whose gradients make one update")
    add("--precision", choices=("fp32", "bf16"), help="bf16: forward and loss under autocast")
    add("--patience", type=or_none(at_least(1)), metavar="N", help="stop after N epochs without a better loss, or none")
    add(
        "--on-nan",
        choices=ON_NAN,
        help="at a loss or gradient that is not finite: stop, skip the update, or restore the last checkpoint and "
        "halve the learning rate",
    )
    add(
        "--no-detach-state",
        type=at_least(1),
        metavar="K",
        help=f"carried state: keep the graph across K batches (at most {MAX_GRAPH_BATCHES}), update once for them",
    )
    add("--report-every", type=at_least(1), metavar="N", help="epochs between two lines")


@dataclass(frozen=True)
class Settings:
    """A resolved configuration: the recipe, and what a run has beside it, with the defaults."""

    recipe: Recipe
    model: str = "fused"
    seed: int = 0
    device: str = "cpu"
    backend: str = "auto"
    capture: str = "auto"
    text: list[str] | None = None
    encoding: str = "utf-8"
    errors: str = "strict"

    def toml(self) -> str:
        """As a file that --config reads."""
        values = asdict(self)
        recipe = values.pop("recipe")
        prompts, _ = recipe.pop("prompts"), [recipe.pop(name) for name in ("book", "sample_at_reports")]
        values = {"recipe": recipe.pop("name"), **values}
        values |= {RENAMED.get(name, name): value for name, value in recipe.items()}
        for name in OR_NONE:
            values[name] = "none" if values[name] is None else values[name]
        return toml.write({**values, "prompts": prompts}, COMMENTS)


COMMENTS = {
    "recipe": "charrnn-fast train --config THIS_FILE; a key left out is as the recipe has it",
    "letters": "data",
    "hidden_size": "model and training",
}


def resolve(options: argparse.Namespace, own: Path | None = None) -> Settings:
    """The settings of the command line, over those of --config or of the run's `own` file, over the recipe's.

    Raises InputError for a file that cannot be read, keys that are no settings, and values that are none of theirs.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    path = options.config or (own if own is not None and own.exists() and options.recipe is None else None)
    prompts: tuple[Prompt, ...] | None = None
    if path is not None:
        content = toml.read(path)
        prompts = _prompts(path, content.pop("prompts", None))
        given = _parsed(path, content) | given
    run: dict[str, Any] = {f.name: given[f.name] for f in fields(Settings) if f.name in given}
    recipe = RECIPES[str(run.pop("recipe", "scratch"))]
    changes = {
        f.name: given[option]
        for f in fields(Recipe)
        if (option := RENAMED.get(f.name, f.name)) in given and f.name not in ("name", "prompts")
    }
    changes |= {name: None for name in OR_NONE if changes.get(name) == "none"}
    if prompts is not None:
        changes["prompts"] = prompts
    recipe = replace(recipe, **changes)
    if recipe.sampler == "pieces":
        recipe = replace(recipe, batch_size=1)
    _check(recipe)
    if isinstance(run.get("text"), str):
        run["text"] = [run["text"]]
    return Settings(recipe, **run)


def _check(recipe: Recipe) -> None:
    """What no single option says."""
    if recipe.graph_batches > 1 and recipe.sampler not in ("sequential", "pieces"):
        raise InputError(
            f"--no-detach-state needs a sampler that carries the state (sequential, pieces), got {recipe.sampler}"
        )
    if recipe.graph_batches > MAX_GRAPH_BATCHES:
        raise InputError(
            f"--no-detach-state keeps the graph across at most {MAX_GRAPH_BATCHES} batches, got {recipe.graph_batches}"
        )
    if recipe.graph_batches > 1 and recipe.accumulate > 1:
        raise InputError("--accumulate and --no-detach-state both make one update of several batches: pass one of them")


class _FileParser(argparse.ArgumentParser):
    """The options of a file, whose errors are InputErrors."""

    path: str | Path = ""

    def error(self, message: str) -> Any:
        raise InputError(f"{self.path}: {message}")


def _parsed(path: str | Path, content: dict[str, Any]) -> dict[str, Any]:
    """A file's values, by the options' own types."""
    parser = _FileParser(add_help=False, allow_abbrev=False)
    parser.path = path
    add_settings(parser)
    known = {action.dest: action for action in parser._actions}
    arguments: list[str] = []
    for key, value in content.items():
        if key not in known:
            raise InputError(f"{path}: {key} is no setting of a run: expected some of {', '.join(sorted(known))}")
        option = "--" + key.replace("_", "-")
        if isinstance(known[key], argparse.BooleanOptionalAction):
            if not isinstance(value, bool):
                raise InputError(f"{path}: {key} must be true or false, got {value!r}")
            arguments.append(option if value else "--no-" + option[2:])
        elif isinstance(value, bool | dict) or (isinstance(value, list) and any(isinstance(v, dict) for v in value)):
            raise InputError(f"{path}: {key} cannot be {value!r}")
        elif isinstance(value, list) and known[key].nargs == "+":
            continue  # set below: a text's name may look like an option
        else:
            shown = ",".join(str(v) for v in value) if isinstance(value, list) else str(value)
            arguments.append(f"{option}={shown}")
    parsed = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    if isinstance(content.get("text"), list):
        parsed["text"] = [str(name) for name in content["text"]]
    return parsed


def _prompts(path: str | Path, tables: Any) -> tuple[Prompt, ...] | None:
    """[[prompts]] tables: text, num_chars, temperature (left out: greedy)."""
    if tables is None:
        return None
    prompts = []
    for table in tables if isinstance(tables, list) else [tables]:
        try:
            prompt = Prompt(**table)
        except TypeError:
            raise InputError(f"{path}: each of [[prompts]] has text, num_chars and maybe temperature") from None
        heat = prompt.temperature
        numbers = isinstance(prompt.num_chars, int) and (heat is None or isinstance(heat, int | float))
        if not isinstance(prompt.text, str) or not numbers or prompt.num_chars < 0 or (heat is not None and heat < 0):
            raise InputError(f"{path}: each of [[prompts]] has a text, and numbers of at least 0")
        prompts.append(prompt)
    return tuple(prompts)


def config_option(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--config", metavar="FILE.toml", help="settings of the run, as --print-config writes them; options go over them"
    )
    p.add_argument("--print-config", action="store_true", help="print the settings as such a file and train nothing")
