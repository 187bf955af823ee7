"""L2P: leave the network alone and learn what to say to it.

L2P (Learning to Prompt) never changes the pretrained ViT. It learns a pool of prompts: short sequences of made-up
tokens that are put before a picture's patches and steer what the frozen network makes of it. Every prompt has a key.
A picture first passes the untouched network, its class token is the query, and the prompts of the five nearest keys
are used. Pictures of different sessions may pick different prompts; that is what should keep the sessions apart.

A session's life
    grown     one linear head for the session's rows, on the mean output of the prompt tokens
    trained   the pool of prompts, the keys and the new head
    frozen    the ViT, always; the old heads
    tested    on all emotions so far: RCH merges the rows that mean the same emotion (rch.py)

The loss is cross-entropy over the session's own rows, and a pull that moves the chosen keys towards their queries:

    CE(logits of the session's rows, y) - 0.1 mean_b sum over the 5 chosen keys k of cos(q_b, k)

What RCH adds: a returning emotion gets a new row in the new session's head. What goes wrong without exemplars: the
pool is shared, so a later session overwrites prompts that an earlier one relied on, and the queries of flow pictures
are alike: most samples choose the same few prompts, whatever their session. The run prints how often each was chosen.

Control: --no-prompts, the same head on the class token of the frozen ViT. Without it nobody knows what prompts add.

Paper: Wang et al., Learning to Prompt for Continual Learning, arXiv 2112.08654; in the benchmark: arXiv 2501.19111,
section 5.
Run:   python l2p.py --backbone vit --protocol ilcv

Differs from the paper / from the released code
 1. At test every sample chooses its own prompts. The released code, like the public ports, lets the batch vote, also at
    test, on a loader sorted by emotion: its predictions depend on who else is in the batch. Here they do not.
 2. In training too every sample chooses its own. The original configuration votes over the batch there.
 3. Prompt tokens get the class token's position, as in the public PyTorch ports; the original code gives them none.
 4. The optimizer starts anew in every session, and nothing is copied from one session's prompts to the next.
 5. Adam at 0.03 x batch / 256, the original's rule, constant, no weight decay, gradients clipped to norm 1, for 60
    epochs in session 1 and 10 later. The released code takes 3e-4 for 60 epochs in every session; in 10 epochs that
    would move no prompt entry by more than 0.02.
 6. The parts of timm's own ViT are called; no copy of it is kept here. Backbones that are not plain ViTs are refused.
"""

import functools

import torch
from torch import nn
from torch.nn import functional as F

import common
import data
import protocols
import rch

# ---- settings --------------------------------------------------------------------------------------------------------
SETTINGS = {  # (paper preset, tiny preset)
    "epochs_first": (60, 10),
    "epochs_next": (10, 3),
    "batch": (16, 16),
    "lr": (0.03 * 16 / 256, 5e-3),
    "lr_no_prompts": (1e-3, 1e-2),
    "pool": (10, 10),  # P prompts
    "length": (5, 5),  # L tokens each
    "chosen": (5, 5),  # prompts per sample
    "pull": (0.1, 0.1),
}


# ---- the method's own pieces -----------------------------------------------------------------------------------------
class PromptPool(nn.Module):
    """P prompts of L tokens with a key each, all d wide: prompts (P, L, d), keys (P, d)."""

    def __init__(self, count, length, width, device=None):
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(count, length, width, device=device).uniform_(-1, 1))
        self.keys = nn.Parameter(torch.empty(count, width, device=device).uniform_(-1, 1))

    def choose(self, q, count):
        """The keys nearest to each query (B, d), sample by sample: indices and cosines, (B, count) each."""
        cosine = F.normalize(q, dim=1) @ F.normalize(self.keys, dim=1).T  # (B, P)
        cosine, index = cosine.topk(count, dim=1)
        return index, cosine

    def forward(self, vit, x, index):
        """Features (B, d) of pictures (B, 3, S, S) with the prompts (B, count): the mean output of their tokens."""
        prompts = self.prompts[index].flatten(1, 2)  # (B, count, L, d) -> (B, count L, d)
        position = vit.pos_embed  # (1, 1 + patches, d)
        cls = (vit.cls_token + position[:, :1]).expand(len(x), -1, -1)  # (B, 1, d)
        tokens = torch.cat([cls, prompts + position[:, :1], vit.patch_embed(x) + position[:, 1:]], 1)
        tokens = vit.norm(vit.blocks(vit.norm_pre(tokens)))
        return tokens[:, 1 : 1 + prompts.shape[1]].mean(1)


