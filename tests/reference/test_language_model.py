"""The reference language model: sizes, encodings, the loss."""

import torch
from torch.nn import functional as F

from charrnn_fast.reference.language_model import RNNLM


def test_time_machine_model_has_2876_parameters():
    assert sum(p.numel() for p in RNNLM.from_scratch(28, 32).parameters()) == 2876


def test_loss_is_torchs_cross_entropy_of_its_logits():
    net = RNNLM.from_scratch(6, 4, sigma=1.0, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.randint(6, (3, 8), generator=torch.Generator().manual_seed(1))
    logits, state = net(tokens[:, :-1])
    assert logits.shape == (3, 7, 6) and state.shape == (1, 3, 4)
    loss, _ = net.loss(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def test_an_embedding_of_the_identity_is_one_hot():
    generator = torch.Generator().manual_seed(0)
    onehot = RNNLM.from_scratch(6, 4, sigma=1.0, generator=generator)
    embedded = RNNLM(onehot.cells, onehot.W_hq, onehot.b_q, torch.eye(6))
    tokens = torch.randint(6, (2, 5))
    torch.testing.assert_close(onehot(tokens)[0], embedded(tokens)[0])
    assert any(p is embedded.W_embed for p in embedded.parameters())
