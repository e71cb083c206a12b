"""charrnn-fast train: one run as the terminal and its folder see it."""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from charrnn_fast.cli.options import at_least, every, find_device, require_memory
from charrnn_fast.cli.progress import notice
from charrnn_fast.cli.run import Run, decode
from charrnn_fast.cli.settings import CONFIG, Settings, add_settings, config_option, resolve
from charrnn_fast.errors import InputError
from charrnn_fast.lm import checkpoint, corpora, data, distributed, toml
from charrnn_fast.lm.corpora import Corpus
from charrnn_fast.lm.distributed import Processes
from charrnn_fast.lm.files import write_whole
from charrnn_fast.lm.language_model import LanguageModel
from charrnn_fast.lm.recipes import (
    Recipe,
    build_model,
    build_sampler,
    build_trainer,
    for_processes,
    prepare_text,
    split_by_place,
)
from charrnn_fast.lm.records import EpochRecord, perplexity
from charrnn_fast.lm.texts import LargeText, read_texts
from charrnn_fast.lm.training import Trainer
from charrnn_fast.ops import backends

CAPTURE: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}
INTERRUPTED = 128  # and the signal's number: how a shell reports it


def add_parser(commands) -> None:
    p = commands.add_parser(
        "train",
        help="train a recipe, print its perplexities and a decoded text",
        description="Train a recipe on its book (or any text), then print perplexities, speed and a decoded text. "
        "SIGINT (Ctrl-C) and SIGTERM finish the step and save; a second one ends at once.",
    )
    config_option(p)
    p.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write DIR/last.ckpt, best.ckpt, history.json, curve.png and the settings, config.toml",
    )
    p.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out from its last.ckpt, with its config.toml where neither --config nor --recipe "
        "is given",
    )
    p.add_argument(
        "--save-every",
        type=every,
        metavar="N",
        help="write last.ckpt also every N steps, or with N such as 30s or 10m after so much time (default: at the "
        "recipe's reports)",
    )
    p.add_argument(
        "--keep", type=at_least(0), default=0, metavar="K", help="keep the last K states as step-N.ckpt (default: 0)"
    )
    p.add_argument(
        "--log",
        "--log-file",  # torchrun takes the short name for one of its own options
        type=Path,
        metavar="FILE",
        help="append one JSON object a line: steps, epochs, checkpoints",
    )
    p.add_argument("--tensorboard", type=Path, metavar="DIR", help="event files for TensorBoard (package tensorboard)")
    p.add_argument("--sample-every", type=at_least(1), metavar="N", help="print a decoded text every N epochs")
    p.add_argument("-q", "--quiet", action="store_true", help="print nothing but notices, errors and --json")
    p.add_argument("--json", action="store_true", help="print one JSON object as the last line of standard output")
    add_settings(p)
    p.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    count = distributed.launched()
    if count == 1 or options.print_config:
        return _run(options, None)
    if not distributed.speaks():  # one progress bar, one log, one result
        options.quiet, options.json = True, False
        options.log = options.tensorboard = options.sample_every = None
    code = _run(options, distributed.join())
    distributed.leave()
    return code


