"""The tests of this project, with pytest; and two commands that measure it.

python -m pytest test_all.py       a few minutes on two CPU cores, no network, no data
python test_all.py --bench         ratios: the ridge, the training loop, whole commands
python test_all.py --table         the results table of the README, from every run that it holds

The method files are flat scripts, so the tests watch them from outside: `watch` runs a script's main() in this process
and looks at its local variables whenever a session has been tested.
"""

import argparse
import contextlib
import copy
import functools
import importlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
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
    assert f"| {backbone} | {method} (1 of 5 folds) |" in table and "| contempt |" in table


@pytest.mark.parametrize(
    "flags", [["finetune", "--joint"], ["finetune", "--no-rch"], ["ranpac", "--features", "frozen"]]
)
def test_controls(flags, tmp_path):
    assert "S4 casme3" in command(f"{flags[0]}.py", *flags[1:], *SHORT, cwd=tmp_path).stdout


def test_help_is_quick_and_shows_defaults(tmp_path):
    seconds = []
    for _ in range(2):  # the second time the files are in memory
        begin = time.perf_counter()
        out = command("ranpac.py", "--help", cwd=tmp_path).stdout
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 3 and "paper 60, tiny 10" in out and "--features" in out


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


def readme_commands():
    with open(os.path.join(HERE, "README.md")) as file:
        blocks = re.findall(r"```bash\n(.*?)```", file.read(), re.S)
    return [line for block in blocks for line in block.splitlines() if re.match(r"python (?!-m|test_all|common)", line)]


def test_readme_commands(tmp_path):
    """Every command of the README runs, in its order; what trains, for one epoch on one fold in the tiny preset."""
    commands = readme_commands()
    assert len(commands) >= 5
    for line in commands:
        words = line.split("#")[0].split()[1:]
        if words[0][:-3] in METHODS:
            words += SHORT if "--folds" not in words else SHORT[2:]
            words += ["--preset", "tiny"] if "--data" in words else []
        command(*words, cwd=tmp_path)


def test_readme_line_counts():
    with open(os.path.join(HERE, "README.md")) as file:
        counts = dict(re.findall(r"^\| \[`(\w+\.py)`\]\(\w+\.py\) \| (\d+) \|", file.read(), re.M))
    assert set(counts) == {name for name in os.listdir(HERE) if name.endswith(".py")}
    for name, count in counts.items():
        with open(os.path.join(HERE, name)) as file:
            assert int(count) == len(file.readlines()), name


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


def test_joint_starts_over_with_all_data(watch, monkeypatch):
    monkeypatch.setattr(common, "load_sessions", lambda args: small_stream())
    made = []
    clone = copy.deepcopy
    monkeypatch.setattr(copy, "deepcopy", lambda value, *memo: made.append(1) or clone(value, *memo))
    sizes = []

    def look(t, local):
        sizes.append((len(local["x"]), len(local["heads"]), local["heads"][0].out_features))

    watch("finetune", "--joint", *SHORT, at_record=look)
    parts = np.cumsum([len(s.keys) - len(protocols.split(s.subjects, "ilcv")[0]) for s in small_stream()])
    assert sizes == [(parts[0], 1, 5), (parts[1], 1, 7), (parts[2], 1, 9), (parts[3], 1, 9)]


def test_the_stand_in_sees_more_than_an_untrained_network():
    """Frozen features of tiny/*.pt against random weights: ridge on session 1 and 3, fold 0 of both protocols."""
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
            expected = kd(z, local["teacher"][batch].double().numpy())
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
def train_and_test_sizes():
    sessions = small_stream()
    tests = [len(protocols.split(s.subjects, "ilcv")[0]) for s in sessions]
    return [len(s.keys) - n for s, n in zip(sessions, tests)], tests


