"""The report: all runs below a folder as Markdown tables, beside the paper's numbers where they are comparable.

    python -m tools.report results                                  the newest run of every name
    python -m tools.report results --compare finetune ranpac        the difference of two runs, with interval and p
    python -m tools.report results --details                        also all that the tables have no room for
    python -m tools.report results --csv all.csv --plot all.png     also all numbers as a file, and drawn

Runs on other images, folds, sessions or presets have a table of their own. Runs that differ in the seed alone are one
row: means over seeds, on the folds that all of them have. Of several runs with one name (their scripts, data or
versions differ) the newest counts; the others are named in a line. Rows of scores are merged by each run's own first
way, or by --how (see rch.py). One person's samples are alike: intervals come from drawing subjects again, within each
session, and p from giving each subject's difference a random sign.

Below, a run is (folder, info, folds), where `folds` are the arrays of its fold files, {fold: {name: array}}; a row of a
table is (folders, info, seeds), where `seeds` are the folds of each seed. S subjects, E emotions, T sessions.
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
from tools import prepare

MEASURES = {"accuracy": protocols.accuracy, **protocols.METRICS}
DRAWS, FLIPS = 2000, 10_000  # of subjects for an interval, of signs for a p
COLOURS = ("#0b3c8c", "#d1495b", "#2e8b57", "#c77700", "#7b3fa0", "#008b9a", "#8c4a1f", "#d63fae")
MARKS, GREYS, DASHES = "os^Dv<>Pp*h", ("0.2", "0.4", "0.5", "0.3"), ("--", ":", "-.", (0, (8, 2)), (0, (1, 3)))
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
    """Of every name below a folder the newest run with a finished fold: {title: [run, ...]}, sorted."""
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
    order = lambda run: (run[1]["backbone"], is_control(run[1]), label(run[1]), run[1]["seed"])  # noqa: E731
    for run in sorted(runs.values(), key=order):
        groups.setdefault(title(run[1]), []).append(run)
    return dict(sorted(groups.items()))


def title(info):
    """What the runs of one table have in common."""
    source, counts = "synthetic stream" if info["synthetic"] else "data", info["counts"]
    official = [data.DATASETS[name].samples if name in data.DATASETS else None for name in counts]
    of = "" if None in official else f" of {sum(official):,}"
    return (f"{info['protocol'].upper()}, {source}, {', '.join(counts)}, {info['preset']} preset,"
            f" {sum(count['samples'] for count in counts.values()):,}{of} samples,"
            f" images {info['images']}, folds {info['folds']}"
            + (f", tests {info['tests']}" if info.get("tests", info["folds"]) != info["folds"] else ""))  # fmt: skip


def label(info):
    """A run's method with its changed settings."""
    return " ".join([info["method"], *(f"{name}={value}" for name, value in info["changed"].items())])


def but_seed(info):
    """All that a run's numbers depend on, but the seed, from which random weights come, too."""
    other = ("seed", "arguments", "seeds", "label", *["weights"] * (info["changed"].get("weights") == "none"))
    return {word: value for word, value in info.items() if word not in other}


def is_control(info):
    """Whether the run's script lies in controls/."""
    return os.path.join("controls", f"{info['method']}.py") in info["code"]


def rows(runs, each_seed=False):
    """The rows of a table: of `runs`, those that differ in the seed alone are one, on the folds that all of them have.

    With `each_seed`, or where seeds have no fold in common, each is a row. info gets "seeds", and "label" to print.
    """
    alike, result = {}, []
    for run in runs:
        key = json.dumps([but_seed(run[1]), run[1]["seed"] if each_seed else None])
        alike.setdefault(key, {}).setdefault(run[1]["seed"], run)  # a copy of a run is the same run
    for group in (list(group.values()) for group in alike.values()):
        shared = set.intersection(*(set(folds) for _, _, folds in group))
        for part in [group] if shared else [[run] for run in group]:
            folders, infos, seeds = zip(*part)
            seeds = [{fold: own[fold] for fold in own if fold in shared or not shared} for own in seeds]
            which = [info["seed"] for info in infos]
            words = f", {len(part)} seeds" if len(part) > 1 else f", seed {which[0]}"
            words *= each_seed or which != [0]  # nothing is said of the default
            result.append((folders, infos[0] | {"seeds": which, "label": label(infos[0]) + words}, seeds))
    return result


