"""Optical flow of the datasets as downloaded, written as a processed folder: what --data of every method takes.

    python -m tools.prepare --raw RAW --out OUT --landmarks DIR [--sessions NAME ...] [--size 256] [--flow]

Each usable row of a dataset's own annotation sheet (.xlsx or .csv) gives one image: the flow from its onset to its apex
frame. RAW holds a folder per session, with the sheet and the clip folders anywhere below it, as they were unpacked:
    casme2  CASME2-coding-20140508.xlsx, CASME2_RAW_selected/sub01/EP02_01f/img46.jpg
            or Cropped/sub01/EP02_01f/reg_img46.jpg
    samm    SAMM_Micro_FACS_Codes_v2.xlsx, 006/006_1_2/006_05562.jpg
    mmew    MMEW_Micro_Exp.xlsx, Micro_Expression/happiness/S03-01-002/1.jpg or S03/happiness/S03-01-002/1.jpg
    casme3  cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx, part_A/data/spNO.1/a/color/355.jpg
            or Part_A_ME_clip/frame/spNo.1_a_355/355.jpg, or as the released code has it, happy/spNO.1a360/355.jpg
    dfme    training_full_with_AU.xlsx, train_data/sub0003_01/00046.png
The sheet's labels count, never the folders' names; Table 1 says which labels stay. Only onset and apex are needed.

As in the released benchmark, raw frames of casme2, samm and dfme are cropped to the face, by the landmarks in DIR, and
all others are taken whole; --crop and --whole say otherwise. DIR holds a folder per session with NumPy files of 68
points as (x, y) in pixels of the frames, shape (68, 2), named as in the benchmark's landmarks.zip, which has no dfme:
casme2/sub01/EP02_01f.npy, samm/006/006_1_2.npy, mmew/happiness/S03-01-002/S03-01-002.npy, dfme/sub0003_01.npy,
casme3/spNO.1/a/color/color.npy (one per recording). Of raw and cropped frames, the raw ones are used with landmarks.

OUT gets <session>_<emotion>/sub<subject>_<clip>_onset<frame>_apex<frame>.png; folds.csv, the folds of all rows with a
label of Table 1; report.csv, the rows left out, each with its reason; prepare.json, what the images depend on; with
--flow, .flow/<session>_<emotion>/<same name>.npy. A second run makes only the images that are missing, and several runs
may fill one folder at once. A run with other settings is refused.
"""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

import common
import data
import protocols


@dataclass
class Source:
    """A dataset as it is downloaded. Patterns are regular expressions for names in lower case."""

    title: str
    page: str  # where it is requested
    sheets: tuple  # names of the annotation sheet, best first; a file's name may also just contain one
    clips: str  # end of a clip folder's or landmark file's path; groups: clip | subject, clip[, onset | , empty, apex]
    usable: int  # rows of the official sheet that an image can be expected of
    copies: tuple = ()  # whole names of circulating copies of the sheet
    crop: bool = False  # whether the benchmark crops its raw frames
    skipped: str = ""  # folders passed by, for frames and for landmarks
    digits: int = 3  # of the subject in the images' names
    renamed: dict = field(default_factory=dict)  # labels, beside data.ALIASES
    many: bool = False  # whether a clip is a recording of several expressions, told apart by their onset


