"""The tests of tools/: prepare, report, view, tables, bench, pretrain, and of what docs/ says."""

import contextlib
import csv
import functools
import importlib
import io
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import openpyxl
import pytest
import torch
from openpyxl.styles import Font
from PIL import Image

import common
import data
import finetune
import protocols
import ranpac
from controls import pixels
from tools import bench, megc2019, prepare, pretrain, report, tables, view

HERE = Path(__file__).resolve().parent.parent

# ---- prepare: raw trees in every layout, naming and oddity of the official downloads ---------------------------------
# A frame is texture, 200 x 160 pixels. From onset to apex all of it moves in one direction, and most around BUMP. Each
# entry has its own direction: an image's hue tells whether it was made of the right frames, and its brightest place how
# they were cropped. What must not be used moves the other way.
BUMP, NOSE, SIDE = (125, 65), {1: (135, 85), 0: (100, 85)}, 90  # landmarks: nose of odd and even subjects; crop's side
# fmt: off
HEADERS = {
    "casme2": "Subject|Filename||OnsetFrame|ApexFrame|OffsetFrame||Action Units|Estimated Emotion",
    "samm": "Subject|Filename|Inducement Code|Onset Frame|Apex Frame|Offset Frame|Duration|Micro|Estimated Emotion",
    "mmew": "Subject|Filename|OnsetFrame|ApexFrame|OffsetFrame|Action Units|Estimated Emotion|remarks",
    "casme3": "Subject|Filename|Onset|Apex|Offset|AU|Objective class|emotion",
    "dfme": "Subject|Filename|OnsetFrame|ApexFrame|OffsetFrame|Emotion|EmotionId|Fps|AU"}
SHEETS = {"casme2": "CASME II/CASME2-coding-20140508.xlsx", "samm": "SAMM/SAMM_Micro_FACS_Codes_v2.xlsx",
          "mmew": "mmew/MMEW_Micro_Exp (20).xlsx", "dfme": "dfme/full_release_annotation/training_full_with_AU.xlsx",
          "casme3": "CAS(ME)^3/annotation/partA/cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx"}
MMEW, CLIPS = "Micro_and_Macro_Expression_Warehouse/MMEW_Final/", "Part_A_ME_clip/Part_A_ME_clip/"
MACRO, MAE = MMEW + "Macro_Expression/{e}/{c}/{n}.jpg", "Part_A_MaE_clip/frame/spNo.{s}_{c}_{o}/{n}.jpg"
COLOR, CODE = "part_A/data/part1/spNO.{s}/{c}/color/{n}.jpg", "part_A/{e}/spNO.{s}k{a}/{n}.jpg"
LAYOUT = {  # frames and landmarks of subject s, clip c, emotion e, onset o, apex a, frame n
    "casme2": ("CASME2_RAW_selected/CASME2_RAW_selected/sub{s:02d}/{c}/img{n}.jpg", "sub{s:02d}/{c}.npy"),
    "samm": ("SAMM/{s:03d}/{c}/{s:03d}_{n:05d}.jpg", "{s:03d}/{c}.npy"),
    "mmew": (MMEW + "Micro_Expression/{e}/{c}/{n}.jpg", "{e}/{c}/{c}.npy"),
    "casme3": (CLIPS + "frame/spNo.{s}_{c}_{o}/{n}.jpg", "spNO.{s}/{c}/color/color.npy"),
    "dfme": ("train_data/train_data/{c}/{n:05d}.png", "{c}.npy")}
DECOYS = {"mmew": [MACRO], "casme3": [CLIPS + "depth/spNo.{s}_{c}_{o}/{n}.png", MAE,  # frames that must not be used
                                      "part_C/data/spNO.{s}/{c}/color/{n}.jpg"]}
LABEL, NUMBER, NAME = "emotion outside Table 1", "onset or apex is not a number", "no subject or no file name"
TWICE, ORDER, FOLDER, CUT = "same clip as another entry", "apex before onset", "no clip folder", "onset frame missing"
DAMAGES = ("apex frame missing", "onset frame cannot be decoded", "apex frame cannot be decoded",
           "onset frame found twice", "onset and apex frame are the same", "onset and apex frame differ in size",
           "apex frame cannot be decoded")
ENTRIES = {  # subject, clip, onset, apex, label, image or reason; frames, if not as above, None if there are none
    "casme2": [
        ("01", "EP02_01f", 46, 59, "happiness", "happiness/sub01"), ("24", "EP1", 1, 2, "sadness", LABEL),
        ("01", "EP03_02", "131.0", 161, "disgust", "disgust/sub01", "CASME2-RAW/Sub01/ep03_02/img{n}.JPG"),
        ("02", "EP03_02", 10, 14, "others", "others/sub02", "CASME2_RAW/CASME2-RAW/sub02/{c}/img{n}.jpeg"),
        (3, "EP06_02_01", 99.0, 101, "repression", "repression/sub03", "sub03/{c}/{n:05d}.bmp"), (None,) * 7,
        ("26", "EP01_2", "7", " 9 ", " Surprise ", "surprise/sub26"), ("23", "EP01_09", 4, 9, None, LABEL),
        ("04", "EP12_01f", 1, "/", "disgust", NUMBER, None), ("05", "EP09_05f", 9, 9, "disgust", "onset = apex"),
        ("01", "EP02_01f", 47, 59, "disgust", TWICE, None), ("05", "EP1", 5, 9, "others", "others/sub05"),
        ("22", None, 4, 9, "others", NAME, None), ("?", "EP01_01", 4, 9, "others", NAME, None),
        ("18", "EP08_01", 4, 9, "others", FOLDER, None),
        *[("17", f"EP05_{i}", 4, 9, "others", reason) for i, reason in enumerate(DAMAGES)]],
    "samm": [
        ("006", "006_1_2", 5562, 5567, "Anger", "anger/sub006"), ("032", "032_3_2", 26, 27, "Anger", "anger/sub032"),
        ("013", "013_1_8", 562, 570, "Other", "others/sub013", "SAMM/013/013_1_8/013_{n:04d}.jpg"),
        ("011", "011_4_2", 4, 9, "Contempt", "contempt/sub011"), ("028", "028_4_1", 9, 43, "Anger", DAMAGES[0])],
    "mmew": [  # the second one's folder is stale
        (3, "S03-01-002", 1, 5, "happiness", "happiness/sub03"), (5, "S05-04-001", 1, 5, "others", FOLDER, MACRO),
        (4, "S04-02-001", 2, 8, "surprise", "surprise/sub04", MMEW + "Micro_Expression/disgust/{c}/{n}.jpg"),
        ("S13", "S13-04-001", 1, 10, "repression", "others/sub13", MMEW + "S13/{e}/{c}/{n}.jpg"),
        (30, "S30-06-001", 1, 3, "sadness", "sad/sub30", MMEW + "S30/{e}/{c}/{n}.jpg")],
    "casme3": [
        ("spNO.1", "a", "355", "360", "happy", "happiness/sub001"), ("spNO.1", "a", "400", "405", "sad", "sad/sub001"),
        ("spNO.1", "a", "355", "361", "happy", TWICE, None), ("spNO.1", "B", "900", "905", "sad", FOLDER, MAE),
        ("spNO.12", "J", "5", "9", "Others", "others/sub012", COLOR), ("spNO.4", "e", "1", "2", "sad", "sad/sub004"),
        ("spNO.12", "J", "50", "59", "anger", "anger/sub012", COLOR), ("spNO.149", "d", "112", "83", "sad", ORDER),
        ("spNO.12", "J", None, "85", "sad", NUMBER, None), ("spNO.12", "J", "500", "505", "fear", "fear/sub012"),
        ("spNO.12", "J", "80", "85", "sad", CUT, None), ("spNO.8", "K", 3, 7, "fear", "fear/sub008", CODE),
        ("spNO.7", "K", 31, 37, "sad", "sad/sub007", CODE)],
    "dfme": [
        ("sub0003", "sub0003_01", 46, 60, "happiness", "happiness/sub0003"),
        ("sub0003", "sub0003_02", 0, 5, "sadness", "sad/sub0003", "train_data/{c}/{n:05d}.PNG"),
        ("sub0650", "sub0650_11", 3, 5, "contempt", "contempt/sub0650", "USTC_partB/micro/fear/{c}/{n:05d}.png"),
        *[(f"sub{s}", f"sub{s}_01", 3, 5, "anger", FOLDER, None) for s in (1000, 1001, 1002)]]}
BAD_MARKS = {  # clip: its landmark file's bytes, None being no file, or how the right points are changed; its reason
    "006_1_2": (None, "no landmarks"), "sub0003_02": (b"PK\x03\x04", "landmarks cannot be used: "),
    "013_1_8": (lambda p: np.ones((98, 2)), "cannot be used: (98, 2) numbers, needed are (68, 2), none of them nan"),
    "EP1": (lambda p: p * np.nan, "needed are (68, 2), none of them nan"),
    "S04-02-001": (lambda p: 0 * p, "all points in one line: x 0 "),
    "EP03_02": (lambda p: p - p.min(0), "is not in the middle, so measured in others: x 0 to "),  # in the cropped face
    "sub0650_11": (lambda p: landmarks(*NOSE[1], SIDE), "those of another person: "),  # of sub0003
    "EP01_2": (lambda p: p / (200, 160), "fractions of the frame, needed are pixels: x 0.4"),
    "S13-04-001": (lambda p: p[:, ::-1], "(y, x), mirrored or rotated, by the outer corners of the eyes: x 62.5"),
    "EP06_02_01": (lambda p: (0, 170) + p * (1, -1), "upside down: the mouth is above the eyes: x "),
    "011_4_2": (lambda p: (300, 0) + p * (-1, 1), "(y, x), mirrored or rotated, by the outer corners of the eyes: x "),
    "032_3_2": (lambda p: p * 1.6, "outside of the frame, so measured in others: x 131.2 to 188.8, y 100"),
    "S30-06-001": (lambda p: p / 1.5, "too small a face, 38% of the height, so measured in others: x 54.67 to")}
# fmt: on


def number(text):
    """A subject or a frame of the sheet as a number, where it is one."""
    digits = re.search(r"\d+", str(text))
    return int(digits.group()) if digits else text


ALL = [(session, *entry) for session, entries in ENTRIES.items() for entry in entries]
EXPECTED = {f"{e[0]}_{e[6]}_{e[2]}_onset{number(e[3])}_apex{number(e[4])}.png": e for e in ALL if "/" in str(e[6])}
DROPPED = [(e[0], str(number(e[1])), e[2] or "", e[6]) for e in ALL if "/" not in (e[6] or "/")]
ANGLES = {entry: 37 * i for i, entry in enumerate(ALL)}
TINY = next(iter(EXPECTED))
TEXTURE = np.clip(128 + 400 * (cv2.GaussianBlur(np.random.RandomState(0).rand(160, 200), (0, 0), 2) - 0.5), 0, 255)


@functools.cache
def moved(angle):
    """The frame after a motion of 1 pixel towards `angle`, of 4 pixels at BUMP."""
    y, x = np.mgrid[:160, :200]
    size = 1 + 3 * np.exp(-((x - BUMP[0]) ** 2 + (y - BUMP[1]) ** 2) / (2 * 12**2))
    x, y = x - size * np.cos(np.radians(angle)), y - size * np.sin(np.radians(angle))
    return cv2.remap(TEXTURE, np.float32(x), np.float32(y), cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)


