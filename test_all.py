"""The tests of the core, with pytest: `python -m pytest` (tools/test_tools.py holds those of the tools).

`trace` runs a script's main() once, on fold 0 of the synthetic stream, and notes what it did. The tests compare this
with slow and obvious versions, written here from the papers. A new script joins by one entry in SCRIPTS; entries in the
tables below (what is trained, the loss, the scores) add the checks that are its own.

python test_all.py    prints the golden table anew
"""

import argparse
import collections
import contextlib
import copy
import datetime
import doctest
import functools
import glob
import hashlib
import importlib
import io
import itertools
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import types
from importlib import metadata

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import f1_score, recall_score
from sklearn.model_selection import KFold
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

import common
import data
import protocols
import ranpac
import rch

# fmt: off
HERE = os.path.dirname(os.path.abspath(__file__))
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": HERE, "HF_HUB_OFFLINE": "1"}
os.environ.pop("PYTHONUNBUFFERED", None)
torch.set_num_threads(1)
STARTED = []  # processes of the current test
METHODS = ["finetune", "der", "foster", "l2p", "dualprompt", "ranpac"]
# A new script joins here:
SCRIPTS = [*METHODS, "controls.joint", "controls.norch", "controls.linear", "controls.pixels"]
BRIEF = {"epochs_first": "2", "epochs_next": "1", "projected": "300"}
SHEETS = {  # samples of each emotion in the official sheets, in the order of the paper's Table 1; subjects
    "casme2": (dict(disgust=63, happiness=32, others=99, repression=27, surprise=25), 26),
    "samm": (dict(anger=57, contempt=12, happiness=26, others=26, surprise=15), 27),
    "mmew": (dict(disgust=72, fear=16, happiness=36, others=66, sad=13, surprise=89), 30),
    "casme3": (dict(anger=64, disgust=250, fear=86, happiness=55, others=161, sad=57, surprise=187), 94),
    "dfme": (dict(anger=161, contempt=100, disgust=548, fear=265, happiness=206, sad=278, surprise=298), 176),
}
NAMES, EMOTIONS = list(SHEETS)[:4], {name: list(counts) for name, (counts, _) in SHEETS.items()}
SO_FAR = [list(dict.fromkeys(e for name in NAMES[: t + 1] for e in EMOTIONS[name])) for t in range(4)]
OFFSET = [0, 5, 10, 16, 23]  # rows before each session
ONE_ROW = ("controls.joint", "controls.norch")  # one row per emotion instead
TRAIN_ONCE = dict(epochs_first=(60, 10), batch=(16, 32), lr=(2e-5, 5e-4), weight_decay=(0.05, 0.05))
TRAIN = TRAIN_ONCE | dict(epochs_next=(10, 3))
PROMPT = dict(epochs_first=(60, 10), epochs_next=(10, 3), batch=(16, 16), lr=(0.03 * 16 / 256, 5e-3), length=(5, 5))
SETTINGS = {  # (paper preset, tiny preset): the benchmark's paper, and what it leaves open
    "finetune": TRAIN, "der": TRAIN, "foster": TRAIN, "controls.norch": TRAIN, "controls.joint": TRAIN_ONCE,
    "l2p": PROMPT | dict(pool=(10, 10), chosen=(5, 5), pull=(0.1, 0.1)), "dualprompt": PROMPT,
    "ranpac": TRAIN_ONCE | dict(projected=(10_000, 2_000)), "controls.pixels": dict(projected=(10_000, 2_000)),
    "controls.linear": dict(epochs_first=(60, 10), epochs_next=(10, 3), batch=(16, 16), lr=(1e-3, 1e-2)),
}
GOLDEN = {  # what `fingerprint` gives, as BRIEF, one thread; made by `python test_all.py`
    "finetune": [74.0, 42.308, 43.066, 33.333, 34.304, 33.333, 36.57, 11.589, 0.092, 0.558],
    "der": [70.0, 35.897, 49.635, 25.243, 37.54, 41.1, 34.304, 10.494, -0.676, 1.579],
    "foster": [70.0, 51.282, 46.715, 29.126, 28.155, 32.039, 28.155, 8.312, -0.219, 1.202],
    "l2p": [54.0, 37.179, 52.555, 50.162, 49.515, 49.515, 52.751, 27.832, -0.096, 0.756],
    "dualprompt": [62.0, 39.744, 58.394, 51.456, 53.074, 52.751, 53.074, 25.16, -0.101, 0.982],
    "ranpac": [68.0, 52.564, 64.234, 54.693, 41.424, 54.693, 54.693, 34.402, 0.043, 0.099],
    "controls.joint": [74.0, 48.718, 69.343, 58.9, 58.9, 56.958, 58.9, 36.632, -0.059, 1.35],
    "controls.norch": [74.0, 24.359, 54.015, 54.693, 54.693, 54.369, 54.693, 31.877, 0.039, 0.856],
    "controls.linear": [66.0, 47.436, 61.314, 52.427, 52.751, 52.104, 53.074, 30.778, -0.112, 1.32],
    "controls.pixels": [70.0, 60.256, 70.803, 57.929, 40.129, 56.634, 58.252, 38.748, 0.043, 0.096],
}
# Two samples' worth. On one machine no number differed between torch's kernels for AVX-512, for AVX2 and for neither.
SLACK = np.array([4, 2.6, 1.5, 0.7, 0.7, 0.7, 0.7, 2, 0.01, 0.01])

# ---- to start a script -----------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    while STARTED:
        STARTED.pop().kill()  # whatever a failed test left running

def path_of(script):
    return script if script.endswith(".py") else os.path.join(HERE, script.replace(".", os.sep) + ".py")

def text_of(name):
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()

def start(script, *flags, patches=()):
    """What `python script flags` does, in this process: (status, screen, errors)."""
    screen, errors, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(screen), contextlib.redirect_stderr(errors):
        loaded = (common, "LOADED", time.time())  # the script is read now, not when the tests began
        for thing, name, value in [(sys, "argv", ["", *flags]), loaded, *patches]:
            patch.setattr(thing, name, value)
        try:
            runpy.run_path(path_of(script), run_name="__main__")
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else print(stop.code, file=sys.stderr) or 1
    return status, screen.getvalue(), errors.getvalue()

def works(script, *flags, patches=()):
    """The screen of a run that ends well and without a note."""
    status, screen, errors = start(script, *flags, patches=patches)
    assert (status, errors) == (0, "")
    return screen

def one_line(script, *flags):
    """The one line with which a mistake ends, before anything is written."""
    status, _, errors = start(script, *flags)
    assert status == 1 and re.fullmatch("error: .*\n", errors), (script, flags, errors)
    assert not os.path.exists("results"), (script, flags)
    return errors

def brief(script):
    """The flags of BRIEF that a script has."""
    few = {name: value for name, value in BRIEF.items() if name in importlib.import_module(script).SETTINGS}
    return [word for name, value in few.items() for word in ("--" + name.replace("_", "-"), value)]

def folds_in(root):
    """{fold: its arrays} of the only run below root."""
    ((folder, files),) = [(folder, files) for folder, _, files in os.walk(root) if "run.json" in files]
    return {int(f[4:-4]): dict(np.load(os.path.join(folder, f))) for f in sorted(files) if f.endswith(".npz")}

@functools.cache
def whole_stream(make=data.synthetic):
    return make(48)

def made_up(size, sessions, seed=0):
    """Small sessions of noise. In fold 0 the first emotion is never trained on, and the second one never tested."""
    random, result = np.random.RandomState(0), []
    for count, name in enumerate(sessions, 40):  # a last batch of one image is among them
        emotions, (train, test) = EMOTIONS[name], kfold(range(count))
        labels, subjects = random.choice(emotions[2:], count), random.randint(1, 9, count)
        labels[test[0]], labels[train[:2]] = emotions[0], emotions[1]
        keys = np.array([f"{name}_{label}/{i}.png" for i, label in enumerate(labels)])
        images = random.randint(0, 256, (count, 3, size, size)).astype(np.uint8)
        result.append(data.Session(name, emotions, images, labels, subjects, keys, name))
    return result

def kfold(samples, fold=0):
    """(train, test) indices: the paper's folds."""
    return list(KFold(5, shuffle=True, random_state=42).split(samples))[fold]

# ---- the trace -------------------------------------------------------------------------------------------------------
def networks(local):
    """The networks among main's local variables, with lists of them: {name: module}."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in local.items()}
    return {f"{name}.{i}": m for name, of in lists.items() for i, m in enumerate(of) if isinstance(m, nn.Module)}

def tensors(local):
    """Every parameter and buffer of the networks in main: {id: (name, copy, whether a parameter, itself)}."""
    return {id(tensor): (f"{name}.{key}", tensor.detach().clone(), isinstance(tensor, nn.Parameter), tensor)
            for name, module in networks(local).items()
            for key, tensor in [*module.named_parameters(), *module.named_buffers()]}

def copied(local, memo=None):
    """main's local variables with copies of its networks, to look at later; memo gets {id: its copy}."""
    memo, whole = {} if memo is None else memo, {name.split(".")[0] for name in networks(local)}
    kept = {name: list(value) if type(value) is list else value for name, value in local.items()}
    return {name: copy.deepcopy(value, memo) if name in whole else value for name, value in kept.items()}

def main_locals():
    """The local variables of the main() that is being run further up the stack."""
    frame = sys._getframe(1)
    while frame.f_code.co_name != "main":
        frame = frame.f_back
    return frame.f_locals

@functools.cache
def trace(script, backbone="vit"):
    """What main() did: .sessions, one log each, .fold, its file, .screen, .trains. Small sessions unless vit."""
    log, extract = argparse.Namespace(sessions=[]), common.extract
    arriving, record = protocols.Run.stream, protocols.Run.record

    def note_arrival(run, fold):
        for arrival in arriving(run, fold):
            log.sessions.append(argparse.Namespace(before=tensors(main_locals()), optimizers=[]))
            yield arrival

    def note_record(run, fold, t, rows, scores, *losses, **others):
        local, now = main_locals(), log.sessions[-1]
        now.after, now.end, now.scores, now.others = tensors(local), copied(local), scores.clone(), others
        record(run, fold, t, rows, scores, *losses, **others)

    def in_eval_mode(network, *words, **flags):
        parts = (network, getattr(network, "func", None), *getattr(network, "args", ()))  # of a functools.partial
        backbones = [part for part in parts if hasattr(part, "pretrained_cfg")]  # networks of timm
        assert not any(module.training for part in backbones for module in part.modules())
        return extract(network, *words, **flags)

    def spied(kind):
        class Spied(getattr(torch.optim, kind)):
            def __init__(self, trained, lr, **flags):
                trained = list(trained)
                super().__init__(trained, lr, **flags)
                local, start = main_locals(), {id(p): (p.detach().clone(), p) for p in trained}
                busy = [name for name, m in networks(local).items() if start.keys() & {*map(id, m.parameters())}]
                named = TRAINED[script](local) if script in TRAINED else []
                expected = {id(p) for m in named for p in ([m] if isinstance(m, nn.Parameter) else m.parameters())}
                self.log = argparse.Namespace(kind=kind, flags=flags, busy=busy, start=start, expected=expected,
                                              steps=[], first=None, lrs=[], norms=[])
                log.sessions[-1].optimizers.append(self.log)

            def step(self):
                local, parameters = main_locals(), [p for group in self.param_groups for p in group["params"]]
                self.log.first = self.log.first or copied(local)
                self.log.steps.append((local["batch"].clone(), local["loss"].item()))
                grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
                self.log.norms.append(torch.cat([grad.flatten() for grad in grads]).norm().item())
                self.log.lrs.append(self.param_groups[0]["lr"])
                if len(self.log.steps) == len(local["batches"]):  # the last one, for an autograd of our own
                    self.log.last, self.log.grads = copied(local, memo := {}), [grad.clone() for grad in grads]
                    self.log.trained = [memo.get(id(p)) for p in parameters]
                super().step()
        return Spied

    whole = lambda size, sessions: [copy.copy(s) for s in whole_stream()]  # noqa: E731
    patches = [(protocols.Run, "stream", note_arrival), (protocols.Run, "record", note_record),
               (common, "extract", in_eval_mode), (data, "synthetic", whole if backbone == "vit" else made_up),
               *((torch.optim, kind, spied(kind)) for kind in ("AdamW", "Adam"))]
    with tempfile.TemporaryDirectory() as out:
        flags = ["--backbone", backbone, "--folds", "0", *brief(script), "--out", out, "--save"]
        log.screen = works(script, *flags, patches=patches)
        ((_, log.fold),) = folds_in(out).items()
        log.model = torch.load(*glob.glob(f"{out}/*/*/model0.pt"), weights_only=True)
    log.trains = any(session.optimizers for session in log.sessions)
    return log

