"""The report: all runs below a folder as Markdown tables, beside the paper's numbers where they are comparable.

    python -m tools.report results                                  the newest run of every name
    python -m tools.report results --compare finetune ranpac        the difference of two runs, with interval and p
    python -m tools.report results --details                        also all that the tables have no room for
    python -m tools.report results --csv all.csv --plot all.png     also all numbers as a file, and drawn

Runs on other images, folds, sessions or presets have a table of their own. Runs that differ in the seed alone are one
line: means over seeds, on the folds that all of them have. Of several runs with one name (their scripts, data or
versions differ) the newest counts; the others are named in a note. Rows of scores are merged by each run's own first
way, or by --how (see rch.py). One person's samples are alike: intervals come from drawing subjects again, within each
session, and p from giving each subject's difference a random sign.

Below, a run is a dict of what its run.json says, with the arguments on the same level, and of what read_run adds. A
line of a table is a dict of what its first run is, and of what join_seeds adds. S subjects, E emotions, T sessions.
"""

import csv
import io
import json
import os
import re
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


# ---- runs on disk ----------------------------------------------------------------------------------------------------
def read_run(folder, about):
    """The run of a folder and of its run.json, without fold files that read_fold refuses; None if it is no run's."""
    try:
        info = about["info"]
        run = info["arguments"] | info | {"made": about["made"], "prepared": about["prepared"]}
        found = {fold: protocols.read_fold(folder, info, fold) for fold in range(info["fold_count"])}
    except (TypeError, KeyError):  # something else, such as a run of an older version
        return None
    random = run["changed"].get("weights") == "none"  # random weights differ from seed to seed, too
    other = ["arguments", "seed", "made", "prepared", *["weights"] * random]
    run["alike"] = {word: value for word, value in run.items() if word not in other}
    run["name"] = " ".join([run["method"], *(f"{name}={value}" for name, value in run["changed"].items())])
    run["control"] = os.path.join("controls", f"{run['method']}.py") in run["code"]
    folds = {fold: saved for fold, saved in found.items() if saved}  # {fold: {name: array}}
    return run | {"folders": [folder], "seeds": [run["seed"]], "trials": [folds]}  # of a line one each of all its runs


def find_runs(root):
    """Of every name below a folder the newest run with a finished fold: {title: [run, ...]}, sorted.

    The newest is the one whose run.json says so. A note names all runs that are passed by.
    """
    if not os.path.isdir(root):
        sys.exit(f"error: {root!r}: no such folder; it is what --out was, results by default")
    infos, newest, passed, groups = {}, {}, [], {}
    for folder, children, files in os.walk(root, onerror=lambda error: print(f"note: {error}", file=sys.stderr)):
        paths = [os.path.join(folder, child) for child in children]
        passed += [f"{path} (behind a link)" for path in paths if os.path.islink(path)]
        folds = [file for file in files if re.fullmatch(r"fold\d+\.npz", file)]
        try:
            with open(os.path.join(folder, "run.json"), encoding="utf-8") as file:
                about = json.load(file)
            infos[folder] = (about["made"], len(folds), about)
        except FileNotFoundError:
            passed += [f"{folder} (no run.json)"] if folds else []
        except OSError:
            passed.append(f"{folder} (unreadable)")
        except (ValueError, TypeError, KeyError):  # no JSON, or something else in it
            passed.append(f"{folder} (made by another version)")
    for folder in sorted(infos, key=lambda folder: infos[folder][0], reverse=True):
        _, count, about = infos[folder]
        name = os.path.dirname(os.path.abspath(folder))
        run = None if name in newest else read_run(folder, about)
        if run and run["trials"][0]:
            newest[name] = run
        elif name in newest:
            passed.append(f"{folder} (older; it has {count} folds, the newer {len(newest[name]['trials'][0])})")
        else:
            passed.append(f"{folder} ({'no finished fold' if run else 'made by another version'})")
    if passed:
        print(f"note: passed by: {', '.join(sorted(passed))}", file=sys.stderr)
    if not newest:
        sys.exit(f"error: {root}: holds no finished fold of any run")
    for run in sorted(newest.values(), key=lambda run: [run[word] for word in ("backbone", "control", "name", "seed")]):
        groups.setdefault(title_of(run), []).append(run)
    return dict(sorted(groups.items()))