def ways(info, folds):
    """The merges that mean something for a run, its own first: prob and centered do for logits only."""
    saved = next(iter(folds.values()))
    if len(saved["row_emotion"]) == len(saved["emotions"]):  # one row per emotion: there is nothing to merge
        return info["merges"][:1]
    return list(dict.fromkeys([*info["merges"], *(rch.WAYS if "prob" in info["merges"] else ("sum", "max"))]))


def lead(info, folds, how):
    """The merge of a run's row: `how`, where it means something, else the run's own first one."""
    return how if how in ways(info, folds) else info["merges"][0]


# ---- subjects --------------------------------------------------------------------------------------------------------
FROM_COUNTS = {  # measures of counts (..., E) of hits, true and predicted; true is nan for an emotion without a sample
    "accuracy": lambda hits, true, predicted: hits.sum(-1) / np.nansum(true, -1),
    "UF1": lambda hits, true, predicted: np.nanmean(2 * hits / (true + predicted), -1),
    "UAR": lambda hits, true, predicted: np.nanmean(hits / true, -1),
}


def by_subject(folds, how):
    """Counts (3, T, S, E) of hits, true and predicted emotions of each subject's samples tested after each session.

    And the session (S,) that each subject is of: a subject's number means one person within a session only.
    """
    pairs = [list(zip(saved["session"].tolist(), saved["subjects"].tolist())) for saved in folds.values()]
    people, saved = sorted(set(sum(pairs, []))), next(iter(folds.values()))
    counts = np.zeros((3, len(saved["seconds"]), len(people), len(saved["emotions"])))
    for saved, pair in zip(folds.values(), pairs):
        subject = np.array([people.index(person) for person in pair])
        for t in range(counts.shape[1]):
            true, predicted, _ = protocols.outcome(saved, t, how)
            own, hit = subject[: len(true)], true == predicted
            np.add.at(counts[0, t], (own[hit], true[hit]), 1)
            np.add.at(counts[1, t], (own, true), 1)
            np.add.at(counts[2, t], (own, predicted), 1)
    return counts, np.array([session for session, _ in people])


def draw(session):
    """How often each subject is in each draw, (DRAWS, S): of every session as many as it has, with replacement."""
    random, sizes = np.random.default_rng(0), np.unique(session, return_counts=True)[1]
    return np.concatenate([random.multinomial(size, np.full(size, 1 / size), DRAWS) for size in sizes], 1)


def with_average(a):
    """Values (T, ...) with their mean and the last one behind: (T + 2, ...)."""
    return np.concatenate([a, a.mean(0, keepdims=True), a[-1:]])


def intervals(seeds, how):
    """95 % intervals in %, pooled over folds, of the mean over seeds: {measure: (2, T + 2) low and high}.

    A draw of subjects serves all of S1..ST, so their mean has an interval too. Who is alone in a session gives none.
    """
    counts, session = zip(*(by_subject(folds, how) for folds in seeds))
    hits, true, predicted = draw(session[0]) @ np.array(counts).swapaxes(0, 1)  # (seeds, T, DRAWS, E) each
    true = np.where(true > 0, true, np.nan)
    percent = 100 if np.unique(session[0], return_counts=True)[1].min() > 1 else np.nan
    values = {name: percent * measure(hits, true, predicted).mean(0) for name, measure in FROM_COUNTS.items()}
    return {name: np.quantile(with_average(value), (0.025, 0.975), 1) for name, value in values.items()}