def save(path, content):
    """Write bytes, landmarks or an image."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if isinstance(content, bytes):
        Path(path).write_bytes(content)
    elif path.endswith(".npy"):
        np.save(path, content)
    else:
        Image.fromarray(content.clip(0, 255).astype(np.uint8)).save(path, quality=95)


def clip(pattern, onset, apex, angle, **names):
    """Frames onset, apex and the one after it, and beside them what is no frame."""
    for n, image in ((onset, TEXTURE), (apex, moved(angle)), (apex + 1, moved(angle + 180))):
        folder, name = os.path.split(pattern.format(n=n, **names))
        save(f"{folder}/{name}", moved(angle + 180))
        for no_frame in (f"._{name}", f"{name}.{n}.part"):  # of macOS; of a program that was killed
            shutil.copy(f"{folder}/{name}", f"{folder}/{no_frame}")
        save(f"{folder}/{name}", image)


def book(path, entries):
    """Write a session's sheet for some of ALL, offset always 0, and a second worksheet that is large and empty."""
    session, workbook = entries[0][0], openpyxl.Workbook()
    header = HEADERS[session].split("|")
    for line in 13 * (session == "samm") * [["a note: see Subject"]] + [header]:
        workbook.active.append(line)
    for _, subject, name, onset, apex, emotion, *_ in entries:
        cells = dict(subject=subject, filename=name, onset=onset, apex=apex, offset=0, emotion=emotion)
        words = [re.sub("estimated|frame| ", "", word.lower()) for word in header]
        workbook.active.append([cells.get(word, "=SUM(F2-D2)+1") if subject else None for word in words])
    workbook.create_sheet("Sheet2").cell(434, 17).font = Font(bold=True)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    workbook.save(path)


def landmarks(x, y, side):
    """68 points (x, y) around the tip of the nose, for which the crop is a square of the given side."""
    points = np.full((68, 2), (x, y), float)
    points[36:42] += np.array([-0.2, -0.25]) * side  # eyes
    points[42:48] += np.array([0.2, -0.25]) * side
    points[48:68, 1] += 0.1 * side  # mouth
    points[[8, 19, 57], 1] = y + np.array([28, -16, 8]) * side / 64  # chin, brow, lower lip: twice 28 + 16 - 8 are 64
    return points


def make_tree(raw, marks):
    """All five datasets as they were downloaded, and landmarks for them."""
    homes = {session: f"{raw}/{sheet.split('/')[0]}" for session, sheet in SHEETS.items()}
    for entry, angle in ANGLES.items():
        session, subject, name, onset, apex, label, gives, *frames = entry
        names, (right, points) = dict(s=number(subject), c=name, e=label, o=onset, a=apex), LAYOUT[session]
        if frames != [None]:
            clip(f"{homes[session]}/{(frames or [right])[0]}", number(onset), number(apex), angle, **names)
        if entry not in EXPECTED.values():
            continue
        for decoy in (f"__MACOSX/{right}", *DECOYS.get(session, [])):
            clip(f"{homes[session]}/{decoy}", number(onset), number(apex), angle + 180, **names)
        content, own = BAD_MARKS.get(name, [lambda p: p])[0], landmarks(*NOSE[names["s"] % 2], SIDE)
        own[0] += angle / 1e6 * (name != "sub0003_01")  # no two clips have the same, but for this one and sub0650's
        if content is not None:
            save(f"{marks}/{session}/{points.format(**names)}", content(own) if callable(content) else content)
    for decoy in ("mmew/Macro_Expression/happiness/S03-01-002.npy", "casme3/part_C/spNO.1/a/color/color.npy"):
        save(f"{marks}/{decoy}", landmarks(60, 80, 60))
    for session, sheet in SHEETS.items():
        book(f"{raw}/{sheet}", [entry for entry in ALL if entry[0] == session])
    os.remove(f"{homes['samm']}/SAMM/028/028_4_1/028_00043.jpg")
    place = f"{homes['casme2']}/CASME2_RAW_selected/CASME2_RAW_selected/sub17/EP05_"
    os.remove(f"{place}0/img9.jpg")
    os.truncate(f"{place}2/img9.jpg", 1500)
    for name, content in {"1/img4": b"", "3/img004": TEXTURE, "4/img9": TEXTURE, "5/img9": TEXTURE[:90]}.items():
        save(f"{place}{name}.jpg", content)
    os.remove(f"{place}6/img9.jpg")
    Image.fromarray(257 * np.arange(256, dtype=np.uint16).reshape(16, 16)).save(f"{place}6/img9.png")


def here(*words, main=prepare.main):
    """main() in this process: what it printed, or the one line "error: ..." that it ended with."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["a tool", *map(str, words)])
        try:
            common.launch(main)
        except SystemExit as stop:
            return str(stop.code or out.getvalue())
    return out.getvalue()


def refused(words, *parts):
    """A user's mistake: one line that has all of the parts."""
    line = here(*words)
    assert re.fullmatch("error: .*", line) and all(str(part) in line for part in parts), (parts, line)


def images(out):
    """{path below OUT: time of writing} of the images there; each is read to its end."""
    paths = list(Path(out).glob("*/*.png"))
    assert all(Image.open(path).size == (64, 64) and Image.open(path).load() for path in paths)
    return {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in paths}


def table(out, name, *columns):
    """The lines of folds.csv or report.csv: dicts, or tuples of some columns."""
    lines = list(csv.DictReader(Path(out, name).read_text("utf-8").splitlines()))
    return [tuple(line[column] for column in columns) for line in lines] if columns else lines


def shows(path, angle, place=(125 / 200, 65 / 160), tolerance=0.06):
    """Whether an image shows motion in the direction `angle`, most of it at `place` (x, y), from 0 to 1."""
    hue, _, value = np.asarray(Image.open(path).convert("HSV"), np.float32).transpose(2, 0, 1)
    mean = np.degrees(np.angle((value**2 * np.exp(2j * np.pi * hue / 255)).sum()))
    value = cv2.GaussianBlur(value, (0, 0), len(value) / 16)[5:-5, 5:-5]
    found = (np.array(np.unravel_index(value.argmax(), value.shape))[::-1] + 5.5) / (len(value) + 10)
    return abs((mean - angle + 180) % 360 - 180) < 4 and abs(found - place).max() < tolerance


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """All five datasets, prepared by one command: the folder, the command's words, what it printed."""
    root = tmp_path_factory.mktemp("prepare")
    make_tree(f"{root}/raw", f"{root}/marks")
    words = ["--raw", f"{root}/raw", "--out", f"{root}/out", "--size", 64, "--sessions", *HEADERS]
    return root, words, here(*words)


# ---- prepare: what is written, what is left out, folds ---------------------------------------------------------------
def test_every_usable_entry_gives_an_image_of_its_own_frames_and_every_other_a_reason(prepared):
    root, _, screen = prepared
    out = root / "out"
    assert set(images(out)) == set(EXPECTED), screen
    assert [key for key, entry in EXPECTED.items() if not shows(out / key, ANGLES[entry])] == []
    assert not any(".jpg" in path for path in prepare.explore("samm", f"{root}/raw/SAMM")[1])  # clips are not entered
    assert table(out, "report.csv", "session", "subject", "clip", "reason") == DROPPED
    details = table(out, "report.csv", "row", "clip", "detail")
    assert ("9", "d", "") in details and ("12", "EP02_01f", "line 2 of the sheet is used") in details
    detail = dict(line[1:] for line in details)
    found = r"frame 43; .*SAMM/028/028_4_1 has 5 files \(.jpg .part\), numbers 9 to 44"
    assert re.fullmatch(found, detail["028_4_1"]) and "more than 8 bits" in detail["EP05_6"]
    assert "left out:     1 entries of samm: apex frame missing\n" in screen
    assert re.findall("warning: (.*): its raw frames stay whole", screen) == ["casme2", "samm", "dfme"]
    assert {  # entries of the sheet, of Table 1, usable, expected; words as they are after normalising
        "casme2 others 12 12 2 the official sheet has 99", "casme2 (blank) 1 0 0", "casme2 sad 1 0 0",
        "casme2 all 21 19 6 244", "samm all 5 5 4 134", "mmew all 5 5 4 292", "casme3 all 13 13 8 803",
        "dfme all 6 6 3 1856",
    } <= {" ".join(line.split()) for line in screen.splitlines()}  # fmt: skip


def test_folds_belong_to_the_sheet(prepared):
    """To all entries with a subject, a clip and an emotion of Table 1, with an image or not, ordered as numbers."""
    everything = table(prepared[0] / "out", "folds.csv")
    assert {line["key"] for line in everything} == {"", *EXPECTED} and len(everything) == 17 + 5 + 5 + 13 + 6
    lines = [line for line in everything if line["session"] == "casme3"]
    words = ["{subject} {clip} {onset} {slcv}".format(**line) + "*" * bool(line["key"]) for line in lines]
    assert words == ["1 a 355 0*", "1 a 355 0", "1 a 400 0*", "1 b 900 0", "4 e 1 1*", "7 k 31 2*", "8 k 3 3*",
                     "12 j 5 4*", "12 j 50 4*", "12 j 80 4", "12 j 500 4*", "12 j  4", "149 d 112 0"]  # fmt: skip
    for fold, test in enumerate(protocols.split(range(13), "ilcv")):
        assert all(lines[i]["ilcv"] == str(fold) for i in test)


def test_second_run_makes_only_what_is_missing_and_with_other_settings_nothing(prepared):
    root, words, screen = prepared
    out, settings, samm = root / "out", root / "out" / "prepare.json", root / "raw" / "SAMM"
    key = "samm_anger/sub006_006_1_2_onset5562_apex5567.png"
    before, kept, tables = images(out), settings.read_text(), [table(out, "report.csv"), table(out, "folds.csv")]
    os.renames(samm / "SAMM_Micro_FACS_Codes_v2.xlsx", samm / "a" / "SAMM_Micro_FACS_Codes_v2.xlsx")
    os.renames(samm / "SAMM" / "011", root / "011")  # its image is there
    assert f"{len(EXPECTED)} images are there already, 15 to make" in here(*words, "samm")  # named twice
    os.renames(root / "011", samm / "SAMM" / "011")
    assert images(out) == before and [table(out, "report.csv"), table(out, "folds.csv")] == tables
    assert f"casme3: 13 entries in {SHEETS['casme3'].partition('/')[2]}, " in screen
    for old, new, part in (("64", "32", "size 32, this is 64"), ('e": 15', 'e": 21', "farneback"),
                           ("whole frame", "landmarks", "casme2 crop landmarks"),
                           ('"raw"', '"cropped"', "frames"), (cv2.__version__, "4.0", "opencv 4.0, this"),
                           ('sha256": "', 'sha256": "0', "sheet_sha")):  # fmt: skip
        settings.write_text(kept.replace(old, new))
        refused([*words, "--sessions", "casme2"], out, part, "another --out")
    settings.write_text(kept.replace(np.__version__, "0"))
    for name, content in (("report.csv", "session,subject".encode("utf-16")), ("folds.csv", b"session;subject\n")):
        (out / name).write_bytes(content)  # saved by another program
        (out / key).unlink(missing_ok=True)
        refused(words, name, "delete it and run again")
        assert not (out / key).exists()  # it ends before the work, not after it
        os.remove(out / name)
    here(*words)
    assert images(out).keys() == before.keys() and [table(out, "report.csv"), table(out, "folds.csv")] == tables
    record = json.loads(settings.read_text())
    assert [versions["numpy"] for versions in record["versions"]] == ["0", np.__version__]
    assert list(record["sessions"]) == list(HEADERS) and record["sessions"]["samm"]["sheet"].startswith("a" + os.sep)