# fmt: off
SOURCES = {  # a new dataset is one more record, beside that in data.DATASETS
    "casme2": Source("CASME II", "http://casme.psych.ac.cn/casme/e2",
                     ("CASME2-coding-20140508", "CASME2-coding-20190701", "CASME2-coding"),  # Table 1 counts the first
                     r"sub(\d+)/(ep[\w-]+)", 244, ("CASME2",), crop=True, digits=2),
    "samm": Source("SAMM", "http://www2.docm.mmu.ac.uk/STAFF/M.Yap/dataset.php",
                   ("SAMM_Micro_FACS_Codes_v2", "Micro_FACS_Codes"), r"(\d{3}_\d+_\d+)", 134, ("SAMM",), crop=True),
    "mmew": Source("MMEW", "http://www.dpailab.com/database.html", ("MMEW_Micro_Exp",), r"(s\d+-\d+-\d+)", 292,
                   ("MMEW",), digits=2, skipped=r"macro.*",  # macro-expressions have the same clip names
                   renamed={"repression": "others"}),  # the official page's word for what the sheet calls others
    "casme3": Source("CAS(ME)^3", "http://casme.psych.ac.cn/casme/e4",
                     ("cas(me)3_part_A_ME_label_JpgIndex_v2", "part_A_ME_label_JpgIndex"),
                     r"spno\.?(\d+)/([a-z])/color(?:/color)?|spno\.?(\d+)_([a-z])_(\d+)|spno\.?(\d+)([a-z])()(\d+)",
                     801, ("casme3_table",), many=True,
                     skipped=r"depth|(.*_)?mae(_.*)?|part_?[bc](_.*)?"),  # depth, macro-expressions, parts B and C
    "dfme": Source("DFME", "https://mea-lab-421.github.io",
                   ("training_full_with_AU", "coding"),  # the challenge's training part, that data.DATASETS counts
                   r"(sub\d+_\d+)", 1856, crop=True, digits=4),
}
COLUMNS = {"subject": "subject", "filename": "clip", "onset": "onset", "apex": "apex",
           "emotion": "emotion"}  # the sheet's word, without "estimated" and "frame": ours
TABLES = {"folds.csv": ["session", "subject", "clip", "onset", "key", "slcv", "ilcv"],  # of all sessions: their columns
          "report.csv": ["session", "subject", "clip", "onset", "apex", "emotion", "reason", "detail", "row"]}
# fmt: on
# The released benchmark's parameters of OpenCV's calcOpticalFlowFarneback.
FARNEBACK = {"pyr_scale": 0.5, "levels": 3, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.2, "flags": 0}
UNLISTED = ("emotion outside Table 1", "no subject or no file name")  # rows that folds.csv does not have
CHIN, BROW, NOSE_TIP, LOWER_LIP = 8, 19, 30, 57  # of the 68 landmarks, counted from 0


