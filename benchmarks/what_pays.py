"""From `lean` to `modern`, one change at a time, on real films at equal steps: what pays and what does not.

    python benchmarks/what_pays.py --data FILMS --weights squeezenet1_0.pth --steps 1000 --seeds 0 1 2 --only lean generator

Every finished run is added to the JSON at once; a run that is there already is not repeated. No picture is written."""
import argparse, json, time
from pathlib import Path

import torch

from cxr_gan.cli import films
from cxr_gan.core import save_json
from cxr_gan.metrics import evaluate_images, make_extractor
from cxr_gan.recipes import learner, override, recipe
from cxr_gan.training import sample

RESULTS = Path(__file__).resolve().parent.parent/'nbs'/'results'
RESIDUAL, SLOWER = dict(generator='ModernGenerator', g_args=dict(norm=True)), dict(g_opt=dict(lr=5e-4, betas=(0., .99)))
CHANGES = dict( # name -> what is changed in `lean`
    lean={},
    generator=RESIDUAL,
    generator_no_norm=dict(generator='ModernGenerator'),
    generator_slower={**RESIDUAL, **SLOWER},
    slower=SLOWER,
    excitation=dict(generator='ModernGenerator', g_args=dict(norm=True, excitation=True), **SLOWER),
    attention=dict(generator='ModernGenerator', g_args=dict(norm=True, attention=16), **SLOWER),
    discriminator=dict(discriminator='ModernDiscriminator'),
    deviation=dict(discriminator='ModernDiscriminator', d_args=dict(deviation=4)),
    relativistic=dict(loss='relativistic', terms=dict(r1=1., r2=1.)),
    r1_stronger=dict(terms=dict(r1=5.)),
    r1_weaker=dict(terms=dict(r1=.1)),
    r1_lazy=dict(terms=dict(r1=dict(weight=1., every=4))),
    lecam=dict(terms=dict(r1=1., lecam=.1)),
    xray=dict(augment=dict(name='xray', p=.3)),
    adaptive=dict(augment=dict(name='adaptive', images=30_000)),
    uncertainty=dict(d_args=dict(p=.2), uncertainty=dict(mode='max', alpha=1., passes='analytic')))

def one(name, seed, train, test, steps, extractor):
    "Train one change with one seed and measure it."
    l = learner(override(recipe('lean', amp=True), **CHANGES[name]), train, train.size, seed=seed, device='cpu')
    start = time.process_time()
    with l.no_bar(), l.no_logging(): l.fit_for(steps=steps)
    seconds = (time.process_time()-start)/steps
    scores = evaluate_images(lambda n, y, s: sample(l.model.best, n, y, s)[0], test, train, extractor, latent_sets=2)
    return dict(change=name, seed=seed, steps=steps, cpu_seconds_a_step=round(seconds, 3), scores=[s.to_dict() for s in scores])

def rows(file):
    "What was measured so far."
    return json.loads(file.read_text(encoding='utf-8'))['rows'] if file.exists() else []

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data', required=True); p.add_argument('--weights', required=True); p.add_argument('--extractor', default='squeezenet1_0')
    p.add_argument('--size', type=int, default=64); p.add_argument('--steps', type=int, default=1000); p.add_argument('--seeds', type=int, nargs='+', default=[0])
    p.add_argument('--only', nargs='+', choices=CHANGES, default=list(CHANGES)); p.add_argument('--threads', type=int, default=1)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    extractor, out = make_extractor(a.extractor, a.weights), RESULTS/f'what_pays_{a.size}.json'
    train, test = (films(a.data, a.size, part) for part in ('train', 'test'))
    for seed in a.seeds:
        for name in a.only:
            if any((r['change'], r['seed'], r['steps']) == (name, seed, a.steps) for r in rows(out)): continue
            row = one(name, seed, train, test, a.steps, extractor)
            save_json(dict(rows=[*rows(out), row]), out)
            print(name, seed, row['cpu_seconds_a_step'], {s['metric']: round(s['value'], 3) for s in row['scores']}, flush=True)

if __name__ == '__main__': main()
