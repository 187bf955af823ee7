"""What a session is, and where its images come from.

A micro-expression sample is one picture: the optical flow from the onset to the apex frame of a clip, coded as HSV
(hue = direction of the motion, value = its size). A session is one dataset of such pictures. This file reads sessions
from a processed folder (`load`) or makes up a stream that resembles them (`synthetic`), and knows which emotions each
dataset contributes (Table 1 of arXiv 2501.19111).

Shapes: N samples of one session, S image side in pixels, K bumps of motion.

Commands, at the end of the file:
    python data.py export --out DIR              write the synthetic stream as a processed folder of PNG files
    python data.py show [--data DIR] --out FILE  contact sheet: one row per session, samples of each emotion
    python data.py check [--data DIR]            samples, subjects and emotions beside the official sheets' counts
    python data.py prepare --raw RAW --out OUT   optical flow of the datasets as downloaded, as a processed folder
"""

import argparse
import csv
import functools
import hashlib
import inspect
import io
import json
import math
import os
import re
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np
import PIL
from PIL import Image, ImageDraw

# Table 1: the emotions of each session in their order, with the number of subjects and samples that the official
# annotation sheets hold once every other emotion (and SAMM's with fewer than 10 samples) is left out.
SUBJECTS = {"casme2": 26, "samm": 27, "mmew": 30, "casme3": 94, "dfme": 176}
COUNTS = {
    "casme2": {"disgust": 63, "happiness": 32, "others": 99, "repression": 27, "surprise": 25},
    "samm": {"anger": 57, "contempt": 12, "happiness": 26, "others": 26, "surprise": 15},
    "mmew": {"disgust": 72, "fear": 16, "happiness": 36, "others": 66, "sad": 13, "surprise": 89},
    "casme3": {"anger": 64, "disgust": 250, "fear": 86, "happiness": 55, "others": 161, "sad": 57, "surprise": 187},
    "dfme": {"anger": 161, "contempt": 100, "disgust": 548, "fear": 265, "happiness": 206, "sad": 278, "surprise": 298},
}
TABLE1 = {session: list(counts) for session, counts in COUNTS.items()}
STREAM = ["casme2", "samm", "mmew", "casme3"]  # the paper's four sessions; dfme is an optional fifth
EMOTIONS = sorted({emotion for emotions in TABLE1.values() for emotion in emotions})
ALIASES = {"other": "others", "happy": "happiness", "sadness": "sad"}  # spellings found in the sheets and in folders
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".bmp")


@dataclass
class Session:
    """One dataset of the stream.

    name      its word in folder names, e.g. "casme2"
    images    (N, 3, S, S) uint8, RGB
    emotions  N normalised emotion words
    subjects  (N,) int; a number means one person within this session only
    keys      N paths below the processed folder, e.g. "casme2_happiness/sub01_EP02_01f.png"
    Samples are sorted by (emotion, file name), so folds are the same on every file system.
    """

    name: str
    images: np.ndarray
    emotions: list
    subjects: np.ndarray
    keys: list


def fail(message):
    """A user's mistake: one line on stderr and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def argument_parser(description, epilog=None):
    """A command line whose errors are one line, as of `fail`, and whose help keeps the text's line breaks."""
    formatter = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=formatter)
    p.error = lambda message: fail(f"{message}; see --help")
    return p


# ---- a processed folder ----------------------------------------------------------------------------------------------
def load(path, sessions=STREAM, size=224):
    """Read `sessions` from the processed folder `path`, resized (stretched, bilinear) to size x size pixels.

    The layout is that of the released benchmark: one folder per <session>_<emotion>, images inside, the subject being
    the first number in the file name. Returns a list of Session in the order of `sessions`. Ends with one line on an
    unknown folder, an unreadable image, a name without a number or a session without samples. Emotions outside the
    session's Table 1 set are left out and counted on the screen.
    """
    if not os.path.isdir(path):
        fail(f"{path}: no such folder; --data takes a processed folder with one folder per <session>_<emotion>")
    try:
        found = _find_samples(path, sessions)
    except OSError as error:
        fail(f"{error.filename}: cannot be read ({error.strerror})")
    return [_read_session(path, session, sorted(found[session]), size) for session in sessions]


def _find_samples(path, sessions):
    """The samples of each session: {session: list of (emotion, file name, key, subject)}."""
    found = {session: [] for session in sessions}
    left_out = {}
    for folder in sorted(os.listdir(path)):
        if folder.startswith(".") or not os.path.isdir(os.path.join(path, folder)):
            continue
        session, _, word = folder.lower().partition("_")
        emotion = ALIASES.get(word, word)
        if session not in TABLE1 or emotion not in EMOTIONS:
            fail(f"{os.path.join(path, folder)}: folders are named <session>_<emotion>; sessions: {', '.join(TABLE1)};"
                 f" emotions: {', '.join(EMOTIONS)}")  # fmt: skip
        if session not in found:
            continue
        for name in sorted(os.listdir(os.path.join(path, folder))):
            stem, extension = os.path.splitext(name)
            # DFME's auxiliary flows end in _f<number>; they lie beside the samples but are not samples.
            if name.startswith(".") or extension.lower() not in IMAGE_TYPES or re.search(r"_f\d+$", stem):
                continue
            if emotion not in TABLE1[session]:
                left_out[folder] = left_out.get(folder, 0) + 1
                continue
            subject = re.search(r"\d+", stem)
            if not subject or int(subject.group()) >= 2**31:
                problem = "too large a first number" if subject else "no number"
                fail(f"{os.path.join(path, folder, name)}: {problem} in the file name; the first number is the subject")
            found[session].append((emotion, name, f"{folder}/{name}", int(subject.group())))
    for folder, count in left_out.items():
        print(f"left out: {count} samples of {folder}, an emotion that Table 1 does not list for this session")
    return found


