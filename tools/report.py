"""The report: all runs below a folder as Markdown tables, beside the paper's numbers where they are comparable.

    python -m tools.report results                                  the newest run of every name
    python -m tools.report results --details                        also all that the tables have no room for
    python -m tools.report results --csv all.csv --plot all.png     also all numbers as a file, and drawn

Runs on other images, folds, sessions, presets or seeds have a table of their own. Of several runs with one name (their
scripts, data or versions differ) the newest counts; the others are named in a line. Rows are merged by each run's own
first way, or by --how (see rch.py). `folds` are the arrays of a run's fold files, {fold: {name: array}}.
"""

import csv
import io
import json
import os
import sys

import numpy as np

import common
import data
import protocols
import rch

MEASURES = {"accuracy": protocols.accuracy, **protocols.METRICS}
TABLE2 = {  # (protocol, backbone, method): S1..S4, avg, last in %; the paper gives no standard deviations
    ("slcv", "resnet", "finetune"): (35.60, 25.74, 23.90, 21.04, 26.57, 21.04),
    ("slcv", "resnet", "foster"): (39.69, 17.38, 27.53, 28.38, 28.24, 28.38),
    ("slcv", "resnet", "der"): (37.19, 17.59, 23.05, 23.62, 25.36, 23.62),
    ("slcv", "resnet", "ranpac"): (38.51, 31.69, 35.38, 31.44, 34.26, 31.44),
    ("slcv", "vit", "finetune"): (49.44, 26.33, 33.28, 27.98, 34.26, 27.98),
    ("slcv", "vit", "foster"): (48.59, 27.08, 37.39, 29.05, 35.53, 29.05),
    ("slcv", "vit", "der"): (49.15, 21.38, 37.80, 32.87, 35.30, 32.87),
    ("slcv", "vit", "l2p"): (50.85, 28.26, 35.66, 31.30, 36.52, 31.30),
    ("slcv", "vit", "dualprompt"): (48.74, 33.78, 39.94, 34.26, 39.18, 34.26),
    ("slcv", "vit", "ranpac"): (47.07, 37.25, 43.17, 39.08, 41.64, 39.08),
    ("slcv", "swin", "finetune"): (43.82, 25.88, 29.37, 32.93, 33.00, 32.93),
    ("slcv", "swin", "foster"): (44.38, 20.96, 31.47, 34.25, 32.77, 34.25),
    ("slcv", "swin", "der"): (48.57, 19.50, 34.08, 35.51, 34.41, 35.51),
    ("slcv", "swin", "ranpac"): (38.91, 36.61, 39.73, 35.20, 37.61, 35.20),
    ("ilcv", "resnet", "finetune"): (39.49, 29.75, 26.80, 22.17, 29.55, 22.17),
    ("ilcv", "resnet", "foster"): (38.69, 18.24, 27.25, 31.22, 28.85, 31.22),
    ("ilcv", "resnet", "der"): (37.08, 21.41, 23.40, 26.38, 27.07, 26.38),
    ("ilcv", "resnet", "ranpac"): (41.52, 37.05, 38.66, 33.93, 37.79, 33.93),
    ("ilcv", "vit", "finetune"): (57.23, 36.00, 35.42, 30.53, 39.80, 30.53),
    ("ilcv", "vit", "foster"): (51.16, 20.67, 35.58, 33.24, 35.16, 33.24),
    ("ilcv", "vit", "der"): (57.26, 24.79, 42.39, 37.19, 40.41, 37.19),
    ("ilcv", "vit", "l2p"): (56.43, 36.83, 38.24, 35.30, 41.70, 35.30),
    ("ilcv", "vit", "dualprompt"): (61.30, 40.21, 43.56, 37.19, 45.56, 37.19),
    ("ilcv", "vit", "ranpac"): (53.23, 46.18, 50.50, 43.84, 48.44, 43.84),
    ("ilcv", "swin", "finetune"): (50.82, 25.55, 35.12, 35.36, 36.71, 35.36),
    ("ilcv", "swin", "foster"): (53.67, 21.94, 33.93, 36.50, 36.51, 36.50),
    ("ilcv", "swin", "der"): (49.62, 17.21, 36.88, 38.13, 35.46, 38.13),
    ("ilcv", "swin", "ranpac"): (48.80, 44.89, 48.14, 41.27, 45.77, 41.27),
}
TABLE3 = {  # (loso, backbone, method): accuracy, F1, UAR in %, on CASME II's five emotions
    ("loso", "resnet", "finetune"): (55.6, 41.6, 40.6),
    ("loso", "vit", "finetune"): (76.6, 72.3, 71.9),
    ("loso", "swin", "finetune"): (81.5, 80.5, 79.3),
}


