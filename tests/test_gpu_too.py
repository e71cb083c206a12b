"""Which tests a GPU adds to those of `-m gpu`."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu_too import FILES, is_gpu_test

HERE = Path(__file__).parent


@pytest.mark.parametrize("path", FILES)
def test_the_files_are_there_and_choose_a_device(path):
    assert "device" in (HERE / path).read_text().lower()


def test_what_a_cpus_kernels_do_is_not_a_gpus():
    assert is_gpu_test("test_compiled.py", {"backend": "triton"}) and is_gpu_test("test_compiled.py", {})
    assert not is_gpu_test("test_compiled.py", {"backend": "native"})
    assert not is_gpu_test("test_package.py", {})


def test_they_are_marked_where_there_is_one(monkeypatch, request):
    marked = []

    def item(path, **params):
        keywords: dict = {}
        added = SimpleNamespace(path=HERE / path, keywords=keywords, callspec=SimpleNamespace(params=params))
        added.add_marker = lambda mark: marked.append((path, params, mark.name))
        return added

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    modify = request.config.pluginmanager.get_plugin(str(HERE / "conftest.py")).pytest_collection_modifyitems
    options = SimpleNamespace(option=SimpleNamespace(markexpr="slow"))
    modify(options, [item("test_compiled.py", backend="triton"), item("test_package.py"), item(FILES[0])])
    assert marked == [("test_compiled.py", {"backend": "triton"}, "gpu"), (FILES[0], {}, "gpu")]
