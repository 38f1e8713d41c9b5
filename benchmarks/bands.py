"""At which scale generated films fail: distances after everything finer than so many cycles a film is taken away, from films and generated images alike.

    python benchmarks/bands.py --data FILMS --weights squeezenet1_0.pth --runs NAME=FOLDER [NAME=FOLDER ...]

Each band has its own floor, between films of the training and of the test split. `--grain` adds what so many grey levels of noise do to the test films themselves. The JSON has one row a run and band; no picture is written."""
import argparse, math
from dataclasses import replace
from pathlib import Path

import torch

from real_films import reference

from cxr_gan.cli import load_generator
from cxr_gan.core import save_json
from cxr_gan.metrics import evaluate_images, make_extractor, table
from cxr_gan.training import sample

RESULTS = Path(__file__).resolve().parent.parent/'nbs'/'results'

def coarse(
    x, # (n,c,s,s) uint8
    cycles:float, # what is finer, in cycles a film, is taken away; infinity takes nothing
): # uint8, same shape
    "Images without their detail finer than `cycles`, by a filter whose edge is one cycle wide."
    if math.isinf(cycles): return x
    k = torch.fft.fftfreq(x.shape[-1])*x.shape[-1]
    keep = torch.sigmoid(cycles-(k[:, None]**2+k**2).sqrt())
    return torch.cat([torch.fft.ifft2(torch.fft.fft2(p.float())*keep).real.round().clamp(0, 255).to(torch.uint8) for p in x.split(512)])

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data', required=True); p.add_argument('--weights', required=True); p.add_argument('--extractor', default='squeezenet1_0')
    p.add_argument('--runs', nargs='+', required=True, metavar='NAME=FOLDER'); p.add_argument('--cycles', type=float, nargs='+', default=[8, 16, 24, math.inf])
    p.add_argument('--grain', type=float, nargs='*', default=[1, 2], help='standard deviations of the noise'); p.add_argument('--sets', type=int, default=2, help='of latents'); p.add_argument('--out', type=Path)
    a = p.parse_args()
    extractor, rows = make_extractor(a.extractor, a.weights), []
    def add(run, cycles, scores):
        rows.append(dict(run=run, cycles=None if math.isinf(cycles) else cycles, scores=[s.to_dict() for s in scores])); print(run, cycles, table(scores), sep='\n', flush=True)
    for name, folder in (r.split('=', 1) for r in a.runs):
        net, classes = load_generator(folder, 'cpu'); sets = reference(a.data, net.size, tuple(classes))
        for cycles in a.cycles:
            test, train = (replace(s, images=coarse(s.images, cycles)) for s in sets)
            add(name, cycles, evaluate_images(lambda n, y, seed: coarse(sample(net, n, y, seed)[0], cycles), test, train, extractor, latent_sets=a.sets))
    test, train = sets
    for sd in a.grain:
        noise = sd*torch.randn(test.images.shape, generator=torch.Generator().manual_seed(0))
        add(f'grain {sd:g}', math.inf, evaluate_images((test.images+noise).round().clamp(0, 255).to(torch.uint8), test, train, extractor))
    save_json(dict(rows=rows), a.out or RESULTS/f'bands_{net.size}.json')

if __name__ == '__main__': main()
