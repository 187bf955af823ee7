"""The evaluation protocol: folds, fold binding, metrics, and the lines and files of a run.

A trial binds fold i of every session: the model trains on session t without its fold i, and after session t it is
tested on the fold-i parts of sessions 1..t together. Five trials make a run. Every sample has then been tested once
after its own session and once after each later one, by a model that never saw it (SLCV: that never saw its person).

    A_t     accuracy after session t     avg   mean of A_1..A_T (the paper's A-bar)     last   A_T (its A-tilde)

Means are over folds, as in the paper (arXiv 2501.19111, protocols: section 3.2, metrics: 3.3); standard deviations
(n - 1) are ours. `python -m tools.report` tells what else is in a run's files.

Shapes: N samples of a session, n samples tested after a session, R rows, E emotions, T sessions.
"""

import ast
import hashlib
import io
import json
import os
import platform
import re
import sys
import time
from importlib import metadata

import numpy as np
import torch

import data
import rch

HERE = os.path.dirname(os.path.realpath(__file__))
K = 5  # folds, as the paper


# ---- folds -----------------------------------------------------------------------------------------------------------
def split(subjects, protocol, k=K, seed=42):
    """Test indices of each fold of one session: a list of sorted int arrays; every sample is in exactly one.

    subjects  (N,) int, the subject of each sample in the session's order
    slcv      Subject-Level Cross-Validation: fold i tests the subjects unique(subjects)[i::k]
    ilcv      Instance-Level: scikit-learn's KFold(k, shuffle=True, random_state=seed), written out
    loso      leave one subject out: one fold per subject
    Raises ValueError where there are too few subjects or samples.
    """
    subjects = np.asarray(subjects)
    people = np.unique(subjects)
    if protocol == "ilcv":
        if len(subjects) < k:
            raise ValueError(f"{len(subjects)} samples are too few for {k} folds")
        order = np.arange(len(subjects))
        np.random.RandomState(seed).shuffle(order)
        return [np.sort(part) for part in np.array_split(order, k)]  # the first N % k parts are one longer
    if protocol == "loso":
        k = len(people)
    if len(people) < max(k, 2):
        raise ValueError(f"{len(people)} subjects are too few for {max(k, 2)} folds of {protocol}")
    return [np.flatnonzero(np.isin(subjects, people[i::k])) for i in range(k)]


# ---- metrics ---------------------------------------------------------------------------------------------------------
def accuracy(true, predicted):
    """Share of correct predictions, 0 to 1."""
    return float(np.mean(np.asarray(true) == np.asarray(predicted)))


def uf1(true, predicted):
    """Unweighted F1: the mean over classes of 2 TP / (2 TP + FP + FN). Only classes present in `true` count."""
    true, predicted = np.asarray(true), np.asarray(predicted)
    members = [(true == c, predicted == c) for c in np.unique(true)]
    return float(np.mean([2 * sum(t & p) / (sum(t) + sum(p)) for t, p in members]))


def uar(true, predicted):
    """Unweighted average recall: the mean over classes of TP / (TP + FN). Only classes present in `true` count."""
    true, predicted = np.asarray(true), np.asarray(predicted)
    return float(np.mean([np.mean(predicted[true == c] == c) for c in np.unique(true)]))


METRICS = {"UF1": uf1, "UAR": uar}  # printed beside the accuracy; a new one is one entry


def predict(scores, row_emotion, row_session, train_counts, how="sum"):
    """Predicted emotion (n,) from row scores (n, R). An emotion without a training sample so far never wins."""
    emotion_scores = rch.remap(scores, row_emotion, row_session, how)
    return np.where(train_counts > 0, emotion_scores, -np.inf).argmax(1)


