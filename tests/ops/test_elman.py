"""The operation elman: one layer, one direction; gradients of every order; arguments; the registered operator."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from charrnn_fast.ops import elman
from charrnn_fast.ops.tokens import TOKEN_TYPES

T, B, V, H = 2, 2, 2, 3
LENGTHS = [2, 1]


def make_case(tokens=False, packed=False, h0=True, bias=True, dtype=torch.float64, device="cpu", seed=0):
    """input, h0, weight_ih, weight_hh, bias_ih, bias_hh; batch_sizes."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    kind = torch.int32 if packed else torch.int64
    input = torch.randint(0, V, (T, B), generator=generator, dtype=kind).to(device) if tokens else make(T, B, V)
    batch_sizes = None
    if packed:
        sequence = pack_padded_sequence(input.detach(), LENGTHS)
        input, batch_sizes = sequence.data.requires_grad_(not tokens), sequence.batch_sizes
    biases = (make(H), make(H)) if bias else (None, None)
    return [input, make(B, H) if h0 else None, make(H, V), make(H, H), *biases], batch_sizes


def one_hot_rnn(arguments, batch_sizes, nonlinearity, reverse):
    """torch.nn.functional's answer, for the reverse walk by torch.nn.RNN's second direction."""
    input, h0, *weights = arguments
    if input.dtype in TOKEN_TYPES:
        input = F.one_hot(input.long(), V).to(weights[0].dtype)
    weights = [weight for weight in weights if weight is not None]
    directions = 2 if reverse else 1
    rnn = torch.nn.RNN(V, H, nonlinearity=nonlinearity, bias=len(weights) == 4, bidirectional=reverse)
    names = [name for name, _ in rnn.named_parameters()]
    values = dict(zip(names, weights * directions, strict=True))
    rnn = rnn.to(weights[0])
    h0 = torch.zeros(B, H).to(weights[0]) if h0 is None else h0
    sequence = input if batch_sizes is None else PackedSequence(input, batch_sizes)
    output, h_n = torch.func.functional_call(rnn, values, (sequence, torch.stack([h0] * directions)))
    output = output if batch_sizes is None else output.data
    return output[..., -H:], h_n[-1]


def gradients(output, arguments):
    """Of one loss that uses the output and the last state."""
    wanted = [x for x in arguments if x is not None and x.requires_grad]
    loss = output[0].sin().sum() + (output[1] * output[1]).sum()
    return torch.autograd.grad(loss, wanted, materialize_grads=True, allow_unused=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [False, True])
def test_outputs_and_gradients(backend, device, tokens, packed, nonlinearity, reverse):
    for h0, bias in itertools.product([False, True], repeat=2):
        arguments, batch_sizes = make_case(tokens, packed, h0, bias, device=device)
        options = {"nonlinearity": nonlinearity, "reverse": reverse}
        expected = one_hot_rnn(arguments, batch_sizes, **options)
        got = elman(*arguments, batch_sizes=batch_sizes, backend=backend, **options)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(gradients(got, arguments), gradients(expected, arguments))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("h0", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [False, True])
def test_gradcheck_through_the_kernels(device, tokens, packed, h0, nonlinearity):
    arguments, batch_sizes = make_case(tokens, packed, h0, device=device)
    arguments[5] = None  # the sum of the biases is PyTorch's
    reverse = packed  # both walks are covered, in half the time

    def function(*given):
        return elman(*given, nonlinearity=nonlinearity, reverse=reverse, batch_sizes=batch_sizes, backend="triton")

    # Every entry of the Jacobian for tanh; for relu, whose kernel differs in one factor, random projections of it.
    assert torch.autograd.gradcheck(function, arguments, fast_mode=nonlinearity == "relu")


@pytest.mark.parametrize(("tokens", "packed", "nonlinearity"), [(False, True, "tanh"), (True, False, "relu")])
def test_gradgradcheck(backend, device, tokens, packed, nonlinearity):
    arguments, batch_sizes = make_case(tokens, packed, device=device)

    def function(*given):
        return elman(*given, nonlinearity=nonlinearity, batch_sizes=batch_sizes, backend=backend)

    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


def test_a_tensor_in_two_places_gets_both_gradients_of_both_orders(backend, device):
    """W_ih = W_hh and input = h0's rows: each place adds its own share, also where the layer is recomputed."""
    square = torch.randn(H, H, dtype=torch.float64, device=device, requires_grad=True)
    rows = torch.randn(B, H, dtype=torch.float64, device=device, requires_grad=True)

    def penalty(run):
        output, h_n = run(rows.expand(T, B, H), rows, square, square)
        first = torch.autograd.grad(output.sum() + h_n.sin().sum(), [rows, square], create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), [rows, square])

    def steps(x, h, weight_ih, weight_hh):
        outputs = []
        for x_t in x:
            h = torch.tanh(x_t @ weight_ih.T + h @ weight_hh.T)
            outputs.append(h)
        return torch.stack(outputs), h

    torch.testing.assert_close(penalty(lambda *given: elman(*given, backend=backend)), penalty(steps))


