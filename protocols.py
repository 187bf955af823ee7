"""The evaluation protocol: folds, fold binding, metrics, and the lines and files of a run.

A TRIAL binds fold i of every session: the model trains on session t without its fold i, and after session t it is
tested on the fold-i parts of sessions 1..t together. Five trials make a run. After session t every sample of sessions
1..t has then been tested exactly once, by a model that never saw it (SLCV: that never saw its person).

    A_t      accuracy after session t          A-bar   mean of A_1..A_T          A-tilde   A_T, the last

Means are over folds, as in the paper (arXiv 2501.19111, section 5); standard deviations (n - 1) are ours. Folds differ
in size by a factor of almost three, so the run also pools all folds' predictions: accuracy with a 95 % interval, UF1
and UAR, all three by eq. 3's sum.

Shapes: N samples of a session, n samples tested after a session, R rows, E emotions, T sessions.

Command, at the end of the file:
    python protocols.py results [--how prob] [--details] [--csv FILE] [--plot FILE]     all runs below a folder
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import signal
import sys
import time

import numpy as np

import rch

HERE = os.path.dirname(os.path.abspath(__file__))
K = 5  # folds, as the paper


def fail(message):
    """A user's mistake: one line on stderr and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


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
    classes = np.unique(true)
    hits = np.array([np.sum((true == c) & (predicted == c)) for c in classes])  # TP
    sizes = np.array([np.sum(true == c) + np.sum(predicted == c) for c in classes])  # 2 TP + FP + FN
    return float(np.mean(2 * hits / sizes))


def uar(true, predicted):
    """Unweighted average recall: the mean over classes of TP / (TP + FN). Only classes present in `true` count."""
    true, predicted = np.asarray(true), np.asarray(predicted)
    return float(np.mean([np.mean(predicted[true == c] == c) for c in np.unique(true)]))


def interval(correct, total):
    """95 % Wilson interval (low, high) of the share correct / total, 0 to 1.

    It takes samples as independent, though one person's are not quite.
    """
    z, p = 1.96, correct / total
    middle, half = p + z * z / (2 * total), z * np.sqrt(p * (1 - p) / total + z * z / (4 * total**2))
    return (middle - half) / (1 + z * z / total), (middle + half) / (1 + z * z / total)


def predict(scores, row_emotion, row_session, train_counts, how="sum"):
    """Predicted emotion (n,) from row scores (n, R). An emotion without a training sample so far never wins."""
    emotion_scores = rch.remap(scores, row_emotion, row_session, how)
    return np.where(train_counts > 0, emotion_scores, -np.inf).argmax(1)


