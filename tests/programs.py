"""Small programs in the manner of users, none of which knows of this library: each is given the class of its recurrent
layers and what it does to a finished model, and returns the curve of its training as a list of numbers.

tests/clients/test_programs.py runs each three times. Not a test itself.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

Finish = Callable[[nn.Module], nn.Module]


def repackage_hidden(h: Tensor | tuple) -> Tensor | tuple:
    """Wraps hidden states in new tensors, to detach them from their history."""
    return h.detach() if isinstance(h, Tensor) else tuple(repackage_hidden(v) for v in h)


class WordModel(nn.Module):
    """An encoder, a recurrent module by its name, a decoder that may share the encoder's weight."""

    def __init__(self, rnn_type: str, ntoken: int, ninp: int, nhid: int, nlayers: int, tie_weights: bool):
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.encoder = nn.Embedding(ntoken, ninp)
        nonlinearity = {"RNN_TANH": "tanh", "RNN_RELU": "relu"}[rnn_type]
        self.rnn = nn.RNN(ninp, nhid, nlayers, nonlinearity=nonlinearity, dropout=0.2)
        self.decoder = nn.Linear(nhid, ntoken)
        if tie_weights:
            self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        self.nhid, self.nlayers = nhid, nlayers

    def forward(self, input: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        output, hidden = self.rnn(self.drop(self.encoder(input)), hidden)
        decoded = self.decoder(self.drop(output))
        return F.log_softmax(decoded.view(-1, decoded.shape[-1]), dim=1), hidden

    def init_hidden(self, bsz: int) -> Tensor:
        return next(self.parameters()).new_zeros(self.nlayers, bsz, self.nhid)


def word_language_model(finish: Finish, rnn_type: str, tied: bool) -> list[float]:
    """Batches in columns, truncated backpropagation with a carried, repackaged state, clipping, an update by hand."""
    ntoken, bptt, bsz, lr = 30, 12, 5, 2.0
    data = torch.randint(ntoken, (8 * bptt + 1, bsz))
    model, found = finish(WordModel(rnn_type, ntoken, 16, 16, 2, tied)), []
    for _ in range(2):
        model.train()
        hidden = model.init_hidden(bsz)
        for i in range(0, len(data) - 1, bptt):
            input, target = data[i : i + bptt], data[i + 1 : i + 1 + bptt].reshape(-1)
            model.zero_grad()
            hidden = repackage_hidden(hidden)
            output, hidden = model(input, hidden)
            loss = F.nll_loss(output, target)
            loss.backward()
            found.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.25)))
            for p in model.parameters():
                p.data.add_(p.grad, alpha=-lr)
            found.append(loss.item())
        model.eval()
        with torch.no_grad():
            output, _ = model(data[:-1], model.init_hidden(bsz))
            found.append(F.nll_loss(output, data[1:].reshape(-1)).item())
    return found


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12, padding_idx=0)
        self.rnn = nn.RNN(12, 10, num_layers=2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(20, 3)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        _, hidden = self.rnn(packed)
        return self.out(torch.cat([hidden[-2], hidden[-1]], dim=1))


def sequence_classifier(finish: Finish) -> list[float]:
    """Sentences of different lengths in a PackedSequence; the last layer's two final states to classes; Adam."""
    lengths = torch.tensor([9, 4, 12, 7, 1, 5])
    ids = torch.randint(1, 20, (6, 12)) * (torch.arange(12) < lengths[:, None])
    labels = torch.randint(3, (6,))
    model, found = finish(Classifier()), []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids, lengths), labels)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.rnn = nn.RNN(12, 10, bidirectional=True, bias=False)
        self.out = nn.Linear(20, 5)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        output, _ = self.rnn(pack_padded_sequence(self.embed(ids), lengths))
        padded, _ = pad_packed_sequence(output, padding_value=0.0, total_length=len(ids))
        return self.out(padded)


