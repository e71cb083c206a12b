"""generate, evaluate, plot, export, doctor and configuration files, as a user meets them."""

import json
import sys

import pytest
import torch
from command_line import TEXT

from charrnn_fast.cli import _parser, doctor, progress, selftest
from charrnn_fast.cli.plot import curve_of
from charrnn_fast.cli.settings import Settings, resolve
from charrnn_fast.kernels import native
from charrnn_fast.lm import checkpoint, forms, generation
from charrnn_fast.lm.data import Vocabulary
from charrnn_fast.lm.export import FORMS, Plain, export
from charrnn_fast.lm.plots import AXES, plot_curve, plot_runs
from charrnn_fast.lm.recipes import RECIPES, Prompt
from charrnn_fast.ops.elman import elman

GENERATE = "generate raw --prompt 'it was'"


@pytest.mark.parametrize("sampling", ["", "--temperature 0", "--temperature 0.7 --seed 5 --top-k 4"])
def test_a_stream_is_the_text_character_by_character(says, sampling, monkeypatch):
    whole = says(f"{GENERATE} --num-chars 40 {sampling}").out
    written = []
    monkeypatch.setattr(
        sys.stdout, "write", lambda text, write=sys.stdout.write: (written.append(text), write(text))[1]
    )
    assert says(f"{GENERATE} --num-chars 40 --stream {sampling}").out == whole
    assert written[0] == "it was" and [len(piece) for piece in written if piece][1:41] == [1] * 40


@pytest.mark.parametrize("form", ["fused", "torch", "reference"])
def test_stream_is_generate(form):
    torch.manual_seed(0)
    vocab = Vocabulary(list("abcdef"), letters=False)
    net = forms.make(form, 6, 5, 2)
    for options in ({}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.5, "seed": 4, "top_k": 2, "alpha": 1.5}):
        assert "".join(generation.stream(net, vocab, "abc", 50, **options)) == generation.generate(
            net, vocab, "abc", 50, **options
        )
    with pytest.raises(ValueError, match="the prompt is empty"):
        next(generation.stream(net, vocab, "", 5))


def test_temperature_0_and_the_sharpest_sampling_are_greedy(says):
    greedy = says(GENERATE).out
    assert greedy.startswith("it was") and len(greedy) == 6 + 50 + 1
    for sharp in ("--temperature 0", "--temperature 1e-310", "--temperature 1 --alpha 1e308"):
        for options in ("--seed 3 --top-k 2", f"--seed {2**63 - 1} --top-k {2**31 - 1}"):
            assert says(f"{GENERATE} {sharp} {options}").out == greedy
    assert says(f"{GENERATE} --temperature 1 --seed 3").out != greedy


def test_samples_have_seeds_and_can_be_made_again(says):
    sample = f"{GENERATE} --temperature 0.8 --top-k 5 --alpha 1.5"
    three = says(f"{sample} --seed 7 --num-samples 3").out.splitlines()
    alone = [says(f"{sample} --seed {seed}").out.rstrip("\n") for seed in (7, 8, 9)]
    assert three == alone and len(set(three)) == 3
    result = json.loads(says(f"{sample} --num-samples 2 --json").out)
    assert result["checkpoint"].endswith("best.ckpt") and len(result["samples"]) == 2
    for found in result["samples"]:
        assert found["prompt"] == "it was"
        again = says(f"{sample.replace('raw', 'raw/best.ckpt')} --seed {found['seed']}").out
        assert again == found["text"] + "\n"


def test_prompts_from_a_file(here, says):
    (here / "prompts").write_text("it was\n\nthe age\n")
    first, second = says("generate raw --prompt-file prompts --num-chars 4").out.splitlines()
    assert first.startswith("it was") and second.startswith("the age")
    (here / "whole").write_text("it was the age")
    assert says("generate raw --prompt FILE:whole").out.startswith("it was the age")