def least_passes(method, epochs=1):
    """(with gradients, without) images through a backbone in one trial, from the method's description alone."""
    n, m = train_and_test_sizes()
    tested = np.cumsum(m)
    if method == "finetune":
        return epochs * sum(n), sum(tested)
    if method == "ranpac":
        return epochs * n[0], sum(n) + sum(m)
    if method == "der":  # old extractors once over the session's training images; each extractor once over every test
        return epochs * sum(n), sum(t * n[t] for t in range(4)) + 4 * sum(m)
    if (
        method == "foster"
    ):  # old and teacher once over the training images; old over new tests; new and student over all
        return epochs * (sum(n) + sum(n[1:])), 2 * sum(n[1:]) + sum(m[1:]) + tested[0] + 2 * sum(tested[1:])
    return epochs * sum(n), sum(tested)  # prompted passes; queries are counted apart


@pytest.mark.parametrize("method", METHODS)
def test_no_frozen_network_sees_an_image_twice(method, watch, monkeypatch):
    """Images through backbones, counted with hooks in one trial: no more than the method needs."""
    monkeypatch.setattr(common, "load_sessions", lambda args: small_stream())
    passes = {"train": 0, "eval": 0, "query": 0}
    make = common.make_backbone

    def counting(args):
        backbone = make(args)

        def hook(module, inputs):
            passes["train" if module.training else "eval"] += len(inputs[0])

        backbone.register_forward_pre_hook(hook)
        if args.backbone == "vit":  # the prompt methods call the ViT's parts; a query is one forward_features
            whole = backbone.forward_features
            backbone.forward_features = lambda x: passes.update(query=passes["query"] + len(x)) or whole(x)
            backbone.blocks[0].norm1.register_forward_pre_hook(
                lambda module, inputs: passes.update({key: passes.get(key, 0) + len(inputs[0]) for key in [
                    "prompted train" if torch.is_grad_enabled() else "prompted eval"]}))  # fmt: skip
        return backbone

    monkeypatch.setattr(common, "make_backbone", counting)
    backbone = "vit" if method in ("l2p", "dualprompt") else "resnet"
    folds = ["--folds", "0", "1"] if backbone == "vit" else ["--folds", "0"]
    watch(method, "--backbone", backbone, *SHORT[2:], *folds)
    n, m = train_and_test_sizes()
    if backbone == "vit":
        everything = sum(len(s.keys) for s in small_stream())
        assert passes["query"] == everything  # once per run, for both folds
        sizes = [[len(protocols.split(s.subjects, "ilcv")[f]) for s in small_stream()] for f in (0, 1)]
        train = sum(len(s.keys) - size[i] for size in sizes for i, s in enumerate(small_stream()))
        tests = sum(np.cumsum(size).sum() for size in sizes)
        dropped = train - passes["prompted train"]
        assert 0 <= dropped <= 8 and passes["prompted eval"] == tests + everything
    else:
        train, evaluated = least_passes(method)
        assert 0 <= train - passes["train"] <= 8  # last batches of one image are dropped
        assert passes["eval"] == evaluated


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


def test_order_of_the_file_system_does_not_matter_to_a_batch():
    """Scores do not depend on the test batch: one image alone and in any company gives the same features."""
    images = torch.from_numpy(data.synthetic(common.TINY_SIZE, sessions=["samm"])[0].images)
    for name in common.CHECKPOINTS:
        args = tiny_args(name)
        backbone = common.make_backbone(args)
        together = common.extract(backbone, images, args)
        order = torch.randperm(len(images))
        assert torch.allclose(common.extract(backbone, images[order], args), together[order], atol=1e-5)
        assert torch.allclose(common.extract(backbone, images[:9], args, batch=1), together[:9], atol=1e-5)


