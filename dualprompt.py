"""DualPrompt: some prompts for all sessions, and some for each.

DualPrompt never changes the pretrained ViT either. Its prompts are keys and values that are put
before the tokens' own inside the attention of some blocks: g (general) prompts in blocks 0 and 1
for all sessions, e (expert) prompts in blocks 2 to 4 for one session each. In training the session
is known. At test the query, the class token of the untouched ViT, picks the e prompt by its key.
    grown     one e prompt, a copy of the last one; one key; one linear head on the class token
    trained   the g prompts, the session's e prompt, the new head: CE over the session's own rows
    set       the key: the mean direction of the session's training queries
    frozen    the ViT, always; the old e prompts, keys and heads
    tested    on all emotions so far
There are no exemplars: the g prompts drift, and an image may pick another session's e prompt.
Paper: Wang et al., arXiv 2204.04799 (eq. 4). What differs: docs/differences.md
Run:   python dualprompt.py --backbone vit --protocol ilcv
       synthetic stream, seed 0: last 52.9 %; 6 s a fold on one core
"""

import functools

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
    "length": (5, 5),  # L, of g and of e prompts
}
G_BLOCKS, E_BLOCKS = (0, 1), (2, 3, 4)


def attend_with_prefix(block, x, prefix):
    """One timm Block on tokens x (B, n, d), with prefix (B, 2, L, heads, d / heads) before its keys and values.
    As the block's own forward, without dropout and drop-path: the ViT is always in eval mode."""
    attention = block.attn
    b, n, d = x.shape
    assert prefix.shape[:2] == (b, 2) and prefix.shape[3:] == (attention.num_heads, d // attention.num_heads)

    qkv = attention.qkv(block.norm1(x)).reshape(b, n, 3, attention.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, n, d / heads) each
    q, k = attention.q_norm(q), attention.k_norm(k)

    # The axes K, V and B are never merged: a reshape here would mix the samples of a batch.
    k_prefix, v_prefix = prefix.permute(1, 0, 3, 2, 4)  # (B, heads, L, d / heads) each
    k, v = torch.cat([k_prefix, k], 2), torch.cat([v_prefix, v], 2)  # (B, heads, L + n, d / heads)

    out = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)  # (B, heads, n, d / heads)
    x = x + block.ls1(attention.proj(out.permute(0, 2, 1, 3).flatten(2)))
    return x + block.ls2(block.mlp(block.norm2(x)))