def difference(a, b):
    """(value, low, high, p), (T + 1,) each: accuracy by counts `a` less that by counts `b`, of S1..ST and avg, in %.

    a, b  lists of what by_subject gives, one per seed, of the same samples; correctness is averaged over seeds first
    p     how often random signs of all subjects' summed differences give a sum of this size or a larger one
    """
    session, total = a[0][1], a[0][0][1].sum(-1)  # (S,), (T, S)
    gain = 100 * np.subtract(*(np.mean([counts[0].sum(-1) for counts, _ in row], 0) for row in (a, b)))  # (T, S)
    share = with_average(gain / total.sum(1, keepdims=True))[:-1]  # (T + 1, S): its sum over subjects is the value
    drawn, signs = draw(session), np.random.default_rng(0).choice((-1.0, 1.0), (FLIPS, len(session)))
    low, high = np.quantile(with_average((gain @ drawn.T) / (total @ drawn.T))[:-1], (0.025, 0.975), 1)
    large = abs(share @ signs.T) > abs(share.sum(1, keepdims=True)) - 1e-9  # equal sums may differ in their last bits
    return share.sum(1), low, high, (large.sum(1) + 1) / (FLIPS + 1)


# ---- numbers ---------------------------------------------------------------------------------------------------------
def columns(info):
    """The columns of the paper's Table 2, or for LOSO those of its Table 3."""
    sessions = [f"S{t + 1}" for t in range(len(info["counts"]))]
    return list(MEASURES) if info["protocol"] == "loso" else [*sessions, "avg", "last"]


def numbers(info, seeds, how):
    """What can be said of a row by one merge: {what: values for the first of `columns`}, in % (but the size of scores).

    Means over seeds; std is over folds, of these means. Forgetting of a session is its best accuracy ever, pooled, less
    that at the end, as in Chaudhry et al., arXiv 1801.10112, but the end itself may be the best, so it is never
    negative. The last session has none.
    """
    results = [[protocols.pooled(folds, t, how) for folds in seeds] for t in range(len(info["counts"]))]
    each = {name: [[100 * measure(*r[:2]) for r in result] for result in results] for name, measure in MEASURES.items()}
    each = {name: with_average(np.array(values)) for name, values in each.items()}  # (T + 2, seeds), pooled
    ends = dict.fromkeys(MEASURES, np.full((2, len(results) + 2), np.nan)) | intervals(seeds, how)
    if info["protocol"] == "loso":  # a fold is one person: only pooled numbers mean anything
        of_seeds = np.array([values[0] for values in each.values()])  # (measures, seeds)
        found = {"pooled": of_seeds.mean(1)}
        found |= {f"95 % {side}": [ends[name][i, 0] for name in MEASURES] for i, side in enumerate(("low", "high"))}
    else:
        a = np.array([protocols.curve(folds, how) for folds in seeds])  # (seeds, folds, T + 2)
        of_seeds, a = a.mean(1).T, a.mean(0)
        found = {"mean": a.mean(0)} | ({"std": a.std(0, ddof=1)} if len(a) > 1 else {})
        for name, values in each.items():
            found |= {f"pooled {name}": values.mean(1)}
            found |= {f"95 % {side} {name}": ends[name][i] for i, side in enumerate(("low", "high"))}
    found |= {"lowest seed": of_seeds.min(1), "highest seed": of_seeds.max(1)} if len(seeds) > 1 else {}
    if len(results) > 1:
        sources = range(len(results))
        ever = [np.array([[100 * np.mean((r[0] == r[1])[r[2] == s]) for r in result] for result in results[s:]])
                for s in sources[:-1]]  # (times, seeds) for each session but the last  # fmt: skip
        lost = [np.mean(accuracies.max(0) - accuracies[-1]) for accuracies in ever]
        found["forgetting"] = [*lost, np.nan, np.mean(lost)]
        # Long training makes large scores, and in eq. 3's sum a session with large scores decides.
        final = np.concatenate([saved[f"scores_{sources[-1]}"] for folds in seeds for saved in folds.values()])
        sizes = abs(final - final.mean(1, keepdims=True)).mean(0)  # (R,)
        row_session = next(iter(seeds[0].values()))["row_session"]  # not every session brings a new row
        found["size of scores"] = [sizes[row_session == s].mean() if s in row_session else np.nan for s in sources]
    published = paper(info, seeds[0])
    return found | ({"paper": published} if published else {})