# ---- a run -----------------------------------------------------------------------------------------------------------
class Run:
    """One run of a method: which folds to do, the line after each session, a file per fold and the summary.

    args      common.parse's arguments          sessions   list of data.Session, T of them
    logits    whether the scores are logits; only for those does `prob` mean anything
    .folds    the folds this process does: the loop of every method goes over them
    Ends with one line on impossible folds, a results folder that cannot be written, or --resume of another run.
    """

    def __init__(self, args, sessions, logits=True):
        self.sessions = sessions
        self.tests = []  # T lists of k index arrays
        for session in sessions:
            try:
                self.tests.append(split(session.subjects, args.protocol))
            except ValueError as error:
                fail(f"session {session.name}: {error}")
        if args.protocol == "loso" and len(sessions) > 1:
            fail(f"--protocol loso takes one session, not {len(sessions)}; name it with --sessions")
        count = len(self.tests[0])
        for session, tests in zip(sessions, self.tests):
            for fold, test in enumerate(tests):
                if len(session.keys) - len(test) < 2:
                    fail(f"session {session.name}: fold {fold} leaves fewer than 2 samples to train on")
        for fold in args.folds or []:
            if not 0 <= fold < count:
                fail(f"--folds {fold}: this run has folds 0 to {count - 1}")
        folds = list(dict.fromkeys(args.folds or range(count)))

        # What the numbers depend on. Two runs that agree here give the same numbers on the same machine.
        manifest = hashlib.sha256()
        for session, tests in zip(sessions, self.tests):
            manifest.update(json.dumps([session.name, session.keys, [test.tolist() for test in tests]]).encode())
            manifest.update(session.images.tobytes())
        skip = ("folds", "out", "resume", "data", "weights", "device")  # where things lie; what is in them is hashed
        self.info = {name: value for name, value in vars(args).items() if name not in skip}
        self.info |= {"device": args.device.type, "synthetic": args.data is None, "logits": logits, "fold_count": count,
                      "manifest": manifest.hexdigest()[:12]}  # fmt: skip
        shared = [os.path.join(HERE, name) for name in ("common.py", "data.py", "protocols.py", "rch.py")]
        for path in [os.path.abspath(sys.argv[0]), *shared]:
            with open(path, "rb") as file:
                self.info[os.path.basename(path)] = hashlib.sha256(file.read()).hexdigest()[:12]
        self.info = json.loads(json.dumps(self.info))  # as it comes back from run.json, with lists for tuples

        source = "data" if args.data else "synthetic"
        sessions_named = "" if args.default_sessions else "+".join(args.sessions)
        words = [args.method, args.variant, args.backbone, args.protocol, args.preset, source, f"seed{args.seed}"]
        name = "-".join(filter(None, [*words, sessions_named, *args.changed]))
        self.folder = os.path.join(args.out, re.sub(r"[^\w.+=-]", "_", name))
        kept = self._resume(args.resume)
        path, text = os.path.join(self.folder, "run.json"), json.dumps(self.info, indent=1).encode()
        try:
            os.makedirs(self.folder, exist_ok=True)
            others = [i for i in range(count) if i not in folds and os.path.exists(f"{self.folder}/fold{i}.npz")]
            if others and os.path.exists(path):
                with open(path, "rb") as file:
                    if file.read() != text:
                        numbers = ", ".join(map(str, others))
                        print(f"note: {self.folder}: folds {numbers} are of another run and count no more")
            _write(path, text)
        except OSError as error:
            fail(f"{self.folder}: cannot be written ({error.strerror}); --out takes another folder")

        # Under torchrun, rank r of w takes every w-th fold.
        rank, self.world = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
        self.folds = [fold for fold in folds[rank :: self.world] if fold not in kept]
        print(f"{args.method} {args.variant}".strip() + f", {args.backbone} ({args.checkpoint}), {args.protocol}, "
              f"{args.device}, folds and data {self.info['manifest']}")  # fmt: skip
        if kept:
            print(f"kept from {self.folder}: folds {', '.join(map(str, sorted(kept)))}")
        self.ways = ["sum", "prob"] if logits else ["sum"]
        self.header_printed = False
        self.clock = time.perf_counter()

    def _resume(self, resume):
        """The finished folds that --resume keeps; a set of int."""
        path = os.path.join(self.folder, "run.json")
        if not resume or not os.path.exists(path):
            return set()
        old = _read_info(path)
        changed = sorted(name for name in old.keys() | self.info.keys() if old.get(name) != self.info.get(name))
        if changed:
            fail(f"--resume: {self.folder} differs in {', '.join(changed)}; without --resume it is redone")
        return set(read_folds(self.folder, self.info))

    def parts(self, fold, t):
        """Indices (train, test) into session t's samples, for this fold."""
        test = self.tests[t][fold]
        return np.setdiff1d(np.arange(len(self.sessions[t].keys)), test), test

    def record(self, fold, t, rows, scores, **others):
        """Score the model after session t, and print the line; after the last session write the fold's file.

        scores  (n, R) row scores of the fold-`fold` test parts of sessions 0..t, in that order: array or CPU tensor
        rows    the rch.RCH that they belong to
        others  further row scores (n, R) to keep and to print behind the first, named
        Ends with one line if a score is not finite or a file cannot be written. A printed last line means a kept fold.
        """
        if t == 0:  # a trial begins
            self.saved = {"seconds": [], "train_counts": []}
        tests = [self.parts(fold, s)[1] for s in range(t + 1)]
        labels = np.array([self.sessions[s].emotions[i] for s in range(t + 1) for i in tests[s]])
        words = [self.sessions[s].emotions[i] for s in range(t + 1) for i in self.parts(fold, s)[0]]
        counts = np.array([words.count(word) for word in rows.emotions])
        now = time.perf_counter()
        self.saved["seconds"].append(now - self.clock)
        self.saved["train_counts"].append(counts)
        true = np.array([rows.emotions.index(word) for word in labels])

        cells = []
        for name, values in {"": scores, **others}.items():
            values = np.asarray(values, np.float32)
            assert values.shape == (len(labels), len(rows.row_emotion))
            if not np.isfinite(values).all():
                fail(f"the scores are not finite in fold {fold}, session {self.sessions[t].name}; try a smaller --lr")
            self.saved[f"{name or 'scores'}_{t}"] = values
            predictions = [predict(values, rows.row_emotion, rows.row_session, counts, how) for how in self.ways]
            shares = [accuracy(true, p) for p in predictions] + [uf1(true, predictions[0]), uar(true, predictions[0])]
            cells.append(name + "".join(f"{100 * share:6.1f}" for share in shares))
        if t == len(self.sessions) - 1:
            padded = [np.pad(c, (0, len(rows.emotions) - len(c))) for c in self.saved.pop("train_counts")]
            self.saved |= {
                "identity": np.array(_identity(self.info)),
                "labels": labels,  # (n,) words
                "subjects": np.concatenate([self.sessions[s].subjects[test] for s, test in enumerate(tests)]),
                "keys": np.array([self.sessions[s].keys[i] for s, test in enumerate(tests) for i in test]),
                "session": np.repeat(np.arange(t + 1), [len(test) for test in tests]),  # (n,) source of each sample
                "emotions": np.array(rows.emotions),
                "row_emotion": rows.row_emotion,
                "row_session": rows.row_session,
                "train_counts": np.array(padded),  # (T, E) training samples of each emotion so far
            }
            path, file = os.path.join(self.folder, f"fold{fold}.npz"), io.BytesIO()
            np.savez_compressed(file, **self.saved)
            try:
                _write(path, file.getvalue())
            except OSError as error:
                fail(f"{path}: cannot be written ({error.strerror}); --resume goes on from the finished folds")
        if not self.header_printed:
            columns = "".join(f"{column:>6s}" for column in (*self.ways, "UF1", "UAR"))
            print(f"fold  session  emotions  {columns}   seconds" + "".join(f"   {name}{columns}" for name in others))
            self.header_printed = True
        line = f"{fold:4d}  {self.sessions[t].name:7s}  {len(rows.emotions):8d}  {cells[0]}  {now - self.clock:8.1f}"
        print("   ".join([line, *cells[1:]]), flush=True)
        self.clock = time.perf_counter()

    def summary(self):
        """Print the run's summary from its files: all finished folds, those of other processes too.

        Under torchrun the processes end at different times; there the report (python protocols.py) gives the summary.
        """
        if self.world == 1:
            print(summarise(self.info, read_folds(self.folder, self.info)))
        print(f"files: {self.folder}; all runs as a table: python protocols.py {os.path.dirname(self.folder) or '.'}")


