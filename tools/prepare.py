"""Optical flow of the datasets as downloaded, written as a processed folder: what --data of every method takes.

    python -m tools.prepare --raw RAW --out OUT --landmarks DIR [--sessions NAME ...] [--size 256] [--flow]

Each usable entry of a dataset's own annotation sheet (.xlsx or .csv) gives one image: the flow from its onset to its
apex frame. RAW holds a folder per session, with the sheet and the clip folders anywhere below it, as unpacked:
    casme2  CASME2-coding-20140508.xlsx, CASME2_RAW_selected/sub01/EP02_01f/img46.jpg
            or Cropped/sub01/EP02_01f/reg_img46.jpg
    samm    SAMM_Micro_FACS_Codes_v2.xlsx, 006/006_1_2/006_05562.jpg
    mmew    MMEW_Micro_Exp.xlsx, Micro_Expression/happiness/S03-01-002/1.jpg or S03/happiness/S03-01-002/1.jpg
    casme3  cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx, part_A/data/spNO.1/a/color/355.jpg
            or Part_A_ME_clip/frame/spNo.1_a_355/355.jpg, or as the released code has it, happy/spNO.1a360/355.jpg
    dfme    training_full_with_AU.xlsx, train_data/sub0003_01/00046.png
The sheet's labels count, never the folders' names; Table 1 says which labels stay. Only onset and apex are needed.

As in the released benchmark, raw frames of casme2, samm and dfme are cropped to the face, by the landmarks in DIR (dfme
by a rule of ours), and all others are taken whole; --crop and --whole say otherwise. DIR holds a folder per session
with NumPy files of 68 points as (x, y) in pixels of the frames, shape (68, 2), named as in the benchmark's
landmarks.zip, which has no dfme: casme2/sub01/EP02_01f.npy, samm/006/006_1_2.npy,
mmew/happiness/S03-01-002/S03-01-002.npy, dfme/sub0003_01.npy, casme3/spNO.1/a/color/color.npy (one per recording). Of
raw and cropped frames, the raw ones are used with landmarks.

OUT gets <session>_<emotion>/sub<subject>_<clip>_onset<frame>_apex<frame>.png; folds.csv, the folds of all entries with
a label of Table 1; report.csv, the entries left out, each with its reason; prepare.json, what the images depend on;
with --flow, .flow/<session>_<emotion>/<same name>.npy. A second run makes only what is missing, and several runs may
fill one folder at once. A run with other settings is refused.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image

import common
import data
import protocols


class Source(NamedTuple):
    """A dataset as it is downloaded. Patterns are regular expressions for names in lower case."""

    title: str
    page: str  # where it is requested
    clips: str  # end of a clip folder's or landmark file's path; groups: clip | subject, clip[, onset | , empty, apex]
    usable: int  # entries of the official sheet that an image can be expected of
    sheets: tuple  # names of the annotation sheet, best first; a file's name may also just contain one
    copies: tuple = ()  # whole names of circulating copies of the sheet
    crop: bool = False  # whether the benchmark crops its raw frames
    skipped: str = ""  # folders passed by, for frames and for landmarks
    digits: int = 3  # of the subject in the images' names
    renamed: dict = {}  # labels, beside data.ALIASES
    face: float = 0.5  # least side of the crop, in heights of the frame: all released landmark files have more
    many: bool = False  # whether a clip is a recording of several expressions, told apart by their onset


# fmt: off
SOURCES = {  # a new dataset is one more record, beside that in data.DATASETS
    "casme2": Source("CASME II", "http://casme.psych.ac.cn/casme/e2", r"sub(\d+)/(ep[\w-]+)", 244, crop=True, digits=2,
                     sheets=("CASME2-coding-20140508", "CASME2-coding-20190701", "CASME2-coding"), copies=("CASME2",)),
    "samm": Source("SAMM", "http://www2.docm.mmu.ac.uk/STAFF/M.Yap/dataset.php", r"(\d{3}_\d+_\d+)", 134, crop=True,
                   sheets=("SAMM_Micro_FACS_Codes_v2", "Micro_FACS_Codes"), copies=("SAMM",)),
    "mmew": Source("MMEW", "http://www.dpailab.com/database.html", r"(s\d+-\d+-\d+)", 292, digits=2,
                   sheets=("MMEW_Micro_Exp",), copies=("MMEW",), skipped=r"macro.*",  # these have the same clip names
                   renamed={"repression": "others"}),  # the official page's word for what the sheet calls others
    "casme3": Source("CAS(ME)^3", "http://casme.psych.ac.cn/casme/e4",
                     r"spno\.?(\d+)/([a-z])/color(?:/color)?|spno\.?(\d+)_([a-z])_(\d+)|spno\.?(\d+)([a-z])()(\d+)",
                     803, many=True, face=0.2, copies=("casme3_table",),
                     sheets=("cas(me)3_part_A_ME_label_JpgIndex_v2", "part_A_ME_label_JpgIndex"),
                     skipped=r"depth|(.*_)?mae(_.*)?|part_?[bc](_.*)?"),  # depth, macro-expressions, parts B and C
    "dfme": Source("DFME", "https://mea-lab-421.github.io", r"(sub\d+_\d+)", 1856, crop=True, digits=4, face=0.2,
                   sheets=("training_full_with_AU", "coding")),  # the challenge's training part
}
# The sheet's word, without "estimated" and "frame": ours.
COLUMNS = {"subject": "subject", "filename": "clip", "onset": "onset", "apex": "apex", "emotion": "emotion"}
TABLES = {"folds.csv": list(protocols.FOLDS),  # the columns of both files
          "report.csv": ["session", "subject", "clip", "onset", "apex", "emotion", "reason", "detail", "row"]}
# fmt: on
FARNEBACK = {"pyr_scale": 0.5, "levels": 3, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.2, "flags": 0}
NO_LABEL, NO_CLIP = "emotion outside Table 1", "no subject or no file name"  # of entries that folds.csv does not have
# Of the 68 landmarks, counted from 0.
CHIN, BROW, NOSE_TIP, LOWER_LIP, EYES, EYE_CORNERS, MOUTH = 8, 19, 30, 57, slice(36, 48), [36, 45], slice(48, 68)


def main():
    args = parse()
    try:
        import cv2
    except ImportError:
        sys.exit("error: prepare needs the package opencv-python-headless: pip install opencv-python-headless")
    sample = data.flow_to_image(np.random.RandomState(0).randn(1, 16, 16, 2))
    coding = hashlib.sha256(sample).hexdigest()
    settings = dict(size=args.size, flow=args.flow, coding=coding, opencv=cv2.__version__, farneback=FARNEBACK)
    settings |= {"sessions": {}, "versions": [{"numpy": np.__version__, "pillow": PIL.__version__}]}
    entries = [entry for session in args.sessions for entry in survey(session, args, settings["sessions"])]
    settle(args.out, settings)
    write_folds(args.out, args.sessions, entries)  # before the images: an incomplete folder has its folds, too
    usable = [entry for entry in entries if not entry["reason"]]
    todo = [entry for entry in usable if not os.path.exists(os.path.join(args.out, entry["key"]))]
    print(f"{args.out}: {len(usable) - len(todo)} images are there already, {len(todo)} to make", flush=True)
    for entry in data.progress(todo, "images"):
        entry["reason"], entry["detail"] = make_image(entry, args.out, args.size, args.flow)
    write_folds(args.out, args.sessions, entries)
    report(args.out, args.sessions, entries)


def parse():
    """The command line, checked. args.landmarks is the folder that holds the sessions' folders, or None."""
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
        if session not in args.sessions or (session in args.crop and no_crop):
            sys.exit(f"error: --crop or --whole {session}: not in --sessions, in both, or without landmarks to crop by")
    return args


