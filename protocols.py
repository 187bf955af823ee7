"""The evaluation protocol: folds, fold binding, metrics, and the lines and files of a run.

A trial binds fold i of every session: a model trains on session t without its fold i, and is then tested on the fold-i
parts of sessions 1..t together. Five trials make a run. A_t is the accuracy after session t, `avg` the mean of A_1..A_T
(the paper's A-bar), `last` A_T (its A-tilde), as means over folds (arXiv 2501.19111, sections 3.2 and 3.3); standard
deviations (n - 1) are ours. Shapes: N samples of a session, n samples tested after one, R rows, E emotions, T sessions.
"""

import ast
import copy
import csv
import datetime
import hashlib
import io
import json
import os
import re
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

import rch

HERE = os.path.dirname(os.path.realpath(__file__))
K = 5  # folds, as the paper
FOLDS = ("session", "subject", "clip", "onset", "key", "slcv", "ilcv")  # the columns of folds.csv


# ---- folds -----------------------------------------------------------------------------------------------------------
def split(subjects, protocol, k=K, seed=42):
    """Test indices of each fold of one session: a list of sorted int arrays; every sample is in exactly one.

    subjects (N,) int. slcv, by subject: fold i tests the subjects unique(subjects)[i::k]. ilcv, by instance: as
    scikit-learn's KFold(k, shuffle=True, random_state=seed). loso: a fold per subject. ValueError if there are too few.
    """
    people = np.unique(subjects)
    if protocol == "ilcv":
        if len(subjects) < k:
            raise ValueError(f"{len(subjects)} samples are too few for {k} folds")
        order = np.arange(len(subjects))
        np.random.RandomState(seed).shuffle(order)
        return [np.sort(part) for part in np.array_split(order, k)]  # the first N % k are one longer
    if protocol == "loso":
        k = len(people)
    if len(people) < max(k, 2):
        raise ValueError(f"{len(people)} subjects are too few for {max(k, 2)} folds of {protocol}")
    return [np.flatnonzero(np.isin(subjects, people[i::k])) for i in range(k)]


def bind(session, args):
    """(test indices of each fold of a session, hash of the folds): from <args.data>/folds.csv or by `split`.
    The same hash means the same clips in the same folds, whatever images are missing; without the file it is None."""
    path, folds_hash = os.path.join(args.data or "", "folds.csv"), None
    try:
        if args.data is None or args.protocol == "loso" or not os.path.exists(path):
            tests = split(session.subjects, args.protocol)
        else:
            lines = read_folds(path, session)
            fold_of = {line["key"]: int(line[args.protocol]) for line in lines}
            folds = np.array([fold_of[key] for key in session.keys.tolist()])
            print(f"folds.csv: {session.name} has {len(lines)} lines, {len(lines) - len(folds)} without an image")
            tests = [np.flatnonzero(folds == i) for i in range(K)]
            folds_hash = _sha([[line[n] for n in FOLDS[1:] if n != "key"] for line in lines])
        if min(map(len, tests)) < 1 or len(session.keys) - max(map(len, tests)) < 2:
            raise ValueError("a fold has no sample to test or fewer than 2 to train on")
    except (KeyError, ValueError, csv.Error) as error:
        what = f"{path} has no line of the image {error}" if isinstance(error, KeyError) else error
        sys.exit(f"error: session {session.name}: {what}")
    return tests, folds_hash