def test_landmarks_crop_both_frames_at_the_nose(prepared):
    assert prepare.crop_box(landmarks(20, 145, 60), 200, 160) == [0, 115, 50, 160]  # cut off at the edges
    root, words, _ = prepared
    os.makedirs(f"{root}/z")
    os.symlink(f"{root}/marks", f"{root}/z/landmarks")  # as it may be unpacked
    out, crop = f"{root}/cropped", ["--crop", "mmew", "casme3", "--flow"]
    words = [*words, "--out", out, f"--landmarks={root}/z"]
    here(*words, *crop)
    usable = {key: entry for key, entry in EXPECTED.items() if entry[2] not in BAD_MARKS}
    assert set(images(out)) == set(usable)
    for key, entry in usable.items():
        place = np.subtract(BUMP, NOSE[number(entry[1]) % 2]) / SIDE + 0.5
        assert shows(f"{out}/{key}", ANGLES[entry], place, 0.12), key
        flow = np.load(f"{out}/.flow/{key[:-4]}.npy")  # as OpenCV gave it, before it was coded and resized
        assert flow.dtype == np.float32 and flow.shape == (SIDE, SIDE, 2) and 3 < np.hypot(*flow.T).max() < 5, key
        coded = Image.fromarray(data.flow_to_image(flow[None])[0].transpose(1, 2, 0)).resize((64, 64), 2)  # bilinear
        assert np.array_equal(np.asarray(coded), np.asarray(Image.open(f"{out}/{key}")))
    why = {clip: f"{reason}: {detail}" for clip, reason, detail in table(out, "report.csv", "clip", "reason", "detail")}
    assert all(part in why[name] for name, (_, part) in BAD_MARKS.items()), why
    refused([*words, *crop[:-1]], "flow True", "another --out")
    save(f"{root}/marks/samm/006/006_1_2.npy", landmarks(120, 60, 60))
    refused([*words, *crop], "samm landmarks_sha256", "another --out")
    save(f"{root}/others/samm/099_1_1.npy", landmarks(120, 60, 60))
    refused([*words, f"--landmarks={root}/others", "--sessions=samm"], "no usable entry", "found", "/099_1_1.npy")
    save(f"{root}/marks/mmew/S03-01-002.npy", landmarks(120, 60, 60))
    refused([*words, *crop, "--out", f"{root}/new"], "two landmark files", "/mmew/S03-01-002.npy",
            "/mmew/happiness/S03-01-002/S03-01-002.npy")  # fmt: skip
    # Sessions that the benchmark takes whole stay whole, though there are landmarks.
    shutil.rmtree(f"{root}/marks/dfme")
    screen = here(*words, "--out", f"{root}/whole", "--whole", "samm", "--sessions", *list(HEADERS)[1:])
    assert screen.count("folders), whole frame") == 4 and re.findall("warning: (.*): its", screen) == ["dfme"]
    assert all(shows(f"{root}/whole/{key}", ANGLES[EXPECTED[key]]) for key in EXPECTED if "casme2" not in key)
    for more in (["--crop", "dfme"], ["--crop", "samm", "--whole", "samm"], ["--whole", "casme2", "--sessions=samm"]):
        refused([*words, *more], f"--crop or --whole {more[1]}")
    assert not os.path.exists(f"{root}/new") and not os.path.exists(f"{root}/whole/.flow")


def test_cropped_frames_are_preferred_without_landmarks_and_raw_frames_with(tmp_path, monkeypatch):
    raw, words = f"{tmp_path}/raw/casme2", ["--raw", f"{tmp_path}/raw", "--sessions", "casme2", "--size", 64]
    book(f"{raw}/CASME2-coding-20140508.xlsx", ALL[:1])
    clip(f"{raw}/Cropped-updated/Cropped/sub01/EP02_01f/reg_img{{n}}.jpg", 46, 59, 60)
    clip(f"{raw}/CASME2-RAW/sub01/EP02_01f/img{{n}}.jpg", 46, 59, 240)
    clip(f"{tmp_path}/elsewhere/Cropped/sub01/EP02_01f/reg_img{{n}}.jpg", 46, 59, 90)
    os.symlink(tmp_path / "elsewhere", f"{raw}/a")
    save(f"{tmp_path}/marks/casme2/sub01/EP02_01f.npy", landmarks(*BUMP, 90))
    out, raw_out = ["--out", tmp_path / "out"], tmp_path / "raw frames"
    screen = here(*words, *out)
    assert "1 clips of cropped frames (1 raw and 1 cropped in 3 folders), whole frame" in screen
    assert shows(f"{tmp_path}/out/{TINY}", 60)  # of Cropped-updated, before a in order
    assert "warning" not in screen and "folds.csv gets no lines of casme2: 1 subjects are too few" in screen
    out += ["--landmarks", tmp_path / "marks"]
    screen = here(*words[:4], *out, "--out", raw_out)
    assert "1 clips of raw frames (1 raw and 1 cropped in 3 folders), landmarks" in screen
    assert shows(raw_out / TINY, 240, (0.5, 0.5), 0.12) and Image.open(raw_out / TINY).size == (256, 256)  # the default
    shutil.rmtree(f"{raw}/CASME2-RAW")
    assert "1 clips of cropped frames (0 raw and 1 cropped in 2 folders), whole frame" in here(*words, *out)
    refused([*words, *out, "--crop", "casme2"], "casme2 crop whole frame, this is landmarks")
    monkeypatch.setattr(data, "flow_to_image", lambda flow: np.zeros((1, 3, 8, 8), np.uint8))
    refused([*words, *out], "coding", "another --out")


def test_view_writes_down_the_folds_that_a_folder_has_had(prepared, tmp_path):
    out = shutil.copytree(prepared[0] / "out", tmp_path / "out")
    assert "has a folds.csv already" in here("folds", "--data", out, main=view.main)
    (out / "folds.csv").unlink()
    before = {session.name: session for session in data.load(str(out), list(HEADERS), 8)}
    screen = here("folds", "--data", out, main=view.main)
    assert re.findall(r"no lines of (\w+): \d subjects are too few", screen) == ["samm", "mmew", "dfme"]
    lines = {line["key"]: line for line in table(out, "folds.csv")}
    assert len(lines) == len(before["casme2"].keys) + len(before["casme3"].keys)
    line = dict(session="casme3", subject="12", clip="sub012_j_onset5_apex9", onset="")
    assert line.items() < lines["casme3_others/sub012_J_onset5_apex9.png"].items()
    for name, protocol in itertools.product(("casme2", "casme3"), ("slcv", "ilcv")):
        for fold, test in enumerate(protocols.split(before[name].subjects, protocol)):
            assert {lines[key][protocol] for key in before[name].keys[test]} == {str(fold)}
    check = functools.partial(here, "check", "--data", out, "--sessions", "casme2", main=view.main)
    for key in before["casme2"].keys[:2]:
        Image.new("L", (64, 64)).save(out / key)
    assert "2 images have one colour" in check() and "folds.csv: casme2 has" in check()
    text = (out / "folds.csv").read_text()
    (out / "folds.csv").write_text(text.replace(",0,", ",7,", 1))
    assert check().startswith("error: session casme2: ") and "has the folds 7 and " in check()


def test_view_compares_the_folds_of_two_folders(prepared, tmp_path):
    """One line has another fold, one another image, one is gone: the last two move no sample."""
    out, screen = prepared[0] / "out", lambda *words: here("folds", "--data", *words, main=view.main)
    other = shutil.copytree(out, tmp_path / "other")
    assert screen(out, "--against", other) == "46 and 46 lines; of 46 entries in both, 0 are in other folds\n"
    first, *lines = (out / "folds.csv").read_text().splitlines(keepends=True)
    changed = [line for line in lines if not line.startswith("samm,32")]
    changed = [line.replace("casme2_disgust/sub01_EP03_02_onset131_apex161.png", "") for line in changed]
    (other / "folds.csv").write_text(first + "".join(changed).replace("dfme,3,sub0003_01,46,dfme_happiness/"
        "sub0003_sub0003_01_onset46_apex60.png,0", "dfme,3,sub0003_01,46,dfme_happiness/"
        "sub0003_sub0003_01_onset46_apex60.png,4"))  # fmt: skip
    gone, image, fold, total = screen(out, "--against", other).splitlines()
    for line, start, end in ((gone, "casme2 1 ep03_02 131: slcv 0 ilcv ", " no image"),
                             (image, "samm 32 032_3_2 26: slcv ", " | no line "),
                             (fold, "dfme 3 sub0003_01 46: slcv 0 ilcv ", ".png")):  # fmt: skip
        assert line.startswith(start) and line.endswith(end)
    assert total == "46 and 45 lines; of 45 entries in both, 1 are in other folds"
    (other / "folds.csv").write_bytes(b"\xef\xbb\xbf" + (out / "folds.csv").read_bytes().replace(b"casme", b"mmew"))
    assert screen(out, "--against", other).endswith("lines; of 16 entries in both, 0 are in other folds\n")
    (other / "folds.csv").write_bytes(first.encode() + b"x,1,a,1,,0,0")
    assert screen(out, "--against", other).endswith("have no entry in common")
    (other / "folds.csv").write_bytes(b"")
    assert "no lines with the columns session,subject," in screen(out, "--against", other)
    assert here("check", "--data", out, "--against", out, main=view.main) == "error: check takes no --against"


# ---- prepare: annotation sheets --------------------------------------------------------------------------------------
@pytest.mark.parametrize("session, names, error", [  # without an error the first one is the right one
    ("casme2", "copy/CASME2-coding-20140508.xlsx|CASME2-coding-20140508.csv", ""),  # the .xlsx is the original
    ("casme2", "CASME2-coding-20140508.csv|CASME2-coding-20190701.xlsx", ""),
    ("casme2", "CASME2.xlsx|CASME2-ObjectiveClasses.xlsx|~$CASME2.xlsx", ""), ("samm", "SAMM.xlsx|._SAMM.xlsx", ""),
    ("casme3", "cas(me)3_part_A_ME_label_JpgIndex_v1.xlsx|cas(me)3_part_A_MaE_label_JpgIndex_v2.xlsx", ""),
    ("casme3", "casme3_table.xlsx|casme3_MaE.xlsx", ""), ("mmew", "MMEW_Micro_Exp (20).xlsx|MMEW.xlsx", ""),
    ("mmew", "MMEW_Micro_Exp.csv|MMEW_Micro_Exp_new.xlsx", ""), ("mmew", "a/MMEW.xlsx|b/MMEW.xlsx", ""),  # equal bytes
    ("dfme", "coding.xlsx|test_coding.txt|testA_full_with_AU.xlsx", ""),
    ("casme2", "a.txt", "no annotation sheet CASME2-coding-20140508.xlsx or .csv .*no table at all; CASME II .*/e2"),
    ("casme2", "CASME2-ObjectiveClasses.xlsx|CASME2-coding-20140508.xls", "no .*found CASME2-O.*-coding-20140508.xls;"),
    ("mmew", "MMEW_Micro_Exp (1).xlsx|MMEW_Micro_Exp (2).xlsx", r"several sheets .*\(1\).*\(2\)"),
])  # fmt: skip
def test_the_right_one_of_several_sheets(tmp_path, session, names, error):
    paths = [f"{tmp_path}/{name}" for name in names.split("|")]
    for path in paths:
        save(path, os.path.basename(path).encode())
    try:
        assert prepare.find_sheet(session, "RAW", sorted(paths)) == paths[0] and not error
    except SystemExit as stop:
        assert error and re.match(f"error: RAW: {error}", stop.code)


def test_sheets_as_csv_and_wrong_ones(tmp_path):
    book(f"{tmp_path}/sheet.xlsx", ALL[:7])
    entries = prepare.read_sheet("casme2", f"{tmp_path}/sheet.xlsx")
    lines = list(openpyxl.load_workbook(f"{tmp_path}/sheet.xlsx").worksheets[0].values)
    for delimiter in ",;\t":
        with open(f"{tmp_path}/sheet.csv", "w", newline="", encoding="utf-8-sig") as out:
            csv.writer(out, delimiter=delimiter).writerows([*line, "Emotion"] for line in lines)  # the first counts
            out.write("\r\n")  # an empty line
        assert prepare.read_sheet("casme2", f"{tmp_path}/sheet.csv") == entries and len(entries) == 6
    save(f"{tmp_path}/sheet.csv", b"Emotion,Apex,Subject,Onset,Filename\nfear,5,sub0001,3")  # no offset, no file name
    entry = dict(session="dfme", subject="sub0001", clip="", onset="3", apex="5", emotion="fear", row=2)
    assert prepare.read_sheet("dfme", f"{tmp_path}/sheet.csv") == [entry]
    for name, content, error in (
        ("sheet.csv", b"", "has no cell Subject"), ("sheet.csv", b"a;b\n1;2", "has no cell Subject; needed: Subject, "),
        ("sheet.csv", b"Subject;Filename;Emotion\n1;2;3", "has only the columns Subject, Filename, Emotion;.*casme/e2"),
        ("sheet.csv", "Subject,Filename,Onset,Apex,Emotion\n1,副本,1,2,fear".encode("gbk"), "not in UTF-8; save"),
        ("sheet.csv", "Subject,Filename,Onset,Apex,Emotion\n1,a,1,2,fear".encode("utf-16"), "not in UTF-8; save"),
        ("sheet.xlsx", b"<html>Sign in</html>", "not readable .*zip"),
    ):  # fmt: skip
        save(f"{tmp_path}/{name}", content)
        with pytest.raises(SystemExit, match=f"^error: {tmp_path}/{name}: {error}"):
            prepare.read_sheet("casme2", f"{tmp_path}/{name}")


