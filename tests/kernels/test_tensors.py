"""What a survey says of tensors, by the C extension and by Python."""

import threading
import warnings

import needs
import pytest
import torch
from torch import nn
from unusual import KINDS

from charrnn_fast.kernels import tensors
from charrnn_fast.kernels.native import library
from charrnn_fast.ops.context import plain


def _by_c(*arguments):
    needs.native_kernels()
    assert tensors._EXCHANGE is not None  # every supported PyTorch has it
    return tensors.survey(*arguments, plain=lambda *_: pytest.fail("asked of Python"))


def _by_python(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "_EXCHANGE", None)
        return tensors.survey(*arguments, plain=plain)


WAYS = pytest.mark.parametrize("survey", [_by_c, _by_python], ids=["c", "python"])


def _leaked(transform):
    """A tensor of a transform that has ended."""
    kept = []

    def run(x):
        kept.append(x * 1)
        return x.sum()

    transform(run)(torch.ones(3, 2))
    return kept[0]


def _freed():
    x = torch.ones(4)
    x.untyped_storage().resize_(0)
    return x


# How to make what is no plain memory, whichever way it is asked: each kind of a matrix, and what has ended.
NOT_PLAIN = ["negative view", "imaginary part of a conjugate", "sparse", "sparse rows", "subclass", "logging subclass"]
NOT_PLAIN += ["meta", "zero tensor", "nested", "quantized", "mkldnn", "inference tensor", "not a tensor", "nothing"]
UNUSUAL = {kind: lambda kind=kind: KINDS[kind](torch.eye(3)) for kind in NOT_PLAIN} | {
    "of vmap": lambda: _leaked(torch.vmap),
    "of grad": lambda: _leaked(torch.func.grad),
    "functional": lambda: torch._to_functional_tensor(torch.ones(3)),
    "freed": _freed,
}


@WAYS
@pytest.mark.parametrize("kind", UNUSUAL)
def test_what_is_no_plain_memory_is_not_surveyed(survey, kind):
    if survey is _by_python and kind in ("not a tensor", "nothing"):
        return  # it is asked of tensors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = UNUSUAL[kind]()
    assert survey([torch.ones(2), x]) is None
    assert survey([torch.ones(2)], [x]) is None


def _memory(*shape, dtype=torch.float32, offset=0):
    return torch.zeros(sum(shape, 200), dtype=dtype)[offset : offset + torch.Size(shape).numel()].view(shape)


GROUPS = {
    "nothing": lambda: ([], None),
    "one": lambda: ([torch.ones(3, 4)], None),
    "types": lambda: ([torch.ones(2, dtype=dtype) for dtype in tensors.KINDS], None),
    "parameter": lambda: ([nn.Parameter(torch.ones(3))], None),
    "other type": lambda: ([torch.ones(2), torch.ones(2, dtype=torch.int64)], None),
    "complex": lambda: ([torch.ones(2, dtype=torch.complex64)], None),
    "scalar and empty": lambda: ([torch.tensor(1.0), torch.ones(0, 3)], None),
    "transposed": lambda: ([torch.ones(3, 4).t(), torch.ones(2, 3, 4).permute(1, 2, 0)], None),
    "gaps": lambda: ([torch.ones(3, 4)[:, :2]], None),
    "every second": lambda: ([torch.ones(8)[::2]], None),
    "expanded": lambda: ([torch.ones(1, 3).expand(2, 3)], None),
    "sizes of one": lambda: ([torch.ones(3, 1, 2).as_strided((3, 1, 2), (2, 77, 1))], None),
    "channels last": lambda: ([torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)], None),
    "unaligned": lambda: ([_memory(4, offset=1), _memory(4)], None),
    "twice": lambda: ([_memory(3, 4)] * 2, None),
    "overlap": lambda: ((x := torch.ones(10)) is not None and [x[:6], x[5:]], None),
    "side by side": lambda: ((x := torch.ones(16)) is not None and [x[8:], x[:8]], None),
    "empty inside another": lambda: ((x := torch.ones(8)) is not None and [x, x[3:3]], None),
    "alike": lambda: ([torch.ones(3, 4), torch.ones(4, 3).t()], [torch.ones(3, 4), torch.zeros(4, 3).t()]),
    "other strides": lambda: ([torch.ones(3, 4)], [torch.ones(4, 3).t()]),
    "other shape": lambda: ([torch.ones(3, 4)], [torch.ones(4, 3)]),
    "other dtype": lambda: ([torch.ones(3, 4)], [torch.ones(3, 4).double()]),
    "same others": lambda: ([torch.ones(3, 4), torch.ones(3, 4)], [torch.zeros(3, 4)] * 2),
    "same tensor, two others": lambda: ([torch.ones(3, 4)] * 2, [torch.zeros(3, 4), torch.zeros(3, 4)]),
    "unaligned others": lambda: ([_memory(4)], [_memory(4, offset=3)]),
}
FALSE_OF = {
    "contiguous": ("transposed", "channels last", "gaps", "every second", "expanded", "alike"),
    "side_by_side": ("gaps", "every second", "expanded"),
    "apart": ("twice", "overlap", "same others"),
    "aligned": ("overlap", "unaligned", "unaligned others"),
    "alike": ("other strides", "other shape", "other dtype"),
}


