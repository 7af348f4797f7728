"""experiments/dpo_losses.py: each loss has its golden values, stays finite far out, and fits into dpo.py."""

import json
import runpy
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_dpo import make_files, run

import dpo
from experiments import dpo_losses
from utils.models import load_tokenizer
from utils.run import model_card

def with_lengths(function):
    """Losses that want the number of tokens too, by the signature of the others."""
    return lambda logprobs, ref_logprobs, beta: function(logprobs, ref_logprobs, beta, LENGTHS[:, : logprobs.shape[1]])


def simpo(logprobs, ref_logprobs, beta):
    return dpo_losses.simpo_losses(logprobs, beta, LENGTHS[:, : logprobs.shape[1]])


PER_TOKEN = {"ipo_per_token": with_lengths(dpo_losses.ipo_per_token_losses),
             "length_normalized": with_lengths(dpo_losses.length_normalized_losses), "simpo": simpo}
FLAGS = {**dpo.LOSSES, **dpo_losses.LOSSES}  # by --loss
ALL = {**FLAGS, **PER_TOKEN}
# log-probabilities of policy and reference, lengths: h = 1.5 and -6; and a third pair without tokens
LOGPROBS = torch.tensor([[-10.0, -50.0], [-12.0, -40.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-11.0, -48.0], [-11.5, -44.0]], dtype=torch.float64)
LENGTHS = torch.tensor([[5, 20, 0], [8, 10, 0]])
GOLDEN = {  # at beta 0.1 (SimPO: 2): of these two pairs, and where policy and reference agree
    "robust": (0.602207, 1.112488, 0.693147), "exo": (2.505517, 3.810296, 2.761230),
    "nca": (1.350825, 1.553716, 1.386294), "apo_zero": (0.962523, 1.148522, 1.0),
    "apo_down": (0.987549, 1.095822, 1.0), "sppo_hard": (36.25, 130.0, 50.0),
    "ipo_per_token": (22.443906, 30.25, 25.0), "length_normalized": (0.680108, 0.718460, 0.693147),
    "simpo": (2.126928, 0.126928, None)}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
    """Both pairs have their values to six decimals, alone and in one batch, and so has the start of a run."""
    function, (*expected, start) = ALL[name], GOLDEN[name]
    beta = 2.0 if name == "simpo" else 0.1
    assert function(LOGPROBS, REFERENCE, beta).tolist() == pytest.approx(expected, abs=1e-6)
    assert function(LOGPROBS[:, :1], REFERENCE[:, :1], beta).tolist() == pytest.approx(expected[:1], abs=1e-6)
    if start:  # SimPO has no reference to agree with
        assert function(LOGPROBS, LOGPROBS, beta).tolist() == pytest.approx([start] * 2, abs=1e-6)


def test_every_loss_of_the_module_has_golden_values():
    """No function of the module stands outside these tests."""
    functions = {name.removesuffix("_losses") for name in vars(dpo_losses) if name.endswith("_losses")}
    assert functions - {"soft_label"} == set(GOLDEN) and set(GOLDEN) == set(ALL) - set(dpo.LOSSES)