def title_of(run):
    """What the lines of one table have in common."""
    source, counts = "synthetic stream" if run["synthetic"] else "data", run["counts"]
    in_sheets = [data.in_sheet(name) if name in data.DATASETS else None for name in counts]
    of = "" if None in in_sheets else f" of {sum(in_sheets):,}"
    tests = "" if run["tests"] == run["folds"] else f", tests {run['tests']}"
    return (f"{run['protocol'].upper()}, {source}, {', '.join(counts)}, {run['preset']} preset,"
            f" {sum(count['samples'] for count in counts.values()):,}{of} samples,"
            f" images {run['images']}, folds {run['folds']}{tests}")  # fmt: skip


def preparation(run):
    """How a run's images were made, as their prepare.json says; nothing where none told."""
    about = run["prepared"] or {}
    words = [f"{word} {about[word][:16]}" for word in ("source", "opencv", "coding", "crop") if word in about]
    known = about.get("sessions", {})
    words += [f"{name} {known[name]['frames']} frames {known[name]['crop']}" for name in run["counts"] if name in known]
    return "; ".join(words)


def made_otherwise(lines):
    """Of lines that stand together: {name: in what its code, versions, processor, ... are not those of the newest one}.

    Code is compared where the Python is the same: its hash is not the same on another one.
    """
    newest, found = {}, {}
    for line in sorted(lines, key=lambda line: line["made"], reverse=True):
        folds = [saved for trial in line["trials"] for saved in trial.values()]
        own = {(path, line["versions"].get("python")): digest for path, digest in line["code"].items()}
        own |= {(name, ""): version for name, version in line["versions"].items()}
        own |= {("preparation of the images", ""): preparation(line)}
        for word in ("threads", "processor", "device"):
            own[word, ""] = sorted({str(saved[word]) for saved in folds})
        words = [word[0] for word in own if own[word] != newest.setdefault(word, own[word])]
        if words:
            found[f"{line['backbone']} {line['label']}"] = ", ".join(words)
    return found


def join_seeds(runs, how=None, each_seed=False):
    """The lines of a table: of `runs`, those that differ in the seed alone are one, on the folds that all of them have.

    With `each_seed`, or where seeds have no fold in common, each is a line. `how` is the merge that is asked for.
    """
    alike, lines = {}, []
    for run in runs:
        key = json.dumps([run["alike"], run["seed"] if each_seed else None])
        alike.setdefault(key, {}).setdefault(run["seed"], run)  # a copy of a run is the same run
    for group in alike.values():
        shared = set.intersection(*(set(run["trials"][0]) for run in group.values()))
        for part in [[*group.values()]] if shared else [[run] for run in group.values()]:
            line = part[0] | {word: [run[word][0] for run in part] for word in ("folders", "seeds", "trials")}
            line["made"] = max(run["made"] for run in part)
            line["fold"] = next(iter(line["trials"][0].values()))  # the arrays of any fold
            line["ways"] = line["merges"][:1]  # the merges that mean something, its own first
            if len(line["fold"]["row_emotion"]) > len(line["fold"]["emotions"]):  # else there is nothing to merge
                more = rch.WAYS if "prob" in line["merges"] else ("sum", "max")  # prob and centered: logits only
                line["ways"] = list(dict.fromkeys([*line["merges"], *more]))
            line["merge"] = how if how in line["ways"] else line["ways"][0]
            line["label"] = line["name"]
            if len(part) > 1:
                line["label"] += f", {len(part)} seeds"
                line["trials"] = [{fold: folds[fold] for fold in sorted(shared)} for folds in line["trials"]]
            elif each_seed or line["seed"]:  # nothing is said of seed 0, the default
                line["label"] += f", seed {line['seed']}"
            if line["merge"] != (how or "sum"):
                line["label"] += f", by {line['merge']}"
            if len(line["trials"][0]) < line["fold_count"]:
                line["label"] += f" ({len(line['trials'][0])} of {line['fold_count']} folds)"
            lines.append(line | {"paper": paper(line)})
    return lines


