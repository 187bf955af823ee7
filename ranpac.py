"""RanPAC: adapt once, then never train again. Random projection, and ridge regression that adds up over sessions.

In session 1 the backbone is fine-tuned, then frozen for good. From there on only sums grow, and a sum forgets nothing.
Each image becomes features f (d numbers), then h = relu(f W) with a fixed random W of M = 10000 columns, among which a
linear classifier can separate more than in f itself. The classifier is ridge regression from h onto the rows' 0/1
targets. With the samples' h as H (N x M) and their targets as Y (N x R) it needs two sums over samples,

    G = H^T H  (M x M)      Q = H^T Y  (M x R)      weights = (G + lambda I)^-1 Q      scores = h @ weights.

Sums do not depend on order: after session t, G and Q are what they would be had all data come at once. For a given
lambda and backbone the classifier is exactly the joint one, without one old sample kept.

What RCH adds, and why here eq. 3 is exact: ridge weights are linear in Y. Let A (R x E) hold a 1 where a row stands for
an emotion. Then summing rows, (G + lambda I)^-1 H^T Y A, IS ridge regression on the merged labels Y A. What goes wrong
without exemplars: the backbone only adapts to session 1, and lambda is chosen on the current session's samples alone.

Paper: McDonnell et al., RanPAC, arXiv 2307.02251 (the original); in the benchmark: arXiv 2501.19111, section 3.4
Run:   python ranpac.py --backbone vit --protocol ilcv       (--epochs-first 0: the network untouched)

Differs from the paper / from the released code (both the benchmark's; and as finetune.py 1 to 4)
 1. Phase 1 trains the whole backbone with a linear head. The original: small adapters, a cosine head with a scale.
 2. Scores are h @ weights, as in the original. Released: cosine similarity, for which eq. 3 is no longer exact.
 3. The solution is the exact low-rank one in float64. Released: M x M systems in float32, wrong at small lambda.
 4. Of the lambdas whose error is within 1 % of the smallest, the largest is taken. Both choose on a random fifth.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import common
import data
import protocols
import rch

SETTINGS = {  # name: (paper preset, tiny preset); each is a flag
    "epochs_first": (60, 10),  # in the first session, the only one that trains
    "batch": (16, 32),
    "lr": (2e-5, 5e-4),
    "weight_decay": (0.05, 0.05),
    "projected": (10_000, 2_000),  # M; on 96 to 192 features more columns only take time
}
LAMBDAS = [10.0**power for power in range(-8, 9)]


def to_float64(x):
    """x in float64, which mps lacks: the ridge then runs on the CPU."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def eigen(gram):
    """Eigenvalues (k,) and eigenvectors (n, k) of a Gram matrix (n, n), without those that are rounding errors of 0."""
    eigenvalues, u = torch.linalg.eigh(gram)
    keep = eigenvalues > 1e-13 * eigenvalues.max()
    return eigenvalues[keep], u[:, keep]


class LowRankRidge:
    """Ridge regression that adds up over sessions, exact, without the M x M matrix.

    Instead of G = H^T H (M x M) and Q = H^T Y (M x R) it carries S (k x M) and Z (k x R) with S^T S = G and S^T Z = Q.
    S = H and Z = Y would do, but that would be keeping the samples. S is turned until its k rows are orthogonal,
    S S^T = diag(eigenvalues): they are G's eigenvectors times the roots of their eigenvalues, so S holds no more about
    any one sample than G does, and k is at most the number of samples so far. Since

        (S^T S + lambda I) S^T = S^T (S S^T + lambda I),    so    (S^T S + lambda I)^-1 S^T = S^T (S S^T + lambda I)^-1,

    the weights (G + lambda I)^-1 Q are S^T diag(1 / (eigenvalues + lambda)) Z, and every lambda costs next to nothing.
    """

    def __init__(self, num_features):
        self.s = torch.zeros(0, num_features, dtype=torch.float64)  # S (k, M)
        self.z = torch.zeros(0, 0, dtype=torch.float64)  # Z (k, R)
        self.eigenvalues = torch.zeros(0, dtype=torch.float64)  # of G, those that are not 0 (k,)

    def update(self, h, y, gram=None):
        """Add samples: h (n, M) features, y (n, R) targets; gram is h h^T, if known. R may grow from call to call."""
        h, y = to_float64(h), to_float64(y)
        assert h.shape[1] == self.s.shape[1] and len(y) == len(h) and y.shape[1] >= self.z.shape[1]
        # The new S is the old one with h below it: S^T S = G + h^T h. The new Z too: S^T Z = Q + h^T y.
        s, z = self.s.to(h.device), F.pad(self.z.to(h.device), (0, y.shape[1] - self.z.shape[1]))  # old y: 0 there
        k, gram = len(s), h @ h.T if gram is None else gram
        outer = torch.block_diag(torch.diag(self.eigenvalues.to(h.device)), gram)  # S S^T: of the old S it is diagonal
        outer[k:, :k] = h @ s.T  # eigh reads nothing above the diagonal
        # S S^T = U diag(eigenvalues) U^T. U is orthogonal, so U^T S and U^T Z have the same products S^T S and S^T Z.
        # The squared length of a row u^T S is its eigenvalue: where that is 0, so is the row, and it can go.
        self.eigenvalues, u = eigen(outer)
        self.s = torch.addmm(u[:k].T @ s, u[k:].T, h)  # U^T S, old part and new part
        self.z = u.T @ torch.cat([z, y])

    def weights(self, lam):
        """Ridge weights (M, R) for regularisation `lam`."""
        return self.s.T @ (self.z / (self.eigenvalues + lam)[:, None])