def test_golden_values_of_soft_labels_and_without_a_reference():
    """Soft labels by a reward difference of 1.5, and DPO with reference log-probabilities of 0."""
    probabilities = torch.full((2,), 1.5).sigmoid()
    soft = dpo_losses.soft_label_losses(LOGPROBS, REFERENCE, 0.1, probabilities)
    assert soft.tolist() == pytest.approx([0.648321, 0.928033], abs=1e-6)
    free = dpo.sigmoid_losses(LOGPROBS, 0 * REFERENCE, 0.1)
    assert free.tolist() == pytest.approx([0.598139, 1.313262], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_losses_are_finite_far_out(name, dtype, monkeypatch):
    """At beta h = 100, -100 and, without a token, 0: losses and gradients are finite, and a wrong order costs more."""
    monkeypatch.setitem(globals(), "LENGTHS", torch.tensor([[1, 1, 0]] * 2))
    logprobs = torch.tensor([[-500.0, -1500.0, 0.0], [-1500.0, -500.0, 0.0]], dtype=dtype, requires_grad=True)
    reference = torch.tensor([[-1000.0, -1000.0, 0.0]] * 2, dtype=dtype)
    losses = ALL[name](logprobs, reference, 0.1)
    losses.sum().backward()
    assert losses.isfinite().all() and logprobs.grad.isfinite().all()
    assert losses[1] - losses[0] > 0.9 or name == "apo_down"  # which lowers both
    assert logprobs.grad[0, 1] < 0 < logprobs.grad[1, 1] or name not in dpo.LOSSES


@pytest.mark.parametrize("smoothing", [0.05, 0.3])
def test_robust_loss_is_unbiased_under_flipped_labels(smoothing):
    """Its mean over labels of which a share is flipped is the DPO loss of the true labels."""
    function = partial(dpo_losses.robust_losses, beta=0.1, label_smoothing=smoothing)
    true, flipped = function(LOGPROBS, REFERENCE), function(LOGPROBS.flip(0), REFERENCE.flip(0))
    expected = dpo.sigmoid_losses(LOGPROBS, REFERENCE, 0.1)
    assert ((1 - smoothing) * true + smoothing * flipped).tolist() == pytest.approx(expected.tolist(), rel=1e-9)


@pytest.mark.parametrize("name", dpo_losses.LOSSES)
def test_flags_reach_the_loss(name, monkeypatch, capsys):
    """Chosen by --loss, it gets --beta; --label_smoothing where it has one, and is refused elsewhere."""
    monkeypatch.setattr(dpo, "LOSSES", FLAGS)
    monkeypatch.setattr(dpo, "SMOOTHED", dpo.SMOOTHED | dpo_losses.SMOOTHED)
    function, inputs = dpo_losses.LOSSES[name], (LOGPROBS, REFERENCE)
    args = dpo.Args(loss=name, beta=0.3)
    dpo.check_loss(args)
    assert torch.equal(dpo.preference_losses(*inputs, args), function(*inputs, 0.3))
    args = dpo.Args(loss=name, beta=0.1, label_smoothing=0.2)
    if name in ("robust", "exo"):
        dpo.check_loss(args)
        assert torch.equal(dpo.preference_losses(*inputs, args), function(*inputs, 0.1, label_smoothing=0.2))
    else:
        with pytest.raises(SystemExit):
            dpo.check_loss(args)
        assert f"--loss {name} has none" in capsys.readouterr().err


def test_the_module_runs_dpo_with_all_losses(monkeypatch):
    """As a script it hands the command line to dpo.main, where its losses are known besides dpo.py's own."""
    seen = SimpleNamespace()
    monkeypatch.setattr(dpo, "LOSSES", {**dpo.LOSSES})
    monkeypatch.setattr(dpo, "SMOOTHED", {*dpo.SMOOTHED})
    monkeypatch.setattr(dpo, "main", lambda args: vars(seen).update(
        args=args, names={*dpo.LOSSES}, smoothed={*dpo.SMOOTHED}))
    monkeypatch.setattr(sys, "argv", ["dpo_losses", "--loss", "nca"])
    runpy.run_path(str(ROOT / "experiments/dpo_losses.py"), run_name="__main__")
    assert seen.args.loss == "nca" and seen.names == {*FLAGS} and seen.smoothed == {"sigmoid", "robust", "exo"}


def test_the_model_card_names_the_module(tmp_path, monkeypatch):
    """The command in the card of a model that was trained through the module is the one that was given."""
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="experiments.dpo_losses"))
    monkeypatch.setattr(sys, "argv", ["dpo_losses.py", "--loss", "nca"])
    model_card(tmp_path, "dpo.py", "model", "data")
    assert "Command: `python -m experiments.dpo_losses --loss nca`" in (tmp_path / "README.md").read_text()


def test_a_run_with_nca_learns(tmp_path, monkeypatch):
    """dpo.main trains with a loss that LOSSES has been given: 2 ln 2 at the start, less in the end, margin above 0."""
    monkeypatch.setattr(dpo, "LOSSES", FLAGS)
    files = make_files(tmp_path, load_tokenizer(str(ROOT / "assets/base"), "--model"))
    run(files, tmp_path / "run", loss="nca", epochs=2)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if "train/loss" in row]
    assert train[0]["train/loss"] == rows[0]["eval/held_out/loss"] == pytest.approx(1.386294, abs=1e-6)
    assert train[-1]["train/loss"] < 1.38 and train[-1]["rewards/margins"] > 0.1