# ---- runs on disk ----------------------------------------------------------------------------------------------------
def read_run(folder):
    """(info, folds) of a run's folder, without fold files that read_fold refuses; None if run.json is not a run's."""
    try:
        with open(os.path.join(folder, "run.json"), encoding="utf-8") as file:
            info = json.load(file)
        if "arguments" not in info:  # a run of the first edition
            return None
        found = {fold: protocols.read_fold(folder, info, fold) for fold in range(info["fold_count"])}
    except (ValueError, TypeError, KeyError):  # no JSON, or something else in it
        return None
    return info, {fold: saved for fold, saved in found.items() if saved}


def find_runs(root):
    """Of every name below a folder the newest run with a finished fold: {title: [(folder, info, folds)]}, sorted."""
    if not os.path.isdir(root):
        sys.exit(f"error: {root!r}: no such folder; it is what --out was, results by default")
    times, runs, passed, groups = {}, {}, [], {}
    for folder, _, files in os.walk(root):
        if "run.json" in files:
            paths = [os.path.join(folder, file) for file in files if file.endswith((".json", ".npz"))]
            times[folder] = max(map(os.path.getmtime, paths))
    for folder in sorted(times, key=times.get, reverse=True):
        name = os.path.dirname(os.path.abspath(folder))
        run = None if name in runs else read_run(folder)
        if run and run[1]:
            runs[name] = folder, run[0]["arguments"] | run[0], run[1]  # from here on info holds the arguments too
        else:
            why = "older" if name in runs else "no finished fold" if run else "no run of this edition"
            passed.append(f"{folder} ({why})")
    if passed:
        print(f"note: passed by: {', '.join(sorted(passed))}", file=sys.stderr)
    if not runs:
        sys.exit(f"error: {root}: holds no finished fold of any run")
    for run in sorted(runs.values(), key=lambda run: (run[1]["backbone"], is_control(run[1]), label(run[1]))):
        groups.setdefault(title(run[1]), []).append(run)
    return dict(sorted(groups.items()))


def title(info):
    """What the runs of one table have in common."""
    source = "synthetic stream" if info["synthetic"] else "data"
    return (f"{info['protocol'].upper()}, {source}, {', '.join(info['counts'])}, {info['preset']} preset,"
            f" seed {info['seed']}, images {info['images']}, folds {info['folds']}")  # fmt: skip


def label(info):
    """A run's method with its changed settings."""
    return " ".join([info["method"], *(f"{name}={value}" for name, value in info["changed"].items())])


def is_control(info):
    """Whether the run's script lies in controls/."""
    return os.path.join("controls", f"{info['method']}.py") in info["code"]


def ways(info, folds):
    """The merges that mean something for a run, its own first: prob and centered do for logits only."""
    saved = next(iter(folds.values()))
    if len(saved["row_emotion"]) == len(saved["emotions"]):  # one row per emotion: there is nothing to merge
        return info["merges"][:1]
    return list(dict.fromkeys([*info["merges"], *(rch.WAYS if "prob" in info["merges"] else ("sum", "max"))]))


def lead(info, folds, how):
    """The merge of a run's row: `how`, where it means something, else the run's own first one."""
    return how if how in ways(info, folds) else info["merges"][0]


# ---- numbers ---------------------------------------------------------------------------------------------------------
def columns(info):
    """The columns of the paper's Table 2, or for LOSO those of its Table 3."""
    sessions = [f"S{t + 1}" for t in range(len(info["counts"]))]
    return list(MEASURES) if info["protocol"] == "loso" else [*sessions, "avg", "last"]


