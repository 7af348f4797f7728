"""experiments/group_invariance.py: what its rewards are, what its controls change, how it compares at equal KL."""

import itertools
import json
import math
import shutil

import pytest
import torch
from conftest import ROOT, StubTokenizer

import group_invariant_ppo as gi
from experiments import group_invariance as bed


@pytest.fixture
def task(monkeypatch):
    monkeypatch.setattr(bed, "TASK", {"E": [0] * 8, "H": [3, 1, 7, 2, 2, 5, 6, 4]})


@pytest.mark.parametrize("query, response, score, gold", [
    ("E 5", " 0 0 0 0 0 0", 2, 0), ("E 5", " 0 0 0 1 1 1", 1, 1), ("E 5", " 0 0 0 0 1 1", 4 / 3, 2 / 3),
    ("E 5", " 0 1", 1 / 3, 1 / 3), ("H 2", " 7 7 7 7 7 7", 2, 2), ("H 2", " 0 0 0 0 0 7", 1 / 3, 1 / 3),
    ("H 0", " 1 1 1 1 1 1 3", 0, 0), ("H 0", "", 0, 0)])
def test_rewards_of_the_token_bed(task, query, response, score, gold):
    """2 x the share of wanted symbols in the first six places; gold falls beyond one half on easy prompts alone."""
    assert bed.proxy([query], [response]) == pytest.approx([score])
    assert bed.gold([query], [response]) == pytest.approx([gold])


def test_hard_prompts_want_one_symbol_for_each_content_and_easy_ones_0():
    drawn = [bed.wanted_symbols(seed) for seed in bed.SEEDS]
    assert all(wanted["E"] == [0] * 8 and len(wanted["H"]) == 8 and set(wanted["H"]) <= set(range(1, 8))
               and len(set(wanted["H"])) > 2 for wanted in drawn)
    assert len({tuple(wanted["H"]) for wanted in drawn}) == len(drawn)


LABELS = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]])
QUERIES, GROUPS = [[8, 0], [9, 1], [9, 2], [8, 3]], {(8, 0): 1, (9, 1): 0, (9, 2): 0, (8, 3): 1}
EASY = torch.tensor([1.0, 0.0, 0.0, 1.0])
SCORES = torch.tensor([1.0, 3.0, 3.0, -2.0])


def within(name, exact=False):
    """Multipliers and KL coefficients of an update of four episodes under this control, or costs of the exact one."""
    with bed.control(name, GROUPS, seed=1):
        tokenizer = StubTokenizer(0, 9)
        gi.Episodes([(query, "", {}) for query in QUERIES], torch.ones(4, 2, dtype=torch.long), tokenizer, torch.tensor([0]))
        gi.normalize(SCORES, (4, 0.0, 1.0), 0.0)
        kl_coefs, gradient = gi.adaptive_kl_coefs(LABELS, SCORES, 0.2)[0], gi.label_gradient(LABELS, SCORES, "mass")
        return (LABELS * gradient).sum(1) if exact else (gi.advantage_multiplier(LABELS, SCORES, 0.5, "mass"), kl_coefs)


def test_controls_change_labels_or_multipliers_and_nothing_after_them():
    kappas, kl_coefs = within(None)
    assert torch.equal(kappas, gi.advantage_multiplier(LABELS, SCORES, 0.5, "mass")) and kappas.unique().numel() == 4
    assert torch.equal(kl_coefs, gi.adaptive_kl_coefs(LABELS, SCORES, 0.2)[0])
    shuffled, same_kl = within("shuffled")
    assert not torch.equal(shuffled, kappas) and torch.equal(shuffled.sort().values, kappas.sort().values)
    assert torch.equal(same_kl, kl_coefs)
    reweight, same_kl = within("reweight")
    easy = EASY.bool()
    expected = torch.where(easy, kappas[easy].mean(), kappas[~easy].mean())
    assert torch.equal(reweight, expected) and torch.equal(same_kl, kl_coefs) and expected[0] != expected[1]
    truth = torch.stack([1 - EASY, EASY], dim=1)
    oracle, oracle_kl = within("oracle")
    assert torch.equal(oracle, gi.advantage_multiplier(truth, SCORES, 0.5, "mass"))
    assert oracle_kl == pytest.approx([0, 0.2, 0.2, 0])  # of the episodes with the higher mean score, the hard ones
    rank = torch.tensor([3 / 8, 3 / 4, 3 / 4, 1 / 8])  # of four scores, where the middle of a tie counts
    score, score_kl = within("score")
    assert score == pytest.approx(gi.advantage_multiplier(torch.stack([1 - rank, rank], 1), SCORES, 0.5, "mass"))
    assert score_kl == pytest.approx(0.2 * rank)
    ranks = torch.stack([1 - rank, rank], 1)
    for name, labels in ((None, LABELS), ("shuffled", LABELS), ("oracle", truth), ("score", ranks)):
        cost = (labels * gi.label_gradient(labels, SCORES, "mass")).sum(1)
        assert within(name, exact=True) == pytest.approx(cost), name