def test_an_emotion_whose_number_is_not_the_official_one_is_marked(tmp_path, capsys):
    """One contempt has become happiness, as in a circulating copy of SAMM's sheet: the sum is right."""
    counts = data.DATASETS["samm"] | {"contempt": 11, "happiness": 27}
    entries = [dict(session="samm", emotion=word, reason="") for word, count in counts.items() for _ in range(count)]
    prepare.report(tmp_path, ["samm"], entries)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1:3] + line[-1:] for line in lines if "official" in line] == [
        ["contempt", "11", "12"],
        ["happiness", "27", "26"],
    ]
    assert ["samm", "all", "136", "136", "136", "134"] in lines


def test_frames_that_have_not_the_numbers_of_the_sheet(tmp_path):
    raw, out = f"{tmp_path}/raw/casme2", tmp_path / "out"
    book(f"{raw}/CASME2-coding-20140508.xlsx", ALL[:1])
    clip(f"{raw}/sub01/EP02_01f/img{{n}}.jpg", 1, 14, 60)  # counted from 1
    line = here("--raw", f"{tmp_path}/raw", "--out", out, "--sessions", "casme2")
    assert line == "error: casme2: not one usable image; report.csv says why"
    (reason,) = table(out, "report.csv", "reason", "detail")
    assert reason[0] == "onset frame missing" and reason[1].endswith(" has 6 files (.jpg .part), numbers 1 to 15")
    shutil.rmtree(f"{raw}/sub01/EP02_01f")
    save(f"{raw}/sub01/EP02_01f/46.tiff", TEXTURE)
    here("--raw", f"{tmp_path}/raw", "--out", out, "--sessions", "casme2")
    assert table(out, "report.csv", "detail")[0][0].endswith("/EP02_01f has 1 files (.tiff), no frame")


def test_names_that_are_not_utf8(tmp_path):
    """As an archive packed on a Chinese Windows unpacks on Linux, before a terminal that knows UTF-8 alone."""
    word = os.fsdecode("原始数据".encode("gbk"))
    entries = [("casme2", f"{s:02d}", f"EP0{k}", 4, 9, ("happiness", "others")[k]) for s in range(8) for k in (0, 1)]
    book(f"{tmp_path}/raw/casme2/{word}/CASME2-coding-20140508.xlsx", entries)
    for i, (_, s, c, o, a, e) in enumerate(entries):
        if i:  # the first one's reason has the name
            clip(f"{tmp_path}/raw/casme2/{word}/sub{s}/{c}/img{{n}}.jpg", o, a, 20 * i)
        save(f"{tmp_path}/out/casme2_{e}/{s}_{c}_{word}.png", moved(20 * i))
    os.makedirs(f"{tmp_path}/raw/casme2/{word}/sub00/EP00")
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}

    def run(*words):
        return subprocess.run([sys.executable, "-m", *words], cwd=HERE, env=environment, capture_output=True, text=True)

    done = run("tools.prepare", "--raw", f"{tmp_path}/raw", "--out", f"{tmp_path}/new", "--sessions", "casme2")
    assert done.returncode == 0 and r"\udcca\udcfd" in done.stdout
    assert len(list((tmp_path / "new").glob("*/*.png"))) == 15
    assert os.fsencode(word) in (tmp_path / "new/report.csv").read_bytes()
    pixels = ["--data", f"{tmp_path}/out", "--out", f"{tmp_path}/{word}"]
    pixels += "--preset tiny --protocol slcv --sessions casme2".split()
    first = run("controls.pixels", *pixels)
    assert first.returncode == 0 and "casme2 16 of 246, subjects 8 of 26" in first.stdout
    assert run("tools.view", "folds", "--data", f"{tmp_path}/out").returncode == 0
    assert "16 lines, 0 without an image" in run("controls.pixels", *pixels).stdout
    assert run("tools.report", f"{tmp_path}/{word}", "--csv", f"{tmp_path}/all.csv").returncode == 0
    Path(tmp_path, "out/casme2_others", f"00_{word}.png").write_bytes(b"no image")
    last = run("tools.view", "check", "--data", f"{tmp_path}/out")
    error = r"error: .*/00_\S+\\udcca\S+.png: not a readable image .*\n"
    assert last.returncode == 1 and re.fullmatch(error, last.stderr)


# ---- prepare: what users get wrong, and what machines do -------------------------------------------------------------
def test_mistakes_end_with_one_line_and_nothing_written(prepared, tmp_path, monkeypatch):
    raw, words = f"{prepared[0]}/raw", ["--raw", f"{prepared[0]}/raw", "--out", f"{tmp_path}/out", "--sessions", "samm"]
    save(f"{tmp_path}/file", b"")
    os.makedirs(tmp_path / "marks" / "samm" / "006")
    for name in ("no clips", "other"):
        book(f"{tmp_path}/{name}/samm/SAMM.xlsx", [entry for entry in ALL if entry[0] == "samm"])
    save(f"{tmp_path}/other/samm/099_1_1/1.jpg", TEXTURE)  # of no clip of the sheet
    for option, value, *parts in (
        ("--raw", "nowhere", "--raw 'nowhere'", "samm"), ("--landmarks", "", "--landmarks ''", "no such folder"),
        ("--size", 7, "--size 7", "8 to 1024"), ("--sessions", "smic", "smic"), ("--out", "", "--out ''"),
        ("--raw", f"{tmp_path}/no clips", "no clip folders", "M.Yap/dataset.php", "found SAMM.xlsx"),
        ("--raw", f"{tmp_path}/other", "no usable entry", "found", "other/samm/099_1_1"),
        ("--raw", f"{tmp_path}/other/samm", "other/samm: no folder samm", "found 099_1_1, SAMM.xlsx", "M.Yap"),
        ("--landmarks", tmp_path, "none of the folders samm, f"),
        ("--landmarks", f"{tmp_path}/marks", "marks/samm", "no landmark files, found 006"),
        ("--out", f"{tmp_path}/file", "/file", "File exists"), ("--out", raw, raw, "not a folder that prepare"),
        ("--out", f"{tmp_path}/file/out", "/file/out", "Not a directory"),
    ):  # fmt: skip
        refused([*words, option, value], *parts)
    for module, package in (("cv2", "opencv-python-headless"), ("openpyxl", "openpyxl")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            refused(words, f"pip install {package}")
    assert not os.path.exists(f"{tmp_path}/out") and len(os.listdir(raw)) == 5
    screen = here("--help")
    assert all(word in screen for word in ("sub01/EP02_01f/reg_img46.jpg", "spNo.1_a_355", "SAMM_Mic", "landmarks"))


def test_interrupted_killed_and_two_at_once(prepared, tmp_path, monkeypatch, capsys):
    """Whenever a run ends, what is there is whole, and others go on from there."""
    root, words, _ = prepared
    command = functools.partial(runpy.run_path, prepare.__file__, run_name="__main__")
    columns, replace = ("session", "subject", "clip", "onset", "slcv", "ilcv"), os.replace
    save(f"{tmp_path}/prepare.json.77.part", b"{")  # of one that was killed at its first write
    full = OSError(28, "No space left on device", "a.png")
    for stop, said in ((KeyboardInterrupt, "130"), (full, "error: a.png: No space left on device"), (SystemExit, "")):
        before, calls = images(tmp_path), itertools.count()

        def ends(*paths, calls=calls, stop=stop):  # and leaves the file without its name, as a kill does
            if next(calls) == 5:
                raise stop
            replace(*paths)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", ends)
            assert here(*words, "--out", tmp_path, main=command).endswith(said)
        assert len(images(tmp_path)) == len(before) + 3 and before.items() <= images(tmp_path).items()
        # The folds are those of the whole folder, already.
        assert table(tmp_path, "folds.csv", *columns) == table(root / "out", "folds.csv", *columns)
    assert "interrupted; the images that are made are kept" in capsys.readouterr().err
    command = [sys.executable, "-m", "tools.prepare", *words[:2], "--size=64", "--out", tmp_path, "--sessions"]
    runs = [subprocess.Popen([*command, *names], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for names in (("casme2", "samm", "mmew", "casme3"), ("samm", "mmew", "casme3", "dfme"))]  # fmt: skip
    assert [(run.communicate()[1], run.returncode) for run in runs] == [(b"", 0)] * 2
    assert images(tmp_path).keys() == set(EXPECTED) and before.items() <= images(tmp_path).items()
    for name in [*EXPECTED, "folds.csv", "report.csv"]:
        assert (tmp_path / name).read_bytes() == (root / "out" / name).read_bytes()
    assert set(json.loads((tmp_path / "prepare.json").read_text())["sessions"]) == set(HEADERS)


def test_files_are_written_whole_and_by_one_run_at_a_time(prepared, tmp_path, monkeypatch):
    locks, written, lock = [], [], prepare.lock
    monkeypatch.setattr(prepare, "lock", lambda out: locks.append(lock(out)) or locks[-1])
    locked = lambda: any(not file.closed for file in locks)  # noqa: E731
    monkeypatch.setattr(protocols, "write", lambda path, _: written.append((os.path.relpath(path, tmp_path), locked())))
    here(*prepared[1], "--out", tmp_path, "--flow", "--sessions", "samm")
    keys = [(name, False) for key in EXPECTED if "samm" in key for name in (f".flow/{key[:-4]}.npy", key)]
    assert written == [("prepare.json", True), ("folds.csv", True), *keys, ("folds.csv", True), ("report.csv", True)]
    assert not any(path.is_file() for path in tmp_path.glob("**/[!.]*"))
    fcntl = pytest.importorskip("fcntl")
    with lock(tmp_path), open(tmp_path / ".lock") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    save(f"{tmp_path}/image.png", b"of another run")
    assert prepare.make_image({"key": "image.png", "folder": None}, tmp_path, 64, False) == ("", "")


# ---- report, view, tables, on run folders written by hand -----------------------------------------------------------
# Two sessions of two rows, disgust anger | disgust fear, and two folds. Right after session 1: 1 of 2 and 1 of 1; after
# session 2, of four each: by sum 2 and 3, by prob 3 and 3, by centered 1 and 3, by max 3 and 2.
FINAL = [[3, 0, -1, 1.5], [1, 2, -4, -5], [2, -1, -4, 1], [2, 2.2, 1.9, 0]]
FINAL += [[1, 0, -3, 0.5], [0, 0, 0, 1], [2, 0, -3, 1], [1, 0, 1, 1.4]]
ROWS = dict(emotions=["disgust", "anger", "fear"], row_emotion=[0, 1, 0, 2], row_session=[0, 0, 1, 1])
HAND = [dict(ROWS, labels=["disgust", "anger", "disgust", "fear"], session=[0, 0, 1, 1], subjects=[1, 2, 1, 2],
             scores_0=[[1.0, 0.0]] * 2, scores_1=FINAL[:4], train_counts=[[5, 3, 0], [6, 3, 8]]),
        dict(ROWS, labels=["disgust", "fear", "fear", "disgust"], session=[0, 1, 1, 1], subjects=[2, 1, 1, 3],
             scores_0=[[2.0, 1.0]], scores_1=FINAL[4:], train_counts=[[2, 4, 0], [9, 4, 2]])]  # fmt: skip
BETTER = [HAND[0] | dict(scores_1=9 * np.eye(4)[[0, 1, 0, 3]]), HAND[1]]  # all four of fold 0 right after session 2
PEOPLE = [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]  # (session, subject)


def read(arrays):
    """The arrays of a fold as they are read from its file."""
    times = sum(name.startswith("scores_") for name in arrays)
    return {name: np.array(value) for name, value in arrays.items()} | {"seconds": np.zeros(times)}


def write_run(folder, files=HAND, **changes):
    """A run's folder as protocols.Run writes it, without the folds that are None; the later, the newer."""
    about = {"made": changes.pop("made", f"{time.time_ns():022d}"), "prepared": changes.pop("prepared", None)}
    arguments = dict(method="der", backbone="vit", protocol="ilcv", preset="tiny", seed=0, changed={})
    arguments |= {name: changes.pop(name) for name in list(changes) if name in arguments}
    info = dict(arguments=arguments, merges=["sum", "prob"], synthetic=True, fold_count=2, images="i0", folds="f0",
                counts={"casme2": dict(samples=239, subjects=26), "samm": dict(samples=130, subjects=27)},
                weights="vit.pt", code={"der.py": "0"}, versions={"torch": "2.14"}) | changes  # fmt: skip
    info.setdefault("tests", info["folds"])
    os.makedirs(folder)
    (folder / "run.json").write_text(json.dumps(about | {"info": info}))
    for i, arrays in enumerate(files):
        if arrays:
            own = dict(fold=i, identity=protocols._sha(info), threads=1, processor="AVX2", device="cpu")
            np.savez(folder / f"fold{i}.npz", **own | read(arrays))


def as_line(*seeds):
    """A line of a table, given the files of each seed, with what the functions on subjects ask of it."""
    trials = [dict(enumerate(map(read, files))) for files in seeds]
    return {"trials": trials, "seeds": [*range(len(seeds))], "fold": trials[0][0], "counts": [0, 1], "merge": "sum"}


def lines_of(text):
    """The lines of all Markdown tables, {first two cells: the others}."""
    lines = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {(line[0], line[1]): " ".join(line[2:]) for line in lines}


@pytest.fixture
def call(monkeypatch, capfd):
    def run(tool, *words):  # what a command prints, and its notes with its one line of error
        monkeypatch.setattr(sys, "argv", [tool.__file__, *map(str, words)])
        try:
            tool.main()
        except SystemExit as stop:
            print(stop.code or "", file=sys.stderr)
        return capfd.readouterr()

    return run


def test_report_by_hand(tmp_path, call, monkeypatch):
    write_run(tmp_path / "a" / "1")
    write_run(tmp_path / "b" / "1", method="new", merges=["max", "prob"], code={os.path.join("controls", "new.py"): ""})
    monkeypatch.setattr(report, "paper", lambda line: [1, 2, 3, 2] if line["method"] == "der" else [])
    text = call(report, tmp_path, "--details", "--csv", tmp_path / "a.csv").out
    size = [np.mean([abs(x[r] - sum(x) / 4) for x in FINAL for r in own]) for own in ((0, 1), (2, 3))]
    ends = report.intervals(*report.by_subject(as_line(HAND), "sum"))  # tested against a loop below
    last = "{:.1f} to {:.1f}".format(*ends["accuracy"][:, 3])
    for line, values in {
        ("backbone", "method"): "S1 S2 avg last last, 95 % last by prob",
        ("-", "always the commonest emotion"): "25.00 37.50 31.25 37.50 - -",
        ("vit", "der"): f"75.00 ± 35.36 62.50 ± 17.68 68.75 ± 26.52 62.50 ± 17.68 {last} 75.00",
        ("vit", "der, the paper, on its own preparation"): "1.00 2.00 3.00 2.00 - -",
        ("sum", "pooled accuracy"): "66.67 62.50 64.58 62.50",
        ("sum", "95 % low UAR"): " ".join(f"{end:.2f}" for end in ends["UAR"][0]),
        ("sum", "pooled UF1"): "40.00 71.43 55.71 71.43",  # (4/5 + 0) / 2; (4/7 + 1 + 4/7) / 3
        ("sum", "pooled UAR"): "50.00 72.22 61.11 72.22",  # (1 + 0) / 2; (1/2 + 1 + 2/3) / 3
        ("sum", "size of scores"): f"{size[0]:.2f} {size[1]:.2f} - -",
        ("prob", "tests after S1"): "66.67 - - -",
        ("prob", "tests after S2"): "100.00 60.00 - -",  # of session 1 and of session 2
        ("prob", "forgetting"): "0.00 - 0.00 -",  # session 1 from 2 right of 3 to 3: never less than nothing
        ("prob", "backward transfer"): "33.33 - 33.33 -",
        ("centered", "forgetting"): "33.33 - 33.33 -",  # to 1 right of 3
        ("centered", "backward transfer"): "-33.33 - -33.33 -",
    }.items():
        assert lines_of(text)[line] == values, line
    assert lines_of(text)["vit", "new, by max"].startswith("75.00 ± 35.36 62.50 ± 17.68 68.75 ± 8.84 62.50 ± 17.68 ")
    by_sum, by_max = (lines_of(part.rpartition("\n| true")[2]) for part in text.split("### ")[1:])
    first = lines_of(text.split("### ")[1].split("\n| true")[1])  # after the first session
    assert first["disgust", "2"] == "0 0" and first["anger", "1"] == "0 0"
    assert by_sum == {("disgust", "2"): "0 2", ("anger", "0"): "1 0", ("fear", "1"): "0 2", ("---", "---"): "--- ---"}
    assert by_max["fear", "1"] == "1 1"  # by each run's own first way
    by_prob = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))[1]
    words = (
        "method merge mean_S2 std_avg pooled_UAR_S2 paper_S1 folds samples_casme2 subjects_samm recall_fear_S2".split()
    )
    words += "recall_disgust_S2 fear_as_disgust_S2 version_of_torch device seconds_S1 tests_after_S2_S1".split()
    values = "der prob 75.0000 17.6777 77.7778 1.0000 f0 239 27 33.3333 100.0000 2 2.14 cpu 0.00 100.0000".split()
    assert [by_prob[word.replace("_", " ")] for word in words] == values
    write_run(tmp_path / "c" / "1", HAND[:1], method="ranpac", merges=["sum"])  # no logits: prob means nothing
    text = call(report, tmp_path, "--how", "prob").out
    assert "folds f0, merged by prob**\n" in text and "last by prob" not in text
    assert lines_of(text)["-", "always the commonest emotion"] == "25.00 37.50 31.25 37.50 -"  # of both folds
    assert lines_of(text)["vit", "der"].startswith("75.00 ± 35.36 75.00 ± 0.00 75.00 ± 17.68 75.00 ± 0.00 ")
    assert lines_of(text)["vit", "ranpac, by sum (1 of 2 folds)"].startswith("50.00 50.00 50.00 50.00 ")


