"""charrnn-fast train: one run as the terminal and its folder see it."""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from charrnn_fast.cli.options import (
    LAYERS,
    SEED,
    WIDTH,
    add_text,
    at_least,
    clip_norm,
    embedding_kind,
    find_device,
    positive,
    require_memory,
)
from charrnn_fast.errors import InputError, TrainingError
from charrnn_fast.lm import checkpoint, corpora, data
from charrnn_fast.lm.corpora import Corpus
from charrnn_fast.lm.files import write_whole
from charrnn_fast.lm.model import CharRNN, generate
from charrnn_fast.lm.recipes import RECIPES, Prompt, Recipe, build_model, build_sampler, prepare_text
from charrnn_fast.lm.training import MAX_GRAPH_BATCHES, EpochRecord, Trainer, perplexity
from charrnn_fast.ops import backends
from charrnn_fast.reference.language_model import RNNLM

CAPTURE: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}


def add_parser(commands) -> None:
    p = commands.add_parser(
        "train",
        help="train a recipe, print its perplexities and a decoded text",
        description="Train a recipe on its book (or any text), then print perplexities, speed and a decoded text.",
    )
    p.add_argument("--recipe", choices=RECIPES, default="scratch", help="what to train (default: scratch)")
    p.add_argument(
        "--model",
        choices=("fused", "reference", "torch"),
        default="fused",
        help="fused: this library's kernels (default); reference: from scratch; torch: torch.nn.RNN",
    )
    p.add_argument(
        "--epochs",
        "--iterations",
        type=at_least(1),
        metavar="N",
        help="epochs (santa: iterations) in all, default the recipe's",
    )
    p.add_argument(
        "--seed",
        type=at_least(*SEED),
        default=0,
        metavar="S",
        help="seed of the parameters and of the batches (default: 0)",
    )
    p.add_argument("--device", default="cpu", metavar="D", help="cpu (default), cuda, cuda:1, ...")
    p.add_argument(
        "--backend", default="auto", metavar="B", help="auto (default), triton, native, torch: what runs a fused model"
    )
    p.add_argument(
        "--capture",
        choices=CAPTURE,
        default="auto",
        help="training steps as CUDA graphs, captured once and replayed: auto (default, where they can), on, off",
    )
    p.add_argument(
        "--out", type=Path, metavar="DIR", help="write DIR/last.ckpt, DIR/best.ckpt, DIR/history.json and DIR/curve.png"
    )
    p.add_argument("--resume", action="store_true", help="continue the run in --out from its last.ckpt")
    p.add_argument("--json", action="store_true", help="print one JSON object as the last line of standard output")
    add_text(p, required=False, help="train on this file instead of the recipe's book")
    p = p.add_argument_group("variations of a recipe (default: as the recipe has it)")
    p.add_argument(
        "--sampler", choices=("windows", "sequential", "random", "pieces"), help="how batches are drawn from the text"
    )
    p.add_argument("--hidden-size", type=at_least(1, WIDTH), metavar="H", help="hidden units")
    p.add_argument("--layers", type=at_least(1, LAYERS), metavar="L", help="stacked cells")
    p.add_argument("--nonlinearity", choices=("tanh", "relu"), help="the cell's activation")
    p.add_argument("--embedding", type=embedding_kind, metavar="E", help="onehot, or the width of a learned embedding")
    p.add_argument("--lr", type=positive, metavar="X", help="learning rate")
    p.add_argument("--clip", type=clip_norm, metavar="X", help="largest global gradient norm, or none")
    p.add_argument(
        "--no-detach-state",
        type=at_least(2),
        metavar="K",
        help=f"carried state: keep the graph across K batches (at most {MAX_GRAPH_BATCHES}), update once for them",
    )
    p.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    recipe = _vary(RECIPES[options.recipe], options)
    device = find_device(options.device)
    if options.out is not None:
        _prepare_folder(options.out, options.resume)
    elif options.resume:
        raise InputError("--resume continues the run in a folder: name it with --out")
    corpus = _corpus(recipe, options)
    vocab, tokens = prepare_text(recipe, corpus.text)
    sampler = build_sampler(recipe, tokens.to(device), options.seed)
    backend = _backend(options, recipe, device)
    require_memory(_numbers(recipe, len(vocab)), "parameters, gradients and an optimiser's state", device)
    model = build_model(recipe, len(vocab), options.seed, kind=options.model, backend=options.backend, device=device)
    trainer = _trainer(recipe, model, CAPTURE[options.capture])
    run = _Run(options, recipe, trainer, sampler, vocab, corpus)
    if options.resume:
        run.resume()
    _print_header(options.model, backend, recipe, trainer, corpus, vocab, tokens, sampler)
    history = run.fit()
    texts = [_decode(model, vocab, prompt, options.seed) for prompt in recipe.prompts]
    _print_result(options, recipe, backend, history, texts, time.perf_counter() - start)
    return 0


