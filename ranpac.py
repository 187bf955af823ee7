"""RanPAC: adapt once, then never train again: random projection, and ridge regression on sums.

In session 1 the backbone is fine-tuned, then frozen. Its features f (d numbers) become
h = relu(f W), W fixed and random with M columns. With all h as H (N x M) and their one-hot rows as
Y (N x R), only two sums over samples grow, and a sum forgets nothing:
    G = H^T H    Q = H^T Y    weights = (G + lambda I)^-1 Q (M x R)    scores = h @ weights
For a given lambda and backbone that is the ridge regression of all sessions at once, without one
old sample. It is linear in Y: where A (R x E) tells which row means which emotion, the sum of rows
(G + lambda I)^-1 H^T Y A IS the regression on merged labels Y A. So eq. 3 of rch.py is exact here.
There are no exemplars: the backbone adapts to session 1 alone, and lambda is chosen on new samples alone.
Paper: McDonnell et al., arXiv 2307.02251. What differs: docs/differences.md
Run:   python ranpac.py --backbone vit --protocol ilcv
       synthetic stream, seed 0: last 58.7 %; 4 s a fold on one core
       --epochs-first 0 takes the pretrained network as it is
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
    "epochs_first": (60, 10),  # in the first session
    "batch": (16, 32),
    "lr": (2e-5, 5e-4),
    "weight_decay": (0.05, 0.05),
    "projected": (10_000, 2_000),  # M columns of W
}
LAMBDAS = [10.0**power for power in range(-8, 9)]


def to_float64(x):
    """x in float64, which mps lacks: the ridge then runs on the CPU."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def eigen(gram):
    """Eigenvalues (k,) and eigenvectors (n, k) of a Gram matrix (n, n), without rounding errors of 0."""
    eigenvalues, u = torch.linalg.eigh(gram)
    keep = eigenvalues > 1e-13 * eigenvalues.max()
    return eigenvalues[keep], u[:, keep]


class LowRankRidge:
    """Ridge regression that adds up over sessions, exact, without the M x M matrix.

    Instead of G and Q it carries S (k x M) and Z (k x R) with S^T S = G, S^T Z = Q, and orthogonal rows
    of S, S S^T = diag(eigenvalues): it holds no more about a sample than G does. k is at most the number
    of samples so far. Since (S^T S + lambda I) S^T = S^T (S S^T + lambda I),

        (G + lambda I)^-1 Q = S^T diag(1 / (eigenvalues + lambda)) Z.
    """

    def __init__(self, num_features):
        self.s = torch.zeros(0, num_features, dtype=torch.float64)  # S (k, M)
        self.z = torch.zeros(0, 0, dtype=torch.float64)  # Z (k, R)
        self.eigenvalues = torch.zeros(0, dtype=torch.float64)  # of G, those that are not 0 (k,)

    def update(self, h, y, gram=None):
        """Add samples: h (n, M) features, y (n, R) targets, R growing; gram is h h^T, if known."""
        h, y = to_float64(h), to_float64(y)
        assert h.shape[1] == self.s.shape[1] and len(y) == len(h) and y.shape[1] >= self.z.shape[1]
        if gram is None:
            gram = h @ h.T

        # The new S is the old one with h below it, S^T S = G + h^T h, and Z so too, S^T Z = Q + h^T y.
        k, s = len(self.s), self.s.to(h.device)
        z = F.pad(self.z.to(h.device), (0, y.shape[1] - self.z.shape[1]))  # the new rows are 0 for old samples
        outer = torch.block_diag(torch.diag(self.eigenvalues.to(h.device)), gram)  # S S^T
        outer[k:, :k] = h @ s.T  # eigh reads nothing above the diagonal

        # S S^T = U diag(eigenvalues) U^T. U is orthogonal: U^T S and U^T Z have the same products.
        # A row u^T S whose eigenvalue is 0 is 0 itself, and left out.
        self.eigenvalues, u = eigen(outer)
        self.s = torch.addmm(u[:k].T @ s, u[k:].T, h)  # U^T S, old part and new part
        self.z = u.T @ torch.cat([z, y])

    def weights(self, lam):
        """Ridge weights (M, R) for regularisation `lam`."""
        return self.s.T @ (self.z / (self.eigenvalues + lam)[:, None])