# ---- a run -----------------------------------------------------------------------------------------------------------
class Run:
    """One run of a script: which folds to do, the line after each session, a file per fold and the summary.

    args     common.parse's arguments          sessions   list of data.Session, T of them
    merges   ways of rch.remap, a column each; the first one leads (`prob` means something for logits only)
    .folds   the folds that this process does: every script's loop goes over them
    Its folder is named after all that the numbers depend on; finished folds that lie there are kept and printed again.
    Ends with one line on impossible folds.
    """

    def __init__(self, args, sessions, merges=("sum", "prob")):
        if args.protocol == "loso" and len(sessions) > 1:
            sys.exit(f"error: --protocol loso takes one session, not {len(sessions)}; name it with --sessions")
        self.sessions, self.tests = sessions, []  # T lists of k index arrays
        listed = args.protocol != "loso" and any(session.folds is not None for session in sessions)  # in folds.csv
        for session in sessions:
            try:
                if listed and not session.folds:
                    raise ValueError("folds.csv has no lines of it")
                if listed and session.folds["count"] != K:
                    raise ValueError(f"folds.csv has {session.folds['count']} folds, not {K}")
                tests = [np.flatnonzero(session.folds[args.protocol] == i) for i in range(K)] if listed else None
                self.tests.append(tests or split(session.subjects, args.protocol))
                if min(map(len, self.tests[-1])) < 1 or len(session.keys) - max(map(len, self.tests[-1])) < 2:
                    raise ValueError("a fold has no sample to test or fewer than 2 to train on")
            except ValueError as error:
                sys.exit(f"error: session {session.name}: {error}")
        count = len(self.tests[0])
        self.asked = args.folds or list(range(count))
        if not all(0 <= fold < count and self.asked.count(fold) == 1 for fold in self.asked):
            sys.exit(f"error: --folds {' '.join(map(str, self.asked))}: of 0 to {count - 1}, each once")
        given = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        rank, world = (int(word) if word.isdecimal() else -1 for word in given)
        if not 0 <= rank < world or ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ):
            sys.exit("error: RANK and WORLD_SIZE must both be set, 0 <= RANK < WORLD_SIZE, or neither")

        elsewhere = ("folds", "out", "data", "weights", "device", "loaded")  # what is there is hashed below
        cut = _sha([[s.keys.tolist(), *map(np.ndarray.tolist, f)] for s, f in zip(sessions, self.tests)])[:12]
        self.info = {  # all that the numbers depend on: runs that agree here give the same on the same machine
            "arguments": {name: value for name, value in vars(args).items() if name not in elsewhere},
            "merges": list(merges),
            "device": args.device.type,
            "synthetic": args.data is None,
            "fold_count": count,
            "counts": {s.name: {"samples": len(s.keys), "subjects": len(set(s.subjects.tolist())),
                                "emotions": {e: int(sum(s.labels == e)) for e in s.emotions}} for s in sessions},
            "images": _sha([session.digest for session in sessions])[:12],
            "tests": cut,
            "folds": _sha([s.folds["digest"] for s in sessions])[:12] if listed else cut,
            "weights": args.loaded,
            "code": _code(os.path.realpath(sys.argv[0])),
            "versions": {name: metadata.version(name) for name in ("torch", "timm", "numpy", "pillow")}
            | {"python": platform.python_version()},
        }  # fmt: skip
        source = "synthetic" if args.data is None else os.path.basename(os.path.abspath(args.data))
        words = [args.method, args.backbone, args.protocol, args.preset, source]
        words += ["+".join(args.sessions)] * (args.sessions != data.STREAM) + [f"{K}folds"] * (K != 5)
        words += [f"{name}={value}" for name, value in args.changed.items()] + [f"seed{args.seed}"]
        self.folder = os.path.join(args.out, re.sub(r"[^\w.+=-]", "_", "-".join(words)), _sha(self.info)[:8])
        os.makedirs(self.folder, exist_ok=True)
        write(os.path.join(self.folder, "run.json"), json.dumps(self.info, indent=1).encode())

        where = "folds.csv" if listed else "images"  # what the folds are made of
        print(f"{args.method}, {args.backbone} ({args.loaded}), {args.protocol}, {args.device},"
              f" images {self.info['images']}, folds {self.info['folds']} ({where})")  # fmt: skip
        self.folds, self.header_printed, self.first = [], False, rank == 0
        for fold in self.asked[rank::world]:  # under torchrun, rank r of w takes every w-th fold
            saved = read_fold(self.folder, self.info, fold)
            if saved is None:
                self.folds.append(fold)
            for t in range(len(sessions) if saved else 0):
                self._print_line(fold, t, saved, "  kept")

    def stream(self, fold):
        """The sessions of trial `fold` as they arrive: (t, session, train, test), t from 0, indices of its samples."""
        self.saved, self.words = {"fold": fold, "seconds": []}, []
        for t, (session, tests) in enumerate(zip(self.sessions, self.tests)):
            self.clock = time.perf_counter()
            train = np.setdiff1d(np.arange(len(session.keys)), tests[fold])
            self.words.append(session.labels[train])
            yield t, session, train, tests[fold]

    def record(self, fold, t, rows, scores, **others):
        """Score the model after session t, and print the line; after the last session write the fold's file.

        scores  (n, R) row scores of the fold-`fold` test parts of sessions 0..t, in that order: array or tensor
        rows    the rch.RCH that they belong to
        others  further row scores (n, R) to keep and to print behind the first, named
        Ends with one line if a score is not finite. A printed last line means a kept fold.
        """
        self.saved["seconds"].append(time.perf_counter() - self.clock)
        tests = [(session, tests[fold]) for session, tests in zip(self.sessions[: t + 1], self.tests)]
        for name in ("labels", "subjects", "keys"):  # (n,) each
            self.saved[name] = np.concatenate([getattr(session, name)[test] for session, test in tests])
        self.saved["session"] = np.repeat(np.arange(t + 1), [len(test) for _, test in tests])  # (n,) where it is from
        self.saved |= {"emotions": rows.emotions, "row_emotion": rows.row_emotion, "row_session": rows.row_session}
        counts = [[sum(words == emotion) for emotion in rows.emotions] for words in self.words]  # of each session
        self.saved["train_counts"] = np.cumsum(counts, 0)  # (t + 1, E), of all until each session
        for name, values in {"scores": scores, **others}.items():
            values = np.asarray(values.cpu() if torch.is_tensor(values) else values, np.float32)
            assert values.shape == (len(self.saved["labels"]), len(rows.row_emotion))
            if not np.isfinite(values).all():
                where = f"fold {fold}, session {self.sessions[t].name}"
                sys.exit(f"error: the scores are not finite in {where}; try a smaller --lr")
            self.saved[f"{name}_{t}"] = values
        if t == len(self.sessions) - 1:
            self.saved |= {"identity": _sha(self.info), "threads": torch.get_num_threads()}
            self.saved["processor"] = torch.backends.cpu.get_cpu_capability()
            file = io.BytesIO()
            np.savez_compressed(file, **self.saved, seal=_seal(self.saved))
            write(os.path.join(self.folder, f"fold{fold}.npz"), file.getvalue())
        self._print_line(fold, t, self.saved)

    def _print_line(self, fold, t, saved, remark=""):
        """The line of one fold and session: accuracy by each merge, and the metrics by the first."""
        merges, names = self.info["merges"], [key[:-2] for key in saved if key[-2:] == "_0" and key != "scores_0"]
        if not self.header_printed:
            columns = "".join(f"{column:>6s}" for column in (*merges, *METRICS))
            print(f"fold  session  emotions  {columns}  seconds" + "".join(f"  {name}{columns}" for name in names))
            self.header_printed = True
        cells = []
        for name in ("scores", *names):
            results = [outcome(saved, t, how, name)[:2] for how in merges]
            shares = [accuracy(*result) for result in results] + [metric(*results[0]) for metric in METRICS.values()]
            cells.append("".join(f"{100 * share:6.1f}" for share in shares))
        emotions = len(set(saved["row_emotion"][: saved[f"scores_{t}"].shape[1]]))
        line = f"{fold:4d}  {self.sessions[t].name:7s}  {emotions:8d}  {cells[0]}  {saved['seconds'][t]:7.1f}"
        more = "".join(f"  {' ' * len(name)}{cell}" for name, cell in zip(names, cells[1:]))
        print(f"{line}{more}{remark}\n", end="", flush=True)  # in one piece: other processes print, too

    def summary(self):
        """Print means, standard deviations, the commonest emotion and the T x T matrix, of all folds that are there.

        Only if all that were asked for are there. Under torchrun the process that finds the last one done prints; the
        first, if all were there before.
        """
        if not (self.folds or self.first):
            return
        names, lead, count = list(self.info["counts"]), self.info["merges"][0], self.info["fold_count"]
        folds = {fold: saved for fold in range(count) if (saved := read_fold(self.folder, self.info, fold))}
        if not set(self.asked) <= set(folds):
            return

        def row(label, *cells):
            texts = [f"{c:12.2f}" if isinstance(c, float) else f"{c:>12s}" for c in cells]
            print(f"{label:28s}{''.join(texts)}\n", end="", flush=True)  # whole lines, beside other processes' lines

        print(f"\n{len(folds)} of {count} folds, in %")
        if self.info["arguments"]["protocol"] == "loso":  # a fold is one person: only pooled numbers mean anything
            row("pooled over subjects", "accuracy", *METRICS)
            for how in (lead, "majority"):
                true, predicted, _ = pooled(folds, 0, how)
                row(how, *(100 * metric(true, predicted) for metric in (accuracy, *METRICS.values())))
        else:
            row("accuracy", *(f"S{t + 1} {name}" for t, name in enumerate(names)), "avg", "last")
            for how in (*self.info["merges"], "majority"):
                a = curve(folds, how)
                row(f"{how}, mean over folds", *a.mean(0))
                if len(a) > 1:
                    row("  +- standard deviation", *a.std(0, ddof=1))
            print(f"\non the tests of each session (columns), after training on each (rows), by {lead}, folds pooled")
            for t, name in enumerate(names):
                row(f"after {name}", *sources(folds, t, lead))
        out = os.path.dirname(os.path.dirname(self.folder)) or "."
        print(f"files: {self.folder}; all runs as a table: python -m tools.report {out}")


