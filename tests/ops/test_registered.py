"""The operators that the library registers with torch: torch's own checks of them, their floating-point operations, and
programs that run without the library.
"""

import io
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from charrnn_fast import CharRNN, FusedRNN, linear_cross_entropy
from charrnn_fast.ops.decompositions import decompositions

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's compiler and exporter announce their own changes

OPERATORS = torch.ops.charrnn_fast
T, B, F_IN, H, V, N = 5, 3, 4, 6, 9, 7


def _layer(form, backend, device):
    """Arguments of elman_layer: (input, h0, batch_sizes, weights, backend, nonlinearity, reverse)."""
    torch.manual_seed(0)
    directions = 2 if form in ("both directions", "packed") else 1
    shapes = [(H, F_IN), (H, H), *[(H,)] * {"no bias": 0, "two biases": 2}.get(form, 1)] * directions
    weights = [torch.randn(s, device=device, requires_grad=True) for s in shapes]
    h0 = torch.randn(directions, B, H, device=device, requires_grad=True) if form != "no state" else None
    input = torch.randn(T, B, F_IN, device=device, requires_grad=True)
    sizes = None
    if form == "tokens":
        input = torch.randint(F_IN, (T, B), device=device)
    elif form == "packed":
        sizes = torch.tensor([3, 2, 1])
        input = torch.randn(6, F_IN, device=device, requires_grad=True)
    return input, h0, sizes, weights, backend, "relu" if form == "no bias" else "tanh", [False, True][:directions]


FORMS = ["dense", "no state", "no bias", "two biases", "both directions", "tokens", "packed"]


def _grads_of(arguments):
    """Arguments of elman_layer_backward behind those of elman_layer."""
    input, h0, sizes, weights, *options = arguments
    with torch.no_grad():
        out, h_n = OPERATORS.elman_layer(*arguments)
    detached = [x if x is None else x.detach() for x in (input, h0)]
    needs_grad = [input.is_floating_point(), h0 is not None, *(True for _ in weights)]
    upstream = torch.randn_like(out), torch.randn_like(h_n)
    return *upstream, out, *detached, sizes, [w.detach() for w in weights], *options, needs_grad


def test_every_operator_is_known_here():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("charrnn_fast::")}
    assert names == {
        "charrnn_fast::elman_checkpointed",
        "charrnn_fast::elman_checkpointed_backward",
        "charrnn_fast::elman_layer",
        "charrnn_fast::elman_layer_backward",
        "charrnn_fast::linear_cross_entropy",
        "charrnn_fast::linear_cross_entropy_backward",
    }
    assert {f"charrnn_fast::{packet.__name__}" for packet in flop_registry if "charrnn_fast" in str(packet)} == names


IMPORTS = """
import sys, torch, charrnn_fast
print([name for name in ("torch._dynamo", "torch.utils.flop_counter", "triton") if name in sys.modules])
import importlib.util
assert importlib.util.find_spec("torch._dynamo") is not None  # who looks for it does not import it
import torch.utils.flop_counter
print(sum("charrnn_fast" in str(packet) for packet in torch.utils.flop_counter.flop_registry))
import torch._dynamo
print(torch._dynamo.variables.builder.VariableBuilder.wrap_module.__wrapped__.__name__)
print(charrnn_fast.ops.backends.choose._dynamo_marked_constant)
print(any("charrnn_fast" in type(finder).__module__ for finder in sys.meta_path))
"""


def test_the_compiler_is_told_when_it_is_imported_and_not_imported_to_be_told():
    """It takes as long to import as torch itself."""
    result = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=120)
    assert result.stdout.split("\n") == ["[]", "6", "wrap_module", "True", "False", ""], result.stderr


@pytest.mark.parametrize("form", FORMS)
def test_torchs_checks_of_the_layer(backend, device, form):
    arguments = _layer(form, backend, device)
    torch.library.opcheck(OPERATORS.elman_layer.default, arguments, test_utils="ALL")
    torch.library.opcheck(OPERATORS.elman_layer_backward.default, _grads_of(arguments), test_utils="ALL")


