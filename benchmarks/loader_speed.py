"""Images a second: `ResidentLoader` against fastai's decode-per-epoch path, on PNG files of phantoms.

    python benchmarks/loader_speed.py [--n 1200] [--size 128] [--turns 3]

Every loader hands out the same films at the same size as float batches in [-1,1] or [0,1]. Ratios are of medians over turns in one process, a second or an epoch each."""
import argparse, statistics, tempfile, time, warnings
from pathlib import Path

import torch
from PIL import Image


def write_films(root, n):
    "PNG phantoms of 256 to 300 pixels in class folders."
    from cxr_gan.phantom import CLASSES, make_phantoms
    p = make_phantoms(n, size=256, seed=0)
    for i, (x, y) in enumerate(zip(p.images, p.labels.tolist())):
        side = 256+i % 45
        path = root/CLASSES[y]/f'{CLASSES[y]}-{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[0].numpy()).resize((side, side), Image.BILINEAR).save(path)


def speed_of(loader, seconds=1.):
    "Images a second over whole epochs, at least one and at least `seconds` long."
    t, n = time.perf_counter(), 0
    while n == 0 or time.perf_counter()-t < seconds:
        for x, y in loader: n += len(x)
    if x.is_cuda: torch.cuda.synchronize()
    return n/(time.perf_counter()-t)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--n', type=int, default=1200); a.add_argument('--size', type=int, default=128); a.add_argument('--bs', type=int, default=64)
    a.add_argument('--turns', type=int, default=3); a.add_argument('--device', default='cpu')
    a = a.parse_args()
    warnings.filterwarnings('ignore')
    from fastai.data.transforms import parent_label
    from fastai.vision.core import PILImageBW
    from fastai.vision.augment import Resize, ResizeMethod
    from fastai.data.block import CategoryBlock, DataBlock
    from fastai.data.transforms import get_image_files
    from fastai.vision.data import ImageBlock
    from cxr_gan.data import ResidentLoader, read_images
    with tempfile.TemporaryDirectory() as d:
        write_films(Path(d)/'films', a.n)
        block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=lambda o: (list(range(len(o))), [0]),
                          item_tfms=Resize(a.size, method=ResizeMethod.Squish))
        fastai = {w: block.dataloaders(Path(d)/'films', bs=a.bs, num_workers=w, device=torch.device(a.device), drop_last=False).train for w in (0, 2)}
        t = time.perf_counter(); films = read_images(Path(d)/'films', size=a.size, cache=Path(d)/'cache', progress=False); first = time.perf_counter()-t
        t = time.perf_counter(); read_images(Path(d)/'films', size=a.size, cache=Path(d)/'cache', progress=False); again = time.perf_counter()-t
        loaders = {'fastai, 0 workers': fastai[0], 'fastai, 2 workers': fastai[2], 'ResidentLoader': ResidentLoader(films, bs=a.bs, device=a.device)}
        for dl in loaders.values(): speed_of(dl, 0) # warm up
        speed = {k: [] for k in loaders}
        for _ in range(a.turns):
            for k, dl in loaders.items(): speed[k].append(speed_of(dl))
    mid = {k: statistics.median(v) for k, v in speed.items()}
    print(f'{a.n} PNG of 256-300 px -> {a.size} px, batches of {a.bs}, {a.device}, {torch.get_num_threads()} torch threads, torch {torch.__version__}, median of {a.turns} turns')
    print(f"{'loader':20}{'images/s':>10}{'least':>10}{'most':>10}{'Resident is faster by':>24}")
    for k, v in speed.items(): print(f"{k:20}{mid[k]:10.0f}{min(v):10.0f}{max(v):10.0f}{mid['ResidentLoader']/mid[k]:23.1f}x")
    print(f'reading the folder once: {first:.2f} s; from the cache: {again:.3f} s')


if __name__ == '__main__': main()