def published():
    """The lines of the paper's Tables 2 and 3 as in paper.csv: {column: word}; it gives no standard deviations."""
    with open(os.path.join(os.path.dirname(__file__), "paper.csv"), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def paper(line):
    """The paper's numbers for `columns`, if the line is comparable, else [].

    Comparable: its settings and checkpoints, on (nearly) all usable samples of its sessions, cropped as there where
    that is known, all folds of five or all subjects.
    """
    loso, counts, known = line["protocol"] == "loso", line["counts"], (line["prepared"] or {}).get("sessions", {})
    usual = list(counts) == (["casme2"] if loso else data.STREAM) and (loso or line["fold_count"] == 5)
    whole = len(line["trials"][0]) == line["fold_count"] and not line["synthetic"] and line["preset"] == "paper"
    if line["changed"] or not (usual and whole):
        return []
    for name, count in counts.items():
        source = prepare.SOURCES[name]
        cropped = known[name]["crop"] == "landmarks" if name in known else source.crop
        if count["samples"] < 0.95 * source.usable or cropped != source.crop:
            return []
    for theirs in published():
        if all(theirs[word] == line[word] for word in ("protocol", "backbone", "method")):
            return [float(theirs[column]) for column in columns(line)]
    return []


# ---- subjects --------------------------------------------------------------------------------------------------------
FROM_COUNTS = {  # measures of counts (..., E) of hits, true and predicted; true is nan for an emotion without a sample
    "accuracy": lambda hits, true, predicted: hits.sum(-1) / np.nansum(true, -1),
    "UF1": lambda hits, true, predicted: np.nanmean(2 * hits / (true + predicted), -1),
    "UAR": lambda hits, true, predicted: np.nanmean(hits / true, -1),
}


def by_subject(line, how):
    """Counts (3, seeds, T, S, E) of hits, true and predicted emotions in each subject's tests after each session.

    And the session (S,) that each subject is of: a subject's number means one person within a session only.
    """
    pairs = lambda saved: list(zip(saved["session"].tolist(), saved["subjects"].tolist()))  # noqa: E731
    people = sorted({pair for saved in line["trials"][0].values() for pair in pairs(saved)})
    counts = np.zeros((3, len(line["trials"]), len(line["counts"]), len(people), len(line["fold"]["emotions"])))
    for seed, folds in enumerate(line["trials"]):
        for saved in folds.values():
            subject = np.array([people.index(pair) for pair in pairs(saved)])
            for t in range(len(line["counts"])):
                true, predicted, _ = protocols.outcome(saved, t, how)
                own, hit = subject[: len(true)], true == predicted
                np.add.at(counts[0, seed, t], (own[hit], true[hit]), 1)
                np.add.at(counts[1, seed, t], (own, true), 1)
                np.add.at(counts[2, seed, t], (own, predicted), 1)
    return counts, np.array([session for session, _ in people])


def draw(session):
    """How often each subject is in each draw, (DRAWS, S): of every session as many as it has, with replacement."""
    random, sizes = np.random.default_rng(0), np.unique(session, return_counts=True)[1]
    return np.concatenate([random.multinomial(size, np.full(size, 1 / size), DRAWS) for size in sizes], 1)


def with_average(a):
    """Values (T, ...) with their mean and the last one behind: (T + 2, ...)."""
    return np.concatenate([a, a.mean(0, keepdims=True), a[-1:]])


def intervals(counts, session):
    """95 % intervals in %, pooled over folds, of the mean over seeds: {measure: (2, T + 2) low and high}.

    counts, session are by_subject's. A draw of subjects serves all of S1..ST, so their mean has an interval too. Who
    is alone in a session gives none.
    """
    hits, true, predicted = draw(session) @ counts  # (seeds, T, DRAWS, E) each
    true = np.where(true > 0, true, np.nan)
    percent = 100 if np.unique(session, return_counts=True)[1].min() > 1 else np.nan
    values = {name: percent * measure(hits, true, predicted).mean(0) for name, measure in FROM_COUNTS.items()}
    return {name: np.quantile(with_average(value), (0.025, 0.975), 1) for name, value in values.items()}


def difference(a, b):
    """(value, low, high, p), (T + 1,) each: accuracy of line `a` less that of line `b`, of S1..ST and avg, in %.

    And {seed: value} of the seeds that both have. Both have the same samples; correctness is averaged over seeds first.
    p is how often random signs of all subjects' summed differences give a sum of this size or a larger one.
    """
    (counts, session), (others, _) = by_subject(a, a["merge"]), by_subject(b, b["merge"])
    total = counts[1, 0].sum(-1)  # (T, S)
    right, others = 100 * counts[0].sum(-1), 100 * others[0].sum(-1)  # (seeds, T, S) each
    each = {}
    for seed in [seed for seed in a["seeds"] if seed in b["seeds"]]:
        own = right[a["seeds"].index(seed)] - others[b["seeds"].index(seed)]
        each[seed] = with_average(own.sum(1) / total.sum(1))[:-1]
    gain = right.mean(0) - others.mean(0)  # (T, S)
    share = with_average(gain / total.sum(1, keepdims=True))[:-1]  # (T + 1, S): its sum over subjects is the value
    drawn, signs = draw(session), np.random.default_rng(0).choice((-1.0, 1.0), (FLIPS, len(session)))
    low, high = np.quantile(with_average((gain @ drawn.T) / (total @ drawn.T))[:-1], (0.025, 0.975), 1)
    large = abs(share @ signs.T) > abs(share.sum(1, keepdims=True)) - 1e-9  # equal sums may differ in their last bits
    return share.sum(1), low, high, (large.sum(1) + 1) / (FLIPS + 1), each


# ---- numbers ---------------------------------------------------------------------------------------------------------
def columns(line):
    """The columns of the paper's Table 2, or for LOSO those of its Table 3."""
    sessions = [f"S{t + 1}" for t in range(len(line["counts"]))]
    return list(MEASURES) if line["protocol"] == "loso" else [*sessions, "avg", "last"]


def numbers(line, how):
    """What can be said of a line by one merge: {what: values for the first of `columns`}, in % (sizes of scores not).

    Means over seeds; std is over folds, of these means. `tests after St`: accuracy on the tests of each session after
    training on session t, pooled. Backward transfer of a session (arXiv 1706.08840): its accuracy at the end less that
    after its own training, below 0 where it was forgotten. Forgetting (arXiv 1801.10112): its best accuracy ever less
    that at the end, never below 0, since the end may be the best. The last session has neither.
    """
    found, seeds, times = {}, line["trials"], range(len(line["counts"]))
    counts, session = by_subject(line, how)
    results = [[protocols.pooled(folds, t, how)[:2] for folds in seeds] for t in times]
    pooled, ends = {}, intervals(counts, session)
    for name, measure in MEASURES.items():
        pooled[name] = with_average(np.array([[100 * measure(*pair) for pair in pairs] for pairs in results]))
        ends.setdefault(name, np.full((2, len(times) + 2), np.nan))
    if line["protocol"] == "loso":  # a fold is one person: only pooled numbers mean anything
        of_seeds = np.array([values[0] for values in pooled.values()])  # (measures, seeds)
        found["pooled"] = of_seeds.mean(1)
        found["95 % low"], found["95 % high"] = np.transpose([ends[name][:, 0] for name in MEASURES])
    else:
        curves = np.array([protocols.curve(folds, how) for folds in seeds])  # (seeds, folds, T + 2)
        of_seeds, of_folds = curves.mean(1).T, curves.mean(0)
        found["mean"] = of_folds.mean(0)
        if len(of_folds) > 1:
            found["std"] = of_folds.std(0, ddof=1)
        for name, values in pooled.items():
            found[f"pooled {name}"] = values.mean(1)
            found[f"95 % low {name}"], found[f"95 % high {name}"] = ends[name]
    if len(seeds) > 1:
        found["lowest seed"], found["highest seed"] = of_seeds.min(1), of_seeds.max(1)
        found["std over seeds"] = of_seeds.std(1, ddof=1)
    if len(times) > 1:
        hits, true = np.stack([counts[:2, :, :, session == s].sum((-2, -1)) for s in times], -1)  # (seeds, T, T) each
        matrix = 100 * hits / np.where(true > 0, true, np.nan)  # on the tests of each session (last), after each
        for t in times:
            found[f"tests after S{t + 1}"] = matrix.mean(0)[t]
        end, own = matrix[:, -1, :-1], np.stack([matrix[:, s, s] for s in times[:-1]], 1)  # (seeds, T - 1) each
        for what, values in {"backward transfer": end - own,
                             "forgetting": np.nanmax(matrix[:, :, :-1], 1) - end}.items():  # fmt: skip
            found[what] = [*values.mean(0), np.nan, values.mean()]
        # Long training makes large scores, and in eq. 3's sum a session with large scores decides.
        final = np.concatenate([saved[f"scores_{times[-1]}"] for folds in seeds for saved in folds.values()])
        sizes = abs(final - final.mean(1, keepdims=True)).mean(0)  # (R,)
        rows = [sizes[line["fold"]["row_session"] == s] for s in times]  # not every session brings a new row
        found["size of scores"] = [own.mean() if len(own) else np.nan for own in rows]
    return found | ({"paper": line["paper"]} if line["paper"] else {})


# ---- text and files --------------------------------------------------------------------------------------------------
def cells(values, spreads=()):
    """Numbers as a table shows them."""
    words = ["-" if np.isnan(value) else f"{value:.2f}" for value in values]
    return [f"{word} ± {spread:.2f}" for word, spread in zip(words, spreads)] if len(spreads) else words


def span(found, low, high, i):
    """Column i of two of `numbers`' values, as a table shows an interval."""
    if low not in found or np.isnan(found[low][i]):
        return "-"
    return f"{found[low][i]:.1f} to {found[high][i]:.1f}"


def grid(head, lines):
    """A Markdown table; lines that are too short end with -, those that are too long are cut."""
    lines = [head, ["---"] * len(head), *([*line, *["-"] * len(head)][: len(head)] for line in lines)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def tables(groups, how):
    """Lines {title: [line, ...]} as Markdown, a table per title, in the columns of the paper's Tables 2 and 3."""
    text = ["Accuracy in %: mean ± standard deviation over folds, LOSO pooled. avg, last: the paper's A-bar, A-tilde."]
    text += ["The 95 % intervals are of the accuracy pooled over folds, by drawing subjects again."]
    for title, lines in groups.items():
        fullest = max(lines, key=lambda line: len(line["trials"][0]))
        loso, several = fullest["protocol"] == "loso", any(len(line["seeds"]) > 1 for line in lines)
        shown, i, measure = ("pooled", 0, "") if loso else ("mean", -1, " accuracy")
        head = ["backbone", "method", *columns(fullest), f"{columns(fullest)[i]}, 95 %"]
        head += [f"{columns(fullest)[i]} of the seeds"] * several + ["last by prob"] * (not loso and not how)
        table = [["-", "always the commonest emotion", *cells(numbers(fullest, "majority")[shown])]]
        notes, alike, others = [], {}, made_otherwise(lines)
        for line in lines:
            found = numbers(line, line["merge"])
            name = f"{line['backbone']} {line['label']}"
            own = [line["backbone"], line["label"] + " †" * (name in others)]
            own += cells(found[shown], found.get("std", ()))
            own.append(span(found, f"95 % low{measure}", f"95 % high{measure}", i))
            if several:
                spread = f" (± {found['std over seeds'][i]:.1f})" if "std over seeds" in found else ""
                own.append(span(found, "lowest seed", "highest seed", i) + spread)
            if head[-1] == "last by prob" and "prob" in line["merges"]:
                own += cells(numbers(line, "prob")["mean"][-1:])
            table.append(own)
            if line["paper"]:
                words = f"{line['name']}, the paper, on its own preparation"
                table.append([line["backbone"], words, *cells(line["paper"])])
            for word in ("threads", "processor", "device"):
                if len({str(saved[word]) for folds in line["trials"] for saved in folds.values()}) > 1:
                    notes.append(f"\nmixed: the folds of {name} differ in {word}")
            one, other = line["alike"], alike.setdefault((line["backbone"], line["name"]), line["alike"])
            differ = [word for word in one | other if one.get(word) != other.get(word)]
            if differ:
                notes.append(f"\nnot one line: the runs of {name} differ in {' and '.join(differ)}")
        notes += [f"\n† not made as the newest line here: {name} ({what})" for name, what in others.items()]
        notes += [f"\nimages: {words}" for words in dict.fromkeys(map(preparation, lines)) if words]
        text += [f"\n**{title}**", "", grid(head, table), *notes]
    return "\n".join(text)


def details(line):
    """All numbers by every merge, and the confusion matrix of the line's own merge after each session, as Markdown."""
    emotions, table = line["fold"]["emotions"].tolist(), []
    for way in line["ways"]:
        table += [[way, what, *cells(values)] for what, values in numbers(line, way).items()]
    text = [grid(["merged by", "what", *columns(line)], table)]
    for t, session in enumerate(line["counts"]):
        counts = [[word, *own] for word, own in zip(emotions, confusion(line, t, line["merge"]).tolist())]
        text.append(grid([f"true \\ predicted, by {line['merge']}, pooled, after {session}", *emotions], counts))
    return "\n\n".join(text)


def confusion(line, t, how):
    """How often each emotion (first axis) was taken for each one after session t, all folds and seeds: (E, E)."""
    true, predicted = np.concatenate([protocols.pooled(folds, t, how)[:2] for folds in line["trials"]], 1)
    counts = np.zeros((len(line["fold"]["emotions"]),) * 2, int)
    np.add.at(counts, (true, predicted), 1)
    return counts


def is_meant(run, word):
    """Whether a word of --compare means a run: it is the run's name, its folder or one above."""
    here, there = (os.path.join(os.path.abspath(path), "") for path in (run["folders"][0], word))
    return word == run["name"] or here.startswith(there)


def compare(groups, words, how):
    """The difference between two lines, each meant by a name or a folder, in all tables that have both, as Markdown.

    groups are find_runs's. What has no backbone, such as pixels, is compared on every backbone of the other. Ends with
    one line where a word means no run, or several lines of a table, or where images, folds or finished folds differ.
    """
    text, alone, everything, others = [], [], sum(groups.values(), []), {}
    for word in words:
        if not any(is_meant(run, word) for run in everything):
            known = ", ".join(sorted({run["name"] for run in everything}))
            sys.exit(f"error: --compare {word}: no such run; there are {known}, and their folders")
    for title, runs in groups.items():
        meant, table = [[run for run in runs if is_meant(run, word)] for word in words], []
        for backbone in sorted({run["backbone"] for run in sum(meant, [])} - {"none"}) or ["none"]:
            pair = [join_seeds([run for run in own if run["backbone"] in (backbone, "none")], how) for own in meant]
            place = f"{title}, {backbone}"
            if max(map(len, pair)) > 1:
                sys.exit(f"error: --compare: a word means several lines of {place}; name folders")
            if not all(pair):
                alone += [f"{word} in {place}" for word, own in zip(words, pair) if own]
                continue
            (a,), (b,) = pair
            others |= made_otherwise([a, b])
            done = [" ".join(map(str, line["trials"][0])) for line in (a, b)]
            if done[0] != done[1]:
                sys.exit(f"error: --compare: {words[0]} has folds {done[0]}, {words[1]} {done[1]}, in {place}")
            value, low, high, p, each = difference(a, b)
            table.append([backbone, f"{a['label']} - {b['label']}", *(f"{v:+.2f}" for v in value)])
            table.append(["", "95 %", *(f"{v:+.2f} to {w:+.2f}" for v, w in zip(low, high))])
            table.append(["", "p", *(f"{v:.4f}" for v in p)])
            for seed, own in each.items() if len(each) > 1 else ():
                table.append(["", f"seed {seed}", *(f"{v:+.2f}" for v in own)])
        if table:
            shown = ["accuracy"] if runs[0]["protocol"] == "loso" else columns(runs[0])[:-1]
            text += [f"**{title}**", grid(["backbone", "difference", *shown], table)]
    if not text:
        sys.exit(f"error: --compare: no table has both, but {'; '.join(alone)}")
    for name, what in others.items():
        text.append(f"not made as the other: {name} ({what})")
    for place in alone:
        print(f"note: nothing to compare with {place}", file=sys.stderr)
    about = (
        "Accuracy, pooled over folds, in points: first less second. Interval and p are by subject: they do not cover"
    )
    return "\n\n".join([f"{about} the choice of the seed.", *text])


def write_csv(groups, path):
    """All lines, one per merge: what they are, how they were made, and all numbers; seconds are a fold's mean."""
    table, words = [], "method backbone protocol preset synthetic weights images folds fold_count".split()
    for line in sum(groups.values(), []):
        for way in line["ways"]:
            own = {word: line[word] for word in words} | {"finished": len(line["trials"][0]), "merge": way}
            own |= {"seeds": " ".join(map(str, line["seeds"])), "folders": ";".join(line["folders"])}
            own |= {"sessions": "+".join(line["counts"]), "changed": line["name"].partition(" ")[2]}
            for name, count in line["counts"].items():
                own |= {f"{what} {name}": count[what] for what in ("samples", "subjects")}
            for what, values in numbers(line, way).items():
                own |= {f"{what} {column}": f"{value:.4f}" for column, value in zip(columns(line), values)}
            saved = [saved for folds in line["trials"] for saved in folds.values()]
            own |= {f"version of {name}": version for name, version in line["versions"].items()}
            own["device"] = ";".join(sorted({str(fold["device"]) for fold in saved}))
            for t in range(len(line["counts"])):
                counts, emotions = confusion(line, t, way), line["fold"]["emotions"]
                own[f"seconds S{t + 1}"] = f"{np.mean([fold['seconds'][t] for fold in saved]):.2f}"
                for e in np.flatnonzero(counts.sum(1)):
                    own[f"recall {emotions[e]} S{t + 1}"] = f"{100 * counts[e, e] / counts[e].sum():.4f}"
                    own |= {f"{emotions[e]} as {word} S{t + 1}": n for word, n in zip(emotions, counts[e]) if n}
            table.append(own)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for own in table for key in own)))
    writer.writeheader()
    writer.writerows(table)
    protocols.write(path, os.fsencode(text.getvalue()))


