"""FOSTER: let a second network learn what the first one gets wrong, then press both back into one.

FOSTER (Feature Boosting and Compression) takes two steps per session. Boosting: the network so far is frozen and a new
one, starting as its copy, is trained beside it; a head over both feature vectors learns the session, while distillation
holds the scores of its old rows. Compression: the pair is the teacher, and a single student of the old network's size
learns to give the same scores. The next session starts from the student, so the model never grows, unlike DER's.

A session's life (from the second on; the first trains one network with cross-entropy)
    boosting      trained   the new network, the head over [old, new] features, a head on the new features alone
                  frozen    the old network and its head
    compression   trained   the student: a copy of the OLD network, and its head (old rows copied); loss KD, no labels
                  frozen    the teacher: both networks and their head
    tested        the teacher, as in the original; beside it the student, with which the next session starts
The loss of boosting, with z = the scores over both, z_new those of the new network alone, z_old the old network's, is
CE(z, y) + CE(z_new, y) + KD(z[old rows], z_old). What goes wrong without exemplars: as in DER, to old rows the
cross-entropy only says "not this one"; and the distillation sees images of the new dataset alone.

Paper: Wang et al., FOSTER, arXiv 2204.04662; in the benchmark: arXiv 2501.19111, section 3.4
Run:   python foster.py --backbone vit --protocol ilcv

Differs from the paper / from the released code (and as finetune.py 1 to 4)
 1. No class weights from effective numbers of samples (beta 0.96, 0.97) in either loss: without exemplars an old class
    has 0 samples and an infinite weight, and the ancestor's loss becomes NaN. Released: an AttributeError before that.
 2. Hence CE and KD stand as above, with weight 1 each and without a factor T^2. No exemplars, nothing old is replayed.
 3. Boosting and compression take epochs-next each (released: 10 and 10); compression has no weight decay.
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
    "epochs_next": (10, 3),  # in each later one: of boosting, and again of compression
    "batch": (16, 32),
    "lr": (2e-5, 5e-4),
    "weight_decay": (0.05, 0.05),
}


def distillation(scores, teacher_scores, temperature=2):
    """KD(p, s), p = scores and s = teacher_scores (B, R): - mean_b sum_k softmax(s / T)_k log_softmax(p / T)_k."""
    return F.cross_entropy(scores / temperature, F.softmax(teacher_scores / temperature, 1))


def main():
    args = common.parse(__doc__, SETTINGS)
    pretrained = common.make_backbone(args)  # images (B, 3, S, S) -> features (B, d)
    sessions = data.load_sessions(args, pretrained)
    run = protocols.Run(args, sessions)
    d = pretrained.num_features

    for fold in run.folds:
        # ---- a trial begins: fold i of every session ----
        torch.manual_seed(args.seed * 1000 + fold)
        rows = rch.RCH()
        student, student_head = pretrained, None
        test_images, old_test_f = [], torch.empty(0, d, device=args.device)

        for t, session, train, test in run.stream(fold):
            # ---- session t arrives (session 1 is t = 0) ----
            new = rows.add_session(session.emotions)
            x = session.images[train]  # (N, 3, S, S)
            y = torch.from_numpy(rows.targets(session.labels[train])).to(args.device)  # (N,)
            test_images.append(session.images[test])

            # ---- grow ----
            old, old_head = student, student_head  # in session 1: the pretrained network, without a head
            backbone = copy.deepcopy(old).requires_grad_(True)
            head = nn.Linear(2 * d if t else d, new.stop).to(args.device)
            new_head = nn.Linear(d, new.stop).to(args.device)  # on the new features alone
            if t:
                with torch.no_grad():
                    head.weight[: new.start, :d] = old_head.weight
                    head.bias[: new.start] = old_head.bias
                    old_f = common.extract(old, x)  # (N, d) constants
                    old_scores = old_head(old_f)  # (N, R of the sessions before)

            # ---- train: boosting; in session 1 plain training ----
            epochs = args.epochs_next if t else args.epochs_first
            batches = common.batches(len(x), args.batch, epochs, args.device)
            trained = [*backbone.parameters(), *head.parameters(), *new_head.parameters()]
            optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay, fused=True)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
            backbone.train()
            for batch in batches:
                with common.autocast(args):
                    f = backbone(x[batch])  # (B, d)
                    logits = head(torch.cat([old_f[batch], f], 1) if t else f)  # (B, R)
                    new_logits = new_head(f)  # (B, R), unused in session 1
                loss = F.cross_entropy(logits.float(), y[batch])
                if t:
                    loss = loss + F.cross_entropy(new_logits.float(), y[batch])
                    loss = loss + distillation(logits[:, : new.start].float(), old_scores[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            backbone.eval().requires_grad_(False)

            # ---- compress: a student starts from the old network; in session 1 there is nothing to compress ----
            student, student_head = backbone, head
            if t:
                with torch.no_grad():
                    teacher_scores = head(torch.cat([old_f, common.extract(backbone, x)], 1))  # (N, R)
                    student = copy.deepcopy(old).requires_grad_(True)
                    student_head = nn.Linear(d, new.stop).to(args.device)
                    student_head.weight[: new.start] = old_head.weight
                    student_head.bias[: new.start] = old_head.bias
                batches = common.batches(len(x), args.batch, epochs, args.device)
                trained = [*student.parameters(), *student_head.parameters()]
                optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=0, fused=True)
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
                student.train()
                for batch in batches:
                    with common.autocast(args):
                        logits = student_head(student(x[batch]))  # (B, R)
                    loss = distillation(logits.float(), teacher_scores[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                student.eval().requires_grad_(False)

            # ---- test on the fold-i parts of all sessions so far ----
            # The old network is the last session's student, whose features of the earlier test images are kept.
            with torch.no_grad():
                everything = torch.cat(test_images)
                student_f = common.extract(student, everything)  # (n, d)
                scores = student_scores = student_head(student_f)  # (n, R); in session 1 there is no teacher
                if t:
                    old_test_f = torch.cat([old_test_f, common.extract(old, test_images[-1])])
                    scores = head(torch.cat([old_test_f, common.extract(backbone, everything)], 1))
                old_test_f = student_f
            run.record(fold, t, rows, scores, student=student_scores)
    run.summary()


if __name__ == "__main__":
    common.launch(main)