# ---- what is there ---------------------------------------------------------------------------------------------------
def survey(session, args, settings):
    """The entries of a session's sheet, with all that is known before a frame is read; fills in settings[session]."""
    source, root = SOURCES[session], session_folder(args.raw, session)
    if root is None:
        sys.exit(f"error: {args.raw}: no folder {session} ({source.page}), {found_in(args.raw)}; see --sessions")
    folders, files = explore(session, root)
    sheet = find_sheet(session, root, files)
    entries = read_sheet(session, sheet)
    judge(session, entries)
    if not folders:
        sys.exit(f"error: {root}: no clip folders of {source.title} ({source.page}), {found_in(root)}; see --help")

    wanted = session in args.crop or (source.crop and session not in args.whole)
    place = session_folder(args.landmarks, session) if wanted else None
    landmarks = find_landmarks(session, place) if place else {}
    raw, cropped = {}, {}
    for key, path in reversed(folders):  # of several folders of a clip the first stays
        clips = cropped if "crop" in os.path.relpath(path, root).lower() else raw
        clips[key] = path
    kind = "raw" if raw and (landmarks or not cropped) else "cropped"
    clips = raw if kind == "raw" else cropped
    if kind == "cropped" and session not in args.crop:
        landmarks = {}  # these are faces already, and the benchmark's landmarks were measured in raw frames
    for entry in entries:
        entry |= {"folder": of_clip(clips, entry), "crop": bool(landmarks), "landmarks": of_clip(landmarks, entry)}
    faces = {}  # {a landmark file's content: the first clip that has it}
    for entry in [entry for entry in entries if entry["landmarks"]]:
        first = faces.setdefault(Path(entry["landmarks"]).read_bytes(), entry)
        if first["subject"] != entry["subject"]:  # of one person two clips may share them
            entry["twin"] = first["landmarks"]
    for name, paths in (("folder", clips), ("landmarks", landmarks)):
        if paths and not any(entry[name] for entry in entries if not entry["reason"]):
            sys.exit(f"error: {sheet}: no usable entry is of a clip that is there, found {min(paths.values())}")

    sheet_place, crop = os.path.relpath(sheet, root), "landmarks" if landmarks else "whole frame"
    settings[session] = {"sheet": sheet_place, "sheet_sha256": sha256([sheet]), "frames": kind, "crop": crop}
    settings[session]["landmarks_sha256"] = sha256(landmarks.values()) if landmarks else None
    found = f"{len(clips)} clips of {kind} frames ({len(raw)} raw and {len(cropped)} cropped in {len(folders)} folders)"
    print(f"{session}: {len(entries)} entries in {sheet_place}, {found}, {crop}", flush=True)
    if wanted and kind == "raw" and not landmarks:
        print(f"warning: {session}: its raw frames stay whole, the benchmark crops them by --landmarks DIR/{session}")
    assign_folds(session, sorted((e for e in entries if e["reason"] not in (NO_LABEL, NO_CLIP)), key=fold_order))
    return entries


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
        keys = {name: clip_key(session, os.path.join(folder, name)) for name in seen}
        clips += [(key, os.path.join(folder, name)) for name, key in keys.items() if key]
        children[:] = [name for name in seen if enter_clips or not keys[name]]  # CAS(ME)^3 has millions of frames
    return sorted(clips, key=lambda clip: clip[1]), sorted(files)