def noisy(seed):
    """HAND with random scores, and the samples tested after each session: ((session, subject), true, predicted)."""
    random, tested = np.random.RandomState(seed), [[], []]
    files = [fold | {f"scores_{t}": random.randn(*np.shape(fold[f"scores_{t}"])) for t in (0, 1)} for fold in HAND]
    for t, fold in itertools.product((0, 1), map(read, files)):
        for true, predicted, session, subject in zip(*protocols.outcome(fold, t), fold["subjects"]):
            tested[t].append(((session, subject), true, predicted))
    return files, tested


def test_intervals_and_differences_are_those_of_a_loop(monkeypatch):
    pair, session = [[noisy(0), noisy(1)], [noisy(2)]], np.array([0, 0, 1, 1, 1])  # two seeds, and one
    drawn = report.draw(session)
    assert drawn.shape == (2000, 5) and (drawn[:, :2].sum(1) == 2).all() and (drawn[:, 2:].sum(1) == 3).all()
    assert abs((drawn == 0).mean(0) - np.repeat([0.5**2, (2 / 3) ** 3], (2, 3))).max() < 0.05  # how often not drawn
    monkeypatch.setattr(report, "DRAWS", 30)
    monkeypatch.setattr(report, "FLIPS", 300)
    drawn = [dict(zip(PEOPLE, weights)) for weights in report.draw(session)]
    a, b = (as_line(*(files for files, _ in seeds)) for seeds in pair)

    def again(seeds, measure, weights):  # of each sample as many as its subject was drawn; S1 and S2, means over seeds
        times = [[[s[1:] for s in seed[t] for _ in range(weights[s[0]])] for _, seed in seeds] for t in (0, 1)]
        return np.array([100 * np.mean([measure(*zip(*pairs)) for pairs in samples]) for samples in times])

    ends = lambda values: np.quantile([[*v, np.mean(v), v[1]] for v in values], (0.025, 0.975), 0)  # noqa: E731
    for name, measure in report.MEASURES.items():
        expected = ends([again(pair[0], measure, weights) for weights in drawn])
        np.testing.assert_allclose(report.intervals(*report.by_subject(a, "sum"))[name], expected)
    value, low, high, p, each = report.difference(a, b)
    one, by_one = (
        dict.fromkeys(PEOPLE, 1),
        [again([seed], protocols.accuracy, dict.fromkeys(PEOPLE, 1)) for seed in pair[0]],
    )
    other = again(pair[1], protocols.accuracy, one)
    assert list(each) == [0]  # the seed that both have
    swapped = as_line(*(files for files, _ in pair[0][::-1])) | {"seeds": [1, 0]}  # the same runs
    assert all(not any(own) for own in report.difference(a, swapped)[4].values())
    np.testing.assert_allclose(each[0], [*(by_one[0] - other), np.mean(by_one[0] - other)])
    less = [np.subtract(*(again(seeds, protocols.accuracy, weights) for seeds in pair)) for weights in drawn]
    np.testing.assert_allclose([low, high], ends(less)[:, :3])
    share = [[[100 * np.mean([[w == who and x == y for w, x, y in seed[t]] for _, seed in seeds]) for who in PEOPLE]
              for t in (0, 1)] for seeds in pair]  # fmt: skip
    sums = np.subtract(*share) @ np.vstack([np.ones(5), np.random.default_rng(0).choice((-1.0, 1.0), (300, 5))]).T
    sums = np.vstack([sums, sums.mean(0)])  # (S1 S2 avg, as it is and then 300 flips)
    np.testing.assert_allclose(value, sums[:, 0])
    np.testing.assert_allclose(p, (abs(sums) > abs(sums[:, :1]) - 1e-9).sum(1) / 301)
    assert len(set(p)) > 1 and 0.01 < min(p) < 0.9  # neither none nor all