@WAYS
@pytest.mark.parametrize("name", GROUPS)
def test_what_a_survey_says(survey, name):
    group, others = GROUPS[name]()
    found = survey(group, others)
    assert found.count == len(group) and found.elements == sum(x.numel() for x in group) and found.one_device
    assert list(found.column(0)) == [x.data_ptr() for x in group]
    assert list(found.column(1)) == [x.numel() for x in group]
    kinds = [tensors.KINDS.index(x.dtype) if x.dtype in tensors.KINDS else 4 for x in group]
    assert list(found.column(2)) == kinds and found.kinds == sum(1 << kind for kind in set(kinds))
    assert list(found.column(3)) == [x.data_ptr() for x in others or [torch.ones(0)] * len(group)]
    assert found.floats == (4 not in kinds) and set(found.dtypes) == {x.dtype for x in group} & set(tensors.KINDS)
    for what, names in FALSE_OF.items():
        assert getattr(found, what) == (name not in names and (what != "alike" or others is not None)), what


@pytest.mark.gpu
@WAYS
def test_devices(survey):
    assert not survey([torch.ones(2), torch.ones(2, device="cuda")]).one_device
    assert survey([torch.ones(2, device="cuda")] * 2).one_device


def test_c_is_told_how_large_the_table_is():
    needs.native_kernels()
    table = tensors.array("q", bytes(64))
    address, size = table.buffer_info()[0], 64
    right = [[torch.ones(2)] * 2, None, (torch.Tensor,), (), tensors._EXCHANGE, address, size]
    call = library.extension.survey
    assert call(*right)[1] == 4
    for place, wrong, error in (
        (0, [torch.ones(2)] * 3, ValueError),
        (1, [torch.ones(2)], ValueError),
        (5, 0, ValueError),
        (6, 63, ValueError),
        (6, -1, ValueError),
        (0, (torch.ones(2),), TypeError),
        (1, 3, TypeError),
        (2, torch.Tensor, TypeError),
        (3, None, TypeError),
        (4, object(), ValueError),
        (5, "x", TypeError),
        (6, 2**70, OverflowError),
    ):
        arguments = list(right)
        arguments[place] = wrong
        with pytest.raises(error):
            call(*arguments)
    with pytest.raises(TypeError):
        call(*right[:-1])
    with pytest.raises(ZeroDivisionError):  # a method's own error
        call(*right[:3], (lambda x: 1 / 0,), *right[4:])
    shrinking = [torch.ones(2), torch.ones(2)]
    with pytest.raises(IndexError):  # by a method that is asked
        call(shrinking, None, (torch.Tensor,), (lambda x: bool(shrinking.clear()),), *right[4:])


def test_threads_survey_at_once():
    group = [torch.ones(5) for _ in range(300)]
    expected, found = tensors.survey(group), []
    threads = [threading.Thread(target=lambda: found.append(tensors.survey(group))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8
