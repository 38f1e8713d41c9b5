"""From `lean` to `modern`, one change at a time, on real films in equal CPU time: what pays and what does not.

    python benchmarks/what_pays.py --data FILMS --weights squeezenet1_0.pth --minutes 5 --seeds 0 1 2 --only lean modern

The learning rates stay constant here: their decay belongs to a full training. Every finished run is added to the JSON at once;
a run that is there already is not repeated. No picture is written."""
import argparse, json, time
from pathlib import Path

import torch
from fastai.callback.core import Callback

from cxr_gan.cli import films
from cxr_gan.core import save_json
from cxr_gan.metrics import evaluate_images, make_extractor
from cxr_gan.recipes import learner, override, recipe
from cxr_gan.training import sample

RESULTS = Path(__file__).resolve().parent.parent/'nbs'/'results'
def rate(lr): return dict(lr=lr, betas=(0., .99))
PATH = dict( # name -> what is changed in `lean`, one more thing each time
    lean={},
    generator=dict(generator='ModernGenerator', g_args=dict(norm=True)),
    slower=dict(generator='ModernGenerator', g_args=dict(norm=True), g_opt=rate(5e-4)),
    lazy=dict(generator='ModernGenerator', g_args=dict(norm=True), g_opt=rate(5e-4), terms=dict(r1=dict(weight=1., every=4))))
CHANGES = dict( # name -> one thing that is changed in the last of the path
    no_norm=dict(g_args={}),
    excitation=dict(g_args=dict(norm=True, excitation=True)),
    attention=dict(g_args=dict(norm=True, attention=16)),
    discriminator=dict(discriminator='ModernDiscriminator', d_opt=rate(5e-4)),
    deviation=dict(discriminator='ModernDiscriminator', d_opt=rate(5e-4), d_args=dict(deviation=4)),
    packed=dict(discriminator='PackedDiscriminator'),
    naming=dict(discriminator='ModernDiscriminator', d_opt=rate(5e-4), d_args=dict(classes=True), terms=dict(r1=dict(weight=1., every=4), classes=1.)),
    relativistic=dict(loss='relativistic', d_opt=rate(5e-4), terms=dict(r1=dict(weight=1., every=4), r2=dict(weight=1., every=4))),
    r1_stronger=dict(terms=dict(r1=dict(weight=5., every=4))),
    r1_weaker=dict(terms=dict(r1=dict(weight=.1, every=4)), d_opt=rate(5e-4)),
    lecam=dict(terms=dict(r1=dict(weight=1., every=4), lecam=.1)),
    xray=dict(augment=dict(name='xray', p=.3)),
    adaptive=dict(augment=dict(name='adaptive', images=30_000)),
    emphasis=dict(terms=dict(r1=dict(weight=5., every=4)), augment=dict(name='emphasis', gain=10.)),
    uncertainty=dict(d_args=dict(p=.2), uncertainty=dict(mode='max', alpha=1., passes='analytic')),
    batch_64=dict(bs=64),
    batch_16=dict(bs=16))
NAMES = [*PATH, *CHANGES]

def changed(name):
    "`lean` with the changes that go by this name."
    return override(recipe('lean', amp=True), **(PATH[name] if name in PATH else {**PATH['lazy'], **CHANGES[name]}))

class Spend(Callback):
    "Stop after so many minutes of CPU time."
    def __init__(self, minutes): self.seconds, self.start = 60*minutes, time.process_time()
    def after_batch(self): self.learn.stop |= time.process_time()-self.start >= self.seconds

def one(name, seed, train, test, minutes, extractor):
    "Train one change with one seed and measure it."
    l = learner(changed(name), train, train.size, seed=seed, device='cpu')
    with l.no_bar(), l.no_logging(): l.fit_for(steps=10**9, cbs=[Spend(minutes)])
    scores = evaluate_images(lambda n, y, s: sample(l.model.best, n, y, s)[0], test, train, extractor, latent_sets=2)
    return dict(change=name, seed=seed, cpu_minutes=minutes, steps=l.steps, scores=[s.to_dict() for s in scores])

def rows(file):
    "What was measured so far."
    return json.loads(file.read_text(encoding='utf-8'))['rows'] if file.exists() else []

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data', required=True); p.add_argument('--weights', required=True); p.add_argument('--extractor', default='squeezenet1_0')
    p.add_argument('--size', type=int, default=64); p.add_argument('--minutes', type=float, default=5., help='of CPU time, all threads together'); p.add_argument('--seeds', type=int, nargs='+', default=[0])
    p.add_argument('--only', nargs='+', choices=NAMES, default=NAMES); p.add_argument('--threads', type=int, default=1); p.add_argument('--out', type=Path)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    extractor, out = make_extractor(a.extractor, a.weights), a.out or RESULTS/f'what_pays_{a.size}.json'
    train, test = (films(a.data, a.size, part) for part in ('train', 'test'))
    for seed in a.seeds:
        for name in a.only:
            if any((r['change'], r['seed'], r['cpu_minutes']) == (name, seed, a.minutes) for r in rows(out)): continue
            row = one(name, seed, train, test, a.minutes, extractor)
            save_json(dict(rows=[*rows(out), row]), out)
            print(name, seed, row['steps'], {s['metric']: round(s['value'], 3) for s in row['scores']}, flush=True)

if __name__ == '__main__': main()