def choose_lambda(h, y, gram=None):
    """The lambda of LAMBDAS that predicts a random fifth of the samples h (n, M), y (n, R) best, fitted on the others.

    Only the session's own samples are there to choose on. Errors within 1 % count as equal; of those the largest
    lambda, the smoothest classifier, is taken. gram is h h^T (n, n) in float64, if known: it is all that is needed.
    """
    held_out, fitted = torch.randperm(len(h)).to(h.device).tensor_split([max(1, len(h) // 5)])
    gram, y = to_float64(h) @ to_float64(h).T if gram is None else gram, to_float64(y)
    eigenvalues, u = eigen(gram[fitted][:, fitted])  # with S = u^T h[fitted] and Z = u^T y[fitted], as above,
    left, z = gram[held_out][:, fitted] @ u, u.T @ y[fitted]  # the predictions are (h[held_out] S^T) diag(...) Z
    errors = torch.stack([F.mse_loss(left @ (z / (eigenvalues + lam)[:, None]), y[held_out]) for lam in LAMBDAS])
    return max(lam for lam, error in zip(LAMBDAS, errors) if error <= 1.01 * errors.min())


def main():
    args = common.parse(__doc__, SETTINGS)
    pretrained = common.make_backbone(args)  # images (B, 3, S, S) -> features (B, d)
    sessions = data.load_sessions(args, pretrained)
    run = protocols.Run(args, sessions, merges=("sum",))  # no prob: the scores are regressions, not logits

    for fold in run.folds:
        # ---- a trial begins: fold i of every session ----
        torch.manual_seed(args.seed * 1000 + fold)
        rows = rch.RCH()
        backbone = copy.deepcopy(pretrained)
        own = torch.Generator().manual_seed(args.seed * 1000 + fold)  # W is the same whatever training draws
        projection = torch.randn(backbone.num_features, args.projected, generator=own).to(args.device)  # W (d, M)
        ridge = LowRankRidge(args.projected)
        test_h = []

        for t, session, train, test in run.stream(fold):
            # ---- session t arrives (session 1 is t = 0) ----
            new = rows.add_session(session.emotions)
            x = session.images[train]  # (N, 3, S, S)
            y = torch.from_numpy(rows.targets(session.labels[train])).to(args.device)  # (N,)

            # ---- grow: Q gets a column per new row, inside ridge.update ----

            # ---- train: phase 1, in session 1 only ----
            if t == 0:
                head = nn.Linear(backbone.num_features, new.stop).to(args.device)  # temporary
                batches = common.batches(len(x), args.batch, args.epochs_first, args.device)
                trained = [*backbone.parameters(), *head.parameters()]
                optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay, fused=True)
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
                backbone.train()
                for batch in batches:
                    with common.autocast(args):
                        logits = head(backbone(x[batch]))  # (B, R)
                    loss = F.cross_entropy(logits.float(), y[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                backbone.eval()

            # ---- add up: phase 2, in every session ----
            h = to_float64(F.relu(common.extract(backbone, x) @ projection))  # (N, M)
            gram, one_hot = h @ h.T, F.one_hot(y, new.stop)  # (N, N), (N, R)
            lam = choose_lambda(h, one_hot, gram)
            ridge.update(h, one_hot, gram)
            weights = ridge.weights(lam)  # (M, R) float64

            # ---- test on the fold-i parts of all sessions so far ----
            test_h.append(F.relu(common.extract(backbone, session.images[test]) @ projection))  # the earlier h are kept
            scores = to_float64(torch.cat(test_h)) @ weights  # (n, R)
            run.record(fold, t, rows, scores)
    run.summary()


if __name__ == "__main__":
    common.launch(main)
