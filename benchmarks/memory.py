"""Peak memory of reading films, of a training step and of metrics, each in a fresh process, above what the imported package takes.

    python benchmarks/memory.py [--only data step metrics] [--device cpu] [--threads 1] [--weights squeezenet1_0.pth] [--most GIB]

data: read n PNG files of phantoms (300 of 256 pixels, linked under n names), take the training part, which is four fifths of each class, go
through it once in batches of 64; in memory and mapped. step: two steps of a recipe, for its batch size in place of n. metrics: features of n films,
and distances between two tables of n rows. Films of the last two are random bytes, their features random numbers: only memory is looked at.

`peak_mib` is the growth of the process's resident memory at its highest, as Linux counts it (VmHWM), or on CUDA of what torch had allocated.
`own_mib` leaves out pages of mapped files, which the system takes back when it needs them; it is looked at every 2 ms. Films made for a metric are
there before its growth is counted. A row is written as soon as it is measured, and one that is there is not repeated; a process that asks for more than --most is not written."""
import argparse, json, os, shutil, subprocess, sys, tempfile, time, warnings
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent/'nbs'/'results'/'memory.json'
SIZES, FILMS, BATCHES = (64, 128, 256), (1000, 4000, 20_000), (4, 16, 64)
PLAN = dict( # kind -> (way, n or batch size, size of the films or None)
    data=[(way, n, size) for n in FILMS for size in SIZES for way in ('resident', 'mapped')],
    step=[(name, bs, size) for bs in BATCHES for size in SIZES for name in ('lean', 'cgan_max')],
    metrics=[*(('pixels', n, size) for n in FILMS for size in SIZES), *(('squeezenet1_0', FILMS[0], size) for size in SIZES), *((f, n, None) for n in FILMS for f in ('frechet_distance', 'kernel_distance', 'precision_recall'))])

def status(pid='self'):
    "MiB of a process by the name of the line."
    rows = (l.split() for l in Path(f'/proc/{pid}/status').read_text().splitlines())
    return {r[0][:-1]: int(r[1])/1024 for r in rows if r[-1] == 'kB'}