def choose_lambda(h, y, gram=None):
    """The lambda of LAMBDAS that predicts a random fifth of the samples h (n, M), y (n, R) best.

    Fitted on the others. Of errors within 1 % the largest lambda is taken. gram is h h^T (n, n), if known.
    """
    held_out, fitted = torch.randperm(len(h)).to(h.device).tensor_split([max(1, len(h) // 5)])
    if gram is None:
        gram = to_float64(h) @ to_float64(h).T
    y = to_float64(y)
    # As in LowRankRidge, with S = u^T h[fitted] and Z = u^T y[fitted].
    eigenvalues, u = eigen(gram[fitted][:, fitted])
    left, z = gram[held_out][:, fitted] @ u, u.T @ y[fitted]
    errors = torch.stack([F.mse_loss(left @ (z / (eigenvalues + lam)[:, None]), y[held_out]) for lam in LAMBDAS])
    return max(lam for lam, error in zip(LAMBDAS, errors) if error <= 1.01 * errors.min())


def main():
    args = common.parse(__doc__, SETTINGS)
    pretrained = common.make_backbone(args)  # images (B, 3, S, S) -> features (B, d)
    sessions = data.load_sessions(args, pretrained)
    run = protocols.Run(args, sessions, merges=("sum",))  # no prob: the scores are no logits

    for fold in run.folds:
        # ---- a trial begins: this fold of every session is its test part ----
        torch.manual_seed(args.seed * 1000 + fold)
        rows = rch.RCH()  # which row means which emotion of which session
        backbone = copy.deepcopy(pretrained)
        # W (d, M) has a generator of its own: it is the same whatever training draws.
        generator = torch.Generator().manual_seed(args.seed * 1000 + fold)
        projection = torch.randn(backbone.num_features, args.projected, generator=generator).to(args.device)
        ridge = LowRankRidge(args.projected)
        test_h = []

        for t, session, train, test in run.stream(fold):
            # ---- session t arrives (session 1 is t = 0); train and test are indices ----
            new_rows = rows.add_session(session.emotions)  # a slice of all R rows
            x = session.images[train]  # (N, 3, S, S)
            y = torch.from_numpy(rows.targets(session.labels[train])).to(args.device)  # (N,)

            # ---- grow ----
            # Q gets a column per new row, inside ridge.update.

            # ---- train ----
            losses = []
            if t == 0:
                head = nn.Linear(backbone.num_features, new_rows.stop).to(args.device)  # temporary
                batches = common.batches(len(x), args.batch, args.epochs_first, args.device)  # indices (B,)
                trained = [*backbone.parameters(), *head.parameters()]
                optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay, fused=True)
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
                backbone.train()
                for batch in batches:
                    with common.autocast(args):
                        logits = head(backbone(x[batch]))  # (B, R)
                    loss = F.cross_entropy(logits.float(), y[batch])
                    losses.append(loss.detach())

                    optimizer.zero_grad()
                    loss.backward()

                    optimizer.step()
                    schedule.step()
                backbone.eval()

            # ---- add up ----
            h = to_float64(F.relu(common.extract(backbone, x) @ projection))  # (N, M)
            one_hot = F.one_hot(y, new_rows.stop)  # (N, R)
            gram = h @ h.T  # (N, N)
            lam = choose_lambda(h, one_hot, gram)
            ridge.update(h, one_hot, gram)
            weights = ridge.weights(lam)  # (M, R)

            # ---- test on the test parts of all sessions so far ----
            test_h.append(F.relu(common.extract(backbone, session.images[test]) @ projection))
            scores = to_float64(torch.cat(test_h)) @ weights  # (n, R)
            run.record(fold, t, rows, scores, losses)  # rows -> emotions -> accuracy
        run.save(fold, backbone=backbone, projection=projection, weights=weights)  # with --save
    run.summary()


if __name__ == "__main__":
    common.launch(main)
