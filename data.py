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
"""

import argparse
import os
import re
import sys
from dataclasses import dataclass

import numpy as np
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
    found = {session: [] for session in sessions}  # per session: (emotion, file name, key)
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
            if not re.search(r"\d", stem):
                fail(f"{os.path.join(path, folder, name)}: no number in the file name; the first number is the subject")
            found[session].append((emotion, name, f"{folder}/{name}"))
    for folder, count in left_out.items():
        print(f"left out: {count} samples of {folder}, an emotion that Table 1 does not list for this session")
    return [_read_session(path, session, sorted(found[session]), size) for session in sessions]


def _read_session(path, name, samples, size):
    """Decode `samples`, a sorted list of (emotion, file name, key), into one Session."""
    if not samples:
        fail(f"{path}: no images of session {name}; expected folders such as {name}_{TABLE1[name][0]}")
    images = np.empty((len(samples), 3, size, size), np.uint8)
    for i, (_, _, key) in enumerate(samples):
        try:
            with Image.open(os.path.join(path, key)) as image:
                image = image.convert("RGB")
                if image.size != (size, size):
                    image = image.resize((size, size), Image.Resampling.BILINEAR)
                images[i] = np.asarray(image).transpose(2, 0, 1)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            fail(f"{os.path.join(path, key)}: not a readable image ({error})")
    subjects = np.array([int(re.search(r"\d+", file).group()) for _, file, _ in samples])
    return Session(name, images, [emotion for emotion, _, _ in samples], subjects, [key for _, _, key in samples])


def flow_to_image(flow):
    """Code flow fields (N, S, S, 2), in pixels, x to the right and y down, as RGB images (N, 3, S, S) uint8.

    HSV with hue = direction, saturation = 1 and value = magnitude scaled from 0 to 1 within each image, as the released
    benchmark does. At full saturation the conversion to RGB is a tent of width 4 (in sixths of the circle) per channel.
    """
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
    return [
        _synthetic_session(name, size, np.random.RandomState([seed, list(TABLE1).index(name)])) for name in sessions
    ]


def _synthetic_session(name, size, random):
    people = [_synthetic_subject(random) for _ in range(SUBJECTS[name])]
    emotions = [emotion for emotion, count in COUNTS[name].items() for _ in range(count)]
    # Emotions are dealt unevenly: each has its own few frequent subjects; then everyone gets at least one sample.
    shares = {emotion: random.dirichlet([0.4] * len(people)) for emotion in COUNTS[name]}
    owners = np.array([random.choice(len(people), p=shares[emotion]) for emotion in emotions])
    for person in sorted(set(range(len(people))) - set(owners)):
        owners[random.choice(np.flatnonzero(owners == np.bincount(owners).argmax()))] = person
    flows = np.stack([_synthetic_flow(CAMERAS[name], people[o], e, size, random) for o, e in zip(owners, emotions)])
    keys = [f"{name}_{e}/sub{o + 1:03d}_{i:04d}.png" for i, (o, e) in enumerate(zip(owners, emotions))]
    order = sorted(range(len(keys)), key=lambda i: (emotions[i], keys[i]))
    emotions, keys = [emotions[i] for i in order], [keys[i] for i in order]
    return Session(name, flow_to_image(flows)[order], emotions, owners[order] + 1, keys)


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
    """One sample's flow field (S, S, 2), float32."""
    scale, scale_spread, shift_spread, rotation_spread, head, noise, blur = camera
    # The crop: which place of the face each pixel shows.
    angle, zoom = random.normal(0, rotation_spread), scale * np.exp(random.normal(0, scale_spread))
    shift = shift_spread * (0.7 * person["shift"] + 0.7 * random.normal(0, 1, 2))
    line = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    x, y = line[None, :] - np.float32(shift[0]), line[:, None] - np.float32(shift[1])  # (1, S), (S, 1)
    cos, sin = np.float32(np.cos(angle) / zoom), np.float32(np.sin(angle) / zoom)
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
    flow = np.zeros((size, size, 2), np.float32)
    if bumps:
        bump_x, bump_y, dx, dy, width = np.array(bumps, np.float32).T[:, :, None, None]  # (K, 1, 1) each
        shape = np.exp(-((x - bump_x) ** 2 + (y - bump_y) ** 2) / (2 * width**2))  # (K, S, S)
        flow += np.stack([(shape * dx).sum(0), (shape * dy).sum(0)], -1)
    # The head moves a little, as one piece, and the flow is noisy.
    oval = np.exp(-(((x / 0.9) ** 2 + (y / 1.1) ** 2) ** 2))[..., None]
    turn, nod = head * random.normal(0, 0.5, 2)
    flow += oval * np.stack([-turn * y + nod * x, turn * x + nod * y], -1)
    flow += oval * (head * (person["head"] + random.normal(0, 0.6, 2))).astype(np.float32)
    return (flow + noise * smooth_noise(random, 1, size, 12)[0]).astype(np.float32)


def smooth_noise(random, count, size, grid):
    """Fields (count, S, S, 2) of unit normal noise on a coarse grid x grid, interpolated linearly to S x S."""
    place = np.linspace(0, grid - 1, size)
    up = np.maximum(0, 1 - abs(place[:, None] - np.arange(grid))).astype(np.float32)  # (S, grid)
    return np.einsum("yg,xh,nghc->nyxc", up, up, random.randn(count, grid, grid, 2).astype(np.float32), optimize=True)


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


def show(sessions, out, each=3, side=72):
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("command", choices=("export", "show", "check"))
    parser.add_argument("--data", metavar="PATH", help="processed folder (default: the synthetic stream)")
    parser.add_argument("--sessions", nargs="+", default=STREAM, choices=list(TABLE1), metavar="NAME",
                        help=f"of {', '.join(TABLE1)} (default: {' '.join(STREAM)})")  # fmt: skip
    parser.add_argument("--size", type=int, default=48, help="image side in pixels (default: 48)")
    parser.add_argument("--out", metavar="PATH", help="folder to export to, or file to show in")
    args = parser.parse_args()
    if args.command != "check" and not args.out:
        fail(f"{args.command} needs --out")
    if not 8 <= args.size <= 1024:
        fail(f"--size {args.size}: must be 8 to 1024 pixels")
    if args.command == "export":
        export(args.out, args.size)
        return
    if args.data is None:
        print("Synthetic stream: made-up flow images.")
    sessions = load(args.data, args.sessions, args.size) if args.data else synthetic(args.size, sessions=args.sessions)
    if args.command == "show":
        show(sessions, args.out)
    else:
        check(sessions)


if __name__ == "__main__":
    main()