def _read_session(path, name, samples, size):
    """Decode `samples`, a sorted list of (emotion, file name, key, subject), into one Session."""
    if not samples:
        fail(f"{path}: no images of session {name}; expected folders such as {name}_{TABLE1[name][0]}")
    emotions, _, keys, subjects = (list(column) for column in zip(*samples))
    images = np.empty((len(samples), 3, size, size), np.uint8)
    for i, key in enumerate(keys):
        try:
            with Image.open(os.path.join(path, key), formats=("PNG", "JPEG", "BMP")) as image:
                if image.mode[0] in "IF":
                    raise ValueError("more than 8 bits per channel")
                image = image.convert("RGB")
                if image.size != (size, size):
                    image = image.resize((size, size), Image.Resampling.BILINEAR)
                images[i] = np.asarray(image).transpose(2, 0, 1)
        except Exception as error:  # a damaged file can raise almost anything
            fail(f"{os.path.join(path, key)}: not a readable image ({' '.join(str(error).split())})")
    return Session(name, images, emotions, np.array(subjects), keys)


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


# ---- the synthetic stream --------------------------------------------------------------------------------------------
# A small generative model of the real input. A face spans about [-1, 1] in x (right) and y (down), nose at the origin.
# Where each action unit moves the skin, and in which direction, on the right half of the picture; the left mirrors it.
ACTION_UNITS = {  # x, y, dx, dy, width
    1: (0.18, -0.50, 0.0, -1.0, 0.16),  # inner brow raiser
    2: (0.50, -0.55, 0.1, -1.0, 0.16),  # outer brow raiser
    4: (0.24, -0.42, -0.6, 0.8, 0.16),  # brow lowerer
    5: (0.38, -0.30, 0.0, -1.0, 0.10),  # upper lid raiser
    6: (0.52, -0.05, -0.3, -0.9, 0.18),  # cheek raiser
    7: (0.38, -0.20, -0.4, -0.6, 0.10),  # lid tightener
    9: (0.12, 0.02, 0.0, -1.0, 0.12),  # nose wrinkler
    10: (0.16, 0.32, 0.1, -1.0, 0.12),  # upper lip raiser
    12: (0.36, 0.46, 0.8, -0.6, 0.15),  # lip corner puller
    14: (0.40, 0.48, 0.9, 0.1, 0.12),  # dimpler
    15: (0.34, 0.58, 0.3, 0.9, 0.14),  # lip corner depressor
    17: (0.08, 0.78, 0.0, -1.0, 0.16),  # chin raiser
    20: (0.38, 0.54, 1.0, 0.3, 0.14),  # lip stretcher
    24: (0.14, 0.48, -0.9, 0.1, 0.10),  # lip pressor
    26: (0.08, 0.72, 0.0, 1.0, 0.20),  # jaw drop
}
# How often each unit takes part in an emotion.
EMOTION_UNITS = {
    "anger": {4: 0.9, 7: 0.6, 24: 0.5},
    "contempt": {14: 0.9, 12: 0.3},
    "disgust": {9: 0.8, 10: 0.6, 4: 0.5},
    "fear": {1: 0.6, 4: 0.4, 5: 0.5, 20: 0.7},
    "happiness": {12: 0.95, 6: 0.6},
    "others": {4: 0.7, 7: 0.4, 14: 0.3, 24: 0.1},
    "repression": {17: 0.8, 15: 0.5, 24: 0.4},
    "sad": {15: 0.7, 1: 0.5, 4: 0.4, 17: 0.4},
    "surprise": {1: 0.9, 2: 0.8, 5: 0.4, 26: 0.4},
}
# Each session's recording: half the face's height as a share of half the picture's, its spread, the spread of the
# face's place, of its rotation (radians), the size of head motion and of noise (a strong bump moves by 1), extra blur.
CAMERAS = {  # scale, its spread, shift, rotation, head, noise, blur
    "casme2": (0.95, 0.05, 0.05, 0.05, 0.10, 0.10, 0.05),
    "samm": (0.90, 0.06, 0.06, 0.06, 0.14, 0.12, 0.03),
    "mmew": (1.05, 0.06, 0.06, 0.06, 0.12, 0.12, 0.06),
    "casme3": (0.60, 0.08, 0.12, 0.08, 0.20, 0.16, 0.04),
    "dfme": (0.80, 0.08, 0.10, 0.08, 0.16, 0.14, 0.04),
}


def synthetic(size=48, seed=0, sessions=STREAM):
    """Made-up sessions with the official sheets' sample, subject and emotion counts: a list of Session, size x size.

    The same seed gives the same images. It was calibrated on a control without any network (RanPAC's ridge on 12 x 12
    pixels) and on nothing else. Its numbers say nothing about real micro-expressions.
    """
    seeds = {name: [seed, number] for number, name in enumerate(TABLE1)}  # a session is the same in any company
    return [_synthetic_session(name, size, np.random.RandomState(seeds[name])) for name in sessions]