def paper(info, folds):
    """The paper's numbers for `columns`, if the run is comparable, else (). A weight file is taken at its word.

    Comparable: on (nearly) all usable samples of its sessions, all folds of five or all subjects, its settings.
    """
    loso, counts = info["protocol"] == "loso", info["counts"]
    unchanged = all(name == "weights" and value != "none" for name, value in info["changed"].items())
    usual = list(counts) == ["casme2"] if loso else list(counts) == data.STREAM and info["fold_count"] == 5
    enough = usual and all(count["samples"] >= 0.95 * prepare.SOURCES[name].usable for name, count in counts.items())
    if info["synthetic"] or info["preset"] != "paper" or not unchanged or not enough or len(folds) < info["fold_count"]:
        return ()
    return (TABLE2 | TABLE3).get((info["protocol"], info["backbone"], info["method"]), ())


# ---- text and files --------------------------------------------------------------------------------------------------
def cells(values, spreads=()):
    """Numbers as a table shows them."""
    words = ["-" if np.isnan(value) else f"{value:.2f}" for value in values]
    return [f"{word} ± {spread:.2f}" for word, spread in zip(words, spreads)] if len(spreads) else words


def span(low, high):
    """Two ends as a table shows them."""
    return "-" if np.isnan(low) else f"{low:.1f} to {high:.1f}"