def test_killed_and_resumed_runs_end_alike(tmp_path):
    flags = ["--epochs-first", "1", "--epochs-next", "1", *TWO, "--folds", "0", "1", "2"]
    command("finetune.py", *flags, "--out", "whole", cwd=tmp_path)
    whole = results(tmp_path / "whole")
    for kill_after in range(5):  # lines of results seen: within and between folds 0, 1 and 2
        out = f"killed{kill_after}"
        words = [sys.executable, os.path.join(HERE, "finetune.py"), *flags, "--out", out]
        process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        lines = 0
        while lines <= kill_after and (line := process.stdout.readline()):
            lines += bool(re.match(r" +\d  \w", line)) if kill_after else line.startswith("finetune")
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        folder = tmp_path / out / os.listdir(tmp_path / out)[0]
        files = {name: os.stat(folder / name).st_mtime_ns for name in os.listdir(folder) if name.endswith(".npz")}
        assert len(files) == (kill_after + 1) // 2 if kill_after else not files
        resumed = command("finetune.py", *flags, "--out", out, "--resume", cwd=tmp_path).stdout
        assert same(whole, results(tmp_path / out))
        assert all(os.stat(folder / name).st_mtime_ns == stamp for name, stamp in files.items())
        assert len(re.findall(r"^ +\d  \w", resumed, re.M)) == 6 - 2 * len(files)


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


def test_missing_classes(watch, monkeypatch, capsys):
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
        shutil.rmtree("results", ignore_errors=True)
        folds = watch(method, *TWO, *SHORT)
        fold = folds[0]
        emotions = list(fold["emotions"])
        for how in rch.WAYS:
            true, predicted, _ = protocols.outcome(fold, 1, how)
            assert emotions.index("contempt") in true and emotions.index("contempt") not in predicted
        assert emotions.index("repression") not in true
        recalls = [np.mean(predicted[true == c] == c) for c in range(7) if c in true]
        assert protocols.uar(true, predicted) == pytest.approx(np.mean(recalls)) and len(recalls) == 6
        shutil.rmtree(os.path.dirname(os.path.dirname(protocols.find_runs(os.path.dirname(sys.argv[-1]))[0][0])))
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
    path.write_bytes(path.read_bytes()[:60])
    assert good[3] in ranpac_error(*casme2) and "not a readable image" in ranpac_error(*casme2)
    fresh()
    (tree / good[0]).write_text("this is no picture")
    assert good[0] in ranpac_error(*casme2)
    fresh("casme2_others/nobody.png")
    assert "nobody.png" in ranpac_error(*casme2) and "no number" in ranpac_error(*casme2)
    fresh()
    assert "4 subjects are too few for 5 folds of slcv" in ranpac_error(*casme2, "--protocol", "slcv")
    assert "folds 0 to 4" in ranpac_error(*casme2, "--folds", "7")
    assert "must be one of" in ranpac_error("--sessions", "casme1")
    assert "named once" in ranpac_error("--sessions", "samm", "samm")
    assert "losoo" in ranpac_error("--protocol", "losoo")
    assert "--lr" in ranpac_error("--lr", "-1") and "--epochs-first" in ranpac_error("--epochs-first", "0")
    assert "--seed" in ranpac_error("--seed", "-3") and "--device" in ranpac_error("--device", "abacus")
    assert "vit, swin, resnet" in ranpac_error("--backbone", "vgg")
    assert "timm model id" in ranpac_error("--backbone", "no_such_net", "--preset", "paper")
    assert "no such weight file" in ranpac_error("--weights", tmp_path / "none.pt")
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


def test_an_error_in_a_terminal(tmp_path):
    done = command("ranpac.py", "--data", "nowhere", cwd=tmp_path, check=False)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: nowhere: no such folder")
        and done.stderr.count("\n") == 1
    )


def test_diverging_loss_stops_the_run(watch, monkeypatch, capsys):
    monkeypatch.setattr(common, "load_sessions", lambda args: small_stream()[:2])
    line = error_of(lambda: watch("finetune", *TWO, "--lr", "1e30", "--epochs-first", "2"), capsys)
    assert "fold 0, session casme2, epoch" in line


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