def test_seeds_are_one_line(tmp_path, call):
    """S2 of the two folds is 50 and 75 by seed 0, 100 and 75 by seed 1; S1 is 50 and 100 by both."""
    root, weights = tmp_path / "seeds", tmp_path / "weights"
    for place, (files, seed) in {"0": (HAND, 0), "1": (BETTER, 1), "copy": (BETTER, 1)}.items():
        write_run(root / place / "1", files, seed=seed)
    out = lines_of(call(report, root, "--csv", tmp_path / "a.csv", "--details").out)
    both = "75.00 ± 35.36 75.00 ± 0.00 75.00 ± 17.68 75.00 ± 0.00 {:.1f} to {:.1f} 62.5 to 87.5 (± 17.7) 81.25"
    ends = report.intervals(*report.by_subject(as_line(HAND, BETTER), "sum"))["accuracy"][:, 3]
    assert out["backbone", "method"] == "S1 S2 avg last last, 95 % last of the seeds last by prob"
    assert out["vit", "der, 2 seeds"] == both.format(*ends)
    assert out["sum", "mean"] == "75.00 75.00 75.00 75.00" and out["sum", "forgetting"] == "0.00 - 0.00 -"
    assert out["fear", "1"] == "0 5"  # the confusion matrix holds both seeds
    by_sum = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))[0]
    words = ("seeds", "std avg", "pooled accuracy S2", "recall disgust S2", "lowest seed last", "std over seeds last")
    assert [by_sum[word] for word in words] == ["0 1", "17.6777", "75.0000", "62.5000", "62.5000", "17.6777"]
    for seed, name in itertools.product((0, 1), ("none", "a.pt")):  # random weights differ from seed to seed
        changed = dict(changed={"weights": name}, weights=f"{name}, sha256 {seed}")
        write_run(weights / f"{name} {seed}" / "1", seed=seed, **changed)
    found = [line[1] for line in lines_of(call(report, weights).out) if line[0] == "vit"]
    assert found == ["der weights=a.pt", "der weights=a.pt, seed 1", "der weights=none, 2 seeds"]
    apart = lines_of(call(report, root, "--each-seed").out)
    assert [apart["vit", f"der, seed {seed}"][14:19] for seed in (0, 1)] == ["62.50", "87.50"] and len(apart) == 5
    write_run(root / "2" / "1", [BETTER[0], None], seed=2, prepared={"opencv": "5"})  # it is on the same images
    out = lines_of(call(report, root).out)  # fold 0 of all three: 50, 100 and 100 after session 2
    assert out["vit", "der, 3 seeds (1 of 2 folds)"].startswith("50.00 83.33 66.67 83.33 ")
    write_run(root / "3" / "1", [None, HAND[1]], seed=3)  # now they have no fold in common
    write_run(root / "4" / "1", seed=4, code={"der.py": "1"}, versions={"torch": "3"})
    text = call(report, root).out
    labels = ["der", "der, seed 1", "der, seed 2 (1 of 2 folds)", "der, seed 3 (1 of 2 folds)", "der, seed 4"]
    assert [line[1].removesuffix(" †") for line in lines_of(text) if line[0] == "vit"] == labels
    assert text.count("not one line") == 1 and "vit der, seed 4 differ in code and versions" in text


def test_compare(tmp_path, call, monkeypatch):
    """new has two more of the eight samples right than der, of two subjects."""
    monkeypatch.chdir(tmp_path)
    for i, (files, change) in enumerate([
        (HAND, {}), (BETTER, dict(method="new")), (HAND, dict(backbone="swin")), (HAND, dict(seed=1)),
        (BETTER, dict(method="pixels", backbone="none")), (HAND[:1], dict(method="half")), (HAND, dict(method="twice")),
        (BETTER, dict(method="older", folds="f1")), (HAND, dict(method="new", backbone="resnet")),
        (HAND, dict(method="twice", code={})), (BETTER, dict(protocol="slcv")), (HAND, dict(protocol="slcv", seed=1)),
    ]):  # fmt: skip
        write_run(tmp_path / "runs" / f"r{i}" / "1", files, **change)
    out, notes = call(report, "runs", "--compare", "der", "new")
    assert out.count("**ILCV") == 1 and notes.count("nothing to compare with") == 3  # swin, resnet, slcv
    value, ends, p = ([cell.strip() for cell in line.split("|")[2:-1]] for line in out.splitlines()[-3:])
    assert value == ["der, 2 seeds - new", "+0.00", "-25.00", "-12.50"] and ends[:2] == ["95 %", "+0.00 to +0.00"]
    assert p[1] == "1.0000" and 0.48 < float(p[2]) < 0.52  # two subjects: both signs are alike in half of the flips
    out = lines_of(call(report, "runs", "--compare", "pixels", "der", "--how", "max").out)
    assert [line for line in out if "pixels" in line[1]] == [("swin", "pixels - der"), ("vit", "pixels - der, 2 seeds")]
    out = lines_of(call(report, "runs", "--compare", "runs/r10", "runs/r11/1").out)  # folders tell seeds apart
    assert out["vit", "der - der, seed 1"] == "+0.00 +25.00 +12.50"
    for words, parts in {
        "der nosuch": "nosuch: no such run; there are der, half, new, older, pixels, twice, and their folders",
        "der half": "der has folds 0 1, half 0, in ILCV,", "der older": "images i0, folds f1, vit",
        "der runs": "several lines of ILCV", "new twice": "several lines of ILCV",
        "der new --csv a.csv": "--compare stands alone", "der new --each-seed": "--compare stands alone",
    }.items():  # fmt: skip
        out, notes = call(report, "runs", "--compare", *words.split())
        assert not out and notes.splitlines()[-1].startswith("error: --compare") and parts in notes, words


def test_loso_is_pooled_and_the_paper_stands_beside_its_like(tmp_path, call):
    """True 0 0 1 1 2, answers 0 1 1 1 0, of two people: 3 and 2; the commonest emotion in training is 0."""
    shared = dict(emotions=["a", "b", "c"], row_emotion=[0, 1, 2], row_session=[0] * 3, train_counts=[[3, 2, 1]])
    files = [shared | dict(labels=["a", "a", "b"], session=[0] * 3, scores_0=np.eye(3)[[0, 1, 1]], subjects=[4] * 3),
             shared | dict(labels=["b", "c"], session=[0, 0], scores_0=np.eye(3)[[1, 0]], subjects=[7, 7])]  # fmt: skip
    real, loso = dict(synthetic=False, preset="paper"), dict(method="finetune", protocol="loso")
    casme2 = {"casme2": dict(samples=240, subjects=2)}
    write_run(tmp_path / "a" / "1", files, **real, **loso, counts=casme2)
    write_run(tmp_path / "b" / "1", files[:1], **real, **loso | {"method": "der"}, counts=casme2)
    text = call(report, tmp_path, "--csv", tmp_path / "a.csv").out
    for line, values in {
        ("backbone", "method"): "accuracy UF1 UAR accuracy, 95 %",
        ("-", "always the commonest emotion"): "40.00 19.05 33.33 -",
        ("vit", "finetune"): "60.00 43.33 50.00 50.0 to 66.7",  # (2/4 + 4/5 + 0) / 3, (1/2 + 1 + 0) / 3
        ("vit", "finetune, the paper, on its own preparation"): "76.60 72.30 71.90 -",
        ("vit", "der (1 of 2 folds)"): "66.67 66.67 75.00 -",  # one person has no interval
    }.items():
        assert lines_of(text)[line] == values, line
    found = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))  # one row per emotion: nothing to merge
    assert "240 of 246 samples" in text and [line["merge"] for line in found] == ["sum", "sum"]
    assert [found[1][f"95 % {side} accuracy"] for side in ("low", "high")] == ["50.0000", "66.6667"]
    assert "more than one session" in call(report, tmp_path, "--plot", "a.png").err
    assert "| difference | accuracy |\n" in call(report, tmp_path, "--compare", "finetune", "finetune").out

    least = dict(casme2=232, samm=128, mmew=278, casme3=763)  # 95 % of the usable
    counts = lambda **change: {name: {"samples": count} for name, count in (least | change).items()}  # noqa: E731
    good = real | dict(method="ranpac", backbone="vit", protocol="ilcv", changed={}, counts=counts(), fold_count=5,
                       prepared={"sessions": {name: {"crop": "landmarks" if name in "casme2 samm" else "whole frame"}
                                              for name in data.STREAM}})  # fmt: skip
    good["trials"] = [dict.fromkeys(range(5))]
    for change in (
        dict(changed={"weights": "vit.pt"}), dict(changed={"lr": 1.0}), dict(synthetic=True), dict(preset="tiny"),
        *(dict(fold_count=k, trials=[dict.fromkeys(range(done))]) for k, done in ((3, 3), (6, 6), (6, 5), (5, 4))),
        dict(method="linear"), dict(counts=counts(dfme=1856)),
        dict(counts=dict(reversed(counts().items()))), dict(counts=casme2),
        *(dict(counts=counts(**{name: count - 1})) for name, count in least.items()),
        *(loso | dict(counts={name: {"samples": count}}) for name, count in {"casme2": 231, "samm": 134}.items()),
    ):  # fmt: skip
        assert not report.paper(good | change), change
    for name, known in good["prepared"]["sessions"].items():  # another crop than the benchmark's
        crop = {"crop": "whole frame" if known["crop"] == "landmarks" else "landmarks"}
        assert not report.paper(good | {"prepared": {"sessions": good["prepared"]["sessions"] | {name: crop}}}), name
    assert "1,401 of 1,534 samples" in report.title_of(good | dict(images=0, folds=0, tests=0, prepared=None))
    assert report.paper(good | loso | {"counts": casme2}) == [76.6, 72.3, 71.9]
    for change in ({}, {"prepared": None}):
        assert report.paper(good | change) == [53.23, 46.18, 50.50, 43.84, 48.44, 43.84]
    *table2, _, _, _ = report.published()
    assert [line["table"] for line in report.published()] == 28 * ["2"] + 3 * ["3"]
    for line in table2:
        sessions = [float(line[f"S{t}"]) for t in (1, 2, 3, 4)]
        assert abs(np.mean(sessions) - float(line["avg"])) < 0.011 and float(line["last"]) == sessions[3], line