def grid(head, lines):
    """A Markdown table; lines that are too short end with -."""
    lines = [head, ["---"] * len(head), *(line + ["-"] * (len(head) - len(line)) for line in lines)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def tables(groups, how=None):
    """Rows {title: [row, ...]} as Markdown, a table per title, in the columns of the paper's Tables 2 and 3."""
    text = ["Accuracy in %: mean ± standard deviation over folds, LOSO pooled. avg, last: the paper's A-bar, A-tilde."]
    text += ["The 95 % intervals are of the accuracy pooled over folds, by drawing subjects again."]
    for name, table in groups.items():
        _, first, seeds = max(table, key=lambda row: len(row[2][0]))  # the row with the most folds
        loso, several = first["protocol"] == "loso", any(len(seeds) > 1 for _, _, seeds in table)
        shown, i, measure = ("pooled", 0, "") if loso else ("mean", -1, " accuracy")
        head = ["backbone", "method", *columns(first), f"{columns(first)[i]}, 95 %"]
        head += [f"{columns(first)[i]} of the seeds"] * several + ["last by prob"] * (not loso and not how)
        lines = [["-", "always the commonest emotion", *cells(numbers(first, seeds[:1], "majority")[shown])]]
        notes, alike = [], {}
        for _, info, seeds in table:
            merge = lead(info, seeds[0], how)
            found = numbers(info, seeds, merge)
            missing = f" ({len(seeds[0])} of {info['fold_count']} folds)" * (len(seeds[0]) < info["fold_count"])
            line = [info["backbone"], info["label"] + f", by {merge}" * (merge != (how or "sum")) + missing]
            ends = [(f"95 % low{measure}", f"95 % high{measure}"), *[("lowest seed", "highest seed")] * several]
            spans = [span(found[low][i], found[high][i]) if low in found else "-" for low, high in ends]
            by_prob = cells(numbers(info, seeds, "prob")[shown][-1:]) if "prob" in info["merges"] else []
            lines.append((line + cells(found[shown], found.get("std", ())) + spans + by_prob)[: len(head)])
            if paper(info, seeds[0]):
                words = f"{label(info)}, the paper, on its own preparation"
                lines.append([info["backbone"], words, *cells(paper(info, seeds[0]))])
            files = [saved for folds in seeds for saved in folds.values()]
            mixed = [word for word in ("threads", "processor") if len({str(file[word]) for file in files}) > 1]
            notes += [f"\nmixed: the folds of {' '.join(line)} differ in {' and '.join(mixed)}"] * bool(mixed)
            one, other = but_seed(info), but_seed(alike.setdefault((info["backbone"], label(info)), info))
            differ = [word for word in one | other if one.get(word) != other.get(word)]
            notes += [f"\nnot one row: the runs of {' '.join(line)} differ in {' and '.join(differ)}"] * bool(differ)
        text += [f"\n**{name}**" + f", merged by {how}" * (how not in (None, "sum")), "", grid(head, lines), *notes]
    return "\n".join(text)


def details(info, seeds, how=None):
    """All numbers by every merge, and the confusion matrix of the lead merge at the end, as Markdown."""
    merge, emotions = lead(info, seeds[0], how), list(next(iter(seeds[0].values()))["emotions"])
    found = [(way, *pair) for way in ways(info, seeds[0]) for pair in numbers(info, seeds, way).items()]
    lines = [[way, what, *cells(values)] for way, what, values in found]
    results = [protocols.pooled(folds, len(info["counts"]) - 1, merge)[:2] for folds in seeds]
    true, predicted = np.concatenate(results, 1)
    confusion = [[word, *np.bincount(predicted[true == e], minlength=len(emotions))] for e, word in enumerate(emotions)]
    head = [f"true \\ predicted, by {merge}, pooled, at the end", *emotions]
    return grid(["merged by", "what", *columns(info)], lines) + "\n\n" + grid(head, confusion)


def is_meant(run, word):
    """Whether a word of --compare means a run: it is the run's label, its folder or one above."""
    here, there = (os.path.join(os.path.abspath(path), "") for path in (run[0], word))
    return word == label(run[1]) or here.startswith(there)


def compare(groups, words, how=None):
    """The difference between two rows, each meant by a label or a folder, in all tables that have both, as Markdown.

    groups are find_runs's. What has no backbone, such as pixels, is compared on every backbone of the other. Ends with
    one line where a word means no run, or several rows of a table, or where images, folds or finished folds differ.
    """
    text, alone, runs = [], {}, sum(groups.values(), [])
    for word in words:
        if not any(is_meant(run, word) for run in runs):
            known = ", ".join(sorted({label(info) for _, info, _ in runs}))
            sys.exit(f"error: --compare {word}: no such run; there are {known}, and their folders")
    for name, runs in groups.items():
        meant, lines = [[run for run in runs if is_meant(run, word)] for word in words], []
        for backbone in sorted({info["backbone"] for _, info, _ in sum(meant, [])} - {"none"}) or ["none"]:
            pair = [rows([run for run in own if run[1]["backbone"] in (backbone, "none")]) for own in meant]
            if max(map(len, pair)) > 1:
                sys.exit(f"error: --compare: a word means several rows of {name}, {backbone}; name folders")
            if not all(pair):
                for word in (word for word, own in zip(words, pair) if own):
                    alone.setdefault(f"{word} in {name}", []).append(backbone)
                continue
            pair = [own[0] for own in pair]
            done = [" ".join(map(str, seeds[0])) for _, _, seeds in pair]
            if done[0] != done[1]:
                sys.exit(f"error: --compare: {words[0]} has folds {done[0]}, {words[1]} {done[1]} ({name}, {backbone})")
            counts = [[by_subject(folds, lead(info, folds, how)) for folds in seeds] for _, info, seeds in pair]
            value, low, high, p = difference(*counts)
            lines += [[backbone, " - ".join(info["label"] for _, info, _ in pair), *(f"{v:+.2f}" for v in value)],
                      ["", "95 %", *(f"{v:+.2f} to {w:+.2f}" for v, w in zip(low, high))],
                      ["", "p", *(f"{v:.4f}" for v in p)]]  # fmt: skip
        if lines:
            head = ["backbone", "difference", *columns(runs[0][1])[: 1 if runs[0][1]["protocol"] == "loso" else -1]]
            text += [f"**{name}**", grid(head, [line[: len(head)] for line in lines])]
    alone = [f"{place} ({', '.join(backbones)})" for place, backbones in alone.items()]
    if not text:
        sys.exit(f"error: --compare: no table has both, but {'; '.join(alone)}")
    print("".join(f"note: nothing to compare with {place}\n" for place in alone), end="", file=sys.stderr)
    return "\n\n".join(["Accuracy, pooled over folds, in points: first less second; interval and p by subject.", *text])


def write_csv(groups, path):
    """All rows, one line per row and merge: what they are, and all numbers but the confusion matrix."""
    lines, words = [], "method backbone protocol preset synthetic weights images folds fold_count".split()
    for folders, info, seeds in sum(groups.values(), []):
        emotions = next(iter(seeds[0].values()))["emotions"]
        for way in ways(info, seeds[0]):
            line = {word: info[word] for word in words} | {"finished": len(seeds[0]), "merge": way}
            line |= {"seeds": " ".join(map(str, info["seeds"])), "folders": ";".join(folders)}
            line |= {"sessions": "+".join(info["counts"]), "changed": label(info).partition(" ")[2]}
            for name, count in info["counts"].items():
                line |= {f"{what} {name}": count[what] for what in ("samples", "subjects")}
            for what, values in numbers(info, seeds, way).items():
                line |= {f"{what} {column}": f"{value:.4f}" for column, value in zip(columns(info), values)}
            hits, true, _ = np.sum([by_subject(folds, way)[0][:, -1].sum(1) for folds in seeds], 0)  # (E,) each
            line |= {f"recall {emotion}": f"{100 * h / n:.4f}" for emotion, h, n in zip(emotions, hits, true) if n}
            lines.append(line)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)))
    writer.writeheader()
    writer.writerows(lines)
    protocols.write(path, text.getvalue().encode())


