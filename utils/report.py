"""What evaluate.py found, for people: table.md, figures, and report.html, one file that opens without a network.

utils/report.html is the frame of that page: its style, its controls, its script.
"""

import base64
import html
import json
import math
import re
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

# For up to 63 models a pair of their own; colours that colour-blind readers can tell apart (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "os^Dv*PX<"
PAGE = Path(__file__).with_name("report.html")


def write_report(folder, results, prompts, answers, scores, wins, said, groups):
    """Write everything about an evaluation into its folder; summary.json last, for its presence says: complete.

    results: the figures, as in summary.json; prompts: N texts; answers: {model: N dicts of response, length, ended,
    kl}; scores: {judge: {model: N numbers}}; wins: {(judge, a, b): N verdicts on a, nan where there is none}; said: of
    servers {(judge, a, b): N lists of the replies with a first and with b first}; groups: {column: N values}.
    """
    rows = [{"prompt_index": i, "prompt": prompt, "model": model,
             **{key: found[i][key] for key in ("response", "length", "ended", "kl")},
             "scores": {judge: scores[judge][model][i] for judge in scores},
             "groups": {column: values[i] for column, values in groups.items()}}
            for i, prompt in enumerate(prompts) for model, found in answers.items()]
    verdicts = [{"judge": judge, "a": a, "b": b, "a_wins": [float(win) for win in a_wins]}
                for (judge, a, b), a_wins in wins.items()]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with open(folder / "verdicts.jsonl", "w", encoding="utf-8") as file:
        for verdict in verdicts:
            replies = said.get((verdict["judge"], verdict["a"], verdict["b"]))
            for i, win in enumerate(map(_finite, verdict["a_wins"])):
                row = {key: verdict[key] for key in ("judge", "a", "b")} | {"prompt_index": i, "a_wins": win}
                file.write(json.dumps(row | ({"replies": replies[i]} if replies else {})) + "\n")
    write_page(folder, results, rows, verdicts)
    (folder / "summary.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def write_page(folder, results, rows, verdicts):
    """Write table.md, the figures that have data, and report.html. rows: those of samples.jsonl."""
    folder = Path(folder)
    shown = tables(results)
    (folder / "table.md").write_bytes(markdown(shown).encode("utf-8", "replace"))  # "replace": lone surrogates
    with plt.rc_context({"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.grid": True, "grid.alpha": 0.3, "axes.titlesize": 10, "legend.frameon": False}):
        figures = [(folder / name, caption) for name, caption, draw in FIGURES if draw(folder / name, results)]
    page = html_page(results, shown, figures, sample_data(rows, verdicts, results["models"]))
    (folder / "report.html").write_bytes(page.encode("utf-8", "replace"))


# ---- Tables -----------------------------------------------------------------------------------------------


def tables(results):
    """List of {title, note, columns, rows}, all text, without empty columns and empty tables."""
    models, comparisons = results["models"], results["comparisons"]
    judges = list(dict.fromkeys(judge for model in models.values() for judge in model["scores"]))
    found = [_table(
        "Models",
        f"Means over {results['prompts']:,} prompts, in brackets 95 % intervals over prompts. Length in tokens; ended: "
        "responses that came to their end before the limit; distinct n: different n-grams as a share of all; "
        f"{'KL in nats to ' + results['reference_model'] + '; ' if results['reference_model'] else ''}"
        "in a judge's column its score.",
        ["model", "length", "ended", "distinct 1", "distinct 2", "distinct 3", "KL", "ROUGE-1", "ROUGE-2", "ROUGE-L",
         *judges],
        [[name, _number(model["length"], digits=1), _share(model["ended"]),
          *(_number(model[f"distinct_{n}"]) for n in (1, 2, 3)),
          _number(model["kl"], model["kl_low"], model["kl_high"], digits=2),
          *(_number(model[key]) for key in ("rouge1", "rouge2", "rougeL")),
          *(_number(*(model["scores"].get(judge, {}).get(key) for key in ("mean", "low", "high"))) for judge in judges)]
         for name, model in models.items()])]
    groups = []  # many rows: they come last
    for judge in dict.fromkeys(comparison["judge"] for comparison in comparisons):
        mine = [comparison for comparison in comparisons if comparison["judge"] == judge]
        found.append(_table(
            f"Comparisons by {judge}",
            "How often a's response is preferred to b's. A tie counts half in the win rate; in brackets 95 % intervals "
            "over prompts. Dropped: prompts without a verdict. Length-controlled: the win rate expected at equal "
            "lengths, an extrapolation where hardly any pair is equally long. A is longer: share of the prompts where "
            "a's response has more tokens, a half for equal lengths." + (
                " Each pair is shown in both orders: position bias is the share of verdicts that change with it, "
                "first the share of replies for the response shown first."
                if any(c.get("position_bias") is not None for c in mine) else ""),
            ["a", "b", "prompts", "dropped", "win", "tie", "lose", "win rate", "length-controlled", "a is longer",
             "position bias", "first"],
            [[c["a"], c["b"], f"{c['prompts']:,}", f"{c['dropped']:,}", _share(c["win"]), _share(c["tie"]),
              _share(c["lose"]), _share(c["win_rate"], c["low"], c["high"]),
              _share(c["length_controlled"], c["length_controlled_low"], c["length_controlled_high"]),
              _share(c["longer"]), _share(c.get("position_bias")), _share(c.get("first"))] for c in mine]))
        groups.append(_table(
            f"Comparisons by {judge}, group by group",
            "The win rate of a on the prompts of one group, ties counting half, with its 95 % interval.",
            ["a", "b", "group", "prompts", "win rate"],
            [[c["a"], c["b"], name, f"{group['prompts']:,}", _share(group["win_rate"], group["low"], group["high"])]
             for c in mine for name, group in c["groups"].items()]))
    found.append(_table(
        "Agreement of judges",
        "How often two judges prefer the same response, over the prompts where neither calls a tie; kappa is the "
        "agreement beyond chance: 0 as by chance, 1 always.",
        ["a", "b", "judges", "prompts", "agreement", "kappa"],
        [[row["a"], row["b"], " and ".join(row["judges"]), f"{row['prompts']:,}", _share(row["agreement"]),
          _number(row["kappa"], digits=2)] for row in results["agreement"]]))
    rows = []
    for row in results["calibration"]:
        bins = [bin for bin in row["bins"] if bin["pairs"]]
        pairs = sum(bin["pairs"] for bin in bins)
        means = [sum(bin["pairs"] * bin[key] for bin in bins) / pairs if pairs else None
                 for key in ("predicted", "accuracy")]
        rows.append([row["judge"], row["by"], row["a"], row["b"], f"{pairs:,}", *map(_share, means)])
    found.append(_table(
        "Calibration",
        "Predicted: the mean sigmoid of a reward model's score differences, what it expects of another judge; "
        "accuracy: how often that judge prefers the same response, without its ties. summary.json has both in bins of "
        "the difference, without the largest ones.",
        ["judge", "other judge", "a", "b", "pairs", "predicted", "accuracy"], rows))
    return [table for table in found + groups if table["rows"]]


def _table(title, note, columns, rows):
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    return {"title": title, "note": note, "columns": [columns[i] for i in kept],
            "rows": [[row[i] for i in kept] for row in rows]}


def _finite(value):
    return None if value is None or not math.isfinite(value) else value


def _number(value, low=None, high=None, digits=3, scale=1, unit=""):
    """`0.612 [0.550, 0.671]`, without brackets where there is no interval, and nothing for None."""
    value, low, high = (None if _finite(x) is None else f"{round(x * scale, digits) + 0.0:.{digits}f}"  # + 0.0: no -0
                        for x in (value, low, high))
    return "" if value is None else value + unit + ("" if low is None or high is None else f" [{low}, {high}]")


_share = partial(_number, digits=1, scale=100, unit=" %")


def markdown(shown):
    """The tables as Markdown."""

    def line(cells):
        return "| " + " | ".join(map(escaped, cells)) + " |"

    def escaped(text):
        text = html.escape(" ".join(text.split()), quote=False)
        return text.replace("\\", "\\\\").replace("|", "\\|")

    return "\n\n".join(
        f"## {escaped(table['title'])}\n\n{escaped(table['note'])}\n\n" + "\n".join(
            [line(table["columns"]), "|-" * len(table["columns"]) + "|", *map(line, table["rows"])])
        for table in shown) + "\n"


# ---- Figures: each function writes its file, or returns False where there is nothing to draw ----------------


def win_rates(file, results):
    base, comparisons = _against(results)
    if not comparisons:
        return False
    names = list(dict.fromkeys(c["a"] for c in comparisons))
    for axis, judge in _panels((c["judge"] for c in comparisons), 2.9, 1.1 + 0.34 * len(names)):
        for key, low, high, shift, style in (
                ("win_rate", "low", "high", 0.13, dict(label="win rate", marker="o", color=COLOURS[0])),
                ("length_controlled", "length_controlled_low", "length_controlled_high", -0.13,
                 dict(label="length-controlled", marker="s", color=COLOURS[1], mfc="white"))):
            for c in (c for c in comparisons if c["judge"] == judge and _finite(c[key]) is not None):
                axis.errorbar(c[key], shift - names.index(c["a"]), xerr=_error(c[key], c[low], c[high]), ls="", ms=5,
                              **style)
        axis.axvline(0.5, color="black", lw=0.8)
        axis.set(xlim=(-0.02, 1.02), ylim=(0.4 - len(names), 0.6), xlabel=f"preferred to {_short(base)}")
        axis.set_yticks(range(0, -len(names), -1), map(_short, names))
        axis.tick_params(labelleft=axis.get_subplotspec().is_first_col())
        axis.xaxis.set_major_formatter(PercentFormatter(1, 0))
    return _save(file)


def win_rate_by_length(file, results):
    comparisons = [c for c in results["comparisons"] if c["b"] == "references" and any(map(_drawn, c["by_length"]))]
    if not comparisons:
        return False
    for axis, judge in _panels((c["judge"] for c in comparisons), 3.6, 3.1):
        for c in (c for c in comparisons if c["judge"] == judge):
            inner = [bin for bin in c["by_length"] if None not in (bin["from"], bin["to"])]
            width = inner[0]["to"] - inner[0]["from"] if inner else 0.5
            x = [_middle(bin, width) for bin in c["by_length"]]
            y, low, high = ([bin[key] if _drawn(bin) else math.nan for bin in c["by_length"]]
                            for key in ("win_rate", "low", "high"))
            style = _style(list(results["models"]).index(c["a"]))
            axis.plot(x, y, ms=4, lw=1.5, label=_short(c["a"]), **style)
            if len(results["models"]) <= 7:  # more would hide one another
                axis.fill_between(x, low, high, color=style["color"], alpha=0.12, lw=0)
        axis.axhline(0.5, color="black", lw=0.8)
        axis.axvline(0, color="black", lw=0.8)
        axis.set(ylim=(-0.02, 1.02), xlabel="log(tokens / tokens of the reference)", ylabel="preferred to references")
        axis.yaxis.set_major_formatter(PercentFormatter(1, 0))
    return _save(file)


def score_against_kl(file, results):
    models = {name: model for name, model in results["models"].items() if _finite(model["kl"]) is not None}
    judges = [judge for model in models.values() for judge in model["scores"]]
    if not judges:
        return False
    names = list(results["models"])
    for axis, judge in _panels(judges, 3.8, 3.2):
        for name, model in models.items():
            x, score = model["kl"], model["scores"].get(judge, {"mean": None})
            if _finite(score["mean"]) is not None:
                axis.errorbar(x, score["mean"], _error(score["mean"], score["low"], score["high"]),
                              _error(x, model["kl_low"], model["kl_high"]), ms=6, elinewidth=1, ls="",
                              label=None if len(models) <= 8 else _short(name), **_style(names.index(name)))
                if len(models) <= 8:
                    axis.annotate(_short(name), (x, score["mean"]), (5, 5), textcoords="offset points", fontsize=8)
        references = results["models"].get("references", {}).get("scores", {}).get(judge)
        if references and _finite(references["mean"]) is not None:
            axis.axhline(references["mean"], color="0.3", ls=":")
            axis.text(0.01, references["mean"], "references", va="bottom", fontsize=8, color="0.3",
                      transform=axis.get_yaxis_transform())
        axis.margins(x=0.15, y=0.12)
        axis.set(xlabel="KL (nats)", ylabel="mean score")
    return _save(file)


def calibration(file, results):
    rows = results["calibration"]
    rows = [row for row in rows if row["b"] == "references"] or rows  # all pairs at once would hide one another
    rows = [{**row, "bins": [bin for bin in row["bins"] if bin["pairs"] >= 5]} for row in rows]
    rows = [row for row in rows if row["bins"]]
    if not rows:
        return False
    most = max(bin["pairs"] for row in rows for bin in row["bins"])
    pairs = list(dict.fromkeys(f"{row['a']} and {row['b']}" for row in rows))  # more than 8 have no room for names
    for axis, title in _panels((f"{row['judge']}, judged by {row['by']}" for row in rows), 3.6, 3.3):
        axis.plot([0.5, 1], [0.5, 1], color="black", lw=0.8)
        for row in (row for row in rows if f"{row['judge']}, judged by {row['by']}" == title):
            number = pairs.index(f"{row['a']} and {row['b']}")
            axis.scatter([bin["predicted"] for bin in row["bins"]], [bin["accuracy"] for bin in row["bins"]],
                         s=[8 + 120 * bin["pairs"] / most for bin in row["bins"]], alpha=0.7, lw=0,
                         label=_short(pairs[number]) if len(pairs) <= 8 else None, **_style(number))
        axis.set(xlabel="predicted by the difference of the scores", ylabel="accuracy")
        for one in (axis.xaxis, axis.yaxis):
            one.set_major_formatter(PercentFormatter(1, 0))
    return _save(file)


FIGURES = (
    ("win_rates.png", "Win rates with 95 % intervals, as they are and at equal lengths.", win_rates),
    ("win_rate_by_length.png", "Win rate by length against the reference's length, with 95 % intervals. Bins of fewer "
     "than 5 prompts are left out.", win_rate_by_length),
    ("score_against_kl.png", "Mean score against KL, with 95 % intervals; dotted: the references.", score_against_kl),
    ("calibration.png", "Calibration: how often the response with the higher score is preferred by another judge, and "
     "what the difference of the scores predicts. Larger marks stand for more pairs, fewer than 5 are left out.",
     calibration))


def _against(results):
    """What win rates are drawn against, and the comparisons with it, turned so that it is b."""
    comparisons = results["comparisons"]
    base = "references" if any("references" in (c["a"], c["b"]) for c in comparisons) else next(iter(results["models"]))
    return base, [c if c["b"] == base else _turned(c) for c in comparisons if base in (c["a"], c["b"])]


def _turned(c):
    swapped = {"win_rate": "win_rate", "low": "high", "high": "low", "length_controlled": "length_controlled",
               "length_controlled_low": "length_controlled_high", "length_controlled_high": "length_controlled_low"}
    return {**c, "a": c["b"], "b": c["a"],
            **{key: None if c[other] is None else 1 - c[other] for key, other in swapped.items()}}


def _short(name, most=32):
    """A name as a figure can show it."""
    name = " ".join(name.encode("utf-8", "replace").decode().split())
    return name if len(name) <= most else name[: most - 1] + "…"


def _style(number):
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def _error(value, low, high):
    """Lengths of an error bar below and above; none where there is no interval."""
    return None if _finite(low) is None or _finite(high) is None else [[max(0, value - low)], [max(0, high - value)]]


def _drawn(bin):
    return bin["prompts"] >= 5 and _finite(bin["win_rate"]) is not None


def _middle(bin, width):
    """Where to draw a bin; the outermost ones are drawn as if they had the width of the others."""
    low, high = bin["from"], bin["to"]
    if low is None and high is None:
        return 0
    return high - width / 2 if low is None else low + width / 2 if high is None else (low + high) / 2


def _panels(titles, width, height):
    """A new figure with a panel for each title: pairs of (axis, title)."""
    titles = list(dict.fromkeys(titles))
    columns = min(3, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = plt.figure(figsize=(width * columns + 1.4, height * rows), layout="constrained")
    return [(figure.add_subplot(rows, columns, i, title=_short(title, 45)), title) for i, title in enumerate(titles, 1)]


def _save(file):
    figure = plt.gcf()
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    if len(handles) > 1:
        figure.legend(handles.values(), handles, loc="outside right upper", fontsize=8,
                      ncols=math.ceil(len(handles) / 12))
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return True


# ---- The page -------------------------------------------------------------------------------------------------


def sample_data(rows, verdicts, models):
    """What the page's script works on: one entry a prompt, with one cell a model. Numbers are finite or None."""
    models = list(dict.fromkeys([*models, *(row["model"] for row in rows)]))
    judges = list(dict.fromkeys(judge for row in rows for judge in row["scores"]))
    groups = list(dict.fromkeys(name for row in rows for name in row["groups"]))
    prompts = {}
    for row in rows:
        entry = prompts.setdefault(row["prompt_index"], {
            "index": row["prompt_index"], "prompt": row["prompt"], "cells": [None] * len(models),
            "groups": [str(row["groups"].get(name, "")) for name in groups]})
        entry["cells"][models.index(row["model"])] = {
            "text": row["response"], "ended": row["ended"],
            "numbers": [*map(_finite, (row["length"], row["kl"], *map(row["scores"].get, judges)))]}
    return {"models": models, "quantities": ["length", "KL", *judges], "groups": groups,
            "rows": [prompts[index] for index in sorted(prompts)],
            "verdicts": [{**verdict, "a_wins": [*map(_finite, verdict["a_wins"])]} for verdict in verdicts]}


def script_json(data):
    """JSON that can stand in a <script>: no character of it can end the element or begin a comment.

    ASCII only, so that U+2028 and lone surrogates are escapes too.
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def html_page(results, shown, figures, data):
    """One file: nothing in it is fetched, and its policy forbids the browser to fetch anything."""

    def cells(tag, texts):
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>\n"

    parts = [f"<h2>{html.escape(table['title'])}</h2>\n<p>{html.escape(table['note'])}</p>\n"
             f'<div class="scroll"><table>\n<thead>{cells("th", table["columns"])}</thead>\n<tbody>'
             f'{"".join(cells("td", row) for row in table["rows"])}</tbody></table></div>\n' for table in shown]
    images = [f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,'
              f'{base64.b64encode(file.read_bytes()).decode()}">'
              f"<figcaption>{html.escape(caption)}</figcaption></figure>\n" for file, caption in figures]
    before, between, after = re.split("<!-- results -->|<!-- data -->", PAGE.read_text(encoding="utf-8"))
    return "".join([before, f"<pre>{html.escape(results['command'])}</pre>\n", *parts[:1], *images, *parts[1:], between,
                    script_json(data), after])