def numbers(info, folds, how):
    """What can be said of a run by one merge: {what: values for the first of `columns`}, in % (but the size of scores).

    Forgetting of a session is its best accuracy ever, pooled, less that at the end, as in Chaudhry et al., arXiv
    1801.10112, but the end itself may be the best, so it is never negative. The last session has none.
    """
    results = [protocols.pooled(folds, t, how) for t in range(len(info["counts"]))]  # (true, predicted, source) each
    if info["protocol"] == "loso":  # a fold is one person: only pooled numbers mean anything
        found = {"pooled": [100 * measure(*results[0][:2]) for measure in MEASURES.values()]}
    else:
        a = protocols.curve(folds, how)
        found = {"mean": a.mean(0)} | ({"std": a.std(0, ddof=1)} if len(a) > 1 else {})
        found |= {f"pooled {name}": [100 * measure(*r[:2]) for r in results] for name, measure in MEASURES.items()}
    bounds = [interval(np.sum(true == predicted), len(true)) for true, predicted, _ in results]
    found |= {"95 % low": [low for low, _ in bounds], "95 % high": [high for _, high in bounds]}
    if len(results) > 1:
        sources = range(len(results))
        ever = [[100 * np.mean((true == guess)[of == s]) for true, guess, of in results[s:]] for s in sources]
        lost = [max(accuracies) - accuracies[-1] for accuracies in ever[:-1]]
        found["forgetting"] = [*lost, np.nan, np.mean(lost)]
        # Long training makes large scores, and in eq. 3's sum a session with large scores decides.
        final = np.concatenate([saved[f"scores_{sources[-1]}"] for saved in folds.values()])
        sizes = abs(final - final.mean(1, keepdims=True)).mean(0)  # (R,)
        row_session = next(iter(folds.values()))["row_session"]  # not every session brings a new row
        found["size of scores"] = [sizes[row_session == s].mean() if s in row_session else np.nan for s in sources]
    return found | ({"paper": paper(info)} if paper(info) else {})


def interval(correct, total):
    """95 % Wilson interval (low, high), in %. It takes samples as independent, though one person's are not quite."""
    z, p = 1.96, correct / total
    middle, half = p + z * z / (2 * total), z * np.sqrt(p * (1 - p) / total + z * z / (4 * total**2))
    return tuple(100 * end / (1 + z * z / total) for end in (middle - half, middle + half))


def paper(info):
    """The paper's numbers for `columns`, if the run is comparable, else (). A weight file is taken at its word."""
    loso, sessions = info["protocol"] == "loso", list(info["counts"])
    unchanged = all(name == "weights" and value != "none" for name, value in info["changed"].items())
    usual = sessions == ["casme2"] if loso else sessions == data.STREAM and info["fold_count"] == 5
    if info["synthetic"] or info["preset"] != "paper" or not unchanged or not usual:
        return ()
    return (TABLE2 | TABLE3).get((info["protocol"], info["backbone"], info["method"]), ())


# ---- text and files --------------------------------------------------------------------------------------------------
def cells(values, spreads=()):
    """Numbers as a table shows them."""
    words = ["-" if np.isnan(value) else f"{value:.2f}" for value in values]
    return [f"{word} ± {spread:.2f}" for word, spread in zip(words, spreads)] if len(spreads) else words


def grid(head, rows):
    """A Markdown table; rows that are too short end with -."""
    rows = [head, ["---"] * len(head), *(row + ["-"] * (len(head) - len(row)) for row in rows)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def tables(groups, how=None):
    """The runs as Markdown, a table per title, in the columns of the paper's Tables 2 and 3."""
    text = ["Accuracy in %: mean ± standard deviation over folds, LOSO pooled. avg, last: the paper's A-bar, A-tilde."]
    for name, runs in groups.items():
        _, first, folds = max(runs, key=lambda run: len(run[2]))  # the run with the most folds
        shown, notes = "pooled" if first["protocol"] == "loso" else "mean", []
        head = ["backbone", "method", *columns(first), *["last by prob"] * (shown == "mean" and not how)]
        rows = [["-", "always the commonest emotion", *cells(numbers(first, folds, "majority")[shown])]]
        for _, info, folds in runs:
            merge = lead(info, folds, how)
            found = numbers(info, folds, merge)
            missing = f" ({len(folds)} of {info['fold_count']} folds)" * (len(folds) < info["fold_count"])
            row = [info["backbone"], label(info) + f", by {merge}" * (merge != (how or "sum")) + missing]
            by_prob = cells(numbers(info, folds, "prob")[shown][-1:]) if "prob" in info["merges"] else []
            rows.append((row + cells(found[shown], found.get("std", ())) + by_prob)[: len(head)])
            if paper(info):
                rows.append([info["backbone"], f"{label(info)}, the paper", *cells(paper(info))])
            mixed = [word for word in ("threads", "processor") if len({str(f[word]) for f in folds.values()}) > 1]
            notes += [f"\nmixed: the folds of {' '.join(row)} differ in {' and '.join(mixed)}"] * bool(mixed)
        text += [f"\n**{name}**" + f", merged by {how}" * (how not in (None, "sum")), "", grid(head, rows), *notes]
    return "\n".join(text)


def details(info, folds, how=None):
    """All numbers by every merge, and the confusion matrix of the lead merge at the end, as Markdown."""
    merge, emotions = lead(info, folds, how), list(next(iter(folds.values()))["emotions"])
    found = [(way, *pair) for way in ways(info, folds) for pair in numbers(info, folds, way).items()]
    rows = [[way, what, *cells(values)] for way, what, values in found]
    true, predicted, _ = protocols.pooled(folds, len(info["counts"]) - 1, merge)
    confusion = [[word, *np.bincount(predicted[true == e], minlength=len(emotions))] for e, word in enumerate(emotions)]
    head = [f"true \\ predicted, by {merge}, pooled, at the end", *emotions]
    return grid(["merged by", "what", *columns(info)], rows) + "\n\n" + grid(head, confusion)


def write_csv(groups, path):
    """All runs, one line per run and merge: what they are, and all numbers but the confusion matrix."""
    lines, words = [], "method backbone protocol preset seed synthetic weights images folds fold_count".split()
    for folder, info, folds in sum(groups.values(), []):
        for way in ways(info, folds):
            line = {word: info[word] for word in words} | {"finished": len(folds), "folder": folder, "merge": way}
            line |= {"sessions": "+".join(info["counts"]), "changed": label(info).partition(" ")[2]}
            for what, values in numbers(info, folds, way).items():
                line |= {f"{what} {column}": f"{value:.4f}" for column, value in zip(columns(info), values)}
            lines.append(line)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)))
    writer.writeheader()
    writer.writerows(lines)
    protocols.write(path, text.getvalue().encode())