def write_films(root, n):
    "Phantoms of 256 pixels in class folders with a training and a test part, n names for 300 files."
    from cxr_gan.core import save_png
    from cxr_gan.phantom import CLASSES, make_phantoms
    p = make_phantoms(300, size=256, seed=0)
    for i in range(n):
        f = root/CLASSES[int(p.labels[i%300])]/('test' if i//3 % 5 == 0 else 'train')/f'{i}.png'; f.parent.mkdir(parents=True, exist_ok=True)
        if i < 300: save_png(p.images[i], f)
        else: os.link(next(root.glob(f'*/*/{i%300}.png')), f)

def reading(way, n, size, a):
    "What the command line does with a folder of films."
    from cxr_gan.data import ResidentLoader, read_images
    def run():
        s = read_images(Path(a.folder)/str(n), size, cache=Path(a.folder)/'cache', workers=a.threads, progress=False, mapped=way == 'mapped').part('train')
        for _ in ResidentLoader(s, 64, device=a.device): pass
    return run

def step(name, bs, size, a):
    "Two steps: in the second the optimisers have their averages."
    import torch
    from cxr_gan.data import ImageSet
    from cxr_gan.recipes import learner, recipe
    s = ImageSet(torch.randint(0, 256, (bs, 1, size, size), dtype=torch.uint8), torch.arange(bs) % 3, ['normal', 'covid', 'viral_pneumonia'])
    def run():
        l = learner(recipe(name, bs=bs), s, size, device=a.device)
        with l.no_bar(), l.no_logging(): l.fit_for(steps=2)
    return run

def metric(name, n, size, a):
    "Features of n films, or a distance of two tables of n rows with the dimensions of SqueezeNet's."
    import torch
    from cxr_gan import metrics
    if size is None: two = torch.randn(2, n, 512); return lambda: getattr(metrics, name)(*two)
    x, extractor = torch.randint(0, 256, (n, 1, size, size), dtype=torch.uint8), metrics.make_extractor(name, None if name == 'pixels' else a.weights, device=a.device)
    return lambda: extractor(x)

def measure(kind, way, n, size, a):
    "In a process of its own: say when it begins, do it, say how far it got."
    import resource, torch
    warnings.filterwarnings('ignore')
    import cxr_gan.cli, cxr_gan.data, cxr_gan.metrics, cxr_gan.recipes # what every command has
    torch.set_num_threads(a.threads)
    run = dict(data=reading, step=step, metrics=metric)[kind](way, n, size, a)
    resource.setrlimit(resource.RLIMIT_DATA, (int(a.most*2**30),)*2)
    if cuda := a.device.startswith('cuda'): torch.zeros(1, device=a.device); torch.cuda.reset_peak_memory_stats(a.device)
    Path('/proc/self/clear_refs').write_text('5') # the highest so far is forgotten
    before, held = status(), torch.cuda.memory_allocated(a.device) if cuda else 0
    print(json.dumps(dict(own=before['RssAnon'])), flush=True)
    run()
    peak = (torch.cuda.max_memory_allocated(a.device)-held)/2**20 if cuda else status()['VmHWM']-before['VmRSS']
    print(json.dumps(dict(peak=peak, torch=torch.__version__)), flush=True)

def watch(kind, way, n, size, a):
    "Start that process and look at it until it ends: one row, or None where it wanted too much."
    args = ['--one', kind, way, str(n), str(size or 0), '--folder', str(a.folder), '--device', a.device, '--threads', str(a.threads), '--most', str(a.most), '--weights', a.weights or '']
    env = dict(os.environ, OMP_NUM_THREADS=str(a.threads), MKL_NUM_THREADS=str(a.threads))
    with subprocess.Popen([sys.executable, __file__, *args], stdout=subprocess.PIPE, text=True, env=env) as p:
        first, own = p.stdout.readline(), 0.
        while p.poll() is None:
            own = max(own, status(p.pid).get('RssAnon', 0.)); time.sleep(.002)
        last = p.stdout.readline()
    if p.returncode: return None
    last = json.loads(last)
    return dict(kind=kind, way=way, n=n, size=size, peak_mib=round(last['peak'], 1), own_mib=round(max(0., own-json.loads(first)['own']), 1), device=a.device, threads=a.threads, torch=last['torch'])

def rows():
    "What was measured so far."
    return json.loads(OUT.read_text(encoding='utf-8'))['rows'] if OUT.exists() else []

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='+', choices=PLAN, default=list(PLAN)); p.add_argument('--device', default='cpu'); p.add_argument('--threads', type=int, default=1)
    p.add_argument('--weights', help='of SqueezeNet 1.0; without them its rows are left out'); p.add_argument('--most', type=float, help='GiB a process may ask for; half of what is free if left out')
    p.add_argument('--folder', help='for the films; the system\'s temporary folder if left out'); p.add_argument('--one', nargs=4, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one: return measure(a.one[0], a.one[1], int(a.one[2]), int(a.one[3]) or None, a)
    from cxr_gan.core import save_json
    from cxr_gan.data import _free_memory
    a.most = a.most or _free_memory()/2**31
    with tempfile.TemporaryDirectory(dir=a.folder) as a.folder:
        for kind, way, n, size in ((k, *row) for k in a.only for row in PLAN[k]):
            if any((r['kind'], r['way'], r['n'], r['size'], r['device']) == (kind, way, n, size, a.device) for r in rows()): continue
            if way == 'squeezenet1_0' and not a.weights: continue
            if kind == 'data' and not (Path(a.folder)/str(n)).exists(): write_films(Path(a.folder)/str(n), n)
            row = watch(kind, way, n, size, a); shutil.rmtree(Path(a.folder)/'cache', ignore_errors=True)
            if row: save_json(dict(rows=[*rows(), row]), OUT)
            print(row or f'{kind} {way} {n} {size}: more than {a.most:.1f} GiB, or it failed', flush=True)

if __name__ == '__main__': main()
