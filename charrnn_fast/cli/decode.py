"""charrnn-fast generate and evaluate: what a checkpoint is good for."""

import argparse
import json
import math
import sys

from charrnn_fast.cli.options import CHARACTERS, SEED, add_text, at_least, find_device, positive
from charrnn_fast.lm import checkpoint, corpora, data
from charrnn_fast.lm.model import generate
from charrnn_fast.lm.training import validate

EVALUATION_STEPS = 1024  # characters a step when a whole text is walked with a carried state


def add_generate_parser(commands) -> None:
    p = commands.add_parser(
        "generate", help="continue a prompt with a trained model", description="Continue a prompt with a trained model."
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint file, or the --out folder of a run")
    p.add_argument("--prompt", required=True, metavar="P", help="the text to continue")
    p.add_argument(
        "--num-chars", type=at_least(0, CHARACTERS), default=50, metavar="N", help="characters to append (default: 50)"
    )
    p.add_argument(
        "--temperature", type=positive, metavar="T", help="sample at this temperature (default: decode greedily)"
    )
    p.add_argument(
        "--top-k", type=at_least(1, 2**31 - 1), metavar="K", help="sample among the K most probable characters"
    )
    p.add_argument("--alpha", type=positive, default=1.0, metavar="A", help="sample from q ~ p^A (default: 1)")
    p.add_argument(
        "--seed", type=at_least(*SEED), metavar="S", help="seed of the sampling (default: another text each time)"
    )
    p.add_argument("--device", default="cpu", metavar="D", help="cpu (default), cuda, ...")
    p.set_defaults(run=_generate)


def add_evaluate_parser(commands) -> None:
    p = commands.add_parser(
        "evaluate",
        help="perplexity of a text under a trained model",
        description="Walk a text once with a carried state; print its mean loss and perplexity under a trained model.",
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint file, or the --out folder of a run")
    add_text(p, required=True, help="the text to evaluate on")
    p.add_argument("--device", default="cpu", metavar="D", help="cpu (default), cuda, ...")
    p.add_argument("--json", action="store_true", help="print one JSON object as the last line of standard output")
    p.set_defaults(run=_evaluate)


def _generate(options: argparse.Namespace) -> int:
    written = checkpoint.load(options.checkpoint)
    model = written.build(find_device(options.device))
    text = generate(
        model,
        written.vocab,
        options.prompt,
        options.num_chars,
        temperature=options.temperature,
        top_k=options.top_k,
        alpha=options.alpha,
        seed=options.seed,
    )
    print(text)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    written = checkpoint.load(options.checkpoint)
    device = find_device(options.device)
    corpus = corpora.read_text(options.text, options.encoding, options.errors)
    if corpus.notice:
        print(f"charrnn-fast: {corpus.notice}", file=sys.stderr)
    tokens = written.vocab.encode(corpus.text).to(device)
    measured = validate(written.build(device), data.consecutive(tokens, EVALUATION_STEPS), carry_state=True)
    assert measured is not None  # consecutive() yields a batch or raises
    ppl = measured[0]
    print(f"{corpus.source}: perplexity {ppl:.3f}, {math.log(ppl):.4f} nats a character, {len(tokens):,} characters")
    if options.json:
        result = {
            "checkpoint": str(written.path),
            "text": options.text,
            "characters": len(tokens),
            "loss": math.log(ppl),
            "ppl": ppl,
        }
        print(json.dumps(result), flush=True)
    return 0
