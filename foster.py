"""FOSTER: let a second network learn what the first one gets wrong, then press both back into one.

FOSTER (Feature Boosting and Compression) takes two steps per session. Boosting: the network so far is frozen and a
new one, starting as its copy, is trained beside it; a head over both feature vectors learns the session, while
distillation keeps its old rows saying what they said. Compression: the pair is the teacher, and a single student of
the old network's size learns to say the same. The next session starts from the student, so the model never grows,
unlike DER's.

A session's life (from the second on; the first trains one network with cross-entropy)
    boosting      trained   the new network, the head over [old, new] features, a head on the new features alone
                  frozen    the old network and its head
    compression   trained   the student: a copy of the OLD network, and its head (old rows copied)
                  frozen    the teacher: both networks and their head
    tested        the teacher, as in the original; beside it the student, with which the next session starts; both on
                  all emotions so far: RCH merges the rows that mean the same emotion (rch.py)

The loss of boosting, with z = the scores over both, z_new = those of the new network alone, z_old = the old network's:

    CE(z, y) + CE(z_new, y) + KD(z[old rows], z_old)
    KD(p, s) = - mean_b sum_k softmax(s / 2)_k log_softmax(p / 2)_k

The loss of compression is KD(student, teacher), without labels.

What RCH adds: old rows are held by distillation while the returning emotion learns its new row. What goes wrong without
exemplars: as in DER the cross-entropy hears of no old row but as "not this one", and the distillation sees only the new
domain's pictures, on which the old network has little of value to say.

Paper: Wang et al., FOSTER, arXiv 2204.04662; in the benchmark: arXiv 2501.19111, section 5.
Run:   python foster.py --backbone vit --protocol ilcv

Differs from the paper / from the released code
 1. No class weights from effective numbers (beta 0.96 and 0.97), which in the original rebalance boosting's logits
    and the teacher. Without exemplars the old classes have 0 samples, their weights are infinite and the loss is NaN:
    the released code and its ancestor fail here, and the released code sums label positions where it should count
    labels.
 2. Hence cross-entropy and distillation are written without them, each with weight 1, as above (no T^2 factor).
 3. No exemplars, so nothing old is replayed in either step.
 4. AdamW with a cosine and weight decay 0.05, where the benchmark's paper names no optimizer; the released code takes
    SGD with momentum, weight decay 0.005 and a constant 2e-5, which hardly moves the network. Boosting and
    compression take epochs-next each, 10 + 10 in the paper preset, as in the released code.
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
SETTINGS = {  # (paper preset, tiny preset)
    "epochs_first": (60, 10),
    "epochs_next": (10, 3),
    "batch": (16, 32),
    "lr": (2e-5, 5e-4),
    "weight_decay": (0.05, 0.05),  # in session 1 and in boosting; compression has none
}


# ---- the method's own pieces -----------------------------------------------------------------------------------------
def distillation(scores, teacher_scores, temperature=2):
    """KD(p, s) with p = scores and s = teacher_scores, (B, R) each: a scalar, the mean over the batch."""
    return -(F.softmax(teacher_scores / temperature, 1) * F.log_softmax(scores / temperature, 1)).sum(1).mean()


# ---- the run ---------------------------------------------------------------------------------------------------------
def main():
    parser = common.parser(__doc__, SETTINGS)
    args = common.parse(parser, SETTINGS)
    sessions = common.load_sessions(args)  # T data.Session: name, images, emotions, subjects
    images = [torch.from_numpy(session.images).to(args.device) for session in sessions]  # (N, 3, S, S) uint8 each
    pretrained = common.make_backbone(args)  # pictures (B, 3, S, S) -> features (B, d), in eval mode
    d = pretrained.num_features
    run = protocols.Run(args, sessions)  # makes the folds; prints the lines, writes the files
    common.estimate(args, pretrained, sessions, run)  # only says how long the paper preset takes on a CPU

    for fold in run.folds:  # those asked for, without those that --resume keeps
        # ---- a trial begins: fold i of every session ----
        common.seed(args, fold)  # so that a fold is the same in any company
        rows = rch.RCH()  # the rows so far, each a (session, emotion) pair
        student, student_head = pretrained, None
        test_images, old_test_f = [], torch.empty(0, d, device=args.device)

        for t, session in enumerate(sessions):
            # ---- session t arrives (session 1 is t = 0) ----
            train, test = run.parts(fold, t)  # indices into the session's samples
            emotions = data.TABLE1[session.name]  # the session's 5 to 7 words
            new = rows.add_session(emotions)  # slice of the new rows among all R
            x = images[t][train]  # (N, 3, S, S) uint8; N is now the session's training samples
            y = torch.from_numpy(rows.targets(session.emotions)[train]).to(args.device)  # (N,) the row of each sample
            test_images.append(images[t][test])

            # ---- grow ----
            old, old_head = student, student_head  # in session 1: the pretrained network, without a head
            backbone = copy.deepcopy(old).requires_grad_(True)
            head = nn.Linear(2 * d if t else d, new.stop, device=args.device)
            new_head = nn.Linear(d, new.stop, device=args.device)  # on the new features alone
            if t:
                with torch.no_grad():
                    head.weight[: new.start, :d] = old_head.weight
                    head.bias[: new.start] = old_head.bias
                    old_f = common.extract(old, x, args)  # (N, d) constants
                    old_scores = old_head(old_f)  # (N, R of the sessions before)

            # ---- train ----
            # Boosting; in session 1 plain training.
            epochs = args.epochs_next if t else args.epochs_first
            trained = [*backbone.parameters(), *head.parameters(), *new_head.parameters()]
            optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay, fused=True)
            steps = epochs * common.steps_per_epoch(len(x), args.batch)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            backbone.train()
            for epoch in range(epochs):
                for batch in common.batches(len(x), args.batch, args.device):  # shuffled indices (B,)
                    with common.autocast(args):  # bfloat16, on CUDA only
                        f = backbone(common.normalize(x[batch], args))  # (B, d)
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
                common.check_finite(loss, fold, session.name, epoch)  # stops a run that has diverged
            backbone.eval().requires_grad_(False)
            student, student_head = backbone, head  # in session 1 there is nothing to compress

            # Compression: a student starts from the old network and learns what the teacher says.
            if t:
                with torch.no_grad():
                    teacher_scores = head(torch.cat([old_f, common.extract(backbone, x, args)], 1))  # (N, R)
                    student = copy.deepcopy(old).requires_grad_(True)
                    student_head = nn.Linear(d, new.stop, device=args.device)
                    student_head.weight[: new.start] = old_head.weight
                    student_head.bias[: new.start] = old_head.bias
                trained = [*student.parameters(), *student_head.parameters()]
                optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=0, fused=True)
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
                student.train()
                for epoch in range(epochs):
                    for batch in common.batches(len(x), args.batch, args.device):  # shuffled indices (B,)
                        with common.autocast(args):  # bfloat16, on CUDA only
                            logits = student_head(student(common.normalize(x[batch], args)))  # (B, R)
                        loss = distillation(logits.float(), teacher_scores[batch])
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
                        schedule.step()
                    common.check_finite(loss, fold, session.name, epoch)  # stops a run that has diverged
                student.eval().requires_grad_(False)

            # ---- test on the fold-i parts of all sessions so far ----
            # extract: in batches, from uint8, in float32, without gradients.
            # The old network is the last session's student, whose features of the earlier test images are kept.
            with torch.no_grad():
                everything = torch.cat(test_images)
                student_f = common.extract(student, everything, args)  # (n, d)
                scores = student_scores = student_head(student_f)  # (n, R); in session 1 there is no teacher
                if t:
                    old_test_f = torch.cat([old_test_f, common.extract(old, test_images[-1], args)])
                    scores = head(torch.cat([old_test_f, common.extract(backbone, everything, args)], 1))
                old_test_f = student_f
            # Merges the rows, prints the line; after the last session writes the fold's file.
            run.record(fold, t, rows, scores.cpu(), student=student_scores.cpu())
    run.summary()  # of all finished folds of this run


if __name__ == "__main__":
    common.launch(main)