def test_characters_outside_the_vocabulary_are_mapped(here, says):
    out, err = says("generate raw --prompt 'thé Age\n' --unknown map --num-chars 0")
    assert out == "the age \n" and "mapped characters outside the vocabulary: '\\n' 'A' 'é'" in err
    (here / "upper.txt").write_text("IT WAS THÉ AGE")
    says("evaluate raw --text upper.txt --unknown map")


def test_evaluate(here, says):
    lines = says("evaluate run --text book.txt --json").out.splitlines()
    result = json.loads(lines[-1])
    assert 1 < result["ppl"] < 30 and f"perplexity {result['ppl']:.3f}" in lines[0]
    assert result["characters"] == len(checkpoint.load(here / "run").vocab.prepare(TEXT))
    assert f"{2 * len(TEXT):,} characters" in says("evaluate raw --text book.txt book.txt").out


def test_mapping_keeps_what_is_known():
    vocab = Vocabulary(sorted("abc D"), letters=False)
    assert vocab.map_unknown("abc D") == ("abc D", [])
    assert vocab.map_unknown("\u00e1Bd\u00c7!\u9053") == ("abDc  ", ["!", "B", "d", "\u00c7", "\u00e1", "\u9053"])
    assert Vocabulary(["a"], letters=False).map_unknown("a!b") == ("a", ["!", "b"])


def test_pictures_say_what_they_show(here, says):
    """What stands in them; that they can be read was looked at."""
    out, _ = says("plot raw embedded")
    assert (here / "runs.png").read_bytes().startswith(b"\x89PNG") and "embedded: iteration 3: training" in out
    curve = curve_of(here / "raw")
    assert curve.text == "on book.txt" and curve.model.startswith("fused, 2 layers of 8 tanh units, ")
    for along in AXES.values():
        x = along(curve.history)
        assert len(x) == len(curve.history) and x == sorted(set(x))
    both = ("raw: fused, 2 layers of 8 tanh units", "on book.txt", "iteration 3: training", "bits per character")
    one = ("raw: fused, 2 layers of 8", "on book.txt", "iteration 2: training", "perplexity (log scale)")
    for parts, draw in (
        (both, lambda path: plot_runs([curve, curve_of(here / "embedded")], path)),
        (one, lambda path: plot_curve(curve, path)),
    ):
        texts = _texts_of(draw, here / "a.png")
        for part in parts:
            assert any(part in text for text in texts), (part, texts)