class Prompts(nn.Module):
    """g prompts (2 blocks, 2, L, heads, d / heads); a growing list of e prompts (3 blocks, ...) with keys (T, d)."""

    def __init__(self, vit, length):
        super().__init__()
        heads, d = vit.blocks[max(E_BLOCKS)].attn.num_heads, vit.pos_embed.shape[2]
        self.shape, self.device = (2, length, heads, d // heads), vit.pos_embed.device  # [K, V], L, heads, d / heads
        self.g = self.uniform(G_BLOCKS)
        self.e = nn.ParameterList()
        self.register_buffer("keys", torch.empty(0, d, device=self.device))

    def uniform(self, blocks):
        """Prompts to start with, U(-1, 1), (blocks, 2, L, heads, d / heads)."""
        return nn.Parameter(torch.empty(len(blocks), *self.shape).uniform_(-1, 1).to(self.device))

    def grow(self, q):
        """Add an e prompt, a copy of the last one, and the key of the training queries q (N, d)."""
        if len(self.e) == 0:
            self.e.append(self.uniform(E_BLOCKS))
        else:
            self.e[-1].requires_grad_(False)
            self.e.append(nn.Parameter(self.e[-1].clone()))
        self.keys = torch.cat([self.keys, F.normalize(q, dim=1).mean(0, keepdim=True)])

    def choose(self, q):
        """The e prompt whose key is nearest to each query (B, d), sample by sample: (B,)."""
        return (F.normalize(q, dim=1) @ F.normalize(self.keys, dim=1).T).argmax(1)

    def forward(self, vit, x, index):
        """Features (B, d), the class token, of images (B, 3, S, S) with the e prompts `index` (B,)."""
        e = torch.stack(list(self.e))[index]  # (B, 3, 2, L, heads, d / heads)
        cls = vit.cls_token.expand(len(x), -1, -1)  # (B, 1, d)
        tokens = vit.norm_pre(torch.cat([cls, vit.patch_embed(x)], 1) + vit.pos_embed)  # (B, 1 + patches, d)
        for i, block in enumerate(vit.blocks):
            if i in G_BLOCKS:
                g = self.g[G_BLOCKS.index(i)].expand(len(x), *self.shape)  # (B, 2, L, heads, d / heads)
                tokens = attend_with_prefix(block, tokens, g)
            elif i in E_BLOCKS:
                tokens = attend_with_prefix(block, tokens, e[:, E_BLOCKS.index(i)])
            else:
                tokens = block(tokens)
        return vit.norm(tokens)[:, 0]


def without_prompts(vit, x):
    """What the prompted network gives with prefixes of length 0, (B, d): it must be what the ViT itself gives."""
    prompts = Prompts(vit, 0)
    prompts.e.append(prompts.uniform(E_BLOCKS))
    return prompts(vit, x, torch.zeros(len(x), dtype=torch.long))


def main():
    args = common.parse(__doc__, SETTINGS)
    vit = common.make_backbone(args, parts=without_prompts).requires_grad_(False)
    sessions = data.load_sessions(args, vit)
    run = protocols.Run(args, sessions)
    queries = {session.name: common.extract(vit, session.images) for session in sessions}  # (N, d) each
    usage = torch.zeros(len(sessions), len(sessions))  # (T, T): whose key a session's test samples chose

    for fold in run.folds:
        # ---- a trial begins: this fold of every session is its test part ----
        torch.manual_seed(args.seed * 1000 + fold)
        rows = rch.RCH()  # which row means which emotion of which session
        prompts = Prompts(vit, args.length)
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
            prompts.grow(q)
            heads.append(nn.Linear(vit.num_features, len(session.emotions)).to(args.device))

            # ---- train ----
            losses = []
            epochs = args.epochs_next if t > 0 else args.epochs_first
            batches = common.batches(len(x), args.batch, epochs, args.device)  # indices (B,)
            trained = [prompts.g, prompts.e[-1], *heads[-1].parameters()]
            optimizer = torch.optim.Adam(trained, args.lr, fused=True)
            for batch in batches:
                index = torch.full((len(batch),), t, device=args.device)  # (B,) the session is known
                with common.autocast(args):
                    logits = heads[-1](prompts(vit, x[batch], index))  # (B, emotions of the session)
                # A head counts its rows from 0.
                loss = F.cross_entropy(logits.float(), y[batch] - new_rows.start)
                losses.append(loss.detach())

                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(trained, 1.0)

                optimizer.step()

            # ---- test on the test parts of all sessions so far ----
            with torch.no_grad():
                index = prompts.choose(torch.cat(test_queries))  # (n,) the session is not known
                f = common.extract(functools.partial(prompts, vit), torch.cat(test_images), index)  # (n, d)
                scores = torch.cat([head(f) for head in heads], 1)  # (n, R)
            run.record(fold, t, rows, scores, losses)  # rows -> emotions -> accuracy
        run.save(fold, prompts=prompts, heads=heads)  # with --save

        # The trial is over: whose keys did the last test choose?
        for i, chosen in enumerate(index.split([len(part) for part in test_queries])):
            usage[i] += chosen.bincount(minlength=len(sessions)).cpu()
    if run.folds:
        print("\nwhose key each session's test samples chose at the end, in %, in the folds made now")
        print(" " * 8 + "".join(f"{session.name:>9s}" for session in sessions))
        for session, counts in zip(sessions, usage):
            share = 100 * counts / counts.sum()
            print(f"{session.name:8s}" + "".join(f"{percent:9.1f}" for percent in share.tolist()))
    run.summary()


if __name__ == "__main__":
    common.launch(main)
