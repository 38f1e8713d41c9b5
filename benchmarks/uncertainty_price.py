"""What an estimate of the discriminator's uncertainty costs and how far off it is: a training step with it over a plain step, and the error of U.

    python benchmarks/uncertainty_price.py [--size 64] [--bs 32] [--width 24] [--blocks 9] [--steps 4] [--train 300] [--threads 1] [--device cpu]

One lean discriminator, its dropout in one of three places: before the head, after the last convolution too, after every convolution. `cost` is the median
over blocks of --steps training steps of (with the estimate) / (without, same networks, same dropout); blocks alternate in one process. `error` is the root
mean square over films and repeats of (estimate - truth), `bias` its mean; the truth being the mean over 4,096 passes of a discriminator trained for --train steps on phantoms."""
import argparse, json, statistics, time
from pathlib import Path

import torch
from torch import nn

from cxr_gan.architectures import LeanDiscriminator, LeanGenerator, MCDropout
from cxr_gan.core import save_json, set_seed
from cxr_gan.data import phantom_set, resident_loaders
from cxr_gan.training import GANLearner, OptSettings
from cxr_gan.uncertainty import Uncertainty

OUT = Path(__file__).resolve().parent.parent/'nbs'/'results'/'uncertainty_price.json'
PLACES = ('head', 'tail', 'every layer')
def batched(T, estimator='plug_in'): return dict(T=T, passes='batched', estimator=estimator)
ESTIMATES = { # place -> name -> how to ask
    'head': {'analytic': dict(passes='analytic'), 'vmap T=10': dict(T=10, passes='vmap'), 'vmap T=2 unbiased': dict(T=2, passes='vmap', estimator='unbiased'), 'batched T=10': batched(10)},
    'tail': {'vmap T=10': dict(T=10, passes='vmap'), 'vmap T=2 unbiased': dict(T=2, passes='vmap', estimator='unbiased'), 'batched T=10': batched(10)},
    'every layer': {'T=2': batched(2), 'T=2 unbiased': batched(2, 'unbiased'), 'T=4': batched(4), 'T=10': batched(10)}}

class Placed(LeanDiscriminator):
    "A lean discriminator with dropout where `place` says."
    def __init__(self, size=64, channels=1, n_classes=3, width=24, p=.2, place='head'):
        super().__init__(size, channels, n_classes, width, p=p)
        self.config['place'] = place
        acts = [i for i, m in enumerate(self.body) if isinstance(m, nn.LeakyReLU)]
        after = dict(zip(PLACES, ([], acts[-1:], acts)))[place]
        self.body = nn.Sequential(*[l for i, m in enumerate(self.body) for l in (m, *([MCDropout(p)] if i in after else []))])

def make(place, a, uncertainty, seed=0):
    "A learner with the dropout in one place."
    set_seed(seed)
    opt = OptSettings(1e-3, (0., .99))
    return GANLearner(resident_loaders(phantom_set(600, a.size), bs=a.bs, device=a.device, drop_last=True), LeanGenerator(a.size, width=a.width), Placed(a.size, width=a.width, place=place), uncertainty=uncertainty, d_opt=opt, g_opt=opt, terms=dict(r1=1.))

def clock(device):
    "Seconds, once the device is done."
    if device.startswith('cuda'): torch.cuda.synchronize(device)
    return time.perf_counter()

def seconds(l, steps, device):
    "Of a step."
    start = clock(device)
    with l.no_bar(), l.no_logging(): l.fit_for(steps=l.steps+steps)
    return (clock(device)-start)/steps

@torch.no_grad()
def errors(net, films, labels, how, truth, repeats):
    "Root mean square error of U over films and repeats, and the part of it that repeating does not remove: the mean error."
    u = torch.stack([Uncertainty(**how).judge(net, films, labels).u for _ in range(1 if how.get('passes') == 'analytic' else repeats)])
    return dict(error=float((u-truth).square().mean().sqrt()), bias=float((u-truth).mean()))

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(size=64, bs=32, width=24, blocks=9, steps=4, train=300, threads=1).items(): p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--device', default='cpu'); p.add_argument('--out', type=Path, default=OUT)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    rows = []
    for place in PLACES:
        l = make(place, a, None); seconds(l, a.train, a.device)
        net = l.discriminator.eval(); x, y = l.dls.train.one_batch()
        with torch.no_grad(): truth = torch.stack([net(x, y).logit.sigmoid() for _ in range(4096)]).mean(0); truth = truth*(1-truth)
        plain, ways = make(place, a, None), {name: make(place, a, Uncertainty(**how)) for name, how in ESTIMATES[place].items()}
        for w in (plain, *ways.values()): seconds(w, 2, a.device) # warm up
        ratios = {name: [] for name in ways}
        for _ in range(a.blocks):
            for name, w in ways.items(): base, cost = seconds(plain, a.steps, a.device), seconds(w, a.steps, a.device); ratios[name].append(cost/base)
        for name, how in ESTIMATES[place].items():
            rows.append(dict(place=place, estimate=name, cost=round(statistics.median(ratios[name]), 3), cost_low=round(min(ratios[name]), 3), cost_high=round(max(ratios[name]), 3), **errors(net, x, y, how, truth, 200)))
            print(json.dumps(rows[-1]), flush=True)
    save_json(dict(size=a.size, bs=a.bs, width=a.width, train=a.train, device=a.device, threads=a.threads, torch=torch.__version__, mean_u=float(truth.mean()), rows=rows), a.out)

if __name__ == '__main__': main()