def _run(options: argparse.Namespace, processes: Processes | None) -> int:
    start = time.perf_counter()
    if options.resume and options.out is None:
        raise InputError("--resume continues the run in a folder: name it with --out")
    if distributed.restarts() and options.out is not None and distributed.speaks():
        options.resume = options.resume or (options.out / checkpoint.LAST).exists()
    own = options.out / CONFIG if options.resume else None
    if own is not None and not toml.readable():
        notice(
            f"{own} is not read without Python 3.11 or the package tomli: the run's settings have to be passed again"
        )
        own = None
    settings = resolve(options, own) if distributed.speaks() else None
    if options.print_config:
        print("" if settings is None else settings.toml(), end="")
        return 0
    if processes is not None:
        settings, options.resume = processes.from_first((settings, options.resume))
    assert settings is not None
    if options.out is not None and distributed.speaks():
        _prepare_folder(options.out, options.resume)
    page = settings
    settings = replace(settings, recipe=for_processes(settings.recipe, distributed.launched()))
    recipe, device = settings.recipe, find_device(settings.device)
    corpus = _corpus(settings)
    if processes is not None:
        _require_one_text(corpus, processes)
    vocab, tokens = prepare_text(recipe, corpus.text if isinstance(corpus, Corpus) else corpus)
    if isinstance(corpus, LargeText) and corpus.notice:
        notice(corpus.notice)
    tokens = tokens.to(device)
    sampler = build_sampler(recipe, tokens, settings.seed)
    backend = _backend(settings, device)
    require_memory(_numbers(recipe, len(vocab)), "parameters, gradients and an optimiser's state", device)
    model = build_model(recipe, len(vocab), settings.seed, kind=settings.model, backend=settings.backend, device=device)
    torch.manual_seed(settings.seed + (0 if processes is None else processes.rank))  # of dropout
    trainer = _trainer(settings, model, processes)
    run = Run(options, settings, trainer, sampler, vocab, corpus)
    if options.resume:
        run.resume()
    if options.out is not None and distributed.speaks():
        _keep_settings(options.out, page)
    if not options.quiet:
        _print_header(run, backend, tokens)
    history = run.fit()
    if run.signal is not None:
        return INTERRUPTED + run.signal
    if history and distributed.speaks():
        _conclude(run, backend, history, tokens, time.perf_counter() - start)
    if history:
        run.require_saved()
    return 0


def _conclude(run: Run, backend: str, history: list[EpochRecord], tokens: torch.Tensor, seconds: float) -> None:
    """What the run has come to: decoded texts, the perplexity of the test part."""
    begun, seed = time.perf_counter(), run.settings.seed
    texts = [decode(run.trainer.model, run.vocab, prompt, seed) for prompt in run.recipe.prompts]
    test = run.test(split_by_place(run.recipe, tokens)[2])
    _print_result(run, backend, history, texts, test, seconds + time.perf_counter() - begun)


def _numbers(recipe: Recipe, vocab_size: int) -> int:
    """How many numbers a training step keeps at least: three for each parameter."""
    H, V = recipe.hidden_size, vocab_size
    width = V if recipe.embedding == "onehot" else int(recipe.embedding)
    embedded = 0 if recipe.embedding == "onehot" else V * width
    return 3 * (embedded + H * (width + H + 2) + (recipe.num_layers - 1) * 2 * H * (H + 1) + V * (H + 1))


def _prepare_folder(folder: Path, resume: bool) -> None:
    """Make a run's folder; never write over another run's checkpoints."""
    try:
        if not resume:
            folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"cannot make the folder {folder}: {getattr(error, 'strerror', None) or error}") from None
    existing = [name for name in (checkpoint.LAST, checkpoint.BEST) if (folder / name).exists()]
    if existing and not resume:
        raise InputError(
            f"{folder} holds the {existing[0]} of an earlier run: pass --resume to continue it, or another --out"
        )


def _keep_settings(folder: Path, settings: Settings) -> None:
    """The resolved configuration beside the checkpoints; a folder that cannot be written is told before training."""
    write_whole(folder / CONFIG, settings.toml().encode(), "the configuration")


def _corpus(settings: Settings) -> Corpus | LargeText:
    if settings.text is not None and "-" in settings.text and distributed.launched() > 1:
        raise InputError("standard input is there for one process: name a file with --text")
    if settings.text is None:
        corpus: Corpus | LargeText = corpora.load_book(settings.recipe.book)
    else:
        corpus = read_texts(settings.text, settings.encoding, settings.errors)
    if corpus.notice:
        notice(corpus.notice)
    return corpus


