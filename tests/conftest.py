"""Shared by all tests: the repository on the import path, one thread, and a tiny random model.

Tests import the scripts' own functions, run on the CPU without network, and write to temporary folders only.
"""

import os
import sys
from pathlib import Path

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
