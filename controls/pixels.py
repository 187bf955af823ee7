"""Pixels: RanPAC without a network. Its ridge on 12 x 12 pixels of the images at 48 x 48.

What a network is held against: on flow images a few pixels already tell much. It trains nothing and
loads no weights; it borrows the ridge from ranpac.py, where everything about it is told.
Run:   python -m controls.pixels --protocol ilcv
       synthetic stream, seed 0: last 56.8 %; 1 s a fold on one core
"""

import sys

import torch
from torch import nn
from torch.nn import functional as F

import common
import data
import protocols
import rch
from ranpac import LowRankRidge, choose_lambda, to_float64

SETTINGS = {  # name: (paper preset, tiny preset); each is a flag
    "projected": (10_000, 2_000),  # M
}


class Pixels(nn.Module):
    """Images (B, 3, S, S) -> 12 x 12 area-averaged pixels (B, 432), in place of a backbone."""

    image_size, mean, std, num_features = common.TINY_SIZE, (0.5,) * 3, (0.5,) * 3, 3 * 12 * 12

    def forward(self, x):
        return F.adaptive_avg_pool2d(x, 12).flatten(1)


def main():
    args = common.parse(__doc__, SETTINGS)
    if args.backbone != "vit" or args.weights is not None:
        sys.exit("error: --backbone, --weights: there is no network here")
    args.backbone = "none"
    pixels = Pixels()
    sessions = data.load_sessions(args, pixels)
    run = protocols.Run(args, sessions, merges=("sum",))  # no prob: the scores are no logits

    for fold in run.folds:
        # ---- a trial begins: this fold of every session is its test part ----
        torch.manual_seed(args.seed * 1000 + fold)
        rows = rch.RCH()  # which row means which emotion of which session
        # W (d, M) has a generator of its own, as in ranpac.py.
        generator = torch.Generator().manual_seed(args.seed * 1000 + fold)
        projection = torch.randn(pixels.num_features, args.projected, generator=generator).to(args.device)
        ridge = LowRankRidge(args.projected)
        test_h = []

        for t, session, train, test in run.stream(fold):
            # ---- session t arrives (session 1 is t = 0); train and test are indices ----
            new_rows = rows.add_session(session.emotions)  # a slice of all R rows
            x = session.images[train]  # (N, 3, S, S)
            y = torch.from_numpy(rows.targets(session.labels[train])).to(args.device)  # (N,)

            # ---- add up ----
            h = to_float64(F.relu(common.extract(pixels, x) @ projection))  # (N, M)
            one_hot = F.one_hot(y, new_rows.stop)  # (N, R)
            gram = h @ h.T  # (N, N)
            lam = choose_lambda(h, one_hot, gram)
            ridge.update(h, one_hot, gram)
            weights = ridge.weights(lam)  # (M, R)

            # ---- test on the test parts of all sessions so far ----
            test_h.append(F.relu(common.extract(pixels, session.images[test]) @ projection))
            scores = to_float64(torch.cat(test_h)) @ weights  # (n, R)
            run.record(fold, t, rows, scores)  # rows -> emotions -> accuracy
        run.save(fold, projection=projection, weights=weights)  # with --save
    run.summary()


if __name__ == "__main__":
    common.launch(main)