def _identity(info):
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()


def _write(path, content):
    """Write a file whole or not at all: a kill leaves the old file or the new one, never half of one."""
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            file.write(content)
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # it is gone, if all went well
            os.remove(part)


def _read_info(path):
    try:
        with open(path) as file:
            info = json.load(file)
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot be read ({error})")
    needed = {"fold_count": int, "sessions": list, "changed": list, "seed": int}
    needed |= dict.fromkeys(("logits", "synthetic", "default_sessions"), bool)
    needed |= dict.fromkeys(("method", "variant", "backbone", "protocol", "preset", "checkpoint"), str)
    if not isinstance(info, dict) or not all(isinstance(info.get(name), kind) for name, kind in needed.items()):
        fail(f"{path}: not a run.json of this project")
    return info


def read_folds(folder, info):
    """The fold files of one run: {fold: {name: array}}. Files of another run (other arguments or code) are not read."""
    folds = {}
    for fold in range(info["fold_count"]):
        path = os.path.join(folder, f"fold{fold}.npz")
        if os.path.exists(path):
            try:
                with np.load(path, allow_pickle=False) as file:
                    if str(file["identity"]) == _identity(info):
                        folds[fold] = dict(file)
                    else:
                        print(f"{path}: of another run (other arguments, code or threads), ignored", file=sys.stderr)
            except Exception as error:  # a broken archive can raise almost anything
                fail(f"{path}: not a readable fold file ({error}); delete it and run again with --resume")
    return folds


