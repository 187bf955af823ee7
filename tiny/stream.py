"""The generator of the synthetic stream: made-up optical flow of made-up faces. NumPy alone, no network, no files.

It is a small model of what the real input is like. A person has a face of their own shape, movements of their own
strength and a habit; an emotion moves some action units (the coded movements of facial muscles); a camera crops the
face badly, the head moves, the flow is noisy. Its numbers say nothing about real micro-expressions.

Shapes: N samples of one session, S image side in pixels, K bumps of motion.
"""

import numpy as np

# A face spans about [-1, 1] in x (right) and y (down), nose at the origin. Where each action unit moves the skin and in
# which direction, on the right half of the image; the left half mirrors it.
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
# Each session's recording: half the face's height as a share of half the image's, its spread, the spread of the
# face's place, of its rotation (radians), the size of head motion and of noise (a strong bump moves by 1), extra blur,
# and a drift (x, y) that all of its frames share, the background too: a camera that sinks, a face tracked with a bias.
CAMERAS = {  # scale, its spread, shift, rotation, head, noise, blur, drift
    "casme2": (0.95, 0.02, 0.02, 0.02, 0.05, 0.10, 0.05, (0.10, 0.05)),
    "samm": (0.90, 0.14, 0.16, 0.16, 0.60, 0.28, 0.03, (-0.30, -0.15)),
    "mmew": (1.05, 0.06, 0.06, 0.06, 0.12, 0.12, 0.06, (0, 0)),
    "casme3": (0.60, 0.08, 0.12, 0.08, 0.20, 0.16, 0.04, (0, 0)),
    "dfme": (0.80, 0.08, 0.10, 0.08, 0.16, 0.14, 0.04, (0, 0)),
    "other": (0.85, 0.07, 0.08, 0.07, 0.14, 0.13, 0.04, (0, 0)),  # any other dataset
}


def session(name, counts, subjects, size, seed=0):
    """One made-up dataset: (labels, people, flows).

    counts    {emotion: how many samples}; the emotions are words of EMOTION_UNITS
    subjects  how many people
    labels    list of N emotion words
    people    (N,) int, the subject of each sample, from 1
    flows     iterator over N flow fields (S, S, 2) float64, x to the right and y down
    The same name, counts, subjects, size and seed give the same fields on every machine, whatever other sessions there
    are. The cameras of casme2 and samm were calibrated, on seeds 0 to 2, by what methods score on real flow of the two;
    all other numbers by controls/pixels.py alone.
    """
    camera = name if name in CAMERAS else "other"
    own = [] if name in CAMERAS else name.encode()  # other datasets with one camera are not the same images
    random = np.random.RandomState([seed, list(CAMERAS).index(camera), *own])
    people = [_person(random) for _ in range(subjects)]
    labels = [emotion for emotion, count in counts.items() for _ in range(count)]
    # Emotions are dealt unevenly: each has its own few frequent subjects; then everyone gets at least one sample.
    shares = {emotion: random.dirichlet([0.4] * subjects) for emotion in counts}
    owners = np.array([random.choice(subjects, p=shares[emotion]) for emotion in labels])
    for person in sorted(set(range(subjects)) - set(owners)):
        owners[random.choice(np.flatnonzero(owners == np.bincount(owners).argmax()))] = person
    flows = (_flow(CAMERAS[camera], people[owner], emotion, size, random) for owner, emotion in zip(owners, labels))
    return labels, owners + 1, flows


def _person(random):
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


def _flow(camera, person, emotion, size, random):
    """One sample's flow field (S, S, 2)."""
    scale, scale_spread, shift_spread, rotation_spread, head, noise, blur, drift = camera
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
    flow += oval * head * (person["head"] + random.normal(0, 0.6, 2)) + drift
    return flow + noise * smooth_noise(random, 1, size, 12)[0]


def smooth_noise(random, count, size, grid):
    """Fields (count, S, S, 2) of unit normal noise on a coarse grid x grid, interpolated linearly to S x S."""
    place = np.linspace(0, grid - 1, size)
    up = np.maximum(0, 1 - abs(place[:, None] - np.arange(grid)))  # (S, grid)
    return np.einsum("yg,xh,nghc->nyxc", up, up, random.randn(count, grid, grid, 2), optimize=True)
