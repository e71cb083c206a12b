"""generate, evaluate, plot, export, doctor and configuration files, as a user meets them."""

import json
import sys

import pytest
import torch

from charrnn_fast.cli import doctor, main, selftest
from charrnn_fast.cli.plot import curve_of
from charrnn_fast.kernels import native
from charrnn_fast.lm import checkpoint, forms, generation
from charrnn_fast.lm.data import Vocabulary
from charrnn_fast.lm.export import FORMS, Plain, export
from charrnn_fast.lm.plots import AXES, plot_curve, plot_runs
from charrnn_fast.lm.recipes import RECIPES, Prompt
from charrnn_fast.ops.elman import elman

TEXT = "It was the best of times, it was the worst of times; it was the age of wisdom, it was the age of folly. " * 30


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    (folder / "book.txt").write_text(TEXT)
    train = ["train", "--recipe", "santa", "--text", str(folder / "book.txt"), "--hidden-size", "8", "-q"]
    assert main([*train, "--epochs", "2", "--out", str(folder / "raw"), "--layers", "2"]) == 0
    assert main([*train, "--epochs", "3", "--out", str(folder / "embedded"), "--embedding", "5"]) == 0
    return folder


def _fails(capsys, arguments, *parts):
    assert main([str(a) for a in arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    for part in parts:
        assert part in line


def _generate(capsys, place, *arguments) -> str:
    capsys.readouterr()
    assert main(["generate", str(place / "raw"), *map(str, arguments)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "sampling", [[], ["--temperature", "0"], ["--temperature", "0.7", "--seed", "5", "--top-k", 4]]
)
def test_a_stream_is_the_text_character_by_character(place, capsys, sampling, monkeypatch):
    whole = _generate(capsys, place, "--prompt", "it was", "--num-chars", 40, *sampling)
    written = []
    monkeypatch.setattr(
        sys.stdout, "write", lambda text, write=sys.stdout.write: (written.append(text), write(text))[1]
    )
    assert _generate(capsys, place, "--prompt", "it was", "--num-chars", 40, "--stream", *sampling) == whole
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


def test_temperature_0_is_greedy_whatever_else_is_said(place, capsys):
    greedy = _generate(capsys, place, "--prompt", "it was")
    assert _generate(capsys, place, "--prompt", "it was", "--temperature", 0, "--seed", 3, "--top-k", 2) == greedy
    assert _generate(capsys, place, "--prompt", "it was", "--temperature", 1, "--seed", 3) != greedy


def test_samples_have_seeds_and_can_be_made_again(place, capsys):
    sampling = ["--prompt", "it was", "--temperature", "1.0"]
    three = _generate(capsys, place, *sampling, "--seed", 7, "--num-samples", 3).splitlines()
    alone = [_generate(capsys, place, *sampling, "--seed", seed).rstrip("\n") for seed in (7, 8, 9)]
    assert three == alone and len(set(three)) == 3
    result = json.loads(_generate(capsys, place, *sampling, "--num-samples", 2, "--json"))
    assert result["checkpoint"].endswith("best.ckpt") and len(result["samples"]) == 2
    for sample in result["samples"]:
        assert sample["prompt"] == "it was"
        assert _generate(capsys, place, *sampling, "--seed", sample["seed"]) == sample["text"] + "\n"
    _fails(capsys, ["generate", place / "raw", "--prompt", "it", "--num-samples", 2], "pass --temperature")
    _fails(capsys, ["generate", place / "raw", "--prompt", "it", "--stream", "--json"], "pass one of them")


def test_prompts_from_a_file(place, capsys):
    (place / "prompts").write_text("it was\n\nthe age\n")
    lines = _generate(capsys, place, "--prompt-file", place / "prompts", "--num-chars", 4).splitlines()
    assert (
        [line[:7] for line in lines] == [lines[0][:7], "the age"] and lines[0].startswith("it was") and len(lines) == 2
    )
    (place / "whole").write_text("it was the age")
    assert _generate(capsys, place, "--prompt", f"FILE:{place / 'whole'}").startswith("it was the age")
    (place / "none").write_text("\n\n")
    _fails(capsys, ["generate", place / "raw", "--prompt-file", place / "none"], "holds no prompts")
    _fails(capsys, ["generate", place / "raw", "--prompt", f"FILE:{place}"], "cannot read the text")
    with pytest.raises(SystemExit):
        main(["generate", str(place / "raw"), "--prompt", "a", "--prompt-file", "b"])


def test_characters_outside_the_vocabulary_are_named_or_mapped(place, capsys):
    _fails(capsys, ["generate", place / "raw", "--prompt", "thé Zoo"], "'Z'", "'é'", "--unknown map")
    assert main(["generate", str(place / "raw"), "--prompt", "thé Age\n", "--unknown", "map", "--num-chars", "0"]) == 0
    out, err = capsys.readouterr()
    assert out == "the age \n" and "mapped characters outside the vocabulary: '\\n' 'A' 'é'" in err
    (place / "other.txt").write_text("IT WAS THÉ AGE")
    _fails(capsys, ["evaluate", place / "raw", "--text", place / "other.txt"], "'E'", "--unknown map")
    assert main(["evaluate", str(place / "raw"), "--text", str(place / "other.txt"), "--unknown", "map"]) == 0
    (place / "book2.txt").write_text(TEXT)
    assert main(["evaluate", str(place / "raw"), "--text", str(place / "book2.txt"), str(place / "book2.txt")]) == 0
    assert f"{2 * len(TEXT):,} characters" in capsys.readouterr().out


def test_mapping_keeps_what_is_known():
    vocab = Vocabulary(sorted("abc D"), letters=False)
    assert vocab.map_unknown("abc D") == ("abc D", [])
    assert vocab.map_unknown("\u00e1Bd\u00c7!\u9053") == ("abDc  ", ["!", "B", "d", "\u00c7", "\u00e1", "\u9053"])
    assert Vocabulary(["a"], letters=False).map_unknown("a!b") == ("a", ["!", "b"])


def test_pictures_say_what_they_show(place, capsys):
    """What stands in them; that they can be read was looked at."""
    out = place / "runs.png"
    assert main(["plot", str(place / "raw"), str(place / "embedded"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG") and "embedded: iteration 3: training" in printed
    curve = curve_of(place / "raw")
    assert curve.text == "on book.txt" and curve.model.startswith("fused, 2 layers of 8 tanh units, ")
    for along in AXES.values():
        x = along(curve.history)
        assert len(x) == len(curve.history) and x == sorted(set(x))
    texts = _texts_of(lambda path: plot_runs([curve, curve_of(place / "embedded")], path), place / "a.png")
    for part in ("raw: fused, 2 layers of 8 tanh units", "on book.txt", "iteration 3: training", "bits per character"):
        assert any(part in text for text in texts), (part, texts)
    texts = _texts_of(lambda path: plot_curve(curve, path), place / "b.png")
    for part in ("raw: fused, 2 layers of 8", "on book.txt", "iteration 2: training", "perplexity (log scale)"):
        assert any(part in text for text in texts), (part, texts)
    _fails(capsys, ["plot", place / "nowhere"], "there is no checkpoint")
    _fails(capsys, ["plot", place / "raw", "--out", place / "no" / "x.png"], "cannot write the picture")
    _fails(capsys, ["plot", place / "raw", "--out", place / "x.magic"], "cannot write the picture")


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


def test_curves_of_an_interrupted_run_continue(place, tmp_path):
    run = ["train", "--text", str(place / "book.txt"), "--hidden-size", "8", "-q", "--out", str(tmp_path / "run")]
    assert main([*run, "--epochs", "2"]) == 0
    assert main([*run, "--epochs", "4", "--resume"]) == 0
    assert [r.epoch for r in curve_of(tmp_path / "run").history] == [1, 2, 3, 4]


def _expected(written, tokens, state):
    logits, state = written.build()(tokens, state)
    return logits.detach(), state.detach()


@pytest.mark.parametrize("run", ["raw", "embedded"])
@pytest.mark.parametrize("form", FORMS)
def test_an_exported_model_is_the_model(form, run, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert main(["export", str(place / run), "--to", form]) == 0
    path = place / f"model{FORMS[form]}"
    assert path.name in capsys.readouterr().out
    written = checkpoint.load(place / run)
    L, V = written.config["num_layers"], written.config["vocab_size"]
    tokens = torch.randint(V, (3, 7), generator=torch.Generator().manual_seed(0))
    state = torch.randn(L, 3, 8, generator=torch.Generator().manual_seed(1))
    expected = _expected(written, tokens, state)
    described = None
    if form == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(path))
        found = session.run(None, {"tokens": tokens.numpy(), "state": state.numpy()})
        found = tuple(torch.from_numpy(x) for x in found)
        described = session.get_modelmeta().custom_metadata_map
    elif form == "torchscript":
        extra = {"meta.json": ""}
        found = torch.jit.load(str(path), _extra_files=extra)(tokens, state)
        described = json.loads(extra["meta.json"])
    else:
        if form == "safetensors":
            safetensors = pytest.importorskip("safetensors.torch")
            parameters = safetensors.load_file(path)
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                described = file.metadata()
        else:
            parameters = torch.load(path, weights_only=True)
        found = _by_hand(parameters, written, tokens, state)
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


def test_exports_that_cannot_be(place, capsys, monkeypatch):
    _fails(
        capsys, ["export", place / "raw", "--to", "state-dict", "--out", place / "no" / "x"], "cannot write the export"
    )
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    _fails(capsys, ["export", place / "raw", "--to", "safetensors", "--out", place / "x"], "pip install")
    monkeypatch.setitem(sys.modules, "onnx", None)
    _fails(capsys, ["export", place / "raw", "--to", "onnx", "--out", place / "x"], "pip install")
    with pytest.raises(ValueError, match="the form must be one of"):
        export(checkpoint.load(place / "raw"), "gguf", place / "x")
    assert not Plain(checkpoint.load(place / "raw")).training


def test_doctor_tests_every_operation(capsys, monkeypatch):
    assert main(["doctor", "--device", "cpu", "--hidden-size", "32", "48"]) == 0
    out = capsys.readouterr().out
    for operation in selftest.OPERATIONS:
        assert f"\n    {operation} " in out
    assert out.count("    not triton: ") == 4  # of the recurrence, the decoder, both for both sizes, and two kinds more
    assert "C compiler: " in out and "\nadvice: " in out and "WRONG" not in out and "BROKEN" not in out


def test_doctor_finds_what_is_broken(capsys, monkeypatch):
    def almost(*arguments, **options):
        out, last = elman(*arguments, **options)
        return out * 1.01, last

    monkeypatch.setattr(selftest, "elman", almost)
    assert main(["doctor", "--device", "cpu"]) == doctor.BROKEN == 1
    out = capsys.readouterr().out
    assert "WRONG" in out and "advice: elman of" in out and "CHARRNN_BACKEND=" in out
    monkeypatch.setattr(selftest, "elman", lambda *arguments, **options: 1 / 0)
    assert main(["doctor", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "BROKEN" in out and "raised ZeroDivisionError: division by zero" in out


def test_doctor_advises(capsys, monkeypatch):
    monkeypatch.setenv("CHARRNN_BACKEND", "torch")
    assert main(["doctor", "--device", "cpu"]) == 0
    assert "advice: CHARRNN_BACKEND=torch chooses the backend" in capsys.readouterr().out
    monkeypatch.delenv("CHARRNN_BACKEND")
    monkeypatch.setattr(native, "available", lambda: "it was not built")
    monkeypatch.setattr(doctor, "_compiler", lambda: None)
    lines = doctor._advice(torch.device("cpu"), torch.float32, ["torch"])
    assert lines[0].startswith("the CPU kernels are not there (it was not built): install gcc or clang")


def test_every_dtype_is_tested(capsys):
    for dtype in doctor.DTYPES:
        assert main(["doctor", "--device", "cpu", "--dtype", dtype, "--hidden-size", "8"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_printed_is_the_recipe(name, tmp_path, capsys):
    assert main(["train", "--recipe", name, "--print-config"]) == 0
    page = capsys.readouterr().out
    (tmp_path / "run.toml").write_text(page)
    assert main(["train", "--config", str(tmp_path / "run.toml"), "--print-config"]) == 0
    assert capsys.readouterr().out == page and len(page.splitlines()) < 60
    from charrnn_fast.cli.settings import resolve

    settings = resolve(_options(["train", "--config", str(tmp_path / "run.toml")]))
    assert settings.recipe == RECIPES[name]


def _options(arguments):
    from charrnn_fast.cli import _parser

    return _parser().parse_args(arguments)


def test_the_command_line_goes_over_the_file_and_the_file_over_the_recipe(place, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(
        'recipe = "santa"\nhidden_size = 9\nlr = 0.5\nclip = "none"\nsplit = [0.8, 0.2]\nsecond_bias = false\n'
        f'text = ["{place / "book.txt"}"]\n[[prompts]]\ntext = "it \\" was"\nnum_chars = 3\n'
    )
    from charrnn_fast.cli.settings import resolve

    settings = resolve(_options(["train", "--config", str(tmp_path / "run.toml"), "--lr", "0.25", "--clip", "2"]))
    recipe = settings.recipe
    assert (recipe.name, recipe.hidden_size, recipe.lr, recipe.clip) == ("santa", 9, 0.25, 2.0)
    assert recipe.split == (0.8, 0.2) and recipe.second_bias is False and recipe.optimizer == "adam"
    assert recipe.prompts == (Prompt('it " was', 3),) and settings.text == [str(place / "book.txt")]
    out = tmp_path / "out"
    run = ["train", "--config", str(tmp_path / "run.toml"), "--lr", "0.01", "--epochs", "2", "--out", str(out), "-q"]
    assert main(run) == 0
    saved = (out / "config.toml").read_text()
    assert "lr = 0.01" in saved and "hidden_size = 9" in saved
    assert main(["train", "--config", str(out / "config.toml"), "--print-config"]) == 0
    assert capsys.readouterr().out == saved
    assert main(["train", "--config", str(out / "config.toml"), "--out", str(tmp_path / "again"), "-q"]) == 0
    one, other = (checkpoint.load(folder / "last.ckpt").parameters for folder in (out, tmp_path / "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr = ", "is not TOML"),
        ("learning_rate = 1", "learning_rate is no setting of a run"),
        ("lr = -1", "must be a number above 0"),
        ("letters = 1", "letters must be true or false"),
        ("lr = true", "lr cannot be True"),
        ("hidden_size = 1.5", "invalid whole number value"),
        ("[lr]\nx = 1", "lr cannot be"),
        ('recipe = "lstm"', "invalid choice"),
        ("[[prompts]]\nwords = 1", "each of [[prompts]] has"),
        ('[[prompts]]\ntext = "a"\nnum_chars = "b"', "each of [[prompts]] has"),
        ("split = [0.9]", "two or three shares"),
        ("split = [0.9, 0.2]", "together at most 1"),
        ("split = [0.9, -0.1]", "two or three shares"),
    ],
)
def test_files_that_are_no_configuration(content, message, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(content)
    _fails(capsys, ["train", "--config", tmp_path / "run.toml", "--print-config"], "run.toml", message)


def test_a_configuration_that_is_not_there(tmp_path, capsys, monkeypatch):
    _fails(capsys, ["train", "--config", tmp_path / "no.toml"], "cannot read the configuration", "No such file")
    (tmp_path / "x.toml").write_bytes(b"\xff")
    _fails(capsys, ["train", "--config", tmp_path / "x.toml"], "cannot read the configuration")
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    _fails(capsys, ["train", "--config", tmp_path / "x.toml"], "needs Python 3.11 or the package tomli")


def test_resuming_where_toml_cannot_be_read(place, tmp_path, capsys, monkeypatch):
    """Python 3.10 without tomli: the settings are passed again."""
    run = ["train", "--text", str(place / "book.txt"), "--hidden-size", "8", "--out", str(tmp_path / "run"), "-q"]
    assert main([*run, "--epochs", "1"]) == 0
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    assert main([*run, "--epochs", "2", "--resume"]) == 0
    assert "config.toml is not read without Python 3.11" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "run" / "last.ckpt").epoch == 2


@pytest.mark.parametrize("sampler", ["windows", "sequential", "random", "pieces"])
def test_every_option_of_training_together(sampler, place, tmp_path, capsys):
    """One run of each sampler with the rest of the options, whose meaning tests/lm looks at."""
    run = ["train", "--recipe", "ch8", "--sampler", sampler, "--text", str(place / "book.txt"), "--hidden-size", "8"]
    run += ["--batch-size", "8", "--num-steps", "10", "--epochs", "3", "--layers", "2", "--dropout", "0.1"]
    run += ["--optimizer", "rmsprop", "--momentum", "0.5", "--weight-decay", "0.01", "--lr", "0.001", "--warmup", "3"]
    run += ["--schedule", "step", "--lr-every", "1", "--lr-gamma", "0.5", "--accumulate", "2", "--split", "0.7,0.2,0.1"]
    run += ["--patience", "9", "--init", "orthogonal", "--precision", "bf16", "--max-chars", "none", "--no-second-bias"]
    assert main([*run, "--out", str(tmp_path / "run"), "--sample-every", "2", "--json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert 1 < result["test_ppl"] < 40 and 1 < result["val_ppl"] < 40 and ", test " in out and "(best.ckpt, " in out
    assert out.count("\nsample '") == 1, "of epoch 2"
    assert "bits/char" in out and "norm" in out and "clipped" in out


def test_quiet_prints_nothing(place, capsys):
    assert main(["train", "--text", str(place / "book.txt"), "--hidden-size", "8", "--epochs", "2", "-q"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "error" not in err and "%" not in err


def test_one_line_an_epoch_in_a_pipe_and_a_bar_on_a_terminal(place, capsys, monkeypatch):
    run = ["train", "--text", str(place / "book.txt"), "--hidden-size", "8", "--epochs", "3"]
    assert main(run) == 0
    out, err = capsys.readouterr()
    assert sum(line.startswith("epoch") for line in out.splitlines()) == 3 and "|" not in err
    from charrnn_fast.cli import progress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.0)
    assert main(run) == 0
    out, err = capsys.readouterr()
    assert sum(line.startswith("epoch") for line in out.splitlines()) == 3
    for part in ("epoch 2/3", "loss ", "perplexity ", "bits/char", "tokens/s", "norm ", " left"):
        assert part in err
