"""The tests of this project, with pytest; and two commands that measure it.

python -m pytest test_all.py       a few minutes on two CPU cores, no network, no data
python test_all.py --bench         ratios: the ridge, the training loop, whole commands
python test_all.py --table         the results table of the README, from every run that it holds

The method files are flat scripts, so the tests watch them from outside: `watch` runs a script's main() in this process
and looks at its local variables whenever a session has been tested.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import doctest
import functools
import importlib
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import cv2
import numpy as np
import openpyxl
import pytest
import torch
from openpyxl.styles import Font
from PIL import Image
from skimage.data import astronaut
from sklearn.model_selection import KFold
from torch.nn import functional as F

import common
import data
import dualprompt
import finetune
import l2p
import protocols
import ranpac
import rch

HERE = os.path.dirname(os.path.abspath(__file__))
METHODS = ["finetune", "der", "foster", "l2p", "dualprompt", "ranpac"]
SHORT = ["--folds", "0", "--epochs-first", "1", "--epochs-next", "1"]
TWO = ["--sessions", "casme2", "samm"]


# ---- helpers ---------------------------------------------------------------------------------------------------------
def command(*words, cwd, check=True):
    """Run a script of this project as a user does, in the folder cwd; returns the finished process."""
    words = [sys.executable, os.path.join(HERE, words[0]), *map(str, words[1:])]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def watch(monkeypatch, tmp_path):
    """watch(method, *flags, at_record=f) runs method.main() here and calls f(t, main's locals) after each session."""

    def run(method, *flags, at_record=None):
        module = importlib.import_module(method)
        monkeypatch.setattr(sys, "argv", [module.__file__, *flags, "--out", str(tmp_path / "results")])
        record = protocols.Run.record

        def recording(self, fold, t, rows, scores, **others):
            record(self, fold, t, rows, scores, **others)
            if at_record:
                at_record(t, sys._getframe(1).f_locals)

        with monkeypatch.context() as patch:
            patch.setattr(protocols.Run, "record", recording)
            module.main()
        return results(tmp_path / "results")

    return run


def results(root):
    """The fold files of the only run below root: {fold: {name: array}}."""
    ((_, _, folds),) = protocols.find_runs(str(root))
    return folds


def same(a, b):
    """Whether two runs' folds hold the same numbers; times and the runs' identities are not compared."""
    skip = ("seconds", "identity")
    return a.keys() == b.keys() and all(
        np.array_equal(a[f][name], b[f][name]) for f in a for name in a[f] if name not in skip
    )


def error_of(run, capsys):
    """The one line of a user's mistake: run() must end with status 2 and one line on stderr, without a traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def small_stream(every=4):
    """Every 4th sample of the synthetic stream."""
    pick = slice(None, None, every)
    return [
        data.Session(s.name, s.images[pick], s.emotions[pick], s.subjects[pick], s.keys[pick])
        for s in data.synthetic(common.TINY_SIZE)
    ]


def write_images(root, names, size=8):
    """Small grey images at root/<name> for every name."""
    for name in names:
        os.makedirs(os.path.dirname(root / name), exist_ok=True)
        Image.new("RGB", (size, size), "grey").save(root / name)


def tiny_args(backbone, weights=None):
    """The arguments that make_backbone and extract read, for the tiny preset."""
    weights = weights or os.path.join(HERE, "tiny", f"{backbone}.pt")
    return argparse.Namespace(preset="tiny", backbone=backbone, weights=weights, seed=0, image_size=common.TINY_SIZE,
                              device=torch.device("cpu"), mean=[0.5] * 3, std=[0.5] * 3)  # fmt: skip


def states(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal_states(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- folds and metrics -----------------------------------------------------------------------------------------------
def test_folds_are_those_of_the_paper():
    for session in data.synthetic(16, sessions=list(data.TABLE1)):
        people = np.array(sorted(set(session.subjects.tolist())))
        slcv = protocols.split(session.subjects, "slcv")
        for i in range(5):
            assert slcv[i].tolist() == [n for n, s in enumerate(session.subjects) if s in people[i::5]]
        ilcv = protocols.split(session.subjects, "ilcv")
        expected = KFold(5, shuffle=True, random_state=42).split(session.subjects)
        assert all(np.array_equal(mine, theirs) for mine, (_, theirs) in zip(ilcv, expected))
        loso = protocols.split(session.subjects, "loso")
        assert len(loso) == data.SUBJECTS[session.name] and all(len(set(session.subjects[f])) == 1 for f in loso)
        for folds in (slcv, ilcv, loso):
            assert np.array_equal(np.sort(np.concatenate(folds)), np.arange(len(session.keys)))


def test_subjects_are_sorted_as_numbers():
    """Text order, 1 10 100 11 2 9, would give other folds."""
    subjects = np.repeat([9, 10, 100, 2, 1, 11], [1, 2, 3, 4, 5, 6])
    assert [len(fold) for fold in protocols.split(subjects, "slcv")] == [5 + 3, 4, 1, 2, 6]


def test_metrics_by_hand():
    true, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 3, 0]
    assert protocols.accuracy(true, predicted) == 3 / 6
    # class 0: TP 2, FP 1, FN 1; class 1: TP 1, FP 1, FN 1; class 2: TP 0; class 3 is not in `true` and does not count
    assert protocols.uf1(true, predicted) == pytest.approx((4 / 6 + 2 / 4 + 0) / 3)
    assert protocols.uar(true, predicted) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    low, high = protocols.interval(50, 100)
    assert low == pytest.approx(0.4038, abs=1e-4) and high == pytest.approx(0.5962, abs=1e-4)  # Wilson, by hand


# ---- RCH -------------------------------------------------------------------------------------------------------------
def test_rows_and_remapping_by_hand():
    rows = rch.RCH()
    assert rows.add_session(["disgust", "happiness"]) == slice(0, 2)
    assert rows.add_session(["anger", "happiness"]) == slice(2, 4)
    assert rows.emotions == ["disgust", "happiness", "anger"]
    assert rows.row_emotion.tolist() == [0, 1, 2, 1] and rows.row_session.tolist() == [0, 0, 1, 1]
    assert rows.targets(["happiness", "anger"]).tolist() == [3, 2]  # the latest session's rows
    scores = np.log([[1.0, 2.0, 3.0, 4.0]])
    pair = rows.row_emotion, rows.row_session
    assert np.allclose(rch.remap(scores, *pair, "sum"), np.log([[1, 8, 3]]))
    assert np.allclose(rch.remap(scores, *pair, "prob"), [[0.1, 0.6, 0.3]])
    assert np.allclose(rch.remap(scores, *pair, "max"), np.log([[1, 4, 3]]))
    expected = [np.log(1) - np.log(2) / 2, np.log(8) - np.log(2) / 2 - np.log(12) / 2, np.log(3) - np.log(12) / 2]
    assert np.allclose(rch.remap(scores, *pair, "centered"), [expected])


def test_equation_3_is_the_sum_of_weights_and_depends_on_a_constant():
    rows = rch.RCH()
    for session in data.STREAM:
        rows.add_session(data.TABLE1[session])
    assert len(rows.row_emotion) == 23 and len(rows.emotions) == 9
    random = np.random.RandomState(0)
    x, h = random.randn(50, 8), random.randn(8, 23)
    final = np.stack([h[:, rows.row_emotion == e].sum(1) for e in range(9)], 1)  # H_final, column by column
    assert np.allclose(x @ final, rch.remap(x @ h, rows.row_emotion, rows.row_session, "sum"))
    for how in rch.WAYS:
        before, after = (rch.remap(s, rows.row_emotion, rows.row_session, how).argmax(1) for s in (x @ h, x @ h - 30))
        assert (before == after).all() == (how != "sum")  # the same constant on all rows: no loss ever sees it
    # With that constant, only the two emotions of a single session, repression and contempt, are left.
    assert {rows.emotions[e] for e in rch.remap(x @ h - 30, rows.row_emotion, rows.row_session).argmax(1)} <= {
        "repression",
        "contempt",
    }


# ---- the ridge -------------------------------------------------------------------------------------------------------
def ridge_sessions(m=500):
    generator = torch.Generator().manual_seed(0)
    hs = [torch.randn(n, m, generator=generator).relu() for n in (60, 40, 80, 150)]
    ys, rows = [], 0
    for h, count in zip(hs, (5, 5, 6, 7)):
        y = torch.randint(count, (len(h),), generator=generator) + rows
        rows += count
        ys.append(F.one_hot(y, rows))
    return hs, ys


def dense_ridge(h, y, lam):
    h, y = h.double(), y.double()
    return torch.linalg.solve(h.T @ h + lam * torch.eye(h.shape[1], dtype=torch.float64), h.T @ y)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_low_rank_ridge_is_the_dense_ridge():
    hs, ys = ridge_sessions()
    ridge, backwards = ranpac.LowRankRidge(500), ranpac.LowRankRidge(500)
    for h, y in zip(hs, ys):
        ridge.update(h, y)
    ys = [F.pad(y, (0, 23 - y.shape[1])) for y in ys]
    for h, y in reversed(list(zip(hs, ys))):
        backwards.update(h, y)
    for lam in [lam for lam in ranpac.LAMBDAS if lam >= 1]:
        dense = dense_ridge(torch.cat(hs), torch.cat(ys), lam)
        assert relative(ridge.weights(lam), dense) < 1e-8
        assert relative(ridge.weights(lam), backwards.weights(lam)) < 1e-8


def test_sum_of_rows_is_ridge_on_emotions():
    hs, ys = ridge_sessions()
    rows = rch.RCH()
    for session in data.STREAM:
        rows.add_session(data.TABLE1[session])
    merge = torch.from_numpy(np.eye(9)[rows.row_emotion])  # A (R, E)
    by_rows, by_emotions = ranpac.LowRankRidge(500), ranpac.LowRankRidge(500)
    for h, y in zip(hs, ys):
        by_rows.update(h, y)
        by_emotions.update(h, F.pad(y, (0, 23 - y.shape[1])).double() @ merge)
    for lam in (1.0, 1e3):
        scores = torch.cat(hs).double() @ by_rows.weights(lam)
        summed = torch.from_numpy(rch.remap(scores.numpy(), rows.row_emotion, rows.row_session, "sum"))
        assert relative(summed, torch.cat(hs).double() @ by_emotions.weights(lam)) < 1e-10


def test_lambda_is_the_one_that_dense_solves_choose():
    hs, ys = ridge_sessions(100)
    torch.manual_seed(3)
    chosen = ranpac.choose_lambda(hs[3], ys[3])
    torch.manual_seed(3)
    order = torch.randperm(150)
    held_out, fitted = order[:30], order[30:]
    h, y = hs[3].double(), ys[3].double()
    errors = {}
    for lam in [lam for lam in ranpac.LAMBDAS if lam >= 1e-3]:  # below that the dense solve is the worse one
        errors[lam] = F.mse_loss(h[held_out] @ dense_ridge(h[fitted], y[fitted], lam), y[held_out]).item()
    assert chosen == max(lam for lam, error in errors.items() if error <= 1.01 * min(errors.values()))
    assert len({round(error, 6) for error in errors.values()}) > 5  # the errors do differ


# ---- the data --------------------------------------------------------------------------------------------------------
def test_stream_has_the_sheets_counts_and_is_reproducible():
    first, again, other = data.synthetic(24), data.synthetic(24), data.synthetic(24, seed=1)
    assert [len(s.keys) for s in first] == [246, 136, 292, 860]
    assert [len(set(s.subjects.tolist())) for s in first] == [26, 27, 30, 94]
    for a, b, c in zip(first, again, other):
        assert {e: a.emotions.count(e) for e in data.TABLE1[a.name]} == data.COUNTS[a.name]
        assert a.images.tobytes() == b.images.tobytes() != c.images.tobytes()
        assert a.keys == sorted(a.keys, key=lambda key: (key.split("_", 1)[1].split("/")[0], key.split("/")[1]))
    assert data.synthetic(24, sessions=["mmew"])[0].images.tobytes() == first[2].images.tobytes()


def test_flow_is_coded_by_direction_and_size():
    flow = np.zeros((1, 4, 4, 2))
    directions = [(1, 0), (0.5, np.sqrt(0.75)), (-0.5, np.sqrt(0.75)), (-1, 0)]  # 0, 60, 120, 180 degrees, y down
    for x, (dx, dy) in enumerate(directions):
        flow[0, 0, x] = 2 * dx, 2 * dy
    flow[0, 1, 0] = 1, 0
    image = data.flow_to_image(flow)[0]
    assert image[:, 0].T.tolist() == [[255, 0, 0], [255, 255, 0], [0, 255, 0], [0, 255, 255]]
    assert image[:, 1, 0].tolist() == [128, 0, 0] and image[:, 2:].max() == 0
    assert data.flow_to_image(np.zeros((1, 4, 4, 2))).max() == 0  # no motion at all: black, no division by zero


def test_processed_folder_with_every_alias(tmp_path, monkeypatch, capsys):
    write_images(
        tmp_path, ["samm_other/006_1_2_f.png", "samm_others/020_1.PNG", "samm_Happy/7.jpg", "samm_anger/s11_6.bmp"]
    )
    write_images(tmp_path, ["samm_disgust/006_2.png", "casme3_sadness/spNO.12a355.png", "casme3_sad/sub003_f10.png"])
    (tmp_path / "samm_anger" / "Thumbs.db").write_text("not an image")
    (tmp_path / "samm_anger" / ".hidden.png").write_text("not an image")
    listing = os.listdir
    orders = []
    for reverse in (False, True):
        monkeypatch.setattr(os, "listdir", lambda path, reverse=reverse: sorted(listing(path), reverse=reverse))
        (samm,) = data.load(str(tmp_path), ["samm"], 8)
        orders.append(samm.keys)
    assert orders[0] == orders[1]
    assert samm.emotions == ["anger", "happiness", "others", "others"]
    assert samm.subjects.tolist() == [11, 7, 6, 20]
    assert "left out: 1 samples of samm_disgust" in capsys.readouterr().out
    (casme3,) = data.load(str(tmp_path), ["casme3"], 8)
    assert casme3.keys == ["casme3_sadness/spNO.12a355.png"] and casme3.emotions == ["sad"]  # _f10 is auxiliary flow


def test_exported_stream_gives_the_numbers_of_the_embedded_one(tmp_path):
    command("data.py", "export", "--out", tmp_path / "processed", cwd=tmp_path)
    flags = ["--features", "pixels", "--folds", "0", "1"]
    command("ranpac.py", *flags, "--out", "embedded", cwd=tmp_path)
    command("ranpac.py", *flags, "--data", "processed", "--preset", "tiny", "--out", "read", cwd=tmp_path)
    assert same(results(tmp_path / "embedded"), results(tmp_path / "read"))
    # The folder is the same to the commands, and another export does not overwrite it.
    check = command("data.py", "check", "--data", "processed", cwd=tmp_path).stdout
    assert "860 samples of   860" in check and check.count("\n") == 4 + 23
    assert command("data.py", "export", "--out", "processed", cwd=tmp_path, check=False).returncode == 2
    command("data.py", "show", "--data", "processed", "--out", "sheet.png", cwd=tmp_path)
    assert Image.open(tmp_path / "sheet.png").width > 500


# ---- every script, as a user runs it ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "method, backbone",
    [(method, "vit") for method in METHODS] + [(method, "swin") for method in METHODS[:3]] + [("ranpac", "resnet")],
)
def test_every_script(method, backbone, tmp_path):
    flags = ["--backbone", backbone, "--protocol", "slcv" if backbone == "swin" else "ilcv"]
    out = command(f"{method}.py", *flags, *SHORT, cwd=tmp_path).stdout
    assert out.count("Synthetic stream") == 1 and out.startswith("Synthetic stream, tiny preset")
    lines = re.findall(r"^ +0  (\w+) +(\d+) +(\d+\.\d)", out, re.M)
    assert [line[:2] for line in lines] == [("casme2", "5"), ("samm", "7"), ("mmew", "9"), ("casme3", "9")]
    assert 0 < float(lines[0][2]) <= 100 and "A-tilde" in out
    table = command("protocols.py", "results", "--details", cwd=tmp_path).stdout
    label = f"{method} epochs_first=1" + " epochs_next=1" * (method != "ranpac")  # which has no later epochs
    assert f"| {backbone} | {label} (1 of 5 folds) |" in table and "| contempt |" in table


@pytest.mark.parametrize(
    "flags", [["finetune", "--joint"], ["finetune", "--no-rch"], ["ranpac", "--features", "frozen"]]
)
def test_controls(flags, tmp_path):
    assert "S4 casme3" in command(f"{flags[0]}.py", *flags[1:], *SHORT, cwd=tmp_path).stdout


def test_help_is_quick_and_shows_defaults(tmp_path):
    out = command("ranpac.py", "--help", cwd=tmp_path).stdout
    assert "paper 60, tiny 10" in out and "--features" in out
    # Quick, since timm (seconds) is imported only where a backbone is made.
    code = ["import sys, ranpac", "sys.argv = ['ranpac.py', '--help']", "try: ranpac.main()",
            "finally: assert 'timm' not in sys.modules"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_six_files_share_one_skeleton():
    """Same banners, loops and closing calls in the same order in all six, so that a diff of two shows the methods."""
    landmarks = re.compile(
        r" *(# ---- .*|for (fold|t, session|epoch|batch) in .*|def main.*|args = .*|run\.record.*|run\.sum.*)"
    )
    skeletons = {}
    for method in METHODS:
        with open(os.path.join(HERE, f"{method}.py")) as file:
            lines = [match.group(1) for match in map(landmarks.fullmatch, file.read().splitlines()) if match]
        lines = [re.sub(r"run\.record\(.*", "run.record", line) for line in lines if "own pieces" not in line]
        skeletons[method] = list(dict.fromkeys(re.sub(r"range\(.*\)", "range", line) for line in lines))
    for method, skeleton in skeletons.items():
        assert skeleton == skeletons["finetune"], f"{method}.py drifted from finetune.py"
    assert len(skeletons["finetune"]) >= 13


def readme():
    with open(os.path.join(HERE, "README.md")) as file:
        return file.read()


def readme_commands():
    blocks = re.findall(r"```bash\n(.*?)```", readme(), re.S)
    return [line for block in blocks for line in block.splitlines() if re.match(r"python (?!-m|test_all|common)", line)]


def test_readme_commands(tmp_path):
    """Every command of the README runs, in its order; what trains, for one epoch on one fold in the tiny preset."""
    commands = readme_commands()
    assert len(commands) >= 5
    for session, maker in MAKERS.items():
        maker(f"{tmp_path}/raw/{session}")  # for the prepare command
    for line in commands:
        words = line.split("#")[0].split()[1:]
        if words[0][:-3] in METHODS:
            words += SHORT if "--folds" not in words else SHORT[2:]
            words += ["--preset", "tiny"] if "--data" in words else []
        command(*words, cwd=tmp_path)


def test_readme_examples():
    failed, tried = doctest.testfile(os.path.join(HERE, "README.md"), module_relative=False)
    assert tried >= 5 and not failed


def test_readme_shows_this_stream(watch, capsys):
    """The hash of folds and images that the README prints: the stream is the same, byte for byte, on every machine."""
    watch("ranpac", "--features", "pixels", "--sessions", *data.STREAM, "--folds", "0")
    (shown,) = re.findall("folds and data (.*)", capsys.readouterr().out)
    assert f"folds and data {shown}\n" in readme()


def test_readme_line_counts():
    counts = dict(re.findall(r"^\| \[`(\w+\.py)`\]\(\w+\.py\) \| (\d+) \|", readme(), re.M))
    assert set(counts) == {f"{name}.py" for name in (*METHODS, "common", "data", "protocols", "rch", "test_all")}
    for name, count in counts.items():
        with open(os.path.join(HERE, name)) as file:
            assert int(count) == len(file.readlines()), name


def test_the_stream_is_as_hard_as_real_data_is(watch, tmp_path):
    """The pixels' control drops from ILCV to SLCV and over sessions; a trained method is well above the majority."""
    curves = {}
    for protocol in ("ilcv", "slcv"):
        shutil.rmtree(tmp_path / "results", ignore_errors=True)
        curves[protocol] = protocols.curve(watch("ranpac", "--features", "pixels", "--protocol", protocol)).mean(0)
        assert curves[protocol][3] < curves[protocol][0] - 5
    assert curves["slcv"][0] < curves["ilcv"][0] - 5
    shutil.rmtree(tmp_path / "results")
    folds = watch("finetune", "--protocol", "slcv", "--sessions", "casme2")
    often = np.mean([protocols.majority(fold, 0) for fold in folds.values()])
    assert protocols.curve(folds)[:, 0].mean() > 1.25 * 100 * often


def test_estimate_and_backbones_of_the_paper_preset(watch, monkeypatch, capsys, tmp_path):
    """The CPU estimate works for trained and for frozen backbones; odd model names end with one line."""
    small = [data.Session(s.name, np.zeros((len(s.keys), 3, 224, 224), np.uint8), s.emotions, s.subjects, s.keys)
             for s in small_stream(8)[:1]]  # fmt: skip
    monkeypatch.setattr(common, "load_sessions", lambda args: small)
    flags = ["--preset", "paper", "--weights", "none", "--sessions", "casme2", "--folds", "0", "--epochs-first", "1"]
    for method in ("l2p", "finetune"):
        watch(method, *flags, "--backbone", "vit_tiny_patch16_224")
        assert "minutes of training the backbone" in capsys.readouterr().out
        shutil.rmtree(tmp_path / "results")
    for name in ("vit_base_patch16_224.no_such_tag", "vit_small_patch16_18x2_224"):
        assert name in error_of(lambda name=name: watch("l2p", *flags, "--backbone", name), capsys)


def test_readme_points_at_the_right_lines():
    places = re.findall(r"\| \[`(\w+\.py):(\d+)`\]\(\w+\.py#L\d+\) \| `(.*)` \|$", readme(), re.M)
    assert len(places) >= 8
    for name, number, words in places:
        with open(os.path.join(HERE, name)) as file:
            assert words in file.readlines()[int(number) - 1], (name, number)


# ---- the report ------------------------------------------------------------------------------------------------------
def test_loso_pools_over_subjects(watch, monkeypatch):
    """One fold per subject of CASME II, and by hand: folds of 3 and 1 samples count by sample, not by fold."""
    flags = ["--protocol", "loso", "--sessions", "casme2", "--epochs-first", "1"]
    folds = watch("finetune", *flags, "--folds", "0", "25")
    assert list(folds) == [0, 25] and all(len(set(fold["subjects"])) == 1 for fold in folds.values())
    emotions = np.array(data.TABLE1["casme2"])

    def fold(labels, answers):
        scores = np.eye(5, dtype=np.float32)[answers]
        return {"scores_0": scores, "labels": emotions[labels], "emotions": emotions, "row_emotion": np.arange(5),
                "row_session": np.zeros(5, int), "train_counts": np.ones((1, 5), int),
                "session": np.zeros(len(labels), int)}  # fmt: skip

    hand = {0: fold([0, 0, 1], [0, 1, 1]), 1: fold([1], [0])}  # true 0 0 1 1, answers 0 1 1 0
    info = {"protocol": "loso", "sessions": ["casme2"], "logits": True}
    assert protocols.report_columns(info, hand) == (["accuracy", "F1", "UAR"], [50.0, 50.0, 50.0], [None] * 3)
    # True 0 0 1 1 2, answers 0 1 1 1 0: F1 = (2/4 + 4/5 + 0) / 3, UAR = (1/2 + 1 + 0) / 3.
    hand[1] = fold([1, 2], [1, 0])
    assert protocols.report_columns(info, hand)[1] == pytest.approx([60.0, 130 / 3, 50.0])
    # The commonest training emotion is 0 in both folds: right for 2 of 5 samples, though for 1/3 by the mean of folds.
    info |= {"fold_count": 2, "backbone": "vit", "method": "finetune", "preset": "paper", "synthetic": False,
             "default_sessions": False, "changed": [], "variant": ""}  # fmt: skip
    lines = protocols.summarise(info, hand).splitlines()
    assert lines[1].split()[-2:] == ["S1", "casme2"] and {len(line) for line in lines[1:7]} == {44}
    assert ["always the commonest emotion", "40.00"] == re.split(r" {2,}", lines[6])
    assert lines[7] == "the paper: accuracy 76.60, F1 72.30, UAR 71.90"


def test_paper_stands_beside_comparable_runs_only(watch, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common, "load_sessions", lambda args: small_stream())
    watch("ranpac", "--features", "frozen", *SHORT)
    ((folder, info, folds),) = protocols.find_runs(str(tmp_path / "results"))
    assert "the paper" not in protocols.table([(folder, info, folds)])
    real = info | {"synthetic": False, "preset": "paper", "variant": "", "changed": []}
    (line,) = [line for line in protocols.table([(folder, real, folds)]).splitlines() if "the paper" in line]
    assert line == "| vit | ranpac, the paper | 53.23 | 46.18 | 50.50 | 43.84 | 48.44 | 43.84 | - |"
    assert "53.23" in protocols.summarise(real, folds)
    for change in ({"synthetic": True}, {"preset": "tiny"}, {"variant": "frozen"}, {"changed": ["lr=1"]},
                   {"default_sessions": False}):  # fmt: skip
        assert protocols.paper_numbers(real | change) is None
    loso = real | {"protocol": "loso", "sessions": ["casme2"], "method": "finetune"}
    assert protocols.paper_numbers(loso) == (76.6, 72.3, 71.9)
    # The table's printed means are those of the paper's own columns.
    for row in protocols.TABLE2.values():
        assert np.mean(row[:4]) == pytest.approx(row[4], abs=0.011) and row[3] == row[5]

    protocols.write_csv([(folder, real, folds)], str(tmp_path / "all.csv"))
    with open(tmp_path / "all.csv") as file:
        lines = list(csv.DictReader(file))
    assert [line["remap"] for line in lines] == ["sum", "max"]
    expected = protocols.curve(folds)[0]
    assert [float(lines[0][c]) for c in ("S1", "S4", "A-bar")] == pytest.approx(expected[[0, 3, 4]], abs=1e-3)
    protocols.plot([(folder, real, folds), (folder, real | {"backbone": "swin"}, folds)], str(tmp_path / "plot.png"))
    assert Image.open(tmp_path / "plot.png").width > 400


def test_fifth_session(watch):
    flags = ["--sessions", "casme2", "dfme", "--features", "pixels"]
    (fold,) = watch("ranpac", *flags, "--folds", "0").values()
    assert fold["scores_1"].shape[1] == 12 and len(fold["emotions"]) == 9  # disgust, happiness and surprise are shared


def test_forgetting_and_sources_by_hand():
    emotions = np.array(["disgust", "anger"])
    fold = {"scores_0": np.float32([[1], [1]]), "scores_1": np.float32([[0, 1], [1, 0], [0, 1], [0, 1]]),
            "labels": np.array(["disgust", "disgust", "anger", "disgust"]), "emotions": emotions,
            "session": np.array([0, 0, 1, 1]), "row_emotion": np.arange(2), "row_session": np.arange(2),
            "train_counts": np.array([[3, 0], [3, 3]])}  # fmt: skip
    matrix = protocols.per_source({0: fold})
    assert matrix[0, 0] == 1 and matrix[1].tolist() == [0.5, 0.5] and np.isnan(matrix[0, 1])
    assert protocols.forgetting({0: fold}) == 0.5
    assert protocols.majority(fold, 1) == 0.75


# ---- what is trained and what is frozen ------------------------------------------------------------------------------
def test_finetune_trains_all_but_the_old_heads(watch, monkeypatch):
    monkeypatch.setattr(common, "load_sessions", lambda args: small_stream())
    seen = []

    def look(t, local):
        heads = [states(head) for head in local["heads"]]
        backbone = states(local["backbone"])
        assert len(heads) == t + 1 and [len(h["bias"]) for h in heads] == [5, 5, 6, 7][: t + 1]
        assert not local["backbone"].training
        if t:
            old_heads, old_backbone = seen[-1]
            assert all(equal_states(a, b) for a, b in zip(old_heads, heads))
            assert all(not torch.equal(old_backbone[name], backbone[name]) for name, p in
                       local["backbone"].named_parameters() if p.requires_grad)  # fmt: skip
        seen.append((heads, backbone))

    watch("finetune", "--backbone", "resnet", *SHORT, at_record=look)
    assert len(seen) == 4


def test_ranpac_freezes_the_backbone_after_session_1(watch, monkeypatch):
    monkeypatch.setattr(common, "load_sessions", lambda args: small_stream())
    seen = []

    def look(t, local):
        seen.append(states(local["backbone"]))
        if t == 0:
            pretrained = states(local["pretrained"])
            moved = {name for name in pretrained if not torch.equal(pretrained[name], seen[0][name])}
            assert {name for name, _ in local["backbone"].named_parameters()} <= moved
            assert any("running_mean" in name for name in moved)
        assert equal_states(seen[0], seen[-1])  # BatchNorm's buffers included
        assert local["weights"].shape == (10_000, [5, 10, 16, 23][t])

    watch("ranpac", "--backbone", "resnet", *SHORT, at_record=look)
    assert len(seen) == 4


def test_joint_starts_over_with_all_data(watch, monkeypatch, optimizers):
    monkeypatch.setattr(common, "load_sessions", lambda args: small_stream())
    sizes = []

    def look(t, local):
        sizes.append((len(local["x"]), len(local["heads"]), local["heads"][0].out_features))

    starts = []
    optimizers.new = lambda local: starts.append(equal_states(states(local["backbone"]), states(local["pretrained"])))
    watch("finetune", "--joint", *SHORT, at_record=look)
    assert starts == [True] * 4
    parts = np.cumsum([len(s.keys) - len(protocols.split(s.subjects, "ilcv")[0]) for s in small_stream()])
    assert sizes == [(parts[0], 1, 5), (parts[1], 1, 7), (parts[2], 1, 9), (parts[3], 1, 9)]


def test_the_stand_in_sees_more_than_an_untrained_network():
    """Frozen features of tiny/*.pt against random weights: ridge on sessions 1 and 3 alone, ILCV."""
    sessions = [s for s in data.synthetic(common.TINY_SIZE) if s.name in ("casme2", "mmew")]
    for name in common.CHECKPOINTS:
        scores = []
        for weights in (os.path.join(HERE, "tiny", f"{name}.pt"), "none"):
            args = tiny_args(name, weights)
            backbone = common.make_backbone(args)
            right = []
            for session in sessions:
                f = common.extract(backbone, torch.from_numpy(session.images), args)
                y = torch.tensor([data.TABLE1[session.name].index(e) for e in session.emotions])
                h = (f @ torch.randn(f.shape[1], 2000, generator=torch.Generator().manual_seed(0))).relu()
                for test in protocols.split(session.subjects, "ilcv"):
                    train = np.setdiff1d(np.arange(len(y)), test)
                    ridge = ranpac.LowRankRidge(2000)
                    ridge.update(h[train], F.one_hot(y[train]))
                    weights_ = ridge.weights(ranpac.choose_lambda(h[train], F.one_hot(y[train])))
                    right.append(((h[test].double() @ weights_).argmax(1) == y[test]).float().mean().item())
            scores.append(100 * np.mean(right))
        print(f"{name}: stand-in {scores[0]:.1f}, untrained {scores[1]:.1f}")
        assert scores[0] > scores[1] + 8


def test_stand_in_files_are_small_safe_and_say_how_they_were_made():
    total = 0
    for name in common.CHECKPOINTS:
        path = os.path.join(HERE, "tiny", f"{name}.pt")
        total += os.path.getsize(path)
        made = torch.load(path, weights_only=True)["made"]
        assert f"pretrain --backbone {name}" in made["command"]
        assert made["held_out_loss"] < 0.25 * made["no_motion_loss"]
    assert total < 6e6


def test_pretrain_makes_a_file_that_loads(tmp_path):
    flags = ["--backbone", "resnet", "--images", "200", "--epochs", "1", "--out", "small.pt"]
    assert "held-out loss" in command("common.py", "pretrain", *flags, cwd=tmp_path).stdout
    command("ranpac.py", "--backbone", "resnet", "--weights", "small.pt", *TWO, *SHORT, cwd=tmp_path)


def main_locals():
    """The local variables of the method's main() that is being run further up the stack."""
    frame = sys._getframe(1)
    while frame.f_code.co_name != "main":
        frame = frame.f_back
    return frame.f_locals


@pytest.fixture
def optimizers(monkeypatch):
    """Calls .new(main's locals) when a method makes an optimizer and .step(main's locals) before each of its steps."""
    spy = argparse.Namespace(new=lambda local: None, step=lambda local: None)
    for name in ("AdamW", "Adam"):

        class Spied(getattr(torch.optim, name)):
            def __init__(self, *args, **flags):
                super().__init__(*args, **flags)
                spy.new(main_locals())

            def zero_grad(self):
                spy.step(main_locals())
                super().zero_grad()

        monkeypatch.setattr(torch.optim, name, Spied)
    return spy


def softmax(scores):
    return np.exp(scores) / np.exp(scores).sum(1, keepdims=True)


def cross_entropy(scores, y):
    return -np.mean([np.log(p[k]) for p, k in zip(softmax(scores), y)])


# ---- DER -------------------------------------------------------------------------------------------------------------
def test_der_freezes_old_extractors_and_grows_one_head(watch, monkeypatch, optimizers):
    monkeypatch.setattr(common, "load_sessions", lambda args: small_stream())
    finished, losses = [], []

    def new(local):
        t = local["t"]
        if t:  # the head has just grown: its old block and biases are copies; the new extractor is a copy of the last
            head, old = local["head"], local["old_head"]
            assert torch.equal(head.weight[: local["new"].start, : t * local["d"]], old.weight)
            assert torch.equal(head.bias[: local["new"].start], old.bias)
            assert equal_states(local["extractors"][-1].state_dict(), finished[-1][-1])
        assert local["head"].weight.shape == (local["new"].stop, (t + 1) * local["d"])

    def step(local):  # the loss, written out
        y = local["y"][local["batch"]].numpy()
        expected = cross_entropy(local["logits"].detach().double().numpy(), y)
        if local["t"]:
            aux = local["aux"].detach().double().numpy()
            assert aux.shape[1] == 1 + len(local["emotions"])
            words = [local["rows"].emotions[local["rows"].row_emotion[row]] for row in y]
            expected += cross_entropy(aux, [1 + local["emotions"].index(word) for word in words])
        assert local["loss"].item() == pytest.approx(expected, rel=1e-4)
        losses.append(expected)

    def look(t, local):
        extractors = [states(extractor) for extractor in local["extractors"]]
        assert len(extractors) == t + 1 and not any(extractor.training for extractor in local["extractors"])
        if t:
            assert all(equal_states(a, b) for a, b in zip(finished[-1], extractors))  # BatchNorm's buffers too
            moved = [not torch.equal(finished[-1][-1][name], extractors[-1][name]) for name in extractors[-1]]
            assert all(moved)
        finished.append(extractors)

    optimizers.new, optimizers.step = new, step
    watch("der", "--backbone", "resnet", *SHORT, at_record=look)
    assert len(finished) == 4 and len(losses) > 4


# ---- FOSTER ----------------------------------------------------------------------------------------------------------
def test_foster_boosts_compresses_and_goes_on_from_the_student(watch, monkeypatch, optimizers):
    monkeypatch.setattr(common, "load_sessions", lambda args: small_stream())
    students, teachers, kinds = [], [], []

    def kd(scores, teacher):  # independent of foster.distillation: temperature 2, no factor 4
        return -np.mean((softmax(teacher / 2) * np.log(softmax(scores / 2))).sum(1))

    def new(local):
        t, rows = local["t"], local["new"].start
        compressing = t > 0 and len(local["trained"]) == len(list(local["student"].parameters())) + 2 and (
            local["student"] is not local["old"])  # fmt: skip
        kinds.append((t, "compression" if compressing else "boosting"))
        if compressing:  # the student starts from the old network and the old head
            assert equal_states(local["student"].state_dict(), local["old"].state_dict())
            assert torch.equal(local["student_head"].weight[:rows], local["old_head"].weight)
            assert torch.equal(local["student_head"].bias[:rows], local["old_head"].bias)
            teachers.append((states(local["old"]), states(local["backbone"]), states(local["head"])))
        elif t:  # boosting starts from the last session's student, and so does the new network
            assert equal_states(local["old"].state_dict(), students[-1][0])
            assert equal_states(local["backbone"].state_dict(), students[-1][0])
            assert equal_states(local["old_head"].state_dict(), students[-1][1])
            assert torch.equal(local["head"].weight[:rows, : local["d"]], local["old_head"].weight)
            assert torch.equal(local["head"].bias[:rows], local["old_head"].bias)

    def step(local):
        batch, y = local["batch"], local["y"][local["batch"]].numpy()
        z = local["logits"].detach().double().numpy()
        if kinds[-1][1] == "compression":
            expected = kd(z, local["teacher_scores"][batch].double().numpy())
        else:
            expected = cross_entropy(z, y)
            if local["t"]:
                expected += cross_entropy(local["new_logits"].detach().double().numpy(), y)
                expected += kd(z[:, : local["new"].start], local["old_scores"][batch].double().numpy())
        assert local["loss"].item() == pytest.approx(expected, rel=1e-4)

    def look(t, local):
        students.append((states(local["student"]), states(local["student_head"])))
        if t:
            now = [states(local[name]) for name in ("old", "backbone", "head")]
            assert all(equal_states(a, b) for a, b in zip(teachers[-1], now))  # the teacher rests during compression
            assert equal_states(now[0], students[-2][0])  # and the old network during both
            assert not equal_states(now[1], students[-2][0]) and not equal_states(students[-1][0], students[-2][0])

    optimizers.new, optimizers.step = new, step
    watch("foster", "--backbone", "resnet", *SHORT, at_record=look)
    later = [(t, kind) for t in (1, 2, 3) for kind in ("boosting", "compression")]
    assert kinds == [(0, "boosting"), *later]


# ---- L2P -------------------------------------------------------------------------------------------------------------
def block_token_by_token(block, tokens, prefix=None):
    """A timm Block on one sample's tokens (n, d), with loops; prefix (2, L, heads, d / heads) or None."""
    attention, (n, d) = block.attn, tokens.shape
    heads, width = attention.num_heads, d // attention.num_heads
    q, k, v = (block.norm1(tokens) @ attention.qkv.weight.T + attention.qkv.bias).split(d, 1)
    out = torch.zeros(n, d)
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        keys, values = [row[part] for row in k], [row[part] for row in v]
        if prefix is not None:
            keys, values = list(prefix[0, :, h]) + keys, list(prefix[1, :, h]) + values
        for i in range(n):
            weights = torch.stack([q[i, part] @ key / width**0.5 for key in keys]).softmax(0)
            out[i, part] = sum(weight * value for weight, value in zip(weights, values))
    tokens = tokens + out @ attention.proj.weight.T + attention.proj.bias
    return tokens + block.mlp(block.norm2(tokens))


def vit_and_pictures(count=4):
    vit = common.make_backbone(tiny_args("vit")).requires_grad_(False)
    images = torch.from_numpy(data.synthetic(common.TINY_SIZE, sessions=["samm"])[0].images[:count])
    x = common.normalize(images, tiny_args("vit"))
    return vit, x, vit.forward_features(x)[:, 0]


def test_l2p_forward_is_the_slow_one():
    torch.manual_seed(0)
    vit, x, q = vit_and_pictures()
    pool = l2p.PromptPool(10, 5, 96)
    index, cosine = pool.choose(q, 5)
    for b in range(len(x)):
        similar = [torch.dot(q[b], key) / q[b].norm() / key.norm() for key in pool.keys]
        best = sorted(range(10), key=lambda j, similar=similar: -similar[j])[:5]
        assert index[b].tolist() == best and torch.allclose(
            cosine[b], torch.stack([similar[j] for j in best]), atol=1e-6
        )
        patches = vit.patch_embed(x[b : b + 1])[0]
        tokens = [vit.cls_token[0, 0] + vit.pos_embed[0, 0]]
        tokens += [token + vit.pos_embed[0, 0] for j in best for token in pool.prompts[j]]
        tokens += [patch + position for patch, position in zip(patches, vit.pos_embed[0, 1:])]
        tokens = torch.stack(tokens)
        for block in vit.blocks:
            tokens = block_token_by_token(block, tokens)
        slow = vit.norm(tokens)[1:26].mean(0)
        assert torch.allclose(pool(vit, x, index)[b], slow, atol=1e-5)


def test_l2p_pull_reaches_only_keys_and_only_chosen_prompts_count():
    torch.manual_seed(0)
    vit, x, q = vit_and_pictures()
    pool = l2p.PromptPool(10, 5, 96)
    index, cosine = pool.choose(q, 5)
    (-cosine.sum(1).mean()).backward()
    assert pool.prompts.grad is None and all(p.grad is None for p in vit.parameters())
    chosen = sorted(set(index.flatten().tolist()))
    assert sorted(set(pool.keys.grad.nonzero()[:, 0].tolist())) == chosen
    pool.keys.grad = None
    pool(vit, x, index).square().sum().backward()
    assert pool.keys.grad is None and sorted(set(pool.prompts.grad.nonzero()[:, 0].tolist())) == chosen
    with torch.no_grad():
        before = pool(vit, x, index)
        unused = next(j for j in range(10) if j not in index[0].tolist())
        pool.prompts[unused].neg_()
        assert torch.allclose(pool(vit, x[:1], index[:1]), before[:1], atol=1e-6)
        pool.prompts[index[0, 0]].neg_()
        assert not torch.allclose(pool(vit, x[:1], index[:1]), before[:1], atol=1e-3)


def test_l2p_trains_prompts_keys_and_the_new_head_only(watch):
    seen = []

    def look(t, local):
        pool, heads = states(local["pool"]), [states(head) for head in local["heads"]]
        vit = states(local["vit"])
        if t:
            old_pool, old_heads, old_vit = seen[-1]
            assert equal_states(vit, old_vit) and all(equal_states(a, b) for a, b in zip(old_heads, heads))
            with torch.no_grad():
                index = local["pool"].choose(local["q"], 5)[0]
            usual = (index.flatten().bincount(minlength=10) > 0.8 * len(index)).nonzero()[:, 0]
            moved = (pool["prompts"] - old_pool["prompts"]).abs().amax((1, 2))
            assert len(usual) and (moved[usual] > 0.05).all()
            assert not torch.equal(pool["keys"], old_pool["keys"])
            # Any company, any order, one by one: the same scores (the choice is per sample).
            network = functools.partial(local["pool"], local["vit"])
            images, f = torch.cat(local["test_images"]), torch.cat(local["test_queries"])
            with torch.no_grad():
                order = torch.randperm(len(images))
                index = local["pool"].choose(f, 5)[0]
                together = common.extract(network, images, local["args"], index)
                shuffled_index = local["pool"].choose(f[order], 5)[0]
                shuffled = common.extract(network, images[order], local["args"], shuffled_index)
                alone_index = torch.cat([local["pool"].choose(q, 5)[0] for q in f[:20].split(1)])
                alone = common.extract(network, images[:20], local["args"], alone_index, batch=1)
                head = local["heads"][0]
            assert torch.allclose(head(shuffled), head(together)[order], atol=1e-5)
            assert torch.allclose(head(alone), head(together[:20]), atol=1e-5)
        seen.append((pool, heads, vit))

    watch("l2p", "--folds", "0", "--epochs-first", "1", *TWO, at_record=look)
    assert len(seen) == 2


# ---- DualPrompt ------------------------------------------------------------------------------------------------------
def test_prefix_attention_is_the_slow_one():
    torch.manual_seed(0)
    vit, x, _ = vit_and_pictures()
    tokens = torch.cat([vit.cls_token.expand(len(x), -1, -1), vit.patch_embed(x)], 1) + vit.pos_embed
    block, prefix = vit.blocks[0], torch.empty(len(x), 2, 5, 3, 32).uniform_(-1, 1)
    fast = dualprompt.attend_with_prefix(block, tokens, prefix)
    for b in range(len(x)):
        assert torch.allclose(fast[b], block_token_by_token(block, tokens[b], prefix[b]), atol=1e-5)
    swapped = dualprompt.attend_with_prefix(block, tokens, prefix.flip(1))
    assert not torch.allclose(fast, swapped, atol=1e-2)  # keys are not values
    assert torch.allclose(dualprompt.attend_with_prefix(block, tokens, prefix[:, :, :0]), block(tokens), atol=1e-5)


def test_copies_of_a_picture_get_equal_outputs_in_any_company():
    torch.manual_seed(0)
    vit, x, q = vit_and_pictures(6)
    prompts = dualprompt.Prompts(vit, 5)
    for _ in range(3):
        prompts.grow(q + torch.randn_like(q))
        with torch.no_grad():
            prompts.e[-1].uniform_(-1, 1)
    index = torch.tensor([2, 0, 2, 1, 2, 2])
    copies = torch.stack([x[0], x[1], x[0], x[2], x[0], x[0]])
    with torch.no_grad():
        out = prompts(vit, copies, index)
        for place in (0, 2, 4, 5):
            assert torch.allclose(out[place], prompts(vit, x[:1], index[:1])[0], atol=1e-5)
        assert not torch.allclose(out[0], prompts(vit, x[:1], torch.tensor([1]))[0], atol=1e-3)  # another e prompt


def test_dualprompt_trains_one_session_at_a_time(watch, monkeypatch):
    seen = []

    def look(t, local):
        prompts, heads = local["prompts"], [states(head) for head in local["heads"]]
        now = states(prompts)
        assert len(prompts.e) == len(prompts.keys) == t + 1
        expected = torch.stack([q / q.norm() for q in local["q"]]).mean(0)
        assert torch.allclose(prompts.keys[t], expected, atol=1e-6)
        vit = states(local["vit"])
        if t:
            before, old_heads, old_vit = seen[-1]
            assert equal_states(vit, old_vit) and all(equal_states(a, b) for a, b in zip(old_heads, heads))
            assert all(torch.equal(now[f"e.{s}"], before[f"e.{s}"]) for s in range(t))
            assert torch.equal(now["keys"][:t], before["keys"])
            assert not torch.equal(now["g"], before["g"]) and not torch.equal(now[f"e.{t}"], before[f"e.{t - 1}"])
            index, f = prompts.choose(torch.cat(local["test_queries"])), torch.cat(local["test_queries"])
            nearest = [max(range(t + 1), key=lambda s, q=q: torch.cosine_similarity(q, prompts.keys[s], 0)) for q in f]
            assert index.tolist() == nearest
        seen.append((now, heads, vit))

    watch("dualprompt", *SHORT, at_record=look)
    assert len(seen) == 4


@pytest.mark.parametrize("method", ["l2p", "dualprompt"])
def test_prompts_need_a_plain_vit(method, monkeypatch, capsys, tmp_path):
    module = importlib.import_module(method)

    def refusal(backbone, preset="paper"):
        flags = ["--backbone", backbone, "--preset", preset, "--out", str(tmp_path / "results")]
        monkeypatch.setattr(sys, "argv", [module.__file__, *flags])
        monkeypatch.setattr(common, "load_sessions", lambda args: pytest.fail("loaded something first"))
        return error_of(module.main, capsys)

    assert "plain ViT" in refusal("resnet", "tiny") and "plain ViT" in refusal("swin")
    for name in ("deit3_small_patch16_224.fb_in1k", "vit_small_patch14_reg4_dinov2.lvd142m", "convnext_tiny.fb_in1k",
                 "deit_tiny_distilled_patch16_224.fb_in1k", "vit_base_patch16_siglip_224.webli"):  # fmt: skip
        assert "plain ViT" in refusal(name)
    for name in ("vit_base_patch16_224.augreg_in21k_ft_in1k", "vit_base_patch16_clip_224.openai"):
        common.require_plain_vit(argparse.Namespace(preset="paper", backbone=name, method=method))


# ---- passes through the network --------------------------------------------------------------------------------------
def least_passes(method, n, m, first, later):
    """(with gradients, without) images through a backbone in one trial, from the method's description alone.

    n and m: training and test images of each session; first and later: epochs. A last batch of one image is dropped.
    """
    _, batch = importlib.import_module(method).SETTINGS["batch"]
    once = [count - (count % batch == 1) for count in n]
    trained, tested = first * once[0] + later * sum(once[1:]), np.cumsum(m)
    if method == "ranpac":
        return first * once[0], sum(n) + sum(m)
    if method == "der":  # old extractors once over the session's training images; each extractor once over every test
        return trained, sum(t * n[t] for t in range(4)) + 4 * sum(m)
    if method == "foster":  # old and new network once over training images; old over new tests; new, student over all
        evaluated = 2 * sum(n[1:]) + sum(m[1:]) + tested[0] + 2 * sum(tested[1:])
        return trained + later * sum(once[1:]), evaluated
    return trained, sum(tested)  # in the prompt methods prompted passes; queries come on top


def sizes_of(sessions, fold):
    tests = [len(protocols.split(session.subjects, "ilcv")[fold]) for session in sessions]
    return [len(session.keys) - count for session, count in zip(sessions, tests)], tests


@pytest.mark.parametrize("method", METHODS)
def test_no_frozen_network_sees_an_image_twice(method, watch, monkeypatch):
    """Images through backbones, counted by a hook in two trials: exactly as many as the method needs."""
    sessions, make = small_stream(), common.make_backbone
    monkeypatch.setattr(common, "load_sessions", lambda args: sessions)
    passes = {True: 0, False: 0}  # with gradients, without

    def counting(args):
        backbone = make(args)

        def count(module, inputs):
            passes[torch.is_grad_enabled()] += len(inputs[0])

        backbone.blocks[0].norm1.register_forward_pre_hook(count)  # copies of the backbone keep it
        return backbone

    monkeypatch.setattr(common, "make_backbone", counting)
    watch(method, "--epochs-first", "2", "--epochs-next", "1", "--folds", "0", "1")
    trained, evaluated = np.sum([least_passes(method, *sizes_of(sessions, fold), 2, 1) for fold in (0, 1)], 0)
    queries = sum(len(session.keys) for session in sessions) if method in ("l2p", "dualprompt") else 0
    assert (passes[True], passes[False]) == (trained, evaluated + queries)  # queries: once per run, for both folds


def test_readme_counts_the_passes():
    sizes, text = sizes_of(data.synthetic(common.TINY_SIZE), 0), readme()
    for method in METHODS:
        trained, evaluated = least_passes(method, *sizes, 10, 3)
        assert re.search(rf"^\| {method} \| .* \| {trained:,} \| .* \| {evaluated:,} \|$", text, re.M), method


# ---- determinism, faults ---------------------------------------------------------------------------------------------
def test_same_seed_same_numbers(watch, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "load_sessions", lambda args: small_stream()[:2])
    short = ["--epochs-first", "1", "--epochs-next", "1", *TWO]
    for method in METHODS:
        runs = []
        for flags in ([], [], ["--seed", "1"], ["--folds", "3"]):
            shutil.rmtree(tmp_path / "results", ignore_errors=True)
            runs.append(watch(method, *short, *flags))
        assert same(runs[0], runs[1])
        assert not same(runs[0], runs[2]) and all(
            np.array_equal(runs[0][f]["keys"], runs[2][f]["keys"]) for f in range(5)
        )
        assert same({3: runs[0][3]}, runs[3])


def test_features_do_not_depend_on_the_batch():
    """Scores do not depend on the test batch: one image alone and in any company gives the same features."""
    images = torch.from_numpy(data.synthetic(common.TINY_SIZE, sessions=["samm"])[0].images)
    for name in common.CHECKPOINTS:
        args = tiny_args(name)
        backbone = common.make_backbone(args)
        together = common.extract(backbone, images, args)
        order = torch.randperm(len(images))
        assert torch.allclose(common.extract(backbone, images[order], args), together[order], atol=1e-5)
        assert torch.allclose(common.extract(backbone, images[:9], args, batch=1), together[:9], atol=1e-5)


DYING = """  # runs a script that kills itself at a moment: python -c DYING MOMENT COUNT SCRIPT FLAGS...
import os, runpy, signal, sys, torch, common

moment, count, sys.argv = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
backward, normalize, replace = torch.Tensor.backward, common.normalize, os.replace

def dies(at):
    global count
    count -= at == moment
    if at == moment and count < 0:
        os.kill(os.getpid(), signal.SIGKILL)

def dying_backward(loss):
    dies("training")
    backward(loss)

def dying_normalize(images, args):  # under no_grad a batch of test pictures, or of training features
    dies("training" if torch.is_grad_enabled() else "evaluation")
    return normalize(images, args)

def dying_replace(part, path):
    if moment == "half" and count == 0:
        os.truncate(part, os.path.getsize(part) // 2)
    dies("half")
    dies("written")
    replace(part, path)
    dies("renamed")

torch.Tensor.backward, common.normalize, os.replace = dying_backward, dying_normalize, dying_replace
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_killed_anywhere_and_resumed_runs_end_alike(tmp_path):
    """SIGKILL in training, in evaluation and at each step of writing a file; then --resume: the undisturbed numbers."""
    flags = ["--epochs-first", "1", "--epochs-next", "1", *TWO, "--folds", "0", "1"]
    # (moment, how many pass before): folds kept. Per fold 11 steps of 2 moments, 2 tests, 1 file; run.json is the first
    moments = {
        ("training", 0): 0, ("training", 15): 0, ("training", 43): 1,
        ("evaluation", 0): 0, ("evaluation", 1): 0, ("evaluation", 3): 1,
        ("half", 0): 0, ("half", 1): 0, ("written", 2): 1, ("renamed", 1): 1,
    }  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": HERE}

    def run(out, *words):
        words = [sys.executable, *words[:-1], os.path.join(HERE, "finetune.py"), *flags, "--out", out, *words[-1:]]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment)

    assert run("whole", "--resume").returncode == 0  # there is nothing to go on from
    whole = results(tmp_path / "whole")

    def killed_and_resumed(moment):
        out = "{}{}".format(*moment)
        assert run(out, "-c", DYING, *map(str, moment), "--resume").returncode == -signal.SIGKILL, moment
        paths = [os.path.join(folder, name) for folder, _, names in os.walk(tmp_path / out) for name in names]
        kept = {path: os.stat(path).st_mtime_ns for path in paths if path.endswith(".npz")}
        assert len(kept) == moments[moment], moment
        done = run(out, "--resume")
        assert done.returncode == 0, done.stderr
        assert all(os.stat(path).st_mtime_ns == stamp for path, stamp in kept.items()), moment
        assert len(re.findall(r"^ +\d  \w", done.stdout, re.M)) == 4 - 2 * len(kept), moment
        assert same(whole, results(tmp_path / out)), moment

    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # one thread each
        list(pool.map(killed_and_resumed, moments))


def test_stopped_inside_the_writing_of_a_fold(watch, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common, "load_sessions", lambda args: small_stream()[:2])
    flags = ["ranpac", "--features", "pixels", *TWO]
    whole = watch(*flags)
    shutil.rmtree(tmp_path / "results")
    replace = os.replace

    def stopped(error):
        def stop(source, target):
            if target.endswith("fold2.npz"):
                raise error
            replace(source, target)

        return stop

    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
            patch.setattr(os, "replace", stopped(error))
            watch(*flags)
        assert list(results(tmp_path / "results")) == [0, 1]
    assert "No space left" in capsys.readouterr().err
    assert same(whole, watch(*flags, "--resume"))


def test_resume_refuses_another_run(tmp_path):
    for name in (*(f"{m}.py" for m in METHODS), "common.py", "data.py", "protocols.py", "rch.py"):
        shutil.copy(os.path.join(HERE, name), tmp_path)
    shutil.copytree(os.path.join(HERE, "tiny"), tmp_path / "tiny")

    def run(*flags):
        words = [sys.executable, "ranpac.py", "--features", "pixels", *TWO, *flags]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)

    assert run().returncode == 0
    again = run("--resume")
    assert again.returncode == 0 and "kept" in again.stdout
    assert len(re.findall(r"^ +\d  \w", run().stdout, re.M)) == 10  # without --resume everything is recomputed
    with open(tmp_path / "ranpac.py", "a") as file:
        file.write("# edited\n")
    refused = run("--resume")
    assert refused.returncode == 2 and refused.stderr.startswith("error: --resume") and "ranpac.py" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert "folds 1, 2, 3, 4 are of another run and count no more" in run("--folds", "0").stdout
    assert "count no more" not in run().stdout


def test_missing_classes(watch, monkeypatch, capsys, tmp_path):
    """contempt is in no training part of SAMM's fold 0, and repression in no test part of CASME II's."""
    sessions = small_stream(1)[:2]
    for session, emotion, in_test in ((sessions[0], "repression", False), (sessions[1], "contempt", True)):
        fold = np.isin(np.arange(len(session.keys)), protocols.split(session.subjects, "ilcv")[0])
        keep = [i for i, e in enumerate(session.emotions) if e != emotion or fold[i] == in_test]
        assert emotion in [session.emotions[i] for i in keep]
        # Keep the number of samples, and so the folds: the others of this emotion become another emotion.
        session.emotions = [e if i in keep else "others" for i, e in enumerate(session.emotions)]
    monkeypatch.setattr(common, "load_sessions", lambda args: sessions)
    for method in METHODS:
        shutil.rmtree(tmp_path / "results", ignore_errors=True)
        folds = watch(method, *TWO, *SHORT)
        fold = folds[0]
        emotions = list(fold["emotions"])
        for how in rch.WAYS:
            true, predicted, _ = protocols.outcome(fold, 1, how)
            assert emotions.index("contempt") in true and emotions.index("contempt") not in predicted
        assert emotions.index("repression") not in true
        recalls = [np.mean(predicted[true == c] == c) for c in range(7) if c in true]
        assert protocols.uar(true, predicted) == pytest.approx(np.mean(recalls)) and len(recalls) == 6
        assert "nan" not in capsys.readouterr().out


# ---- bad input -------------------------------------------------------------------------------------------------------
def test_bad_input_ends_with_one_line(tmp_path, monkeypatch, capsys):
    def ranpac_error(*flags):
        monkeypatch.setattr(sys, "argv", [ranpac.__file__, "--out", str(tmp_path / "results"), *map(str, flags)])
        line = error_of(ranpac.main, capsys)
        assert not (tmp_path / "results").exists()
        return line

    tree = tmp_path / "tree"
    good = [f"casme2_{e}/sub{s:02d}_{i}.png" for e in data.TABLE1["casme2"] for s in range(1, 5) for i in range(2)]

    def fresh(*names):
        shutil.rmtree(tree, ignore_errors=True)
        write_images(tree, [*good, *names])

    casme2 = ["--data", tree, "--sessions", "casme2", "--preset", "tiny", "--features", "pixels"]
    assert "no such folder" in ranpac_error("--data", tmp_path / "nowhere", "--preset", "tiny")
    tree.mkdir()
    assert "no images of session casme2" in ranpac_error("--data", tree, "--preset", "tiny")
    fresh("smic_happiness/1.png")
    assert "smic_happiness" in ranpac_error(*casme2) and "<session>_<emotion>" in ranpac_error(*casme2)
    fresh("casme2_joy/1.png")
    assert "casme2_joy" in ranpac_error(*casme2)
    fresh()
    assert "no images of session samm" in ranpac_error(
        "--data", tree, "--sessions", "casme2", "samm", "--preset", "tiny"
    )
    fresh()
    path = tree / good[3]
    path.write_bytes(path.read_bytes()[:45])
    assert good[3] in ranpac_error(*casme2) and "not a readable image" in ranpac_error(*casme2)
    fresh()
    (tree / good[0]).write_text("this is no picture")
    assert good[0] in ranpac_error(*casme2)
    fresh("casme2_others/nobody.png")
    assert "nobody.png" in ranpac_error(*casme2) and "no number" in ranpac_error(*casme2)
    fresh("casme2_others/99999999999.png")
    assert "99999999999.png: too large a first number" in ranpac_error(*casme2)
    fresh()
    assert "4 subjects are too few for 5 folds of slcv" in ranpac_error(*casme2, "--protocol", "slcv")
    assert "folds 0 to 4" in ranpac_error(*casme2, "--folds", "7")
    assert "must be one of" in ranpac_error("--sessions", "casme1")
    assert "named once" in ranpac_error("--sessions", "samm", "samm")
    assert "losoo" in ranpac_error("--protocol", "losoo")
    assert "--lr" in ranpac_error("--lr", "-1") and "--epochs-first" in ranpac_error("--epochs-first", "0")
    assert "--seed" in ranpac_error("--seed", "-3") and "--device" in ranpac_error("--device", "abacus")
    assert "--device" in ranpac_error("--device", "meta") and "--data is empty" in ranpac_error("--data", "")
    assert "vit, swin, resnet" in ranpac_error("--backbone", "vgg")
    assert "timm model id" in ranpac_error("--backbone", "no_such_net", "--preset", "paper")
    assert "no such weight file" in ranpac_error("--weights", tmp_path / "none.pt")
    assert "--weights is empty" in ranpac_error("--weights", "")
    (tmp_path / "text.pt").write_text("these are no weights")
    assert "not a readable weight file" in ranpac_error("--weights", tmp_path / "text.pt")
    (tmp_path / "text.safetensors").write_text("these are no weights")
    assert "not a readable weight file" in ranpac_error("--weights", tmp_path / "text.safetensors")
    assert "does not fit" in ranpac_error("--weights", os.path.join(HERE, "tiny", "swin.pt"))
    (tmp_path / "file").write_text("a file, no folder")
    assert "cannot be written" in ranpac_error("--features", "pixels", "--out", tmp_path / "file")
    monkeypatch.setattr(sys, "argv", [finetune.__file__, "--protocol", "loso", "--out", str(tmp_path / "results")])
    assert "loso takes one session" in error_of(finetune.main, capsys)
    assert not (tmp_path / "results").exists()
    monkeypatch.setattr(sys, "argv", [protocols.__file__, str(tmp_path / "nowhere")])
    assert "no such folder" in error_of(protocols.main, capsys)
    for flags in (["--images", "9"], ["--epochs", "0"], ["--batch", "1"], ["--seed", "-1"], ["--backbone", "vgg"],
                  ["--out", tmp_path / "file" / "vit.pt"]):  # fmt: skip
        monkeypatch.setattr(sys, "argv", [common.__file__, "pretrain", *map(str, flags)])
        assert str(flags[1]) in error_of(common.main, capsys)
    fresh()
    with monkeypatch.context() as patch:

        def locked(path):  # a folder that may not be read; who runs the tests may read everything
            raise PermissionError(13, "Permission denied", path)

        patch.setattr(os, "listdir", locked)
        assert f"{tree}: cannot be read (Permission denied)" in error_of(lambda: data.load(str(tree)), capsys)


def test_an_error_and_an_interrupt_in_a_terminal(tmp_path):
    done = command("ranpac.py", "--data", "nowhere", cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: nowhere: no such folder")
    # Ctrl-C in the middle: one line, status 130, nothing half-written.
    pretrain = ["common.py", "pretrain", "--images", "100", "--epochs", "9999", "--out", "new.pt"]
    for (script, *flags), first_line in ((["finetune.py", "--epochs-first", "9999"], "finetune"), (pretrain, "epoch")):
        words = [sys.executable, "-u", os.path.join(HERE, script), *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # A job in the background inherits SIGINT as ignored.
        pipes["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(words, cwd=tmp_path, **pipes)
        while line := process.stdout.readline():
            if line.startswith(first_line):
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 130 and errors.startswith("\ninterrupted; ") and errors.count("\n") == 2, errors
        assert not [name for _, _, names in os.walk(tmp_path) for name in names if name != "run.json"]


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no such signal here")
def test_into_a_closed_pipe_a_run_and_a_report_end_quietly(watch, tmp_path):
    watch("ranpac", "--features", "pixels", *TWO, "--folds", "0")
    for words in (["protocols.py", "results"], ["ranpac.py", "--features", "pixels", "--folds", "0"]):
        read, write = os.pipe()
        os.close(read)
        words = [sys.executable, "-u", os.path.join(HERE, words[0]), *words[1:]]
        done = subprocess.run(words, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True)
        os.close(write)
        assert done.returncode in (-signal.SIGPIPE, 1) and done.stderr == "", done.stderr


def test_diverging_loss_stops_the_run(watch, monkeypatch, capsys):
    monkeypatch.setattr(common, "load_sessions", lambda args: small_stream()[:2])
    line = error_of(lambda: watch("finetune", *TWO, "--lr", "1e30", "--epochs-first", "2"), capsys)
    assert "fold 0, session casme2, epoch" in line
    # The very last step diverges, after the last loss was looked at.
    monkeypatch.setattr(common, "load_sessions", lambda args: small_stream(8)[:2])
    line = error_of(lambda: watch("finetune", *TWO, "--lr", "1e30", "--epochs-first", "1"), capsys)
    assert "the scores are not finite in fold 0, session casme2" in line


def test_weight_files_of_every_kind(watch, monkeypatch, tmp_path):
    """The paper preset with a small timm network: .pth, .bin, .safetensors, wrapped and with a classifier, all load."""
    import timm
    from safetensors.torch import save_file

    network = timm.create_model("resnet10t.c3_in1k", pretrained=False)  # with its ImageNet classifier
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, tmp_path / "wrapped.bin")
    save_file(network.state_dict(), tmp_path / "network.safetensors")
    small = [data.Session(s.name, np.zeros((len(s.keys), 3, 176, 176), np.uint8), s.emotions, s.subjects, s.keys)
             for s in small_stream(8)[:1]]  # fmt: skip
    monkeypatch.setattr(common, "load_sessions", lambda args: small)
    for name in ("plain.pth", "wrapped.bin", "network.safetensors"):
        found = []
        flags = ["--preset", "paper", "--backbone", "resnet10t.c3_in1k", "--weights", str(tmp_path / name)]
        watch("ranpac", "--features", "frozen", "--sessions", "casme2", "--folds", "0", *flags,
              at_record=lambda t, local, found=found: found.append(states(local["backbone"])))  # fmt: skip
        assert all(torch.equal(value, network.state_dict()[key]) for key, value in found[0].items())
        shutil.rmtree(tmp_path / "results")


# ---- other devices, more devices -------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_is_on_the_device(method, monkeypatch, tmp_path):
    """Without a GPU: torch's fake tensors "on cuda" refuse to mix devices. Two sessions, from growth to prediction.

    And no training step waits for the device or copies from the host. Not driven here: the backward pass, and of the
    ridge what looks at numbers (update and choose_lambda).
    """
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.utils._python_dispatch import TorchDispatchMode

    class Done(Exception):
        pass

    module, make, shapes, steps = importlib.import_module(method), common.make_backbone, [], []

    def fake_backbone(args):
        with unset_fake_temporarily():
            backbone = make(tiny_args(args.backbone))
        return backbone._apply(lambda p: torch.empty(p.shape, dtype=p.dtype, device=args.device))

    def backward(loss):  # the real one would need a device; the optimizer gets zeros
        assert loss.device.type == "cuda" and loss.ndim == 0
        for parameter in sys._getframe(1).f_locals["trained"]:
            parameter.grad = torch.zeros_like(parameter)
        steps.append(1)

    def record(self, fold, t, rows, scores, **others):
        assert all(values.device.type == "cpu" for values in (scores, *others.values()))
        shapes.append(scores.shape[1])
        if t == 1:
            raise Done

    def choose_lambda(h, y):  # the real one looks at numbers, which fake tensors do not have
        assert h.device.type == y.device.type == "cuda" and len(h) == len(y)
        return 1.0

    def update(self, h, y):  # so does the real one; its result is of this kind
        assert h.device.type == y.device.type == "cuda" and len(h) == len(y)
        self.s, self.z = h.double(), y.double()
        self.eigenvalues = torch.ones(len(h), dtype=torch.float64, device=h.device)

    class Watch(TorchDispatchMode):
        """Refuses what makes the host wait for the device, or copies from the host, inside a training step."""

        training = False

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if Watch.training:
                waits = "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"
                assert function.__name__.split(".")[0] not in waits, function
                if function.__name__.split(".")[0] in ("_to_copy", "copy_", "lift_fresh"):
                    devices = {x.device.type for x in (*args, out) if isinstance(x, torch.Tensor)}
                    assert devices == {"cuda"}, (function, devices)
            return out

    def training_step(images, args):
        x = normalize(images, args)  # its mean and std are copied once
        Watch.training = torch.is_grad_enabled()
        return x

    def session_trained(*args):  # check_finite may wait: it is called once per epoch
        Watch.training = False

    normalize = common.normalize
    monkeypatch.setattr(common, "normalize", training_step)
    monkeypatch.setattr(common, "load_sessions", lambda args: small_stream(8)[:2])
    monkeypatch.setattr(common, "_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(common, "make_backbone", fake_backbone)
    monkeypatch.setattr(common, "require_plain_vit", lambda args: None)
    monkeypatch.setattr(common, "check_finite", session_trained)
    monkeypatch.setattr(ranpac, "choose_lambda", choose_lambda)
    monkeypatch.setattr(ranpac.LowRankRidge, "update", update)
    monkeypatch.setattr(protocols.Run, "record", record)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(sys, "argv", [module.__file__, *SHORT, *TWO, "--out", str(tmp_path / "results")])
    common._moments.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()), Watch(), pytest.raises(Done):
        module.main()
    common._moments.cache_clear()
    assert shapes == [5, 10] and steps
    Watch.training = True  # it does see what it is to see
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        for wait in (lambda: torch.ones(1, device="cuda").sum().item(), lambda: torch.tensor(1.0).to("cuda")):
            with Watch(), pytest.raises(AssertionError):
                wait()


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_autocast(method, watch, monkeypatch):
    """What CUDA does in training, on the CPU: the run ends with finite scores in float32."""
    monkeypatch.setattr(common, "load_sessions", lambda args: small_stream()[:2])
    monkeypatch.setattr(common, "autocast", lambda args: torch.autocast("cpu", torch.bfloat16))
    (fold,) = watch(method, *SHORT, *TWO).values()
    assert np.isfinite(fold["scores_1"]).all() and fold["scores_1"].dtype == np.float32


def test_two_processes_make_the_files_of_one(tmp_path):
    flags = [os.path.join(HERE, "ranpac.py"), "--epochs-first", "1", *TWO, "--folds", "0", "1", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for words, out in (([sys.executable], "one"), (torchrun, "two")):
        done = subprocess.run(
            [*words, *flags, "--out", out], cwd=tmp_path, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
    assert same(results(tmp_path / "one"), results(tmp_path / "two")) and len(results(tmp_path / "two")) == 3


def test_each_process_takes_its_own_device(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "3")
    if torch.cuda.device_count() < 4:  # there is no fourth one here: the error names it
        assert "--device cuda:3: " in error_of(lambda: common._device("cuda"), capsys)


def test_two_jobs_share_a_results_folder(tmp_path):
    flags = [sys.executable, os.path.join(HERE, "ranpac.py"), "--features", "pixels", *TWO]
    jobs = [subprocess.Popen([*flags, "--folds", fold], cwd=tmp_path, stdout=subprocess.PIPE) for fold in "04"]
    assert [job.communicate() and job.returncode for job in jobs] == [0, 0]
    assert list(results(tmp_path / "results")) == [0, 4]


# ---- malformed input, by a seeded generator --------------------------------------------------------------------------
def png(mode="RGB", **flags):
    file = io.BytesIO()
    Image.new(mode, (20, 14), 7).save(file, "PNG", **flags)
    return file.getvalue()


BAD_IMAGES = {  # each makes the bytes of one image file
    "truncated": lambda random: png()[: random.randint(1, len(png()) - 12)],
    "empty": lambda random: b"",
    "noise": lambda random: random.bytes(random.randint(1, 400)),
    "noise inside": lambda random: png()[:30] + random.bytes(9) + png()[39:],
    "huge": lambda random: png()[:16] + random.randint(30_000, 60_000, 2).astype(">u4").tobytes() + png()[24:],
    "16 bit": lambda random: png("I;16"),  # would be clipped to white
    "palette": lambda random: png("P"),
    "alpha": lambda random: png("RGBA"),
    "grey": lambda random: png("L"),
    "grey and alpha": lambda random: png("LA"),
    "one bit": lambda random: png("1"),
    "animated": lambda random: png(save_all=True, append_images=[Image.new("RGB", (20, 14), random.randint(255))]),
}


def ends_well(run, capsys):
    """run() works, or ends with status 2 and one line. Returns the line, or None."""
    capsys.readouterr()
    try:
        run()
        return None
    except SystemExit as stop:
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_malformed_images(kind, tmp_path, capsys):
    random = np.random.RandomState(list(BAD_IMAGES).index(kind))
    for i in range(4):
        write_images(tmp_path, ["samm_anger/1.png"])
        (tmp_path / "samm_anger" / f"2_{i}.png").write_bytes(BAD_IMAGES[kind](random))
        line = ends_well(lambda: data.load(str(tmp_path), ["samm"], 8), capsys)
        readable = kind in ("palette", "alpha", "grey", "grey and alpha", "one bit", "animated")
        assert (line is None) == readable or kind in ("noise inside", "truncated")  # the last bytes may not matter
        assert line is None or f"2_{i}.png" in line
        (tmp_path / "samm_anger" / f"2_{i}.png").unlink()


def test_odd_names_and_links(tmp_path, capsys):
    names = ["samm_anger/6_\u00e9\u4e2d.png", "samm_anger/7_" + "x" * 240 + ".png", "samm_anger/8 a b.png"]
    write_images(tmp_path, names)
    (session,) = data.load(str(tmp_path), ["samm"], 8)
    assert sorted(session.keys) == sorted(names) and sorted(session.subjects.tolist()) == [6, 7, 8]
    os.symlink(tmp_path / "samm_fear", tmp_path / "samm_fear")  # a folder that is a link to itself is no folder
    os.symlink(tmp_path / "samm_anger", tmp_path / "samm_anger" / "loop")  # nor is a folder among the images an image
    assert len(data.load(str(tmp_path), ["samm"], 8)[0].keys) == 3
    os.symlink(tmp_path / "samm_anger" / "9.png", tmp_path / "samm_anger" / "9.png")
    assert "9.png" in ends_well(lambda: data.load(str(tmp_path), ["samm"], 8), capsys)


def test_malformed_weight_files(tmp_path, capsys):
    random = np.random.RandomState(0)
    path = tmp_path / "weights.pt"
    with open(os.path.join(HERE, "tiny", "vit.pt"), "rb") as file:
        good = file.read()
    broken = [b"", random.bytes(500), good[: random.randint(len(good))], good[:-9], png()]
    others = [
        [1, 2],
        {3: torch.ones(2)},
        {"state_dict": None},
        {"model": {"x": 1}},
        torch.ones(3),
        argparse.Namespace(a=1),
    ]
    for content in broken + others:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        line = ends_well(lambda: common.make_backbone(tiny_args("vit", str(path))), capsys)
        assert line and str(path) in line
        os.replace(path, tmp_path / "weights.safetensors")
        assert ends_well(lambda: common.make_backbone(tiny_args("vit", str(tmp_path / "weights.safetensors"))), capsys)


def test_malformed_results(watch, tmp_path, capsys, monkeypatch):
    flags = ["ranpac", "--features", "pixels", *TWO, "--folds", "0"]
    watch(*flags)
    ((folder, _, _),) = protocols.find_runs(str(tmp_path / "results"))
    path, random = os.path.join(folder, "fold0.npz"), np.random.RandomState(0)
    with open(path, "rb") as file:
        good = file.read()
    pickled = io.BytesIO()
    np.savez(pickled, identity=np.array([{"a": 1}], object))

    def report():
        monkeypatch.setattr(sys, "argv", ["protocols.py", str(tmp_path / "results")])
        protocols.main()

    for content in (
        b"",
        random.bytes(300),
        good[: len(good) // 2],
        pickled.getvalue(),
        b"PK\x03\x04" + random.bytes(50),
    ):
        with open(path, "wb") as file:
            file.write(content)
        assert "fold0.npz" in ends_well(report, capsys)
        assert "fold0.npz" in ends_well(lambda: watch(*flags, "--resume"), capsys)
    os.remove(path)
    for content in (b"", b"{", b"[]", b"3", b"{}", random.bytes(40), b'{"fold_count": "x"}'):
        with open(os.path.join(folder, "run.json"), "wb") as file:
            file.write(content)
        assert ends_well(report, capsys)
        assert ends_well(lambda: watch(*flags, "--resume"), capsys)
    watch(*flags)  # without --resume a broken folder is simply written anew


# ---- prepare ---------------------------------------------------------------------------------------------------------
# Small raw trees in every layout, naming and oddity of the official downloads. The frames are a real face, warped by a
# known field between onset and apex. Each usable row has its own direction of motion, so the hue of an image tells
# whether it was made of the right frames; what must not be used moves otherwise.
FACE = cv2.cvtColor(astronaut(), cv2.COLOR_RGB2GRAY)[10:210, 120:320]  # (200, 200)
SMALL = cv2.resize(FACE, (96, 96), interpolation=cv2.INTER_AREA)
WRONG = 180  # decoys move the other way
cv2.setNumThreads(1)


# ---- prepare: raw trees ----------------------------------------------------------------------------------------------
def warp(image, dx, dy, centre=None, width=None):
    """Move the picture's content by (dx, dy) pixels, all of it or a Gaussian spot of it around centre (x, y)."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float32)
    share = 1 if centre is None else np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * width**2))
    x, y = (x - share * dx).astype(np.float32), (y - share * dy).astype(np.float32)
    return cv2.remap(image, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)


