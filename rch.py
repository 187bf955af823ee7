"""The Remappable Classification Head (RCH): the idea of the benchmark paper (arXiv 2501.19111, section 3.4).

Datasets share emotions, each time in another domain. RCH gives every session its own ROWS of the head's weights, one
per (session, emotion) pair, redundant on purpose: 5 + 5 + 6 + 7 = 23 rows for 9 emotions. Training only sees rows. For
a prediction the rows that mean the same are merged. With x the features, H_t^c the weights of emotion c in session t:

    eq. 3   H_final^c = sum over the sessions t that contain emotion c of H_t^c
    eq. 4   p(c | x) = softmax(x^T H_final)_c

For a linear head the sum of weights is the sum of scores: one product of the row scores (B, R) with a 0/1 matrix
(R, E). The softmax of eq. 4 changes no argmax.

The sum needs care: what is added to every row counts four times for an emotion that four sessions have. Rows may be
summed where a score of 0 means "no evidence for this row", as in RanPAC (regressions onto 0 and 1). Cross-entropy fixes
only differences of scores. Within a session's own rows (Finetune, L2P, DualPrompt) it leaves a constant free per
session. Over all rows (DER, FOSTER) it pushes old rows down, which get no sample any more. So compare:

    sum        eq. 3
    prob       not eq. 4: softmax over the rows first, then the sum; a constant common to all rows cancels
    centered   first subtract each session's mean row score, then sum: a constant per session cancels
    max        the best row decides: what the released code does

Shapes: B batch, R rows, E emotions.
"""

import numpy as np

WAYS = ("sum", "prob", "centered", "max")


class RCH:
    """The rows so far: which emotion and which session each one stands for."""

    def __init__(self):
        self.emotions, self.sessions = [], 0  # E words in order of first appearance; how many sessions came
        self.row_emotion = np.zeros(0, int)  # (R,) index into emotions
        self.row_session = np.zeros(0, int)  # (R,) 0 for the first session

    def add_session(self, emotions):
        """Add one row per word of `emotions`, as the next session; returns the slice of the new rows."""
        first = len(self.row_emotion)
        self.emotions += [word for word in emotions if word not in self.emotions]
        added = np.array([self.emotions.index(word) for word in emotions], int)
        self.row_emotion = np.append(self.row_emotion, added)
        self.row_session = np.append(self.row_session, np.full(len(added), self.sessions))
        self.sessions += 1
        return slice(first, len(self.row_emotion))

    def targets(self, words):
        """Training targets of N samples: for each one's emotion the index of its newest row, (N,) int."""
        newest = {self.emotions[e]: row for row, e in enumerate(self.row_emotion)}  # later rows replace earlier ones
        return np.array([newest[word] for word in words], int)


def remap(row_scores, row_emotion, row_session, how="sum"):
    """Row scores (B, R) -> emotion scores (B, E), by eq. 3 (`sum`) or as listed above. Plain arrays in and out.

    row_emotion (R,) and row_session (R,) are RCH's. `prob` gives probabilities, the others scores.
    """
    assert row_scores.shape[1:] == row_emotion.shape == row_session.shape
    merge = (row_emotion[:, None] == np.arange(row_emotion.max() + 1)).astype(row_scores.dtype)  # (R, E)
    if how == "sum":
        return row_scores @ merge
    if how == "prob":
        likelihood = np.exp(row_scores - row_scores.max(1, keepdims=True))
        return (likelihood / likelihood.sum(1, keepdims=True)) @ merge
    if how == "centered":
        centered = row_scores.copy()
        for session in np.unique(row_session):
            own = row_session == session
            centered[:, own] -= row_scores[:, own].mean(1, keepdims=True)
        return centered @ merge
    if how == "max":
        return np.where(merge > 0, row_scores[:, :, None], -np.inf).max(1)  # (B, R, E) -> (B, E)
    raise ValueError(f"how is {how!r}, not one of {', '.join(WAYS)}")