def fingerprint(script):
    """Accuracy after S1 to S4; after S4 by prob, centered, max, and UF1, all in %; mean and deviation of the scores."""
    fold = trace(script).fold
    shares = [protocols.accuracy(*protocols.outcome(fold, t)[:2]) for t in range(4)]
    shares += [protocols.accuracy(*protocols.outcome(fold, 3, how)[:2]) for how in rch.WAYS[1:]]
    shares.append(protocols.uf1(*protocols.outcome(fold, 3)[:2]))
    return np.array([*(100 * share for share in shares), fold["scores_3"].mean(), fold["scores_3"].std()])

@functools.cache
def part_of(t, part):
    """(images (n, 3, 48, 48), words) of session t's training part (0) or test part (1), independent of the core."""
    session = whole_stream()[t]
    index = kfold(session.keys)[part]
    pixels = torch.from_numpy(((session.images[index].astype(np.float64) / 255 - 0.5) / 0.5).astype(np.float32))
    return pixels, session.labels[index].tolist()

# ---- what each script trains, its loss and its scores, written out ---------------------------------------------------
TRAINED = {  # main's local variables -> the networks or parameters in the optimizer
    "finetune": lambda v: [v["backbone"], v["heads"][v["t"]]],
    "der": lambda v: [v["extractors"][v["t"]], v["head"], v["aux_head"]],
    "foster": lambda v: [v["student"], v["student_head"]] if v["student"] not in (v["old"], v["backbone"]) else
              [v["backbone"], v["head"], v["new_head"]],
    "l2p": lambda v: [v["pool"].prompts, v["pool"].keys, v["heads"][v["t"]]],
    "dualprompt": lambda v: [v["prompts"].g, v["prompts"].e[v["t"]], v["heads"][v["t"]]],
    "ranpac": lambda v: [v["backbone"], v["head"]], "controls.joint": lambda v: [v["backbone"], v["head"]],
    "controls.norch": lambda v: [v["backbone"], *v["heads"]], "controls.linear": lambda v: [v["heads"][v["t"]]],
}

def ce(logits, index):
    return F.cross_entropy(logits.double(), torch.tensor(index))

def kd(scores, teacher):
    """Distillation as FOSTER's paper has it: temperature 2, no factor 4."""
    s, p = ((z.double() / 2).exp() / (z.double() / 2).exp().sum(1, keepdim=True) for z in (teacher, scores))
    return -(s.detach() * p.log()).sum(1).mean()

def slow_block(block, tokens, prefix=None):
    """A timm Block on one sample's tokens (n, d); prefix (2, L, heads, d / heads) or None."""
    qkv = block.attn.qkv(block.norm1(tokens)).view(len(tokens), 3, block.attn.num_heads, -1)
    q, k, v = qkv.permute(1, 2, 0, 3)  # (heads, n, d / heads) each
    q, k = block.attn.q_norm(q), block.attn.k_norm(k)  # the identity in the tiny ViT
    if prefix is not None:
        k, v = torch.cat([prefix[0].transpose(0, 1), k], 1), torch.cat([prefix[1].transpose(0, 1), v], 1)
    out = (q @ k.mT / q.shape[2] ** 0.5).softmax(2) @ v
    tokens = tokens + block.attn.proj(out.transpose(0, 1).flatten(1))
    return tokens + block.mlp(block.norm2(tokens))

def slow_vit(vit, x, prompts=(), g=None, e=None):
    """All tokens (n, d) after the last norm of one image (3, S, S): L2P's prompts, DualPrompt's prefixes, or none."""
    patches, position = vit.patch_embed(x[None])[0], vit.pos_embed[0]
    tokens = [vit.cls_token[0, 0] + position[0], *(prompt + position[0] for prompt in prompts)]
    tokens = torch.stack([*tokens, *(patch + place for patch, place in zip(patches, position[1:]))])
    prefixes = {0: g[0], 1: g[1], 2: e[0], 3: e[1], 4: e[2]} if g is not None else {}
    for i, block in enumerate(vit.blocks):
        tokens = slow_block(block, tokens, prefixes.get(i))
    return vit.norm(tokens)

def slow_l2p(v, x):
    """(features (d,), sum of the cosines of the chosen keys) of one image, which chooses for itself."""
    q = slow_vit(v["vit"], x)[0]
    cosines = [torch.dot(q, key) / q.norm() / key.norm() for key in v["pool"].keys]
    best = sorted(range(10), key=lambda j: -cosines[j].item())[:5]
    tokens = slow_vit(v["vit"], x, [token for j in best for token in v["pool"].prompts[j]])
    return tokens[1:26].mean(0), sum(cosines[j] for j in best)

def slow_dualprompt(v, x, t=None):
    """Features (d,) of one image with session t's e prompt; without t with that of the nearest key."""
    p = v["prompts"]
    if t is None:
        q = slow_vit(v["vit"], x)[0]
        t = max(range(len(p.keys)), key=lambda s: (torch.dot(q, p.keys[s]) / q.norm() / p.keys[s].norm()).item())
    return slow_vit(v["vit"], x, g=p.g, e=p.e[t])[0]

def loss_l2p(v, x, y, t, stage):
    features, pulls = zip(*(slow_l2p(v, image) for image in x))
    return ce(v["heads"][t](torch.stack(features)), y) - 0.1 * torch.stack(pulls).mean()

def loss_der(v, x, y, t, stage):
    f = [extractor(x) for extractor in v["extractors"]]
    old = ce(v["aux_head"](f[-1]), [k + 1 for k in y]) if t else 0
    return ce(v["head"](torch.cat(f, 1)), [k + OFFSET[t] for k in y]) + old

def loss_foster(v, x, y, t, stage):
    y, both = [k + OFFSET[t] for k in y], [v[name](x) for name in (("old", "backbone") if t else ("backbone",))]
    z = v["head"](torch.cat(both, 1))
    if stage == 1:
        return kd(v["student_head"](v["student"](x)), z)
    return ce(z, y) + (ce(v["new_head"](both[1]), y) + kd(z[:, : OFFSET[t]], v["old_head"](both[0])) if t else 0)

def loss_norch(v, x, y, t, stage):
    own = [SO_FAR[t].index(e) for e in EMOTIONS[NAMES[t]]]  # the rows of the session's emotions, in their order
    return ce(torch.cat([head(v["backbone"](x)) for head in v["heads"]], 1)[:, own], y)

LOSSES = {  # (copies of main's variables, images, index of each emotion in its session, t, stage) -> loss
    "finetune": lambda v, x, y, t, stage: ce(v["heads"][t](v["backbone"](x)), y),
    "der": loss_der, "foster": loss_foster, "l2p": loss_l2p, "controls.norch": loss_norch,
    "dualprompt": lambda v, x, y, t, stage: ce(v["heads"][t](torch.stack([slow_dualprompt(v, i, t) for i in x])), y),
    **dict.fromkeys(["ranpac", "controls.joint"], lambda v, x, y, t, stage: ce(v["head"](v["backbone"](x)), y)),
    "controls.linear": lambda v, x, y, t, stage: ce(v["heads"][t](v["pretrained"](x)), y),
}

def by_heads(features):
    """Scores from features and a list of heads, old ones first."""
    return lambda v, x, t: torch.cat([head(features(v, x)[None])[0] for head in v["heads"]])

def dense_ridge(h, y, lam):
    h, y = h.double(), y.double()
    return torch.linalg.solve(h.T @ h + lam * torch.eye(h.shape[1], dtype=torch.float64), h.T @ y)

@functools.cache
def ridge_weights(script, t):
    """(network, W, dense ridge weights) after session t: all training parts so far, and the lambda that main chose."""
    v = trace(script).sessions[t].end
    network = v["pixels"] if script == "controls.pixels" else trace(script).sessions[0].end["backbone"]
    d = 432 if script == "controls.pixels" else 96
    w = torch.randn(d, 300, generator=torch.Generator().manual_seed(0))
    h = (torch.cat([network(part_of(s, 0)[0]) for s in range(t + 1)]) @ w).clamp(min=0)
    y = [OFFSET[s] + EMOTIONS[NAMES[s]].index(word) for s in range(t + 1) for word in part_of(s, 0)[1]]
    return network, w, dense_ridge(h, F.one_hot(torch.tensor(y), OFFSET[t + 1]), v["lam"])

def scores_ridge(script, v, x, t):
    network, w, weights = ridge_weights(script, t)
    return (network(x[None]) @ w).clamp(min=0).double()[0] @ weights

SCORES = {  # (copies of main's variables after a session, one image (3, S, S), t) -> row scores (R,)
    **dict.fromkeys(["finetune", "controls.norch"], by_heads(lambda v, x: v["backbone"](x[None])[0])),
    "der": lambda v, x, t: v["head"](torch.cat([extractor(x[None])[0] for extractor in v["extractors"]])),
    "foster": lambda v, x, t: v["head"](torch.cat([v[name](x[None])[0] for name in ("old", "backbone")[t == 0 :]])),
    "l2p": by_heads(lambda v, x: slow_l2p(v, x)[0]), "dualprompt": by_heads(slow_dualprompt),
    "controls.joint": lambda v, x, t: v["head"](v["backbone"](x[None]))[0],
    "controls.linear": by_heads(lambda v, x: v["pretrained"](x[None])[0]),
    **{script: functools.partial(scores_ridge, script) for script in ("ranpac", "controls.pixels")},
}

