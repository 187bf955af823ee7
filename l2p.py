"""L2P: leave the network alone and learn what to put before its input.

L2P (Learning to Prompt) never changes the pretrained ViT. It learns a pool of prompts: short
sequences of tokens that are put before an image's patches, each with a key. An image first passes
the untouched network; its class token is the query, and the prompts of the nearest keys are used.
Images of different sessions may choose different prompts, which should keep the sessions apart.
    grown     one linear head for the session's rows, on the mean output of the prompt tokens
    trained   the pool, the keys and the new head: CE over the session's own rows, and a pull that
              moves chosen keys towards the queries, - pull * mean_b sum_k cos(q_b, k)
    frozen    the ViT, always; the old heads
    tested    on all emotions so far
There are no exemplars: later sessions change the prompts that earlier ones rely on. The run prints which.
Paper: Wang et al., arXiv 2112.08654 (eq. 3 to 5). What differs: docs/differences.md
Run:   python l2p.py --backbone vit --protocol ilcv
       synthetic stream, seed 0: last 52.3 %; 12 s a fold on one core
"""

import functools
import sys

import torch
from torch import nn
from torch.nn import functional as F

import common
import data
import protocols
import rch

SETTINGS = {  # name: (paper preset, tiny preset); each is a flag
    "epochs_first": (60, 10),  # in the first session
    "epochs_next": (10, 3),  # in each later session
    "batch": (16, 16),
    "lr": (0.03 * 16 / 256, 5e-3),
    "pool": (10, 10),  # P prompts
    "length": (5, 5),  # L tokens each
    "chosen": (5, 5),  # prompts per sample
    "pull": (0.1, 0.1),
}


def tokens(vit, x, prompts):
    """All tokens after the last norm, (B, 1 + n + patches, d), for images (B, 3, S, S) and prompts (B, n, d)."""
    position = vit.pos_embed  # (1, 1 + patches, d)
    cls = (vit.cls_token + position[:, :1]).expand(len(x), -1, -1)  # (B, 1, d)
    patches = vit.patch_embed(x) + position[:, 1:]  # (B, patches, d)
    joined = torch.cat([cls, prompts + position[:, :1], patches], 1)
    return vit.norm(vit.blocks(vit.norm_pre(joined)))


def query(vit, x):
    """The class token of the ViT without prompts, (B, d)."""
    no_prompts = torch.empty(len(x), 0, vit.pos_embed.shape[2], device=x.device)
    return tokens(vit, x, no_prompts)[:, 0]


class PromptPool(nn.Module):
    """P prompts of L tokens with a key each, all d wide: prompts (P, L, d), keys (P, d)."""

    def __init__(self, count, length, width):
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(count, length, width).uniform_(-1, 1))
        self.keys = nn.Parameter(torch.empty(count, width).uniform_(-1, 1))

    def choose(self, q, count):
        """The keys nearest to each query (B, d), sample by sample: indices and cosines, (B, count) each."""
        cosine = F.normalize(q, dim=1) @ F.normalize(self.keys, dim=1).T  # (B, P)
        cosine, index = cosine.topk(count, dim=1)
        return index, cosine

    def forward(self, vit, x, index):
        """Features (B, d) of images (B, 3, S, S) with the prompts (B, count): the mean output of their tokens."""
        prompts = self.prompts[index].flatten(1, 2)  # (B, count, L, d) -> (B, count L, d)
        return tokens(vit, x, prompts)[:, 1 : 1 + prompts.shape[1]].mean(1)


def main():
    args = common.parse(__doc__, SETTINGS)
    if args.chosen > args.pool:
        sys.exit(f"error: --chosen {args.chosen}: more than the --pool of {args.pool}")
    vit = common.make_backbone(args, parts=query).requires_grad_(False)
    sessions = data.load_sessions(args, vit)
    run = protocols.Run(args, sessions)
    queries = {session.name: common.extract(vit, session.images) for session in sessions}  # (N, d) each
    usage = torch.zeros(len(sessions), args.pool)  # (T, P): how often a session's test samples chose a prompt

    for fold in run.folds:
        # ---- a trial begins: this fold of every session is its test part ----
        torch.manual_seed(args.seed * 1000 + fold)
        rows = rch.RCH()  # which row means which emotion of which session
        pool = PromptPool(args.pool, args.length, vit.num_features).to(args.device)
        heads = nn.ModuleList()
        test_images = []
        test_queries = []

        for t, session, train, test in run.stream(fold):
            # ---- session t arrives (session 1 is t = 0); train and test are indices ----
            new_rows = rows.add_session(session.emotions)  # a slice of all R rows
            x = session.images[train]  # (N, 3, S, S)
            q = queries[session.name][train]  # (N, d)
            y = torch.from_numpy(rows.targets(session.labels[train])).to(args.device)  # (N,)
            test_images.append(session.images[test])
            test_queries.append(queries[session.name][test])

            # ---- grow ----
            heads.append(nn.Linear(vit.num_features, len(session.emotions)).to(args.device))

            # ---- train ----
            losses = []
            epochs = args.epochs_next if t > 0 else args.epochs_first
            batches = common.batches(len(x), args.batch, epochs, args.device)  # indices (B,)
            trained = [*pool.parameters(), *heads[-1].parameters()]
            optimizer = torch.optim.Adam(trained, args.lr, fused=True)
            for batch in batches:
                index, cosine = pool.choose(q[batch], args.chosen)  # (B, chosen) each
                with common.autocast(args):
                    logits = heads[-1](pool(vit, x[batch], index))  # (B, emotions of the session)
                # A head counts its rows from 0.
                loss = F.cross_entropy(logits.float(), y[batch] - new_rows.start)
                loss = loss - args.pull * cosine.sum(1).mean()
                losses.append(loss.detach())

                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(trained, 1.0)

                optimizer.step()

            # ---- test on the test parts of all sessions so far ----
            with torch.no_grad():
                index, _ = pool.choose(torch.cat(test_queries), args.chosen)  # (n, chosen)
                prompted = functools.partial(pool, vit)
                f = common.extract(prompted, torch.cat(test_images), index)  # (n, d)
                scores = torch.cat([head(f) for head in heads], 1)  # (n, R)
            run.record(fold, t, rows, scores, losses)  # rows -> emotions -> accuracy
        run.save(fold, pool=pool, heads=heads)  # with --save

        # The trial is over: which prompts did the last test choose?
        for i, chosen in enumerate(index.split([len(part) for part in test_queries])):
            usage[i] += chosen.flatten().bincount(minlength=args.pool).cpu()
    if run.folds:
        print("\nhow often each prompt was chosen at the end, in % of a session's test samples in the folds made now")
        for session, counts in zip(sessions, usage):
            share = 100 * args.chosen * counts / counts.sum()  # each sample chooses `chosen` prompts
            print(f"{session.name:8s}" + "".join(f"{percent:6.1f}" for percent in share.tolist()))
    run.summary()


if __name__ == "__main__":
    common.launch(main)