def test_plot(tmp_path, call, monkeypatch):
    """Eight methods and four controls, each with a look of its own, named in the order of the ends, from the top."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "paper", lambda line: [60, 70, 65, 70] if line["method"] == "A" else [])
    for name in "ABCDEFGHIJKL":
        write_run(tmp_path / name / "1", method=name, code={os.path.join("controls" * (name > "H"), f"{name}.py"): ""})
    write_run(tmp_path / "seed1" / "1", BETTER, method="H", code={"H.py": ""}, seed=1)
    assert call(report, tmp_path, "--plot", tmp_path / "a.svg").err == ""
    svg, names = (tmp_path / "a.svg").read_text().split("<!-- vit -->")
    assert re.findall("<!-- (.*) -->", names)[:12] == ["H, 2 seeds", *"ABCDEFGIJKL"]
    shape = r'<path d="M \S+ (\S+) \nL \S+ (\S+) \n" clip.*none; (?:.*array: (.*?);.*)?stroke: (#(?!b0b0b0)\w+);'
    first, last, dashes, colours = zip(*re.findall(shape, svg))
    assert first == 12 * (last[0],) and last[1:] == 11 * (last[1],)  # H stays at 75 %; the others fall to 62.5 %
    assert len(set(colours)) == 12 and len(set(dashes)) == 5 and dashes[:8] == 8 * ("",)
    marks = dict(re.findall(r'href="#(\w+)" x=.*"fill: (#\w+)', svg))
    assert sorted(marks.values()) == sorted(colours[:8])  # each method's own
    top, percent = float(first[0]), (float(last[1]) - float(first[0])) / 12.5  # y grows downwards
    papers = np.float64(re.findall(r'y="(\S+)" style="fill-opacity: 0; stroke: ' + colours[1], svg))
    assert percent > 0 and papers == pytest.approx([top + 15 * percent, top + 5 * percent], abs=1e-4)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in call(report, tmp_path, "--plot", "a.png").err


def test_which_runs_stand_where(tmp_path, call):
    mine = {"casme2": {"samples": 239, "subjects": 9}, "mine": {"samples": 1000, "subjects": 9}}  # not in data.DATASETS
    for i, change in enumerate([{}, {"images": "i1"}, {"folds": "f1"}, {"counts": mine}, {"preset": "paper"}]):
        write_run(tmp_path / "tables" / str(i) / "1", **change)
    write_run(tmp_path / "tables" / "same" / "1", backbone="swin", seed=1)
    text = call(report, tmp_path / "tables").out
    assert text.count("**ILCV, synthetic stream, casme2, samm, tiny preset, 369 of 382 samples, images i") == 3
    assert text.count("**") == 10 and "casme2, mine, tiny preset, 1,239 samples" in text and "| der, seed 1 |" in text
    root, ages = tmp_path / "names", {"b/1": 30, "b/2": 10, "b/3": 0, "c/1": 0, "d/1": 0, "old": 0, "broken": 0}
    for lr, (place, age) in enumerate(ages.items()):
        files = [HAND[0], HAND[1] | {"threads": 2}] if place == "d/1" else HAND[: 1 + (place != "b/3")]
        write_run(root / place, files, changed={"lr": lr}, made=f"{1000 - age:04d}")
        for file in os.listdir(root / place):  # the files' own times do not count
            os.utime(root / place / file, (1e9 + age, 1e9 + age))
        os.utime(root / place, (1e9 + age, 1e9 + age))
    (root / "c/1/fold0.npz").write_bytes((root / "b/1/fold0.npz").read_bytes())  # of another run
    (root / "c/1/fold1.npz").write_bytes(b"PK no archive")
    (root / "old/run.json").write_text('{"fold_count": 5, "method": "der"}')  # of an older version
    (root / "broken/run.json").write_text("{")
    shutil.copytree(root / "d/1", root / "bare")
    (root / "bare/run.json").unlink()
    (root / "elsewhere").symlink_to(tmp_path / "tables")
    shutil.copytree(root / "d/1", root / "shut")
    (root / "shut/run.json").unlink()
    (root / "shut/run.json").mkdir()  # to root, nothing that is a file is unreadable
    text, notes = call(report, root)
    assert [line[1] for line in lines_of(text) if line[0] == "vit"] == ["der lr=2 (1 of 2 folds)", "der lr=4 †"]
    assert text.count("mixed") == 1 and "the folds of vit der lr=4 differ in threads" in text
    words = ["b/1 (older; it has 2 folds, the newer 1)", "b/2 (older; it has 2 folds, the newer 1)",
             "bare (no run.json)", "c/1 (no finished fold)", "old (made by another", "broken (made by another",
             "elsewhere (behind a link)", "shut (unreadable)"]  # fmt: skip
    assert all(word in notes.splitlines()[-1] for word in words) and notes.count(": not used (") == 2


def test_what_was_made_otherwise_is_marked(tmp_path, call):
    """What the newest line of a table does not share with another stands at that one, and under the table."""
    about, code = {"opencv": "4.8", "coding": "ab12"}, "c.py"
    about["sessions"] = {"casme2": dict(frames="raw", crop="landmarks")}
    write_run(tmp_path / "0/1", prepared=about, code={"der.py": "0", code: "1"})
    write_run(tmp_path / "1/1", prepared=about, method="foster", code={"foster.py": "0", code: "2"})
    write_run(tmp_path / "2/1", BETTER, prepared=about, method="l2p", code={"l2p.py": "0", code: "2"})
    write_run(tmp_path / "3/1", prepared=about | {"opencv": "5.0"}, images="i5")
    hand = [fold | {"threads": 2, "device": "H100"} for fold in HAND]
    write_run(tmp_path / "4/1", hand, prepared=about, method="ranpac", versions={"torch": "9"}, code={}, made="0")
    text = call(report, tmp_path).out
    assert "\nimages: opencv 4.8; coding ab12; casme2 raw frames landmarks\n" in text
    assert "\nimages: opencv 5.0; " in text and "images i5, folds f0" in text  # other images: a table of its own
    assert {line[1] for line in lines_of(text) if line[0] == "vit"} == {"der", "der †", "foster", "l2p", "ranpac †"}
    assert re.findall("† not made as the newest line here: (.*)", text) == [
        "vit der (c.py)", "vit ranpac (torch, threads, device)"]  # fmt: skip
    assert "not made as the other: vit der (c.py)" in call(report, tmp_path, "--compare", "der", "l2p").out
    assert "not made" not in call(report, tmp_path, "--compare", "foster", "l2p").out
    write_run(tmp_path / "more/0/1", changed={"lr": 1}, code={"der.py": "1"})
    write_run(tmp_path / "more/1/1", changed={"lr": 2}, code={"der.py": "2"})
    other = {"torch": "2.14", "python": "3.10"}
    write_run(tmp_path / "more/2/1", changed={"lr": 3}, code={"der.py": "3"}, versions=other)
    write_run(tmp_path / "more/3/1", method="l2p", code={"l2p.py": "1"}, prepared=about)
    assert re.findall("† not made as the newest line here: (.*)", call(report, tmp_path / "more").out) == [
        "vit der lr=3 (preparation of the images)", "vit der lr=2 (preparation of the images)",
        "vit der lr=1 (der.py, preparation of the images)"]  # fmt: skip


def test_export_show_check(tmp_path, monkeypatch):
    viewed = functools.partial(here, "--size", 8, "--sessions=casme2", main=view.main)
    out, junk = tmp_path / "new/made", tmp_path / "new/made.part/samm_x"
    os.makedirs(junk)  # left by a killed export of an older version
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: signal.default_int_handler(2, None))
        assert viewed("export", "--out", out) == "130"  # interrupted
    assert [folders for _, folders, _ in os.walk(tmp_path / "new")] == [["made.part"], ["samm_x"], []]
    viewed("export", "--out", out)
    (made,), (read,) = data.synthetic(8, sessions=["casme2"]), data.load(str(out), ["casme2"], 8)
    assert all(np.array_equal(vars(made)[name], vars(read)[name]) for name in ("images", "labels", "subjects", "keys"))
    assert len(os.listdir(out)) == 5 and os.stat(out).st_mode == os.stat(junk).st_mode  # others may read it
    viewed("show", "--data", out, "--out", tmp_path / "a.png")
    sheet, second = Image.open(tmp_path / "a.png"), np.flatnonzero(read.subjects != read.subjects[0])[0]
    for left, i in ((70, 0), (126, second)):  # of disgust, the first images of two subjects
        image = Image.fromarray(read.images[i].transpose(1, 2, 0)).resize((56, 56))
        assert np.array_equal(np.asarray(sheet)[21:77, left : left + 56], np.asarray(image))
    os.remove(out / made.keys[-1])
    assert "exists already" in viewed("export", "--out", out)
    lines = [line.split() for line in viewed("check", "--data", out).splitlines()[-6:]]
    assert lines[0] == "casme2 245 samples of 246 26 subjects of 26".split()
    assert lines[-2:] == ["repression 27 of 27".split(), "surprise 24 of 25 -1".split()]


def test_tables_has_every_line(call):
    lines = [f"python {line['method']}.py --backbone {line['backbone']} --protocol {line['protocol']}"
             + " --sessions casme2" * (line["table"] == "3") for line in report.published()]  # fmt: skip
    found = call(tables, "--dry-run").out.splitlines()
    assert sorted(found) == sorted(f"{line} --seed 0 --out {os.path.join('results', 'table')}" for line in lines)
    more = "--data no/where --preset tiny --out o"
    found = call(tables, *f"--seeds 2 0 2 --controls --dry-run {more}".split()).out.splitlines()
    assert len(set(found)) == len(found) == 2 * 63 and all(line.endswith(more) for line in found)
    assert f"python -m controls.norch --backbone swin --protocol slcv --seed 2 {more}" in found


def test_tables_runs_one_per_device(tmp_path, call, monkeypatch):
    fails = ["-c", "import os, sys; print('a line'); sys.exit('error: threads ' + os.environ['OMP_NUM_THREADS'])"]
    real = ["-m", "controls.pixels", "--projected", "100", "--folds", "0", "--sessions", "casme2", "samm", "mmew"]
    monkeypatch.setattr(tables, "commands", lambda *_: [fails, [*real, "--out", str(tmp_path / "table")]])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    out, notes = call(tables, "--out", tmp_path / "table")
    assert ("none", "pixels projected=100 (1 of 5 folds)") in lines_of(out)  # a run as it is written is read
    found = lines_of(call(report, tmp_path / "table", "--details").out)
    assert [cell == "-" for cell in found["sum", "forgetting"].split()] == [False, False, True, False, True]
    assert "1 of 2 left after " in notes and "0 of 2 left after " in notes and "failed: -c" in notes
    assert "error: threads 1" in notes.splitlines()[-2] and notes.splitlines()[-1].startswith("error: 1 runs failed")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert tables.devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    job = """import os, sys, time\nname = sys.argv[1] + os.environ["CUDA_VISIBLE_DEVICES"]
