"Phantoms a second: `make_phantoms` against the same shapes evaluated one by one on the whole film. Prints a table; run it as `python benchmarks/phantom_speed.py`."
import argparse, time

import torch
import torch.nn.functional as F

from cxr_gan import phantom
from cxr_gan.phantom import FIELD, ellipsoid_chord, make_phantoms


def naive_tubes(points, radius, size, field=FIELD, hollow=0., reach=None):
    "What `tubes` does, every bead a disc on the whole film."
    points, r = phantom._dense(points, size), phantom._dense(radius.expand(points.shape[:3])[..., None], size)[..., 0]
    px, m = field/size, 8+size//32 # a margin, for what hangs over the edge
    film, g = torch.zeros(len(points), size+2*m, size+2*m), (torch.arange(-m, size+m)+.5)*(field/size)-field/2
    step = points.diff(dim=2).square().sum(-1).sqrt()/2
    mass = (F.pad(step, (1, 0))+F.pad(step, (0, 1)))*r.square()*(torch.pi/px**2)
    for i in range(len(points)):
        for (x, y, _), rad, bead in zip(points[i].flatten(0, 1).tolist(), r[i].flatten().tolist(), mass[i].flatten().tolist()):
            d = ((g-x).square()[None]+(g-y).square()[:, None]).sqrt()/px
            wide = max(rad/px, .5)
            w = (wide+.5-d).clamp(0, 1)-hollow*(.7*wide+.5-d).clamp(0, 1)
            if (total := w.sum().item()) > 0: film[i] += w*(bead/total)
    return film[:, m:-m, m:-m]


def naive_blobs(points, semi, angle, size, field=FIELD, solid=False, reach=None):
    "What `blobs` does, every ellipsoid on the whole film."
    film, g = torch.zeros(len(points), size, size), (torch.arange(size)+.5)*(field/size)-field/2
    for i in range(len(points)):
        for p, s, a in zip(points[i].tolist(), semi[i].tolist(), angle[i].tolist()):
            chord = ellipsoid_chord(g[None], g[:, None], p, s, a)
            film[i] += chord if solid or not s[2] else (chord/(2*s[2]))**3*(4/3*s[2])
    return film


def naive_phantoms(n, size, seed=0):
    "One film at a time, every shape on the whole film."
    fast = phantom.tubes, phantom.blobs
    phantom.tubes, phantom.blobs = naive_tubes, naive_blobs
    try: return torch.cat([phantom._batch(seed, [i], torch.tensor([i % 3]), size)[0] for i in range(n)])
    finally: phantom.tubes, phantom.blobs = fast


def rate(f, n, repeats):
    "Best of several runs, films a second."
    times = []
    for _ in range(repeats):
        t = time.perf_counter(); f(n); times.append(time.perf_counter()-t)
    return n/min(times)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--n', type=int, default=200); p.add_argument('--naive', type=int, default=6); p.add_argument('--threads', type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    print(f'{a.threads} threads, best of 3\n{"size":>5} {"make_phantoms/s":>16} {"naive/s":>9} {"ratio":>7} {"largest difference":>19}')
    for size in (32, 64, 128):
        quick, slow = rate(lambda n: make_phantoms(n, size), a.n, 3), rate(lambda n: naive_phantoms(n, size), a.naive, 1)
        gap = (make_phantoms(a.naive, size).images.int()-naive_phantoms(a.naive, size).int()).abs().max().item()
        print(f'{size:5d} {quick:16.0f} {slow:9.2f} {quick/slow:7.0f} {gap:16d}/255')