def moved(image, angle, pixels=3.0):
    return warp(image, pixels * np.cos(np.radians(angle)), pixels * np.sin(np.radians(angle)))


def save(path, image):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(image.astype(np.uint8)).save(path, quality=95)


def clip(folder, name, onset, apex, angle=0, image=SMALL):
    """Frames onset, apex and one after it (moved the wrong way), called name.format(number)."""
    for number, frame in ((onset, image), (apex, moved(image, angle)), (apex + 1, moved(image, angle + WRONG))):
        save(os.path.join(folder, name.format(number)), frame)


def book(path, rows, title="Sheet1", more=()):
    """Write rows to an .xlsx or, comma-separated, to a .csv file; more: titles of further, empty worksheets."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if path.endswith(".csv"):
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows(rows)
        return
    workbook = openpyxl.Workbook()
    workbook.active.title = title
    for row in rows:
        workbook.active.append(row)
    for name in more:
        workbook.create_sheet(name)
    workbook.save(path)


CASME2 = ["Subject", "Filename", None, "OnsetFrame", "ApexFrame", "OffsetFrame", None, "Action Units",
          "Estimated Emotion"]  # fmt: skip
SAMM = ["Subject", "Filename", "Inducement Code", "Onset Frame", "Apex Frame", "Offset Frame", "Duration", "Micro",
        "Action Units", "Estimated Emotion", "Objective Classes", "Notes"]  # fmt: skip
MMEW = ["Subject", "Filename", "OnsetFrame", "ApexFrame", "OffsetFrame", "Action Units", "Estimated Emotion", "remarks"]
CASME3 = ["Subject", "Filename", "Onset", "Apex", "Offset", "AU", "Objective class", "emotion"]
DFME = ["Subject", "Filename", "OnsetFrame", "ApexFrame", "OffsetFrame", "Emotion", "EmotionId", "Fps", "AU"]


def casme2_row(subject, name, onset, apex, offset, emotion):
    return [subject, name, None, onset, apex, offset, None, "4+L10", emotion]


def samm_row(subject, name, onset, apex, offset, emotion):
    return [subject, name, 3, onset, apex, offset, "=SUM(F2-D2)+1", "Micro - 1/2", "12 or 15 ", emotion, 1, None]


def make_casme2(root):
    raw, rows = f"{root}/CASME2_RAW_selected/CASME2_RAW_selected", [CASME2]
    good = {  # subject and clip: cells, angle; the file
        ("01", "EP02_01f"): (46, 59, 86, "happiness", 0, "casme2_happiness/sub01_EP02_01f_onset46_apex59.png"),
        ("01", "EP03_02"): ("131.0", 161, 170, "disgust", 90, "casme2_disgust/sub01_EP03_02_onset131_apex161.png"),
        ("02", "EP03_02"): (10, 14, 20, "others", 180, "casme2_others/sub02_EP03_02_onset10_apex14.png"),
        (3, "EP06_02_01"): (
            99.0,
            101,
            110,
            "repression",
            270,
            "casme2_repression/sub03_EP06_02_01_onset99_apex101.png",
        ),
        ("26", "EP01_2"): ("7", " 9 ", "12", " Surprise ", 45, "casme2_surprise/sub26_EP01_2_onset7_apex9.png"),
    }
    expected = {}
    for (subject, name), (onset, apex, offset, emotion, angle, path) in good.items():
        rows.append(casme2_row(subject, name, onset, apex, offset, emotion))
        clip(f"{raw}/sub{int(subject):02d}/{name}", "img{}.jpg", int(float(onset)), int(apex), angle)
        expected[path] = angle
    dropped = [  # the report's subject, clip, reason
        ("9", "EP02_02f", "emotion outside Table 1", casme2_row("09", "EP02_02f", 1, 2, 3, "fear")),
        ("24", "EP10_02", "emotion outside Table 1", casme2_row("24", "EP10_02", 1, 2, 3, "sadness")),
        ("4", "EP12_01f", "onset, apex or offset is not a number", casme2_row("04", "EP12_01f", 1, "/", 3, "disgust")),
        ("5", "EP09_05f", "onset = apex", casme2_row("05", "EP09_05f", 69, 69, 80, "disgust")),
        ("5", "EP03_01", "offset is 0", casme2_row("05", "EP03_01", 5, 9, 0, "others")),
        ("5", "EP03_07", "onset, apex or offset is not a number", casme2_row("05", "EP03_07", 5, 9, None, "others")),
        ("17", "EP05_02", "apex frame missing", casme2_row("17", "EP05_02", 4, 9, 10, "others")),
        ("17", "EP05_03", "onset frame cannot be decoded", casme2_row("17", "EP05_03", 4, 9, 10, "others")),
        ("17", "EP05_04", "apex frame cannot be decoded", casme2_row("17", "EP05_04", 4, 9, 10, "others")),
        ("18", "EP08_01", "no clip folder", casme2_row("18", "EP08_01", 4, 9, 10, "others")),
        ("1", "EP02_01f", "same clip as another row", casme2_row("01", "EP02_01f", 47, 59, 86, "disgust")),
        ("20", "EP01_03", "onset and apex frame are the same picture", casme2_row("20", "EP01_03", 4, 9, 10, "others")),
        ("20", "EP15_03f", "onset and apex frame differ in size", casme2_row("20", "EP15_03f", 4, 9, 10, "others")),
        ("21", "EP05_05", "onset frame found twice", casme2_row("21", "EP05_05", 4, 9, 10, "others")),
        ("22", "", "no subject or no file name", casme2_row("22", None, 4, 9, 10, "others")),
        ("?", "EP01_01", "no subject or no file name", casme2_row("?", "EP01_01", 4, 9, 10, "others")),
        ("23", "EP01_09", "emotion outside Table 1", casme2_row("23", "EP01_09", 4, 9, 10, None)),
    ]
    for subject, name, _, _ in dropped:
        if name in ("EP05_03", "EP05_04", "EP01_03", "EP15_03f", "EP05_05"):
            clip(f"{raw}/sub{subject}/{name}", "img{}.jpg", 4, 9)
    save(f"{raw}/sub17/EP05_02/img4.jpg", SMALL)
    with open(f"{raw}/sub17/EP05_03/img4.jpg", "wb") as file:
        file.write(b"not an image")
    with open(f"{raw}/sub17/EP05_04/img9.jpg", "r+b") as file:
        file.truncate(1500)
    save(f"{raw}/sub20/EP01_03/img9.jpg", SMALL)
    save(f"{raw}/sub20/EP15_03f/img9.jpg", SMALL[:90])
    save(f"{raw}/sub21/EP05_05/img004.png", SMALL)
    rows += [[None] * 9] + [row for *_, row in dropped]
    book(f"{root}/CASME2-coding-20140508.xlsx", rows, more=("Sheet2", "Sheet3"))
    book(f"{root}/CASME2-ObjectiveClasses.xlsx", [["Subject", "Filename", "Objective Class"], ["01", "EP02_01f", 3]])
    return expected, [("casme2", *drop[:3]) for drop in dropped]


def make_samm(root):
    rows = [["SAMM Micro-Expressions"], ["Subject numbers have three digits; frames count from the recording's start"]]
    rows += [[f"note {i}"] for i in range(11)] + [SAMM]
    good = {
        "006_1_2": (5562, 5567, 5580, "Anger", "{:05d}", 10, "samm_anger/sub006_006_1_2_onset5562_apex5567.png"),
        "013_1_8": (562, 570, 580, "Other", "{:04d}", 100, "samm_others/sub013_013_1_8_onset562_apex570.png"),
        "011_4_2": (4, 10, 20, "Contempt", "{:05d}", 190, "samm_contempt/sub011_011_4_2_onset4_apex10.png"),
        "032_3_2": (5126, 5127, 5180, "Surprise", "{:05d}", 280, "samm_surprise/sub032_032_3_2_onset5126_apex5127.png"),
    }
    expected = {}
    for name, (onset, apex, offset, emotion, padding, angle, path) in good.items():
        rows.append(samm_row(name[:3], name, onset, apex, offset, emotion))
        clip(f"{root}/SAMM/{name[:3]}/{name}", f"{name[:3]}_{padding}.jpg", onset, apex, angle)
        expected[path] = angle
    dropped = [
        ("28", "028_4_1", "apex outside onset..offset", samm_row("028", "028_4_1", 1100, 1143, 1134, "Happiness")),
        ("32", "032_3_1", "apex outside onset..offset", samm_row("032", "032_3_1", 4919, 1930, 4976, "Anger")),
        ("24", "024_1_1", "emotion outside Table 1", samm_row("024", "024_1_1", 5, 6, 7, "Disgust")),
        ("36", "036_1_1", "emotion outside Table 1", samm_row("036", "036_1_1", 5, 6, 7, "Fear")),
        ("36", "036_1_2", "emotion outside Table 1", samm_row("036", "036_1_2", 5, 6, 7, "Sadness")),
    ]
    for name, frames in (("028_4_1", (1100, 1143)), ("032_3_1", (4919, 4930))):
        clip(f"{root}/SAMM/{name[:3]}/{name}", name[:3] + "_{:05d}.jpg", *frames)
    rows += [row for *_, row in dropped]
    book(f"{root}/SAMM_Micro_FACS_Codes_v2.xlsx", rows, "MICRO_ONLY")
    book(f"{root}/SAMM_LongVideos_V2_Release.xlsx", [SAMM])
    return expected, [("samm", *drop[:3]) for drop in dropped]


def make_mmew(root):
    rows, expected = [MMEW], {}
    home = f"{root}/Micro_and_Macro_Expression_Warehouse/MMEW_Final"
    good = [  # subject, clip, frames, emotion, folder, angle, file
        (3, "S03-01-002", (1, 5, 9), "happiness", "Micro_Expression/happiness", 20,
         "mmew_happiness/sub03_S03-01-002_onset1_apex5.png"),
        (4, "S04-02-001", (2, 8, 9), "surprise", "Micro_Expression/disgust", 110,  # a stale folder: the sheet is right
         "mmew_surprise/sub04_S04-02-001_onset2_apex8.png"),
        ("S13", "S13-04-001", (1, 10, 19), "repression", "S13/repression", 200,
         "mmew_others/sub13_S13-04-001_onset1_apex10.png"),
        (30, "S30-06-001", (1, 3, 9), "sadness", "S30/sadness", 290, "mmew_sad/sub30_S30-06-001_onset1_apex3.png"),
    ]  # fmt: skip
    for subject, name, frames, emotion, folder, angle, path in good:
        rows.append([subject, name, *frames, "4+10", emotion, None])
        clip(f"{home}/{folder}/{name}", "{}.jpg", *frames[:2], angle)
        expected[path] = angle
        clip(f"{home}/Macro_Expression/{emotion}/{name}", "{}.jpg", *frames[:2], angle + WRONG)
    save(f"{home}/Macro_Expression/S01/anger/S01-07-001.jpg", SMALL)
    rows.append([1, "S01-07-001", 1, 5, 9, 4, "anger", "x"])
    rows.append([5, "S05-04-001", 1, 5, 9, 4, "others", "only in the macro part"])
    clip(f"{home}/Macro_Expression/others/S05-04-001", "{}.jpg", 1, 5)
    book(f"{root}/MMEW_Micro_Exp (20).xlsx", rows)
    return expected, [("mmew", "1", "S01-07-001", "emotion outside Table 1"),
                      ("mmew", "5", "S05-04-001", "no clip folder")]  # fmt: skip


def make_casme3(root):
    rows, expected, release = [CASME3], {}, f"{root}/Part_A_ME_clip/Part_A_ME_clip"
    good = [  # subject, clip, frames, emotion, folder, angle, file
        ("spNO.1", "a", (355, 360, 370), "happy", f"{release}/frame/spNo.1_a_355", 30,
         "casme3_happiness/sub001_a_onset355_apex360.png"),
        ("spNO.1", "a", (400, 405, 410), "sad", f"{release}/frame/spNo.1_a_400", 120,
         "casme3_sad/sub001_a_onset400_apex405.png"),
        ("spNO.12", "J", (5, 9, 20), "Others", f"{root}/part_A/data/part1/spNO.12/j/color", 210,
         "casme3_others/sub012_J_onset5_apex9.png"),
        ("spNO.12", "J", (50, 59, 70), "anger", f"{root}/part_A/data/part1/spNO.12/j/color", 300,
         "casme3_anger/sub012_J_onset50_apex59.png"),
        ("spNO.12", "J", (500, 505, 510), "fear", f"{release}/frame/spNo.12_J_500", 330,
         "casme3_fear/sub012_J_onset500_apex505.png"),
    ]  # fmt: skip
    for subject, name, frames, emotion, folder, angle, path in good:
        rows.append([subject, name, *map(str, frames), "12", "4", emotion])
        clip(folder, "{}.jpg", *frames[:2], angle)
        expected[path] = angle
        clip(folder.replace("frame", "depth").replace("color", "depth"), "{}.png", *frames[:2], angle + WRONG)
    clip(f"{root}/Part_A_MaE_clip/frame/spNo.1_a_900", "{}.jpg", 900, 905, WRONG)
    dropped = [
        ("spNO.149", "d", "112", "83", "358", "disgust", "apex outside onset..offset"),
        ("spNO.216", "d", "3647", "2668", "2694", "fear", "apex outside onset..offset"),
        ("spNO.40", "e", "10", "20", "0", "surprise", "offset is 0"),
        ("spNO.40", "e", "60", "70", "0", "surprise", "offset is 0"),
        ("spNO.216", "e", "0", "0", "25", "fear", "onset = apex"),
        ("spNO.7", "b", "12", "12", "40", "others", "onset = apex"),
        ("spNO.1", "a", "355", "361", "370", "happy", "same clip as another row"),
        ("spNO.1", "a", "900", "905", "910", "disgust", "no clip folder"),
        ("spNO.12", "J", "80", "85", "99", "disgust", "onset frame missing"),
    ]
    rows += [[*row[:5], "4", "1", row[5]] for row in dropped]
    sheets = f"{root}/annotation/partA"
    book(f"{sheets}/cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx", rows, "label", ("Sheet1", "Sheet3"))
    workbook = openpyxl.load_workbook(f"{sheets}/cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx")
    workbook["Sheet1"].cell(434, 17).font = Font(bold=True)  # empty, but large
    workbook.save(f"{sheets}/cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx")
    book(f"{sheets}/cas(me)3_part_A_MaE_label_JpgIndex_v2_emotion.xlsx", [CASME3])
    book(f"{root}/annotation/CAS(ME)3_part_C_ME.xlsx", [CASME3])
    for name in (
        "CAS(ME)3_part_A_v2.xls",
        "cas(me)3_part_A_ME_label_JpgIndex_v1.xls",
        "~$cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx",
    ):
        with open(f"{sheets}/{name}", "w") as file:
            file.write("old Excel")
    return expected, [("casme3", row[0][5:], row[1], row[6]) for row in dropped]


def make_dfme(root):
    rows, expected = [DFME], {}
    good = [  # subject, clip, frames, emotion, folder, name, angle
        ("sub0003", "sub0003_01", (46, 60, 90), "happiness", "train_data/train_data", "{:05d}.png", 40),
        ("sub0003", "sub0003_02", (0, 5, 9), "sadness", "train_data/train_data", "{:05d}.PNG", 130),
        ("sub0650", "sub0650_11", (3, 5, 9), "contempt", "USTC_partB_sub0600_sub0650/micro/fear", "{:05d}.png", 220),
    ]
    for subject, name, frames, emotion, folder, pattern, angle in good:
        rows.append([subject, name, *frames, emotion, 1, 500, "AU4"])
        clip(f"{root}/{folder}/{name}", pattern, *frames[:2], angle)
        word = {"sadness": "sad"}.get(emotion, emotion)
        expected[f"dfme_{word}/{subject}_{name}_onset{frames[0]}_apex{frames[1]}.png"] = angle
    book(f"{root}/full_release_annotation/training_full_with_AU.xlsx", rows)
    book(f"{root}/full_release_annotation/testA_full_with_AU.xlsx", [DFME, *rows[1:]])
    return expected, []


MAKERS = {"casme2": make_casme2, "samm": make_samm, "mmew": make_mmew, "casme3": make_casme3, "dfme": make_dfme}


def tiny_casme2(root, sheet="CASME2-coding-20140508.xlsx", frames="Cropped/sub01/EP02_01f/reg_img{}.jpg", angle=0):
    """The least raw tree: CASME II with one row; returns the path of RAW."""
    book(f"{root}/casme2/{sheet}", [CASME2, casme2_row("01", "EP02_01f", 46, 59, 86, "happiness")])
    if frames:
        clip(f"{root}/casme2/{os.path.dirname(frames)}", os.path.basename(frames), 46, 59, angle)
    return str(root)


def run_data(*arguments, **variables):
    """Run data.py as a user does, on one thread; returns the finished process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENCV_FOR_THREADS_NUM": "1"} | variables
    line = [sys.executable, os.path.join(HERE, "data.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment)


def refused(run, *words):
    """A user error: exit status 2 and one line that begins with error: and has all of the words."""
    lines = run.stderr.splitlines()
    assert run.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), run.stderr
    for word in words:
        assert str(word) in lines[0], f"{word!r} not in {lines[0]}"


def images(out):
    return {f"{folder}/{name}" for folder in os.listdir(out) if os.path.isdir(f"{out}/{folder}")
            for name in os.listdir(f"{out}/{folder}")}  # fmt: skip


def direction(path):
    """The direction of motion, in degrees, that an image shows: the mean hue, bright pixels counting more."""
    hue, _, value = np.asarray(Image.open(path).convert("HSV"), float).transpose(2, 0, 1)
    return np.degrees(np.angle(((value / 255) ** 2 * np.exp(2j * np.pi * hue / 255)).sum())) % 360


def apart(one, other):
    return abs((one - other + 180) % 360 - 180)


def times(out):
    return {path: os.stat(f"{out}/{path}").st_mtime_ns for path in images(out)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """All five raw trees, prepared by one command."""
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("work") / "out"
    names = {"casme2": "CASME II", "samm": "SAMM", "mmew": "mmew", "casme3": "CAS(ME)^3", "dfme": "dfme"}
    made = [maker(f"{raw}/{names[session]}") for session, maker in MAKERS.items()]
    line = ["prepare", "--raw", raw, "--out", out, "--size", 64, "--sessions", *MAKERS]
    return {
        "out": str(out),
        "line": line,
        "run": run_data(*line),
        "expected": {path: angle for expected, _ in made for path, angle in expected.items()},
        "dropped": [drop for _, dropped in made for drop in dropped],
    }


# ---- what is written, what is left out -------------------------------------------------------------------------------
def test_every_usable_row_is_written_and_made_of_its_own_frames(prepared):
    assert prepared["run"].returncode == 0 and prepared["run"].stderr == "", prepared["run"].stderr
    assert images(prepared["out"]) == set(prepared["expected"])
    for path, angle in prepared["expected"].items():
        assert Image.open(f"{prepared['out']}/{path}").size == (64, 64)
        assert apart(direction(f"{prepared['out']}/{path}"), angle) < 20, path


def test_every_other_row_is_reported_with_its_reason(prepared):
    with open(f"{prepared['out']}/report.csv", encoding="utf-8", newline="") as file:
        report = list(csv.DictReader(file))
    assert list(report[0]) == list(data.REPORT)
    found = [tuple(row[name] for name in ("dataset", "subject", "clip", "reason")) for row in report]
    assert sorted(found) == sorted(prepared["dropped"])
    assert [row["row"] for row in report if row["clip"] == "028_4_1"] == ["19"]  # its number in the sheet
    assert [row["detail"] for row in report if row["clip"] == "EP05_02"] == [
        "frame 9 in CASME2_RAW_selected/CASME2_RAW_selected/sub17/EP05_02"]  # fmt: skip
    screen = prepared["run"].stdout
    assert "left out:     2 rows of samm: apex outside onset..offset" in screen
    assert "left out:     3 rows of casme2: emotion outside Table 1" in screen


def test_counts_of_sheet_table1_and_usable(prepared):
    rows = [line.split() for line in prepared["run"].stdout.splitlines()]
    assert ["session", "emotion", "sheet", "Table", "1", "usable"] in rows
    assert ["casme2", "others", "12", "12", "1"] in rows  # the emotions as they are after normalising
    assert ["casme2", "fear", "1", "0", "0"] in rows and ["casme2", "(blank)", "1", "0", "0"] in rows
    assert ["casme2", "all", "22", "19", "5"] in rows and ["samm", "all", "9", "6", "4"] in rows
    assert ["mmew", "all", "6", "5", "4"] in rows and ["casme3", "all", "14", "14", "5"] in rows
    assert ["dfme", "sad", "1", "1", "1"] in rows and ["dfme", "all", "3", "3", "3"] in rows


def test_sheets_and_settings_are_recorded(prepared):
    with open(f"{prepared['out']}/prepare.json") as file:
        record = json.load(file)
    assert record["size"] == 64 and record["farneback"] == data.FARNEBACK
    assert record["versions"][0]["opencv"] == cv2.__version__
    sheets = {session: os.path.basename(one["sheet"]) for session, one in record["sessions"].items()}
    assert sheets == {
        "casme2": "CASME2-coding-20140508.xlsx",
        "samm": "SAMM_Micro_FACS_Codes_v2.xlsx",
        "mmew": "MMEW_Micro_Exp (20).xlsx",
        "casme3": "cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx",
        "dfme": "training_full_with_AU.xlsx",
    }
    assert all(len(one["sheet_sha256"]) == 64 for one in record["sessions"].values())
    for name in sheets.values():
        assert name in prepared["run"].stdout


def test_load_reads_the_prepared_folder(prepared):
    sessions = {session.name: session for session in data.load(prepared["out"], list(MAKERS), 32)}
    assert sessions["casme2"].emotions == ["disgust", "happiness", "others", "repression", "surprise"]
    assert sessions["casme2"].subjects.tolist() == [1, 1, 2, 3, 26]
    assert sessions["samm"].subjects.tolist() == [6, 11, 13, 32]  # anger, contempt, others, surprise
    assert sessions["mmew"].subjects.tolist() == [3, 13, 30, 4]  # happiness, others, sad, surprise
    assert sessions["casme3"].subjects.tolist() == [12, 12, 1, 12, 1]  # anger, fear, happiness, others, sad
    assert sessions["dfme"].subjects.tolist() == [650, 3, 3]  # contempt, happiness, sad
    assert sorted(key for one in sessions.values() for key in one.keys) == sorted(prepared["expected"])


@pytest.mark.parametrize("method", METHODS)
def test_prepared_folder_runs_through_every_method(prepared, watch, method):
    flags = ["--data", prepared["out"], "--sessions", "casme2", "casme3", "--preset", "tiny"]
    (fold,) = watch(method, *flags, *SHORT).values()
    assert fold["keys"].tolist() == [path for path in fold["keys"].tolist() if path in prepared["expected"]]
    assert len(fold["scores_1"]) == 2 and fold["scores_1"].shape[1] == 5 + 7


def test_second_run_does_only_what_is_missing(prepared):
    out, before = prepared["out"], times(prepared["out"])
    with open(f"{out}/report.csv") as file:
        report = file.read()
    run = run_data(*prepared["line"])
    assert run.returncode == 0 and times(out) == before
    with open(f"{out}/report.csv") as file:
        assert file.read() == report
    lost = "samm_anger/sub006_006_1_2_onset5562_apex5567.png"
    with open(f"{out}/{lost}", "rb") as file:
        content = file.read()
    os.remove(f"{out}/{lost}")
    sheet = f"{prepared['line'][2]}/SAMM/SAMM_Micro_FACS_Codes_v2.xlsx"
    os.renames(sheet, sheet.replace("SAMM_Micro", "sheets/SAMM_Micro"))  # the same sheet somewhere else
    with open(f"{out}/{lost}.part", "wb") as file:  # what a kill in the middle of writing leaves behind
        file.write(content[:100])
    assert len(data.load(out, ["samm"], 32)[0].keys) == 3
    run = run_data(*prepared["line"][:-5], "samm")  # of one session: the report keeps the others' rows
    assert run.returncode == 0 and "3 images are there already, 1 to make" in run.stdout
    after = times(out)
    assert after.keys() == before.keys() and [path for path in after if after[path] != before[path]] == [lost]
    with open(f"{out}/{lost}", "rb") as file:
        assert file.read() == content
    with open(f"{out}/report.csv") as file:
        assert sorted(file.read().splitlines()) == sorted(report.splitlines())
    with open(f"{out}/prepare.json") as file:
        assert list(json.load(file)["sessions"]) == list(MAKERS)


def test_another_size_or_parameter_is_refused(prepared, tmp_path):
    out, line = prepared["out"], prepared["line"]
    refused(run_data(*[128 if word == 64 else word for word in line]), out, "size 64", "128", "another --out")
    with open(f"{out}/prepare.json") as file:
        kept = file.read()
    try:
        with open(f"{out}/prepare.json", "w") as file:
            file.write(kept.replace('"winsize": 15', '"winsize": 21'))
        refused(run_data(*line), out, "winsize", "another --out")
        with open(f"{out}/prepare.json", "w") as file:
            file.write("[]")
        refused(run_data(*line), "prepare.json", "another --out")
    finally:
        with open(f"{out}/prepare.json", "w") as file:
            file.write(kept)


def test_another_sheet_is_refused(tmp_path):
    line = ["prepare", "--raw", tiny_casme2(tmp_path), "--out", tmp_path / "out", "--sessions", "casme2", "--size", 64]
    assert run_data(*line).returncode == 0
    book(f"{tmp_path}/casme2/CASME2-coding-20140508.xlsx", [CASME2, casme2_row("01", "EP02_01f", 46, 59, 86, "others")])
    refused(run_data(*line), tmp_path / "out", "casme2 sheet_sha256", "another --out")


# ---- layouts ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("frames", [
    "CASME2-RAW/sub01/EP02_01f/img{}.jpg",
    "CASME2_RAW/CASME2-RAW/Sub01/ep02_01F/img{}.JPG",
    "CASME2_RAW_selected/sub01/EP02_01f/img{}.jpeg",
    "Cropped/sub01/EP02_01f/reg_img{}.jpg",
    "Cropped-updated/Cropped/sub01/EP02_01f/reg_img{}.bmp",
    "sub01/EP02_01f/{:05d}.png",
])  # fmt: skip
def test_casme2_folders(tmp_path, frames):
    raw, out = tiny_casme2(tmp_path / "raw", frames=frames, angle=60), str(tmp_path / "out")
    save(f"{raw}/casme2/{os.path.dirname(frames)}/._img46.jpg", SMALL)  # resource forks of macOS are no frames
    data.prepare(raw, out, ["casme2"], size=64)
    assert apart(direction(f"{out}/casme2_happiness/sub01_EP02_01f_onset46_apex59.png"), 60) < 20