os.mkdir(name)  # stops where another is at work on this device\ntime.sleep(0.2)\nos.rmdir(name)
open(sys.argv[1] + "log", "a").write(name[-1] + os.environ["OMP_NUM_THREADS"] + " ")"""
    assert not tables.run_all([["-c", job, f"{tmp_path}/"]] * 5, len(tables.devices()))
    assert set((tmp_path / "log").read_text().split()) == {"33", "53"}  # both were used; threads are left as they are


def test_mistakes_end_with_one_line(tmp_path, call, monkeypatch):
    write_run(tmp_path / "a" / "1", [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "HERE", str(tmp_path))  # below which pretrain would write tiny/vit.pt
    for tool, words, error in (
        (report, "''", "no such folder"), (report, tmp_path, "no finished fold"), (report, "a --csv ''", "--csv"),
        (report, "a --plot ''", "--plot"), (report, "a --plot a.doc", "--plot"), (view, "show --out a.doc", ".png"),
        (view, "check --data ''", "no such folder"), (view, "export --out ''", "needs"), (tables, "--out ''", "--out"),
        (view, "export --out a --data b", "no --data"), (view, "check --out a", "no --out"),
        (view, "check --size 3", "--size 3"), (tables, "--jobs 0", "--jobs"),
        (tables, "--data nowhere", "no such folder"), (tables, "--data '' --dry-run", "--data"),
        (tables, "--seeds 0 -1", "--seeds 0 -1"), (pretrain, "--backbone odd", "--backbone odd"),
        (bench, "--parts gpu", "invalid choice: 'gpu'"), (bench, "--device nowhere", "--device nowhere"),
        (pretrain, "--backbone test_vit --size 6", "image of 6 pixels"), (pretrain, "--size 96", "--size 96"),
        *((pretrain, bad, bad) for bad in ("--images 9", "--batch 1", "--seed -1")),
    ):  # fmt: skip
        out, notes = call(tool, *shlex.split(str(words)))
        *others, last = notes.splitlines()
        assert not out and last.startswith("error: ") and error in last, words
        assert all(line.startswith("note: ") for line in others), words
    assert "loss is not finite" in call(pretrain, *"--backbone resnet --images 40 --batch 2 --lr 1e20".split()).err
    assert [path.name for path in tmp_path.rglob("*.*")] == ["run.json"]  # nothing is written


def test_bench_prints_every_part(call, monkeypatch):
    """Each part, made small, prints what docs/speed.md shows, in units that can be; a script that fails is named."""
    for name, value in dict(SCRIPTS=["controls.linear", "controls.pixels"], M=4000, EPOCHS=1, IMAGES=32).items():
        monkeypatch.setattr(bench, name, value)
    begin, flags = time.perf_counter(), "--device cpu -- --sessions casme2 --backbone resnet".split()
    out = call(bench, "--parts", "scripts", "ridge", "loop", "backbones", *flags).out
    device, scripts, ridge, loop, backbones = out.split("\n\n")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d, torch 2\S+, cpu \(\w+\), \d+ of \d+ threads", device)
    assert scripts.endswith("\ncontrols.pixels  error: --backbone, --weights: there is no network here")
    took, peak = map(float, re.search(r"\ncontrols.linear +(\d+\.\d) s +(\d+) MiB\n", scripts).groups())
    assert 1 < took < time.perf_counter() - begin and 200 < peak < 2000  # torch alone takes so much
    *low, dense, one, ratio = map(float, re.findall(r"(?<= )(?:\d+\.\d\d|\d+(?= s,)|\d+$)", ridge.split("\n", 1)[1]))
    assert ridge.count("\n") == 3 and len(low) == 4 and "17 lambdas, float64, seconds per session: " in ridge
    assert abs(dense - 4 * 18 * one) < 0.9 and ratio == pytest.approx(dense / sum(low), rel=0.2)  # one: to 0.01 s
    assert 0.2 < float(loop.splitlines()[1]) < 10
    for name, line in zip(common.TINY, backbones.splitlines()[1:], strict=True):
        trained, seen = re.fullmatch(rf"{name} +(\d+) images/s trained, +(\d+) images/s seen", line).groups()
        assert 10 < int(trained) < int(seen) < 1e5, line


# ---- pretrain, the shipped weight files and docs/ -------------------------------------------------------------------
def test_pretrain_makes_files_that_every_method_takes(call, tmp_path):
    flags = "--sessions casme2 --folds 0 --epochs-first 0 --projected 100 --out".split() + [tmp_path / "results"]
    for backbone, preset, size in (("resnet", "tiny", 48), ("resnet10t", "paper", 40),
                                   ("vit_tiny_patch16_224", "paper", 32)):  # fmt: skip
        file = tmp_path / f"{backbone}.pt"
        images, lr = (3000, 0.003) if preset == "tiny" else (150, 0.001)
        words = ["--backbone", backbone, "--images", images, "--batch", 50, "--size", size, "--lr", lr, "--out", file]
        losses = re.findall(r"held-out loss (\S+)", call(pretrain, *words).out)
        made = torch.load(file, weights_only=True)["made"]
        assert len(losses) == min(10, images // 50) and made["size"] == size
        assert f"{made['held_out_loss']:.4f}" == losses[-1]
        assert preset == "paper" or made["held_out_loss"] < 0.95 * made["no_motion_loss"]  # it learns
        screen = call(ranpac, "--backbone", backbone, "--preset", preset, "--weights", file, *flags).out
        assert f"({file.name}, {size} px, " in screen, screen


def test_pretrain_targets_are_the_clean_flow_in_cells_and_flows_those_of_the_shipped_files():
    images, targets = pretrain.Batches(2, 3, 48, 5, "hsv")[1]  # the second batch, of three images
    strains, same_targets = pretrain.Batches(2, 3, 48, 5, "uvs")[1]
    assert torch.equal(same_targets, targets)
    clean, seen = pretrain.random_flows(np.random.RandomState([5, 1]), 3, 48)
    for i in range(3):
        largest = max(np.hypot(*seen[i, y, x]) for y in range(48) for x in range(48))
        cells = clean[i].reshape(6, 8, 6, 8, 2).mean((1, 3)).transpose(2, 0, 1)  # x and y, each row by row
        np.testing.assert_allclose(targets[i], 7 * cells.flatten() / largest, atol=1e-5)
        assert (images[i].numpy() == data.flow_to_image(seen[i : i + 1])[0]).all()
        u, v = seen[i, ..., 0], seen[i, ..., 1]
        (u_y, u_x), (v_y, v_x) = np.gradient(u), np.gradient(v)
        for channel, field in zip(strains[i].numpy(), (u, v, (u_x**2 + v_y**2 + (u_y + v_x) ** 2 / 2) ** 0.5)):
            scaled = 255 * (field - field.min()) / (field.max() - field.min())
            assert abs(channel - scaled).max() < 0.51 and (channel.min(), channel.max()) == (0, 255)
    random = np.random.RandomState(0)
    clean, seen = pretrain.random_flows(random, 3, 48)  # numbers of the first version
    values = [clean.sum(), seen.sum(), *clean[2, 20, 30], *seen[2, 20, 30]]
    np.testing.assert_allclose(values, [719.874, 1416.560, 0.00951, -0.01987, 0.15224, 0.03938], rtol=1e-3)
    assert random.randint(2**31) == 1291920150  # as many draws
    for name in (*common.TINY, "vit-uvs"):
        path = HERE / "tiny" / f"{name}.pt"
        made, (backbone, _, coding) = torch.load(path, weights_only=True)["made"], name.partition("-")
        assert f"pretrain --backbone {backbone} {coding and '--coding uvs '}--images" in made["command"]
        assert path.stat().st_size < 2e6
        assert made["held_out_loss"] < 0.25 * made["no_motion_loss"]


# ---- the public flow of MEGC 2019 ------------------------------------------------------------------------------------
PUBLIC = {  # dataset of the list: its people and clips in their spelling, samples of the three classes, how many people
    "smic": ("s{:02d}", "s{:02d}_ne_{:02d}", (70, 51, 43), 16), "samm": ("{:03d}", "{:03d}_{}_7", (92, 26, 15), 28),
    "casme2": ("sub{:02d}", "EP{:02d}_{:02d}f", (88, 32, 25), 24)}  # fmt: skip


def public_clone(root):
    """A tree like the repository: its list, images of a colour each; {name: (dataset, person, class, file)}."""
    images, lines = {}, []
    for dataset, (person, clip, counts, people) in PUBLIC.items():
        for i in range(sum(counts)):
            label = sum(i >= end for end in np.cumsum(counts))
            sub, name = (
                person.format(i % people + 1),
                clip.format(50 + i // 9, i),
            )  # a clip's number is not the person's
            Image.new("RGB", (28, 28), (i, label, people)).save(file := io.BytesIO(), "PNG")
            images[f"{sub}_{name} .png"] = dataset, i % people + 1, "negative positive surprise".split()[label], file
            lines.append([dataset, sub, name, label, "", f"{sub}_{name}.jpg", ""])
    folder = root / "datasets" / "STSNet_whole_norm_u_v_os"
    folder.mkdir(parents=True)
    for name, (*_, file) in images.items():
        (folder / name).write_bytes(file.getvalue())
    text = "\n".join(",".join(map(str, line)) for line in lines)
    head = "dataset,sub,filename_o,label,apex,imagename,sub_filename\n"
    (root / "combined_3_class2_for_optical_flow.csv").write_text(head + text + "\n")
    return images


def test_public_flow_becomes_three_sessions_or_one(tmp_path, call, monkeypatch):
    images, three, one = public_clone(tmp_path / "HTNet"), ["smic-3", "casme2-3", "samm-3"], ["megc-3"]
    monkeypatch.chdir(tmp_path)
    for flags, names, out in (([], three, "a"), (["--composite"], one, "b")):
        assert "442 images of " + ", ".join(names) in call(megc2019, "--repo", "HTNet", "--out", out, *flags).out
        found = {}  # {grey, which is the image: (session, subject, emotion)}
        for session in data.load(out, names, 28):
            assert session.emotions == ["negative", "positive", "surprise"]
            assert len({*session.subjects}) == data.SUBJECTS[session.name]
            for key, subject, emotion in zip(session.keys, session.subjects, session.labels):
                found[Path(out, key).read_bytes()] = session.name, subject, emotion
        places = ["smic", "casme2", "samm"]  # in order of publication
        for dataset, person, emotion, file in images.values():
            person += 1000 * (1 + places.index(dataset)) if flags else 0
            assert found[file.getvalue()] == (f"{dataset}-3" if not flags else "megc-3", person, emotion)
        assert len(found) == 442 and (Path(out) / "prepare.json").exists()
    flags = ["--preset", "tiny", "--projected", "50", "--out", "results"]
    screen = call(pixels, "--data", "a", "--sessions", *three, "--protocol", "slcv", *flags).out
    assert "samm-3 133 of 133, subjects 28 of 28" in screen and "(folds.csv)" in screen and "S3 samm-3" in screen
    screen = call(pixels, "--data", "b", "--sessions", *one, "--protocol", "loso", "--folds", "0", "67", *flags).out
    assert "2 of 68 folds" in screen and "pooled over subjects" in screen
    assert "442 samples" in call(report, "results").out


def test_mistakes_with_the_public_flow_end_with_one_line(tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = list(public_clone(tmp_path / "HTNet"))
    whole = {path: path.read_bytes() for path in (tmp_path / "HTNet").rglob("*.*") if path.is_file()}
    sheet, image = tmp_path / "HTNet" / megc2019.LIST, tmp_path / "HTNet" / megc2019.IMAGES / names[7]
    Image.new("RGB", (30, 28)).save(large := io.BytesIO(), "PNG")
    for path, content, words in (
        (image, None, names[7]),
        (image, large.getvalue(), "not 28 x 28 RGB"),
        (image, b"text", "cannot identify"),
        (sheet, None, megc2019.LIST),
        (sheet, whole[sheet].replace(b"smic,s01", b"smik,s01"), "'smik'"),
        (sheet, whole[sheet].replace(b"filename_o", b"file"), "'filename_o'"),
        (sheet, whole[sheet].rsplit(b"\n", 2)[0], "24 images of casme2-3 surprise instead of 25"),
    ):
        path.write_bytes(content) if content else path.unlink()
        out, error = call(megc2019, "--repo", "HTNet", "--out", "out")
        assert not out and re.fullmatch(f"error: HTNet: .*{re.escape(words)}.*\n", error), error
        path.write_bytes(whole[path])
    os.mkdir("full")
    Path("full", "a").touch()
    for words in ("--repo HTNet --out full", "--repo nowhere --out out", "--repo HTNet --out ''"):
        assert re.fullmatch("error: .*\n", call(megc2019, *shlex.split(words)).err), words
    assert sorted(os.listdir()) == ["HTNet", "full"]


# ---- what docs/ says -------------------------------------------------------------------------------------------------
def test_a_saved_model_answers_as_its_run_did(tmp_path, call, monkeypatch):
    """The page's code, in another process: for each image of the test fold the run's own answer, by two methods; from
    two frames an emotion."""
    monkeypatch.chdir(tmp_path)
    (session,) = data.synthetic(48, 0, ["samm"])
    view.export([session], "prepared")
    page = (HERE / "docs" / "laboratory.md").read_text(encoding="utf-8").split("## A trained model")[1]
    code = re.findall(r"```python\n(.*?)```", page, re.S)[0]
    flags = "--data prepared --preset tiny --sessions samm --folds 0 --epochs-first 3 --save".split()
    base = np.random.RandomState(0).rand(60, 60).astype(np.float32)
    for name, shift in (("onset", 0), ("apex", 1)):
        frame = cv2.GaussianBlur(np.roll(base, shift, 1), (0, 0), 2)
        Image.fromarray(np.uint8(255 * (frame - frame.min()) / np.ptp(frame))).save(f"{name}.png")
    for script in (finetune, ranpac):
        call(script, *flags, *(["--projected", "200"] if script == ranpac else []))
        (folder,) = Path("results").glob(f"{script.__name__}-*/*")
        shutil.copy(folder / "model0.pt", "model0.pt")
        fold = np.load(folder / "fold0.npz")
        answers = fold["emotions"][protocols.outcome(fold, 0)[1]].tolist()
        more = f"print(*[emotion_of('prepared/' + key, model, backbone) for key in {fold['keys'].tolist()}])"
        done = subprocess.run([sys.executable, "-c", code + more], capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(HERE)})  # fmt: skip
        first, second = done.stdout.splitlines() or [done.stderr, ""]
        assert first in session.emotions and second.split() == answers and len(set(answers)) > 1, done.stderr
    flow = prepare.optical_flow(*(Image.open(f"{name}.png") for name in ("onset", "apex")))
    assert 0.7 < flow[10:-10, 10:-10, 0].mean() < 1.3  # one pixel to the right


@pytest.mark.parametrize("path", ["controls/pixels.py", "tools/report.py", "tools/prepare.py"])
def test_a_file_that_is_run_by_its_path_says_how(path):
    done = subprocess.run([sys.executable, path], cwd=HERE, capture_output=True, text=True)
    name = path[:-3].replace("/", ".")
    assert (done.returncode, done.stderr) == (1, f"error: from the project's folder, run it as: python -m {name}\n")


def test_commands_in_docs_have_flags_that_exist(call):
    scripts = {}  # {script: flags} of all that docs/ names
    for path in (HERE / "docs").glob("*.md"):
        pieces = path.read_text(encoding="utf-8").split("```")  # every second one is a block; the others have code in `
        code = "\0".join([*"".join(pieces[1::2]).splitlines(), *re.findall(r"`([^`]+)`", "".join(pieces[::2]))])
        for module, script, more in re.findall(r"(?:-m\s+([\w.]+)|(\w+)\.py)\b([^;#'\0]*)", code):
            scripts.setdefault(module or script, set()).update(re.findall(r"--[\w-]+", more))
    assert {f"tools.{name}" for name in ("prepare", "view", "report", "tables", "bench", "pretrain", "megc2019")} < set(
        scripts
    )
    for script in set(scripts) - {"FILE", "test_all", "pytest"}:  # any script
        options = call(importlib.import_module(script), "--help").out.split("\noptions:")[1]
        assert scripts[script] <= set(re.findall(r"--[\w-]+", options)), script