def find_landmarks(session, place):
    """{clip_key: path} of the landmark files below `place`."""
    landmarks = {}
    for path in explore(session, place, enter_clips=True)[1]:
        if path.lower().endswith(".npy") and (key := clip_key(session, path[:-4])):
            if key in landmarks:
                sys.exit(f"error: two landmark files for one clip, keep one: {landmarks[key]}, {path}")
            landmarks[key] = path
    return landmarks or sys.exit(f"error: {place}: no landmark files, {found_in(place)}; see --help for their names")


def clip_key(session, path):
    """What a path's end tells, the groups of Source.clips: texts in lower case and numbers, or None."""
    match = re.fullmatch(rf"(?:.*/)?(?:{SOURCES[session].clips})", path.lower().replace(os.sep, "/"))
    return match and tuple(int(group) if group.isdigit() else group for group in match.groups() if group is not None)


def of_clip(paths, entry):
    """The one of `paths` {clip_key: path} that is of an entry's clip, or None."""
    subject, clip, onset = entry["subject"], entry["clip"].lower(), entry["onset"]
    keys = ((subject, clip, onset), (subject, clip, "", entry["apex"]), (subject, clip), (clip,))
    return next((paths[key] for key in keys if key in paths), None)


# ---- the annotation sheet --------------------------------------------------------------------------------------------
def find_sheet(session, root, files):
    """The path of a session's annotation sheet among the files."""
    source, ranks = SOURCES[session], {}
    tables = [path for path in files if re.fullmatch(r"[^.~].*\.(xlsx?|csv)", os.path.basename(path).lower())]
    for path in tables:
        stem, extension = os.path.splitext(os.path.basename(path).lower())
        for place, name in enumerate(source.sheets + source.copies):
            same = plain(name) == plain(stem)
            fits = same or (name in source.sheets and plain(name) in plain(stem))
            if fits and extension != ".xls":  # the very name goes first, and an .xlsx before its .csv
                ranks.setdefault(path, (place, not same, extension == ".csv"))
    best = [path for path in ranks if ranks[path] == min(ranks.values())]
    if not best:
        found = ", ".join(map(os.path.basename, tables)) or "no table at all"
        sys.exit(f"error: {root}: no annotation sheet {source.sheets[0]}.xlsx or .csv (save an .xls as .xlsx),"
                 f" found {found}; {source.title} is requested at {source.page}")  # fmt: skip
    if len({Path(path).read_bytes() for path in best}) > 1:
        sys.exit(f"error: {root}: several sheets could be the right one, keep one: {', '.join(best)}")
    return best[0]