# ---- python test_all.py --bench --------------------------------------------------------------------------------------
def bench():
    """Print what this machine measures. Only the ratios mean anything on another one."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}")

    def seconds(work):
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    print("\nRidge over four sessions, M = 10000, the benchmark's sample counts (197, 108, 233, 688 to train on)")
    m, hs, ys, rows = 10_000, [], [], 0
    for n, count in zip((197, 108, 233, 688), (5, 5, 6, 7)):
        hs.append(torch.randn(n, 96).matmul(torch.randn(96, m)).relu())
        ys.append(F.one_hot(torch.randint(count, (n,)) + rows))
        rows += count
        ys[-1] = F.pad(ys[-1], (0, rows - ys[-1].shape[1]))
    ridge = ranpac.LowRankRidge(m)

    def session(h, y):
        lam = ranpac.choose_lambda(h, y)
        ridge.update(h, y)
        ridge.weights(lam)

    low_rank = [seconds(lambda h=h, y=y: session(h, y)) for h, y in zip(hs, ys)]
    print("low rank, 17 lambdas, float64, seconds per session: " + ", ".join(f"{s:.2f}" for s in low_rank))
    h, y = hs[0].double(), ys[0].double()
    g = h.T @ h + torch.eye(m, dtype=torch.float64)
    once = seconds(lambda: torch.linalg.solve(g, h.T @ y))
    dense = 4 * (len(ranpac.LAMBDAS) + 1) * once
    print(
        f"dense M x M, float64: one solve {once:.1f} s; 4 sessions x (17 lambdas + 1) = {dense:.0f} s, scaled from it"
    )
    print(f"dense / low rank = {dense / sum(low_rank):.0f}")

    print("\nTiny backbones, training, batch 32 (forward, loss, backward, fused AdamW)")
    for name in common.CHECKPOINTS:
        args = tiny_args(name, "none")
        backbone = common.make_backbone(args).train()
        optimizer = torch.optim.AdamW(backbone.parameters(), 1e-4, fused=True)
        images = torch.zeros(32, 3, common.TINY_SIZE, common.TINY_SIZE, dtype=torch.uint8)

        def step(backbone=backbone, optimizer=optimizer, images=images, args=args):
            loss = backbone(common.normalize(images, args)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        for _ in range(5):
            step()
        print(f"{name:7s} {32 * 30 / seconds(lambda: [step() for _ in range(30)]):.0f} images/s")

    print("\nWhole commands, tiny preset, ilcv, five folds")
    for method in METHODS:
        for name in common.CHECKPOINTS:
            words = [sys.executable, os.path.join(HERE, f"{method}.py"), "--backbone", name]
            with contextlib.redirect_stdout(io.StringIO()):
                total = seconds(lambda words=words: subprocess.run(words, cwd="/tmp", capture_output=True, check=True))
            print(f"{method} {name}: {total:.0f} s")


# ---- python test_all.py --table --------------------------------------------------------------------------------------
RUNS = [["ranpac.py", "--features", "pixels"]]
for network in ("resnet", "vit", "swin"):
    fitting = [method for method in METHODS if network == "vit" or method not in ("l2p", "dualprompt")]
    RUNS += [[f"{method}.py", "--backbone", network] for method in fitting]
    RUNS += [["ranpac.py", "--backbone", network, "--features", "frozen"]]
    RUNS += [["ranpac.py", "--backbone", network, "--features", "frozen", "--weights", "none"]]
RUNS += [["finetune.py", "--joint"], ["finetune.py", "--no-rch"], ["l2p.py", "--no-prompts"]]


def table():
    """Run everything that the README's results table holds, on the synthetic stream, and print the table."""
    for protocol in ("slcv", "ilcv"):
        for words in RUNS:
            print(" ".join(words), protocol, file=sys.stderr)
            words = [sys.executable, os.path.join(HERE, words[0]), *words[1:], "--protocol", protocol]
            subprocess.run([*words, "--out", "results/table", "--resume"], stdout=subprocess.DEVNULL, check=True)
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
