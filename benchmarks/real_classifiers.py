"""Do a run's films help a classifier of real films? Real-only against half-batches at equal steps, several seeds, into nbs/results/classifiers_NAME_SIZE.json; what a file has already is not trained again.

    python benchmarks/real_classifiers.py --data FILMS --name small
    python benchmarks/real_classifiers.py --data FILMS --name squeezenet_frozen --network squeezenet1_0 --weights squeezenet1_0.pth --frozen --lr 1e-3 --epochs 8
    python benchmarks/real_classifiers.py --data FILMS --name small --run RUNS/modern --arm half generated      # later, when there is a generator

Films of one size for all arms, brought to the network's input by the same path. No film is written."""
import argparse, hashlib, json, time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from cxr_gan.audit import shortcut_baselines, shortcut_line
from cxr_gan.classification import run_arms
from cxr_gan.classifiers import make_classifier
from cxr_gan.cli import films, load_run
from cxr_gan.core import save_json
from cxr_gan.data import ImageSet
from cxr_gan.training import sample

NBS = Path(__file__).resolve().parent.parent/'nbs'

class Remember(nn.Module):
    "A frozen body that looks at a film once, however many epochs, seeds and arms it comes in."
    seen = {}
    def __init__(self, body): super().__init__(); self.body = body
    @torch.no_grad()
    def forward(self, x):
        keys = [hashlib.sha256(row.cpu().numpy().tobytes()).digest() for row in x]
        if new := [i for i, k in enumerate(keys) if k not in self.seen]: self.seen.update(zip([keys[i] for i in new], self.body(x[new]).clone()))
        return torch.stack([self.seen[k] for k in keys])

def network(k, channels, name, weights, frozen, side, keras):
    "As `make_classifier`; `keras`: weights that want [-1,1] and films upside down, and whose batch norm was folded into the convolutions."
    if name == 'small': return make_classifier('small', k, channels)
    net = make_classifier(name, k, channels, weights, frozen, side)
    if frozen: net.net.features = Remember(net.net.features)
    if keras:
        net.mean.fill_(.5); net.std.fill_(.5); net.frozen = True; net.train() # the statistics are not data's: they stay
        net.register_forward_pre_hook(lambda m, x: (x[0].flip(2, 3),))
    return net

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data', required=True); p.add_argument('--name', required=True, help='of the JSON file'); p.add_argument('--run', help='folder of a finished training, for the arms with generated films'); p.add_argument('--pool', type=int, default=10_000, help='generated films, made once')
    p.add_argument('--network', default='small'); p.add_argument('--weights'); p.add_argument('--frozen', action='store_true'); p.add_argument('--keras', action='store_true', help='the weights were converted from Keras: see the code')
    p.add_argument('--size', type=int, default=64, help='of all films'); p.add_argument('--side', type=int, default=96, help="of the network's input"); p.add_argument('--arm', nargs='+', default=['real']); p.add_argument('--seed', type=int, nargs='+', default=[0, 1, 2, 3, 4])
    p.add_argument('--epochs', type=int, default=16); p.add_argument('--lr', type=float, default=1e-2); p.add_argument('--bs', type=int, default=32); p.add_argument('--device', default='cpu')
    a = p.parse_args()
    train, test = (films(a.data, a.size, part) for part in ('train', 'test'))
    r = load_run(a.run, a.device) if a.run else None
    made = r and ImageSet(*sample(r.generator, a.pool, torch.arange(a.pool) % len(r.classes), seed=0), r.classes)
    setting = dict(network=a.network, body='from scratch' if not a.weights else 'frozen' if a.frozen else 'fine-tuned', side=a.side if a.network != 'small' else a.size, epochs=a.epochs, lr=a.lr, bs=a.bs, size=a.size, device=a.device)
    out = NBS/'results'/f'classifiers_{a.name}_{a.size}.json'
    kept = json.loads(out.read_text(encoding='utf-8')) if out.is_file() else dict(setting=setting, classes=list(test.classes), labels=''.join(map(str, test.labels.tolist())), shortcuts=shortcut_line(shortcut_baselines(train, test)), rows=[])
    if kept['setting'] != setting: raise SystemExit(f"{out.name} holds runs of {kept['setting']}, asked for {setting}: choose another --name")
    if r: kept['generator'] = dict(recipe=r.recipe.name, steps=r.steps, seed=r.plan['seed'], films=a.pool)
    for seed in a.seed:
        for arm in a.arm:
            if any((q['arm'], q['seed']) == (arm, seed) for q in kept['rows']): continue
            start = time.monotonic()
            q, = run_arms(train, test, made, arm, (seed,), a.epochs, a.bs, a.lr, valid=0, network=partial(network, name=a.network, weights=a.weights, frozen=a.frozen, side=a.side, keras=a.keras), device=a.device)
            kept['rows'].append({**{k: v for k, v in q.to_dict().items() if k not in ('classes', 'network', 'size', 'bs', 'curve')}, 'answers': ''.join(map(str, q.answers)), 'seconds': round(time.monotonic()-start)})
            save_json(kept, out); print(f'{a.name} {arm} seed {seed}: accuracy {q.accuracy:.4f}, {time.monotonic()-start:.0f} s', flush=True)

if __name__ == '__main__': main()