def main():
    p = common.parser(__doc__)
    p.add_argument("--raw", required=True, help="folder that holds the datasets as downloaded")
    p.add_argument("--out", required=True, help="folder to write: new, empty, or one to go on with")
    p.add_argument("--landmarks", metavar="DIR", help="landmarks to crop the face by (default: all frames are whole)")
    which = f"of {', '.join(SOURCES)} (default: {' '.join(data.STREAM)})"
    p.add_argument("--sessions", nargs="+", default=data.STREAM, choices=list(SOURCES), metavar="NAME", help=which)
    for option, does in (("--crop", "crop these sessions, too"), ("--whole", "do not crop these")):
        p.add_argument(option, nargs="+", default=[], choices=list(SOURCES), metavar="NAME", help=does)
    p.add_argument("--size", type=int, default=256, help="image side in pixels, 8 to 1024 (default: 256)")
    p.add_argument("--flow", action="store_true", help="keep the flow itself, too: float32 at the frames' resolution")
    args = p.parse_args()
    args.sessions = list(dict.fromkeys(args.sessions))
    names = ", ".join(args.sessions)
    if not args.out or not 8 <= args.size <= 1024:
        sys.exit(f"error: --out {args.out!r} --size {args.size}: needed are a path, and 8 to 1024 pixels")
    for option, path in (("--raw", args.raw), ("--landmarks", args.landmarks)):
        if path is not None and not os.path.isdir(path):
            sys.exit(f"error: {option} {path!r}: no such folder; it must hold {names}; see --help")
    if args.landmarks and os.path.isdir(os.path.join(args.landmarks, "landmarks")):  # as a zip may have been unpacked
        args.landmarks = os.path.join(args.landmarks, "landmarks")
    if args.landmarks and not any(session_folder(args.landmarks, session) for session in args.sessions):
        sys.exit(f"error: {args.landmarks}: holds none of the folders {names}, {found_in(args.landmarks)}; see --help")
    for session in args.crop + args.whole:
        no_crop = session in args.whole or not session_folder(args.landmarks, session)
        if session not in args.sessions or session in args.crop and no_crop:
            sys.exit(f"error: --crop or --whole {session}: not in --sessions, in both, or without landmarks to crop by")
    try:
        import cv2
    except ImportError:
        sys.exit("error: prepare needs the package opencv-python-headless: pip install opencv-python-headless")

    versions = {"opencv": cv2.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
    code = hashlib.sha256(data.flow_to_image(np.random.RandomState(0).randn(1, 16, 16, 2))).hexdigest()  # by a sample
    settings = dict(size=args.size, flow=args.flow, coding=code, farneback=FARNEBACK, versions=[versions], sessions={})
    rows = [row for session in args.sessions for row in survey(session, args, settings["sessions"])]
    settle(args.out, settings)
    write_folds(args.out, args.sessions, rows)  # before the images: a folder that is not complete has its folds, too
    usable = [row for row in rows if not row["reason"]]
    todo = [row for row in usable if not os.path.exists(os.path.join(args.out, row["key"]))]
    print(f"{args.out}: {len(usable) - len(todo)} images are there already, {len(todo)} to make", flush=True)
    for row in data.progress(todo, "images"):
        row["reason"], row["detail"] = make_image(row, args.out, args.size, args.flow)
    write_folds(args.out, args.sessions, rows)
    report(args.out, args.sessions, rows)


# ---- what is there ---------------------------------------------------------------------------------------------------
def survey(session, args, settings):
    """The rows of a session's sheet, with all that is known before a frame is read; fills in settings[session]."""
    source, root = SOURCES[session], session_folder(args.raw, session)
    if root is None:
        sys.exit(f"error: {args.raw}: no folder {session} ({source.page}), {found_in(args.raw)}; see --sessions")
    folders, files = explore(session, root)
    sheet = find_sheet(session, root, files)
    rows = read_sheet(session, sheet)
    judge(session, rows)
    if not folders:
        sys.exit(f"error: {root}: no clip folders of {source.title} ({source.page}), {found_in(root)}; see --help")
    wanted = session in args.crop or source.crop and session not in args.whole
    place = wanted and session_folder(args.landmarks, session)
    marks = find_landmarks(session, place) if place else {}
    kinds = {"raw": {}, "cropped": {}}
    for key, path in folders:
        kinds["cropped" if "crop" in os.path.relpath(path, root).lower() else "raw"].setdefault(key, []).append(path)
    # Cropped frames are faces already; the landmarks of the released benchmark were measured in raw frames.
    kind, other = sorted(kinds, key=lambda kind: (not kinds[kind], (kind == "raw") != bool(marks)))
    clips, twice = kinds[kind], sum(len(paths) > 1 for paths in kinds[kind].values())
    marks = marks if kind == "raw" or session in args.crop else {}
    for row in rows:
        row |= {"folder": of_clip(clips, row), "crop": bool(marks), "marks": of_clip(marks, row)}
    for name, index in {"folder": clips, "marks": marks}.items():
        if index and not any(row[name] for row in rows if not row["reason"]):
            sys.exit(f"error: {sheet}: no usable row is of a clip that is there, found {next(iter(index.values()))[0]}")
    sheet_place, crop = os.path.relpath(sheet, root), "landmarks" if marks else "whole frame"
    settings[session] = {"sheet": sheet_place, "sheet_sha256": sha256([sheet]), "frames": kind, "crop": crop}
    settings[session]["landmarks_sha256"] = sha256([paths[0] for paths in marks.values()]) if marks else None
    print(f"{session}: {len(rows)} rows in {sheet_place}, {len(clips)} clip folders of {kind} frames"
          + f" (the {other} ones are not used)" * bool(kinds[other])
          + f" ({twice} clips are in several folders, the first is used)" * bool(twice)
          + f", {crop}", flush=True)  # fmt: skip
    if wanted and kind == "raw" and not marks:
        print(f"warning: {session}: its raw frames stay whole, the benchmark crops them by --landmarks DIR/{session}")
    assign_folds(session, sorted((row for row in rows if row["reason"] not in UNLISTED), key=fold_order))
    return rows


def plain(text):
    """Letters and digits in lower case, so that CAS(ME)^3 equals casme3 and "Onset Frame" equals OnsetFrame."""
    return re.sub(r"[\W_]", "", str(text).lower())


def session_folder(path, session):
    """The folder in `path` that is named by a session's word or by its dataset's title, or None."""
    names = (session, plain(SOURCES[session].title))
    paths = [os.path.join(path, name) for name in sorted(os.listdir(path)) if plain(name) in names] if path else []
    return next(filter(os.path.isdir, paths), None)


def found_in(path):
    return f"found {', '.join(sorted(os.listdir(path))[:8]) or 'nothing'}"


def sha256(paths):
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in sorted(paths))).hexdigest()


