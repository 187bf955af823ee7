"""DualPrompt: one thing to say to the network about every session, and another about each.

DualPrompt never changes the pretrained ViT either. Its prompts are prefixes: made-up keys and values that are put
before the tokens' own inside the attention of some blocks, for every token to look at. The g (general) prompts, in
blocks 0 and 1, are shared by all sessions. The e (expert) prompts, in blocks 2, 3 and 4, belong to one session each.
In training the session is known, so its e prompt is used. At test it is not: the picture's query, the class token of
the untouched network, picks the e prompt whose key is nearest.

A session's life
    grown     one e prompt, starting as a copy of the last one; one key; one linear head for the session's rows
    trained   the g prompts, the session's e prompt, the new head
    set       the key: the mean direction of the session's training queries
    frozen    the ViT, always; the old e prompts, keys and heads
    tested    on all emotions so far: RCH merges the rows that mean the same emotion (rch.py)

What RCH adds: a returning emotion gets a new row in the new session's head. What goes wrong without exemplars: the g
prompts are shared and drift; and a picture that picks the wrong session's e prompt is read by it all the same. The
run prints which keys the samples of each session picked.

Control: --no-prompts, a linear head on the class token of the frozen ViT (the same as l2p.py's).

Paper: Wang et al., DualPrompt, arXiv 2204.04799; in the benchmark: arXiv 2501.19111, section 5.
Run:   python dualprompt.py --backbone vit --protocol ilcv

Differs from the paper / from the released code
 1. The bug of the public ports, and of the released code with them: they merge the axes of [K, V] and of the batch
    with a reshape where a permute is needed. Half of a batch then gets K for both, the other half V, and samples read
    each other's prompts. Here the axes are indexed by name and asserted; copies of one picture give equal outputs in
    any batch.
 2. Keys are set, not trained. The pull term is their only gradient and the mean of the unit queries is its exact
    maximum. Trained for a few epochs, keys stay near their random start and attract nobody.
 3. At test one e prompt per sample, among the sessions seen. The released code takes top-5 of a pool of 10, which
    turns the task mask off from session 3 on.
 4. The e prompts are a list with one entry per session seen, since the rest of a pool of 10 would never be used.
 5. Adam at 0.03 x batch / 256, the original's rule, constant, no weight decay, gradients clipped to norm 1, the
    optimizer anew in every session, 60 and 10 epochs. The released code takes 3e-4 for 60 epochs in every session.
 6. Prefixes join after the blocks' own key normalisation, where a ViT has one.
 7. The parts of timm's own ViT are called; no copy of it is kept here. Backbones that are not plain ViTs are refused.
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
    "length": (5, 5),  # L, of g and of e prompts
}
G_BLOCKS, E_BLOCKS = (0, 1), (2, 3, 4)


# ---- the method's own pieces -----------------------------------------------------------------------------------------
def attend_with_prefix(block, x, prefix):
    """One timm Block on tokens x (B, n, d), with prefix (B, 2, L, heads, d / heads) before its keys and values.

    As the block's own forward, without dropout and drop-path: the ViT is always in eval mode.
    """
    attention = block.attn
    b, n, d = x.shape
    assert prefix.shape[:2] == (b, 2) and prefix.shape[3:] == (attention.num_heads, d // attention.num_heads)
    qkv = attention.qkv(block.norm1(x)).reshape(b, n, 3, attention.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, n, d / heads) each
    q, k = attention.q_norm(q), attention.k_norm(k)
    k_prefix, v_prefix = prefix.permute(1, 0, 3, 2, 4)  # (B, heads, L, d / heads) each
    k, v = torch.cat([k_prefix, k], 2), torch.cat([v_prefix, v], 2)  # (B, heads, L + n, d / heads)
    out = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)  # (B, heads, n, d / heads)
    x = x + block.ls1(attention.proj(out.permute(0, 2, 1, 3).flatten(2)))
    return x + block.ls2(block.mlp(block.norm2(x)))


class Prompts(nn.Module):
    """g prompts (2 blocks, 2, L, heads, d / heads); a growing list of e prompts (3 blocks, ...) with keys (T, d)."""

    def __init__(self, vit, length):
        super().__init__()
        heads, self.device = vit.blocks[0].attn.num_heads, vit.pos_embed.device
        self.shape = (2, length, heads, vit.num_features // heads)  # [K, V], L, heads, d / heads
        self.g = nn.Parameter(self.uniform(G_BLOCKS))
        self.e = nn.ParameterList()
        self.register_buffer("keys", torch.empty(0, vit.num_features, device=self.device))

    def uniform(self, blocks):  # (blocks, 2, L, heads, d / heads)
        return torch.empty(len(blocks), *self.shape, device=self.device).uniform_(-1, 1)

    def grow(self, q):
        """Add an e prompt, a copy of the last one, and the key of the training queries q (N, d)."""
        for old in self.e:
            old.requires_grad_(False)
        self.e.append(nn.Parameter(self.e[-1].clone() if len(self.e) else self.uniform(E_BLOCKS)))
        self.keys = torch.cat([self.keys, F.normalize(q, dim=1).mean(0, keepdim=True)])

    def choose(self, q):
        """The e prompt whose key is nearest to each query (B, d), sample by sample: (B,)."""
        return (F.normalize(q, dim=1) @ F.normalize(self.keys, dim=1).T).argmax(1)

    def forward(self, vit, x, index):
        """Features (B, d), the class token, of pictures (B, 3, S, S) with the e prompts `index` (B,)."""
        e = torch.stack(list(self.e))[index]  # (B, 3, 2, L, heads, d / heads)
        cls = vit.cls_token.expand(len(x), -1, -1)  # (B, 1, d)
        tokens = vit.norm_pre(torch.cat([cls, vit.patch_embed(x)], 1) + vit.pos_embed)  # (B, 1 + patches, d)
        for i, block in enumerate(vit.blocks):
            if i in G_BLOCKS:
                tokens = attend_with_prefix(block, tokens, self.g[G_BLOCKS.index(i)].expand(len(x), *self.shape))
            elif i in E_BLOCKS:
                tokens = attend_with_prefix(block, tokens, e[:, E_BLOCKS.index(i)])
            else:
                tokens = block(tokens)
        return vit.norm(tokens)[:, 0]


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
    usage = torch.zeros(len(sessions), len(sessions))  # (T, T): whose key the test samples of a session chose

    for fold in run.folds:  # those asked for, without those that --resume keeps
        # ---- a trial begins: fold i of every session ----
        common.seed(args, fold)  # so that a fold is the same in any company
        rows = rch.RCH()  # the rows so far, each a (session, emotion) pair
        prompts = Prompts(vit, args.length)
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
            prompts.grow(q)
            heads.append(nn.Linear(d, len(emotions), device=args.device))

            # ---- train ----
            epochs = args.epochs_next if t else args.epochs_first
            trained = [*([] if args.no_prompts else [prompts.g, prompts.e[-1]]), *heads[-1].parameters()]
            optimizer = torch.optim.Adam(trained, lr, fused=True)
            for epoch in range(epochs):
                for batch in common.batches(len(x), args.batch, args.device):  # shuffled indices (B,)
                    index = torch.full((len(batch),), t, device=args.device)  # (B,) the session is known in training
                    with common.autocast(args):  # bfloat16, on CUDA only
                        if args.no_prompts:
                            f = q[batch]  # (B, d)
                        else:
                            f = prompts(vit, common.normalize(x[batch], args), index)  # (B, d)
                        logits = heads[-1](f)  # (B, emotions of the session)
                    loss = F.cross_entropy(logits.float(), y[batch] - new.start)
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(trained, 1.0)
                    optimizer.step()
                common.check_finite(loss, fold, session.name, epoch)  # stops a run that has diverged

            # ---- test on the fold-i parts of all sessions so far ----
            # extract: in batches, from uint8, in float32, without gradients.
            with torch.no_grad():
                test_q = torch.cat(test_queries)  # (n, d)
                index = prompts.choose(test_q)  # (n,) at test the session is not known: the nearest key decides
                if args.no_prompts:
                    f = test_q
                else:
                    f = common.extract(functools.partial(prompts, vit), torch.cat(test_images), args, index)  # (n, d)
                scores = torch.cat([head(f) for head in heads], 1)  # (n, R)
            # Merges the rows, prints the line; after the last session writes the fold's file.
            run.record(fold, t, rows, scores.cpu())
        # The trial is over: which keys did the last test choose?
        for s, chosen in enumerate(index.split([len(q) for q in test_queries])):
            usage[s] += chosen.bincount(minlength=len(sessions)).cpu()
    if run.folds and not args.no_prompts:
        print("\nwhose key each session's test samples in these folds chose at the end, in %")
        print(" " * 7 + "".join(f"{session.name:>8s}" for session in sessions))
        for session, counts in zip(sessions, usage):
            print(f"{session.name:7s}" + "".join(f"{v:8.1f}" for v in (100 * counts / counts.sum()).tolist()))
    run.summary()  # of all finished folds of this run


if __name__ == "__main__":
    common.launch(main)
