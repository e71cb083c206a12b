"""The forms of the language model by name, and one of a form made."""

from typing import Any

from charrnn_fast.lm.language_model import LanguageModel
from charrnn_fast.lm.model import CharRNN
from charrnn_fast.lm.recurrent import RecurrentLM
from charrnn_fast.lm.reference_model import ReferenceCharRNN
from charrnn_fast.lm.torch_model import TorchCharRNN
from charrnn_fast.reference.language_model import RNNLM

FORMS = ("fused", "reference", "torch")


def make_modules(form: str, *sizes: int, backend: str = "auto", **options: Any) -> RecurrentLM:
    """A model of torch modules, from which `as_form` makes the form; CharRNN's arguments. backend: of "fused" alone.

    The random numbers that torch's generator draws for its parameters are the same for every form.
    """
    if form not in FORMS:
        raise ValueError(f"the form must be one of {', '.join(FORMS)}, got {form!r}")
    if form == "torch":
        return TorchCharRNN(*sizes, **options)
    return CharRNN(*sizes, backend=backend if form == "fused" else "auto", **options)


def as_form(form: str, model: RecurrentLM) -> LanguageModel:
    """What `make_modules` made for a form, as that form."""
    return model.to_reference() if form == "reference" else model


def make(form: str, *sizes: int, **options: Any) -> LanguageModel:
    """A model in one of its FORMS. Raises ValueError for another, and what CharRNN raises."""
    return as_form(form, make_modules(form, *sizes, **options))


def of(model: Any) -> LanguageModel:
    """A model as the language model that it is; charrnn_fast.reference's own as one that shares its parameters. Raises
    TypeError for what is none.
    """
    if hasattr(model, "form"):
        return model
    if isinstance(model, RNNLM):
        return ReferenceCharRNN(model.cells, model.W_hq, model.b_q, model.W_embed, model.nonlinearity)
    names = "CharRNN, TorchCharRNN or charrnn_fast.reference.language_model.RNNLM"
    raise TypeError(f"a language model was expected ({names}), got {type(model).__name__}")