def explore(session, root, enter_clips=False):
    """[(clip_key, path)] of the clip folders below `root`, and [path] of the files outside of them, or all; sorted."""
    clips, files, skipped = [], [], SOURCES[session].skipped
    for folder, children, names in os.walk(root, followlinks=True):
        files += [os.path.join(folder, name) for name in names]
        seen = [name for name in children if name[0] not in "._" and not re.fullmatch(skipped, name.lower())]
        keys = {name: clip_key(session, os.path.join(folder, name)) for name in sorted(seen)}
        clips += [(key, os.path.join(folder, name)) for name, key in keys.items() if key]
        children[:] = [name for name, key in keys.items() if enter_clips or not key]  # CAS(ME)^3 has millions of frames
    return sorted(clips, key=lambda clip: clip[1]), sorted(files)


def find_landmarks(session, place):
    """{clip_key: [path]} of the landmark files below `place`."""
    marks = {}
    for path in explore(session, place, enter_clips=True)[1]:
        if path.lower().endswith(".npy") and (key := clip_key(session, path[:-4])):
            if key in marks:
                sys.exit(f"error: two landmark files for one clip, keep one: {marks[key][0]}, {path}")
            marks[key] = [path]
    return marks or sys.exit(f"error: {place}: no landmark files, {found_in(place)}; see --help for their names")


def clip_key(session, path):
    """What a path's end tells, the groups of Source.clips: texts in lower case and numbers, or None."""
    match = re.fullmatch(rf"(?:.*/)?(?:{SOURCES[session].clips})", path.lower().replace(os.sep, "/"))
    return match and tuple(int(group) if group.isdigit() else group for group in match.groups() if group is not None)


def of_clip(index, row):
    """The first path that `index` {clip_key: paths} has for a row's clip, or None."""
    key = (row["subject"], row["clip"].lower(), row["onset"])
    keys = (key, (*key[:2], "", row["apex"]), key[:2], key[1:2])
    return next((index[key][0] for key in keys if key in index), None)


# ---- the annotation sheet --------------------------------------------------------------------------------------------
def find_sheet(session, root, files):
    """The path of a session's annotation sheet among the files."""
    source, ranks = SOURCES[session], {}
    tables = [path for path in files if re.fullmatch(r"[^.~].*\.(xlsx?|csv)", os.path.basename(path).lower())]
    for path in tables:
        stem, extension = os.path.splitext(os.path.basename(path).lower())
        for place, sheet in enumerate(map(plain, source.sheets + source.copies)):
            fits = sheet == plain(stem) or sheet in plain(stem) and place < len(source.sheets)
            if fits and extension != ".xls":  # the very name goes first, and an .xlsx before its .csv
                ranks.setdefault(path, (place, plain(stem) != sheet, extension == ".csv"))
    best = [path for path in ranks if ranks[path] == min(ranks.values())]
    if not best:
        found = ", ".join(map(os.path.basename, tables)) or "no table at all"
        sys.exit(f"error: {root}: no annotation sheet {source.sheets[0]}.xlsx or .csv (save an .xls as .xlsx),"
                 f" found {found}; {source.title} is requested at {source.page}")  # fmt: skip
    if len({sha256([path]) for path in best}) > 1:
        sys.exit(f"error: {root}: several sheets could be the right one, keep one: {', '.join(best)}")
    return best[0]


