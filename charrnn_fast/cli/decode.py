"""charrnn-fast generate and evaluate: what a checkpoint is good for."""

import argparse
import json
import math
import random
import sys
from typing import Any

from charrnn_fast.cli.options import CHARACTERS, SEED, at_least, between, find_device, positive
from charrnn_fast.errors import InputError
from charrnn_fast.lm import checkpoint, corpora, data
from charrnn_fast.lm.evaluation import validate
from charrnn_fast.lm.generation import generate, stream
from charrnn_fast.lm.texts import read_texts

WHOLE = "FILE:"  # before a name: the whole content of that file
EVALUATION_STEPS = 1024  # characters a step when a whole text is walked with a carried state


def add_generate_parser(commands) -> None:
    p = commands.add_parser(
        "generate", help="continue a prompt with a trained model", description="Continue a prompt with a trained model."
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint file, or the --out folder of a run")
    given = p.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--prompt", metavar="P", help=f"the text to continue, or {WHOLE}NAME for the whole content of a file"
    )
    given.add_argument("--prompt-file", metavar="NAME", help="continue each line of a file")
    p.add_argument(
        "--num-chars", type=at_least(0, CHARACTERS), default=50, metavar="N", help="characters to append (default: 50)"
    )
    p.add_argument(
        "--temperature",
        type=between(0, math.inf),
        metavar="T",
        help="sample at this temperature (default: decode greedily, as 0 does)",
    )
    p.add_argument(
        "--top-k", type=at_least(1, 2**31 - 1), metavar="K", help="sample among the K most probable characters"
    )
    p.add_argument("--alpha", type=positive, default=1.0, metavar="A", help="sample from q ~ p^A (default: 1)")
    p.add_argument(
        "--seed", type=at_least(*SEED), metavar="S", help="seed of the sampling (default: another text each time)"
    )
    p.add_argument(
        "--num-samples",
        type=at_least(1, 10**6),
        default=1,
        metavar="N",
        help="texts for each prompt, with the seeds S, S+1, ... (default: 1)",
    )
    p.add_argument("--stream", action="store_true", help="print characters as they come")
    add_unknown(p)
    p.add_argument("--json", action="store_true", help="print one JSON object with all samples, and nothing else")
    p.add_argument("--device", default="cpu", metavar="D", help="cpu (default), cuda, ...")
    p.set_defaults(run=_generate)


def add_unknown(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--unknown",
        choices=("error", "map"),
        default="error",
        help="characters outside the model's vocabulary: an error that names them (default), or map them to their "
        "letter without accents, its other case, or a space",
    )


def add_evaluate_parser(commands) -> None:
    p = commands.add_parser(
        "evaluate",
        help="perplexity of a text under a trained model",
        description="Walk a text once with a carried state; print its mean loss and perplexity under a trained model.",
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint file, or the --out folder of a run")
    what = "the text to evaluate on: files, folders, or - for standard input"
    p.add_argument("--text", metavar="F", nargs="+", required=True, help=what)
    p.add_argument("--encoding", default="utf-8", metavar="C", help="the file's encoding (default: utf-8)")
    what = "what to do with bytes that are not in it"
    p.add_argument("--errors", choices=("strict", "replace", "ignore"), default="strict", help=what)
    add_unknown(p)
    p.add_argument("--device", default="cpu", metavar="D", help="cpu (default), cuda, ...")
    p.add_argument("--json", action="store_true", help="print one JSON object as the last line of standard output")
    p.set_defaults(run=_evaluate)


def _generate(options: argparse.Namespace) -> int:
    written = checkpoint.load(options.checkpoint)
    prompts = [known(written.vocab, prompt, options.unknown) for prompt in _prompts(options)]
    greedy = options.temperature is None or options.temperature == 0
    if greedy and options.num_samples > 1:
        raise InputError("greedy texts of one prompt are all the same: pass --temperature with --num-samples")
    if options.stream and options.json:
        raise InputError("--stream prints characters, and --json one object: pass one of them")
    sampling: dict[str, Any] = {"top_k": options.top_k, "alpha": options.alpha, "temperature": options.temperature}
    if options.temperature == 0:  # greedy, whatever else is said about sampling
        sampling = {}
    model, samples = written.build(find_device(options.device)), []
    for prompt in prompts:
        for i in range(options.num_samples):
            seed = options.seed
            if not greedy:  # one that can be told, so that a text can be made again
                seed = (random.SystemRandom().randrange(2**32) if seed is None else seed) + i
                seed = min(seed, SEED[1])
            drawn = sampling if options.temperature == 0 else {**sampling, "seed": seed}
            if options.stream:
                for piece in stream(model, written.vocab, prompt, options.num_chars, **drawn):
                    print(piece, end="", flush=True)
                print(flush=True)
                continue
            text = generate(model, written.vocab, prompt, options.num_chars, **drawn)
            samples.append({"prompt": prompt, "text": text, "seed": None if greedy else seed})
            if not options.json:
                print(text, flush=True)
    if options.json:
        print(json.dumps({"checkpoint": str(written.path), "samples": samples}), flush=True)
    return 0


def _prompts(options: argparse.Namespace) -> list[str]:
    """The prompts of the command line or of a file: its lines, without the empty ones, or all of it."""
    if options.prompt is not None:
        if not options.prompt.startswith(WHOLE):
            return [options.prompt]
        return [corpora.read_text(options.prompt.removeprefix(WHOLE)).text]
    lines = [line for line in corpora.read_text(options.prompt_file).text.splitlines() if line]
    if not lines:
        raise InputError(f"{options.prompt_file} holds no prompts: expected one a line")
    return lines


def known(vocab: data.Vocabulary, text: str, unknown: str) -> str:
    """The text, with unknown="map" without the characters that the vocabulary lacks, which are told."""
    if unknown == "error":
        return text
    mapped, replaced = vocab.map_unknown(text)
    if replaced:
        shown = " ".join(repr(c) for c in replaced[:8]) + (" ..." if len(replaced) > 8 else "")
        print(f"charrnn-fast: mapped characters outside the vocabulary: {shown}", file=sys.stderr)
    return mapped


def _evaluate(options: argparse.Namespace) -> int:
    written = checkpoint.load(options.checkpoint)
    device = find_device(options.device)
    corpus = read_texts(options.text, options.encoding, options.errors, large=math.inf)
    assert isinstance(corpus, corpora.Corpus)
    if corpus.notice:
        print(f"charrnn-fast: {corpus.notice}", file=sys.stderr)
    text = known(written.vocab, corpus.text, options.unknown)
    tokens = written.vocab.encode(text, written.vocab.dtype).to(device)
    measured = validate(
        written.build(device), data.consecutive(tokens, EVALUATION_STEPS, len(written.vocab)), carry_state=True
    )
    assert measured is not None  # consecutive() yields a batch or raises
    ppl = measured[0]
    print(f"{corpus.source}: perplexity {ppl:.3f}, {math.log(ppl):.4f} nats a character, {len(tokens):,} characters")
    if options.json:
        result = {
            "checkpoint": str(written.path),
            "text": corpus.source,
            "characters": len(tokens),
            "loss": math.log(ppl),
            "ppl": ppl,
        }
        print(json.dumps(result), flush=True)
    return 0
