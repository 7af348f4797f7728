"""utils/report.py: numbers that can be checked by hand, files that open, and texts that can do no harm."""

import json
import math
import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest

from utils import report

HOSTILE = ["</script><script>alert(1)</script>", '<img src=x onerror="alert(1)">', "<!-- <script>", "]]> & &lt;/b&gt;",
           "a\u2028b\u2029c", "lone \ud800 surrogate", "x" * 10_000, " two\n\n  lines\r\nand\ttab ", "http://a.example"]
FIGURES = {"win_rates.png", "win_rate_by_length.png", "score_against_kl.png", "calibration.png"}
RATES = {"win": 0.55, "tie": 0.1, "lose": 0.35, "win_rate": 0.6, "low": 0.5, "high": 0.7, "length_controlled": 0.5712,
         "length_controlled_low": 0.46, "length_controlled_high": 0.68, "longer": 0.525, "position_bias": None,
         "first": None, "by_length": [], "groups": {}}


def example():
    """3 models and references, two judges that score and one that only compares, groups, and some None."""
    models = {}
    for i, name in enumerate(("sft", "ppo", "dpo", "references")):
        model = name != "references"
        models[name] = {
            "path": name, "length": 13.64 + i, "ended": 0.9531 if model else None,
            "distinct_1": 0.1, "distinct_2": 0.25, "distinct_3": 0.5,
            "kl": 2.0 * i if model else None, "kl_low": 2.0 * i - 0.5 if model else None,
            "kl_high": 2.0 * i + 0.5 if model else None, "rouge1": None, "rouge2": None, "rougeL": None,
            "scores": {"reward_model": {"mean": i - 0.25, "low": i - 0.5, "high": i + 0.125},
                       "vader:compound": {"mean": 0.0, "low": -0.0001, "high": 0.1}}}
    bins = [{"from": low, "to": high, "prompts": prompts, "win_rate": 0.25, "low": 0.125, "high": 0.5}
            for low, high, prompts in ((None, -0.25, 9), (-0.25, 0.0, 4), (0.0, 0.25, 5), (0.25, None, 9))]
    comparisons, verdicts = [], []
    for judge in ("reward_model", "vader:compound", "server"):
        for a, b in (("sft", "references"), ("ppo", "references"), ("dpo", "references"), ("ppo", "sft")):
            comparisons.append({
                **RATES, "judge": judge, "a": a, "b": b, "prompts": 1199, "dropped": 1, "by_length": bins,
                "groups": {"novel=Emma": {"prompts": 40, "win_rate": 0.5, "low": 0.35, "high": 0.65}}})
            verdicts.append({"judge": judge, "a": a, "b": b, "a_wins": [1.0, 0.5, 0.0, None]})
            if judge == "server":
                comparisons[-1].update(position_bias=0.125, first=0.5625)
    rows = [{"prompt_index": i, "prompt": f"prompt {i}", "model": name, "response": f" {name} says {i}",
             "length": 4 + i, "ended": None if name == "references" else i != 2,
             "kl": None if name == "references" else 0.5 * i,
             "scores": {"reward_model": 0.1 * i, "vader:compound": -0.1 * i}, "groups": {"novel": "Emma"}}
            for i in range(4) for name in models]
    results = {
        "command": "python evaluate.py", "prompts": 1200, "reference_model": "assets/sft", "models": models,
        "comparisons": comparisons,
        "agreement": [{"a": "ppo", "b": "references", "judges": ["reward_model", "server"], "prompts": 300,
                       "agreement": 0.8125, "kappa": None}],
        "calibration": [{"judge": "reward_model", "by": "server", "a": "ppo", "b": "references", "bins": [
            {"from": 0.0, "pairs": 31, "accuracy": 0.55, "predicted": 0.5625},
            {"from": 0.5, "pairs": 12, "accuracy": 0.75, "predicted": 0.6789}]}]}
    return results, rows, verdicts


def bare(**changes):
    """One model alone, without anything that can be left out."""
    results, rows, _ = example()
    model = {**results["models"]["sft"], "kl": None, "kl_low": None, "kl_high": None, "scores": {}}
    rows = [{**row, "groups": {}, "scores": {}, "kl": None} for row in rows if row["model"] == "sft"]
    return {**results, "reference_model": None, "models": {"sft": model}, "comparisons": [], "agreement": [],
            "calibration": [], **changes}, rows, []


def table(results, title):
    """A table as a list of {column: cell}."""
    found, = [table for table in report.tables(results) if table["title"] == title]
    return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]


def page_data(text):
    return json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