def read_sheet(session, path):
    """The rows of an annotation sheet, dicts: session, the values of COLUMNS (stripped texts), row (counted from 1)."""
    extension, source, seen = os.path.splitext(path)[1], SOURCES[session], "no cell Subject"
    try:
        if extension.lower() == ".csv":
            lines = Path(path).read_text("utf-8-sig", errors="replace").splitlines(keepends=True)
            tables = [list(csv.reader(lines, delimiter=delimiter)) for delimiter in ",;\t"]  # one finds the columns
        else:
            import openpyxl

            warnings.filterwarnings("ignore", module="openpyxl")  # about features of Excel that it does not know
            book = openpyxl.load_workbook(path, data_only=True)
            tables = [list(table.iter_rows(values_only=True)) for table in book.worksheets]
    except ImportError:
        sys.exit(f"error: {path}: reading it needs the package openpyxl: pip install openpyxl")
    except Exception as error:  # openpyxl lets through whatever its parsers raise
        sys.exit(f"error: {path}: not a readable {extension} file ({' '.join(str(error).split())})")
    for table in tables:
        places, rows = {}, []  # places: {our word: column}
        for number, cells in enumerate(table, 1):
            cells = ["" if cell is None else str(cell).strip() for cell in cells]
            if len(places) == len(COLUMNS):
                row = {word: (cells + [""] * (i + 1))[i] for word, i in places.items()}
                rows += [{"session": session, **row, "row": number}] * any(row.values())
            else:  # the header is still to come; the first of two columns with one name counts
                names = [COLUMNS.get(re.sub("^estimated|frame$", "", plain(cell))) for cell in cells]
                places = {word: names.index(word) for word in names if word}
                seen = "only the columns " + ", ".join(filter(None, cells)) if "subject" in names else seen
        if len(places) == len(COLUMNS):
            return rows
    sys.exit(f"error: {path}: has {seen}; needed: Subject, Filename, Onset[Frame], Apex[Frame], [Estimated]"
             f" Emotion, as in the sheet of {source.title} ({source.page})")  # fmt: skip


def judge(session, rows):
    """Normalise the rows in place; add the image's key, or the reason why the sheet alone rules a row out."""
    source, seen = SOURCES[session], {}
    for row in rows:
        word, subject = row["emotion"].lower(), re.search(r"\d+", row["subject"])
        row["emotion"] = (data.ALIASES | source.renamed).get(word, word) or "(blank)"
        row["subject"] = int(subject.group()) if subject else row["subject"]
        for name in ("onset", "apex"):
            frame = re.fullmatch(r"(\d+)(\.0*)?", row[name])
            row[name] = int(frame.group(1)) if frame else ""
        onset, apex = row["onset"], row["apex"]
        clip = (row["subject"], row["clip"].lower(), onset if source.many else None)
        reasons = {  # the first that holds; wrong rows are never repaired: the sheets' copies do so and disagree
            UNLISTED[0]: row["emotion"] not in data.DATASETS[session].emotions,
            UNLISTED[1]: not subject or not row["clip"],
            "onset or apex is not a number": "" in (onset, apex),
            "apex before onset": "" not in (onset, apex) and apex < onset,  # behind the offset: the frames tell
            "onset = apex": onset == apex,
            "same clip as another row": clip in seen,
        }
        row["reason"] = next((reason for reason, holds in reasons.items() if holds), "")
        row["detail"] = f"row {seen[clip]} is used" if row["reason"] == "same clip as another row" else ""
        if not row["reason"]:
            seen[clip] = row["row"]
            name = re.sub(r"[^\w.-]", "-", row["clip"])
            name = f"sub{row['subject']:0{source.digits}d}_{name}_onset{onset}_apex{apex}.png"
            row["key"] = f"{session}_{row['emotion']}/{name}"