# ======================================================================================================================
# The summary, the paper's numbers and the report. No method needs them to be read.
# ======================================================================================================================
def ways(info):
    """The remaps that mean something for a run's scores: prob and centered undo a constant that only logits have."""
    return rch.WAYS if info["logits"] else ("sum", "max")


def outcome(saved, t, how="sum"):
    """(true, predicted, source session) of one fold's tests after session t, (n,) int each, from its file's arrays."""
    scores = saved[f"scores_{t}"]
    row_emotion, row_session = saved["row_emotion"][: scores.shape[1]], saved["row_session"][: scores.shape[1]]
    counts = saved["train_counts"][t][: row_emotion.max() + 1]
    true = np.array([list(saved["emotions"]).index(word) for word in saved["labels"][: len(scores)]])
    return true, predict(scores, row_emotion, row_session, counts, how), saved["session"][: len(scores)]


def pooled(folds, t, how="sum"):
    """The same, over all folds: three arrays."""
    return [np.concatenate(arrays) for arrays in zip(*(outcome(saved, t, how) for saved in folds.values()))]


def session_count(folds):
    """T, from any fold's file."""
    return len(next(iter(folds.values()))["train_counts"])


def with_means(a):
    """Accuracies (folds, T) -> (folds, T + 2): A_1..A_T, A-bar, A-tilde of each fold."""
    return np.concatenate([a, a.mean(1, keepdims=True), a[:, -1:]], 1)


def curve(folds, how="sum"):
    """A_1..A_T, A-bar, A-tilde of each fold, (folds, T + 2) in percent."""
    times = range(session_count(folds))
    return with_means(np.array([[100 * accuracy(*outcome(f, t, how)[:2]) for t in times] for f in folds.values()]))


def majority(saved, t):
    """Accuracy after session t of always answering the emotion that was most frequent in training so far, 0 to 1."""
    true, _, _ = outcome(saved, t)
    return accuracy(true, np.full(len(true), saved["train_counts"][t].argmax()))


def majority_curve(folds):
    """The same as a curve: A_1..A_T, A-bar, A-tilde of each fold, (folds, T + 2) in percent."""
    times = range(session_count(folds))
    return with_means(np.array([[100 * majority(saved, t) for t in times] for saved in folds.values()]))


def per_source(folds, how="sum"):
    """Accuracies (T, T), pooled, 0 to 1: [t, s] on the tests of session s after training on t; nan for s > t."""
    matrix = np.full((session_count(folds), session_count(folds)), np.nan)
    for t in range(len(matrix)):
        true, predicted, source = pooled(folds, t, how)
        matrix[t, : t + 1] = [accuracy(true[source == s], predicted[source == s]) for s in range(t + 1)]
    return matrix


def summarise(info, folds):
    """The summary of a run as text."""
    if not folds:
        return "no finished folds"
    names, last, loso = info["sessions"], len(info["sessions"]) - 1, info["protocol"] == "loso"
    columns = [f"S{t + 1} {name}" for t, name in enumerate(names)] + ([] if loso else ["A-bar", "A-tilde"])
    head = f"{len(folds)} of {info['fold_count']} folds, accuracy in %"
    lines = ["", f"{head:32s}" + "".join(f"{column:>12s}" for column in columns)]

    def add(label, cells):
        lines.append(f"{label:32s}" + "".join(f"{cell:>12s}" for cell in cells))

    if not loso:  # LOSO folds are single persons: only the pooled numbers mean anything
        for how in ["sum", "prob"] if info["logits"] else ["sum"]:
            a = curve(folds, how)
            add(f"{how}, mean over folds", [f"{v:.2f}" for v in a.mean(0)])
            if len(folds) > 1:
                add("  +- standard deviation", [f"{v:.2f}" for v in a.std(0, ddof=1)])
        if paper_numbers(info):
            add("the paper's Table 2", [f"{v:.2f}" for v in paper_numbers(info)])
    results = [pooled(folds, t) for t in range(last + 1)]
    add("sum, pooled over folds", [f"{100 * accuracy(true, predicted):.2f}" for true, predicted, _ in results])
    bounds = [interval(np.sum(true == predicted), len(true)) for true, predicted, _ in results]
    add("  95 % interval", [f"{100 * low:.1f}-{100 * high:.1f}" for low, high in bounds])
    add("UF1, pooled", [f"{100 * uf1(true, predicted):.2f}" for true, predicted, _ in results])
    add("UAR, pooled", [f"{100 * uar(true, predicted):.2f}" for true, predicted, _ in results])
    weights = [len(saved["labels"]) for saved in folds.values()] if loso else None
    often = np.average(majority_curve(folds), axis=0, weights=weights)[: len(columns)]
    add("always the commonest emotion", [f"{v:.2f}" for v in often])
    if loso and paper_numbers(info):
        lines.append("the paper: accuracy {:.2f}, F1 {:.2f}, UAR {:.2f}".format(*paper_numbers(info)))
    if last:
        lines.append("\naccuracy on the tests of each session (columns), after training on each (rows), pooled")
        for t, by_source in enumerate(per_source(folds)):
            add(f"after {names[t]}", [f"{100 * v:.2f}" for v in by_source[: t + 1]])
        # Long training makes large scores: rows of the first session can outshout the later ones in eq. 3's sum.
        row_session = next(iter(folds.values()))["row_session"]
        final = np.concatenate([saved[f"scores_{last}"] for saved in folds.values()])
        sizes = {s: np.abs(final[:, row_session == s] - final.mean(1, keepdims=True)).mean() for s in set(row_session)}
        add("mean size of the row scores", [f"{sizes[s]:.3g}" if s in sizes else "-" for s in range(last + 1)])
    return "\n".join(lines)