# ---- what main() did -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_optimizers_and_batches(script):
    """Kind, settings, trained parameters, learning rate of every step, and each image once per epoch."""
    settings = importlib.import_module(script).SETTINGS
    assert settings == SETTINGS.get(script, settings)
    assert all(type(paper) is type(tiny) for paper, tiny in settings.values())  # the flag's type is the paper value's
    rules = {name: tiny for name, (_, tiny) in settings.items()}
    for t, session in enumerate(trace(script).sessions):
        expected = {"foster": 2 if t else 1, "ranpac": int(t == 0), "controls.pixels": 0}.get(script, 1)
        assert script not in SETTINGS or len(session.optimizers) == expected
        for stage, log in enumerate(session.optimizers):
            count, size, steps = len(session.end["x"]), session.end["args"].batch, len(log.steps)
            epochs = 1 if t and "epochs_next" in rules else 2
            per_epoch = [[b for b, _ in log.steps[e * steps // epochs :][: steps // epochs]] for e in range(epochs)]
            orders = [torch.cat(batches).tolist() for batches in per_epoch]
            assert steps % epochs == 0 and all(len(b) == size for batches in per_epoch for b in batches[:-1])
            assert all(len(set(order)) == count - (count % size == 1) == len(order) for order in orders)
            assert all(order != sorted(order) for order in orders) and (epochs == 1 or orders[0] != orders[1])
            if script not in SETTINGS:
                continue
            assert log.start.keys() == log.expected and size == rules["batch"]
            if "weight_decay" in rules:  # AdamW, and a cosine to 0 within the session
                assert log.kind == "AdamW" and log.flags["weight_decay"] == (0.05 if stage == 0 else 0)
                expected = [rules["lr"] * (1 + np.cos(np.pi * i / steps)) / 2 for i in range(steps)]
            else:  # Adam, constant, clipped to norm 1
                assert log.kind == "Adam" and not log.flags.get("weight_decay") and max(log.norms) <= 1 + 1e-4
                expected = [rules["lr"]] * steps
            assert log.lrs == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert script not in ("l2p", "dualprompt") or any(norm > 0.99 for log in session.optimizers for norm in log.norms)

@pytest.mark.parametrize("case", [*zip(SCRIPTS), *itertools.product([*METHODS[:3], "ranpac", "controls.linear"],
                                                                    ["swin", "resnet"])])
def test_only_what_is_trained_changes(case):
    """Each session: what is in no optimizer is bitwise what it was, BatchNorm's buffers too; what is trained moves."""
    for t, session in enumerate(trace(*case).sessions):
        backbones = [m for m in networks(session.end).values() if hasattr(m, "image_size") and list(m.parameters())]
        assert not any(part.training for m in backbones for part in m.modules()), t  # eval mode at test
        trained = set().union(*(log.start for log in session.optimizers))
        owners = {name.rsplit(".", 1)[0] for key, (name, *_) in session.after.items() if key in trained}
        for key, (name, before, *_) in session.before.items():
            _, after, parameter, _ = session.after.get(key, (name, before, True, None))
            if key not in trained and (parameter or name.rsplit(".", 1)[0] not in owners):
                assert torch.equal(before, after), (t, name)
        for log in session.optimizers:
            for key, (start, _) in log.start.items():
                name, after, *_ = session.after[key]
                unused = t == 0 and name.startswith(("aux_head", "new_head"))
                assert torch.equal(start, after) == unused, (t, name)
            for name, module in networks(log.first).items() if case[0] in TRAINED and "resnet" in case else ():
                if any(isinstance(part, nn.BatchNorm2d) for part in module.modules()):  # what is trained is in train
                    assert any(part.training for part in module.modules()) == (name in log.busy), (t, name)  # mode

@pytest.mark.parametrize("script", SCORES)
def test_losses_gradients_and_scores_are_the_papers(script):
    """Loss and gradient at the last step of every optimizer, from the images up: normalising, choice of prompts, rows,
    every term. And row scores of test images, one image at a time: nothing depends on the others in the batch."""
    for t, session in enumerate(trace(script).sessions):
        seen, index = ([t], EMOTIONS[NAMES[t]]) if script != "controls.joint" else (range(t + 1), SO_FAR[t])
        images = torch.cat([part_of(s, 0)[0] for s in seen])
        y = [index.index(word) for s in seen for word in part_of(s, 0)[1]]
        for stage, log in enumerate(session.optimizers):
            batch, loss = log.steps[-1]
            expected = LOSSES[script](log.last, images[batch], [y[i] for i in batch], t, stage)
            assert loss == pytest.approx(expected.item(), rel=2e-4), (t, stage)
            own = torch.autograd.grad(expected, log.trained, allow_unused=True)
            own = [torch.zeros_like(grad) if mine is None else mine for mine, grad in zip(own, log.grads)]
            mine, theirs = (torch.cat([grad.flatten() for grad in grads]).double() for grads in (own, log.grads))
            assert torch.dot(mine, theirs) > 0.999 * mine.norm() * theirs.norm() > 0, (t, stage)
        images = torch.cat([part_of(s, 1)[0] for s in range(t + 1)])
        assert session.scores.shape == (len(images), len(SO_FAR[t]) if script in ONE_ROW else OFFSET[t + 1])
        for i in [*range(0, len(images), 20), len(images) - 1]:
            with torch.no_grad():
                expected = SCORES[script](session.end, images[i], t)
            assert torch.allclose(session.scores[i].double(), expected.double(), atol=2e-4), (t, i)
    assert np.all(abs(fingerprint(script) - GOLDEN[script]) <= SLACK), fingerprint(script).round(2).tolist()

@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_and_the_model_that_are_kept(script):
    """Each session's own losses, step by step, and the means of their first and last tenth in its line. The networks as
    the last session left them, what its rows mean, and what an image must be."""
    lines, local = lines_of(trace(script).screen)[0], trace(script).sessions[-1].end
    for t, session in enumerate(trace(script).sessions):
        for name, log in itertools.zip_longest(("loss", "loss_student"), session.optimizers):
            found = trace(script).fold.get(f"{name}_{t}", np.zeros(0))
            expected = np.float32([loss for _, loss in log.steps] if log else [])
            assert np.array_equal(found, expected), (t, name)
            tenth = max(1, len(expected) // 10)
            ends = f"{expected[:tenth].mean():.2f} > {expected[-tenth:].mean():.2f}" if log else "-"
            assert name != "loss" or ends in " ".join(lines[t]), t
    model = dict(trace(script).model)
    assert model.pop("images") == {"size": 48, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert model.pop("arguments")["seed"] == 0
    for name in ("emotions", "row_emotion", "row_session"):
        assert model.pop(name) == trace(script).fold[name].tolist()
    assert model and set(model) <= set(local)
    for name, kept in model.items():
        parts = nn.ModuleList(local[name]) if isinstance(local[name], list) else local[name]
        states = (parts.state_dict(), kept) if isinstance(parts, nn.Module) else ({0: parts}, {0: kept})
        assert states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())

@pytest.mark.parametrize("script", ["l2p", "dualprompt"])
def test_the_table_of_chosen_prompts(script):
    """In % of a session's test samples: how often each chose each prompt, or whose key."""
    end, expected = trace(script).sessions[-1].end, []
    choices = end["index"].reshape(len(end["index"]), -1).tolist()  # per test sample
    for t in range(4):
        own = [choices.pop(0) for _ in part_of(t, 1)[1]]
        width = 10 if script == "l2p" else 4
        expected.append([100 * np.mean([prompt in chosen for chosen in own]) for prompt in range(width)])
    table = trace(script).screen.split(" in the folds made now")[1].split("\n\n")[0]
    found = [re.findall(r"\d+\.\d", re.search(f"^{name} .*", table, re.M).group()) for name in NAMES]
    assert np.allclose(np.float64(found), expected, atol=0.051) and np.ptp(expected) > 10

def test_prefixes_join_behind_the_normalised_keys():
    """In a block that normalises keys: the prefix itself is not normalised, and samples are not mixed."""
    from timm.models.vision_transformer import Block

    block, generator = Block(24, 4, qkv_bias=True, qk_norm=True).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(generator=generator)
        x, prefix = torch.randn(3, 5, 24, generator=generator), torch.randn(3, 2, 6, 4, 6, generator=generator)
        out = importlib.import_module("dualprompt").attend_with_prefix(block, x, prefix)
        slow = torch.stack([slow_block(block, tokens, own) for tokens, own in zip(x, prefix)])
    assert torch.allclose(out, slow, atol=1e-4)

@pytest.mark.parametrize("script", SCRIPTS)
def test_folds_and_seeds_start_differently(script):
    """All that is drawn for a trial differs between two folds and two seeds; --weights none between the seeds."""
    drawn = {}

    def note(run, fold, t, rows, scores, *losses, **others):
        local = main_locals()
        started = {name: value for name, (name, value, *_) in tensors(local).items()}
        started |= {name: local[name].clone() for name in ("projection",) if name in local}
        drawn[local["args"].seed, fold] = started
        return record(run, fold, t, rows, scores, *losses, **others)

    record = protocols.Run.record
    few = [word for name in importlib.import_module(script).SETTINGS if name.startswith("epochs")
           for word in ("--" + name.replace("_", "-"), "0")]
    weights = [] if script == "controls.pixels" else ["--weights", "none"]
    for seed in "01":
        works(script, *few, *weights, "--sessions", "samm", "--folds", "0", "1", "--seed", seed,
              patches=[(data, "synthetic", made_up), (protocols.Run, "record", note)])
    backbones = ("backbone", "extractors", "student", "old", "vit", "pretrained")
    for (seed, fold), (other_seed, other_fold) in itertools.combinations(drawn, 2):
        a, b = drawn[seed, fold], drawn[other_seed, other_fold]
        for name in a:
            if a[name].ndim > 1 and not (name.startswith(backbones) and seed == other_seed):
                assert not torch.equal(a[name], b[name]), (name, seed, other_seed)
    assert len(drawn) == 4 and max(value.ndim for value in a.values()) > 1

def same(a, b, buffers=True):
    """Whether two networks are bitwise the same. The first forward pass, in train mode, moves BatchNorm's buffers."""
    a, b = ([*network.parameters(), *(network.buffers() if buffers else ())] for network in (a, b))
    return len(a) == len(b) and all(map(torch.equal, a, b))

def goes_on(head, old, rows, columns=None):
    """Whether a head's old rows are those of the head before."""
    return torch.equal(head.weight[:rows, :columns], old.weight) and torch.equal(head.bias[:rows], old.bias)

@pytest.mark.parametrize("case", [*zip(["dualprompt", "controls.joint", "der", "foster"]),
                                  ("der", "resnet"), ("foster", "resnet")])
def test_what_a_session_starts_from(case):
    """Networks, heads, keys and prompts before their first step, against those that the session before left."""
    sessions = trace(*case).sessions
    for t, session in enumerate(sessions):
        v, before = session.optimizers[0].first, sessions[t - 1].end
        if case[0] == "dualprompt":  # key t is the mean direction of the session's queries
            with torch.no_grad():
                q = v["vit"].forward_features(part_of(t, 0)[0])[:, 0]
            assert torch.allclose(v["prompts"].keys[t], (q / q.norm(dim=1, keepdim=True)).mean(0), atol=1e-5)
            assert len(v["prompts"].e) == len(v["prompts"].keys) == t + 1
            assert t == 0 or torch.equal(v["prompts"].e[t], before["prompts"].e[t - 1])
        elif case[0] == "controls.joint":
            assert same(v["backbone"], v["pretrained"])  # that it trains on all data: see its loss
        elif t == 0:
            assert same(v["extractors"][0] if case[0] == "der" else v["backbone"], v["pretrained"], False)
        elif case[0] == "der":
            assert len(v["extractors"]) == t + 1 and v["head"].weight.shape == (OFFSET[t + 1], (t + 1) * v["d"])
            assert same(v["extractors"][t], before["extractors"][t - 1], False)
            assert all(same(a, b) for a, b in zip(v["extractors"], before["extractors"]))
            assert goes_on(v["head"], before["head"], OFFSET[t], t * v["d"])
            assert v["aux_head"].weight.shape == (len(EMOTIONS[NAMES[t]]) + 1, v["d"])
        else:
            student = session.optimizers[1].first
            assert same(v["old"], before["student"]) and same(student["old"], before["student"])
            assert same(v["backbone"], v["old"], False) and same(student["student"], v["old"], False)
            assert goes_on(v["head"], before["student_head"], OFFSET[t], v["d"])
            assert goes_on(student["student_head"], before["student_head"], OFFSET[t])
            expected = session.end["student_head"](session.end["student"](torch.cat(session.end["test_images"])))
            assert torch.allclose(session.others["student"][0], expected, atol=1e-4)

def test_ranpac_chooses_lambda_and_adds_up_as_dense_solves_do():
    generator, ridge, hs, ys = torch.Generator().manual_seed(0), ranpac.LowRankRidge(100), [], []
    assert ranpac.LAMBDAS == [10.0**p for p in range(-8, 9)]
    for t in range(4):  # fewer samples than columns, and more
        h = torch.randn(60 + 40 * t, 100, generator=generator).relu()
        y = F.one_hot(torch.randint(5, (len(h),), generator=generator), 5)
        known = [h.double() @ h.double().T] * (t % 2)
        torch.manual_seed(3)
        chosen = ranpac.choose_lambda(h, y, *known)
        torch.manual_seed(3)
        tried, fitted = torch.randperm(len(h)).tensor_split([len(h) // 5])
        weights = {lam: dense_ridge(h[fitted], y[fitted], lam) for lam in ranpac.LAMBDAS[5:]}  # below it is the worse
        errors = {lam: F.mse_loss(h[tried].double() @ w, y[tried].double()).item() for lam, w in weights.items()}
        assert chosen == max(lam for lam, error in errors.items() if error <= 1.01 * min(errors.values()))
        assert len({round(error, 6) for error in errors.values()}) > 5
        hs, ys = [*hs, h], [*(F.pad(old, (0, 5)) for old in ys), F.pad(y, (5 * t, 0))]
        ridge.update(h, ys[-1], *known)
        for lam in (1.0, 1e3, 1e8):
            dense = dense_ridge(torch.cat(hs), torch.cat(ys), lam)
            assert (ridge.weights(lam) - dense).norm() < 1e-8 * dense.norm()

# ---- all scripts -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", SCRIPTS)
def test_seed_missing_emotions_bfloat16_and_loso(script):
    """A fold does not depend on the folds before; another seed differs; an emotion never trained is never predicted."""
    runs, patches = {}, [(data, "synthetic", made_up)]
    for flags in ("--folds 0", "--folds 2 0", "--folds 0 --seed 1"):
        works(script, *brief(script), "--sessions", *NAMES[:2], *flags.split(), "--out", flags, patches=patches)
        runs[flags] = folds_in(flags)[0]
    fold, again, other = runs.values()
    assert all(np.array_equal(fold[f"scores_{t}"], again[f"scores_{t}"]) for t in (0, 1))
    assert not trace(script).trains or not np.array_equal(fold["scores_1"], other["scores_1"])
    untrained, untested = ([fold["emotions"].tolist().index(EMOTIONS[s][i]) for s in NAMES[:2]] for i in (0, 1))
    assert not fold["train_counts"][1][untrained].any()
    for how in rch.WAYS:
        true, predicted, _ = protocols.outcome(fold, 1, how)
        assert {*untrained} <= {*true} and not {*untrained} & {*predicted} and untested[1] not in true
    # What CUDA does in training, on the CPU: finite scores in float32. And LOSO: one fold per person, one session.
    patches.append((common, "autocast", lambda args: torch.autocast("cpu", torch.bfloat16)))
    flags = ["--sessions", "casme2", "--protocol", "loso", "--folds", "0", "7", *brief(script)]
    assert "pooled over subjects" in works(script, *flags, patches=patches)
    for i, fold in folds_in("results").items():
        assert set(fold["subjects"]) == {i + 1} and fold["scores_0"].dtype == np.float32

@pytest.mark.parametrize("script", SCRIPTS)
def test_every_tensor_is_on_the_device(script):
    """Without a GPU: torch's fake tensors "on cuda" refuse to mix devices, and to give a number that a step waits for.
    Not driven here: the backward pass, and what looks at numbers in the ridge."""
    device, shapes, steps = torch.device("cuda"), [], []
    with FakeTensorMode():
        try:
            torch.empty(2, device="cuda:0")[0]
        except RuntimeError:
            pytest.skip("this torch asks a real driver before it indexes a fake tensor")
    cpu = argparse.Namespace(preset="tiny", backbone="vit", weights=None, seed=0, device=torch.device("cpu"))
    network = common.make_backbone(cpu)

    def backward(loss):  # the real one would need a device; the optimizer gets zeros
        steps.append(loss)
        assert loss.device.type == "cuda" and loss.ndim == 0
        for parameter in main_locals()["trained"]:
            parameter.grad = torch.zeros_like(parameter)

    def record(run, fold, t, rows, scores, *losses, **others):
        shapes.append(scores.shape[1])
        sys.exit(0) if t == 1 else None

    def moved(module, place, **kind):  # the real one swaps tensors, which fake tensors refuse
        for part in module.modules():
            for name, p in part._parameters.items():
                part._parameters[name] = nn.Parameter(torch.empty_like(p, device=place))
        return module

    def choose_lambda(h, y, gram):  # the real one looks at numbers, which fake tensors do not have
        assert h.device.type == y.device.type == gram.device.type == "cuda" and len(h) == len(y) == len(gram)
        return 1.0

    def update(self, h, y, gram):  # so does the real one; its result is of this kind
        self.s, self.z, self.eigenvalues = h.double(), y.double(), torch.ones(len(h), device=device).double()
        choose_lambda(h, y, gram)

    def launch(main):
        ridge = type("Ridge", (ranpac.LowRankRidge,), {"update": update})
        main.__globals__.update(LowRankRidge=ridge, choose_lambda=choose_lambda)
        main()

    patches = [(common, "set_up", lambda name, preset: device), (common, "launch", launch),
               (common, "make_backbone", lambda args, parts=None: moved(network, device)), (data, "synthetic", made_up),
               (nn.Module, "to", moved), (protocols.Run, "record", record), (torch.Tensor, "backward", backward)]
    flags = ["--sessions", "casme2", "samm", "--folds", "0", *brief(script)]
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        status, _, _ = start(script, *flags, patches=patches)
    assert status == 0 and bool(steps) == trace(script).trains
    assert shapes == ([5, 7] if script in ONE_ROW else [5, 10])

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICE = "cuda"

@CUDA
@pytest.mark.parametrize("script", SCRIPTS)
def test_cuda_is_near_the_cpu(script):
    """One step per session: scores in float32 within 1 % of the largest on the CPU, with bfloat16 training within 5 %;
    no training step waits for the device; every network and score is on it. Prints the peak memory (pytest -rP)."""
    draw, record = common.batches, protocols.Run.record

    class Watched(list):
        def __iter__(self):
            torch.cuda.set_sync_debug_mode("error")
            yield from super().__iter__()
            torch.cuda.set_sync_debug_mode("default")

    def note(run, fold, t, rows, scores, *losses, **others):
        where = [tensor.device.type for *_, tensor in tensors(main_locals()).values()]
        assert {scores.device.type, *where} == {DEVICE}
        record(run, fold, t, rows, scores, *losses, **others)

    few = {"epochs_first": "1", "epochs_next": "1", "batch": "4096"}
    few = {name: value for name, value in few.items() if name in importlib.import_module(script).SETTINGS}
    flags = [word for name, value in few.items() for word in ("--" + name.replace("_", "-"), value)]
    flags += ["--preset", "tiny", "--sessions", *NAMES[:2], "--folds", "0"]
    no_cast, watch = [(common, "autocast", lambda args: contextlib.nullcontext())], []
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        watch = [(common, "batches", lambda *words: Watched(draw(*words)))]
    for out, device, patches in (("cpu", "cpu", no_cast), ("float32", DEVICE, [*no_cast, *watch]),
                                 ("bfloat16", DEVICE, [*watch, (protocols.Run, "record", note)])):
        works(script, *flags, "--device", device, "--out", out, patches=patches)
    cpu, float32, bfloat16 = (folds_in(out)[0] for out in ("cpu", "float32", "bfloat16"))
    for name in ("scores_0", "scores_1"):
        largest = abs(cpu[name]).max()
        assert abs(float32[name] - cpu[name]).max() <= 0.01 * largest, name
        assert abs(bfloat16[name] - cpu[name]).max() <= 0.05 * largest, name
    if DEVICE == "cuda":
        print(f"{script}: peak memory on the device {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")

# ---- data, runs on disk, processes, mistakes: as a user starts a script ------------------------------------------
TWO = ["--sessions", "casme2", "samm", "--device", "cpu"]
PIXELS = ["controls.pixels", "--projected", "50", *TWO]
SHORT = ["finetune", "--epochs-first", "1", "--epochs-next", "1", *TWO, "--folds", "0", "1", "--save"]
TREE = [f"{s}_{e}/sub{i // 2:02d}_{i}.png" for s in TWO[1:3] for e in ("happiness", "others") for i in range(2, 10)]
STUB = """
import numpy, common, data, helper, protocols, rch

def main():
    args = common.parse("A new method needs nothing more than this. It answers at random.", {"wild": (1.0, 2.0)})
    run = protocols.Run(args, data.load_sessions(args, helper.Network))
    for fold in run.folds:
        rows, random, tested = rch.RCH(), numpy.random.RandomState([args.seed, fold]), 0
        for t, session, train, test in run.stream(fold):
            rows.add_session(session.emotions)
            tested += len(test)
            scores = args.wild * random.randn(tested, len(rows.row_emotion))
            run.record(fold, t, rows, scores, second=(-3 * scores, []))
        run.save(fold, last=data.torch.from_numpy(scores))
    run.summary()

if __name__ == "__main__":
    common.launch(main)
"""
HELPER = "import lib.deep\n\nclass Network:\n    image_size, mean, std = lib.deep.size, (0.5,) * 3, (0.5,) * 3\n"
NEW_METHOD = {"stub.py": STUB, "helper.py": HELPER, "lib/__init__.py": "", "lib/deep.py": "from .more import size\n",
              "lib/more.py": "from free.number import size\n", "free/number.py": "size = 12\n"}

def process(*words, **others):
    others = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | others
    STARTED.append(subprocess.Popen([sys.executable, *words], **others))
    return STARTED[-1]

def faults(moment, count, error=None):
    """Patches with which a run kills itself, or raises `error`, at a moment, once `count` of them have passed."""
    seen, replace, backward, extract = [], os.replace, torch.Tensor.backward, common.extract

    def reach(at):
        seen.append(at)
        if at == moment and seen.count(at) == count + 1:
            if error:
                raise error
            os.kill(os.getpid(), signal.SIGKILL)

    def moving(part, path):
        os.truncate(part, os.path.getsize(part) // (1 + (moment == "half" and seen.count("half") == count)))
        reach("half"), reach("written"), replace(part, path), reach("renamed")

    return [(os, "replace", moving), (torch.Tensor, "backward", lambda loss: (reach("training"), backward(loss))),
            (common, "extract", lambda *words: (reach("evaluation"), extract(*words))[1])]

def numbers(root, *but):
    """All that the run's fold files hold, to compare. Times are left out."""
    but += ("seconds",)
    return {(fold, k): v.tolist() for fold, saved in folds_in(root).items() for k, v in saved.items() if k not in but}

def stamps(root="results"):
    return {path: os.stat(path).st_mtime_ns for path in sorted(glob.glob(f"{root}/*/*/*.npz"))}

def lines_of(screen):
    """The lines of folds and sessions, split; and below them [(label, numbers)]."""
    table = [(line[:28].strip(), re.findall(r"(?<= )-?\d+\.\d\d(?= |$)", line[27:])) for line in screen.splitlines()]
    folds = [line.split() for line in re.findall(r"^ +\d  \w.*$", screen, re.M)]
    return folds, [(label, [float(number) for number in found]) for label, found in table if found]

def png(mode="RGB", colour=7, kind="PNG"):
    """A file of one colour, or of an array (S, S, 3)."""
    image = Image.new(mode, (20, 20), colour) if isinstance(mode, str) else Image.fromarray(mode)
    image.save(file := io.BytesIO(), kind)
    return file.getvalue()

def put(root, files):
    """Files below root: {name: text, bytes, or None for no file}; a list of names gets a small image each."""
    for name, content in (files if isinstance(files, dict) else dict.fromkeys(files, png())).items():
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content if isinstance(content, bytes) else (content or "").encode())
        os.remove(path) if content is None else None

class Code:
    def __reduce__(self):  # who unpickles this makes a folder
        return os.mkdir, ("unpickled",)

def f1_uar(true, predicted):
    of = {"average": "macro", "labels": np.unique(true), "zero_division": 0}
    return [metric(true, predicted, **of) for metric in (f1_score, recall_score)]

def test_folds_metrics_and_rows_by_hand_and_against_sklearn():
    subjects = np.repeat([9, 10, 100, 2, 1, 11], [1, 2, 3, 4, 5, 6])  # in the order of numbers: 1 2 9 10 11 100
    for protocol, people in (("slcv", [{1, 100}, {2}, {9}, {10}, {11}]), ("loso", [{1}, {2}, {9}, {10}, {11}, {100}])):
        folds = protocols.split(subjects, protocol)
        assert [set(subjects[fold]) for fold in folds] == people and sorted(np.concatenate(folds)) == list(range(21))
    for count, k in ((5, 5), (7, 5), (136, 5), (860, 5), (21, 3)):
        expected = [test.tolist() for _, test in KFold(k, shuffle=True, random_state=42).split(np.zeros(count))]
        assert [fold.tolist() for fold in protocols.split(np.arange(count), "ilcv", k)] == expected
    true, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 3, 0]
    # class 0: TP 2, FP 1, FN 1; class 1: TP 1, FP 1, FN 1; class 2: TP 0; class 3 is not in `true` and does not count
    assert protocols.uf1(true, predicted) == pytest.approx((4 / 6 + 2 / 4 + 0) / 3)
    assert protocols.uar(true, predicted) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert protocols.accuracy(true, predicted) == 3 / 6 and list(protocols.METRICS) == ["UF1", "UAR"]
    true, predicted = np.random.RandomState(0).randint(0, 6, (2, 50))
    assert [metric(true, predicted) for metric in protocols.METRICS.values()] == pytest.approx(f1_uar(true, predicted))
    rows = rch.RCH()
    assert rows.add_session(["disgust", "happiness"]) == slice(0, 2)
    assert rows.add_session(["anger", "happiness"]) == slice(2, 4) and rows.add_session([]) == slice(4, 4)
    assert rows.emotions == ["disgust", "happiness", "anger"]
    assert rows.row_emotion.tolist() == [0, 1, 2, 1] and rows.row_session.tolist() == [0, 0, 1, 1]
    assert rows.targets(["happiness", "anger", "disgust"]).tolist() == [3, 2, 0]  # the newest rows
    first, second = np.log(2) / 2, np.log(12) / 2  # the sessions' mean scores
    for how, expected in {"sum": np.log([1, 8, 3]), "prob": [0.1, 0.6, 0.3], "max": np.log([1, 4, 3]),
                          "centered": np.log([1, 8, 3]) - [first, first + second, second]}.items():
        assert np.allclose(rch.remap(np.log([[1.0, 2, 3, 4]]), rows.row_emotion, rows.row_session, how), [expected])
    for shift in (-50, 1000):  # float32, as scores are kept: nothing overflows, nothing falls to 0
        scores = (np.log([[1.0, 2, 3, 4]]) + shift).astype(np.float32)
        merged = {how: rch.remap(scores, rows.row_emotion, rows.row_session, how) for how in rch.WAYS}
        assert np.allclose(merged["prob"], [[0.1, 0.6, 0.3]], atol=1e-3)
        assert np.allclose(merged["sum"] - np.log([1, 8, 3]), [[shift, 2 * shift, shift]], rtol=1e-5)
        assert np.allclose(merged["max"] - np.log([1, 4, 3]), [[shift] * 3], rtol=1e-5)
        assert np.allclose(merged["centered"], [np.log([1, 8, 3]) - [first, first + second, second]], atol=1e-3)

def test_the_synthetic_stream():
    stream, small, other = whole_stream(), data.synthetic(12), data.synthetic(12, seed=1)
    for s, (name, (counts, people)) in zip([*stream, *data.synthetic(12, sessions=["dfme"])], SHEETS.items()):
        assert s.emotions == list(data.DATASETS[name]) == list(counts) and len({*s.subjects}) == people
        assert collections.Counter(s.labels.tolist()) == counts
        parts = [re.fullmatch(rf"{name}_(\w+)/(sub0*(\d+)_\d+\.png)", key).groups() for key in s.keys]
        assert parts == sorted(parts) and [emotion for emotion, _, _ in parts] == s.labels.tolist()
        assert [int(subject) for _, _, subject in parts] == s.subjects.tolist()
    assert hashlib.sha256(b"".join(s.images.tobytes() for s in stream)).hexdigest()[:16] == "38eaa1f2a7e26a48"
    (samm,) = data.synthetic(12, sessions=["samm"])  # does not depend on the other sessions
    assert np.array_equal(samm.images, small[1].images) and not np.array_equal(other[1].images, small[1].images)
    assert [s.digest for s in small] == [s.digest for s in stream] and len({s.digest for s in stream + other}) == 8
    # What is hashed is the text of the code, which no Python writes otherwise, and no syntax.
    code = text_of("tiny/stream.py") + re.search(r"def flow_to_image.*?(?=\n\n\n)", text_of("data.py"), re.S)[0] + "\n"
    right = f"{code} samm 0 {dict(SHEETS['samm'][0])} {SHEETS['samm'][1]}"
    assert small[1].digest == hashlib.sha256(right.encode()).hexdigest()
    flow = np.zeros((2, 4, 4, 2))
    directions = [(1, 0), (0.5, np.sqrt(0.75)), (-0.5, np.sqrt(0.75)), (-1, 0)]  # 0, 60, 120, 180 degrees, y down
    flow[0, 0], flow[0, 1, 0], flow[0, 1, 1] = 2 * np.array(directions), (1, 0), (0, -2)  # half as strong; 270 degrees
    image, still = data.flow_to_image(flow)
    assert image[:, 0].T.tolist() == [[255, 0, 0], [255, 255, 0], [0, 255, 0], [0, 255, 255]]
    assert image[:, 1].T.tolist()[:2] == [[128, 0, 0], [128, 0, 255]] and image[:, 2:].max() == still.max() == 0
    flow[0, 1:] += (flow[0, 1:] == 0).all(-1, keepdims=True)  # now the weakest motion has size 1: it is black
    assert data.flow_to_image(flow)[0][:, 1, 0].tolist() == [0, 0, 0]

def test_a_processed_folder_with_every_oddity(monkeypatch, capsys):
    read = ["samm_anger/006_f7.jpeg", "samm_anger/6_\u00e9\u4e2d.png", "samm_anger/s11_6.bmp", "SAMM_Happy/7.jpg",
            "samm_other/006_1_2_f.png", "samm_others/020_1.PNG"]
    others = ["casme3_sadness/spNO.12a355_f10.png", "dfme_sad/13_f.png", "dfme_sad/14_f3x.png"]
    unread = ["dfme_sad/12_f3.png", "samm_anger/Thumbs.db", "samm_anger/deeper/1.png", "notes.txt"]
    uncounted = [".hidden/1.png", "samm_anger/.1.png", "report.csv", "prepare.json", "mmew_sad/Thumbs.db"]
    put("tree", [*read, *others, *unread, *uncounted, "samm_disgust/006_2.png", "samm_disgust/007_2.png"])
    put("tree", {read[2]: png(kind="BMP"), read[3]: png(kind="JPEG")})
    listing, found = os.listdir, []
    for backwards in (False, True):
        monkeypatch.setattr(os, "listdir", lambda path, backwards=backwards: sorted(listing(path), reverse=backwards))
        found.append(data.load("tree", ["samm", "casme3", "dfme"], 8))
        words = [line.split(",")[0].split(" files")[0] for line in capsys.readouterr().out.splitlines()]
        assert words == ["left out: 2 samples of samm_disgust", "not read: 4"]
    (samm, casme3, dfme), again = found
    assert samm.keys.tolist() == read and [*casme3.keys, *dfme.keys] == others and samm.digest == again[0].digest
    assert samm.labels.tolist() == ["anger"] * 3 + ["happiness"] + ["others"] * 2 and casme3.labels.tolist() == ["sad"]
    assert samm.subjects.tolist() == [6, 6, 11, 7, 6, 20] and casme3.subjects.tolist() == [12]
    for mode, colour, rgb in (("RGB", (1, 2, 3), [1, 2, 3]), ("L", 7, [7] * 3), ("LA", (7, 9), [7] * 3),
                              ("RGBA", (1, 2, 3, 4), [1, 2, 3]), ("1", 1, [255] * 3), ("P", 0, [0] * 3)):
        put("modes", {"samm_anger/1.png": png(mode, colour)})
        assert data.load("modes", ["samm"], 8)[0].images.transpose(0, 2, 3, 1).tolist() == [[[rgb] * 8] * 8], mode

def test_an_exported_stream_and_a_new_dataset(monkeypatch):
    for session in data.synthetic(sessions=["casme2", "samm"]):
        put("tree", {key: png(image) for key, image in zip(session.keys, session.images.transpose(0, 2, 3, 1))})
    made, read = works(*PIXELS, "--out", "a"), works(*PIXELS, "--data", "tree", "--preset", "tiny", "--out", "b")
    assert numbers("a", "identity") == numbers("b", "identity")
    assert "Synthetic stream" in made and "Synthetic" not in read
    assert "casme2 246 of 246, subjects 26 of 26; samm 136 of 136, subjects 27 of 27\n" in read
    # What a backbone gets: the images stretched to its size, and normalised by its own mean and std.
    backbone = argparse.Namespace(image_size=24, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    args = argparse.Namespace(data="tree", sessions=["samm"], device=torch.device("cpu"), preset="paper")
    (session,), (large,) = data.load_sessions(args, backbone), data.load("tree", ["samm"], 48)
    pixels = np.asarray(Image.open(f"tree/{large.keys[5]}").resize((24, 24), Image.Resampling.BILINEAR)) / 255
    expected = ((pixels - backbone.mean) / backbone.std).transpose(2, 0, 1)
    assert session.images.dtype == torch.float32 and np.allclose(session.images[5], expected, atol=1e-5)
    assert session.digest == large.digest and large.images.shape == (136, 3, 48, 48)
    # A new dataset is one record. Without all counts, or with an emotion that no face shows, it cannot be made up.
    for emotions, people in (({"awe": 9}, 3), ({"fear": 9}, None), ({"surprise": None, "sad": None}, 5)):
        monkeypatch.setitem(data.DATASETS, "smic", emotions)
        monkeypatch.setitem(data.SUBJECTS, "smic", people)
        assert "smic cannot be made up" in one_line(*PIXELS, "--sessions", "smic")
    put("new", [f"smic_{emotion}/{i}.png" for emotion in ("sad", "surprise") for i in range(8)])
    screen = works(*PIXELS, "--sessions", "smic", "--data", "new", "--folds", "0")
    assert "smic 16 of ?, subjects 8 of 5" in screen
    put("new", ["smic_sad/8.png"])  # 9 people in 17 images: more than half as many
    for people in (5, None):
        monkeypatch.setitem(data.SUBJECTS, "smic", people)
        line = start(*PIXELS, *"--sessions smic --data new".split())[2]
        assert line.endswith(f"is taken for the subject: 9 subjects in 17 images, {people or '?'} in the sheet\n")
    assert folds_in("results")[0]["emotions"].tolist() == ["surprise", "sad"]

@pytest.mark.parametrize("protocol, names", [("ilcv", NAMES), ("loso", ["casme2"])])
def test_every_number_printed_or_kept(protocol, names):
    put(".", NEW_METHOD)
    clock = types.SimpleNamespace(perf_counter=(i * i for i in itertools.count()).__next__)
    screen = works("./stub.py", "--protocol", protocol, "--sessions", *names,
                   patches=[(data, "synthetic", made_up), (protocols, "time", clock)])
    files, (lines, table), sessions, count = folds_in("results"), lines_of(screen), made_up(12, names), len(names)
    found, rows = collections.defaultdict(list), [emotion for name in names for emotion in EMOTIONS[name]]
    for fold, saved in files.items():
        by_subject = [np.flatnonzero(session.subjects == fold + 1) for session in sessions]
        cut = by_subject if protocol == "loso" else [kfold(session.keys, fold)[1] for session in sessions]
        for name in ("labels", "subjects", "keys"):
            assert saved[name].tolist() == [x for s, test in zip(sessions, cut) for x in getattr(s, name)[test]]
        assert saved["session"].tolist() == [t for t in range(count) for _ in cut[t]]
        assert saved["emotions"].tolist() == SO_FAR[count - 1] and saved["fold"] == fold
        assert saved["emotions"][saved["row_emotion"]].tolist() == rows
        assert saved["row_session"].tolist() == [t for t in range(count) for _ in sessions[t].emotions]
        seen = collections.Counter()
        for t, (session, test) in enumerate(zip(sessions, cut)):
            seen.update(np.delete(session.labels, test).tolist())
            assert saved["train_counts"][t].tolist() == [seen[word] for word in saved["emotions"]]
            n, words, cells = sum(map(len, cut[: t + 1])), SO_FAR[t], []
            true, source = saved["labels"][:n], saved["session"][:n]
            for name, how in itertools.product(("scores", "second"), ("sum", "prob")):
                scores = torch.tensor(saved[f"{name}_{t}"])  # (n, R)
                scores = scores.softmax(1) if how == "prob" else scores
                one_hot = [[float(row == word) for word in words] for row in rows[: OFFSET[t + 1]]]  # (R, E)
                merged = scores @ torch.tensor(one_hot)
                merged[:, [seen[word] == 0 for word in words]] = -np.inf  # without a training sample: never the answer
                answers = np.array(words)[merged.argmax(1)]
                found[name, how, t].append((true, answers, source))
                cells += [np.mean(true == answers), *(f1_uar(true, answers) if how == "sum" else [])]
            found["scores", "majority", t].append((true, np.full(n, max(words, key=seen.__getitem__)), source))
            line, expected = lines[count * fold + t], 100 * np.array(cells)[[0, 3, 4, 7, 1, 2]]
            assert line[:3] == [str(fold), session.name, str(len(words))]
            assert np.allclose(np.float64(line[3:9]), expected, atol=0.051), line
            assert line[9] == "-" and float(line[10]) == saved["seconds"][t] == 4 * (count * fold + t) + 1
    assert len(lines) == count * len(files) and len(files) == (5 if protocol == "ilcv" else 8)
    pooled = {key: [np.concatenate(arrays) for arrays in zip(*folds)] for key, folds in found.items()}
    percent, expected = lambda true, answers, *_: 100 * np.mean(true == answers), []
    for how in ("sum", "prob", "majority") if protocol == "ilcv" else ():
        a = np.array([[percent(*arrays) for arrays in found["scores", how, t]] for t in range(4)])  # (T, folds)
        a = np.array([*a, a.sum(0) / 4, a[3]])  # and avg, and last
        spread = np.sqrt(((a - a.mean(1, keepdims=True)) ** 2).sum(1) / 4)
        expected += [(f"{how}, mean over folds", a.mean(1)), ("+- standard deviation", spread)]
    for t in range(4) if protocol == "ilcv" else ():
        true, answers, source = pooled["scores", "sum", t]
        expected.append((f"after {names[t]}", [percent(true[source == s], answers[source == s]) for s in range(t + 1)]))
    for how in ("sum", "majority") if protocol == "loso" else ():
        true, answers, _ = pooled["scores", how, 0]
        expected.append((how, [percent(true, answers), *(100 * np.array(f1_uar(true, answers)))]))
    assert [label for label, _ in table] == [label for label, _ in expected]
    assert all(np.allclose(a, b, atol=0.0051) for (_, a), (_, b) in zip(table, expected))
    assert abs(expected[0][1] - np.array(expected[-1 if protocol == "loso" else 2][1])).max() > 1  # they do differ
    header, words = "S1 casme2 S2 samm S3 mmew S4 casme3 avg last", " ".join(screen.split())
    assert (header if protocol == "ilcv" else "pooled over subjects accuracy UF1 UAR") in words
    assert "emotions acc(sum) acc(prob) second(sum) second(prob) UF1 UAR loss seconds" in words

def test_a_run_is_what_its_numbers_depend_on(monkeypatch):
    """Each change alone, against the same first run: fold 0 is kept where it must be, else made in another folder."""
    for folder, change in dict(a={}, b={TREE[0]: png(colour=8)}, c={TREE[0]: None}, d={}).items():
        put(f"{folder}/x", dict.fromkeys(TREE, png()) | change)
    put("c/x", ["casme2_happiness/sub09_2.png"])
    put("a/x", {"prepare.json": '{"opencv": "5"}'})
    now = functools.partial(datetime.datetime.now, datetime.timezone.utc)
    made = [now()]
    core = ("common.py", "data.py", "protocols.py", "rch.py", "tiny/__init__.py", "tiny/stream.py")
    core = {name: text_of(name) for name in core}
    monkeypatch.setattr(protocols, "HERE", os.getcwd())  # the core whose files count is the copy
    code = NEW_METHOD | {"unused.py": ""} | {name: core[name] for name in ("protocols.py", "rch.py", "tiny/stream.py")}
    put(".", core | code | {"timm/note.txt": "a folder that is called like a package"})
    kept = ["", "--folds 1 0", "--data d/x", "unused.py \na = 1", *(f"{name} \n# a comment" for name in code)]
    new = ["--seed 1", "--wild 3", "--sessions samm casme2", "--sessions samm", "--protocol loso --sessions samm",
           "--preset tiny", "--data b/x", "--data c/x", "K",
           *(f"{name} \na = 1" for name in code if name != "unused.py")]
    folders, hashes = [], {}
    for change in ["", *kept, *new]:
        name, _, text = change.partition(" ")
        put(".", {name: code[name] + text} if name in code else {})
        with monkeypatch.context() as patch:
            if change == "K":
                patch.setattr(protocols, "K", 3)
                patch.setattr(protocols.split, "__defaults__", (3, 42))
            flags = change.split() if change[:2] == "--" else ()
            screen = works("./stub.py", *TWO, "--data", "a/x", "--folds", "0", *flags)
        folders.append(re.search(r"^files: (\S+);", screen, re.M).group(1))
        made.append(now())
        hashes[change] = re.search(r"images (\w{12}), folds (\w{12})", screen).groups()
        assert ("  kept\n" in screen) == (len(folders) > 1 and change in kept), change
        assert len(set(folders)) == max(1, len(folders) - len(kept)), change
        put(".", code)
    images, folds = hashes[""]
    assert hashes["--data d/x"] == hashes["--wild 3"] == (images, folds) and hashes["K"][0] == images
    assert hashes["--data b/x"][0] != images and hashes["--data b/x"][1] == folds  # a pixel
    assert hashes["--data c/x"][0] != images and hashes["--data c/x"][1] != folds != hashes["K"][1]  # a name; the cut
    with open(os.path.join(folders[0], "run.json"), encoding="utf-8") as file:
        about = json.load(file)
    info = about.pop("info")
    assert about["prepared"] == {"opencv": "5"} and list(about) == ["made", "prepared"]  # of the first run of them
    assert made[0] < datetime.datetime.fromisoformat(about["made"]) < made[1]
    assert list(info) == ("arguments merges device synthetic fold_count counts images tests folds weights code"
                          " versions").split()
    assert set(info["arguments"]) == {"backbone", "protocol", "sessions", "preset", "seed", "wild", "method", "changed"}
    assert info["device"] == "cpu" and info["versions"]["torch"] == metadata.version("torch")
    assert list(info["versions"]) == ["torch", "torchvision", "timm", "numpy", "pillow", "cuda", "python"]
    assert info["weights"] == "no network" and set(info["code"]) == {*core, *code} - {"unused.py"}

SAVES = "import time; time.sleep(0.1)\nwith open({!r}, 'a') as file:\n    file.write('\\na = 1')\n"  # as an editor

def test_code_that_was_edited_after_it_was_loaded_does_not_run():
    """While a script starts, its own file, a helper or one of the core; after a notebook imported it. And how a
    notebook runs a script: with foreign arguments, without a file, with a fresh file."""
    put(".", NEW_METHOD | {name: text_of(name) for name in ("common.py", "data.py", "protocols.py", "rch.py")}
        | {"tiny/__init__.py": "", "tiny/stream.py": text_of("tiny/stream.py")})
    notebook = "import sys; sys.ps1 = ''; sys.argv = ['', '--folds', '0', '--sessions', 'samm']\n"
    environment = os.environ | {"PYTHONPATH": ""}
    for name in ("stub.py", "helper.py", "rch.py"):
        saved, edits = {"rch.py": text_of("rch.py")}, SAVES.format(name)
        put(".", {"old.py": "a = 1\n" + (NEW_METHOD | saved)[name]})  # older than the process, and renamed in it
        renames = f"import os, time; time.sleep(0.1); os.replace('old.py', {name!r}); "
        early = {"stub.py": STUB.replace("import numpy", "import early, numpy"), "early.py": edits}  # before common
        for words, files in ((["stub.py", "--folds", "0"], early),
                             (["-c", f"{notebook}import stub\n{renames}stub.main()"], {}),
                             (["-c", f"{notebook}import stub\n{edits}stub.main()"], {})):
            if files and not os.path.exists("/proc/self/stat"):
                continue  # only Linux tells when a process started
            put(".", NEW_METHOD | saved | files)
            job = process(*words, env=environment)
            errors = job.communicate()[1]
            assert job.returncode == 1, (name, words, errors)
            assert errors.startswith(f"error: {os.path.realpath(name)}: changed after it was loaded; start again")
            assert not os.path.exists("results")
    put(".", NEW_METHOD)
    in_cell = notebook + "import common\ndef main(): common.parse('', {})\nmain()"
    foreign = notebook + "sys.argv = ['ipykernel_launcher.py', '-f', 'kernel.json']\nimport stub; stub.main()"
    fresh = notebook + f"open('fresh.py', 'w').write({STUB!r})\nimport fresh; fresh.main(); fresh.main()"
    for code, status, words in ((in_cell, 1, "error: main() stands in no file"), (foreign, 1, "error: unrecognized"),
                                (fresh, 0, "")):
        job = process("-c", code, env=environment)
        screen, errors = job.communicate()
        assert job.returncode == status and errors.startswith(words) and errors.count("\n") == status, errors
    assert screen.count("  kept\n") == 1 and os.path.exists(glob.glob("results/fresh-*")[0])

def test_settings_of_every_type(monkeypatch):
    """A flag each; 0 where it can be meant; what cannot be meant ends with one line."""
    settings = {"few": (3, 0), "many": (3, 2), "epochs_last": (3, 2), "batch": (4, 4), "lr": (0.1, 0.2),
                "share": (0.0, 1.0), "on": (True, False), "name": ("a", "b")}

    def parsed(flags):
        monkeypatch.setattr(sys, "argv", ["", *flags.split()])
        return common.parse("", settings)

    for preset in (0, 1):
        args = parsed(["--preset paper", "--preset tiny"][preset])
        assert [getattr(args, name) for name in settings] == [pair[preset] for pair in settings.values()]
        assert args.changed == {} and args.method == "test_all"
    args = parsed("--preset paper --few 0 --epochs-last 0 --batch 2 --lr 0.5 --share 1 --no-on --name c")
    assert args.changed == {"few": 0, "epochs_last": 0, "batch": 2, "lr": 0.5, "share": 1.0, "on": False, "name": "c"}
    assert parsed("--on --share 0").changed == {"on": True, "share": 0.0}
    for flags in ("--many 0", "--few -1", "--batch 1", "--lr 0", "--share nan", "--many 1.5", "--few x"):
        with pytest.raises(SystemExit, match=f"error: .*{flags.split()[0]}"):
            parsed(flags)

def test_fold_files_that_are_not_used():
    put(".", NEW_METHOD | {f"tree/{name}": png() for name in TREE})
    run = ["./stub.py", *TWO, "--data", "tree", "--folds", "1"]
    works(*run, "0")
    works(*run, "0", "--seed", "1", "--out", "other")
    paths = [*sorted(glob.glob("results/*/*/*.npz")), *glob.glob("other/*/*/fold0.npz")]
    content, another_fold, another_run = (open(path, "rb").read() for path in paths)
    whole, path = numbers("results"), paths[0]
    for saved in [another_fold, another_run, b"", content[:900], b"PK\x03\x04" + bytes(99), content[::-1], None]:
        put(".", {path: saved}) if saved is not None else np.savez(path, identity=np.array([Code()]))
        for fold in ((), ("0",)):
            status, screen, errors = start(*run, *fold)
            assert status == 0 and re.fullmatch(r"note: \S+fold0.npz: not used \(.*\)\n", errors), saved
            assert screen.count("  kept\n") == 2 and f"{1 + len(fold)} of 5 folds" in screen
        assert whole == numbers("results") and not os.path.exists("unpickled")

def test_many_processes_make_the_files_of_one(monkeypatch):
    folds, two = ["--folds", "0", "4", "2"], ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    jobs = [process("-m", *two, *PIXELS, *folds, "--out", "two")]
    jobs += [process("-m", *PIXELS, "--out", "jobs", "--folds", *words) for words in (("0", "2"), "4")]
    screen, (out, errors) = works(*PIXELS, *folds, "--out", "one"), jobs[0].communicate()
    assert [job.wait() for job in jobs] == [0, 0, 0], errors
    assert numbers("one") == numbers("two") == numbers("jobs")
    assert len(re.findall("(?:casme2 +5|samm +7) ", out)) == 6  # torchrun's processes may write into each other's lines
    assert screen.split("\n\n")[1] in out
    # Process 1 of 2 takes every second fold; a fold that is there is kept; who finds all done prints the summary, once.
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected, done in (("1", "44", 0), ("0", "0022", 1), ("1", "44", 0), ("0", "0022", 1)):
        monkeypatch.setenv("RANK", rank)
        out = works(*PIXELS, *folds, "--out", "ranks")
        assert "".join(line[0] for line in lines_of(out)[0]) == expected
        assert out.count("of 5 folds") == out.count("3 of 5 folds") == done
    assert numbers("one") == numbers("ranks")
    for own in ({"RANK": "0"}, {"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS")} | own)
            assert "WORLD_SIZE" in one_line(*PIXELS), own
    tried = []  # and on CUDA each process takes a device of its own
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: tried.append(device) or 1 / 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank, flags in itertools.product(("", "0", "3"), ([], ["--device", "cuda"], ["--device", "cuda:7"])):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert one_line("finetune", *flags).startswith(f"error: --device {tried[-1]}: ")
    assert tried == [device for own in ("cuda", "cuda:0", "cuda:1") for device in (own, own, "cuda:7")]

def test_what_takes_long_shows_a_bar(monkeypatch):
    """Of each step of a run; on a terminal only, and of processes side by side only that of the first."""
    long, progress = collections.Counter(), data.progress
    with monkeypatch.context() as patch:
        patch.setattr(data, "progress", lambda items, what, *n: long.update([what]) or progress(items, what, *n))
        works(*SHORT)
        put("tree", TREE)
        data.load("tree", ["samm"], 12)
    assert long == {"casme2": 1, "samm": 2, "training": 4, "features": 5}  # one to try the network
    for rank, terminal, expected in (("0", True, "steps:   0%"), ("1", True, ""), ("0", False, "")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(sys, "stderr", screen := io.StringIO())
        screen.isatty = lambda terminal=terminal: terminal
        assert list(data.progress(range(3), "steps")) == [0, 1, 2] and expected in screen.getvalue()
        assert bool(screen.getvalue()) == bool(expected)

def test_the_tiny_preset_takes_one_thread_of_a_cpu(monkeypatch):
    for variable, preset, expected in (("", "tiny", [1]), ("OMP_NUM_THREADS", "tiny", []), ("", "paper", [])):
        asked = []
        monkeypatch.setattr(torch, "set_num_threads", asked.append)
        monkeypatch.setattr(sys, "argv", ["finetune.py", "--preset", preset, "--device", "cpu"])
        monkeypatch.setattr(os, "environ", {variable: "2"})
        common.parse("", {})
        assert asked == expected, (variable, preset)

@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_stopped_anywhere_a_run_goes_on_to_the_undisturbed_numbers():
    """SIGKILL in training, in evaluation and at each step of writing a file; a full disk; Ctrl-C. With --save."""
    # Per fold 7 + 4 steps, 2 tests, 2 files; before them one pass measures the network, run.json is written.
    jobs = [("training", 0, 0), ("training", 8, 0), ("training", 9, 0), ("evaluation", 1, 0), ("evaluation", 2, 0),
            ("evaluation", 4, 1), ("half", 0, 0), ("half", 2, 0), ("written", 3, 1), ("renamed", 1, 0),
            ("written", 3, 1, OSError(28, "No space left on device"), 1, "error: .*No space left on device\n"),
            ("training", 15, 1, KeyboardInterrupt(), 130, "\ninterrupted; .*\n")]
    works(*SHORT, "--out", "whole")
    halves = [process("-c", f"import test_all; test_all.stop_and_go_on({jobs[half::2]})") for half in (0, 1)]
    for half in halves:  # autograd wants a process of its own before a fork
        out, errors = half.communicate()
        assert out == "0 0\n" * (len(jobs) // 2), (out, errors)
    for lr, words in (("1e30", "the loss is not finite in step 2 of 7"), ("1e20", "")):
        status, screen, errors = start(*SHORT, "--lr", lr, "--folds", "3", "--out", "diverged")
        assert status == 1 and re.fullmatch(f"error: fold 3, casme2: {words}.*\n", errors), errors
        assert not lines_of(screen)[0] and not stamps("diverged")

def stop_and_go_on(jobs):
    """Of each (moment, count, folds kept[, error, status, words]): (0, 0) if the run ended so, and then went on."""
    import timm  # noqa: F401  # once, not in every child

    for i, (moment, count, kept, *fault) in enumerate(jobs):
        out, ends = f"{moment}{count}{i}", []
        for patches in (faults(moment, count, *fault[:1]), []):
            if not (child := os.fork()):
                before = stamps(out)
                if not patches:
                    assert len(before) >= kept and works(*SHORT, "--out", out).count("  kept\n") == 2 * kept, out
                    assert not kept or before.items() <= stamps(out).items(), out  # no model: a fold is made anew
                    assert numbers("whole") == numbers(out), out
                    os._exit(0)
                status, _, errors = start(*SHORT, "--out", out, patches=patches)
                os._exit(0 if fault and status == fault[1] and re.fullmatch(fault[2], errors) else 1)
            ends.append(os.waitpid(child, 0)[1])
        print(ends[0] % 128 - 9 * (not fault), ends[1], flush=True)  # 9: killed

def test_an_interrupt_and_a_closed_pipe_in_a_terminal():
    # A job in the background would ignore Ctrl-C.
    listens = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")  # not on Windows
    screen, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 40, 100, 0, 0))  # lines and columns
    words = [os.path.join(HERE, "finetune.py"), *TWO, "--epochs-first", "300"]
    endless = process(*words, stderr=terminal, preexec_fn=listens)
    os.close(terminal)
    closed, pipe = os.pipe()
    os.close(closed)
    for words in (["-m", *PIXELS, "--out", "x"], ["-c", "import common; common.launch(lambda: print(1))"]):
        quiet = process(*words, stdout=pipe)
        assert quiet.communicate()[1] == "" and quiet.returncode == 1, words
    seen, asked = "", False
    with contextlib.suppress(OSError):  # the screen's end
        while part := os.read(screen, 10_000).decode(errors="replace"):
            seen += part
            if not asked and re.search(r"training: +\d+%.*\d/2100 .*<.*it/s", seen):  # 300 times seven batches
                endless.send_signal(signal.SIGINT)
                asked = True
    assert endless.wait() == 130 and re.search(r"\r +\r\r\ninterrupted; [^\r\n]*\r\n$", seen), seen
    assert [os.path.basename(path) for path in glob.glob("results/*/*/*")] == ["run.json"]

FLAGS = """der --odd; finetune --lr -1; finetune --lr nan; l2p --lr inf; l2p --batch 1
controls.joint --epochs-first -1; controls.norch --epochs-next 1.5; l2p --pool 0; l2p --chosen 11
dualprompt --length 0; ranpac --projected 0; der --weight-decay -1; finetune --device abacus
l2p --sessions smic; der --weights less.pt
der --weights more.pt; controls.pixels --weights swin.pt; controls.pixels --backbone swin; finetune --protocol losoo
finetune --sessions samm samm; controls.pixels --data ""; finetune --weights ""; finetune --backbone vgg
finetune --backbone odd --preset paper --weights none; l2p --backbone vit.odd --preset paper
ranpac --backbone resnet51q.ra2_in1k --preset paper; finetune --weights nowhere.pt; finetune --weights text.pt
finetune --weights text.safetensors; finetune --weights list.pt; l2p --weights code.pt; ranpac --weights empty.bin
ranpac --weights swin.pt; ranpac --weights junk.npz; l2p --backbone swin; dualprompt --backbone swin; der --folds 5
dualprompt --backbone resnet; ranpac --folds 1 0 1; ranpac --folds -1; finetune --protocol loso
controls.pixels --protocol loso --sessions casme2 samm; controls.pixels --out file; controls.pixels --out file/deeper"""
NO_PLAIN_VIT = ["vit_small_patch14_reg4_dinov2", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224",
                "test_convnext", "test_vit3"]
SEEN = np.random.RandomState(0).randint(0, 255, (20, 20, 3), np.uint8)
NOISE = png(SEEN)
TREES = [  # what differs in a small right folder, flags, what the line must say
    ({"samm_anger/1_1.png": NOISE, "samm_anger/1_2.png": NOISE}, "", "1_2.png: the same image as samm_anger/1_1.png"),
    ({"samm_anger/1_1.png": NOISE, "samm_others/3.png": NOISE}, "", "/3.png: the same image as samm_anger/1_1.png"),
    ({"samm_anger/1_1.png": NOISE, "samm_others/3.bmp": png(SEEN, kind="BMP")}, "", "/3.bmp: the same image"),
    ({f"samm_{e}/{i:06d}_sub001.png": png() for e in ("anger", "surprise") for i in range(100, 156)}, "",
     "000155_sub001.png: its first number, 155, is taken for the subject: 60 subjects in 128 images, 27 in the sheet"),
    ({f"samm_surprise/{i:06d}_sub001_{i}.png": png() for i in range(100, 128)}, "",
     "its first number, 127, is taken for the subject: 32 subjects in 44 images, 27 in the sheet"),
    ({"casme2_Happy/sub09_1.png": png(), "casme2_happiness/sub09_1.jpg": png()}, "", "an image twice"),
    ({}, "--data nowhere", "nowhere"), ({}, "--data hollow", "hollow: no images of session casme2"),
    ({}, "--sessions casme2 samm mmew", "no images of session mmew"), ({"smic_sad/1.png": ""}, "", "smic_sad"),
    ({"samm_joy/1.png": ""}, "", "samm_joy"), ({"casme2/1.png": ""}, "", "tree/casme2"),
    *(({f"samm_anger/{name}.png": png()}, "", f"samm_anger/{name}.png") for name in ("nobody", "9999999999")),
    *(({TREE[3]: content}, "", TREE[3]) for content in (
        b"", b"text", png("I;16"), png(kind="GIF"), png()[:-30], png()[:30] + b"noise" + png()[35:],
        png()[:16] + b"\0\0\xff\xff" * 2 + png()[24:])),
    ({}, "--protocol slcv", "session casme2: 4 subjects are too few"),
    (dict.fromkeys(TREE[20:]), "", "session samm: 4 samples are too few"),
    (dict.fromkeys(TREE[2:8] + TREE[10:16]), "--protocol loso --sessions casme2", "casme2: 1 subjects are too few"),
    (dict.fromkeys(TREE[3:16]), "--protocol loso --sessions casme2", "session casme2: a fold has no sample"),
]

def test_mistakes_end_with_one_line(monkeypatch):
    import timm  # after HF_HUB_OFFLINE is set: else each refused download is tried for seconds

    monkeypatch.setattr(timm, "create_model", functools.cache(timm.create_model))
    texts = dict.fromkeys(["text.pt", "text.safetensors", "file", "junk.npz", "hollow/a"], "text")
    put(".", texts | {"empty.bin": b""})
    shutil.copy(os.path.join(HERE, "tiny", "swin.pt"), "swin.pt")
    state = torch.load(os.path.join(HERE, "tiny", "vit.pt"), weights_only=True)["state_dict"]
    less = {name: value for name, value in state.items() if name != "norm.weight"}
    for name, content in {"list": [1], "code": Code(), "less": less, "more": state | {"odd": torch.ones(2)}}.items():
        torch.save(content, f"{name}.pt")
    before = sorted(os.listdir("."))
    models = [f"l2p --backbone {name} --preset paper --weights none" for name in NO_PLAIN_VIT]
    models += [words.replace("l2p", "dualprompt") for words in models[:2]]
    for words in re.split("; |\n", FLAGS) + models:
        script, *flags = shlex.split(words)
        line = one_line(script, *flags)
        assert flags[0] in line or flags[1] and flags[1] in line, line
    assert sorted(os.listdir(".")) == before
    for files, flags, words in TREES:
        shutil.rmtree("tree", ignore_errors=True)
        put("tree", dict.fromkeys(TREE, png()) | files)
        assert words in one_line(*PIXELS, "--data", "tree", "--preset", "tiny", *flags.split())
    put("tree", {TREE[3]: png()})
    works(*PIXELS, "--data", "tree", *"--protocol loso --sessions casme2".split())  # nothing else was wrong

def test_weight_files_of_every_kind(monkeypatch):
    """With the classifier in the file, which is left out; and prompts are accepted in a plain ViT."""
    import timm  # after HF_HUB_OFFLINE is set: else each refused download is tried for seconds

    found = []
    for folder, change, kept in (("a", 0, False), ("b", 1, False), ("c", 0, True)):  # other weights, the same name
        content = torch.load(os.path.join(HERE, "tiny", "resnet.pt"), weights_only=True)
        content["state_dict"]["bn1.bias"] += change
        os.mkdir(folder)
        torch.save(content, f"{folder}/w.pt")
        flags = ["--weights", f"{folder}/w.pt", "--backbone", "resnet", "--epochs-first", "0", "--projected", "50"]
        assert ("kept" in works("ranpac", *flags, *TWO, "--folds", "0")) == kept
    assert len(stamps()) == 2
    monkeypatch.setattr(data, "load_sessions", lambda args, network: found.append(network) or sys.exit("loaded"))
    resnet = ("resnet10t.c3_in1k", 176, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    vit = ("vit_tiny_patch16_224", 224, (0.5,) * 3, (0.5,) * 3)
    for script, (name, *expected) in (("finetune", resnet), ("l2p", vit), ("dualprompt", vit)):
        state = {key: torch.rand(v.shape).to(v.dtype) for key, v in timm.create_model(name).state_dict().items()}
        wrapped = lambda state, file: torch.save({"state_dict": state, "epoch": 3}, file)  # noqa: E731
        for save, file in ((torch.save, "plain.pth"), (wrapped, "wrapped.bin"), (save_file, "network.safetensors")):
            save(state, file)
            errors, loaded = start(script, "--preset", "paper", "--backbone", name, "--weights", file)[2], found[-1]
            assert errors == "loaded\n" and [loaded.image_size, loaded.mean, loaded.std] == expected
            values = loaded.state_dict()
            assert len(values) == len(state) - 2 and all(torch.equal(values[key], state[key]) for key in values)
    flags = "--preset paper --backbone vit_base_patch16_clip_224 --weights none".split()
    assert start("dualprompt", *flags)[2] == "loaded\n"
    # By the names of the model's authors: SwinV2's merges stand at the end of a stage there, its tables are kept.
    swin, theirs = timm.create_model("swinv2_tiny_window8_256"), {}
    for key, value in swin.state_dict().items():
        stage = re.match(r"layers\.(\d)\.downsample", key)
        key = f"layers.{int(stage[1]) - 1}.downsample{key[stage.end():]}" if stage else key
        theirs[key.replace("head.fc.", "head.")] = value
    table = "layers.0.blocks.1.attn.relative_coords_table"
    theirs |= {"layers.0.blocks.1.attn_mask": torch.ones(1), table: torch.ones(1, 15, 15, 2)}
    torch.save({"model": theirs}, "swinv2_tiny_patch4_window8_256.pth")
    state = timm.create_model(vit[0]).state_dict()
    torch.save(state | {f"pre_logits.fc.{name}": torch.ones(1) for name in ("weight", "bias")}, "in21k.pth")
    for name, file, right in (("swinv2_tiny_window8_256", "swinv2_tiny_patch4_window8_256.pth", swin.state_dict()),
                              (vit[0], "in21k.pth", state)):
        assert start("finetune", "--preset", "paper", "--backbone", name, "--weights", file)[2] == "loaded\n"
        assert all(torch.equal(value, right[key]) for key, value in found[-1].state_dict().items())
    shutil.rmtree("results")
    # What cannot be loaded: with the true reason.
    lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:0"
    put(".", {"lfs.bin": lfs, "lfs.safetensors": lfs, "page.pth": "<!doctype html><title>Sign in</title>"})
    save_file(state, "renamed.bin")
    torch.save(state, "torch.safetensors")
    torch.save(timm.create_model("vit_tiny_patch16_384").state_dict(), "384.pth")
    torch.save({"model": theirs | {table: torch.ones(1, 31, 31, 2)}}, "swin_window16.pth")
    for file, reason in {"lfs.bin": "a Git LFS pointer", "lfs.safetensors": "a Git LFS pointer",
                         "renamed.bin": "must end with .safetensors", "torch.safetensors": "deserializing header",
                         "384.pth": "pos_embed is [1, 577, 192], here [1, 197, 192]: of another image, patch or",
                         "swin_window16.pth": "table is [1, 31, 31, 2], here [1, 15, 15, 2]: of another image",
                         "page.pth": "no torch file, or one that holds more than weights",
                         "nowhere.pth": "No such file"}.items():  # fmt: skip
        name = "swinv2_tiny_window8_256" if "swin" in file else vit[0]
        line = one_line("finetune", "--preset", "paper", "--backbone", name, "--weights", file)
        assert line.startswith(f"error: {file}: cannot be loaded into this backbone (") and reason in line, line

def test_a_hub_that_is_silent():
    """It takes a connection and never answers: a line before the download, and an end in two minutes, here sooner."""
    words = ["", "--preset", "paper", "--backbone", "vit_tiny_patch16_224"]
    code = f"""if True:
        import sys, huggingface_hub
        ask = huggingface_hub.model_info
        huggingface_hub.model_info = lambda repository, timeout: ask(repository, timeout=timeout / 60)
        sys.argv = {words}
        import finetune
        finetune.main()"""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        place = f"http://127.0.0.1:{hub.getsockname()[1]}"
        own = {"HF_ENDPOINT": place, "HF_HUB_OFFLINE": "0", "HF_HOME": os.path.abspath("empty"), "PYTHONPATH": HERE}
        began = time.time()
        out, errors = process("-c", code, env=os.environ | own).communicate(timeout=100)
    name = "vit_tiny_patch16_224"
    assert out == f"weights: {place}/timm/{name}.augreg_in21k_ft_in1k, about 22 MB, once (or --weights FILE)\n"
    assert re.fullmatch(rf"error: {name}: cannot be .* \(.*timed out.*\); pass a file with --weights .*\n", errors)
    assert time.time() - began < 90

def changed(script, diff):
    """The text of a script after a diff of the docs: its old lines are there, in this order."""
    lines, out = text_of(f"{script}.py").splitlines(), []
    for mark, line in re.findall("^([ +-])(.*)$", diff, re.M):
        if mark == "+":
            out.append(line)
        else:
            at = lines.index(line)
            out, lines = [*out, *lines[: at + (mark == " ")]], lines[at + 1 :]
    return "\n".join([*out, *lines]) + "\n"

@pytest.mark.parametrize("page, count", [("README.md", 1), ("docs/exercises.md", 9)])
def test_changes_in_the_docs_run(page, count):
    """The diffs, each on the script that is named last before it; and the code that reads a run's files."""
    changes = re.findall("(.*?)```diff\n(.*?)```", text_of(page), re.S)
    assert len(changes) == count
    for before, diff in changes:
        script = re.findall(r"`(?:cp )?(\w+)\.py", before)[-1]
        put(".", {"mine.py": changed(script, diff)})
        screen = works("mine.py", *TWO, "--folds", "0", *brief(script))
        assert len(lines_of(screen)[0]) == 2
        shutil.rmtree("results")
    for code in re.findall("```python\n(import glob.*?)```", text_of(page), re.S):
        works("finetune", *"--protocol loso --sessions casme2 --folds 0 1".split())
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, {})
        folds = folds_in("results")
        pooled = protocols.uf1(*protocols.pooled(folds, 0)[:2])
        mean = np.mean([protocols.uf1(*protocols.outcome(saved, 0)[:2]) for saved in folds.values()])
        assert np.float64(out.getvalue().split()) == pytest.approx([pooled, mean])

def test_readme_is_true():
    """Its examples and commands run, in their order (what trains for one epoch on one fold); its hashes are these.

    The first lines that it shows are those of the main command, and the methods' numbers those of docs/results.md.
    """
    text = text_of("README.md")
    failed, tried = doctest.testfile(os.path.join(HERE, "README.md"), module_relative=False)
    assert tried >= 5 and not failed
    commands = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    commands = [line.split("#")[0].split()[1:] for line in commands if re.match(r"python (?!-m pytest)", line)]
    commands.insert(0, re.search("&& (python ranpac.*)", text).group(1).split()[1:])
    assert len(commands) >= 7
    importlib.import_module("tools.test_tools").public_clone(pathlib.Path("HTNet"))  # as the one that README clones
    os.mkdir("tiny")
    shutil.copy(os.path.join(HERE, "tiny", "vit-uvs.pt"), "tiny")
    for script, *flags in commands:
        script, *flags = (script[:-3], *flags) if script != "-m" else flags
        shown = script == "ranpac" and "--data" not in flags
        short = ["--folds", "0", *([] if shown else brief(script))] if script in SCRIPTS else []
        screen = works(script, *flags, *short, *(["--preset", "tiny"] if short and "--data" in flags else []))
        if shown:
            assert screen.splitlines()[1] in text
            for line, told in zip(lines_of(screen)[0], lines_of(text)[0], strict=True):
                assert line[:3] == told[:3] and np.float64(line[3:6]) == pytest.approx(np.float64(told[3:6]), abs=4)
    table = text_of("docs/results.md").split("## The synthetic stream")[1].split("**ILCV")[1].split("\n**")[0]
    found = {}  # {method, or method prob: `last`} of the tiny ViT
    for line in re.findall(r"^\| (?:vit|none) \| .*3 seeds.*$", table, re.M):
        cells = line.split("|")
        found |= {(name := cells[2].split(",")[0].strip()): cells[8], f"{name} prob": cells[-2]}
    real = text_of("docs/results.md").split("**SLCV, real flow")[1].split("**ILCV")[0]
    lines = re.findall(r"^\| (.+?) (\|.*)$", real, re.M)
    real = {name: re.findall(r"\| (\d+\.\d\d)", line)[:4] for name, line in lines}
    shown = re.findall(r"^\| (.+?) \| (\d+\.\d\d) \| (\d+\.\d\d) \| (\d+\.\d\d) \| (\d+\.\d\d) \|$", text, re.M)
    assert len(shown) == 6
    for name, *told in shown:
        name = re.sub(r"12 x 12 pixels.*\.(?=pixels)|[`)]|controls\.|\.py", "", name).replace(", vit", " weights=vit")
        assert real[name] == told, name
    numbers = dict(re.findall(r"^\| (\w+) \| (\d+\.\d \| \d+) \|$", text_of("docs/results.md"), re.M))
    for script in SCRIPTS:
        last, seconds = numbers[script.split(".")[-1]].split(" | ")
        assert f"seed 0: last {last} %; {seconds} s a fold on one core" in text_of(path_of(script)), script
    told = re.findall(r"^\| \[`(\w+)\.py`\]\(\1\.py\) \| .* \| .* \| (.*) \| (.*) \|$", text, re.M)
    assert [name for name, _, _ in told] == METHODS
    for name, seed0, cell in told:
        assert numbers[name].split(" | ")[0] == seed0
        more = {"finetune": ["norch", "joint"], "der": ["der prob"], "foster": ["foster prob"], "l2p": ["linear"],
                "ranpac": ["ranpac epochs_first=0", "pixels"]}.get(name, [])
        expected = [float(found[word].split()[0]) for word in (name, *more)]
        assert np.float64(re.findall(r"\d+\.\d", cell)) == pytest.approx(expected, abs=0.051), name
    # Every other number with a decimal in the text stands in docs/results.md, to the digit.
    prose = re.sub(r"(?s)```.*?```|\]\(.*?\)|^\|.*?$|Python 3.10", "", text, flags=re.M)
    prose = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", prose)
    assert len(prose) > 20 and not set(prose) - set(re.findall(r"\d+\.\d+", text_of("docs/results.md")))

def test_sum_of_rows_is_ridge_on_emotions():
    """RCH meets ridge: the sum of the rows' scores is ridge regression on merged labels; the sessions in any order."""
    generator, rows = torch.Generator().manual_seed(0), rch.RCH()
    for name in data.STREAM:
        rows.add_session(data.DATASETS[name])
    merge, ends = torch.from_numpy(np.eye(9)[rows.row_emotion]), [0, 5, 10, 16, 23]  # A (R, E)
    hs = [torch.randn(n, 500, generator=generator).relu() for n in (60, 40, 80, 150)]
    ys = [F.one_hot(torch.randint(ends[t], ends[t + 1], (len(h),), generator=generator), 23) for t, h in enumerate(hs)]
    by_rows, by_emotions = ranpac.LowRankRidge(500), ranpac.LowRankRidge(500)
    for h, y in zip(hs, ys):
        by_rows.update(h, y)
    for h, y in reversed(list(zip(hs, ys))):
        by_emotions.update(h, y.double() @ merge)
    for lam in (1.0, 1e3):
        scores = (torch.cat(hs).double() @ by_rows.weights(lam)).numpy()
        summed = torch.from_numpy(rch.remap(scores, rows.row_emotion, rows.row_session, "sum"))
        expected = torch.cat(hs).double() @ by_emotions.weights(lam)
        assert (summed - expected).norm() < 1e-10 * expected.norm()

@pytest.mark.parametrize("protocol", ["slcv", "ilcv"])
def test_folds_come_from_folds_csv_where_there_is_one(protocol):
    """Its folds, whatever images are missing; the hash of its lines without keys; and what does not fit is refused."""
    put("tree", TREE)
    session = [key.split("_")[0] for key in TREE]
    people = [int(re.search(r"sub(\d+)", key).group(1)) for key in TREE]
    lines = [[s, p, i, "", key, p % 5, i * 2 % 5] for i, (s, p, key) in enumerate(zip(session, people, TREE))]
    lines += [["casme2", 9, 99, "", "", 4, 4], ["casme2", 10, 100, "", "", 0, 0], ["samm", 9, 99, "", "", 4, 4]]
    column, flags = {"slcv": 5, "ilcv": 6}[protocol], [*PIXELS, "--data", "tree", "--preset", "tiny"]
    if protocol == "slcv":  # who has an image is in fewer than five folds, unless more people are there
        more = [[s, p, p, "", f"{s}_others/sub{p:02d}_x.png", p % 5, 0] for s in ("casme2", "samm") for p in (11, 15)]
        put("tree", [line[4] for line in more])
        lines += more

    def run(lines, *more, way=works):
        text = "\n".join(",".join(map(str, line)) for line in [FOLDS, *lines])
        put("tree", {"folds.csv": text})
        return way(*flags, "--protocol", protocol, *more)

    FOLDS = ["session", "subject", "clip", "onset", "key", "slcv", "ilcv"]
    screen = run(lines)
    for fold, saved in folds_in("results").items():
        assert sorted(saved["keys"]) == sorted(line[4] for line in lines if line[4] and line[column] == fold)
    count = sum(line[0] == "casme2" for line in lines)
    assert len(folds_in("results")) == 5 and f"casme2 has {count} lines, 2 without an image" in screen
    os.remove(os.path.join("tree", TREE[0]))
    assert re.search(r"folds (\w+) \(folds.csv\)", run(lines, "--out", "b")).group(1) in screen
    put("tree", TREE)
    shutil.rmtree("results")
    end, same = len(lines) + 2, [[*line[:2], 5, 30, *line[4:]] for line in lines[:2]]  # two images of one clip
    for wrong, words in (
        (lines[:3] + lines[4:], f"tree/folds.csv has no line of the image '{TREE[3]}'"),
        ([["text"]], "session casme2: tree/folds.csv has no line of the image 'casme2_"),
        ([*lines, ["casme2", 1, 7, "", "", 3, 3]], f"line {end} puts subject 1 in a second SLCV fold"),
        ([[*line[:5], line[5] + 1, line[6]] for line in lines], f"line {2 + 6} has the folds 5 and "),
        ([[*line[:6], f"{line[6]}.0"] for line in lines], "line 2 has the folds 1 and 0.0, which are 0 to 4"),
        ([*lines, ["casme2", 1]], f"line {end} has the folds None and None"),
        ([*lines, lines[0]], f"tree/folds.csv: line {end} has {TREE[0]}, or its clip and onset, a second time"),
        (same + lines[2:], f"line 3 has {TREE[1]}, or its clip and onset, a second time"),
        ([["casme2", 77, *lines[0][2:]], *lines[1:]], f"line 2 has subject 77, the name of {TREE[0]} 1"),
        ([[*line[:5], 0, 0] for line in lines], "session casme2: a fold has no sample to test"),
    ):  # fmt: skip
        assert words in run(wrong, way=one_line), words
    run([*lines, ["casme2", 9, 99, "", "", 4, 4]])  # two entries without an image may be alike
    shutil.rmtree("results")
    for text in (";".join(FOLDS).encode(), b"session,subject", b""):  # saved by a spreadsheet program, cut, empty
        put("tree", {"folds.csv": text})
        assert "tree/folds.csv: its first line must be session,subject," in one_line(*flags, "--protocol", protocol)
    put("tree", {"folds.csv": ",".join(FOLDS).encode("utf-16")})
    assert one_line(*flags, "--protocol", protocol).startswith("error: session casme2: ")  # Python 3.10: "contains NUL"
    assert "(images)" in run([["text"]], "--protocol", "loso", "--sessions", "casme2")


if __name__ == "__main__":
    for script in SCRIPTS:
        print(f'    "{script}": {fingerprint(script).round(3).tolist()},')