def read_folds(path, session):
    """The lines of a folds.csv that are a session's: dicts of texts. A ValueError if one cannot be right."""
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        if not set(FOLDS) <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}: its first line must be {','.join(FOLDS)}")
        lines = [line | {"line": reader.line_num} for line in reader if line["session"] == session.name]
    subject_of, fold_of, seen = dict(zip(session.keys.tolist(), session.subjects.astype(str))), {}, set()
    for line in lines:
        subject, clip, onset, key, slcv, ilcv = [line[name] for name in FOLDS[1:]]
        # Two entries may be alike where one has no image (no key); without an onset (tools.view) a clip is no name.
        own = {key, (subject, clip, onset) if onset else key} if key else set()
        if not {slcv, ilcv} <= set(map(str, range(K))):
            why = f"has the folds {slcv} and {ilcv}, which are 0 to {K - 1}"
        elif fold_of.setdefault(subject, slcv) != slcv:
            why = f"puts subject {subject} in a second SLCV fold"
        elif own & seen:
            why = f"has {key}, or its clip and onset, a second time"
        elif subject_of.get(key, subject) != subject:
            why = f"has subject {subject}, the name of {key} {subject_of[key]}"
        else:
            seen |= own
            continue
        raise ValueError(f"{path}: line {line['line']} {why}")
    return lines


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

    merges   ways of rch.remap, a column each; the first one leads (`prob` means something for logits only)
    .folds   the folds that this process does: those asked for, without those that its folder holds already
    .tests   of each session the test indices of each fold
    """

    def __init__(self, args, sessions, merges=("sum", "prob")):
        if args.protocol == "loso" and len(sessions) > 1:
            sys.exit(f"error: --protocol loso takes one session, not {len(sessions)}; name it with --sessions")
        self.args, self.sessions, self.header_printed = args, sessions, False
        self.tests, hashes = zip(*(bind(session, args) for session in sessions))
        count = len(self.tests[0])
        self.asked = args.folds or list(range(count))
        if not all(0 <= fold < count and self.asked.count(fold) == 1 for fold in self.asked):
            sys.exit(f"error: --folds {' '.join(map(str, self.asked))}: of 0 to {count - 1}, each once")
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
        if not 0 <= rank < world or ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ):
            sys.exit("error: RANK and WORLD_SIZE must both be set, 0 <= RANK < WORLD_SIZE, or neither")

        self.info = describe(args, sessions, self.tests, hashes, merges)
        self.folder = os.path.join(args.out, name_of(args), _sha(self.info)[:8])
        os.makedirs(self.folder, exist_ok=True)
        path, source = os.path.join(self.folder, "run.json"), Path(args.data or "", "prepare.json")
        if not os.path.exists(path):  # beside what the numbers depend on: when it began, and how the images were made
            prepared = json.loads(source.read_text("utf-8")) if args.data and source.exists() else None
            made = datetime.datetime.now(datetime.timezone.utc).isoformat()
            write(path, json.dumps({"made": made, "prepared": prepared, "info": self.info}, indent=1).encode())
        print(f"{args.method}, {args.backbone} ({args.loaded}), {args.protocol}, {args.device}, images", end=" ")
        print(f"{self.info['images']}, folds {self.info['folds']} ({'folds.csv' if hashes[0] else 'images'})")

        self.folds, self.first = [], rank == 0
        for fold in self.asked[rank::world]:
            saved = read_fold(self.folder, self.info, fold)
            whole = not args.save or os.path.exists(os.path.join(self.folder, f"model{fold}.pt"))
            if saved is None or not whole:
                self.folds.append(fold)
                continue
            for t in range(len(sessions)):
                self._print_line(fold, t, saved, "  kept")

    def stream(self, fold):
        """The sessions of trial `fold` as they arrive: (t, session, train, test), t from 0, indices of its samples."""
        self.saved, self.train_labels = {"fold": fold, "seconds": []}, []
        for t, (session, tests) in enumerate(zip(self.sessions, self.tests)):
            self.began = time.perf_counter()
            train = np.setdiff1d(np.arange(len(session.keys)), tests[fold])
            self.train_labels.append(session.labels[train])
            yield t, session, train, tests[fold]

    def record(self, fold, t, rows, scores, losses=(), **others):
        """Score the model after session t, and print the line; after the last session write the fold's file.

        scores  (n, R) of the fold-`fold` test parts of sessions 0..t, in that order: array or tensor
        losses  of every training step, 0-d tensors
        others  further (scores, losses), named: kept, and the accuracies printed
        """
        saved = self.saved
        saved["seconds"].append(time.perf_counter() - self.began)
        parts = [(session, tests[fold]) for session, tests in zip(self.sessions[: t + 1], self.tests)]
        for name in ("labels", "subjects", "keys"):  # (n,) each
            saved[name] = np.concatenate([getattr(session, name)[test] for session, test in parts])
        saved["session"] = np.repeat(np.arange(t + 1), [len(test) for _, test in parts])  # (n,) where it is from
        saved |= {"emotions": rows.emotions, "row_emotion": rows.row_emotion, "row_session": rows.row_session}
        counts = [[sum(labels == emotion) for emotion in rows.emotions] for labels in self.train_labels]
        saved["train_counts"] = np.cumsum(counts, 0)  # (t + 1, E), of all sessions until each
        saved["names"] = ["scores", *others]
        where = f"error: fold {fold}, {self.sessions[t].name}"
        for name, (values, steps) in {"scores": (scores, losses), **others}.items():
            loss = "loss" if name == "scores" else f"loss_{name}"
            values = np.asarray(values.cpu() if torch.is_tensor(values) else values, np.float32)
            assert values.shape == (len(saved["labels"]), len(rows.row_emotion))
            steps = torch.stack(list(steps)).float().cpu().numpy() if len(steps) else np.zeros(0, np.float32)
            wrong = np.flatnonzero(~np.isfinite(steps))
            if len(wrong):
                what = f"the {loss.replace('_', ' of the ')} is not finite in step {wrong[0] + 1} of {len(steps)}"
                sys.exit(f"{where}: {what}; try a smaller --lr")
            if not np.isfinite(values).all():
                sys.exit(f"{where}: scores are not finite; try a smaller --lr")
            saved |= {f"{name}_{t}": values, f"{loss}_{t}": steps}
        if t == len(self.sessions) - 1:
            device = self.args.device
            saved["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            saved |= {"threads": torch.get_num_threads(), "processor": torch.backends.cpu.get_cpu_capability()}
            saved["identity"] = _sha(self.info)
            file = io.BytesIO()
            np.savez_compressed(file, **saved)
            write(os.path.join(self.folder, f"fold{fold}.npz"), file.getvalue())
        self._print_line(fold, t, saved)

    def save(self, fold, **parts):
        """With --save, write a trial's model, for torch.load(path, weights_only=True): of each part the state (a state
        dict, or a tensor) on the CPU, what the rows mean, the images' size, mean and std, the arguments."""
        if self.args.save:
            model = {name: copy.deepcopy(part).cpu() for name, part in parts.items()}
            for name, part in model.items():
                model[name] = part.state_dict() if isinstance(part, torch.nn.Module) else part
            model |= {name: np.array(self.saved[name]).tolist() for name in ("emotions", "row_emotion", "row_session")}
            model |= {"images": self.args.images, "arguments": vars(self.args) | {"device": str(self.args.device)}}
            file = io.BytesIO()
            torch.save(model, file)
            write(os.path.join(self.folder, f"model{fold}.pt"), file.getvalue())

    def _print_line(self, fold, t, saved, remark=""):
        """The line of one fold and session: accuracies by each merge, metrics by the first, the loss at both ends."""
        shares, merges, steps = {}, self.info["merges"], saved[f"loss_{t}"]
        for name in saved["names"]:
            for how in merges:
                label = f"acc({how})" if name == "scores" else f"{name}({how})"
                shares[label] = accuracy(*outcome(saved, t, how, name)[:2])
        true, predicted, _ = outcome(saved, t, merges[0])
        shares |= {name: metric(true, predicted) for name, metric in METRICS.items()}
        if not self.header_printed:
            labels = "  ".join(f"{label:>5s}" for label in shares)
            print(f"fold  session   emotions  {labels}         loss  seconds")
            self.header_printed = True
        cells = "  ".join(f"{100 * share:{max(5, len(label))}.1f}" for label, share in shares.items())
        emotions = 1 + saved["row_emotion"][: saved[f"scores_{t}"].shape[1]].max()
        tenth = max(1, len(steps) // 10)
        loss = f"{steps[:tenth].mean():.2f} > {steps[-tenth:].mean():.2f}" if len(steps) else "-"
        line = f"{fold:4d}  {self.sessions[t].name:8s}  {emotions:8d}  {cells}  {loss:>11s}  {saved['seconds'][t]:7.1f}"
        print(f"{line}{remark}\n", end="", flush=True)  # in one piece: other processes print, too

    def summary(self):
        """Print means, standard deviations and the T x T matrix of all folds that are there, if those asked for are."""
        if not (self.folds or self.first):  # under torchrun who finished the last fold prints, else the first
            return
        names, merges, count = list(self.info["counts"]), self.info["merges"], self.info["fold_count"]
        folds = {fold: saved for fold in range(count) if (saved := read_fold(self.folder, self.info, fold))}
        if not set(self.asked) <= set(folds):
            return

        def print_line(label, *cells):
            texts = [f"{c:12.2f}" if isinstance(c, float) else f"{c:>12s}" for c in cells]
            print(f"{label:28s}{''.join(texts)}\n", end="", flush=True)  # in one piece, as above

        print(f"\n{len(folds)} of {count} folds, in %")
        if self.info["arguments"]["protocol"] == "loso":  # a fold is one person: only pooled numbers mean anything
            print_line("pooled over subjects", "accuracy", *METRICS)
            for how in (merges[0], "majority"):
                true, predicted, _ = pooled(folds, 0, how)
                print_line(how, *(100 * metric(true, predicted) for metric in (accuracy, *METRICS.values())))
        else:
            print_line("accuracy", *(f"S{t + 1} {name}" for t, name in enumerate(names)), "avg", "last")
            for how in (*merges, "majority"):
                a = curve(folds, how)
                print_line(f"{how}, mean over folds", *a.mean(0))
                if len(a) > 1:
                    print_line("  +- standard deviation", *a.std(0, ddof=1))
            print(f"\non the tests of each session (columns), after training on each, by {merges[0]}, folds pooled")
            for t, name in enumerate(names):
                print_line(f"after {name}", *sources(folds, t, merges[0]))
        out = os.path.dirname(os.path.dirname(self.folder)) or "."
        print(f"files: {self.folder}; all runs as a table: python -m tools.report {out}")


# ---- a run on disk ---------------------------------------------------------------------------------------------------
def describe(args, sessions, tests, folds_hashes, merges):
    """All that the numbers depend on: runs that agree here give the same on the same machine."""
    elsewhere = "folds out save data images weights device loaded code".split()  # hashed below, or change no number
    cuts = [[s.keys.tolist(), *(test.tolist() for test in own)] for s, own in zip(sessions, tests)]
    tests_hash = _sha(cuts)[:12]
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy", "pillow")}
    versions |= {"cuda": torch.version.cuda, "python": sys.version.split()[0]}
    return {
        "arguments": {name: value for name, value in vars(args).items() if name not in elsewhere},
        "merges": list(merges),
        "device": args.device.type,
        "synthetic": args.data is None,
        "fold_count": len(tests[0]),
        "counts": {s.name: {"samples": len(s.keys), "subjects": len(np.unique(s.subjects))} for s in sessions},
        "images": _sha([session.digest for session in sessions])[:12],
        "tests": tests_hash,  # which image is in which fold
        "folds": _sha(folds_hashes)[:12] if folds_hashes[0] else tests_hash,
        "weights": args.loaded,
        "code": args.code,
        "versions": versions,
    }


def name_of(args):
    """The name of a run, its folder's. Runs of one name may still differ in what `describe` lists."""
    source = "synthetic" if args.data is None else os.path.basename(os.path.abspath(args.data))
    parts = [args.method, args.backbone, args.protocol, args.preset, source, "+".join(args.sessions)]
    parts += [f"{name}={value}" for name, value in args.changed.items()]
    return re.sub(r"[^\w.+=-]", "_", "-".join([*parts, f"seed{args.seed}"]))


def code_of(script, loaded):
    """{path: hash of its syntax} of a script and of all that it imports, directly or not, from its own or this folder.
    Ends with one line if a file is newer than `loaded` (seconds since 1970): it may be other code than what runs."""
    todo, found = [script], {}
    while todo:
        path = todo.pop()
        if max(os.stat(path).st_mtime, os.stat(path).st_ctime) > loaded:  # the second: put there by a rename
            sys.exit(f"error: {path}: changed after it was loaded; start again, in a notebook the kernel")
        with open(path, "rb") as file:
            tree = ast.parse(file.read())
        found[os.path.relpath(path, HERE)] = _sha(ast.dump(tree))[:12]
        imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        for name in [f"{getattr(node, 'module', '') or ''}.{alias.name}" for node in imports for alias in node.names]:
            parts = name.strip(".").split(".")  # a package, a module, a name in it
            for folder in {os.path.dirname(script), os.path.dirname(path), HERE}:  # the second: relative imports
                places = [os.path.join(folder, *parts[: n + 1]) for n in range(len(parts))]
                files = [place + end for place in places for end in (".py", f"{os.sep}__init__.py")]
                todo += [f for f in files if os.path.isfile(f) and os.path.relpath(f, HERE) not in found]
    return dict(sorted(found.items()))


def _sha(thing):
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()


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
        if saved["identity"] != _sha(info) or saved["fold"] != fold:
            raise ValueError("of another run or of another fold")
    except Exception as error:  # a broken archive can raise almost anything
        print(f"note: {path}: not used ({' '.join(str(error).split())})", file=sys.stderr)
        return None
    return saved


def outcome(saved, t, how="sum", name="scores"):
    """(true, predicted, source session) of one fold's tests after session t, (n,) int each, from its file's arrays.
    how is a way of rch.remap, or "majority": always the emotion that was commonest in training so far."""
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
    return 100 * np.array([[*line, np.mean(line), line[-1]] for line in a])


def sources(folds, t, how="sum"):
    """Accuracy in percent on the tests of each session 0..t after training on session t, pooled: t + 1 numbers."""
    true, predicted, source = pooled(folds, t, how)
    return [100 * accuracy(true[source == s], predicted[source == s]) for s in range(t + 1)]