# ---- from two frames to an image -------------------------------------------------------------------------------------
def make_image(row, out, size, keep_flow):
    """Write a row's flow image. Returns "", "" or, where there is none, the reason and its detail."""
    import cv2

    folder, files, images, path = row["folder"], {}, [], os.path.join(out, row["key"])
    if os.path.exists(path):  # another run has made it meanwhile
        return "", ""
    if folder is None:
        return "no clip folder", ""
    for name in sorted(os.listdir(folder)):
        stem, extension = os.path.splitext(name)
        numbers = re.findall(r"\d+", stem)  # the last one is the frame's, whatever its padding
        if numbers and name[0] != "." and extension.lower() in data.IMAGE_TYPES:
            files.setdefault(int(numbers[-1]), []).append(os.path.join(folder, name))
    for name in ("onset", "apex"):
        found = files.get(row[name], [])
        if len(found) != 1:
            return f"{name} frame {'found twice' if found else 'missing'}", f"frame {row[name]} in {folder}"
        try:
            images.append(Image.open(found[0]).convert("L"))
        except Exception:  # a damaged file can raise almost anything
            return f"{name} frame cannot be decoded", found[0]
    if images[0].size != images[1].size:
        return "onset and apex frame differ in size", folder
    if row["crop"] and not row["marks"]:
        return "no landmarks", ""
    if row["crop"]:
        try:
            box = crop_box(np.asarray(np.load(row["marks"])), *images[0].size)
        except Exception as error:  # and so can this one
            return "landmarks cannot be used", " ".join(str(error).split())
        images = [image.crop(box) for image in images]
    # Flow at the frames' own resolution, as in the released benchmark: a stretched frame would change its directions.
    onset, apex = map(np.asarray, images)
    if np.array_equal(onset, apex):
        return "onset and apex frame are the same", folder
    flow = cv2.calcOpticalFlowFarneback(onset, apex, None, **FARNEBACK)  # (H, W, 2), x to the right, y down
    coded, npy, png = data.flow_to_image(flow[None])[0].transpose(1, 2, 0), io.BytesIO(), io.BytesIO()
    Image.fromarray(coded).resize((size, size), Image.Resampling.BILINEAR).save(png, "PNG")
    np.save(npy, flow)
    kept = [(os.path.join(out, ".flow", row["key"][:-4] + ".npy"), npy)] * keep_flow  # hidden: no folder of images
    for place, file in [*kept, (path, png)]:  # where the image is, the flow is too
        os.makedirs(os.path.dirname(place), exist_ok=True)
        protocols.write(place, file.getvalue())
    return "", ""


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


# ---- the files that tell of all sessions -----------------------------------------------------------------------------
def fold_order(line):
    """Where a session's line stands in folds.csv. Its emotion does not count: the sheets' copies disagree on it."""
    return line["subject"], line["clip"].lower(), line["onset"] == "", line["onset"]


def assign_folds(session, lines):
    """Give the lines of a session, in their order, their folds; too few lines get none, and a note."""
    try:
        for protocol in ("slcv", "ilcv"):
            for fold, test in enumerate(protocols.split([line["subject"] for line in lines], protocol)):
                for i in test:
                    lines[i][protocol] = fold
    except ValueError as error:
        print(f"folds.csv gets no lines of {session}: {error}", flush=True)


def write_folds(out, sessions, rows):
    """Write folds.csv: the rows that have folds, with the key of the image where there is, or will be, one."""
    rows = sorted((row for row in rows if "ilcv" in row), key=fold_order)
    lines = [row | {"clip": row["clip"].lower(), "key": "" if row["reason"] else row["key"]} for row in rows]
    if lines:
        write_table(out, "folds.csv", sessions, lines)


