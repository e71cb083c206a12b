"""Random decoders and their results written out step by step, for the tests of all that decode."""

import torch

from charrnn_fast.reference.generate import next_token

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
