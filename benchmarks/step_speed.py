"""Seconds a training step: `learner(...)` against a textbook loop of the same networks, losses and optimisers, recipe by recipe.

    python benchmarks/step_speed.py [recipe ...] [--size 64] [--width-share 0.25] [--bs 16] [--blocks 5] [--steps 3] [--threads 2]
                                    [--device cpu] [--amp] [--json FILE]

The textbook loop is `Textbook` below: PNG files decoded for every batch (PIL, DataLoader, 0 workers), fakes sampled anew for each player, dropout
passes asked one after the other, one optimiser a player, plain `backward()`, float32, contiguous tensors, `.item()` at every step, a Python loop for
the moving average. `ratio` is its time over ours: the median over pairs of neighbouring blocks of --steps steps (ours, textbook, textbook, ours, ...
in one process; the first pair warms up and is left out). `reading` is what the textbook needs to get its batches; `ratio without` takes that off its
side and nothing off ours. Before it is timed, each recipe is checked: without chance both loops must have the same losses."""
import argparse, copy, inspect, json, math, statistics, tempfile, time, warnings
from dataclasses import replace
from pathlib import Path

import torch
from fastai.callback.core import Callback
from PIL import Image
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from cxr_gan.core import set_seed
from cxr_gan.data import read_images
from cxr_gan.losses import Turn, Verdict
from cxr_gan.phantom import CLASSES, make_phantoms
from cxr_gan.recipes import RECIPES, learner, recipe
from cxr_gan.training import OPTIMIZERS
from cxr_gan.uncertainty import judge_once


class FilmFiles(torch.utils.data.Dataset):
    "The films of a loader as PNG files, each decoded, resized and normalised whenever it is asked for."
    def __init__(self, loader):
        s = loader.dataset
        self.files, self.labels, self.size, (self.lo, self.hi) = [Path(s.root)/f for f in s.files], s.labels.tolist(), s.size, loader.value_range
        self.mode = 'L' if s.channels == 1 else 'RGB'
    def __len__(self): return len(self.files)
    def __getitem__(self, i):
        film = Image.open(self.files[i]).convert(self.mode).resize((self.size, self.size), Image.BILINEAR)
        x = torch.frombuffer(bytearray(film.tobytes()), dtype=torch.uint8).view(self.size, self.size, -1).permute(2, 0, 1)
        return x.float()/255*(self.hi-self.lo)+self.lo, self.labels[i]


def settings_of(l):
    "The arguments of each player's optimiser, the discriminator's first."
    known = set(inspect.signature(OPTIMIZERS[l.optimizer]).parameters)-{'params', 'fused'}
    return [{k: v for k, v in group.items() if k in known} for group in l.opt.opt.param_groups]


