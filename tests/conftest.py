"""Shared by all tests: the repository on the import path, one thread, and a tiny random model.

Tests import the scripts' own functions, run on the CPU without network, and write to temporary folders only.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs on the GPU where there is one (python -m pytest -m gpu tests)")


@pytest.fixture(autouse=True)
def repository_folder(monkeypatch):
    """Default paths of the scripts (assets/...) are relative to the repository."""
    monkeypatch.chdir(ROOT)


def tiny_config(**changes):
    """2 layers, hidden 64, vocabulary 64; EOS 0, PAD 60. Weights large enough that wrong numbers stand out."""
    return GPTNeoXConfig(**{**dict(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=128, rotary_pct=0.25, initializer_range=0.2, eos_token_id=0, pad_token_id=60,
        bos_token_id=0, hidden_dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0), **changes})


@pytest.fixture
def tiny_lm():
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(tiny_config()).eval()


@pytest.fixture
def tiny_classifier():
    torch.manual_seed(1)
    return GPTNeoXForSequenceClassification(tiny_config(num_labels=1)).eval()


class StubTokenizer:
    """What Episodes needs of a tokenizer; the text of a row is what `decode` makes of its ids."""

    chat_template = None

    def __init__(self, eos_token_id, pad_token_id, decode=lambda ids: ""):
        self.eos_token_id, self.pad_token_id, self.decode = eos_token_id, pad_token_id, decode

    def __len__(self):
        return 64

    def get_added_vocab(self):
        return {"EOS": self.eos_token_id, "PAD": self.pad_token_id}

    def batch_decode(self, rows, **_):
        return [self.decode(torch.as_tensor(row).tolist()) for row in rows]


def watch_steps(monkeypatch, script):
    """A list that fills up with what each optimizer step of a script's main saw and did, each a flat vector:
    `before` and `after`, the weights; `gradient`, before clipping; and `lr`.

    A plain loop that takes `before` and `gradient` from here agrees with main to rounding. One that runs beside main
    does not: where a gradient is rounding alone, as of key biases, AdamW divides it by itself and steps at full rate.
    """
    steps, original = [], script.optimizer_step

    def optimizer_step(engine, lr):
        weights = [*engine.module.parameters()]
        steps.append(SimpleNamespace(lr=lr, before=flat(weights), gradient=flat([p.grad for p in weights])))
        norm = original(engine, lr)
        steps[-1].after = flat(weights)
        return norm

    monkeypatch.setattr(script, "optimizer_step", optimizer_step)
    return steps


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def check_step(step, model, optimizer, max_grad_norm=0.0):
    """The gradient that `model` has now is that of main's step, and AdamW, given main's, goes where main went.

    Before, the model has the weights `step.before` (see `set_weights`); returns its gradient's norm.
    """
    weights = [*model.parameters()]
    expected = flat([p.grad for p in weights])
    assert (step.gradient - expected).norm() < 1e-4 * expected.norm()
    split_into([p.grad for p in weights], step.gradient)
    if max_grad_norm:
        torch.nn.utils.clip_grad_norm_(weights, max_grad_norm)
    optimizer.step()
    moved = (step.after - step.before).norm()
    assert (flat(weights) - step.after).norm() <= 1e-4 * moved and (moved > 0) == (step.lr > 0)
    return expected.norm().item()


@torch.no_grad()
def split_into(tensors, vector):
    """Write a flat vector into tensors."""
    for tensor, part in zip(tensors, vector.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(part.view_as(tensor))


def set_weights(model, vector):
    split_into([*model.parameters()], vector)
