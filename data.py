"""What a session is, and where its images come from.

A micro-expression sample is one image: the optical flow from the onset to the apex frame of a clip, coded as HSV
(hue = direction of the motion, value = its size). A session is one dataset of such images, read from a processed folder
(`load`) or made up (`synthetic`); `load_sessions` puts either on the device, as the backbone expects its images.

Shapes: N samples of one session, S image side in pixels.
"""

import ast
import csv
import hashlib
import inspect
import io
import os
import re
import sys
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from tiny import stream


@dataclass
class Dataset:
    """A dataset of the field: its emotions in their order, and how much of it there is.

    emotions  {word: samples in the official annotation sheet once all other emotions are left out, or None}; the words
              are the dataset's rows in Table 1 of arXiv 2501.19111, dfme's those of its sheet
    subjects  in the sheet, or None. Without these numbers the dataset can be read, but not made up (`synthetic`).
    """

    emotions: dict
    subjects: int = None

    @property
    def samples(self):
        """All samples in the sheet, or None where an emotion's number is not known."""
        return None if None in self.emotions.values() else sum(self.emotions.values())


DATASETS = {  # a new dataset is one more record; its name in lower case and without an underscore
    "casme2": Dataset(dict(disgust=63, happiness=32, others=99, repression=27, surprise=25), 26),
    "samm": Dataset(dict(anger=57, contempt=12, happiness=26, others=26, surprise=15), 27),
    "mmew": Dataset(dict(disgust=72, fear=16, happiness=36, others=66, sad=13, surprise=89), 30),
    "casme3": Dataset(dict(anger=64, disgust=250, fear=86, happiness=55, others=161, sad=57, surprise=187), 94),
    "dfme": Dataset(dict(anger=161, contempt=100, disgust=548, fear=265, happiness=206, sad=278, surprise=298), 176),
}
STREAM = ["casme2", "samm", "mmew", "casme3"]  # the paper's four sessions; dfme is an optional fifth
ALIASES = {"other": "others", "happy": "happiness", "sadness": "sad"}  # spellings found in the sheets and in folders
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".bmp")
OURS = ("folds.csv", "report.csv", "prepare.json")  # files of a processed folder that are no images


@dataclass
class Session:
    """One dataset of the stream. Samples are sorted by (emotion, file name): the same on every file system.

    name      its word in folder names, e.g. "casme2"
    emotions  its words in the order of DATASETS
    images    (N, 3, S, S) uint8 RGB; from `load_sessions` float32 on the device, as the backbone expects them
    labels    (N,) str, the emotion of each sample
    subjects  (N,) int; a number means one person within this session only
    keys      (N,) str, paths below the processed folder, e.g. "casme2_happiness/sub01_EP02_01f.png"
    digest    a hash of what the images were made of, whatever S is
    folds     from folds.csv: None without the file, {} without a line of the session, else {"slcv", "ilcv": (N,) int;
              "count": how many folds; "digest": a hash of the session's lines without their keys}
    """

    name: str
    emotions: list
    images: np.ndarray
    labels: np.ndarray
    subjects: np.ndarray
    keys: np.ndarray
    digest: str
    folds: dict = None


def progress(items, what, total=None):
    """The items, with a bar on a terminal: items per second, time left. Of processes side by side only the first's."""
    hidden = True if os.environ.get("RANK", "0") != "0" else None  # None: where there is no terminal
    return tqdm(items, what, total, leave=False, disable=hidden)


def load_sessions(args, backbone):
    """The sessions that args ask for, on args.device, in backbone.image_size and normalised by its mean and std."""
    if args.data is None:
        print(f"Synthetic stream, {args.preset} preset: made-up flow images, numbers not comparable with the paper's.")
        sessions = synthetic(backbone.image_size, sessions=args.sessions)
    else:
        sessions = load(args.data, args.sessions, backbone.image_size)
        counts = ", ".join(f"{s.name} {len(s.keys)} of {DATASETS[s.name].samples or '?'}" for s in sessions)
        print(f"samples, of those in the official sheets: {counts}")
    mean, std = (torch.tensor(v, device=args.device).view(3, 1, 1) for v in (backbone.mean, backbone.std))
    for session in sessions:
        session.images = (torch.from_numpy(session.images).to(args.device).float() / 255 - mean) / std
    return sessions