def _checkpointed(form, backend, device):
    """Arguments of elman_checkpointed: (input, hx, batch_sizes, weights, masks, backend, nonlinearity, num_layers,
    directions, dropout, steps).
    """
    input, h0, sizes, own, _, nonlinearity, reverse = _layer(form, backend, device)
    dropout, width = (0.5 if form == "two biases" else 0.0), len(reverse) * H
    own = [w for w in own if w.dim() == 2 or form == "two biases"]
    each = len(own) // len(reverse)
    above = [
        torch.randn(H, width if i % each == 0 else w.shape[-1], device=device, requires_grad=True)
        if w.dim() == 2
        else w.detach().clone().requires_grad_()
        for i, w in enumerate(own)
    ]
    masks = [torch.randint(64, (T, B, 1), dtype=torch.uint8, device=device)] if dropout else []
    hx = None if h0 is None else torch.cat([h0, h0]).detach().requires_grad_()
    return input, hx, sizes, [*own, *above], masks, backend, nonlinearity, 2, len(reverse), dropout, 2


@pytest.mark.parametrize("form", ["two biases", "tokens", "packed"])
def test_torchs_checks_of_checkpointed_layers(form):
    arguments = _checkpointed(form, "native", "cpu")
    torch.library.opcheck(OPERATORS.elman_checkpointed.default, arguments, test_utils="ALL")
    input, hx, sizes, weights, masks, *options = arguments
    with torch.no_grad():
        out, h_n, kept = OPERATORS.elman_checkpointed(*arguments)
    detached = [x if x is None else x.detach() for x in (input, hx)]
    needs_grad = [input.is_floating_point(), hx is not None, *(True for _ in weights)]
    given = (torch.randn_like(out), torch.randn_like(h_n), kept, *detached, sizes, [w.detach() for w in weights], masks)
    backward = OPERATORS.elman_checkpointed_backward.default
    torch.library.opcheck(backward, (*given, *options, needs_grad), test_utils="ALL")


@pytest.fixture
def loss_on(device, monkeypatch):
    """Where the loss's operator runs: by the Triton kernels, interpreted without a GPU."""
    monkeypatch.setenv("CHARRNN_BACKEND", "triton")
    return device


def _loss(reduction, device):
    torch.manual_seed(0)
    operands = [torch.randn(s, device=device, requires_grad=True) for s in ((N, H), (V, H), (V,))]
    target = torch.randint(V, (N,), device=device)
    target[1] = -100
    return *operands, target, reduction, -100, torch.float32


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torchs_checks_of_the_loss(loss_on, reduction):
    arguments = _loss(reduction, loss_on)
    torch.library.opcheck(OPERATORS.linear_cross_entropy.default, arguments, test_utils="ALL")
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    loss, lse, count = OPERATORS.linear_cross_entropy(*arguments)
    backward = (torch.ones_like(loss), lse, count, *arguments, [True, True, True])
    torch.library.opcheck(OPERATORS.linear_cross_entropy_backward.default, backward, test_utils="ALL")


# ---- meta tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
def test_meta_tensors(options):
    """Shapes without memory: a model too large for it can be drawn, as torch.nn.RNN's can."""
    ours, theirs = (kind(F_IN, H, device="meta", **options) for kind in (FusedRNN, nn.RNN))
    x = torch.empty(T, B, F_IN, device="meta")
    for found, expected in zip(ours(x), theirs(x), strict=True):
        assert found.is_meta and found.shape == expected.shape and found.dtype == expected.dtype
    logits, state = CharRNN(V, H, device="meta")(torch.empty(B, T, dtype=torch.int64, device="meta"))
    assert (logits.shape, state.shape) == ((B, T, V), (1, B, H)) and logits.is_meta
    total = sum(y.sum() for y in ours(x))
    total.backward()
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in ours.parameters())


# ---- floating-point operations --------------------------------------------------------------------------------------


