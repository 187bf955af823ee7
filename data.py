"""What a session is, and where its images come from.

A sample is one image: the optical flow from the onset to the apex frame of a clip, coded as HSV (hue = direction of the
motion, value = its size), or otherwise by others. A session is one dataset of such images, read from a processed folder
(`load`) or made up (`synthetic`). Shapes: N samples of one session, S image side in pixels.
"""

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

# {dataset: {emotion: samples in the official sheet, or None if not known}}: the emotions of Table 1 of arXiv 2501.19111
# in its order, for dfme those of its sheet, for -3 the classes of MEGC 2019 (tools.megc2019). A new dataset is one more
# entry, named in lower case without an underscore.
DATASETS = {
    "casme2": dict(disgust=63, happiness=32, others=99, repression=27, surprise=25),
    "samm": dict(anger=57, contempt=12, happiness=26, others=26, surprise=15),
    "mmew": dict(disgust=72, fear=16, happiness=36, others=66, sad=13, surprise=89),
    "casme3": dict(anger=64, disgust=250, fear=86, happiness=55, others=161, sad=57, surprise=187),
    "dfme": dict(anger=161, contempt=100, disgust=548, fear=265, happiness=206, sad=278, surprise=298),
    "smic-3": dict(negative=70, positive=51, surprise=43),
    "casme2-3": dict(negative=88, positive=32, surprise=25),
    "samm-3": dict(negative=92, positive=26, surprise=15),
    "megc-3": dict(negative=250, positive=109, surprise=83),
}
SUBJECTS = {"casme2": 26, "samm": 27, "mmew": 30, "casme3": 94, "dfme": 176,
            "smic-3": 16, "casme2-3": 24, "samm-3": 28, "megc-3": 68}  # people in the sheets, where known  # fmt: skip
STREAM = ["casme2", "samm", "mmew", "casme3"]  # the paper's four; dfme is an optional fifth
ALIASES = {"other": "others", "happy": "happiness", "sadness": "sad"}  # spellings in sheets and folder names
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".bmp")
OURS = ("folds.csv", "report.csv", "prepare.json")  # files of a processed folder that are no images


@dataclass
class Session:
    """One dataset of the stream. Samples are sorted by (emotion, file name): the same on every file system."""

    name: str  # its word in folder names, e.g. "casme2"
    emotions: list  # its words in the order of DATASETS
    images: np.ndarray  # (N, 3, S, S) uint8 RGB; from `load_sessions` float32 on the device, normalised
    labels: np.ndarray  # (N,) str, the emotion of each sample
    subjects: np.ndarray  # (N,) int; a number means one person within this session only
    keys: np.ndarray  # (N,) str, paths below the processed folder, e.g. "casme2_happiness/sub01_EP02_01f.png"
    digest: str  # a hash of what the images were made of, whatever S is


def progress(items, what, total=None):
    """The items, with a bar on a terminal. Of processes side by side (torchrun) only the first shows one."""
    hidden = True if os.environ.get("RANK", "0") != "0" else None  # None: where there is no terminal
    return tqdm(items, what, total, leave=False, disable=hidden)


def in_sheet(name):
    """Samples of a dataset in its official sheet, or None where an emotion's number is not known."""
    counts = DATASETS[name].values()
    return None if None in counts else sum(counts)


def load_sessions(args, backbone):
    """The sessions of `args`, on args.device, in backbone.image_size and normalised by its mean and std."""
    if args.data is None:
        print(f"Synthetic stream, {args.preset} preset: made-up flow images, numbers not comparable with the paper's.")
        sessions = synthetic(backbone.image_size, sessions=args.sessions)
    else:
        sessions = load(args.data, args.sessions, backbone.image_size)
        texts = []
        for s in sessions:
            people = f"subjects {len(np.unique(s.subjects))} of {SUBJECTS.get(s.name) or '?'}"
            texts.append(f"{s.name} {len(s.keys)} of {in_sheet(s.name) or '?'}, {people}")
        print(f"samples, of those in the official sheets: {'; '.join(texts)}")
    args.images = {"size": backbone.image_size, "mean": backbone.mean, "std": backbone.std}
    for session in sessions:
        session.images = normalise(torch.from_numpy(session.images).to(args.device), backbone.mean, backbone.std)
    return sessions