def _synthetic_session(name, size, random):
    people = [_synthetic_subject(random) for _ in range(SUBJECTS[name])]
    emotions = [emotion for emotion, count in COUNTS[name].items() for _ in range(count)]
    # Emotions are dealt unevenly: each has its own few frequent subjects; then everyone gets at least one sample.
    shares = {emotion: random.dirichlet([0.4] * len(people)) for emotion in COUNTS[name]}
    owners = np.array([random.choice(len(people), p=shares[emotion]) for emotion in emotions])
    for person in sorted(set(range(len(people))) - set(owners)):
        owners[random.choice(np.flatnonzero(owners == np.bincount(owners).argmax()))] = person
    flows = (_synthetic_flow(CAMERAS[name], people[o], e, size, random) for o, e in zip(owners, emotions))
    images = np.concatenate([flow_to_image(flow[None]) for flow in flows])
    keys = [f"{name}_{e}/sub{o + 1:03d}_{i:04d}.png" for i, (o, e) in enumerate(zip(owners, emotions))]
    order = sorted(range(len(keys)), key=lambda i: (emotions[i], keys[i]))
    emotions, keys = [emotions[i] for i in order], [keys[i] for i in order]
    return Session(name, images[order], emotions, owners[order] + 1, keys)


def _synthetic_subject(random):
    """A person: what is the same in all of their samples."""
    return {
        "shape": random.normal(1, 0.08, 2),  # width and height of the face
        "places": {unit: random.normal(0, 0.04, 2) for unit in ACTION_UNITS},  # where each unit sits
        "gains": {unit: np.exp(random.normal(0, 0.5)) for unit in ACTION_UNITS},  # how strongly each moves
        "sides": random.normal(0, 0.3),  # asymmetry: the right half's gain against the left's
        "habit": random.choice(list(ACTION_UNITS)),  # a movement of their own, whatever the emotion
        "head": random.normal(0, 0.8, 2),  # where the head tends to go, in units of the camera's head motion
        "shift": random.normal(0, 1, 2),  # how their face was cropped, in units of the camera's spread
    }


def _synthetic_flow(camera, person, emotion, size, random):
    """One sample's flow field (S, S, 2)."""
    scale, scale_spread, shift_spread, rotation_spread, head, noise, blur = camera
    # The crop: which place of the face each pixel shows.
    angle, zoom = random.normal(0, rotation_spread), scale * np.exp(random.normal(0, scale_spread))
    shift = shift_spread * (0.7 * person["shift"] + 0.7 * random.normal(0, 1, 2))
    line = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = line[None, :] - shift[0], line[:, None] - shift[1]  # (1, S), (S, 1)
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    x, y = cos * x + sin * y, cos * y - sin * x  # (S, S) each, in the face's own coordinates
    # The emotion's action units, the person's habit, and now and then a unit that means nothing.
    chances = {unit: 0.04 for unit in ACTION_UNITS} | {person["habit"]: 0.5} | EMOTION_UNITS[emotion]
    strength = np.exp(random.normal(0, 0.3))
    bumps = []
    for unit, (place_x, place_y, dx, dy, width) in ACTION_UNITS.items():
        if random.rand() < chances[unit]:
            gain = strength * person["gains"][unit] * np.exp(random.normal(0, 0.3))
            place_x, place_y = (np.array([place_x, place_y]) + person["places"][unit]) * person["shape"]
            for side in (1, -1):
                side_gain = gain * max(0.0, 1 + side * (person["sides"] + random.normal(0, 0.2)))
                bumps.append((side * place_x, place_y, side * side_gain * dx, side_gain * dy, np.hypot(width, blur)))
    flow = np.zeros((size, size, 2))
    if bumps:
        bump_x, bump_y, dx, dy, width = np.array(bumps).T[:, :, None, None]  # (K, 1, 1) each
        shape = np.exp(-((x - bump_x) ** 2 + (y - bump_y) ** 2) / (2 * width**2))  # (K, S, S)
        flow += np.stack([(shape * dx).sum(0), (shape * dy).sum(0)], -1)
    # The head moves a little, as one piece, and the flow is noisy.
    oval = np.exp(-(((x / 0.9) ** 2 + (y / 1.1) ** 2) ** 2))[..., None]
    turn, nod = head * random.normal(0, 0.5, 2)
    flow += oval * np.stack([-turn * y + nod * x, turn * x + nod * y], -1)
    flow += oval * head * (person["head"] + random.normal(0, 0.6, 2))
    return flow + noise * smooth_noise(random, 1, size, 12)[0]


def smooth_noise(random, count, size, grid):
    """Fields (count, S, S, 2) of unit normal noise on a coarse grid x grid, interpolated linearly to S x S."""
    place = np.linspace(0, grid - 1, size)
    up = np.maximum(0, 1 - abs(place[:, None] - np.arange(grid)))  # (S, grid)
    return np.einsum("yg,xh,nghc->nyxc", up, up, random.randn(count, grid, grid, 2), optimize=True)


# ======================================================================================================================
# Commands. No method needs them to be read.
# ======================================================================================================================
def export(out, size):
    """Write the synthetic stream as a processed folder of PNG files: load() then reads the very same images."""
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        fail(f"{out}: exists already; --out takes a new or an empty folder")
    part = f"{out.rstrip(os.sep)}.part"  # renamed when complete, so a folder with this name is never half a stream
    count = 0
    try:
        for session in synthetic(size):
            for image, key in zip(session.images, session.keys):
                os.makedirs(os.path.dirname(os.path.join(part, key)), exist_ok=True)
                Image.fromarray(image.transpose(1, 2, 0)).save(os.path.join(part, key))
                count += 1
        os.replace(part, out)
    except OSError as error:
        fail(f"{out}: cannot be written ({error.strerror})")
    print(f"{out}: {count} synthetic images of {size} x {size} pixels")