def read_tables(path):
    """The tables in a file, lists of lines of cells: a workbook's worksheets, or a .csv read by each delimiter."""
    try:
        if path.lower().endswith(".csv"):
            lines = Path(path).read_text("utf-8-sig").splitlines(keepends=True)
            return [list(csv.reader(lines, delimiter=delimiter)) for delimiter in ",;\t"]
        import openpyxl

        warnings.filterwarnings("ignore", module="openpyxl")  # about features of Excel that it does not know
        book = openpyxl.load_workbook(path, data_only=True)
        return [list(table.iter_rows(values_only=True)) for table in book.worksheets]
    except UnicodeDecodeError:
        sys.exit(f"error: {path}: not in UTF-8; save it as .xlsx, or as CSV in UTF-8")
    except Exception as error:  # openpyxl lets through whatever its parsers raise
        sys.exit(f"error: {path}: not readable ({' '.join(str(error).split())}); an .xlsx needs pip install openpyxl")


def read_sheet(session, path):
    """The entries of a sheet, dicts: session, the values of COLUMNS (stripped texts), row (its line, from 1)."""
    source, found = SOURCES[session], "no cell Subject"
    for table in read_tables(path):
        lines = [["" if cell is None else str(cell).strip() for cell in line] for line in table]
        for above, line in enumerate(lines, 1):
            header = [COLUMNS.get(re.sub("^estimated|frame$", "", plain(cell))) for cell in line]
            if set(COLUMNS.values()) <= set(header):
                entries = []
                for number, cells in enumerate(lines[above:], above + 1):
                    cells += [""] * len(header)  # a line of a .csv may end early
                    entry = {word: cells[header.index(word)] for word in COLUMNS.values()}  # of equal columns the first
                    if any(entry.values()):
                        entries.append({"session": session, **entry, "row": number})
                return entries
            if "subject" in header:
                found = "only the columns " + ", ".join(filter(None, line))
    sys.exit(f"error: {path}: has {found}; needed: Subject, Filename, Onset[Frame], Apex[Frame], [Estimated]"
             f" Emotion, as in the sheet of {source.title} ({source.page})")  # fmt: skip