# ---- the run ---------------------------------------------------------------------------------------------------------
def main():
    parser = common.parser(__doc__, SETTINGS)
    parser.add_argument("--no-prompts", action="store_true", help="the control: a linear head on the frozen ViT")
    args = common.parse(parser, SETTINGS)
    common.require_plain_vit(args)
    args.variant = "no-prompts" if args.no_prompts else ""
    lr = args.lr_no_prompts if args.no_prompts and args.lr_is_default else args.lr
    sessions = common.load_sessions(args)  # T data.Session: name, images, emotions, subjects
    images = [torch.from_numpy(session.images).to(args.device) for session in sessions]  # (N, 3, S, S) uint8 each
    vit = common.make_backbone(args).requires_grad_(False)  # frozen, in eval mode, the same for all folds
    d = vit.num_features
    run = protocols.Run(args, sessions)  # makes the folds; prints the lines, writes the files
    if not args.no_prompts:
        common.estimate(args, vit, sessions, run)  # only says how long the paper preset takes on a CPU
    # A picture's query is the class token of the untouched ViT: a constant, computed once for all folds and epochs.
    queries = [common.extract(lambda x: vit.forward_features(x)[:, 0], whole, args) for whole in images]  # (N, d) each
    usage = torch.zeros(len(sessions), args.pool)  # (T, P): how often the test samples of a session chose a prompt

    for fold in run.folds:  # those asked for, without those that --resume keeps
        # ---- a trial begins: fold i of every session ----
        common.seed(args, fold)  # so that a fold is the same in any company
        rows = rch.RCH()  # the rows so far, each a (session, emotion) pair
        pool = PromptPool(args.pool, args.length, d, args.device)
        heads = nn.ModuleList()
        test_images, test_queries = [], []

        for t, session in enumerate(sessions):
            # ---- session t arrives (session 1 is t = 0) ----
            train, test = run.parts(fold, t)  # indices into the session's samples
            emotions = data.TABLE1[session.name]  # the session's 5 to 7 words
            new = rows.add_session(emotions)  # slice of the new rows among all R
            x, q = images[t][train], queries[t][train]  # (N, 3, S, S) uint8, (N, d)
            y = torch.from_numpy(rows.targets(session.emotions)[train]).to(args.device)  # (N,) the row of each sample
            test_images.append(images[t][test])
            test_queries.append(queries[t][test])

            # ---- grow ----
            heads.append(nn.Linear(d, len(emotions), device=args.device))

            # ---- train ----
            epochs = args.epochs_next if t else args.epochs_first
            trained = [*([] if args.no_prompts else pool.parameters()), *heads[-1].parameters()]
            optimizer = torch.optim.Adam(trained, lr, fused=True)
            for epoch in range(epochs):
                for batch in common.batches(len(x), args.batch, args.device):  # shuffled indices (B,)
                    index, cosine = pool.choose(q[batch], args.chosen)  # (B, chosen) each
                    with common.autocast(args):  # bfloat16, on CUDA only
                        if args.no_prompts:
                            f = q[batch]  # (B, d)
                        else:
                            f = pool(vit, common.normalize(x[batch], args), index)  # (B, d)
                        logits = heads[-1](f)  # (B, emotions of the session)
                    loss = F.cross_entropy(logits.float(), y[batch] - new.start)
                    if not args.no_prompts:
                        loss = loss - args.pull * cosine.sum(1).mean()  # reaches the chosen keys only
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(trained, 1.0)
                    optimizer.step()
                common.check_finite(loss, fold, session.name, epoch)  # stops a run that has diverged

            # ---- test on the fold-i parts of all sessions so far ----
            # extract: in batches, from uint8, in float32, without gradients.
            with torch.no_grad():
                test_q = torch.cat(test_queries)  # (n, d)
                index, _ = pool.choose(test_q, args.chosen)  # (n, chosen)
                if args.no_prompts:
                    f = test_q
                else:
                    f = common.extract(functools.partial(pool, vit), torch.cat(test_images), args, index)  # (n, d)
                scores = torch.cat([head(f) for head in heads], 1)  # (n, R)
            # Merges the rows, prints the line; after the last session writes the fold's file.
            run.record(fold, t, rows, scores.cpu())
        # The trial is over: which prompts did the last test choose?
        for s, chosen in enumerate(index.split([len(q) for q in test_queries])):
            usage[s] += chosen.flatten().bincount(minlength=args.pool).cpu()
    if run.folds and not args.no_prompts:
        print("\nhow often each prompt was chosen at the end, in % of a session's test samples in these folds")
        for session, counts in zip(sessions, usage):
            share = 100 * args.chosen * counts / counts.sum()  # each sample chooses `chosen` prompts
            print(f"{session.name:7s}" + "".join(f"{v:6.1f}" for v in share.tolist()))
    run.summary()  # of all finished folds of this run


if __name__ == "__main__":
    common.launch(main)