# ---- a run on disk ---------------------------------------------------------------------------------------------------
def _sha(thing):
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()


def _seal(saved):
    """A hash of a fold's arrays: a file that was edited, or made by anything but `record`, does not have it."""
    return _sha([[name, np.asarray(saved[name]).tolist()] for name in sorted(saved) if name != "seal"])


def _code(script):
    """{path: hash of its syntax} of a script and of all that it imports, directly or not, from its own or this folder.

    Of the syntax tree: a changed comment is the same code.
    """
    todo, found = [script], {}
    while todo:
        path = todo.pop()
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read())
        found[os.path.relpath(path, HERE)] = _sha(ast.dump(tree))[:12]
        for node in ast.walk(tree):
            for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
                words = f"{getattr(node, 'module', None) or ''}.{alias.name}".strip(".").split(".")
                for folder in {os.path.dirname(script), os.path.dirname(path), HERE}:  # the second: relative imports
                    places = [os.path.join(folder, *words[: n + 1]) for n in range(len(words))]
                    files = [file for place in places for file in (f"{place}.py", os.path.join(place, "__init__.py"))]
                    todo += [f for f in files if os.path.isfile(f) and os.path.relpath(f, HERE) not in found]
    return dict(sorted(found.items()))


def write(path, content):
    """Write bytes to a file whole or not at all: a kill leaves the old file or the new one, never half of one."""
    part = f"{path}.{os.getpid()}.part"
    with open(part, "wb") as file:
        file.write(content)
    os.replace(part, path)