def judge(session, entries):
    """Normalise the entries in place; add the image's key, or the reason why the sheet alone rules an entry out."""
    source, used = SOURCES[session], {}
    for entry in entries:
        word, digits = entry["emotion"].lower(), re.search(r"\d+", entry["subject"])
        emotion = (data.ALIASES | source.renamed).get(word, word) or "(blank)"
        subject = int(digits.group()) if digits else entry["subject"]
        frames = [re.fullmatch(r"(\d+)(\.0*)?", entry[name]) for name in ("onset", "apex")]
        onset, apex = (int(frame.group(1)) if frame else "" for frame in frames)
        entry |= {"emotion": emotion, "subject": subject, "onset": onset, "apex": apex, "reason": ""}
        clip = (subject, entry["clip"].lower(), onset if source.many else None)
        # Wrong entries are never repaired: the sheets' copies do so, and disagree. The offset is not looked at.
        if emotion not in data.DATASETS[session]:
            entry["reason"] = NO_LABEL
        elif not digits or not entry["clip"]:
            entry["reason"] = NO_CLIP
        elif "" in (onset, apex):
            entry["reason"] = "onset or apex is not a number"
        elif apex <= onset:
            entry["reason"] = "apex before onset" if apex < onset else "onset = apex"
        elif clip in used:
            entry["reason"], entry["detail"] = "same clip as another entry", f"line {used[clip]} of the sheet is used"
        else:
            used[clip] = entry["row"]
            name = re.sub(r"[^\w.-]", "-", entry["clip"])
            entry["key"] = f"{session}_{emotion}/sub{subject:0{source.digits}d}_{name}_onset{onset}_apex{apex}.png"


# ---- from two frames to an image -------------------------------------------------------------------------------------
def make_image(entry, out, size, keep_flow):
    """Write an entry's image, and its flow if asked. Returns "", "" or, if there is none, the reason and its detail."""
    folder, files, frames, path = entry["folder"], {}, [], os.path.join(out, entry["key"])
    if os.path.exists(path):  # another run has made it meanwhile
        return "", ""
    if folder is None:
        return "no clip folder", ""
    names = sorted(name for name in os.listdir(folder) if name[0] != ".")
    for name in names:
        numbers = re.findall(r"\d+", os.path.splitext(name)[0])  # the last one is the frame's, whatever its padding
        if numbers and name.lower().endswith(data.IMAGE_TYPES):
            files.setdefault(int(numbers[-1]), []).append(os.path.join(folder, name))
    for name in ("onset", "apex"):
        found = files.get(entry[name], [])
        if len(found) != 1:
            types = " ".join(sorted({os.path.splitext(name)[1] for name in names}))
            there = f"numbers {min(files)} to {max(files)}" if files else "no frame"
            detail = f"frame {entry[name]}; {folder} has {len(names)} files ({types}), {there}"
            return f"{name} frame {'found twice' if found else 'missing'}", detail
        try:
            frames.append(read_frame(found[0]))
        except Exception as error:  # a damaged file can raise almost anything
            return f"{name} frame cannot be decoded", f"{found[0]} ({error})"
    if frames[0].size != frames[1].size:
        return "onset and apex frame differ in size", folder
    if entry["crop"] and not entry["landmarks"]:
        return "no landmarks", ""
    if entry["crop"]:
        try:
            box = crop_box(np.load(entry["landmarks"]), *frames[0].size, SOURCES[entry["session"]].face)
        except Exception as error:  # and so can this one
            return "landmarks cannot be used", " ".join(str(error).split())
        if "twin" in entry:
            return "landmarks cannot be used", f"those of another person: {entry['twin']}"
        frames = [frame.crop(box) for frame in frames]
    if np.array_equal(*frames):
        return "onset and apex frame are the same", folder
    flow = optical_flow(*frames)  # at their own resolution, as in the benchmark: stretching would change directions
    npy, png, coded = io.BytesIO(), io.BytesIO(), data.flow_to_image(flow[None])[0].transpose(1, 2, 0)
    np.save(npy, flow)
    Image.fromarray(coded).resize((size, size), Image.Resampling.BILINEAR).save(png, "PNG")
    kept = {os.path.join(out, ".flow", entry["key"][:-4] + ".npy"): npy} if keep_flow else {}
    for place, file in (kept | {path: png}).items():  # where the image is, the flow is too
        os.makedirs(os.path.dirname(place), exist_ok=True)
        protocols.write(place, file.getvalue())
    return "", ""