def bidirectional_tagger(finish: Finish) -> list[float]:
    """A tag for each word of sorted sentences, RMSprop under a schedule, an average of the weights (swa_utils)."""
    lengths = torch.tensor([11, 8, 8, 3])
    ids, tags = torch.randint(20, (11, 4)), torch.randint(5, (11, 4))
    tags[torch.arange(11)[:, None] >= lengths] = -100
    model, found = finish(Tagger()), []
    optimizer = torch.optim.RMSprop(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(8):
        loss = F.cross_entropy(model(ids, lengths).flatten(0, 1), tags.flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
        scheduler.step()
        average.update_parameters(model)
        found.append(loss.item())
    with torch.no_grad():
        found += average(ids, lengths).flatten().tolist()
    return found


class Policy(nn.Module):
    """Observations and resets (T, B) to actions and values; a state is zeroed where an episode begins."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(6, 16)
        self.actor, self.critic = nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, observations: Tensor, state: Tensor, begins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs = []
        # Between resets many steps at a time, as recurrent policies do.
        cuts = [0, *(begins[1:].any(1).nonzero().flatten() + 1).tolist(), len(begins)]
        for start, end in itertools.pairwise(cuts):
            state = state * (1.0 - begins[start].float())[None, :, None]
            output, state = self.rnn(observations[start:end], state)
            outputs.append(output)
        features = torch.cat(outputs)
        return self.actor(features), self.critic(features).squeeze(-1), state


def recurrent_policy(finish: Finish) -> list[float]:
    """Advantage actor-critic on rollouts in which episodes end, each begun from zeros; the state is carried."""
    T, B = 24, 4
    model, found = finish(Policy()), []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    state = torch.zeros(1, B, 16)
    for _ in range(6):
        observations, rewards = torch.randn(T, B, 6), torch.randn(T, B)
        begins = torch.rand(T, B) < 0.06
        actions = torch.randint(3, (T, B))
        logits, values, after = model(observations, state, begins)
        returns, running = torch.zeros(T, B), torch.zeros(B)
        for t in reversed(range(T)):
            running = rewards[t] + 0.9 * running * (1.0 - (begins[t + 1].float() if t + 1 < T else 0.0))
            returns[t] = running
        distribution = torch.distributions.Categorical(logits=logits)
        advantage = returns - values.detach()
        loss = -(distribution.log_prob(actions) * advantage).mean() + 0.5 * F.mse_loss(values, returns)
        loss = loss - 0.01 * distribution.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        state = after.detach()
        found.append(loss.item())
    return found


class Regressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(4, 8, batch_first=True)
        self.out = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1]).squeeze(-1)


def per_sample_gradients(finish: Finish) -> list[float]:
    """Private training: each sample's gradient by torch.func, clipped to norm 0.1, their mean the update."""
    from torch.func import functional_call, grad, vmap

    x, y = torch.randn(7, 12, 4), torch.randn(7)
    model, found = finish(Regressor()), []
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss_of(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (functional_call(model, parameters, (x[None],))[0] - y).square()

    for _ in range(4):
        try:
            grads = vmap(grad(loss_of), in_dims=(None, 0, 0))(parameters, x, y)
        except RuntimeError:  # torch.nn.RNN has no rule for vmap: one after the other
            leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
            each = [
                torch.autograd.grad(loss_of(leaves, *sample), list(leaves.values()))
                for sample in zip(x, y, strict=True)
            ]
            grads = {name: torch.stack(of) for name, of in zip(leaves, zip(*each, strict=True), strict=True)}
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        scale = (0.1 / norms).clamp(max=1.0)
        update = {name: torch.einsum("n,n...->...", scale, g) / len(x) for name, g in grads.items()}
        parameters = {name: p - 0.5 * update[name] for name, p in parameters.items()}
        found += norms.tolist()
    return found


def half_precision(finish: Finish) -> list[float]:
    """autocast to bfloat16 and a GradScaler, gradients accumulated over two batches, gradient checkpointing."""
    from torch.utils.checkpoint import checkpoint

    x, y = torch.randn(2, 6, 12, 4), torch.randn(2, 6)
    model, found = finish(Regressor()), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    for _ in range(4):
        for x_i, y_i in zip(x, y, strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                prediction = checkpoint(model, x_i, use_reentrant=False)
            loss = F.mse_loss(prediction.float(), y_i)
            scaler.scale(loss / 2).backward()
            found.append(loss.item())
        scaler.unscale_(optimizer)
        found.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return found


def pruned_and_normalised(finish: Finish) -> list[float]:
    """Half of W_hh pruned away, W_ih under weight normalisation, trained, made permanent, saved and loaded again."""
    import copy
    import io

    from torch.nn.utils import prune
    from torch.nn.utils.parametrizations import weight_norm

    x, y = torch.randn(6, 12, 4), torch.randn(6)
    model, found = finish(Regressor()), []
    prune.l1_unstructured(model.rnn, "weight_hh_l0", amount=0.5)
    weight_norm(model.rnn, "weight_ih_l0")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(6):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    nn.utils.parametrize.remove_parametrizations(model.rnn, "weight_ih_l0")
    prune.remove(model.rnn, "weight_hh_l0")
    found.append(float((model.rnn.weight_hh_l0 == 0).float().mean()))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.rnn.weight_ih_l0)
    other.load_state_dict(torch.load(file, weights_only=True))
    return found + other(x).tolist()


def lightning_module(finish: Finish) -> list[float]:
    """A LightningModule with its Trainer: manual logging, gradient clipping, validation, a scheduler."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = finish(Regressor())
            self.seen: list[float] = []

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            x, y = batch
            loss = F.mse_loss(self.model(x), y)
            self.seen.append(loss.item())
            return loss

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            x, y = batch
            self.seen.append(F.mse_loss(self.model(x), y).item())

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    data = torch.utils.data.TensorDataset(torch.randn(12, 10, 4), torch.randn(12))
    module = Module()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=2, gradient_clip_val=0.5, enable_model_summary=True, devices=1, **options)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    trainer.fit(module, loader, loader)
    return module.seen


def accelerate_loop(finish: Finish) -> list[float]:
    """An Accelerator around model, optimizer, loader and scheduler: accumulation, clipping, a saved state."""
    import tempfile

    from accelerate import Accelerator

    accelerator, found = Accelerator(cpu=True, gradient_accumulation_steps=2), []
    data = torch.utils.data.TensorDataset(torch.randn(12, 10, 4), torch.randn(12))
    model = finish(Regressor())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    loader = torch.utils.data.DataLoader(data, batch_size=3)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for _ in range(2):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.mse_loss(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    found.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            found.append(loss.item())
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        accelerator.load_state(folder)
    found.append(accelerator.unwrap_model(model)(data.tensors[0]).sum().item())
    return found


PROGRAMS: dict[str, Callable[[Finish], list[float]]] = {
    "word model, RNN_TANH, tied": lambda finish: word_language_model(finish, "RNN_TANH", True),
    "word model, RNN_RELU": lambda finish: word_language_model(finish, "RNN_RELU", False),
    "sequence classifier": sequence_classifier,
    "bidirectional tagger": bidirectional_tagger,
    "recurrent policy": recurrent_policy,
    "per-sample gradients": per_sample_gradients,
    "half precision": half_precision,
    "pruned and normalised": pruned_and_normalised,
    "lightning": lightning_module,
    "accelerate": accelerate_loop,
}


def in_another_process(module: nn.Module, x: Tensor, results: Any) -> None:
    """What a spawned process does with a module that it was sent."""
    results.put(module(x)[0].sum().item())
