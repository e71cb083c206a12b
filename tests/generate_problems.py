"""Random decoders and their results written out step by step, for the tests of all that decode."""

import struct

import torch
from needs import DEVICE

from charrnn_fast.kernels.triton.generate_grid import generate_grid
from charrnn_fast.kernels.triton.generate_grid_tiles import GenerateGridTile
from charrnn_fast.reference.generate import next_token


class Decoder:
    """Random weights of a stack and a head in fp64, and the decoder written out step by step."""

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

    def reference(self, num_tokens, sampled, **options):
        """Ids and last state; in fp64."""
        f = torch.tanh if self.nonlinearity == "tanh" else torch.relu
        (B, P), ids = self.prompt.shape, []
        zeros = [self.table.new_zeros(B, self.table.shape[1]) for _ in self.weight_hh]
        state = zeros if self.state is None else list(self.state)
        for step in range(P + num_tokens - 1):
            x = self.table[self.prompt[:, step] if step < P else ids[-1]]
            for layer, weight in enumerate(self.weight_hh):
                if layer:
                    x = x @ self.weight_ih[layer].T + self.bias[layer]
                x = state[layer] = f(x + state[layer] @ weight.T)
            if step >= P - 1:
                logits = torch.nn.functional.linear(x, self.head_weight, self.head_bias)
                uniform = self.uniforms[:, step - P + 1] if sampled else None
                ids.append(next_token(logits, uniform, **options))
        return torch.stack(ids, 1), torch.stack(state)

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

    def behind_greedy(self, ids):
        """How far the logit of each id is behind the largest, after the prompt and the ids before it."""
        text, state = torch.cat((self.prompt, ids[:, :-1]), 1), self.state[0]
        for step, column in enumerate(text.T, 1 - self.prompt.shape[1]):
            state = torch.tanh(self.table[column] + state @ self.weight_hh[0].T)
            if step >= 0:
                logits = state @ self.head_weight.T + self.head_bias
                yield (logits.amax(1) - logits.gather(1, ids[:, step : step + 1])[:, 0]).max()


TILE = GenerateGridTile(16, 2, 1.0)  # 16 units a program, two warps


def across(*given, tile=TILE, steps_per_launch=None, uniforms, nonlinearity, top_k=None, alpha=1.0, temperature=1.0):
    """generate's arguments, across the chip."""
    return generate_grid(
        *given,
        uniforms=uniforms,
        sharpness=struct.unpack("q", struct.pack("d", alpha / temperature))[0],
        top_k=top_k if uniforms is not None and top_k is not None and top_k < given[2].shape[0] else None,
        tanh=nonlinearity == "tanh",
        tile=tile,
        steps_per_launch=steps_per_launch,
    )