def _texts_of(draw, path) -> list[str]:
    """All texts of a figure, as it is saved."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    found = []

    def savefig(self, *arguments, original=Figure.savefig, **options):
        original(self, *arguments, **options)
        found.extend(t.get_text() for t in self.findobj(Text))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        draw(path)
    return found


def test_curves_of_an_interrupted_run_continue(here, says):
    says("train --text book.txt --hidden-size 8 -q --out run --epochs 4 --resume")
    assert [r.epoch for r in curve_of(here / "run").history] == [1, 2, 3, 4]


@pytest.mark.parametrize("run", ["raw", "embedded"])
@pytest.mark.parametrize("form", FORMS)
def test_an_exported_model_is_the_model(form, run, here, says):
    path = f"model{FORMS[form]}"
    assert path in says(f"export {run} --to {form}").out
    written = checkpoint.load(here / run)
    L, V = written.config["num_layers"], written.config["vocab_size"]
    tokens = torch.randint(V, (3, 7), generator=torch.Generator().manual_seed(0))
    state = torch.randn(L, 3, 8, generator=torch.Generator().manual_seed(1))
    described = None
    if form == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(path)
        found = session.run(None, {"tokens": tokens.numpy(), "state": state.numpy()})
        found = tuple(torch.from_numpy(x) for x in found)
        described = session.get_modelmeta().custom_metadata_map
    elif form == "torchscript":
        extra = {"meta.json": ""}
        found = torch.jit.load(path, _extra_files=extra)(tokens, state)
        described = json.loads(extra["meta.json"])
    elif form == "safetensors":
        safetensors = pytest.importorskip("safetensors.torch")
        with safetensors.safe_open(path, "pt") as file:
            described = file.metadata()
        found = _by_hand(safetensors.load_file(path), written, tokens, state)
    else:
        found = _by_hand(torch.load(path, weights_only=True), written, tokens, state)
    expected = tuple(y.detach() for y in written.build()(tokens, state))
    torch.testing.assert_close(tuple(found), expected, rtol=1e-4, atol=1e-5)
    if described is not None:
        assert json.loads(described["config"]) == written.config
        assert json.loads(described["vocab"])["symbols"] == written.vocab.symbols


def _by_hand(parameters, written, tokens, state):
    """The parameters in modules of torch: what a user of the file writes."""
    config = written.config
    rows = torch.nn.functional.one_hot(tokens, config["vocab_size"]).float()
    if "embed.weight" in parameters:
        rows = parameters["embed.weight"][tokens]
    rnn = torch.nn.RNN(rows.shape[2], config["hidden_size"], config["num_layers"], batch_first=True)
    rnn.load_state_dict({k.removeprefix("rnn."): v for k, v in parameters.items() if k.startswith("rnn.")})
    head = torch.nn.Linear(config["hidden_size"], config["vocab_size"])
    head.load_state_dict({k.removeprefix("head."): v for k, v in parameters.items() if k.startswith("head.")})
    outputs, state = rnn(rows, state)
    back = written.build()
    back.rnn.load_state_dict(rnn.state_dict())  # and back
    assert all(torch.equal(p, back.state_dict()[name]) for name, p in parameters.items())
    return head(outputs).detach(), state.detach()


def test_exports_that_cannot_be(here):
    with pytest.raises(ValueError, match="the form must be one of"):
        export(checkpoint.load(here / "raw"), "gguf", here / "x")
    assert not Plain(checkpoint.load(here / "raw")).training


def test_doctor_tests_every_operation_and_says_why_others_do_not_run(says):
    out, _ = says("doctor --device cpu --hidden-size 32 48 100000")
    for operation in selftest.OPERATIONS:
        assert f"\n    {operation} " in out
    chosen = "native" if native.available() is None else "torch"
    assert f"torch {torch.__version__}" in out
    assert out.count("  training steps: not captured: a CUDA graph needs a CUDA or ROCm device\n") == 1
    assert f"  hidden size 32, 48: {chosen}" in out and f"  hidden size 100000: {chosen}" in out
    assert out.count("    not triton: ") == 5  # of two kinds of sizes, the decoder's, and two kinds of other operations
    assert f"  generate, hidden size 32, 48, 100000: {chosen}\n" in out
    assert f"  linear_cross_entropy, language_model_loss, clip_grad_norm_: {chosen}\n" in out
    assert "C compiler: " in out and "\nadvice: " in out and "WRONG" not in out and "BROKEN" not in out


def test_doctor_finds_what_is_broken(says, monkeypatch):
    def almost(*arguments, **options):
        out, last = elman(*arguments, **options)
        return out * 1.01, last

    monkeypatch.setattr(selftest, "elman", almost)
    out, _ = says("doctor --device cpu", code=doctor.BROKEN)
    assert "WRONG" in out and "advice: elman of" in out and "CHARRNN_BACKEND=" in out
    monkeypatch.setattr(selftest, "elman", lambda *arguments, **options: 1 / 0)
    out, _ = says("doctor --device cpu", code=1)
    assert "BROKEN" in out and "raised ZeroDivisionError: division by zero" in out


def test_doctor_advises(says, monkeypatch):
    monkeypatch.setenv("CHARRNN_BACKEND", "torch")
    assert "advice: CHARRNN_BACKEND=torch chooses the backend" in says("doctor --device cpu").out
    monkeypatch.delenv("CHARRNN_BACKEND")
    monkeypatch.setattr(native, "available", lambda: "it was not built")
    monkeypatch.setattr(doctor, "_compiler", lambda: None)
    lines = doctor._advice(torch.device("cpu"), torch.float32, ["torch"])
    assert lines[0].startswith("the CPU kernels are not there (it was not built): install gcc or clang")


def test_every_dtype_is_tested(says):
    for dtype in doctor.DTYPES:
        says(f"doctor --device cpu --dtype {dtype} --hidden-size 8")


def _settings(line: str) -> Settings:
    return resolve(_parser().parse_args(line.split()))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_printed_is_the_recipe(name, here, says):
    page = says(f"train --recipe {name} --print-config").out
    (here / "run.toml").write_text(page)
    assert says("train --config run.toml --print-config").out == page and len(page.splitlines()) < 60
    assert _settings("train --config run.toml").recipe == RECIPES[name]


def test_the_command_line_goes_over_the_file_and_the_file_over_the_recipe(here, says):
    (here / "run.toml").write_text(
        'recipe = "santa"\nhidden_size = 9\nlr = 0.5\nclip = "none"\nsplit = [0.8, 0.2]\nsecond_bias = false\n'
        'text = ["book.txt"]\n[[prompts]]\ntext = "it \\" was"\nnum_chars = 3\n'
    )
    settings = _settings("train --config run.toml --lr 0.25 --clip 2")
    recipe = settings.recipe
    assert (recipe.name, recipe.hidden_size, recipe.lr, recipe.clip) == ("santa", 9, 0.25, 2.0)
    assert recipe.split == (0.8, 0.2) and recipe.second_bias is False and recipe.optimizer == "adam"
    assert recipe.prompts == (Prompt('it " was', 3),) and settings.text == ["book.txt"]
    says("train --config run.toml --lr 0.01 --epochs 2 --out out -q")
    saved = (here / "out" / "config.toml").read_text()
    assert "lr = 0.01" in saved and "hidden_size = 9" in saved
    assert says("train --config out/config.toml --print-config").out == saved
    says("train --config out/config.toml --out again -q")
    one, other = (checkpoint.load(here / run / "last.ckpt").parameters for run in ("out", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_resuming_where_toml_cannot_be_read(here, says, monkeypatch):
    """Python 3.10 without tomli: the settings are passed again."""
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    _, err = says("train --text book.txt --hidden-size 8 --out run -q --epochs 3 --resume")
    assert "config.toml is not read without Python 3.11" in err
    assert checkpoint.load(here / "run" / "last.ckpt").epoch == 3


@pytest.mark.parametrize("sampler", ["windows", "sequential", "random", "pieces"])
def test_every_option_of_training_together(sampler, here, says):
    """One run of each sampler with the rest of the options, whose meaning tests/lm looks at."""
    (here / "short.txt").write_text(TEXT[:1200])
    line = f"train --recipe ch8 --sampler {sampler} --text short.txt --hidden-size 8 --out out --sample-every 2 --json"
    line += " --batch-size 8 --num-steps 10 --epochs 3 --layers 2 --dropout 0.1"
    line += " --optimizer rmsprop --momentum 0.5 --weight-decay 0.01 --lr 0.001 --warmup 3"
    line += " --schedule step --lr-every 1 --lr-gamma 0.5 --accumulate 2 --split 0.7,0.2,0.1"
    line += " --patience 9 --init orthogonal --precision bf16 --max-chars none --no-second-bias"
    out, _ = says(line)
    result = json.loads(out.splitlines()[-1])
    assert 1 < result["test_ppl"] < 40 and 1 < result["val_ppl"] < 40 and ", test " in out and "(best.ckpt, " in out
    assert out.count("\nsample '") == 1, "of epoch 2"
    assert "bits/char" in out and "norm" in out and "clipped" in out


def test_quiet_prints_nothing(says):
    out, err = says("train --text book.txt --hidden-size 8 --epochs 2 -q")
    assert out == "" and "error" not in err and "%" not in err


def test_one_line_an_epoch_in_a_pipe_and_a_bar_on_a_terminal(says, monkeypatch):
    line = "train --text book.txt --hidden-size 8 --epochs 3"
    out, err = says(line)
    assert sum(line.startswith("epoch") for line in out.splitlines()) == 3 and "|" not in err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.0)
    out, err = says(line)
    assert sum(line.startswith("epoch") for line in out.splitlines()) == 3
    for part in ("epoch 2/3", "loss ", "perplexity ", "bits/char", "tokens/s", "norm ", " left"):
        assert part in err