def read_frame(path):
    """A frame as a grey image. A ValueError if it has more than 8 bits, as a depth map has."""
    image = Image.open(path)
    if image.mode[0] in "IF":  # .convert would clip nearly all of it to white
        raise ValueError("more than 8 bits per channel")
    return image.convert("L")


def optical_flow(onset, apex):
    """The flow between two grey images (H, W) uint8: (H, W, 2) float32 in pixels, x to the right and y down."""
    import cv2

    return cv2.calcOpticalFlowFarneback(np.asarray(onset), np.asarray(apex), None, **FARNEBACK)


def crop_box(points, width, height, least=0.2):
    """The face in a frame of width x height pixels: [left, top, right, bottom], cut off at the frame's edges.

    points: 68 landmarks (68, 2) as (x, y) in pixels. The box is a square around the tip of the nose. Its side is the
    released benchmark's: the height from brow to chin plus that from lower lip to chin. (The benchmark reads the centre
    as (y, x), which moves the crop off the face; for dfme it has another rule.) A ValueError says why the points cannot
    be a face in this frame; least: the box's side, in heights of the frame (0.5: the face must be in the middle, too).
    """
    if points.shape != (68, 2) or not np.isfinite(points).all():
        raise ValueError(f"{points.shape} numbers, needed are (68, 2), none of them nan")
    left, top, right, bottom = *points.min(0), *points.max(0)
    there = f"x {left:.4g} to {right:.4g}, y {top:.4g} to {bottom:.4g} in a frame of {width} x {height} pixels"
    eyes, mouth = points[EYES].mean(0), points[MOUTH].mean(0)
    across, down = np.diff(points[EYE_CORNERS], axis=0)[0]  # in a right file the second one is farther to the right
    if left == right or top == bottom:
        raise ValueError(f"all points in one line: {there}")
    if max(right, bottom) <= 2:
        raise ValueError(f"fractions of the frame, needed are pixels: {there}")
    if across < abs(down):
        raise ValueError(f"(y, x), mirrored or rotated, by the outer corners of the eyes: {there}")
    if mouth[1] <= eyes[1]:
        raise ValueError(f"upside down: the mouth is above the eyes: {there}")
    # A chin may lie a little below the frame; points measured in other frames lie far outside, or take up less of it.
    if not (abs(points / (width, height) - 0.5) <= 0.6).all():
        raise ValueError(f"outside of the frame, so measured in others: {there}")
    x, y = points[NOSE_TIP]
    half = (2 * points[CHIN, 1] - points[BROW, 1] - points[LOWER_LIP, 1]) / 2
    if 2 * half < least * height:
        raise ValueError(f"too small a face, {2 * half / height:.0%} of the height, so measured in others: {there}")
    if least == 0.5 and not (abs(x / width - 0.5) < 0.2 and abs(y / height - 0.6) < 0.2):  # recorded from in front
        raise ValueError(f"the nose at {x:.4g}, {y:.4g} is not in the middle, so measured in others: {there}")
    return np.floor((x - half, y - half, x + half, y + half)).clip(0, (width, height) * 2).astype(int).tolist()


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