def test_a_point_at_equal_kl_lies_between_its_neighbours():
    points = [{"KL": kl, "gold": gold, "gap": gap} for kl, gold, gap in ((4.0, 0.5, 0.1), (1.0, 0.2, 0.4), (2, 0.4, 0))]
    for kl, gold, gap in ((1.25, 0.25, 0.3), (3.5, 0.475, 0.075)):
        found = bed.at_kl(points, kl)
        assert [found[key] for key in ("KL", "gold", "gap")] == pytest.approx([kl, gold, gap])
    x = 1.25  # through (1, .2), (2, .4), (4, .5), by Lagrange
    gold = .2 * (x - 2) * (x - 4) / 3 + .4 * (x - 1) * (x - 4) / -2 + .5 * (x - 1) * (x - 2) / 6
    assert bed.at_kl(points, x)["gold, parabola"] == pytest.approx(gold)
    assert "gold, parabola" not in bed.at_kl(points[:2], 3.0)
    assert bed.at_kl(points, 0.9) is None and bed.at_kl(points, 4.1) is None


def test_intervals_are_students():
    """The table of quantiles, by integration of the density; a mean of 3 values with its half width by hand."""
    for values, quantile in bed.T_975.items():
        freedom = values - 1
        x = torch.linspace(0, quantile, 200001, dtype=torch.float64)
        log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
        density = (log_scale - (freedom + 1) / 2 * (1 + x**2 / freedom).log()).exp()
        assert 0.5 + torch.trapezoid(density, x).item() == pytest.approx(0.975, abs=2e-5)
    assert bed.interval([1.0, 2.0, 6.0]) == pytest.approx((3.0, 4.303 * math.sqrt(7 / 3)))


def test_a_bed_runs_and_reports(tmp_path, monkeypatch, capsys):
    """Two arms, two seeds, two updates of the token bed: files, both tables, the figure; no run is repeated."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(bed, "SEEDS", (1, 2))
    monkeypatch.setitem(bed.TARGET_KL, "token", 0.0)
    flags = [flag for flag in bed.TOKEN_FLAGS if "total_episodes" not in flag] + ["--total_episodes=128"]
    arms = {arm: (*bed.TOKEN_ARMS[arm][:3], (0.2,)) for arm in ("ppo", "oracle adaptive KL")}
    monkeypatch.setitem(bed.BEDS, "token", (arms, flags, bed.token_data))
    (tmp_path / "token").mkdir()
    bed.token_model(tmp_path / "token_task_1", 1)
    shutil.copytree(tmp_path / "token_task_1", tmp_path / "token_task_2")  # to train one model is enough here
    for arm, seed in itertools.product(arms, (1, 2)):
        bed.run(tmp_path, "token", arm, 0.2, seed)
    file = tmp_path / "token/oracle_adaptive_KL-kl_0.2-seed_2.json"
    found, before = json.loads(file.read_text()), file.stat().st_mtime_ns
    assert set(found["curve"]) == {"0", "2"} and len(found["metrics"]) == 2
    assert {group: rows for group, (rows, *_) in found["curve"]["2"].items()} == {"E": 256, "H": 256}
    bed.run(tmp_path, "token", "oracle adaptive KL", 0.2, 2)
    assert file.stat().st_mtime_ns == before
    capsys.readouterr()
    bed.report(tmp_path, "token")
    table = capsys.readouterr().out
    assert "token: 4 runs, seeds [1, 2]" in table and "| oracle adaptive KL | 0.2 | " in table
    rows = [json.loads(line) for line in open(tmp_path / "token.jsonl")]
    end = found["curve"]["2"]
    mine = next(row for row in rows if row["arm"] == "oracle adaptive KL" and row["seed"] == 2)
    assert mine["gap"] == pytest.approx(abs(end["E"][1] - end["H"][1]), rel=1e-3)
    assert mine["gold"] == pytest.approx(0.8 * end["E"][2] + 0.2 * end["H"][2], rel=1e-3)
    assert mine["KL"] == pytest.approx(0.8 * end["E"][3] + 0.2 * end["H"][3], rel=1e-3)
    assert mine["sd E"] == pytest.approx(torch.tensor(found["scores"]["E"]).std(correction=0).item(), rel=1e-3)
    assert not any(name.startswith("AUC") for row in rows for name in row)  # neither arm trains the head
    assert (tmp_path / "token.png").stat().st_size > 10_000