def test_cropped_frames_are_preferred_without_landmarks_and_raw_frames_with(tmp_path, capsys):
    raw = tiny_casme2(tmp_path / "raw", angle=60)
    clip(f"{raw}/casme2/CASME2-RAW/sub01/EP02_01f", "img{}.jpg", 46, 59, 240)
    os.makedirs(f"{tmp_path}/marks/casme2/sub01")
    np.save(f"{tmp_path}/marks/casme2/sub01/EP02_01f.npy", landmarks(48, 48, 60))
    for marks, angle, words in (
        (None, 60, "cropped frames (the raw ones"),
        ("marks", 240, "raw frames (the cropped ones"),
    ):
        out = f"{tmp_path}/out-{marks}"
        data.prepare(raw, out, ["casme2"], marks and f"{tmp_path}/{marks}", 64)
        assert words in capsys.readouterr().out
        assert apart(direction(f"{out}/casme2_happiness/sub01_EP02_01f_onset46_apex59.png"), angle) < 20


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_sheets(tmp_path, delimiter):
    root = f"{tmp_path}/raw/samm"
    clip(f"{root}/006/006_1_2", "006_{:05d}.jpg", 10, 15)
    lines = [["Subject and frames, see the article"], SAMM, samm_row(6, "006_1_2", 10, 15, 20, "Other"), [""] * 12]
    with open(f"{root}/SAMM_Micro_FACS_Codes_v2.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows(lines)
    data.prepare(f"{tmp_path}/raw", f"{tmp_path}/out", ["samm"], size=64)
    assert images(f"{tmp_path}/out") == {"samm_others/sub006_006_1_2_onset10_apex15.png"}


def test_the_right_one_of_several_sheets(tmp_path, capsys):
    raw = tiny_casme2(tmp_path, sheet="CASME2-coding-20140508.csv")
    book(f"{raw}/casme2/CASME2-coding-20190701.xlsx", [CASME2])
    data.prepare(raw, f"{tmp_path}/one", ["casme2"], size=64)
    assert "1 rows in CASME2-coding-20140508.csv" in capsys.readouterr().out
    tiny_casme2(tmp_path, sheet="copy/CASME2-coding-20140508.xlsx")  # the .xlsx is the original
    data.prepare(raw, f"{tmp_path}/two", ["casme2"], size=64)
    assert "1 rows in copy/CASME2-coding-20140508.xlsx" in capsys.readouterr().out
    for names, right in (
        (("cas(me)3_part_A_MaE_label_JpgIndex_v2.xlsx", "cas(me)3_part_A_ME_label_JpgIndex_v1.xlsx"), 1),
        (("MMEW_Micro_Exp_v2.xlsx", "MMEW_Micro_Exp.xlsx"), 1),
        (("MMEW_Micro_Exp.csv", "MMEW_Micro_Exp_new.xlsx"), 0),
        (("cas(me)3_part_A_MaE_label_JpgIndex_v2.xlsx", "cas(me)3_part_A_ME_label_JpgIndex_v2_refined.xlsx"), 1),
        (("cas(me)3_part_A_ME_label_JpgIndex_v2.csv", "cas(me)3_part_A_ME_label_JpgIndex_v1.xlsx"), 0),
        (("test_coding.txt", "testA_full_with_AU.xlsx", "coding.xlsx"), 2),
    ):
        session = {"M": "mmew", "c": "casme3", "t": "dfme"}[names[0][0]]
        paths = [str(tmp_path / name) for name in names]
        for path in paths:
            with open(path, "w") as file:
                file.write(path)
        assert data._find_sheet(session, tmp_path, paths) == paths[right]


# ---- flow and crop ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("angle", range(0, 360, 45))
def test_hue_is_the_direction_of_a_known_translation(angle):
    flow = data.flow_between(FACE, moved(FACE, angle, 2.0))
    expected = 2 * np.cos(np.radians(angle)), 2 * np.sin(np.radians(angle))
    assert np.abs(np.median(flow[20:-20, 20:-20], (0, 1)) - expected).max() < 0.1  # x to the right, y down
    rgb = data.flow_to_image(flow[None])[0]
    middle = rgb.transpose(1, 2, 0)[80:120, 80:120].reshape(-1, 3).mean(0)
    pure = {0: (1, 0, 0), 45: (1, 0.75, 0), 90: (0.5, 1, 0), 135: (0, 1, 0.25), 180: (0, 1, 1), 225: (0, 0.25, 1),
            270: (0.5, 0, 1), 315: (1, 0, 0.75)}[angle]  # fmt: skip
    assert np.abs(middle / middle.max() - pure).max() < 0.15


def test_coding_agrees_with_opencv():
    flow = data.flow_between(FACE, warp(FACE, 4, -3, (120, 80), 25))
    magnitude, angle = cv2.cartToPolar(flow[..., 0], flow[..., 1])
    hsv = np.full((*FACE.shape, 3), 255, np.uint8)
    hsv[..., 0] = angle * 90 / np.pi
    hsv[..., 2] = cv2.normalize(magnitude, None, 0, 255, cv2.NORM_MINMAX)
    theirs = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(int)
    ours = data.flow_to_image(flow[None])[0].transpose(1, 2, 0)
    assert np.abs(ours - theirs).max() <= 10  # OpenCV's hue goes in steps of 2 degrees


def brightest(path):
    """The place (x, y) of the largest motion, from 0 to 1; the image's rim is left out."""
    value = np.asarray(Image.open(path).convert("HSV"))[..., 2].astype(np.float32)
    value = cv2.GaussianBlur(value, (0, 0), len(value) / 30)
    rim = len(value) // 10
    y, x = np.unravel_index(value[rim:-rim, rim:-rim].argmax(), value[rim:-rim, rim:-rim].shape)
    return (x + rim) / len(value), (y + rim) / len(value)


def landmarks(x, y, side):
    """68 points (x, y) around the tip of the nose, for which the crop is a square of the given side."""
    points = np.full((68, 2), (x, y), float)
    points[[8, 19, 57], 1] = y + side / 3, y - side / 3, y + side / 3 - side / 3
    return points


def test_place_of_a_known_local_warp(tmp_path):
    raw, frame = tiny_casme2(tmp_path / "raw", frames=None), FACE[:160]  # wider than high
    folder = f"{raw}/casme2/CASME2-RAW/sub01/EP02_01f"
    save(f"{folder}/img46.png", frame)
    save(f"{folder}/img59.png", warp(frame, 4, 0, (130, 60), 16))
    assert run_data("prepare", "--raw", raw, "--out", tmp_path / "out", "--sessions", "casme2").returncode == 0
    path = f"{tmp_path}/out/casme2_happiness/sub01_EP02_01f_onset46_apex59.png"
    assert Image.open(path).size == (256, 256)  # the default
    assert np.abs(np.subtract(brightest(path), (130 / 200, 60 / 160))).max() < 0.06
    assert apart(direction(path), 0) < 15


def test_crop_box():
    assert data.crop_box(landmarks(110, 50, 60), 200, 160) == (80, 20, 140, 80)  # (x, y), not swapped
    assert data.crop_box(landmarks(20, 150, 60), 200, 160) == (0, 120, 50, 160)  # cut off at the edges
    points = landmarks(100, 80, 60)
    points[8, 1], points[19, 1], points[57, 1] = 150, 40, 120  # chin, brow, lower lip: side 110 + 30
    assert data.crop_box(points, 200, 160) == (30, 10, 170, 150)
    for wrong in (
        landmarks(320, 90, 60),
        landmarks(100, 170, 60),
        landmarks(100, 80, -60),
        np.zeros((68, 3)),
        np.full((68, 2), np.nan),
    ):
        with pytest.raises(ValueError):
            data.crop_box(wrong, 200, 160)


def test_landmarks_crop_both_frames_at_the_nose(tmp_path):
    """The nose is at (80, 110), the motion at (105, 85): in the crop (30..130, 60..160) at (3/4, 1/4)."""
    raw, marks, out = tmp_path / "raw", tmp_path / "marks", tmp_path / "out"
    row = ("happiness", 46, 59, 86)
    places = {  # clip folder and landmark file in each dataset's naming
        "casme2": ("CASME2-RAW/sub01/EP02_01f/img{}.png", "sub01/EP02_01f.npy"),
        "samm": ("006/006_1_2/006_{:05d}.png", "006/006_1_2.npy"),
        "mmew": ("Micro_Expression/happiness/S03-01-002/{}.png", "happiness/S03-01-002/S03-01-002.npy"),
        "casme3": ("part_A/data/spNO.1/a/color/{}.png", "spNO.1/a/color/color.npy"),
        "dfme": ("train_data/sub0003_01/{:05d}.png", "sub0003_01.npy"),
    }
    for session, (frames, file) in places.items():
        for number, frame in ((46, FACE), (59, warp(FACE, 0, 3, (105, 85), 10))):
            save(f"{raw}/{session}/{frames.format(number)}", frame)
        os.makedirs(os.path.dirname(f"{marks}/{session}/{file}"))
        np.save(f"{marks}/{session}/{file}", landmarks(80, 110, 100))
    emotion, *numbers = row
    rows = [casme2_row("01", "EP02_01f", *numbers, emotion), casme2_row("02", "EP01_01", *numbers, emotion),
            casme2_row("03", "EP01_01", *numbers, emotion), casme2_row("04", "EP01_01", *numbers, emotion),
            casme2_row("05", "EP01_01", *numbers, emotion), casme2_row("06", "EP01_01", *numbers, emotion)]  # fmt: skip
    for subject, points in ((3, np.zeros((5, 2))), (4, landmarks(400, 60, 60)), (5, np.array(["a"])), (6, None)):
        os.makedirs(f"{marks}/casme2/sub0{subject}")
        np.save(f"{marks}/casme2/sub0{subject}/EP01_01.npy", points)
    with open(f"{marks}/casme2/sub06/EP01_01.npy", "wb") as file:
        file.write(b"PK\x03\x04 an archive, cut off")
    for subject in (2, 3, 4, 5, 6):
        clip(f"{raw}/casme2/CASME2-RAW/sub0{subject}/EP01_01", "img{}.jpg", 46, 59)
    book(f"{raw}/casme2/CASME2-coding-20140508.xlsx", [CASME2, *rows])
    book(f"{raw}/samm/SAMM_Micro_FACS_Codes_v2.xlsx", [SAMM, samm_row("006", "006_1_2", *numbers, emotion)])
    book(f"{raw}/mmew/MMEW_Micro_Exp.xlsx", [MMEW, [3, "S03-01-002", *numbers, 12, emotion, None]])
    book(f"{raw}/casme3/cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx", [CASME3, ["spNO.1", "a", *numbers, 12, 1, "happy"]])
    book(f"{raw}/dfme/coding.xlsx", [DFME, ["sub0003", "sub0003_01", *numbers, emotion, 4, 500, "AU4"]])
    line = ["prepare", "--raw", raw, "--out", out, "--landmarks", marks, "--size", 120, "--sessions", *places]
    run = run_data(*line)
    assert run.returncode == 0, run.stderr
    assert len(images(out)) == 5
    for path in images(out):
        assert np.abs(np.subtract(brightest(f"{out}/{path}"), (0.75, 0.25))).max() < 0.08, path
        assert apart(direction(f"{out}/{path}"), 90) < 15, path
    with open(f"{out}/report.csv", newline="") as file:
        reasons = {row["subject"]: (row["reason"], row["detail"]) for row in csv.DictReader(file)}
    assert reasons["2"] == ("no landmarks", "")
    assert {reasons[subject][0] for subject in "3456"} == {"landmarks cannot be used"}
    assert "(5, 2)" in reasons["3"][1] and "outside" in reasons["4"][1]
    # Other landmarks, or none, give other images: another folder is needed.
    np.save(f"{marks}/samm/006/006_1_2.npy", landmarks(120, 60, 60))
    refused(run_data(*line), out, "samm landmarks_sha256", "another --out")
    refused(
        run_data(*[word for word in line if word not in ("--landmarks", marks)]), out, "crop landmarks", "whole frame"
    )
    # A session without a folder of landmarks keeps whole frames.
    os.rename(marks / "samm", marks / "put away")
    whole = [tmp_path / "whole" if word == out else word for word in line]
    said = "samm: 1 rows in SAMM_Micro_FACS_Codes_v2.xlsx, 1 clip folders of raw frames, whole frame"
    assert said in run_data(*whole).stdout
    path = f"{tmp_path}/whole/samm_happiness/sub006_006_1_2_onset46_apex59.png"
    assert np.abs(np.subtract(brightest(path), (105 / 200, 85 / 200))).max() < 0.08


# ---- what users get wrong --------------------------------------------------------------------------------------------
def test_wrong_raw_folders(tmp_path):
    refused(run_data("prepare", "--out", tmp_path / "out"), "--raw")
    refused(run_data("prepare", "--raw", tmp_path), "--out")
    refused(
        run_data("prepare", "--raw", tmp_path / "nowhere", "--out", tmp_path / "out"), tmp_path / "nowhere", "--raw"
    )
    raw = tiny_casme2(tmp_path / "raw")
    refused(run_data("prepare", "--raw", raw, "--out", tmp_path / "out"), raw, "samm", "casme2", data.PAGES["samm"][1])
    inside = f"{raw}/casme2"
    refused(run_data("prepare", "--raw", inside, "--out", tmp_path / "out", "--sessions", "casme2"), inside, "Cropped",
            "CASME II", "http://casme.psych.ac.cn/casme/e2")  # fmt: skip
    raw = tiny_casme2(tmp_path / "other", frames=None)
    refused(
        run_data("prepare", "--raw", raw, "--out", tmp_path / "out", "--sessions", "casme2"), raw, "no clip folders"
    )
    assert not os.path.exists(tmp_path / "out")


@pytest.mark.parametrize("files, words", [
    ({}, ["CASME2-coding-20140508.xlsx", "no table at all", "http://casme.psych.ac.cn/casme/e2"]),
    ({"CASME2-ObjectiveClasses.xlsx": [CASME2]}, ["CASME2-coding-20140508.xlsx", "found CASME2-ObjectiveClasses.xlsx"]),
    ({"CASME2-coding-20140508.xls": "old Excel"}, ["save an .xls as .xlsx", "found CASME2-coding-20140508.xls;"]),
    ({"CASME2-coding-20140508.xlsx": "<html>Sign in</html>"}, ["20140508.xlsx", "not a readable .xlsx", "zip"]),
    ({"CASME2-coding-20140508.csv": ""}, ["20140508.csv", "no cell Subject"]),
    ({"CASME2-coding-20140508.xlsx": [["a", "b"], [1, 2]]}, ["20140508.xlsx", "no cell Subject", "needed: Subject"]),
    ({"CASME2-coding-20140508.xlsx": [["Subject", "Filename", "OnsetFrame", "Emotion"]]},
     ["20140508.xlsx", "only the columns Subject, Filename, OnsetFrame, Emotion", "Apex[Frame]", "casme/e2"]),
    ({"a/CASME2-coding-20140508.xlsx": [CASME2], "b/CASME2-coding-20140508.xlsx": [CASME2, [1]]},
     ["several sheets", "a/CASME2", "b/CASME2"]),
])  # fmt: skip
def test_wrong_sheets(tmp_path, files, words):
    clip(f"{tmp_path}/raw/casme2/Cropped/sub01/EP02_01f", "reg_img{}.jpg", 46, 59)
    for name, content in files.items():
        if isinstance(content, str):
            with open(f"{tmp_path}/raw/casme2/{name}", "w") as file:
                file.write(content)
        else:
            book(f"{tmp_path}/raw/casme2/{name}", content)
    run = run_data("prepare", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--sessions", "casme2")
    refused(run, *words)
    assert not os.path.exists(tmp_path / "out")


def test_wrong_out(tmp_path, monkeypatch, capsys):
    raw = tiny_casme2(tmp_path / "raw")
    line = ["prepare", "--raw", raw, "--sessions", "casme2", "--out"]
    (tmp_path / "file").write_text("")
    refused(run_data(*line, tmp_path / "file"), tmp_path / "file", "--out")
    refused(run_data(*line, tmp_path / "file" / "out"), tmp_path / "file" / "out", "Not a directory")
    refused(run_data(*line, raw), raw, "not a folder that prepare made")

    def denied(path, mode="r", *arguments, **named):
        if str(path).startswith(str(tmp_path / "out")):
            raise PermissionError(13, "Permission denied", path)
        return open(path, mode, *arguments, **named)

    monkeypatch.setattr(data, "open", denied, raising=False)  # root may write anywhere
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, line), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        data.main()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert message.startswith(f"error: {tmp_path}/out") and "Permission denied" in message


def test_a_report_that_another_program_has_saved(tmp_path):
    raw = tiny_casme2(tmp_path / "raw")
    line = ["prepare", "--raw", raw, "--sessions", "casme2", "--out", tmp_path / "out"]
    assert run_data(*line).returncode == 0
    with open(tmp_path / "out" / "report.csv", encoding="utf-8") as file:
        text = file.read()
    for content in (text.encode("utf-16"), text.replace(",", ";").encode()):
        (tmp_path / "out" / "report.csv").write_bytes(content)
        refused(run_data(*line), tmp_path / "out" / "report.csv", "delete it and run again")
    (tmp_path / "out" / "report.csv").unlink()
    assert run_data(*line).returncode == 0


def test_wrong_landmarks(tmp_path):
    raw = tiny_casme2(tmp_path / "raw")
    line = ["prepare", "--raw", raw, "--sessions", "casme2", "--out", tmp_path / "out", "--landmarks"]
    refused(run_data(*line, tmp_path / "nowhere"), tmp_path / "nowhere", "--landmarks")
    refused(run_data(*line, tmp_path), tmp_path, "none of the folders casme2")
    os.makedirs(tmp_path / "marks" / "casme2" / "sub01")
    refused(run_data(*line, tmp_path / "marks"), tmp_path / "marks" / "casme2", "no landmark files")


@pytest.mark.parametrize("module, package", [("cv2", "opencv-python-headless"), ("openpyxl", "openpyxl")])
def test_missing_packages_are_named(tmp_path, module, package):
    raw = tiny_casme2(tmp_path / "raw")
    os.makedirs(tmp_path / "hidden")
    (tmp_path / "hidden" / f"{module}.py").write_text("raise ImportError")
    line = ["prepare", "--raw", raw, "--sessions", "casme2", "--out", tmp_path / "out"]
    refused(run_data(*line, PYTHONPATH=str(tmp_path / "hidden")), package, f"pip install {package}")


def test_help_names_the_expected_folders():
    run = run_data("prepare", "--help")
    assert run.returncode == 0
    for word in (
        "Cropped/sub01/EP02_01f/reg_img46.jpg",
        "spNo.1_a_355",
        "SAMM_Micro_FACS_Codes_v2.xlsx",
        "landmarks.zip",
    ):
        assert word in run.stdout


# ---- python test_all.py --bench --------------------------------------------------------------------------------------
def seconds(work, repeat=1):
    """Wall seconds of work(), the least of `repeat` tries."""
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def run_here(module, out, *flags):
    """Run a script's main() in this process, without its lines."""
    sys.argv = [module.__file__, *flags, "--out", out]
    with contextlib.redirect_stdout(io.StringIO()):
        module.main()


def bench():
    """Print what this machine measures. Only the ratios mean anything on another one."""
    processor = platform.processor()
    with contextlib.suppress(OSError, IndexError), open("/proc/cpuinfo") as file:  # platform knows it elsewhere
        processor = re.findall(r"model name\s*: (.*)", file.read())[0]
    today = time.strftime("%Y-%m-%d")
    print(f"{today}, torch {torch.__version__}, {torch.get_num_threads()} threads of {processor}, {platform.system()}")
    out = tempfile.mkdtemp()
    try:
        bench_ridge()
        bench_training(out)
        bench_kept(out)
        bench_commands(out)
    finally:
        shutil.rmtree(out)


def bench_ridge():
    print("\nRidge over four sessions, M = 10000, the benchmark's sample counts (197, 108, 233, 688 to train on)")
    m, hs, ys, rows = 10_000, [], [], 0
    for n, count in zip((197, 108, 233, 688), (5, 5, 6, 7)):
        hs.append(torch.randn(n, 96).matmul(torch.randn(96, m)).relu())
        ys.append(F.pad(F.one_hot(torch.randint(count, (n,)), count), (rows, 0)))
        rows += count
    ridge = ranpac.LowRankRidge(m)

    def session(h, y):
        lam = ranpac.choose_lambda(h, y)
        ridge.update(h, y)
        ridge.weights(lam)

    low_rank = [seconds(lambda h=h, y=y: session(h, y)) for h, y in zip(hs, ys)]
    print("low rank, 17 lambdas, float64, seconds per session: " + ", ".join(f"{s:.2f}" for s in low_rank))
    g, q = hs[0].double().T @ hs[0].double() + torch.eye(m, dtype=torch.float64), hs[0].double().T @ ys[0].double()
    once, solves = seconds(lambda: torch.linalg.solve(g, q)), 4 * (len(ranpac.LAMBDAS) + 1)
    print(f"dense M x M, float64: one solve {once:.1f} s; 4 x (17 lambdas + 1) of them {solves * once:.0f} s, scaled")
    print(f"dense / low rank = {solves * once / sum(low_rank):.0f}")
    for name, sizes in (("samples", [(200, m), (400, m), (800, m)]), ("M", [(400, m // 4), (400, m // 2), (400, m)])):
        times = []
        for n, width in sizes:
            h, y = torch.randn(n, width), F.one_hot(torch.randint(7, (n,)), 7)
            times.append(seconds(lambda h=h, y=y, width=width: ranpac.LowRankRidge(width).update(h, y), 3))
        print(f"one update, {name} doubled twice: " + ", ".join(f"x {t / times[0]:.1f}" for t in times))


def bench_training(out):
    print("\nTiny backbones, batch 32: training (forward, loss, backward, fused AdamW), and features")
    for name in common.CHECKPOINTS:
        args = tiny_args(name, "none")
        backbone = common.make_backbone(args).train()
        optimizer = torch.optim.AdamW(backbone.parameters(), 1e-4, fused=True)
        images = torch.zeros(1024, 3, common.TINY_SIZE, common.TINY_SIZE, dtype=torch.uint8)

        def epoch(backbone=backbone, optimizer=optimizer, images=images, args=args):
            for part in images.split(32):
                loss = backbone(common.normalize(part, args)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        epoch()
        train = seconds(epoch, 3) / 1024
        backbone.eval()
        see = seconds(lambda b=backbone, x=images, a=args: common.extract(b, x, a), 3) / 1024
        print(f"{name:7s} {1 / train:6.0f} images/s trained, {1 / see:6.0f} images/s seen")

    print("\nA session of finetune.py, its tests and lines included / bare forward, backward and step on its batches")
    epochs = 20
    args = tiny_args("vit")
    network = torch.nn.Sequential(common.make_backbone(args), torch.nn.Linear(96, 5)).train()
    optimizer = torch.optim.AdamW(network.parameters(), 5e-4, fused=True)
    (session,) = data.synthetic(common.TINY_SIZE, sessions=["casme2"])
    train = np.setdiff1d(np.arange(len(session.keys)), protocols.split(session.subjects, "ilcv")[0])
    parts = common.normalize(torch.from_numpy(session.images[train]), args).split(32)
    labels = torch.randint(5, (len(train),)).split(32)

    def bare():
        for _ in range(epochs):
            for x, y in zip(parts, labels):
                loss = F.cross_entropy(network(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    loop, floor = [], []
    for _ in range(3):  # in turns, since the machine's speed drifts
        run_here(finetune, out, "--sessions", "casme2", "--folds", "0", "--epochs-first", str(epochs))
        loop.append(results(out)[0]["seconds"][0])
        floor.append(seconds(bare))
    print(f"{min(loop) / min(floor):.2f}")


def bench_kept(out):
    print("\nFrozen features recomputed whenever needed / kept: one trial, tiny preset, vit, least of three in turns")
    normalize, extract = common.normalize, common.extract

    def in_every_step(networks):  # `networks`: main's local variables -> the frozen networks that a step needs to hear
        def again(images, args):
            x = normalize(images, args)
            if torch.is_grad_enabled():  # a training step
                with torch.no_grad():
                    for network in networks(sys._getframe(1).f_locals):
                        network(x)
            return x

        return {"normalize": again}

    def of_foster(local):
        compressing = local["student"].training
        return [local["old"], local["backbone"]] if compressing else [local["old"]] if local["t"] else []

    def earlier_tests(backbone, x, args):
        local = sys._getframe(1).f_locals
        if len(x) == len(local["test"]):
            for s in range(local["t"]):
                extract(backbone, local["images"][s][local["run"].parts(local["fold"], s)[1]], args)
        return extract(backbone, x, args)

    recomputing = {
        "der": in_every_step(lambda local: local["extractors"][:-1]),
        "foster": in_every_step(of_foster),
        "l2p": in_every_step(lambda local: [local["vit"].forward_features]),
        "dualprompt": in_every_step(lambda local: [local["vit"].forward_features]),
        "ranpac": {"extract": earlier_tests},
    }
    for method, patches in recomputing.items():
        module, times = importlib.import_module(method), collections.defaultdict(list)
        for _ in range(3):
            for way in ("kept", "recomputed"):
                common.normalize, common.extract = normalize, extract
                for name, work in patches.items() if way == "recomputed" else ():
                    setattr(common, name, work)
                times[way].append(seconds(lambda module=module: run_here(module, out, "--folds", "0")))
        print(f"{method:11s} {min(times['recomputed']) / min(times['kept']):.2f}")
    common.normalize, common.extract = normalize, extract
    print("finetune    keeps none: it freezes nothing")


def bench_commands(out):
    print("\nWhere the seconds of python ranpac.py --backbone vit --protocol ilcv go")
    spent, running = collections.Counter(), set()

    def timed(module, name, label):
        work = getattr(module, name)

        def wrapped(*args, **flags):
            if label in running:  # choosing lambda calls the ridge's own functions
                return work(*args, **flags)
            running.add(label)
            begin = time.perf_counter()
            try:
                return work(*args, **flags)
            finally:
                running.remove(label)
                spent[label] += time.perf_counter() - begin

        setattr(module, name, wrapped)
        return module, name, work

    quick = [sys.executable, "-c", "import torch, timm, numpy, PIL"]
    spent["imports"] = seconds(lambda: subprocess.run(quick, check=True))
    wrapped = [
        timed(data, "synthetic", "stream"),
        timed(common, "extract", "features"),
        timed(ranpac, "choose_lambda", "ridge"),
        timed(ranpac.LowRankRidge, "update", "ridge"),
        timed(ranpac.LowRankRidge, "weights", "ridge"),
        timed(protocols.Run, "record", "lines and files"),
    ]
    total = seconds(lambda: run_here(ranpac, out)) + spent["imports"]
    spent["training and the rest"] = total - sum(spent.values())
    for module, name, work in wrapped:
        setattr(module, name, work)
    print(f"in all {total:.0f} s: " + ", ".join(f"{label} {100 * s / total:.0f} %" for label, s in spent.most_common()))

    print("\nWhole commands, tiny preset, vit, ilcv, five folds: seconds, and peak memory where /proc tells it")
    for method in METHODS:
        begin, peak = time.perf_counter(), 0
        words = [sys.executable, os.path.join(HERE, f"{method}.py"), "--out", out]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{process.pid}/status") as file:
                peak = max(peak, int(re.findall(r"VmHWM:\s+(\d+)", file.read())[0]))
            time.sleep(0.1)
        assert process.returncode == 0
        print(f"{method:11s} {time.perf_counter() - begin:4.0f} s  {peak / 1024:5.0f} MiB")


# ---- python test_all.py --table --------------------------------------------------------------------------------------
RUNS = [["ranpac.py", "--features", "pixels"]]
for network in ("resnet", "vit", "swin"):
    fitting = [method for method in METHODS if network == "vit" or method not in ("l2p", "dualprompt")]
    RUNS += [[f"{method}.py", "--backbone", network] for method in fitting]
    RUNS += [["ranpac.py", "--backbone", network, "--features", "frozen"]]
    RUNS += [["ranpac.py", "--backbone", network, "--features", "frozen", "--weights", "none"]]
RUNS += [["finetune.py", "--joint"], ["finetune.py", "--no-rch"], ["l2p.py", "--no-prompts"]]


def table():
    """Run everything that the README's results table holds, on the synthetic stream, and print the table.

    As many runs at a time as there are cores, each on one thread: such small networks gain little from a second one.
    """

    def run(words):
        words = [sys.executable, os.path.join(HERE, words[0]), *words[1:], "--out", "results/table", "--resume"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        print(" ".join(words[1:-3]), done.stderr, file=sys.stderr, flush=True)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, [[*words, "--protocol", protocol] for protocol in ("ilcv", "slcv") for words in RUNS]))
    subprocess.run([sys.executable, os.path.join(HERE, "protocols.py"), "results/table"], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--bench", action="store_true", help="print times and ratios")
    what.add_argument("--table", action="store_true", help="make the README's results table in results/table")
    if parser.parse_args().bench:
        bench()
    else:
        table()
