"""RanPAC: adapt once, then never train again. Random projection, and ridge regression that adds up over sessions.

In session 1 the backbone is fine-tuned, then frozen for good. From there on nothing is learned by gradient descent, so
nothing can be forgotten. Each picture becomes a feature vector f of d numbers, then h = relu(f W) with a fixed random
W of M = 10000 columns: many random directions of f, each cut off at zero, among which a linear classifier separates far
more than it could in f itself. The classifier is ridge regression from h onto the rows' 0/1 targets, and its solution
needs only two sums over samples,

    G = H^T H  (M x M)      Q = H^T Y  (M x R)      weights = (G + lambda I)^-1 Q      scores = h @ weights.

Sums do not care about order or about who brought the samples: after session t, G and Q are what they would be had all
data come at once. For a given lambda the classifier is therefore exactly the joint one, without one old sample kept.

A session's life
    session 1 trained   the backbone, with a temporary linear head that is thrown away
    frozen after that   the backbone, and W from the start
    grown               one column of Q per row; the sums
    tested              on all emotions so far, by eq. 3 (rch.py)

What RCH adds, and why here eq. 3 is exact: ridge weights are linear in Y. Let A (R x E) hold a 1 where a row stands
for an emotion. Then summing rows, (G + lambda I)^-1 H^T Y A, IS ridge regression on the merged labels Y A. The 23
rows and the 9 emotions give the same predictions; the rows can be seen and remapped later, and that is all the
difference. What goes wrong without exemplars: lambda is chosen on the current session's samples alone, and the
backbone only ever adapted to session 1.

The M x M matrix never exists (see LowRankRidge): G has at most as many non-zero directions as there were samples.

Controls: --features frozen (the pretrained backbone untouched), --features pixels (no network: 12 x 12 pixels).

Paper: McDonnell et al., RanPAC, arXiv 2307.02251; in the benchmark: arXiv 2501.19111, section 5.
Run:   python ranpac.py --backbone vit --protocol ilcv

Differs from the paper / from the released code
 1. Session 1 fine-tunes the whole backbone, as the benchmark's paper says. The original trains small adapters.
 2. AdamW with a cosine and weight decay 0.05, where the benchmark's paper names no optimizer; the released code takes
    SGD with momentum, weight decay 0.005 and a constant 2e-5, which hardly moves the network.
 3. Scores are the plain linear h @ weights, as in the original. The released code predicts by cosine similarity,
    which is another classifier, and one for which eq. 3 is no longer exact.
 4. The solution is the exact low-rank one in float64. The released code solves M x M systems in float32, which takes
    minutes and is wrong at small lambda.
 5. lambda is chosen on a random fifth of the session's training rows. The released code takes the last fifth in file
    order, which is sorted by emotion: it validates on emotions it did not fit.
 6. Near ties in lambda go to the largest within 1 % of the smallest error.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import common
import data
import protocols
import rch

# ---- settings --------------------------------------------------------------------------------------------------------
SETTINGS = {  # paper, tiny
    "epochs_first": (60, 10),
    "batch": (16, 32),
    "lr": (2e-5, 5e-4),
    "weight_decay": (0.05, 0.05),
    "projected": (10_000, 10_000),  # M
}
LAMBDAS = [10.0**power for power in range(-8, 9)]


# ---- the method's own pieces -----------------------------------------------------------------------------------------
def float64(x):
    """x in float64, which mps lacks: the ridge then runs on the CPU."""
    return (x.cpu() if x.device.type == "mps" else x).double()


class LowRankRidge:
    """Ridge regression that adds up over sessions, exact, without the M x M matrix.

    Instead of G = H^T H (M x M) and Q = H^T Y (M x C) it carries a small square root of G: R (r x M) and Z (r x C) with
    R^T R = G and R^T Z = Q. Here r is at most the number of samples so far, and the rows of R are orthogonal:
    R R^T = diag(w). Since (R^T R + lambda I)^-1 R^T = R^T (R R^T + lambda I)^-1, every lambda costs next to nothing:

        weights(lambda) = R^T diag(1 / (w + lambda)) Z        (M x C)

    R is a function of G, so it holds no more about any one sample than G does: still exemplar-free.
    """

    def __init__(self, num_features):
        self.r = torch.zeros(0, num_features, dtype=torch.float64)  # R (r, M)
        self.z = torch.zeros(0, 0, dtype=torch.float64)  # Z (r, C)
        self.w = torch.zeros(0, dtype=torch.float64)  # w (r,)

    def update(self, h, y):
        """Add samples: h (n, M) features, y (n, C) targets. C may grow from call to call."""
        h, y = float64(h), float64(y)
        assert h.shape[1] == self.r.shape[1] and y.shape == (len(h), y.shape[1]) and y.shape[1] >= self.z.shape[1]
        s = torch.cat([self.r.to(h.device), h])  # S (r + n, M): S^T S is the new G
        t = torch.cat(
            [F.pad(self.z.to(h.device), (0, y.shape[1] - self.z.shape[1])), y]
        )  # T (r + n, C): S^T T is the new Q
        w, u = torch.linalg.eigh(s @ s.T)  # S S^T = U diag(w) U^T, so (U^T S)(U^T S)^T = diag(w)
        keep = w > 1e-13 * w.max()  # the other directions are only rounding errors
        self.w, u = w[keep], u[:, keep]
        self.r, self.z = u.T @ s, u.T @ t

    def weights(self, lam):
        """Ridge weights (M, C) for regularisation `lam`."""
        return self.r.T @ (self.z / (self.w + lam)[:, None])


def choose_lambda(h, y):
    """The lambda of LAMBDAS with the least squared error on a random 20 % of (h (n, M), y (n, C)), fitted on the rest.

    With a the rows fitted on and b the rows held out, a a^T = U diag(w) U^T gives the predictions for every lambda,
    (b a^T U)(U^T y_a / (w + lambda)), from one small eigendecomposition. Near ties go to the largest.
    """
    h, y = float64(h), float64(y)
    held_out, fitted = torch.randperm(len(h)).to(h.device).tensor_split([max(1, len(h) // 5)])
    a, b = h[fitted], h[held_out]
    w, u = torch.linalg.eigh(a @ a.T)
    left, right = b @ a.T @ u, u.T @ y[fitted]  # (n_b, n_a), (n_a, C)
    errors = torch.stack([F.mse_loss(left @ (right / (w.clamp(min=0) + lam)[:, None]), y[held_out]) for lam in LAMBDAS])
    return max(lam for lam, error in zip(LAMBDAS, errors) if error <= 1.01 * errors.min())


class Pixels(nn.Module):
    """The control without a network: pictures (B, 3, S, S) -> 12 x 12 area-averaged pixels (B, 432)."""

    num_features = 3 * 12 * 12

    def forward(self, x):
        return F.adaptive_avg_pool2d(x, 12).flatten(1)


# ---- the run ---------------------------------------------------------------------------------------------------------
def main():
    parser = common.parser(__doc__, SETTINGS)
    parser.add_argument("--features", choices=("adapted", "frozen", "pixels"), default="adapted",
                        help="adapted in session 1 (RanPAC), or the controls (default: adapted)")  # fmt: skip
    args = common.parse(parser, SETTINGS)
    args.variant = "" if args.features == "adapted" else args.features
    sessions = common.load_sessions(args)
    images = [torch.from_numpy(session.images).to(args.device) for session in sessions]  # (N, 3, S, S) uint8 each
    pretrained = Pixels() if args.features == "pixels" else common.make_backbone(args)
    run = protocols.Run(args, sessions, logits=False)
    if args.features == "adapted":
        common.estimate(args, pretrained, sessions, run)

    for fold in run.folds:
        # ---- a trial begins: fold i of every session ----
        common.seed(args, fold)
        rows = rch.RCH()
        backbone = copy.deepcopy(pretrained)
        test_h = []

        for t, session in enumerate(sessions):
            # ---- session t arrives ----
            train, test = run.parts(fold, t)
            new = rows.add_session(data.TABLE1[session.name])
            x = images[t][train]  # (N, 3, S, S) uint8
            y = torch.from_numpy(rows.targets(session.emotions)[train]).to(args.device)  # (N,) rows

            # ---- grow ----
            if t == 0:
                own = torch.Generator().manual_seed(args.seed * 1000 + fold)  # W is the same whatever phase 1 draws
                w = torch.randn(backbone.num_features, args.projected, generator=own).to(args.device)  # W (d, M)
                ridge = LowRankRidge(args.projected)
                head = nn.Linear(backbone.num_features, new.stop, device=args.device)  # temporary

            # ---- train ----
            # Phase 1: the backbone, in session 1 only.
            if t == 0 and args.features == "adapted":
                trained = [*backbone.parameters(), *head.parameters()]
                optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay, fused=True)
                steps = args.epochs_first * common.steps(len(x), args.batch)
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
                backbone.train()
                for epoch in range(args.epochs_first):
                    for batch in common.batches(len(x), args.batch, args.device):
                        with common.autocast(args):
                            logits = head(backbone(common.normalize(x[batch], args)))  # (B, R)
                        loss = F.cross_entropy(logits.float(), y[batch])
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
                        schedule.step()
                    common.check_finite(loss, fold, session.name, epoch)
                backbone.eval()

            # Phase 2, in every session: add its samples to the sums and solve.
            h = F.relu(common.extract(backbone, x, args) @ w)  # (N, M)
            one_hot = F.one_hot(y, new.stop)  # (N, R)
            lam = choose_lambda(h, one_hot)
            ridge.update(h, one_hot)
            weights = ridge.weights(lam)  # (M, R) float64

            # ---- test on the fold-i parts of sessions 1..t ----
            # The network is frozen, so the features of earlier test parts are kept.
            test_h.append(F.relu(common.extract(backbone, images[t][test], args) @ w))
            scores = float64(torch.cat(test_h)) @ weights  # (n, R)
            run.record(fold, t, rows, scores.cpu())
    run.summary()


if __name__ == "__main__":
    common.launch(main)