def read_fold(folder, info, fold):
    """The arrays of a run's fold file {name: array}, or None where there is none that is this run's, with a note."""
    path = os.path.join(folder, f"fold{fold}.npz")
    if not os.path.exists(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            saved = dict(file)
        if saved["identity"] != _sha(info) or saved["fold"] != fold or saved.get("seal") != _seal(saved):
            raise ValueError("of another run, of another fold, or changed")
    except Exception as error:  # a broken archive can raise almost anything
        print(f"note: {path}: not used ({' '.join(str(error).split())})", file=sys.stderr)
        return None
    return saved


def outcome(saved, t, how="sum", name="scores"):
    """(true, predicted, source session) of one fold's tests after session t, (n,) int each, from its file's arrays.

    how is a way of rch.remap, or "majority": always the emotion that was commonest in training so far.
    """
    n, r = saved[f"{name}_{t}"].shape
    row_emotion, row_session = saved["row_emotion"][:r], saved["row_session"][:r]
    counts = saved["train_counts"][t][: row_emotion.max() + 1]
    true = np.array([list(saved["emotions"]).index(word) for word in saved["labels"][:n]])
    if how == "majority":
        return true, np.full(n, counts.argmax()), saved["session"][:n]
    return true, predict(saved[f"{name}_{t}"], row_emotion, row_session, counts, how), saved["session"][:n]


def pooled(folds, t, how="sum"):
    """The same, over all folds {fold: arrays}: three arrays."""
    return [np.concatenate(arrays) for arrays in zip(*(outcome(saved, t, how) for saved in folds.values()))]


def curve(folds, how="sum"):
    """A_1..A_T, avg and last of each fold in percent, (folds, T + 2)."""
    a = [[accuracy(*outcome(f, t, how)[:2]) for t in range(len(f["seconds"]))] for f in folds.values()]
    return 100 * np.array([[*row, np.mean(row), row[-1]] for row in a])


def sources(folds, t, how="sum"):
    """Accuracy in percent on the tests of each session 0..t after training on session t, pooled: t + 1 numbers."""
    true, predicted, source = pooled(folds, t, how)
    return [100 * accuracy(true[source == s], predicted[source == s]) for s in range(t + 1)]