def normalise(images, mean, std):
    """Images (N, 3, S, S) uint8, on any device, as a backbone expects them: float32, by its mean and std."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return (images.float() / 255 - mean) / std


# ---- a processed folder ----------------------------------------------------------------------------------------------
def load(path, sessions=STREAM, size=224):
    """Read `sessions` from the processed folder `path`, resized (stretched, bilinear) to size x size pixels.

    The layout is that of the released benchmark: one folder per <session>_<emotion>, images inside, the subject being
    the first number in the file name. Returns a list of Session in the order of `sessions`. Ends with one line on what
    cannot be right: a folder, an image, a subject, an image twice, a session without samples.
    """
    emotions = sorted({emotion for counts in DATASETS.values() for emotion in counts})
    found = {name: [] for name in sessions}
    unread = 0
    for folder in sorted(os.listdir(path)):
        inside = os.path.join(path, folder)
        if folder.startswith(".") or not os.path.isdir(inside):
            unread += not folder.startswith(".") and folder not in OURS
            continue
        name, _, word = folder.lower().partition("_")
        emotion = ALIASES.get(word, word)
        if name not in DATASETS or emotion not in emotions:
            known = f"sessions: {', '.join(DATASETS)}; emotions: {', '.join(emotions)}"
            sys.exit(f"error: {inside}: folders are named <session>_<emotion>; {known}")
        if name not in found:
            continue
        files = [file for file in os.listdir(inside) if not file.startswith(".")]
        samples = [file for file in files if file.lower().endswith(IMAGE_TYPES)]
        if name == "dfme":  # other flows lie beside its samples
            samples = [file for file in samples if not re.search(r"_f\d+\.\w+$", file)]
        unread += len(files) - len(samples)
        if emotion in DATASETS[name]:
            found[name] += [(emotion, file, f"{folder}/{file}") for file in samples]
        elif samples:
            print(f"left out: {len(samples)} samples of {folder}, an emotion that this session does not list")
    if unread:
        print(f"not read: {unread} files or folders that are no samples (other extensions, other places)")
    return [_read_session(path, name, sorted(found[name]), size) for name in sessions]


def _read_session(path, name, samples, size):
    """Decode `samples`, a sorted list of (emotion, file name, key), into one Session."""
    if not samples:
        folder = f"{name}_{next(iter(DATASETS[name]))}"
        sys.exit(f"error: {path}: no images of session {name}; expected folders such as {folder}, or other --sessions")
    labels, files, keys = zip(*samples)
    if len({(emotion, os.path.splitext(file)[0]) for emotion, file, _ in samples}) < len(samples):
        sys.exit(f"error: {path}: session {name} has an image twice, in two spellings of a folder or two formats")
    subjects, first = [], {}
    images = np.empty((len(samples), 3, size, size), np.uint8)
    digest = hashlib.sha256()
    for i, key in enumerate(progress(keys, name)):
        file = os.path.join(path, key)
        subject = re.match(r"\D*(\d{1,9})(?!\d)", os.path.splitext(files[i])[0])
        if not subject:
            sys.exit(f"error: {file}: no number of at most 9 digits in the file name; the first one is the subject")
        subjects.append(int(subject.group(1)))
        try:
            with open(file, "rb") as opened:
                content = opened.read()
            images[i] = read_image(io.BytesIO(content), size)
        except Exception as error:  # a damaged file can raise almost anything
            sys.exit(f"error: {file}: not a readable image ({' '.join(str(error).split())})")
        digest.update(os.fsencode(f"{key} {len(content)} ") + content)  # names need not be UTF-8
        twin = first.setdefault(hashlib.sha256(images[i]).digest(), key)
        if twin != key and np.ptp(images[i], (1, 2)).any():  # images of one colour are alike and no copies
            sys.exit(f"error: {file}: the same image as {twin}: one could be in training, the other in the tests")
    people, sheet = len(set(subjects)), SUBJECTS.get(name)
    # Names that begin with an index would make SLCV as easy as ILCV.
    if people > max(sheet or 0, len(samples) / 2) or people > 2 * (sheet or people):
        read = f"its first number, {subjects[-1]}, is taken for the subject"
        sys.exit(f"error: {file}: {read}: {people} subjects in {len(samples)} images, {sheet or '?'} in the sheet")
    columns = np.array(labels), np.array(subjects), np.array(keys)
    return Session(name, list(DATASETS[name]), images, *columns, digest.hexdigest())


def read_image(file, size):
    """An image file as (3, size, size) uint8 RGB, stretched, bilinear. A ValueError if it has more than 8 bits."""
    with Image.open(file, formats=("PNG", "JPEG", "BMP")) as image:
        if image.mode[0] in "IF":
            raise ValueError("more than 8 bits per channel")
        image = image.convert("RGB")
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(image).transpose(2, 0, 1)


# ---- made-up images --------------------------------------------------------------------------------------------------
def flow_to_image(flow):
    """Code flow fields (N, S, S, 2), in pixels, x to the right and y down, as RGB images (N, 3, S, S) uint8.

    HSV with hue = direction, saturation = 1 and value = magnitude scaled from 0 to 1 within each image, as the released
    benchmark does. At full saturation a channel of RGB is a tent over the hue (in sixths of the circle).
    """
    flow = flow.astype(np.float64)  # in float32 processors differ in a last bit, and then pixels do
    magnitude = np.hypot(flow[..., 0], flow[..., 1])
    low = magnitude.min((1, 2), keepdims=True)
    high = magnitude.max((1, 2), keepdims=True)
    value = (magnitude - low) / np.maximum(high - low, 1e-12)
    hue = np.arctan2(flow[..., 1], flow[..., 0]) % (2 * np.pi) * (3 / np.pi)  # 0..6: red, yellow, green, cyan, blue
    tents = np.stack([abs(hue - 3) - 1, 2 - abs(hue - 2), 2 - abs(hue - 4)], 1)  # (N, 3, S, S)
    return np.round(255 * tents.clip(0, 1) * value[:, None]).astype(np.uint8)


def synthetic(size=48, seed=0, sessions=STREAM):
    """Made-up sessions with the counts of DATASETS: a list of Session, size x size pixels. Same seed, same images."""
    code = inspect.getsource(stream) + inspect.getsource(flow_to_image)
    result = []
    for name in sessions:
        emotions, people = DATASETS[name], SUBJECTS.get(name)
        if None in (people, in_sheet(name)) or not set(emotions) <= set(stream.EMOTION_UNITS):
            sys.exit(f"error: {name} cannot be made up: data.py lacks a count, or tiny/stream.py one of its emotions")
        labels, subjects, flows = stream.session(name, emotions, people, size, seed)
        images = np.concatenate([flow_to_image(flow[None]) for flow in progress(flows, name, len(labels))])
        keys = np.array([f"{name}_{e}/sub{s:03d}_{i:04d}.png" for i, (e, s) in enumerate(zip(labels, subjects))])
        order = np.argsort(keys)  # they begin with the emotion
        digest = hashlib.sha256(f"{code} {name} {seed} {emotions} {people}".encode()).hexdigest()
        columns = np.array(labels)[order], subjects[order], keys[order]
        result.append(Session(name, list(emotions), images[order], *columns, digest))
    return result
