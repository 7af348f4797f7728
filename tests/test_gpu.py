"""What must hold on a GPU as well: each test runs on the GPU where there is one, else on the CPU.

python -m pytest -m gpu tests
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import StubTokenizer

import ppo
from utils.data import pad

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EOS, PAD = 0, 60
FORBIDDEN = torch.arange(64, device=DEVICE) == PAD
ARGS = SimpleNamespace(temperature=0.7, response_length=6)


def prompts_and_responses():
    """Query ids of five rows, and responses (5, 6) that end at different places; the last never ends."""
    torch.manual_seed(0)
    queries = [torch.randint(1, PAD, (length,)).tolist() for length in (3, 9, 5, 1, 7)]
    responses = torch.randint(1, PAD, (5, 6))
    for row, end in enumerate((2, 0, 5, 3)):
        responses[row, end] = EOS
    return queries, responses


def episodes_on(device, queries, responses):
    tokenizer = StubTokenizer(EOS, PAD)
    return ppo.Episodes([(ids, "", {}) for ids in queries], responses.to(device), tokenizer, torch.tensor([EOS], device=device))


def slow_logprobs(model, queries, responses, temperature):
    """log p of each response token up to EOS, from one row at a time without padding, on the CPU in fp64: (B, Tr)."""
    model, found = model.cpu().double(), torch.zeros(responses.shape, dtype=torch.float64)
    for i, (query, response) in enumerate(zip(queries, responses.tolist())):
        response = response[: response.index(EOS) + 1] if EOS in response else response
        logits = model(torch.tensor([query + response])).logits[0, len(query) - 1 : -1] / temperature
        logits[:, PAD] = float("-inf")
        found[i, : len(response)] = logits.log_softmax(-1)[range(len(response)), response]
    return found


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_padded_logprobs_equal_those_of_single_rows(tiny_lm, dtype, tolerance):
    queries, responses = prompts_and_responses()
    with torch.no_grad():
        expected = slow_logprobs(tiny_lm.to(dtype), queries, responses, 0.7)
        episodes = episodes_on(DEVICE, queries, responses)
        logprobs = ppo.response_logprobs(tiny_lm.to(DEVICE, dtype), episodes, range(5), ARGS, FORBIDDEN)
    assert (logprobs.cpu() - expected).abs().max() < tolerance
    assert logprobs.dtype == torch.float32


def test_sampling_draws_the_tokens_that_full_forwards_draw(tiny_lm):
    """With a cache and ended rows dropped, each token is the one that a whole forward of its row gives for its noise."""
    model, (queries, _) = tiny_lm.to(DEVICE), prompts_and_responses()
    ids, mask = pad(queries, PAD, "left", DEVICE)
    noise = ppo.sampling_noise(1, 1, range(5), 12).to(DEVICE)
    responses = ppo.generate(model, ids, mask, noise, 1.5, 1.0, 1.0, FORBIDDEN, torch.tensor([EOS], device=DEVICE), PAD)
    assert responses.device.type == DEVICE.type
    for query, response, uniforms in zip(queries, responses.tolist(), noise):
        sequence = list(query)
        for t, token in enumerate(response):
            if EOS in response[:t]:
                assert token == PAD
                continue
            with torch.no_grad():
                logits = model(torch.tensor([sequence], device=DEVICE)).logits[:, -1]
            cdf = ppo.scale_logits(logits, 1.5, FORBIDDEN).double().softmax(-1).cumsum(-1)[0]
            below = cdf[token - 1] if token else 0.0
            assert below - 1e-5 <= uniforms[t] * cdf[-1] <= cdf[token] + 1e-5
            sequence.append(token)


def losses_and_gradient(model, device):
    """The clipped policy loss of made-up advantages, and the gradient of all weights, on this device."""
    queries, responses = prompts_and_responses()
    model = model.to(device)
    model.zero_grad()
    episodes = episodes_on(device, queries, responses)
    logprobs = ppo.response_logprobs(model, episodes, range(5), ARGS, FORBIDDEN.to(device))
    old = logprobs.detach() + torch.linspace(-0.3, 0.3, 6, device=device)
    advantages = ppo.masked_whiten(torch.linspace(-1, 2, 30, device=device).view(5, 6), episodes.mask)
    losses, _ = ppo.policy_losses(logprobs, old, advantages, 0.2)
    loss = (losses * episodes.mask).sum() / episodes.mask.sum()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]).cpu()


def test_policy_gradient_equals_the_cpus(tiny_lm):
    (loss, gradient), (expected_loss, expected) = (losses_and_gradient(tiny_lm, device) for device in (DEVICE, "cpu"))
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_advantages_equal_the_cpus():
    torch.manual_seed(1)
    rewards, values = torch.randn(2, 4, 7)
    for mine, cpu in zip(ppo.gae(rewards.to(DEVICE), values.to(DEVICE), 0.9, 0.95), ppo.gae(rewards, values, 0.9, 0.95)):
        assert torch.allclose(mine.cpu(), cpu, atol=1e-6)


def test_a_run_trains_and_resumes(tmp_path):
    """Three updates at once, and two with a kill after them and the third by --resume: the same figures, up to a GPU's
    rounding; the first log-ratio of each update is checked by the run itself."""
    flags = dict(batch_size=16, micro_batch_size=8, num_eval_prompts=16, eval_every=3, save_every=1, total_episodes=48)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    ppo.main(ppo.Args(output_dir=str(whole), **flags))
    shutil.copytree(whole, resumed)
    for name in ("summary.json", "model.safetensors"):
        (resumed / name).unlink()
    assert (resumed / "checkpoints/step_0000002").exists()
    ppo.main(ppo.Args(output_dir=str(resumed), resume=True, **flags))
    first, second = ([json.loads(line) for line in open(folder / "metrics.jsonl")] for folder in (whole, resumed))
    assert [row["step"] for row in second] == [0, 1, 2, 3, 3]
    for a, b in zip(first, second):
        for name in a.keys() - {name for name in a if name.startswith("time/")}:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-3), name
