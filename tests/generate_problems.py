"""Random decoders and their results by the reference, for the tests of all that decode."""

import struct

import torch
from needs import DEVICE

from charrnn_fast.kernels.triton.generate_grid import generate_grid
from charrnn_fast.kernels.triton.generate_grid_tiles import GenerateGridTile
from charrnn_fast.kernels.triton.generate_types import Decoding
from charrnn_fast.reference.generate import generate
from charrnn_fast.reference.language_model import RNNLM, Cell


class Decoder:
    """Random weights of a stack and a head in fp64, and what they are in the reference."""

    def __init__(self, H, V, L=1, B=1, P=1, *, nonlinearity="tanh", head_bias=True, state=True, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.prompt = torch.randint(0, V, (B, P), generator=generator)
        self.table = random(V, H)
        self.weight_ih = [None, *(random(H, H) / H**0.5 for _ in range(L - 1))]
        self.weight_hh = [random(H, H) / H**0.5 for _ in range(L)]
        self.bias = [None, *(random(H) for _ in range(L - 1))]
        self.head_weight, self.head_bias = random(V, H) / H**0.5 * 3, random(V) if head_bias else None
        self.state = random(L, B, H) if state else None
        self.uniforms = torch.rand(B, 4096, generator=generator, dtype=torch.float64)
        self.nonlinearity = nonlinearity

    def model(self) -> RNNLM:
        """The reference's form of it."""
        (V, H), zeros = self.table.shape, self.table.new_zeros
        inputs = [self.table, *(w.T for w in self.weight_ih[1:])]
        biases = [zeros(H), *self.bias[1:]]
        cells = [
            Cell(*(t.clone() for t in (w, u.T, b))) for w, u, b in zip(inputs, self.weight_hh, biases, strict=True)
        ]
        head_bias = zeros(V) if self.head_bias is None else self.head_bias.clone()
        return RNNLM(cells, self.head_weight.T.clone(), head_bias, nonlinearity=self.nonlinearity)

    def reference(self, num_tokens, sampled, **options):
        """Ids and last state; in fp64."""
        uniforms = self.uniforms[:, :num_tokens] if sampled else None
        return generate(self.model(), self.prompt, num_tokens, uniforms=uniforms, state=self.state, **options)

    def run(self, decode, num_tokens, sampled, dtype=torch.float64, device=DEVICE, **options):
        def cast(tensor):
            return None if tensor is None else tensor.to(device, dtype)

        weights = ([cast(t) for t in tensors] for tensors in (self.weight_ih, self.weight_hh, self.bias))
        uniforms = self.uniforms[:, :num_tokens].to(device) if sampled else None
        ids, state = decode(
            *(self.prompt.to(device), num_tokens, cast(self.table), *weights),
            *(cast(self.head_weight), cast(self.head_bias), cast(self.state)),
            uniforms=uniforms,
            nonlinearity=self.nonlinearity,
            **options,
        )
        return ids.cpu(), state.cpu()

    def rounded_to(self, dtype):
        """This decoder with its weights and state rounded to dtype."""
        for name in ("table", "head_weight", "head_bias", "state"):
            setattr(self, name, getattr(self, name).to(dtype).double())
        self.weight_hh = [w.to(dtype).double() for w in self.weight_hh]
        return self

    @torch.no_grad()
    def behind_greedy(self, ids):
        """How far the logit of each id is behind the largest, after the prompt and the ids before it."""
        logits, _ = self.model()(torch.cat((self.prompt, ids[:, :-1]), 1), self.state)
        logits = logits[:, self.prompt.shape[1] - 1 :]
        return logits.amax(-1) - logits.gather(-1, ids[..., None])[..., 0]


TILE = GenerateGridTile(16, 2, 1.0)  # 16 units a program, two warps


def across(*given, tile=TILE, steps_per_launch=None, uniforms, nonlinearity, top_k=None, alpha=1.0, temperature=1.0):
    """generate's arguments, across the chip."""
    call = Decoding(
        *given,
        uniforms=uniforms,
        sharpness=struct.unpack("q", struct.pack("d", alpha / temperature))[0],
        top_k=top_k if uniforms is not None and top_k is not None and top_k < given[2].shape[0] else None,
        tanh=nonlinearity == "tanh",
    )
    return generate_grid(call, tile, steps_per_launch)