def _vary(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """The recipe with the command line's variations."""
    changes = {
        "epochs": options.epochs,
        "sampler": options.sampler,
        "hidden_size": options.hidden_size,
        "num_layers": options.layers,
        "nonlinearity": options.nonlinearity,
        "embedding": options.embedding,
        "lr": options.lr,
        "graph_batches": options.no_detach_state,
    }
    recipe = replace(recipe, **{name: value for name, value in changes.items() if value is not None})
    if options.clip is not None:
        recipe = replace(recipe, clip=None if math.isinf(options.clip) else options.clip)
    if recipe.sampler == "pieces":
        recipe = replace(recipe, batch_size=1)
    if options.no_detach_state is not None:
        if recipe.sampler not in ("sequential", "pieces"):
            raise InputError(
                f"--no-detach-state needs a sampler that carries the state (sequential, pieces), got {recipe.sampler}"
            )
        if options.no_detach_state > MAX_GRAPH_BATCHES:
            raise InputError(
                f"--no-detach-state keeps the graph across at most {MAX_GRAPH_BATCHES} batches, "
                f"got {options.no_detach_state}"
            )
    return recipe


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


def _corpus(recipe: Recipe, options: argparse.Namespace) -> Corpus:
    if options.text is None:
        corpus = corpora.load_book(recipe.book)
    else:
        corpus = corpora.read_text(options.text, options.encoding, options.errors)
    if corpus.notice:
        print(f"charrnn-fast: {corpus.notice}", file=sys.stderr)
    return corpus


def _backend(options: argparse.Namespace, recipe: Recipe, device: torch.device) -> str:
    """The name of what runs the recurrence. A backend that is unknown or cannot run is an InputError that says why."""
    if options.model != "fused":
        return options.model
    try:
        return backends.choose(options.backend, device, torch.get_default_dtype(), recipe.hidden_size)
    except (ValueError, RuntimeError) as error:
        raise InputError(str(error)) from None


def _trainer(recipe: Recipe, model: CharRNN | RNNLM, capture: bool | str) -> Trainer:
    """The recipe's trainer. Steps that are to be captured and cannot be are an InputError that says why."""
    try:
        return Trainer(
            model,
            optimizer=recipe.optimizer,
            lr=recipe.lr,
            clip=recipe.clip,
            epochs=recipe.epochs,
            graph_batches=recipe.graph_batches,
            capture=capture,
        )
    except RuntimeError as error:
        raise InputError(str(error)) from None


def _print_header(
    kind: str,
    backend: str,
    recipe: Recipe,
    trainer: Trainer,
    corpus: Corpus,
    vocab: data.Vocabulary,
    tokens: torch.Tensor,
    sampler: data.Sampler,
) -> None:
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    plural = "s" if recipe.num_layers > 1 else ""
    layers = f"{recipe.num_layers} layer{plural} of {recipe.hidden_size} {recipe.nonlinearity} units"
    print(f"text    {corpus.source}: {len(tokens):,} characters, {len(vocab)} symbols")
    print(f"model   {kind} ({backend} backend, {sampler.tokens.device}): {layers}, {count:,} parameters")
    reason = trainer.capture_reason
    print("steps   " + ("captured as CUDA graphs" if reason is None else f"not captured: {reason}"))
    if isinstance(sampler, data.Windows) and sampler.shortened:
        print(
            f"charrnn-fast: the text is short: {sampler.num_train:,} windows train, {sampler.num_val:,} validate",
            file=sys.stderr,
        )


class _Run:
    """One training run as the terminal and its folder see it: the lines, the progress bar, the files."""

    def __init__(
        self,
        options: argparse.Namespace,
        recipe: Recipe,
        trainer: Trainer,
        sampler: data.Sampler,
        vocab: data.Vocabulary,
        corpus: Corpus,
    ):
        self.out: Path | None = options.out
        self.kind, self.seed = options.model, options.seed
        self.recipe, self.trainer, self.sampler, self.vocab = recipe, trainer, sampler, vocab
        self.source, self.text_sha256 = corpus.source, corpus.sha256
        self.capture_reason = trainer.capture_reason  # as the header says

    def resume(self) -> None:
        assert self.out is not None
        written = checkpoint.load(self.out / checkpoint.LAST)
        if (written.kind, written.seed) != (self.kind, self.seed):
            raise InputError(
                f"{written.path} was written by --model {written.kind} --seed {written.seed}; "
                f"got --model {self.kind} --seed {self.seed}"
            )
        if (written.vocab.symbols, written.vocab.letters) != (self.vocab.symbols, self.vocab.letters):
            raise InputError(f"{written.path} has another vocabulary: it was trained on {written.source}, not on this")
        if written.text_sha256 is None:
            print(
                f"charrnn-fast: {written.path} keeps no hash of its text: only the vocabulary was compared",
                file=sys.stderr,
            )
        elif written.text_sha256 != self.text_sha256:
            raise InputError(
                f"{written.path} was trained on another text, {written.source} with SHA-256 {written.text_sha256}; "
                f"got {self.source} with {self.text_sha256}"
            )
        checkpoint.resume(written, self.trainer, self.sampler, self.recipe)
        if written.epoch >= self.recipe.epochs:
            raise InputError(
                f"{written.path} is at {self.recipe.unit} {written.epoch} already: raise --epochs to go on"
            )
        print(f"resume  {written.path}: {written.epoch} {self.recipe.unit}s done")

    def fit(self) -> list[EpochRecord]:
        try:
            with tqdm(
                total=self.recipe.epochs,
                initial=len(self.trainer.history),
                unit=f" {self.recipe.unit}s",
                leave=False,
                disable=not sys.stderr.isatty(),
            ) as bar:
                return self.trainer.fit(self.sampler, on_epoch=lambda record: self.report(record, bar))
        except (TrainingError, KeyboardInterrupt):
            if self.out is not None and (self.out / checkpoint.LAST).exists():
                print(
                    f"charrnn-fast: {self.out / checkpoint.LAST} keeps the last state that was saved", file=sys.stderr
                )
            raise

    def report(self, record: EpochRecord, bar: tqdm) -> None:
        bar.update()
        if record.epoch % self.recipe.report_every and record.epoch not in (1, self.recipe.epochs):
            return
        self.write()  # before anything is printed, which may fail
        recent = self.trainer.history[-self.recipe.report_every :]
        speed = sum(r.tokens for r in recent) / sum(r.seconds for r in recent)
        width = len(str(self.recipe.epochs))
        line = f"{self.recipe.unit} {record.epoch:{width}d}/{self.recipe.epochs}  "
        if self.recipe.unit == "iteration":
            mean = sum(r.train_loss for r in recent) / len(recent)
            line += f"loss {record.train_loss:.3f}  mean of last {len(recent)} {mean:.3f}"
        else:
            line += f"train perplexity {record.train_ppl:.3f}"
        if record.val_ppl is not None:
            line += f"  validation {record.val_ppl:.3f} (batch mean {record.val_ppl_batch_mean:.3f})"
        line += f"  {speed:,.0f} tokens/s"
        if self.recipe.sample_at_reports:
            line += "".join(
                f"  {_decode(self.trainer.model, self.vocab, p, self.seed + record.epoch)!r}"
                for p in self.recipe.prompts
            )
        with bar.external_write_mode():
            if self.capture_reason != self.trainer.capture_reason:
                self.capture_reason = self.trainer.capture_reason
                print(f"charrnn-fast: steps are not captured: {self.capture_reason}", file=sys.stderr)
            print(line, flush=True)

    def write(self) -> None:
        if self.out is None:
            return
        history = self.trainer.history
        self._save(checkpoint.LAST)
        scores = [r.train_ppl if r.val_ppl is None else r.val_ppl for r in history]
        if min(scores[-self.recipe.report_every :]) <= min(scores):
            self._save(checkpoint.BEST)
        lines = json.dumps([asdict(r) for r in history], indent=1) + "\n"
        write_whole(self.out / "history.json", lambda file: file.write(lines.encode()), "the history")
        if len(history) == self.recipe.epochs:
            self._plot()

    def _save(self, name: str) -> None:
        assert self.out is not None
        checkpoint.save(
            self.out / name,
            self.trainer,
            self.sampler,
            self.vocab,
            self.recipe,
            kind=self.kind,
            seed=self.seed,
            source=self.source,
            text_sha256=self.text_sha256,
        )

    def _plot(self) -> None:
        assert self.out is not None
        try:
            from charrnn_fast.lm.plots import plot_curve

            plot_curve(
                self.trainer.history, self.out / "curve.png", f"{self.recipe.name}, {self.kind}", self.recipe.unit
            )
        except ImportError:
            print(
                "charrnn-fast: no curve.png, because matplotlib is not installed (pip install matplotlib)",
                file=sys.stderr,
            )


def _decode(model: CharRNN | RNNLM, vocab: data.Vocabulary, prompt: Prompt, seed: int) -> str:
    """A recipe's prompt continued. Characters that another text does not have are left out of the prompt."""
    known = "".join(c for c in vocab.prepare(prompt.text) if c in vocab.symbols) or vocab.symbols[0]
    sampled = prompt.temperature is not None
    return generate(
        model, vocab, known, prompt.num_chars, temperature=prompt.temperature, seed=seed if sampled else None
    )


def _print_result(
    options: argparse.Namespace,
    recipe: Recipe,
    backend: str,
    history: list[EpochRecord],
    texts: list[str],
    seconds: float,
) -> None:
    last = history[-1]
    recent = history[-recipe.report_every :]
    train_ppl = perplexity(sum(r.train_loss for r in recent) / len(recent))
    speed = sum(r.tokens for r in history) / sum(r.seconds for r in history)
    print(f"result  training perplexity {train_ppl:.3f}", end="")
    if last.val_ppl is not None:
        print(f", validation {last.val_ppl:.3f} (mean of the batches' {last.val_ppl_batch_mean:.3f})", end="")
    print(f"; {speed:,.0f} tokens/s, {seconds:.1f} s")
    for text in texts:
        print(f"decoded {text!r}")
    if options.json:
        result = {
            "recipe": recipe.name,
            "model": options.model,
            "backend": backend,
            "seed": options.seed,
            "train_ppl": train_ppl,
            "val_ppl": last.val_ppl,
            "val_ppl_batch_mean": last.val_ppl_batch_mean,
            "tokens_per_s": speed,
            "seconds": seconds,
            "text": "\n".join(texts) if texts else None,
        }
        print(json.dumps(result), flush=True)