def _backend(settings: Settings, device: torch.device) -> str:
    """The name of what runs the recurrence. A backend that is unknown or cannot run is an InputError that says why."""
    if settings.model != "fused":
        return settings.model
    try:
        hidden_size, dtype = settings.recipe.hidden_size, torch.get_default_dtype()
        return backends.choose("elman", device, dtype, hidden_size=hidden_size, backend=settings.backend)
    except (ValueError, RuntimeError) as error:
        raise InputError(str(error)) from None


def _require_one_text(corpus: Corpus | LargeText, processes: Processes) -> None:
    """InputError unless every process has read the same text."""
    texts = processes.of_all((corpus.sha256, corpus.source))
    for rank, (sha256, source) in enumerate(texts):
        if sha256 != texts[0][0]:
            raise InputError(f"rank {rank} has read another text than rank 0: {source}, and {texts[0][1]}")


def _trainer(settings: Settings, model: LanguageModel, processes: Processes | None) -> Trainer:
    """The recipe's trainer. What it refuses, steps that cannot be captured for one, is an InputError that says why."""
    try:
        return build_trainer(settings.recipe, model, CAPTURE[settings.capture], processes)
    except (ValueError, RuntimeError) as error:
        raise InputError(str(error)) from None


def _print_header(run: Run, backend: str, tokens: torch.Tensor) -> None:
    settings, recipe, trainer, sampler = run.settings, run.recipe, run.trainer, run.sampler
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    plural = "s" if recipe.num_layers > 1 else ""
    layers = f"{recipe.num_layers} layer{plural} of {recipe.hidden_size} {recipe.nonlinearity} units"
    print(f"text    {run.source}: {len(tokens):,} characters, {len(run.vocab)} symbols")
    print(f"model   {settings.model} ({backend} backend, {tokens.device}): {layers}, {count:,} parameters")
    if trainer.processes is not None:
        count = trainer.processes.count
        print(f"run     {count} processes, which share batches of {recipe.batch_size:,} sequences")
    reason = trainer.capture_reason
    print("steps   " + ("captured as CUDA graphs" if reason is None else f"not captured: {reason}"))
    reason = trainer.at_once_reason
    print("step    " + ("at once, without autograd" if reason is None else f"of separate operations: {reason}"))
    if recipe.split is not None:
        parts = zip(("train", "validate", "test"), split_by_place(recipe, tokens), strict=True)
        print("split   " + ", ".join(f"{len(part):,} {name}" for name, part in parts if part is not None))
    if isinstance(sampler, data.Windows) and sampler.shortened:
        notice(f"the text is short: {sampler.num_train:,} windows train, {sampler.num_val:,} validate")
    sys.stdout.flush()


def _print_result(
    run: Run,
    backend: str,
    history: list[EpochRecord],
    texts: list[str],
    test: tuple[float, str] | None,
    seconds: float,
) -> None:
    last, options, settings, recipe = history[-1], run.options, run.settings, run.recipe
    recent = history[-recipe.report_every :]
    train_ppl = perplexity(sum(r.train_loss for r in recent) / len(recent))
    speed = sum(r.tokens for r in history) / sum(r.seconds for r in history)
    if not options.quiet:
        print(f"result  training perplexity {train_ppl:.3f}", end="")
        if last.val_ppl is not None:
            print(f", validation {last.val_ppl:.3f} (mean of the batches' {last.val_ppl_batch_mean:.3f})", end="")
        if test is not None:
            print(f", test {test[0]:.3f} ({test[1]})", end="")
        print(f"; {speed:,.0f} tokens/s, {seconds:.1f} s")
        for text in texts:
            print(f"decoded {text!r}")
    if options.json:
        result = {
            "recipe": recipe.name,
            "model": settings.model,
            "backend": backend,
            "seed": settings.seed,
            "train_ppl": train_ppl,
            "val_ppl": last.val_ppl,
            "val_ppl_batch_mean": last.val_ppl_batch_mean,
            "tokens_per_s": speed,
            "seconds": seconds,
            "text": "\n".join(texts) if texts else None,
        }
        if test is not None:
            result["test_ppl"] = test[0]
        print(json.dumps(result), flush=True)