def show(sessions, out, each=3, side=56):
    """Contact sheet: one row per session; of each emotion, by name, one image of each of the first `each` subjects."""
    widest = max(len(TABLE1[session.name]) for session in sessions)
    margin, gap, band = 70, 10, 16
    sheet = Image.new("RGB", (margin + widest * (each * side + gap), len(sessions) * (side + band + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, session in enumerate(sessions):
        top = row * (side + band + gap) + gap // 2
        draw.text((6, top + band + side // 2 - 6), session.name, fill="black")
        for column, emotion in enumerate(TABLE1[session.name]):
            left = margin + column * (each * side + gap)
            own = [i for i, word in enumerate(session.emotions) if word == emotion]
            draw.text((left, top), f"{emotion} ({len(own)})", fill="black")
            firsts = list({session.subjects[i]: i for i in reversed(own)}.values())[::-1]
            for place, i in enumerate((firsts + [i for i in own if i not in firsts])[:each]):
                image = Image.fromarray(session.images[i].transpose(1, 2, 0)).resize((side, side))
                sheet.paste(image, (left + place * side, top + band))
    try:
        sheet.save(out)
    except (OSError, ValueError) as error:
        fail(f"{out}: cannot be written ({error})")
    print(f"{out}: {len(sessions)} sessions")


def check(sessions):
    """Print samples, subjects and emotions of each session, beside the official sheets' counts."""
    for session in sessions:
        counts = COUNTS[session.name]
        print(f"{session.name:7s} {len(session.keys):5d} samples of {sum(counts.values()):5d}"
              f"  {len(set(session.subjects.tolist())):4d} subjects of {SUBJECTS[session.name]:4d}")  # fmt: skip
        for emotion, count in counts.items():
            own = session.emotions.count(emotion)
            print(f"    {emotion:11s} {own:5d} of {count:5d}" + ("" if own == count else f"   {own - count:+d}"))


# ---- prepare: from the official downloads to a processed folder ------------------------------------------------------
PAGES = {  # each dataset's title, and where it is requested
    "casme2": ("CASME II", "http://casme.psych.ac.cn/casme/e2"),
    "samm": ("SAMM", "http://www2.docm.mmu.ac.uk/STAFF/M.Yap/dataset.php"),
    "mmew": ("MMEW", "http://www.dpailab.com/database.html"),
    "casme3": ("CAS(ME)^3", "http://casme.psych.ac.cn/casme/e4"),
    "dfme": ("DFME", "https://mea-lab-421.github.io"),
}
SHEETS = {  # names of the annotation sheet, best first; a file's name may also just contain it
    "casme2": ("CASME2-coding-20140508", "CASME2-coding-20190701", "CASME2-coding"),  # Table 1 counts the first one
    "samm": ("SAMM_Micro_FACS_Codes_v2", "Micro_FACS_Codes"),
    "mmew": ("MMEW_Micro_Exp",),
    "casme3": ("cas(me)3_part_A_ME_label_JpgIndex_v2", "part_A_ME_label_JpgIndex"),
    "dfme": ("training_full_with_AU", "coding"),  # Table 1 counts the training part of the challenge
}
# The header cells that are looked for, as regular expressions for what _plain leaves of a cell.
COLUMNS = {"subject": "subject", "clip": "filename", "onset": "onset(frame)?", "apex": "apex(frame)?",
           "offset": "offset(frame)?", "emotion": "(estimated)?emotion"}  # fmt: skip
RENAMED = {"mmew": {"repression": "others"}}  # the official page's word for what the sheet calls others
CLIPS = {  # the end of a clip folder's path, or a landmark file's, in lower case; groups: subject, clip, onset
    "casme2": r"sub(\d+)/(ep[\w-]+)",
    "samm": r"(\d{3}_\d+_\d+)",
    "mmew": r"(s\d+-\d+-\d+)",
    "casme3": r"spno\.?(\d+)/([a-z])/color(?:/color)?|spno\.?(\d+)_([a-z])_(\d+)",
    "dfme": r"(sub\d+_\d+)",
}
# Folders passed by: MMEW's macro-expressions have the same clip names; CAS(ME)^3 has depth maps and other parts too.
SKIPPED = {"mmew": r"macro.*", "casme3": r"depth|(.*_)?mae(_.*)?|part_?[bc](_.*)?"}
DIGITS = {"casme2": 2, "samm": 3, "mmew": 2, "casme3": 3, "dfme": 4}  # of the subject in the names that are written
REPORT = ("dataset", "subject", "clip", "onset", "apex", "offset", "emotion", "reason", "detail", "row")
# The released benchmark's parameters of OpenCV's calcOpticalFlowFarneback.
FARNEBACK = {"pyr_scale": 0.5, "levels": 3, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.2, "flags": 0}
CHIN, BROW, NOSE_TIP, LOWER_LIP = 8, 19, 30, 57  # of the 68 landmarks, counted from 0


def prepare(raw, out, sessions, landmarks=None, size=256):
    """Optical flow from onset to apex of every usable row of the datasets' own sheets, written as a processed folder.

    RAW holds one folder per session, with the sheet and the clip folders anywhere below it, as they were unpacked:
        casme2  CASME2-coding-20140508.xlsx, CASME2_RAW_selected/sub01/EP02_01f/img46.jpg
                or Cropped/sub01/EP02_01f/reg_img46.jpg
        samm    SAMM_Micro_FACS_Codes_v2.xlsx, 006/006_1_2/006_05562.jpg
        mmew    MMEW_Micro_Exp.xlsx, Micro_Expression/happiness/S03-01-002/1.jpg or S03/happiness/S03-01-002/1.jpg
        casme3  cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx, part_A/data/spNO.1/a/color/355.jpg
                or Part_A_ME_clip/frame/spNo.1_a_355/355.jpg
        dfme    training_full_with_AU.xlsx, train_data/sub0003_01/00046.png
    Sheets may be .xlsx or .csv. Their labels count, never the folders' names, and Table 1 says which labels stay.

    --landmarks DIR crops the face (crop_box says how). DIR holds a folder per session with NumPy files (.npy) of 68
    points as (x, y) in pixels of the frames, shape (68, 2), named as in the released benchmark's landmarks.zip:
        casme2/sub01/EP02_01f.npy, samm/006/006_1_2.npy, mmew/happiness/S03-01-002/S03-01-002.npy,
        casme3/spNO.1/a/color/color.npy (one per recording), dfme/sub0003_01.npy
    A session without a folder in DIR keeps whole frames, as mmew and casme3 do in the released benchmark. Where both
    raw and cropped frames are there, the raw ones are used with landmarks and the cropped ones without.

    OUT gets <session>_<emotion>/sub<subject>_<clip>_onset<frame>_apex<frame>.png, size x size pixels; report.csv, the
    rows left out, each with its reason; prepare.json, what the images depend on. Images that are there already are
    kept, so a second run makes only what is missing; with other settings it is refused.
    """
    try:
        import cv2
    except ImportError:
        fail("prepare needs the package opencv-python-headless: pip install opencv-python-headless")
    for path, option in ((raw, "--raw"), (landmarks, "--landmarks")):
        if path is not None and not os.path.isdir(path):
            fail(f"{path}: no such folder; {option} takes a folder that holds {', '.join(sessions)}; see --help")
    if landmarks is not None and not any(_session_folder(landmarks, session) for session in sessions):
        fail(f"{landmarks}: holds none of the folders {', '.join(sessions)}; see --help for how landmarks are named")
    plans = {session: _plan(raw, landmarks, session, out) for session in sessions}
    versions = {"opencv": cv2.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
    chosen = {session: plan["settings"] for session, plan in plans.items()}
    _settle(out, {"size": size, "farneback": FARNEBACK, "versions": [versions], "sessions": chosen})

    usable = [(plan, row) for plan in plans.values() for row in plan["rows"] if not row["reason"]]
    todo = [(plan, row) for plan, row in usable if not os.path.exists(row["path"])]
    print(f"{out}: {len(usable) - len(todo)} images are there already, {len(todo)} to make", flush=True)
    began = time.monotonic()
    for done, (plan, row) in enumerate(todo, 1):
        image, row["reason"], row["detail"] = _flow_image(row, plan, size)
        if image is not None:
            png = io.BytesIO()
            image.save(png, "PNG")
            _write(row["path"], png.getvalue())
        line = f"{done} of {len(todo)} done, {(time.monotonic() - began) / done * (len(todo) - done):.0f} s left"
        if sys.stdout.isatty():
            print(f"\r{line:50s}", end="\n" if done == len(todo) else "", flush=True)
        elif done % max(1, len(todo) // 10) == 0:
            print(line, flush=True)
    _report(os.path.join(out, "report.csv"), plans)


def _plan(raw, landmarks, session, out):
    """All that is known of a session before a frame is read: its rows, clip folders, landmark files and settings."""
    title, page = PAGES[session]
    root = _session_folder(raw, session)
    if root is None:
        found = ", ".join(sorted(os.listdir(raw))[:8]) or "nothing"
        fail(f"{raw}: no folder {session}, found {found}; {title} is requested at {page}, --sessions can leave it out")
    folders, files = _explore(root, session)
    sheet = _find_sheet(session, root, files)
    rows = read_sheet(session, sheet)
    _judge(session, rows, out)
    marks, place = None, _session_folder(landmarks, session) if landmarks else None
    if place:
        files = [os.path.join(folder, name) for folder, _, names in os.walk(place) for name in names]
        marks = {_clip_key(path[:-4], session): [path] for path in files if path.lower().endswith(".npy")}
        if not any(marks):
            fail(f"{place}: no landmark files; see --help for how they are named")
    # Cropped frames are faces already; the landmarks of the released benchmark were measured in raw frames.
    kinds = [kind for kind in (("raw", "cropped") if place else ("cropped", "raw")) if folders[kind]]
    if not kinds:
        fail(f"{root}: no clip folders of {title}; see --help for the expected names, {page} for the dataset")
    settings = {
        "sheet": os.path.relpath(sheet, root),
        "sheet_sha256": _sha256([sheet]),
        "frames": kinds[0],
        "crop": "landmarks" if place else "whole frame",
        "landmarks_sha256": _sha256([path for paths in marks.values() for path in paths]) if place else None,
    }
    clips, twice = folders[kinds[0]], sum(len(paths) > 1 for paths in folders[kinds[0]].values())
    print(f"{session}: {len(rows)} rows in {settings['sheet']}, {len(clips)} clip folders of {kinds[0]} frames"
          + (f" (the {kinds[1]} ones are not used)" if kinds[1:] else "")
          + (f" ({twice} clips are in several folders, the first is used)" if twice else "")
          + f", {settings['crop']}", flush=True)  # fmt: skip
    return {"root": root, "rows": rows, "clips": clips, "marks": marks, "settings": settings}


def _plain(text):
    """Letters and digits in lower case, so that CAS(ME)^3 equals casme3 and "Onset Frame" equals OnsetFrame."""
    return re.sub(r"[\W_]", "", str(text).lower())


def _session_folder(path, session):
    """The folder in `path` that is named by a session's word or by its dataset's title, or None."""
    names = (session, _plain(PAGES[session][0]))
    paths = [os.path.join(path, name) for name in sorted(os.listdir(path)) if _plain(name) in names]
    return next(filter(os.path.isdir, paths), None)


def _sha256(paths):
    digest = hashlib.sha256()
    for path in sorted(paths):
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def _explore(root, session):
    """Walk below `root`: clip folders {"raw" | "cropped": {key: paths}}, and the paths of all files outside of them."""
    folders, files = {"raw": {}, "cropped": {}}, []
    for folder, children, names in os.walk(root, followlinks=True):
        files += [os.path.join(folder, name) for name in names]
        for name in list(children):
            path = os.path.join(folder, name)
            key = _clip_key(path, session)
            skipped = name[0] in "._" or re.fullmatch(SKIPPED.get(session, ""), name.lower())
            if key or skipped:
                children.remove(name)  # not entered: CAS(ME)^3 has millions of frames
            if key and not skipped:
                kind = "cropped" if "crop" in os.path.relpath(path, root).lower() else "raw"
                folders[kind].setdefault(key, []).append(path)
    return {kind: {key: sorted(paths) for key, paths in found.items()} for kind, found in folders.items()}, files


def _clip_key(path, session):
    """What a path's end tells: (clip,), (subject, clip) or (subject, clip, onset), in lower case, or None."""
    match = re.fullmatch(rf"(?:.*/)?(?:{CLIPS[session]})", path.lower().replace(os.sep, "/"))
    return match and tuple(int(group) if group.isdigit() else group for group in match.groups() if group)


def _of_clip(index, row):
    """The first path that `index` has for a row's clip, or None."""
    keys = [(row["subject"], row["clip"].lower(), row["onset"]), (row["subject"], row["clip"].lower())]
    return next((index[key][0] for key in [*keys, keys[1][1:]] if key in index), None)


def _find_sheet(session, root, files):
    """The path of a session's annotation sheet among the files."""
    tables = [path for path in sorted(files) if re.fullmatch(r"[^.~].*\.(xlsx?|csv)", os.path.basename(path).lower())]
    for sheet in SHEETS[session]:
        ranks = {}  # the very name goes before one that only contains it, an .xlsx before the .csv made from it
        for path in tables:
            stem, extension = os.path.splitext(os.path.basename(path).lower())
            if extension != ".xls" and _plain(sheet) in _plain(stem):
                ranks[path] = (_plain(stem) != _plain(sheet), extension == ".csv")
        found = [path for path in ranks if ranks[path] == min(ranks.values())]
        if len({_sha256([path]) for path in found}) > 1:
            fail(f"{root}: several sheets could be the right one, keep one: {', '.join(found)}")
        if found:
            return found[0]
    found = ", ".join(map(os.path.basename, tables)) or "no table at all"
    fail(f"{root}: no annotation sheet {SHEETS[session][0]}.xlsx or .csv (save an .xls as .xlsx), found {found};"
         f" {PAGES[session][0]} is requested at {PAGES[session][1]}")  # fmt: skip


def _tables(path):
    """The worksheets of a file, each a list of rows of cells."""
    if path.lower().endswith(".csv"):
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            lines = file.read().splitlines(keepends=True)
        return [list(csv.reader(lines, delimiter=delimiter)) for delimiter in ",;\t"]  # one of them finds the columns
    try:
        import openpyxl
    except ImportError:
        fail(f"{path}: reading it needs the package openpyxl: pip install openpyxl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about features of Excel that openpyxl does not know
        book = openpyxl.load_workbook(path, data_only=True)
    return [list(sheet.iter_rows(values_only=True)) for sheet in book.worksheets]


def read_sheet(session, path):
    """The rows of an annotation sheet, wherever its header and its columns stand: a list of dicts of stripped text.

    Keys: dataset, subject, clip, onset, apex, offset, emotion, and row, the row's number in the sheet counted from 1.
    Ends with one line if the file is unreadable or lacks a column.
    """
    try:
        tables = _tables(path)
    except Exception as error:  # openpyxl lets through whatever its parsers raise
        fail(f"{path}: not a readable {os.path.splitext(path)[1]} file ({' '.join(str(error).split())})")
    seen = "no cell Subject"
    for table in tables:
        for start, header in enumerate(table, 1):
            names = [_plain(cell) for cell in header]
            places = {key: [i for i, name in enumerate(names) if re.fullmatch(COLUMNS[key], name)] for key in COLUMNS}
            if not all(places.values()):
                if "subject" in names:
                    seen = "only the columns " + ", ".join(str(cell) for cell in header if cell)
                continue
            rows = []
            for number, cells in enumerate(table[start:], start + 1):
                cells = ["" if cell is None else str(cell).strip() for cell in cells] + [""] * len(header)
                row = {key: cells[place[0]] for key, place in places.items()}
                if any(row.values()):
                    rows.append({"dataset": session, **row, "row": number})
            return rows
    fail(f"{path}: has {seen}; needed: Subject, Filename, Onset[Frame], Apex[Frame], Offset[Frame], [Estimated]"
         f" Emotion, as in the sheet of {PAGES[session][0]} ({PAGES[session][1]})")  # fmt: skip


def _judge(session, rows, out):
    """Normalise the rows in place and add the image's path, or the reason why the sheet alone rules a row out.

    Wrong rows are never repaired: the circulating copies of the sheets do so and disagree.
    """
    seen = {}
    for row in rows:
        word, subject = row["emotion"].lower(), re.search(r"\d+", row["subject"])
        frames = [re.fullmatch(r"(\d+)(\.0*)?", row[name]) for name in ("onset", "apex", "offset")]
        row["emotion"] = (ALIASES | RENAMED.get(session, {})).get(word, word) or "(blank)"
        row["subject"] = int(subject.group()) if subject else row["subject"]
        row["detail"] = ""
        if row["emotion"] not in TABLE1[session]:
            row["reason"] = "emotion outside Table 1"
            continue
        if not subject or not row["clip"]:
            row["reason"] = "no subject or no file name"
            continue
        if not all(frames):
            row["reason"] = "onset, apex or offset is not a number"
            continue
        onset, apex, offset = [int(frame.group(1)) for frame in frames]
        row |= {"onset": onset, "apex": apex, "offset": offset}
        # One recording of CAS(ME)^3 holds several micro-expressions.
        key = (row["subject"], row["clip"].lower(), onset if session == "casme3" else None)
        if offset == 0:
            row["reason"] = "offset is 0"
        elif not onset <= apex <= offset:
            row["reason"] = "apex outside onset..offset"
        elif onset == apex:
            row["reason"] = "onset = apex"
        elif key in seen:
            row["reason"], row["detail"] = "same clip as another row", f"row {seen[key]} is used"
        else:
            seen[key] = row["row"]
            row["reason"] = ""
            clip = re.sub(r"[^\w.-]", "-", row["clip"])
            name = f"sub{row['subject']:0{DIGITS[session]}d}_{clip}_onset{onset}_apex{apex}.png"
            row["path"] = os.path.join(out, f"{session}_{row['emotion']}", name)


@functools.lru_cache(maxsize=4)  # a recording's rows stand together; all recordings' frames would fill the memory
def _frames(folder):
    """The image files of a clip folder by the last number in their names: {number: names}."""
    frames = {}
    for name in sorted(os.listdir(folder)):
        stem, extension = os.path.splitext(name)
        numbers = re.findall(r"\d+", stem)
        if numbers and name[0] != "." and extension.lower() in IMAGE_TYPES:
            frames.setdefault(int(numbers[-1]), []).append(name)
    return frames


def _flow_image(row, plan, size):
    """The flow image of a row, a PIL image, "", ""; or None, the reason why there is none and its detail."""
    folder = _of_clip(plan["clips"], row)
    if folder is None:
        return None, "no clip folder", ""
    images, where = [], os.path.relpath(folder, plan["root"])
    for name in ("onset", "apex"):
        files = _frames(folder).get(row[name], [])
        if len(files) != 1:
            return None, f"{name} frame {'found twice' if files else 'missing'}", f"frame {row[name]} in {where}"
        try:
            with Image.open(os.path.join(folder, files[0])) as image:
                images.append(image.convert("L"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return None, f"{name} frame cannot be decoded", os.path.join(where, files[0])
    if images[0].size != images[1].size:
        return None, "onset and apex frame differ in size", where
    box = None
    if plan["marks"] is not None:
        path = _of_clip(plan["marks"], row)
        if path is None:
            return None, "no landmarks", ""
        try:
            box = crop_box(np.asarray(np.load(path)), *images[0].size)
        except Exception as error:  # a damaged file can raise almost anything
            return None, "landmarks cannot be used", " ".join(str(error).split())
    # Flow at the frames' own resolution, as in the released benchmark: a stretched frame would change its directions.
    onset, apex = (np.asarray(image.crop(box) if box else image) for image in images)
    if np.array_equal(onset, apex):
        return None, "onset and apex frame are the same picture", where
    coded = Image.fromarray(flow_to_image(flow_between(onset, apex)[None])[0].transpose(1, 2, 0))
    return coded.resize((size, size), Image.Resampling.BILINEAR), "", ""


def crop_box(points, width, height):
    """The face in a frame of width x height pixels: (left, top, right, bottom), cut off at the frame's edges.

    points: 68 landmarks (68, 2) as (x, y) in pixels. The box is a square around the tip of the nose. Its side is the
    released benchmark's: the height from brow to chin plus that from lower lip to chin. (The benchmark reads the centre
    as (y, x), which moves the crop off the face.) ValueError if the points cannot belong to the frame.
    """
    if points.shape != (68, 2) or not np.isfinite(points).all():
        raise ValueError(f"shape {points.shape} or values, needed (68, 2) and finite")
    # A chin may lie a little below the frame; points measured in other frames lie far outside.
    if (abs(points / (width, height) - 0.5) > 0.6).any():
        raise ValueError(f"points lie outside of the frame of {width} x {height} pixels")
    x, y = points[NOSE_TIP]
    half = (2 * points[CHIN, 1] - points[BROW, 1] - points[LOWER_LIP, 1]) / 2
    left, right = max(0, math.floor(x - half)), min(width, math.floor(x + half))
    top, bottom = max(0, math.floor(y - half)), min(height, math.floor(y + half))
    if right <= left or bottom <= top:
        raise ValueError("the chin is not below the brow and the lip")
    return left, top, right, bottom


def flow_between(onset, apex):
    """Farneback flow (H, W, 2) float32 from onset to apex, grey images (H, W) uint8; x to the right, y down, pixels."""
    import cv2

    return cv2.calcOpticalFlowFarneback(onset, apex, None, **FARNEBACK)


def _settle(out, settings):
    """Write prepare.json, or refuse a folder that was made otherwise: its images would not go with the new ones."""
    path = os.path.join(out, "prepare.json")
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                old = json.load(file)
            pairs = [(name, old[name], settings[name]) for name in ("size", "farneback")]
            for session, now in settings["sessions"].items():
                before = old["sessions"].get(session, now)
                pairs += [(f"{session} {name}", before[name], now[name]) for name in now if name != "sheet"]
            settings["sessions"] = old["sessions"] | settings["sessions"]
            settings["versions"] = old["versions"] + [one for one in settings["versions"] if one not in old["versions"]]
        except (ValueError, KeyError, TypeError, AttributeError):
            fail(f"{path}: not readable as what prepare writes; use another --out")
        for name, before, now in pairs:
            if before != now:
                fail(f"{out}: was made with {name} {before}, this is {now}; use another --out")
    elif os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        fail(f"{out}: not a folder that prepare made; --out takes a new or empty folder, or one to go on with")
    _write(path, json.dumps(settings, indent=1).encode())


def _write(path, content):
    """Write bytes under a temporary name, then rename: what has its name is complete."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.part", "wb") as file:
        file.write(content)
    os.replace(f"{path}.part", path)


def _report(path, plans):
    """Write report.csv (rows of sessions that are not in `plans` stay), and print counts per emotion and per reason."""
    dropped = [row for plan in plans.values() for row in plan["rows"] if row["reason"]]
    others = []
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                others = [row for row in reader if row["dataset"] not in plans]
            if tuple(reader.fieldnames or ()) != REPORT:
                raise ValueError("other columns")
        except (KeyError, ValueError) as error:
            fail(f"{path}: not readable as what prepare writes ({error}); delete it and run again")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, REPORT, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(others + dropped)
    _write(path, text.getvalue().encode())
    print(f"{'session':8s} {'emotion':12s} {'sheet':>7s} {'Table 1':>7s} {'usable':>7s}")
    for session, plan in plans.items():
        listed = TABLE1[session]
        sheet = Counter(row["emotion"] for row in plan["rows"])
        usable = Counter(row["emotion"] for row in plan["rows"] if not row["reason"])
        words = listed + sorted(set(sheet) - set(listed))
        counts = {word: (sheet[word], sheet[word] * (word in listed), usable[word]) for word in words}
        for word, numbers in [*counts.items(), ("all", [sum(column) for column in zip(*counts.values())])]:
            print(f"{session:8s} {word:12s}" + "".join(f" {number:7d}" for number in numbers))
    for (session, reason), count in sorted(Counter((row["dataset"], row["reason"]) for row in dropped).items()):
        print(f"left out: {count:5d} rows of {session}: {reason}")
    print(f"{path}: the {len(dropped)} rows that were left out, each with its reason")


def main():
    parser = argument_parser(__doc__, epilog="prepare: " + inspect.cleandoc(prepare.__doc__))
    parser.add_argument("command", choices=("export", "show", "check", "prepare"))
    parser.add_argument("--data", metavar="PATH", help="processed folder (default: the synthetic stream)")
    parser.add_argument("--sessions", nargs="+", default=STREAM, choices=list(TABLE1), metavar="NAME",
                        help=f"of {', '.join(TABLE1)} (default: {' '.join(STREAM)})")  # fmt: skip
    parser.add_argument("--size", type=int, help="image side in pixels (default: 48; prepare: 256)")
    parser.add_argument("--out", metavar="PATH", help="folder to export to or to prepare, or file to show in")
    parser.add_argument("--raw", metavar="RAW", help="prepare: folder that holds the datasets as downloaded")
    parser.add_argument("--landmarks", metavar="DIR", help="prepare: landmarks to crop the face by, see below")
    args = parser.parse_args()
    args.size = args.size if args.size is not None else (256 if args.command == "prepare" else 48)
    if args.command != "check" and not args.out:
        fail(f"{args.command} needs --out")
    if not 8 <= args.size <= 1024:
        fail(f"--size {args.size}: must be 8 to 1024 pixels")
    if args.command == "export":
        export(args.out, args.size)
        return
    if args.command == "prepare":
        if not args.raw:
            fail("prepare needs --raw, the folder that holds the datasets as downloaded; see --help")
        try:
            prepare(args.raw, args.out, list(dict.fromkeys(args.sessions)), args.landmarks, args.size)
        except OSError as error:
            fail(f"{error.filename or args.out}: cannot be read or written ({error.strerror or error})")
        return
    if args.data is None:
        print("Synthetic stream: made-up flow images.")
    sessions = load(args.data, args.sessions, args.size) if args.data else synthetic(args.size, sessions=args.sessions)
    if args.command == "show":
        show(sessions, args.out)
    else:
        check(sessions)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; prepare goes on when it is run again, the other commands start anew", file=sys.stderr)
        raise SystemExit(130) from None