class Textbook:
    "The loop of the tutorials around copies of a learner's parts."
    def __init__(self, l):
        self.l, self.device, self.steps, self.read, self.log = l, next(l.model.parameters()).device, 0, 0., {}
        model = copy.deepcopy(l.model).to(memory_format=torch.contiguous_format).train()
        self.g, self.d, self.average, self.show = model.generator, model.discriminator, model.average, model.augment or nn.Identity()
        self.terms = copy.deepcopy(l.terms)
        if l.opt is None: l.create_opt()
        self.d_opt, self.g_opt = (OPTIMIZERS[l.optimizer](net.parameters(), **settings) for net, settings in zip((self.d, self.g), settings_of(l)))
        self.loader = torch.utils.data.DataLoader(FilmFiles(l.dls.train), l.dls.train.bs, shuffle=True, drop_last=True)
        self.batches = (b for _ in iter(int, 1) for b in self.loader) # epoch after epoch

    def fakes(self, x, y, latents):
        "Generated images and their labels."
        y = self.l.draw_labels(len(x), y) if self.g.conditional else None
        return self.g((latents or self.g.latents)(len(x), self.device), y), y

    def judge(self, x, y):
        "Ask the discriminator once, or T times in turn."
        y, u = y if self.d.conditional else None, self.l.uncertainty
        def in_turn(xs, ys): # T copies side by side, asked one by one
            verdicts = [self.d(x, None if ys is None else y) for x in xs.chunk(u.T)]
            return Verdict(*[None if f[0] is None else torch.cat(f) for f in zip(*verdicts)])
        return replace(u, passes='batched').judge(in_turn, x, y) if u else judge_once(self.d, x, y)

    def d_turn(self, x, y):
        "The discriminator's gradient."
        fake, y_fake = self.fakes(x, y, self.l.own_latents[0])
        x, fake = self.show(x).detach(), self.show(fake).detach()
        for side, images in (('real', x), ('fake', fake)): images.requires_grad_(any(side in t.slopes for t in self.terms))
        turn = Turn(self.judge(x, y), self.judge(fake, y_fake), x, fake, y, y_fake, self.judge, self.d)
        loss = self.l.objective.discriminator(turn.real.verdict, turn.fake.verdict)
        if self.l.uncertainty: loss = loss+self.l.uncertainty.discriminator(turn.real, turn.fake)
        loss = loss+sum(t.factor(self.steps)*t.every*v for t in self.terms if self.steps % t.every == 0 and (v := t.discriminator(turn)) is not None)
        self.back(loss, self.d, self.d_opt, self.l.opts[0])
        if hasattr(self.show, 'update'): self.show.update(turn.real.mean_logit.detach(), turn.fake.mean_logit.detach())
        p_real, p_fake = (v.mean_logit.sigmoid().mean() for v in (turn.real, turn.fake))
        self.log.update(d_loss=loss.item(), d_real=p_real.item(), d_fake=p_fake.item(), u_fake=turn.fake.u.mean().item())

    def g_turn(self, x, y):
        "The generator's gradient."
        fake, y_fake = self.fakes(x, y, self.l.own_latents[1])
        fake = self.show(fake)
        with torch.no_grad(): real = self.judge(self.show(x), y) if self.l.objective.sees_real else None
        turn = Turn(real, self.judge(fake, y_fake), x, fake, y, y_fake, self.judge, self.d)
        loss = self.l.objective.generator(turn.fake.verdict, real and real.verdict)
        if self.l.uncertainty: loss = loss+self.l.uncertainty.generator(turn.fake)
        loss = loss+sum(t.factor(self.steps)*v for t in self.terms if (v := t.generator(turn)) is not None)
        self.back(loss, self.g, self.g_opt, self.l.opts[1])
        self.log.update(g_loss=loss.item())

    def back(self, loss, net, opt, settings):
        "Gradients, clipped as the settings say."
        opt.zero_grad(); loss.backward()
        if settings.clip_value: clip_grad_value_(net.parameters(), settings.clip_value)
        if settings.clip_norm: clip_grad_norm_(net.parameters(), settings.clip_norm)

    def step(self, x, y):
        "One step of the discriminator and, every `n_disc`, one of the generator."
        for opt, o in zip((self.d_opt, self.g_opt), self.l.opts): opt.param_groups[0]['lr'] = o.lr*self.l.schedule.factor(self.steps)
        g_too, both = (self.steps+1) % self.l.n_disc == 0, self.l.simultaneous
        if both: self.g_turn(x, y) # before the discriminator's, whose gradients it would spoil
        self.d_turn(x, y); self.d_opt.step()
        if g_too and not both: self.g_turn(x, y)
        if g_too:
            self.g_opt.step()
            if self.average is not None: self.update_average(self.steps//self.l.n_disc)
        self.steps += 1

    @torch.no_grad()
    def update_average(self, t):
        "The generator's moving average, tensor by tensor."
        w = 1-min(self.l.model.decay, (1+t)/(10+t))
        for old, new in zip((*self.average.parameters(), *self.average.buffers()), (*self.g.parameters(), *self.g.buffers())):
            if old.is_floating_point(): old.lerp_(new, w)
            else: old.copy_(new)

    def run(self, n):
        "n steps, each on the next batch of files."
        for _ in range(n):
            t = time.perf_counter()
            x, y = (v.to(self.device) for v in next(self.batches))
            self.read += time.perf_counter()-t
            self.step(x, y)


class Turns(Callback):
    "Stops our clock after each block of ours, and lets the textbook have as many blocks as keep the order A B B A A B B A."
    order = 100
    def __init__(self, textbook, blocks, steps): self.textbook, self.blocks, self.n = textbook, blocks, steps
    def before_fit(self): self.ours, self.theirs, self.reading = [], [], []; self.tick = clock(self.textbook.device)
    def after_batch(self):
        if self.steps % self.n: return
        self.ours.append((clock(self.textbook.device)-self.tick)/self.n)
        k, last = len(self.ours), len(self.ours) == self.blocks
        for _ in range(k % 2 if last else 2*(k % 2)): self.block()
        self.tick = clock(self.textbook.device)
    def block(self):
        "One block of the textbook's."
        t, before = clock(self.textbook.device), self.textbook.read
        self.textbook.run(self.n)
        self.theirs.append((clock(self.textbook.device)-t)/self.n); self.reading.append((self.textbook.read-before)/self.n)


class Beside(Callback):
    "The textbook does our step with the same films; `logs` keeps the losses of both."
    order = 100
    def __init__(self, textbook): self.textbook, self.logs = textbook, []
    def after_batch(self):
        self.textbook.step(self.xb[0].detach(), self.yb[0])
        self.logs.append([(float(self.stats[k]), self.textbook.log[k]) for k in ('d_loss', 'g_loss')])


def clock(device):
    "Seconds, once the device is done."
    if device.type == 'cuda': torch.cuda.synchronize(device)
    return time.perf_counter()


def write_films(root, n, size):
    "n PNG phantoms in folders named after their class."
    p = make_phantoms(n, size=size, seed=0)
    for i, (x, y) in enumerate(zip(p.images, p.labels.tolist())):
        path = root/CLASSES[y]/f'{CLASSES[y]}-{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[0].numpy()).save(path)


def fit(l, steps, cb):
    "Train silently; returns the callback."
    with l.no_bar(), l.no_logging(): l.fit_for(steps=steps, cbs=[cb])
    return cb


def check(r, films, a):
    "Without chance (no dropout, no augmentation, the same latents and labels) the losses of a first step must agree."
    l = learner(replace(r, amp=False, augment=None), films, a.size, device=a.device)
    z = l.model.generator.latents(r.bs, torch.device(a.device))
    l.own_latents, l.draw_labels = (lambda n, device: z,)*2, lambda n, y: y
    for m in l.model.modules():
        if 'Dropout' in type(m).__name__: m.p = 0.
    losses = fit(l, 1, Beside(Textbook(l))).logs[0]
    tols = 1e-4 if a.device == 'cpu' else .01, .02 # TF32 on a GPU; the generator may meet a discriminator that has moved
    for name, (ours, theirs), tol in zip(('d_loss', 'g_loss'), losses, tols):
        same = math.isfinite(ours) and math.isclose(ours, theirs, rel_tol=tol, abs_tol=tol/10)
        assert same, f'{r.name}: {name} is {ours} for ours and {theirs} for the textbook, expected the same'


def same_parts(l, textbook):
    "After as many steps: the same numbers of updates, the same learning rates, nothing that is not finite."
    ours, theirs = (l.model.discriminator, l.model.generator), (textbook.d, textbook.g)
    for net, twin, opt, group in zip(ours, theirs, (textbook.d_opt, textbook.g_opt), l.opt.opt.param_groups):
        counts = [[int(o.state[p]['step']) for p in n.parameters() if p in o.state] for n, o in ((net, l.opt.opt), (twin, opt))]
        rates = [group['lr'], opt.param_groups[0]['lr']]
        assert counts[0] == counts[1] != [], f'{type(net).__name__}: found {[c[:3] for c in counts]} updates (ours, textbook), expected the same'
        assert rates[0] == rates[1], f'{type(net).__name__}: found learning rates {rates} (ours, textbook), expected the same'
    assert all(math.isfinite(v) for v in textbook.log.values()), f'the textbook diverged: {textbook.log}'


def measure(name, films, a):
    "One row of the table."
    r = recipe(name, width=max(4, round(RECIPES[name].width*a.width_share)), bs=a.bs, amp=a.amp)
    check(r, films, a)
    l = learner(r, films, a.size, device=a.device)
    t = fit(l, (a.blocks+1)*a.steps, Turns(Textbook(l), a.blocks+1, a.steps))
    same_parts(l, t.textbook)
    pairs = list(zip(t.ours, t.theirs, t.reading))[1:] # the first pair warms up
    ratios, without = [b/o for o, b, _ in pairs], [(b-read)/o for o, b, read in pairs]
    ours, theirs, reading = (statistics.median(v) for v in zip(*pairs))
    return dict(recipe=name, ours=ours, textbook=theirs, reading=reading, ratio=statistics.median(ratios), least=min(ratios), most=max(ratios),
                ratio_without=statistics.median(without))


def parse():
    "The command line."
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('recipes', nargs='*', metavar='recipe', help='names of RECIPES; none means all')
    a.add_argument('--size', type=int, default=64); a.add_argument('--bs', type=int, default=16)
    a.add_argument('--width-share', type=float, default=.25, help="share of the recipe's width; at least 4 remain")
    a.add_argument('--blocks', type=int, default=5); a.add_argument('--steps', type=int, default=3, help='steps in a block')
    a.add_argument('--threads', type=int, default=2); a.add_argument('--device', default='cpu', help='cpu or cuda')
    a.add_argument('--amp', action='store_true', help='bfloat16 autocast, for ours only'); a.add_argument('--json', metavar='FILE')
    found = a.parse_args()
    if unknown := [n for n in found.recipes if n not in RECIPES]: a.error(f"no recipe {', '.join(unknown)}; known: {', '.join(RECIPES)}")
    return found


def line(v):
    "One row of the table as text."
    seconds, ratios = (v['ours'], v['textbook'], v['reading']), (v['ratio'], v['least'], v['most'], v['ratio_without'])
    return f"{v['recipe']:22}"+''.join(f'{s:12.4f}' for s in seconds)+''.join(f'{r:15.2f}' for r in ratios)


def main():
    a = parse()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(a.threads); set_seed(0)
    where = torch.cuda.get_device_name() if a.device.startswith('cuda') else f'{a.device}, {a.threads} threads'
    print(f"{a.size} px, batches of {a.bs}, {a.width_share:g} of each recipe's width, {where}{', ours in bfloat16'*a.amp}, "
          f'torch {torch.__version__}, median of {a.blocks} pairs of blocks of {a.steps} steps')
    heads = 'ours s', 'textbook s', 'reading s', 'ratio', 'least', 'most', 'ratio without'
    print(f"{'recipe':22}"+''.join(f'{h:>{12 if i < 3 else 15}}' for i, h in enumerate(heads)))
    with tempfile.TemporaryDirectory() as d:
        write_films(Path(d), 24*a.bs, 2*a.size)
        films, rows = read_images(d, size=a.size, cache=False, progress=False), []
        for name in a.recipes or RECIPES:
            rows.append(measure(name, films, a))
            print(line(rows[-1]), flush=True)
    worst = min(rows, key=lambda v: v['ratio'])
    print(f"worst ratio: {worst['ratio']:.2f} ({worst['recipe']})")
    if a.json: Path(a.json).write_text(json.dumps(dict(settings=vars(a), where=where, torch=torch.__version__, rows=rows), indent=1))


if __name__ == '__main__': main()
