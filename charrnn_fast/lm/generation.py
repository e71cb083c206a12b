"""Text from a language model: a prompt continued, at once or character by character."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from charrnn_fast.errors import InputError
from charrnn_fast.lm.data import Vocabulary
from charrnn_fast.lm.forms import of
from charrnn_fast.lm.language_model import LanguageModel


def generate(
    model: LanguageModel,
    vocab: Vocabulary,
    prompt: str,
    num_chars: int,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    alpha: float = 1.0,
    seed: int | None = None,
) -> str:
    """Continue a prompt by num_chars characters; returns the prompt and its continuation.

    temperature=None decodes greedily. Otherwise characters are drawn from q ~ p^alpha with p = softmax(o /
    temperature), among the top_k most probable if given; lower temperatures and larger alphas are more deterministic.
    The uniform numbers come from a torch.Generator with `seed` (fresh entropy if None), so a seed gives one text on
    every backend.

    Raises InputError for an empty prompt, characters outside the vocabulary, and options out of range.
    """
    model = of(model)
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "alpha": alpha, "seed": seed}
    ids, sampling = _sampling(model, vocab, prompt, num_chars, **options)
    new, _ = model.generate_ids(ids, num_chars, **sampling)
    return vocab.prepare(prompt) + vocab.decode(new[0])


def stream(model: LanguageModel, vocab: Vocabulary, prompt: str, num_chars: int, **options: Any) -> Iterator[str]:
    """`generate`, character by character as they come: first the prompt, then num_chars characters. Together they are
    what `generate` returns. Arguments and errors as there.
    """
    model = of(model)
    ids, sampling = _sampling(model, vocab, prompt, num_chars, **options)
    uniforms, state = sampling.pop("uniforms"), None
    yield vocab.prepare(prompt)
    for i in range(num_chars):
        drawn = None if uniforms is None else uniforms[:, i : i + 1]
        ids, state = model.generate_ids(ids, 1, uniforms=drawn, state=state, **sampling)
        yield vocab.decode(ids[0])


def _sampling(
    model: LanguageModel,
    vocab: Vocabulary,
    prompt: str,
    num_chars: int,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    alpha: float = 1.0,
    seed: int | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The prompt's ids (1, P) on the model's device, and generate_ids' options. Raises InputError as `generate`."""
    if not vocab.prepare(prompt):
        raise InputError("the prompt is empty: expected at least one character")
    if num_chars < 0:
        raise InputError(f"the number of characters must be at least 0, got {num_chars}")
    if temperature is not None and not temperature > 0:
        raise InputError(f"the temperature must be above 0, got {temperature}; leave it out to decode greedily")
    if not alpha > 0:
        raise InputError(f"alpha must be above 0, got {alpha}")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1, got {top_k}")
    if temperature is None and (top_k is not None or alpha != 1.0 or seed is not None):
        raise InputError("top_k, alpha and seed apply to sampling: pass a temperature with them")
    device = model.device
    ids = vocab.encode(prompt).to(device).unsqueeze(0)  # (1, P)
    uniforms = None
    if temperature is not None:
        generator = torch.Generator(device="cpu")
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        uniforms = torch.rand(1, num_chars, generator=generator, dtype=torch.float64, device="cpu").to(device)
    sampling: dict[str, Any] = {"uniforms": uniforms, "temperature": temperature or 1.0, "alpha": alpha}
    sampling["top_k"] = None if top_k is None else min(top_k, len(vocab))
    return ids, sampling