TABLE2 = {  # (protocol, backbone, method): S1..S4, A-bar, A-tilde in %; the paper gives no standard deviations
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
TABLE3 = {  # backbone: accuracy, F1, UAR in %, LOSO on CASME II's five emotions
    "resnet": (55.6, 41.6, 40.6),
    "vit": (76.6, 72.3, 71.9),
    "swin": (81.5, 80.5, 79.3),
}


def comparable(info):
    """Whether the paper has this run: real data, the unchanged paper preset, the method as such, its sessions.

    A weight file is taken at its word, and its name stands in the run's; constants edited in a script are not noticed.
    """
    sessions = info["default_sessions"] or info["protocol"] == "loso"
    changed = [word for word in info["changed"] if not word.startswith("weights=") or word == "weights=none"]
    return not info["synthetic"] and info["preset"] == "paper" and not changed and not info["variant"] and sessions


def forgetting(folds, how="sum"):
    """Mean over sessions but the last of (best accuracy ever on its tests - accuracy at the end), pooled, 0 to 1.

    As in Chaudhry et al., arXiv 1801.10112, but the end itself may be the best, so it is never negative.
    """
    matrix = per_source(folds, how)
    return float(np.mean(np.nanmax(matrix, 0)[:-1] - matrix[-1, :-1])) if len(matrix) > 1 else 0.0


def find_runs(root):
    """All runs below a folder: a list of (folder, info, folds)."""
    if not os.path.isdir(root):
        fail(f"{root}: no such folder; it is what --out was, results by default")
    runs = []
    for folder, _, files in sorted(os.walk(root)):
        if "run.json" in files:
            info = _read_info(os.path.join(folder, "run.json"))
            folds = read_folds(folder, info)
            if folds:
                runs.append((folder, info, folds))
    if not runs:
        fail(f"{root}: holds no finished fold of any run")
    names = "protocol", "synthetic", "sessions", "preset", "seed", "backbone", "variant", "method"
    return sorted(runs, key=lambda run: [*(str(run[1][word]) for word in names), " ".join(run[1]["changed"])])


def report_columns(info, folds, how="sum"):
    """What the report shows of a run: ([column names], [numbers in %], [standard deviations over folds or None])."""
    if info["protocol"] == "loso":  # a fold is one person: only the pooled numbers mean anything
        true, predicted, _ = pooled(folds, 0, how)
        return ["accuracy", "F1", "UAR"], [100 * f(true, predicted) for f in (accuracy, uf1, uar)], [None] * 3
    a = curve(folds, how)
    names = [f"S{t + 1}" for t in range(a.shape[1] - 2)] + ["A-bar", "A-tilde"]
    return names, a.mean(0).tolist(), a.std(0, ddof=1).tolist() if len(a) > 1 else [None] * a.shape[1]


def paper_numbers(info):
    """The paper's numbers for a run that is comparable with it, in the order of `report_columns`, or None."""
    if not comparable(info):
        return None
    if info["protocol"] == "loso":
        return TABLE3.get(info["backbone"]) if info["sessions"] == ["casme2"] and info["method"] == "finetune" else None
    return TABLE2.get((info["protocol"], info["backbone"], info["method"]))


def title(info):
    """What the runs of one table have in common."""
    source = "synthetic stream" if info["synthetic"] else "data"
    sessions = ", ".join(info["sessions"])
    return f"{info['protocol'].upper()}, {source}, {sessions}, {info['preset']} preset, seed {info['seed']}"


def run_label(info):
    """A run's method with its variant and changed settings."""
    return " ".join([info["method"], *filter(None, [info["variant"]]), *info["changed"]])


def table(runs, how="sum"):
    """The runs as Markdown, one table per protocol and kind of data, in the columns of the paper's Tables 2 and 3.

    Cells are mean ± standard deviation over folds, in %, pooled over all subjects for LOSO. Controls are rows of their
    own; the paper's row stands under a run that is comparable with it. Beside eq. 3's sum stands the last accuracy by
    prob. Scores that are no logits (RanPAC's) are always summed.
    """
    lines, last = [], None
    for _, info, folds in runs:
        loso = info["protocol"] == "loso"
        columns, means, spreads = report_columns(info, folds, how if info["logits"] else "sum")
        if title(info) != last:
            last = title(info)
            by_prob = ["A-tilde by prob"] if how == "sum" and not loso else []
            head, blank = ["backbone", "method", *columns, *by_prob], ["-"] * len(by_prob)
            lines += ["", f"**{last}** (remapped by {how})", "", markdown_row(head), "|" + "---|" * len(head)]
            if not loso:
                most = max((fs for _, i, fs in runs if title(i) == last), key=len)  # the run with the most folds
                often = [f"{v:.2f}" for v in majority_curve(most).mean(0)]
                lines.append(markdown_row(["-", "always the commonest emotion", *often, *blank]))
        cells = [f"{v:.2f}" if s is None else f"{v:.2f} ± {s:.2f}" for v, s in zip(means, spreads)]
        if by_prob:
            cells.append(f"{report_columns(info, folds, 'prob')[1][-1]:.2f}" if info["logits"] else "-")
        missing = "" if len(folds) == info["fold_count"] else f" ({len(folds)} of {info['fold_count']} folds)"
        lines.append(markdown_row([info["backbone"], run_label(info) + missing, *cells]))
        if paper_numbers(info):
            paper = [f"{v:.2f}" for v in paper_numbers(info)]
            lines.append(markdown_row([info["backbone"], f"{info['method']}, the paper", *paper, *blank]))
    return "\n".join(lines[1:])


def markdown_row(cells):
    """One line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def details(info, folds):
    """The four ways to remap, UF1, UAR and forgetting after the last session, and the confusion matrix, as Markdown."""
    last = len(info["sessions"]) - 1
    head = ["remap", *(f"S{t + 1}" for t in range(last + 1)), "A-bar", "A-tilde", "UF1", "UAR", "forgetting"]
    lines = [markdown_row(head), "|" + "---|" * len(head)]
    saved = next(iter(folds.values()))
    emotions = list(saved["emotions"])
    one_each = len(saved["row_emotion"]) == len(emotions)  # one row per emotion: there is nothing to merge
    for how in ("sum",) if one_each else ways(info):
        true, predicted, _ = pooled(folds, last, how)
        at_end = [100 * f for f in (uf1(true, predicted), uar(true, predicted), forgetting(folds, how))]
        lines.append(markdown_row([how, *(f"{v:.2f}" for v in [*curve(folds, how).mean(0), *at_end])]))
    true, predicted, _ = pooled(folds, last)
    head = ["true \\ predicted (sum, pooled, at the end)", *emotions]
    lines += ["", markdown_row(head), "|" + "---|" * len(head)]
    for e, emotion in enumerate(emotions):
        lines.append(markdown_row([emotion, *np.bincount(predicted[true == e], minlength=len(emotions))]))
    return "\n".join(lines)


def write_csv(runs, path):
    """All runs, one line per run and way to remap: what they are, `report_columns` and its standard deviations."""
    lines = []
    for folder, info, folds in runs:
        for how in ways(info):
            what = ("method", "variant", "backbone", "protocol", "preset", "seed", "synthetic", "checkpoint")
            line = {key: info[key] for key in what} | {"sessions": "+".join(info["sessions"]), "remap": how}
            line |= {"changed": " ".join(info["changed"]), "folds": len(folds), "folder": folder}
            for column, mean, spread in zip(*report_columns(info, folds, how)):
                line |= {column: f"{mean:.4f}", f"{column} std": "" if spread is None else f"{spread:.4f}"}
            true, predicted, _ = pooled(folds, len(info["sessions"]) - 1, how)
            pooled_uf1, pooled_uar = 100 * uf1(true, predicted), 100 * uar(true, predicted)
            line |= {"pooled UF1": f"{pooled_uf1:.4f}", "pooled UAR": f"{pooled_uar:.4f}"}
            lines.append(line)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)))
    writer.writeheader()
    writer.writerows(lines)
    try:
        _write(path, text.getvalue().encode())
    except OSError as error:
        fail(f"{path}: cannot be written ({error.strerror})")
    print(f"{path}: {len(lines)} lines")


def plot(runs, path, how="sum"):
    """Accuracy over sessions per method, a panel per protocol and backbone, as the paper's Figure 5.

    Controls are dashed; the paper's points are open markers, where a run is comparable.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        fail("--plot needs the package matplotlib: pip install matplotlib")
    runs = [run for run in runs if run[1]["protocol"] != "loso" and len(run[1]["sessions"]) > 1]
    if not runs:
        fail("--plot needs a run with more than one session")
    panels = sorted({(info["protocol"], info["backbone"]) for _, info, _ in runs})
    panel_protocols, columns = sorted({p for p, _ in panels}), sorted({b for _, b in panels})
    colours = {word: f"C{i}" for i, word in enumerate(sorted({run_label(info) for _, info, _ in runs}))}
    size = 1.2 + 3.4 * len(columns), 0.9 + 2.6 * len(panel_protocols)
    shape = {"nrows": len(panel_protocols), "ncols": len(columns), "figsize": size}
    figure, axes = pyplot.subplots(**shape, sharey=True, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_visible(False)
    for _, info, folds in runs:
        axis = axes[panel_protocols.index(info["protocol"]), columns.index(info["backbone"])]
        axis.set_visible(True)
        steps = range(1, len(info["sessions"]) + 1)
        label, style = run_label(info), "--" if info["variant"] or info["changed"] else "-o"
        axis.plot(steps, report_columns(info, folds, how)[1][:-2], style, color=colours[label], ms=4, label=label)
        if paper_numbers(info):
            axis.plot(steps, paper_numbers(info)[:-2], "o", color=colours[label], mfc="none", ms=7)
        axis.set_title(f"{info['backbone']}, {info['protocol'].upper()}", fontsize=10)
        axis.set_xticks(steps, info["sessions"], fontsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy, %")
    found = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(found.values(), found.keys(), loc="outside right center", fontsize=8, frameon=False)
    kinds = sorted({"synthetic stream" if info["synthetic"] else "data" for _, info, _ in runs})
    markers = "; open markers: the paper" if any(paper_numbers(info) for _, info, _ in runs) else ""
    figure.suptitle(f"{' and '.join(kinds)}, remapped by {how}{markers}", fontsize=10)
    try:
        figure.savefig(path, dpi=80)
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot be written ({error})")
    print(f"{path}: {len(panels)} panels")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: fail(f"{message}; see --help")
    p.add_argument("results", help="the folder that --out named")
    p.add_argument("--how", choices=rch.WAYS, default="sum", help="how rows are merged (default: sum)")
    p.add_argument("--details", action="store_true", help="also all remaps, UF1, UAR, forgetting, confusion matrix")
    p.add_argument("--csv", metavar="FILE", help="also write all numbers to a CSV file")
    p.add_argument("--plot", metavar="FILE.png", help="also draw accuracy over sessions (needs matplotlib)")
    args = p.parse_args()
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` ends quietly, as other commands do
    runs = find_runs(args.results)
    print(table(runs, args.how))
    if args.csv:
        write_csv(runs, args.csv)
    if args.plot:
        plot(runs, args.plot, args.how)
    for folder, info, folds in runs if args.details else []:
        print(f"\n### {os.path.basename(folder)}\n\n{details(info, folds)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