def write_folds(out, sessions, entries):
    """Write folds.csv: the entries that have folds, with the key of the image where there is, or will be, one."""
    lines = sorted((entry for entry in entries if "ilcv" in entry), key=fold_order)
    lines = [line | {"clip": line["clip"].lower(), "key": "" if line["reason"] else line["key"]} for line in lines]
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
        old = json.loads(Path(path).read_text("utf-8")) if os.path.exists(path) else settings
        parts = {"": old} | old["sessions"]
        for part, now in ({"": settings} | settings["sessions"]).items():
            before = parts.get(part, now)
            for name in now:
                if name not in ("sessions", "versions", "sheet") and before.get(name) != now[name]:
                    change = f"{part} {name} {before.get(name, 'unknown')}, this is {now[name]}".strip()
                    sys.exit(f"error: {out}: was made with {change}; use another --out")
        settings["sessions"] = old["sessions"] | settings["sessions"]
        settings["versions"] = old["versions"] + [v for v in settings["versions"] if v not in old["versions"]]
        protocols.write(path, json.dumps(settings, indent=1).encode())


def read_table(out, name):
    """The lines of one of OUT's TABLES, dicts; none if there is none."""
    path = os.path.join(out, name)
    if not os.path.exists(path):
        return []
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        if file.readline().strip() != ",".join(TABLES[name]):  # saved by a spreadsheet program
            sys.exit(f"error: {path}: not readable as what prepare writes; delete it and run again")
        return list(csv.DictReader(file, TABLES[name]))


def write_table(out, name, sessions, lines):
    """Write one of OUT's TABLES, session by session; the lines of other sessions in it stay."""
    text = io.StringIO(newline="")
    with lock(out):
        lines = [line for line in read_table(out, name) if line["session"] not in sessions] + lines
        writer = csv.DictWriter(text, TABLES[name], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(line for session in data.DATASETS for line in lines if line["session"] == session)
        protocols.write(os.path.join(out, name), os.fsencode(text.getvalue()))  # of names that are not UTF-8, too


def report(out, sessions, entries):
    """Write report.csv, and print counts per emotion and per reason."""
    dropped = [entry for entry in entries if entry["reason"]]
    write_table(out, "report.csv", sessions, dropped)
    print(f"{'session':8s} {'emotion':12s} {'sheet':>7s} {'Table 1':>7s} {'usable':>7s} {'expected':>8s}")
    for session in sessions:
        known, own = data.DATASETS[session], [entry for entry in entries if entry["session"] == session]
        sheet = Counter(entry["emotion"] for entry in own)
        usable = Counter(entry["emotion"] for entry in own if not entry["reason"])
        counts = {}
        for word in [*known, *sorted(sheet)]:
            counts[word] = [sheet[word], sheet[word] if word in known else 0, usable[word]]
        counts["all"] = [sum(column) for column in zip(*counts.values())] + [SOURCES[session].usable]
        for word, numbers in counts.items():
            altered = known.get(word) not in (None, sheet[word])
            remark = f"   the official sheet has {known[word]}" if altered else ""
            print(f"{session:8s} {word:12s}" + "".join(f" {number:7d}" for number in numbers) + remark)
    for (session, reason), count in sorted(Counter((entry["session"], entry["reason"]) for entry in dropped).items()):
        print(f"left out: {count:5d} entries of {session}: {reason}")
    print(f"{os.path.join(out, 'report.csv')}: the {len(dropped)} entries that were left out, each with its reason")
    none = [session for session in sessions if all(entry["reason"] for entry in entries if entry["session"] == session)]
    if none:
        sys.exit(f"error: {', '.join(none)}: not one usable image; report.csv says why")


if __name__ == "__main__":
    common.launch(main, kept="the images that are made are kept, the same command goes on from there")