class Tags(HTMLParser):
    """Start tags of a page as a browser would see them, with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


# ---- Tables -----------------------------------------------------------------------------------------------


def test_table_of_models():
    rows = table(example()[0], "Models")
    assert rows[1] == {
        "model": "ppo", "length": "14.6", "ended": "95.3 %", "distinct 1": "0.100", "distinct 2": "0.250",
        "distinct 3": "0.500", "KL": "2.00 [1.50, 2.50]", "reward_model": "0.750 [0.500, 1.125]",
        "vader:compound": "0.000 [0.000, 0.100]"}  # no -0.000; no ROUGE columns, since all are empty
    assert rows[3]["ended"] == rows[3]["KL"] == ""
    results = example()[0]
    results["models"]["dpo"]["rougeL"] = 0.12345
    assert [row["ROUGE-L"] for row in table(results, "Models")] == ["", "", "0.123", ""]


def test_table_of_comparisons():
    results = example()[0]
    rows = table(results, "Comparisons by reward_model")
    assert len(rows) == 4 and rows[3] == {
        "a": "ppo", "b": "sft", "prompts": "1,199", "dropped": "1", "win": "55.0 %", "tie": "10.0 %", "lose": "35.0 %",
        "win rate": "60.0 % [50.0, 70.0]", "length-controlled": "57.1 % [46.0, 68.0]", "a is longer": "52.5 %"}
    server = table(results, "Comparisons by server")
    assert server[0]["position bias"] == "12.5 %" and server[0]["first"] == "56.2 %"
    notes = {table["title"]: table["note"] for table in report.tables(results)}
    assert "both orders" in notes["Comparisons by server"] and "both orders" not in notes["Comparisons by reward_model"]
    results["comparisons"][0].update(length_controlled=None, length_controlled_low=None, length_controlled_high=None)
    assert table(results, "Comparisons by reward_model")[0]["length-controlled"] == ""


def test_tables_of_groups_agreement_and_calibration():
    results = example()[0]
    assert table(results, "Comparisons by server, group by group")[1] == {
        "a": "ppo", "b": "references", "group": "novel=Emma", "prompts": "40", "win rate": "50.0 % [35.0, 65.0]"}
    assert table(results, "Agreement of judges") == [{
        "a": "ppo", "b": "references", "judges": "reward_model and server", "prompts": "300", "agreement": "81.2 %"}]
    assert table(results, "Calibration") == [{  # (31 * 0.5625 + 12 * 0.6789) / 43, (31 * 0.55 + 12 * 0.75) / 43
        "judge": "reward_model", "other judge": "server", "a": "ppo", "b": "references", "pairs": "43",
        "predicted": "59.5 %", "accuracy": "60.6 %"}]


def test_tables_leave_out_what_is_empty():
    results = bare()[0]
    assert [table["title"] for table in report.tables(results)] == ["Models"]
    assert "KL" not in report.tables(results)[0]["note"]


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_number_that_is_none_is_an_empty_cell(value):
    assert report._number(value, 0.1, 0.2) == ""
    assert report._share(0.5, value, 0.6) == "50.0 %"


def test_markdown_keeps_its_columns():
    results = example()[0]
    results["models"] = {"a|b\nc\u2028d": results["models"]["sft"], "e\\|<b>f": results["models"]["ppo"]}
    lines = report.markdown(report.tables(results)).split("## ")[1].splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 4 and {len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows} == {10}
    assert rows[2].startswith("| a\\|b c d | 13.6 |") and rows[3].startswith("| e\\\\\\|&lt;b&gt;f |")


# ---- Files ------------------------------------------------------------------------------------------------


def test_files_of_a_full_report(tmp_path):
    report.write_page(tmp_path, *example())
    assert {path.name for path in tmp_path.iterdir()} == FIGURES | {"table.md", "report.html"}
    for name in FIGURES:
        image = matplotlib.image.imread(tmp_path / name)
        assert min(image.shape[:2]) > 100 and np.ptp(image) > 0.5
    text = (tmp_path / "report.html").read_text()
    images = [attributes for tag, attributes in Tags(text).found if tag == "img"]
    assert len(images) == 4 and all(image["alt"] for image in images)
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert "57.1 % [46.0, 68.0]" in text and "57.1 % [46.0, 68.0]" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("missing, without", [
    ("comparisons", {"win_rates.png", "win_rate_by_length.png"}), ("calibration", {"calibration.png"})])
def test_a_figure_without_data_is_not_written(missing, without, tmp_path):
    results, rows, verdicts = example()
    report.write_page(tmp_path, {**results, missing: []}, rows, verdicts)
    assert {path.name for path in tmp_path.glob("*.png")} == FIGURES - without


@pytest.mark.parametrize("scores", [{}, {"vader:compound": {"mean": 0.5, "low": None, "high": None}}])
def test_one_model_alone(scores, tmp_path):
    """No references, groups, KL or comparison, and with scores or without."""
    results, rows, verdicts = bare()
    results["models"]["sft"]["scores"] = scores
    report.write_page(tmp_path, results, rows, verdicts)
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "report.html"}
    assert len(page_data((tmp_path / "report.html").read_text())["rows"]) == 4


def test_empty_bins_and_missing_intervals_are_drawn(tmp_path):
    """What a run with few prompts brings: no bin of 5 prompts, no interval, no pair in a bin of the calibration."""
    results, rows, verdicts = example()
    for comparison in results["comparisons"]:
        comparison.update(low=None, high=None, length_controlled=None, by_length=[
            {"from": None, "to": None, "prompts": 4, "win_rate": 0.5, "low": None, "high": None}])
    results["models"]["ppo"].update(kl_low=None, kl_high=None)
    results["calibration"][0]["bins"] = [{"from": 0.0, "pairs": 0, "accuracy": None, "predicted": None}]
    report.write_page(tmp_path, results, rows, verdicts)
    assert {path.name for path in tmp_path.glob("*.png")} == {"win_rates.png", "score_against_kl.png"}


# ---- Figures ----------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the figures, kept before they are closed."""
    kept = []
    monkeypatch.setattr(report, "_save", lambda file: kept.extend(report.plt.gcf().axes) or True)
    yield kept
    report.plt.close("all")