def load(path, sessions=STREAM, size=224):
    """Read `sessions` from the processed folder `path`, resized (stretched, bilinear) to size x size pixels.

    The layout is that of the released benchmark: one folder per <session>_<emotion>, images inside, the subject being
    the first number in the file name. Returns a list of Session in the order of `sessions`. Ends with one line on an
    unknown folder, an unreadable image, a name without a number or a session without samples. What is not read is
    counted on the screen: samples of emotions that the session does not list, and files that are no samples.
    """
    if not os.path.isdir(path):
        sys.exit(f"error: {path!r}: no such folder; --data takes one that holds one folder per <session>_<emotion>")
    emotions = sorted({emotion for dataset in DATASETS.values() for emotion in dataset.emotions})
    found, unlisted, unread = {name: [] for name in sessions}, {}, 0
    for folder in sorted(os.listdir(path)):
        name, _, word = folder.lower().partition("_")
        emotion = ALIASES.get(word, word)
        if folder.startswith(".") or not os.path.isdir(os.path.join(path, folder)):
            unread += not folder.startswith(".") and folder not in OURS
            continue
        if name not in DATASETS or emotion not in emotions:
            sys.exit(f"error: {os.path.join(path, folder)}: folders are named <session>_<emotion>;"
                     f" sessions: {', '.join(DATASETS)}; emotions: {', '.join(emotions)}")  # fmt: skip
        for file in os.listdir(os.path.join(path, folder)) if name in found else ():
            stem, extension = os.path.splitext(file)
            auxiliary = name == "dfme" and re.search(r"_f\d+$", stem)  # flows that lie beside DFME's samples
            subject = re.match(r"\D*(\d{1,9})(?!\d)", stem)
            if file.startswith(".") or extension.lower() not in IMAGE_TYPES or auxiliary:
                unread += not file.startswith(".")
            elif emotion not in DATASETS[name].emotions:
                unlisted[folder] = unlisted.get(folder, 0) + 1
            elif not subject:
                sys.exit(f"error: {os.path.join(path, folder, file)}: no number of at most 9 digits in the file name;"
                         " the first number is the subject")  # fmt: skip
            else:
                found[name].append((emotion, file, f"{folder}/{file}", int(subject.group(1))))
    for folder, count in unlisted.items():
        print(f"left out: {count} samples of {folder}, an emotion that this session does not list")
    if unread:
        print(f"not read: {unread} files or folders that are no samples (other extensions, other places)")
    result = [_read_session(path, name, sorted(found[name]), size) for name in sessions]
    if os.path.exists(os.path.join(path, "folds.csv")):
        _read_folds(os.path.join(path, "folds.csv"), result)
    return result


def _read_folds(path, sessions):
    """Give the sessions the folds that tools.prepare wrote for all rows of the official sheets, with an image or not.

    Two laboratories whose files have the same hash test the same clips in the same folds, whatever images they lack.
    """
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    for session in sessions:
        try:
            own = [line for line in lines if line["session"] == session.name]
            if not own:  # prepare found too few subjects for the folds; leaving one subject out does not ask for them
                session.folds = {}
                continue
            numbers = {line["key"]: (int(line["slcv"]), int(line["ilcv"])) for line in own if line["key"]}
            missing = [key for key in session.keys if key not in numbers]
            slcv = dict((line["subject"], line["slcv"]) for line in own)
            twice = [line["subject"] for line in own if line["slcv"] != slcv[line["subject"]]]
            content = [[line[name] for name in ("subject", "clip", "onset", "slcv", "ilcv")] for line in own]
            count = 1 + max(int(number) for line in content for number in line[3:])
        except (KeyError, TypeError, ValueError):
            sys.exit(f"error: {path}: no lines of session {session.name} as tools.prepare writes them")
        if missing or twice:
            what = f"no line for the image {missing[0]}" if missing else f"subject {twice[0]} in two SLCV folds"
            sys.exit(f"error: {path}: session {session.name} has {what}")
        gone = len(own) - len(session.keys)
        print(f"folds.csv: {session.name} has {len(own)} lines, {gone} of them without an image")
        columns = zip(("slcv", "ilcv"), np.array([numbers[key] for key in session.keys]).T)
        session.folds = dict(columns) | {"count": count, "digest": hashlib.sha256(repr(content).encode()).hexdigest()}