def spread(values, gap):
    """Places for labels at `values`: in the same order, at least `gap` apart; the mean of pushing up and down."""
    order, steps = np.argsort(values, kind="stable"), gap * np.arange(len(values))
    apart = np.array(values)[order] - steps
    places = (np.maximum.accumulate(apart) + np.minimum.accumulate(apart[::-1])[::-1]) / 2 + steps
    return places[np.argsort(order)]


def plot(groups, path, how=None):
    """Accuracy over sessions: a line of panels per title, a panel per backbone; open marks are the paper's numbers.

    Every method has a colour and a mark of its own, controls are grey and dashed, and names stand at the lines' ends.
    """
    try:
        from matplotlib import figure
    except ImportError:
        sys.exit("error: --plot needs the package matplotlib: pip install matplotlib")
    groups = {name: table for name, table in groups.items() if len(table[0][1]["counts"]) > 1}
    if not groups:
        sys.exit("error: --plot needs a run with more than one session")
    infos = [info for _, info, _ in sum(groups.values(), [])]
    backbones = sorted({info["backbone"] for info in infos} - {"none"}) or ["none"]
    methods, controls = (dict.fromkeys(label(i) for i in infos if is_control(i) == kind) for kind in (False, True))
    styles = {name: {"color": COLOURS[i % 8], "marker": MARKS[i % 11]} for i, name in enumerate(methods)}
    styles |= {name: {"color": GREYS[i % 4], "ls": DASHES[i % 5]} for i, name in enumerate(controls)}
    height = 1.3 + 0.19 * max(10, *map(len, groups.values()))  # inches
    width = max(6, len(backbones) * (3.2 + 0.085 * max(len(info["label"]) for info in infos)))
    whole = figure.Figure((width, height * len(groups)), layout="constrained")
    for part, (name, table) in zip(whole.subfigures(len(groups), 1, squeeze=False)[:, 0], groups.items()):
        lines = [(info, numbers(info, seeds, lead(info, seeds[0], how))["mean"][:-2], paper(info, seeds[0])[:-2])
                 for _, info, seeds in table]  # fmt: skip
        low, high = (end(value for _, *both in lines for a in both for value in a) for end in (min, max))
        words = name.replace(", images", ",\nimages") + f", merged by {how}" * (how not in (None, "sum"))
        part.suptitle(words, x=0.01, ha="left", fontsize=9)
        axes, end = part.subplots(1, len(backbones), sharey=True, squeeze=False)[0], len(table[0][1]["counts"]) - 1
        axes[0].set_ylabel("accuracy, %")
        for word, axis in zip(backbones, axes):
            axis.set(title=word, xlim=(-0.1, end + 0.1), ylim=(low - 3, high + 3))
            axis.set_xticks(range(end + 1), table[0][1]["counts"])
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.3)
            own = [line for line in lines if line[0]["backbone"] in (word, "none")]  # what needs no network is in each
            places = spread([ours[-1] for _, ours, _ in own], 0.18 * (high - low + 6) / (height - 1.1))
            for (info, ours, papers), y in zip(own, places):
                style = styles[label(info)]
                axis.plot(ours, ms=6, **style)
                axis.plot(papers, ms=9, mfc="none", **style | {"ls": ""})
                axis.plot([end, end + 0.3], [ours[-1], y], color=style["color"], lw=0.5, clip_on=False)
                axis.plot([end + 0.3, end + 0.7], [y, y], ms=6, markevery=[1], clip_on=False, **style)
                axis.text(end + 0.8, y, info["label"], color=style["color"], va="center")
    content = io.BytesIO()
    whole.savefig(content, format=path[-3:], dpi=120, bbox_inches="tight")
    protocols.write(path, content.getvalue())