def points(axis):
    """(x, y) of the first point of each line with a marker."""
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if line.get_marker() not in ("None", "")]


def test_win_rates_are_those_against_the_references(drawn):
    assert report.win_rates(None, example()[0])
    assert [axis.get_title() for axis in drawn] == ["reward_model", "vader:compound", "server"]
    plain, controlled = points(drawn[0])[:3], points(drawn[0])[3:]
    assert [x for x, _ in plain] == [0.6] * 3 and [x for x, _ in controlled] == [0.5712] * 3
    assert [round(y) for _, y in plain] == [round(y) for _, y in controlled] == [0, -1, -2]
    assert [label.get_text() for label in drawn[0].get_yticklabels()] == ["sft", "ppo", "dpo"]


def test_win_rates_without_references_are_those_against_the_first_model(drawn):
    """Turned where the first model is a: the ends of the interval change places."""
    results = example()[0]
    del results["models"]["references"]
    turned = {**RATES, "judge": "server", "a": "sft", "b": "dpo", "win_rate": 0.75, "low": 0.5, "high": 0.875,
              "length_controlled_low": 0.25}
    results["comparisons"] = [c for c in results["comparisons"] if (c["judge"], c["b"]) == ("server", "sft")] + [turned]
    assert report.win_rates(None, results)
    assert [x for x, _ in points(drawn[0])] == [0.6, 0.25, 0.5712, 1 - 0.5712]
    back = report._turned(turned)
    assert (back["low"], back["high"], back["length_controlled_high"]) == (0.125, 0.5, 0.75)
    assert drawn[0].get_xlabel() == "preferred to sft"


def test_win_rate_by_length_leaves_out_bins_of_few_prompts(drawn):
    assert report.win_rate_by_length(None, example()[0])
    line = drawn[0].lines[0]
    assert line.get_xdata().tolist() == [-0.375, -0.125, 0.125, 0.375]  # the outermost as wide as the others
    np.testing.assert_array_equal(line.get_ydata(), [0.25, np.nan, 0.25, 0.25])
    assert drawn[0].get_legend_handles_labels()[1] == ["sft", "ppo", "dpo"]  # and not ppo, sft


def test_score_against_kl(drawn):
    assert report.score_against_kl(None, example()[0])
    assert points(drawn[0]) == [(0.0, -0.25), (2.0, 0.75), (4.0, 1.75)]
    dotted, = [line for line in drawn[0].lines if line.get_linestyle() == ":"]
    assert dotted.get_ydata()[0] == 2.75
    assert {text.get_text() for text in drawn[0].texts} == {"sft", "ppo", "dpo", "references"}


def test_calibration_figure(drawn):
    assert report.calibration(None, example()[0])
    marks, = drawn[0].collections
    assert marks.get_offsets().tolist() == [[0.5625, 0.55], [0.6789, 0.75]]
    assert marks.get_sizes()[0] > marks.get_sizes()[1]  # 31 pairs and 12