def _read_session(path, name, samples, size):
    """Decode `samples`, a sorted list of (emotion, file name, key, subject), into one Session."""
    emotions, names = DATASETS[name].emotions, {(emotion, os.path.splitext(file)[0]) for emotion, file, _, _ in samples}
    if len(names) < len(samples):
        sys.exit(f"error: {path}: session {name} has an image twice, in two spellings of a folder or two formats")
    if not samples:
        sys.exit(f"error: {path}: no images of session {name}; expected folders such as {name}_{next(iter(emotions))}")
    labels, _, keys, subjects = (np.array(column) for column in zip(*samples))
    images, digest = np.empty((len(samples), 3, size, size), np.uint8), hashlib.sha256()
    for i, key in enumerate(progress(keys, name)):
        try:
            with open(os.path.join(path, key), "rb") as file:
                content = file.read()
            digest.update(f"{key} {len(content)} ".encode() + content)
            with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "BMP")) as image:
                if image.mode[0] in "IF":
                    raise ValueError("more than 8 bits per channel")
                image = image.convert("RGB")
                if image.size != (size, size):
                    image = image.resize((size, size), Image.Resampling.BILINEAR)
                images[i] = np.asarray(image).transpose(2, 0, 1)
        except Exception as error:  # a damaged file can raise almost anything
            sys.exit(f"error: {os.path.join(path, key)}: not a readable image ({' '.join(str(error).split())})")
    return Session(name, list(emotions), images, labels, subjects, keys, digest.hexdigest())


def flow_to_image(flow):
    """Code flow fields (N, S, S, 2), in pixels, x to the right and y down, as RGB images (N, 3, S, S) uint8.

    HSV with hue = direction, saturation = 1 and value = magnitude scaled from 0 to 1 within each image, as the released
    benchmark does. At full saturation the conversion to RGB is a tent of width 4 (in sixths of the circle) per channel.
    """
    flow = flow.astype(np.float64)  # in float32 processors differ in a last bit, and then pixels do
    magnitude = np.hypot(flow[..., 0], flow[..., 1])
    low = magnitude.min((1, 2), keepdims=True)
    value = (magnitude - low) / np.maximum(magnitude.max((1, 2), keepdims=True) - low, 1e-12)
    hue = np.arctan2(flow[..., 1], flow[..., 0]) % (2 * np.pi) * (3 / np.pi)  # 0..6: red, yellow, green, cyan, blue
    red, green, blue = abs(hue - 3) - 1, 2 - abs(hue - 2), 2 - abs(hue - 4)
    rgb = np.stack([red, green, blue], 1).clip(0, 1) * value[:, None]
    return np.round(255 * rgb).astype(np.uint8)


def synthetic(size=48, seed=0, sessions=STREAM):
    """Made-up sessions with the counts of DATASETS: a list of Session, size x size pixels. Same seed, same images."""
    code = ast.unparse(ast.parse(inspect.getsource(stream) + inspect.getsource(flow_to_image)))  # without comments
    result = []
    for name in sessions:
        emotions, people = DATASETS[name].emotions, DATASETS[name].subjects
        if None in (people, DATASETS[name].samples) or not set(emotions) <= set(stream.EMOTION_UNITS):
            sys.exit(f"error: {name} cannot be made up: data.py lacks a count, or tiny/stream.py one of its emotions")
        labels, subjects, flows = stream.session(name, emotions, people, size, seed)
        images = np.concatenate([flow_to_image(flow[None]) for flow in progress(flows, name, len(labels))])
        keys = np.array([f"{name}_{e}/sub{s:03d}_{i:04d}.png" for i, (e, s) in enumerate(zip(labels, subjects))])
        order = np.argsort(keys)  # they begin with the emotion
        digest = hashlib.sha256(f"{code} {name} {seed} {emotions} {people}".encode()).hexdigest()
        labels = np.array(labels)[order]
        result.append(Session(name, list(emotions), images[order], labels, subjects[order], keys[order], digest))
    return result