def plot(groups, path, how=None):
    """Accuracy over sessions: a row per title, a panel per backbone, controls dashed, the paper's as open markers."""
    try:
        from matplotlib import colormaps, figure
    except ImportError:
        sys.exit("error: --plot needs the package matplotlib: pip install matplotlib")
    groups = {name: runs for name, runs in groups.items() if len(runs[0][1]["counts"]) > 1}
    if not groups:
        sys.exit("error: --plot needs a run with more than one session")
    backbones = sorted({info["backbone"] for _, info, _ in sum(groups.values(), [])} - {"none"}) or ["none"]
    whole = figure.Figure((3 + 3.4 * max(2, len(backbones)), 2.9 * len(groups)), layout="constrained")
    lines, colours = {}, colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2]  # strong ones first
    for part, (name, runs) in zip(whole.subfigures(len(groups), 1, squeeze=False)[:, 0], groups.items()):
        part.suptitle(name + f", merged by {how}" * (how not in (None, "sum")), x=0.01, ha="left", fontsize=8)
        for word, axis in zip(backbones, part.subplots(1, len(backbones), sharey=True, squeeze=False)[0]):
            axis.set(title=word, ylabel="accuracy, %")
            axis.set_xticks(range(len(runs[0][1]["counts"])), runs[0][1]["counts"])
            axis.grid(alpha=0.3)
            for _, info, folds in runs:
                if info["backbone"] in (word, "none"):  # what needs no network stands beside each
                    a, key = numbers(info, folds, lead(info, folds, how))["mean"], label(info)
                    colour = lines[key].get_color() if key in lines else colours[len(lines) % 20]
                    (lines[key],) = axis.plot(a[:-2], "--" if is_control(info) else "-o", color=colour, ms=4)
                    axis.plot(paper(info)[:-2], "o", color=colour, mfc="none", ms=7)
    whole.legend(lines.values(), lines.keys(), loc="outside right center", frameon=False)
    content = io.BytesIO()
    whole.savefig(content, format=path[-3:], dpi=80)
    protocols.write(path, content.getvalue())


def main():
    p = common.parser(__doc__)
    p.add_argument("results", help="the folder that --out named, or one below it")
    p.add_argument("--how", choices=rch.WAYS, help="how rows are merged (default: each run's own first way)")
    p.add_argument("--details", action="store_true", help="also all numbers by every merge, and the confusion matrix")
    p.add_argument("--csv", metavar="FILE", help="also write all numbers to a CSV file")
    p.add_argument("--plot", metavar="FILE.png", help="also draw accuracy over sessions (needs matplotlib)")
    args = p.parse_args()
    if args.csv == "" or args.plot is not None and args.plot[-4:] not in (".png", ".pdf", ".svg"):
        sys.exit("error: --csv takes the name of a file, --plot one that ends with .png, .pdf or .svg")
    groups = find_runs(args.results)
    if args.plot:
        plot(groups, args.plot, args.how)
    if args.csv:
        write_csv(groups, args.csv)
    print(tables(groups, args.how))
    for folder, info, folds in sum(groups.values(), []) if args.details else ():
        print(f"\n### {folder}\n\n{details(info, folds, args.how)}")


if __name__ == "__main__":
    common.launch(main, "the same command starts anew")