def main():
    p = common.parser(__doc__)
    p.add_argument("results", help="the folder that --out named, or one below it")
    p.add_argument("--how", choices=rch.WAYS, help="how rows are merged (default: each run's own first way)")
    p.add_argument("--each-seed", action="store_true", help="runs that differ in the seed alone are rows of their own")
    p.add_argument("--compare", nargs=2, metavar="RUN", help="only their difference; labels of the tables, or folders")
    p.add_argument("--details", action="store_true", help="also all numbers by every merge, and the confusion matrix")
    p.add_argument("--csv", metavar="FILE", help="also write all numbers to a CSV file")
    p.add_argument("--plot", metavar="FILE.png", help="also draw accuracy over sessions (needs matplotlib)")
    args = p.parse_args()
    if args.csv == "" or args.plot is not None and args.plot[-4:] not in (".png", ".pdf", ".svg"):
        sys.exit("error: --csv takes the name of a file, --plot one that ends with .png, .pdf or .svg")
    if args.compare and (args.each_seed or args.details or args.csv or args.plot):
        sys.exit("error: --compare stands alone, or with --how")
    groups = find_runs(args.results)
    if args.compare:
        print(compare(groups, args.compare, args.how))
        return
    groups = {name: rows(runs, args.each_seed) for name, runs in groups.items()}
    if args.plot:
        plot(groups, args.plot, args.how)
    if args.csv:
        write_csv(groups, args.csv)
    print(tables(groups, args.how))
    for folders, info, seeds in sum(groups.values(), []) if args.details else ():
        print(f"\n### {', '.join(folders)}\n\n{details(info, seeds, args.how)}")


if __name__ == "__main__":
    common.launch(main, "the same command starts anew")