def test_calibration_of_many_pairs_has_no_names_and_small_bins_no_marks(drawn):
    """Nine names have no room beside one panel; a bin of 4 pairs is noise."""
    results = example()[0]
    row = results["calibration"][0]
    row["bins"][1]["pairs"] = 4
    assert report.calibration(None, results)
    assert len(drawn[0].collections[0].get_offsets()) == 1 and drawn[0].get_legend_handles_labels()[1]
    results["calibration"] = [{**row, "a": f"model {i}"} for i in range(9)]
    assert report.calibration(None, results)
    assert len(drawn[1].collections) == 9 and not drawn[1].get_legend_handles_labels()[1]


@pytest.mark.filterwarnings("error")
def test_many_models_and_odd_names_are_drawn(tmp_path):
    """Names with mathematics that is none, a newline, a lone surrogate, and much too long."""
    results, rows, verdicts = example()
    names = ["$\\frac$", "_hidden", "a\nb", "\ud800", "long" * 40, *(f"model {i}" for i in range(8))]
    references = results["models"].pop("references")
    results["models"] = {**{name: results["models"]["ppo"] for name in names}, "references": references}
    results["comparisons"] = [{**results["comparisons"][0], "a": name, "judge": judge} for name in names
                              for judge in ("$x", "j" * 200, "third", "fourth")]
    report.write_page(tmp_path, results, rows, verdicts)
    assert {path.name for path in tmp_path.glob("*.png")} == FIGURES


# ---- The page ---------------------------------------------------------------------------------------------


def test_page_is_one_file_that_may_fetch_nothing(tmp_path):
    report.write_page(tmp_path, *example())
    text = (tmp_path / "report.html").read_text()
    assert not re.search("https?:|//[a-z]|@import|url\\(", re.sub("base64,[^\"]*", "", text).replace("// ", ""))
    tags = Tags(text).found
    policy, = [attributes["content"] for tag, attributes in tags if attributes.get("http-equiv")]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    for tag, attributes in tags:
        assert attributes.get("src", "data:").startswith("data:") and attributes.get("href", "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "fetch("):
        assert word not in report.PAGE.read_text()


def test_page_data():
    results, rows, verdicts = example()
    rows = [row for row in rows if (row["prompt_index"], row["model"]) != (1, "ppo")][::-1]
    data = report.sample_data(rows, verdicts, results["models"])
    assert data["models"] == ["sft", "ppo", "dpo", "references"] and data["groups"] == ["novel"]
    assert data["quantities"] == ["length", "KL", "reward_model", "vader:compound"]
    assert [row["index"] for row in data["rows"]] == [0, 1, 2, 3] and data["rows"][1]["cells"][1] is None
    assert data["rows"][2]["cells"][1] == {"text": " ppo says 2", "ended": False, "numbers": [6, 1.0, 0.2, -0.2]}
    assert data["rows"][2]["cells"][3]["numbers"][1] is None and data["rows"][2]["groups"] == ["Emma"]
    assert data["verdicts"] == verdicts


def test_hostile_texts_come_back_as_they_were_and_open_no_element(tmp_path):
    results, rows, verdicts = example()
    hostile = [{**rows[0], "prompt_index": i, "prompt": text, "response": text, "model": text, "groups": {text: text},
                "scores": {text: math.nan, "reward_model": math.inf}} for i, text in enumerate(HOSTILE)]
    comparison = {**results["comparisons"][0], "judge": HOSTILE[0], "a": HOSTILE[1], "b": HOSTILE[2]}
    model = results["models"]["sft"]
    results.update(command=HOSTILE[0], reference_model=HOSTILE[1], comparisons=[comparison],
                   models={text: model for text in HOSTILE})
    verdicts = [{"judge": HOSTILE[0], "a": HOSTILE[1], "b": HOSTILE[2], "a_wins": [1.0, math.nan]}]
    report.write_page(tmp_path, results, hostile, verdicts)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(re.findall("<script", text, re.IGNORECASE)) == len(re.findall("</script", text, re.IGNORECASE)) == 2
    tags = Tags(text)
    assert [tag for tag, _ in tags.found].count("script") == 2
    assert all("onerror" not in attributes for _, attributes in tags.found) and "<!--" not in text
    assert HOSTILE[0] in tags.text and HOSTILE[1] in tags.text  # the tables show them as text
    data = page_data(text)
    assert [row["prompt"] for row in data["rows"]] == data["models"] == data["groups"] == HOSTILE
    assert [row["cells"][i]["text"] for i, row in enumerate(data["rows"])] == HOSTILE
    assert data["rows"][0]["cells"][0]["numbers"] == [4, 0.0, *[None] * len(data["quantities"][2:])]
    assert data["verdicts"][0]["a_wins"] == [1.0, None]
    raw = re.search('id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert raw.isascii() and not set("<>&\n") & set(raw) and "NaN" not in raw and "Infinity" not in raw