def plot(groups, path):
    """Accuracy over sessions: a row of panels per title, a panel per backbone; open marks are the paper's numbers.

    Every method has a colour and a mark of its own, controls are grey and dashed; names stand in the order of the ends.
    """
    try:
        from matplotlib import figure
    except ImportError:
        sys.exit("error: --plot needs the package matplotlib: pip install matplotlib")
    groups = {title: lines for title, lines in groups.items() if len(lines[0]["counts"]) > 1}
    if not groups:
        sys.exit("error: --plot needs a run with more than one session")
    everything = sum(groups.values(), [])
    backbones = sorted({line["backbone"] for line in everything} - {"none"}) or ["none"]
    methods, controls = (dict.fromkeys(i["name"] for i in everything if i["control"] == kind) for kind in (False, True))
    styles = {name: {"color": COLOURS[i % 8], "marker": MARKS[i % 11]} for i, name in enumerate(methods)}
    styles |= {name: {"color": GREYS[i % 4], "ls": DASHES[i % 5]} for i, name in enumerate(controls)}
    seeds = {len(line["seeds"]) for line in everything}
    shared = f", {max(seeds)} seeds" if len(seeds) == 1 and max(seeds) > 1 else ""  # told in the title instead
    short = lambda line: line["label"].replace(shared, "")  # noqa: E731
    height = 1.2 + 0.19 * max(10, *(len(set(map(short, lines))) for lines in groups.values()))  # inches
    width = 2.7 * len(backbones) + 0.6 + 0.085 * max(map(len, map(short, everything)))
    whole = figure.Figure((max(4.4, width), height * len(groups)), layout="constrained")
    for part, (title, lines) in zip(whole.subfigures(len(groups), 1, squeeze=False)[:, 0], groups.items()):
        part.suptitle(title.partition(", images")[0] + shared, x=0.01, ha="left", fontsize=9, wrap=True)
        curves = [(numbers(line, line["merge"])["mean"][:-2], line) for line in lines]
        ends = {}
        for values, line in curves:
            ends.setdefault(short(line), []).append(values[-1])
        order = sorted(ends, key=lambda label: -np.mean(ends[label]))  # by their ends, from the top
        curves.sort(key=lambda curve: order.index(short(curve[1])))
        axes, named = part.subplots(1, len(backbones), sharey=True, squeeze=False)[0], {}
        axes[0].set_ylabel("accuracy, %")
        for backbone, axis in zip(backbones, axes):
            axis.set_title(backbone)
            axis.set_xticks(range(len(lines[0]["counts"])), lines[0]["counts"])
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=9)
            axis.grid(alpha=0.3)
            for values, line in curves:
                if line["backbone"] in (backbone, "none"):  # what has no network stands in each panel
                    style = styles[line["name"]]
                    (named[short(line)],) = axis.plot(values, ms=6, **style)
                    axis.plot(line["paper"][:-2], ms=9, mfc="none", **style | {"ls": ""})
        axes[-1].legend([named[label] for label in order], order, loc="center left", bbox_to_anchor=(1, 0.5),
                        frameon=False, labelcolor="linecolor")  # fmt: skip
    content = io.BytesIO()
    whole.savefig(content, format=path[-3:], dpi=120, bbox_inches="tight")
    protocols.write(path, content.getvalue())


def main():
    p = common.parser(__doc__)
    p.add_argument("results", help="the folder that --out named, or one below it")
    p.add_argument("--how", choices=rch.WAYS, help="how rows are merged (default: each run's own first way)")
    p.add_argument("--each-seed", action="store_true", help="runs that differ in the seed alone are lines of their own")
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
    merged = "" if args.how in (None, "sum") else f", merged by {args.how}"
    groups = {title + merged: join_seeds(runs, args.how, args.each_seed) for title, runs in groups.items()}
    if args.plot:
        plot(groups, args.plot)
    if args.csv:
        write_csv(groups, args.csv)
    print(tables(groups, args.how))
    for line in sum(groups.values(), []) if args.details else ():
        print(f"\n### {', '.join(line['folders'])}\n\n{details(line)}")


if __name__ == "__main__":
    common.launch(main, "the same command starts anew")
