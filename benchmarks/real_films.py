"""Measure trained runs against real films and write what the notebooks show: numbers as JSON, generated films as PNG.

    cxr-gan train lean_max --data FILMS --size 64 --amp --steps 10000 --out RUNS/lean_max      # and so on, one folder a recipe
    python benchmarks/real_films.py --data FILMS --runs RUNS --weights squeezenet1_0.pth
    python benchmarks/real_films.py --data FILMS --runs OTHER_SEEDS --weights squeezenet1_0.pth --name seeds --no-pictures

No picture of a real film is written."""
import argparse, json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from cxr_gan.cli import films, load_generator
from cxr_gan.core import save_json, save_png, tile
from cxr_gan.health import copies, judge_films, look_at_curves, measure_films
from cxr_gan.losses import objective
from cxr_gan.metrics import evaluate_images, make_extractor, table
from cxr_gan.training import decoder_maps, load_network, read_history, sample

NBS = Path(__file__).resolve().parent.parent/'nbs'
KEPT = ('d_acc_real', 'd_acc_fake', 'd_loss', 'g_loss', 'u_real', 'u_fake', 'r1') # curves worth a picture, where a run has them

def thin(values, points=60):
    "Means of consecutive stretches, rounded: a curve small enough to commit."
    return [round(float(v.mean()), 4) for v in np.array_split(np.asarray(values, dtype=float), min(points, len(values)))]

def draw(run, net, name):
    "A sheet of generated films, a row a class; with the maps of a discriminator that judges pixels."
    rows = max(net.n_classes, 1); y = torch.arange(rows).repeat_interleave(8) if net.n_classes else None
    x, y = sample(net, 8*rows, y, seed=1)
    save_png(tile(x, 8), NBS/'images'/f'{name}_{net.size}.png')
    if not (run/'discriminator').is_dir(): return
    judge, _ = load_network(run/'discriminator')
    try: maps = decoder_maps(judge, x, y)
    except TypeError: return
    few = torch.arange(0, len(x), max(1, len(x)//8))[:8]
    save_png(tile(torch.cat([x[few], maps[few]]), 8), NBS/'images'/f'{name}_maps_{net.size}.png')

def draw_wide(net, name, truncations):
    "The same latents at every truncation, a row each, four films a class."
    n = 4*max(net.n_classes, 1); y = torch.arange(n)//4 if net.n_classes else None
    save_png(tile(torch.cat([sample(net, n, y, seed=1, truncation=psi)[0] for psi in truncations]), n), NBS/'images'/f'{name}_wide_{net.size}.png')

@lru_cache(None)
def reference(data, size, classes):
    "The test and the training films that a run is measured with, read once for all runs of their kind."
    return tuple(films(data, size, part, list(classes) or None) for part in ('test', 'train'))

def measure(run, data, extractor, sets, pictures, truncations=(), which='generator'): # pictures: how their names begin, or None for none; which: folder of the generator
    "One row: what was trained, how it scores, its curves and its health; with `pictures` its sheet of films is written beside."
    plan, meta = (json.loads((run/f).read_text(encoding='utf-8')) for f in ('run.json', f'{which}/config.json'))
    net, classes = load_generator(run/which, 'cpu')
    test, train = reference(data, net.size, tuple(classes))
    def scored(psi): return evaluate_images(lambda n, y, s: sample(net, n, y if net.n_classes else None, s, truncation=psi)[0], test, train, extractor, latent_sets=sets)
    scores, r, history = scored(1.), plan['recipe'], read_history(run/'history.csv')
    if pictures is not None:
        draw(run, net, pictures+r['name'])
        if truncations: draw_wide(net, pictures+r['name'], (1., *truncations))
    def seen_at(psi, limits=None): return measure_films(*sample(net, 480, seed=2, truncation=psi), train, test, limits)
    seen = seen_at(1.); limits = seen.copies.limits
    null = copies(test.images, train.images, limits=limits) # the same for real films of other patients
    def aside(psi): f = seen_at(psi, limits); return {s.metric: s.value for s in scored(psi)} | dict(copies=f.copies.share, diversity=f.diversity, health=[q.kind for q in judge_films(f)])
    found = look_at_curves(history, anchored=objective(r['loss']).anchored)+judge_films(seen)
    print(f"{run.name}\n{table(scores)}\n{[f.kind for f in found]}", flush=True)
    return dict(recipe=r['name'], width=r['width'], bs=r['bs'], amp=r['amp'], T=(r['uncertainty'] or {}).get('T'), steps=meta['steps'], seed=plan['seed'], classes=classes, films=plan['films'], health=sorted({f.kind for f in found}), diversity=seen.diversity, copies={k: dict(share=c.share, nearest=float(c.distance.median())) for k, c in dict(generated=seen.copies, held_out=null).items()},
        scores=[s.to_dict() for s in scores], truncation={psi: aside(psi) for psi in truncations}, curves={k: thin(history[k]) for k in KEPT if k in history}), scores

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for a in ('--data', '--runs', '--weights'): p.add_argument(a, required=True)
    p.add_argument('--extractor', default='squeezenet1_0'); p.add_argument('--sets', type=int, default=5); p.add_argument('--device-name', default='CPU')
    p.add_argument('--name', default='real_films', help='of the JSON file'); p.add_argument('--minutes', type=float, help='the budget of each run, for the record'); p.add_argument('--no-pictures', action='store_true')
    p.add_argument('--truncation', type=float, nargs='+', default=[], help='factors on the latents to measure as well')
    p.add_argument('--generator', default='generator', help='its folder in each run, e.g. ensemble')
    a = p.parse_args()
    extractor, rows = make_extractor(a.extractor, a.weights), []
    pictures = None if a.no_pictures else '' if a.name == 'real_films' else f'{a.name}_'
    for run in sorted(r for r in Path(a.runs).iterdir() if (r/a.generator/'config.json').exists()):
        name = json.loads((run/'run.json').read_text(encoding='utf-8'))['recipe']['name'] # of several seeds the first is drawn
        row, scores = measure(run, a.data, extractor, a.sets, None if name in [r['recipe'] for r in rows] else pictures, a.truncation, a.generator); rows.append(row)
    if not rows: raise SystemExit(f'{a.runs}: found no finished run, expected folders written by cxr-gan train')
    s, seeds = scores[0], ', '.join(map(str, sorted({r['seed'] for r in rows})))
    caption = (f'{s.n_fake} generated films in each of {s.sets} sets of fresh latents (mean ± population standard deviation over the sets) against the {s.n_real} films of the test split, both at {s.size} pixels; '
        f'features: {s.extractor}, {s.d} dimensions, input {s.resize}, weights {s.weights}; seed {seeds}, **one seed for each row**; {a.device_name}. '
        f'The first row is the floor: {s.n_fake} real training films in the same class proportions.')
    out = NBS/'results'/f'{a.name}_{s.size}.json'
    save_json(dict(metrics=[s.metric for s in scores], floor={s.metric: s.floor for s in scores}, rows=rows, caption=caption, minutes=a.minutes), out)
    print(out.name)

if __name__ == '__main__': main()