def test_gradients_of_one_result_alone(backend, device):
    arguments, _ = make_case(device=device)
    for index in (0, 1):
        expected = torch.autograd.grad(one_hot_rnn(arguments, None, "tanh", False)[index].sin().sum(), arguments)
        got = torch.autograd.grad(elman(*arguments, backend=backend)[index].sin().sum(), arguments)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("wanted", range(6))
def test_only_what_is_asked_gets_a_gradient(backend, device, wanted):
    arguments, _ = make_case(device=device)
    expected = torch.autograd.grad(elman(*arguments, backend=backend)[0].sin().sum(), arguments[wanted])
    arguments = [x if place == wanted else x.detach() for place, x in enumerate(arguments)]
    output, _ = elman(*arguments, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(output.sin().sum(), arguments[wanted]), expected)


def test_nothing_is_kept_but_input_output_and_weights(device):
    """The kernels' backward needs no pre-activations and no projected input."""
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    arguments, _ = make_case(device=device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, _ = elman(*arguments, backend="triton")
    allowed = {x.untyped_storage().data_ptr() for x in [*arguments, output]}
    others = [x for x in kept if x.untyped_storage().data_ptr() not in allowed]
    assert not others


@pytest.mark.parametrize("bad", [-1, V, 1 << 40])
def test_token_ids_out_of_range_on_a_cpu(backend, device, bad):
    if device.type != "cpu":
        pytest.skip("a GPU reports this by a device-side assertion")
    arguments, _ = make_case(tokens=True)
    arguments[0][1, 1] = bad
    with pytest.raises(IndexError, match=rf"index out of range in self: token id {bad} is not in 0\.\.{V - 1}"):
        elman(*arguments, backend=backend)


@pytest.mark.parametrize("shape", [(0, B), (T, 0)])
@pytest.mark.parametrize("tokens", [False, True])
def test_empty_input(backend, device, tokens, shape):
    arguments, _ = make_case(tokens, device=device)
    input = arguments[0].detach()[: shape[0], : shape[1]].requires_grad_(not tokens)
    h0 = arguments[1].detach()[: shape[1]].requires_grad_()
    output, h_n = elman(input, h0, *arguments[2:], backend=backend)
    assert output.shape == (*shape, H)
    assert h_n.shape == (shape[1], H)
    if shape[0] == 0:
        torch.testing.assert_close(h_n, h0)
        torch.testing.assert_close(torch.autograd.grad(h_n.sum(), h0)[0], torch.ones_like(h0))
    got = gradients(elman(input, h0, *arguments[2:], backend=backend), [*arguments[2:]])
    assert all(not grad.any() for grad in got)


def test_one_bias_alone(backend, device):
    arguments, _ = make_case(device=device)
    zero = torch.zeros_like(arguments[4])
    expected = elman(*arguments[:5], zero, backend=backend)
    torch.testing.assert_close(elman(*arguments[:5], backend=backend), expected)
    torch.testing.assert_close(elman(*arguments[:4], None, arguments[4], backend=backend), expected)


def test_the_output_is_contiguous_whatever_the_order_of_the_input(backend, device):
    arguments, _ = make_case(device=device)
    batch_first = arguments[0].detach().transpose(0, 1).contiguous()
    expected, _ = elman(*arguments, backend=backend)
    output, _ = elman(batch_first.transpose(0, 1), *arguments[1:], backend=backend)
    torch.testing.assert_close(output, expected)
    assert expected.is_contiguous() and output.is_contiguous() and not output._is_view()


def test_autocast(backend, device):
    arguments, _ = make_case(dtype=torch.float32, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output, h_n = elman(*arguments, backend=backend)
    assert output.dtype == h_n.dtype == torch.bfloat16
    torch.testing.assert_close((output.float(), h_n.float()), elman(*arguments, backend=backend), atol=0.05, rtol=0.05)
    assert {grad.dtype for grad in gradients((output, h_n), arguments)} == {torch.float32}


def test_compiled_in_one_graph(backend, device):
    for tokens in (False, True):
        arguments, _ = make_case(tokens, device=device)
        torch._dynamo.reset()
        compiled = torch.compile(elman, fullgraph=True, backend="aot_eager")
        result = compiled(*arguments, reverse=True, backend=backend)
        expected = elman(*arguments, reverse=True, backend=backend)
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(gradients(result, arguments), gradients(expected, arguments))


BAD_ARGUMENTS = {
    "weight_ih must be": {"weight_ih": torch.zeros(H)},
    "input must be torch.float64 as weight_ih is, or int64 or int32 token ids, got torch.float32": {
        "input": torch.zeros(T, B, V)
    },
    rf"input must be \(T, B, {V}\), got \({T}, {B}, {V + 1}\)": {"input": torch.zeros(T, B, V + 1).double()},
    rf"input must be \(T, B, {V}\), got \({T}, {V}\)": {"input": torch.zeros(T, V).double()},
    rf"input must be \(T, B\), got \({T},\)": {"input": torch.zeros(T, dtype=torch.int64)},
    rf"weight_hh must be \({H}, {H}\), got \({H}, 1\)": {"weight_hh": torch.zeros(H, 1).double()},
    rf"bias_ih must be \({H},\), got \(1,\)": {"bias_ih": torch.zeros(1).double()},
    "bias_hh must be torch.float64 as weight_ih is, got torch.float32": {"bias_hh": torch.zeros(H)},
    rf"h0 must be \({B}, {H}\), got \(1, {B}, {H}\)": {"h0": torch.zeros(1, B, H).double()},
    "h0 must be on cpu as weight_ih is, got meta": {"h0": torch.zeros(B, H, device="meta").double()},
    "input must be on cpu as weight_ih is, got meta": {"input": torch.zeros(T, B, V, device="meta").double()},
    "Unknown nonlinearity 'gelu'. Select from 'tanh' or 'relu'.": {"nonlinearity": "gelu"},
    "Unknown backend 'cuda'. Select from 'auto', ": {"backend": "cuda"},
    "batch_sizes must be .T,. int64 on the CPU, got .2,. torch.int32 on cpu": {
        "batch_sizes": torch.tensor([2, 1], dtype=torch.int32),
        "input": torch.zeros(3, V).double(),
    },
    r"batch_sizes must be positive and must not increase, got \[1, 2\]": {
        "batch_sizes": torch.tensor([1, 2]),
        "input": torch.zeros(3, V).double(),
    },
    "batch_sizes must sum to the 4 rows of input, got 3": {
        "batch_sizes": torch.tensor([2, 1]),
        "input": torch.zeros(4, V).double(),
    },
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_with_expected_and_got(message):
    arguments, _ = make_case()
    names = ("input", "h0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    with pytest.raises(ValueError, match=message):
        elman(**{**dict(zip(names, arguments, strict=True)), **BAD_ARGUMENTS[message]})


def test_dispatch_modes_see_the_operator(device):
    """FakeTensorMode, make_fx and the like cannot look into a kernel launch, so they get the registered operator."""
    from torch.fx.experimental.proxy_tensor import make_fx

    arguments, _ = make_case(device=device)
    arguments = [x.detach() for x in arguments]
    graph = make_fx(lambda *given: elman(*given, backend="triton"))(*arguments)
    assert torch.ops.charrnn_fast.elman_layer.default in {node.target for node in graph.graph.nodes}
    torch.testing.assert_close(graph(*arguments), elman(*arguments, backend="triton"))


@pytest.mark.gpu
def test_ids_out_of_range_on_a_gpu_are_reported_like_embeddings():
    """In a process of its own: a device-side assertion ends a CUDA context."""
    program = """
import torch
from charrnn_fast import FusedRNN
FusedRNN(3, 4, device="cuda").forward_tokens(torch.tensor([[0], [7]], device="cuda"))
torch.cuda.synchronize()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode != 0
    assert "device-side assert" in result.stderr


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_nan_is_in_the_gradients_where_torch_has_it(backend, device, nonlinearity):
    """relu's derivative of NaN is not 0, which would hide it."""
    from charrnn_fast import FusedRNN

    rnn = FusedRNN(3, 5, nonlinearity=nonlinearity, backend=backend).to(device)
    theirs = torch.nn.RNN(3, 5, nonlinearity=nonlinearity).to(device)
    theirs.load_state_dict(rnn.state_dict())
    x = torch.randn(6, 4, 3).to(device)
    x[2, 1, 0] = torch.nan
    found, expected = (torch.autograd.grad(net(x)[0].pow(2).sum(), list(net.parameters())) for net in (rnn, theirs))
    for ours, right in zip(found, expected, strict=True):
        assert torch.equal(ours.isnan(), right.isnan())
