"""charrnn-fast export: a trained model for other programs."""

import argparse
from pathlib import Path

from charrnn_fast.lm import checkpoint
from charrnn_fast.lm.export import FORMS, export


def add_parser(commands) -> None:
    p = commands.add_parser(
        "export",
        help="write a trained model for other programs",
        description="Write a trained model as safetensors, a state_dict (for torch.nn.RNN and torch.nn.Linear), ONNX "
        "or TorchScript. The last two take tokens (B, T) and a state (L, B, H), and give logits (B, T, V) and the new "
        "state.",
    )
    p.add_argument("checkpoint", metavar="RUN", help="the --out folder of a run, or a checkpoint file")
    p.add_argument("--to", choices=FORMS, required=True, help="the form")
    p.add_argument("--out", type=Path, metavar="FILE", help="where to (default: model with the form's ending, here)")
    p.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    written = checkpoint.load(options.checkpoint)
    path = options.out or Path(f"model{FORMS[options.to]}")
    export(written, options.to, path)
    print(f"{path}: {options.to}, {sum(p.numel() for p in written.parameters.values()):,} parameters")
    return 0
