"""README's table of what is not supported: each row's case raises an error that says what the row says."""

from pathlib import Path

import pytest
import torch
from command_line import Two
from torch import nn
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence

from charrnn_fast import CharRNN, FusedRNN, Trainer
from charrnn_fast.errors import InputError
from charrnn_fast.lm import checkpoint, data
from charrnn_fast.lm.recipes import RECIPES, build_model, for_processes
from charrnn_fast.ops.decompositions import decompositions

README = Path(__file__).parents[2] / "README.md"
PLAIN = (ValueError, RuntimeError)


def rows():
    """The table's rows: (what, message)."""
    _, _, section = README.read_text().partition("\n## Not supported\n")
    lines = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    return dict(tuple(cell.strip().strip("`") for cell in line.strip("| ").split(" | ")) for line in lines)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = FusedRNN(4, 8, backend="native")

    def forward(self, rows, batch_sizes, state):
        return self.rnn(PackedSequence(rows, batch_sizes), state)[0].data


def _changed_in_place():
    output, _ = FusedRNN(4, 8)(torch.randn(9, 2, 4))
    output.mul_(2).sum().backward()


def _decomposed_packed():
    given = (torch.randn(6, 4), torch.tensor([3, 2, 1]), torch.randn(1, 3, 8))
    program = torch.export.export(Packed(), given, dynamic_shapes=({0: Dim.DYNAMIC}, None, None))
    program.run_decompositions(decompositions())


def _changed_model():
    model = CharRNN(5, 4)
    model.head = nn.Sequential(model.head)
    trainer = Trainer(model, optimizer="sgd")
    sampler = data.Windows(torch.arange(5).repeat(30), torch.Generator(), batch_size=2, num_steps=4)
    vocab = data.Vocabulary(list("abcde"), letters=False)
    checkpoint.as_bytes(trainer, sampler, vocab, RECIPES["scratch"], kind="fused", seed=0, source="a book")


def _reference_resumed(says):
    train = "train --text book.txt --model reference --hidden-size 8 --out out"
    says(f"{train} --epochs 1")
    raise InputError(says(f"{train} --epochs 2 --resume", code=2).err)


CASES = {
    "a projection, as LSTM has it": lambda: FusedRNN(4, 8, proj_size=2),
    "another nonlinearity than tanh and relu": lambda: FusedRNN(4, 8, nonlinearity="sigmoid"),
    "a backend that is asked for and cannot run": lambda: FusedRNN(4, 8, backend="native", device="meta")(
        torch.empty(9, 2, 4, device="meta")
    ),
    "no steps": lambda: FusedRNN(4, 8)(torch.randn(0, 2, 4)),
    "token ids that are no int64 or int32": lambda: FusedRNN(4, 8).forward_tokens(torch.randn(9, 2)),
    "`forward_with_lengths` of lengths on another device than the input": lambda: FusedRNN(4, 8).forward_with_lengths(
        torch.randn(9, 2, 4), torch.ones(2, dtype=torch.int64, device="meta")
    ),
    "`forward_with_resets` and `forward_with_lengths` of unbatched or packed input": lambda: FusedRNN(
        4, 8
    ).forward_with_lengths(torch.randn(9, 4), torch.ones(1, dtype=torch.int64)),
    "a change of the output in place before its backward": _changed_in_place,
    "a decomposition of packed input": _decomposed_packed,
    "the reference form of a model with dropout": lambda: CharRNN(5, 4, dropout=0.1).to_reference(),
    "the reference form in several processes": lambda: Trainer(
        build_model(RECIPES["scratch"], 28, 0, kind="reference"), processes=Two()
    ),
    "the sampler pieces in several processes": lambda: for_processes(RECIPES["santa"], 2),
    "`--resume` of `--model reference`": _reference_resumed,
    "LBFGS in a Trainer": lambda: Trainer(model := CharRNN(5, 4), optimizer=torch.optim.LBFGS(model.parameters())),
    "`accumulate` and `graph_batches` together": lambda: Trainer(CharRNN(5, 4), accumulate=2, graph_batches=2),
    "captured steps on a CPU": lambda: Trainer(CharRNN(5, 4), capture=True),
    "a checkpoint of a model whose parts were replaced": _changed_model,
}


def test_the_table_and_its_cases_are_the_same():
    assert list(rows()) == [what.strip("`") for what in CASES]


@pytest.mark.parametrize("what", CASES)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_supported_says_so(what, request):
    case = CASES[what]
    arguments = [request.getfixturevalue(name) for name in case.__code__.co_varnames[: case.__code__.co_argcount]]
    with pytest.raises((*PLAIN, InputError)) as caught:
        case(*arguments)
    assert rows()[what.strip("`")] in " ".join(str(caught.value).split())