def lock(out):
    """An open file: until it is closed, no other run rewrites these files."""
    file = open(os.path.join(out, ".lock"), "w")
    with contextlib.suppress(ImportError, OSError):  # Windows and some network drives have no such lock
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def settle(out, settings):
    """Write prepare.json, or refuse a folder that was made otherwise: its images would not go with the new ones."""
    os.makedirs(out, exist_ok=True)
    path, names = os.path.join(out, "prepare.json"), os.listdir(out)
    if "prepare.json" not in names and not all(name[0] == "." or name.endswith(".part") for name in names):
        sys.exit(f"error: {out}: not a folder that prepare made; --out takes a new or empty one, or one to go on with")
    with lock(out):
        read_table(out, "report.csv")  # if it cannot be read, now is the time to say so
        try:
            old = json.loads(Path(path).read_text("utf-8")) if os.path.exists(path) else settings
            names = ("size", "flow", "coding", "farneback")
            pairs = [(name, old.get(name, settings[name]), settings[name]) for name in names]  # value in OUT, value now
            for session, now in settings["sessions"].items():
                before = old["sessions"].get(session, now)
                pairs += [(f"{session} {name}", before[name], now[name]) for name in now if name != "sheet"]
            settings["sessions"] = old["sessions"] | settings["sessions"]
            settings["versions"] = old["versions"] + [v for v in settings["versions"] if v not in old["versions"]]
        except (ValueError, KeyError, TypeError, AttributeError):
            sys.exit(f"error: {path}: not readable as what prepare writes; use another --out")
        for name, before, now in pairs:
            if before != now:
                sys.exit(f"error: {out}: was made with {name} {before}, this is {now}; use another --out")
        protocols.write(path, json.dumps(settings, indent=1).encode())


def read_table(out, name):
    """The lines of one of OUT's TABLES, dicts; none if there is none."""
    path = os.path.join(out, name)
    try:
        reader = csv.DictReader(io.StringIO(Path(path).read_bytes().decode(), newline=""))
        if reader.fieldnames != TABLES[name]:
            raise ValueError("other columns")
        return list(reader)
    except FileNotFoundError:
        return []
    except (ValueError, csv.Error) as error:
        sys.exit(f"error: {path}: not readable as what prepare writes ({error}); delete it and run again")


def write_table(out, name, sessions, lines):
    """Write one of OUT's TABLES, session by session; the lines of other sessions in it stay."""
    text = io.StringIO(newline="")
    with lock(out):
        lines = [line for line in read_table(out, name) if line["session"] not in sessions] + lines
        writer = csv.DictWriter(text, TABLES[name], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(line for session in data.DATASETS for line in lines if line["session"] == session)
        protocols.write(os.path.join(out, name), text.getvalue().encode())


def report(out, sessions, rows):
    """Write report.csv, and print counts per emotion and per reason."""
    dropped = [row for row in rows if row["reason"]]
    write_table(out, "report.csv", sessions, dropped)
    print(f"{'session':8s} {'emotion':12s} {'sheet':>7s} {'Table 1':>7s} {'usable':>7s} {'expected':>8s}")
    for session in sessions:
        known, own = data.DATASETS[session].emotions, [row for row in rows if row["session"] == session]
        sheet = Counter(row["emotion"] for row in own)
        usable = Counter(row["emotion"] for row in own if not row["reason"])
        counts = {word: [sheet[word], sheet[word] * (word in known), usable[word]] for word in [*known, *sorted(sheet)]}
        counts["all"] = [sum(column) for column in zip(*counts.values())] + [SOURCES[session].usable]
        for word, numbers in counts.items():
            print(f"{session:8s} {word:12s}" + "".join(f" {number:7d}" for number in numbers))
    for (session, reason), count in sorted(Counter((row["session"], row["reason"]) for row in dropped).items()):
        print(f"left out: {count:5d} rows of {session}: {reason}")
    print(f"{os.path.join(out, 'report.csv')}: the {len(dropped)} rows that were left out, each with its reason")


if __name__ == "__main__":
    common.launch(main, kept="the images that are made are kept, the same command goes on from there")