def _counted(run):
    with FlopCounterMode(display=False) as mode:
        run()
    return mode.get_total_flops()


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
def test_flops_of_an_exported_program_are_torchs(backend, device, options, state):
    rnn = FusedRNN(F_IN, H, backend=backend, device=device, **options).eval()
    theirs = nn.RNN(F_IN, H, device=device, **options)
    x = torch.randn(T, B, F_IN, device=device)
    given = (x, torch.randn(len(rnn._flat_weights) // (4 if rnn.bias else 2), B, H, device=device)) if state else (x,)
    program = torch.export.export(rnn, given).module()
    assert "elman_layer" in str(program.graph)
    assert _counted(lambda: program(*given)) == _counted(lambda: theirs(*given)) > 0


@pytest.mark.parametrize("form", ["dense", "no bias", "no state", "both directions"])
def test_flops_of_the_layers_backward_are_torchs(backend, device, form):
    input, h0, *_, reverse = arguments = _layer(form, backend, device)
    theirs = nn.RNN(F_IN, H, bias=form != "no bias", bidirectional=len(reverse) == 2, device=device)
    leaves = [input, *theirs.parameters()] if h0 is None else [input, h0, *theirs.parameters()]
    result = theirs(input, h0)
    upstream = [torch.randn_like(y) for y in result]
    expected = _counted(lambda: torch.autograd.grad(result, leaves, upstream))
    found = _counted(lambda: OPERATORS.elman_layer_backward(*_grads_of(arguments))) - _counted(
        lambda: OPERATORS.elman_layer(*arguments)
    )
    assert found == expected > 0


@pytest.mark.parametrize("form", ["no bias", "no state", "both directions"])
def test_flops_of_checkpointed_layers_are_torchs(backend, device, form):
    """What backward computes once more is not counted, as nothing of what kernels do more than torch is."""
    input, hx, *_, num_layers, directions, _, _ = arguments = _checkpointed(form, backend, device)
    theirs = nn.RNN(F_IN, H, num_layers, bias=False, bidirectional=directions == 2, device=device)
    leaves = [input, *theirs.parameters()] if hx is None else [input, hx, *theirs.parameters()]
    result = theirs(input, hx)
    upstream = [torch.randn_like(y) for y in result]
    expected = _counted(lambda: torch.autograd.grad(result, leaves, upstream))
    assert _counted(lambda: OPERATORS.elman_checkpointed(*arguments)) == _counted(lambda: theirs(input, hx)) > 0
    input, hx, sizes, weights, masks, *options = arguments
    found = flop_registry[OPERATORS.elman_checkpointed_backward](
        None, None, None, input, hx, sizes, weights, masks, *options, [True, hx is not None, *(True for _ in weights)]
    )
    assert found == expected > 0


def test_flops_of_the_loss_are_torchs(loss_on):
    arguments = _loss("mean", loss_on)
    input, weight, bias, target, *_ = arguments
    loss = F.cross_entropy(F.linear(input, weight, bias), target)
    own = OPERATORS.linear_cross_entropy(*arguments)
    forward = _counted(lambda: OPERATORS.linear_cross_entropy(*arguments))
    assert forward == _counted(lambda: F.cross_entropy(F.linear(input, weight, bias), target)) > 0
    kept = [x.detach() for x in own[1:]]
    for needs_grad in ([True, True, True], [False, True, False], [True, False, False]):
        wanted = [x for x, needs in zip((input, weight, bias), needs_grad, strict=True) if needs]
        theirs = _counted(lambda wanted=wanted: torch.autograd.grad(loss, wanted, retain_graph=True))
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        operands = (torch.ones(()), *kept, *detached, needs_grad)
        ours = _counted(lambda operands=operands: OPERATORS.linear_cross_entropy_backward(*operands))
        assert ours == theirs > 0


# ---- programs that run without the library --------------------------------------------------------------------------


class _Loss(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.head = nn.Linear(H, V, device=device)

    def forward(self, rows, target):
        return linear_cross_entropy(rows, self.head.weight, target, linear_bias=self.head.bias)


class _Ids(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = FusedRNN(F_IN, H, nonlinearity="relu", bias=False, backend="native")

    def forward(self, ids):
        return self.rnn.forward_tokens(ids)


ANY = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
MODELS = {
    "layers and directions": (
        lambda: FusedRNN(F_IN, H, 2, bidirectional=True, backend="native"),
        lambda t, b: (torch.randn(t, b, F_IN),),
        (ANY,),
    ),
    "batch first, a state": (
        lambda: FusedRNN(F_IN, H, batch_first=True, nonlinearity="relu", backend="native"),
        lambda t, b: (torch.randn(b, t, F_IN), torch.randn(1, b, H)),
        (ANY, {1: Dim.DYNAMIC}),
    ),
    "tokens": (_Ids, lambda t, b: (torch.randint(F_IN, (t, b)),), (ANY,)),
    "language model": (lambda: CharRNN(V, H, 2), lambda t, b: (torch.randint(V, (b, t)),), (ANY,)),
}

ELSEWHERE = """
import sys, torch
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "charrnn_fast":
            raise ImportError("charrnn_fast is not installed here")
sys.meta_path.insert(0, Refused())
for program, given, results in torch.load(sys.argv[1], weights_only=False):
    import io
    found = torch.export.load(io.BytesIO(program)).module()(*given)
    torch.testing.assert_close(list(found) if isinstance(found, tuple) else [found], list(results))
assert not hasattr(torch.ops.charrnn_fast, "elman_layer") and "charrnn_fast" not in sys.modules
print("equal")
"""


def _operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def _saved(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def test_decomposed_programs_run_where_the_library_is_not(tmp_path, monkeypatch):
    """With any number of steps and sequences; in a process in which charrnn_fast cannot be imported."""
    torch.manual_seed(0)
    files = []
    for make, given, shapes in MODELS.values():
        model = make().eval()
        program = torch.export.export(model, given(T, B), dynamic_shapes=shapes)
        decomposed = program.run_decompositions(decompositions())
        assert not any("charrnn_fast" in name for name in _operators(decomposed)), _operators(decomposed)
        for sizes in ((T, B), (17, 4), (1, 1)):
            arguments = given(*sizes)
            files.append((_saved(decomposed), arguments, tuple(model(*arguments))))
    monkeypatch.setenv("CHARRNN_BACKEND", "triton")
    loss, arguments = _Loss("cpu"), (torch.randn(N, H), torch.randint(V, (N,)))
    program = torch.export.export(loss, arguments)
    assert any("charrnn_fast" in name for name in _operators(program))
    files.append((_saved(program.run_decompositions(decompositions())), arguments, (loss(*arguments),)))
    torch.save(files, tmp_path / "programs")
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(tmp_path / "programs")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.stdout == "equal\n", result.stderr


def test_an_exported_program_without_them_needs_the_library():
    program = torch.export.export(FusedRNN(F_IN, H, backend="native"), (torch.randn(T, B, F_IN),))
    assert any("charrnn_fast" in name for name in _operators(program))


def test_the_losss_decomposition_gives_all_that_the_operator_does(loss_on):
    for reduction in ("mean", "sum", "none"):
        arguments = _loss(reduction, loss_on)
        decomposed = decompositions()[OPERATORS.linear_cross_entropy.default](*arguments)
        torch.testing.assert_close(decomposed, OPERATORS.linear_cross_entropy(*arguments))


def test_packed_input_has_no_decomposition():
    arguments = _layer("packed", "native", "cpu")
    with pytest.raises(RuntimeError, match="an Elman layer of packed input has no decomposition: export"):
        decompositions()[OPERATORS.elman_layer.default](*arguments)


@pytest.mark.slow
def test_ahead_of_time_compilation():
    """torch._inductor's shared library, which calls the operators: for any number of steps and sequences."""
    rnn = FusedRNN(F_IN, H, 2, bidirectional=True, backend="native").eval()
    sizes = {0: Dim("steps", min=1, max=4096), 1: Dim("batch", min=1, max=4096)}
    with torch.no_grad():
        program = torch.export.export(rnn, (torch.randn(T, B, F_IN),), dynamic_shapes={"input": sizes})
        compiled = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program))
        for shape in ((T, B, F_IN), (20, 4, F_IN), (1, 1, F_IN)):
            x = torch.randn(shape)
            torch.testing.assert_close(tuple(compiled(x)), rnn(x))
